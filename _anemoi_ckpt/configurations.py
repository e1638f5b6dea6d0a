"""What the configurations of a checkpoint and a model say of channels, and no shape tells.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from _anemoi_ckpt.layouts import find_core, regressors_of
from _anemoi_ckpt.variables import Variables, few

Setting = tuple[str, tuple[str | int, ...], list[str]]  # prefix of tensors, path, the model's value


def read_config(checkpoint: Any) -> Any:
    """Give the section ``model`` of the configuration among a checkpoint's hyper-parameters."""
    return _item(checkpoint, "hyper_parameters", "config", "model")


def configured_otherwise(
    model: torch.nn.Module,
    names: Collection[str],
    config: Any,
    source: Mapping[str, Variables],
) -> str:
    """Describe the tensors whose channels the configurations order in another way; or empty.

    Args:
        model: the model that would take the tensors.
        names: the tensors' names in the model.
        config: the configuration of the checkpoint that they are from, as `read_config` gives it.
        source: the variables of that checkpoint; one dataset alone may have another name here.
    """
    try:
        prefix, core = find_core(model)
    except ValueError:  # not a model of anemoi-models
        return ""
    routes = _routes(core) if len(source) > 1 else iter(())
    known = {name for variables in source.values() for name in variables.index}
    for front, path, value in (*_settings(core), *routes):
        theirs = _texts(_item(config, *path))
        if path[-1] == "variables":  # those that a dataset lacks are left out
            theirs = [name for name in theirs if name in known]
        affected = [name for name in names if name.startswith(prefix + front)]
        if affected and theirs and theirs != value:
            return (
                f"the checkpoint was configured with {'.'.join(map(str, path))} = {few(theirs)},"
                f" and the model with {few(value)}, which {len(affected)} tensors depend on:"
                f" {few(affected)}"
            )
    return ""


def _settings(core: Any) -> Iterator[Setting]:
    """List the settings that order channels."""
    for key, target in getattr(core, "decoders_target_input", {}).items():
        features = [feature.name for feature in target.features]
        yield f"decoder.{key}.emb_nodes_dst.", ("decoders", key, "target_node_features"), features
    for dataset, residual in getattr(core, "residual", {}).items():
        names = regressors_of(core, dataset, residual)
        yield f"residual.{dataset}.", ("residual", "datasets", dataset, "regressors"), names
    for dataset, boundings in core.boundings.items():
        for place, bounding in enumerate(boundings):
            names = list(getattr(bounding, "variables", ()))
            path = ("bounding", "datasets", dataset, place, "variables")
            yield f"boundings.{dataset}.{place}.norm_min_val", path, names


def _routes(core: Any) -> Iterator[Setting]:
    """List which datasets go through which encoder and decoder."""
    for key, datasets in getattr(core, "encoder2datasets", {}).items():
        yield f"encoder.{key}.", ("encoders", key, "source_datasets"), list(datasets)
    for key, datasets in getattr(core, "decoder2datasets", {}).items():
        yield f"decoder.{key}.", ("decoders", key, "target_datasets"), list(datasets)


def _item(config: Any, *path: str | int) -> Any:
    """Give the item at a path of a configuration, inert or not; None if there is none."""
    for key in path:
        if isinstance(key, int):
            items = _items(config)
            config = items[key] if key < len(items) else None
        else:
            config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _items(value: Any) -> list[Any]:
    """Make a list of a configuration's list, inert or not; an empty one of anything else."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []


def _texts(value: Any) -> list[str]:
    """Make a list of texts; an empty one if there are none, or if one refers to another setting."""
    texts = [str(item) for item in _items(value)]
    return [] if any("${" in text for text in texts) else texts
