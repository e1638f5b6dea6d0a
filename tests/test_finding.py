"""Which checkpoints a glob finds, and at what price."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import servers
from anemoi_ckpt import (
    CheckpointNotFoundError,
    Entries,
    InvalidURIError,
    diff,
    find,
    latest,
    list_objects,
    load,
    peek,
    plan,
    save,
    verify,
)
from checkpoints import as_bytes
from conftest import Place
from strategies import include, weights

DATA = as_bytes({"w": torch.ones(3)})
LISTING = ["local", "s3", "gcs", "azure"]
NAMES = [
    "a/epoch=1.ckpt",
    "a/epoch=2.ckpt",
    "a/last.ckpt",
    "a/notes.txt",
    "b/deep/er/last.ckpt",
    "b/epoch=10.ckpt",
    "b/w.safetensors",
    "last.ckpt",
]
CHECKPOINTS = [name for name in NAMES if not name.endswith(".txt")]


@pytest.fixture
def run(place: Place) -> str:
    """Stores the files; gives the folder's URI."""
    for name in NAMES:
        uri = place.put(f"run/{name}", DATA)
    return uri.rpartition("/")[0]


def names(entries: Entries) -> list[str]:
    return [str(entry.uri).partition("/run/")[2] for entry in entries]


GLOBS = {
    "*.ckpt": ["last.ckpt"],
    "**/*.ckpt": [name for name in NAMES if name.endswith(".ckpt")],
    "**.ckpt": [name for name in NAMES if name.endswith(".ckpt")],
    "*/epoch=*.ckpt": ["a/epoch=1.ckpt", "a/epoch=2.ckpt", "b/epoch=10.ckpt"],
    "a/epoch=[12].ckpt": ["a/epoch=1.ckpt", "a/epoch=2.ckpt"],
    "a/epoch=[!1].ckpt": ["a/epoch=2.ckpt"],
    "b/**/last.ckpt": ["b/deep/er/last.ckpt"],
    "**/last.ckpt": ["a/last.ckpt", "b/deep/er/last.ckpt", "last.ckpt"],
    "a[!x]last.ckpt": [],
    "a/l*": ["a/last.ckpt"],
    "c/*": [],
    "": CHECKPOINTS,
    "b": ["b/deep/er/last.ckpt", "b/epoch=10.ckpt", "b/w.safetensors"],
}


@pytest.mark.parametrize("place", LISTING, indirect=True)
def test_a_glob_finds_what_it_names(run: str) -> None:
    for glob, expected in GLOBS.items():
        if glob == "c/*" and "://" not in run:
            with pytest.raises(CheckpointNotFoundError):  # a store knows no folders
                find(f"{run}/{glob}")
            continue
        assert names(find(f"{run}/{glob}")) == expected, glob
    for entry in find(f"{run}/a/*.ckpt"):
        assert entry.size == len(DATA)
        assert load(entry)["w"].all()
        assert verify(entry)
        assert peek(entry).bytes == len(DATA)


def test_a_question_mark_is_a_wildcard_in_a_path_alone(tmp_path: Path) -> None:
    for name in ("epoch=1.ckpt", "epoch=12.ckpt", "odd[1].ckpt"):
        (tmp_path / name).write_bytes(DATA)
    assert [each.uri.filename for each in find(tmp_path / "epoch=?.ckpt")] == ["epoch=1.ckpt"]
    assert [each.uri.filename for each in find(f"{tmp_path}/odd[[]1].ckpt")] == ["odd[1].ckpt"]


def test_a_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(DATA)
    assert [each.uri.filename for each in find(folder)] == ["last.ckpt"]
    assert latest(folder).filename == "last.ckpt"


def test_a_glob_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for name in ("a.ckpt", "run/b.ckpt"):
        Path(name).write_bytes(DATA)
    assert [str(each.uri) for each in find("*.ckpt")] == ["a.ckpt"]
    assert [str(each.uri) for each in find("**/*.ckpt")] == ["a.ckpt", "run/b.ckpt"]
    assert [str(each.uri) for each in find("./r*/*.ckpt")] == ["./run/b.ckpt"]
    assert [str(each.uri) for each in find(Path("run"))] == ["run/b.ckpt"]


@pytest.mark.parametrize("place", LISTING, indirect=True)
def test_the_latest_that_a_glob_finds(run: str) -> None:
    def epoch(entry) -> int:
        return int(entry.uri.filename.partition("=")[2].removesuffix(".ckpt"))

    assert latest(f"{run}/**/epoch=*.ckpt", key=epoch).filename == "epoch=10.ckpt"
    assert latest(f"{run}/a/*", key=lambda entry: peek(entry).bytes).filename == "notes.txt"
    with pytest.raises(CheckpointNotFoundError, match="glob chooses no checkpoint"):
        latest(f"{run}/a/none*.ckpt")


def test_the_store_is_asked_for_what_begins_so(s3: servers.Store) -> None:
    """And for ten thousand objects, in eleven requests."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    bucket = s3.uri("x").split("/")[2]
    names = [*(f"many/{number:05}.ckpt" for number in range(10_000)), "other/0.ckpt"]
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # of the emulator, which runs in this process
    for name in names:
        backend.put_object(bucket, name, b"x")
    assert s3.server is not None
    s3.server.log.clear()
    entries = find(f"s3://{bucket}/many/**/*.ckpt")
    assert len(entries) == 10_000
    assert len(s3.server.log) <= 11
    assert all("prefix=many%2F" in each.query for each in s3.server.log)
    s3.server.log.clear()
    assert len(find(f"s3://{bucket}/many/0001*")) == 10
    (asked_once,) = [each for each in s3.server.log if "list-type" in each.query]
    assert "prefix=many%2F0001&" in f"{asked_once.query}&"
    for name in names:  # other tests list this bucket
        backend.delete_object(bucket, name)


def test_entries_print_as_a_table_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(DATA)
    (tmp_path / "deep").mkdir()
    os.utime(path, (1_000_000_000, 1_000_000_000))
    entries = list_objects(tmp_path)
    text = repr(entries)
    assert f"{path}" in text
    assert "2001-09-09 01:46:40" in text
    assert "2 found" in text
    assert "<td" in entries._repr_html_()
    folder, file = sorted(
        json.loads(json.dumps(entries.as_dict())), key=lambda each: each["size"] is not None
    )
    assert file == {"uri": str(path), "size": len(DATA), "modified": "2001-09-09T01:46:40+00:00"}
    assert folder["modified"] is None
    assert entries[0].modified == datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    assert repr(find(tmp_path / "none*")).startswith("0 found")


def test_errors_of_a_listing(tmp_path: Path, s3: servers.Store) -> None:
    with pytest.raises(CheckpointNotFoundError):
        find(tmp_path / "none/*.ckpt")
    with pytest.raises(CheckpointNotFoundError):
        find("s3://no-such-bucket-here/**.ckpt")
    with pytest.raises(InvalidURIError, match="does not tell what is in it"):
        find("https://example.com/run/*.ckpt")
    file = tmp_path / "a.ckpt"
    file.write_bytes(DATA)
    for ask in (find, latest, list_objects):
        with pytest.raises(CheckpointNotFoundError, match="a file, not a folder"):
            ask(file)
    with pytest.raises(TypeError):
        find(None)  # type: ignore[arg-type]


def test_what_was_found_is_written_beside(tmp_path: Path) -> None:
    save({"epoch": 1}, tmp_path / "1.ckpt")
    for entry in find(tmp_path / "*.ckpt"):
        save(load(entry), tmp_path / "copy.ckpt")
    assert load(latest(tmp_path / "c*"))["epoch"] == 1


def test_a_pool_of_processes_asks_at_once(tmp_path: Path) -> None:
    paths = [save({"w": torch.full((3,), n)}, tmp_path / f"{n}.ckpt") for n in (1.0, 2.0)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        asked = [
            pool.submit(peek, paths[0]),
            pool.submit(plan, paths[0], weights),
            pool.submit(verify, paths[0], values=True),
            pool.submit(diff, *paths, include("w"), values=True),
            pool.submit(find, tmp_path),
            pool.submit(latest, tmp_path),
        ]
        contents, planned, verified, difference, found, newest = (each.result() for each in asked)
        again = list(pool.map(verify, found))
    assert contents.tree().bytes == 12
    assert [each.name for each in planned.tensors] == ["w"]
    assert verified
    assert difference.norms["w"].max == 1.0
    assert [str(each.uri) for each in found] == [*map(str, paths)]
    assert newest == paths[1]
    assert [each.ok for each in again] == [True, True]
