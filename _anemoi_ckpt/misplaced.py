"""Tensors that fit a model by their shape, but whose variables are not where the model has them.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from _anemoi_ckpt.alignment import axes, labels, with_steps
from _anemoi_ckpt.anatomy import weights_of
from _anemoi_ckpt.comparing import shapes_of
from _anemoi_ckpt.layouts import layout_in_steps, suspect_axis, unknown_tensors
from _anemoi_ckpt.leads import Shapes, described, own_steps, solved_steps
from _anemoi_ckpt.variables import (
    ROLES,
    Variables,
    compare,
    differences,
    few,
    paired,
    read_model,
    recast,
    with_roles,
)


def misplaced(
    model: torch.nn.Module,
    names: Iterable[str],
    source: Mapping[str, Variables],
    shapes: Shapes,
) -> str:
    """Describe the tensors whose variables are not where the model has them; empty if none are.

    If the model's layout is known, these are the tensors whose channels are of other variables.
    Otherwise they are all tensors, as soon as one variable has another index or another role.

    Args:
        model: the model that would take the tensors.
        names: the tensors' names in the model; their shapes are the model's.
        source: the variables of the checkpoint that the tensors are from.
        shapes: of all tensors that the checkpoint has.
    """
    pairs = paired_variables(source, read_model(model))
    layouts = _layouts(model) if pairs else {}
    own = own_steps(layouts.values())
    wanted = shapes_of(weights_of(model)) if own else {}
    old = {dataset: before for dataset, (before, _) in pairs.items()}
    steps = solved_steps(old, layouts, shapes, wanted)
    pairs = {d: pair for d, pair in pairs.items() if pair[0] != pair[1] or steps != own}
    affected = _affected(model, names, pairs, layouts, steps) if pairs else []
    if not affected:
        return ""
    if steps != own:
        return (
            f"the checkpoint has {described(steps)}, and the model {described(own)};"
            f" {len(affected)} tensors that fit by their shape run over them: {few(affected)}"
        )
    return (
        f"the checkpoint's variables are not where the model has them ({changes(pairs)}), and"
        f" {len(affected)} tensors that fit by their shape run over them: {few(affected)}"
    )


def changes(pairs: Mapping[str, tuple[Variables, Variables]]) -> str:
    """Describe how the variables of datasets differ."""
    details = [
        (f"{dataset}: " if len(pairs) > 1 else "")
        + "; ".join(filter(None, [differences(old.index, new.index), ", ".join(recast(old, new))]))
        for dataset, (old, new) in pairs.items()
    ]
    return ", ".join(details)


def paired_variables(
    source: Mapping[str, Variables], target: Mapping[str, Variables]
) -> dict[str, tuple[Variables, Variables]]:
    """Pair the variables of datasets, with the roles that both sides know."""
    return {
        dataset: (with_roles(old, new), with_roles(new, old))
        for dataset, (old, new) in paired(source, target).items()
    }


def _layouts(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Derive the layouts of a model; none if it is not one of anemoi-models."""
    try:
        return layout_in_steps(model)
    except ValueError:
        return {}


def _affected(
    model: torch.nn.Module,
    names: Iterable[str],
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Mapping[str, Any]],
    steps: Mapping[str, int],
) -> list[str]:
    """List the tensors that would give a variable the slices of another one."""
    if not layouts:  # an unknown layout: every tensor may run over variables
        moved = any(moves(old, new) for old, new in pairs.values())
        return list(names) if moved else []
    unknown = unknown_tensors(model, layouts)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def clashes(name: str, dataset: str) -> bool:
        entries = layouts.get(dataset, {})
        if name in unknown.get(dataset, ()):
            return bool(suspect_axis(shapes[name], shapes[name], *pairs[dataset], entries, steps))
        return _clashes(entries.get(name), *pairs[dataset], steps)

    return [name for name in names if any(clashes(name, dataset) for dataset in pairs)]


def moves(source: Variables, target: Variables) -> bool:
    """Tell whether a variable has another index or role, or another one's index."""
    there = {position: name for name, position in source.index.items()}
    replaced = any(
        name not in source.index and there.get(position, name) not in {name, *target.index}
        for name, position in target.index.items()
    )
    changes = compare(source.index, target.index)
    return replaced or bool(changes["moved"] or recast(source, target))


def _clashes(entry: Any, source: Variables, target: Variables, steps: Mapping[str, int]) -> bool:
    """Tell whether a channel is another variable's in the model."""
    if entry == "model":
        return _roles_in_order(source) != _roles_in_order(target)
    return any(
        old != new
        for parts in axes(entry).values()
        for old, new in zip(
            labels(with_steps(parts, steps), source), labels(parts, target), strict=False
        )
    )


def _roles_in_order(variables: Variables) -> list[tuple[bool, ...]]:
    """Give the roles of the variables in the order of their indices.

    Tensors of positions depend on these alone.
    """
    names = sorted(variables.index, key=variables.index.__getitem__)
    return [tuple(name in getattr(variables, role) for role in ROLES) for name in names]
