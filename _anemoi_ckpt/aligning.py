"""Weights are put into the order of other variables: every axis is indexed anew, by name.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from _anemoi_ckpt.alignment import (
    Alignment,
    Layout,
    Plan,
    aligned_indices,
    differ_in_prefix,
    disagreement,
    entry_with_steps,
    known_variables,
    origins,
)
from _anemoi_ckpt.anatomy import (
    OPTIMIZER,
    like,
    path_to_weights,
    replaced,
    weights_of,
    without,
    without_averages,
)
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.globs import choose
from _anemoi_ckpt.layouts import suspect_axis
from _anemoi_ckpt.leads import other_steps, own_steps
from _anemoi_ckpt.tensors import change_tensors, is_strided, snapshot, tensor_names, view_key
from _anemoi_ckpt.variables import Variables, few, read_checkpoint


def find_alignment(
    checkpoint: Any,
    source: Mapping[str, Variables],
    target: Mapping[str, Variables],
    layouts: Mapping[str, Layout],
    model_tensors: Mapping[str, Any],
) -> Alignment:
    """Find the variables of each dataset that differ, and the tensors to align for them.

    Args:
        checkpoint: the checkpoint whose weights are to be aligned.
        source: its variables, by dataset; empty to read them from the checkpoint.
        target: the wanted variables, by dataset.
        layouts: the axes that run over variables, by dataset.
        model_tensors: the model's tensors, by name.

    Raises:
        ValueError: the checkpoint has no variables, the layout chooses nothing, a tensor's size
            does not agree with the layout, or that of an unknown tensor does with some variables;
            or there are other steps, of which none need be the model's.
    """
    known = known_variables(read_checkpoint(checkpoint), source, target, layouts)
    state_dict = weights_of(checkpoint)
    steps = other_steps(checkpoint, state_dict, known, layouts, model_tensors)
    pairs = {dataset: (old, new) for dataset, (old, new) in known.items() if steps or old != new}
    _check_predicted(pairs, layouts)
    tensors = _tensors_to_align(pairs, layouts, state_dict, model_tensors, steps)
    _check_unknown(pairs, layouts, state_dict, model_tensors, steps)
    present = {dataset for dataset, _ in tensors.values()}
    present |= {d for d in pairs if not tensors.keys().isdisjoint(layouts[d].entries)}
    if pairs and not present:
        raise MismatchError(
            UNPLACED, "it has none of the layout's tensors", f"it has: {few(state_dict)}"
        )
    own = own_steps(layout.entries for layout in layouts.values()) if steps else {}
    return Alignment({d: pair for d, pair in pairs.items() if d in present}, tensors, steps, own)


def align(
    checkpoint: Any,
    alignment: Alignment,
    model_tensors: Mapping[str, Any],
    new: str | Mapping[str, str],
) -> Any:
    """Put a checkpoint's weights into another order.

    Args:
        checkpoint: the checkpoint, which is not modified.
        alignment: the result of `find_alignment` for it.
        model_tensors: the tensors that provide the slices of new variables.
        new: what new variables get, as for `align_variables`.

    Raises:
        ValueError: a new variable shall get a copy of one that a tensor lacks, or the model has no
            values to provide.
    """
    if not alignment.pairs:
        return checkpoint
    plans = {
        name: origins(name, entry, *alignment.pairs[dataset], new, alignment.steps)
        for name, (dataset, entry) in alignment.tensors.items()
    }
    state_dict = weights_of(checkpoint)
    fitting = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in plans or _fits(tensor, plans[name], model_tensors.get(name))
    }
    chosen = {
        name: (plan, name in model_tensors and view_key(model_tensors[name]))
        for name, plan in plans.items()
        if name in fitting
    }
    aligned = change_tensors(
        like(state_dict, fitting),
        chosen,
        lambda name, tensor: _assemble(name, tensor, plans[name], model_tensors.get(name)),
    )
    path = path_to_weights(checkpoint) or ()
    return _record_alignment(replaced(checkpoint, path, aligned), alignment)


def _check_predicted(
    pairs: Mapping[str, tuple[Variables, Variables]], layouts: Mapping[str, Layout]
) -> None:
    """Refuse variables that are only read now, where the model read more of what was predicted."""
    for dataset, (old, new) in pairs.items():
        reason = layouts[dataset].fixed.get("forcing")
        predicted = old.index.keys() - old.forcing - old.diagnostic - old.target
        lost = [name for name in new.index if name in new.forcing & predicted]
        if reason and lost:
            raise MismatchError(
                UNPLACED,
                f"the model only reads {few(lost)}, which the checkpoint's predicts, too: {reason}",
                "exclude the tensors of the encoder, or have the model predict them",
            )


def _tensors_to_align(
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Layout],
    state_dict: Mapping[str, Any],
    model_tensors: Mapping[str, Any],
    steps: Mapping[str, int],
) -> dict[str, tuple[str, Any]]:
    """Find the tensors to align, each with its dataset and the entry of its layout.

    Raises:
        ValueError: the layout chooses a tensor twice or none, or does not agree with its size.
    """
    names = tensor_names(state_dict)
    tensors: dict[str, tuple[str, Any]] = {}
    problems = []
    for dataset, (old, new) in pairs.items():
        for glob, entry in layouts[dataset].entries.items():
            chosen = choose(names, [glob], missing_ok=True)
            if not chosen:
                _check_absent(glob, names, model_tensors)
            for name in chosen:
                if name in tensors and not _is_shared(name, glob, tensors, layouts):
                    raise MismatchError(
                        UNPLACED, f"the layout has {name} twice", f"{glob!r} chooses it again"
                    )
                tensors[name] = dataset, entry
                former = entry_with_steps(entry, steps)
                sides = [("the checkpoint", state_dict[name], old, former)]
                if name in model_tensors:
                    sides += [("the model", model_tensors[name], new, entry)]
                problems += [
                    f"{name} {problem} in {side}"
                    for side, tensor, variables, expected in sides
                    if (problem := disagreement(expected, variables, tensor.shape))
                ]
    problems += _divided(tensors, pairs, layouts)
    if problems:
        raise MismatchError(
            UNPLACED,
            f"these do not agree with the layout: {few(problems)}",
            "exclude leaves these tensors out",
        )
    return tensors


def _is_shared(
    name: str, glob: str, tensors: Mapping[str, tuple[str, Any]], layouts: Mapping[str, Layout]
) -> bool:
    """Tell whether the layouts of several datasets name a tensor: they go through one encoder."""
    dataset, _ = tensors[name]
    return name == glob and layouts[dataset].entries.get(name) == tensors[name][1]


def _divided(
    tensors: Mapping[str, tuple[str, Any]],
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Layout],
) -> list[str]:
    """Describe the tensors that several datasets share, and would have in different orders."""

    def plan(name: str, dataset: str) -> Plan | None:
        entry = layouts[dataset].entries[name]
        return origins(name, entry, *pairs[dataset], "zeros", {}) if dataset in pairs else None

    shared = {
        name: [dataset for dataset, layout in layouts.items() if name in layout.entries]
        for name in tensors
    }
    return [
        f"{name} is shared by the datasets {few(datasets)}, whose variables change differently"
        for name, datasets in shared.items()
        if any(plan(name, dataset) != plan(name, datasets[0]) for dataset in datasets[1:])
    ]


def _check_unknown(
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Layout],
    state_dict: Mapping[str, Any],
    model_tensors: Mapping[str, Any],
    steps: Mapping[str, int],
) -> None:
    """Refuse tensors that the layout does not know, and whose size is that of some variables."""
    names = set(tensor_names(state_dict)) & model_tensors.keys()
    problems = {
        name: problem
        for dataset, (old, new) in pairs.items()
        for name in sorted(names & layouts[dataset].unknown)
        if (
            problem := suspect_axis(
                state_dict[name].shape,
                model_tensors[name].shape,
                old,
                new,
                layouts[dataset].entries,
                steps,
            )
        )
    }
    if problems:
        described = [f"{name} ({problem})" for name, problem in problems.items()]
        raise MismatchError(
            UNPLACED,
            f"the layout of anemoi-models does not know what these tensors run over:"
            f" {few(described)}",
            "exclude leaves them out; or add them to anemoi_layout(model), by dataset, and pass"
            " that as layout: {name: {axis: [parts]}}, with a number for an axis without variables",
        )


def _check_absent(glob: str, names: Sequence[str], model_tensors: Mapping[str, Any]) -> None:
    """Refuse a glob that chooses no tensor, unless it chooses one that only the model has."""
    if not choose(model_tensors, [glob], missing_ok=True):
        choose(names, [glob])
    similar = [name for name in names if differ_in_prefix(name, glob)]
    if similar:
        raise MismatchError(
            UNPLACED,
            f"it has no {glob}, but {few(similar)}",
            "strip_prefix or add_prefix makes the names equal",
        )


def _fits(tensor: torch.Tensor, plan: Plan, target: Any) -> bool:
    """Tell whether a tensor can be assembled: its other axes agree with the model's, if needed."""
    if isinstance(plan, str):
        return True
    if target is None or not _needs_model(plan):
        return is_strided(tensor)
    if not (is_strided(tensor) and is_strided(target)) or tensor.dim() != target.dim():
        return False
    indexed = {axis % tensor.dim() for axis, _ in plan}
    sizes = enumerate(zip(tensor.shape, target.shape, strict=True))
    return all(size == wanted or axis in indexed for axis, (size, wanted) in sizes)


def _needs_model(plan: Plan) -> bool:
    """Tell whether a tensor takes anything from the model."""
    return isinstance(plan, str) or any("model" in channels for _, channels in plan)


def _assemble(name: str, tensor: torch.Tensor, plan: Plan, target: Any) -> torch.Tensor:
    """Assemble a tensor from its own slices, the model's, and zeros.

    Raises:
        ValueError: it needs slices of the model, and there are none.
    """
    if _needs_model(plan):
        target = _with_values(name, target)
    if isinstance(plan, str):
        whole: torch.Tensor = snapshot(target)
        return whole.to(tensor.dtype)
    kept = [[i for i, origin in enumerate(axis) if isinstance(origin, int)] for _, axis in plan]
    # A tensor that keeps no slice is not asked for its device, which counts as asking for its
    # values: so `load` does not move it.
    device = tensor.device if all(kept) else torch.device("cpu")
    assembled = _new_slices(tensor, plan, target, device)
    if not all(kept):
        return assembled
    new_positions = [torch.arange(size, device=device) for size in assembled.shape]
    for (axis, origins_along), positions in zip(plan, kept, strict=True):
        old_positions = [origins_along[position] for position in positions]
        new_positions[axis] = torch.tensor(positions, device=device)
        tensor = tensor.index_select(axis, torch.tensor(old_positions, device=device))
    # not in place: what is hollow would be written into a real tensor, and so be needed for sure
    return assembled.index_put(torch.meshgrid(*new_positions, indexing="ij"), tensor)


def _with_values(name: str, target: Any) -> torch.Tensor:
    """Give the model's tensor with all its values, also if it is sharded.

    Raises:
        ValueError: there is no such tensor, or it is on the meta device.
    """
    if target is None or target.is_meta:
        lack = "no model that has it was passed" if target is None else "the model's is on meta"
        raise MismatchError(
            UNPLACED,
            f"{name} takes slices of new variables from a model, but {lack}",
            "pass model=, not on the meta device, or new='zeros', which applies to all tensors but"
            " statistics",
        )
    # under fully_shard, full_tensor is a collective call; all ranks run the same strategy
    tensor: torch.Tensor = target.full_tensor() if hasattr(target, "full_tensor") else target
    return tensor


def _new_slices(
    tensor: torch.Tensor,
    plan: tuple[tuple[int, tuple[int | str, ...]], ...],
    target: Any,
    device: torch.device,
) -> torch.Tensor:
    """Make a tensor of the new size with all slices that are not the old tensor's."""
    sizes = list(tensor.shape)
    for axis, origins_along in plan:
        sizes[axis] = len(origins_along)
    result = torch.zeros(sizes, dtype=tensor.dtype, device=device)
    if _needs_model(plan):
        result.copy_(target.detach())
    for axis, origins_along in plan:
        for position, origin in enumerate(origins_along):
            if origin == "zeros":
                result.select(axis, position).zero_()
    return result


def _record_alignment(checkpoint: Mapping[str, Any], alignment: Alignment) -> dict[str, Any]:
    """Record the new variables in a checkpoint, and drop the states that are in the old order."""
    aligned = without_averages(without(checkpoint, [OPTIMIZER]))
    parameters: Any = aligned.get("hyper_parameters")
    if read_checkpoint({"hyper_parameters": parameters}):
        indices = aligned_indices(parameters["data_indices"], alignment)
        aligned["hyper_parameters"] = like(parameters, {**parameters, "data_indices": indices})
    return aligned
