"""Several state dicts are combined into one: their mean, or the entries of all.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _anemoi_ckpt.anatomy import like, versions_of, with_versions
from _anemoi_ckpt.calls import level_of_user
from _anemoi_ckpt.comparing import describe_differences, shapes_of
from _anemoi_ckpt.describing import differing_units, read_units
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.misplaced import changes, moves, paired_variables
from _anemoi_ckpt.tensors import change_tensors, is_inexact, mean, view_key
from _anemoi_ckpt.variables import few, read_checkpoint


def in_one_order(
    verb: str, others: Sequence[Any], combine: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """Let a strategy that combines checkpoints refuse those whose variables stand elsewhere.

    Args:
        verb: what it does with them, for the error.
        others: the checkpoints that another one is combined with.
        combine: the strategy.
    """
    known = [(read_checkpoint(other), read_units(other)) for other in others]

    def combined(checkpoint: Any) -> Any:
        variables, units = read_checkpoint(checkpoint), read_units(checkpoint)
        for number, (theirs, their_units) in enumerate(known, 1):
            pairs = paired_variables(theirs, variables)
            pairs = {d: (old, new) for d, (old, new) in pairs.items() if moves(old, new)}
            units_differ = differing_units(their_units, units)
            if pairs or units_differ:
                raise MismatchError(
                    UNPLACED,
                    f"the variables of checkpoint {number} to {verb} with are not the same here:"
                    f" {changes(pairs) or few(units_differ)}",
                    "put both through align_variables(model=model) before; weights(checkpoint)"
                    " tells no variables, for tensors that do not run over them",
                )
        return combine(checkpoint)

    return combined if any(variables for variables, _ in known) else combine


def average_state_dicts(
    state_dict: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Replace the floating-point and complex tensors by their mean with those of the others.

    Raises:
        MismatchError: names or shapes differ.
    """
    shapes = shapes_of(state_dict)
    for number, other in enumerate(others, 1):
        problems = describe_differences(shapes, shapes_of(other), "other")
        if problems:
            raise MismatchError(
                UNPLACED,
                f"the weights do not match checkpoint {number} to average with{problems}",
                "leave out of both what they do not share, with include or exclude",
            )
    chosen = {
        # Two names that are tied here, but not in another state dict, have two means.
        name: tuple(view_key(other[name]) for other in others)
        for name, shape in shapes.items()
        if shape is not None and is_inexact(state_dict[name])
    }
    return change_tensors(
        state_dict, chosen, lambda name, tensor: mean(tensor, [other[name] for other in others])
    )


def merge_state_dicts(
    state_dict: Mapping[str, Any], others: Sequence[Mapping[str, Any]], clash: str
) -> dict[str, Any]:
    """Add the entries of the others; `clash` is as for `strategies.merge`.

    Raises:
        MismatchError: names clash, and `clash` is ``"error"``.
    """
    items = dict(state_dict)
    clashes: dict[str, None] = {}  # a dict, for the order
    for other in others:
        clashes |= {n: None for n, v in other.items() if n in items and items[n] is not v}
        items = {**items, **other} if clash != "first" else items | {**other, **items}
    if clashes and clash == "error":
        problem = f"names clash in merging ({len(clashes)}): {few(clashes)}"
        raise MismatchError(UNPLACED, problem, "say which is kept: clash='first' or 'last'")
    if clashes and clash == "warn":
        message = f"names clash in merging ({len(clashes)}), the last wins: {few(clashes)}"
        # The frames below the caller's: the step, on_weights' function, and this one.
        warnings.warn(message, stacklevel=level_of_user())
    versions: dict[str, Any] = {}
    for source in (state_dict, *others):
        versions |= versions_of(source)
    return with_versions(like(state_dict, items), versions)
