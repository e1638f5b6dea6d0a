"""The one table of a checkpoint's keys, and how its state dict is found and replaced.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

table · state dict · averages · tests · replace
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from _anemoi_ckpt.errors import UNPLACED, MismatchError, NoDictError, redact
from _anemoi_ckpt.variables import few

# ── table ─────────────────────────────────────────────────────────────────────────────────────


def _never(_value: Any) -> bool:
    return False


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint: its usual keys, in order of precedence, and a test of its values.

    A value that passes the test is this part under any key.
    """

    name: str
    keys: tuple[str, ...]
    looks_like: Callable[[Any], bool] = _never

    def of(self, checkpoint: Mapping[Any, Any]) -> dict[Any, Any]:
        """Give the values of a checkpoint that are this part, by key; the usual keys come first.

        Tensors are left out: they belong to a bare state dict.
        """
        usual = [key for key in self.keys if key in checkpoint]
        others = [k for k, v in checkpoint.items() if k not in usual and self.looks_like(v)]
        pairs = {key: checkpoint[key] for key in (*usual, *others)}
        return {k: value for k, value in pairs.items() if not isinstance(value, torch.Tensor)}


def _has_keys(*keys: str) -> Callable[[Any], bool]:
    """Recognise a mapping that has these keys, a list of such mappings, or some of them by name."""

    def has_all(value: Any) -> bool:
        return isinstance(value, Mapping) and all(key in value for key in keys)

    def looks_like(value: Any) -> bool:
        several = value.values() if isinstance(value, Mapping) else value
        is_several = isinstance(value, list | tuple | Mapping) and len(value) > 0
        return has_all(value) or (is_several and all(map(has_all, several)))

    return looks_like


# Whatever else is in the checkpoint: Lightning's, usual, usual, DeepSpeed's.
_SURELY_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
WEIGHTS = Part(
    "weights",
    (
        *_SURELY_WEIGHTS,
        "model_state",  # FourCastNet, OpenPCDet
        "state",  # composer, which has the model's state dict one level below
        "net",
        "network",
        "params",  # basicsr
        "params_ema",
        "weights",
        "generator",
        "student",  # DINO
        "teacher",
    ),
)
OPTIMIZER = Part(
    "optimizer",
    (
        "optimizer_states",  # Lightning
        "optimizer_state_dict",
        "optimizer",
        "optimizers",
        "optimizer_state",
        "optim_state_dict",
        "optim",
        "opt",  # DiT
        "opt_state",
        "last_optimizer_state",  # fairseq
        "optimizer_history",
    ),
    _has_keys("state", "param_groups"),  # torch.optim.Optimizer.state_dict
)
SCHEDULER = Part(
    "scheduler",
    (
        "lr_schedulers",  # Lightning
        "lr_scheduler_state_dict",
        "scheduler_state_dict",
        "lr_scheduler",
        "scheduler",
        "schedulers",
        "param_schedulers",  # OpenMMLab
        "opt_param_scheduler",  # Megatron
    ),
    _has_keys("last_epoch", "_last_lr"),  # torch.optim.lr_scheduler.LRScheduler.state_dict
)
SCALER = Part(
    "gradient scaler",
    (
        "MixedPrecision",  # Lightning, by the name of its plugin
        "MixedPrecisionPlugin",
        "NativeMixedPrecisionPlugin",
        "native_amp_scaling_state",
        "amp_scaling_state",
        "scaler",
        "scaler_state_dict",
        "grad_scaler",
        "amp",  # apex
    ),
    _has_keys("growth_factor", "backoff_factor"),  # torch.amp.GradScaler.state_dict
)
AVERAGES = Part(  # beside the state dict, or in a callback's state
    "averaged weights",
    (
        "ema",
        "ema_state_dict",
        "state_dict_ema",  # timm
        "model_ema",
        "ema_model",
        "ema_state",
        "ema_weights",
        "params_ema",
        "average_model_state",  # Lightning's StochasticWeightAveraging
    ),
)
# Lightning's WeightAveraging keeps the average in state_dict, and these beside it
AVERAGING = Part("state of averaging", ("averaging_state",))
TRAINED_WEIGHTS = Part("weights being trained", ("current_model_state",))
COUNTS = Part("counts", ("epoch", "global_step", "step", "iteration"))
PROGRESS = Part(
    "progress",
    # Anemoi's last
    ("loops", "callbacks", *AVERAGING.keys, *TRAINED_WEIGHTS.keys, "task_state"),
)
_PARTS = (WEIGHTS, AVERAGES, TRAINED_WEIGHTS, OPTIMIZER, SCHEDULER, SCALER, PROGRESS)


def values_of(part: Part, checkpoint: Mapping[Any, Any]) -> dict[Any, Any]:
    """Give what a checkpoint has of a part, also beside its weights some levels below."""
    return {key: v for level in _levels(checkpoint) for key, v in part.of(level).items()}


def states_of(part: Part, checkpoint: Mapping[Any, Any]) -> list[Any]:
    """List a checkpoint's states of a part, such as those of one or several optimizers.

    They are those under the first of the part's usual keys that has any, or otherwise all values
    that pass the part's test.
    """
    values = values_of(part, checkpoint)
    usual = next((values[key] for key in part.keys if values.get(key)), None)
    if usual is not None:
        return _listed(part, usual)
    return [state for key in values if key not in part.keys for state in _listed(part, values[key])]


def _listed(part: Part, value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    by_name = isinstance(value, Mapping) and value and all(map(part.looks_like, value.values()))
    return list(value.values()) if by_name else [value]


# ── state dict ────────────────────────────────────────────────────────────────────────────────


def path_to_weights(checkpoint: Any) -> tuple[str, ...] | None:
    """Give the keys that lead to the state dict; None if there is no state dict.

    A state dict with tensors comes before one without.
    """
    path = _path_to(checkpoint, has_tensors)
    return _path_to(checkpoint, _is_stateless) if path is None else path


def _path_to(
    checkpoint: Any, is_state_dict: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, ...] | None:
    if is_module(checkpoint):
        return ()
    if not isinstance(checkpoint, Mapping) or OPTIMIZER.looks_like(checkpoint):
        return None
    for key in WEIGHTS.keys if _names_its_weights(checkpoint) else _SURELY_WEIGHTS:
        path = _path_to(checkpoint.get(key), is_state_dict)
        if path is not None:
            return (key, *path)
    return () if is_state_dict(checkpoint) else None


def _names_its_weights(checkpoint: Mapping[Any, Any]) -> bool:
    """Tell whether all state dicts of a checkpoint are under keys that this table has.

    Otherwise "weights", say, may be those of the terms of a loss.
    """
    states = (key for key, v in checkpoint.items() if isinstance(v, Mapping) and has_tensors(v))
    return all(any(key in part.keys for part in _PARTS) for key in states)


def _levels(checkpoint: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """List the checkpoint, and each dict between it and its state dict."""
    inner = (path_to_weights(checkpoint) or ())[:-1]
    return list(itertools.accumulate(inner, operator.getitem, initial=checkpoint))


def weights_of(checkpoint: Any) -> Mapping[str, Any]:
    """Give the state dict, under whichever usual key the checkpoint has it.

    Raises:
        MismatchError: there is none; the error lists the checkpoint's keys.
    """
    path = path_to_weights(checkpoint)
    if path is None:
        refuse_place(checkpoint)
        keys = checkpoint if isinstance(checkpoint, Mapping) else [type(checkpoint).__name__]
        usual = ", ".join(WEIGHTS.keys)
        raise MismatchError(
            UNPLACED,
            f"no state dict under any of {usual} in {few(keys)}",
            "take it by its own key before, as lambda checkpoint: checkpoint[key]",
        )
    return weights_at(checkpoint, path)


def refuse_place(checkpoint: Any) -> None:
    """Refuse what tells where a checkpoint is, and is none.

    Raises:
        NoDictError: it is a text or a path.
    """
    if isinstance(checkpoint, str | os.PathLike):
        raise NoDictError(
            UNPLACED,
            f"a strategy takes a checkpoint, and {redact(str(checkpoint))!r:.99} is where one is:"
            " load(place, strategy) reads it",
            "in compose, load stands behind the strategies: compose(strategy, load)",
        )


def weights_at(checkpoint: Any, path: Sequence[str]) -> Mapping[str, Any]:
    """Give the state dict at a path; a module, or the inert data of one, gives its own."""
    value = functools.reduce(lambda inner, key: inner[key], path, checkpoint)
    state_dict: Mapping[str, Any] = value.state_dict() if is_module(value) else value
    return state_dict


def beside_weights(checkpoint: Any, path: Sequence[str]) -> dict[str, Any]:
    """Give the items beside the state dict, at each level of the path to it."""
    if not path:
        return {}
    key, *inner = path
    rest = {name: value for name, value in checkpoint.items() if name != key}
    below = beside_weights(checkpoint[key], inner)
    return {**rest, key: below} if below else rest


def mapping_of(checkpoint: Any) -> Mapping[str, Any]:
    """Give a checkpoint back, if it is a dict.

    Raises:
        NoDictError: it is not.
    """
    if not isinstance(checkpoint, Mapping):
        refuse_place(checkpoint)
        raise NoDictError(
            UNPLACED,
            f"this strategy takes a checkpoint that is a dict, not {type(checkpoint).__name__}",
            "leave the strategy out, or put it before the one that gives this",
        )
    return checkpoint


# ── averages ──────────────────────────────────────────────────────────────────────────────────


def find_averages(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Find averaged weights beside the weights or in a callback's state, and name them as these.

    Raises:
        MismatchError: there are none; the error lists the checkpoint's keys.
    """
    callbacks = checkpoint.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    holders = [checkpoint, *(state for state in states if isinstance(state, Mapping))]
    for value in (holder[key] for holder in holders for key in AVERAGES.keys if key in holder):
        averages = {} if path_to_weights(value) is None else dict(weights_of(value))
        if "n_averaged" in averages:  # torch.optim.swa_utils.AveragedModel
            averages = _strip_averaged_model(averages)
        if averages:
            return averages
    keys = ", ".join((*AVERAGING.keys, *AVERAGES.keys))
    raise MismatchError(
        UNPLACED,
        f"no averaged weights under {keys}, nor under these in a callback's state",
        f"its keys are: {few(checkpoint)}",
    )


def _strip_averaged_model(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Give the entries of the module that an AveragedModel wraps, by their names in that module."""
    prefix = "module."
    return {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}


# ── tests ─────────────────────────────────────────────────────────────────────────────────────


def is_module(value: Any) -> bool:
    """Tell whether this is a module, or the inert data of one."""
    return not isinstance(value, Mapping) and callable(getattr(value, "state_dict", None))


def has_tensors(value: Mapping[str, Any]) -> bool:
    """Tell whether a dict contains tensors, as a state dict does."""
    return any(isinstance(entry, torch.Tensor) for entry in value.values())


def _is_stateless(value: Mapping[str, Any]) -> bool:
    """Tell whether this may be the state dict of a module without tensors.

    A strategy that drops all tensors leaves such a state dict, too.
    """
    return all(map(is_extra_state, value))


def is_extra_state(name: Any) -> bool:
    """Tell whether a name is that of a module's extra state, which may be of any type and shape."""
    return str(name).endswith("_extra_state")  # torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


# ── replace ───────────────────────────────────────────────────────────────────────────────────


def replaced(checkpoint: Any, path: Sequence[str], state_dict: Any) -> Any:
    """Put a state dict at a path; only the dicts along the path are copied."""
    if not path:
        return state_dict
    key, *inner = path
    return like(checkpoint, {**checkpoint, key: replaced(checkpoint[key], inner, state_dict)})


def like(original: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    """Make a dict of the type, and with the attributes (``_metadata``), of the original."""
    if not isinstance(original, dict):
        return dict(items)
    copied = copy.copy(original)
    copied.clear()
    copied.update(items)
    return copied


def without(checkpoint: Mapping[Any, Any], parts: Iterable[Part]) -> dict[Any, Any]:
    """Drop parts of a checkpoint, also where they stand beside its weights some levels below."""
    return _without(checkpoint, tuple(parts), path_to_weights(checkpoint) or ())


def _without(
    level: Mapping[Any, Any], parts: Sequence[Part], path: Sequence[str]
) -> dict[Any, Any]:
    dropped = {key for part in parts for key in part.of(level)}.difference(path[:1])
    kept = {key: value for key, value in level.items() if key not in dropped}
    if len(path) > 1:
        kept[path[0]] = _without(level[path[0]], parts, path[1:])
    return like(level, kept)


def without_averages(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the other copies of the weights, beside them or in a callback's state."""
    parts = (AVERAGES, TRAINED_WEIGHTS)
    rest = without(checkpoint, parts)
    if isinstance(rest.get("callbacks"), Mapping):
        rest["callbacks"] = {
            name: without(state, parts) if isinstance(state, Mapping) else state
            for name, state in rest["callbacks"].items()
        }
    return rest


def versions_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Give the versions of modules, by path, that `torch.nn.Module.state_dict` records."""
    versions = getattr(state_dict, "_metadata", None)
    return versions if isinstance(versions, dict) else {}


def with_versions(state_dict: dict[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the versions of modules in a new state dict, if it has any."""
    if versions_of(state_dict):
        vars(state_dict)["_metadata"] = like(versions_of(state_dict), versions)
    return state_dict
