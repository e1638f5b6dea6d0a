"""What a real Anemoi model has learned goes along when its variables change. Skipped without it."""

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import needs
import strategies
from anemoi_ckpt import MismatchError, Report, load, load_into
from checkpoints import assert_same, quiet_trainer
from pages import ALL, marked
from strategies import (
    Strategy,
    align_variables,
    anemoi_layout,
    cast,
    exclude,
    filter_shapes,
    include,
    pad_or_slice,
    rename,
    require_match,
    require_variables,
    standard,
    strip_prefix,
    transfer_learning,
    variables,
    weights,
)
from weather import KINDS, Variables, graph, interface

needs.anemoi()
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

ERA5 = Variables(
    ("t_850", "cos_lat", "z_500", "tp", "msl", "cp", "sin_lat"),
    forcing=("cos_lat", "sin_lat"),
    diagnostic=("tp", "cp"),
)
CERRA = Variables(("2t", "tp", "cos_lat", "cp", "10u"), diagnostic=("tp", "cp"))
DATASETS = {"single": {"data": ERA5}, "several": {"era5": ERA5, "cerra": CERRA}}
NEW = ["q_700", "u_10", "hcc", "sst", "ssrd"]
BOUNDED = {"normalizer": ["mean-std"], "min_val": [0.0], "variables": ["tp"]}
BOUNDING = [{"_target_": "anemoi.models.layers.bounding.NormalizedReluBounding", **BOUNDED}]


class Task(torch.nn.Module):
    """The interface under the name that Anemoi's Lightning module has it under."""

    def __init__(self, datasets: Mapping[str, Variables], kind: str, *, salt: int = 0) -> None:
        super().__init__()
        self.model = interface(datasets, kind, salt=salt, bounding=BOUNDING)


@functools.cache
def trained(kind: str, several: str) -> tuple[Task, dict[str, Any]]:
    """A model after a few steps, and its checkpoint."""
    torch.manual_seed(0)
    task = Task(DATASETS[several], kind)
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.05)
    for _ in range(5):
        batch = {
            name: torch.randn(2, 2, 1, 6, len(each.inputs), generator=draw)
            for name, each in DATASETS[several].items()
        }
        sum(given.square().mean() for given in task.model(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    hyper_parameters = {"data_indices": task.model.data_indices}
    state_dict = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    states = [optimizer.state_dict()]
    return task, {
        "epoch": 3,
        "state_dict": state_dict,
        "optimizer_states": states,
        "hyper_parameters": hyper_parameters,
    }


def knowledge_is_preserved(
    old: Any, new: Any, before: Mapping[str, Variables], after: Mapping[str, Variables]
) -> None:
    """On all inputs, the outputs of kept variables are the old ones: normalised, and in units."""
    draw = torch.Generator().manual_seed(2)
    values = {
        dataset: {
            name: torch.randn(2, 2, 6, generator=draw)
            * (1 if name in before[dataset].names else 50)
            for name in dict.fromkeys((*before[dataset].names, *each.names))
        }
        for dataset, each in after.items()
    }

    def batch(datasets: Mapping[str, Variables]) -> dict[str, torch.Tensor]:
        return {
            dataset: torch.stack([values[dataset][name] for name in each.inputs], -1)
            for dataset, each in datasets.items()
        }

    for model in (old, new):
        model.eval()
    with torch.no_grad():
        normal = [
            model({n: x[:, :, None] for n, x in batch(datasets).items()})
            for model, datasets in ((old, before), (new, after))
        ]
        in_units = [
            model.predict_step(batch(datasets)) for model, datasets in ((old, before), (new, after))
        ]
    for one, other in (normal, in_units):
        for dataset, each in after.items():
            kept = [name for name in each.outputs if name in before[dataset].outputs]
            was = one[dataset][..., [before[dataset].outputs.index(name) for name in kept]]
            now = other[dataset][..., [each.outputs.index(name) for name in kept]]
            torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5)
            assert was.std() > 0.01


@st.composite
def changed(draw: Callable[..., Any], datasets: Mapping[str, Variables]) -> dict[str, Variables]:
    """Other variables: in another order, some diagnostic ones gone, new ones of any role."""
    made = {}
    for dataset, old in datasets.items():
        gone = draw(st.sets(st.just("cp")))
        new = draw(st.lists(st.sampled_from(NEW), unique=True))
        roles = [draw(st.sampled_from(["prognostic", "forcing", "diagnostic"])) for _ in new]
        of = {
            role: [name for name, drawn in zip(new, roles, strict=True) if drawn == role]
            for role in ("forcing", "diagnostic")
        }
        kept = [name for name in old.names if name not in gone]
        made[dataset] = Variables(
            draw(st.permutations([*kept, *new])),
            (*old.forcing, *of["forcing"]),
            (*(name for name in old.diagnostic if name not in gone), *of["diagnostic"]),
        )
    return made


@pytest.mark.parametrize("several", DATASETS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_knowledge_is_preserved(kind: str, several: str, data: Any) -> None:
    task, checkpoint = trained(kind, several)
    datasets = data.draw(changed(DATASETS[several]))
    new = Task(datasets, kind, salt=5)  # with other statistics
    report = load_into(new, checkpoint, align_variables(model=new, new="zeros"), strict=True)
    assert set(report.loaded) == set(new.state_dict())
    knowledge_is_preserved(task.model, new.model, DATASETS[several], datasets)


@pytest.mark.parametrize(
    "strategy", [lambda _new: exclude("nothing", missing_ok=True), filter_shapes, pad_or_slice]
)
def test_without_alignment_it_is_not(strategy: Callable[[Any], Strategy]) -> None:
    """The law can be broken, and is; in silence if the variables are not known."""
    task, checkpoint = trained("Transformer", "single")
    after = {"data": Variables([*reversed(ERA5.names)], ERA5.forcing, ERA5.diagnostic)}
    new = Task(after, "Transformer")
    load_into(new, strategy(new.state_dict())(checkpoint["state_dict"]))
    with pytest.raises(AssertionError, match="not close"):
        knowledge_is_preserved(task.model, new.model, {"data": ERA5}, after)


@pytest.mark.parametrize("kind", KINDS)
def test_ensembles_are_aligned_too(kind: str) -> None:
    torch.manual_seed(0)
    old = interface({"data": ERA5}, kind, ensemble=True)
    after = Variables(("q_700", *ERA5.names[::-1]), ERA5.forcing, ERA5.diagnostic)
    new = interface({"data": after}, kind, ensemble=True)
    checkpoint = {
        "state_dict": old.state_dict(),
        "hyper_parameters": {"data_indices": old.data_indices},
    }
    load_into(new, checkpoint, align_variables(model=new, new="zeros"))
    for model in (old, new):
        model.forward = functools.partial(model.forward, fcstep=1)
        model.predict_step = lambda batch, model=model: model.model.predict_step(
            batch, model.pre_processors, model.post_processors, 2, fcstep=1
        )
    knowledge_is_preserved(old, new, {"data": ERA5}, {"data": after})


# ── layouts ───────────────────────────────────────────────────────────────────────────────────


def test_the_layout_is_plain_data() -> None:
    found = anemoi_layout(Task({"data": ERA5}, "GraphTransformer"))
    inputs, statistics = {1: ["input", "input", 6]}, {0: ["all"], "new": "model"}
    front = "model.model"
    expected: dict[str, Any] = {
        f"{front}.encoder.data.emb_nodes_src.weight": inputs,
        f"{front}.decoder.data.emb_nodes_dst.weight": inputs,
        f"{front}.decoder.data.node_data_extractor.1.weight": {0: ["output"]},
        f"{front}.decoder.data.node_data_extractor.1.bias": {0: ["output"]},
        f"{front}.boundings.data.0.norm_min_val": {0: [["tp"]], "new": "model"},
        "forcing": ["cos_lat", "sin_lat"],
        "diagnostic": ["cp", "tp"],
        "target": [],
    }
    for which in ("pre", "post"):
        normalizer = f"model.{which}_processors.data.processors.normalizer"
        expected |= dict.fromkeys(
            [f"{normalizer}._norm_mul", f"{normalizer}._norm_add"], statistics
        )
        expected |= dict.fromkeys(
            [f"{normalizer}._input_idx", f"{normalizer}._output_idx"], "model"
        )
    assert found == {"data": expected}
    gnn = anemoi_layout(interface({"era5": ERA5, "cerra": CERRA}))
    assert gnn["cerra"]["model.encoder.cerra.emb_nodes_src.mlp.0.weight"] == inputs
    assert gnn["era5"]["model.decoder.era5.node_data_extractor.mlp.4.bias"] == {0: ["output"]}
    assert not any("emb_nodes_dst" in name for name in gnn["era5"])  # that kind has none there


def test_the_layout_and_names_alone_will_do() -> None:
    task, checkpoint = trained("Transformer", "single")
    after = {"data": Variables((*ERA5.names[::-1], "q_700"), ERA5.forcing, ERA5.diagnostic)}
    new = Task(after, "Transformer")
    index, goal = ({name: n for n, name in enumerate(v.names)} for v in (ERA5, after["data"]))
    align = align_variables(index, goal, anemoi_layout(new), model=new, new="zeros")
    load_into(new, checkpoint["state_dict"], align)
    knowledge_is_preserved(task.model, new.model, {"data": ERA5}, after)


@pytest.mark.parametrize("broken", ["wider", "no encoder", "sparse"])
def test_other_models_want_a_layout_of_ones_own(broken: str) -> None:
    task = Task({"data": ERA5}, "GNN")
    core = task.model.model
    if broken == "wider":
        core.n_step_output = 2
        told = (
            r"AnemoiModelEncProcDec has another order of channels: .*"
            r"mlp\.4\.weight has 5 along axis 0, but its layout has output 5"
        )
    elif broken == "no encoder":
        del core.encoder["data"]
        told = r"no model\.model\.encoder\.data\.emb_nodes_src in .*write its layout yourself"
    else:
        del core.n_step_output
        told = r"no encoder-processor-decoder of anemoi-models in Task"
    with pytest.raises(ValueError, match=told):
        anemoi_layout(task)
    with pytest.raises(ValueError, match=told):
        align_variables(model=task)
    assert transfer_learning(task)(trained("GNN", "single")[1])["epoch"] == 0  # as it always did


def test_statistics_of_any_processor_are_aligned() -> None:
    """Whatever has a number, or a yes or no, for each variable; and positions are the model's."""
    tasks = [
        Task({"data": ERA5}, "GNN"),
        Task({"data": Variables(ERA5.names[::-1], *ERA5[1:])}, "GNN"),
    ]
    for place, task in enumerate(tasks):
        processors = task.model.pre_processors["data"].processors
        imputer = processors["imputer"] = torch.nn.Module()
        imputer.register_buffer("replacement", torch.arange(7.0) + 10 * place)
        imputer.register_buffer("is_imputed", torch.arange(7) == 2)
        imputer.register_buffer("index", torch.tensor([2 + place]))
        imputer.register_buffer("other", torch.ones(11))
        imputer.register_buffer("scalar", torch.tensor(1.0 + place))
    old, new = tasks
    layout = anemoi_layout(new)["data"]
    assert not any(name.endswith((".other", ".scalar")) for name in layout)
    align = align_variables(source=old, model=new)
    state_dict = align(dict(old.state_dict()))
    front = "model.pre_processors.data.processors.imputer."
    assert state_dict[front + "replacement"].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert state_dict[front + "is_imputed"].tolist() == [n == 4 for n in range(7)]
    assert state_dict[front + "index"].tolist() == [3]
    assert state_dict[front + "scalar"] == 1
    # three are the prognostic variables, and these have moved
    for task in tasks:
        task.model.pre_processors["data"].processors["imputer"].other = torch.ones(3)
    told = r"does not know .*\.imputer\.other \(axis 0 of size 3 could run over prognostic\)"
    with pytest.raises(ValueError, match=told):
        align_variables(source=old, model=new)(dict(old.state_dict()))


# ── in one line ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning's Trainer saves of a model of ERA5's variables."""
    import lightning

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = interface({"data": ERA5}, "GraphTransformer")
            held = {"data_indices": self.model.data_indices, "graph_data": graph()}
            self.save_hyperparameters(held)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model({"data": batch[0]})["data"].square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    folder = tmp_path_factory.mktemp("anemoi")
    draw = torch.Generator().manual_seed(1)
    batches = torch.randn(4, 2, 1, 6, len(ERA5.inputs), generator=draw)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches), batch_size=2)
    trainer = quiet_trainer(max_epochs=1, default_root_dir=folder)
    trainer.fit(Training(), loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


AFTER = Variables(
    ("sst", "msl", "q_700", "tp", "cos_lat", "z_500", "sin_lat", "t_850"),
    ("cos_lat", "sin_lat", "sst"),
    ("tp",),
)


class Plain(torch.nn.Module):
    """As above, without bounding."""

    def __init__(self, names: Variables, *, salt: int = 5) -> None:
        super().__init__()
        self.model = interface({"data": names}, "GraphTransformer", salt=salt)


def test_transfer_learning_aligns_by_itself_and_says_so(path: Path) -> None:
    old, new = Plain(ERA5), Plain(AFTER)
    load_into(old, path, exclude("nothing", missing_ok=True), strict=True)
    report = load_into(new, path, transfer_learning(new, new="zeros"))
    knowledge_is_preserved(old.model, new.model, {"data": ERA5}, {"data": AFTER})
    assert report.missing == report.unexpected == ()
    assert report.mismatched == {}
    assert report.variables["kept"] == ("msl", "tp", "cos_lat", "z_500", "sin_lat", "t_850")
    assert report.variables["new"] == ("sst", "q_700")
    assert report.variables["gone"] == ("cp",)
    assert "cos_lat from 1 to 4" in report.variables["moved"]
    assert set(report.aligned) == anemoi_layout(new)["data"].keys() - {
        "forcing",
        "diagnostic",
        "target",
    }
    assert report.rest["epoch"] == 0
    for told in ("6 kept: msl, tp", "4 moved: msl from 4 to 1", "2 new: sst, q_700", "1 gone: cp"):
        assert told in repr(report)


def test_transfer_learning_with_the_models_own_slices(path: Path) -> None:
    new = Plain(AFTER)
    own = new.state_dict()["model.model.encoder.data.emb_nodes_src.weight"].clone()
    held = load(path, weights)["model.model.encoder.data.emb_nodes_src.weight"]
    load_into(new, path, transfer_learning(new))
    weight = new.state_dict()["model.model.encoder.data.emb_nodes_src.weight"]
    inputs, old = AFTER.inputs, ERA5.inputs
    for step in range(2):
        for place, name in enumerate(inputs):
            expected = (
                held[:, step * len(old) + old.index(name)]
                if name in old
                else own[:, step * len(inputs) + place]
            )
            assert torch.equal(weight[:, step * len(inputs) + place], expected)


def test_transfer_learning_goes_on_where_there_is_nothing_to_align(path: Path) -> None:
    new = Plain(AFTER)
    # a checkpoint that does not know its variables, another dataset, the same variables
    assert load_into(new, load(path, weights), transfer_learning(new)).aligned == ()
    other = torch.nn.Module()
    other.model = interface({"a": AFTER, "b": AFTER}, "GraphTransformer")
    report = load_into(other, path, transfer_learning(other))
    assert report.variables == {}
    assert any("processor" in name for name in report.loaded)
    same = Plain(ERA5)
    report = load_into(same, path, transfer_learning(same), strict=True)
    assert report.variables["kept"] == ERA5.names
    assert report.aligned == report.variables["moved"] == ()
    for new_ones in ({"w": "t"}, "zeros"):
        with pytest.raises(ValueError, match="needs a model of anemoi-models"):
            transfer_learning(torch.nn.Linear(1, 1), new=new_ones)


def test_a_hollow_model_is_transferred_to_with_zeros(path: Path) -> None:
    with torch.device("meta"):
        hollow = Plain(AFTER)
    new = Plain(AFTER)
    load_into(new, path, transfer_learning(new, new="zeros"))
    load_into(hollow, path, transfer_learning(hollow, new="zeros"))
    assert_same(dict(hollow.state_dict()), dict(new.state_dict()))


def test_what_has_no_variables_may_be_loaded_in_any_order(path: Path) -> None:
    new = Plain(AFTER)
    report = load_into(new, path, include("model.model.processor"))
    assert report.loaded == tuple(
        n for n in new.state_dict() if n.startswith("model.model.processor.")
    )
    report = load_into(new, path, exclude("*.node_data_extractor.*", "*_idx"), filter_shapes(new))
    assert report.loaded
    more = Plain(Variables((*ERA5.names, "q_700"), *ERA5[1:]))
    report = load_into(more, path, filter_shapes(more))
    assert report.variables["new"] == ("q_700",)


@pytest.mark.parametrize(
    "strategies",
    [
        lambda _new: (),
        lambda _new: (weights, cast(torch.float16)),
        lambda new: (filter_shapes(new),),
        lambda new: (require_match(new, missing=False),),
        lambda new: (pad_or_slice(new),),
        lambda new: (standard(new),),
        lambda _new: (include("*.node_data_extractor.1.bias"),),
    ],
)
def test_another_order_is_refused_by_name(path: Path, strategies: Any) -> None:
    """The same variables elsewhere; every shape fits."""
    moved = Variables(("z_500", "cos_lat", "t_850", *ERA5.names[3:]), *ERA5[1:])
    new = Plain(moved)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(
        ValueError, match=r"z_500 from 2 to 0, t_850 from 0 to 2\).*align_variables"
    ):
        load_into(new, path, *strategies(new))
    assert_same(dict(new.state_dict()), dict(before))
    report = load_into(new, path, align_variables(model=new), *strategies(new))
    assert report.variables["moved"] == ("z_500 from 2 to 0", "t_850 from 0 to 2")
    assert load(path, align_variables(model=new), require_variables(new), variables) == {
        "data": {name: place for place, name in enumerate(moved.names)}
    }


def test_another_role_is_refused_and_told_of(path: Path) -> None:
    """Read, too, a variable's output is an increment; as a forcing, it is none."""
    roles = Variables(ERA5.names, ("cos_lat", "t_850"), ("tp", "cp", "sin_lat"))
    new = Plain(roles)
    told = r"\(t_850 from prognostic to forcing, sin_lat from forcing to diagnostic\).*extractor"
    with pytest.raises(ValueError, match=told):
        load_into(new, path, filter_shapes(new))
    report = load_into(new, path, transfer_learning(new, new="zeros"))
    assert report.variables["moved"] == ()
    assert report.variables["recast"] == (
        "t_850 from prognostic to forcing",
        "sin_lat from forcing to diagnostic",
    )
    assert "2 recast: t_850 from" in repr(report)
    bias = new.state_dict()["model.model.decoder.data.node_data_extractor.1.bias"]
    assert bias[roles.outputs.index("sin_lat")] == 0
    assert bias[roles.outputs.index("z_500")] != 0


def test_positions_of_other_roles_are_refused(path: Path) -> None:
    """Where the networks do not fit, and the normalisers' indices do by their shape."""
    wide = torch.nn.Module()
    roles = Variables(ERA5.names, ("cos_lat",), ("sin_lat", "cp"))
    wide.model = interface({"data": roles}, "GraphTransformer", channels=16)
    with pytest.raises(ValueError, match=r"normalizer\._input_idx"):
        load_into(wide, path, filter_shapes(wide))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_a_whole_module_knows_its_variables(tmp_path: Path, beside: bool, trust: bool) -> None:
    """As Anemoi writes for inference."""
    old, new = Plain(ERA5).model, Plain(Variables(ERA5.names[::-1], *ERA5[1:])).model
    path = tmp_path / "inference-last.ckpt"
    torch.save({"model": old, "epoch": 3} if beside else old, path)
    for chain in ((), (weights,), (filter_shapes(new),), (cast(torch.float64),)):
        with pytest.raises(ValueError, match=r"moved sin_lat from 6 to 0.*align_variables"):
            load_into(new, path, *chain, trust=trust)
    for strategy in (align_variables(model=new), transfer_learning(new)):
        report = load_into(new, path, strategy, trust=trust)
        assert report.variables["kept"] == ERA5.names[::-1]
        assert report.aligned
        knowledge_is_preserved(
            old, new, {"data": ERA5}, {"data": Variables(ERA5.names[::-1], *ERA5[1:])}
        )


def test_a_dataset_under_a_new_name_is_the_one_that_was_alone(path: Path) -> None:
    """Renamed before, it is aligned; renamed after, that is an error; unaligned, too."""
    moved = Variables(ERA5.names[::-1], *ERA5[1:])
    one, two = torch.nn.Module(), torch.nn.Module()
    one.model = interface({"era5": moved}, "GraphTransformer")
    two.model = interface({"era5": moved, "cerra": CERRA}, "GraphTransformer")
    named = rename(r"(\.|latlons_)data\b", r"\1era5")
    old = Plain(ERA5).model
    load_into(old, path, strip_prefix("model."), filter_shapes(old.state_dict()))
    for new in (one, two):
        with pytest.raises(ValueError, match=r"moved sin_lat from 6 to 0.*align_variables"):
            load_into(new, path, named, filter_shapes(new))
        with pytest.raises(ValueError, match=r"none of the layout's tensors"):
            load_into(new, path, align_variables(model=new), named)
        for align in (align_variables(model=new), transfer_learning(new)):
            assert load_into(new, path, named, align, exclude("none", missing_ok=True)).aligned
    values = [
        new.state_dict()["model.model.decoder.era5.node_data_extractor.1.bias"]
        for new in (one, two)
    ]
    held = load(path, weights)["model.model.decoder.data.node_data_extractor.1.bias"]
    assert values[0].tolist() == values[1].tolist() == held.flip(0).tolist()


def test_padding_does_not_hide_another_order(path: Path) -> None:
    """Two steps of inputs: padded at the end, the second one's variables are the first one's."""
    more = Plain(Variables((*ERA5.names, "q_700"), *ERA5[1:]))
    with pytest.raises(ValueError, match=r"added q_700\).*emb_nodes_src.weight.*align_variables"):
        load_into(more, path, pad_or_slice(more))


def test_a_step_more_is_the_oldest(path: Path) -> None:
    """Without the nodes' attributes nothing tells them from another step: the sum is shown."""
    new = torch.nn.Module()
    new.model = interface({"data": AFTER}, "GraphTransformer", steps=3)
    told = r"src\.weight has 16 along axis 1, but its layout has (input 5 \+ ){3}6 = 21"
    bare = exclude("*.node_attributes.*")
    with pytest.raises(ValueError, match=told):
        load_into(new, path, bare, transfer_learning(new))
    left = exclude("*.emb_nodes_src", "*.emb_nodes_dst")
    assert load_into(new, path, bare, left, transfer_learning(new)).aligned
    name = "model.model.encoder.data.emb_nodes_src.weight"
    own, count = new.state_dict()[name].clone(), len(AFTER.inputs)
    assert name in load_into(new, path, transfer_learning(new)).aligned
    same = torch.nn.Module()
    same.model = interface({"data": AFTER}, "GraphTransformer")
    same.load_state_dict({name: own[:, count:].clone()}, strict=False)  # what new variables get
    load_into(same, path, transfer_learning(same))
    assert_same(new.state_dict()[name], torch.cat([own[:, :count], same.state_dict()[name]], 1))


def test_names_under_another_prefix_are_told_of(path: Path) -> None:
    new = Plain(AFTER)
    with pytest.raises(ValueError, match=r"strip_prefix or add_prefix"):
        load_into(new.model, path, transfer_learning(new.model))
    report = load_into(new.model, path, strip_prefix("model."), transfer_learning(new.model))
    assert report.aligned


def test_a_refusal_is_a_mismatch_of_the_place(path: Path) -> None:
    new = Plain(Variables(ERA5.names[::-1], *ERA5[1:]))
    with pytest.raises(MismatchError) as caught:
        load_into(new, path)
    assert caught.value.place == str(path)


def test_reports_are_made_of_what_they_tell(path: Path) -> None:
    new = Plain(AFTER)
    report = load_into(new, path, align_variables(model=new))
    assert isinstance(report, Report)
    assert "<th style='text-align:left'>variables</th>" in report._repr_html_()


def test_readme(tmp_path: Path) -> None:
    block = marked("variables")
    (shown,) = re.findall(r"```text\n(aligned.*?)```", ALL, re.DOTALL)
    before = Variables(("t_850", "z_500", "msl", "tp"), ())
    old, new = Plain(before), Plain(Variables(("z_500", "t_925", "t_850", "tp"), ()))
    held = {"data_indices": old.model.data_indices}
    torch.save({"state_dict": old.state_dict(), "hyper_parameters": held}, tmp_path / "last.ckpt")
    for line in block.splitlines():
        scope = {"model": new, "uri": tmp_path / "last.ckpt", **vars(strategies)}
        report = repr(eval(line.partition("  #")[0], {**scope, "load_into": load_into}))
        for row in shown.replace("aligned 12 ", "").splitlines():
            assert re.split(r"  +", row.strip(" …"))[-1] in report
        assert "aligned 12 " in report
