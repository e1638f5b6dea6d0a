"""A model's own hook, called as Lightning calls it when training goes on from a checkpoint.

Lightning gives the whole checkpoint to `on_load_checkpoint` before it gives the weights to
`load_state_dict` (LightningModule, "Checkpoint" hooks). Anemoi's training modules take from it what
no state dict has: the rollout, and the variables and units that the weights were trained with.

call · undo
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from _anemoi_ckpt.pickles.inert import walk
from _anemoi_ckpt.resuming import LIGHTNING

STATES = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}  # Lightning's
_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
_OPAQUE = (type, types.ModuleType, types.FunctionType, torch.nn.Module, torch.Tensor, np.ndarray)


# ── call ──────────────────────────────────────────────────────────────────────────────────────


def call_hook(
    hook: Callable[[Any], Any],
    model: torch.nn.Module,
    checkpoint: Mapping[str, Any],
    undo: ExitStack,
    *,
    owned: bool,
) -> dict[str, Any]:
    """Call a model's hook with a copy of a checkpoint, and give the copy as the hook leaves it.

    Args:
        hook: the model's `on_load_checkpoint`.
        model: what the hook may change; `undo` puts it back, but for the values of tensors.
        checkpoint: under Lightning's keys.
        undo: what to do if the load fails.
        owned: whether nobody else has the checkpoint's tensors, so that they need no copy.
    """
    tensors = [leaf for _, leaf in walk(checkpoint) if isinstance(leaf, torch.Tensor)]
    memo: dict[int, Any] = {id(each): each if owned else each.detach().clone() for each in tensors}
    whole = copy.deepcopy(dict(checkpoint), memo)
    remember(model, undo)
    hook(whole)
    return whole


def mark_loaded(model: torch.nn.Module) -> None:
    """Tell a training module of Anemoi that it has weights: its pipeline warns otherwise."""
    if any(each.__module__.startswith("anemoi.training.") for each in type(model).__mro__):
        vars(model)["weights_initialized"] = True


# ── undo ──────────────────────────────────────────────────────────────────────────────────────


def remember(model: torch.nn.Module, undo: ExitStack) -> None:
    """Keep a model's attributes, and what these hold; `undo` puts them back."""
    for container in _containers(model):
        undo.callback(_refill, container, copy.copy(container))


def _containers(model: torch.nn.Module) -> Iterator[Any]:
    """Give the dicts, lists and sets that can be reached from a model's attributes.

    Not through Lightning's trainer, nor through tensors and arrays.
    """
    todo: list[Any] = [vars(module) for module in model.modules()]
    seen: dict[int, Any] = {}
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if type(item) in (*_DICTS, list, set):
            yield item
            todo += item.values() if isinstance(item, dict) else item
        elif not isinstance(item, _OPAQUE) and _is_open(item):
            todo.append(vars(item))


def _is_open(item: Any) -> bool:
    has_attributes = type(getattr(item, "__dict__", None)) is dict
    return has_attributes and type(item).__module__.partition(".")[0] not in LIGHTNING


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)
