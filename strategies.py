"""Strategies: pure functions from checkpoint to checkpoint, and what puts them together.

A checkpoint is what `torch.load` gives: a dict with a state dict in it, or a bare state dict. A
strategy takes one and returns another, and never changes what it was given. It sees a hollow
checkpoint first (tensors on the meta device), so what it drops is never moved.

What comes back has the order, the type and the ``_metadata`` of the state dict that went in, and
tied entries stay tied. A model may be given as a module or as its state dict, under its own names.
A glob chooses a name, or all names under it: ``encoder`` chooses ``encoder.weight`` and not
``model.encoder.weight``, which ``model.encoder`` and ``*.encoder`` do.

compose · choose · fit · rename · change values · progress · variables · recipes · freeze
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from _ckpt_variables import (
    NO_VARIABLES,
    Alignment,
    Layout,
    Plan,
    Variables,
    anemoi_layout,
    changed,
    check_new,
    differences,
    disagreement,
    few,
    misplaced,
    origins,
    paired,
    read_checkpoint,
    read_given,
    read_layout,
    read_model,
    rewritten,
)

__all__ = [
    "add_prefix",
    "align_variables",
    "anemoi_layout",
    "average",
    "cast",
    "cold_start",
    "compose",
    "drop",
    "drop_optimizer",
    "exclude",
    "filter_shapes",
    "freeze",
    "include",
    "keep_progress",
    "merge",
    "on_weights",
    "pad_or_slice",
    "pipe",
    "prefer_ema",
    "refresh_processors",
    "rename",
    "require_match",
    "require_variables",
    "reset_progress",
    "standard",
    "strip_prefix",
    "take",
    "transfer_learning",
    "unfreeze",
    "variables",
    "warm_start",
    "weights",
    "weights_only",
]


def __dir__() -> list[str]:
    """List what is public, for completion in a shell."""
    return __all__


Strategy = Callable[[Any], Any]
Model = torch.nn.Module | Mapping[str, Any]
_Shapes = dict[str, tuple[int, ...] | None]  # None where there is no tensor, or its shape is free


# ── compose ───────────────────────────────────────────────────────────────────────────────────


def compose(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """Compose functions from right to left: ``compose(f, g, h)(x)`` is ``f(g(h(x)))``.

    With `load` as one of them, those on its left are handed to it as its strategies, so that
    ``compose(f, g, load)(uri)`` is ``load(uri, g, f)`` and moves only what survives them.

    Raises:
        TypeError: one of them is not callable.

    >>> compose(len, weights)({"state_dict": {"a": torch.ones(1), "b": torch.ones(1)}})
    2

    See Also: pipe, on_weights
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


def on_weights(function: Callable[[Mapping[str, Any]], Any]) -> Strategy:
    """Lift a function of a state dict to checkpoints.

    The new state dict stands where the old one stood; everything else is as it was.

    Raises:
        TypeError: it is not callable.
        ValueError: (the strategy) there is no state dict.

    >>> first = on_weights(lambda state_dict: dict(list(state_dict.items())[:1]))
    >>> first({"epoch": 3, "state_dict": {"a": torch.ones(1), "b": torch.ones(1)}})
    {'epoch': 3, 'state_dict': {'a': tensor([1.])}}

    See Also: weights, compose
    """
    if not callable(function):
        raise TypeError(f"on_weights takes a function of a state dict, not {function!r}")

    @functools.wraps(function, updated=())
    def lifted(checkpoint: Any) -> Any:
        return _put(checkpoint, _path(checkpoint), function(weights(checkpoint)))

    return lifted


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


_EMA = (  # where training loops keep averaged weights, beside the state dict or in a callback
    "ema",
    "ema_state_dict",
    "state_dict_ema",  # timm
    "model_ema",
    "ema_model",
    "ema_state",
    "ema_weights",
    "average_model_state",  # Lightning's StochasticWeightAveraging
)


def weights(checkpoint: Any) -> Mapping[str, Any]:
    """Choose the state dict alone, wherever the checkpoint holds it.

    Looks for ``state_dict``, ``model_state_dict``, ``model`` and ``module``, in this order and
    also inside one another; a dict of tensors is a state dict itself, a module gives its own.

    Raises:
        ValueError: there is none; lists the keys that there are.

    >>> list(weights({"epoch": 3, "state_dict": {"layer.weight": torch.ones(2)}}))
    ['layer.weight']

    See Also: on_weights, drop_optimizer, prefer_ema
    """
    path = _path(checkpoint)
    if path is None:
        held = checkpoint if isinstance(checkpoint, Mapping) else [type(checkpoint).__name__]
        raise ValueError(f"no state dict under any of {', '.join(_WEIGHTS)} in {few(held)}")
    found: Any = functools.reduce(lambda held, key: held[key], path, checkpoint)
    state_dict: Mapping[str, Any] = found.state_dict() if _is_module(found) else found
    return state_dict


def drop_optimizer(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the states of optimizers, learning-rate schedulers and gradient scalers.

    Raises:
        TypeError: the checkpoint is no dict.

    >>> list(drop_optimizer({"state_dict": {}, "optimizer_states": [], "epoch": 3}))
    ['state_dict', 'epoch']

    See Also: drop, weights, reset_progress
    """
    return _without(checkpoint, _OPTIMIZER)


def drop(*keys: str, missing_ok: bool = False) -> Strategy:
    """Drop keys of the checkpoint itself: what stands beside the weights.

    Raises:
        TypeError: a key is no text.
        ValueError: no key is given; (the strategy) one is not there, unless `missing_ok`.

    >>> drop("callbacks", "loops")({"state_dict": {}, "loops": {}, "callbacks": {}, "epoch": 3})
    {'state_dict': {}, 'epoch': 3}

    See Also: drop_optimizer, exclude
    """
    _check_texts("drop", keys)

    def dropped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        held = _mapping(checkpoint)
        absent = [key for key in keys if key not in held]
        if absent and not missing_ok:
            raise ValueError(f"no {few(absent)} to drop; there are: {few(held)}")
        return _like(held, {key: value for key, value in held.items() if key not in keys})

    return dropped


def include(*globs: str, missing_ok: bool = False) -> Strategy:
    """Keep of the weights only what one of the globs chooses.

    Raises:
        TypeError: a glob is no text.
        ValueError: none is given; (the strategy) one chooses nothing, unless `missing_ok`.

    >>> checkpoint = {"encoder.weight": torch.ones(1), "decoder.weight": torch.zeros(1)}
    >>> include("encoder")(checkpoint)
    {'encoder.weight': tensor([1.])}

    See Also: exclude, filter_shapes
    """
    _check_texts("include", globs)

    @on_weights
    def included(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        chosen = _chosen(state_dict, globs, missing_ok=missing_ok)
        return _like(state_dict, {k: value for k, value in state_dict.items() if k in chosen})

    return included


def exclude(*globs: str, missing_ok: bool = False) -> Strategy:
    """Drop from the weights what one of the globs chooses.

    Raises:
        TypeError: a glob is no text.
        ValueError: none is given; (the strategy) one chooses nothing, unless `missing_ok`.

    >>> exclude("*.bias")({"encoder.weight": torch.ones(1), "encoder.bias": torch.zeros(1)})
    {'encoder.weight': tensor([1.])}

    See Also: include, drop
    """
    _check_texts("exclude", globs)

    @on_weights
    def excluded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        chosen = _chosen(state_dict, globs, missing_ok=missing_ok)
        kept = {key: value for key, value in state_dict.items() if key not in chosen}
        return _like(state_dict, kept)

    return excluded


def prefer_ema(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Put averaged weights, such as an exponential moving average, in the place of the weights.

    They may stand beside the weights or in a callback's state, under any usual key, with or
    without what `torch.optim.swa_utils.AveragedModel` adds; entries without an average stay.
    Lightning's ``WeightAveraging`` has put them there already: then only what it keeps of the
    weights that were not averaged is dropped.

    Raises:
        TypeError: the checkpoint is no dict.
        ValueError: there are none, or they have names that the weights have not.

    >>> prefer_ema({"state_dict": {"a": torch.ones(1)}, "ema": {"a": torch.zeros(1)}})["state_dict"]
    {'a': tensor([0.])}

    See Also: weights, average
    """
    held = _mapping(checkpoint)
    if "averaging_state" in held:  # lightning.pytorch.callbacks.weight_averaging
        return _without(held, {"current_model_state"})
    averaged = _averaged(held)
    if averaged is None:
        raise ValueError(
            f"no averaged weights under averaging_state, {', '.join(_EMA)}, nor under these in a "
            f"callback's state; there are: {few(held)}"
        )
    path = _path(held)
    if path is None:
        return _like(held, {**held, "state_dict": averaged})
    state_dict = weights(held)
    strange = [name for name in averaged if name not in state_dict]
    if strange:
        raise ValueError(
            f"averaged weights that are not among the weights: {few(strange)}; "
            f"these are: {few(state_dict)}"
        )
    result: dict[str, Any] = _put(held, path, _like(state_dict, {**state_dict, **averaged}))
    return result


def _averaged(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the averaged weights under the names of the weights, or None."""
    callbacks = checkpoint.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    holders = [checkpoint, *(state for state in states if isinstance(state, Mapping))]
    for held in (holder[key] for holder in holders for key in _EMA if key in holder):
        found = dict(weights(held)) if _path(held) is not None else {}
        if "n_averaged" in found:  # torch.optim.swa_utils.AveragedModel
            front = "module."
            found = {n.removeprefix(front): v for n, v in found.items() if n.startswith(front)}
        if found:
            return found
    return None


def _path(checkpoint: Any) -> tuple[str, ...] | None:
    """Give the keys that lead to the state dict: one with tensors rather than one without."""
    found = _path_to(checkpoint, _has_tensors)
    return _path_to(checkpoint, _is_stateless) if found is None else found


def _is_module(held: Any) -> bool:
    """Tell whether this is a module, or the inert data of one."""
    return not isinstance(held, Mapping) and callable(getattr(held, "state_dict", None))


def _path_to(
    checkpoint: Any, is_state_dict: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, ...] | None:
    if _is_module(checkpoint):
        return ()
    if not isinstance(checkpoint, Mapping):
        return None
    for key in _WEIGHTS:
        path = _path_to(checkpoint.get(key), is_state_dict)
        if path is not None:
            return (key, *path)
    return () if is_state_dict(checkpoint) else None


def _has_tensors(held: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in held.values())


def _is_stateless(held: Mapping[str, Any]) -> bool:
    """Tell whether this may be what a module without tensors, or a strategy, leaves."""
    return all(_is_extra_state(name) for name in held)


def _is_extra_state(name: Any) -> bool:
    """Tell what a module adds as it likes; load_state_dict lets it have any shape."""
    return str(name).endswith("_extra_state")  # torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def _put(checkpoint: Any, path: Sequence[str] | None, state_dict: Any) -> Any:
    """Put a state dict at a path, and copy only the dicts on the way."""
    if not path:
        return state_dict
    key, *rest = path
    return _like(checkpoint, {**checkpoint, key: _put(checkpoint[key], rest, state_dict)})


def _like(original: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    """Make a dict of the type, and with the attributes (``_metadata``), of the original."""
    if not isinstance(original, dict):
        return dict(items)
    made = copy.copy(original)
    made.clear()
    made.update(items)
    return made


def _mapping(checkpoint: Any) -> Mapping[str, Any]:
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"a checkpoint is a dict here, not {type(checkpoint).__name__}")
    return checkpoint


def _without(checkpoint: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Drop keys where they are there; a tensor of that name is a bare state dict's own."""
    held = _mapping(checkpoint)
    kept = {
        key: value
        for key, value in held.items()
        if key not in keys or isinstance(value, torch.Tensor)
    }
    return _like(held, kept)


def _check_texts(what: str, texts: Sequence[Any]) -> None:
    """Check that there are some, and that all of them are text: early, in the factory."""
    if not texts:
        raise ValueError(f"{what} needs at least one name or glob")
    for each in texts:
        if not isinstance(each, str):
            raise TypeError(f"{what} takes text, not {each!r}")


def _chosen(names: Iterable[str], globs: Iterable[str], *, missing_ok: bool = False) -> set[str]:
    """Choose names, or raise for a glob that chooses none."""
    names = list(names)
    chosen: set[str] = set()
    for glob in globs:
        found = {name for name in names if _is_chosen(name, glob)}
        if not found and not missing_ok:
            raise ValueError(
                f"{glob!r} chooses nothing{_hint(names, glob)}; there are: {few(names)}"
            )
        chosen |= found
    return chosen


def _is_chosen(name: str, glob: str) -> bool:
    """Match the whole name, or one of the modules it is in."""
    return any(fnmatch.fnmatchcase(each, glob) for each in (name, *_above(name)))


def _hint(names: Sequence[str], glob: str) -> str:
    if any(_is_chosen(name, f"*.{glob}") for name in names):
        return f", though '*.{glob}' would"
    known = dict.fromkeys(part for name in names for part in (name, *_above(name)))
    near = difflib.get_close_matches(glob, known, cutoff=0.8)
    return f", though {few(map(repr, near))} would" if near else ""


def _above(name: str) -> list[str]:
    """Give the modules that a name is in: of ``a.b.c``, ``a`` and ``a.b``."""
    return [name[:place] for place, letter in enumerate(name) if letter == "."]


# ── fit ───────────────────────────────────────────────────────────────────────────────────────


def filter_shapes(model: Model) -> Strategy:
    """Keep of the weights what the model has under the same name and in the same shape.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no state dict.

    >>> checkpoint = {"weight": torch.ones(1, 2), "bias": torch.ones(5)}
    >>> list(filter_shapes(torch.nn.Linear(2, 1))(checkpoint))
    ['weight']

    See Also: require_match, pad_or_slice, transfer_learning
    """
    wanted = _shapes(_tensors("filter_shapes", model))

    @on_weights
    def filtered(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        held = _shapes(state_dict)
        fits = [name for name in held if name in wanted and held[name] == wanted[name]]
        return _like(state_dict, {name: state_dict[name] for name in fits})

    return _in_order(model, filtered)


def require_match(model: Model, *, missing: bool = True, unexpected: bool = True) -> Strategy:
    """Refuse weights that do not match the model's names and shapes, in one error with all of it.

    With `missing` or `unexpected` False, names on one side only pass; shapes never do.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no state dict; (the strategy) the weights do not match it.

    >>> require_match(torch.nn.Linear(2, 1))({"weight": torch.ones(1, 3)})
    Traceback (most recent call last):
        ...
    ValueError: the weights do not match the model
      missing, in the model only (1): bias
      mismatched (1): weight is (1, 3), the model's is (1, 2)

    See Also: filter_shapes, standard
    """
    wanted = _shapes(_tensors("require_match", model))

    @on_weights
    def required(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        told = _differences(
            _shapes(state_dict), wanted, "model", missing=missing, unexpected=unexpected
        )
        if told:
            raise ValueError(f"the weights do not match the model{told}")
        return state_dict

    return _in_order(model, required)


def pad_or_slice(model: Model, *, fill: Literal["model", "zeros"] = "model") -> Strategy:
    """Give each tensor the model's shape: the part that both have is kept, the rest filled.

    Filled from the model as it is when the strategy runs, or with zeros. A tensor with another
    number of dimensions, or a sparse one, stays as it is, for `filter_shapes` or `require_match`.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no state dict, or is to fill and on the meta device; or another `fill`.

    >>> pad_or_slice({"a": torch.zeros(2, 3)})({"a": torch.ones(3, 2)})
    {'a': tensor([[1., 1., 0.],
            [1., 1., 0.]])}

    See Also: filter_shapes, take
    """
    if fill not in ("model", "zeros"):
        raise ValueError(f"pad_or_slice fills from 'model' or with 'zeros', not {fill!r}")
    targets = {
        name: value for name, value in _tensors("pad_or_slice", model).items() if _is_strided(value)
    }
    if fill == "model" and any(target.is_meta for target in targets.values()):
        raise ValueError("pad_or_slice cannot fill from a hollow model; fill='zeros' can")

    @on_weights
    def fitted(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {
            name: (targets[name].shape, _alias(targets[name]) if fill == "model" else None)
            for name, value in state_dict.items()
            if name in targets
            and not _is_extra_state(name)
            and _is_strided(value)
            and value.shape != targets[name].shape
            and value.dim() == targets[name].dim()
        }

        def fit(name: str, tensor: torch.Tensor) -> torch.Tensor:
            target = targets[name].detach()
            made = (
                target.to(tensor, copy=True) if fill == "model" else tensor.new_zeros(target.shape)
            )
            both = tuple(map(slice, map(min, tensor.shape, target.shape)))
            made[both].copy_(tensor[both])
            return made

        return _change(state_dict, chosen, fit)

    return _in_order(model, fitted)


def take(glob: str, dim: int, index: Sequence[int] | torch.Tensor) -> Strategy:
    """Reorder or select along an axis of the tensors that a glob chooses, such as variables.

    Indices count from the end where they are negative, as `dim` does.

    Raises:
        TypeError: the glob is no text, or `dim` or an index no integer.
        ValueError: (the strategy) the glob chooses nothing, or a tensor without such a place.

    >>> take("encoder", 0, [2, 0])({"encoder.weight": torch.tensor([10.0, 11.0, 12.0])})
    {'encoder.weight': tensor([12., 10.])}

    See Also: pad_or_slice, require_variables
    """
    _check_texts("take", (glob,))
    places = index.tolist() if isinstance(index, torch.Tensor) else index
    places = list(places) if isinstance(places, Iterable) else [places]
    for each in (dim, *places):
        if not isinstance(each, int) or isinstance(each, bool):
            raise TypeError(f"take needs an integer for dim and for every index, not {each!r}")

    def taken(name: str, tensor: torch.Tensor) -> torch.Tensor:
        known = -tensor.dim() <= dim < tensor.dim()
        size = tensor.shape[dim] if known else 0
        strange = [place for place in places if not -size <= place < size]
        if strange or not known:
            raise ValueError(
                f"cannot take {few(strange)} along dim {dim} of {name}: its shape is "
                f"{tuple(tensor.shape)}"
            )
        where = torch.tensor(
            [place % size for place in places], dtype=torch.int64, device=tensor.device
        )
        return tensor.index_select(dim, where)

    @on_weights
    def reordered(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        chosen = _chosen(_tensor_names(state_dict), [glob])
        return _change(state_dict, dict.fromkeys(chosen), taken)

    return reordered


def _in_order(model: Model, strategy: Strategy) -> Strategy:
    """Refuse what fits the model by shape alone: where it has other variables."""
    if not isinstance(model, torch.nn.Module) or not read_model(model):
        return strategy
    wanted = _shapes(weights(model))

    def checked(checkpoint: Any) -> Any:
        fitted = strategy(checkpoint)
        fits = [n for n, shape in _shapes(weights(fitted)).items() if wanted.get(n) == shape]
        told = misplaced(model, fits, read_checkpoint(checkpoint))
        if told:
            raise ValueError(
                f"{told}; put align_variables(model=model) before, with a layout if the model is"
                " not Anemoi's"
            )
        return fitted

    return checked


def _tensors(what: str, model: Any) -> Mapping[str, Any]:
    if not isinstance(model, torch.nn.Module | Mapping):
        raise TypeError(f"{what} takes a module or a state dict, not {model!r}")
    return weights(model)


def _tensor_names(state_dict: Mapping[str, Any]) -> list[str]:
    return [name for name, value in state_dict.items() if isinstance(value, torch.Tensor)]


def _shapes(state_dict: Mapping[str, Any]) -> _Shapes:
    return {
        name: tuple(value.shape)
        if isinstance(value, torch.Tensor) and not _is_extra_state(name)
        else None
        for name, value in state_dict.items()
    }


def _differences(
    held: _Shapes, wanted: _Shapes, whose: str, *, missing: bool = True, unexpected: bool = True
) -> str:
    """Tell all names and shapes that differ, a line a kind; nothing where none does."""
    kinds = {
        f"missing, in the {whose} only": [n for n in wanted if missing and n not in held],
        f"unexpected, not in the {whose}": [n for n in held if unexpected and n not in wanted],
        "mismatched": [
            f"{name} is {_said(shape)}, the {whose}'s is {_said(wanted[name])}"
            for name, shape in held.items()
            if name in wanted and wanted[name] != shape
        ],
    }
    return "".join(f"\n  {kind} ({len(told)}): {few(told)}" for kind, told in kinds.items() if told)


def _said(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(shape)


def _is_strided(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _alias(tensor: torch.Tensor) -> Hashable:
    """Give what two tensors have in common that show the same values of the same memory."""
    if not _is_strided(tensor):
        return id(tensor)
    return (
        StorageWeakRef(tensor.untyped_storage()),  # equal for the same one
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _change(
    state_dict: Mapping[str, Any],
    chosen: Mapping[str, Hashable],
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Change the tensors under the chosen names; those tied, and chosen alike, only once.

    Parameters stay Parameters, and what requires a gradient goes on to, where it can.
    """
    values: dict[Hashable, torch.Tensor] = {}
    made: dict[Hashable, torch.Tensor] = {}

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        key = _alias(tensor), chosen[name]
        if key not in values:
            values[key] = change(name, tensor.detach())
        whole = id(tensor), key
        if whole not in made:
            made[whole] = _kept_kind(tensor, values[key])
        return made[whole]

    items = {name: changed(name, v) if name in chosen else v for name, v in state_dict.items()}
    return _like(state_dict, items)


def _kept_kind(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    requires_grad = old.requires_grad and _has_mean(new)
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=requires_grad)
    return new.detach().requires_grad_() if requires_grad else new


def _has_mean(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


# ── rename ────────────────────────────────────────────────────────────────────────────────────


def strip_prefix(prefix: str) -> Strategy:
    """Strip a prefix from the names that have it: ``model.``, DDP's ``module.``.

    Raises:
        TypeError: it is no text.
        ValueError: it does not end with a dot; (the strategy) two names would become one.

    >>> list(strip_prefix("module.")({"module.weight": torch.ones(1), "step": torch.ones(1)}))
    ['weight', 'step']

    See Also: add_prefix, rename
    """
    _check_prefix("strip_prefix", prefix)
    return on_weights(functools.partial(_renamed, new_name=lambda name: name.removeprefix(prefix)))


def add_prefix(prefix: str) -> Strategy:
    """Put a prefix before every name, such as Lightning's and Anemoi's ``model.``.

    Raises:
        TypeError: it is no text.
        ValueError: it does not end with a dot.

    >>> list(add_prefix("model.")({"weight": torch.ones(1)}))
    ['model.weight']

    See Also: strip_prefix, rename
    """
    _check_prefix("add_prefix", prefix)
    return on_weights(functools.partial(_renamed, new_name=lambda name: prefix + name))


def rename(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Strategy:
    r"""Rename the weights, as `re.sub` does with each name.

    Raises:
        TypeError: the pattern is no text.
        ValueError: it, or the replacement, is malformed; (the strategy) two names would become one.

    >>> compiled = {"model._orig_mod.layers.0.weight": torch.ones(1)}
    >>> list(rename(r"_orig_mod\.", "")(compiled))  # torch.compile's
    ['model.layers.0.weight']
    >>> list(rename(r"layers\.(\d+)", r"blocks.\1.mlp")(compiled))
    ['model._orig_mod.blocks.0.mlp.weight']

    See Also: strip_prefix, add_prefix
    """
    _check_texts("rename", (pattern,))
    if not isinstance(replacement, str) and not callable(replacement):
        raise TypeError(f"rename takes text or a function to replace by, not {replacement!r}")
    try:
        found = re.compile(pattern)
        # early: a malformed replacement is found whether or not there is anything to replace
        found.sub(replacement if isinstance(replacement, str) else "", "")
    except (re.error, IndexError) as err:  # IndexError: a group of a name that is not there
        raise ValueError(f"rename cannot replace {pattern!r} by {replacement!r}: {err}") from err
    return on_weights(
        functools.partial(_renamed, new_name=functools.partial(found.sub, replacement))
    )


def _check_prefix(what: str, prefix: Any) -> None:
    _check_texts(what, (prefix,))
    if not prefix.endswith("."):
        raise ValueError(f"{what} takes a prefix that ends with a dot, not {prefix!r}; see rename")


def _renamed(state_dict: Mapping[str, Any], new_name: Callable[[str], str]) -> dict[str, Any]:
    before: dict[str, str] = {}
    clashes = []
    for name in state_dict:
        new = new_name(name)
        if new in before:
            clashes.append(f"{before[new]} and {name} both become {new}")
        before[new] = name
    if clashes:
        raise ValueError(f"names clash: {few(clashes)}")
    made = _like(state_dict, {new: state_dict[name] for new, name in before.items()})
    # A module's version stands under its path: what its entries begin with is renamed as they are.
    # Where a module takes the place of the one around it, it comes after it, and its version holds.
    versions = {
        new_name(f"{path}." if path else "").removesuffix("."): version
        for path, version in _metadata(state_dict).items()
    }
    return _with_metadata(made, versions)


def _metadata(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Give the versions of modules, by path, that `torch.nn.Module.state_dict` adds."""
    held = getattr(state_dict, "_metadata", None)
    return held if isinstance(held, dict) else {}


def _with_metadata(made: dict[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Give a new state dict other versions, where it has any."""
    if _metadata(made):
        vars(made)["_metadata"] = _like(_metadata(made), versions)
    return made


# ── change values ─────────────────────────────────────────────────────────────────────────────


def cast(dtype: torch.dtype, *globs: str, only_floating: bool = True) -> Strategy:
    """Cast the weights, or those that a glob chooses, to a dtype: floating-point ones only.

    With `only_floating` False, integers, booleans and complex numbers too.

    Raises:
        TypeError: the dtype is none, or a glob no text.
        ValueError: (the strategy) a glob chooses nothing.

    >>> cast(torch.bfloat16)({"weight": torch.ones(1), "steps": torch.tensor([3])})
    {'weight': tensor([1.], dtype=torch.bfloat16), 'steps': tensor([3])}

    See Also: average
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"cast takes a torch.dtype, not {dtype!r}")
    _check_texts("cast", globs or ("*",))

    @on_weights
    def casted(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        names = _tensor_names(state_dict)
        chosen = _chosen(names, globs) if globs else names
        differ = {
            name: None
            for name in chosen
            if state_dict[name].dtype != dtype
            and (state_dict[name].is_floating_point() or not only_floating)
        }
        return _change(state_dict, differ, lambda _name, tensor: tensor.to(dtype))

    return casted


def average(*others: Any) -> Strategy:
    """Give the mean of a checkpoint's weights and those of others, already loaded.

    Of floating-point and complex tensors, computed in double precision and returned in the dtype
    of the first; everything else is the first's.

    Raises:
        ValueError: none is given, or one has no state dict; (the strategy) names or shapes differ.

    >>> average({"a": torch.tensor([3.0])})({"a": torch.tensor([1.0])})
    {'a': tensor([2.])}

    See Also: merge, prefer_ema
    """
    if not others:
        raise ValueError("average needs at least one other checkpoint")
    held = [weights(other) for other in others]

    def mean(name: str, tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        total = tensor.to(wide)
        for state_dict in held:
            total = total + state_dict[name].detach().to(total.device, wide)
        share = 1 + len(held)  # torch multiplies sparse tensors of any layout, and divides few
        return (total / share if _is_strided(total) else total * (1 / share)).to(tensor.dtype)

    @on_weights
    def averaged(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        for place, other in enumerate(held, 1):
            told = _differences(_shapes(state_dict), _shapes(other), "other")
            if told:
                raise ValueError(
                    f"the weights do not match checkpoint {place} to average with{told}"
                )
        chosen = {
            # tied here and not there: two means
            name: tuple(_alias(other[name]) for other in held)
            for name, shape in _shapes(state_dict).items()
            if shape is not None and _has_mean(state_dict[name])
        }
        return _change(state_dict, chosen, mean)

    return averaged


def merge(*others: Any, clash: Literal["warn", "last", "first", "error"] = "warn") -> Strategy:
    """Put the weights of other checkpoints, already loaded, beside a checkpoint's own.

    Where several have a name, the last wins, and a warning lists such names; ``clash="last"``
    does so in silence, ``"first"`` lets the first win, and ``"error"`` raises.

    Raises:
        ValueError: none is given, or one has no state dict; or another `clash`; (the strategy)
            names clash and that is an error.

    >>> merge({"decoder": torch.zeros(1)})({"encoder": torch.ones(1)})
    {'encoder': tensor([1.]), 'decoder': tensor([0.])}

    See Also: include, average
    """
    if not others:
        raise ValueError("merge needs at least one other checkpoint")
    if clash not in ("warn", "last", "first", "error"):
        raise ValueError(f"merge takes clash='warn', 'last', 'first' or 'error', not {clash!r}")
    held = [weights(other) for other in others]

    @on_weights
    def merged(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        items = dict(state_dict)
        clashes: dict[str, None] = {}
        for other in held:
            clashes |= {n: None for n, v in other.items() if n in items and items[n] is not v}
            items = {**items, **other} if clash != "first" else items | {**other, **items}
        if clashes and clash == "error":
            raise ValueError(f"names clash in merging ({len(clashes)}): {few(clashes)}")
        if clashes and clash == "warn":
            told = f"names clash in merging ({len(clashes)}), the last wins: {few(clashes)}"
            warnings.warn(told, stacklevel=3)  # where the strategy is called
        versions = {path: v for each in (state_dict, *held) for path, v in _metadata(each).items()}
        return _with_metadata(_like(state_dict, items), versions)

    return merged


# ── progress ──────────────────────────────────────────────────────────────────────────────────

_COUNTS = ("epoch", "global_step", "step", "iteration")

_PROGRESS = {
    "loops",  # Lightning
    "callbacks",
    "averaging_state",  # Lightning's WeightAveraging; the average is in state_dict
    "current_model_state",
    "task_state",  # Anemoi
}


def reset_progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Forget how far training was: a cold start from these weights.

    Epoch and step are zero where there are any; loops, callbacks, and the states of optimizers,
    schedulers and scalers are gone. What describes the weights (hyper-parameters) stays.

    Raises:
        TypeError: the checkpoint is no dict.

    >>> reset_progress({"epoch": 3, "global_step": 70, "state_dict": {}, "loops": {}})
    {'epoch': 0, 'global_step': 0, 'state_dict': {}}

    See Also: keep_progress, drop_optimizer, cold_start
    """
    kept = _without(checkpoint, _PROGRESS | _OPTIMIZER)
    if _path(checkpoint) == ():  # a bare state dict, in which "step" is a buffer
        return kept
    return _like(kept, {key: 0 if key in _COUNTS else value for key, value in kept.items()})


def keep_progress(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep everything, and refuse a checkpoint that training cannot go on from.

    That takes an epoch or a step, and the state of an optimizer.

    Raises:
        TypeError: the checkpoint is no dict.
        ValueError: one of these is not there.

    >>> keep_progress({"state_dict": {"a": torch.ones(1)}, "epoch": 3})
    Traceback (most recent call last):
        ...
    ValueError: no progress to keep: no optimizer state; there are: state_dict, epoch

    See Also: reset_progress, warm_start
    """
    held = _mapping(checkpoint)
    found = set() if _path(held) == () else set(held)
    absent = [] if found & set(_COUNTS) else ["epoch or step"]
    absent += [] if found & {key for key in _OPTIMIZER if "optim" in key} else ["optimizer state"]
    if absent:
        raise ValueError(f"no progress to keep: no {', no '.join(absent)}; there are: {few(held)}")
    return checkpoint


# ── variables ─────────────────────────────────────────────────────────────────────────────────

_PROCESSORS = re.compile(r"((?:model\.)*)((?:pre|post)_processors(_tendencies)?\..*)")


def variables(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Give the index of each variable by its name, for each dataset of an Anemoi checkpoint.

    From ``hyper_parameters["data_indices"]``, or those of a module that was pickled whole: an
    ``IndexCollection`` for each dataset, or one alone, whose dataset is then called ``data``.
    Objects read without their class will do.

    Raises:
        ValueError: there are none; says where they were looked for.

    >>> from types import SimpleNamespace as IndexCollection
    >>> indices = {"era5": IndexCollection(name_to_index={"2t": 0, "msl": 1})}
    >>> variables({"hyper_parameters": {"data_indices": indices}})
    {'era5': {'2t': 0, 'msl': 1}}

    See Also: require_variables
    """
    found = read_checkpoint(checkpoint)
    if not found:
        raise ValueError(NO_VARIABLES)
    return {dataset: each.index for dataset, each in found.items()}


def require_variables(
    wanted: torch.nn.Module | Mapping[str, int] | Mapping[str, Mapping[str, int]],
) -> Strategy:
    """Refuse a checkpoint whose variables are not those wanted, each at the same index.

    Wanted are a model's ``data_indices``, another checkpoint's, or a dict of name to index; or a
    dict of these by dataset.

    Raises:
        TypeError: no variables are given.
        ValueError: (the strategy) the checkpoint has none, or others; says which were added,
            removed and moved.

    >>> from types import SimpleNamespace as IndexCollection
    >>> held = {"data_indices": IndexCollection(name_to_index={"2t": 0, "msl": 1, "tp": 2})}
    >>> require_variables({"msl": 0, "2t": 1, "sst": 2})({"hyper_parameters": held})
    Traceback (most recent call last):
        ...
    ValueError: the checkpoint's variables are not those wanted
      data: added sst; removed tp; moved msl from 1 to 0, 2t from 0 to 1
      align_variables puts the weights into their order

    See Also: variables, align_variables
    """
    expected = {d: each.index for d, each in read_given("require_variables", wanted).items()}

    def required(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        found = variables(checkpoint)
        told = "".join(
            f"\n  {dataset}: {differences(found.get(dataset, {}), expected.get(dataset, {}))}"
            for dataset in dict.fromkeys((*expected, *found))
            if found.get(dataset) != expected.get(dataset)
        )
        if told:
            raise ValueError(
                f"the checkpoint's variables are not those wanted{told}\n  align_variables puts"
                " the weights into their order"
            )
        return checkpoint

    return required


def align_variables(
    source: Any = None,
    target: Any = None,
    layout: Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    new: Literal["model", "zeros"] | Mapping[str, str] = "model",
) -> Strategy:
    """Put the weights into the order of other variables: each variable takes its slices along.

    Every axis that runs over variables is indexed anew by name. Variables on both sides keep their
    slices, wherever they stand now; those that are gone lose them, and new ones get `new`. Where a
    variable is predicted but no longer read, or was not before, its output means something else (a
    value, or an increment), and is new. The result says that its variables are the target's, so
    that a second time nothing is left to do; states of optimizers and averaged weights, which would
    be in the old order, are dropped. Where the variables are the same, nothing is changed.

    Args:
        source: the checkpoint's variables: name to index, by dataset where there are several, or
            ``data_indices``. None reads them from the checkpoint.
        target: those wanted, likewise; None reads them from the model's ``data_indices``.
        layout: for a glob of tensor names, the axes that run over variables and what each is made
            of, in order: ``{"encoder.weight": {1: ["input", "input", 4]}}`` is two steps of the
            inputs, then four channels of something else. A part is a count of channels, a list of
            variables, or ``"all"``, ``"input"``, ``"output"``, ``"prognostic"``, ``"forcing"`` or
            ``"diagnostic"`` variables in the order of their indices. ``"new": "model"`` beside the
            axes holds for these tensors whatever `new` is, as statistics need; ``"model"`` in place
            of axes takes the model's own tensor. Roles that the variables come without stand under
            ``"forcing"``, ``"diagnostic"`` and ``"target"``. By dataset where there are several.
            None derives it from the model with `anemoi_layout`.
        model: gives the slices of new variables, as they are when the strategy runs. A tensor that
            would need some, and is not as wide as the model's, is left out.
        new: ``"model"``; ``"zeros"``, with which a new variable starts without a say; or for some
            of the new ones the variable of the checkpoint whose slices they get a copy of
            (``{"t_925": "t_850"}``), or either of these.

    Raises:
        TypeError: variables, layout, model or `new` are of another kind.
        ValueError: one of them makes no sense; (the strategy) there are no variables, a glob
            chooses nothing, or a size does not agree with the layout; says what it adds up to.

    >>> layout = {"encoder.weight": {1: ["all", 1]}}
    >>> align = align_variables({"t": 0, "z": 1}, {"z": 0, "q": 1, "t": 2}, layout, new="zeros")
    >>> align({"encoder.weight": torch.tensor([[1.0, 2.0, 9.0]])})
    {'encoder.weight': tensor([[2., 0., 1., 9.]])}

    See Also: anemoi_layout, variables, require_variables, transfer_learning
    """
    if model is None and (target is None or layout is None):
        raise TypeError("align_variables needs target and layout, or a model to derive them from")
    goal = read_given("align_variables", model if target is None else target)
    layouts = read_layout(anemoi_layout(model) if layout is None else layout, goal)  # type: ignore[arg-type] # it refuses a dict
    start = {} if source is None else read_given("align_variables", source)
    targets = {} if model is None else _tensors("align_variables", model)
    check_new(new, goal)

    def alignment(checkpoint: Any) -> Alignment:
        pairs = changed(read_checkpoint(checkpoint), start, goal, layouts)
        tensors = _laid_out(pairs, layouts, weights(checkpoint), targets)
        here = {dataset for dataset, _ in tensors.values()}
        if pairs and not here:
            raise ValueError(f"none of the layout's tensors: {few(weights(checkpoint))}")
        return Alignment({d: pair for d, pair in pairs.items() if d in here}, tensors)

    def aligned(checkpoint: Any) -> Any:
        found = alignment(checkpoint)
        if not found.pairs:
            return checkpoint
        plans = {
            name: origins(name, entry, *found.pairs[dataset], new)
            for name, (dataset, entry) in found.tensors.items()
        }
        state_dict = weights(checkpoint)
        fitting = {
            n: t
            for n, t in state_dict.items()
            if n not in plans or _fits(t, plans[n], targets.get(n))
        }
        chosen = {
            n: (plan, n in targets and _alias(targets[n]))
            for n, plan in plans.items()
            if n in fitting
        }
        made = _change(
            _like(state_dict, fitting),
            chosen,
            lambda n, t: _indexed(n, t, plans[n], targets.get(n)),
        )
        return _in_new_order(_put(checkpoint, _path(checkpoint), made), found)

    aligned.variable_alignment = alignment  # type: ignore[attr-defined] # what load_into reports
    return aligned


def _laid_out(
    pairs: Mapping[str, tuple[Variables, Variables]],
    layouts: Mapping[str, Layout],
    state_dict: Mapping[str, Any],
    targets: Mapping[str, Any],
) -> dict[str, tuple[str, Any]]:
    """Find the tensors to align, with dataset and layout; refuse a layout that is not theirs."""
    names = _tensor_names(state_dict)
    found: dict[str, tuple[str, Any]] = {}
    wrong = []
    for dataset, (old, new) in pairs.items():
        entries = layouts[dataset].entries
        chosen = {glob: _chosen(names, [glob], missing_ok=True) for glob in entries}
        for glob in (glob for glob, each in chosen.items() if not each):
            _check_absent(glob, names, targets)
        for name, glob in ((name, glob) for glob, each in chosen.items() for name in each):
            if name in found:
                raise ValueError(f"the layout has {name} twice; {glob!r} chooses it again")
            found[name] = dataset, entries[glob]
            sizes = {"the checkpoint": (state_dict[name], old)}
            sizes |= {"the model": (targets[name], new)} if name in targets else {}
            wrong += [
                f"{name} {told} in {where}"
                for where, (tensor, variables) in sizes.items()
                if (told := disagreement(entries[glob], variables, tensor.shape))
            ]
    if wrong:
        raise ValueError(
            f"sizes that the layout does not explain: {few(wrong)}; exclude leaves these out"
        )
    return found


def _check_absent(glob: str, names: Sequence[str], targets: Mapping[str, Any]) -> None:
    """Refuse a glob that chooses nothing, unless it chooses what the model has and no other has."""
    if not _chosen(targets, [glob], missing_ok=True):
        _chosen(names, [glob])
    alike = [name for name in names if _is_alike(name, glob)]
    if alike:
        raise ValueError(
            f"there is no {glob}, but {few(alike)}; strip_prefix or add_prefix gives names alike"
        )


def _is_alike(one: str, other: str) -> bool:
    """Tell whether names are the same but for what is before them."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _fits(tensor: torch.Tensor, plan: Plan, target: Any) -> bool:
    """Tell whether a tensor can be put together: with slices of the model, if it is as wide."""
    if isinstance(plan, str):
        return True
    if target is None or not _of_model(plan):
        return _is_strided(tensor)
    if not (_is_strided(tensor) and _is_strided(target)) or tensor.dim() != target.dim():
        return False
    along = {axis % tensor.dim() for axis, _ in plan}
    pairs = enumerate(zip(tensor.shape, target.shape, strict=True))
    return all(size == wanted or axis in along for axis, (size, wanted) in pairs)


def _of_model(plan: Plan) -> bool:
    """Tell whether a tensor takes anything from the model."""
    return isinstance(plan, str) or any("model" in channels for _, channels in plan)


def _indexed(name: str, tensor: torch.Tensor, plan: Plan, target: Any) -> torch.Tensor:
    """Put a tensor together from its own slices, the model's and zeros."""
    if _of_model(plan) and (target is None or target.is_meta):
        lack = "none is given that has it" if target is None else "that is hollow"
        raise ValueError(
            f"{name} takes slices of new variables from a model, and {lack}; give model=, not on"
            " the meta device, or new='zeros', which is for all but statistics"
        )
    if hasattr(target, "full_tensor"):
        target = target.full_tensor()  # of a model under fully_shard, whose ranks all do this
    if isinstance(plan, str):
        return _detached(target).to(tensor.dtype)  # type: ignore[no-any-return] # a tensor by now
    kept = [[at for at, origin in enumerate(each) if isinstance(origin, int)] for _, each in plan]
    # a tensor that gives nothing is not asked for anything, so that it is not moved
    device = tensor.device if all(kept) else torch.device("cpu")
    sizes = list(tensor.shape)
    for axis, channels in plan:
        sizes[axis] = len(channels)
    made = torch.zeros(sizes, dtype=tensor.dtype, device=device)
    if _of_model(plan):
        made.copy_(target.detach())
    for axis, channels in plan:
        for place in (place for place, origin in enumerate(channels) if origin == "zeros"):
            made.select(axis, place).zero_()
    if not all(kept):
        return made
    there = [torch.arange(size, device=device) for size in sizes]
    for (axis, channels), places in zip(plan, kept, strict=True):
        there[axis] = torch.tensor(places, device=device)
        here = torch.tensor([channels[place] for place in places], device=device)
        tensor = tensor.index_select(axis, here)
    made[torch.meshgrid(*there, indexing="ij")] = tensor
    return made


def _in_new_order(checkpoint: Mapping[str, Any], alignment: Alignment) -> dict[str, Any]:
    """Say that a checkpoint's variables are others, and drop what is still in the old order."""
    averages = {*_EMA, "current_model_state"}
    made = _without(checkpoint, averages | {key for key in _OPTIMIZER if "optim" in key})
    if isinstance(made.get("callbacks"), Mapping):
        made["callbacks"] = {
            name: _without(state, averages) if isinstance(state, Mapping) else state
            for name, state in made["callbacks"].items()
        }
    parameters: Any = made.get("hyper_parameters")
    if read_checkpoint({"hyper_parameters": parameters}):
        indices = rewritten(parameters["data_indices"], alignment)
        made["hyper_parameters"] = _like(parameters, {**parameters, "data_indices": indices})
    return made


def refresh_processors(model: Model, *, tendencies: bool = True, states: bool = False) -> Strategy:
    """Take the statistics of pre- and post-processors from the model in place of the checkpoint's.

    Those of the tendencies, and those of the states on request. The model's may lack the leading
    ``model.`` of the checkpoint's, or have one more.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no processors, or hollow ones, or neither kind is asked for.

    >>> model = {"pre_processors_tendencies.mean": torch.ones(1)}
    >>> refresh_processors(model)({"model.pre_processors_tendencies.mean": torch.zeros(1)})
    {'model.pre_processors_tendencies.mean': tensor([1.])}

    See Also: merge, require_variables
    """
    if not (tendencies or states):
        raise ValueError("refresh_processors needs tendencies=True or states=True")
    given = _tensors("refresh_processors", model)
    found = {name: match for name in given if (match := _PROCESSORS.fullmatch(name))}
    if not found:
        raise ValueError(f"no pre_processors or post_processors in the model: {few(given)}")
    if any(isinstance(given[name], torch.Tensor) and given[name].is_meta for name in found):
        raise ValueError("refresh_processors has no values to take from a hollow model")

    def is_asked(match: re.Match[str] | None) -> bool:
        return match is not None and (tendencies if match[3] else states)

    fresh = {match[2]: _detached(given[n]) for n, match in found.items() if is_asked(match)}
    own = next(match[1] for match in found.values())

    @on_weights
    def refreshed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        matches = {name: _PROCESSORS.fullmatch(name) for name in state_dict}
        held = {match[2]: match[1] for match in matches.values() if match}
        front = next(iter(held.values()), own)
        added = {front + name: value for name, value in fresh.items() if name not in held}
        kept = {
            name: fresh[match[2]] if match and is_asked(match) else state_dict[name]
            for name, match in matches.items()
            if not (match and is_asked(match)) or match[2] in fresh
        }
        return _like(state_dict, kept | added)

    return refreshed


def _detached(value: Any) -> Any:
    """Copy a model's value, so that what is made of it does not change with the model."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


# ── recipes ───────────────────────────────────────────────────────────────────────────────────


def standard(model: Model) -> Strategy:
    """Load everything, and refuse what does not match the model to the last name and shape.

    >>> standard({"a": torch.zeros(1)})({"epoch": 3, "state_dict": {"a": torch.ones(1)}})
    {'epoch': 3, 'state_dict': {'a': tensor([1.])}}

    See Also: require_match, warm_start, transfer_learning
    """
    return require_match(model)


def transfer_learning(
    model: Model,
    *,
    skip_mismatched: bool = True,
    new: Literal["model", "zeros"] | Mapping[str, str] = "model",
) -> Strategy:
    """Take what fits the model, without the progress of its training.

    Where checkpoint and model both know their variables, and the model is one of Anemoi's, the
    weights are put into its order first, and `new` is for its new variables: see `align_variables`
    (also for what it refuses: other counts of steps or of trainable features, for which `exclude`
    is the way). What has another shape is skipped, or refused where `skip_mismatched` is False.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no state dict, or `new` asks for what nobody knows; (the strategy) as
            `align_variables`, and `require_match` where `skip_mismatched` is False.

    >>> pretrained = {"state_dict": {"a": torch.ones(1), "b": torch.ones(2)}, "epoch": 3}
    >>> transfer_learning({"a": torch.zeros(1), "b": torch.zeros(5)})(pretrained)
    {'state_dict': {'a': tensor([1.])}, 'epoch': 0}

    See Also: align_variables, filter_shapes, require_match, reset_progress
    """
    check = [] if skip_mismatched else [require_match(model, missing=False, unexpected=False)]
    align = _align_where_known(model, new)
    return compose(reset_progress, filter_shapes(model), *check, *align)


def _align_where_known(model: Model, new: Any) -> list[Strategy]:
    """Give what aligns the variables where the checkpoint has any, if the model's are known."""
    try:
        layout = anemoi_layout(model) if isinstance(model, torch.nn.Module) else {}
    except ValueError:  # it is none of Anemoi's
        layout = {}
    if not layout:
        if new != "model":
            raise ValueError(
                f"new={new!r} needs one of Anemoi's models, or align_variables a layout"
            )
        return []
    align: Any = align_variables(layout=layout, model=model, new=new)
    goal, names = read_model(model), {name for each in layout.values() for name in each}

    def can(checkpoint: Any) -> bool:
        if not paired(read_checkpoint(checkpoint), goal):
            return False
        # what has none of the names has nothing to align; under another prefix that is an error
        state_dict = weights(checkpoint)
        return any(_is_alike(name, held) for name in names for held in state_dict)

    def aligned(checkpoint: Any) -> Any:
        return align(checkpoint) if can(checkpoint) else checkpoint

    def alignment(checkpoint: Any) -> Alignment:
        return align.variable_alignment(checkpoint) if can(checkpoint) else Alignment({}, {})

    aligned.variable_alignment = alignment  # type: ignore[attr-defined] # what load_into reports
    return [aligned]


def weights_only(checkpoint: Any) -> Mapping[str, Any]:
    """Take the state dict and nothing else, as `weights` does.

    >>> weights_only({"state_dict": {"a": torch.ones(1)}, "epoch": 3})
    {'a': tensor([1.])}

    See Also: weights, cold_start
    """
    return weights(checkpoint)


def warm_start(model: Model) -> Strategy:
    """Go on with training: everything, matching the model, with progress to go on from.

    >>> stopped = {"state_dict": {"a": torch.ones(1)}, "epoch": 3, "optimizer_states": []}
    >>> warm_start({"a": torch.zeros(1)})(stopped) == stopped
    True

    See Also: keep_progress, require_match, cold_start
    """
    return compose(require_match(model), keep_progress)


def cold_start(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Start training anew from these weights: everything but progress.

    >>> cold_start({"state_dict": {"a": torch.ones(1)}, "epoch": 3, "optimizer_states": []})
    {'state_dict': {'a': tensor([1.])}, 'epoch': 0}

    See Also: reset_progress, warm_start
    """
    return reset_progress(checkpoint)


# ── freeze ────────────────────────────────────────────────────────────────────────────────────


def freeze(model: torch.nn.Module, *globs: str) -> list[str]:
    """Freeze the parameters that a glob or an exact path chooses; gives those newly frozen.

    This one changes what it is given: ``requires_grad`` of the model's parameters.

    Raises:
        TypeError: the model is no module, or a glob no text.
        ValueError: no glob is given, or one chooses no parameter; then nothing is changed.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> freeze(model, "0", "*.bias")
    ['0.weight', '0.bias', '1.bias']

    See Also: unfreeze
    """
    return _require_grad("freeze", model, globs, requires_grad=False)


def unfreeze(model: torch.nn.Module, *globs: str) -> list[str]:
    """Unfreeze the parameters that a glob or an exact path chooses; gives those newly unfrozen.

    Raises:
        TypeError: the model is no module, or a glob no text.
        ValueError: no glob is given, or one chooses no parameter; then nothing is changed.

    >>> model = torch.nn.Linear(1, 1).requires_grad_(False)
    >>> unfreeze(model, "weight")
    ['weight']

    See Also: freeze
    """
    return _require_grad("unfreeze", model, globs, requires_grad=True)


def _require_grad(
    what: str, model: torch.nn.Module, globs: Sequence[str], *, requires_grad: bool
) -> list[str]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{what} takes a module, not {model!r}")
    _check_texts(what, globs)
    # Tied parameters under each of their names; integers cannot have a gradient.
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = _chosen(named, globs)
    new = [
        name
        for name, parameter in named.items()
        if name in chosen and _has_mean(parameter) and parameter.requires_grad != requires_grad
    ]
    for name in new:
        named[name].requires_grad_(requires_grad)
    return new
