"""The plan: a checkpoint put through strategies, and the records that the result still needs."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import field, frozen

from _anemoi_ckpt.errors import UNPLACED, CheckpointError, redact
from _anemoi_ckpt.formats import Archive
from _anemoi_ckpt.hollow import AskedError, Ledger, build, watching
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.pickles.inert import walk
from _anemoi_ckpt.pickles.reading import Trust
from _anemoi_ckpt.steps import run

Strategy = Callable[[Any], Any]
SMALL_BYTES = 64 * 1024  # of a record that is worth no round of its own: a flag, a counter


@frozen
class Planned:
    """What strategies made of a checkpoint, and the records whose values it still needs."""

    result: Any  # hollow as long as it needs any
    needed: frozenset[str]  # keys of `Archive.records`
    ledger: Ledger = field(factory=Ledger, repr=False)  # of the tensors in the result


def planned(
    opened: Opened,
    storages: Mapping[str, torch.UntypedStorage],
    strategies: Sequence[Strategy],
    trust: Trust,
) -> Planned:
    """Put a checkpoint through strategies, with the storages that are there; moves nothing.

    With none, every tensor is hollow, and what the result needs is the plan of a load. Where a
    strategy asks for values that are not there, these are needed, and there is no result to trust.

    Args:
        opened: the open checkpoint.
        storages: by record key: the values that have been fetched.
        strategies: applied from left to right.
        trust: which names of the pickle may be run.

    Raises:
        CheckpointError: the pickle cannot be read.
        Exception: what a strategy raises, if not for lack of values.
    """
    archive = opened.archive
    absent = frozenset(archive.records.keys() - storages.keys())
    ledger = Ledger()
    watch = functools.partial(watching, ledger) if absent else nullcontext
    try:
        with watch() if trust else nullcontext():  # whose code is that of the checkpoint
            checkpoint = [build(archive, storages, ledger, trust)]
    except (Exception, AskedError) as err:
        if absent and ledger.was_asked(err):
            return Planned(None, absent)
        raise
    bare = ledger.keys_at(leaf for _, leaf in walk(checkpoint) if torch.is_storage(leaf))
    if bare:  # no mode hears what these are asked
        return Planned(None, frozenset(bare))

    watch_living = functools.partial(_watching_living, ledger)
    try:
        # keeps nothing alive
        result = applied(strategies, checkpoint.pop(), archive.place, watch_living)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:  # some of torch's own derive from it, and hold what was asked for
        if absent and ledger.was_asked(err):
            return Planned(None, _asked(ledger, archive, storages) or absent)
        raise
    if not absent:
        return Planned(result, absent)
    if ledger.was_asked():  # and a strategy caught the error and went on
        return Planned(result, _asked(ledger, archive, storages))
    needed = _living(ledger, result)
    if not needed and _has_hollow(result):
        needed = absent
    return Planned(result, needed, ledger)


def _watching_living(ledger: Ledger) -> AbstractContextManager[None]:
    """Let a ledger hear what is done, if anything hollow is left."""
    return watching(ledger) if ledger.origins() else nullcontext()


def random_states() -> Callable[[], None]:
    """Note the states of the generators that the process shares; give what puts them back.

    The program then goes on with the numbers that follow one run of a strategy.
    """
    generators = (torch.default_generator, *torch.cuda.default_generators)
    states = [(generator, generator.get_state()) for generator in generators]
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy.random")  # which torch does without
    array = numpy and numpy.get_state()

    def rewind() -> None:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(python)
        if numpy:
            numpy.set_state(array)

    return rewind


def _asked(
    ledger: Ledger, archive: Archive, storages: Mapping[str, torch.UntypedStorage]
) -> frozenset[str]:
    """Choose what to fetch for a strategy that asked for values: in few rounds, and few bytes.

    First that alone, then all that is small, then all that the strategy may still ask for.
    """
    if not storages:
        return frozenset(ledger.asked)
    if sum(storage.nbytes() for storage in storages.values()) > SMALL_BYTES:
        return frozenset(ledger.living)
    small = {key for key in ledger.living if archive.records[key].size <= SMALL_BYTES}
    return frozenset(ledger.asked | small)


def _living(ledger: Ledger, result: Any) -> frozenset[str]:
    """Give the absent records whose values are in tensors that a result may hold."""
    if ledger.origins() - ledger.keys_of(*_on_meta(result)):
        gc.collect()  # what was dropped may hang in a cycle
    return frozenset(ledger.origins())


def applied(
    strategies: Sequence[Strategy],
    checkpoint: Any,
    place: object,
    watch: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Put a checkpoint through strategies; an error of theirs tells which one was loaded.

    Each runs in a context of its own: without modes, once nothing is hollow any more.
    """
    try:
        for strategy in strategies:
            with watch():
                checkpoint = run(strategy, checkpoint)
    except Exception as err:
        if isinstance(err, CheckpointError) and err.place == UNPLACED:
            err.name_place(place)
        else:
            err.add_note(f"while loading {redact(str(place))}")
        raise
    return checkpoint


def _has_hollow(result: Any) -> bool:
    """Tell whether there are tensors on the meta device; a strategy may have made its own there."""
    return next(_on_meta(result), None) is not None


def _on_meta(result: Any) -> Iterator[torch.Tensor]:
    return (leaf for _, leaf in walk(result) if isinstance(leaf, torch.Tensor) and leaf.is_meta)
