"""The layout of the models of ``anemoi-models`` 0.13 to 0.19: which axes run over which variables.

Each table cites what it was read from. A model that orders its channels in another way is refused.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

core · mappers · residuals, boundings, processors · what the layout does not know
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from _anemoi_ckpt.alignment import (
    GROUPS,
    Part,
    axes,
    disagreement,
    in_steps,
    labels,
    part_name,
    plain,
    with_steps,
)
from _anemoi_ckpt.leads import own_steps
from _anemoi_ckpt.variables import ROLES, Variables, few, read_model

_WRITE_ONE = "write its layout yourself"

# ── core ──────────────────────────────────────────────────────────────────────────────────────

_CORE = ("data_indices", "node_attributes", "encoder", "decoder", "n_step_input", "n_step_output")


def anemoi_layout(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Derive the layout of an encoder-processor-decoder of ``anemoi-models``, for each dataset.

    The layout is for `align_variables`: a dict by tensor name, as in the model's state dict, with
    the variables' roles. It knows the models of anemoi-models 0.13 to 0.19: graph neural networks,
    transformers, graph transformers and point-wise mappers, hierarchical ones, ensembles, and
    transport (diffusion). The encoder's channels are the inputs of each step and the nodes'
    attributes; a transport model also reads the outputs of each step, and an ensemble the step of
    the forecast. The decoder is conditioned on the same, or on the ``target_node_features`` of the
    configuration. Its output channels are the outputs of each step. Statistics are the tensors of
    pre- and post-processors with one number for each variable, and the thresholds of boundings: new
    variables always get the model's. Tensors of positions are taken from the model.

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
    return {
        dataset: {name: entry if name in ROLES else plain(entry) for name, entry in each.items()}
        for dataset, each in layout_in_steps(model).items()
    }


def layout_in_steps(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Derive a layout as `anemoi_layout` does, whose groups tell which step in time they are of.

    Raises:
        ValueError: as `anemoi_layout`.
    """
    prefix, core = find_core(model)
    tensors = model.state_dict(keep_vars=True)
    layout: dict[str, dict[str, Any]] = {}
    for dataset, variables in read_model(core).items():
        entries = {
            **_layout_of_encoder(prefix, core, tensors, dataset),
            **_layout_of_decoder(prefix, core, tensors, dataset),
            **_layout_of_residual(prefix, core, tensors, dataset),
            **_layout_of_boundings(prefix, core, dataset),
            **_layout_of_processors(tensors, dataset, len(variables.index)),
        }
        for name, entry in entries.items():
            problem = disagreement(entry, variables, tensors[name].shape)
            if problem:
                raise ValueError(
                    f"{type(core).__name__} has another order of channels: {name} {problem};"
                    f" {_WRITE_ONE}"
                )
        layout[dataset] = {**entries, **{role: sorted(getattr(variables, role)) for role in ROLES}}
    return layout


def find_core(model: torch.nn.Module) -> tuple[str, Any]:
    """Find the encoder-processor-decoder in a model, and the prefix of its tensors.

    Raises:
        ValueError: there is none.
    """
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in _CORE):
            return f"{path}." if path else "", module
    raise ValueError(
        f"no encoder-processor-decoder of anemoi-models in {type(model).__name__}: {_WRITE_ONE}"
    )


def _class_of(module: Any, attribute: str = "__module__") -> type:
    """Give the first class of a module that is not torch's (``fully_shard``) and has an attribute.

    >>> _class_of(torch.nn.Linear(1, 1)).__name__
    'object'
    """
    own = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch."))
    return next((kind for kind in own if attribute in vars(kind)), object)


def fixed_steps(model: torch.nn.Module) -> dict[str, str]:
    """Tell why the steps of another model are not steps of this one, by what differs, if so.

    What differs is ``"input"`` or ``"output"``, or ``"fewer output"`` if this model has fewer; and
    ``"forcing"`` if a variable that it only reads was predicted.
    """
    _, core = find_core(model)
    assembling = _class_of(core, "_assemble_input").__name__
    if "Interpolator" in assembling:
        reason = f"the steps of {type(core).__name__} lie between each other"
        return {"input": reason, "output": reason}
    counted = [
        dataset
        for dataset, residual in dict(getattr(core, "residual", {})).items()
        if getattr(residual, "step", -1) >= 0
    ]
    reason = f"the residual connection of {few(counted)} counts its step from the oldest on"
    fixed = {"input": reason} if counted else {}
    conditioned = getattr(core, "condition_on_residual", False)
    if (
        conditioned and "residuals" in _INPUTS[assembling]
    ):  # the same columns' sum would be another one
        kind = type(core).__name__
        fixed["fewer output"] = f"{kind} reads the residual once more for each step of output"
        fixed["forcing"] = f"{kind} reads the residual of what it predicts once more"
    return fixed


# ── mappers ───────────────────────────────────────────────────────────────────────────────────

# what `_assemble_input` concatenates, by the class that defines it (anemoi/models/models/*.py)
_PLAIN, _TRANSPORT = ("inputs", "attributes"), ("inputs", "outputs", "attributes")
_INPUTS = {
    "AnemoiModelEncProcDec": _PLAIN,
    "AnemoiModelEncProcDecMultiOutInterpolator": _PLAIN,
    "AnemoiEnsModelEncProcDec": (*_PLAIN, "step", "residual"),
    "AnemoiDiffusionModelEncProcDec": _TRANSPORT,  # 0.13 and 0.14
    "AnemoiDiffusionTendModelEncProcDec": (*_TRANSPORT, "residuals"),
    "AnemoiTransportModelEncProcDec": _TRANSPORT,  # from 0.16 on
    "AnemoiTransportTendModelEncProcDec": (*_TRANSPORT, "residuals"),
}


def _inputs(core: Any, dataset: str) -> list[Part]:
    """Give the parts of the channels that the encoder reads."""
    assembling = _class_of(core, "_assemble_input")
    kinds = [assembling, _class_of(core, "_assemble_targets")]  # the latter only from 0.19 on
    foreign = [k for k in kinds if k is not object and not k.__module__.startswith("anemoi.")]
    if assembling.__name__ not in _INPUTS or foreign:
        raise ValueError(
            f"{type(core).__name__} has another order of channels: its _assemble_input or"
            f" _assemble_targets is not one of anemoi-models 0.13 to 0.19; {_WRITE_ONE}"
        )
    conditioned = bool(getattr(core, "condition_on_residual", False))
    parts: dict[str, list[Part]] = {
        "inputs": in_steps("input", "input", core.n_step_input),
        "outputs": in_steps("output", "output", core.n_step_output),
        "attributes": [core.node_attributes.attr_ndims[dataset]],
        "step": [1],
        "residual": [*conditioned * ["prognostic"]],
        "residuals": conditioned * in_steps("prognostic", "output", core.n_step_output),
    }
    return [part for name in _INPUTS[assembling.__name__] for part in parts[name]]


def _targets(core: Any, dataset: str) -> list[Part]:
    """Give the parts of the channels that a decoder is conditioned on.

    From anemoi-models 0.19 on they are the features of ``core.decoders_target_input``
    (anemoi/models/layers/target_features.py); before, they are what the encoder reads.
    """
    inputs = _inputs(core, dataset)
    decoders = getattr(core, "decoders_target_input", None)
    if decoders is None:
        return inputs
    steps = core.n_step_input
    parts: list[Part] = []
    for feature in decoders[core.dataset2decoder[dataset]].features:
        known: dict[str, list[Part]] = {
            "encoded_data": inputs,
            "forcings": in_steps("forcing", "input", steps),
            "prognostics": in_steps("prognostic", "input", steps),
            "coordinates": [feature.dim],
            "trainable_parameters": [feature.dim],
        }
        if feature.name not in known:
            raise ValueError(
                f"the decoder of {dataset} in {type(core).__name__} has the target_node_features"
                f" {feature.name}, which is none of {few(known)}; {_WRITE_ONE}"
            )
        parts += known[feature.name]
    return parts


def _layout_of_encoder(
    prefix: str, core: Any, tensors: Mapping[str, Any], dataset: str
) -> dict[str, Any]:
    """Lay out the first matrix of the embedding of a dataset's nodes.

    From anemoi-models 0.19 on encoders have the names that the configuration gives them.
    """
    keys = getattr(core, "dataset2encoder", {dataset: dataset})
    if dataset not in keys:  # a dataset that is predicted alone
        return {}
    embedding = f"{prefix}encoder.{keys[dataset]}.emb_nodes_src."
    matrices = _first_matrices(tensors, embedding)
    if not matrices:
        raise ValueError(f"no {embedding[:-1]} in {type(core).__name__}: {_WRITE_ONE}")
    return {name: {1: _inputs(core, dataset)} for name in matrices}


def _layout_of_decoder(
    prefix: str, core: Any, tensors: Mapping[str, Any], dataset: str
) -> dict[str, Any]:
    """Lay out the first matrix of the embedding of targets, and the last one of the extractor."""
    keys = getattr(core, "dataset2decoder", {dataset: dataset})
    if dataset not in keys:  # a dataset that is read alone
        return {}
    decoder = f"{prefix}decoder.{keys[dataset]}."
    extractors = [
        name
        for name in tensors
        if name.startswith(f"{decoder}node_data_extractor.") and _is_matrix(tensors[name])
    ]
    if not extractors:
        raise ValueError(f"no {decoder}node_data_extractor in {type(core).__name__}: {_WRITE_ONE}")
    # GNNs and point-wise mappers have no such embedding: they are not conditioned on the targets
    embeddings = _first_matrices(tensors, f"{decoder}emb_nodes_dst.")
    layout: dict[str, Any] = {name: {1: _targets(core, dataset)} for name in embeddings}
    for name in (extractors[-1], f"{extractors[-1].rpartition('.')[0]}.bias"):
        rows = in_steps("output", "output", core.n_step_output)
        layout |= {name: {0: rows}} if name in tensors else {}
    return layout


_FIRST = ("weight", "mlp.0.weight", "mlp.0.gate_proj.weight", "mlp.0.value_proj.weight")


def _first_matrices(tensors: Mapping[str, Any], prefix: str) -> list[str]:
    """Find what an embedding multiplies its channels with: gated layers have two matrices."""
    return [prefix + name for name in _FIRST if _is_matrix(tensors.get(prefix + name))]


def _is_matrix(tensor: Any) -> bool:
    return getattr(tensor, "ndim", 0) == 2  # noqa: PLR2004 - a matrix


# ── residuals, boundings, processors ──────────────────────────────────────────────────────────


def _layout_of_residual(
    prefix: str, core: Any, tensors: Mapping[str, Any], dataset: str
) -> dict[str, Any]:
    """Lay out the Ornstein residuals: theta, mu and a row for each regressor, by variable.

    They are those of anemoi/models/layers/residual.py; the spectral one has a filter, too.
    """
    residual = dict(getattr(core, "residual", {})).get(dataset)
    if not hasattr(residual, "_regressors_input_idx"):
        return {}
    rows = {0: [2, regressors_of(core, dataset, residual)], 1: ["prognostic"]}
    filtered = _inputs_at(core, dataset, getattr(residual, "_truncation_input_idx", ()))
    is_whole = hasattr(residual, "_internal_input_idx") and not untruncated(core, dataset, residual)
    truncated = {0: ["prognostic" if is_whole else filtered]}
    entries = {"weight": rows, "muzero": rows, "filter": truncated, "walias": truncated}
    front = f"{prefix}residual.{dataset}."
    return {front + name: entry for name, entry in entries.items() if front + name in tensors}


def regressors_of(core: Any, dataset: str, residual: Any) -> list[str]:
    """Give the variables that a residual has a row of weights for; none if it has no such rows."""
    return _inputs_at(core, dataset, getattr(residual, "_regressors_input_idx", ()))


def untruncated(core: Any, dataset: str, residual: Any) -> list[str]:
    """Give the prognostic variables that a residual with a filter leaves out of it; else none."""
    filtered = set(map(int, getattr(residual, "_truncation_input_idx", ())))
    prognostic = map(int, getattr(residual, "_internal_input_idx", ()) if filtered else ())
    return _inputs_at(core, dataset, [place for place in prognostic if place not in filtered])


def _inputs_at(core: Any, dataset: str, positions: Iterable[Any]) -> list[str]:
    """Give the names of the input variables at some positions."""
    index = core.data_indices[dataset].model.input.name_to_index if positions else {}
    names = {int(position): name for name, position in index.items()}
    return [names[int(position)] for position in positions]


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


_PROCESSORS = r"(.*\.)?(pre|post)_processors(_tendencies)?\.{}\..*"


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


# ── what the layout does not know ─────────────────────────────────────────────────────────────

# modules of anemoi.models.layers with no tensors over variables but those laid out above
_LAYERS = (
    *("mapper", "processor", "graph", "graph_provider", "aggregator", "ensemble", "diffusion"),
    *("sparse_projector", "spectral_transforms", "spectral_helpers"),
)
_FREE = frozenset(f"anemoi.models.layers.{layer}" for layer in _LAYERS)
_FREE_CHILDREN = ("noise_cond_mlp", "noise_embedder")  # of transport models
# the layers of an embedding or extractor that the mappers build, beside which may be others
_AT_ENDS = re.compile(r".*\.(emb_nodes_src|emb_nodes_dst|node_data_extractor)\.(.*)")
_BUILT = re.compile(r"((mlp\.)?\d+\.(gate_proj\.|value_proj\.)?|layer_norm\.)?(weight|bias)")


def unknown_tensors(
    model: torch.nn.Module, layout: Mapping[str, Mapping[str, Any]]
) -> dict[str, frozenset[str]]:
    """Find the tensors of an Anemoi model that may run over variables, for all that is known.

    Args:
        model: the model.
        layout: its layout, as `anemoi_layout` derives it.

    Returns:
        The names of tensors that neither the layout nor this module knows, for each dataset whose
        name is in theirs, or which has none.
    """
    prefix, core = find_core(model)
    free = {f"{prefix}{name}." for name in _FREE_CHILDREN}
    free |= {
        f"{prefix}{path}."
        for path, module in core.named_modules()
        if _class_of(module).__module__ in _FREE
    }
    known = {name for entries in layout.values() for name in entries}
    unknown = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
        and name not in known
        and not (_is_below(free, name) and _is_built(name))
    ]
    return {dataset: frozenset(_of_dataset(unknown, dataset, layout)) for dataset in layout}


def _is_below(prefixes: Iterable[str], name: str) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes)


def _is_built(name: str) -> bool:
    """Tell whether a mapper of Anemoi's builds a tensor, as far as its name goes."""
    match = _AT_ENDS.fullmatch(name)
    return match is None or _BUILT.fullmatch(match[2]) is not None


def _of_dataset(names: Iterable[str], dataset: str, datasets: Iterable[str]) -> Iterator[str]:
    """Choose the names that have a dataset's in them, or none."""
    others = {other for other in datasets if other != dataset}
    for name in names:
        components = set(name.split("."))
        if dataset in components or not components & others:
            yield name


def suspect_axis(  # noqa: PLR0913, PLR0917 - both sides of a tensor
    shape: Sequence[int],
    wanted: Sequence[int],
    source: Variables,
    target: Variables,
    entries: Mapping[str, Any],
    steps: Mapping[str, int],
) -> str:
    """Describe the axis of an unknown tensor that could run over variables; empty if none could.

    Such an axis has the size of a group of variables, or of the channels of another tensor, in the
    checkpoint, which may have other `steps`, and in the model, and these are not the same there.

    >>> source, target = Variables({"t": 0, "z": 1}), Variables({"t": 0, "q": 1})
    >>> suspect_axis((3, 2), (3, 2), source, target, {}, {})
    'axis 1 of size 2 could run over all'
    >>> suspect_axis((3, 2), (3, 2), source, source, {}, {})
    ''
    """
    known = [tuple(parts) for entry in entries.values() for parts in axes(entry).values()]
    own = own_steps([entries])
    known += [
        tuple(in_steps(group, kind, own[kind]))
        for group in GROUPS
        for kind in own.keys() & steps.keys()
    ]
    repeats = {1, *(parts.count(group) for parts in known for group in GROUPS)} - {0}
    groups = [(group,) * count for group in GROUPS for count in sorted(repeats)]
    if len(shape) != len(wanted):
        return ""
    for axis, sizes in enumerate(zip(shape, wanted, strict=True)):
        for parts in (*groups, *known):
            before, after = labels(with_steps(parts, steps), source), labels(parts, target)
            if before != after and sizes == (len(before), len(after)):
                named = " + ".join(map(part_name, parts))
                return f"axis {axis} of size {sizes[0]} could run over {named}"
    return ""
