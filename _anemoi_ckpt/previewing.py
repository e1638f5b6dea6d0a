"""What `plan` gives: what a load would move, told by the first round of its loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence

import torch
from attrs import frozen

from _anemoi_ckpt.contents import hollow_of, infos_of
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.fetching import foreseen, spare_bytes
from _anemoi_ckpt.loading import Loaded
from _anemoi_ckpt.matching import Match, Receivers, Terms, matched, tracked
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.pickles.reading import Trust
from _anemoi_ckpt.pictures import as_tree, bar, captioned, page, text_bar
from _anemoi_ckpt.planning import Strategy, planned, random_states
from _anemoi_ckpt.report import Report, reported
from _anemoi_ckpt.tables import Table, as_html, folded, section, sized
from _anemoi_ckpt.trees import TensorInfo, branch_of, tree_of

_NOBODY: Receivers = {"optimizer": (), "scheduler": ()}


@frozen(repr=False, eq=False)
class Plan(Table):
    """What a load would move. Prints as a table, in notebooks, too."""

    place: str
    bytes_stored: int  # of the file, or of all shards
    bytes_moved: int  # by now: the directory and the pickle
    bytes_to_move: int  # by the load, after these
    requests: int  # in all
    records: tuple[str, ...]  # that the load would move
    tensors: tuple[TensorInfo, ...]  # whose values are in these
    complete: bool  # False where a strategy asks for values: once it has them, it may need others
    report: Report | None  # what `load_into` would give, if there is a model and the plan complete

    def seconds(self, bytes_per_second: float) -> float:
        """Tell how long the load takes at a rate.

        Raises:
            ValueError: the rate is not above zero.
        """
        if not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second is more than 0, not {bytes_per_second}")
        return (self.bytes_moved + self.bytes_to_move) / bytes_per_second

    def _rows(self) -> list[tuple[str, str]]:
        share = min(1, (self.bytes_moved + self.bytes_to_move) / max(1, self.bytes_stored))
        rows = self._facts(section(f"tensors {len(self.tensors)}", folded(self._names())))
        return [*rows[:2], ("", text_bar(share, rest="░")), *rows[2:]]

    def _names(self) -> Iterator[str]:
        return (each.name for each in self.tensors)

    def _repr_html_(self) -> str:
        """Show the table in a notebook, a bar of what moves, and the tensors as a tree."""
        stored = max(1, self.bytes_stored)
        told = f"{sized(self.bytes_moved)} moved by now, {sized(self.bytes_to_move)} to move, of"
        return page(
            as_html(self._facts([("tensors", f"{len(self.tensors)}")])),
            captioned(f"{told} {sized(self.bytes_stored)} stored"),
            bar(self.bytes_moved / stored, self.bytes_to_move / stored),
            as_tree(branch_of(tree_of(self.tensors))),
        )

    def _facts(self, tensors: list[tuple[str, str]]) -> list[tuple[str, str]]:
        total = self.bytes_moved + self.bytes_to_move
        share = total / max(1, self.bytes_stored)
        more = "" if self.complete else ", or more: a strategy asks for values"
        moves = f"{sized(total)} of {sized(self.bytes_stored)} ({share:.0%})"
        rates = {"1 Gbit/s": 1e9 / 8, "100 Mbit/s": 1e8 / 8}
        rows = [
            ("checkpoint", self.place),
            ("moves", f"{moves} in {self.requests} requests{more}"),
            ("takes", ", ".join(f"{self.seconds(r):.1f} s at {name}" for name, r in rates.items())),
            *tensors,
        ]
        told = [] if self.report is None else self.report._rows()  # noqa: SLF001 - of tables alike
        return [*rows, *(row for row in told if row[0] not in {"checkpoint", "moved"})]


def previewed(
    checkpoint: Opened,
    strategies: Sequence[Strategy],
    trust: Trust,
    model: torch.nn.Module | None,
    terms: Terms,
) -> Plan:
    """Put a hollow checkpoint through strategies, and tell what the result would take.

    Args:
        checkpoint: the open checkpoint.
        strategies: as for `load`.
        trust: which names of the pickle may be run.
        model: what it would be loaded into, if anything.
        terms: on which terms.

    Raises:
        CheckpointError: as the load would.
    """
    steps: list[Strategy] = [*strategies]
    if model is not None:
        steps = [*tracked(strategies), functools.partial(matched, terms, model, _NOBODY)]
    begun = time.perf_counter()
    rewind = random_states()
    found = planned(checkpoint, {}, steps, trust)
    rewind()
    archive = checkpoint.archive
    wanted = {key: record for key, record in archive.records.items() if key in found.needed}
    total = sum(record.size for record in wanted.values())
    spare = spare_bytes(wanted.values(), total, checkpoint.bytes_moved)
    parts = [] if checkpoint.source.in_memory else foreseen(checkpoint.source, wanted, spare)
    hollow = hollow_of(archive)
    complete = found.result is not None or not found.needed
    to_move = sum(length for _, length in parts)
    report = None
    if isinstance(found.result, Match) and model is not None:
        moved = checkpoint.bytes_moved + to_move
        loaded = Loaded(found.result, moved, checkpoint.bytes_stored)
        report = reported(terms.place, model, loaded, time.perf_counter() - begun)
    return Plan(
        place=redact(str(archive.place)),
        bytes_stored=checkpoint.bytes_stored,
        bytes_moved=checkpoint.bytes_moved,
        bytes_to_move=to_move,
        requests=len(checkpoint.origin.moved) + len(parts),
        records=tuple(record.name for record in wanted.values()),
        tensors=tuple(
            info
            for info, keys in zip(infos_of(hollow), hollow.records.values(), strict=True)
            if keys & found.needed
        ),
        complete=complete,
        report=report,
    )
