"""Every format in which weights come: torch's of old, TorchScript, safetensors, a bare tensor."""

import io
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import servers
from anemoi_ckpt import CorruptError, NotACheckpointError, load, load_into
from checkpoints import as_bytes, assert_same, odd_checkpoint
from strategies import include, weights

MEGABYTE = 10**6


def legacy(obj: object) -> bytes:
    return as_bytes(obj, _use_new_zipfile_serialization=False)


def of_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


# ── torch's before 1.6 ────────────────────────────────────────────────────────────────────────


def test_a_legacy_file_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    checkpoint = odd_checkpoint()
    for name in list(checkpoint["state_dict"]):
        if "float8" in name or "uint16" in name:  # torch has no storage type of old for them
            del checkpoint["state_dict"][name]
    (tmp_path / "a.ckpt").write_bytes(legacy(checkpoint))
    assert_same(load(tmp_path / "a.ckpt"), of_torch(legacy(checkpoint)))
    only = load(tmp_path / "a.ckpt", lambda c: c["state_dict"]["transposed"])
    assert torch.equal(only, checkpoint["state_dict"]["transposed"])


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


def test_sparse_tensors_of_a_legacy_file_are_validated_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.ckpt").write_bytes(legacy({"s": torch.eye(3).to_sparse_csr()}))
    with torch.sparse.check_sparse_tensor_invariants():
        assert torch.equal(load(tmp_path / "a.ckpt")["s"].to_dense(), torch.eye(3))


def test_a_legacy_file_of_another_byte_order(tmp_path: Path) -> None:
    tensor = torch.arange(9.0)
    tensor.untyped_storage().byteswap(tensor.dtype)
    data = legacy({"w": tensor})
    told = b"little_endianq\x02\x88" if sys.byteorder == "little" else b"little_endianq\x02\x89"
    assert data.count(told) == 1
    other = told[:-1] + (b"\x89" if sys.byteorder == "little" else b"\x88")
    (tmp_path / "a.ckpt").write_bytes(data.replace(told, other))
    assert torch.equal(load(tmp_path / "a.ckpt")["w"], torch.arange(9.0))


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
