"""Parameters of a model are frozen and unfrozen.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from _anemoi_ckpt.arguments import check_texts
from _anemoi_ckpt.globs import choose
from _anemoi_ckpt.tensors import is_inexact


def set_requires_grad(
    function: str, model: torch.nn.Module, globs: Sequence[str], *, requires_grad: bool
) -> list[str]:
    """Set ``requires_grad`` of the parameters that a glob chooses.

    Returns:
        The names of the parameters whose ``requires_grad`` was another before.

    Raises:
        TypeError: the model is not a module, or a glob is not a string.
        ValueError: there is no glob, or one chooses no parameter. Then nothing is changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes a module, not {model!r}")
    check_texts(function, globs)
    # A tied parameter is listed under each of its names. Integers cannot have a gradient.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = choose(parameters, globs, owner="the model")
    changed = [
        name
        for name, parameter in parameters.items()
        if name in chosen and is_inexact(parameter) and parameter.requires_grad != requires_grad
    ]
    for name in changed:
        parameters[name].requires_grad_(requires_grad)
    return changed
