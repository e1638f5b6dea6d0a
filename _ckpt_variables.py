"""Variables of weather models: which there are, where each stands, and what tensors run over them.

Knows names, indices and layouts, and nothing of values. Imports torch and the standard library
alone, since `strategies` stands on it, too.
variables · layouts · order
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import torch

Part = int | str | Sequence[str]  # of an axis: channels without a name, a group, these variables
A = TypeVar("A")
B = TypeVar("B")
Label = tuple[int, Any]  # of a channel: the part it is in, and what it stands for there

_LISTED = 20  # names in a message; more than that nobody reads


# ── variables ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Variables:
    """The variables of a dataset: their indices, and the roles that some of them have.

    As Anemoi's ``IndexCollection`` has them: forcing ones are read and not predicted, diagnostic
    ones predicted and not read, targets neither (the loss alone sees them); all others both.
    """

    index: dict[str, int]
    forcing: frozenset[str] = frozenset()
    diagnostic: frozenset[str] = frozenset()
    target: frozenset[str] = frozenset()
    has_roles: bool = field(default=False, compare=False)  # else nobody has told them
    origin: Any = field(default=None, compare=False, repr=False)  # what they were read from


def read_checkpoint(checkpoint: Any) -> dict[str, Variables]:
    """Read the variables of each dataset that a checkpoint holds; none if it does not tell.

    They are among a training's hyper-parameters, or known to a module that was pickled whole.
    """
    parameters = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    indices = parameters.get("data_indices") if isinstance(parameters, Mapping) else None
    modules = checkpoint.values() if isinstance(checkpoint, Mapping) else [checkpoint]
    whole = [_field(each, "data_indices") for each in modules if hasattr(each, "state_dict")]
    return next((found for each in (indices, *whole) if (found := _by_dataset(each))), {})


def read_model(model: Any) -> dict[str, Variables]:
    """Read the variables that a model, or the first module in it, knows; none if none does."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = (_by_dataset(getattr(module, "data_indices", None)) for module in modules)
    return next((each for each in found if each), {})


def read_given(what: str, wanted: Any) -> dict[str, Variables]:
    """Read variables in any form that a user may give them in.

    Raises:
        TypeError: these are none.
        ValueError: a checkpoint without any.
    """
    if isinstance(wanted, Mapping) and "hyper_parameters" in wanted:
        found = read_checkpoint(wanted)
        if not found:
            raise ValueError(NO_VARIABLES)
        return found
    named = isinstance(wanted, Mapping) and len(wanted) > 0
    if isinstance(wanted, torch.nn.Module):
        found = read_model(wanted)
    elif named and all(isinstance(place, Integral) for place in wanted.values()):  # numpy's, too
        found = {"data": Variables(dict(wanted))}
    elif named and any(_of(each) is not None for each in (wanted, *wanted.values())):
        found = _by_dataset(wanted) or {}
    elif named and all(isinstance(each, Mapping) for each in wanted.values()):
        found = {str(dataset): Variables(dict(each)) for dataset, each in wanted.items()}
    else:
        found = _by_dataset(wanted) or {}
    if not found:
        shown = wanted if isinstance(wanted, Mapping) else type(wanted).__name__
        raise TypeError(f"{what} takes variables by name, or a model's, not {shown}")
    return found


NO_VARIABLES = (
    "no variables: no hyper_parameters['data_indices'] with a name_to_index, nor a module that"
    " knows them"
)


def _by_dataset(indices: Any) -> dict[str, Variables] | None:
    """Read the variables of each dataset, or None where these are nowhere to be found."""
    alone = _of(indices)
    if alone is not None:
        return {"data": alone}
    if not isinstance(indices, Mapping):
        return None
    found = {str(dataset): _of(each) for dataset, each in indices.items()}
    sure = {dataset: each for dataset, each in found.items() if each is not None}
    return sure if sure and len(sure) == len(found) else None


def _of(collection: Any) -> Variables | None:
    """Read what an ``IndexCollection``, its inert data, or a dict like it tells."""
    index = _field(collection, "name_to_index")
    if not isinstance(index, Mapping) or not all(isinstance(n, Integral) for n in index.values()):
        return None
    roles = [_field(collection, role) for role in ROLES]
    sets = (frozenset(n for n in _listed(names) if isinstance(n, str)) for names in roles)
    forcing, diagnostic, target = sets
    told = any(names is not None for names in roles)
    return Variables(dict(index), forcing, diagnostic, target, told, collection)


def _listed(names: Any) -> list[Any]:
    """List what there is to list: a file may hold anything."""
    try:
        return list(names)
    except TypeError:
        return []


def _field(holder: Any, name: str) -> Any:
    """Find a field of an object, of a dict, or of what a stand-in keeps as its state."""
    if isinstance(holder, Mapping):
        return holder.get(name)
    states = [each for each in getattr(holder, "__dict__", {}).values() if isinstance(each, dict)]
    return getattr(holder, name, next((each[name] for each in states if name in each), None))


def compare(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, list[str]]:
    """Tell which variables were added and removed, and which of the others stand elsewhere.

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
    """Say what `compare` finds."""
    found = compare(old, new)
    return "; ".join(f"{kind} {few(names)}" for kind, names in found.items() if names)


def recast(old: Variables, new: Variables) -> list[str]:
    """Tell which variables have another role.

    >>> recast(Variables({"tp": 0}, diagnostic=frozenset({"tp"})), Variables({"tp": 0}))
    ['tp from diagnostic to prognostic']
    """

    def role(variables: Variables, name: str) -> str:
        return next((r for r in ROLES if name in getattr(variables, r)), "prognostic")

    roles = {name: (role(old, name), role(new, name)) for name in new.index if name in old.index}
    return [f"{name} from {was} to {now}" for name, (was, now) in roles.items() if was != now]


def few(names: Iterable[Any]) -> str:
    """List names for a message, the first of them where there are many."""
    texts = [str(name) for name in names]
    more = f", ... and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return (", ".join(texts[:_LISTED]) or "none") + more


# ── layouts ───────────────────────────────────────────────────────────────────────────────────

ROLES = ("forcing", "diagnostic", "target")  # what IndexCollection calls them
NEW = ("model", "zeros")  # what new variables get
GROUPS = ("all", "input", "output", "prognostic", "forcing", "diagnostic")

_PROCESSORS = r"(.*\.)?(pre|post)_processors(_tendencies)?\.{}\..*"
_CORE = ("data_indices", "node_attributes", "encoder", "decoder", "n_step_input", "n_step_output")


def anemoi_layout(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Derive the layout of an encoder-processor-decoder of ``anemoi-models``, for each dataset.

    For `align_variables`: a dict of tensor names, as the model's state dict has them, and of the
    variables' roles. The encoder reads, and the decoder is conditioned on, the inputs of each step,
    then sines and cosines of the coordinates and the nodes' trainable features, and in ensembles
    the forecast's step (``_assemble_input`` of anemoi-models 0.13); the decoder gives the outputs
    of each step. Normalisers and the like (what has a number for each variable), and thresholds of
    boundings, are statistics: those of new variables are always the model's. Tensors of positions
    are the model's.

    Raises:
        TypeError: the model is no module.
        ValueError: there is no such model in it, or one that puts its inputs together otherwise.

    >>> anemoi_layout(torch.nn.Linear(1, 1))
    Traceback (most recent call last):
        ...
    ValueError: no encoder-processor-decoder of anemoi-models in Linear: write its layout yourself

    See Also: align_variables
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"anemoi_layout takes a module, not {type(model).__name__}")
    cores = (
        (f"{path}." if path else "", module)
        for path, module in model.named_modules()
        if all(hasattr(module, name) for name in _CORE)
    )
    front, core = next(cores, ("", None))
    if core is None:
        raise ValueError(
            f"no encoder-processor-decoder of anemoi-models in {type(model).__name__}: write its"
            " layout yourself"
        )
    tensors = model.state_dict(keep_vars=True)
    layout: dict[str, dict[str, Any]] = {}
    for dataset, variables in read_model(core).items():
        entries = {
            **_mapped(front, core, tensors, dataset),
            **_bounded(front, core, dataset),
            **_processed(tensors, dataset, len(variables.index)),
        }
        for name, entry in entries.items():
            told = disagreement(entry, variables, tensors[name].shape)
            if told:
                raise ValueError(
                    f"{type(core).__name__} puts its channels together otherwise: {name} {told};"
                    " write its layout yourself"
                )
        layout[dataset] = {**entries, **{role: sorted(getattr(variables, role)) for role in ROLES}}
    return layout


def _mapped(front: str, core: Any, tensors: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """Lay out the first matrix of each embedding, and the last one of what extracts."""
    count = hasattr(core, "noise_injector")  # ensembles are told which step of the forecast it is
    inputs = [*core.n_step_input * ["input"], core.node_attributes.attr_ndims[dataset] + count]
    outputs = core.n_step_output * ["output"]
    encoder, decoder = f"{front}encoder.{dataset}.", f"{front}decoder.{dataset}."
    found: dict[str, Any] = {}
    embeddings = _matrices(tensors, f"{encoder}emb_nodes_src.")
    extractors = _matrices(tensors, f"{decoder}node_data_extractor.")
    if not embeddings or not extractors:
        raise ValueError(
            f"no {encoder}emb_nodes_src or {decoder}node_data_extractor in {type(core).__name__}:"
            " write its layout yourself"
        )
    # mappers of the GNN kind are not conditioned on the inputs
    for name in (embeddings[0], *_matrices(tensors, f"{decoder}emb_nodes_dst.")[:1]):
        found[name] = {1: inputs}
    for name in (extractors[-1], f"{extractors[-1].rpartition('.')[0]}.bias"):
        found |= {name: {0: outputs}} if name in tensors else {}
    return found


def _matrices(tensors: Mapping[str, Any], front: str) -> list[str]:
    found = [name for name in tensors if name.startswith(front)]
    return [name for name in found if getattr(tensors[name], "ndim", 0) == 2]  # noqa: PLR2004 - a matrix


def _bounded(front: str, core: Any, dataset: str) -> dict[str, Any]:
    """Lay out thresholds, which stand in the order of the variables that a bounding names."""
    boundings = enumerate(core.boundings[dataset])
    return {
        f"{front}boundings.{dataset}.{place}.norm_min_val": {
            0: [list(each.variables)],
            "new": "model",
        }
        for place, each in boundings
        if hasattr(each, "norm_min_val")
    }


def _processed(tensors: Mapping[str, Any], dataset: str, count: int) -> dict[str, Any]:
    """Lay out what pre- and post-processors know: a number for each variable, or positions."""
    pattern = re.compile(_PROCESSORS.format(re.escape(dataset)))
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not pattern.fullmatch(name) or not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
            continue
        if not tensor.is_floating_point() and tensor.dtype is not torch.bool:
            found[name] = "model"
        elif len(tensor) == count:
            found[name] = {0: ["all"], "new": "model"}
    return found


def labels(parts: Sequence[Part], variables: Variables) -> list[Label]:
    """Give what each channel of an axis stands for.

    >>> labels(["input", "output", 1], Variables({"t": 0, "tp": 1}, diagnostic=frozenset({"tp"})))
    [(0, 't'), (1, ('t', False)), (1, ('tp', True)), (2, 0)]
    """
    return [
        (place, each) for place, part in enumerate(parts) for each in _channels(part, variables)
    ]


def _channels(part: Part, variables: Variables) -> list[Any]:
    if isinstance(part, int):
        return list(range(part))
    names = sorted(variables.index, key=variables.index.__getitem__)
    if not isinstance(part, str):
        return [name for name in part if name in variables.index]
    absent = {
        "all": frozenset[str](),
        "input": variables.diagnostic | variables.target,
        "output": variables.forcing | variables.target,
        "prognostic": variables.forcing | variables.diagnostic | variables.target,
        "forcing": frozenset(names) - variables.forcing,
        "diagnostic": frozenset(names) - variables.diagnostic,
    }[part]
    present = [name for name in names if name not in absent]
    if part == "output":  # an increment where it is read, too, else a value: not the same knowledge
        return [(name, name in variables.diagnostic) for name in present]
    return present


def disagreement(entry: Any, variables: Variables, shape: Sequence[int]) -> str:
    """Say where a shape is not what a layout adds up to; nothing where it is."""
    if len({axis % max(len(shape), 1) for axis in axes(entry)}) < len(axes(entry)):
        return f"has {len(shape)} axes, and its layout one of them twice"
    for axis, parts in axes(entry).items():
        if not -len(shape) <= axis < len(shape):
            return f"has no axis {axis}: its shape is {tuple(shape)}"
        sizes = [(part, len(_channels(part, variables))) for part in parts]
        total = sum(size for _, size in sizes)
        if shape[axis] != total:
            told = " + ".join(f"{_named(part)}{size}" for part, size in sizes)
            return f"has {shape[axis]} along axis {axis}, its layout {told} = {total}"
    return ""


def _named(part: Part) -> str:
    if isinstance(part, int):
        return ""
    return f"{part} " if isinstance(part, str) else f"({few(part)}) "


def axes(entry: Any) -> dict[int, Sequence[Part]]:
    """Give the axes of a layout's entry that run over variables, and what they run over."""
    if not isinstance(entry, Mapping):
        return {}
    return {axis: parts for axis, parts in entry.items() if isinstance(axis, int)}


@dataclass(frozen=True)
class Layout:
    """What tensors of a dataset run over: entries by glob, and roles that it tells."""

    entries: dict[str, Any]
    roles: Variables


def read_layout(layout: Any, goal: Mapping[str, Variables]) -> dict[str, Layout]:
    """Check a layout, and give it for each dataset.

    Raises:
        TypeError: it is no dict.
        ValueError: it is for other datasets, or has an entry that is none.
    """
    if not isinstance(layout, Mapping) or not layout:
        raise TypeError(f"a layout is a dict by globs, or of such dicts by dataset, not {layout!r}")
    nested = all(isinstance(each, Mapping) and not axes(each) for each in layout.values())
    if not nested and len(goal) != 1:
        raise ValueError(f"a layout for several datasets is by dataset: {few(goal)}")
    found = {}
    for dataset, each in layout.items() if nested else [(next(iter(goal)), layout)]:
        if dataset not in goal:
            raise ValueError(f"a layout for {dataset}, and there are variables of {few(goal)}")
        entries = {glob: entry for glob, entry in each.items() if glob not in ROLES}
        roles = {role: names for role, names in each.items() if role in ROLES}
        strange = [
            glob
            for glob, entry in entries.items()
            if not isinstance(glob, str) or (entry != "model" and not _is_entry(entry))
        ]
        strange += [role for role, names in roles.items() if not _are_names(names)]
        if strange:
            told = ", ".join(f"{glob!r}: {each[glob]!r}" for glob in strange)
            raise ValueError(f"no layout: {told}; see align_variables for what one is")
        sets = {role: frozenset(names) for role, names in roles.items()}
        found[dataset] = Layout(entries, Variables({}, **sets, has_roles=bool(sets)))
    return found


def _is_entry(entry: Any) -> bool:
    along = axes(entry)
    if not along or {*entry} - {*along, "new"} or entry.get("new", "zeros") not in NEW:
        return False
    return all(
        isinstance(parts, list | tuple)
        and all(part in GROUPS if isinstance(part, str) else _is_part(part) for part in parts)
        for parts in along.values()
    )


def _is_part(part: Any) -> bool:
    return (isinstance(part, int) and part >= 0) or _are_names(part)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def check_new(new: Any, goal: Mapping[str, Variables]) -> None:
    """Check what is to become of new variables.

    Raises:
        ValueError: it is nothing known, or for variables that are not wanted.
    """
    if not isinstance(new, Mapping):
        if new not in NEW:
            raise ValueError(f"new is 'model', 'zeros' or a dict of variables, not {new!r}")
        return
    strange = [name for name in new if not any(name in each.index for each in goal.values())]
    if not all(isinstance(wanted, str) for wanted in new.values()):
        raise ValueError(f"new has the name of a variable for each, 'model' or 'zeros': {new!r}")
    if strange:
        raise ValueError(f"new is for variables that are wanted, which {few(strange)} is not")


# ── order ─────────────────────────────────────────────────────────────────────────────────────

Plan = str | tuple[tuple[int, tuple[int | str, ...]], ...]  # "model", or of each axis the origins


@dataclass(frozen=True)
class Alignment:
    """What is to be aligned: each dataset's variables, before and after, and the tensors."""

    pairs: dict[str, tuple[Variables, Variables]]
    tensors: dict[str, tuple[str, Any]]  # of which dataset, and laid out how


def with_roles(variables: Variables, *others: Variables) -> Variables:
    """Give variables that come without roles those that others tell."""
    teller = next((each for each in (variables, *others) if each.has_roles), variables)
    roles = {role: getattr(teller, role) & variables.index.keys() for role in ROLES}
    return replace(variables, **roles, has_roles=teller.has_roles)


def paired(source: Mapping[str, A], target: Mapping[str, B]) -> dict[str, tuple[A, B]]:
    """Pair datasets of the same name, by the target's; or what is alone, whatever it is called."""
    if len(source) == 1 and not source.keys() & target.keys():
        alone = next(iter(source.values()))
        return {name: (alone, each) for name, each in target.items()}
    return {name: (source[name], each) for name, each in target.items() if name in source}


def changed(
    held: Mapping[str, Variables],
    source: Mapping[str, Variables],
    target: Mapping[str, Variables],
    layouts: Mapping[str, Layout],
) -> dict[str, tuple[Variables, Variables]]:
    """Pair the variables that a checkpoint holds, or that are given, with other ones wanted.

    Raises:
        ValueError: there are none, or none of the same dataset, or others than are given.
    """
    if not held and not source:
        raise ValueError(f"{NO_VARIABLES}; or give source")
    begun = paired(source or held, target)
    if not begun:
        raise ValueError(f"no dataset in common: {few(source or held)}, and wanted {few(target)}")
    own = paired(held, target)
    pairs = {}
    for dataset, (old, new) in ((d, pair) for d, pair in begun.items() if d in layouts):
        told = layouts[dataset].roles
        now = own[dataset][0] if dataset in own else old
        if now.index not in (old.index, new.index):
            raise ValueError(
                "the checkpoint's variables are not those given as source:"
                f" {differences(old.index, now.index)}"
            )
        before = with_roles(now, old, told, new)
        after = with_roles(new, told, before)
        if before != after:
            pairs[dataset] = before, after
    return pairs


def origins(
    name: str, entry: Any, source: Variables, target: Variables, new: str | Mapping[str, str]
) -> Plan:
    """Find where each channel of a tensor in its new order comes from.

    Its place in the old one, or ``"model"`` or ``"zeros"``.

    >>> old, new = Variables({"t": 0, "z": 1}), Variables({"z": 0, "q": 1})
    >>> origins("weight", {1: ["input", "input", 1]}, old, new, "zeros")
    ((1, (1, 'zeros', 3, 'zeros', 4)),)

    Raises:
        ValueError: a new variable is to be a copy of one that is not there.
    """
    if isinstance(entry, str):
        return entry
    rule = entry.get("new", new)

    def origin(label: Label, places: Mapping[Label, int]) -> int | str:
        if label in places:
            return places[label]
        part, channel = label
        variable = channel if isinstance(channel, str) else channel[0]
        wanted: str = rule if isinstance(rule, str) else rule.get(variable, "model")
        if wanted in NEW:
            return wanted
        sibling = part, wanted if isinstance(channel, str) else (wanted, *channel[1:])
        if sibling not in places:
            raise ValueError(
                f"{variable} cannot be a copy of {wanted} in {name}: the checkpoint has none there"
            )
        return places[sibling]

    def along(parts: Sequence[Part]) -> tuple[int | str, ...]:
        places = {label: place for place, label in enumerate(labels(parts, source))}
        return tuple(origin(label, places) for label in labels(parts, target))

    return tuple((axis, along(parts)) for axis, parts in axes(entry).items())


def rewritten(indices: Any, alignment: Alignment) -> Any:
    """Give a checkpoint's ``data_indices`` with the variables after an alignment."""
    fresh = {
        dataset: copy.deepcopy(new.origin) if new.origin is not None else _told(new)
        for dataset, (_, new) in alignment.pairs.items()
    }
    if _of(indices) is not None:  # one alone, by no dataset
        return next(iter(fresh.values()))
    return fresh if len(indices) == 1 else {**indices, **fresh}


def _told(variables: Variables) -> dict[str, Any]:
    roles = {role: sorted(getattr(variables, role)) for role in ROLES}
    return {"name_to_index": dict(variables.index), **roles}


def misplaced(model: torch.nn.Module, names: Iterable[str], source: Mapping[str, Variables]) -> str:
    """Say which of the tensors that a model would take have variables where it has others.

    Exactly, where the model's layout is known; else any of them may, as soon as a variable moved.
    """
    both = paired(source, read_model(model)).items()
    pairs = {dataset: (with_roles(old, new), with_roles(new, old)) for dataset, (old, new) in both}
    pairs = {dataset: (old, new) for dataset, (old, new) in pairs.items() if old != new}
    try:
        layouts = anemoi_layout(model) if pairs else {}
    except ValueError:
        moved = [
            compare(*(v.index for v in pair))["moved"] or recast(*pair) for pair in pairs.values()
        ]
        found = list(names) if any(moved) else []
    else:
        found = [
            name
            for name in names
            for dataset, pair in pairs.items()
            if _clashes(layouts.get(dataset, {}).get(name), *pair)
        ]
    if not found:
        return ""
    kinds = [
        (f"{dataset}: " if len(pairs) > 1 else "")
        + "; ".join(filter(None, [differences(old.index, new.index), ", ".join(recast(old, new))]))
        for dataset, (old, new) in pairs.items()
    ]
    return (
        f"the checkpoint's variables are not where the model has them ({', '.join(kinds)}), and"
        f" {len(found)} tensors that fit by their shape run over them: {few(found)}"
    )


def _clashes(entry: Any, source: Variables, target: Variables) -> bool:
    """Tell whether a channel stands where another is, and one of them is known on both sides.

    What each side has alone may stand in the other's place: a rename.
    """

    def both_have(label: Label) -> bool:
        _, channel = label
        name = channel[0] if isinstance(channel, tuple) else channel
        return isinstance(name, int) or (name in source.index and name in target.index)

    if entry == "model" and _standing(source) != _standing(target):
        return True
    pairs = [
        pair
        for parts in axes(entry).values()
        for pair in zip(labels(parts, source), labels(parts, target), strict=False)
    ]
    return any(was != now and (both_have(was) or both_have(now)) for was, now in pairs)


def _standing(variables: Variables) -> list[tuple[bool, ...]]:
    """Give, in the order of the indices, which roles what stands there has: what positions tell."""
    names = sorted(variables.index, key=variables.index.__getitem__)
    return [tuple(name in getattr(variables, role) for role in ROLES) for name in names]
