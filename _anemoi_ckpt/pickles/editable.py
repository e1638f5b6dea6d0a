"""Inert objects that can be changed: OmegaConf's mappings, as the real ones can."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from _anemoi_ckpt.pickles.inert import Inert, InertMapping, walk


def editable(value: Any) -> Any:
    """Copy a configuration so that it can be changed, also within dicts."""
    if _is_config(value):
        return _Editor(copy.deepcopy(value, _tensors_of(value)))
    if isinstance(value, Inert) and value.inert_class.endswith(".HeteroData"):
        return _Graph(value)
    return {k: editable(v) for k, v in value.items()} if type(value) is dict else value


def _tensors_of(value: Any) -> dict[int, Any]:
    """Give a memo with which `copy.deepcopy` copies no tensor."""
    return {id(leaf): leaf for _, leaf in walk(value) if isinstance(leaf, torch.Tensor)}


def inert(value: Any) -> Any:
    """Give back the inert objects of what `editable` gave."""
    if isinstance(value, _Editor | _Graph):
        return value.inert
    return {k: inert(v) for k, v in value.items()} if type(value) is dict else value


class _Graph:
    """An inert graph of torch_geometric, which scripts ask for its keys."""

    def __init__(self, inert: Inert) -> None:
        """Take the inert object."""
        self.inert = inert

    def keys(self) -> list[str]:
        """Give no names: the real ones are of attributes (x, edge_index), and not of datasets."""
        return []


class _Editor(MutableMapping[str, Any]):
    """An inert OmegaConf mapping that can be changed as the real one can: by key and attribute."""

    inert: InertMapping
    nodes: dict[str, Any]

    def __init__(self, inert: InertMapping) -> None:
        """Take the inert object, whose content is changed."""
        vars(self).update(inert=inert, nodes=inert._inert_state["_content"])

    def __getitem__(self, key: str) -> Any:
        """Give a value, or the editor of one."""
        value = self.inert[key]
        return _Editor(value) if _is_config(value) else value

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a value, in a node as OmegaConf has it."""
        template = next(filter(_is_node, self.nodes.values()), None)
        self.nodes[key] = value if template is None else _node_like(template, key, value)

    def __delitem__(self, key: str) -> None:
        """Remove a value."""
        del self.nodes[key]

    def __iter__(self) -> Iterator[str]:
        """Go through the keys."""
        return iter(self.nodes)

    def __len__(self) -> int:
        """Count the values."""
        return len(self.nodes)

    def __getattr__(self, name: str) -> Any:
        """Give a value by attribute."""
        try:
            return self[name]
        except KeyError as err:
            raise AttributeError(name) from err

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a value by attribute."""
        self[name] = value


def _is_config(value: Any) -> bool:
    is_mapping = isinstance(value, InertMapping)
    return is_mapping and value.inert_class == "omegaconf.dictconfig.DictConfig"


def _is_node(value: Any) -> bool:
    return isinstance(value, Inert) and value.inert_class == "omegaconf.nodes.AnyNode"


def _node_like(template: Inert, key: str, value: Any) -> Any:
    """Make a node of the same parent."""
    node = copy.copy(template)
    state = dict(template._inert_state)
    metadata = copy.copy(state["_metadata"])
    metadata._inert_state = {**metadata._inert_state, "key": key}
    node._inert_state = {**state, "_val": value, "_metadata": metadata}
    return node
