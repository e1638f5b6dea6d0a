"""Strategies that put weights into the order of a model's variables, or refuse another order.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from _anemoi_ckpt.aligning import align, find_alignment
from _anemoi_ckpt.alignment import (
    Alignment,
    check_new,
    differ_in_prefix,
    read_layout,
)
from _anemoi_ckpt.anatomy import weights_of
from _anemoi_ckpt.arguments import state_dict_of
from _anemoi_ckpt.comparing import shapes_of
from _anemoi_ckpt.configurations import REMEDY, configured_otherwise, read_config
from _anemoi_ckpt.describing import (
    check_factors,
    check_units,
    metadata_of,
    read_units,
    rescaled,
    with_variables,
)
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.layouts import anemoi_layout, fixed_steps, layout_in_steps, unknown_tensors
from _anemoi_ckpt.misplaced import misplaced
from _anemoi_ckpt.steps import Step, with_alignment
from _anemoi_ckpt.variables import paired, read_checkpoint, read_model, read_variables


def aligner(  # noqa: PLR0913, PLR0917 - those of `align_variables`
    source: Any, target: Any, layout: Any, model: Any, new: Any, factors: Any
) -> Step:
    """Build the strategy that `strategies.align_variables` gives, from the same arguments.

    Raises:
        TypeError: variables, layout, model, `new` or `units` are of another kind.
        ValueError: one of them does not fit the others.
    """
    if model is None and (target is None or layout is None):
        raise TypeError("align_variables needs target and layout, or a model to derive them from")
    target_variables = read_variables("align_variables", model if target is None else target)
    derived = _derived(model) if layout is None else {}
    layouts = read_layout(derived or layout, target_variables)
    if derived:
        unknown = unknown_tensors(model, derived)
        fixed = fixed_steps(model)
        layouts = {d: replace(each, unknown=unknown[d], fixed=fixed) for d, each in layouts.items()}
    source_variables = {} if source is None else read_variables("align_variables", source)
    model_tensors = {} if model is None else state_dict_of("align_variables", model)
    check_new(new, target_variables)
    check_factors(factors, target_variables)
    units = read_units(model if target is None else target)
    facts = metadata_of(model if target is None else target)

    def alignment(checkpoint: Any) -> Alignment:
        return find_alignment(
            checkpoint, source_variables, target_variables, layouts, model_tensors
        )

    def aligned(checkpoint: Any) -> Any:
        old = source_variables or read_checkpoint(checkpoint)
        scaled = rescaled(checkpoint, old, target_variables, units, factors)
        changes = alignment(checkpoint)
        return with_variables(align(scaled, changes, model_tensors, new), changes.pairs, facts)

    return with_alignment(aligned, alignment)


def _derived(model: Any) -> dict[str, dict[str, Any]]:
    """Derive the layout of a model, in steps; `anemoi_layout` says why there is none."""
    return layout_in_steps(model) if isinstance(model, torch.nn.Module) else anemoi_layout(model)


def align_where_known(model: Any, new: Any) -> list[Step]:
    """Build the strategy that aligns a checkpoint if both it and the model know their variables.

    Returns:
        One strategy, or none if the model is not one of anemoi-models.

    Raises:
        ValueError: the model is not one of anemoi-models, but `new` is not the default.
    """
    try:
        layout = anemoi_layout(model) if isinstance(model, torch.nn.Module) else {}
    except ValueError:  # not a model of anemoi-models
        layout = {}
    if not layout:
        if new != "model":
            raise ValueError(
                f"new={new!r} needs a model of anemoi-models; for another model, use"
                " align_variables with a layout"
            )
        return []
    aligning = aligner(None, None, None, model, new, {})
    target = read_model(model)
    names = {name for dataset_layout in layout.values() for name in dataset_layout}

    def is_known(checkpoint: Any) -> bool:
        if not paired(read_checkpoint(checkpoint), target):
            return False
        # A checkpoint with none of the layout's names has nothing to align. One that has them under
        # another prefix is passed on, so that the user gets the error that says so.
        state_dict = weights_of(checkpoint)
        return any(differ_in_prefix(name, entry) for name in names for entry in state_dict)

    def alignment(checkpoint: Any) -> Alignment:
        if aligning.alignment is None or not is_known(checkpoint):
            return Alignment({}, {})
        return aligning.alignment(checkpoint)

    def aligned(checkpoint: Any) -> Any:
        return aligning(checkpoint) if is_known(checkpoint) else checkpoint

    return [with_alignment(aligned, alignment)]


def refuse_misplaced(model: Any, strategy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let a strategy refuse tensors that fit by shape, but are in the order of other variables."""
    if not isinstance(model, torch.nn.Module) or not read_model(model):
        return strategy
    wanted = shapes_of(weights_of(model))

    def checked(checkpoint: Any) -> Any:
        result = strategy(checkpoint)
        shapes = shapes_of(weights_of(result))
        fitting = [name for name, shape in shapes.items() if wanted.get(name) == shape]
        problem = misplaced(
            model, fitting, read_checkpoint(checkpoint), shapes_of(weights_of(checkpoint))
        )
        if problem:
            raise MismatchError(
                UNPLACED,
                problem,
                "put align_variables(model=model) before this strategy, with a layout if the model"
                " is not one of anemoi-models, and new={'its name': 'the old one'} for a variable"
                " that was only renamed",
            )
        source = read_checkpoint(checkpoint)
        problem = configured_otherwise(model, fitting, read_config(checkpoint), source)
        if problem:
            raise MismatchError(UNPLACED, problem, REMEDY)
        check_units(UNPLACED, model, fitting, read_units(checkpoint))
        return result

    return checked
