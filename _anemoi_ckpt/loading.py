"""The loop: plan, fetch what is needed, and plan again, until nothing more is needed."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from attrs import evolve, frozen

from _anemoi_ckpt.cache import located
from _anemoi_ckpt.calls import is_public
from _anemoi_ckpt.errors import CorruptError
from _anemoi_ckpt.fetching import fetched, spare_bytes
from _anemoi_ckpt.formats import Archive
from _anemoi_ckpt.hollow import dtypes_of, unwatched
from _anemoi_ckpt.opening import Opened, can_differ, opened, opened_by_ranks
from _anemoi_ckpt.pickles.reading import Trust, trusted
from _anemoi_ckpt.pinning import brought, check_digest
from _anemoi_ckpt.places import URI
from _anemoi_ckpt.places.streams import Place, parse_place
from _anemoi_ckpt.planning import Strategy, applied, planned, random_states
from _anemoi_ckpt.progress import Progress
from _anemoi_ckpt.ranks import Ranks, joined
from _anemoi_ckpt.steps import check_strategies
from _anemoi_ckpt.transport import Transport


@frozen
class Loaded:
    """What a load gave, and what it took."""

    result: Any
    bytes_moved: int
    bytes_stored: int


@unwatched()  # it may be a strategy that loads another checkpoint
def loaded(
    uri: Place,
    strategies: Sequence[Strategy],
    check: Callable[[], Trust],
    transport: Transport,
    progress: Progress,
) -> Loaded:
    """Load a checkpoint through strategies; with a group, by its ranks together.

    Args:
        uri: where it is.
        strategies: applied from left to right.
        check: checks the arguments, and gives what may be run. What one rank refuses, all raise.
        transport: the policy.
        progress: as for `load`.

    Raises:
        CheckpointError: as `load`.
    """
    alone = functools.partial(_loaded_alone, uri, strategies, transport=transport)
    if transport.group is None:
        return alone(check(), progress)
    with joined(transport, uri, f"cached={transport.cached}") as ranks:
        names = ranks.together(functools.partial(_checked_by_rank, check, transport))
        if transport.cached:  # each machine downloads it once
            return ranks.together(lambda: alone(names, progress))
        place = functools.partial(located, uri, transport)
        checkpoint = opened_by_ranks(place, transport, progress, ranks)
        return completed(checkpoint, strategies, names, progress, ranks)


def put_through(
    checkpoint: Any,
    place: URI,
    strategies: Sequence[Strategy],
    check: Callable[[], Trust],
    transport: Transport,
) -> Loaded:
    """Put a checkpoint in memory through strategies; what one rank of a group meets, all raise."""

    def take() -> Loaded:
        check()
        return Loaded(applied(strategies, checkpoint, place), 0, 0)

    if transport.group is None:
        return take()
    with joined(transport, place) as ranks:
        return ranks.together(take)


def _checked_by_rank(check: Callable[[], Trust], transport: Transport) -> Trust:
    if transport.sha256 is not None and not transport.cached:
        raise ValueError("sha256 with a group takes cached=True: each machine checks its copy")
    return check()


def checked(
    caller: str, place: Any, strategies: Sequence[Strategy], trust: bool | Sequence[Any]
) -> Trust:
    """Check the arguments of a load; give the names that may be run.

    Raises:
        TypeError: the place is none; or as `checked_steps`.
        InvalidURIError: as `parse_uri`.
    """
    parse_place(place)
    return checked_steps(caller, strategies, trust)


def checked_steps(
    caller: str, strategies: Sequence[Strategy], trust: bool | Sequence[Any]
) -> Trust:
    """Check what a checkpoint is put through; give the names that may be run.

    Raises:
        TypeError: a strategy is not a function, or is one that has to be called first; or something
            to trust is neither a class nor a function.
    """
    check_strategies(caller, strategies)
    for strategy in strategies:
        problem = "call it by itself" if is_public(strategy) else _arity_problem(strategy)
        if problem:
            name = getattr(strategy, "__qualname__", repr(strategy))
            raise TypeError(f"{caller} takes functions of a checkpoint: {name} is none; {problem}")
    return trusted(trust)


def _arity_problem(strategy: Strategy) -> str:
    """Tell why a function cannot be called with a checkpoint alone; nothing if it can."""
    with suppress(ValueError):  # some functions in C tell nothing of their arguments
        signature = inspect.signature(strategy)
        try:
            signature.bind(None)
        except TypeError as err:
            return f"its arguments are {signature} ({err})"
    return ""


def _loaded_alone(
    uri: Place,
    strategies: Sequence[Strategy],
    trust: Trust,
    progress: Progress,
    transport: Transport,
) -> Loaded:
    place = located(uri, transport)
    with brought(place, transport, progress) as here:
        check = functools.partial(check_digest, place=place)  # of a copy, it is checked by now
        found = _loaded_from(here, check, strategies, trust, progress, transport)
    if transport.sha256 is None or transport.cached:
        return found
    return evolve(found, bytes_moved=found.bytes_stored)  # for the digest, all of it


def _loaded_from(  # noqa: PLR0913, PLR0917 - of one caller
    place: URI,
    check: Callable[[Opened], None],
    strategies: Sequence[Strategy],
    trust: Trust,
    progress: Progress,
    transport: Transport,
) -> Loaded:
    directory = None
    try:
        checkpoint = opened(place, transport, progress)
        directory = checkpoint.directory
        check(checkpoint)
        return completed(checkpoint, strategies, trust, progress)
    except CorruptError:
        if transport.cached and transport.sha256 is None:  # damaged since its download
            checkpoint = opened(place, transport, progress, fresh=True)
        elif directory is None or not can_differ(place, transport):
            raise
        else:
            checkpoint = opened(place, transport, progress)
            if checkpoint.directory == directory:  # no bit of it flipped on the way
                raise
    return completed(checkpoint, strategies, trust, progress)


def completed(
    checkpoint: Opened,
    strategies: Sequence[Strategy],
    trust: Trust,
    progress: Progress,
    ranks: Ranks | None = None,
) -> Loaded:
    """Fetch what the result needs until it needs nothing: as a rule, in the second round."""
    records = checkpoint.archive.records
    storages: dict[str, torch.UntypedStorage] = {}
    while True:
        rewind = random_states()
        plan = functools.partial(planned, checkpoint, storages, strategies, trust)
        found = plan() if ranks is None else ranks.together(plan)
        needed, moved = found.needed, checkpoint.bytes_moved
        if ranks is not None:
            needed, moved = _of_all_ranks(ranks, needed, moved)
        if not needed:
            return Loaded(found.result, checkpoint.bytes_moved, checkpoint.bytes_stored)
        del found  # its tensors are hollow
        rewind()
        wanted = {key: record for key, record in records.items() if key in needed}
        there = sum(storage.nbytes() for storage in storages.values())
        total = there + sum(record.size for record in wanted.values())
        spare = spare_bytes(wanted.values(), total, moved - there)
        fresh = fetched(checkpoint.source, wanted, progress, ranks, spare)
        _swap_bytes(checkpoint.archive, fresh)
        storages |= fresh


def _of_all_ranks(ranks: Ranks, needed: frozenset[str], moved: int) -> tuple[frozenset[str], int]:
    """Give the records that any rank needs, and the bytes that all of them have moved."""
    wanted, counts = zip(*ranks.agree((needed, moved)), strict=True)
    return frozenset().union(*wanted), sum(counts)


def _swap_bytes(archive: Archive, storages: Mapping[str, torch.UntypedStorage]) -> None:
    """Put values into this machine's byte order, where the archive has the other one."""
    if archive.byteorder == sys.byteorder:
        return
    dtypes = dtypes_of(archive)
    for key in storages.keys() & dtypes.keys():
        storages[key].byteswap(dtypes[key])
