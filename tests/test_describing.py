"""What is written after an alignment names the new variables, in hyper-parameters and metadata."""

import functools
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import needs
from anemoi_ckpt import load, metadata, save
from strategies import align_variables, drop_optimizer
from test_units import INDEX, LAYOUT, METRES, Model, checkpoint

NEW = {"q": 0, "tp": 1, "t": 2}


def part(index: dict[str, int], full: list[int], **roles: list[int]) -> dict[str, Any]:
    nothing: dict[str, list[int]] = {role: [] for role in ("forcing", "diagnostic", "target")}
    prognostic = sorted(index.values())
    return {"prognostic": prognostic, **nothing, **roles, "full": full, "name_to_index": index}


def whole(index: dict[str, int] = INDEX) -> dict[str, Any]:
    """The metadata that Anemoi's training embeds, for variables that are all prognostic."""
    names, every = list(index), part(index, list(range(len(index))))
    facts = {name: {"mars": {"param": name}} for name in names}
    indices = {"data": {"input": every, "output": every}}
    types = {"forcing": [], "diagnostic": [], "target": [], "prognostic": names}
    inference = {"data_indices": {"input": index, "output": index}, "variable_types": types}
    entry = {"variables": names, "variables_metadata": facts, "shape": [16, len(names), 1, 48]}
    return {
        "run_id": "abc",
        "dataset": {"data": entry},
        "data_indices": {"data": {**indices, "model": indices["data"]}},
        "metadata_inference": {"seed": 1, "dataset_names": ["data"], "data": inference},
    }


def held(**changes: Any) -> dict[str, Any]:
    made = checkpoint({})
    made["hyper_parameters"]["metadata"] = whole() | changes
    return made


align = functools.partial(align_variables, None, layout=LAYOUT, model=Model({}, NEW), new="zeros")


def without_facts(made: dict[str, Any], name: str) -> dict[str, Any]:
    """As nobody knows more of a new variable than its name."""
    del made["dataset"]["data"]["variables_metadata"][name]
    return made


def test_the_metadata_name_the_new_variables() -> None:
    before = held()
    result = align(NEW)(before)["hyper_parameters"]["metadata"]
    assert result == without_facts(whole(NEW), "q")
    assert list(result["metadata_inference"]["data"]["data_indices"]["input"]) == list(NEW)
    assert before["hyper_parameters"]["metadata"] == whole()


def test_what_the_model_knows_of_its_data_counts() -> None:
    model = Model({"tp": "m"}, NEW)
    model.metadata["dataset"]["data"]["shape"] = [99, 3, 1, 6]
    model.metadata["metadata_inference"] = {"data": {"shapes": {"variables": 18}}}
    result = align_variables(None, None, LAYOUT, model=model, new="zeros")(held())
    described = result["hyper_parameters"]["metadata"]
    assert described["dataset"] == model.metadata["dataset"]
    assert described["metadata_inference"]["data"]["shapes"] == {"variables": 18}
    assert list(described["metadata_inference"]["data"]["data_indices"]["input"]) == list(NEW)
    model.metadata["data_indices"] = {"data": {"data": "its own"}}
    result = align_variables(None, None, LAYOUT, model=model, new="zeros")(held())
    described = result["hyper_parameters"]["metadata"]
    assert described["data_indices"] == {"data": {"data": "its own"}}


def test_roles_are_told_as_anemoi_tells_them() -> None:
    layout = LAYOUT | {"forcing": ["t"], "diagnostic": ["tp"]}
    model = Model({}, NEW)
    result = align_variables(INDEX, NEW, layout, model=model, new="zeros")(held())
    described = result["hyper_parameters"]["metadata"]
    indices = described["data_indices"]["data"]
    assert indices["data"]["input"]["full"] == [0, 2]
    assert indices["data"]["output"]["full"] == [0, 1]
    assert indices["data"]["input"]["diagnostic"] == [1]
    assert indices["model"]["input"]["name_to_index"] == {"q": 0, "t": 1}
    assert indices["model"]["input"]["forcing"] == [1]
    assert indices["model"]["output"]["diagnostic"] == [1]
    inference = described["metadata_inference"]["data"]
    assert inference["data_indices"] == {"input": {"q": 0, "t": 1}, "output": {"q": 0, "tp": 1}}
    types = {"forcing": ["t"], "diagnostic": ["tp"], "target": [], "prognostic": ["q"]}
    assert inference["variable_types"] == types


def test_a_dataset_of_another_name_takes_the_place_of_the_only_one() -> None:
    model = Model({}, NEW)
    model.data_indices = {"era5": model.data_indices["data"]}
    layout = {"era5": LAYOUT}
    result = align_variables(None, None, layout, model=model, new="zeros")(held())
    described = result["hyper_parameters"]["metadata"]
    assert [*described["dataset"], *described["data_indices"]] == ["era5", "era5"]
    assert described["dataset"]["era5"]["variables"] == list(NEW)
    assert described["metadata_inference"]["dataset_names"] == ["era5"]
    assert "data" not in described["metadata_inference"]
    assert described["metadata_inference"]["seed"] == 1


def test_before_datasets_had_names_the_metadata_described_one() -> None:
    made = whole()
    single = {section: made[section]["data"] for section in made if section != "run_id"}
    before = held(**single)
    del before["hyper_parameters"]["metadata"]["dataset"]["shape"]
    described = align(NEW)(before)["hyper_parameters"]["metadata"]
    wanted = without_facts(whole(NEW), "q")
    assert described["data_indices"] == wanted["data_indices"]["data"]
    assert described["metadata_inference"] == wanted["metadata_inference"]["data"]
    assert described["dataset"]["variables"] == list(NEW)
    assert list(described["dataset"]["variables_metadata"]) == ["tp", "t"]


def test_sections_that_are_not_there_are_not_made_up() -> None:
    before = held(dataset={"data": {"variables": list(INDEX)}}, data_indices=None)
    del before["hyper_parameters"]["metadata"]["metadata_inference"]
    described = align(NEW)(before)["hyper_parameters"]["metadata"]
    assert described["dataset"] == {"data": {"variables": list(NEW)}}
    assert described["data_indices"] is None
    assert "metadata_inference" not in described


# ── written ───────────────────────────────────────────────────────────────────────────────────

ARRAYS = {"data": {"mask": np.arange(4) % 2 == 0}, "latitudes": np.linspace(-90, 90, 3)}


def test_metadata_and_arrays_of_ones_own_are_embedded(tmp_path: Path) -> None:
    place = save(held(), tmp_path / "a.ckpt", metadata=(whole(), ARRAYS))
    found, arrays = metadata(place, arrays=True)
    assert found["dataset"] == whole()["dataset"]
    np.testing.assert_array_equal(arrays["data"]["mask"], ARRAYS["data"]["mask"])
    np.testing.assert_array_equal(arrays["latitudes"], ARRAYS["latitudes"])
    again = save(load(place), tmp_path / "b.ckpt", metadata=metadata(place, arrays=True))
    assert metadata(again) == found
    odd = {"a": np.arange(2), "b": torch.float32, "c": MappingProxyType({"metadata": whole()})}
    plain = metadata(save({"w": torch.ones(1)}, tmp_path / "c.ckpt", metadata=odd))
    assert (plain["a"], plain["b"]) == ([0, 1], "torch.float32")
    assert plain["c"]["metadata"] == whole()
    assert plain["supporting_arrays_paths"] == {}


def test_what_is_saved_after_an_alignment_names_the_new_variables(tmp_path: Path) -> None:
    source = save(held(), tmp_path / "a.ckpt", metadata=(whole() | {"uuid": "1"}, ARRAYS))
    aligned = load(source, drop_optimizer, align(NEW))
    found, arrays = metadata(save(aligned, tmp_path / "b.ckpt", metadata=source), arrays=True)
    wanted = without_facts(whole(NEW), "q")
    assert {name: found[name] for name in wanted} == json.loads(json.dumps(wanted))
    assert found["uuid"] == "1"
    np.testing.assert_array_equal(arrays["latitudes"], ARRAYS["latitudes"])
    same = metadata(save(load(source), tmp_path / "c.ckpt", metadata=source))
    assert same == metadata(source)


def test_anemoi_reads_them_as_its_own(tmp_path: Path) -> None:
    needs.anemoi()
    from anemoi.utils.checkpoints import load_metadata

    from weather import Variables, interface

    place = save(held(), tmp_path / "a.ckpt", metadata=(whole(), ARRAYS))
    found, arrays = load_metadata(str(place), supporting_arrays=True)
    assert found["dataset"] == whole()["dataset"]
    np.testing.assert_array_equal(arrays["data"]["mask"], ARRAYS["data"]["mask"])
    names = Variables(("q", "cos_lat", "tp", "t"))
    model = interface({"data": names})
    index = {name: place for place, name in enumerate(names.names)}
    aligned = align_variables(INDEX, model, LAYOUT, model=Model({}, index), new="zeros")(held())
    described = aligned["hyper_parameters"]["metadata"]["data_indices"]["data"]
    theirs = model.data_indices["data"].todict()
    plain = json.loads(json.dumps(theirs, default=lambda each: each.tolist()))
    assert {
        k: {p: {**v, "target": []} for p, v in each.items()} for k, each in plain.items()
    } == described


@pytest.mark.parametrize("units", [METRES])
def test_averages_in_a_callback_are_dropped_where_units_change(units: dict[str, str]) -> None:
    made = checkpoint(units)
    average = {"layer.weight": torch.ones(1, 2)}
    made["callbacks"] = {"EMA": {"ema_weights": average, "decay": 0.9}, "other": 1}
    model = Model({"t": "K", "tp": "mm"})
    result = align_variables(None, None, LAYOUT, model=model, units={"tp": 1000})(made)
    assert "ema_weights" not in result["callbacks"]["EMA"]
    assert result["callbacks"]["other"] == 1
