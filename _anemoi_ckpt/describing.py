"""What Anemoi's metadata say of variables: names, roles, indices and units.

They are a dict: a checkpoint has it in its hyper-parameters, and as JSON in its archive; a model
of anemoi-models has it in its interface. Those from before datasets had names describe one alone.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

read · units · describe
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any

import torch

from _anemoi_ckpt.anatomy import (
    like,
    path_to_weights,
    replaced,
    weights_of,
    without_averages,
)
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.tensors import change_tensors
from _anemoi_ckpt.variables import ROLES, Variables, as_mapping, few, paired

Units = Mapping[str, Mapping[str, str]]  # by dataset and variable
SECTIONS = ("dataset", "data_indices", "metadata_inference")  # of metadata: what has variables
_PARTS = ("input", "output")  # of Anemoi's indices
_NORMALISER = re.compile(
    r"(?:.*\.)?(?:pre|post)_processors(?:_tendencies)?\.(?P<dataset>[^.]+)\..*_norm_(?P<what>mul|add)"
)


# ── read ──────────────────────────────────────────────────────────────────────────────────────


def metadata_of(checkpoint: Any) -> Mapping[str, Any]:
    """Give Anemoi's metadata of a checkpoint's hyper-parameters, or of a module; empty if none."""
    parameters = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    holders = [parameters.get("metadata")] if isinstance(parameters, Mapping) else []
    if isinstance(checkpoint, torch.nn.Module):
        holders = [getattr(module, "metadata", None) for module in checkpoint.modules()]
    known = (each for each in holders if isinstance(each, Mapping) and "dataset" in each)
    return next(known, {})


def read_units(checkpoint: Any) -> dict[str, dict[str, str]]:
    """Read the units of variables, by dataset, of a checkpoint or a model; empty if none are known.

    >>> facts = {"tp": {"units": "m"}, "lsm": {}}
    >>> known = {"metadata": {"dataset": {"data": {"variables_metadata": facts}}}}
    >>> read_units({"hyper_parameters": known})
    {'data': {'tp': 'm'}}
    """
    entries = _by_dataset(metadata_of(checkpoint).get("dataset"))
    units = {dataset: _units_in(entry) for dataset, entry in entries.items()}
    return {dataset: known for dataset, known in units.items() if known}


def _units_in(entry: Mapping[str, Any]) -> dict[str, str]:
    facts = as_mapping(entry.get("variables_metadata"))
    return {name: each["units"] for name, each in facts.items() if _has_units(each)}


def variables_in(metadata: Any) -> dict[str, dict[str, str]]:
    """Give the variables of each dataset that metadata describe, in their order, with their units.

    >>> variables_in({"dataset": {"variables": ["tp"], "variables_metadata": {}}})
    {'data': {'tp': ''}}
    """
    entries = _by_dataset(metadata.get("dataset")) if isinstance(metadata, Mapping) else {}
    found = {}
    for dataset, entry in entries.items():
        names, units = entry.get("variables"), _units_in(entry)
        listed = names if isinstance(names, list | tuple) else ()
        found[dataset] = {str(name): units.get(name, "") for name in listed}
    return {dataset: named for dataset, named in found.items() if named}


def _has_units(facts: Any) -> bool:
    return isinstance(facts, Mapping) and isinstance(facts.get("units"), str)


def _by_dataset(section: Any) -> dict[str, Any]:
    """Give a section's entry for each dataset; where it has no names of datasets, of ``data``."""
    if not isinstance(section, Mapping):
        return {}
    if "variables" in section or "variables_metadata" in section:
        return {"data": section}
    return {name: entry for name, entry in section.items() if isinstance(entry, Mapping)}


# ── units ─────────────────────────────────────────────────────────────────────────────────────


def check_factors(units: Any, target: Mapping[str, Variables]) -> None:
    """Check the factors between units that a user gives.

    Raises:
        TypeError: they are no dict of numbers by variable.
        ValueError: one is not positive, or for a variable that the target lacks.
    """
    numbers = isinstance(units, Mapping) and all(
        isinstance(factor, int | float) and not isinstance(factor, bool)
        for factor in units.values()
    )
    if not numbers:
        raise TypeError(
            "units is a dict: for a variable, how many of the model's units one of the"
            f" checkpoint's is, as in {{'tp': 1000}}; not {units!r}"
        )
    wrong = [name for name, factor in units.items() if not (isfinite(factor) and factor > 0)]
    if wrong:
        raise ValueError(f"units has factors that are not positive: {few(wrong)}")
    unknown = [name for name in units if not any(name in each.index for each in target.values())]
    if unknown:
        raise ValueError(f"units has variables that are not among the wanted ones: {few(unknown)}")


def differing_units(source: Units, target: Units) -> list[str]:
    """List the variables whose units both sides know, and which differ.

    >>> differing_units({"data": {"tp": "m", "msl": "Pa"}}, {"data": {"tp": "mm", "msl": "Pa"}})
    ['tp is in m in the checkpoint and in mm in the model']
    """
    pairs = paired(source, target).values()
    return [
        f"{name} is in {old[name]} in the checkpoint and in {unit} in the model"
        for old, new in pairs
        for name, unit in new.items()
        if old.get(name, unit).strip() != unit.strip()
    ]


def check_units(place: object, model: Any, names: Iterable[str], source: Units) -> None:
    """Refuse tensors that are for other units than the model's.

    These are the normalisers of Anemoi's processors: behind them there are no units. In a model
    without processors, they may be any tensors.

    Args:
        place: whose tensors they are, for the error.
        model: the model that would take the tensors.
        names: the tensors' names.
        source: the units that the tensors are for.

    Raises:
        MismatchError: both sides know the units of a variable, and they differ.
    """
    problems = differing_units(source, read_units(model)) if source else []
    if not problems:
        return
    has_processors = any(map(_NORMALISER.fullmatch, model.state_dict()))
    if any(_NORMALISER.fullmatch(name) or not has_processors for name in names):
        raise MismatchError(place, f"units differ: {few(problems)}", _UNITS_ADVICE)


_UNITS_ADVICE = (
    "align_variables(model=model, units={'its name': how many of the model's units one of the"
    " checkpoint's is}) scales the normaliser, refresh_processors(model, states=True) takes the"
    " model's"
)


def in_units_of(model: Any, refresh: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Note that a strategy leaves normalisers for the units of a model."""
    units = read_units(model)

    def refreshed(checkpoint: Any) -> Any:
        return _with_units(refresh(checkpoint), units)

    return refreshed if units else refresh


def rescaled(
    checkpoint: Any,
    source: Mapping[str, Variables],
    target: Mapping[str, Variables],
    units: Units,
    factors: Mapping[str, float],
) -> Any:
    """Scale the normalisers of a checkpoint to other units of its variables.

    A normaliser multiplies what the model reads and then adds to it, so one for values that are
    1,000 times as large has a factor of a thousandth.

    Args:
        checkpoint: the checkpoint, which is not modified.
        source: its variables, by dataset.
        target: the wanted ones, whose factors and units count.
        units: the units of these.
        factors: for a variable, how many of the target's units one of the checkpoint's is.

    Raises:
        MismatchError: units differ for which there is no factor.
    """
    before = read_units(checkpoint)
    pending = _without_equal(factors, before, units)
    state_dict = weights_of(checkpoint)
    wanted = {d: {n: u for n, u in each.items() if n not in factors} for d, each in units.items()}
    problems = differing_units(before, wanted)
    if problems and any(map(_NORMALISER.fullmatch, state_dict)):
        raise MismatchError(UNPLACED, f"units differ: {few(problems)}", _UNITS_ADVICE)
    scales = {
        dataset: {old.index[n]: pending[n] for n in pending if n in old.index and n in new.index}
        for dataset, (new, old) in paired(target, source).items()
    }
    if not any(scales.values()):
        return checkpoint
    chosen = {name: found for name in state_dict if (found := _scales_of(name, scales)) is not None}
    if not chosen:
        raise MismatchError(
            UNPLACED,
            f"it has no normaliser of Anemoi's processors to scale for {few(pending)}",
            "leave units out if its weights do not depend on units",
        )

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        divisors = torch.ones(len(tensor), dtype=tensor.dtype, device=tensor.device)
        for position, factor in chosen[name]:
            divisors[position] = factor
        return tensor / divisors

    path = path_to_weights(checkpoint) or ()
    result = replaced(checkpoint, path, change_tensors(state_dict, chosen, scaled))
    result = without_averages(result) if path else result
    return _with_units(result, units)


def _scales_of(
    name: str, scales: Mapping[str, Mapping[int, float]]
) -> tuple[tuple[int, float], ...] | None:
    """Give the positions in a tensor to scale, with their factors; None if it is no factor."""
    match = _NORMALISER.fullmatch(name)
    if match is None or match["what"] != "mul":
        return None
    only = next(iter(scales)) if len(scales) == 1 else ""  # before datasets had names
    return tuple(scales.get(match["dataset"], scales.get(only, {})).items()) or None


def _without_equal(factors: Mapping[str, float], before: Units, after: Units) -> dict[str, float]:
    """Leave out the factors of variables that are in the wanted units already."""
    equal = {
        name
        for old, new in paired(before, after).values()
        for name in new
        if old.get(name, "").strip() == new[name].strip()
    }
    return {name: factor for name, factor in factors.items() if name not in equal}


def _with_units(checkpoint: Any, units: Units) -> Any:
    """Note the units of variables whose units a checkpoint knows."""
    metadata = metadata_of(checkpoint)
    section = metadata.get("dataset")
    entries = _by_dataset(section)
    if not isinstance(checkpoint, Mapping) or not entries:
        return checkpoint
    noted = {
        dataset: {**entry, "variables_metadata": _facts_in(entry, new)}
        for dataset, (new, entry) in paired(units, entries).items()
    }
    single = section is entries.get("data")
    whole = noted.get("data", section) if single else {**entries, **noted}
    return _with_metadata(checkpoint, {**metadata, "dataset": whole})


def _facts_in(entry: Mapping[str, Any], units: Mapping[str, str]) -> Any:
    facts = entry.get("variables_metadata")
    if not isinstance(facts, Mapping):
        return facts
    known = [name for name in units if _has_units(facts.get(name))]
    return {**facts, **{name: {**facts[name], "units": units[name]} for name in known}}


# ── describe ──────────────────────────────────────────────────────────────────────────────────


def with_variables(
    checkpoint: Any, pairs: Mapping[str, tuple[Variables, Variables]], facts: Mapping[str, Any]
) -> Any:
    """Have a checkpoint's metadata describe the variables after an alignment.

    Args:
        checkpoint: the checkpoint, whose weights are aligned.
        pairs: the variables of each dataset, before and after.
        facts: the metadata of the model that has the new ones; empty if nobody knows any.
    """
    metadata = metadata_of(checkpoint)
    if not pairs or not metadata:
        return checkpoint
    changed = {
        section: _described(section, metadata[section], pairs, facts.get(section))
        for section in SECTIONS
        if isinstance(metadata.get(section), Mapping)
    }
    return _with_metadata(checkpoint, {**metadata, **changed})


def names_in(metadata: Mapping[str, Any]) -> dict[str, list[str]]:
    """Give the names of the variables of each dataset that metadata describe, in their order."""
    entries = _by_dataset(metadata.get("dataset")).items()
    return {dataset: list(entry.get("variables") or ()) for dataset, entry in entries}


def _described(
    section: str,
    before: Mapping[str, Any],
    pairs: Mapping[str, tuple[Variables, Variables]],
    facts: Any,
) -> dict[str, Any]:
    """Describe the new variables in one section."""
    describe = {
        "dataset": _describe_dataset,
        "data_indices": _describe_indices,
        "metadata_inference": _describe_inference,
    }
    known = _by_dataset(facts)
    if section == "dataset":
        is_single = _by_dataset(before).get("data") is before
    else:  # Anemoi's indices are of the dataset and of the model, each with inputs and outputs
        single = {"data_indices": ("data", "model"), "metadata_inference": ("data_indices",)}
        is_single = all(
            isinstance(before.get(part), Mapping) and {*_PARTS} <= before[part].keys()
            for part in single[section]
        )
    if is_single:
        (dataset, (_, new)) = next(iter(pairs.items()))
        return describe[section](dict(before), new, known.get(dataset))
    described = {name for name, entry in before.items() if isinstance(entry, Mapping)}
    stale = described - pairs.keys() if len(described) == 1 else set()
    old = {name: before.get(name) or before.get(next(iter(stale), ""), {}) for name in pairs}
    entries = {
        dataset: describe[section](dict(old[dataset]), new, known.get(dataset))
        for dataset, (_, new) in pairs.items()
    }
    kept = {name: entry for name, entry in before.items() if name not in stale}
    listed = {"dataset_names": list(pairs)} if stale and "dataset_names" in before else {}
    return {**kept, **listed, **entries}


def _describe_dataset(before: dict[str, Any], new: Variables, known: Any) -> dict[str, Any]:
    if known:
        return dict(known)
    names = _ordered(new)
    facts = before.get("variables_metadata")
    if isinstance(facts, Mapping):
        kept = {name: facts[name] for name in names if name in facts}
        before = {**before, "variables_metadata": kept}
    shape = before.get("shape")  # dates, variables, members, points
    if isinstance(shape, list | tuple) and len(shape) > 1:
        before = {**before, "shape": [shape[0], len(names), *shape[2:]]}
    return {**before, "variables": names}


def _describe_indices(_before: dict[str, Any], new: Variables, known: Any) -> dict[str, Any]:
    """Describe indices as ``IndexCollection.todict`` of anemoi-models does."""
    if known:
        return dict(known)
    reads, predicts = _channels(new)
    everything = dict(new.index)

    def part(index: Mapping[str, int], names: Iterable[str]) -> dict[str, Any]:
        roles = {role: getattr(new, role) for role in ROLES}
        others = frozenset(index) - frozenset[str]().union(*roles.values())
        listed = {"prognostic": others, **{role: roles[role] for role in ROLES}}
        return {
            **{
                role: sorted(index[n] for n in found if n in index)
                for role, found in listed.items()
            },
            "full": sorted(index[name] for name in names),
            "name_to_index": dict(index),
        }

    return {
        "data": {"input": part(everything, reads), "output": part(everything, predicts)},
        "model": {"input": part(reads, reads), "output": part(predicts, predicts)},
    }


def _describe_inference(before: dict[str, Any], new: Variables, known: Any) -> dict[str, Any]:
    reads, predicts = _channels(new)
    roles = {role: [name for name in _ordered(new) if name in getattr(new, role)] for role in ROLES}
    some = {name for names in roles.values() for name in names}
    types = {**roles, "prognostic": [name for name in _ordered(new) if name not in some]}
    indices = {"input": reads, "output": predicts}
    return {**before, **(known or {}), "data_indices": indices, "variable_types": types}


def _ordered(variables: Variables) -> list[str]:
    return sorted(variables.index, key=variables.index.__getitem__)


def _channels(variables: Variables) -> tuple[dict[str, int], dict[str, int]]:
    """Give the positions of variables among those that a model reads, and that it predicts."""
    names = [name for name in _ordered(variables) if name not in variables.target]
    reads = [name for name in names if name not in variables.diagnostic]
    predicts = [name for name in names if name not in variables.forcing]
    return (
        {name: place for place, name in enumerate(reads)},
        {name: place for place, name in enumerate(predicts)},
    )


def _with_metadata(checkpoint: Mapping[str, Any], metadata: Any) -> dict[str, Any]:
    parameters = checkpoint["hyper_parameters"]
    changed = like(parameters, {**parameters, "metadata": metadata})
    return like(checkpoint, {**checkpoint, "hyper_parameters": changed})
