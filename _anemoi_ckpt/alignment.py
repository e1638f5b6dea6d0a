"""The axes of tensors that run over variables, and the origin of each slice in another order.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

layouts · order
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import (
    NO_VARIABLES,
    ROLES,
    Variables,
    compare,
    differences,
    few,
    is_collection,
    paired,
    read_model,
    recast,
    with_roles,
)

Part = int | str | Sequence[str]  # of an axis: a count of channels, a group, or these variables
Label = tuple[int, Any]  # of a channel: the position of its part, and its variable or number there

# ── layouts ───────────────────────────────────────────────────────────────────────────────────

NEW = ("model", "zeros")  # the sources of slices for new variables
GROUPS = ("all", "input", "output", "prognostic", "forcing", "diagnostic")

_PROCESSORS = r"(.*\.)?(pre|post)_processors(_tendencies)?\.{}\..*"
_CORE = ("data_indices", "node_attributes", "encoder", "decoder", "n_step_input", "n_step_output")


def anemoi_layout(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Derive the layout of an encoder-processor-decoder of ``anemoi-models``, for each dataset.

    The layout is for `align_variables`: a dict by tensor name, as in the model's state dict, with
    the variables' roles. The channels that the encoder reads, and on which the decoder is
    conditioned, are the inputs of each step, then sines and cosines of the coordinates and the
    nodes' trainable features, then, in ensembles, the step of the forecast (``_assemble_input`` of
    anemoi-models 0.13). The decoder's output channels are the outputs of each step. Statistics are
    the tensors of pre- and post-processors with one number for each variable, and the thresholds of
    boundings: new variables always get the model's. Tensors of positions are taken from the model.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model contains no such module, or one with another order of channels.

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
    prefix, core = next(cores, ("", None))
    if core is None:
        raise ValueError(
            f"no encoder-processor-decoder of anemoi-models in {type(model).__name__}: write its"
            " layout yourself"
        )
    tensors = model.state_dict(keep_vars=True)
    layout: dict[str, dict[str, Any]] = {}
    for dataset, variables in read_model(core).items():
        entries = {
            **_layout_of_mappers(prefix, core, tensors, dataset),
            **_layout_of_boundings(prefix, core, dataset),
            **_layout_of_processors(tensors, dataset, len(variables.index)),
        }
        for name, entry in entries.items():
            problem = disagreement(entry, variables, tensors[name].shape)
            if problem:
                raise ValueError(
                    f"{type(core).__name__} has another order of channels: {name} {problem}; write"
                    " its layout yourself"
                )
        layout[dataset] = {**entries, **{role: sorted(getattr(variables, role)) for role in ROLES}}
    return layout


def _layout_of_mappers(
    prefix: str, core: Any, tensors: Mapping[str, Any], dataset: str
) -> dict[str, Any]:
    """Lay out the first matrix of each embedding, and the last one of the extractor."""
    step = hasattr(core, "noise_injector")  # ensembles have a channel for the step of the forecast
    inputs = [*core.n_step_input * ["input"], core.node_attributes.attr_ndims[dataset] + step]
    outputs = core.n_step_output * ["output"]
    encoder, decoder = f"{prefix}encoder.{dataset}.", f"{prefix}decoder.{dataset}."
    layout: dict[str, Any] = {}
    embeddings = _matrices(tensors, f"{encoder}emb_nodes_src.")
    extractors = _matrices(tensors, f"{decoder}node_data_extractor.")
    if not embeddings or not extractors:
        raise ValueError(
            f"no {encoder}emb_nodes_src or {decoder}node_data_extractor in {type(core).__name__}:"
            " write its layout yourself"
        )
    # a GNN's decoder has no such embedding: it is not conditioned on the inputs
    for name in (embeddings[0], *_matrices(tensors, f"{decoder}emb_nodes_dst.")[:1]):
        layout[name] = {1: inputs}
    for name in (extractors[-1], f"{extractors[-1].rpartition('.')[0]}.bias"):
        layout |= {name: {0: outputs}} if name in tensors else {}
    return layout


def _matrices(tensors: Mapping[str, Any], prefix: str) -> list[str]:
    names = [name for name in tensors if name.startswith(prefix)]
    return [name for name in names if getattr(tensors[name], "ndim", 0) == 2]  # noqa: PLR2004 - a matrix


def _layout_of_boundings(prefix: str, core: Any, dataset: str) -> dict[str, Any]:
    """Lay out the thresholds of boundings, which are in the order that a bounding's names have."""
    return {
        f"{prefix}boundings.{dataset}.{position}.norm_min_val": {
            0: [list(bounding.variables)],
            "new": "model",
        }
        for position, bounding in enumerate(core.boundings[dataset])
        if hasattr(bounding, "norm_min_val")
    }


def _layout_of_processors(tensors: Mapping[str, Any], dataset: str, count: int) -> dict[str, Any]:
    """Lay out the tensors of pre- and post-processors: a number for each variable, or positions."""
    pattern = re.compile(_PROCESSORS.format(re.escape(dataset)))
    layout: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not pattern.fullmatch(name) or not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
            continue
        if not tensor.is_floating_point() and tensor.dtype is not torch.bool:
            layout[name] = "model"
        elif len(tensor) == count:
            layout[name] = {0: ["all"], "new": "model"}
    return layout


def labels(parts: Sequence[Part], variables: Variables) -> list[Label]:
    """Label each channel of an axis with its part and its variable, or its number.

    >>> labels(["input", "output", 1], Variables({"t": 0, "tp": 1}, diagnostic=frozenset({"tp"})))
    [(0, 't'), (1, ('t', False)), (1, ('tp', True)), (2, 0)]
    """
    return [
        (position, channel)
        for position, part in enumerate(parts)
        for channel in _channels(part, variables)
    ]


def _channels(part: Part, variables: Variables) -> list[Any]:
    """Give the variable of each channel of a part, or the numbers of channels without variables."""
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
    # The model predicts an increment of a variable that it reads, and a value of any other. Weights
    # for the one are of no use for the other, so the label tells them apart.
    if part == "output":
        return [(name, name in variables.diagnostic) for name in present]
    return present


def disagreement(entry: Any, variables: Variables, shape: Sequence[int]) -> str:
    """Describe how a shape differs from the sum of a layout's parts; empty if it does not."""
    if len({axis % max(len(shape), 1) for axis in axes(entry)}) < len(axes(entry)):
        return f"has {len(shape)} axes, but its layout has one of them twice"
    for axis, parts in axes(entry).items():
        if not -len(shape) <= axis < len(shape):
            return f"has no axis {axis}: its shape is {tuple(shape)}"
        sizes = [(part, len(_channels(part, variables))) for part in parts]
        total = sum(size for _, size in sizes)
        if shape[axis] != total:
            terms = " + ".join(f"{_part_name(part)}{size}" for part, size in sizes)
            return f"has {shape[axis]} along axis {axis}, but its layout has {terms} = {total}"
    return ""


def _part_name(part: Part) -> str:
    if isinstance(part, int):
        return ""
    return f"{part} " if isinstance(part, str) else f"({few(part)}) "


def axes(entry: Any) -> dict[int, Sequence[Part]]:
    """Give the axes of a layout's entry that run over variables, with the parts of each."""
    if not isinstance(entry, Mapping):
        return {}
    return {axis: parts for axis, parts in entry.items() if isinstance(axis, int)}


@dataclass(frozen=True)
class Layout:
    """The layout of a dataset's tensors: entries by glob, and the variables' roles."""

    entries: dict[str, Any]
    roles: Variables


def read_layout(layout: Any, target: Mapping[str, Variables]) -> dict[str, Layout]:
    """Check a layout, and give it for each dataset.

    Args:
        layout: by glob, or by dataset and glob.
        target: the wanted variables, by dataset.

    Raises:
        TypeError: the layout is not a dict.
        ValueError: it is for other datasets, or has a malformed entry.
    """
    if not isinstance(layout, Mapping) or not layout:
        raise TypeError(f"a layout is a dict by globs, or of such dicts by dataset, not {layout!r}")
    by_dataset = all(isinstance(value, Mapping) and not axes(value) for value in layout.values())
    if not by_dataset and len(target) != 1:
        raise ValueError(f"a layout for several datasets is by dataset: {few(target)}")
    layouts = layout if by_dataset else {next(iter(target)): layout}
    for dataset in layouts:
        if dataset not in target:
            raise ValueError(
                f"the layout is for the dataset {dataset}, but the variables are of {few(target)}"
            )
    return {dataset: _read_dataset_layout(entries) for dataset, entries in layouts.items()}


def _read_dataset_layout(layout: Mapping[Any, Any]) -> Layout:
    entries = {glob: entry for glob, entry in layout.items() if glob not in ROLES}
    roles = {role: names for role, names in layout.items() if role in ROLES}
    malformed = [
        glob
        for glob, entry in entries.items()
        if not isinstance(glob, str) or (entry != "model" and not _is_entry(entry))
    ]
    malformed += [role for role, names in roles.items() if not _are_names(names)]
    if malformed:
        shown = ", ".join(f"{key!r}: {layout[key]!r}" for key in malformed)
        raise ValueError(f"not a layout: {shown}; see align_variables for what a layout is")
    sets = {role: frozenset(names) for role, names in roles.items()}
    return Layout(entries, Variables({}, **sets, has_roles=bool(sets)))


def _is_entry(entry: Any) -> bool:
    parts_by_axis = axes(entry)
    if not parts_by_axis or {*entry} - {*parts_by_axis, "new"}:
        return False
    return entry.get("new", "zeros") in NEW and all(
        isinstance(parts, list | tuple)
        and all(part in GROUPS if isinstance(part, str) else _is_part(part) for part in parts)
        for parts in parts_by_axis.values()
    )


def _is_part(part: Any) -> bool:
    return (isinstance(part, int) and part >= 0) or _are_names(part)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def check_new(new: Any, target: Mapping[str, Variables]) -> None:
    """Check the source of slices for new variables.

    Raises:
        ValueError: it is unknown, or is for variables that the target lacks.
    """
    if not isinstance(new, Mapping):
        if new not in NEW:
            raise ValueError(f"new is 'model', 'zeros' or a dict of variables, not {new!r}")
        return
    if not all(isinstance(source, str) for source in new.values()):
        raise ValueError(
            f"each value of new is the name of a variable, 'model' or 'zeros', not as in {new!r}"
        )
    unknown = [name for name in new if not any(name in known.index for known in target.values())]
    if unknown:
        raise ValueError(f"new has variables that are not among the wanted ones: {few(unknown)}")


# ── order ─────────────────────────────────────────────────────────────────────────────────────

# "model" for the model's whole tensor, or the origin of each channel along each axis
Plan = str | tuple[tuple[int, tuple[int | str, ...]], ...]


@dataclass(frozen=True)
class Alignment:
    """The variables of each dataset before and after an alignment, and the tensors to align."""

    pairs: dict[str, tuple[Variables, Variables]]
    tensors: dict[str, tuple[str, Any]]  # by name: the dataset, and the entry of its layout


def changed_variables(
    known: Mapping[str, Variables],
    source: Mapping[str, Variables],
    target: Mapping[str, Variables],
    layouts: Mapping[str, Layout],
) -> dict[str, tuple[Variables, Variables]]:
    """Pair the variables of each dataset with the wanted ones, where these differ.

    Args:
        known: the variables that the checkpoint knows; empty if it knows none.
        source: the checkpoint's variables as the caller passed them; empty to use `known`.
        target: the wanted variables.
        layouts: the layout of each dataset; datasets without one are left out.

    Raises:
        ValueError: there are no variables, no dataset in common, or `known` differs from both
            `source` and `target`.
    """
    if not known and not source:
        raise MismatchError(UNPLACED, NO_VARIABLES, "pass source to say what they are")
    candidates = paired(source or known, target)
    if not candidates:
        raise MismatchError(
            UNPLACED,
            f"no dataset in common with the wanted ones, {few(target)}",
            f"its own are: {few(source or known)}",
        )
    own = paired(known, target)
    pairs = {}
    for dataset, (old, new) in ((d, pair) for d, pair in candidates.items() if d in layouts):
        roles = layouts[dataset].roles
        current = own[dataset][0] if dataset in own else old
        if current.index not in (old.index, new.index):
            raise MismatchError(
                UNPLACED,
                "its variables are not those passed as source:"
                f" {differences(old.index, current.index)}",
                "leave source out to read them from the checkpoint",
            )
        before = with_roles(current, old, roles, new)
        after = with_roles(new, roles, before)
        if before != after:
            pairs[dataset] = before, after
    return pairs


def origins(
    name: str, entry: Any, source: Variables, target: Variables, new: str | Mapping[str, str]
) -> Plan:
    """Give the origin of each channel of a tensor in its new order.

    It is the channel's position in the old order, ``"model"``, or ``"zeros"``.

    >>> old, new = Variables({"t": 0, "z": 1}), Variables({"z": 0, "q": 1})
    >>> origins("weight", {1: ["input", "input", 1]}, old, new, "zeros")
    ((1, (1, 'zeros', 3, 'zeros', 4)),)

    Raises:
        ValueError: a new variable shall get a copy of one that the tensor lacks.
    """
    if isinstance(entry, str):
        return entry
    rule = entry.get("new", new)

    def origin(label: Label, positions: Mapping[Label, int]) -> int | str:
        if label in positions:
            return positions[label]
        part, channel = label
        variable = channel if isinstance(channel, str) else channel[0]
        copied: str = rule if isinstance(rule, str) else rule.get(variable, "model")
        if copied in NEW:
            return copied
        sibling = part, copied if isinstance(channel, str) else (copied, *channel[1:])
        if sibling not in positions:
            raise MismatchError(
                UNPLACED,
                f"{variable} cannot be a copy of {copied} in {name}: there is no {copied} there",
                "give it 'model' or 'zeros' in new",
            )
        return positions[sibling]

    def along_axis(parts: Sequence[Part]) -> tuple[int | str, ...]:
        positions = {label: position for position, label in enumerate(labels(parts, source))}
        return tuple(origin(label, positions) for label in labels(parts, target))

    return tuple((axis, along_axis(parts)) for axis, parts in axes(entry).items())


def aligned_indices(indices: Any, alignment: Alignment) -> Any:
    """Give a checkpoint's ``data_indices`` with the variables after an alignment."""
    aligned = {
        dataset: copy.deepcopy(new.origin) if new.origin is not None else _as_collection(new)
        for dataset, (_, new) in alignment.pairs.items()
    }
    if is_collection(indices):  # a single dataset, which is not in a dict by dataset
        return next(iter(aligned.values()))
    return aligned if len(indices) == 1 else {**indices, **aligned}


def _as_collection(variables: Variables) -> dict[str, Any]:
    """Make a dict like an ``IndexCollection``, which `variables` reads."""
    roles = {role: sorted(getattr(variables, role)) for role in ROLES}
    return {"name_to_index": dict(variables.index), **roles}


def misplaced(model: torch.nn.Module, names: Iterable[str], source: Mapping[str, Variables]) -> str:
    """Describe the tensors whose variables are not where the model has them; empty if none are.

    If the model's layout is known, these are the tensors whose channels are of other variables.
    Otherwise they are all tensors, as soon as one variable has another index or another role.

    Args:
        model: the model that would take the tensors.
        names: the tensors' names in the model; their shapes are the model's.
        source: the variables of the checkpoint that the tensors are from.
    """
    pairs = _differing_variables(source, read_model(model))
    affected = _affected(model, names, pairs) if pairs else []
    if not affected:
        return ""
    details = [
        (f"{dataset}: " if len(pairs) > 1 else "")
        + "; ".join(filter(None, [differences(old.index, new.index), ", ".join(recast(old, new))]))
        for dataset, (old, new) in pairs.items()
    ]
    return (
        f"the checkpoint's variables are not where the model has them ({', '.join(details)}), and"
        f" {len(affected)} tensors that fit by their shape run over them: {few(affected)}"
    )


def _differing_variables(
    source: Mapping[str, Variables], target: Mapping[str, Variables]
) -> dict[str, tuple[Variables, Variables]]:
    """Pair the datasets whose indices, or roles that both sides know, differ."""
    pairs = {
        dataset: (with_roles(old, new), with_roles(new, old))
        for dataset, (old, new) in paired(source, target).items()
    }
    return {dataset: (old, new) for dataset, (old, new) in pairs.items() if old != new}


def _affected(
    model: torch.nn.Module,
    names: Iterable[str],
    pairs: Mapping[str, tuple[Variables, Variables]],
) -> list[str]:
    """List the tensors that would give a variable the slices of another one."""
    try:
        layouts = anemoi_layout(model)
    except ValueError:  # an unknown layout: every tensor may run over variables
        moved = any(
            compare(old.index, new.index)["moved"] or recast(old, new)
            for old, new in pairs.values()
        )
        return list(names) if moved else []
    return [
        name
        for name in names
        for dataset, (old, new) in pairs.items()
        if _clashes(layouts.get(dataset, {}).get(name), old, new)
    ]


def _clashes(entry: Any, source: Variables, target: Variables) -> bool:
    """Tell whether a channel is another variable's in the model, and both sides know one of them.

    If each side knows only its own one of the two, the variable may have been renamed, so that is
    not a clash.
    """

    def both_have(label: Label) -> bool:
        _, channel = label
        name = channel[0] if isinstance(channel, tuple) else channel
        return isinstance(name, int) or (name in source.index and name in target.index)

    if entry == "model" and _roles_in_order(source) != _roles_in_order(target):
        return True
    pairs = [
        pair
        for parts in axes(entry).values()
        for pair in zip(labels(parts, source), labels(parts, target), strict=False)
    ]
    return any(old != new and (both_have(old) or both_have(new)) for old, new in pairs)


def _roles_in_order(variables: Variables) -> list[tuple[bool, ...]]:
    """Give the roles of the variables in the order of their indices.

    Tensors of positions depend on these alone.
    """
    names = sorted(variables.index, key=variables.index.__getitem__)
    return [tuple(name in getattr(variables, role) for role in ROLES) for name in names]


def differ_in_prefix(one: str, other: str) -> bool:
    """Tell whether two names are equal, or differ in a prefix alone."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
