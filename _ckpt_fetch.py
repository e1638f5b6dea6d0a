"""Bringing records into storages: coalesced ranges, in parallel, each record checked.

fetch · ranks · spans
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import evolve, frozen

from _ckpt_archive import Record, check, crc_matches, data_start
from _ckpt_places import Notify
from _ckpt_ranks import Ranks
from _ckpt_sources import PART_BYTES, Progress, Source, in_parallel, part_bytes, shown

GAP_BYTES = 512 * 1024  # most that all gaps bridged between wanted records may cost a load
WAVE_BYTES = 64 * 1024**2  # of each rank: the one is given to the others while the next is read
_LEAST_BYTES = 1024**2  # of a request, so that small checkpoints are shared, too

_Pieces = list[tuple[memoryview, str]]  # memory to fill, and whose it is
_Part = tuple[int, _Pieces]  # what one request brings: from this byte of the object on


# ── fetch ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class Fetcher:
    """Brings records, each byte once: for this process, or for all ranks of a group."""

    progress: Progress
    ranks: Ranks | None = None

    def agree(self, needed: set[str], problem: Exception | None) -> set[str]:
        """Give what any of the ranks needs.

        Raises:
            Exception: the problem that one of them has.
        """
        if self.ranks is not None:
            return set().union(*self.ranks.agree(needed, problem))
        if problem is not None:
            raise problem
        return needed

    def fetch(
        self, source: Source, records: Mapping[str, Record]
    ) -> dict[str, torch.UntypedStorage]:
        """Bring records into fresh storages.

        Raises:
            CheckpointError: they cannot be had, or are not what was written.
        """
        storages = {key: torch.UntypedStorage(record.size) for key, record in records.items()}
        views = {key: memory(storage) for key, storage in storages.items() if storage.nbytes()}
        total = sum(record.size for record in records.values())
        first = self.ranks is None or not self.ranks.rank
        progress = self.progress if first or callable(self.progress) else False  # one bar for all
        with shown(source.uri, total, progress) as notify:
            if self.ranks is None:
                _fetch_alone(source, records, views, total, notify)
            else:
                _fetch_shared(source, records, views, self.ranks, notify)
        return storages


def memory(storage: torch.UntypedStorage) -> memoryview:
    """Give a writable view of a storage's own memory, which keeps the storage alive."""
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    buffer.storage = storage  # type: ignore[attr-defined] # ctypes arrays take any
    return memoryview(buffer).cast("B")


def _fetch_alone(
    source: Source,
    records: Mapping[str, Record],
    views: Mapping[str, memoryview],
    total: int,
    notify: Notify,
) -> None:
    headers, parts = _laid_out(records, views, part_bytes(source, total))
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
    """Tell whether what came for a record has to be brought once more, and from where.

    It was not laid out as by torch, or damaged on the way.
    """
    start = data_start(source.uri, record, header) if header else record.start
    if start == record.start and crc_matches(record, view):
        return None
    return evolve(record, header=start, start=start)


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────


def _fetch_shared(
    source: Source,
    records: Mapping[str, Record],
    views: Mapping[str, memoryview],
    ranks: Ranks,
    notify: Notify,
) -> None:
    """Bring each byte to one of the ranks, and from there to all; each checks what it got."""
    headers = _exchange(source, records, views, ranks, notify)

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
        _exchange(source, again, {key: views[key] for key in again}, ranks, notify)
        ranks.together(check_again)


def _exchange(
    source: Source,
    records: Mapping[str, Record],
    views: Mapping[str, memoryview],
    ranks: Ranks,
    notify: Notify,
) -> dict[str, bytearray]:
    """Read this rank's share, wave by wave, and give each to the others while the next is read."""
    share = sum(map(len, views.values())) // ranks.size
    headers, parts = _laid_out(records, views, min(max(share, _LEAST_BYTES), PART_BYTES))
    pending: list[Any] = []
    for wave in _waves(parts, ranks, source.held):
        tasks = [
            functools.partial(source.read, offset, [view for view, _ in pieces], notify)
            for offset, pieces in wave[ranks.rank]
        ]
        ranks.together(functools.partial(in_parallel, tasks, source))
        for finish in pending:
            finish()
        pending = []
        for owner, dealt in enumerate(wave):
            kept = [view for _, pieces in dealt for view, key in pieces if key]
            pending.append(ranks.send(kept, owner))
            if owner != ranks.rank:
                notify(sum(map(len, kept)))
    for finish in pending:
        finish()
    return headers


def _waves(parts: Sequence[_Part], ranks: Ranks, held: bool) -> Iterator[list[list[_Part]]]:
    """Deal parts to the ranks, as much to each (all to rank 0, where it alone has them)."""
    wave: list[list[_Part]] = [[] for _ in range(ranks.size)]
    dealt = [0] * ranks.size
    most = WAVE_BYTES
    for part in parts:
        size = sum(len(view) for view, _ in part[1])
        rank = 0 if held else dealt.index(min(dealt))
        if dealt[rank] + size > most:
            yield wave
            wave = [[] for _ in range(ranks.size)]
            most = dealt[rank] + max(size, WAVE_BYTES)
        wave[rank].append(part)
        dealt[rank] += size
    yield wave


# ── spans ─────────────────────────────────────────────────────────────────────────────────────


def _laid_out(
    records: Mapping[str, Record], views: Mapping[str, memoryview], size: int
) -> tuple[dict[str, bytearray], list[_Part]]:
    """Say what to ask for, in parts of at most so many bytes; give where the headers come to."""
    headers = {key: bytearray(records[key].start - records[key].header) for key in views}
    spans = _spans(records, views, headers)
    return headers, [part for span in spans for part in _cut(*span, size)]


def _spans(
    records: Mapping[str, Record], views: Mapping[str, Any], headers: Mapping[str, Any]
) -> Iterator[tuple[int, _Pieces]]:
    """Lay records that stand side by side in a row: header, bytes, gap, header, bytes, …."""
    keys = sorted(views, key=lambda key: records[key].header)
    bridged = _bridged_gaps([records[key] for key in keys])
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


def _bridged_gaps(records: Sequence[Record]) -> set[int]:
    """Choose the gaps to read over, smallest first: a request costs more than a few bytes."""
    gaps = sorted(
        (after.header - before.start - before.size, after.header)
        for before, after in itertools.pairwise(records)
    )
    bridged, left = set(), GAP_BYTES
    for gap, header in gaps:
        left -= gap
        if left < 0:
            break
        bridged.add(header)
    return bridged
