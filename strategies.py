"""Strategies: pure functions from checkpoint to checkpoint, and what puts them together.

A checkpoint is what `torch.load` gives: a dict with a state dict in it, or a bare state dict. A
strategy takes one and returns another, and never changes what it was given. It sees a hollow
checkpoint first (tensors on the meta device), so what it drops is never moved.

compose · choose
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["compose", "drop_optimizer", "pipe", "weights"]

Strategy = Callable[[Any], Any]


# ── compose ───────────────────────────────────────────────────────────────────────────────────


def compose(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """Compose functions from right to left: ``compose(f, g, h)(x)`` is ``f(g(h(x)))``.

    With `load` as one of them, those on its left are handed to it as its strategies, so that
    ``compose(f, g, load)(uri)`` is ``load(uri, g, f)`` and moves only what survives them.

    Raises:
        TypeError: one of them is not callable.

    >>> compose(len, weights)({"state_dict": {"a": torch.ones(1), "b": torch.ones(1)}})
    2

    See Also: pipe
    """
    flat = [each for function in functions for each in getattr(function, "composed", (function,))]
    for function in flat:
        if not callable(function):
            raise TypeError(f"compose takes functions, not {function!r}")
    last = next((place for place, each in enumerate(flat) if _takes_strategies(each)), 0)
    composed = functools.partial(_call, tuple(flat[:last]), tuple(flat[last:]))
    composed.composed = tuple(flat)  # type: ignore[attr-defined] # so that nesting makes no difference
    return composed


def pipe(value: Any, *functions: Callable[..., Any]) -> Any:
    """Put a value through functions from left to right: ``pipe(x, f, g)`` is ``g(f(x))``.

    >>> pipe({"state_dict": {"a": torch.ones(1)}, "optimizer_states": []}, drop_optimizer, list)
    ['state_dict']

    See Also: compose
    """
    return compose(*reversed(functions))(value)


def _takes_strategies(function: Any) -> bool:
    """Tell whether a function (`load`, or a partial of it) takes strategies after its place."""
    return bool(getattr(getattr(function, "func", function), "takes_strategies", False))


def _call(
    strategies: tuple[Strategy, ...], chain: tuple[Callable[..., Any], ...], *args: Any, **kw: Any
) -> Any:
    if not chain:
        (value,) = args
        return value
    *outer, first = chain
    if not outer:
        return first(*args, *reversed(strategies), **kw)
    value = first(*args, **kw)
    return _call(strategies, tuple(outer), value)


# ── choose ────────────────────────────────────────────────────────────────────────────────────

_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")  # in order of precedence

_OPTIMIZER = {
    "optimizer_states",  # Lightning
    "lr_schedulers",
    "MixedPrecision",  # Lightning's gradient scaler, by the name of its plugin
    "MixedPrecisionPlugin",
    "NativeMixedPrecisionPlugin",
    "native_amp_scaling_state",
    "amp_scaling_state",
    "optimizer",  # training loops of one's own
    "optimizers",
    "optimizer_state",
    "optimizer_state_dict",
    "optim_state_dict",
    "scheduler",
    "schedulers",
    "scheduler_state_dict",
    "lr_scheduler",
    "lr_scheduler_state_dict",
    "scaler",
    "scaler_state_dict",
    "grad_scaler",
}


def weights(checkpoint: Any) -> Mapping[str, Any]:
    """Choose the state dict alone, wherever the checkpoint holds it.

    Looks for ``state_dict``, ``model_state_dict``, ``model`` and ``module``, in this order and
    also inside one another; a dict of tensors is a state dict itself, a module gives its own.

    Raises:
        ValueError: there is none; lists the keys that there are.

    >>> list(weights({"epoch": 3, "state_dict": {"layer.weight": torch.ones(2)}}))
    ['layer.weight']

    See Also: drop_optimizer
    """
    found = _weights(checkpoint)
    if found is None:
        held = list(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"no state dict under any of {', '.join(_WEIGHTS)} in {held}")
    return found


def _weights(checkpoint: Any) -> Mapping[str, Any] | None:
    if isinstance(checkpoint, torch.nn.Module):
        return checkpoint.state_dict()
    if not isinstance(checkpoint, Mapping):
        return None
    nested = (_weights(checkpoint[key]) for key in _WEIGHTS if key in checkpoint)
    found = next((each for each in nested if each is not None), None)
    if found is None and any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return checkpoint
    return found


def drop_optimizer(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the states of optimizers, learning-rate schedulers and gradient scalers.

    >>> list(drop_optimizer({"state_dict": {}, "optimizer_states": [], "epoch": 3}))
    ['state_dict', 'epoch']

    See Also: weights
    """
    return {
        key: value
        for key, value in checkpoint.items()
        if key not in _OPTIMIZER or isinstance(value, torch.Tensor)  # a bare state dict's own
    }
