"""`download`: a file that is there whole, or not at all; and what of it is there stays."""

import base64
import errno
import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from torch import nn

import _anemoi_ckpt.cache
import _anemoi_ckpt.downloading
import _anemoi_ckpt.progress
import _anemoi_ckpt.transport
import anemoi_ckpt
import servers
from anemoi_ckpt import (
    AccessDeniedError,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    NotACheckpointError,
    UnreachableError,
    download,
    load,
    load_into,
    main,
)
from checkpoints import as_bytes

DATA = as_bytes(
    {"w": torch.arange(3_000_000), "v": torch.ones(3_000_000, dtype=torch.int64)}
)  # some parts of 8 MiB
OTHER = as_bytes({"w": torch.ones(3_000_000, dtype=torch.int64), "v": torch.arange(3_000_000)})
SHA256 = hashlib.sha256(DATA).hexdigest()
TEXT = bytes(range(256)) * 9000  # no archive: only the place's own digest can tell


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ── a file ────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_from_all_places(place, tmp_path: Path) -> None:
    uri = place.put("a b.ckpt", DATA)
    path = download(uri, tmp_path / "copy.ckpt")
    assert path == tmp_path / "copy.ckpt"
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert download(uri, tmp_path) == tmp_path / "a b.ckpt"
    assert load(tmp_path / "a b.ckpt")["v"].all()
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["a b.ckpt", "copy.ckpt"]
    assert not list(tmp_path.glob(".[ac]*"))


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_name_is_the_last_part_of_the_path(http_server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = http_server.put("run/last é.ckpt", DATA)
    assert download(f"{url}?sig=a%2Fb", ".") == Path("last é.ckpt")
    (tmp_path / "run").mkdir()
    assert download(url, "run/") == Path("run/last é.ckpt")
    found = {
        "s3://b/run/a.ckpt?versionId=1": "a.ckpt",
        "gs://b/run/a.ckpt#7": "a.ckpt",
        "https://acc.blob.core.windows.net/c/run/a%20b.ckpt?sig=x": "a b.ckpt",
        "file:///run/a%20b.ckpt": "a b.ckpt",
    }
    assert {uri: anemoi_ckpt.parse_uri(uri).filename for uri in found} == found
    assert anemoi_ckpt.URI("sftp://host/run/a.ckpt").filename == "a.ckpt"


def test_an_object_replaced_meanwhile_leaves_no_mixture(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)

    def fault(request: servers.Request) -> servers.Fault | None:
        late = len(http_server.log) == 4
        return servers.Fault(before=lambda: http_server.put("a.ckpt", OTHER)) if late else None

    http_server.fault = fault
    with pytest.raises(ChangedError):
        download(uri, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [DATA, TEXT], ids=["checkpoint", "text"])
def test_a_server_without_ranges(http_server, tmp_path: Path, data: bytes) -> None:
    uri = http_server.put("a.ckpt", data)
    whole = servers.Fault(ignore_range=True)
    broken = servers.Fault(ignore_range=True, cut=100_000)
    http_server.fault = lambda request: broken if len(http_server.log) == 2 else whole
    counts: list[tuple[int, int | None]] = []
    path = download(uri, tmp_path, progress=lambda *count: counts.append(count))
    assert path.read_bytes() == data
    assert counts[-1][1] is None
    assert names(tmp_path) == ["a.ckpt"]


def test_a_server_without_ranges_that_breaks_off_leaves_nothing(http_server, tmp_path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(ignore_range=True, cut=100_000)
    with pytest.raises(UnreachableError):
        download(uri, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("ranged", [True, False])
def test_an_empty_object(http_server, tmp_path: Path, ranged: bool) -> None:
    uri = http_server.put("a.ckpt", b"")
    if not ranged:
        http_server.fault = lambda request: servers.Fault(ignore_range=True)
    with pytest.raises(NotACheckpointError, match="the file is empty"):
        download(uri, tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(NotACheckpointError, match="the file is empty"):
        download(tmp_path / "empty", tmp_path / "copy")
    assert names(tmp_path) == ["empty"]


# ── a disk ────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_not_there(http_server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"cannot be written .*check the folder"):
        download(http_server.put("a.ckpt", DATA), tmp_path / "nowhere" / "a.ckpt")
    assert http_server.log == []
    assert names(tmp_path) == []


def test_a_disk_without_room(http_server, tmp_path: Path, monkeypatch) -> None:
    uri = http_server.put("a.ckpt", DATA)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(_anemoi_ckpt.downloading.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=f"takes {len(DATA)} more .* room for 1000; make"):
        download(uri, tmp_path)
    assert names(tmp_path) == []
    assert http_server.bytes_sent == 1


class FullDisk(io.FileIO):
    """Takes the first few megabytes."""

    room = 10_000_000

    def write(self, data: Any) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("place", ["http", "s3", "gcs", "azure"], indirect=True)
def test_a_disk_that_fills_up(place, tmp_path: Path, monkeypatch) -> None:
    uri = place.put("a.ckpt", DATA)
    monkeypatch.setattr(FullDisk, "room", 10_000_000)
    plain = Path.open

    def opened(path: Path, mode: str, **kw: Any) -> Any:
        return FullDisk(path, mode) if mode == "r+b" else plain(path, mode, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(
            CheckpointError, match=r"a.ckpt: it .*\(No space left on device\)"
        ) as caught:
            download(uri, tmp_path)
    assert not isinstance(caught.value, UnreachableError)
    assert "the same call goes on from there" in caught.value.__notes__[-1]
    assert not (tmp_path / "a.ckpt").exists()
    place.server.reset()
    assert download(uri, tmp_path).read_bytes() == DATA
    assert place.server.bytes_sent < len(DATA) - 5_000_000
    assert names(tmp_path) == ["a.ckpt"]


def test_a_folder_that_vanishes(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    folder = tmp_path / "to"
    folder.mkdir()

    vanished = threading.Event()

    def vanish() -> None:  # at once: a file may be made while others are removed
        shutil.rmtree(folder.rename(tmp_path / "gone"))
        vanished.set()

    http_server.fault = lambda request: (
        servers.Fault(before=vanish) if len(http_server.log) == 2 else None
    )
    with pytest.raises(CheckpointNotFoundError, match="cannot be written"):
        download(uri, folder)
    assert vanished.wait(60)  # the download may end while the files are still being removed
    assert names(tmp_path) == []


def test_a_folder_that_is_read_only(http_server, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")  # root may write everywhere

    monkeypatch.setattr(_anemoi_ckpt.downloading.filelock.FileLock, "acquire", refuse)
    with pytest.raises(AccessDeniedError, match=r"cannot be written \(Permission denied\)"):
        download(http_server.put("a.ckpt", DATA), tmp_path)
    assert http_server.log == []


# ── what was broken off ───────────────────────────────────────────────────────────────────────


def broken_off(http_server: servers.HTTPServer, folder: Path, data: bytes = DATA) -> str:
    """Begin a download that gets some 10 of 48 MB."""
    uri = http_server.put("a.ckpt", data)
    cut = servers.Fault(cut=2 * 1024**2)
    down = servers.Fault(status=503)
    http_server.fault = lambda request: (
        None if len(http_server.log) == 1 else cut if len(http_server.log) < 7 else down
    )
    with pytest.raises(UnreachableError) as caught:
        download(uri, folder)
    assert caught.value.__notes__[-1] == (
        f"what came is kept as {folder}/.a.ckpt.part: the same call goes on from there"
    )
    assert names(folder) == [".a.ckpt.journal", ".a.ckpt.part"]
    http_server.reset()
    return uri


def kept(folder: Path) -> int:
    """How many bytes are there: two chunks of each connection, but for what was being written."""
    chunks = len((folder / ".a.ckpt.journal").read_text().splitlines()) - 1
    assert 4 <= chunks <= 10
    return chunks * 1024**2


def test_a_download_goes_on_where_it_broke_off(http_server, tmp_path: Path) -> None:
    uri = broken_off(http_server, tmp_path)
    there = kept(tmp_path)
    counts: list[tuple[int, int | None]] = []
    path = download(uri, tmp_path, progress=lambda *count: counts.append(count))
    assert path.read_bytes() == DATA
    assert len(DATA) - there <= http_server.bytes_sent < len(DATA) - there + 100
    assert counts[0][0] == there
    assert counts[-1] == (len(DATA), len(DATA))
    assert names(tmp_path) == ["a.ckpt"]


def test_a_failure_leaves_what_was_there(http_server, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"what was there")
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(status=503)
    with pytest.raises(UnreachableError):
        download(uri, tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        download(tmp_path / "nothing", tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == b"what was there"
    assert names(tmp_path) == ["a.ckpt"]


def damaged(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / ".a.ckpt.journal").write_text(text)


def torn(folder: Path) -> None:
    with (folder / ".a.ckpt.journal").open("a") as journal:
        journal.write("4")  # of 44, say


BEGUN_ANEW: dict[str, Callable[[Path], object]] = {
    "empty": damaged(""),
    "garbage": damaged("\0" * 100),
    "another's": lambda folder: damaged(
        (folder / ".a.ckpt.journal").read_text().replace("[48", "[47")
    )(folder),
    "gone": lambda folder: (folder / ".a.ckpt.journal").unlink(),
    "part gone": lambda folder: (folder / ".a.ckpt.part").unlink(),
    "part cut": lambda folder: os.truncate(folder / ".a.ckpt.part", 1000),
    "no numbers": lambda folder: damaged((folder / ".a.ckpt.journal").read_text() + "x\n")(folder),
}


@pytest.mark.parametrize("damage", [*BEGUN_ANEW.values(), torn], ids=[*BEGUN_ANEW, "torn"])
def test_a_journal_that_cannot_be_trusted(http_server, tmp_path: Path, damage) -> None:
    uri = broken_off(http_server, tmp_path)
    fetched = len(DATA) - (kept(tmp_path) if damage is torn else 0)
    damage(tmp_path)
    assert download(uri, tmp_path).read_bytes() == DATA
    assert fetched <= http_server.bytes_sent < fetched + 100
    assert names(tmp_path) == ["a.ckpt"]


def test_what_is_left_of_another_object_is_not_gone_on_with(http_server, tmp_path: Path) -> None:
    broken_off(http_server, tmp_path)
    uri = http_server.put("a.ckpt", OTHER)
    assert download(uri, tmp_path).read_bytes() == OTHER


def test_an_object_without_a_tag_is_begun_anew(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    untagged = {"headers": {"ETag": None, "Last-Modified": None}}
    http_server.fault = lambda request: servers.Fault(
        **untagged, status=503 if len(http_server.log) > 5 else None
    )
    with pytest.raises(UnreachableError) as caught:
        download(uri, tmp_path)
    assert "kept" not in str(caught.value.__notes__)
    assert names(tmp_path) == []


def test_nothing_is_kept_of_what_shall_not_be_resumed(http_server, tmp_path: Path) -> None:
    uri = broken_off(http_server, tmp_path)
    answered = itertools.count()
    http_server.fault = lambda request: (
        None
        if request.range == "bytes=0-0" or next(answered) < 2  # the version, and two parts
        else servers.Fault(status=503)
    )
    with pytest.raises(UnreachableError):
        download(uri, tmp_path, resume=False)
    assert names(tmp_path) == []


def test_a_thread_that_comes_late_leaves_no_journal(http_server, tmp_path: Path) -> None:
    """On a busy machine one opened the journal after the failed download had removed it."""
    uri = anemoi_ckpt.parse_uri(http_server.put("a.ckpt", DATA))
    version = anemoi_ckpt.read_version(uri)
    part = _anemoi_ckpt.downloading._Part(tmp_path / "a.ckpt", version)
    source = _anemoi_ckpt.transport.Source(uri, version)
    part.begin()
    part.journal.unlink()
    with pytest.raises(CheckpointNotFoundError, match="cannot be written"):
        _anemoi_ckpt.downloading._fetch(source, part, range(100), lambda count: None)
    assert names(tmp_path) == [".a.ckpt.part"]


def test_a_killed_process_is_gone_on_with(http_server, tmp_path: Path, monkeypatch) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(rate=20_000_000)
    command = [sys.executable, "-c", CALL, uri, str(tmp_path)]
    for most in (5_000_000, 20_000_000, 35_000_000):
        reached, killed = threading.Event(), threading.Event()

        def send(
            *chunk: Any, most: int = most, reached: Any = reached, killed: Any = killed
        ) -> None:
            if http_server.bytes_sent >= most:
                reached.set()
                killed.wait()
            servers.HTTPServer.send(http_server, *chunk)

        with monkeypatch.context() as patch:
            patch.setattr(http_server, "send", send)
            with subprocess.Popen(command) as process:
                reached.wait()
                process.kill()
        killed.set()
        assert "a.ckpt" not in names(tmp_path)
    subprocess.run(command, check=True)
    assert (tmp_path / "a.ckpt").read_bytes() == DATA
    # a chunk of each connection may have been on its way, and what was in the sockets' buffers
    assert http_server.bytes_sent < len(DATA) + 3 * 6 * 4 * 1024**2
    assert set(names(tmp_path)) == {"a.ckpt"}


CALL = "import sys, anemoi_ckpt; anemoi_ckpt.download(*sys.argv[1:])"


def test_two_processes_do_not_get_in_each_others_way(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    command = [sys.executable, "-c", CALL, uri, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "a.ckpt").read_bytes() == DATA
    assert names(tmp_path) == ["a.ckpt"]


# ── checks ────────────────────────────────────────────────────────────────────────────────────


def test_the_digest_asked_for(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    assert download(uri, tmp_path, sha256=SHA256.upper()).read_bytes() == DATA
    (tmp_path / "a.ckpt").write_bytes(b"what was there")
    with pytest.raises(CorruptError, match=f"its sha256 is {SHA256}, and not the one asked for, 0"):
        download(uri, tmp_path, sha256="0" * 64)
    assert names(tmp_path) == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == b"what was there"
    with pytest.raises(ValueError, match="sha256 of download is 64 hexadecimal digits, not 'abc'"):
        download(uri, tmp_path, sha256="abc")


def flipped_once(server: servers.Server) -> None:
    """The first large answer has a wrong bit in its middle."""
    begun = []

    def fault(request: servers.Request) -> servers.Fault | None:
        large = request.method == "GET" and len(server.log) > 1
        if large and not begun:
            begun.append(request)
            return servers.Fault(flip=8 * 200_000)
        return None

    server.fault = fault


@pytest.mark.parametrize("data", [DATA, TEXT], ids=["CRC-32", "digest"])
@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_a_bit_that_flips_on_the_way_is_fetched_once_more(
    place, tmp_path: Path, data: bytes, caplog
) -> None:
    uri = place.put("a.ckpt", data)
    flipped_once(place.server)
    assert download(uri, tmp_path).read_bytes() == data
    assert "fetched once more: " in caplog.text
    if data is DATA:
        assert place.server.bytes_sent < 1.7 * len(data)  # the damaged record alone
    assert names(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_bits_that_always_flip_are_told(place, tmp_path: Path) -> None:
    uri = place.put("a.bin", TEXT)
    place.server.fault = lambda request: servers.Fault(flip=8 * 200_000) if request.range else None
    with pytest.raises(CorruptError, match="of the place"):
        download(uri, tmp_path)
    assert names(tmp_path) == []


DIGESTS = {
    "Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(TEXT).digest()).decode()}:",
    "x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(hashlib.md5(TEXT).digest()).decode()}",
    "x-ms-blob-content-md5": base64.b64encode(hashlib.md5(TEXT).digest()).decode(),
}


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_that_come_over_http(http_server, tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "google_crc32c", None)  # then the next best that is known
    uri = http_server.put("a.bin", TEXT)
    headers = {name: DIGESTS[name]}
    http_server.fault = lambda request: servers.Fault(headers=headers)
    assert download(uri, tmp_path).read_bytes() == TEXT
    http_server.fault = lambda request: servers.Fault(headers=headers, flip=8 * 1_000_000)
    with pytest.raises(CorruptError, match="and not the one of the place"):
        download(uri, tmp_path, resume=False)
    assert (tmp_path / "a.bin").read_bytes() == TEXT


def test_a_digest_that_is_none_tells_nothing(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    headers = {"x-ms-blob-content-md5": "nonsense!", "x-goog-hash": "md5=AAA"}
    http_server.fault = lambda request: servers.Fault(headers=headers)
    assert download(uri, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC32", "CRC32C", "SHA1"])
def test_checksums_of_s3(s3, tmp_path: Path, algorithm: str) -> None:
    import botocore.exceptions

    uri = s3.uri("a.bin")
    bucket, key = anemoi_ckpt.parse_uri(uri).bucket, anemoi_ckpt.parse_uri(uri).key
    given = {"ChecksumAlgorithm": algorithm}
    if algorithm == "CRC32C":  # boto3 itself needs another package for it
        given["ChecksumCRC32C"] = base64.b64encode(google_crc32c.Checksum(TEXT).digest()).decode()
    try:
        s3.sdk.put_object(Bucket=bucket, Key=key, Body=TEXT, **given)
    except botocore.exceptions.MissingDependencyException as err:
        pytest.skip(str(err))  # before 1.36 it sends no sum that it has not computed
    found = anemoi_ckpt.read_version(anemoi_ckpt.parse_uri(uri)).digests
    assert found["md5"] == hashlib.md5(TEXT).digest()
    assert algorithm.lower() in found
    assert download(uri, tmp_path).read_bytes() == TEXT


def test_an_object_of_many_parts_has_no_md5(s3) -> None:
    uri = anemoi_ckpt.parse_uri(s3.uri("parts.bin"))
    with anemoi_ckpt.open_writer(uri, {"min_part_size": 5 * 1024**2}) as stream:
        stream.write(bytes(12 * 1024**2))
    version = anemoi_ckpt.read_version(uri)
    assert "-" in version.tag
    assert "md5" not in version.digests


def test_damage_where_it_is_stored_is_told(http_server, tmp_path: Path) -> None:
    wrong = bytearray(DATA)
    wrong[len(wrong) // 2] ^= 1
    uri = http_server.put("a.ckpt", bytes(wrong))
    with pytest.raises(CorruptError, match=r"record .*data/1 .* do not match their checksum"):
        download(uri, tmp_path)
    with pytest.raises(CorruptError, match="no readable directory"):
        download(http_server.put("b.ckpt", DATA[:-1000]), tmp_path)
    wrong = bytearray(DATA)
    wrong[DATA.index(b"PK\3\4", 100)] ^= 1  # a local header
    with pytest.raises(CorruptError, match="has no header"):
        download(http_server.put("c.ckpt", bytes(wrong)), tmp_path)
    assert names(tmp_path) == []


def test_a_bit_that_flips_in_what_comes_whole(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(
        ignore_range=True, flip=8 * 30_000_000 if len(http_server.log) == 2 else None
    )
    assert download(uri, tmp_path).read_bytes() == DATA
    assert len(http_server.log) == 3


# ── the cache ─────────────────────────────────────────────────────────────────────────────────


def test_the_second_time_costs_one_request(place) -> None:
    uri = place.put("a.ckpt", DATA)
    path = download(uri)
    assert path.name.endswith("a.ckpt")
    assert path.read_bytes() == DATA
    if place.server is not None:
        place.server.log.clear()
    assert download(uri) == path
    if place.server is not None:
        assert len(place.server.log) == 1
        assert place.server.bytes_sent < 2000
    place.put("a.ckpt", OTHER)
    again = download(uri)
    assert again != path
    assert again.read_bytes() == OTHER
    assert path.read_bytes() == DATA  # somebody may be reading it


def test_where_the_cache_is(tmp_path: Path, monkeypatch) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.ckpt")
    assert download(tmp_path / "a.ckpt").is_relative_to(tmp_path / "cache")
    monkeypatch.delenv("ANEMOI_CKPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download(tmp_path / "a.ckpt").is_relative_to(tmp_path / "xdg" / "anemoi-ckpt")


def test_a_url_that_is_signed_anew_names_the_same_object(http_server) -> None:
    url = http_server.put("a.ckpt", DATA)
    secret = url.replace("://", "://user:hunter2@")
    urls = [
        url,
        secret,
        f"{url}?X-Amz-Signature=1&X-Amz-Date=2",
        f"{url}?sig=abc&se=2026-11-24&sv=1&sr=b",
        f"{url}?access_token=1",
    ]
    assert len({download(each) for each in urls}) == 1
    assert download(f"{url}?se=1") != download(url)  # no signature: it may mean anything
    cache = _anemoi_ckpt.cache.cache_folder()
    assert not any("hunter2" in path.read_text() for path in cache.rglob(".place"))


def test_without_a_tag_who_knows_if_it_is_the_same(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(headers={"ETag": None, "Last-Modified": None})
    path = download(uri)
    http_server.put("a.ckpt", OTHER)
    assert download(uri) == path
    assert path.read_bytes() == OTHER
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    assert download(uri).read_bytes() == OTHER


def test_many_processes_ask_and_one_downloads(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(rate=10_000_000)
    code = "import sys, anemoi_ckpt; print(anemoi_ckpt.download(sys.argv[1]))"
    command = [sys.executable, "-c", code, uri]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate()[0] for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop().strip()).read_bytes() == DATA
    assert http_server.bytes_sent < len(DATA) + 100


def test_who_waits_finds_what_the_other_brought(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: servers.Fault(rate=20_000_000)
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(download, [uri, uri]))
    assert len(paths) == 1
    assert http_server.bytes_sent < len(DATA) + 100


def test_a_digest_asked_for_of_what_is_kept(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    path = download(uri)
    http_server.log.clear()
    assert download(uri, sha256=SHA256) == path
    assert len(http_server.log) == 1
    path.write_bytes(OTHER)  # somebody wrote to it
    assert download(uri, sha256=SHA256).read_bytes() == DATA


def test_loading_by_way_of_the_cache(http_server) -> None:
    net = nn.Linear(300, 700)
    uri = http_server.put("a.ckpt", as_bytes({"state_dict": net.state_dict(), "epoch": 3}))
    assert load(uri, cached=True)["epoch"] == 3
    http_server.log.clear()
    model = nn.Linear(300, 700)
    report = load_into(model, uri, cached=True)
    assert torch.equal(model.weight, net.weight)
    assert report.place == uri
    assert len(http_server.log) == 1


def test_a_cached_copy_that_was_damaged_is_fetched_anew(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    path = download(uri)
    wrong = bytearray(DATA)
    wrong[len(wrong) // 2] ^= 1
    path.write_bytes(wrong)
    assert torch.equal(load(uri, cached=True)["w"], torch.arange(3_000_000))
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("to", ["s3://bucket/a.ckpt?sig=secret", "hf://me/it/a.ckpt"])
def test_a_download_is_to_this_machine(http_server, to: str) -> None:
    uri = http_server.put("a.ckpt", DATA)
    with pytest.raises(ValueError, match=r"not '.*a\.ckpt.*'.*anemoi-ckpt copy") as caught:
        download(uri, to)
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="not int"):
        download(uri, 3)  # type: ignore[arg-type] # the case
    assert http_server.log == []


def test_a_file_to_write_may_be_a_url(http_server, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    assert download(uri, f"file://{tmp_path}/copy%20of.ckpt") == tmp_path / "copy of.ckpt"


@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
def test_a_folder_that_no_file_can_be_created_in(http_server) -> None:
    uri = http_server.put("a.ckpt", DATA)
    with pytest.raises(CheckpointError, match="it cannot be written"):
        download(uri, "/proc/a.ckpt")  # even by root


class Refusing:
    """Raises when it is rebuilt."""

    def __init__(self) -> None:
        """Have a state, so that it is set."""
        self.x = 1

    def __setstate__(self, state: Any) -> None:
        """Refuse it."""
        raise ValueError("not today")


@pytest.mark.parametrize("trust", [True, [Refusing]])
@pytest.mark.parametrize("missing", [True, False])
def test_an_error_of_trusted_code_leaves_the_cached_copy(
    http_server, monkeypatch, trust: Any, missing: bool
) -> None:
    uri = http_server.put("a.ckpt", as_bytes({"w": torch.ones(3), "odd": Refusing()}))
    path = download(uri)
    before = path.read_bytes(), path.stat().st_ino
    if missing:
        monkeypatch.delattr(sys.modules[__name__], "Refusing")
        trust = True  # a list would have the class
    http_server.log.clear()
    with pytest.raises(CheckpointError) as caught:
        load(uri, cached=True, trust=trust)
    assert caught.value.place == uri  # and not the copy
    assert ("cannot be imported" if missing else "not today") in str(caught.value)
    assert len(http_server.log) == 1
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_the_cache_is_listed_and_cleared(http_server, capsys, tmp_path: Path) -> None:
    def shown(*arguments: str) -> str:
        assert main(["cache", *arguments]) == 0
        return str(capsys.readouterr().out)

    folder = _anemoi_ckpt.cache.cache_folder()
    assert shown() == f"     0 B  in {folder}\n"
    urls = [http_server.put("a.ckpt", DATA), http_server.put("b.ckpt", as_bytes({}))]
    paths = [download(f"{url}?sig=hunter2") for url in urls]
    (folder / "stray").write_text("not ours")
    listed = shown()
    assert listed.splitlines()[0] == f"   48 MB  {urls[0]}?sig=***"
    assert listed.splitlines()[1].strip() == str(paths[0])
    assert listed.endswith(f"   48 MB  in {folder}\n")
    with _anemoi_ckpt.downloading.locked(paths[0]):
        assert "a.ckpt" not in shown("--clear")  # it is on its way
    assert "b.ckpt" not in shown()
    assert shown("--clear", "*nothing*").endswith("0 B  removed\n")
    assert shown("*a.ckpt*").splitlines()[0].endswith("/a.ckpt?sig=***")
    assert "a.ckpt" in shown("--clear", "*a.ckpt*")
    assert names(folder) == ["stray"]


def test_what_broke_off_is_listed_as_not_whole(http_server, capsys) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: (
        servers.Fault(status=503) if len(http_server.log) > 3 else None
    )
    with pytest.raises(UnreachableError):
        download(uri)
    main(["cache"])
    assert "a.ckpt  (not whole)" in capsys.readouterr().out
    main(["cache", "--clear"])
    assert "a.ckpt  (not whole)" in capsys.readouterr().out
    assert list(_anemoi_ckpt.cache.cache_folder().iterdir()) == []


# ── what a server calls it ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ('attachment; filename="pangu.ckpt"', "pangu.ckpt"),
        ("attachment; filename*=UTF-8''%C3%A9.ckpt", "é.ckpt"),
        ('attachment; filename="../../etc/pangu.ckpt"', "pangu.ckpt"),
        ('attachment; filename=".."', "content"),
        ('attachment; filename=".bashrc"', "content"),
        ("attachment; filename*=UTF-8''a%00b.ckpt", "content"),
        (f'attachment; filename="{"x" * 300}.ckpt"', "content"),
        ("inline", "content"),
        (None, "content"),
    ],
)
def test_a_server_names_what_its_url_does_not(
    said: str | None, name: str, http_server, tmp_path: Path
) -> None:
    url = http_server.put("records/1/content", DATA)
    headers = {"Content-Disposition": said} if said else {}
    http_server.fault = lambda request: servers.Fault(headers=headers)
    assert download(url, tmp_path) == tmp_path / name
    assert (tmp_path / name).read_bytes() == DATA
    ranges = [request.range for request in http_server.log]
    assert ranges.count("bytes=0-0") == 1  # name and version are told by one answer
    named = http_server.put("b.ckpt", DATA)
    assert download(named, tmp_path) == tmp_path / "b.ckpt"  # a URL that names it wins


def test_a_server_without_ranges_names_it_too(http_server, tmp_path: Path) -> None:
    url = http_server.put("records/1/content", DATA)
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    assert download(url, tmp_path) == tmp_path / "content"
    headers = {"Content-Disposition": "attachment; filename=pangu.ckpt"}
    http_server.fault = lambda request: servers.Fault(ignore_range=True, headers=headers)
    http_server.log.clear()
    assert download(url, tmp_path) == tmp_path / "pangu.ckpt"
    assert (tmp_path / "pangu.ckpt").read_bytes() == DATA
    assert [request.range for request in http_server.log] == ["bytes=0-0", None]
