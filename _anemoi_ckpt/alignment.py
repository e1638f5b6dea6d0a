"""Layouts say which axes of tensors run over variables; a plan says where each slice comes from.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

layouts · steps in time · order
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import (
    NO_VARIABLES,
    ROLES,
    Variables,
    differences,
    few,
    is_collection,
    paired,
    with_roles,
)

Part = int | str | Sequence[str]  # of an axis: a count of channels, a group, or these variables
Label = tuple[Any, Any]  # of a channel: the place of its part, and its variable or number there

# ── layouts ───────────────────────────────────────────────────────────────────────────────────

NEW = ("model", "zeros")  # the sources of slices for new variables
GROUPS = ("all", "input", "output", "prognostic", "forcing", "diagnostic")


def labels(parts: Sequence[Part], variables: Variables) -> list[Label]:
    """Label each channel of an axis with its part and its variable, or its number.

    >>> labels(["input", "output", 1], Variables({"t": 0, "tp": 1}, diagnostic=frozenset({"tp"})))
    [(0, 't'), (1, ('t', False)), (1, ('tp', True)), (2, 0)]
    """
    return [
        (place, channel)
        for place, part in zip(_places(parts), parts, strict=True)
        for channel in _channels(part, variables)
    ]


def _channels(part: Part, variables: Variables) -> list[Any]:
    """Give the variable of each channel of a part, or the numbers of channels without variables."""
    if isinstance(part, int):
        return list(range(part))
    names = sorted(variables.index, key=variables.index.__getitem__)
    if not isinstance(part, str):
        return [name for name in part if name in variables.index]
    absent = {
        "all": frozenset[str](),
        "input": variables.diagnostic | variables.target,
        "output": variables.forcing | variables.target,
        "prognostic": variables.forcing | variables.diagnostic | variables.target,
        "forcing": frozenset(names) - variables.forcing,
        "diagnostic": frozenset(names) - variables.diagnostic,
    }[part]
    present = [name for name in names if name not in absent]
    # The model predicts an increment of a variable that it reads, and a value of any other. Weights
    # for the one are of no use for the other, so the label tells them apart.
    if part == "output":
        return [(name, name in variables.diagnostic) for name in present]
    return present


def disagreement(entry: Any, variables: Variables, shape: Sequence[int]) -> str:
    """Describe how a shape differs from the sum of a layout's parts; empty if it does not."""
    if len({axis % max(len(shape), 1) for axis in axes(entry)}) < len(axes(entry)):
        return f"has {len(shape)} axes, but its layout has one of them twice"
    for axis, parts in axes(entry).items():
        if not -len(shape) <= axis < len(shape):
            return f"has no axis {axis}: its shape is {tuple(shape)}"
        sizes = [(part, len(_channels(part, variables))) for part in parts]
        total = sum(size for _, size in sizes)
        if shape[axis] != total:
            terms = " + ".join(
                f"{size}" if isinstance(part, int) else f"{part_name(part)} {size}"
                for part, size in sizes
            )
            return f"has {shape[axis]} along axis {axis}, but its layout has {terms} = {total}"
    return ""


def part_name(part: Part) -> str:
    """Name a part of an axis for a message."""
    return str(part) if isinstance(part, int | str) else f"({few(part)})"


def axes(entry: Any) -> dict[int, Sequence[Part]]:
    """Give the axes of a layout's entry that run over variables, with the parts of each."""
    if not isinstance(entry, Mapping):
        return {}
    return {axis: parts for axis, parts in entry.items() if isinstance(axis, int)}


@dataclass(frozen=True)
class Layout:
    """The layout of a dataset's tensors: entries by glob, and the variables' roles."""

    entries: dict[str, Any]
    roles: Variables
    unknown: frozenset[str] = frozenset()  # names of tensors that may run over variables, too
    # why other steps are not steps of the model, by what differs, as `fixed_steps` tells
    fixed: Mapping[str, str] = field(default_factory=dict)


def read_layout(layout: Any, target: Mapping[str, Variables]) -> dict[str, Layout]:
    """Check a layout, and give it for each dataset.

    Args:
        layout: by glob, or by dataset and glob.
        target: the wanted variables, by dataset.

    Raises:
        TypeError: the layout is not a dict.
        ValueError: it is for other datasets, or has a malformed entry.
    """
    if not isinstance(layout, Mapping) or not layout:
        raise TypeError(f"a layout is a dict by globs, or of such dicts by dataset, not {layout!r}")
    by_dataset = all(isinstance(value, Mapping) and not axes(value) for value in layout.values())
    if not by_dataset and len(target) != 1:
        raise ValueError(f"a layout for several datasets is by dataset: {few(target)}")
    layouts = layout if by_dataset else {next(iter(target)): layout}
    for dataset in layouts:
        if dataset not in target:
            raise ValueError(
                f"the layout is for the dataset {dataset}, but the variables are of {few(target)}"
            )
    return {dataset: _read_dataset_layout(entries) for dataset, entries in layouts.items()}


def _read_dataset_layout(layout: Mapping[Any, Any]) -> Layout:
    entries = {glob: entry for glob, entry in layout.items() if glob not in ROLES}
    roles = {role: names for role, names in layout.items() if role in ROLES}
    malformed = [
        glob
        for glob, entry in entries.items()
        if not isinstance(glob, str) or (entry != "model" and not _is_entry(entry))
    ]
    malformed += [role for role, names in roles.items() if not _are_names(names)]
    if malformed:
        shown = ", ".join(f"{key!r}: {layout[key]!r}" for key in malformed)
        raise ValueError(f"not a layout: {shown}; see align_variables for what a layout is")
    sets = {role: frozenset(names) for role, names in roles.items()}
    return Layout(entries, Variables({}, **sets, has_roles=bool(sets)))


def _is_entry(entry: Any) -> bool:
    parts_by_axis = axes(entry)
    if not parts_by_axis or {*entry} - {*parts_by_axis, "new"}:
        return False
    return entry.get("new", "zeros") in NEW and all(
        isinstance(parts, list | tuple)
        and all(part in GROUPS if isinstance(part, str) else _is_part(part) for part in parts)
        for parts in parts_by_axis.values()
    )


def _is_part(part: Any) -> bool:
    return (isinstance(part, int) and part >= 0) or _are_names(part)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def check_new(new: Any, target: Mapping[str, Variables]) -> None:
    """Check the source of slices for new variables.

    Raises:
        ValueError: it is unknown, or is for variables that the target lacks.
    """
    if not isinstance(new, Mapping):
        if new not in NEW:
            raise ValueError(f"new is 'model', 'zeros' or a dict of variables, not {new!r}")
        return
    if not all(isinstance(source, str) for source in new.values()):
        raise ValueError(
            f"each value of new is the name of a variable, 'model' or 'zeros', not as in {new!r}"
        )
    unknown = [name for name in new if not any(name in known.index for known in target.values())]
    if unknown:
        raise ValueError(f"new has variables that are not among the wanted ones: {few(unknown)}")


# ── steps in time ─────────────────────────────────────────────────────────────────────────────


class Step(str):
    """A group of variables at one step in time, among all steps of its kind.

    It is a part of an axis, as the name of its group is. Steps of output count from the start of
    the forecast on: 0, 1, … Steps of input count back from there: …, -2, -1. So the same step has
    the same number in models of any count of steps.
    """

    kind: str
    at: int

    __slots__ = ("at", "kind")

    def __new__(cls, group: str, kind: str, at: int) -> Self:
        """Make a step of a kind (``"input"`` or ``"output"``) from its group and number."""
        step = super().__new__(cls, group)
        step.kind, step.at = kind, at
        return step


def in_steps(group: str, kind: str, count: int) -> list[Part]:
    """Give a group at each of several steps, in the order that Anemoi's models have: oldest first.

    >>> [part.at for part in in_steps("input", "input", 2) + in_steps("output", "output", 2)]
    [-2, -1, 0, 1]
    """
    first = -count if kind == "input" else 0
    return [Step(group, kind, first + number) for number in range(count)]


def _runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Put the steps that follow each other into one list, and each other part into its own."""
    runs: list[list[Part]] = []
    for part in parts:
        last = runs[-1][-1] if runs else None
        follows = (
            isinstance(part, Step)
            and isinstance(last, Step)
            and (part, part.kind, part.at) == (last, last.kind, last.at + 1)
        )
        runs = [*runs[:-1], [*runs[-1], part]] if follows else [*runs, [part]]
    return runs


def _places(parts: Sequence[Part]) -> list[Any]:
    """Give each part its place, which does not depend on the count of steps.

    Forcing and prognostic variables that are read apart have one place: the model reads the same
    numbers of a variable whose role has changed.

    >>> _places([4, *in_steps("forcing", "input", 1), *in_steps("prognostic", "input", 1)])
    [0, (('read', 1), -1), (('read', 1), -1)]
    """
    places: list[Any] = []
    read: dict[str, int] = {}  # how often, by group
    for number, run in enumerate(_runs(parts)):
        place: Any = number
        first = run[0]
        if isinstance(first, Step) and first.kind == "input" and first in _READ_APART:
            read[first] = read.get(first, 0) + 1
            place = ("read", read[first])
        places += [(place, part.at) if isinstance(part, Step) else place for part in run]
    return places


_READ_APART = ("forcing", "prognostic")


def with_steps(parts: Sequence[Part], counts: Mapping[str, int]) -> list[Part]:
    """Give an axis of a model of other counts of steps, by kind.

    >>> with_steps([*in_steps("input", "input", 2), 4], {"input": 1})
    ['input', 4]
    """
    return [
        part
        for run in _runs(parts)
        for part in (
            in_steps(str(run[0]), run[0].kind, counts[run[0].kind])
            if isinstance(run[0], Step) and run[0].kind in counts
            else run
        )
    ]


def entry_with_steps(entry: Any, counts: Mapping[str, int]) -> Any:
    """Give the entry of a layout as it is for a model of other counts of steps."""
    if isinstance(entry, str):
        return entry
    return {**entry, **{axis: with_steps(parts, counts) for axis, parts in axes(entry).items()}}


def plain(entry: Any) -> Any:
    """Give the entry of a layout with names of groups instead of steps."""
    if isinstance(entry, str):
        return entry
    names = {
        axis: [str(part) if isinstance(part, str) else part for part in parts]
        for axis, parts in axes(entry).items()
    }
    return {**entry, **names}


# ── order ─────────────────────────────────────────────────────────────────────────────────────

# "model" for the model's whole tensor, or the origin of each channel along each axis
Plan = str | tuple[tuple[int, tuple[int | str, ...]], ...]


@dataclass(frozen=True)
class Alignment:
    """The variables of each dataset before and after an alignment, and the tensors to align."""

    pairs: dict[str, tuple[Variables, Variables]]
    tensors: dict[str, tuple[str, Any]]  # by name: the dataset, and the entry of its layout
    steps: Mapping[str, int] = field(default_factory=dict)  # the checkpoint's, if others, by kind
    own: Mapping[str, int] = field(default_factory=dict)  # the model's, in that case


def known_variables(
    known: Mapping[str, Variables],
    source: Mapping[str, Variables],
    target: Mapping[str, Variables],
    layouts: Mapping[str, Layout],
) -> dict[str, tuple[Variables, Variables]]:
    """Pair the variables of each dataset with the wanted ones.

    Args:
        known: the variables that the checkpoint knows; empty if it knows none.
        source: the checkpoint's variables as the caller passed them; empty to use `known`.
        target: the wanted variables.
        layouts: the layout of each dataset; datasets without one are left out.

    Raises:
        ValueError: there are no variables, no dataset in common, or `known` differs from both
            `source` and `target`.
    """
    if not known and not source:
        raise MismatchError(UNPLACED, NO_VARIABLES, "pass source to say what they are")
    candidates = paired(source or known, target)
    if not candidates:
        raise MismatchError(
            UNPLACED,
            f"no dataset in common with the wanted ones, {few(target)}",
            f"its own are: {few(source or known)}",
        )
    own = paired(known, target)
    pairs = {}
    for dataset, (old, new) in ((d, pair) for d, pair in candidates.items() if d in layouts):
        roles = layouts[dataset].roles
        current = own[dataset][0] if dataset in own else old
        if current.index not in (old.index, new.index):
            raise MismatchError(
                UNPLACED,
                "its variables are not those passed as source:"
                f" {differences(old.index, current.index)}",
                "leave source out to read them from the checkpoint",
            )
        before = with_roles(current, old, roles, new)
        pairs[dataset] = before, with_roles(new, roles, before)
    return pairs


def origins(  # noqa: PLR0913, PLR0917 - all there is to say of an order
    name: str,
    entry: Any,
    source: Variables,
    target: Variables,
    new: str | Mapping[str, str],
    steps: Mapping[str, int],
) -> Plan:
    """Give the origin of each channel of a tensor in its new order.

    It is the channel's position in the old order, which has other `steps` if there are any,
    ``"model"``, or ``"zeros"``. A new step gets what a new variable does, but no copy.

    >>> old, new = Variables({"t": 0, "z": 1}), Variables({"z": 0, "q": 1})
    >>> origins("weight", {1: ["input", "input", 1]}, old, new, "zeros", {})
    ((1, (1, 'zeros', 3, 'zeros', 4)),)

    Raises:
        ValueError: a new variable shall get a copy of one that the tensor lacks.
    """
    if isinstance(entry, str):
        return entry
    rule = entry.get("new", new)

    def origin(label: Label, positions: Mapping[Label, int], kept: set[Any]) -> int | str:
        if label in positions:
            return positions[label]
        part, channel = label
        variable = channel if isinstance(channel, str) else channel[0]
        copied: str = rule if isinstance(rule, str) else rule.get(variable, "model")
        if copied in NEW:
            return copied
        if part not in kept:
            return "model"
        sibling = part, copied if isinstance(channel, str) else (copied, *channel[1:])
        if sibling not in positions:
            raise MismatchError(
                UNPLACED,
                f"{variable} cannot be a copy of {copied} in {name}: there is no {copied} there",
                "give it 'model' or 'zeros' in new",
            )
        return positions[sibling]

    def along_axis(parts: Sequence[Part]) -> tuple[int | str, ...]:
        old = with_steps(parts, steps)
        positions = {label: position for position, label in enumerate(labels(old, source))}
        kept = set(_places(old))
        return tuple(origin(label, positions, kept) for label in labels(parts, target))

    return tuple((axis, along_axis(parts)) for axis, parts in axes(entry).items())


def aligned_indices(indices: Any, alignment: Alignment) -> Any:
    """Give a checkpoint's ``data_indices`` with the variables after an alignment."""
    aligned = {
        dataset: copy.deepcopy(new.origin) if new.origin is not None else _as_collection(new)
        for dataset, (_, new) in alignment.pairs.items()
    }
    if is_collection(indices):  # a single dataset, which is not in a dict by dataset
        return next(iter(aligned.values()))
    return aligned if len(indices) == 1 else {**indices, **aligned}


def _as_collection(variables: Variables) -> dict[str, Any]:
    """Make a dict like an ``IndexCollection``, which `variables` reads."""
    roles = {role: sorted(getattr(variables, role)) for role in ROLES}
    return {"name_to_index": dict(variables.index), **roles}


def differ_in_prefix(one: str, other: str) -> bool:
    """Tell whether two names are equal, or differ in a prefix alone."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
