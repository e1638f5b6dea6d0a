"""A SHA-256 pins what is loaded: nothing is given of an object that has another one."""

import gzip
import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.transport import Source
from anemoi_ckpt import ChangedError, CorruptError, MismatchError, download, load, load_into, save
from checkpoints import as_bytes
from strategies import weights

DATA = as_bytes({"state_dict": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "epoch": 3})
DIGEST = hashlib.sha256(DATA).hexdigest()
WRONG = "0" * 64


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    made = {name: tmp_path / name for name in ("cache", "temporary")}
    made["temporary"].mkdir()
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(made["cache"]))
    monkeypatch.setattr(tempfile, "tempdir", str(made["temporary"]))
    return made


def left(folders: dict[str, Path]) -> list[str]:
    """Give the files that a load left."""
    files = (path for folder in folders.values() for path in folder.rglob("*") if path.is_file())
    return sorted(path.name for path in files)


@pytest.fixture(params=["local", "http", "stream"])
def uri(request: Any, tmp_path: Path, http_store: servers.Store) -> Any:
    if request.param == "http":
        return http_store.write("pinned/a.ckpt", DATA) or http_store.uri("pinned/a.ckpt")
    (tmp_path / "a.ckpt").write_bytes(DATA)
    return io.BytesIO(DATA) if request.param == "stream" else str(tmp_path / "a.ckpt")


def test_the_right_digest_gives_the_checkpoint(uri: Any, folders: dict[str, Path]) -> None:
    assert load(uri, sha256=DIGEST)["epoch"] == 3
    assert load(uri, weights, sha256=DIGEST.upper())["weight"].tolist() == [[1.0, 1.0]]
    report = load_into(torch.nn.Linear(2, 1), uri, sha256=DIGEST)
    assert (report.loaded, report.bytes_moved) == (("weight", "bias"), len(DATA))
    assert left(folders) == []


def test_a_wrong_digest_gives_nothing(uri: Any, folders: dict[str, Path]) -> None:
    model = torch.nn.Linear(2, 1)
    before = model.weight.tolist()
    told = f"its sha256 is {DIGEST}, and not the one asked for, 000.*another than was meant"
    for way in (load, lambda *a, **k: load_into(model, *a, **k)):
        with pytest.raises(CorruptError, match=told):
            way(uri, sha256=WRONG)
    assert model.weight.tolist() == before
    assert left(folders) == []


def test_the_copy_in_the_cache_is_checked(http_store: servers.Store, folders: Any) -> None:
    http_store.write("pinned/a.ckpt", DATA)
    uri = http_store.uri("pinned/a.ckpt")
    with pytest.raises(CorruptError, match="not the one asked for"):
        load(uri, cached=True, sha256=WRONG)
    assert "a.ckpt" not in left(folders)
    http_store.server.reset()
    assert load(uri, cached=True, sha256=DIGEST)["epoch"] == 3
    copy = next(folders["cache"].rglob("a.ckpt"))
    forged = bytearray(DATA)
    forged[-300:-290] = b"x" * 10
    copy.write_bytes(forged)
    assert load(uri, cached=True, sha256=DIGEST)["epoch"] == 3
    assert copy.read_bytes() == DATA


def test_an_object_that_was_forged_with_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    digest = hashlib.sha256(save({"w": torch.zeros(9)}, path).path and path.read_bytes())
    save({"w": torch.ones(9)}, path)
    assert load(path)["w"].tolist() == [1.0] * 9  # every CRC-32 is right
    with pytest.raises(CorruptError, match="not the one asked for"):
        load(path, sha256=digest.hexdigest())


def test_a_file_that_is_replaced_meanwhile(tmp_path: Path, mocker: Any) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(DATA)
    read, calls = Source.read, []

    def replaced(self: Source, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.uri, LocalURI) and not calls and self.version is not None:
            calls.append(1)
            other = tmp_path / "other"
            other.write_bytes(DATA)
            other.replace(path)
        return read(self, *arguments, **options)

    mocker.patch.object(Source, "read", replaced)
    with pytest.raises(ChangedError):
        load(path, sha256=DIGEST)
    assert calls == [1]


def test_the_digest_is_of_the_bytes_that_are_stored(tmp_path: Path) -> None:
    packed = gzip.compress(DATA)
    (tmp_path / "a.ckpt.gz").write_bytes(packed)
    digest = hashlib.sha256(packed).hexdigest()
    assert load(tmp_path / "a.ckpt.gz", sha256=digest)["epoch"] == 3
    copy = download(tmp_path / "a.ckpt.gz", tmp_path / "b.ckpt.gz", sha256=digest)
    assert load(io.BytesIO(copy.read_bytes()), sha256=digest)["epoch"] == 3


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_of_shards_is_refused(cached: bool, http_store: servers.Store) -> None:
    index = json.dumps({"weight_map": {"w": "one.safetensors"}}).encode()
    http_store.write("pinned/model.safetensors.index.json", index)
    uri = http_store.uri("pinned/model.safetensors.index.json")
    with pytest.raises(MismatchError, match="the index of several files, and a sha256 pins one"):
        load(uri, sha256=hashlib.sha256(index).hexdigest(), cached=cached)


def test_what_is_no_digest(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(DATA)
    with pytest.raises(ValueError, match="sha256 of load is 64 hexadecimal digits, not 'abc'"):
        load(tmp_path / "a.ckpt", sha256="abc")
    with pytest.raises(TypeError, match="sha256 of load is 64 hexadecimal digits, not 3"):
        load(tmp_path / "a.ckpt", sha256=3)  # type: ignore[arg-type] # the case
    with pytest.raises(ValueError, match="the checkpoint is a checkpoint in memory"):
        load_into(torch.nn.Linear(2, 1), {"weight": torch.ones(1, 2)}, sha256=DIGEST)
