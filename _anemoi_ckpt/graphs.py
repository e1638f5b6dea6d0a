"""The graph that a checkpoint's weights were trained on, as far as the checkpoint keeps it.

Anemoi's training modules keep it as ``graph_data`` among their hyper-parameters, and modules that
were pickled whole as an attribute. It is a ``HeteroData`` of torch_geometric, or one by dataset.
That has a storage for each type of edges in ``_edge_store_dict``, which has its tensors by name in
``_mapping`` (torch_geometric/data/hetero_data.py and storage.py).

Ground floor: it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from _anemoi_ckpt.tensors import is_strided
from _anemoi_ckpt.variables import as_mapping, kept

Edges = Mapping[str, Any]  # of one type: edge_index, and attributes by name


def read_graph(checkpoint: Any) -> tuple[Edges, ...]:
    """Give the edges of each type that a checkpoint keeps; none if it keeps no graph."""
    graphs: list[Any] = []
    for graph in kept(checkpoint, "graph_data"):
        graphs += graph.values() if isinstance(graph, Mapping) else [graph]
    stores = [
        as_mapping(getattr(store, "_mapping", None))
        for graph in graphs
        for store in as_mapping(getattr(graph, "_edge_store_dict", None)).values()
    ]
    return tuple(each for each in stores if is_strided(each.get("edge_index")))


def edge_attributes(provider: Any, graph: tuple[Edges, ...]) -> list[str]:
    """Name the attributes of edges in the order in which a module has them; none if unknown.

    Args:
        provider: the module that holds a graph's edges (anemoi/models/layers/graph_provider.py),
            built or pickled.
        graph: the edges that it was made of.
    """
    buffers: Mapping[str, Any] = getattr(provider, "_buffers", {})
    edge_index, values = (buffers.get(n) for n in ("edge_index_base", "edge_attr"))
    if not isinstance(edge_index, torch.Tensor) or not isinstance(values, torch.Tensor):
        return []

    def in_order(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        perm = buffers.get("perm")  # None before anemoi-models 0.16
        return tensor if perm is None else tensor.index_select(axis, perm)

    for edges in graph:
        theirs = edges["edge_index"]
        if theirs.shape == edge_index.shape and torch.equal(in_order(theirs, 1), edge_index):
            attributes = {
                name: in_order(each, 0).to(values.dtype)
                for name, each in edges.items()
                if is_strided(each) and each.dim() == values.dim() and len(each) == len(values)
            }
            return _side_by_side(attributes, values)
    return []


def _side_by_side(attributes: Mapping[str, torch.Tensor], values: torch.Tensor) -> list[str]:
    """Name the attributes that make up the columns of values; none if there are others."""
    named: list[str] = []
    column = 0
    while column < values.shape[1]:
        following = (
            name
            for name, each in attributes.items()
            if name not in named and torch.equal(each, values[:, column : column + each.shape[1]])
        )
        name = next(following, None)
        if name is None:
            return []
        named.append(name)
        column += attributes[name].shape[1]
    return named
