"""Every format in which weights come: torch's of old, TorchScript, safetensors, a bare tensor."""

import io
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import needs
import servers
from anemoi_ckpt import (
    CorruptError,
    MissingPackageError,
    NotACheckpointError,
    download,
    load,
    load_into,
    peek,
    save,
)
from checkpoints import as_bytes, assert_same, odd_checkpoint
from strategies import include, weights

MEGABYTE = 10**6


def legacy(obj: object) -> bytes:
    return as_bytes(obj, _use_new_zipfile_serialization=False)


def of_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=needs.SAFE)


# ── torch's zip ───────────────────────────────────────────────────────────────────────────────


def without_crc(data: bytes, record: str) -> bytes:
    """What `torch.serialization.skip_data` writes: the CRC-32 of a record is zero."""
    name = record.encode()
    changed = bytearray(data)
    local, central = data.index(name) - 30, data.rindex(name) - 46
    changed[local + 14 : local + 18] = changed[central + 16 : central + 20] = bytes(4)
    return bytes(changed)


def test_records_without_a_checksum_beside_others(tmp_path: Path) -> None:
    held = {"w": torch.arange(100.0), "b": torch.ones(3)}
    data = bytearray(without_crc(as_bytes(held), "archive/data/0"))
    assert of_torch(bytes(data))["w"][1] == 1
    begin = data.index(held["w"].numpy().tobytes())
    data[begin : begin + 400] = (held["w"] * 2).numpy().tobytes()  # filled in later
    (tmp_path / "a.ckpt").write_bytes(data)
    assert torch.equal(load(tmp_path / "a.ckpt")["w"], held["w"] * 2)
    download(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert (tmp_path / "b.ckpt").read_bytes() == data
    assert peek(tmp_path / "a.ckpt").checked
    data[data.rindex(held["b"].numpy().tobytes())] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(CorruptError, match="do not match their checksum"):
        load(tmp_path / "a.ckpt")


def test_several_archives_in_one_file_are_not_taken_for_the_last(tmp_path: Path) -> None:
    one, other = as_bytes({"w": torch.ones(3)}), as_bytes({"w": torch.zeros(3)})
    for data in (one + other, one + bytes(50) + other, one[:100] + other, one * 3):
        (tmp_path / "a.ckpt").write_bytes(data)
        for read in (load, peek):
            with pytest.raises(NotACheckpointError, match="several archives in a row"):
                read(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes(one + b"x" * 50)  # behind it there may be anything
    assert load(tmp_path / "a.ckpt")["w"].tolist() == [1, 1, 1]
    (tmp_path / "__0_0.distcp").write_bytes(one)
    with pytest.raises(NotACheckpointError, match=r"shard of a folder.*dcp_to_torch"):
        load(tmp_path / "__0_0.distcp")


def test_an_archive_beyond_32_bits_or_within(tmp_path: Path) -> None:
    data = as_bytes({"w": torch.ones(3)})
    plain = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as held, zipfile.ZipFile(plain, "w") as copy:
        for name in held.namelist():
            copy.writestr(name, held.read(name))
    assert (b"PK\6\6" in data, b"PK\6\6" in plain.getvalue()) == (True, False)
    for each in (data, plain.getvalue()):
        (tmp_path / "a.ckpt").write_bytes(each)
        assert load(tmp_path / "a.ckpt")["w"].tolist() == [1, 1, 1]
        (tmp_path / "a.ckpt").write_bytes(data + each)
        with pytest.raises(NotACheckpointError):
            load(tmp_path / "a.ckpt")


def test_an_end_that_is_cut_or_lies_is_corrupt(tmp_path: Path) -> None:
    data = as_bytes({"w": torch.ones(3)})
    wide = data.rindex(b"PK\6\6") + 40  # the size of the directory
    for bad in (data[:-30], data[:-2], data[:wide] + b"\1" + data[wide + 1 :]):
        (tmp_path / "a.ckpt").write_bytes(bad)
        with pytest.raises(CorruptError, match="no readable directory"):
            load(tmp_path / "a.ckpt")


def test_empty_tensors_of_two_dtypes_on_one_storage(tmp_path: Path) -> None:
    empty = torch.empty(0)
    held = {"w": empty, "v": empty.view(torch.int32), "u": empty.view(torch.uint8)}
    for data in (as_bytes(held), legacy(held)):
        (tmp_path / "a.ckpt").write_bytes(data)
        found = load(tmp_path / "a.ckpt")
        assert [t.dtype for t in found.values()] == [torch.float32, torch.int32, torch.uint8]
        assert len(peek(tmp_path / "a.ckpt").tensors) == 3


# ── torch's before 1.6 ────────────────────────────────────────────────────────────────────────


class Of03:
    """A tensor as torch wrote it before 0.4: on a part of a storage."""

    def __init__(self, view: Any, *how: Any) -> None:
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", 6, view)
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor, (Stored(self.pid), *self.how)


class Stored:
    """Pickles as a persistent id."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid


def of_03(held: Any, values: Tensor) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Stored) else None

    out = io.BytesIO()
    for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, held, ["0"]):
        Pickler(out, 2).dump(each)
    out.write(len(values).to_bytes(8, "little") + values.numpy().tobytes())
    return out.getvalue()


def test_views_of_storages_of_old(tmp_path: Path) -> None:
    held = {
        "all": Of03(None, 0, (6,), (1,)),
        "end": Of03(("1", 2, 4), 1, (3,), (1,)),
        "rows": Of03(("2", 2, 4), 0, (2, 2), (2, 1)),
    }
    data = of_03(held, torch.arange(6.0))
    (tmp_path / "a.ckpt").write_bytes(data)
    expected = torch.load(io.BytesIO(data), weights_only=False)
    for trust in (False, True):
        found = load(tmp_path / "a.ckpt", trust=trust)
        assert {name: each.tolist() for name, each in found.items()} == {
            name: each.tolist() for name, each in expected.items()
        }
        assert found["rows"].tolist() == [[2, 3], [4, 5]]
        assert len({each.untyped_storage().data_ptr() for each in found.values()}) == 1
    assert load(tmp_path / "a.ckpt", lambda c: c["end"]).tolist() == [3, 4, 5]
    assert len(peek(tmp_path / "a.ckpt").tensors) == 3


@pytest.mark.parametrize(
    "lie",
    [
        Of03(("1", 2, 5), 0, (1,), (1,)),  # beyond the storage
        Of03(("1", -1, 2), 0, (1,), (1,)),
        Of03(("1", 2, 2), 0, (3,), (1,)),  # beyond the view
        Of03(("1", 2), 0, (1,), (1,)),
        Of03(("1", "2", 2), 0, (1,), (1,)),
    ],
)
def test_views_of_storages_of_old_that_lie(tmp_path: Path, lie: Any) -> None:
    (tmp_path / "a.ckpt").write_bytes(of_03({"w": lie}, torch.arange(6.0)))
    with pytest.raises(CorruptError):
        load(tmp_path / "a.ckpt")


class Id:
    """Written as a persistent id."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid


class OfIds(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Id) else None


def pickles(*objects: Any) -> bytes:
    out = io.BytesIO()
    for obj in objects:
        if isinstance(obj, bytes):
            out.write(obj)
        else:
            OfIds(out, 2).dump(obj)
    return out.getvalue()


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


VALUES = torch.arange(6.0)
TAR = {  # as torch.save of torch 0.1 wrote them
    "sys_info": pickles({"protocol_version": 1000, "little_endian": True, "type_sizes": {}}),
    "pickle": pickles({"w": Id("7"), "tied": [Id("7")], "end": Id("8"), "counts": Id("2"), "n": 3}),
    "tensors": pickles(
        *(2, (7, 1, torch.FloatTensor), numbers(2, 3, 2, 1, 3, 0)),  # transposed
        *((8, 3, torch.FloatTensor), numbers(1, 3, 1, 1)),
    ),
    "storages": pickles(
        *(2, (1, "cpu", torch.FloatStorage), numbers(6) + VALUES.numpy().tobytes()),
        *((2, "cuda:0", torch.LongStorage), numbers(2) + numbers(4, 5)),
        [(3, 1, 2, 4)],  # the view: its key, the storage's, its first value, how many
    ),
}


def tarred(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {**TAR, **members}.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # which takes a header of its own
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_the_tar_of_torch_0_1(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.ckpt")
    for trust in (False, True):
        found = load(path, trust=trust)
        assert found["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert found["w"] is found["tied"][0]
        assert found["end"].tolist() == [3, 4, 5]
        assert found["end"].data_ptr() == found["w"].data_ptr() + 12
        assert (found["counts"].tolist(), found["n"]) == ([4, 5], 3)
    with path.open("rb") as file:
        expected = torch.load(file, map_location="cpu", weights_only=False)
    for name in ("w", "end", "counts"):
        assert found[name].tolist() == expected[name].tolist()
    assert load(path, lambda c: c["end"]).tolist() == [3, 4, 5]
    contents = peek(path)
    assert (contents.format, contents.torch, len(contents.tensors)) == ("torch 0.1 tar", "0.1", 3)


def test_a_module_in_a_tar_of_torch_0_1_has_its_source_beside_it(tmp_path: Path) -> None:
    with_source = pickles({"module": Id((nn.Identity, "identity.py", "class Identity")), "n": 3})
    path = tarred(tmp_path / "a.ckpt", pickle=with_source)
    assert load(path)["module"].full_name == "torch.nn.modules.linear.Identity"
    assert load(path, trust=True) == {"module": nn.Identity, "n": 3}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("sys_info", pickles({})),
        ("sys_info", pickles(Id("1"))),
        ("pickle", pickles(Id("9"))),
        ("pickle", pickles(Id("w"))),
        ("pickle", b""),
        ("tensors", pickles(1, (7, 1, None), numbers(1, 7, 1, 0))),  # too long
        ("tensors", pickles(1, (7, 3, None), numbers(1, 5, 1, 0))),  # longer than the view
        ("tensors", pickles(1, (7, 1, None), numbers(1, 2, -1, 3))),
        ("tensors", pickles(1, (7, 1, None), numbers(2**31 - 1, 2))),
        ("tensors", pickles(1, (7, 7, None), numbers(1, 2, 1, 0))),  # on itself
        ("tensors", pickles(10**9)),
        ("storages", pickles(1, (1, "cpu", torch.FloatStorage), numbers(10**12))),
        ("storages", pickles(1, (1, "cpu", torch.FloatStorage), numbers(-3), bytes(64))),
        ("storages", pickles(1, (1, "cpu", None), numbers(3), bytes(12), [])),
        ("storages", pickles(0, [(3, 1, 2, 4)])),
    ],
)
def test_a_tar_that_lies(tmp_path: Path, member: str, data: bytes) -> None:
    path = tarred(tmp_path / "a.ckpt", **{member: data})
    for read in (load, peek):
        with pytest.raises(CorruptError):
            read(path)


def test_a_tar_of_others_or_with_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with tarfile.open(path, "w") as tar:
        tar.add(tarred(tmp_path / "b.ckpt"), "b.ckpt")
    with pytest.raises(
        NotACheckpointError, match=r"tar archive with 'b\.ckpt' in it; extract that"
    ):
        load(path)
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "b.ckpt", "b.txt")
    with pytest.raises(NotACheckpointError, match=r"a tar archive, and not one of torch 0\.1"):
        load(path)
    with tarfile.open(path, "w") as tar:  # a link has no bytes, and what is empty is sound
        for name, kind in (("last.ckpt", tarfile.SYMTYPE), ("empty", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "epoch=3.ckpt"
            tar.addfile(info)
    with pytest.raises(NotACheckpointError, match=r"a tar archive, and not one of torch 0\.1"):
        load(path)
    whole = (tmp_path / "b.ckpt").read_bytes()
    first = whole.index(b"sys_info\0")
    for size in (b"77777777777", b"-0000000001", b"xxxxxxxxxxx"):
        path.write_bytes(whole[: first + 124] + size + whole[first + 135 :])
        with pytest.raises(CorruptError, match="its tar archive cannot be read"):
            load(path)
    path.write_bytes(whole[: first + 600])
    with pytest.raises(NotACheckpointError):
        load(path)
    end = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[:end])  # without what fills it up
    assert load(path)["n"] == 3
    path.write_bytes(whole[: end - 1])
    with pytest.raises(CorruptError):
        load(path)


def test_of_several_objects_in_a_row_the_first_comes_as_by_torch(tmp_path: Path) -> None:
    data = legacy({"a": torch.ones(2)}) + legacy({"b": torch.zeros(2)})
    (tmp_path / "a.ckpt").write_bytes(data)
    assert_same(load(tmp_path / "a.ckpt"), of_torch(data))


def test_a_legacy_file_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    checkpoint = odd_checkpoint()
    for name in list(checkpoint["state_dict"]):
        if "float8" in name or "uint16" in name:  # torch has no storage type of old for them
            del checkpoint["state_dict"][name]
    (tmp_path / "a.ckpt").write_bytes(legacy(checkpoint))
    assert_same(load(tmp_path / "a.ckpt"), of_torch(legacy(checkpoint)))
    only = load(tmp_path / "a.ckpt", lambda c: c["state_dict"]["transposed"])
    assert torch.equal(only, checkpoint["state_dict"]["transposed"])


def test_a_legacy_file_whose_tensors_share_a_storage_that_is_most_of_it(tmp_path: Path) -> None:
    values = torch.arange(1000.0)
    (tmp_path / "a.ckpt").write_bytes(legacy([values[n:] for n in range(9)]))
    found = load(tmp_path / "a.ckpt")
    assert [each[0].item() for each in found] == [*range(9)]
    assert {each.untyped_storage().data_ptr() for each in found} == {found[0].data_ptr()}


@pytest.mark.filterwarnings("ignore:.*quantized tensor")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_legacy_file_of_quantized_tensors(tmp_path: Path) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0, 1, 2])
    held = {
        "w": values,
        "whole": torch.quantize_per_tensor(values, 0.1, 3, torch.qint8),
        "rows": torch.quantize_per_channel(values, scales, zeros, 0, torch.quint8),
    }
    (tmp_path / "a.ckpt").write_bytes(legacy(held))
    expected = of_torch(legacy(held))
    for checkpoint in (load(tmp_path / "a.ckpt"), load(tmp_path / "a.ckpt", dict)):
        for name in ("whole", "rows"):
            assert torch.equal(checkpoint[name].int_repr(), expected[name].int_repr())
            assert torch.equal(checkpoint[name].dequantize(), expected[name].dequantize())
        assert torch.equal(checkpoint["w"], values)


def test_a_legacy_file_of_another_byte_order(tmp_path: Path) -> None:
    tensor = torch.arange(9.0)
    tensor.untyped_storage().byteswap(tensor.dtype)
    module = nn.ReLU()  # torch keeps its source beside it
    data = legacy({"w": tensor, "module": module})
    told = b"little_endianq\x02\x88" if sys.byteorder == "little" else b"little_endianq\x02\x89"
    assert data.count(told) == 1
    other = told[:-1] + (b"\x89" if sys.byteorder == "little" else b"\x88")
    (tmp_path / "a.ckpt").write_bytes(data.replace(told, other))
    checkpoint = load(tmp_path / "a.ckpt")
    assert torch.equal(checkpoint["w"], torch.arange(9.0))
    assert "ReLU" in repr(checkpoint["module"])


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].register_buffer("transient", torch.ones(2), persistent=False)
    return net


@pytest.mark.parametrize("write", [legacy, as_bytes])
def test_a_pickled_module(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    net = small_net()
    (tmp_path / "a.ckpt").write_bytes(write(net))
    assert_same(dict(load(tmp_path / "a.ckpt", weights)), dict(net.state_dict()))


def test_of_a_legacy_file_only_what_is_needed_moves(http_server: servers.HTTPServer) -> None:
    state = OrderedDict({f"layer.{i}": torch.rand(250_000) for i in range(2)})
    moments = {
        i: {"exp_avg": torch.rand(250_000), "exp_avg_sq": torch.rand(250_000)} for i in (0, 1)
    }
    data = legacy({"state_dict": state, "optimizer_states": [{"state": moments}]})
    uri = http_server.put("old.ckpt", data)
    assert_same(load(uri, weights), state)
    assert http_server.bytes_sent < 2 * MEGABYTE + 700_000 < len(data) / 2


# ── TorchScript ───────────────────────────────────────────────────────────────────────────────


class Inner(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.table = torch.arange(5.0)  # neither parameter nor buffer
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x)) * self.table.sum()
        return y


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = Inner(3)  # two instances of one class
        self.first = Inner(3)
        self.scale = nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.rand(3))
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3)])
        self.tied = self.layers[1]
        self.odd = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.odd(self.first(self.second(x)) * self.scale + self.tied(self.mean))
        return y


def other_outer() -> nn.Module:
    """Another class of the same name, whose parameter is the first's buffer: names are mangled."""

    class Inner(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(4))
            self.linear = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table * self.linear

    Inner.__qualname__ = "Inner"
    return Inner()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Inner(4), other_outer()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x) + self.other(x)
        return y


def scripted(module: nn.Module) -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(module), out)
    return out.getvalue()


def traced(module: nn.Module) -> bytes:
    out = io.BytesIO()
    width = 3 if isinstance(module, Outer) else 4
    torch.jit.save(torch.jit.trace(module.eval(), torch.rand(2, width)), out)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", [Outer, Both])
@pytest.mark.parametrize("write", [scripted, traced])
def test_the_state_dict_of_a_torchscript_archive(
    tmp_path: Path, write: Callable[[nn.Module], bytes], kind: type[nn.Module]
) -> None:
    data = write(kind())
    (tmp_path / "a.pt").write_bytes(data)
    expected = torch.jit.load(io.BytesIO(data)).state_dict()
    found = load(tmp_path / "a.pt")
    assert list(found) == list(expected)
    assert_same(found, dict(expected))
    model = kind()
    load_into(model, tmp_path / "a.pt")
    assert_same(dict(model.state_dict()), dict(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_of_a_torchscript_archive_only_what_is_needed_moves(
    http_server: servers.HTTPServer,
) -> None:
    net = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 2000))
    data = scripted(net)
    uri = http_server.put("net.pt", data)
    assert_same(load(uri, include("0.*")), {k: v for k, v in load(uri).items() if k[0] == "0"})
    http_server.reset()
    load(http_server.put("net.pt", data), include("0.*"))
    assert http_server.bytes_sent < MEGABYTE + 300_000 < len(data) / 3


# ── safetensors ───────────────────────────────────────────────────────────────────────────────


def of_all_dtypes() -> dict[str, Tensor]:
    made = {
        f"a.{dtype}": torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in safetensors.torch._TYPES.values()
    }
    return made | {
        "b.scalar": torch.tensor(2.5),
        "b.empty": torch.empty(0),
        "b.empty too": torch.empty(3, 0, 2, dtype=torch.int8),
        "µ ≠ m": torch.ones(1),
    }


def same_values(found: Any, expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert_same(
        {name: found[name] for name in expected},
        {name: tensor.clone() for name, tensor in expected.items()},
    )


@pytest.mark.parametrize("notes", [None, {"format": "pt", "author": "µ"}])
def test_safetensors_of_all_dtypes(tmp_path: Path, notes: dict[str, str] | None) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(of_all_dtypes(), path, notes)
    expected = safetensors.torch.load_file(path)
    same_values(load(path), expected)
    same_values(load(path, include("b.*")), {k: t for k, t in expected.items() if k[0] == "b"})


def test_safetensors_of_eight_and_four_bits(tmp_path: Path) -> None:
    path, codes = tmp_path / "a.safetensors", torch.arange(8, dtype=torch.uint8).reshape(2, 4)
    for name in ("float8_e8m0fnu", "float4_e2m1fn_x2"):
        dtype = getattr(torch, name, None)
        if dtype is None or not hasattr(safetensors.torch, "_float4_e2m1_x2"):
            continue
        held = {"w": codes.view(dtype), "rest": torch.ones(2)}
        safetensors.torch.save_file(held, path)
        found = load(path)
        assert (found["w"].dtype, found["w"].shape) == (dtype, (2, 4))
        assert torch.equal(found["w"].view(torch.uint8), codes)
        assert torch.equal(load(path, lambda c: c["rest"]), torch.ones(2))
        save(held, tmp_path / "b.safetensors")
        again = safetensors.torch.load_file(tmp_path / "b.safetensors")
        assert again["w"].dtype is dtype
        assert torch.equal(again["w"].view(torch.uint8), codes)


def safetensors_of(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


def test_safetensors_that_no_torch_has_or_with_no_metadata(tmp_path: Path) -> None:
    one = '{"w": {"dtype": "%s", "shape": [%d], "data_offsets": [0, %d]}'
    for dtype in ("F6_E2M3", "F6_E3M2"):
        path = safetensors_of(tmp_path / "a", one % (dtype, 4, 3) + "}", bytes(3))
        with pytest.raises(MissingPackageError, match="install a newer torch"):
            load(path)
    path = safetensors_of(tmp_path / "a", one % ("U8", 3, 3) + ', "__metadata__": null}', bytes(3))
    assert load(path)["w"].tolist() == [0, 0, 0]
    if hasattr(torch, "float4_e2m1fn_x2"):
        path = safetensors_of(tmp_path / "a", one % ("F4", 3, 1) + "}", bytes(1))
        with pytest.raises(CorruptError):
            load(path)


def test_safetensors_without_a_tensor(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors") == {}


def test_safetensors_in_the_order_of_its_header_and_with_spaces(tmp_path: Path) -> None:
    entries = [
        f'"{name}": {{"dtype": "F32", "shape": [1], "data_offsets": [{at}, {at + 4}]}}'
        for name, at in (("z", 4), ("a", 0))
    ]
    header = ("{\n " + ",\n ".join(entries) + " }  ").encode()
    values = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + values)
    assert {name: float(tensor) for name, tensor in load(tmp_path / "a").items()} == {
        "z": 2,
        "a": 1,
    }
    assert list(load(tmp_path / "a")) == ["z", "a"]


def test_of_safetensors_only_what_is_needed_moves(http_server: servers.HTTPServer) -> None:
    state = {f"{part}.{i}": torch.rand(100_000) for part in "ab" for i in range(10)}
    data = safetensors.torch.save(
        {k: t for k, t in state.items() if k != "a.0"} | {"a.0": torch.ones(9)}
    )
    uri = http_server.put("a.safetensors", data)
    found = load(uri, include("a.*"))
    assert torch.equal(found["a.7"], state["a.7"])
    assert set(found) == {f"a.{i}" for i in range(10)}
    assert http_server.bytes_sent < 9 * 400_000 + 700_000 < len(data)


# ── a bare tensor, wrong names, into a model ──────────────────────────────────────────────────


@pytest.mark.parametrize("write", [legacy, as_bytes])
def test_a_bare_tensor(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    (tmp_path / "a.ckpt").write_bytes(write(torch.rand(4, 5).t()))
    assert_same(load(tmp_path / "a.ckpt"), of_torch((tmp_path / "a.ckpt").read_bytes()))


def in_safetensors(module: nn.Module) -> bytes:
    return safetensors.torch.save(dict(module.state_dict()))


def in_zip(module: nn.Module) -> bytes:
    return as_bytes({"state_dict": module.state_dict(), "epoch": 3})


def in_legacy(module: nn.Module) -> bytes:
    return legacy({"state_dict": module.state_dict(), "epoch": 3})


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a.pt", "noname"])
@pytest.mark.parametrize("write", [in_safetensors, in_zip, in_legacy, scripted])
def test_a_format_is_told_by_content_and_loads_into_a_model(
    tmp_path: Path, write: Callable[[nn.Module], bytes], name: str
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    (tmp_path / name).write_bytes(write(net))
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    load_into(other, tmp_path / name)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))


def test_a_pickle_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04K\x03.")
    with pytest.raises(NotACheckpointError, match=r"not one of torch\.save"):
        load(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04\x95")
    with pytest.raises(CorruptError, match="its pickle cannot be read"):
        load(tmp_path / "a.pkl")
