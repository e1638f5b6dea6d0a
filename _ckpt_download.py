"""How a checkpoint comes to a disk: gone on with where it broke off, checked, and shared.

download · ranks · part · checks · cache
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import mmap
import os
import re
import shutil
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import filelock
import platformdirs
from attrs import field, frozen
from zlib_ng import zlib_ng

from _ckpt_archive import LOCAL_SIGNATURE, find_damage, what_instead
from _ckpt_errors import (
    ChangedError,
    CheckpointError,
    CorruptError,
    NotACheckpointError,
    redact,
)
from _ckpt_places import (
    CHUNK_BYTES,
    HTTPURI,
    URI,
    LocalURI,
    Notify,
    UnrangedError,
    Version,
    empty_file,
    open_writer,
    unwritten,
)
from _ckpt_ranks import Ranks
from _ckpt_sources import (
    PART_BYTES,
    Progress,
    Source,
    Transport,
    find_version,
    in_parallel,
    log,
    part_bytes,
    shown,
    stream_whole,
)

# ── download ──────────────────────────────────────────────────────────────────────────────────


@frozen
class Transfer:
    """What is to be downloaded, and how."""

    place: URI
    transport: Transport
    progress: Progress
    sha256: str | None = None
    resume: bool = True


def download_to(target: Path, transfer: Transfer) -> None:
    """Bring a file, or what is missing of it; check it; and only then give it its name.

    Raises:
        CheckpointError: it cannot be had, or not be written, or is not what was stored.
    """
    with _locked(target):
        _bring(target, transfer, _find_version(transfer))


def _find_version(transfer: Transfer) -> Version | None:
    """Ask which object there is; None where a place gives all of it, or nothing."""
    try:
        return find_version(transfer.place, transfer.transport)
    except UnrangedError:
        return None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let one process after the other write a file."""
    path = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(path)
    with unwritten(_local(target)):
        target.parent.stat()  # else filelock would make the folder
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # who waits for it notices, and makes another
        lock.release()


def _local(path: Path) -> LocalURI:
    return LocalURI(str(path), str(path))


def _bring(target: Path, transfer: Transfer, version: Version | None) -> None:
    try:
        _bring_part(target, transfer, version)
    except UnrangedError:  # though the place could tell of it
        _bring_part(target, transfer, None)


def _bring_part(target: Path, transfer: Transfer, version: Version | None) -> None:
    part = _Part(target, version)
    if not transfer.resume:
        part.remove()
    try:
        _fill(part, transfer)
        damage = _damage(part, transfer)
        if damage:  # fetched once more, then an error
            for extent, problem in damage:
                log.warning("fetched once more: %s", problem)
                part.forget(extent)
            _fill(part, transfer)
            damage = _damage(part, transfer)
        if damage:
            raise damage[0][1]  # noqa: TRY301 - the part is removed below, as for all others
        with unwritten(_local(target)):
            part.path.replace(target)
    except (ChangedError, CorruptError, NotACheckpointError, UnrangedError):
        part.remove()  # it is of no use
        raise
    except BaseException as err:
        if transfer.resume and part.resumable:
            err.add_note(f"what came is kept as {part.path}: the same call goes on from there")
        else:
            part.remove()
        raise
    part.journal.unlink(missing_ok=True)


def _fill(part: _Part, transfer: Transfer) -> None:
    """Bring what is missing of a part."""
    if part.version is None:
        with shown(transfer.place, None, transfer.progress) as notify, part.opened("w+b") as file:
            stream_whole(transfer.place, file, transfer.transport, notify)
        return
    part.begin()
    source = Source(transfer.place, part.version, transfer.transport)
    extents = list(part.missing(part_bytes(source, source.size)))
    missing = sum(map(len, extents))
    part.require_room(missing)
    with shown(transfer.place, source.size, transfer.progress) as notify:
        notify(source.size - missing)
        in_parallel([partial(_fetch, source, part, each, notify) for each in extents], source)


def _fetch(source: Source, part: _Part, extent: range, notify: Notify) -> None:
    with part.opened("r+b") as file, part.journal.open("ab", buffering=0) as journal:
        views = part.written_through(extent, file, journal)
        source.read_through(extent.start, len(extent), views, notify)


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Brought:
    """A file that the first rank has."""

    path: Path
    size: int
    modified: int  # nanoseconds
    place: str


def download_shared(
    bring: Callable[[], tuple[Path, URI]], own: Callable[[Path], Path], ranks: Ranks, note: bool
) -> Path:
    """Bring a file to the first rank, and from there to each disk that does not have it.

    Args:
        bring: brings it, and tells where from.
        own: gives a rank's own path for the first one's.
        ranks: who wants it.
        note: whether to note beside it where it is from, in folders that may have to be made.

    Raises:
        CheckpointError: as for `download_to`, on all ranks.
    """
    brought, problem = None, None
    if not ranks.rank:
        try:
            path, place = bring()
            status = path.stat()
            brought = _Brought(path, status.st_size, status.st_mtime_ns, redact(str(place)))
        except Exception as err:  # noqa: BLE001 - raised on all ranks
            problem = err
    first = cast("_Brought", ranks.agree(brought, problem)[0])
    target = own(first.path)
    where = (socket.gethostname(), str(target.absolute()))
    lacking = [*dict.fromkeys(filter(None, ranks.agree(None if _sees(target, first) else where)))]
    if lacking:
        asked = ranks.agree(where)
        writes = where in lacking and asked.index(where) == ranks.rank
        _hand_on(first, target if writes else None, ranks, note)
    return target


def _sees(target: Path, first: _Brought) -> bool:
    """Tell whether a rank sees the very file that the first one has, on whatever disk."""
    with suppress(OSError):
        status = target.stat()
        return (status.st_size, status.st_mtime_ns) == (first.size, first.modified)
    return False


def _hand_on(first: _Brought, target: Path | None, ranks: Ranks, note: bool) -> None:
    """Give the first rank's file to those that write it, all or nothing."""
    problem: Exception | None = None
    sink: Any = None
    with ExitStack() as stack:
        try:
            source: Any = None if ranks.rank else stack.enter_context(first.path.open("rb"))
            if target is not None:
                if note:
                    _note(target, first.place)
                sink = stack.enter_context(open_writer(_local(target)))
        except (CheckpointError, OSError) as err:
            problem = err
        ranks.agree(None, problem)
        crc, room = 0, memoryview(bytearray(min(PART_BYTES, first.size)))
        for start in range(0, first.size, PART_BYTES):
            part = room[: first.size - start]
            if source is not None and source.readinto(part) < len(part):
                problem = CorruptError(first.path, "the file got shorter", "do not write to it")
            ranks.send([part], 0)()
            crc = zlib_ng.crc32(part, crc)
            if sink is not None and problem is None:
                try:
                    sink.write(part)
                except OSError as err:
                    problem = err
        if len({*ranks.agree(crc, problem)}) > 1:
            raise CorruptError(first.path, "ranks got different bytes", "check the network")


# ── part ──────────────────────────────────────────────────────────────────────────────────────

_WRITE_BYTES = 128 * 1024  # more takes large pages, which a virtual machine's host gives slowly


@frozen
class _Part:
    """A file that is not whole yet, and beside it the journal of what of it is there.

    The journal's first line says of which object, each other one a chunk that was written (or,
    as its complement, one that was found wrong). So whoever is killed at any moment leaves
    nothing that is taken for what it is not.
    """

    target: Path
    version: Version | None
    lock: threading.Lock = field(factory=threading.Lock, repr=False)  # else who waits, spins

    @property
    def path(self) -> Path:
        return self.target.with_name(f".{self.target.name}.part")

    @property
    def journal(self) -> Path:
        return self.target.with_name(f".{self.target.name}.journal")

    @property
    def size(self) -> int:
        return self.version.size if self.version else self.path.stat().st_size

    @property
    def header(self) -> bytes:
        tag = self.version.tag if self.version else None
        return json.dumps([self.size, tag, CHUNK_BYTES]).encode()

    @property
    def resumable(self) -> bool:
        """Tell whether some of this very object is there: without a tag, who knows."""
        tagged = self.version is not None and self.version.tag is not None
        return tagged and self.path.is_file() and bool(self._chunks())

    def _chunks(self) -> set[int]:
        """Read the numbers of the chunks that are there."""
        try:
            header, *lines = self.journal.read_bytes().split(b"\n")
            if header != self.header or self.path.stat().st_size != self.size:
                return set()
            found: set[int] = set()
            for number in map(int, lines[:-1]):  # what follows the last line's end is torn
                found.add(number) if number >= 0 else found.discard(~number)
        except (OSError, ValueError):
            return set()
        return found

    def begin(self) -> None:
        """Make a sparse file, unless some of it is there."""
        if self.resumable:
            return
        with self.opened("wb") as file:
            file.truncate(self.size)
            self.journal.write_bytes(self.header + b"\n")

    def missing(self, most: int) -> Iterator[range]:
        """Give what is not there yet, in extents of at most so many bytes."""
        chunks = self._chunks()
        start = stop = 0
        for number in range(-(-self.size // CHUNK_BYTES)):
            first, last = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, self.size)
            if number in chunks or stop - start >= most:
                if start < stop:
                    yield range(start, stop)
                start = stop = last if number in chunks else first
            if number not in chunks:
                stop = last
        if start < stop:
            yield range(start, stop)

    def written_through(self, extent: range, file: BinaryIO, journal: Any) -> Iterator[memoryview]:
        """Give views to fill, and write each to the file once it is full."""
        room = memoryview(bytearray(CHUNK_BYTES))
        for start in range(extent.start, extent.stop, CHUNK_BYTES):
            view = room[: min(CHUNK_BYTES, extent.stop - start)]
            yield view
            with unwritten(_local(self.target)), self.lock:
                file.seek(start)
                file.writelines(
                    view[at : at + _WRITE_BYTES] for at in range(0, len(view), _WRITE_BYTES)
                )
                file.flush()
                journal.write(b"%d\n" % (start // CHUNK_BYTES))

    def forget(self, extent: range) -> None:
        """Note that what is there is wrong."""
        if self.version is None:
            return
        first, last = extent.start // CHUNK_BYTES, (extent.stop - 1) // CHUNK_BYTES
        with unwritten(_local(self.target)), self.journal.open("ab") as journal:
            journal.writelines(b"%d\n" % ~number for number in range(first, last + 1))

    def require_room(self, size: int) -> None:
        """Refuse to begin what the disk has no room for."""
        free = shutil.disk_usage(self.target.parent).free
        if free < size:
            raise CheckpointError(
                self.target,
                f"it takes {size} more bytes, and the disk has room for {free}",
                "make room, or give another folder (as `to`, or as ANEMOI_CKPT_CACHE)",
            )

    @contextmanager
    def opened(self, mode: str) -> Iterator[Any]:
        with unwritten(_local(self.target)), self.path.open(mode) as file:
            yield file

    def remove(self) -> None:
        for path in (self.path, self.journal):
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()


# ── checks ────────────────────────────────────────────────────────────────────────────────────

_STRONGEST_FIRST = ("sha256", "sha512", "crc32c", "crc32", "md5")


def _damage(part: _Part, transfer: Transfer) -> list[tuple[range, CorruptError]]:
    """List what of a file is not what was stored, by all that is known of that."""
    with part.opened("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise empty_file(transfer.place)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        instead = what_instead(bytes(data[:64]))
        if instead:
            raise NotACheckpointError(transfer.place, *instead)
        if data[: len(LOCAL_SIGNATURE)] == LOCAL_SIGNATURE:
            found = find_damage(transfer.place, file, data)
            if found:
                return found
        digests = part.version.digests if part.version else {}
        checks = [
            (name, digests[name], "of the place") for name in _STRONGEST_FIRST if name in digests
        ]
        if transfer.sha256 is not None:
            checks.insert(0, ("sha256", bytes.fromhex(transfer.sha256), "asked for"))
        for name, digest, whose in checks:
            actual = _digest(name, data)
            if actual is not None and actual != digest:
                problem = f"its {name} is {actual.hex()}, and not the one {whose}, {digest.hex()}"
                remedy = "the stored file is damaged, or another than was meant"
                return [(range(size), CorruptError(transfer.place, problem, remedy))]
            if actual is not None and whose == "of the place":
                break  # one of them is enough
    return []


def _digest(name: str, data: memoryview) -> bytes | None:
    """Compute a digest; None where nothing here can."""
    if name == "crc32":
        return int(zlib_ng.crc32(data)).to_bytes(4, "big")
    if name == "crc32c":
        try:
            made = importlib.import_module("google_crc32c").Checksum()
        except ImportError:
            return None
    else:
        made = hashlib.new(name, usedforsecurity=False)
    for start in range(0, len(data), CHUNK_BYTES):  # so that an interrupt is heard
        made.update(bytes(data[start : start + CHUNK_BYTES]))
    return bytes(made.digest())


# ── cache ─────────────────────────────────────────────────────────────────────────────────────

_SIGNING = re.compile(
    r"(?i)X-(?:Amz|Goog)-.*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id"
    r"|.*token|.*password|api_?key"
)
_SAS = re.compile(r"s[veprst]|sig|sip|spr|srt|sdd|sk\w+|saoid|suoid|scid|ses")  # Azure's


def cache_folder() -> Path:
    """Give the folder that `ANEMOI_CKPT_CACHE` names, else one in the platform's own for caches."""
    given = os.environ.get("ANEMOI_CKPT_CACHE")
    if given:
        return Path(given).expanduser()
    return platformdirs.user_cache_path("anemoi-ckpt", appauthor=False)


def download_to_cache(transfer: Transfer) -> Path:
    """Bring a file once for all who ask on this machine, for as long as the object is the same."""
    version = _find_version(transfer)
    known = [version.size, version.tag] if version else None
    key = hashlib.sha256(json.dumps([_identity(transfer.place), known]).encode()).hexdigest()[:32]
    target = cache_folder() / key / (transfer.place.filename or "checkpoint")
    tagged = version is not None and version.tag is not None  # else who knows if it is the same
    if tagged and _is_kept(target, transfer):
        return target
    _note(target, redact(str(transfer.place)))
    with _locked(target):
        if not (tagged and _is_kept(target, transfer)):  # another process may have brought it
            _bring(target, transfer, version)
    return target


def _note(target: Path, place: str) -> None:
    """Note, beside where a file is to be, where it is from."""
    with unwritten(_local(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / _NOTE).write_text(place, "utf-8")


def _is_kept(target: Path, transfer: Transfer) -> bool:
    """Tell whether a file is there; one that is not what was asked for is fetched anew."""
    if not target.is_file():
        return False
    if transfer.sha256 is None:
        return True
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == transfer.sha256.lower()


def _identity(place: URI) -> str:
    """Give what names an object, without what signs a request for it."""
    if isinstance(place, LocalURI):
        return str(Path(place.path).resolve())
    url = urllib.parse.urlsplit(place.text)
    query = urllib.parse.parse_qsl(url.query, keep_blank_values=True)
    signed = "sig" in dict(query)
    kept = [
        (name, value)
        for name, value in query
        if not _SIGNING.fullmatch(name) and not (signed and _SAS.fullmatch(name))
    ]
    host = url.netloc.rpartition("@")[2] if isinstance(place, HTTPURI) else url.netloc
    return url._replace(netloc=host, query=urllib.parse.urlencode(kept)).geturl()


_NOTE = ".place"  # beside a cached file: where it is from


@frozen
class CacheEntry:
    """A folder of the cache: a file in it, or what came of one."""

    place: str
    folder: Path
    file: Path | None  # None where it is not whole
    size: int  # bytes on the disk


def cache_entries(glob: str = "*") -> list[CacheEntry]:
    """List what the cache holds of the places that a glob chooses, the largest first."""
    found = []
    for note in cache_folder().glob(f"*/{_NOTE}"):
        with suppress(FileNotFoundError):  # cleared meanwhile
            place = note.read_text("utf-8")
            files = [path for path in note.parent.iterdir() if path != note]
            whole = [path for path in files if not path.name.startswith(".")]
            size = sum(path.stat().st_blocks * 512 for path in files)
            found.append(CacheEntry(place, note.parent, next(iter(whole), None), size))
    chosen = [entry for entry in found if fnmatch.fnmatchcase(entry.place, glob)]
    return sorted(chosen, key=lambda entry: -entry.size)


def clear_cache(entries: list[CacheEntry]) -> list[CacheEntry]:
    """Remove cached files, but for those that are on their way; give what was removed."""
    removed = []
    for entry in entries:
        locks = [filelock.FileLock(path) for path in entry.folder.glob(".*.lock")]
        try:
            for lock in locks:
                lock.acquire(blocking=False)
        except filelock.Timeout:
            continue
        else:
            shutil.rmtree(entry.folder, ignore_errors=True)
            removed.append(entry)
        finally:
            for lock in locks:
                lock.release()
    return removed
