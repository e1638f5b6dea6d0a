"""Anemoi's metadata are changed in place: all or nothing, and the weights stay as they are."""

import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import servers
from anemoi_ckpt import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    LocalURI,
    edit_metadata,
    load,
    metadata,
    peek,
    save,
)
from checkpoints import assert_same

HELD = {"state_dict": {"a": torch.arange(70_000.0), "b": torch.ones(3)}, "epoch": 3}
ARRAYS = {"data": {"mask": np.arange(6)}}


def rename(found: dict[str, Any]) -> dict[str, Any]:
    found["dataset"]["variables"][0] = "2t"  # what it is given is its own
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    told = {"run_id": "abc", "dataset": {"variables": ["t", "z"]}}
    save(HELD, tmp_path / "last.ckpt", metadata=(told, ARRAYS))
    return tmp_path / "last.ckpt"


def is_whole(path: Path, names: list[str]) -> None:
    found, arrays = metadata(path, arrays=True)
    assert found["dataset"]["variables"] == names
    np.testing.assert_array_equal(arrays["data"]["mask"], ARRAYS["data"]["mask"])
    assert_same(load(path), HELD)
    assert_same(torch.load(path, weights_only=True), HELD)
    assert_same(torch.load(path, weights_only=True, mmap=True), HELD)
    assert peek(path).checked
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_metadata_are_changed_and_nothing_else(path: Path) -> None:
    before, offset = path.read_bytes(), 70_000 * 4
    path.chmod(0o640)
    assert edit_metadata(path, rename) == LocalURI(str(path), str(path))
    is_whole(path, ["2t", "z"])
    assert path.read_bytes()[:offset] == before[:offset]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    size = path.stat().st_size
    for _ in range(3):  # the file does not grow with each
        edit_metadata(path, lambda found: found | {"run_id": "xyz"})
    assert path.stat().st_size <= size
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
    edit_metadata(path, lambda found: found | {"long": "x" * 300_000})
    is_whole(path, ["2t", "z"])


@pytest.mark.parametrize("without", ["a system call for it", "one file system"])
def test_where_the_system_cannot_copy_by_itself(
    path: Path, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    if without == "one file system":
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    else:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    edit_metadata(path, rename)
    is_whole(path, ["2t", "z"])


def test_what_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def refuse(found: Mapping[str, Any]) -> dict[str, Any]:
        raise KeyError(found["run_id"])

    with pytest.raises(KeyError, match="abc"):
        edit_metadata(path, refuse)
    with pytest.raises(TypeError, match="gave NoneType, not metadata: return a dict"):
        edit_metadata(path, lambda found: found.clear())  # type: ignore[arg-type,func-returns-value]
    with monkeypatch.context() as patch:
        patch.setattr(
            zipfile.ZipFile,
            "writestr",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(CheckpointError, match="No space left"):
            edit_metadata(path, rename)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_without_metadata_there_is_nothing_to_change(tmp_path: Path) -> None:
    place = save(HELD, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"there is no anemoi\.json in it"):
        edit_metadata(place, rename)
    with pytest.raises(CheckpointNotFoundError):
        edit_metadata(tmp_path / "none.ckpt", rename)


def test_a_file_that_is_replaced_meanwhile_is_left_alone(path: Path, tmp_path: Path) -> None:
    other = save({"w": torch.ones(1)}, tmp_path / "other.ckpt")
    before = Path(other.path).read_bytes()  # type: ignore[attr-defined]

    def replace(found: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "other.ckpt").replace(path)
        return found

    with pytest.raises(
        CorruptError, match=r"no record archive/anemoi-metadata/anemoi\.json any more"
    ):
        edit_metadata(path, replace)
    assert path.read_bytes() == before


def test_an_object_is_written_whole(path: Path, s3: servers.Store) -> None:
    s3.write("last.ckpt", path.read_bytes())
    uri = s3.uri("last.ckpt")
    edit_metadata(uri, rename)
    assert metadata(uri)["dataset"]["variables"] == ["2t", "z"]
    assert_same(load(uri), HELD)
