"""Weights of anemoi-models 0.19 go where their variables and edges are: every kind of its models.

anemoi-models 0.19 wants an older torch than the other tests run with, so it is not in the extras:
`noxfile.py` installs it without its dependencies' bounds, after the other tests, for this file.
"""

import functools
import importlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import needs
import weather_019
from _anemoi_ckpt.graphs import edge_attributes, read_graph
from anemoi_ckpt import MismatchError, load_into, plan
from strategies import (
    align_variables,
    anemoi_layout,
    exclude,
    filter_shapes,
    include,
    pad_or_slice,
    transfer_learning,
    weights,
)
from weather import Variables
from weather_019 import CONFIGURATIONS, ORNSTEIN, interface_019

needs.anemoi_sorting_edges()
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

# as of the datasets a and b that real checkpoints were trained on, with a forcing variable more
A = Variables(
    ("t_850", "z_500", "q_700", "msl", "cos_lat", "sin_lat", "tp"), ("cos_lat", "sin_lat")
)
B = Variables(
    ("z_500", "cp", "t_925", "sin_lat", "msl", "tp", "cos_lat", "t_850"),
    ("cos_lat", "sin_lat"),
    ("tp", "cp"),
)
NEW = ["q_700", "u_10", "hcc", "sst", "ssrd"]
EDGES = ".trainable.trainable"  # of nodes it is trainable_tensors.data.trainable
BOUNDED = {"normalizer": ["mean-std"], "min_val": [0.0], "variables": ["tp"]}
BOUNDING = [{"_target_": "anemoi.models.layers.bounding.NormalizedReluBounding", **BOUNDED}]


def task(datasets: Mapping[str, Variables], configuration: str, **options: Any) -> Any:
    """The interface under the name that Anemoi's Lightning module has it under."""
    made = torch.nn.Module()
    made.model = interface_019(datasets, configuration, bounding=BOUNDING, **options)
    return made


def checkpoint_of(model: Any) -> dict[str, Any]:
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {"data_indices": model.model.data_indices, "config": model.model.config}
    return {"epoch": 3, "state_dict": state_dict, "hyper_parameters": parameters}


@functools.cache
def trained(configuration: str, several: bool = False, **options: Any) -> tuple[Any, Any]:
    """A model with weights that nothing else has, and its checkpoint."""
    torch.manual_seed(0)
    model = task({"data": A, "more": B} if several else {"data": A}, configuration, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model, checkpoint_of(model)


def outputs(
    model: Any,
    datasets: Mapping[str, Variables],
    before: Mapping[str, Variables],
    after: Mapping[str, Variables],
    steps: tuple[tuple[int, int], tuple[int, int]] = ((2, 1), (2, 1)),
) -> dict[str, dict[str, torch.Tensor]]:
    """What a model makes of fields that depend on their variables' names and steps alone.

    Variables and steps that only the new model knows are large; those that only the old one knows
    are zero.
    """
    core = model.model.model

    def field(dataset: str, kind: str, name: str, place: int, salt: int) -> torch.Tensor:
        seed = sum(n * ord(letter) for n, letter in enumerate(dataset + name, 1)) + salt
        shape = (1, 1, 1, core.node_attributes.num_nodes[dataset])
        draw = torch.Generator().manual_seed(seed + 100_003 * place)
        drawn = torch.randn(shape, generator=draw)
        was, now = (each[bool(salt)] for each in steps)
        if name not in getattr(before[dataset], kind) or place >= was:
            return 50 * drawn
        return drawn if name in getattr(after[dataset], kind) and place < now else 0 * drawn

    def batch(kind: str, count: int, salt: int) -> dict[str, torch.Tensor]:
        # steps of input count back from the last one
        places = range(count) if kind == "outputs" else range(count)[::-1]
        return {
            dataset: torch.cat(
                [
                    torch.stack(
                        [field(dataset, kind, n, at, salt) for n in getattr(each, kind)], -1
                    )
                    for at in places
                ],
                1,
            )
            for dataset, each in datasets.items()
        }

    arguments: dict[str, Any] = {"fcstep": 1}
    if hasattr(core, "noise_embedder"):
        condition = {dataset: torch.full((1, 1, 1, 1, 1), 0.7) for dataset in datasets}
        noised = batch("outputs", core.n_step_output, 10_000)
        arguments = {"conditioned_target": noised, "condition": condition}
    model.eval()
    with torch.no_grad():
        made = core(batch("inputs", core.n_step_input, 0), **arguments)
    return {
        dataset: {name: made[dataset][..., place] for place, name in enumerate(each.outputs)}
        for dataset, each in datasets.items()
    }


def difference(
    old: Any, new: Any, before: Mapping[str, Variables], after: Mapping[str, Variables]
) -> float:
    """How much the outputs of kept variables and steps differ at most from the old ones."""
    cores = [model.model.model for model in (old, new)]
    steps = [(core.n_step_input, core.n_step_output) for core in cores]
    was, now = (
        outputs(model, each, before, after, (steps[0], steps[1]))
        for model, each in ((old, before), (new, after))
    )
    kept = min(count for _, count in steps)
    differences = [0.0]
    for dataset, each in after.items():
        for name in each.outputs:
            own = before[dataset]
            if name in own.outputs and (name in own.diagnostic) == (name in each.diagnostic):
                one, other = was[dataset][name][:, :kept], now[dataset][name][:, :kept]
                assert one.shape[1] == kept
                assert name == "tp" or one.std() > 1e-3  # tp is bounded
                differences.append(float((one - other).abs().max()))
    return max(differences)


def statistics_follow(
    new: Any, own: Any, old: Any, before: Mapping[str, Variables], after: Mapping[str, Variables]
) -> None:
    """Normalisers have the old statistics of kept variables, and the model's own of new ones."""
    for dataset, each in after.items():
        for which in ("pre", "post"):
            for name in ("_norm_mul", "_norm_add"):
                key = f"model.{which}_processors.{dataset}.processors.normalizer.{name}"
                for place, variable in enumerate(each.names):
                    names = before[dataset].names
                    known = variable in names
                    expected = old[key][names.index(variable)] if known else own[key][place]
                    assert new.state_dict()[key][place] == expected


@st.composite
def changed(draw: Callable[..., Any], before: Variables) -> Variables:
    """Other variables: any may be gone or a forcing, new ones of any role are there, in any order.

    tp is bounded, and the regressors of residuals are forcings: these stay.
    """
    gone = draw(st.sets(st.sampled_from([n for n in before.names if n in ("q_700", "msl", "cp")])))
    forced = draw(st.sets(st.sampled_from(["t_850", "msl"]))) - gone  # no longer predicted
    new = draw(st.lists(st.sampled_from([n for n in NEW if n not in before.names]), unique=True))
    roles = {name: draw(st.sampled_from(["prognostic", "forcing", "diagnostic"])) for name in new}
    if draw(st.booleans()) and gone and new:  # each in the place of one that is gone
        names = [new.pop() if n in gone and new else n for n in before.names]
        names = [n for n in names if n not in gone]
        roles = dict.fromkeys(roles, "prognostic")
    else:
        names = [n for n in before.names if n not in gone]
        names = draw(st.permutations([*names, *new]))
    return Variables(
        names,
        (*before.forcing, *(n for n in names if n in forced or roles.get(n) == "forcing")),
        (
            *(n for n in before.diagnostic if n in names),
            *(n for n in names if roles.get(n) == "diagnostic"),
        ),
    )


# tp, which is bounded, is always there; coordinates are no variables
FREE = ("boundings.data.0.norm_min_val", "boundings.more.0.norm_min_val")


def nothing_is_misplaced(
    new: Any, own: Any, before: Mapping[str, Variables], after: Mapping[str, Variables]
) -> None:
    """A model took of an unaligned checkpoint only tensors over variables that are the same."""

    def order(dataset: str, name: str) -> list[Any]:
        each = after[dataset], before[dataset]
        if ".node_data_extractor." in name:
            return [(list(v.outputs), set(v.diagnostic)) for v in each]
        return (
            [[n for n in v.names if n not in v.diagnostic + v.forcing] for v in each]
            if (".residual." in name)
            else [(list(v.names), set(v.forcing), set(v.diagnostic)) for v in each]
        )

    coordinates = new.model.config.model.decoders["0"].target_node_features == ["coordinates"]
    for dataset, entries in anemoi_layout(new).items():
        for name in entries.keys() & own.keys():
            now, was = order(dataset, name)
            taken = not torch.equal(new.state_dict()[name], own[name])
            free = name.endswith(FREE) or (coordinates and ".emb_nodes_dst." in name)
            assert not taken or now == was or free, name


LARGEST = 1e-5  # float32, fields of the size of 1; new ones of the size of 50


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_from_a_to_b(configuration: str) -> None:
    old, checkpoint = trained(configuration)
    new = task({"data": B}, configuration, salt=5)
    own = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = load_into(new, checkpoint, align_variables(model=new, new="zeros"), strict=True)
    assert set(report.loaded) == set(new.state_dict())
    assert difference(old, new, {"data": A}, {"data": B}) < LARGEST
    statistics_follow(new, own, checkpoint["state_dict"], {"data": A}, {"data": B})


@pytest.mark.parametrize(
    ("configuration", "several"),
    [*((name, False) for name in CONFIGURATIONS), ("GNN", True), ("features", True)],
)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_knowledge_is_preserved(configuration: str, several: bool, data: Any) -> None:
    """For every kind and any change: aligned it is right, and else it is refused."""
    before = {"data": A, "more": B} if several else {"data": A}
    old, checkpoint = trained(configuration, several)
    after = {name: data.draw(changed(each)) for name, each in before.items()}
    new = task(after, configuration, salt=5)
    own = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    if any(tuple(after[name].names) != tuple(before[name].names) for name in before):
        try:
            load_into(new, checkpoint, filter_shapes(new))
        except MismatchError:
            assert all(torch.equal(own[name], t) for name, t in new.state_dict().items())
        else:
            nothing_is_misplaced(new, own, before, after)
            new.load_state_dict(own)
    align = align_variables(model=new, new="zeros")
    if configuration == "tendency" and {*after["data"].forcing} & {"t_850", "msl"}:
        with pytest.raises(
            MismatchError, match=r"reads the residual of what it predicts once more"
        ):
            load_into(new, checkpoint, align)
        return
    load_into(new, checkpoint, align, strict=True)
    assert difference(old, new, before, after) < LARGEST
    statistics_follow(new, own, checkpoint["state_dict"], before, after)


def test_a_residual_that_is_no_longer_read_is_refused() -> None:
    """The tendency model has columns for it beside those for its input."""
    _, checkpoint = trained("tendency")
    new = task({"data": Variables(A.names, (*A.forcing, "msl"))}, "tendency")
    with pytest.raises(MismatchError, match="only reads msl, which the checkpoint's predicts, too"):
        load_into(new, checkpoint, align_variables(model=new))
    gone = task({"data": Variables([n for n in A.names if n != "msl"], A.forcing)}, "tendency")
    assert load_into(gone, checkpoint, align_variables(model=gone), strict=True)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_unaligned_it_is_lost(configuration: str) -> None:
    """The law can be broken, and is, where nobody knows the variables: a state dict tells none."""
    old, checkpoint = trained(configuration)
    after = Variables(A.names[::-1], A.forcing)
    new = task({"data": after}, configuration)
    load_into(new, checkpoint["state_dict"])
    assert difference(old, new, {"data": A}, {"data": after}) > 1e-3
    with pytest.raises(MismatchError, match=r"align_variables\(model=model\)"):
        load_into(new, checkpoint)


# ── other steps ───────────────────────────────────────────────────────────────────────────────

LEADS = [  # steps of input and output, before and after
    ((2, 1), (2, 2)),
    ((2, 2), (2, 1)),
    ((2, 2), (2, 3)),
    ((1, 1), (2, 1)),
    ((3, 2), (1, 2)),
    ((1, 2), (2, 1)),
]


@pytest.mark.parametrize(("was", "now"), LEADS)
@pytest.mark.parametrize("after", [A, B], ids=["same", "other variables"])
@pytest.mark.parametrize("kind", ["GNN", "GraphTransformer", "Transformer"])
def test_steps_that_both_have_are_kept(
    kind: str, after: Variables, was: tuple[int, int], now: tuple[int, int]
) -> None:
    steps_are_kept(kind, after, was, now)


@pytest.mark.parametrize(("was", "now"), [((1, 3), (2, 2)), ((2, 1), (1, 2))])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_steps_are_kept_in_every_kind(
    configuration: str, was: tuple[int, int], now: tuple[int, int]
) -> None:
    if configuration == "tendency" and now[1] < was[1]:
        new = task({"data": B}, configuration, steps=now)
        align = align_variables(model=new, new="zeros")
        told = (
            r"have 1 step of input and 3 steps of output, .*reads the residual once more for each"
        )
        with pytest.raises(MismatchError, match=told):
            load_into(new, trained(configuration, steps=was)[1], align)
        return
    steps_are_kept(configuration, B, was, now)


def steps_are_kept(
    configuration: str, after: Variables, was: tuple[int, int], now: tuple[int, int]
) -> None:
    old, checkpoint = trained(configuration, steps=was)
    new = task({"data": after}, configuration, salt=5, steps=now)
    own = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    align = align_variables(model=new, new="zeros")
    report = load_into(new, checkpoint, align, strict=True)
    assert set(report.loaded) == set(new.state_dict())
    assert difference(old, new, {"data": A}, {"data": after}) < LARGEST
    aligned = align(checkpoint)
    assert align(aligned) is aligned
    new.load_state_dict(own)
    load_into(new, checkpoint, transfer_learning(new))
    rows = next(n for n in report.aligned if ".node_data_extractor." in n and n.endswith("bias"))
    size, kept = len(after.outputs), min(was[1], now[1])
    assert torch.equal(new.state_dict()[rows][kept * size :], own[rows][kept * size :])
    assert torch.equal(
        new.state_dict()[rows][: kept * size : size],
        aligned["state_dict"][rows][: kept * size : size],
    )


def test_steps_that_trade_places_are_refused_unaligned() -> None:
    """A transport model reads as many channels of 2 steps and 1 as of 1 and 2."""
    with_tp = {"data": Variables(("t_850", "z_500", "tp"), (), ())}
    old, new = (task(with_tp, "transport", steps=steps) for steps in ((2, 1), (1, 2)))
    told = "2 steps of input and 1 step of output, and the model 1 step of input and 2 steps of"
    with pytest.raises(MismatchError, match=told):
        load_into(new, checkpoint_of(old), filter_shapes(new))
    with pytest.raises(MismatchError, match=told):
        load_into(new, checkpoint_of(old), pad_or_slice(new))
    assert load_into(new, checkpoint_of(old), align_variables(model=new), strict=True)


SKIP = "anemoi.models.layers.residual.SkipConnection"


def test_steps_that_are_not_the_models_are_refused() -> None:
    """A residual that counts from the oldest step on has another one if there are more of them."""
    first = {"_target_": SKIP, "step": 0}
    _, checkpoint = trained("GNN", steps=(2, 1))
    new = task({"data": A}, "GNN", residual=first, steps=(3, 1))
    with pytest.raises(
        MismatchError,
        match=r"have 2 steps of input and 1 step of output, and the model 3 steps of input and 1"
        r" step of output: the residual connection of data counts its step from the oldest",
    ):
        load_into(new, checkpoint, align_variables(model=new))
    new = task({"data": A}, "GNN", residual=first, steps=(2, 2))
    assert load_into(new, checkpoint, align_variables(model=new), strict=True)


def test_other_attributes_are_no_steps() -> None:
    """As many more columns of coordinates as of variables do not pass for another step."""
    _, checkpoint = trained("GNN", steps=(2, 1))
    new = task({"data": A}, "GNN", steps=(3, 1))
    state_dict = {n: t for n, t in checkpoint["state_dict"].items() if ".node_attributes." not in n}
    lacking = {**checkpoint, "state_dict": state_dict}
    report = load_into(new, lacking, align_variables(model=new), filter_shapes(new))
    assert not any(name.endswith("emb_nodes_src.mlp.0.weight") for name in report.loaded)
    assert any(name.endswith("emb_nodes_src.mlp.0.bias") for name in report.loaded)


@pytest.mark.parametrize("section", ["task", "training"])
def test_the_configuration_knows_its_steps(section: str) -> None:
    _, checkpoint = trained("GNN", steps=(2, 1))
    new = task({"data": A}, "GNN", steps=(2, 2))

    def configured(count: int) -> dict[str, Any]:
        config = {**checkpoint["hyper_parameters"]["config"], section: {"multistep_output": count}}
        return {
            **checkpoint,
            "hyper_parameters": {**checkpoint["hyper_parameters"], "config": config},
        }

    for count in (1, 2):  # 2: what was aligned, and has its old configuration, or the other way
        assert load_into(new, configured(count), align_variables(model=new), strict=True)
    with pytest.raises(MismatchError, match="but its configuration has 3 steps of output"):
        load_into(new, configured(3), align_variables(model=new))


# ── what no shape tells ───────────────────────────────────────────────────────────────────────


def test_other_features_of_equal_size_are_refused() -> None:
    _, checkpoint = trained("features of equal size")
    model = task({"data": A}, "features of equal size")
    assert load_into(model, checkpoint, strict=True)
    swapped = ["prognostics", "trainable_parameters", "coordinates", "forcings"]
    for features in (swapped, ["encoded_data"]):
        other = task({"data": A}, "features of equal size", features=features)
        for chain in ((), (align_variables(model=other),), (transfer_learning(other),)):
            with pytest.raises(
                MismatchError, match=r"target_node_features = forcings, coordinates"
            ):
                load_into(other, checkpoint, *chain)


def test_encoders_under_other_keys_are_refused() -> None:
    """Both datasets have as many variables; only the configuration tells which encoder is whose."""
    datasets = {"data": A, "more": Variables(A.names[::-1], A.forcing)}
    old, new = task(datasets, "GNN"), task(datasets, "GNN", keys="10")
    with pytest.raises(MismatchError, match=r"encoders\.1\.source_datasets = more, and the model"):
        load_into(new, checkpoint_of(old))
    assert load_into(task(datasets, "GNN"), checkpoint_of(old), strict=True)


@pytest.mark.parametrize("configuration", ["GNN", "GraphTransformer", "GNN hierarchical"])
def test_edges_of_before_016_go_where_the_migration_puts_them(configuration: str) -> None:
    script = "anemoi.models.migrations.scripts.1779202136_trainable_edge_perm_fix"
    migrate = importlib.import_module(script).migrate
    _, checkpoint = trained(configuration)
    draw = torch.Generator().manual_seed(4)
    legacy = {
        name: torch.randn(tensor.shape, generator=draw) if name.endswith(EDGES) else tensor
        for name, tensor in checkpoint["state_dict"].items()
        if not name.endswith("trainable_layout_version")
    }
    new = task({"data": A}, configuration)
    expected = migrate({"state_dict": dict(legacy)}, new)["state_dict"]
    report = load_into(new, {**checkpoint, "state_dict": legacy}, strict=True)
    moved = [name for name in legacy if name.endswith(EDGES)]
    assert set(report.aligned) == set(moved)
    assert len(moved) >= 3
    assert any(not torch.equal(expected[name], legacy[name]) for name in moved)
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert load_into(new, checkpoint, strict=True).aligned == ()  # today's own


# ── what only the configuration tells ─────────────────────────────────────────────────────────

Amend = Callable[[dict[str, Any]], None]
PREPROCESSING = "anemoi.models.preprocessing."
LAYERS = "anemoi.models.layers."
PLAIN_GRAPH = weather_019._graph


def mappers_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    sides = model["encoders"], model["decoders"]
    return [section["mapper"] for side in sides for section in side.values()]


def edges(*attributes: str) -> Amend:
    def amend(config: dict[str, Any]) -> None:
        model = config["model"]
        mappers = mappers_of(model)
        levels = (model[name] for name in ("processor", "upscale_mapper", "downscale_mapper"))
        for section in (*mappers, *levels):
            section["sub_graph_edge_attributes"] = list(attributes)

    return amend


def aggregated(kind: str, keys: str = "01") -> Amend:
    """Latents of two datasets are put together; the encoders stand in the order of their keys."""

    def amend(config: dict[str, Any]) -> None:
        model = config["model"]
        model["latent_aggregator"] = {"_target_": f"{LAYERS}aggregator.{kind}Aggregator"}
        for side in ("encoders", "decoders"):
            model[side] = {key: model[side][key] for key in keys}
        if kind == "Concat":
            for section in (model["processor"], *(d["mapper"] for d in model["decoders"].values())):
                section["num_channels"] = 16

    return amend


def bounded(*groups: Sequence[str]) -> Amend:
    def amend(config: dict[str, Any]) -> None:
        config["model"]["bounding"]["datasets"]["data"] = [
            {
                "_target_": f"{LAYERS}bounding.NormalizedReluBounding",
                "variables": list(names),
                "min_val": [0.0] * len(names),
                "normalizer": ["mean-std"] * len(names),
            }
            for names in groups
        ]

    return amend


def processed(config: dict[str, Any]) -> None:
    processors = config["data"]["datasets"]["data"]["processors"]
    processors["normalizer"]["config"] |= {"std": ["z_500"], "max": ["t_850"], "none": ["cos_lat"]}
    for name, kind, methods in (
        ("imputer", "imputer.InputImputer", {"default": "none", "mean": ["t_850"]}),
        ("remapper", "remapper.Remapper", {"default": "none", "sqrt": ["tp"]}),
    ):
        processors[name] = {"_target_": PREPROCESSING + kind, "config": methods}


def untrainable(config: dict[str, Any]) -> None:
    model = config["model"]
    model["node_trainable_parameters"] = dict.fromkeys(model["node_trainable_parameters"], 0)
    mappers = mappers_of(model)
    for section in (*mappers, model["processor"]):
        section["trainable_size"] = 0


def one_level(config: dict[str, Any]) -> None:
    config["model"]["enable_hierarchical_level_processing"] = False


ALONE, AFTER = {"data": A}, {"data": B}
FORCED = {"data": Variables(A.names, ("cos_lat", "sin_lat", "msl"))}
TWO = {"data": A, "more": B}
TWO_AFTER = {"data": B, "more": Variables(B.names[::-1], B.forcing, B.diagnostic)}


@pytest.mark.parametrize(
    ("configuration", "before", "after", "options"),
    [
        ("GraphTransformer", ALONE, AFTER, {"mlp_implementation": "swiglu"}),
        ("Transformer", ALONE, AFTER, {"mlp_implementation": "swiglu"}),
        ("PointWise", ALONE, AFTER, {"mlp_implementation": "swiglu"}),
        ("tendency", ALONE, AFTER, {"steps": (2, 2)}),
        ("GNN", ALONE, AFTER, {"amend": processed}),
        ("GNN", ALONE, AFTER, {"amend": untrainable}),
        ("GNN", ALONE, AFTER, {"amend": bounded(["t_850"], ["tp", "msl"])}),
        ("GNN hierarchical", ALONE, AFTER, {"amend": one_level}),
        ("features of equal size", FORCED, ALONE, {}),  # msl changes its role
        ("features of equal size", ALONE, FORCED, {}),
        ("transport", ALONE, FORCED, {}),  # whose noised outputs are read, too
        ("GNN", TWO, TWO_AFTER, {"amend": aggregated("Mean")}),
        ("GraphTransformer", TWO, TWO_AFTER, {"amend": aggregated("Concat")}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_options_are_preserved_too(
    configuration: str,
    before: Mapping[str, Variables],
    after: Mapping[str, Variables],
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    old, new = task(before, configuration, **options), task(after, configuration, **options, salt=5)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    load_into(new, checkpoint_of(old), align_variables(model=new, new="zeros"), strict=True)
    assert difference(old, new, before, after) < LARGEST


SWAPPED = ["forcings", "coordinates", "trainable_parameters", "prognostics"]


@pytest.mark.parametrize(
    ("configuration", "was", "now", "told"),
    [
        (
            "Transformer",
            {"features": SWAPPED},
            {"features": SWAPPED[::-1]},
            r"target_node_features = forcings, coordinates, .*, and the model with prognostics, ",
        ),
        (
            "regressors",
            {},
            {"residual": {**ORNSTEIN, "regressors": ["cos_lat", "sin_lat"]}},
            r"residual\.datasets\.data\.regressors = sin_lat, cos_lat, and the model with cos_lat",
        ),
        (
            "GNN",
            {"amend": bounded(["tp"], ["msl"])},
            {"amend": bounded(["msl"], ["tp"])},
            r"bounding\.datasets\.data\.0\.variables = tp, and the model with msl",
        ),
    ],
)
def test_a_module_that_was_pickled_whole_tells_its_settings(
    configuration: str, was: dict[str, Any], now: dict[str, Any], told: str
) -> None:
    """anemoi-training pickles it for inference, and takes its configuration away before."""
    old, new = task(ALONE, configuration, **was).model, task(ALONE, configuration, **now).model
    alike = task(ALONE, configuration, **was).model
    old.config = None
    torch.save(old, stored := io.BytesIO())
    stored.seek(0)
    assert load_into(alike, stored, strict=True)
    for chain in ((), (align_variables(model=new),), (transfer_learning(new),)):
        stored.seek(0)
        with pytest.raises(MismatchError, match=told):
            load_into(new, stored, *chain)


@pytest.mark.parametrize("configuration", ["GNN", "GraphTransformer"])
def test_attributes_of_edges_in_another_order_are_refused(
    configuration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weather_019, "_graph", with_attributes("edge_second"))
    old, same, new = (
        task(ALONE, configuration, amend=edges(*attributes))
        for attributes in (
            ("edge_length", "edge_second"),
            ("edge_length", "edge_second"),
            ("edge_second", "edge_length"),
        )
    )
    assert load_into(same, checkpoint_of(old), strict=True)
    told = r"sub_graph_edge_attributes = edge_length, edge_second, and the model with edge_second"
    for chain in ((), (align_variables(model=new),), (transfer_learning(new),)):
        with pytest.raises(MismatchError, match=told):
            load_into(new, checkpoint_of(old), *chain)


def with_attributes(*names: str) -> Callable[..., Any]:
    """Make graphs as `weather_019` does, whose edges have more attributes."""

    def graph(*arguments: Any, **options: Any) -> Any:
        made = PLAIN_GRAPH(*arguments, **options)
        for kind in made.edge_types:
            for factor, name in enumerate(names, 2):
                made[kind][name] = factor * made[kind].edge_length.flip(0)
        return made

    return graph


def pickled(model: Any) -> io.BytesIO:
    """What anemoi-training writes for inference: without the configuration."""
    model.model.config = None
    torch.save(model.model, stored := io.BytesIO())
    stored.seek(0)
    return stored


@pytest.mark.parametrize(
    ("configuration", "nodes"), [("GNN", 6), ("GNN hierarchical", 6), ("GraphTransformer", 7)]
)
def test_a_module_that_was_pickled_whole_tells_the_attributes_of_its_edges(
    configuration: str, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weather_019, "_graph", with_attributes("edge_second"))
    names = ["edge_length", "edge_second"]
    stored = pickled(task(ALONE, configuration, amend=edges(*names)))
    same, new = (
        task(ALONE, configuration, amend=edges(*order), nodes=nodes).model
        for order in (names, names[::-1])
    )
    apart = exclude("*trainable*", "*latlons*", missing_ok=True)  # what runs over nodes and edges
    for chain in ((), (transfer_learning(same),)) if nodes == 6 else ((apart,),):
        stored.seek(0)
        load_into(same, stored, *chain, strict=nodes == 6)
    told = r"sub_graph_edge_attributes = edge_length, edge_second, and the model with edge_second"
    for chain in ((apart,), (align_variables(model=new), apart), (transfer_learning(new),)):
        stored.seek(0)
        with pytest.raises(MismatchError, match=told):
            load_into(new, stored, *chain)
    stored.seek(0)
    others = exclude("*emb_edges*", "*lin_edge*", missing_ok=True)
    assert load_into(new, stored, apart, others).loaded


def test_an_order_that_nothing_tells_is_none() -> None:
    """Edges of another graph, attributes that were computed: the values do not tell a name."""
    old = task(ALONE, "GNN")
    provider = old.model.model.processor_graph_provider
    graph = read_graph(old.model)
    assert edge_attributes(provider, graph) == ["edge_length"]
    assert edge_attributes(provider, ()) == edge_attributes(None, graph) == []
    provider.edge_attr += 1
    assert edge_attributes(provider, graph) == []
    other = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"processor": torch.nn.Module()})})
    other.model.processor.proc = old.model.model.processor.proc  # not a model of Anemoi's
    assert load_into(other, pickled(old), include("*.processor.proc.*")).loaded


def test_other_edges_of_equal_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = task(ALONE, "GNN")
    whole = checkpoint_of(old)
    whole["hyper_parameters"]["graph_data"] = old.model.graph_data
    by_dataset = {**whole, "hyper_parameters": {**whole["hyper_parameters"]}}
    by_dataset["hyper_parameters"]["graph_data"] = {"data": old.model.graph_data}

    def other(*arguments: Any, **options: Any) -> Any:
        made = PLAIN_GRAPH(*arguments, **options)
        for kind in (("data", "to", "hidden"), ("hidden", "to", "data")):
            made[kind].edge_index = made[kind].edge_index.flip(1)  # the same ones in another order
        return made

    same = task(ALONE, "GNN")
    monkeypatch.setattr(weather_019, "_graph", other)
    new = task(ALONE, "GNN")
    torch.save(whole, stored := io.BytesIO())
    stored.seek(0)
    told = r"other edges than .*\.encoder_graph_provider\.data\..*; .*\.decoder_graph_provider"
    for model, source, *chain in (
        (new, whole),
        (new, by_dataset, transfer_learning(new)),
        (new, stored, weights),
        (new.model, pickled(old), transfer_learning(new.model)),
    ):
        with pytest.raises(MismatchError, match=told):
            load_into(model, source, *chain)
    stored.seek(0)
    assert plan(stored, model=new).complete  # values are compared when they are there
    assert load_into(same, whole, strict=True)
    assert load_into(new, whole, exclude("*.trainable.trainable")).loaded
    assert load_into(new, {"state_dict": whole["state_dict"]}).loaded  # where nothing is known


# ── processors without tensors ────────────────────────────────────────────────────────────────


def processors(**kinds: Mapping[Any, Any]) -> Amend:
    """Put processors beside the normaliser, those whose names begin with `before` before it."""

    def amend(config: dict[str, Any]) -> None:
        section = config["data"]["datasets"]["data"]
        made = {
            name: {
                "_target_": PREPROCESSING + PROCESSORS[name.split("_")[-1]],
                "config": dict(each),
            }
            for name, each in kinds.items()
        }
        before = {name: each for name, each in made.items() if name.startswith("before")}
        section["processors"] = before | section["processors"] | made

    return amend


PROCESSORS = {
    "imputer": "imputer.InputImputer",
    "constant": "imputer.ConstantImputer",
    "remapper": "remapper.Remapper",
    "relu": "postprocessor.Postprocessor",
}
ROOT = {"default": "none", "sqrt": ["tp"]}
POWER = {"default": "none", "power": ["tp"], "method_kwargs": {"power": {"pow": 0.5}}}
FILLED = {"default": "none", "mean": ["t_850"]}
NOTHING: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({"remapper": ROOT}, NOTHING, "tp = InputNormalizer, Remapper sqrt, .* InputNormalizer,"),
        (
            NOTHING,
            {"remapper": ROOT},
            "tp = InputNormalizer, and the model with InputNormalizer, R",
        ),
        ({"remapper": ROOT}, {"before_remapper": ROOT}, "tp = InputNormalizer, Remapper sqrt, and"),
        (
            {"remapper": ROOT},
            {"remapper": {"default": "asinh"}},
            "and the model with InputNormalizer, Remapper asinh,",
        ),
        ({"remapper": POWER}, {"remapper": ROOT}, r"Remapper power pow=0\.5, and .*Remapper sqrt"),
        ({"imputer": FILLED}, {"constant": {0: ["t_850"]}}, "InputImputer mean, .*Constant\\w+ 0,"),
        ({"imputer": FILLED}, {"imputer": {"default": "minimum"}}, "mean, .*InputImputer minimum,"),
        ({"imputer": FILLED}, NOTHING, ""),  # there are no gaps any more
        ({"imputer": FILLED}, {"imputer": {"default": "mean"}}, ""),
        ({"relu": {"relu": ["tp"]}}, NOTHING, ""),  # after the network
        ({"remapper": {"sqrt": "q_700", "none": "tp"}}, NOTHING, ""),  # a variable that is gone
        (NOTHING, {"remapper": {"sqrt": "cp", "asinh": None}}, ""),  # one that is new
    ],
)
def test_variables_that_are_processed_otherwise_are_refused(
    was: dict[str, Any], now: dict[str, Any], told: str
) -> None:
    b = {"data": Variables(("cp", *(n for n in A.names if n != "q_700")), A.forcing, ("tp", "cp"))}
    old = task(ALONE, "GNN", amend=processors(**was))
    new = task(b, "GNN", amend=processors(**now))
    checkpoint = checkpoint_of(old)
    chains = align_variables(model=new), transfer_learning(new.model)
    for model, source, chain in (
        (new, checkpoint, chains[0]),
        (new.model, pickled(old), chains[1]),
    ):
        if told:
            with pytest.raises(MismatchError, match=rf"data\.data\.processors of .*{told}"):
                load_into(model, source, chain)
        else:
            assert load_into(model, source, chain).loaded
    only = include("*.processor.*")
    assert load_into(new, checkpoint, only).loaded  # which no variable goes through


def test_a_strategy_refuses_by_the_processors_that_a_checkpoint_names() -> None:
    """Which variables it had before it was aligned, a strategy does not know."""
    old = checkpoint_of(task(ALONE, "GNN", amend=processors(remapper=ROOT)))
    new = task(AFTER, "GNN")
    with pytest.raises(MismatchError, match=r"processors of tp = .*Remapper sqrt"):
        transfer_learning(new)(old)
    added = task(AFTER, "GNN", amend=processors(remapper={"sqrt": ["cp", "tp"]}))
    assert transfer_learning(added)(align_variables(model=added)(old))["state_dict"]


def test_processors_are_read_in_every_form() -> None:
    """A configuration refers to others, has one dataset alone, or something else."""
    new = task({"data": A}, "GNN", amend=processors(remapper={"default": "sqrt"}))
    old = checkpoint_of(task({"data": A}, "GNN"))

    def configured(data: Any, **more: Any) -> Any:
        told = {"model": old["hyper_parameters"]["config"]["model"], "data": data, **more}
        return {**old, "hyper_parameters": {**old["hyper_parameters"], "config": told}}

    kinds = {
        "normalizer": {"_target_": "a.InputNormalizer", "config": None},
        "one": {"_target_": "a.Remapper", "config": {"default": "sqrt", "asinh": "${names.some}"}},
    }
    for data in ({"datasets": {"other": {"processors": kinds}}}, {"datasets": {"data": kinds}}):
        known = "other" in data["datasets"]
        for names in (["tp"], "tp"):
            source = configured(data, names={"some": names})
            if known:
                with pytest.raises(MismatchError, match="of tp = InputNormalizer, Remapper asinh,"):
                    load_into(new, source)
            else:
                assert load_into(new, source).loaded
    for some in ([], None, "none"):
        source = configured({"datasets": {"other": {"processors": kinds}}}, names={"some": some})
        assert load_into(new, source, strict=True)
    assert load_into(new, configured(None)).loaded


def test_latents_side_by_side_in_another_order_are_refused() -> None:
    old = task(TWO, "GraphTransformer", amend=aggregated("Concat"))
    new = task(TWO, "GraphTransformer", amend=aggregated("Concat", "10"))
    with pytest.raises(MismatchError, match="latents of encoders = data, more, and the model with"):
        load_into(new, checkpoint_of(old))
    summed = task(TWO, "GraphTransformer", amend=aggregated("Sum", "10"))
    old = task(TWO, "GraphTransformer")
    load_into(summed, checkpoint_of(old), strict=True)
    assert difference(old, summed, TWO, TWO) < LARGEST


def test_a_dataset_does_not_get_the_encoder_of_another() -> None:
    old = task(ALONE, "GNN")
    new = task({"more": A, "data": A}, "GNN")  # whose encoder has the name that data's had
    told = r"encoders\.0\.source_datasets = data, and the model with more"
    with pytest.raises(MismatchError, match=told):
        load_into(new, checkpoint_of(old), transfer_learning(new))


def test_other_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old, plain = task(ALONE, "GNN"), weather_019.graph

    def turned(*arguments: Any) -> Any:
        made = plain(*arguments)
        made["data"].x = made["data"].x.flip(0)
        return made

    monkeypatch.setattr(weather_019, "graph", turned)
    new = task(AFTER, "GNN")
    with pytest.raises(MismatchError, match=r"6 of the 6 nodes of data are in other places"):
        load_into(new, checkpoint_of(old), transfer_learning(new))


def test_the_report_tells_steps_and_when_they_are() -> None:
    """Steps are aligned by their number; how long they are is told, as it may be meant."""
    old, new = (task(ALONE, "GNN", steps=steps) for steps in ((2, 1), (1, 3)))
    for model, first, hours in ((old, 2, "6h"), (new, 1, "3h")):
        places = list(range(first)), list(range(first, first + model.model.n_step_output))
        names = "input_relative_date_indices", "output_relative_date_indices"
        steps = {**dict(zip(names, places, strict=True)), "timestep": hours}
        model.model.metadata = {
            "dataset": {},
            "metadata_inference": {"dataset_names": ["data"], "data": {"timesteps": steps}},
        }
    checkpoint = checkpoint_of(old)
    checkpoint["hyper_parameters"]["metadata"] = old.model.metadata
    report = load_into(new, checkpoint, align_variables(model=new), strict=True)
    assert report.steps == {"input": (2, 1), "output": (1, 3)}
    assert report.times == {"data": ("-6h, 0h to +6h", "0h to +3h, +6h, +9h")}
    printed = re.sub(" +", " ", str(report))
    assert "steps input: the last 1 of 2 kept\n output: the first 1 of 1 kept, 2 new" in printed
    assert "data: -6h, 0h to +6h in the checkpoint, 0h to +3h, +6h, +9h in the model" in printed
    assert "steps" not in re.sub(r".*\n", "", str(load_into(old, checkpoint, strict=True)), count=1)
