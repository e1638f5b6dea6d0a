"""How many steps in time a checkpoint's weights are for, where the model has others.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from _anemoi_ckpt.alignment import Layout, Step, axes, labels, with_steps
from _anemoi_ckpt.comparing import shapes_of
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import Variables, few

Shapes = Mapping[str, Sequence[int] | None]
_CONFIGURED = {"input": "multistep_input", "output": "multistep_output"}


def other_steps(
    checkpoint: Any,
    state_dict: Mapping[str, Any],
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Layout],
    model_tensors: Mapping[str, Any],
) -> dict[str, int]:
    """Give the counts of a checkpoint's steps by kind, if they are not the model's; else nothing.

    Raises:
        ValueError: the model's steps are not to be had from others, or the checkpoint's own
            configuration tells another count than its weights.
    """
    entries = {dataset: layout.entries for dataset, layout in layouts.items() if dataset in pairs}
    own = own_steps(entries.values())
    old = {dataset: before for dataset, (before, _) in pairs.items()}
    steps = solved_steps(old, entries, shapes_of(state_dict), shapes_of(model_tensors))
    if steps == own:
        return {}
    told = f"its weights have {described(steps)}, and the model {described(own)}"
    fixed = next(iter(layouts.values())).fixed
    changed = {kind for kind, count in steps.items() if count != own[kind]}
    changed |= {f"fewer {kind}" for kind in changed if steps[kind] > own[kind]}
    reasons = {reason for change, reason in fixed.items() if change in changed}
    if reasons:
        raise MismatchError(UNPLACED, f"{told}: {few(reasons)}", "exclude leaves tensors out")
    configured = _configured_steps(checkpoint)
    if any(configured.get(kind, count) not in {count, own[kind]} for kind, count in steps.items()):
        raise MismatchError(
            UNPLACED,
            f"{told}, but its configuration has {described(configured)}",
            "source tells other variables than its weights have, or it is none of this model",
        )
    return steps


def own_steps(layouts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count the steps of each kind that the entries of a model's layouts have."""
    steps = [
        part
        for entries in layouts
        for entry in entries.values()
        for parts in axes(entry).values()
        for part in parts
        if isinstance(part, Step)
    ]
    return {
        kind: len({step.at for step in steps if step.kind == kind})
        for kind in sorted({step.kind for step in steps})
    }


def solved_steps(
    old: Mapping[str, Variables],
    layouts: Mapping[str, Mapping[str, Any]],
    shapes: Shapes,
    wanted: Shapes,
) -> dict[str, int]:
    """Find the counts of steps by kind for which a checkpoint's shapes are as its layout says.

    Rows that are outputs alone tell the steps of output. Then columns tell those of input, if the
    nodes have as many attributes as the model's. What nothing tells is as in the model.

    Args:
        old: the variables of the checkpoint, by dataset.
        layouts: the entries of the model's layouts, by dataset.
        shapes: those of the checkpoint's tensors.
        wanted: those of the model's tensors.
    """
    steps = own_steps(layouts.values())
    for kind in sorted(steps, reverse=True):  # output, input
        solutions = {
            solution
            for dataset, variables in old.items()
            if kind == "output" or _same_attributes(dataset, shapes, wanted)
            for solution in _solutions(kind, layouts.get(dataset, {}), variables, shapes, steps)
        }
        if len(solutions) == 1 and solutions != {0}:
            (steps[kind],) = solutions
    return steps


def _solutions(
    kind: str,
    entries: Mapping[str, Any],
    variables: Variables,
    shapes: Shapes,
    steps: Mapping[str, int],
) -> Iterator[int]:
    """Give the count of steps of a kind that each axis tells; 0 if it has no size of any count."""
    for name, entry in entries.items():
        shape = shapes.get(name) or ()
        for axis, parts in axes(entry).items():
            kinds = {part.kind for part in parts if isinstance(part, Step)}
            none, one = (
                len(labels(with_steps(parts, {**steps, kind: count}), variables))
                for count in (0, 1)
            )
            alone = kind == "input" or len(kinds) == 1
            if one > none and alone and axis < len(shape):
                count, rest = divmod(shape[axis] - none, one - none)
                yield 0 if rest else max(count, 0)


def _same_attributes(dataset: str, shapes: Shapes, wanted: Shapes) -> bool:
    """Tell whether the nodes of a dataset have as many attributes on both sides."""
    ends = f"trainable_tensors.{dataset}.trainable", f"latlons_{dataset}"
    ours, theirs = (
        {name: (shape or ())[-1:] for name, shape in each.items() if name.endswith(ends)}
        for each in (shapes, wanted)
    )
    return ours == theirs


def _configured_steps(checkpoint: Any) -> dict[str, int]:
    """Read the counts of steps from a checkpoint's configuration, as far as it tells them.

    They are among the settings of the task; before anemoi-training 0.17, of the training.
    """
    config = _under(_under(checkpoint, "hyper_parameters"), "config")
    sections = [_under(config, key) for key in ("training", "task")]
    return {
        kind: section[name]
        for section in sections
        if isinstance(section, Mapping)
        for kind, name in _CONFIGURED.items()
        if isinstance(section.get(name), int)
    }


def _under(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def described(steps: Mapping[str, int]) -> str:
    """Describe counts of steps.

    >>> described({"input": 2, "output": 1})
    '2 steps of input and 1 step of output'
    """
    return " and ".join(
        f"{count} step{'s' * (count != 1)} of {kind}" for kind, count in steps.items()
    )
