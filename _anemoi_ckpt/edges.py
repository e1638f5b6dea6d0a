"""Trainable values of edges go to the edges that they were trained for.

anemoi-models 0.16 and newer sort a graph's edges by their destination: ``StaticGraphProvider``
(anemoi/models/layers/graph_provider.py) keeps the permutation in ``perm``, which is not saved, and
marks what it saves with ``trainable_layout_version``. A checkpoint without that mark has the values
(``trainable.trainable``) in the graph's own order, as anemoi-models' migration script
``1779202136_trainable_edge_perm_fix`` reads it.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from _anemoi_ckpt.anatomy import OPTIMIZER, like, path_to_weights, replaced, states_of, weights_of
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.graphs import Edges
from _anemoi_ckpt.variables import few

_VALUES = "trainable.trainable"
_MARK = "trainable_layout_version"


def in_edge_order(
    place: str, model: torch.nn.Module, state_dict: Mapping[str, Any], original: Iterable[str]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Put the values of edges into the model's order.

    Args:
        place: where the weights are from, for errors.
        model: the model that gets them.
        state_dict: the weights, by the model's names.
        original: the names that the checkpoint's weights had before any strategy.

    Returns:
        The state dict, with the model's marks where the checkpoint has none, and the names of the
        values that were put into another order, by this function or by a strategy before.

    Raises:
        MismatchError: the model's order is not that of the checkpoint, and one of them is unknown.
    """
    original = set(original)
    names = original | state_dict.keys()
    if _is_marked(names):
        _check_unsorted(place, model, state_dict)
    if _is_marked(original):
        return state_dict, ()
    sorting = _sorting(model)
    orders = {prefix: perm for prefix, perm in sorting.items() if prefix + _MARK not in state_dict}
    before = [p + _VALUES for p in sorting if p not in orders and p + _VALUES in state_dict]
    if not orders:
        return state_dict, tuple(before)
    values = {
        prefix + _VALUES: perm
        for prefix, perm in orders.items()
        if _has_rows(state_dict.get(prefix + _VALUES), len(perm))
    }
    model_tensors = model.state_dict(keep_vars=True)
    _check_known(place, model_tensors, names, values)
    ordered = {
        name: state_dict[name].detach().index_select(0, perm.to(state_dict[name].device))
        for name, perm in values.items()
    }
    marks = {
        prefix + _MARK: model_tensors[prefix + _MARK].detach().clone()
        for prefix in orders
        if prefix + _VALUES in state_dict
        or (
            prefix + _VALUES not in model_tensors
            and not state_dict.keys().isdisjoint(model_tensors)
        )
    }
    return like(state_dict, {**state_dict, **ordered, **marks}), (*before, *values)


def align_edges_of(model: torch.nn.Module, checkpoint: Any) -> Any:
    """Put the values of edges in a checkpoint into the model's order, as `in_edge_order` does.

    Raises:
        MismatchError: as for `in_edge_order`; or there are states of an optimizer, which are in the
            old order.
    """
    state_dict = weights_of(checkpoint)
    ordered, moved = in_edge_order(UNPLACED, model, state_dict, state_dict)
    if ordered is state_dict:
        return checkpoint
    if isinstance(checkpoint, Mapping):
        check_optimizer(UNPLACED, moved, states_of(OPTIMIZER, checkpoint))
    return replaced(checkpoint, path_to_weights(checkpoint) or (), ordered)


def checks_of_graph(
    model: torch.nn.Module, names: Collection[str], graph: Iterable[Edges]
) -> list[Callable[[], str]]:
    """Give what compares the edges that values were trained for with as many of the model's.

    Args:
        model: the model that gets the values.
        names: the names of the tensors that it gets.
        graph: the edges that the checkpoint keeps.

    Returns:
        Functions that say which values are of other edges, or nothing.
    """
    checks: list[Callable[[], str]] = []
    trained = [edges["edge_index"] for edges in graph]
    for prefix, provider in _providers(model):
        own = _in_order_of_graph(provider)
        theirs = [each for each in trained if each.shape == own.shape]
        if prefix + _VALUES in names and theirs and not own.is_meta:
            checks.append(functools.partial(_compared, prefix + _VALUES, own, theirs))
    return checks


def _compared(name: str, own: torch.Tensor, theirs: Iterable[torch.Tensor]) -> str:
    if any(torch.equal(each.cpu(), own.cpu()) for each in theirs):
        return ""
    return (
        "its graph has other edges than the model's, although as many, and these values run over"
        f" them: {name}"
    )


def _in_order_of_graph(provider: Any) -> torch.Tensor:
    """Give the edges of a module, which may have sorted them, in the order of its graph."""
    edge_index: torch.Tensor = provider.edge_index_base
    perm = getattr(provider, "perm", None)
    return edge_index if perm is None else edge_index.index_select(1, perm.argsort())


def check_optimizer(place: str, moved: Iterable[str], states: Any) -> None:
    """Refuse states of an optimizer for values that were put into another order.

    Raises:
        MismatchError: there are such states.
    """
    names = list(moved)
    if names and states:
        raise MismatchError(
            place,
            "the optimizer's states are in the graph's own order of edges, and the model's edges"
            f" are sorted: {few(names)}",
            "put drop_optimizer before, or load with a recipe that does not resume, as"
            " transfer_learning(model)",
        )


def _is_marked(names: Iterable[str]) -> bool:
    return any(str(name).rpartition(".")[2] == _MARK for name in names)


def _providers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Find the modules that hold a static graph's edges, with the prefix of their tensors."""
    for path, module in model.named_modules():
        if hasattr(module, "edge_index_base"):
            yield f"{path}." if path else "", module


def _sorting(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Find the permutations of edges, by the prefix of the module that sorts them."""
    return {
        prefix: perm
        for prefix, module in _providers(model)
        if isinstance(perm := getattr(module, "perm", None), torch.Tensor)
        and hasattr(module, _MARK)
    }


def _has_rows(values: Any, count: int) -> bool:
    return isinstance(values, torch.Tensor) and values.dim() > 0 and len(values) == count


def _check_unsorted(place: str, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse sorted values where the model has the edges in the graph's own order."""
    sorting = _sorting(model)
    unsorted = [
        prefix + _VALUES
        for prefix, _ in _providers(model)
        if prefix not in sorting and prefix + _VALUES in state_dict
    ]
    if unsorted:
        raise MismatchError(
            place,
            "its edges are sorted by destination, as by anemoi-models 0.16 and newer, and the"
            f" model's are not: {few(unsorted)}",
            "install a newer anemoi-models, or leave these out with exclude",
        )


def _check_known(
    place: str,
    model_tensors: Mapping[str, Any],
    names: Iterable[str],
    values: Mapping[str, torch.Tensor],
) -> None:
    """Refuse values whose order, or the model's, cannot be known."""
    hollow = [name for name, perm in values.items() if perm.is_meta]
    if hollow:
        raise MismatchError(
            place,
            "its edges are in the graph's own order, and the model's order of edges is on the meta"
            f" device: {few(hollow)}",
            "make the model on a real device, or leave these out with exclude",
        )
    buffers = {
        name
        for name, value in model_tensors.items()
        if not (isinstance(value, torch.nn.Parameter) or _is_marked([name]))
    }
    if values and buffers and buffers.isdisjoint(names):
        raise MismatchError(
            place,
            f"nothing tells whether its edges are sorted: it has neither a {_MARK} nor any other of"
            f" the model's buffers: {few(values)}",
            "load the whole checkpoint, or leave these out with exclude",
        )
