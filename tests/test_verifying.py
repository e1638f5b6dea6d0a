"""Whether a checkpoint is what was written, without keeping any of it."""

import base64
import gzip
import io
import json
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import servers
from anemoi_ckpt import (
    CheckpointError,
    CheckpointNotFoundError,
    NotACheckpointError,
    UnreachableError,
    load,
    verify,
)
from checkpoints import as_bytes, assert_same, lexicographic, lightning_checkpoint
from conftest import Place

MEGABYTE = 1024**2


@pytest.fixture(scope="module")
def data() -> bytes:
    """Several parts of one read, and records that lie in two of them."""
    generator = torch.Generator().manual_seed(1)
    state = {f"w{i}": torch.randn(700_001, generator=generator) for i in range(12)}
    return as_bytes({"state_dict": state, "epoch": 3})


def test_a_whole_checkpoint(place: Place, data: bytes) -> None:
    found = verify(place.put("last.ckpt", data))
    assert found
    assert found.ok
    assert (found.damaged, found.not_finite, found.bytes) == ((), None, len(data))
    assert found.format == "torch zip"
    assert found.checked == found.records
    assert found.records >= 14  # twelve storages, the pickle, the version
    assert len(data) <= found.bytes_moved <= len(data) + 3 * 64 * 1024
    kept = {"s3": ("crc32",), "gcs": ("crc32c",), "azure": ("md5",)}  # emulators, too
    assert place.cloud or found.digests == kept.get(place.kind, ())
    assert repr(found).endswith("whole")


@pytest.mark.parametrize("where", [0.01, 0.47, 0.99])
def test_a_damaged_record_is_named(where: float, data: bytes, tmp_path: Path) -> None:
    wrong = bytearray(data)
    wrong[int(len(data) * where)] ^= 1
    path = tmp_path / "last.ckpt"
    path.write_bytes(wrong)
    found = verify(path)
    assert not found
    assert len(found.damaged) == 1
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert found.damaged[0] == caught.value.problem
    assert "not whole" in repr(found)


def test_what_verify_lets_pass_loads_as_before(tmp_path: Path) -> None:
    whole = lightning_checkpoint(tmp_path).read_bytes()
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole)
    right, draw, found = load(path), random.Random(4), []
    for number in range(120):
        begin = (0, len(whole) - 20_000)[number % 2]
        wrong = bytearray(whole)
        wrong[begin + draw.randrange(20_000)] ^= 1 << draw.randrange(8)
        path.write_bytes(wrong)
        try:
            found.append(verify(path).ok)
        except NotACheckpointError:
            found.append(False)
        if found[-1]:
            assert_same(load(path), right)
    assert found.count(False) > 40
    assert found.count(True) > 0


def test_a_bit_that_flips_on_the_way_is_no_damage(
    http_server: servers.HTTPServer, data: bytes
) -> None:
    uri = http_server.put("last.ckpt", data)
    verify(uri)
    parts = asked(http_server)
    spoiled = next(each for each in parts if each.startswith("bytes=8388608-"))
    http_server.log.clear()
    http_server.fault = lambda request: (
        servers.Fault(flip=8 * 500_000) if request.headers.get("Range") == spoiled else None
    )
    assert verify(uri)
    assert spoiled in asked(http_server)
    assert len(asked(http_server)) > len(parts)


def asked(server: servers.HTTPServer) -> list[str]:
    return [each.headers.get("Range") or "" for each in server.log if each.method == "GET"]


def test_a_digest_of_the_place_that_differs(http_server: servers.HTTPServer) -> None:
    """It is of all bytes, also of those that no record has."""
    uri = http_server.put("odd.ckpt", as_bytes({"w": torch.ones(5)}))
    digest = base64.b64encode(bytes(32)).decode()
    told = {"Repr-Digest": f"sha-256=:{digest}:"}
    http_server.fault = lambda _: servers.Fault(headers=told)
    found = verify(uri)
    assert found.digests == ("sha256",)
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith("its sha256 is ")
    assert found.checked == found.records


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
DTYPES += [torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.ones(3 * MEGABYTE)
    values[[0, 5, 2 * MEGABYTE + 1]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    good = torch.ones(7)
    state = {"bad": values.to(dtype), "good": good.to(dtype), "count": torch.arange(3)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state}, path)
    assert verify(path)
    found = verify(path, values=True)
    assert not found
    assert found.damaged == ()
    assert found.not_finite == {"state_dict.bad": 3}
    assert "state_dict.bad: 3 values" in repr(found)


def test_values_in_the_other_byte_order(tmp_path: Path) -> None:
    """The bytes of one are a NaN, read the right way round alone."""
    swapped = torch.tensor([0x0000C07F, 0x0000803F], dtype=torch.int32).view(torch.float32)
    assert swapped.isfinite().all()
    foreign = b"big" if sys.byteorder == "little" else b"little"
    path = tmp_path / "foreign.ckpt"
    whole = zipfile.ZipFile(io.BytesIO(as_bytes({"w": swapped})))
    with whole as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = foreign if info.filename.endswith("byteorder") else old.read(info)
            new.writestr(info.filename, data)
    assert load(path)["w"].isnan().tolist() == [True, False]
    assert verify(path, values=True).not_finite == {"w": 1}


@pytest.mark.parametrize("split", [0, 1, 2, 3, 8 * MEGABYTE - 100])
def test_a_value_that_is_cut_by_two_parts(split: int, tmp_path: Path) -> None:
    """safetensors' records begin at any byte."""
    header = {"w": {"dtype": "F32", "shape": [2_500_000], "data_offsets": [0, 10_000_000]}}
    text = json.dumps(header).encode()
    text += b" " * (split + (90 - len(text)))  # the last begins two bytes before a part's end
    values = torch.ones(2_500_000)
    values[::2] = float("nan")
    data = len(text).to_bytes(8, "little") + text + values.numpy().tobytes()
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    found = verify(path, values=True)
    assert found.not_finite == {"w": 1_250_000}
    assert (found.records, found.checked) == (1, 0)
    assert "0 of 1 compared" in repr(found)


@pytest.mark.parametrize(
    ("name", "written", "kind"),
    [
        ("a.ckpt", lambda whole: whole, "torch zip"),
        ("a.ckpt", lexicographic, "torch zip"),
        ("a.ckpt.gz", gzip.compress, "torch zip"),
        ("a.ckpt", lambda whole: legacy(load(io.BytesIO(whole))), "torch legacy"),
        (
            "a.safetensors",
            lambda whole: safetensors.torch.save(load(io.BytesIO(whole))),
            "safetensors",
        ),
    ],
)
def test_all_formats(
    name: str, written: Callable[[bytes], bytes], kind: str, tmp_path: Path
) -> None:
    whole = as_bytes({"w": torch.tensor([1.0, float("inf")]), "empty": torch.ones(0)})
    path = tmp_path / name
    path.write_bytes(written(whole))
    found = verify(path, values=True)
    assert (found.format, found.damaged) == (kind, ())
    assert found.not_finite == {"w": 1}


def legacy(checkpoint: Any) -> bytes:
    return as_bytes(checkpoint, _use_new_zipfile_serialization=False)


def test_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": torch.ones(9)}, "2.safetensors": {"b": torch.ones(3)}}
    shards["2.safetensors"]["b"][1] = float("nan")
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = verify(index, values=True)
    assert found.records == 2
    assert found.not_finite == {"b": 1}
    assert found.bytes_moved >= sum((tmp_path / name).stat().st_size for name in shards)


def test_a_file_that_ends_early(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(data[:-MEGABYTE])
    found = verify(path, values=True)
    assert not found
    assert len(found.damaged) == 1
    assert (found.format, found.not_finite) == ("", {})
    assert "unknown" in repr(found)


def test_what_is_no_checkpoint_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "page.ckpt"
    path.write_bytes(b"<html>" * 100)
    with pytest.raises(NotACheckpointError):
        verify(path)
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "none.ckpt")


@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_server_without_ranges(after: int, http_server: servers.HTTPServer, data: bytes) -> None:
    """Or one that has begun to refuse them."""
    uri = http_server.put("last.ckpt", data)
    http_server.fault = lambda _: (
        servers.Fault(ignore_range=True) if len(http_server.log) > after else None
    )
    found = verify(uri)
    assert found
    assert found.checked == found.records


def test_a_server_that_goes_away(http_server: servers.HTTPServer, data: bytes) -> None:
    uri = http_server.put("last.ckpt", data)
    verify(uri)
    first = next(part for part in asked(http_server)[3:] if part.startswith("bytes=0-"))
    slow = servers.Fault(delay=0.5, status=503)  # meanwhile the other parts wait for this one
    http_server.fault = lambda request: slow if request.headers.get("Range") == first else None
    with pytest.raises(UnreachableError):
        verify(uri, retries=0)


def test_records_that_torch_did_not_lay_out(tmp_path: Path) -> None:
    """Ten bytes stand behind each: its own header tells where it begins."""
    path = tmp_path / "odd.ckpt"
    whole = zipfile.ZipFile(io.BytesIO(as_bytes({"w": torch.tensor([1.0, float("nan")])})))
    with whole as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
            assert new.fp is not None
            new.fp.write(bytes(10))
            new.start_dir = new.fp.tell()
    assert load(path)["w"].isnan().tolist() == [False, True]
    assert verify(path)
    assert verify(path, values=True).not_finite == {"w": 1}
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([1.0, float("nan")]).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert len(verify(path).damaged) == 1


def test_what_was_found_travels(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(data)
    found = verify(path)
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)


def test_what_cannot_be_opened_is_read_and_compared_with_its_digest(
    s3: servers.Store, http_server: servers.HTTPServer, data: bytes
) -> None:
    torn = data[: len(data) // 2]
    s3.write("torn.ckpt", torn)
    found = verify(s3.uri("torn.ckpt"), values=True)
    assert (found.format, found.bytes, found.bytes_moved) == ("", len(torn), len(torn))
    assert found.digests  # so it was torn before it was stored
    assert len(found.damaged) == 1
    assert found.not_finite == {}
    uri = http_server.put("torn.ckpt", torn)
    http_server.fault = lambda _: servers.Fault(ignore_range=True)
    found = verify(uri)
    assert (found.bytes, found.bytes_moved, found.ok) == (len(torn), len(torn), False)
