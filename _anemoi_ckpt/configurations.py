"""What the configurations of a checkpoint and a model say of channels, and no shape tells.

A checkpoint of a training run keeps its configuration among its hyper-parameters. A module that was
pickled whole has lost it (anemoi-training sets it to None before it pickles), but its own parts
tell most of it.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

compare · settings · read
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch

from _anemoi_ckpt.graphs import Edges, edge_attributes
from _anemoi_ckpt.layouts import find_core, regressors_of, untruncated
from _anemoi_ckpt.methods import NONE, SETTINGS, Processor, compared
from _anemoi_ckpt.variables import Variables, as_mapping, few, paired, read_model, whole_modules

REMEDY = "configure the model as the checkpoint's, or exclude these tensors"

Path = tuple[str | int, ...]
Roots = tuple[Any, ...]  # configurations of one model: what the first does not tell, the next may


class Setting(NamedTuple):
    """A setting that orders channels, on both sides; empty where it is unknown."""

    pattern: str  # of the names of the tensors that depend on it, below the core
    label: str
    theirs: list[str]
    own: list[str]


# ── compare ───────────────────────────────────────────────────────────────────────────────────


def configured_otherwise(
    model: torch.nn.Module,
    names: Collection[str],
    config: Roots,
    source: Mapping[str, Variables],
    before: Mapping[str, Variables] | None = None,
) -> str:
    """Describe the tensors whose channels the configurations order in another way; or empty.

    Args:
        model: the model that would take the tensors.
        names: the tensors' names in the model.
        config: of the checkpoint that they are from, as `read_config` gives it.
        source: the variables of that checkpoint; one dataset alone may have another name here.
        before: those that it was trained on, if these are known: it may have been aligned since.
    """
    prefix, own = _configured_model(model)
    processed = _processed(own, config, source, before, read_model(model))
    for setting in chain(_settings(own, config, source), processed):
        affected = _affected(prefix, setting.pattern, names)
        if affected and setting.theirs and setting.own and setting.theirs != setting.own:
            return _problem(setting, affected)
    return ""


def checks_of_edges(
    model: torch.nn.Module, names: Collection[str], config: Roots, told: Mapping[str, Any]
) -> list[Callable[[], str]]:
    """Give what compares the attributes of edges, where only values tell those of a checkpoint.

    Args:
        model: the model that would take the tensors.
        names: the tensors' names in the model.
        config: of the checkpoint that they are from, as `read_config` gives it.
        told: what its values tell, as `read_edges` gives it.

    Returns:
        Functions that describe the tensors which depend on attributes in another order, or none.
    """
    prefix, own = _configured_model(model) if told else ("", ())
    checks: list[Callable[[], str]] = []
    for pattern, paths in _edges(own):
        affected = _affected(prefix, pattern, names)
        setting = _setting(pattern, own, config, *paths)
        read = next(filter(None, (_item((told,), *path) for path in paths)), None)
        if affected and read and setting.own and not setting.theirs:
            checks.append(functools.partial(_compared_by_values, setting, affected, read))
    return checks


def _compared_by_values(setting: Setting, affected: list[str], read: Callable[[], Any]) -> str:
    known = setting._replace(theirs=read())
    return _problem(known, affected) if known.theirs and known.theirs != known.own else ""


def _affected(prefix: str, pattern: str, names: Iterable[str]) -> list[str]:
    matches = re.compile(re.escape(prefix) + pattern).fullmatch
    return [name for name in names if matches(name)]


def _problem(setting: Setting, affected: list[str]) -> str:
    return (
        f"the checkpoint was configured with {setting.label} = {few(setting.theirs)},"
        f" and the model with {few(setting.own)}, which {len(affected)} tensors depend on:"
        f" {few(affected)}"
    )


# ── settings ──────────────────────────────────────────────────────────────────────────────────


def _settings(own: Roots, config: Roots, source: Mapping[str, Variables]) -> Iterator[Setting]:
    """List the settings that order channels."""
    yield from _features(own, config)
    yield from _residuals(own, config)
    yield from _bounded(own, config, source)
    for pattern, paths in _edges(own):
        yield _setting(pattern, own, config, *paths)
    yield from _routes(own, config, source)
    yield from _aggregated(own, config)


def _features(own: Roots, config: Roots) -> Iterator[Setting]:
    for key in _keys(own, "decoders"):
        path: Path = ("decoders", key, "target_node_features")
        yield _setting(rf"decoder\.{re.escape(key)}\.emb_nodes_dst\..*", own, config, path)


def _residuals(own: Roots, config: Roots) -> Iterator[Setting]:
    for dataset in _keys(own, "residual", "datasets"):
        front, section = rf"residual\.{re.escape(dataset)}\.", ("residual", "datasets", dataset)
        yield _setting(f"{front}.*", own, config, (*section, "regressors"))
        skipped = _setting(
            f"{front}(filter|walias)", own, config, (*section, "skip_truncate_variables")
        )
        yield skipped._replace(theirs=sorted(skipped.theirs), own=sorted(skipped.own))


def _bounded(own: Roots, config: Roots, source: Mapping[str, Variables]) -> Iterator[Setting]:
    known = {name for variables in source.values() for name in variables.index}
    for dataset in _keys(own, "bounding", "datasets"):
        for place, _ in enumerate(_items(_item(own, "bounding", "datasets", dataset))):
            path: Path = ("bounding", "datasets", dataset, place, "variables")
            pattern = rf"boundings\.{re.escape(dataset)}\.{place}\.norm_min_val"
            setting = _setting(pattern, own, config, path)
            # those that a dataset lacks are left out
            yield setting._replace(theirs=[name for name in setting.theirs if name in known])


# what multiplies the attributes of edges, in mappers and processors (anemoi/models/layers)
_OF_EDGES = r"\.(.*\.)?(emb_edges|lin_edge|edge_pre_mlp)\..*"
_ATTRIBUTES = "sub_graph_edge_attributes"
_LEVELS = {  # modules between the mappers, and the section with the attributes of their edges
    "processor": "processor",
    "(down|up)_level_processor": "processor",
    "upscale": "upscale_mapper",
    "downscale": "downscale_mapper",
}


def _edges(own: Roots) -> Iterator[tuple[str, list[Path]]]:
    """List the attributes of edges, which stand in the order of the configuration."""
    for side in ("encoder", "decoder"):
        for key in _keys(own, f"{side}s"):  # from anemoi-models 0.19 on; before, one for all
            paths: list[Path] = [(f"{side}s", key, "mapper", _ATTRIBUTES), (side, _ATTRIBUTES)]
            yield rf"{side}\.{re.escape(key)}{_OF_EDGES}", paths
        yield rf"{side}\.\w+{_OF_EDGES}", [(side, _ATTRIBUTES)]
    for module, section in _LEVELS.items():
        yield module + _OF_EDGES, [(section, _ATTRIBUTES)]


def _routes(own: Roots, config: Roots, source: Mapping[str, Variables]) -> Iterator[Setting]:
    """List which datasets go through which encoder and decoder.

    An encoder may be there for more datasets than before, or for fewer.
    """
    for side, what in (("encoder", "source_datasets"), ("decoder", "target_datasets")):
        sections = {key: (f"{side}s", key, what) for key in _keys(own, f"{side}s")}
        here = {name for path in sections.values() for name in _texts(_item(own, *path))}
        if len(source) == 1 and source.keys().isdisjoint(here):
            continue
        for key, path in sections.items():
            setting = _setting(rf"{side}\.{re.escape(key)}\..*", own, config, path)
            theirs, ours = set(setting.theirs), set(setting.own)
            if not (theirs <= ours or ours <= theirs):
                yield setting


def _aggregated(own: Roots, config: Roots) -> Iterator[Setting]:
    """List the datasets whose channels stand side by side behind the encoders."""

    def order(roots: Roots) -> list[str]:
        kind = str(_item(roots, "latent_aggregator", "_target_"))
        if kind.rpartition(".")[2] != "ConcatAggregator":
            return []
        keys = _keys(roots, "encoders")
        return [n for key in keys for n in _texts(_item(roots, "encoders", key, "source_datasets"))]

    theirs, ours = order(config), order(own)
    if len(ours) > 1:
        modules = "|".join(("decoder", *_LEVELS))
        yield Setting(rf"({modules})\..*", "the latents of encoders", theirs, ours)


def _processed(
    own: Roots,
    config: Roots,
    source: Mapping[str, Variables],
    before: Mapping[str, Variables] | None,
    target: Mapping[str, Variables],
) -> Iterator[Setting]:
    """List the variables that processors without tensors change in another way.

    Which ones an aligned checkpoint had before may be unknown: then those that its own processors
    name.
    """
    for dataset, (old, new) in paired(before or source, target).items():
        theirs, ours = _processors(config, dataset), _processors(own, dataset)
        named = {name for each in theirs for name in each.methods}
        both = [n for n in new.index if n in old.index and (before or n in named)]
        different = compared(theirs, ours, both) if theirs and ours else {}
        for name, sides in different.items():
            yield Setting(r"(en|de)coder\..*", f"data.{dataset}.processors of {name}", *sides)


def _setting(pattern: str, own: Roots, config: Roots, *paths: Path) -> Setting:
    """Read a setting from the first of several places that tells it, on each side."""
    ours, theirs = (
        next(filter(None, (_texts(_item(roots, *path)) for path in paths)), list[str]())
        for roots in (own, config)
    )
    return Setting(pattern, ".".join(map(str, paths[0])), theirs, ours)


# ── read ──────────────────────────────────────────────────────────────────────────────────────


def read_config(checkpoint: Any) -> Roots:
    """Read the configuration of the model that a checkpoint is of, as far as it is known.

    It is ``config`` among the hyper-parameters, or what a module that was pickled whole tells.
    """
    told = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    configs = [told["config"]] if isinstance(told, Mapping) and "config" in told else []
    for module in whole_modules(checkpoint):
        levels = _levels(module)
        if levels:
            configs += [_told(levels, levels[-1]), getattr(module, "config", None)]
    return tuple(configs)


def read_edges(checkpoint: Any, graph: tuple[Edges, ...]) -> Mapping[str, Any]:
    """Give what reads the attributes of edges from the values of a module that was pickled whole.

    Args:
        checkpoint: that may have such a module, or be one.
        graph: the edges that it keeps.

    Returns:
        A configuration with functions in the place of the attributes; empty if there is no module.
    """
    cores = [levels[-1] for module in whole_modules(checkpoint) if (levels := _levels(module))]
    return {"model": _told_by_values(cores[0], graph)} if cores and graph else {}


def _configured_model(model: torch.nn.Module) -> tuple[str, Roots]:
    """Give the prefix of a model's core, and its configurations; none if it is not Anemoi's."""
    try:
        prefix, core = find_core(model)
    except ValueError:
        return "", ()
    return prefix, (_told(model.modules(), core), *_configs_of(model))


def _configs_of(model: torch.nn.Module) -> Iterator[Any]:
    """Give the configurations that the modules of a model keep."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), Mapping):
            yield module.config


def _levels(module: Any) -> list[Any]:
    """Give a module that was pickled whole and those in it, to its encoder-processor-decoder.

    Nothing if it has none.
    """
    levels = []
    for _ in range(3):  # of the interface, which may be in a training module
        levels.append(module)
        if all(hasattr(module, name) for name in ("encoder", "decoder", "boundings")):
            return levels
        module = getattr(module, "model", None)
    return []


_FEATURES = {  # classes of anemoi/models/layers/target_features.py, by the name in a configuration
    "EncodedDataFeature": "encoded_data",
    "CoordinatesFeature": "coordinates",
    "TrainableParametersFeature": "trainable_parameters",
    "InputForcingsFeature": "forcings",
    "PrognosticsFeature": "prognostics",
}


def _told(modules: Iterable[Any], core: Any) -> dict[str, Any]:
    """Give what modules tell by themselves, as a configuration does."""
    several = (_children(getattr(module, "pre_processors", {})) for module in modules)
    by_dataset = next(filter(None, several), {})
    processors = {
        dataset: _children(getattr(each, "processors", {})) for dataset, each in by_dataset.items()
    }
    return {
        "model": _described(core),
        "data": {
            "datasets": {
                dataset: {"processors": {name: _processor(one) for name, one in each.items()}}
                for dataset, each in processors.items()
                if all(map(_has_methods, each.values()))
            }
        },
    }


def _has_methods(module: Any) -> bool:
    """Tell whether a module is as Anemoi's processors are, and none of the user's own kind."""
    return hasattr(module, "default") and isinstance(getattr(module, "methods", None), Mapping)


def _processor(module: Any) -> Processor:
    methods = {str(name): str(method) for name, method in module.methods.items()}
    options = as_mapping(getattr(module, "method_kwargs", None))
    return Processor(_class_name(module), str(module.default), methods, options)


def _described(core: Any) -> dict[str, Any]:
    """Describe a core, built or pickled, as the section ``model`` of a configuration does."""
    routes = {side: dict(getattr(core, f"{side}2datasets", {})) for side in ("encoder", "decoder")}
    targets = dict(getattr(core, "decoders_target_input", {}))
    residuals = _children(getattr(core, "residual", {}))
    boundings = _children(core.boundings)
    aggregator = _class_name(getattr(core, "latent_aggregator", None))
    return {
        "encoders": {key: {"source_datasets": each} for key, each in routes["encoder"].items()},
        "decoders": {
            key: {
                "target_datasets": routes["decoder"].get(key, ()),
                "target_node_features": [
                    _feature_name(each) for each in getattr(targets.get(key), "features", ())
                ],
            }
            for key in routes["decoder"] | targets
        },
        "residual": {
            "datasets": {
                dataset: {
                    "regressors": regressors_of(core, dataset, residual),
                    "skip_truncate_variables": untruncated(core, dataset, residual),
                }
                for dataset, residual in residuals.items()
            }
        },
        "bounding": {
            "datasets": {
                dataset: [{"variables": getattr(each, "variables", ())} for each in several]
                for dataset, several in (
                    (d, _children(each).values()) for d, each in boundings.items()
                )
            }
        },
        "latent_aggregator": {"_target_": aggregator},
    }


def _told_by_values(core: Any, graph: tuple[Edges, ...]) -> dict[str, Any]:
    """Describe the attributes of edges of a core that was pickled by what reads them.

    Its tensors tell their order, compared with those of the graph.
    """

    def attributes(name: str, dataset: str = "") -> dict[str, Any]:
        provider = getattr(core, name, {})
        if "edge_attr" not in getattr(provider, "_buffers", {}):  # one for each dataset, or level
            several = _children(provider)
            provider = several.get(dataset, next(iter(several.values()), None))
        return {_ATTRIBUTES: functools.partial(edge_attributes, provider, graph)}

    def of_mappers(side: str) -> dict[str, Any]:
        routes = dict(getattr(core, f"{side}2datasets", {}))
        return {
            key: {"mapper": attributes(f"{side}_graph_provider", next(iter(datasets), ""))}
            for key, datasets in routes.items()
        }

    return {
        **{f"{side}s": of_mappers(side) for side in ("encoder", "decoder")},
        **{side: attributes(f"{side}_graph_provider") for side in ("encoder", "decoder")},
        "processor": attributes("processor_graph_provider"),
        "upscale_mapper": attributes("upscale_graph_providers"),
        "downscale_mapper": attributes("downscale_graph_providers"),
    }


def _feature_name(feature: Any) -> str:
    """Name a feature of targets; one that was pickled tells its class alone."""
    kind = _class_name(feature)
    return _FEATURES.get(kind) or str(getattr(feature, "name", kind))


def _children(container: Any) -> Mapping[str, Any]:
    """Give the modules in a container of modules, built or pickled."""
    children: Mapping[str, Any] = getattr(container, "_modules", container)
    return children


def _class_name(value: Any) -> str:
    """Name the class of an object, inert or not."""
    return str(getattr(value, "inert_class", type(value).__name__)).rpartition(".")[2]


def _keys(roots: Roots, *path: str) -> list[str]:
    section = _item(roots, *path)
    return [str(key) for key in section] if isinstance(section, Mapping) else []


def _item(roots: Roots, *path: str | int) -> Any:
    """Give what the first of several configurations tells at a path in its section ``model``."""
    return _at(roots, "model", *path)


def _at(roots: Roots, *path: str | int) -> Any:
    """Give what the first of several configurations tells at a path."""
    found = (_under(root, root, path, _REFERENCES) for root in roots)
    return next((value for value in found if value is not None), None)


def _processors(roots: Roots, dataset: str) -> list[Processor]:
    """Give the processors of a dataset in their order, or of the only one; none if unknown."""
    keys = list(as_mapping(_at(roots, "data", "datasets")))
    key = keys[0] if len(keys) == 1 else dataset
    path = ("data", "datasets", key, "processors")
    try:
        return [_configured(roots, (*path, name)) for name in as_mapping(_at(roots, *path))]
    except LookupError:
        return []


def _configured(roots: Roots, path: Path) -> Processor:
    """Describe a processor by its configuration, unless a module told it.

    Raises:
        LookupError: it refers to what is not there.
    """
    section = _at(roots, *path)
    if isinstance(section, Processor):
        return section
    config = as_mapping(_plain(roots, _at(roots, *path, "config")))
    methods = {
        name: str(method)
        for method in config
        if method not in SETTINGS
        for name in _names(config[method])
    }
    kind = str(_plain(roots, _at(roots, *path, "_target_"))).rpartition(".")[2]
    options = as_mapping(config.get("method_kwargs"))
    return Processor(kind, str(config.get("default") or NONE), methods, options)


def _plain(roots: Roots, value: Any, depth: int = 0) -> Any:
    """Put what they refer to in the place of all references in a setting.

    Raises:
        LookupError: one refers to what is not there, to a part of a text, or to itself.
    """
    if isinstance(value, str) and "${" in value:
        reference = _REFERENCE.fullmatch(value)
        value = _at(roots, *reference[1].split(".")) if reference else None
        if value is None:
            raise LookupError("a reference")
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    if depth == _REFERENCES:
        raise LookupError("a reference to itself")
    if isinstance(value, Mapping):
        return {key: _plain(roots, _value(value, key), depth + 1) for key in value}
    return [_plain(roots, each, depth + 1) for each in value]


def _names(value: Any) -> list[str]:
    """Make a list of the names of variables, of which a configuration may have one alone."""
    return [value] if isinstance(value, str) and value != NONE else _texts(value)


_REFERENCES = 8  # from one setting to another, at most
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # OmegaConf's, to a path from the root


def _under(root: Any, value: Any, path: Iterable[str | int], references: int) -> Any:
    """Give the item of a configuration, inert or not, at a path; None if there is none."""
    for key in path:
        if isinstance(key, int):
            items = _items(value)
            value = items[key] if key < len(items) else None
        else:
            value = _value(value, key)
        reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if reference is not None and references:
            value = _under(root, root, reference[1].split("."), references - 1)
    return value


def _value(section: Any, key: Any) -> Any:
    """Give a setting; None for one that OmegaConf refuses, as it refers to what is not there."""
    if not isinstance(section, Mapping):
        return None
    try:
        return section.get(key)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return None


def _items(value: Any) -> list[Any]:
    """Make a list of a configuration's list, inert or not; an empty one of anything else."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []


def _texts(value: Any) -> list[str]:
    """Make a list of texts; an empty one if there are none, or if one refers to another setting."""
    texts = [str(item) for item in _items(value)]
    return [] if any("${" in text for text in texts) else texts
