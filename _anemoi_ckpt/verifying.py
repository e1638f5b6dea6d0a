"""What `verify` gives: whether an object is what was written, read once from its first byte on.

Parts are read in parallel and checked in their order, so that digests can be computed in constant
memory: that of a fixed number of parts.

verify · stream · check
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import TypeVar, cast

import torch
from attrs import evolve, frozen
from zlib_ng import zlib_ng

from _anemoi_ckpt.blocks import in_memory, streamed, whole
from _anemoi_ckpt.contents import Hollow, hollow_of
from _anemoi_ckpt.digests import Hasher, hasher, strongest_first
from _anemoi_ckpt.errors import CorruptError, redact
from _anemoi_ckpt.formats import Archive, Record, check_crc
from _anemoi_ckpt.formats.torch_zip import data_start
from _anemoi_ckpt.hollow import dtypes_of
from _anemoi_ckpt.opening import Opened, can_differ, looked
from _anemoi_ckpt.parallel import in_parallel
from _anemoi_ckpt.places import URI, Notify, UnrangedError, Version, pinned
from _anemoi_ckpt.places.joined import STRIDE_BYTES, JoinedURI
from _anemoi_ckpt.places.memory import MemoryURI
from _anemoi_ckpt.progress import Progress, shown
from _anemoi_ckpt.tables import Table, section, sized
from _anemoi_ckpt.tensors import ALL_FINITE, not_finite
from _anemoi_ckpt.transport import PART_BYTES, Source, Transport, find_version

_PARTS = 16  # that are in memory at once, at most
_CHUNK_BYTES = 1024**2  # of a record that is read once more
_WAIT_SECONDS = 0.1  # for another part's turn, before the stop is looked at
_T = TypeVar("_T")
_Reading = Generator[int, memoryview, _T]  # asks for at most so many bytes, and is sent some


@frozen(repr=False, eq=False)
class Verified(Table):
    """What `verify` found. True in a condition if nothing is wrong. Prints as a table."""

    place: str
    format: str  # as `Contents.format`; "" where the file cannot be opened
    bytes: int  # of the file, or of all shards
    records: int  # of the archive, each holding a storage or what describes it
    checked: int  # of these: compared with a CRC-32 that was recorded
    digests: tuple[str, ...]  # of the whole object that were compared: "md5", "sha256", …
    damaged: tuple[str, ...]  # what is wrong, in words
    # tensor: how many values of its storage are NaN or infinite; None if nobody asked
    not_finite: Mapping[str, int] | None
    bytes_moved: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damaged and not self.not_finite

    def __bool__(self) -> bool:
        """Tell the same as `ok`."""
        return self.ok

    def _rows(self) -> list[tuple[str, str]]:
        rate = self.bytes_moved / max(self.seconds, 1e-9)
        rows = [
            ("checkpoint", self.place),
            ("format", f"{self.format or 'unknown'}, {sized(self.bytes)}"),
            ("moved", f"{sized(self.bytes_moved)} in {self.seconds:.2f} s, {sized(int(rate))}/s"),
            ("records", f"{self.checked} of {self.records} compared with their CRC-32"),
            ("digests", ", ".join(self.digests) or "none is kept at the place"),
        ]
        if self.not_finite is not None:
            lines = [f"{name}: {count} values" for name, count in self.not_finite.items()]
            rows += section(f"not finite {len(lines)}", lines)
        rows += section(f"damaged {len(self.damaged)}", self.damaged)
        return [*rows, ("verdict", "whole" if self.ok else "not whole")]


# ── verify ────────────────────────────────────────────────────────────────────────────────────


def verified(
    place: URI, transport: Transport, *, values: bool = False, progress: Progress = False
) -> Verified:
    """Read all of an object once, and tell what is wrong with it.

    Args:
        place: where it is, as `locate` tells it.
        transport: how to reach it.
        values: look for NaN and infinite values, too.
        progress: as for `load`.

    Raises:
        CheckpointError: it cannot be read, or is no checkpoint.
    """
    begun = time.perf_counter()
    try:  # to build it compares the pickle with the directory
        checkpoint, hollow = looked(place, transport, _built, progress)
    except CorruptError as err:
        unopened = _verified_as_bytes(place, transport, err.problem, progress)
        none: dict[str, int] | None = {} if values else None
        return evolve(unopened, not_finite=none, seconds=time.perf_counter() - begun)
    found = _verified_opened(checkpoint, hollow, values=values, progress=progress)
    moved = checkpoint.bytes_moved
    if found.damaged and can_differ(place, transport):
        again, hollow = looked(place, transport, _built, progress)
        if again.directory != checkpoint.directory:  # a bit of it flipped on the way
            found = _verified_opened(again, hollow, values=values, progress=progress)
        moved += again.bytes_moved
    return evolve(found, bytes_moved=moved, seconds=time.perf_counter() - begun)


def _built(checkpoint: Opened) -> tuple[Opened, Hollow]:
    return checkpoint, hollow_of(checkpoint.archive)


def _verified_opened(
    checkpoint: Opened, hollow: Hollow, *, values: bool, progress: Progress
) -> Verified:
    """Compare the records with what the directory tells of them."""
    place, archive = checkpoint.origin.uri, checkpoint.archive
    dtypes = _dtypes_of_values(archive, hollow) if values else {}
    swapped = archive.byteorder != sys.byteorder
    wanted = [
        _Wanted(each, dtypes.get(each), swapped)
        for each in (archive.members or archive.records).values()
    ]
    counts: dict[Record, int] = {}
    damaged: list[str] = []
    digests: dict[str, None] = {}
    with shown(place, checkpoint.bytes_stored, progress) as notify:
        for each in _objects(checkpoint.source, wanted):
            found = _check_object(checkpoint.source, each, notify)
            digests |= dict.fromkeys(found.digests)
            damaged += found.damaged
            counts |= found.not_finite
    return Verified(
        place=redact(str(place)),
        format=archive.format,
        bytes=checkpoint.bytes_stored,
        records=len(wanted),
        checked=sum(each.record.crc is not None for each in wanted),
        digests=tuple(digests),
        damaged=tuple(damaged),
        not_finite=_named(counts, archive, hollow) if values else None,
        bytes_moved=checkpoint.bytes_moved,
        seconds=0.0,
    )


def _verified_as_bytes(
    place: URI, transport: Transport, problem: str, progress: Progress
) -> Verified:
    """Read what cannot be opened, and compare it with the digest that its place keeps."""
    try:
        source = Source(place, find_version(place, transport), transport)
    except UnrangedError:
        source, _ = in_memory(place, streamed(place, transport, progress))
    with shown(place, source.size, progress) as notify:
        (stored,) = _objects(source, [])
        found = _check_object(source, stored, notify)
    return Verified(
        place=redact(str(place)),
        format="",
        bytes=source.size,
        records=0,
        checked=0,
        digests=found.digests,
        damaged=(problem, *found.damaged),
        not_finite=None,
        bytes_moved=sum(source.moved) or source.size,
        seconds=0.0,
    )


def _dtypes_of_values(archive: Archive, hollow: Hollow) -> dict[Record, torch.dtype]:
    """Tell the dtype of each record's values: an untyped storage has that of its tensor."""
    dtypes = dtypes_of(archive)
    for name, keys in hollow.records.items():
        for key in keys:
            if dtypes.get(key) is torch.uint8:
                dtypes[key] = hollow.tensors[name].dtype
    return {archive.records[key]: dtype for key, dtype in dtypes.items()}


def _named(counts: Mapping[Record, int], archive: Archive, hollow: Hollow) -> dict[str, int]:
    """Give the counts that are not zero by the names of tensors, or of records without one."""
    left = {record: count for record, count in counts.items() if count}
    names: dict[str, int] = {}
    for (key, name), keys in hollow.records.items():
        found = {archive.records[each] for each in keys} & left.keys()
        if found:
            names[".".join(filter(None, (key, name)))] = sum(left[each] for each in found)
    tied = {archive.records[each] for keys in hollow.records.values() for each in keys}
    return names | {record.name: count for record, count in left.items() if record not in tied}


@frozen
class _Wanted:
    """A record to look at, and the dtype of its values, if these are to be looked at."""

    record: Record
    dtype: torch.dtype | None
    swapped: bool = False  # whether the values are in the other byte order


@frozen
class _Object:
    """One of the objects that a checkpoint is in."""

    start: int  # where it begins in the source
    size: int
    wanted: Sequence[_Wanted]  # in the order of their bytes
    digests: Mapping[str, bytes]  # that its place keeps


def _objects(source: Source, wanted: Iterable[_Wanted]) -> Iterator[_Object]:
    parts = (
        source.uri.parts if isinstance(source.uri, JoinedURI) else ((source.uri, source.version),)
    )
    in_order = sorted(wanted, key=lambda each: (each.record.header, each.record.start))
    for number, (part, version) in enumerate(parts):
        start, size = number * STRIDE_BYTES, version.size if version else 0
        within = [w for w in in_order if start <= w.record.header < start + STRIDE_BYTES]
        yield _Object(start, size, within, _kept_digests(part, version, source.transport))


def _kept_digests(uri: URI, version: Version | None, transport: Transport) -> dict[str, bytes]:
    """Ask a place for the digests that it keeps of an object: a read need not tell them."""
    if isinstance(uri, MemoryURI):
        return {}
    try:
        return dict(pinned(uri, find_version(uri, transport), version).digests)
    except UnrangedError:
        return {}


# ── stream ────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Found:
    """What was found in one object."""

    digests: tuple[str, ...]
    damaged: list[str]
    not_finite: Mapping[Record, int]


def _check_object(source: Source, stored: _Object, notify: Notify) -> _Found:
    """Read one object, and what came wrong once more."""
    looks: list[_Look] = []
    known = ((name, hasher(name)) for name, _ in strongest_first(stored.digests))
    one = {name: begun for name, begun in known if begun is not None}
    strongest = dict([*one.items()][:1])  # one of them is enough
    feed = _feeding(_look_at_all(stored, looks), list(strongest.values()))
    try:
        _stream(source, stored, feed, notify)
    except UnrangedError:  # the server has begun to refuse ranges
        return _check_object(whole(source), stored, lambda _count: None)
    damaged: list[str] = []
    counts: dict[Record, int] = {}
    for wanted, look in zip(stored.wanted, looks, strict=True):
        try:
            counts[wanted.record] = _second_look(source, wanted, look).not_finite
        except CorruptError as err:
            damaged.append(err.problem)
    for name, begun in strongest.items():
        found, kept = begun.digest(), stored.digests[name]
        if found != kept:
            damaged.append(
                f"its {name} is {found.hex()}, and not the one of the place, {kept.hex()}"
            )
    return _Found(tuple(strongest), damaged, counts)


def _stream(
    source: Source, stored: _Object, feed: Callable[[memoryview], None], notify: Notify
) -> None:
    """Read an object in parallel, and feed its parts in their order."""
    parts = iter(range(0, stored.size, PART_BYTES))
    turns = threading.Condition()
    done = 0

    def bring() -> None:
        nonlocal done
        room = memoryview(bytearray(min(PART_BYTES, stored.size)))
        while True:
            with turns:
                start = next(parts, None)
            if start is None:
                return
            view = room[: stored.size - start]
            source.read(stored.start + start, [view], notify)
            with turns:
                while done != start:
                    if source.stop.is_set():
                        raise CancelledError
                    turns.wait(_WAIT_SECONDS)
                feed(view)
                done += len(view)
                turns.notify_all()

    in_parallel([bring] * min(-(-stored.size // PART_BYTES), _PARTS), source)


def _feeding(reading: _Reading[None], hashers: Iterable[Hasher]) -> Callable[[memoryview], None]:
    """Give what takes the bytes of an object, in their order."""
    asked = next(reading)

    def feed(view: memoryview) -> None:
        nonlocal asked
        for each in hashers:
            each.update(view)
        while view:
            taken, view = view[:asked], view[asked:]
            asked = reading.send(taken)

    return feed


# ── check ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Look:
    """What was seen of a record."""

    header: bytes
    crc: int
    not_finite: int


def _look_at_all(stored: _Object, looks: list[_Look]) -> _Reading[None]:
    """Look at all records of an object as its bytes come by."""
    position = stored.start
    for each in stored.wanted:
        yield from _skipped(each.record.header - position)
        looks.append((yield from _look_at(each)))
        position = each.record.start + each.record.size
    while True:
        yield sys.maxsize


def _skipped(count: int) -> _Reading[None]:
    while count > 0:
        count -= len((yield count))


def _look_at(wanted: _Wanted) -> _Reading[_Look]:
    record = wanted.record
    header = bytearray()
    while missing := record.start - record.header - len(header):
        header += yield missing
    crc, not_finite, rest, left = 0, 0, b"", record.size
    while left:
        view = yield left
        left -= len(view)
        crc = zlib_ng.crc32(view, crc)
        if wanted.dtype is not None:
            count, rest = _count_not_finite(rest, view, wanted)
            not_finite += count
    return _Look(bytes(header), crc, not_finite)


def _second_look(source: Source, wanted: _Wanted, look: _Look) -> _Look:
    """Read a record once more if it came wrong, or does not begin where torch has it begin.

    Raises:
        CorruptError: it is wrong again.
    """
    record = wanted.record
    start = data_start(source.uri, record, look.header) if look.header else record.start
    if start == record.start and record.crc in {None, look.crc}:
        return look
    again = evolve(wanted, record=evolve(record, header=start, start=start))
    look = _read_alone(source, start, _look_at(again))
    check_crc(source.uri, again.record, look.crc)
    return look


def _read_alone(source: Source, offset: int, reading: _Reading[_T]) -> _T:
    """Send to a reading what it asks for, from an offset on."""
    try:
        asked = next(reading)
        while True:
            view = memoryview(bytearray(min(asked, _CHUNK_BYTES)))
            source.read(offset, [view])
            offset += len(view)
            asked = reading.send(view)
    except StopIteration as end:
        return cast("_T", end.value)


def _count_not_finite(rest: bytes, view: memoryview, wanted: _Wanted) -> tuple[int, bytes]:
    """Count the values that are NaN or infinite; give the bytes of one that is cut, too."""
    dtype = wanted.dtype
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex) or dtype in ALL_FINITE:
        return 0, b""
    data = memoryview(bytearray(rest + view)) if rest else view
    whole = len(data) - len(data) % dtype.itemsize
    if not whole:
        return 0, bytes(data)
    values = torch.frombuffer(data[:whole], dtype=dtype)
    if wanted.swapped:
        values = values.clone()
        values.untyped_storage().byteswap(dtype)
    return not_finite(values), bytes(data[whole:])
