"""A whole file on a disk: resumed where a download broke off, checked, and shared by ranks.

download · ranks · part · checks
"""

from __future__ import annotations

import gzip
import json
import mmap
import os
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import filelock
from attrs import evolve, field, frozen
from zlib_ng import zlib_ng

from _anemoi_ckpt.digests import hasher, strongest_first
from _anemoi_ckpt.errors import (
    ChangedError,
    CheckpointError,
    CorruptError,
    NotACheckpointError,
    redact,
)
from _anemoi_ckpt.formats import what_instead
from _anemoi_ckpt.formats.torch_zip import LOCAL_SIGNATURE, find_damage
from _anemoi_ckpt.parallel import in_parallel, part_bytes
from _anemoi_ckpt.places import CHUNK_BYTES, URI, Notify, UnrangedError, Version, open_writer
from _anemoi_ckpt.places.explained import empty_file
from _anemoi_ckpt.places.local import LocalURI, explained_writing, hidden
from _anemoi_ckpt.progress import Progress, shown
from _anemoi_ckpt.ranks import Ranks
from _anemoi_ckpt.transport import (
    PART_BYTES,
    Source,
    Transport,
    find_version,
    log,
    stream_whole,
)
from _anemoi_ckpt.unpacking import GZIP_MARK, SNIFFED_BYTES, bounded, unzipped_start

# ── download ──────────────────────────────────────────────────────────────────────────────────


@frozen
class Transfer:
    """What is to be downloaded, and how."""

    place: URI
    transport: Transport
    progress: Progress
    sha256: str | None = None
    resume: bool = True
    fresh: bool = False  # fetch what is in the cache anew


def download_to(
    target: Path, transfer: Transfer, version: Callable[[], Version | None] | None = None
) -> None:
    """Download a file, or what is missing of it; check it; and only then give it its name.

    Args:
        target: the file.
        transfer: what, and how.
        version: asks which object it is, where the caller has an answer.

    Raises:
        CheckpointError: the file cannot be read or written, or differs from the stored one.
    """
    with locked(target):
        bring(target, transfer, version() if version else pinned_version(transfer))


def pinned_version(transfer: Transfer) -> Version | None:
    """Ask for the object's version; None if the place serves no ranges."""
    return version_and_name(transfer)[0]


def version_and_name(transfer: Transfer) -> tuple[Version | None, str | None]:
    """Ask for the object's version, as `pinned_version`, and what the place calls a copy of it."""
    try:
        version = find_version(transfer.place, transfer.transport)
    except UnrangedError as err:
        return None, err.name
    return version, version.name


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let only one process at a time write a file."""
    path = hidden(target, "lock")
    lock = filelock.FileLock(path)
    with explained_writing(local_uri(target)):
        path.touch()  # filelock creates the folder, and tries for ever where no file can be
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # a waiting process notices, and creates another
        lock.release()


def local_uri(path: Path) -> LocalURI:
    return LocalURI(str(path), str(path))


def bring(target: Path, transfer: Transfer, version: Version | None) -> None:
    codings = version.codings if version else ""
    try:
        _bring_part(target, transfer, version, codings)
    except UnrangedError:  # although the place told its version
        _bring_part(target, transfer, None, codings)


def _bring_part(target: Path, transfer: Transfer, version: Version | None, codings: str) -> None:
    part = _Part(target, version)
    if not transfer.resume:
        part.remove()
    try:
        _fill(part, transfer)
        coded = _is_coded(part, codings)
        stored = evolve(transfer, sha256=None) if coded else transfer
        damage = _damage(part, stored)
        if damage:  # fetch it once more; then raise
            for extent, problem in damage:
                log.warning("fetched once more: %s", problem)
                part.forget(extent)
            _fill(part, transfer)
            damage = _damage(part, stored)
        if coded and not damage:
            part = _uncoded(part, transfer.place)
            damage = _damage(part, transfer)
        if damage:
            raise damage[0][1]  # noqa: TRY301 - the part is removed below, as for all others
        with explained_writing(local_uri(target)):
            part.path.replace(target)
    except (ChangedError, CorruptError, NotACheckpointError, UnrangedError):
        part.remove()  # useless for a later call
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
        in_parallel([partial(_fetch, source, part, extent, notify) for extent in extents], source)


def _fetch(source: Source, part: _Part, extent: range, notify: Notify) -> None:
    with part.opened("r+b") as file, part.journaling() as journal:
        views = part.written_through(extent, file, journal)
        source.read_through(extent.start, len(extent), views, notify)


def _is_coded(part: _Part, codings: str) -> bool:
    """Tell whether a file was compressed on its way into a store, which names that a coding.

    What is named ``.gz``, and is that once, is as its name says.
    """
    if "gzip" not in codings:
        return False
    with part.opened("rb") as file:
        start = file.read(SNIFFED_BYTES)
    twice = unzipped_start(start).startswith(GZIP_MARK)
    return start.startswith(GZIP_MARK) and (twice or part.target.suffix.lower() != ".gz")


def _uncoded(part: _Part, place: URI) -> _Part:
    """Undo the coding of a part; nobody knows the digests of what is in it."""
    plain = hidden(part.target, "plain")
    try:
        with (
            part.opened("rb") as packed,
            gzip.GzipFile(fileobj=packed) as unzipping,
            explained_writing(local_uri(part.target)),
            plain.open("wb") as file,
        ):
            read = bounded(unzipping.read, packed.tell, place)
            while chunk := _unzipped(read, place):
                file.write(chunk)
        with explained_writing(local_uri(part.target)):
            plain.replace(part.path)
    finally:
        plain.unlink(missing_ok=True)
    return evolve(part, version=None)


def _unzipped(read: Callable[[int], bytes], place: URI) -> bytes:
    try:
        return read(CHUNK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise CorruptError(
            place, f"it cannot be decompressed ({err!r})", "was its upload complete?"
        ) from err


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Brought:
    """A file that the first rank has."""

    path: Path
    size: int
    modified: int  # nanoseconds
    place: str


def download_shared(
    bring_first: Callable[[], tuple[Path, URI]],
    own: Callable[[Path], Path],
    ranks: Ranks,
    prepare: Callable[[Path, str], None],
) -> Path:
    """Bring a file to the first rank, and from there to each disk that does not have it.

    Args:
        bring_first: brings it, and tells where from.
        own: gives a rank's own path for the first one's.
        ranks: who wants it.
        prepare: called with the path and the place on each rank that writes the file.

    Raises:
        CheckpointError: as for `download_to`, on all ranks.
    """
    brought, problem = None, None
    if not ranks.rank:
        try:
            with ranks.beating():
                path, place = bring_first()
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
        _send_file(first, target if writes else None, ranks, prepare)
    return target


def _sees(target: Path, first: _Brought) -> bool:
    """Tell whether a rank sees the first rank's file, on a shared disk, say."""
    with suppress(OSError):
        status = target.stat()
        return (status.st_size, status.st_mtime_ns) == (first.size, first.modified)
    return False


def _send_file(
    first: _Brought, target: Path | None, ranks: Ranks, prepare: Callable[[Path, str], None]
) -> None:
    """Send the first rank's file to those that write it, all or nothing."""
    problem: Exception | None = None
    sink: Any = None
    with ExitStack() as stack:
        try:
            source: Any = None if ranks.rank else stack.enter_context(first.path.open("rb"))
            if target is not None:
                prepare(target, first.place)
                sink = stack.enter_context(open_writer(local_uri(target)))
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
    """An unfinished file, and beside it a journal of the chunks that it has.

    The first line of the journal identifies the object. Each other line is the number of a chunk
    that was written, or the complement of the number of a chunk that turned out wrong. A process
    that is killed at any moment leaves no chunk that a later one would mistake for a whole one.
    """

    target: Path
    version: Version | None
    lock: threading.Lock = field(
        factory=threading.Lock, repr=False
    )  # else the threads wait for the file's own lock by spinning

    @property
    def path(self) -> Path:
        return hidden(self.target, "part")

    @property
    def journal(self) -> Path:
        return hidden(self.target, "journal")

    @property
    def size(self) -> int:
        return self.version.size if self.version else self.path.stat().st_size

    @property
    def header(self) -> bytes:
        tag = self.version.tag if self.version else None
        return json.dumps([self.size, tag, CHUNK_BYTES]).encode()

    @property
    def resumable(self) -> bool:
        """Tell whether the part has chunks of this very object, which only a tag can prove."""
        tagged = self.version is not None and self.version.tag is not None
        return tagged and self.path.is_file() and bool(self._chunks())

    def _chunks(self) -> set[int]:
        """Read the numbers of the chunks that are there."""
        try:
            header, *lines = self.journal.read_bytes().split(b"\n")
            if header != self.header or self.path.stat().st_size != self.size:
                return set()
            chunks: set[int] = set()
            for number in map(int, lines[:-1]):  # what follows the last line's end is torn
                chunks.add(number) if number >= 0 else chunks.discard(~number)
        except (OSError, ValueError):
            return set()
        return chunks

    def begin(self) -> None:
        """Create a sparse file, unless the part can be resumed."""
        if self.resumable:
            return
        with self.opened("wb") as file:
            file.truncate(self.size)
            self.journal.write_bytes(self.header + b"\n")

    def missing(self, most: int) -> Iterator[range]:
        """Give the extents that are missing, each of at most so many bytes."""
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
            with explained_writing(local_uri(self.target)), self.lock:
                file.seek(start)
                file.writelines(
                    view[at : at + _WRITE_BYTES] for at in range(0, len(view), _WRITE_BYTES)
                )
                file.flush()
                journal.write(b"%d\n" % (start // CHUNK_BYTES))

    def forget(self, extent: range) -> None:
        """Note in the journal that the chunks of an extent are wrong."""
        if self.version is None:
            return
        first, last = extent.start // CHUNK_BYTES, (extent.stop - 1) // CHUNK_BYTES
        with self.journaling() as journal:
            journal.writelines(b"%d\n" % ~number for number in range(first, last + 1))

    def require_room(self, size: int) -> None:
        """Raise if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.target.parent).free
        if free < size:
            raise CheckpointError(
                self.target,
                f"it takes {size} more bytes, and the disk has room for {free}",
                "make room, or give another folder (as `to`, or as ANEMOI_CKPT_CACHE)",
            )

    @contextmanager
    def opened(self, mode: str) -> Iterator[Any]:
        with explained_writing(local_uri(self.target)), self.path.open(mode) as file:
            yield file

    @contextmanager
    def journaling(self) -> Iterator[Any]:
        """Append to the journal. One that was removed, when the download failed, stays away."""
        with explained_writing(local_uri(self.target)):
            descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "ab", buffering=0) as journal:
                yield journal

    def remove(self) -> None:
        for path in (self.path, self.journal):
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()


# ── checks ────────────────────────────────────────────────────────────────────────────────────


def _damage(part: _Part, transfer: Transfer) -> list[tuple[range, CorruptError]]:
    """List the extents that differ from the stored file, by all checksums that are known."""
    with part.opened("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise empty_file(transfer.place)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        instead = what_instead(bytes(data[:64]))
        if instead:
            raise NotACheckpointError(transfer.place, *instead)
        if data[: len(LOCAL_SIGNATURE)] == LOCAL_SIGNATURE:
            damage = find_damage(transfer.place, file, data)
            if damage:
                return damage
        digests = part.version.digests if part.version else {}
        checks = [(name, digest, "of the place") for name, digest in strongest_first(digests)]
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
    """Compute a digest; None if no installed package can."""
    digest = hasher(name)
    if digest is None:
        return None
    for start in range(0, len(data), CHUNK_BYTES):  # in chunks, so that an interrupt is noticed
        digest.update(data[start : start + CHUNK_BYTES])
    return digest.digest()
