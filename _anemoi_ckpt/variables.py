"""The variables of weather models: their names, indices and roles.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")

ROLES = ("forcing", "diagnostic", "target")  # what IndexCollection calls them
_LISTED = 20  # names in a message; more than that nobody reads


@dataclass(frozen=True)
class Variables:
    """The variables of a dataset: their indices, and the roles that some of them have.

    Roles are those of ``IndexCollection`` in anemoi-models 0.13. The model reads forcing variables,
    and does not predict them. It predicts diagnostic variables, and does not read them. It neither
    reads nor predicts targets: only the loss sees them. All others are prognostic: the model reads
    and predicts them.
    """

    index: dict[str, int]
    forcing: frozenset[str] = frozenset()
    diagnostic: frozenset[str] = frozenset()
    target: frozenset[str] = frozenset()
    has_roles: bool = field(default=False, compare=False)  # False: the roles are unknown
    origin: Any = field(default=None, compare=False, repr=False)  # the object they were read from


def read_checkpoint(checkpoint: Any) -> dict[str, Variables]:
    """Read the variables of each dataset of a checkpoint; none if it does not know them.

    They are ``data_indices`` among the hyper-parameters, or of a module that was pickled whole.
    """
    return _first_known(kept(checkpoint, "data_indices"))


def kept(checkpoint: Any, name: str) -> Iterator[Any]:
    """Give what a checkpoint keeps by a name: as a hyper-parameter, or in modules pickled whole."""
    parameters = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    if isinstance(parameters, Mapping):
        yield parameters.get(name)
    for module in whole_modules(checkpoint):
        yield _field(module, name)


def whole_modules(checkpoint: Any) -> Iterator[Any]:
    """Give the modules that a checkpoint keeps pickled whole; it may be one itself."""
    values = checkpoint.values() if isinstance(checkpoint, Mapping) else [checkpoint]
    return (value for value in values if hasattr(value, "state_dict"))


def as_mapping(value: Any) -> Mapping[Any, Any]:
    """Give a mapping as it is, and an empty one for anything else that stands in its place."""
    return value if isinstance(value, Mapping) else {}


def read_model(model: Any) -> dict[str, Variables]:
    """Read the variables of the first module in a model that knows them; none if none does."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return _first_known(getattr(module, "data_indices", None) for module in modules)


def _first_known(collections: Iterable[Any]) -> dict[str, Variables]:
    """Read the first of several ``data_indices`` that has variables."""
    candidates = (_by_dataset(indices) for indices in collections)
    return next((by_dataset for by_dataset in candidates if by_dataset), {})


def read_variables(function: str, wanted: Any) -> dict[str, Variables]:
    """Read variables in any form in which a user may pass them to a function.

    Args:
        function: its name, for the error.
        wanted: a checkpoint, a model, ``data_indices``, a dict of name to index, or a dict of such
            dicts by dataset.

    Raises:
        TypeError: `wanted` is none of these.
        ValueError: it is a checkpoint without variables.
    """
    if isinstance(wanted, Mapping) and "hyper_parameters" in wanted:
        by_dataset = read_checkpoint(wanted)
        if not by_dataset:
            raise ValueError(NO_VARIABLES)
        return by_dataset
    is_model = isinstance(wanted, torch.nn.Module)
    by_dataset = read_model(wanted) if is_model else _read_indices(wanted)
    if not by_dataset:
        shown = wanted if isinstance(wanted, Mapping) else type(wanted).__name__
        raise TypeError(f"{function} takes variables by name, or a model's, not {shown}")
    return by_dataset


NO_VARIABLES = (
    "no variables: neither hyper_parameters['data_indices'] with a name_to_index, nor a"
    " pickled module with data_indices"
)


def _read_indices(indices: Any) -> dict[str, Variables]:
    """Read name to index, such dicts by dataset, or ``data_indices``; anything else gives none."""
    if not isinstance(indices, Mapping) or not indices:
        return _by_dataset(indices) or {}
    values = list(indices.values())
    if all(isinstance(index, Integral) for index in values):  # Python's or numpy's
        return {"data": Variables(dict(indices))}
    has_collections = any(_read_collection(value) is not None for value in (indices, *values))
    if not has_collections and all(isinstance(value, Mapping) for value in values):
        return {str(dataset): Variables(dict(index)) for dataset, index in indices.items()}
    return _by_dataset(indices) or {}


def _by_dataset(indices: Any) -> dict[str, Variables] | None:
    """Read the variables of each dataset of ``data_indices``; None if this is something else."""
    single = _read_collection(indices)
    if single is not None:
        return {"data": single}
    if not isinstance(indices, Mapping):
        return None
    results = {str(dataset): _read_collection(value) for dataset, value in indices.items()}
    by_dataset = {dataset: known for dataset, known in results.items() if known is not None}
    return by_dataset if by_dataset and len(by_dataset) == len(results) else None


def _read_collection(collection: Any) -> Variables | None:
    """Read an ``IndexCollection``, its inert data, or a dict like it; None for anything else."""
    index = _field(collection, "name_to_index")
    if not isinstance(index, Mapping) or not all(isinstance(n, Integral) for n in index.values()):
        return None
    roles = [_field(collection, role) for role in ROLES]
    forcing, diagnostic, target = (
        frozenset(name for name in _as_list(names) if isinstance(name, str)) for names in roles
    )
    has_roles = any(names is not None for names in roles)
    return Variables(dict(index), forcing, diagnostic, target, has_roles, collection)


def is_collection(indices: Any) -> bool:
    """Tell whether ``data_indices`` are the variables of one dataset, not a dict by dataset."""
    return _read_collection(indices) is not None


def _as_list(names: Any) -> list[Any]:
    """Make a list of an iterable, and an empty one of anything else that a file may contain."""
    try:
        return list(names)
    except TypeError:
        return []


def _field(holder: Any, name: str) -> Any:
    """Give a field of an object, of a dict, or of a dict among the attributes of an object.

    Objects that stand in for unknown classes keep their state in such a dict.
    """
    if isinstance(holder, Mapping):
        return holder.get(name)
    attributes = getattr(holder, "__dict__", {}).values()
    states = [value for value in attributes if isinstance(value, dict)]
    return getattr(holder, name, next((state[name] for state in states if name in state), None))


def compare(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, list[str]]:
    """List the variables that were added, those removed, and those whose index changed.

    >>> compare({"t": 0, "z": 1}, {"z": 0, "q": 1})
    {'added': ['q'], 'removed': ['t'], 'moved': ['z from 1 to 0']}
    """
    both = [name for name in new if name in old]
    return {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "moved": [f"{n} from {old[n]} to {new[n]}" for n in both if old[n] != new[n]],
    }


def differences(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """Describe the differences that `compare` lists."""
    kinds = compare(old, new)
    return "; ".join(f"{kind} {few(names)}" for kind, names in kinds.items() if names)


def recast(old: Variables, new: Variables) -> list[str]:
    """List the variables whose role changed.

    >>> recast(Variables({"tp": 0}, diagnostic=frozenset({"tp"})), Variables({"tp": 0}))
    ['tp from diagnostic to prognostic']
    """

    def role(variables: Variables, name: str) -> str:
        return next((r for r in ROLES if name in getattr(variables, r)), "prognostic")

    roles = {name: (role(old, name), role(new, name)) for name in new.index if name in old.index}
    return [f"{name} from {was} to {now}" for name, (was, now) in roles.items() if was != now]


def few(names: Iterable[Any]) -> str:
    """List names for a message: if there are many, only the first of them, and how many more."""
    texts = [str(name) for name in names]
    more = f", ... and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return (", ".join(texts[:_LISTED]) or "none") + more


def with_roles(variables: Variables, *others: Variables) -> Variables:
    """Give variables without roles the roles of the first of the others that has some."""
    source = next((known for known in (variables, *others) if known.has_roles), variables)
    roles = {role: getattr(source, role) & variables.index.keys() for role in ROLES}
    return replace(variables, **roles, has_roles=source.has_roles)


def paired(source: Mapping[str, A], target: Mapping[str, B]) -> dict[str, tuple[A, B]]:
    """Pair the datasets of source and target that have the same name.

    If the source has one dataset alone, under a name that the target lacks, it is paired with every
    dataset of the target.
    """
    if len(source) == 1 and not source.keys() & target.keys():
        single = next(iter(source.values()))
        return {name: (single, wanted) for name, wanted in target.items()}
    return {name: (source[name], wanted) for name, wanted in target.items() if name in source}
