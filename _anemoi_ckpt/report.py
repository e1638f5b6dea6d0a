"""What `load_into` loaded, and what it did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from _anemoi_ckpt.alignment import Alignment
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.leadtimes import other_times, read_times
from _anemoi_ckpt.loading import Loaded
from _anemoi_ckpt.matching import (
    Dtypes,
    Match,
    Original,
    Shapes,
    compared,
    listed,
    migration_advice,
    tensors_of,
)
from _anemoi_ckpt.tables import Table, folded, section, sized
from _anemoi_ckpt.variables import compare, paired, read_model, recast, with_roles


@frozen(repr=False, eq=False)
class Report(Table):
    """What `load_into` loaded, and what it did not. Prints as a table, in notebooks, too."""

    place: str
    loaded: tuple[str, ...]  # names in the model
    missing: tuple[str, ...]  # in the model, not in the checkpoint
    unexpected: tuple[str, ...]  # in the checkpoint, not in the model
    mismatched: Shapes  # name: shape in the checkpoint, shape in the model
    renamed: Mapping[str, str]  # name in the checkpoint: name in the model
    restored: tuple[str, ...]  # "optimizer", "scheduler"
    bytes_moved: int
    bytes_stored: int
    seconds: float
    rest: Mapping[str, Any]  # the checkpoint's other entries
    # kept, of these moved and recast (in another role); new, gone: if both sides tell
    variables: Mapping[str, tuple[str, ...]]
    aligned: tuple[str, ...]  # tensors put into the order of the model's variables or edges
    on_meta: tuple[str, ...] = ()  # left on the meta device: buffers that no checkpoint has
    # name: dtype in the checkpoint, in the model; the cast lost more than it rounded
    lossy: Mapping[str, Dtypes] = {}
    migrations: tuple[str, ...] = ()  # Anemoi's that it has not had, where names differ
    # "input", "output": how many steps in time the checkpoint has, and the model, where aligned
    steps: Mapping[str, tuple[int, int]] = {}
    # dataset: when the checkpoint's steps are, and the model's, where both tell and they differ
    times: Mapping[str, tuple[str, str]] = {}

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("checkpoint", self.place)]
        if self.bytes_stored:  # zero for a checkpoint in memory
            moved, stored = sized(self.bytes_moved), sized(self.bytes_stored)
            rows.append(("moved", f"{moved} of {stored} in {self.seconds:.2f} s"))
        sections: dict[str, Sequence[str]] = {
            "loaded": folded(self.loaded),
            "missing": folded(self.missing),
            "unexpected": folded(self.unexpected),
            "mismatched": compared(self.mismatched),
            "renamed": _arrows(self.renamed),
            "restored": self.restored,
        }
        if self.variables or self.aligned:
            sections["aligned"] = folded(self.aligned)
        for heading, lines in sections.items():
            rows += section(f"{heading} {len(getattr(self, heading))}", lines)
        if self.on_meta:
            rows += section(f"on meta {len(self.on_meta)}", folded(self.on_meta))
        if self.lossy:
            casts = [
                f"{n}: {old} to {new}".replace("torch.", "") for n, (old, new) in self.lossy.items()
            ]
            rows += section(f"lost by dtype {len(self.lossy)}", casts)
        lines = [f"{len(n)} {kind}: {listed(n)}" for kind, n in self.variables.items() if n]
        rows += section("variables", lines) if lines else []
        steps = [*_of_steps(self.steps), *_of_times(self.times)]
        rows += section("steps", steps) if steps else []
        if self.migrations:
            rows.append(("not migrated", migration_advice(self.migrations)))
        return [*rows, ("rest", ", ".join(map(str, self.rest)))]


def reported(place: str, model: torch.nn.Module, loaded: Loaded, seconds: float) -> Report:
    """Make the report of a load whose match was installed."""
    match: Match = loaded.result
    absent = {*match.missing, *match.mismatched}
    return Report(
        place=redact(place),
        loaded=tuple(name for name in tensors_of(model) if name not in absent),
        missing=match.missing,
        unexpected=match.unexpected,
        mismatched=match.mismatched,
        renamed=match.renamed,
        restored=tuple(kind for kind, states in match.states.items() if states),
        bytes_moved=loaded.bytes_moved,
        bytes_stored=loaded.bytes_stored,
        seconds=seconds,
        rest=match.rest,
        variables=_fate_of_variables(model, match.original),
        aligned=(*match.original.alignment.tensors, *match.moved_edges),
        on_meta=match.on_meta,
        lossy=match.lossy,
        migrations=match.original.pending if match.missing and match.unexpected else (),
        steps=_fate_of_steps(match.original.alignment),
        times=other_times(match.original.times, read_times(model)),
    )


def _fate_of_variables(model: torch.nn.Module, original: Original) -> dict[str, tuple[str, ...]]:
    """List the variables by what became of them; empty unless both sides know theirs."""
    known, pairs = read_model(model), original.alignment.pairs
    named = {dataset: pair for dataset, (pair, _) in paired(pairs, known).items()}  # as the model's
    both = paired(original.variables, known)
    read = {n: pair for n, pair in both.items() if n in original.variables or len(known) == 1}
    pairs = read | (named or pairs)
    fates: dict[str, tuple[str, ...]] = {}
    for dataset, (old, new) in pairs.items():
        differences = compare(old.index, new.index)
        kinds = {
            "kept": [name for name in new.index if name in old.index],
            "moved": differences["moved"],
            "new": differences["added"],
            "gone": differences["removed"],
            "recast": recast(with_roles(old, new), with_roles(new, old)),
        }
        prefix = f"{dataset}." if len(pairs) > 1 else ""
        for kind, names in kinds.items():
            fates[kind] = fates.get(kind, ()) + tuple(prefix + name for name in names)
    return fates


def _fate_of_steps(alignment: Alignment) -> dict[str, tuple[int, int]]:
    """Give the counts of steps, in the checkpoint and in the model, of the kinds that differ."""
    own = alignment.own
    counts = {kind: (count, own[kind]) for kind, count in alignment.steps.items()}
    return {kind: (before, after) for kind, (before, after) in counts.items() if before != after}


def _of_steps(steps: Mapping[str, tuple[int, int]]) -> list[str]:
    """Say which steps were kept.

    >>> _of_steps({"input": (3, 1), "output": (1, 2)})
    ['input: the last 1 of 3 kept', 'output: the first 1 of 1 kept, 1 new']
    """
    lines = []
    for kind, (before, after) in steps.items():
        end = "last" if kind == "input" else "first"
        new = f", {after - before} new" if after > before else ""
        lines.append(f"{kind}: the {end} {min(before, after)} of {before} kept{new}")
    return lines


def _of_times(times: Mapping[str, tuple[str, str]]) -> list[str]:
    return [
        f"{name}: {was} in the checkpoint, {now} in the model" for name, (was, now) in times.items()
    ]


def _arrows(renamed: Mapping[str, str]) -> list[str]:
    old, new = folded(renamed), folded(renamed.values())
    pairs = zip(old, new, strict=True) if len(old) == len(new) else renamed.items()
    return [f"{before} → {after}" for before, after in pairs]
