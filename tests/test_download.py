"""`download`: a file that is there whole, or not at all."""

import os
from pathlib import Path

import pytest
import torch

import _ckpt_sources
import anemoi_ckpt
import servers
from anemoi_ckpt import ChangedError, CheckpointNotFoundError, UnreachableError, download, load
from checkpoints import as_bytes

DATA = as_bytes({"w": torch.arange(6_000_000), "epoch": 3})  # some parts of 8 MiB


def test_a_copy_from_all_places(place, tmp_path: Path) -> None:
    uri = place.put("a b.ckpt", DATA)
    path = download(uri, tmp_path / "copy.ckpt")
    assert path == tmp_path / "copy.ckpt"
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert download(uri, tmp_path) == tmp_path / "a b.ckpt"
    assert load(tmp_path / "a b.ckpt")["epoch"] == 3
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["a b.ckpt", "copy.ckpt"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_name_is_the_last_part_of_the_path(http_server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = http_server.put("run/last é.ckpt", DATA)
    assert download(f"{url}?sig=a%2Fb", ".") == Path("last é.ckpt")
    names = {
        "s3://b/run/a.ckpt?versionId=1": "a.ckpt",
        "gs://b/run/a.ckpt#7": "a.ckpt",
        "https://acc.blob.core.windows.net/c/run/a%20b.ckpt?sig=x": "a b.ckpt",
        "file:///run/a%20b.ckpt": "a b.ckpt",
    }
    assert {uri: anemoi_ckpt.parse_uri(uri).filename for uri in names} == names
    assert anemoi_ckpt.URI("sftp://host/run/a.ckpt").filename == "a.ckpt"


@pytest.mark.parametrize("broken", [servers.Fault(cut=100_000), servers.Fault(status=503)])
def test_a_failure_leaves_what_was_there(http_server, tmp_path: Path, monkeypatch, broken) -> None:
    monkeypatch.setattr(_ckpt_sources, "BACKOFF_SECONDS", 0)
    uri = http_server.put("a.ckpt", DATA)
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"what was there")
    http_server.fault = lambda request: (
        servers.Fault(status=503) if len(http_server.log) > 4 else broken
    )
    with pytest.raises(UnreachableError):
        download(uri, target)
    with pytest.raises(CheckpointNotFoundError):
        download(tmp_path / "nothing", target)
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_an_object_replaced_meanwhile_leaves_no_mixture(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)

    def fault(request: servers.Request) -> servers.Fault | None:
        late = len(http_server.log) == 4
        return servers.Fault(before=lambda: http_server.put("a.ckpt", DATA[::-1])) if late else None

    http_server.fault = fault
    with pytest.raises(ChangedError):
        download(uri, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges(http_server, tmp_path: Path) -> None:
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    counts: list[tuple[int, int | None]] = []
    path = download(
        http_server.put("a.ckpt", DATA), tmp_path, progress=lambda *count: counts.append(count)
    )
    assert path.read_bytes() == DATA
    assert counts[-1] == (len(DATA), None)


def test_a_folder_that_is_not_there(http_server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        download(http_server.put("a.ckpt", DATA), tmp_path / "nowhere" / "a.ckpt")
    assert http_server.log == []
