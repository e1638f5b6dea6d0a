"""Strategies: pure functions from checkpoint to checkpoint, and what puts them together.

A checkpoint is what `torch.load` gives: a dict with a state dict in it, or a bare state dict. A
strategy takes a checkpoint, returns another one, and never changes its argument. `load` runs it
first on a hollow checkpoint, whose tensors are on the meta device and have no values. So `load`
knows which tensors the strategy drops, and never moves them.

The new state dict has the order, the type and the ``_metadata`` of the old one, and tied entries
stay tied. A model may be passed as a module or as its state dict, under its own names.

A glob chooses a name, or all names under it: ``encoder`` chooses ``encoder.weight``. It does not
choose ``model.encoder.weight``; ``model.encoder`` and ``*.encoder`` do.

``Raises`` of each function lists the errors of the call. Errors that come later, when the strategy
that the call returned runs, are marked with "(the strategy)"; each is an
`anemoi_ckpt.MismatchError`, which is a ValueError.

compose · choose · fit · rename · change values · progress · variables · recipes · freeze
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from _anemoi_ckpt.anatomy import (
    AVERAGING,
    COUNTS,
    OPTIMIZER,
    PROGRESS,
    SCALER,
    SCHEDULER,
    TRAINED_WEIGHTS,
    find_averages,
    is_extra_state,
    like,
    mapping_of,
    path_to_weights,
    replaced,
    values_of,
    weights_of,
    without,
)
from _anemoi_ckpt.arguments import (
    check_pattern,
    check_prefix,
    check_texts,
    read_indices,
    state_dict_of,
)
from _anemoi_ckpt.calls import brief
from _anemoi_ckpt.combining import average_state_dicts, in_one_order, merge_state_dicts
from _anemoi_ckpt.comparing import describe_differences, prefix_advice, shapes_of
from _anemoi_ckpt.describing import in_units_of
from _anemoi_ckpt.edges import align_edges_of
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.freezing import set_requires_grad
from _anemoi_ckpt.globs import choose
from _anemoi_ckpt.layouts import anemoi_layout
from _anemoi_ckpt.migrating import migrated
from _anemoi_ckpt.ordering import align_where_known, aligner, refuse_misplaced
from _anemoi_ckpt.processors import read_processors, refresh
from _anemoi_ckpt.renaming import rename_entries
from _anemoi_ckpt.resuming import resuming
from _anemoi_ckpt.steps import (
    Call,
    Step,
    check_strategies,
    factory,
    is_taker,
    no_strategy,
    parts_of,
    run_chain,
)
from _anemoi_ckpt.tensors import (
    casts_to,
    change_tensors,
    drops_parts,
    is_finite,
    is_strided,
    resized,
    select,
    tensor_names,
    view_key,
)
from _anemoi_ckpt.variables import (
    NO_VARIABLES,
    differences,
    few,
    read_checkpoint,
    read_variables,
)

__all__ = [
    "add_prefix",
    "align_edges",
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
    "migrate",
    "on_weights",
    "pad_or_slice",
    "pipe",
    "prefer_ema",
    "refresh_processors",
    "rename",
    "require_finite",
    "require_match",
    "require_variables",
    "reset_progress",
    "standard",
    "strip_prefix",
    "take",
    "training_weights",
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


# ── compose ───────────────────────────────────────────────────────────────────────────────────


@no_strategy
@brief
def compose(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """Compose functions from right to left: ``compose(f, g, h)(x)`` is ``f(g(h(x)))``.

    If `load` is one of them, `compose` passes the functions on its left to it as its strategies:
    ``compose(f, g, load)(uri)`` is ``load(uri, g, f)``, and moves only the bytes that survive them.

    Raises:
        TypeError: an argument is not a function; or it is a factory that was not called, such as
            ``include`` in place of ``include("encoder")``.

    >>> compose(len, weights)({"state_dict": {"a": torch.ones(1), "b": torch.ones(1)}})
    2

    See Also: pipe, on_weights
    """
    check_strategies("compose", functions)
    parts = tuple(part for function in functions for part in parts_of(function))
    taker = next((position for position, part in enumerate(parts) if is_taker(part)), 0)
    run = functools.partial(run_chain, parts[:taker], parts[taker:])
    return Step(run, Call(compose, functions), parts)


@no_strategy
@brief
def pipe(value: Any, *functions: Callable[..., Any]) -> Any:
    """Pass a value through functions from left to right: ``pipe(x, f, g)`` is ``g(f(x))``.

    Raises:
        TypeError: as for `compose`.

    >>> pipe({"state_dict": {"a": torch.ones(1)}, "optimizer_states": []}, drop_optimizer, list)
    ['state_dict']

    See Also: compose
    """
    return compose(*reversed(functions))(value)


@factory
def on_weights(function: Callable[[Mapping[str, Any]], Any]) -> Strategy:
    """Turn a function of a state dict into a strategy, which takes a whole checkpoint.

    The strategy puts the new state dict in the place of the old one, and keeps everything else. One
    exception: the second copy of the weights that Lightning's ``WeightAveraging`` saves (see
    `training_weights`) is dropped, since it would no longer agree.

    Raises:
        TypeError: `function` is not a function.
        ValueError: (the strategy) the checkpoint has no state dict.

    >>> first = on_weights(lambda state_dict: dict(list(state_dict.items())[:1]))
    >>> first({"epoch": 3, "state_dict": {"a": torch.ones(1), "b": torch.ones(1)}})
    {'epoch': 3, 'state_dict': {'a': tensor([1.])}}

    See Also: weights, compose
    """
    check_strategies("on_weights", [function])

    def lifted(checkpoint: Any) -> Any:
        path, before = path_to_weights(checkpoint) or (), weights_of(checkpoint)
        after = function(before)
        if path and after is not before:
            checkpoint = without(checkpoint, [TRAINED_WEIGHTS])
        return replaced(checkpoint, path, after)

    return functools.update_wrapper(lifted, function, updated=())


# ── choose ────────────────────────────────────────────────────────────────────────────────────


def weights(checkpoint: Any) -> Mapping[str, Any]:
    """Give only the state dict, which the checkpoint has under one of the usual keys.

    The usual keys are ``state_dict``, ``model_state_dict``, ``model``, ``module`` and more, in this
    order, also inside one another. A dict of tensors is a state dict itself. A module, or the inert
    data of one, gives its own state dict.

    Raises:
        ValueError: the checkpoint has no state dict; the error lists its keys.

    >>> list(weights({"epoch": 3, "state_dict": {"layer.weight": torch.ones(2)}}))
    ['layer.weight']

    See Also: on_weights, drop_optimizer, prefer_ema
    """
    return weights_of(checkpoint)


def drop_optimizer(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the states of optimizers, learning-rate schedulers and gradient scalers.

    A value is recognised by a usual key, or by its content: ``{"state", "param_groups"}`` is the
    state of an optimizer under any key.

    Raises:
        TypeError: the checkpoint is not a dict.

    >>> list(drop_optimizer({"state_dict": {}, "optimizer_states": [], "epoch": 3}))
    ['state_dict', 'epoch']

    See Also: drop, weights, reset_progress
    """
    return without(mapping_of(checkpoint), (OPTIMIZER, SCHEDULER, SCALER))


@factory
def drop(*keys: str, missing_ok: bool = False) -> Strategy:
    """Drop keys at the top level of the checkpoint, beside the weights.

    Args:
        keys: the keys to drop.
        missing_ok: skip keys that the checkpoint does not have, instead of raising.

    Raises:
        TypeError: a key is not a string.
        ValueError: there is no key; (the strategy) the checkpoint does not have one of them.

    >>> drop("callbacks", "loops")({"state_dict": {}, "loops": {}, "callbacks": {}, "epoch": 3})
    {'state_dict': {}, 'epoch': 3}

    See Also: drop_optimizer, exclude
    """
    check_texts("drop", keys)

    def dropped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        items = mapping_of(checkpoint)
        absent = [key for key in keys if key not in items]
        if absent and not missing_ok:
            problem = f"cannot drop {few(absent)}; its keys are: {few(items)}"
            raise MismatchError(UNPLACED, problem, "name some of these, or pass missing_ok=True")
        return like(items, {key: value for key, value in items.items() if key not in keys})

    return dropped


@factory
def include(*globs: str, missing_ok: bool = False) -> Strategy:
    """Keep only the weights that at least one of the globs chooses.

    Args:
        globs: of names of tensors, or of modules with all tensors in them.
        missing_ok: accept globs that choose nothing, instead of raising.

    Raises:
        TypeError: a glob is not a string.
        ValueError: there is no glob; (the strategy) a glob chooses nothing.

    >>> checkpoint = {"encoder.weight": torch.ones(1), "decoder.weight": torch.zeros(1)}
    >>> include("encoder")(checkpoint)
    {'encoder.weight': tensor([1.])}

    See Also: exclude, filter_shapes
    """
    check_texts("include", globs)

    @on_weights
    def included(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        names = choose(state_dict, globs, missing_ok=missing_ok)
        kept = {name: value for name, value in state_dict.items() if name in names}
        return like(state_dict, kept)

    return included


@factory
def exclude(*globs: str, missing_ok: bool = False) -> Strategy:
    """Drop the weights that at least one of the globs chooses.

    Args:
        globs: of names of tensors, or of modules with all tensors in them.
        missing_ok: accept globs that choose nothing, instead of raising.

    Raises:
        TypeError: a glob is not a string.
        ValueError: there is no glob; (the strategy) a glob chooses nothing.

    >>> exclude("*.bias")({"encoder.weight": torch.ones(1), "encoder.bias": torch.zeros(1)})
    {'encoder.weight': tensor([1.])}

    See Also: include, drop
    """
    check_texts("exclude", globs)

    @on_weights
    def excluded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        names = choose(state_dict, globs, missing_ok=missing_ok)
        kept = {name: value for name, value in state_dict.items() if name not in names}
        return like(state_dict, kept)

    return excluded


def prefer_ema(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the weights by their averages, such as an exponential moving average.

    The averages may be beside the weights or in a callback's state, under any usual key, with or
    without the prefix and the counter of `torch.optim.swa_utils.AveragedModel`. Weights without an
    average stay. Lightning's ``WeightAveraging`` saves the averages as the state dict already: then
    only its copy of the weights being trained is dropped.

    Raises:
        TypeError: the checkpoint is not a dict.
        ValueError: the checkpoint has no averages, or averages of names that the weights lack.

    >>> prefer_ema({"state_dict": {"a": torch.ones(1)}, "ema": {"a": torch.zeros(1)}})["state_dict"]
    {'a': tensor([0.])}

    See Also: training_weights, weights, average
    """
    items = mapping_of(checkpoint)
    if AVERAGING.of(items):  # lightning.pytorch.callbacks.weight_averaging
        return without(items, [TRAINED_WEIGHTS])
    averages = find_averages(items)
    path = path_to_weights(items)
    if path is None:
        return like(items, {**items, "state_dict": averages})
    state_dict = weights(items)
    unknown = [name for name in averages if name not in state_dict]
    if unknown:
        raise MismatchError(
            UNPLACED,
            f"some averaged weights are not among the weights: {few(unknown)}",
            f"the weights are: {few(state_dict)}",
        )
    result: dict[str, Any] = replaced(items, path, like(state_dict, {**state_dict, **averages}))
    return result


def training_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace averaged weights by the weights being trained, where the checkpoint has both.

    Lightning's ``WeightAveraging`` saves the averages as the state dict, and the weights being
    trained as ``current_model_state``. The optimizer's state belongs to the latter. The averages
    and what counts them are dropped. Any other checkpoint is returned as it is.

    Raises:
        TypeError: the checkpoint is not a dict.

    >>> averaged = {"state_dict": {"a": torch.ones(1)}, "averaging_state": {"n_averaged": 3}}
    >>> training_weights({**averaged, "current_model_state": {"a": torch.zeros(1)}})
    {'state_dict': {'a': tensor([0.])}}

    See Also: prefer_ema, warm_start
    """
    items = mapping_of(checkpoint)
    trained = list(TRAINED_WEIGHTS.of(items).values())
    if not trained or not AVERAGING.of(items):
        return checkpoint
    kept = without(items, [TRAINED_WEIGHTS, AVERAGING])
    return like(kept, {**kept, "state_dict": trained[0]})


# ── fit ───────────────────────────────────────────────────────────────────────────────────────


@factory
def filter_shapes(model: Model) -> Strategy:
    """Keep the weights that the model has under the same name and with the same shape.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: the model has no state dict; (the strategy) the checkpoint and the model both
            know their variables, these are in another order, and a tensor that fits depends on it.

    >>> checkpoint = {"weight": torch.ones(1, 2), "bias": torch.ones(5)}
    >>> list(filter_shapes(torch.nn.Linear(2, 1))(checkpoint))
    ['weight']

    See Also: require_match, pad_or_slice, transfer_learning
    """
    wanted = shapes_of(state_dict_of("filter_shapes", model))

    @on_weights
    def filtered(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        shapes = shapes_of(state_dict)
        fitting = [name for name in shapes if name in wanted and shapes[name] == wanted[name]]
        return like(state_dict, {name: state_dict[name] for name in fitting})

    return refuse_misplaced(model, filtered)


@factory
def require_match(model: Model, *, missing: bool = True, unexpected: bool = True) -> Strategy:
    """Refuse weights that do not match the model; one error lists all names and shapes that differ.

    Args:
        model: a module or a state dict.
        missing: refuse names that only the model has.
        unexpected: refuse names that only the checkpoint has.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: the model has no state dict; (the strategy) the weights do not match the model,
            or their variables are in another order, as for `filter_shapes`.

    >>> require_match(torch.nn.Linear(2, 1))({"weight": torch.ones(1, 3)})
    Traceback (most recent call last):
        ...
    anemoi_ckpt.MismatchError: the checkpoint: the weights do not match the model
      missing, in the model only (1): bias
      mismatched (1): weight is (1, 3), the model's is (1, 2)
      filter_shapes leaves out what differs, pad_or_slice resizes it

    See Also: filter_shapes, standard
    """
    wanted = shapes_of(state_dict_of("require_match", model))

    @on_weights
    def required(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        shapes = shapes_of(state_dict)
        problems = describe_differences(
            shapes, wanted, "model", missing=missing, unexpected=unexpected
        )
        if problems:
            raise MismatchError(
                UNPLACED,
                f"the weights do not match the model{problems}",
                prefix_advice(shapes, wanted)
                or "filter_shapes leaves out what differs, pad_or_slice resizes it",
            )
        return state_dict

    return refuse_misplaced(model, required)


@on_weights
def _with_finite_values(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    tensors = {name: t for name, t in state_dict.items() if isinstance(t, torch.Tensor)}
    wrong = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        raise MismatchError(
            UNPLACED,
            f"NaN or infinity in {few(wrong)}",
            "verify(…, values=True) counts",
        )
    return state_dict


def require_finite(checkpoint: Any) -> Any:
    """Refuse weights with values that are NaN or infinite; the error names them.

    Raises:
        ValueError: there are such weights, or the checkpoint has no state dict.

    >>> require_finite({"a": torch.ones(2), "b": torch.tensor([float("nan")])})
    Traceback (most recent call last):
        ...
    anemoi_ckpt.MismatchError: the checkpoint: NaN or infinity in b; verify(…, values=True) counts

    See Also: require_match
    """
    return _with_finite_values(checkpoint)


@factory
def pad_or_slice(model: Model, *, fill: Literal["model", "zeros"] = "model") -> Strategy:
    """Give each tensor the model's shape: keep the part that both shapes have, and fill the rest.

    A sparse tensor, or one whose number of dimensions differs from the model's, stays as it is. Put
    `filter_shapes` or `require_match` after this strategy to drop or refuse such tensors.

    Args:
        model: a module or a state dict.
        fill: ``"model"`` fills with the model's values at the time when the strategy runs,
            ``"zeros"`` with zeros.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: the model has no state dict; it is on the meta device, and `fill` is
            ``"model"``; `fill` has another value; (the strategy) variables are in another order, as
            for `filter_shapes`.

    >>> pad_or_slice({"a": torch.zeros(2, 3)})({"a": torch.ones(3, 2)})
    {'a': tensor([[1., 1., 0.],
            [1., 1., 0.]])}

    See Also: filter_shapes, take
    """
    if fill not in ("model", "zeros"):
        raise ValueError(f"pad_or_slice fills from 'model' or with 'zeros', not {fill!r}")
    targets = {
        name: value
        for name, value in state_dict_of("pad_or_slice", model).items()
        if is_strided(value)
    }
    if fill == "model" and any(target.is_meta for target in targets.values()):
        raise ValueError(
            "pad_or_slice cannot fill from a model on the meta device; use fill='zeros'"
        )

    @on_weights
    def fitted(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {
            name: (targets[name].shape, view_key(targets[name]) if fill == "model" else None)
            for name, value in state_dict.items()
            if name in targets
            and not is_extra_state(name)
            and is_strided(value)
            and value.shape != targets[name].shape
            and value.dim() == targets[name].dim()
        }
        return change_tensors(
            state_dict,
            chosen,
            lambda name, tensor: resized(tensor, targets[name].detach(), zeros=fill == "zeros"),
        )

    return refuse_misplaced(model, fitted)


@factory
def take(glob: str, dim: int, index: Sequence[int] | torch.Tensor) -> Strategy:
    """Select indices, in any order, along one dimension of the tensors that a glob chooses.

    Args:
        glob: of names of tensors, or of modules with all tensors in them.
        dim: the dimension; a negative one counts from the last.
        index: the indices along it, in their new order; a negative one counts from the end.

    Raises:
        TypeError: the glob is not a string, or `dim` or an index is not an integer.
        ValueError: (the strategy) the glob chooses nothing, or a tensor lacks the dimension or an
            index.

    >>> take("encoder", 0, [2, 0])({"encoder.weight": torch.tensor([10.0, 11.0, 12.0])})
    {'encoder.weight': tensor([12., 10.])}

    See Also: pad_or_slice, require_variables
    """
    check_texts("take", (glob,))
    indices = read_indices(dim, index)

    @on_weights
    def selected(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        names = choose(tensor_names(state_dict), [glob])
        return change_tensors(
            state_dict,
            dict.fromkeys(names),
            lambda name, tensor: select(name, tensor, dim, indices),
        )

    return selected


# ── rename ────────────────────────────────────────────────────────────────────────────────────


@factory
def strip_prefix(prefix: str) -> Strategy:
    """Remove a prefix, such as Lightning's ``model.`` or DDP's ``module.``, from names with it.

    Raises:
        TypeError: the prefix is not a string.
        ValueError: it does not end with a dot; (the strategy) two names would become one.

    >>> list(strip_prefix("module.")({"module.weight": torch.ones(1), "step": torch.ones(1)}))
    ['weight', 'step']

    See Also: add_prefix, rename
    """
    check_prefix("strip_prefix", prefix)
    return on_weights(
        functools.partial(rename_entries, new_name=lambda name: name.removeprefix(prefix))
    )


@factory
def add_prefix(prefix: str) -> Strategy:
    """Put a prefix before every name, such as Lightning's and Anemoi's ``model.``.

    Raises:
        TypeError: the prefix is not a string.
        ValueError: it does not end with a dot.

    >>> list(add_prefix("model.")({"weight": torch.ones(1)}))
    ['model.weight']

    See Also: strip_prefix, rename
    """
    check_prefix("add_prefix", prefix)
    return on_weights(functools.partial(rename_entries, new_name=lambda name: prefix + name))


@factory
def rename(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Strategy:
    r"""Rename the weights: `re.sub` is applied to each name.

    Raises:
        TypeError: the pattern is not a string, or the replacement neither a string nor a function.
        ValueError: one of them is malformed; (the strategy) two names would become one.

    >>> compiled = {"model._orig_mod.layers.0.weight": torch.ones(1)}
    >>> list(rename(r"_orig_mod\.", "")(compiled))  # torch.compile's
    ['model.layers.0.weight']
    >>> list(rename(r"layers\.(\d+)", r"blocks.\1.mlp")(compiled))
    ['model._orig_mod.blocks.0.mlp.weight']

    See Also: strip_prefix, add_prefix
    """
    compiled = check_pattern(pattern, replacement)
    return on_weights(
        functools.partial(rename_entries, new_name=functools.partial(compiled.sub, replacement))
    )


# ── change values ─────────────────────────────────────────────────────────────────────────────


@factory
def cast(
    dtype: torch.dtype, *globs: str, only_floating: bool = True, lossy: bool = False
) -> Strategy:
    """Cast floating-point weights to a dtype.

    Args:
        dtype: the new dtype.
        globs: cast only the weights that one of these chooses; without globs, cast all.
        only_floating: False casts integers, booleans and complex numbers, too.
        lossy: True also casts floating-point weights to integers or booleans, and complex ones to
            real ones.

    Raises:
        TypeError: `dtype` is not a `torch.dtype`, torch casts nothing to it (as to ``qint8``), or a
            glob is not a string.
        MismatchError: (the strategy) a glob chooses nothing, or `lossy` is False and a cast would
            drop fractions or imaginary parts.

    >>> cast(torch.bfloat16)({"weight": torch.ones(1), "steps": torch.tensor([3])})
    {'weight': tensor([1.], dtype=torch.bfloat16), 'steps': tensor([3])}

    See Also: average
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"cast takes a torch.dtype, not {dtype!r}")
    if not casts_to(dtype):
        raise TypeError(f"cast takes a torch.dtype that tensors can be cast to, not {dtype}")
    check_texts("cast", globs or ("*",))

    @on_weights
    def casted(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        names = tensor_names(state_dict)
        chosen = choose(names, globs) if globs else names
        differing = [
            name
            for name in chosen
            if state_dict[name].dtype != dtype
            and (state_dict[name].is_floating_point() or not only_floating)
        ]
        lost = [name for name in differing if drops_parts(state_dict[name].dtype, dtype)]
        if lost and not lossy:
            raise MismatchError(
                UNPLACED,
                f"to cast {few(lost)} to {dtype} would drop fractions or imaginary parts",
                "choose others by globs, or pass lossy=True",
            )
        return change_tensors(
            state_dict, dict.fromkeys(differing), lambda _name, tensor: tensor.to(dtype)
        )

    return casted


@factory
def average(*others: Any) -> Strategy:
    """Replace a checkpoint's weights by their mean with those of other checkpoints.

    Only floating-point and complex tensors are averaged. The mean is computed in double precision,
    and has the dtype of the checkpoint that the strategy gets. Everything else is taken from that
    checkpoint.

    Args:
        others: the other checkpoints, already loaded.

    Raises:
        ValueError: there is no other checkpoint, or one has no state dict; (the strategy) names,
            shapes, or the variables (if both sides know them) differ.

    >>> average({"a": torch.tensor([3.0])})({"a": torch.tensor([1.0])})
    {'a': tensor([2.])}

    See Also: merge, prefer_ema
    """
    if not others:
        raise ValueError("average needs at least one other checkpoint")
    state_dicts = [weights(other) for other in others]
    averaged = on_weights(functools.partial(average_state_dicts, others=state_dicts))
    return in_one_order("average", others, averaged)


@factory
def merge(*others: Any, clash: Literal["warn", "last", "first", "error"] = "warn") -> Strategy:
    """Add the weights of other checkpoints to a checkpoint's own.

    Args:
        others: the other checkpoints, already loaded.
        clash: what happens to a name that several checkpoints have. ``"warn"`` takes the last
            one's tensor and warns with all such names; ``"last"`` takes it without a warning;
            ``"first"`` takes the first one's; ``"error"`` raises.

    Raises:
        ValueError: there is no other checkpoint, or one has no state dict; `clash` has another
            value; (the strategy) names clash, and `clash` is ``"error"``; or both sides know their
            variables, and these have other indices.

    >>> merge({"decoder": torch.zeros(1)})({"encoder": torch.ones(1)})
    {'encoder': tensor([1.]), 'decoder': tensor([0.])}

    See Also: include, average
    """
    if not others:
        raise ValueError("merge needs at least one other checkpoint")
    if clash not in ("warn", "last", "first", "error"):
        raise ValueError(f"merge takes clash='warn', 'last', 'first' or 'error', not {clash!r}")
    state_dicts = [weights(other) for other in others]
    merged = on_weights(functools.partial(merge_state_dicts, others=state_dicts, clash=clash))
    return in_one_order("merge", others, merged)


# ── progress ──────────────────────────────────────────────────────────────────────────────────


def reset_progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the progress of training, for a cold start from these weights.

    Epoch and step become zero if the checkpoint has them. Loops, callbacks, and the states of
    optimizers, schedulers and scalers are dropped. Hyper-parameters stay: they describe the
    weights.

    Raises:
        TypeError: the checkpoint is not a dict.

    >>> reset_progress({"epoch": 3, "global_step": 70, "state_dict": {}, "loops": {}})
    {'epoch': 0, 'global_step': 0, 'state_dict': {}}

    See Also: keep_progress, drop_optimizer, cold_start
    """
    kept = without(mapping_of(checkpoint), (PROGRESS, OPTIMIZER, SCHEDULER, SCALER))
    if path_to_weights(checkpoint) == ():  # a bare state dict, in which "step" is a buffer
        return kept
    return like(kept, {key: 0 if key in COUNTS.keys else value for key, value in kept.items()})


@resuming
def keep_progress(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep everything, and refuse a checkpoint that training cannot go on from.

    Training can go on from a checkpoint that has an epoch or a step, and the state of an optimizer.
    If this strategy is given to `load_into`, that calls the model's own `on_load_checkpoint`, as
    Lightning does.

    Raises:
        TypeError: the checkpoint is not a dict.
        ValueError: the checkpoint lacks one of these.

    >>> keep_progress({"state_dict": {"a": torch.ones(1)}, "epoch": 3})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    anemoi_ckpt.MismatchError: the checkpoint: cannot go on from it: no optimizer; its keys are: ...

    See Also: reset_progress, warm_start
    """
    items = mapping_of(checkpoint)
    is_bare = path_to_weights(items) == ()  # a state dict, in which "step" is a buffer
    absent = [] if values_of(COUNTS, items) and not is_bare else ["epoch or step"]
    absent += [] if values_of(OPTIMIZER, items) and not is_bare else ["optimizer"]
    if absent:
        raise MismatchError(
            UNPLACED,
            f"cannot go on from it: no {', no '.join(absent)}; its keys are: {few(items)}",
            "cold_start begins anew from its weights",
        )
    return checkpoint


# ── variables ─────────────────────────────────────────────────────────────────────────────────


def variables(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Give the index of each variable by its name, for each dataset of an Anemoi checkpoint.

    They are read from ``hyper_parameters["data_indices"]``, or from the ``data_indices`` of a
    module that was pickled whole. These are an ``IndexCollection`` for each dataset, or a single
    one; its dataset is then called ``data``. The objects may be inert or real.

    Raises:
        ValueError: the checkpoint has no variables; the error says where they were looked for.

    >>> from types import SimpleNamespace as IndexCollection
    >>> indices = {"era5": IndexCollection(name_to_index={"2t": 0, "msl": 1})}
    >>> variables({"hyper_parameters": {"data_indices": indices}})
    {'era5': {'2t': 0, 'msl': 1}}

    See Also: require_variables
    """
    by_dataset = read_checkpoint(checkpoint)
    if not by_dataset:
        raise MismatchError(UNPLACED, NO_VARIABLES, "pass them by name where they are asked for")
    return {dataset: known.index for dataset, known in by_dataset.items()}


@factory
def require_variables(
    wanted: torch.nn.Module | Mapping[str, int] | Mapping[str, Mapping[str, int]],
) -> Strategy:
    """Refuse a checkpoint unless it has the wanted variables, each at the wanted index.

    Args:
        wanted: a model or a checkpoint that knows its variables, its ``data_indices``, a dict of
            name to index, or a dict of such dicts by dataset.

    Raises:
        TypeError: `wanted` holds no variables.
        ValueError: (the strategy) the checkpoint has no variables, or others; the error lists those
            added, removed and moved.

    >>> from types import SimpleNamespace as IndexCollection
    >>> known = {"data_indices": IndexCollection(name_to_index={"2t": 0, "msl": 1, "tp": 2})}
    >>> require_variables({"msl": 0, "2t": 1, "sst": 2})({"hyper_parameters": known})
    Traceback (most recent call last):
        ...
    anemoi_ckpt.MismatchError: the checkpoint: its variables are not those wanted
      data: added sst; removed tp; moved msl from 1 to 0, 2t from 0 to 1
      align_variables puts the weights into their order

    See Also: variables, align_variables
    """
    by_dataset = read_variables("require_variables", wanted)
    expected = {dataset: known.index for dataset, known in by_dataset.items()}

    def required(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        actual = variables(checkpoint)
        problems = "".join(
            f"\n  {dataset}: {differences(actual.get(dataset, {}), expected.get(dataset, {}))}"
            for dataset in dict.fromkeys((*expected, *actual))
            if actual.get(dataset) != expected.get(dataset)
        )
        if problems:
            raise MismatchError(
                UNPLACED,
                f"its variables are not those wanted{problems}",
                "align_variables puts the weights into their order",
            )
        return checkpoint

    return required


@factory
def align_edges(model: torch.nn.Module) -> Strategy:
    """Put trainable values of edges into the order of a model of anemoi-models 0.16 or newer.

    Such a model has its edges sorted by destination; older checkpoints have the values in the
    graph's own order. Other checkpoints are not changed. `load_into` does this by itself.

    Raises:
        TypeError: the model is not a module.
        ValueError: (the strategy) the order of the values is not known, or is not the model's; or
            the checkpoint has states of an optimizer, which are in the old order.

    >>> align_edges(torch.nn.Linear(1, 1))({"weight": torch.ones(1, 1)})
    {'weight': tensor([[1.]])}

    See Also: align_variables
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"align_edges takes a module, not {type(model).__name__}")
    return functools.partial(align_edges_of, model)


@factory
def align_variables(  # noqa: PLR0913 - by keyword
    source: Any = None,
    target: Any = None,
    layout: Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    new: Literal["model", "zeros"] | Mapping[str, str] = "model",
    units: Mapping[str, float] | None = None,
) -> Strategy:
    """Put the weights into the order of other variables: each variable keeps its slices.

    A slice is the part of a tensor that belongs to one variable, such as a column. Every axis that
    runs over variables is put into the new order, by name. Variables that both sides have keep
    their slices, whatever their index is now. Slices of removed variables are dropped, and new
    variables get `new`. If a variable is predicted on both sides but read on one side only, its
    output is a value on one side and an increment on the other: that output counts as new.

    If a model of Anemoi has another number of input or output steps, those that both sides have are
    kept: the first output steps, and the last input steps. New steps get `new`, as new variables.

    The result lists the target's variables in ``hyper_parameters``, under ``data_indices`` and
    ``metadata``, so a second alignment changes nothing. All else there (``config`` with the counts
    of steps, ``task``, ``statistics``, ``graph_data``) still describes the source's model. So if
    you save the result, load it into a model that was built from its own configuration, as
    `load_into` and ``anemoi-training train`` do; these read only ``data_indices`` and ``metadata``.
    But ``load_from_checkpoint`` without a ``config`` of your own would build the source's model.

    States of optimizers and averaged weights would be in the old order, so they are dropped. If the
    variables are the same already, the checkpoint is returned as it is.

    Args:
        source: the checkpoint's variables: name to index (by dataset if there are several), or
            ``data_indices``. None reads them from the checkpoint.
        target: the wanted variables, likewise. None reads them from the model's ``data_indices``.
        layout: for each glob of tensor names, the axes that run over variables, and for each axis
            its parts in order: ``{"encoder.weight": {1: ["input", "input", 4]}}`` is two steps of
            the inputs, then four channels of something else. A part is a count of channels, a list
            of variables, or ``"all"``, ``"input"``, ``"output"``, ``"prognostic"``, ``"forcing"``
            or ``"diagnostic"``: variables in the order of their indices. ``"new": "model"`` beside
            the axes overrides `new` for these tensors, as statistics need it. ``"model"`` in place
            of the axes takes the model's whole tensor. If the variables have no roles of their own,
            the layout lists them under ``"forcing"``, ``"diagnostic"`` and ``"target"``. A dict of
            layouts by dataset if there are several. None derives it with `anemoi_layout`.
        model: provides the slices of new variables, with its values at the time when the strategy
            runs. A tensor that needs such slices, but differs from the model's along other axes, is
            dropped.
        new: what new variables get. ``"model"`` is the model's slices. ``"zeros"`` is zeros, so
            that a new variable has no influence at first. A dict has one of these for each new
            variable, or the name of a variable of the checkpoint, whose slices are copied
            (``{"t_925": "t_850"}``); new variables that are not in the dict get ``"model"``.
        units: for each variable whose unit differs, how many of the model's units are one of the
            checkpoint's (``{"tp": 1000}`` from m to mm). The variable's factor in the normalisers
            of Anemoi's processors is divided by this number, and averaged weights are dropped. If
            both sides know their units, and these are equal, nothing is scaled, so a second
            alignment does not scale again.

    Raises:
        TypeError: variables, layout, model, `new` or `units` are of another kind.
        ValueError: one of them does not fit the others; (the strategy) the checkpoint has no
            variables; the two units of a variable are known and differ, and `units` has no factor
            for it; a glob chooses nothing; a tensor's size is not the sum that the layout gives
            (the error shows it); or no step can be matched with one of the model's.

    >>> layout = {"encoder.weight": {1: ["all", 1]}}
    >>> align = align_variables({"t": 0, "z": 1}, {"z": 0, "q": 1, "t": 2}, layout, new="zeros")
    >>> align({"encoder.weight": torch.tensor([[1.0, 2.0, 9.0]])})
    {'encoder.weight': tensor([[2., 0., 1., 9.]])}

    See Also: anemoi_layout, variables, require_variables, transfer_learning
    """
    return aligner(source, target, layout, model, new, {} if units is None else units)


@factory
def refresh_processors(model: Model, *, tendencies: bool = True, states: bool = False) -> Strategy:
    """Replace the statistics of the checkpoint's pre- and post-processors by the model's.

    The model's names may have fewer or more leading ``model.`` than the checkpoint's.

    Args:
        model: a module or a state dict, with values.
        tendencies: replace the statistics of tendencies.
        states: replace the statistics of states.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: the model has no processors, or is on the meta device; or neither `tendencies`
            nor `states` is True.

    >>> model = {"pre_processors_tendencies.mean": torch.ones(1)}
    >>> refresh_processors(model)({"model.pre_processors_tendencies.mean": torch.zeros(1)})
    {'model.pre_processors_tendencies.mean': tensor([1.])}

    See Also: merge, require_variables
    """
    if not (tendencies or states):
        raise ValueError("refresh_processors needs tendencies=True or states=True")
    processors = read_processors(
        state_dict_of("refresh_processors", model), tendencies=tendencies, states=states
    )
    refreshed = on_weights(functools.partial(refresh, processors=processors))
    return in_units_of(model, refreshed) if states else refreshed


@factory
def migrate(to: torch.nn.Module | str | None = None) -> Strategy:
    """Bring a checkpoint of Anemoi's training up to date, by the scripts of anemoi-models.

    These scripts, called migrations, rename layers and change configurations to what newer versions
    expect. Those that the checkpoint does not list under ``migrations`` are run, in their order.
    This needs no `trust`: the scripts get the checkpoint's objects as inert data, and placeholders
    for its tensors.

    Args:
        to: a version of anemoi-models: later migrations are not run. Or a model, which is passed to
            the migrations that ask for one. None is the installed version.

    Raises:
        TypeError: `to` is neither a version nor a module.
        ValueError: (the strategy) the checkpoint lists no migrations, or some that the installed
            anemoi-models does not have.
        ImportError: (the strategy) anemoi-models is not installed, or has no migrations.

    >>> migrate("0.13.0")
    migrate('0.13.0')

    See Also: transfer_learning, rename
    """
    if not (to is None or isinstance(to, str | torch.nn.Module)):
        raise TypeError(f"migrate takes a version or a module, not {type(to).__name__}")
    return functools.partial(migrated, to=to)


# ── recipes ───────────────────────────────────────────────────────────────────────────────────


@factory
def standard(model: Model) -> Strategy:
    """Load everything, and refuse weights that differ from the model in any name or shape.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: as for `require_match`.

    >>> standard({"a": torch.zeros(1)})({"epoch": 3, "state_dict": {"a": torch.ones(1)}})
    {'epoch': 3, 'state_dict': {'a': tensor([1.])}}

    See Also: require_match, warm_start, transfer_learning
    """
    return require_match(model)


@factory
def transfer_learning(
    model: Model,
    *,
    skip_mismatched: bool = True,
    new: Literal["model", "zeros"] | Mapping[str, str] = "model",
) -> Strategy:
    """Load the weights that fit the model, without the progress of the old training.

    If checkpoint and model both know their variables, and the model is one of anemoi-models, the
    weights are first put into the model's order by `align_variables`. That refuses tensors whose
    sizes it cannot explain, such as another count of trainable features. To leave such tensors out,
    put `exclude` before.
    Trainable values of edges are put into the model's order by `align_edges`.

    Args:
        model: a module or a state dict.
        skip_mismatched: drop tensors of another shape; False refuses them.
        new: what new variables get, as for `align_variables`.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: the model has no state dict; it is not one of anemoi-models, and `new` is not
            the default; (the strategy) as for `align_variables`, and for `require_match` if
            `skip_mismatched` is False.

    >>> pretrained = {"state_dict": {"a": torch.ones(1), "b": torch.ones(2)}, "epoch": 3}
    >>> transfer_learning({"a": torch.zeros(1), "b": torch.zeros(5)})(pretrained)
    {'state_dict': {'a': tensor([1.])}, 'epoch': 0}

    See Also: align_variables, filter_shapes, require_match, reset_progress
    """
    check = [] if skip_mismatched else [require_match(model, missing=False, unexpected=False)]
    edges = [align_edges(model)] if isinstance(model, torch.nn.Module) else []
    align = align_where_known(model, new)
    return compose(*edges, reset_progress, filter_shapes(model), *check, *align)


def weights_only(checkpoint: Any) -> Mapping[str, Any]:
    """Give the state dict and nothing else, as `weights` does.

    Raises:
        ValueError: the checkpoint has no state dict.

    >>> weights_only({"state_dict": {"a": torch.ones(1)}, "epoch": 3})
    {'a': tensor([1.])}

    See Also: weights, cold_start
    """
    return weights(checkpoint)


@factory
def warm_start(model: Model) -> Strategy:
    """Load everything to go on with training: the weights must match the model; progress is kept.

    If a checkpoint has averaged weights and the weights being trained, training goes on from the
    latter, as `training_weights` gives them. `load_into` calls the model's own
    `on_load_checkpoint`, as for `keep_progress`.

    Raises:
        TypeError: the model is neither a module nor a dict; (the strategy) the checkpoint is not a
            dict.
        ValueError: as for `require_match`; (the strategy) as for `keep_progress`.

    >>> stopped = {"state_dict": {"a": torch.ones(1)}, "epoch": 3, "optimizer_states": []}
    >>> warm_start({"a": torch.zeros(1)})(stopped) == stopped
    True

    See Also: keep_progress, require_match, cold_start
    """
    edges = [align_edges(model)] if isinstance(model, torch.nn.Module) else []
    return compose(require_match(model), *edges, keep_progress, training_weights)


def cold_start(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Load everything but the progress of training, to start anew from these weights.

    Raises:
        TypeError: the checkpoint is not a dict.

    >>> cold_start({"state_dict": {"a": torch.ones(1)}, "epoch": 3, "optimizer_states": []})
    {'state_dict': {'a': tensor([1.])}, 'epoch': 0}

    See Also: reset_progress, warm_start
    """
    return reset_progress(checkpoint)


# ── freeze ────────────────────────────────────────────────────────────────────────────────────


@no_strategy
def freeze(model: torch.nn.Module, *globs: str) -> list[str]:
    """Freeze the parameters that a glob or an exact name chooses, and list those newly frozen.

    This function changes its argument: it sets ``requires_grad`` of the model's parameters.

    Raises:
        TypeError: the model is not a module, or a glob is not a string.
        ValueError: there is no glob, or one chooses no parameter. Then nothing is changed.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> freeze(model, "0", "*.bias")
    ['0.weight', '0.bias', '1.bias']

    See Also: unfreeze
    """
    return set_requires_grad("freeze", model, globs, requires_grad=False)


@no_strategy
def unfreeze(model: torch.nn.Module, *globs: str) -> list[str]:
    """Unfreeze the parameters that a glob or an exact name chooses, and list those newly unfrozen.

    This function changes its argument: it sets ``requires_grad`` of the model's parameters.

    Raises:
        TypeError: the model is not a module, or a glob is not a string.
        ValueError: there is no glob, or one chooses no parameter. Then nothing is changed.

    >>> model = torch.nn.Linear(1, 1).requires_grad_(False)
    >>> unfreeze(model, "weight")
    ['weight']

    See Also: freeze
    """
    return set_requires_grad("unfreeze", model, globs, requires_grad=True)


# ── two names ─────────────────────────────────────────────────────────────────────────────────

# Pickles name our functions by a module that no `strategies.py` of a user's own hides. Both names
# are this one module.
sys.modules.setdefault("anemoi_ckpt.strategies", sys.modules[__name__])
for _function in [globals()[name] for name in __all__]:
    if _function.__module__ == __name__:  # `anemoi_layout` is another module's
        _function.__module__ = "anemoi_ckpt.strategies"
