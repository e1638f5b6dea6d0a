"""What `anemoi_layout` knows, on models shaped like those of anemoi-models 0.19."""

import collections
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from anemoi_ckpt import MismatchError, load_into
from strategies import (
    align_variables,
    anemoi_layout,
    exclude,
    filter_shapes,
    keep_progress,
    transfer_learning,
)

INDEX = {"t": 0, "z": 1, "q": 2, "cos": 3, "tp": 4}
MOVED = {"z": 0, "q": 1, "t": 2, "cos": 3, "tp": 4}
REPLACED = {"t": 0, "z": 1, "u": 2, "cos": 3, "tp": 4}
S, A, WIDTH = 2, 4, 9  # steps of input, attributes of nodes, channels
MAPPERS = "anemoi.models.layers.mapper"


def of(module: str, name: str, *bases: type, **members: Any) -> Any:
    """A class as if it were defined in a module of Anemoi's."""
    return type(name, bases or (nn.Module,), {"__module__": module, **members})


def indices(index: dict[str, int], forcing: Sequence[str] = ("cos",)) -> Any:
    reads = [name for name in index if name != "tp"]
    model = SimpleNamespace(
        input=SimpleNamespace(name_to_index={name: place for place, name in enumerate(reads)})
    )
    roles = {"forcing": list(forcing), "diagnostic": ["tp"], "target": []}
    return SimpleNamespace(name_to_index=dict(index), model=model, **roles)


def core(  # noqa: PLR0913 - by keyword
    index: dict[str, int] = INDEX,
    *,
    assembles: str = "AnemoiModelEncProcDec",
    inputs: int = S * 4 + A,
    targets: int = 0,
    features: Sequence[str] = (),
    gated: bool = False,
    regressors: Sequence[str] | None = None,
    conditioned: bool = False,
    names: Any = None,
    steps: tuple[int, int] = (S, 1),
) -> Any:
    """An encoder-processor-decoder whose inputs are four variables of two steps, and attributes."""
    made = of("anemoi.models.models.x", assembles, _assemble_input=None)()
    if conditioned:
        made.condition_on_residual = True
    made.data_indices = {"data": indices(index)}
    made.n_step_input, made.n_step_output = steps
    made.node_attributes = of("anemoi.models.layers.graph", "NamedNodesAttributes")()
    made.node_attributes.attr_ndims = {"data": A}
    made.dataset2encoder = {"data": "0"} if names is None else names
    made.dataset2decoder = {"data": "0"} if names is None else names
    dims = {"coordinates": 3, "trainable_parameters": 1}
    if features:
        parts = [SimpleNamespace(name=name, dim=dims.get(name)) for name in features]
        made.decoders_target_input = {"0": SimpleNamespace(features=parts)}
    encoder, decoder = (of(MAPPERS, "Mapper")() for _ in range(2))
    encoder.emb_nodes_src = nn.Linear(inputs, WIDTH)
    if gated:
        layer = nn.Module()
        layer.gate_proj, layer.value_proj = nn.Linear(inputs, WIDTH), nn.Linear(inputs, WIDTH)
        encoder.emb_nodes_src = nn.Module()
        encoder.emb_nodes_src.mlp = nn.Sequential(layer, nn.Linear(WIDTH, WIDTH))
    if targets:
        decoder.emb_nodes_dst = nn.Linear(targets, WIDTH)
    decoder.node_data_extractor = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * steps[1]))
    made.encoder, made.decoder = nn.ModuleDict({"0": encoder}), nn.ModuleDict({"0": decoder})
    made.boundings = nn.ModuleDict({"data": nn.ModuleList()})
    if regressors is not None:
        residual = nn.Module()
        residual._regressors_input_idx = [
            made.data_indices["data"].model.input.name_to_index[name] for name in regressors
        ]
        residual.weight = nn.Parameter(torch.arange(3.0 * len(regressors) + 6).reshape(-1, 3))
        made.residual = nn.ModuleDict({"data": residual})
    return made


def stored(model: Any) -> dict[str, Any]:
    parameters = {"data_indices": model.data_indices}
    return {"state_dict": dict(model.state_dict()), "hyper_parameters": parameters}


# ── channels ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("assembles", "conditioned", "expected"),
    [
        ("AnemoiModelEncProcDec", False, ["input", "input", A]),
        ("AnemoiEnsModelEncProcDec", False, ["input", "input", A, 1]),
        ("AnemoiEnsModelEncProcDec", True, ["input", "input", A, 1, "prognostic"]),
        ("AnemoiTransportModelEncProcDec", False, ["input", "input", "output", A]),
        ("AnemoiDiffusionModelEncProcDec", False, ["input", "input", "output", A]),
        ("AnemoiTransportTendModelEncProcDec", False, ["input", "input", "output", A]),
        (
            "AnemoiTransportTendModelEncProcDec",
            True,
            ["input", "input", "output", A, "prognostic"],
        ),
    ],
)
def test_the_channels_are_those_that_a_model_assembles(
    assembles: str, conditioned: bool, expected: Any
) -> None:
    sizes = {"input": 4, "output": 4, "prognostic": 3}
    inputs = sum(sizes.get(part, part) for part in expected)
    options = {"assembles": assembles, "conditioned": conditioned, "inputs": inputs}
    layout = anemoi_layout(core(**options, targets=inputs))["data"]
    assert layout["encoder.0.emb_nodes_src.weight"] == {1: expected}
    assert layout["decoder.0.emb_nodes_dst.weight"] == {1: expected}
    assert layout["decoder.0.node_data_extractor.1.bias"] == {0: ["output"]}


@pytest.mark.parametrize("module", ["anemoi.models.models.x", "their.own"])
def test_what_assembles_otherwise_is_refused(module: str) -> None:
    """Even if the sizes agree: the order may be another."""
    model = core()
    known = module == "their.own"
    name = "AnemoiModelEncProcDec" if known else "AnemoiModelAutoEncoder"
    model.__class__ = of(module, name, type(model), _assemble_input=None)
    told = r"_assemble_input or _assemble_targets is not one of anemoi-models 0\.13"
    with pytest.raises(ValueError, match=told):
        anemoi_layout(model)
    model.__class__ = of("their.own", "Theirs", type(core()), _assemble_targets=None)
    with pytest.raises(ValueError, match=told):
        anemoi_layout(model)
    model.__class__ = of(module, "Theirs", type(core()))  # a subclass that leaves it as it is
    assert anemoi_layout(model)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (["encoded_data"], ["input", "input", A]),
        (["prognostics", "coordinates"], ["prognostic", "prognostic", 3]),
        (
            ["forcings", "trainable_parameters", "coordinates", "prognostics"],
            ["forcing", "forcing", 1, 3, "prognostic", "prognostic"],
        ),
    ],
)
def test_targets_are_in_the_order_of_their_features(features: Any, expected: Any) -> None:
    sizes = {"input": 4, "prognostic": 3, "forcing": 1}
    targets = sum(sizes.get(part, part) for part in expected)
    old, new = (core(i, features=features, targets=targets) for i in (INDEX, MOVED))
    name = "decoder.0.emb_nodes_dst.weight"
    assert anemoi_layout(new)["data"][name] == {1: expected}
    load_into(new, stored(old), align_variables(model=new))
    was, now = old.state_dict()[name], new.state_dict()[name]
    place = expected.index("prognostic") if "prognostic" in expected else 0
    start = sum(sizes.get(part, part) for part in expected[:place])
    for variable in ("t", "z", "q"):  # in both, these come first
        assert torch.equal(now[:, start + MOVED[variable]], was[:, start + INDEX[variable]])


# ── steps ─────────────────────────────────────────────────────────────────────────────────────


def stepped(was: tuple[int, int], assembles: str = "AnemoiModelEncProcDec", **options: Any) -> Any:
    """A model of some steps of input and output."""
    read = {"Plain": was[0], "Transport": sum(was), "Tend": sum(was)}
    kind = next((kind for kind in ("Tend", "Transport") if kind in assembles), "Plain")
    inputs = 4 * read[kind] + A + 3 * was[1] * options.get("conditioned", False)
    return core(assembles=assembles, inputs=inputs, steps=was, **options)


@pytest.mark.parametrize("new", ["zeros", {"u": "t"}])
@pytest.mark.parametrize("index", [INDEX, REPLACED])
@pytest.mark.parametrize(
    ("was", "now"), [((2, 1), (2, 2)), ((2, 3), (3, 1)), ((1, 2), (2, 1)), ((3, 1), (1, 1))]
)
def test_the_last_inputs_and_the_first_outputs_are_kept(
    was: tuple[int, int], now: tuple[int, int], index: dict[str, int], new: Any
) -> None:
    if isinstance(new, dict) and "u" not in index:
        new = "model"
    before, model = stepped(was), stepped(now, index=index)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    align = align_variables(model=model, new=new)
    load_into(model, stored(before), align)
    after = model.state_dict()
    reads, rows = "encoder.0.emb_nodes_src.weight", "decoder.0.node_data_extractor.1.bias"
    for back in range(1, now[0] + 1):
        for place, name in enumerate(n for n in index if n != "tp"):
            at = 4 * (now[0] - back) + place
            source = "t" if name == "u" and isinstance(new, dict) else name
            expected = 0 * own[reads][:, at] if new == "zeros" else own[reads][:, at]
            if back <= was[0] and source in INDEX:
                there = [n for n in INDEX if n != "tp"].index(source)
                expected = before.state_dict()[reads][:, 4 * (was[0] - back) + there]
            assert torch.equal(after[reads][:, at], expected), (back, name)
    for step in range(now[1]):
        for place, name in enumerate(n for n in index if n != "cos"):
            expected = 0 * own[rows][0] if new == "zeros" else own[rows][4 * step + place]
            source = "t" if name == "u" and isinstance(new, dict) else name
            if step < was[1] and source in INDEX:
                there = [n for n in INDEX if n != "cos"].index(source)
                expected = before.state_dict()[rows][4 * step + there]
            assert torch.equal(after[rows][4 * step + place], expected), (step, name)
    assert torch.equal(after[reads][:, 4 * now[0] :], before.state_dict()[reads][:, 4 * was[0] :])
    aligned = align(stored(before))
    assert align(aligned) is aligned


TENDENCY = "AnemoiTransportTendModelEncProcDec"
INTERPOLATOR = "AnemoiModelEncProcDecMultiOutInterpolator"


@pytest.mark.parametrize(
    ("assembles", "was", "now", "options", "told"),
    [
        (INTERPOLATOR, (2, 1), (2, 2), {}, "lie between each other"),
        (INTERPOLATOR, (2, 1), (3, 1), {}, "lie between each other"),
        (TENDENCY, (2, 2), (2, 1), {"conditioned": True}, "reads the residual once more"),
        ("AnemoiModelEncProcDec", (2, 1), (3, 1), {}, "residual connection of data"),
    ],
)
def test_steps_that_are_not_the_models_are_refused(
    assembles: str, was: Any, now: Any, options: dict[str, Any], told: str
) -> None:
    old, new = (stepped(steps, assembles, **options) for steps in (was, now))
    if "residual connection" in told:
        new.residual = nn.ModuleDict(
            {"data": of("anemoi.models.layers.residual", "Skip", step=0)()}
        )
    for align in (align_variables(model=new), transfer_learning(new)):
        with pytest.raises(MismatchError, match=rf"have {was[0]} steps of input and .*{told}"):
            load_into(new, stored(old), align)
    assert load_into(new, stored(new), align_variables(model=new), strict=True)


def test_more_outputs_of_a_tendency_model_and_unaligned_ones() -> None:
    old, new = (stepped(steps, TENDENCY, conditioned=True) for steps in ((2, 1), (2, 2)))
    assert load_into(new, stored(old), align_variables(model=new), strict=True)
    old, new = (stepped(steps, "AnemoiTransportModelEncProcDec") for steps in ((2, 1), (1, 2)))
    told = "has 2 steps of input and 1 step of output, and the model 1 step of input and 2 steps"
    with pytest.raises(MismatchError, match=told):  # as many channels, of other steps
        load_into(new, stored(old), filter_shapes(new))
    assert load_into(new, stored(old), align_variables(model=new), strict=True)


@pytest.mark.parametrize("section", ["task", "training"])
def test_the_configuration_knows_its_steps(section: str) -> None:
    old, new = stepped((2, 1)), stepped((2, 2))

    def configured(count: int) -> dict[str, Any]:
        config = {section: {"multistep_input": 2, "multistep_output": count}, "model": {}}
        parameters = {"data_indices": old.data_indices, "config": config}
        return {**stored(old), "hyper_parameters": parameters}

    for count in (1, 2):  # 2: as after an alignment
        assert load_into(new, configured(count), align_variables(model=new), strict=True)
    with pytest.raises(MismatchError, match="its configuration has 2 steps of input and 3 steps"):
        load_into(new, configured(3), align_variables(model=new))


def test_a_size_of_no_count_of_steps_shows_the_sum() -> None:
    old, new = stepped((2, 1)), stepped((2, 2), index=MOVED)
    extractor = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6))
    old.decoder["0"].node_data_extractor = extractor
    with pytest.raises(MismatchError, match=r"has 6 along axis 0, .*output 4 \+ output 4 = 8"):
        load_into(new, stored(old), align_variables(model=new))


@pytest.mark.parametrize("same", [True, False])
def test_an_unknown_tensor_may_run_over_steps(same: bool) -> None:
    old, new = stepped((2, 1)), stepped((2, 1) if same else (2, 2))
    for model in (old, new):
        model.theirs = nn.Linear(3, 4 * model.n_step_output)
    if same:
        assert load_into(new, stored(old), align_variables(model=new), strict=True)
        return
    with pytest.raises(MismatchError, match=r"theirs.weight \(axis 0 of size 4 could run over"):
        load_into(new, stored(old), align_variables(model=new))


def test_features_of_ones_own_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_node_features orography, which is none of enc"):
        anemoi_layout(core(features=["orography"], targets=5))


def test_both_matrices_of_gated_layers_run_over_variables() -> None:
    old, new = core(gated=True), core(MOVED, gated=True)
    names = [f"encoder.0.emb_nodes_src.mlp.0.{each}_proj.weight" for each in ("gate", "value")]
    assert set(load_into(new, stored(old), align_variables(model=new)).aligned).issuperset(names)
    for name in names:
        assert torch.equal(new.state_dict()[name][:, 0], old.state_dict()[name][:, 1])


def test_datasets_without_encoder_or_decoder() -> None:
    found = anemoi_layout(core(names={}))
    assert found == {"data": {"forcing": ["cos"], "diagnostic": ["tp"], "target": []}}


@pytest.mark.parametrize("part", ["encoder.0.emb_nodes_src", "decoder.0.node_data_extractor"])
def test_a_mapper_of_other_parts_is_refused(part: str) -> None:
    model = core()
    path, _, name = part.rpartition(".")
    setattr(model.get_submodule(path), name, nn.Identity())
    with pytest.raises(ValueError, match=f"no {re.escape(part)} in AnemoiModelEncProcDec"):
        anemoi_layout(model)


def test_ornstein_residuals_follow_variables_and_regressors() -> None:
    old, new = core(regressors=["cos"]), core(MOVED, regressors=["cos"])
    entry = {0: [2, ["cos"]], 1: ["prognostic"]}
    assert anemoi_layout(new)["data"]["residual.data.weight"] == entry
    expected = old.residual["data"].weight[:, [1, 2, 0]].clone()
    load_into(new, stored(old), align_variables(model=new))
    assert torch.equal(new.residual["data"].weight, expected)
    with pytest.raises(MismatchError, match=r"residual\.data\.weight.*align_variables"):
        load_into(core(MOVED, regressors=["cos"]), stored(old))
    spectral = core(regressors=[])
    residual = spectral.residual["data"]
    residual._truncation_input_idx = [2, 0]
    residual.filter = nn.Parameter(torch.zeros(2, 5))
    assert anemoi_layout(spectral)["data"]["residual.data.filter"] == {0: [["q", "t"]]}
    residual._internal_input_idx = [0, 1, 2]  # z is left out
    told = r"skip_truncate_variables = t, and the model with z, which 1 tensors"
    for skipped in (["z"], [], None):
        settings = {"residual": {"datasets": {"data": {"skip_truncate_variables": skipped}}}}
        assert load_into(spectral, configured(spectral, **settings), strict=True)
    settings = {"residual": {"datasets": {"data": {"skip_truncate_variables": ["t"]}}}}
    with pytest.raises(MismatchError, match=told):
        load_into(spectral, configured(spectral, **settings))
    residual._truncation_input_idx = [0, 1, 2]
    residual.filter = nn.Parameter(torch.zeros(3, 2))
    assert anemoi_layout(spectral)["data"]["residual.data.filter"] == {0: ["prognostic"]}


# ── what the layout does not know ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("index", [MOVED, REPLACED])
@pytest.mark.parametrize(
    ("path", "shape", "told"),
    [
        ("extra", (7, 3), r"extra \(axis 1 of size 3 could run over prognostic\)"),
        ("extra", (8,), r"extra \(axis 0 of size 8 could run over input \+ input\)"),
        ("extra", (12, 1), r"extra \(axis 0 of size 12 could run over input \+ input \+ 4\)"),
        ("encoder.0.emb_nodes_src.lora", (2, 12), r"emb_nodes_src\.lora \(axis 1 of size 12"),
        ("encoder.0.gate", (12,), ""),
        ("extra", (7, 11), ""),
        ("extra", (), ""),
    ],
)
def test_what_may_run_over_variables_is_refused(
    index: Any, path: str, shape: Any, told: str
) -> None:
    def model(of_index: dict[str, int]) -> Any:
        made = core(of_index)
        parent, _, name = path.rpartition(".")
        made.get_submodule(parent).register_parameter(name, nn.Parameter(torch.ones(shape)))
        return made

    new = model(index)
    if not told:
        assert path in load_into(new, stored(model(INDEX)), align_variables(model=new)).loaded
        return
    for strategy in (align_variables(model=new), transfer_learning(new)):
        with pytest.raises(MismatchError, match=rf"does not know .*{told}.*exclude leaves"):
            load_into(new, stored(model(INDEX)), strategy)
    with pytest.raises(MismatchError, match=rf"run over them: .*{re.escape(path)}"):
        load_into(new, stored(model(INDEX)))
    assert load_into(new, stored(model(INDEX)), exclude(path), align_variables(model=new)).aligned
    layout = anemoi_layout(new)
    layout["data"][path] = {axis: [size] for axis, size in enumerate(shape)}
    report = load_into(new, stored(model(INDEX)), align_variables(layout=layout, model=new))
    assert path in report.loaded


def test_a_mapper_of_ones_own_has_tensors_that_nobody_knows() -> None:
    def model(index: dict[str, int]) -> Any:
        made = core(index)
        made.encoder["0"].__class__ = of("their.own", "Mapper", type(made.encoder["0"]))
        made.encoder["0"].gate = nn.Parameter(torch.ones(12))
        return made

    new = model(MOVED)
    with pytest.raises(MismatchError, match=r"encoder\.0\.gate \(axis 0 of size 12"):
        load_into(new, stored(model(INDEX)), align_variables(model=new))


def test_an_unknown_tensor_of_another_shape_is_left_to_others() -> None:
    def model(index: dict[str, int], *shape: int) -> Any:
        made = core(index)
        made.extra = nn.Parameter(torch.ones(shape))
        return made

    new = model(MOVED, 3, 1)
    report = load_into(new, stored(model(INDEX, 3)), align_variables(model=new), filter_shapes(new))
    assert set(report.mismatched) == {"extra"}


def test_an_unknown_tensor_of_another_dataset_is_its_own_matter() -> None:
    def model(index: dict[str, int]) -> Any:
        made = core(index)
        made.data_indices = {"data": indices(index), "more": indices(INDEX)}
        made.node_attributes.attr_ndims = {"data": A, "more": A}
        made.dataset2encoder = made.dataset2decoder = {"data": "0", "more": "1"}
        other = core()
        made.encoder["1"], made.decoder["1"] = other.encoder["0"], other.decoder["0"]
        made.boundings["more"] = nn.ModuleList()
        made.scale = nn.ParameterDict({"more": torch.ones(3)})
        return made

    new = model(MOVED)
    report = load_into(new, stored(model(INDEX)), align_variables(model=new))
    assert "scale.more" in report.loaded
    assert "encoder.1.emb_nodes_src.weight" not in report.aligned


# ── what a configuration tells, and no shape ──────────────────────────────────────────────────


def configured(model: Any, **settings: Any) -> dict[str, Any]:
    made = stored(model)
    made["hyper_parameters"]["config"] = {"model": settings}
    return made


FEATURES = ["prognostics", "coordinates", "trainable_parameters"]


def test_other_features_of_equal_size_are_refused() -> None:
    model = core(features=FEATURES, targets=10)
    decoders = {"0": {"target_node_features": FEATURES}}
    assert load_into(model, configured(model, decoders=decoders), strict=True)
    name = "decoder.0.emb_nodes_dst.weight"
    other = {"0": {"target_node_features": ["coordinates", "trainable_parameters", "prognostics"]}}
    for chain in ((), (align_variables(model=model),), (transfer_learning(model),)):
        told = r"target_node_features = coordinates, .*, and the model with prognostics, coord"
        with pytest.raises(MismatchError, match=rf"{told}.*{re.escape(name)}.*or exclude these"):
            load_into(model, configured(model, decoders=other), *chain)
    load_into(model, configured(model, decoders=other), exclude("decoder.0.emb_nodes_dst"))
    for unknown in ({}, {"0": {"target_node_features": "${features}"}}, {"0": 3}):
        assert load_into(model, configured(model, decoders=unknown), strict=True)
    interpolated = {"0": {"target_node_features": ["${feature}"]}}
    assert load_into(model, configured(model, decoders=interpolated), strict=True)
    assert load_into(model, stored(model), strict=True)


def test_other_regressors_and_bounded_variables_are_refused() -> None:
    model = core(regressors=["t"])
    bounding = nn.Module()
    bounding.variables = ["z"]
    bounding.register_buffer("norm_min_val", torch.zeros(1))
    model.boundings["data"].append(bounding)

    def settings(regressor: str, *bounded: str) -> dict[str, Any]:
        return {
            "residual": {"datasets": {"data": {"regressors": [regressor]}}},
            "bounding": {"datasets": {"data": [{"variables": list(bounded)}]}},
        }

    # a variable that the checkpoint does not have is not bounded there, either
    assert load_into(model, configured(model, **settings("t", "z", "hcc")), strict=True)
    with pytest.raises(MismatchError, match=r"residual\.datasets\.data\.regressors = q, and the"):
        load_into(model, configured(model, **settings("q", "z")))
    with pytest.raises(
        MismatchError, match=r"data\.0\.variables = q, and the model with z, which 1"
    ):
        load_into(model, configured(model, **settings("t", "q")))
    none = {"bounding": {"datasets": {"data": []}}}
    assert load_into(model, configured(model, **none), strict=True)


# ── one encoder for several datasets ──────────────────────────────────────────────────────────


def several(
    first: dict[str, int], second: dict[str, int], keys: tuple[str, str] = ("0", "0")
) -> Any:
    """A model of two datasets, whose data go through the encoders with these keys."""
    made = core(first)
    made.data_indices = {"data": indices(first), "more": indices(second)}
    made.node_attributes.attr_ndims = {"data": A, "more": A}
    made.dataset2encoder = made.dataset2decoder = dict(zip(("data", "more"), keys, strict=True))
    routes: dict[str, list[str]] = {}
    for dataset, key in made.dataset2encoder.items():
        routes.setdefault(key, []).append(dataset)
    made.encoder2datasets = made.decoder2datasets = routes
    made.boundings["more"] = nn.ModuleList()
    if len(routes) > 1:
        other = core(second)
        made.encoder["1"], made.decoder["1"] = other.encoder["0"], other.decoder["0"]
    return made


def test_a_shared_encoder_is_aligned_if_its_datasets_agree() -> None:
    old, new = several(INDEX, INDEX), several(MOVED, MOVED)
    load_into(new, stored(old), align_variables(model=new))
    name = "encoder.0.emb_nodes_src.weight"
    assert torch.equal(new.state_dict()[name][:, 0], old.state_dict()[name][:, 1])
    for other in (several(MOVED, INDEX), several(INDEX, MOVED)):
        told = rf"{re.escape(name)} is shared by the datasets data, more, whose variables change"
        with pytest.raises(MismatchError, match=told):
            load_into(other, stored(old), align_variables(model=other))
        with pytest.raises(MismatchError, match=r"run over them: .*emb_nodes_src"):
            load_into(other, stored(old))


def test_datasets_through_other_encoders_are_refused() -> None:
    old, new = several(INDEX, INDEX, ("0", "1")), several(INDEX, INDEX, ("1", "0"))

    def mappers(**keys: str) -> dict[str, Any]:
        encoders = {key: {"source_datasets": [name]} for name, key in keys.items()}
        decoders = {key: {"target_datasets": [name]} for name, key in keys.items()}
        return {"encoders": encoders, "decoders": decoders}

    checkpoint = configured(old, **mappers(data="0", more="1"))
    assert load_into(several(INDEX, INDEX, ("0", "1")), checkpoint, strict=True)
    told = r"encoders\.1\.source_datasets = more, and the model with data, which 2 tensors"
    with pytest.raises(MismatchError, match=told):
        load_into(new, checkpoint)
    with pytest.raises(MismatchError, match=r"decoders\.1\.target_datasets"):
        load_into(new, checkpoint, exclude("encoder"))


def test_a_dataset_alone_does_not_go_through_the_encoder_of_another() -> None:
    old, new = core(), several(INDEX, INDEX, ("1", "0"))
    routes = {
        "encoders": {"0": {"source_datasets": ["data"]}},
        "decoders": {"0": {"target_datasets": ["data"]}},
    }
    told = r"encoders\.0\.source_datasets = data, and the model with more, which 2 tensors"
    with pytest.raises(MismatchError, match=told):
        load_into(new, configured(old, **routes), filter_shapes(new))
    same = several(INDEX, INDEX, ("0", "1"))
    assert load_into(same, configured(old, **routes), filter_shapes(same)).loaded
    shared = several(INDEX, INDEX)  # which both datasets go through, as one did
    assert load_into(shared, configured(old, **routes), filter_shapes(shared)).loaded
    renamed = {
        "encoders": {"0": {"source_datasets": ["era5"]}},
        "decoders": {"0": {"target_datasets": ["era5"]}},
    }
    elsewhere = configured(old, **renamed)
    elsewhere["hyper_parameters"]["data_indices"] = {"era5": old.data_indices["data"]}
    assert load_into(core(), elsewhere, strict=True)


def concatenating(first: str, second: str) -> Any:
    """A model of two datasets, whose latents stand side by side."""
    made = several(INDEX, INDEX, ("0", "1"))
    routes = {"0": [first], "1": [second]}
    made.encoder2datasets = made.decoder2datasets = routes
    made.dataset2encoder = made.dataset2decoder = {first: "0", second: "1"}
    made.latent_aggregator = of("anemoi.models.layers.aggregator", "ConcatAggregator")()
    made.processor = of("anemoi.models.layers.processor", "Processor")()
    made.processor.proc = nn.Linear(2 * WIDTH, 2 * WIDTH)
    return made


def test_latents_side_by_side_in_another_order_are_refused() -> None:
    """The encoders may be found by their names, which do not tell the order."""
    model = concatenating("data", "more")
    target = "anemoi.models.layers.aggregator.ConcatAggregator"

    def settings(*datasets: str, kind: str = target) -> dict[str, Any]:
        encoders = {f"of {name}": {"source_datasets": [name]} for name in datasets}
        return {"encoders": encoders, "latent_aggregator": {"_target_": kind}}

    assert load_into(model, configured(model, **settings("data", "more")), strict=True)
    told = r"the latents of encoders = more, data, and the model with data, more, which 10 tensors"
    with pytest.raises(MismatchError, match=told):
        load_into(model, configured(model, **settings("more", "data")))
    summed = settings("more", "data", kind="anemoi.models.layers.aggregator.SumAggregator")
    assert load_into(model, configured(model, **summed), strict=True)


# ── edges and nodes ───────────────────────────────────────────────────────────────────────────


def attributed(*attributes: str) -> Any:
    """A model whose mappers and processor multiply these attributes of edges."""
    made = core()
    made.encoder["0"].emb_edges = nn.Linear(3, WIDTH)
    made.processor = of("anemoi.models.layers.processor", "Processor")()
    made.processor.lin_edge = nn.Linear(3, WIDTH)
    section = {"sub_graph_edge_attributes": list(attributes)}
    mappers = {"0": {"mapper": section}}
    made.config = {"model": {"encoders": mappers, "decoders": mappers, "processor": section}}
    made.encoder2datasets = made.decoder2datasets = {"0": ["data"]}
    return made


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (
            {"encoders": {"0": {"mapper": {"sub_graph_edge_attributes": ["dirs", "length"]}}}},
            (
                r"encoders\.0\.mapper\.sub_graph_edge_attributes = dirs, length, and the model with"
                r" length, dirs, which 2 tensors depend on: encoder\.0\.emb_edges"
            ),
        ),
        (  # as before anemoi-models 0.19
            {"encoder": {"sub_graph_edge_attributes": ["dirs", "length"]}},
            r"= dirs, length, .* encoder\.0\.emb_edges",
        ),
        (
            {"processor": {"sub_graph_edge_attributes": "${model.edges}"}, "edges": ["length"]},
            r"processor\.sub_graph_edge_attributes = length, .* processor\.lin_edge",
        ),
    ],
)
def test_other_attributes_of_edges_are_refused(settings: dict[str, Any], label: str) -> None:
    model = attributed("length", "dirs")
    for chain in ((), (align_variables(model=model),), (transfer_learning(model),)):
        with pytest.raises(MismatchError, match=label):
            load_into(model, configured(model, **settings), *chain)
    assert load_into(model, configured(model, **model.config["model"]), strict=True)
    refusing = collections.UserDict()  # as OmegaConf refuses what refers to something that is gone
    refusing.get = lambda _key: {}["gone"]  # type: ignore[method-assign] # of the case
    assert load_into(model, configured(model, processor=refusing), strict=True)
    endless = {"processor": {"sub_graph_edge_attributes": "${model.a}"}, "a": "${model.a}"}
    assert load_into(model, configured(model, **endless), strict=True)


def located(latitudes: Sequence[float]) -> Any:
    made = core()
    turned = torch.tensor(latitudes)[:, None]
    coordinates = torch.cat([turned.sin(), turned.cos()], 1)
    made.node_attributes.register_buffer("latlons_data", coordinates)
    made.node_attributes.trainable_tensors = nn.ModuleDict({"data": nn.Module()})
    made.node_attributes.trainable_tensors["data"].trainable = nn.Parameter(torch.randn(3, 2))
    return made


def test_nodes_in_other_places_are_refused() -> None:
    old = located([0.1, 0.2, 0.3])
    for same in ([0.1, 0.2, 0.3], [0.1 + 1e-7, 0.2, 0.3]):
        assert load_into(located(same), stored(old), strict=True)
    new = located([0.1, 0.3, 0.2])
    own = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    told = r"2 of the 3 nodes of data are in other places .* by node_attributes\.latlons_data"
    for chain in ((), (align_variables(model=new),), (transfer_learning(new),)):
        with pytest.raises(MismatchError, match=told):
            load_into(new, stored(old), *chain)
        assert all(torch.equal(own[name], t) for name, t in new.state_dict().items())
    way_out = exclude(
        "*.latlons_data", "*.trainable_tensors.data", "*graph_provider*.trainable", missing_ok=True
    )
    report = load_into(new, stored(old), way_out)
    assert torch.equal(new.state_dict()["node_attributes.latlons_data"], own[report.missing[0]])
    rounded = {n: t.bfloat16() for n, t in stored(old)["state_dict"].items()}
    assert load_into(located([0.1, 0.2, 0.3]), {**stored(old), "state_dict": rounded}, strict=True)
    with torch.device("meta"):
        hollow = located([0.1, 0.3, 0.2])
    assert load_into(hollow, stored(old), strict=True)  # it does not know its own


# ── what was pickled whole ────────────────────────────────────────────────────────────────────


class Pickled(nn.Module):
    """An interface, as anemoi-training pickles it for inference: it has lost its configuration."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model, self.config, self.data_indices = inner, None, inner.data_indices


def test_a_module_that_was_pickled_whole_tells_its_settings() -> None:
    kinds = {
        "coordinates": "CoordinatesFeature",
        "trainable_parameters": "TrainableParametersFeature",
        "prognostics": "PrognosticsFeature",
    }

    def made(*features: str, regressor: str = "t") -> Any:
        model = core(features=features, targets=10, regressors=[regressor])
        for part in model.decoders_target_input["0"].features:
            part.inert_class = f"anemoi.models.layers.target_features.{kinds[part.name]}"
        return Pickled(model)

    model = made(*FEATURES)
    assert load_into(made(*FEATURES), model, strict=True)
    told = r"decoders\.0\.target_node_features = coordinates, trainable_parameters, prognostics, an"
    other = made("coordinates", "trainable_parameters", "prognostics")
    for checkpoint in (other, {"epoch": 3, "model": other}):
        with pytest.raises(MismatchError, match=told):
            load_into(model, checkpoint)
    with pytest.raises(MismatchError, match=r"residual\.datasets\.data\.regressors = q, and the"):
        load_into(model, made(*FEATURES, regressor="q"))
    assert load_into(nn.Linear(2, 2), nn.Linear(2, 2), strict=True)


def test_a_hook_sees_the_variables_that_the_weights_have_now() -> None:
    """Anemoi's takes them for the order of the weights, and compares the data with it."""

    class Training(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.model, self.seen = inner, dict[str, Any]()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            indices = checkpoint["hyper_parameters"]["data_indices"]
            self.seen = {name: dict(each.name_to_index) for name, each in indices.items()}

    old, new = Training(core()), Training(core(MOVED))
    parameters = {"data_indices": old.model.data_indices}
    resumable = {"epoch": 1, "optimizer_states": [{}], "hyper_parameters": parameters}
    resumable["state_dict"] = dict(old.state_dict())
    load_into(new, resumable, keep_progress, align_variables(model=new))
    assert new.seen == {"data": MOVED}
    load_into(old, resumable, keep_progress)
    assert old.seen == {"data": INDEX}
