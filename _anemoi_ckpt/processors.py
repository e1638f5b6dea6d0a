"""The statistics of Anemoi's pre- and post-processors in a state dict.

Anemoi's models (anemoi-models 0.13) keep them under ``pre_processors`` and ``post_processors`` for
states, and under ``pre_processors_tendencies`` and ``post_processors_tendencies`` for tendencies,
with any number of leading ``model.``.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from _anemoi_ckpt.anatomy import like
from _anemoi_ckpt.tensors import snapshot
from _anemoi_ckpt.variables import few

_PROCESSOR = re.compile(
    r"(?P<prefix>(?:model\.)*)(?P<name>(?:pre|post)_processors(?P<tendencies>_tendencies)?\..*)"
)


@dataclass(frozen=True)
class Processors:
    """A model's processors: those of the tendencies, those of the states, or both."""

    values: dict[str, Any]  # by name without the prefix
    prefix: str  # of the model's names: "", "model.", …
    tendencies: bool  # do the values include those of the tendencies?
    states: bool  # do the values include those of the states?

    def include(self, match: re.Match[str]) -> bool:
        """Tell whether a name is that of a processor of the kinds that the values include."""
        return self.tendencies if match["tendencies"] else self.states


def read_processors(model: Mapping[str, Any], *, tendencies: bool, states: bool) -> Processors:
    """Copy the values of a model's processors.

    Args:
        model: the model's state dict.
        tendencies: take those of the tendencies.
        states: take those of the states.

    Raises:
        ValueError: the model has no processors, or its processors are on the meta device.
    """
    matches = {name: match for name in model if (match := _PROCESSOR.fullmatch(name))}
    if not matches:
        raise ValueError(
            f"the model has no pre_processors or post_processors; it has: {few(model)}"
        )
    if any(isinstance(model[name], torch.Tensor) and model[name].is_meta for name in matches):
        raise ValueError("refresh_processors cannot take values from a model on the meta device")
    prefix = next(match["prefix"] for match in matches.values())
    processors = Processors({}, prefix, tendencies, states)
    for name, match in matches.items():
        if processors.include(match):
            processors.values[match["name"]] = snapshot(model[name])
    return processors


def refresh(state_dict: Mapping[str, Any], processors: Processors) -> dict[str, Any]:
    """Put a model's processors in the place of those of a state dict.

    Entries that only the model has are added, and those that only the state dict has are dropped.
    """
    prefixes: dict[str, str] = {}  # by name without the prefix
    items: dict[str, Any] = {}
    for name, value in state_dict.items():
        match = _PROCESSOR.fullmatch(name)
        if match is not None:
            prefixes[match["name"]] = match["prefix"]
        if match is None or not processors.include(match):
            items[name] = value
        elif match["name"] in processors.values:
            items[name] = processors.values[match["name"]]
    prefix = next(iter(prefixes.values()), processors.prefix)
    added = {
        prefix + name: value for name, value in processors.values.items() if name not in prefixes
    }
    return like(state_dict, items | added)
