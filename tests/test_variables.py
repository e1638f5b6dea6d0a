"""Variables follow their names. The parts with real Anemoi models are skipped without them."""

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import servers
from anemoi_ckpt import MismatchError, load, load_into
from checkpoints import assert_same
from pages import marked
from strategies import (
    add_prefix,
    align_variables,
    average,
    cast,
    compose,
    drop_optimizer,
    exclude,
    filter_shapes,
    include,
    keep_progress,
    merge,
    pad_or_slice,
    prefer_ema,
    require_match,
    require_variables,
    standard,
    transfer_learning,
    variables,
    warm_start,
    weights,
)

OLD = {"t": 0, "z": 1, "cos": 2, "tp": 3}
NEW = {"z": 0, "q": 1, "t": 2, "sol": 3, "cos": 4}  # moved, two new, tp gone
ROLES = {"forcing": ["cos", "sol"], "diagnostic": ["tp"]}
LAYOUT = {
    "encoder.weight": {1: ["input", "input", 1]},
    "decoder.*": {0: ["output"]},
    "skip": {0: ["output"], 1: ["input"]},
    "scaler": {-1: ["all"], "new": "model"},
    "positions": "model",
}


class Net(nn.Module):
    """Two steps of inputs and one coordinate, to outputs; a matrix from outputs to inputs."""

    def __init__(self, index: Mapping[str, int], start: float = 0.0) -> None:
        super().__init__()
        self.data_indices = {"data": SimpleNamespace(name_to_index=dict(index), **ROLES)}
        reads = [name for name in index if name not in ROLES["diagnostic"]]
        gives = [name for name in index if name not in ROLES["forcing"]]
        self.encoder = nn.Linear(2 * len(reads) + 1, 3)
        self.decoder = nn.Linear(3, len(gives))
        self.skip = nn.Parameter(torch.empty(len(gives), len(reads)))
        self.register_buffer("scaler", torch.empty(1, len(index)))
        self.register_buffer("positions", torch.arange(len(reads)))
        with torch.no_grad():
            for place, tensor in enumerate([*self.parameters(), self.scaler]):
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + start + place / 8)


def stored(net: nn.Module) -> dict[str, Any]:
    """A checkpoint of it, as Lightning and Anemoi write it."""
    state_dict = net.state_dict()
    return {
        "epoch": 3,
        "state_dict": state_dict,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "callbacks": {"EMA": {"ema": dict(state_dict), "decay": 0.9}, "none": None},
        "hyper_parameters": {"data_indices": net.data_indices, "config": {"lr": 0.1}},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(stored(Net(OLD)), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


# ── what comes of each axis ───────────────────────────────────────────────────────────────────


def test_kept_variables_take_their_slices_and_new_ones_the_models(path: Path) -> None:
    old, new = Net(OLD), Net(NEW, start=100.0)
    own = copy.deepcopy(new.state_dict())
    report = load_into(new, path, align_variables(layout=LAYOUT, model=new))
    # inputs were t z cos, twice, and a coordinate; they are z q t sol cos
    columns = [1, None, 0, None, 2, 4, None, 3, None, 5, 6]
    for place, column in enumerate(columns):
        expected = (
            own["encoder.weight"][:, place] if column is None else old.encoder.weight[:, column]
        )
        assert torch.equal(new.encoder.weight[:, place], expected)
    assert torch.equal(new.encoder.bias, old.encoder.bias)
    # outputs were t z tp; they are z q t
    assert torch.equal(new.decoder.bias[[0, 2]], old.decoder.bias[[1, 0]])
    assert new.decoder.bias[1] == own["decoder.bias"][1]
    # of two axes, what both sides have in both
    kept = torch.meshgrid(torch.tensor([0, 2]), torch.tensor([0, 2, 4]), indexing="ij")
    assert torch.equal(new.skip[kept], old.skip[[1, 0]][:, [1, 0, 2]])
    rest = torch.ones_like(new.skip, dtype=torch.bool)
    rest[kept] = False
    assert torch.equal(new.skip[rest], own["skip"][rest])
    assert torch.equal(new.scaler[0, [0, 2, 4]], old.scaler[0, [1, 0, 2]])
    assert torch.equal(new.scaler[0, [1, 3]], own["scaler"][0, [1, 3]])
    assert torch.equal(new.positions, own["positions"])
    assert report.missing == report.unexpected == ()
    assert report.variables == {
        "kept": ("z", "t", "cos"),
        "moved": ("z from 1 to 0", "t from 0 to 2", "cos from 2 to 4"),
        "new": ("q", "sol"),
        "gone": ("tp",),
        "recast": (),
    }
    assert set(report.aligned) == {*new.state_dict()} - {"encoder.bias"}
    for told in (
        "aligned 6 ",
        "3 kept: z, t, cos",
        "2 new: q, sol",
        "1 gone: tp",
        "3 moved: z from",
    ):
        assert told in repr(report)


def test_with_zeros_new_ones_have_no_say_but_statistics(path: Path) -> None:
    new = Net(NEW, start=100.0)
    own = copy.deepcopy(new.state_dict())
    state_dict = load(path, align_variables(layout=LAYOUT, model=new, new="zeros"), weights)
    assert not state_dict["encoder.weight"][:, [1, 3, 6, 8]].any()
    assert not state_dict["decoder.weight"][1].any()
    assert not state_dict["decoder.bias"][1]
    assert not state_dict["skip"][1].any()
    assert not state_dict["skip"][:, [1, 3]].any()
    assert torch.equal(state_dict["scaler"][0, [1, 3]], own["scaler"][0, [1, 3]])


def test_a_new_one_is_a_copy_of_a_sibling(path: Path) -> None:
    old, new = Net(OLD), Net(NEW, start=100.0)
    rule = {"q": "t", "sol": "zeros"}
    state_dict = load(path, align_variables(layout=LAYOUT, model=new, new=rule), weights)
    assert torch.equal(state_dict["encoder.weight"][:, [1, 6]], old.encoder.weight[:, [0, 3]])
    assert not state_dict["encoder.weight"][:, [3, 8]].any()
    assert state_dict["decoder.bias"][1] == old.decoder.bias[0]
    with pytest.raises(ValueError, match=r"sol cannot be a copy of tp in encoder\.weight"):
        load(path, align_variables(layout=LAYOUT, model=new, new={"sol": "tp"}))


def test_no_model_is_needed_for_zeros() -> None:
    layout = {"weight": {0: ["all"]}}
    align = align_variables({"t": 0, "z": 1}, {"z": 0, "q": 1, "t": 2}, layout, new="zeros")
    assert_same(align({"weight": torch.tensor([1.0, 2.0])}), {"weight": torch.tensor([2.0, 0, 1])})
    bare = align_variables({"t": 0, "z": 1}, {"z": 0, "q": 1, "t": 2}, layout)
    with pytest.raises(
        ValueError, match=r"weight takes .* no model that has it was passed.*new='zeros'"
    ):
        bare({"weight": torch.tensor([1.0, 2.0])})


def test_a_hollow_model_gives_no_slices(path: Path) -> None:
    with torch.device("meta"):
        new = Net(NEW)
    align = align_variables(layout={"decoder.*": {0: ["output"]}}, model=new)
    with pytest.raises(ValueError, match=r"decoder\.\w+ takes .* the model's is on meta"):
        load(path, align)
    zeros = align_variables(layout={"decoder.*": {0: ["output"]}}, model=new, new="zeros")
    assert load(path, zeros, weights)["decoder.bias"][1] == 0


def test_a_variable_that_is_predicted_otherwise_is_new_as_an_output() -> None:
    """Read, too, its output is an increment; else a value."""
    index = {"t": 0, "tp": 1}
    old = SimpleNamespace(name_to_index=index, forcing=[], diagnostic=["tp"])
    new = SimpleNamespace(name_to_index=index, forcing=[], diagnostic=[])
    layout = {"out": {0: ["output"]}, "in": {0: ["input"]}, "of": {0: ["prognostic", "diagnostic"]}}
    align = align_variables(old, new, layout, new="zeros")
    given = {
        "out": torch.tensor([1.0, 2.0]),
        "in": torch.tensor([3.0]),
        "of": torch.tensor([4.0, 5]),
    }
    made = align(given)
    assert_same(made["out"], torch.tensor([1.0, 0.0]))
    assert_same(made["in"], torch.tensor([3.0, 0.0]))
    assert_same(made["of"], torch.tensor([4.0, 0.0]))


def test_named_variables_and_forcings_are_parts() -> None:
    layout = {"a": {0: [["z", "t", "q"], "forcing"]}, "forcing": ["t"]}
    align = align_variables({"t": 0, "z": 1}, {"q": 0, "z": 1, "t": 2}, layout, new="zeros")
    assert_same(align({"a": torch.tensor([1.0, 2, 3])})["a"], torch.tensor([1.0, 2, 0, 3]))


def test_a_tensor_of_another_width_takes_nothing_from_the_model(path: Path) -> None:
    """It is left out where it would have to, and aligned where it need not."""
    new = Net(NEW)
    new.encoder = nn.Linear(11, 7)
    report = load_into(new, path, align_variables(layout=LAYOUT, model=new), filter_shapes(new))
    assert set(report.mismatched) == {"encoder.weight", "encoder.bias"}
    zeros = align_variables(layout=LAYOUT, model=new, new="zeros")
    made = load(path, zeros, weights)["encoder.weight"]
    assert torch.equal(made[:, [0, 2]], Net(OLD).encoder.weight[:, [1, 0]])
    load_into(new, path, zeros, pad_or_slice(new))
    assert torch.equal(new.encoder.weight[:3], made)
    new.encoder = nn.Conv1d(11, 3, 1)  # another number of axes
    assert "encoder.weight" not in load(path, align_variables(layout=LAYOUT, model=new), weights)


def test_dtype_and_ties_are_kept() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    layout = {"*": {0: ["all"]}}
    model = {"a": torch.tensor([7.0, 8.0]), "b": torch.tensor([7.0, 8.0])}
    align = align_variables({"t": 0, "z": 1}, {"z": 0, "q": 1}, layout, model=model)
    made = align(OrderedDict(a=weight, b=weight))
    assert_same(dict(made)["a"].data, torch.tensor([2.0, 8.0], dtype=torch.bfloat16))
    assert isinstance(made["a"], nn.Parameter)
    tied = align_variables({"t": 0, "z": 1}, {"z": 0, "t": 1}, layout)({"a": weight, "b": weight})
    assert tied["a"] is tied["b"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64])
def test_any_dtype(dtype: torch.dtype) -> None:
    given = torch.tensor([0, 1, 2]).to(dtype)
    if torch.__version__ < (2, 3) and "float8" in str(dtype):
        pytest.skip("torch 2.2 selects no elements of eight bits")
    layout = {"a": {0: ["all"]}}
    align = align_variables({"t": 0, "z": 1, "u": 2}, {"u": 0, "t": 1, "q": 2}, layout, new="zeros")
    assert_same(align({"a": given})["a"], torch.tensor([2, 0, 0]).to(dtype))


# ── what else is in the checkpoint ────────────────────────────────────────────────────────────


def test_the_result_is_in_the_new_order_and_says_so(path: Path) -> None:
    new = Net(NEW)
    align = align_variables(layout=LAYOUT, model=new)
    made = load(path, align)
    assert variables(made) == {"data": NEW}
    assert made["hyper_parameters"]["config"] == {"lr": 0.1}
    assert made["hyper_parameters"]["data_indices"]["data"].forcing == ROLES["forcing"]
    assert_same(align(made)["state_dict"], made["state_dict"])  # twice is once
    assert load(path, align, require_variables(new), weights).keys() == new.state_dict().keys()
    # what would be in the old order is not there any more
    assert "optimizer_states" not in made
    assert made["callbacks"] == {"EMA": {"decay": 0.9}, "none": None}
    for strategy, told in ((prefer_ema, "no averaged weights"), (keep_progress, "optimizer")):
        with pytest.raises(ValueError, match=told):
            load(path, align, strategy)
    assert load(path, prefer_ema, align, weights).keys() == new.state_dict().keys()


def test_the_same_variables_change_nothing(path: Path) -> None:
    strange = {"encoder.weight": {1: ["input", 99]}}
    plain, made = load(path), load(path, align_variables(layout=strange, target=OLD))
    assert list(made) == list(plain)
    assert_same(made["state_dict"], plain["state_dict"])
    assert made["optimizer_states"]


def test_the_checkpoints_own_roles_come_before_others() -> None:
    index = {"t": 0, "tp": 1, "cp": 2}
    held = {"name_to_index": index, "diagnostic": ["tp"]}
    goal = {"name_to_index": index, "diagnostic": ["cp"]}
    checkpoint = {
        "state_dict": {"in": torch.tensor([1.0, 2.0]), "out": torch.tensor([1.0, 2.0, 3.0])},
        "hyper_parameters": {"data_indices": held},
    }
    layout = {"in": {0: ["input"]}, "out": {0: ["output"]}}
    for source in (None, index):
        align = align_variables(source, goal, layout, new="zeros")
        made = align(checkpoint)
        assert_same(made["state_dict"]["in"], torch.tensor([1.0, 0.0]))
        assert_same(made["state_dict"]["out"], torch.tensor([1.0, 0.0, 0.0]))
        assert_same(align(made)["state_dict"], made["state_dict"])


def test_what_a_file_tells_may_be_anything(tmp_path: Path) -> None:
    """It tells nothing then, and nothing comes of it."""
    for number, held in enumerate(
        [{"t": 0, "z": "a"}, {"name_to_index": {"t": 0}, "forcing": 3, "diagnostic": [[1]]}]
    ):
        indices = {"data": held if number else {"name_to_index": held}}
        state_dict = {"weight": torch.ones(1, 1)}
        checkpoint = {"state_dict": state_dict, "hyper_parameters": {"data_indices": indices}}
        torch.save(checkpoint, tmp_path / "last.ckpt")
        assert load_into(nn.Linear(1, 1), tmp_path / "last.ckpt").loaded == ("weight",)


def test_a_module_beside_the_weights_is_left_alone() -> None:
    teacher = Net(OLD)
    checkpoint = {"model": teacher.state_dict(), "teacher": teacher}
    made = align_variables(layout=LAYOUT, model=Net(MOVED))(checkpoint)
    assert made["teacher"] is teacher
    assert torch.equal(made["model"]["decoder.bias"], teacher.decoder.bias[[1, 0, 2]])


def test_the_result_is_its_own(path: Path) -> None:
    align = align_variables(OLD, NEW, {**LAYOUT, **ROLES}, model=Net(NEW))
    made = load(path, align)
    made["hyper_parameters"]["data_indices"]["data"]["name_to_index"].clear()
    assert variables(load(path, align)) == {"data": NEW}


def test_roles_of_what_is_not_there_are_none(path: Path) -> None:
    target = {"name_to_index": OLD, "forcing": ["cos", "lsm"], "diagnostic": ["tp", "sf"]}
    made = load(path, align_variables(target=target, layout=LAYOUT, model=Net(OLD)))
    assert made["optimizer_states"]  # nothing was done


def test_what_they_are_may_be_given_instead(path: Path) -> None:
    new = Net(NEW)
    expected = load(path, align_variables(layout=LAYOUT, model=new), weights)
    roles = {"forcing": ["cos", "sol"], "diagnostic": ["tp"]}
    for layout in ({**LAYOUT, **roles}, {"data": {**LAYOUT, **roles}}):
        made = load(path, align_variables(OLD, NEW, layout, model=new), weights)
        assert_same(dict(made), dict(expected))
    bare = load(path, weights)
    target = {"era5": {"name_to_index": NEW, **roles}}
    align = align_variables(OLD, target, LAYOUT | roles, model=new)
    assert_same(dict(align(bare)), dict(expected))
    report = load_into(new, bare, align)
    assert report.variables["new"] == ("q", "sol")
    assert "decoder.bias" in report.aligned
    made = load(path, align_variables(OLD, NEW, {**LAYOUT, **roles}, model=new))
    assert made["hyper_parameters"]["data_indices"]["data"]["forcing"] == ["cos", "sol"]


def test_a_dataset_alone_has_any_name(path: Path) -> None:
    new = Net(NEW)
    roles = {"forcing": ["cos", "sol"], "diagnostic": ["tp"]}
    target = {"era5": {"name_to_index": NEW, **roles}}
    align = align_variables(target=target, layout=LAYOUT, model=new)
    report = load_into(new, path, align, weights)
    assert report.variables["new"] == ("q", "sol")
    assert variables(load(path, align)) == {"era5": NEW}


def test_a_collection_alone_stays_alone(tmp_path: Path) -> None:
    alone = stored(Net(OLD))
    alone["hyper_parameters"]["data_indices"] = alone["hyper_parameters"]["data_indices"]["data"]
    torch.save(alone, tmp_path / "last.ckpt")
    made = load(tmp_path / "last.ckpt", align_variables(layout=LAYOUT, model=Net(NEW)))
    assert made["hyper_parameters"]["data_indices"].name_to_index == NEW


def test_datasets_are_aligned_each_by_its_own_names() -> None:
    layout = {"a": {"enc.a": {0: ["all"]}}, "b": {"enc.b": {0: ["all"]}}}
    held = {"a": {"t": 0, "z": 1}, "b": {"t": 0, "u": 1}, "c": {"q": 0}}
    goal = {"a": {"z": 0, "t": 1}, "b": {"t": 0, "u": 1}, "d": {"q": 0}}
    checkpoint = {
        "state_dict": {"enc.a": torch.tensor([1.0, 2.0]), "enc.b": torch.tensor([3.0, 4.0])},
        "hyper_parameters": {"data_indices": {n: {"name_to_index": i} for n, i in held.items()}},
    }
    made = align_variables(target=goal, layout=layout)(checkpoint)
    assert_same(
        made["state_dict"], {"enc.a": torch.tensor([2.0, 1.0]), "enc.b": torch.tensor([3.0, 4.0])}
    )
    assert variables(made) == {"a": goal["a"], "b": held["b"], "c": held["c"]}


def test_a_module_alone_is_aligned() -> None:
    align = align_variables(OLD, NEW, LAYOUT | ROLES, model=Net(NEW))
    made = align(Net(OLD))
    assert made["decoder.bias"].shape == (3,)


# ── laws ──────────────────────────────────────────────────────────────────────────────────────


def test_it_is_planned_on_the_hollow_checkpoint(
    tmp_path: Path, http_server: servers.HTTPServer
) -> None:
    """What gives no slice is not moved, nor what a later strategy drops."""
    wide = 200_000
    checkpoint = {
        "state_dict": {
            "kept": torch.ones(2, wide),
            "other": torch.ones(1, wide),
            "dropped": torch.ones(2, wide),
        },
        "hyper_parameters": {"data_indices": {"name_to_index": {"t": 0, "z": 1}}},
        "optimizer_states": [torch.ones(4 * wide)],
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    uri = http_server.put("last.ckpt", (tmp_path / "last.ckpt").read_bytes())
    model = nn.Module()
    model.kept = nn.Parameter(torch.zeros(3, wide))
    model.other = nn.Parameter(torch.full((1, wide), 5.0))
    # of the other one's variables, the only one is gone, and another is new
    layout = {"kept": {0: ["all"]}, "other": {0: [["t", "q"]]}, "dropped": {0: [["z", "t"]]}}
    align = align_variables(target={"z": 0, "q": 1, "u": 2}, layout=layout, model=model)
    report = load_into(model, uri, align, exclude("dropped"))
    assert model.kept[:, 0].tolist() == [1, 0, 0]
    assert model.other[0, 0] == 5
    needed = checkpoint["state_dict"]["kept"].nbytes
    assert needed <= report.bytes_moved <= 1.02 * needed + 2**18


def test_fused_is_as_one_after_the_other(path: Path) -> None:
    align = align_variables(layout=LAYOUT, model=Net(NEW, start=50.0))
    after = cast(torch.float64)
    expected = after(align(load(path)))
    for made in (load(path, align, after), compose(after, align, load)(path)):
        assert_same(made["state_dict"], expected["state_dict"])
        assert variables(made) == variables(expected)


@settings(max_examples=50)
@given(order=st.permutations([*OLD]))
def test_there_and_back_is_where_it_was(order: list[str]) -> None:
    old, middle = Net(OLD), Net({name: place for place, name in enumerate(order)})
    checkpoint = stored(old)
    there = align_variables(layout=LAYOUT, model=middle)
    home = align_variables(layout=LAYOUT, model=old)
    before = copy.deepcopy(checkpoint["state_dict"])
    made = home(there(checkpoint))
    assert_same(dict(made["state_dict"]), dict(before))
    assert_same(dict(checkpoint["state_dict"]), dict(before))  # nor is it changed on the way


# ── errors ────────────────────────────────────────────────────────────────────────────────────


def test_a_size_that_the_layout_does_not_explain_shows_the_sum(path: Path) -> None:
    new = Net(NEW)
    layout = {"encoder.weight": {1: ["input", 5]}, "skip": {0: ["output"], 1: ["input"]}}
    with pytest.raises(ValueError, match=r"exclude") as caught:
        load(path, align_variables(target=new, layout=layout))
    assert "encoder.weight has 7 along axis 1, but its layout has input 3 + 5 = 8" in str(
        caught.value
    )
    assert str(caught.value).startswith(str(path))
    with pytest.raises(
        ValueError, match=r"has 11 along axis 1, but its layout has input 5 \+ 5 = 10 in the model"
    ):
        load(path, align_variables(layout=layout, model=new))
    align = align_variables({"t": 0}, {"z": 0}, {"a": {0: ["all"]}}, model={"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"a has no axis 0: its shape is \(\)"):
        align({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"skip has 2 axes, but its layout has one of them twice"):
        load(path, align_variables(target=new, layout={"skip": {1: ["all"], -1: ["all"]}}))
    with pytest.raises(ValueError, match=r"skip has no axis 2: its shape is \(3, 3\)"):
        load(path, align_variables(target=new, layout={"skip": {2: [["z"], "all"]}}))
    with pytest.raises(ValueError, match=r"its layout has \(z, tp\) 2 \+ 1 = 3"):
        load(path, align_variables(target=new, layout={"encoder.weight": {1: [["z", "tp"], 1]}}))


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({}, TypeError, "needs target and layout, or a model"),
        ({"target": NEW}, TypeError, "needs target and layout, or a model"),
        ({"target": 3, "layout": LAYOUT}, TypeError, "takes variables by name"),
        ({"source": "a", "target": NEW, "layout": LAYOUT}, TypeError, "takes variables by name"),
        ({"target": {"hyper_parameters": {}}, "layout": LAYOUT}, ValueError, "no variables"),
        ({"target": NEW, "layout": {}}, TypeError, "a layout is a dict"),
        ({"target": NEW, "layout": [1]}, TypeError, "a layout is a dict"),
        (
            {"target": NEW, "layout": {"a": {1: "input"}}},
            ValueError,
            "not a layout: 'a': {1: 'input'}",
        ),
        ({"target": NEW, "layout": {"a": {1: ["inputs"]}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {"a": {1: [-1]}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {"a": {1: 5}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {3: {1: [5]}}}, ValueError, "not a layout: 3"),
        ({"target": NEW, "layout": {"a": {1: [1.5]}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {"a": {1: [1], "b": 2}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {"a": {1: [1], "new": "ones"}}}, ValueError, "not a layout"),
        ({"target": NEW, "layout": {"a": "zeros", "b": {1: [1]}}}, ValueError, "not a layout: 'a'"),
        (
            {"target": NEW, "layout": LAYOUT | {"forcing": [3]}},
            ValueError,
            "not a layout: 'forcing'",
        ),
        (
            {"target": NEW, "layout": {"x": LAYOUT}},
            ValueError,
            "is for the dataset x, but the variables are of data",
        ),
        ({"target": {"a": NEW, "b": NEW}, "layout": LAYOUT}, ValueError, "is by dataset: a, b"),
        ({"target": NEW, "layout": LAYOUT, "new": "ones"}, ValueError, "new is 'model', 'zeros'"),
        (
            {"target": NEW, "layout": LAYOUT, "new": {"w": "t"}},
            ValueError,
            "not among the wanted ones: w",
        ),
        ({"target": NEW, "layout": LAYOUT, "new": {"q": ["t"]}}, ValueError, "name of a variable"),
        ({"model": Net(NEW).state_dict(), "layout": LAYOUT}, TypeError, "variables by name"),
        (
            {"target": NEW, "layout": LAYOUT, "model": 3},
            TypeError,
            "takes a module or a state dict",
        ),
        ({"model": nn.Linear(1, 1)}, TypeError, "takes variables by name"),
        ({"model": Net(NEW)}, ValueError, "no encoder-processor-decoder of anemoi-models in Net"),
        ({"model": {"a": torch.ones(1)}, "target": NEW}, TypeError, "anemoi_layout takes a module"),
    ],
)
def test_arguments_are_checked_at_once(
    arguments: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=re.escape(told)):
        align_variables(**arguments)


@pytest.mark.parametrize(
    ("layout", "checkpoint", "told"),
    [
        ({"a": {0: ["all"]}}, {"b": torch.ones(2)}, "'a' chooses nothing"),
        ({"a": {0: ["all"]}}, {"m.a": torch.ones(2)}, "'*.a' would"),
        ({"a": {0: ["all"]}, "*": {0: ["all"]}}, {"a": torch.ones(2)}, "has a twice; '*' chooses"),
    ],
)
def test_globs_are_checked(layout: Any, checkpoint: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        align_variables({"t": 0, "z": 1}, {"z": 0, "t": 1}, layout)(checkpoint)


def test_what_the_model_has_may_be_absent_but_not_by_another_name(path: Path) -> None:
    new = Net(NEW)
    align = align_variables(layout=LAYOUT, model=new)
    assert "skip" not in load(path, exclude("skip"), align, weights)
    with pytest.raises(
        ValueError, match=r"no encoder\.weight, but net\.encoder\.weight; strip_prefix"
    ):
        load(path, weights, lambda s: {f"net.{n}": t for n, t in s.items()}, align_from(OLD, new))
    outer = nn.ModuleDict({"net": new})
    align = align_variables(
        OLD, NEW, {f"net.{glob}": each for glob, each in LAYOUT.items()}, model=outer
    )
    with pytest.raises(
        ValueError, match=r"no net\.encoder\.weight, but encoder\.weight; strip_prefix"
    ):
        load(path, align)


def align_from(source: Any, model: nn.Module) -> Any:
    return align_variables(source, layout=LAYOUT, model=model)


def test_variables_that_are_not_there_or_others(path: Path) -> None:
    with pytest.raises(ValueError, match=r"no variables.*; pass source to say what they are"):
        load(path, weights, align_variables(layout=LAYOUT, model=Net(NEW)))
    with pytest.raises(ValueError, match=r"not those passed as source: added tp; removed q"):
        load(
            path, align_variables({"t": 0, "z": 1, "cos": 2, "q": 3}, layout=LAYOUT, model=Net(NEW))
        )
    two = {"a": {"t": 0}, "b": {"z": 0}}
    other = {"c": {"t": 0}, "d": {"z": 0}}
    layout = {"a": LAYOUT}
    with pytest.raises(ValueError, match=r"wanted ones, a, b; its own are: c, d"):
        load(path, align_variables(other, two, layout))


# ── another order is refused ──────────────────────────────────────────────────────────────────

MOVED = {"z": 0, "t": 1, "cos": 2, "tp": 3}  # the same ones elsewhere: every shape fits


@pytest.mark.parametrize(
    "strategies",
    [
        (),
        (weights,),
        (drop_optimizer, cast(torch.float16)),
        (include("encoder"),),
        (lambda checkpoint: {name: t.half() for name, t in checkpoint["state_dict"].items()},),
        ("filter_shapes",),
        ("require_match",),
        ("pad_or_slice",),
        ("standard",),
        ("warm_start",),
        ("transfer_learning",),  # whose layout nobody knows
    ],
)
def test_a_reordered_checkpoint_is_refused(path: Path, strategies: Any) -> None:
    model = Net(MOVED, start=9.0)
    before = copy.deepcopy(model.state_dict())
    of_model = {
        "filter_shapes": filter_shapes,
        "require_match": require_match,
        "pad_or_slice": pad_or_slice,
        "standard": standard,
        "warm_start": warm_start,
        "transfer_learning": transfer_learning,
    }
    made = [of_model[each](model) if isinstance(each, str) else each for each in strategies]
    with pytest.raises(ValueError, match=r"align_variables\(model=model\)") as caught:
        load_into(model, path, *made)
    said = str(caught.value)
    assert "moved z from 1 to 0, t from 0 to 1" in said
    assert "encoder.weight" in said
    assert_same(dict(model.state_dict()), dict(before))
    if any(isinstance(each, str) for each in strategies):
        with pytest.raises(ValueError, match=r"moved z from 1 to 0.*align_variables"):
            load(path, *made)
    else:
        assert isinstance(caught.value, MismatchError)


def test_other_roles_are_refused_where_no_layout_is_known(path: Path) -> None:
    model = Net(OLD)
    swapped = {"forcing": ["tp"], "diagnostic": ["cos"]}
    model.data_indices = {"data": SimpleNamespace(name_to_index=OLD, **swapped)}
    with pytest.raises(
        MismatchError, match=r"cos from forcing to diagnostic, tp from diag.*layout"
    ):
        load_into(model, path)


def test_names_are_the_models_when_it_is_aligned(path: Path) -> None:
    """Else they are not in it yet, and nothing can be taken from it."""
    outer = nn.ModuleDict({"net": Net(NEW)})
    align = align_variables(layout=LAYOUT, model=outer)
    with pytest.raises(ValueError, match=r"takes slices .* no model that has it was passed"):
        load_into(outer, path, align, add_prefix("net."))
    moved = nn.ModuleDict({"net": Net(MOVED)})
    layout = {glob: each for glob, each in LAYOUT.items() if glob != "positions"}
    layout = {**layout, "scaler": {1: ["all"]}}
    report = load_into(moved, path, align_variables(layout=layout, model=moved), add_prefix("net."))
    assert "decoder.bias" in report.aligned
    assert torch.equal(moved["net"].decoder.bias, Net(OLD).decoder.bias[[1, 0, 2]])


def test_aligned_it_loads_whatever_follows(path: Path) -> None:
    align = align_variables(layout=LAYOUT, model=Net(MOVED))
    expected = load(path, align, weights)
    for chain in (
        (align,),
        (align, weights),
        (compose(weights, align),),
        (align, weights, lambda state_dict: {n: t.clone() for n, t in state_dict.items()}),
        (lambda checkpoint: align(checkpoint),),  # noqa: PLW0108 - nobody sees what is in it
        (align, standard(Net(MOVED)), cast(torch.float64)),
    ):
        model = Net(MOVED, start=9.0)
        report = load_into(model, path, *chain)
        assert_same(dict(model.state_dict()), dict(expected))
        assert report.variables["moved"] == ("z from 1 to 0", "t from 0 to 1") or not report.aligned


def test_a_state_dict_alone_is_taken_as_it_is(path: Path) -> None:
    """As the error says: there is nothing to compare, and a strategy of one's own did it."""
    model = Net(MOVED)
    report = load_into(model, load(path, weights))
    assert report.variables == {}
    assert report.aligned == ()
    assert "variables" not in repr(report)
    assert torch.equal(model.decoder.bias, Net(OLD).decoder.bias)


def test_what_is_only_added_is_no_other_order(path: Path) -> None:
    more = Net({**OLD, "q": 4})
    report = load_into(more, path, filter_shapes(more))
    assert report.loaded == ("encoder.bias",)


def test_another_variable_at_the_same_place_is_refused(path: Path) -> None:
    """Every shape fits, and nobody knows whether it is the same variable by another name."""
    other = Net({"t": 0, "geo": 1, "cos": 2, "tp": 3}, start=9.0)
    before = copy.deepcopy(other.state_dict())
    for strategies_ in ((), (filter_shapes(other),)):
        with pytest.raises(
            ValueError, match=r"\(added geo; removed z\).*new=\{'its name': 'the old"
        ):
            load_into(other, path, *strategies_)
        assert_same(dict(other.state_dict()), dict(before))
    old = Net(OLD)
    load_into(other, path, align_variables(layout=LAYOUT, model=other, new={"geo": "z"}))
    assert torch.equal(other.encoder.weight, old.encoder.weight)
    assert torch.equal(other.decoder.bias, old.decoder.bias)
    assert torch.equal(other.scaler[0, [0, 2, 3]], old.scaler[0, [0, 2, 3]])
    assert other.scaler[0, 1] == before["scaler"][0, 1]  # statistics are the model's
    fewer = Net({"t": 0, "cos": 2, "tp": 3})  # z is gone, and nothing is in its place
    assert load_into(fewer, path, filter_shapes(fewer)).loaded == ("encoder.bias",)


def test_readme(tmp_path: Path) -> None:
    block = marked("layout")
    old, new = (
        nn.ModuleDict({"encoder": nn.Linear(inputs, 3), "decoder": nn.Linear(3, 2)})
        for inputs in (8, 10)
    )
    for net in (old, new):
        net["normalizer"] = nn.Module()
        net["normalizer"].register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]))
    torch.save({"state_dict": old.state_dict()}, tmp_path / "last.ckpt")
    new["normalizer"].mean += 10
    scope = {"uri": tmp_path / "last.ckpt", "model": new, "load_into": load_into}
    exec(block, scope | {"align_variables": align_variables})
    assert new["normalizer"].mean.tolist() == [3, 12, 1]
    columns = [new["encoder"].weight[:, place] for place in (0, 2, 3, 5, 6, 7, 8, 9)]
    assert torch.equal(torch.stack(columns, 1), old["encoder"].weight[:, [1, 0, 3, 2, 4, 5, 6, 7]])
    assert torch.equal(new["decoder"].bias[1], old["decoder"].bias[0])
    assert new["decoder"].bias[0] == 0


# ── several checkpoints ───────────────────────────────────────────────────────────────────────


def known(index: dict[str, int], value: float, **units: str) -> dict[str, Any]:
    facts = {name: {"units": unit} for name, unit in units.items()}
    metadata = {"dataset": {"data": {"variables_metadata": facts}}}
    indices = {"data": {"name_to_index": index, "forcing": [], "diagnostic": []}}
    parameters = {"data_indices": indices, "metadata": metadata}
    return {
        "state_dict": {"encoder": torch.full((2,), value)},
        "hyper_parameters": parameters,
    }


@pytest.mark.parametrize(("combine", "verb"), [(average, "average"), (merge, "merge")])
def test_checkpoints_of_other_variables_are_not_combined(combine: Any, verb: str) -> None:
    first = known({"t": 0, "z": 1}, 1.0, t="K")
    moved = known({"z": 0, "t": 1}, 3.0)
    told = rf"variables of checkpoint 2 to {verb} with are not the same here: moved .* from 0 to 1"
    with pytest.raises(MismatchError, match=told):
        combine(known({"t": 0, "z": 1}, 2.0), moved)(first)
    with pytest.raises(MismatchError, match=r"checkpoint 1 .* not the same here: .*\bK\b"):
        combine(known({"t": 0, "z": 1}, 3.0, t="degC"))(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names clash in merging
        for other in (known({"t": 0, "z": 1}, 3.0), weights(moved)):
            result = combine(other)(first)["state_dict"]["encoder"].tolist()
            assert result == ([2.0, 2.0] if verb == "average" else [3.0, 3.0])
