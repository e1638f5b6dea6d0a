"""Records become storages: coalesced ranges, in parallel, each record checked.

fetch · ranks · spans
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import evolve, frozen

from _anemoi_ckpt.blocks import whole
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.formats import Record, blank_storage, check, crc_matches
from _anemoi_ckpt.formats.torch_zip import data_start
from _anemoi_ckpt.parallel import in_parallel, part_bytes
from _anemoi_ckpt.places import Notify, UnrangedError
from _anemoi_ckpt.places.interrupts import Stop
from _anemoi_ckpt.progress import Progress, shown
from _anemoi_ckpt.ranks import Ranks
from _anemoi_ckpt.transport import PART_BYTES, Source

SPARE_BYTES = 1024**2  # that a load may move beside what its result needs, and 2 % of that
GAP_BYTES = 128 * 1024  # of a gap to read over: one request of many at once costs about as much
WAVE_BYTES = 64 * 1024**2  # of each rank: one wave is sent to the others while the next is read
LEAST_BYTES = 1024**2  # of a request by one of several ranks, so that small checkpoints are shared

_Pieces = list[tuple[memoryview, str]]  # memory to fill, and the key of its record ("": a gap)
_Part = tuple[int, _Pieces]  # what one request brings: from this byte of the object on


@frozen
class _Wanted:
    """Records to fetch, the memory to fill, by key, and how many bytes may come beside them."""

    records: Mapping[str, Record]
    views: Mapping[str, memoryview]
    spare: int


# ── fetch ─────────────────────────────────────────────────────────────────────────────────────


def fetched(
    source: Source,
    records: Mapping[str, Record],
    progress: Progress = False,
    ranks: Ranks | None = None,
    spare: int = SPARE_BYTES,
) -> dict[str, torch.UntypedStorage]:
    """Read records into fresh storages, each byte once: in this process, or in all ranks together.

    Args:
        source: where they are.
        records: by key.
        progress: as for `load`.
        ranks: each reads a share, and sends it to the others.
        spare: most bytes to move beside the records, so that it takes few requests; the same on
            all ranks.

    Raises:
        CheckpointError: they cannot be read, or are not what was written.
        MemoryError: there is no room for them.
    """
    allot = functools.partial(_allotted, source, records)
    storages = allot() if ranks is None else ranks.together(allot)
    views = {key: memory(storage) for key, storage in storages.items() if storage.nbytes()}
    wanted = _Wanted(records, views, spare)
    total = sum(map(len, views.values()))
    if ranks is not None and ranks.rank and not callable(progress):
        progress = False  # one bar for all
    with shown(source.uri, total, progress) as notify:
        if ranks is not None:
            _fetch_shared(source, wanted, ranks, notify)
            return storages
        try:
            _fetch_alone(source, wanted, notify)
        except UnrangedError:
            _fetch_alone(_whole(source), wanted, notify)
    return storages


def foreseen(
    source: Source, records: Mapping[str, Record], spare: int = SPARE_BYTES
) -> list[tuple[int, int]]:
    """Tell which ranges `fetched` would ask for: the offset and length of each. Moves nothing."""
    blank = {key: memory(blank_storage(each.size)) for key, each in records.items() if each.size}
    wanted = _Wanted(records, blank, spare)
    _, parts = _laid_out(wanted, part_bytes(source, sum(map(len, blank.values()))))
    return [(offset, sum(len(view) for view, _ in pieces)) for offset, pieces in parts]


def _allotted(source: Source, records: Mapping[str, Record]) -> dict[str, torch.UntypedStorage]:
    try:
        return {key: torch.UntypedStorage(record.size) for key, record in records.items()}
    except RuntimeError as err:  # torch has no MemoryError of its own
        total = sum(record.size for record in records.values())
        raise MemoryError(
            f"{redact(str(source.uri))}: there is no memory for the {total} bytes that it takes;"
            " load less at a time, with a strategy such as include"
        ) from err


def spare_bytes(records: Iterable[Record], needed: int, moved: int) -> int:
    """Give how many bytes a load may move beside the records that it still has to fetch.

    Args:
        records: those.
        needed: bytes of all storages that the result needs.
        moved: bytes that have come and are in no storage: of the directory and the pickle.
    """
    headers = sum(record.start - record.header for record in records)
    left = SPARE_BYTES + needed // 50 - moved - headers
    return left if left > 0 else SPARE_BYTES  # thousands of records: requests cost more than bytes


def _whole(source: Source) -> Source:
    """Take an object in one piece whose server has begun to refuse ranges."""
    return whole(evolve(source, stop=Stop()))  # the refusal has stopped all other reads


def memory(storage: torch.UntypedStorage) -> memoryview:
    """Give a writable view of a storage's own memory, which keeps the storage alive."""
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    buffer.storage = storage  # type: ignore[attr-defined] # ctypes arrays take any
    return memoryview(buffer).cast("B")


def _fetch_alone(
    source: Source,
    wanted: _Wanted,
    notify: Notify,
) -> None:
    records, views = wanted.records, wanted.views
    headers, parts = _laid_out(wanted, part_bytes(source, sum(map(len, views.values()))))
    missing = Counter(owner for _, pieces in parts for _, owner in pieces)
    lock = threading.Lock()

    def bring(offset: int, pieces: _Pieces) -> None:
        source.read(offset, [view for view, _ in pieces], notify)
        for _, owner in pieces:
            with lock:
                missing[owner] -= 1
                whole = owner and not missing[owner]
            if whole:  # checked here, while other parts are still on their way
                wrong = _wrong(source, records[owner], headers[owner], views[owner])
                if wrong:
                    source.read(wrong.start, [views[owner]])
                    check(source.uri, wrong, views[owner])

    in_parallel([functools.partial(bring, *part) for part in parts], source)


def _wrong(source: Source, record: Record, header: Any, view: memoryview) -> Record | None:
    """Tell whether a record has to be read once more, and from where.

    Either torch did not lay it out, or it was damaged on the way.
    """
    start = data_start(source.uri, record, header) if header else record.start
    if start == record.start and crc_matches(record, view):
        return None
    return evolve(record, header=start, start=start)


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────


def _fetch_shared(
    source: Source,
    wanted: _Wanted,
    ranks: Ranks,
    notify: Notify,
) -> None:
    """Read each byte by one of the ranks, which sends it to all; each checks what it received."""
    records, views = wanted.records, wanted.views
    headers = _exchange(source, wanted, ranks, notify)

    def find_wrong() -> dict[str, Record]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(
                lambda key: _wrong(source, records[key], headers[key], views[key]), views
            )
            return {key: record for key, record in zip(views, found, strict=True) if record}

    def check_again() -> None:
        for key, record in again.items():
            check(source.uri, record, views[key])

    found = ranks.agree(ranks.together(find_wrong))
    again = {key: record for wrong in found for key, record in wrong.items()}
    if again:
        some = {key: views[key] for key in again}
        _exchange(source, evolve(wanted, records=again, views=some), ranks, notify)
        ranks.together(check_again)


def _exchange(
    source: Source,
    wanted: _Wanted,
    ranks: Ranks,
    notify: Notify,
) -> dict[str, bytearray]:
    """Read this rank's share in waves, and send each to the others while the next one is read."""
    size = sum(map(len, wanted.views.values())) // ranks.size
    headers, parts = _laid_out(wanted, min(max(size, LEAST_BYTES), PART_BYTES))
    pending: list[Any] = []
    received = 0  # bytes of others that nobody was told of
    for wave in _waves(parts, ranks, source.in_memory):
        share = functools.partial(_read_share, source, wave[ranks.rank], notify, received)
        source, received = ranks.together(share), 0
        for finish in pending:
            finish()
        pending = []
        for owner, dealt in enumerate(wave):
            kept = [view for _, pieces in dealt for view, key in pieces if key]
            pending.append(ranks.send(kept, owner))
            if owner != ranks.rank:
                received += sum(map(len, kept))
    for finish in pending:
        finish()
    ranks.together(functools.partial(notify, received))
    return headers


def _read_share(source: Source, parts: Sequence[_Part], notify: Notify, received: int) -> Source:
    """Read what was dealt to this rank; give the source that could serve it."""
    notify(received)  # here, where what it raises reaches all ranks

    def read(source: Source) -> Source:
        tasks = [
            functools.partial(source.read, offset, [view for view, _ in pieces], notify)
            for offset, pieces in parts
        ]
        in_parallel(tasks, source)
        return source

    try:
        return read(source)
    except UnrangedError:
        return read(_whole(source))


def _waves(parts: Sequence[_Part], ranks: Ranks, in_memory: bool) -> Iterator[list[list[_Part]]]:
    """Deal parts to the ranks, as much to each; all to rank 0, where it alone has the object."""
    wave: list[list[_Part]] = [[] for _ in range(ranks.size)]
    dealt = [0] * ranks.size
    most = WAVE_BYTES
    for part in parts:
        size = sum(len(view) for view, _ in part[1])
        rank = 0 if in_memory else dealt.index(min(dealt))
        if dealt[rank] + size > most:
            yield wave
            wave = [[] for _ in range(ranks.size)]
            most = dealt[rank] + max(size, WAVE_BYTES)
        wave[rank].append(part)
        dealt[rank] += size
    yield wave


# ── spans ─────────────────────────────────────────────────────────────────────────────────────


def _laid_out(wanted: _Wanted, size: int) -> tuple[dict[str, bytearray], list[_Part]]:
    """Lay out what to ask for, in parts of at most `size` bytes; give the headers' buffers, too."""
    records = wanted.records
    headers = {key: bytearray(records[key].start - records[key].header) for key in wanted.views}
    return headers, [part for span in _spans(wanted, headers) for part in _cut(*span, size)]


def _spans(wanted: _Wanted, headers: Mapping[str, bytearray]) -> Iterator[tuple[int, _Pieces]]:
    """Lay records that stand side by side in a row: header, bytes, gap, header, bytes, …."""
    records, views = wanted.records, wanted.views
    keys = sorted(views, key=lambda key: records[key].header)
    bridged = _bridged_gaps([records[key] for key in keys], wanted.spare)
    span: tuple[int, _Pieces] = (0, [])
    end = 0
    for key in keys:
        record = records[key]
        if record.header in bridged:
            span[1].append((memoryview(bytearray(record.header - end)), ""))
        else:
            yield span
            span = (record.header, [])
        span[1].extend(((memoryview(headers[key]), key), (views[key], key)))
        end = record.start + record.size
    yield span


def _cut(offset: int, pieces: _Pieces, size: int) -> Iterator[tuple[int, _Pieces]]:
    """Cut a span of an object, which fills pieces of memory, into parts of one request each."""
    part: _Pieces = []
    room = size
    for view, owner in pieces:
        rest = view
        while rest:
            part.append((rest[:room], owner))
            rest, room = rest[room:], room - min(room, len(rest))
            if not room:
                yield offset, part
                offset, part, room = offset + size, [], size
    if part:
        yield offset, part


def _bridged_gaps(records: Sequence[Record], spare: int) -> set[int]:
    """Choose the gaps to read over, smallest first: so few bytes save the most requests."""
    gaps = sorted(
        (after.header - before.start - before.size, after.header)
        for before, after in itertools.pairwise(records)
    )
    total = itertools.accumulate(gap for gap, _ in gaps)
    return {
        header
        for (gap, header), cost in zip(gaps, total, strict=True)
        if gap <= GAP_BYTES and cost <= spare
    }
