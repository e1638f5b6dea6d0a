"""Variables in other units: refused by name, or the normaliser is scaled."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import needs
from _anemoi_ckpt.leadtimes import other_times, read_times
from anemoi_ckpt import MismatchError, load, load_into, save
from checkpoints import assert_same
from strategies import (
    align_variables,
    compose,
    exclude,
    filter_shapes,
    include,
    refresh_processors,
    require_match,
    transfer_learning,
    weights,
)

INDEX = {"t": 0, "tp": 1}
LAYOUT = {"layer.weight": {1: ["all"]}, "*_norm_*": {0: ["all"], "new": "model"}}
NORMALISER = "pre_processors.data.processors.normalizer."


def described(units: Mapping[str, str], index: Mapping[str, int] = INDEX) -> dict[str, Any]:
    facts = {name: {"mars": {"param": name}} | _units(units, name) for name in index}
    entry = {"variables": sorted(index, key=index.__getitem__), "variables_metadata": facts}
    return {"run_id": "abc", "dataset": {"data": entry}}


def _units(units: Mapping[str, str], name: str) -> dict[str, str]:
    return {"units": units[name]} if name in units else {}


class Normaliser(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("_norm_mul", torch.full((count,), 2.0))
        self.register_buffer("_norm_add", torch.full((count,), 1.0))


def nested(names: str, last: torch.nn.Module) -> torch.nn.Module:
    for name in reversed(names.split(".")):
        last = torch.nn.ModuleDict({name: last})
    return last


class Model(torch.nn.Module):
    """A model as of Anemoi: it normalises what it reads, and knows its variables and units."""

    def __init__(self, units: Mapping[str, str], index: Mapping[str, int] = INDEX) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pre_processors = nested("data.processors.normalizer", Normaliser(len(index)))
        self.layer = torch.nn.Linear(len(index), 1, bias=False)
        self.data_indices = {"data": SimpleNamespace(name_to_index=dict(index))}
        self.metadata = described(units, index)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        normaliser = self.get_submodule(NORMALISER.strip("."))
        return self.layer(values * normaliser._norm_mul + normaliser._norm_add)


def checkpoint(units: Mapping[str, str]) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "epoch": 3,
        "state_dict": {
            f"{NORMALISER}_norm_mul": torch.tensor([0.5, 4.0]),
            f"{NORMALISER}_norm_add": torch.tensor([-1.0, 0.25]),
            "layer.weight": torch.randn(1, 2),
        },
        "current_model_state": {"layer.weight": torch.ones(1, 2)},
        "hyper_parameters": {
            "data_indices": {"data": SimpleNamespace(name_to_index=INDEX)},
            "metadata": described(units),
        },
    }


METRES = {"t": "K", "tp": "m"}
MILLIMETRES = {"t": "K ", "tp": "mm"}
SAID = r"units differ: tp is in m in the checkpoint and in mm in the model; .*units="


@pytest.fixture
def path(tmp_path: Path) -> Any:
    return save(checkpoint(METRES), tmp_path / "last.ckpt")


def test_other_units_are_refused_and_the_model_is_as_it_was(path: Any) -> None:
    model = Model(MILLIMETRES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attempts = [(), (weights,), (transfer_learning(model),), (filter_shapes(model),)]
    attempts += [(require_match(model),), (align_variables(None, None, LAYOUT, model=model),)]
    for strategies in attempts:
        with pytest.raises(MismatchError, match=SAID) as caught:
            load_into(model, path, *strategies)
        assert str(path) in str(caught.value)
    assert_same(dict(model.state_dict()), before)
    with pytest.raises(MismatchError, match=SAID):
        load(path, transfer_learning(model))


@pytest.mark.parametrize("units", [METRES, {}, {"t": "K"}])
def test_equal_and_unknown_units_are_no_matter(path: Any, units: Mapping[str, str]) -> None:
    model = Model(units)
    load_into(model, path, require_match(model), strict=True)
    other = Model(MILLIMETRES)
    load_into(other, checkpoint(units if units != METRES else {}), strict=True)


def test_behind_the_normaliser_there_are_no_units(path: Any) -> None:
    model = Model(MILLIMETRES)
    report = load_into(model, path, exclude("*_norm_*"))
    assert report.loaded == ("layer.weight",)
    plain = Model(MILLIMETRES)
    del plain.pre_processors  # a model that normalises in another way: any tensor may have units
    with pytest.raises(MismatchError, match=SAID):
        load_into(plain, path, include("layer.*"))


def test_the_normaliser_is_scaled_so_that_nothing_else_changes(path: Any) -> None:
    model, old = Model(MILLIMETRES), Model(METRES)
    load_into(old, path, strict=True)
    align = align_variables(None, None, LAYOUT, model=model, units={"tp": 1000})
    load_into(model, path, align, require_match(model), strict=True)
    values = torch.tensor([[280.0, 0.002]])
    torch.testing.assert_close(model(values * torch.tensor([1.0, 1000.0])), old(values))
    result = load(path, align)
    facts = result["hyper_parameters"]["metadata"]["dataset"]["data"]["variables_metadata"]
    assert facts["tp"] == {"mars": {"param": "tp"}, "units": "mm"}
    assert "current_model_state" not in result
    assert_same(align(result), result)  # once is enough
    assert_same(load(path), checkpoint(METRES))
    again = Model(MILLIMETRES)
    load_into(again, path, align, weights, strict=True)  # whose units are known all the same
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    load_into(again, path, compose(transfer_learning(again), align), strict=True)


def test_variables_that_move_are_scaled_too(path: Any) -> None:
    index = {"tp": 0, "q": 1, "t": 2}
    model, old = Model(MILLIMETRES, index), Model(METRES)
    load_into(old, path)
    align = align_variables(None, None, LAYOUT, model=model, new="zeros", units={"tp": 1000})
    load_into(model, path, align, strict=True)
    values = torch.tensor([[2.0, 7.0, 280.0]])
    torch.testing.assert_close(model(values), old(torch.tensor([[280.0, 0.002]])))


def test_where_a_side_knows_no_units_the_factor_counts() -> None:
    model = Model({})
    align = align_variables(None, None, LAYOUT, model=model, units={"tp": 10})
    name = f"{NORMALISER}_norm_mul"
    assert align(checkpoint({}))["state_dict"][name].tolist() == [0.5, pytest.approx(0.4)]
    assert align(checkpoint(METRES))["state_dict"][name].tolist() == [0.5, pytest.approx(0.4)]
    held = checkpoint({})
    del held["hyper_parameters"]["metadata"]["dataset"]["data"]["variables_metadata"]
    named = align_variables(None, None, LAYOUT, model=Model(METRES), units={"tp": 10})
    assert named(held)["state_dict"][name].tolist() == [0.5, pytest.approx(0.4)]
    bare = align_variables(INDEX, INDEX, LAYOUT, units={"tp": 10})(held["state_dict"])
    assert bare[name].tolist() == [0.5, pytest.approx(0.4)]


def test_before_datasets_had_names() -> None:
    held = checkpoint({})
    state_dict = {n.replace("data.", ""): v for n, v in held["state_dict"].items()}
    metadata = {"dataset": described(METRES)["dataset"]["data"]}
    indices = SimpleNamespace(name_to_index=INDEX)
    held["hyper_parameters"] = {"data_indices": indices, "metadata": metadata}
    held["state_dict"] = state_dict
    model = Model(MILLIMETRES)
    with pytest.raises(MismatchError, match=SAID):
        align_variables(None, None, LAYOUT, model=model)(held)
    result = align_variables(None, None, LAYOUT, model=model, units={"tp": 1000})(held)
    name = f"{NORMALISER.replace('data.', '')}_norm_mul"
    assert result["state_dict"][name].tolist() == [0.5, pytest.approx(0.004)]
    section = result["hyper_parameters"]["metadata"]["dataset"]
    assert section["variables_metadata"]["tp"]["units"] == "mm"


def test_the_models_own_normaliser_is_for_the_models_units(path: Any) -> None:
    model = Model(MILLIMETRES)
    before = {n: t.clone() for n, t in model.state_dict().items() if "_norm_" in n}
    refresh = refresh_processors(model, tendencies=False, states=True)
    report = load_into(model, path, refresh, require_match(model), strict=True)
    assert len(report.loaded) == 3
    assert_same({n: model.state_dict()[n] for n in before}, before)
    state_dict = checkpoint(METRES)["state_dict"]
    assert refresh(state_dict).keys() == state_dict.keys()


def test_factors_that_cannot_be(path: Any) -> None:
    model = Model(MILLIMETRES)
    for wrong in (1000, {"tp": "1000"}, {"tp": True}):
        with pytest.raises(TypeError, match="units is a dict: for a variable, how many"):
            align_variables(model=model, layout=LAYOUT, units=wrong)
    for number in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factors that are not positive: tp"):
            align_variables(model=model, layout=LAYOUT, units={"tp": number})
    with pytest.raises(ValueError, match="not among the wanted ones: cp"):
        align_variables(model=model, layout=LAYOUT, units={"cp": 2})
    with pytest.raises(MismatchError, match="no normaliser of Anemoi's processors to scale for tp"):
        load(
            path,
            exclude("*_norm_*"),
            align_variables(None, None, LAYOUT, model=model, units={"tp": 2}),
        )


def test_a_real_model_predicts_in_the_units_of_its_data(tmp_path: Path) -> None:
    needs.anemoi()
    from weather import Variables, interface

    names = Variables(("t_850", "z_500", "msl", "tp", "cos_lat"))
    other = Variables(("tp", "cos_lat", "msl", "z_500", "t_850"))
    index = {name: place for place, name in enumerate(names.names)}
    old, new = interface({"data": names}, salt=3), interface({"data": other}, salt=8)
    old.metadata = described({"tp": "m"}, index) | old.metadata
    new.metadata = described({"tp": "mm"}, {n: p for p, n in enumerate(other.names)}) | new.metadata
    path = tmp_path / "last.ckpt"
    held = {"data_indices": old.data_indices, "metadata": old.metadata}
    torch.save({"state_dict": old.state_dict(), "hyper_parameters": held, "epoch": 1}, path)
    with pytest.raises(MismatchError, match=SAID):
        load_into(new, path, transfer_learning(new))
    align = align_variables(model=new, units={"tp": 1000})
    load_into(new, path, align, transfer_learning(new), strict=True)
    draw = torch.Generator().manual_seed(1)
    values = {n: torch.randn(1, 2, 6, 1, generator=draw) for n in names.inputs}
    results = {}
    for model, variables in ((old, names), (new, other)):
        batch = torch.cat([values[n] for n in variables.inputs], dim=-1)
        with torch.no_grad():
            result = model.predict_step({"data": batch})["data"]
        outputs = {n: result[..., place] for place, n in enumerate(variables.outputs)}
        results[id(model)] = outputs
    before, after = results[id(old)], results[id(new)]
    for name in names.outputs:
        factor = 1000 if name == "tp" else 1
        torch.testing.assert_close(after[name], before[name] * factor, rtol=1e-4, atol=1e-4)


# ── lead times ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "told",
    [
        {"timestep": "monthly"},
        {"timestep": None},
        {"input_relative_date_indices": "01"},
        {"input_relative_date_indices": None},
        {"input_relative_date_indices": [0.5]},
        {"output_relative_date_indices": []},
    ],
)
def test_steps_that_are_not_told_in_full(told: dict[str, object]) -> None:
    steps = {"input_relative_date_indices": [0, 1], "output_relative_date_indices": [2]}
    known = {**steps, "timestep": "6h"}

    def of(*sections: object) -> dict[str, object]:
        facts = dict(zip("ab", sections, strict=False))
        return {"hyper_parameters": {"metadata": {"dataset": {}, "metadata_inference": facts}}}

    assert read_times(of({"timesteps": known}, {"timesteps": known | told})) == {
        "a": "-6h, 0h to +6h"
    }
    assert read_times(of("no section", {"timesteps": "none"})) == {}


def test_steps_at_other_times() -> None:
    theirs = {"a": "0h to +6h", "b": "0h to +6h", "c": "0h to +6h"}
    own = {"a": "0h to +3h", "b": "0h to +6h", "d": "0h to +3h"}
    assert other_times(theirs, own) == {"a": ("0h to +6h", "0h to +3h")}
