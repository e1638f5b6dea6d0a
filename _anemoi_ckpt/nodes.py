"""Weights of nodes go to the nodes that they were trained for.

Anemoi's models keep the sines and cosines of their nodes' latitudes and longitudes beside the
weights: ``node_attributes.latlons_{nodes}`` (anemoi/models/layers/graph.py, NamedNodesAttributes).
A model with as many nodes in other places has other coordinates there. It would get the
checkpoint's, and with these the trainable values of other nodes and edges.

Ground floor: it imports torch and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from _anemoi_ckpt.errors import MismatchError
from _anemoi_ckpt.tensors import is_strided

_COORDINATES = re.compile(r"(.*\.)?node_attributes\.latlons_(?P<nodes>.+)")
_LEAST = 1e-5  # radians: 64 m; recomputed in float32, sines and cosines differ by 1e-7


def check_nodes(place: str, model_tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse coordinates of nodes that are not those of the model.

    Args:
        place: where the values are from, for the error.
        model_tensors: the model's tensors, by name.
        values: what it would get, by name, in the model's shapes.

    Raises:
        MismatchError: some nodes are in other places.
    """
    for name, value in values.items():
        match = _COORDINATES.fullmatch(name)
        if match is None:
            continue
        moved = _moved(value, model_tensors.get(name))
        if moved:
            nodes = match["nodes"]
            raise MismatchError(
                place,
                f"{moved} of the {len(value)} nodes of {nodes} are in other places than the"
                f" model's, by {name}",
                f"exclude('*.latlons_{nodes}', '*.trainable_tensors.{nodes}',"
                " '*graph_provider*.trainable', missing_ok=True) leaves out what runs over nodes"
                " and edges",
            )


def _moved(value: Any, own: Any) -> int:
    """Count the nodes that have other coordinates; none if one side cannot tell."""
    known = is_strided(value) and is_strided(own) and not (value.is_meta or own.is_meta)
    if not known or value.shape != own.shape or not value.is_floating_point():
        return 0
    allowed = max(_LEAST, *(torch.finfo(each.dtype).eps for each in (value, own)))
    distance = (value.detach().double().cpu() - own.detach().double().cpu()).abs()
    return int((distance > allowed).flatten(1).any(1).sum())
