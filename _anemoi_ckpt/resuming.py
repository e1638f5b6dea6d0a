"""Which strategies go on with training, and which models have a hook for it.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from _anemoi_ckpt.steps import Final, parts_of

_F = TypeVar("_F", bound=Callable[..., Any])
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")  # packages

_RESUMING: list[Callable[..., Any]] = []


def resuming(function: _F) -> _F:
    """Mark a strategy with which training goes on: `load_into` calls the model's hook then."""
    _RESUMING.append(function)
    return function


def find_hook(model: torch.nn.Module, strategies: Iterable[Any]) -> Callable[[Any], Any] | None:
    """Give the model's `on_load_checkpoint` if it has one and a strategy resumes training."""
    hook = getattr(model, "on_load_checkpoint", None)
    home = getattr(hook, "__module__", None) or ""
    if hook is None or home.partition(".")[0] in LIGHTNING:  # which does nothing
        return None
    parts = [part for strategy in strategies for part in parts_of(_unwrapped(strategy))]
    asked = any(_unwrapped(part) is each for part in parts for each in _RESUMING)
    return hook if asked else None


def _unwrapped(function: Any) -> Any:
    return function.function if isinstance(function, Final) else function
