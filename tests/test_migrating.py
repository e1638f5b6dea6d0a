"""Anemoi's own migrations run on what is loaded inert and hollow. Skipped without anemoi-models."""

import copy
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import needs
from anemoi_ckpt import MismatchError, MissingPackageError, load, load_into, peek, save
from checkpoints import assert_same
from strategies import drop_optimizer, migrate, require_match, weights

needs.package("anemoi.models.migrations", "pip install -e '.[anemoi]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

SCRIPTS = "anemoi.models.migrations.scripts"
FIRST = "1755530253_initial"


def names() -> list[str]:
    from anemoi.models.migrations import Migrator

    return [each["name"] for each in Migrator().register_migrations({})["migrations"]]


def old() -> dict[str, Any]:
    """A checkpoint of anemoi-models 0.9.4: one dataset, layers in chunks."""
    from omegaconf import OmegaConf
    from torch_geometric.data import HeteroData

    graph = HeteroData()
    graph["data"].x = torch.ones(4, 2)
    processor = {"num_layers": 4, "num_chunks": 2}
    config = {"model": {"processor": processor}, "training": {"lr": 0.1, "swa": {"enabled": True}}}
    layers = [f"processor.proc.{i}.blocks.{j}.weight" for i in range(2) for j in range(2)]
    parts = ["encoder", "processor", "decoder"]
    inner = [f"{part}.{name}" for part in parts for name in ("trainable.trainable", "edge_inc")]
    state_dict = {
        f"model.model.{n}": torch.full((2,), float(i)) for i, n in enumerate([*layers, *inner])
    }
    return {
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "state_dict": state_dict | {"model.pre_processors.normalizer._norm_mul": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(500_000)}}, "param_groups": []}],
        "migrations": [],
        "hyper_parameters": {
            "config": OmegaConf.create(config),
            "graph_data": graph,
            "metadata": {"run_id": "abc"},
            **{key: {"a": 1} for key in ("data_indices", "statistics", "statistics_tendencies")},
            "supporting_arrays": {},
        },
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "last.ckpt"
    torch.save(old(), path)
    return path


NEW = {
    **{f"model.model.processor.proc.{i}.weight": float(i) for i in range(4)},
    "model.model.encoder_graph_provider.data.trainable.trainable": 4.0,
    "model.model.processor_graph_provider.trainable.trainable": 6.0,
    "model.model.decoder_graph_provider.data.trainable.trainable": 8.0,
    "model.pre_processors.data.normalizer._norm_mul": 1.0,
}


def test_a_migration_renames_layers_and_moves_no_more_than_is_asked_for(path: Path) -> None:
    before = load(path)
    result = migrate()(before)
    assert {name: float(tensor[0]) for name, tensor in result["state_dict"].items()} == NEW
    assert result["hyper_parameters"]["data_indices"] == {"data": {"a": 1}}
    assert [each["name"] for each in result["migrations"]] == names()
    assert_same(before, load(path))  # is not modified
    assert migrate()(result) is result
    assert_same(load(path, migrate(), weights), result["state_dict"])

    model = torch.nn.Module()
    for name, value in NEW.items():
        *parents, last = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(last, torch.nn.Parameter(torch.full((2,), value + 1)))
    report = load_into(model, path, migrate(model), strict=True)
    assert report.bytes_moved < 300_000 < path.stat().st_size
    assert report.migrations == ()
    with pytest.raises(MismatchError) as caught:
        load_into(model, path, require_match(model))
    assert "runs 7 of Anemoi's migrations" in caught.value.__notes__[0]
    with pytest.raises(MismatchError) as caught:
        load_into(model, path, strict=True)
    assert FIRST in caught.value.__notes__[0]
    with pytest.raises(MismatchError) as caught:
        load_into(model, path, migrate(), weights, lambda _: {"a": torch.ones(1)})
    assert "migrations" not in "".join(caught.value.__notes__)
    part = {
        **before,
        "state_dict": {
            **before["state_dict"],
            "model.model.processor.proc.0.weight": torch.ones(2),
        },
    }
    report = load_into(model, part)
    assert report.migrations == tuple(names())
    assert "not migrated" in str(report)


def test_peek_tells_which_migrations_are_missing(path: Path, tmp_path: Path) -> None:
    assert peek(path).migrations == tuple(names())
    assert f"migrations missing {len(names())}" in str(peek(path))
    place = save(load(path, migrate(), drop_optimizer), tmp_path / "new.ckpt")
    assert peek(place).migrations == ()
    assert "migrations missing" not in str(peek(place))
    assert peek(save({"migrations": 1}, tmp_path / "odd.ckpt")).migrations == ()


def test_a_version_is_migrated_to_and_no_further(path: Path) -> None:
    result = load(path, migrate("0.11.0"))
    assert "model.model.processor.proc.3.weight" in result["state_dict"]
    assert "model.model.encoder.edge_inc" in result["state_dict"]  # which 0.11.3 drops
    assert [each["name"] for each in result["migrations"]] == names()[:4]
    assert_same(load(path, migrate("0.11.0"), migrate(), weights), load(path, migrate(), weights))


def test_it_is_pickled_and_prints_as_what_it_is(path: Path) -> None:
    strategy = pickle.loads(pickle.dumps(migrate("0.11.0")))
    assert repr(strategy) == "migrate('0.11.0')"
    assert_same(load(path, strategy, weights), load(path, migrate("0.11.0"), weights))


def script(monkeypatch: pytest.MonkeyPatch, migrate: Any) -> None:
    monkeypatch.setattr(importlib.import_module(f"{SCRIPTS}.{FIRST}"), "migrate", migrate)


def test_a_script_changes_the_configuration_as_the_real_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    def change(ckpt: Any) -> Any:
        training = ckpt["hyper_parameters"]["config"].training
        assert training.pop("swa", None).enabled is True
        training.weight_averaging = None
        training["lr"] = 0.2
        assert (len(training), set(training)) == (2, {"lr", "weight_averaging"})
        assert not hasattr(training, "swa")
        ckpt["hyper_parameters"]["config"].model.clear()
        ckpt["hyper_parameters"]["config"].model["first"] = "raw"
        return ckpt

    script(monkeypatch, change)
    before = load(path)
    kept = copy.deepcopy(before)
    result = migrate("0.9.4")(before)
    assert_same(before, kept)
    assert result["hyper_parameters"]["config"].training.weight_averaging is None
    monkeypatch.undo()
    save({"config": result["hyper_parameters"]["config"].training}, tmp_path / "new.ckpt")
    config = torch.load(tmp_path / "new.ckpt", weights_only=False)["config"]
    assert OmegaConf.to_container(config) == {"lr": 0.2, "weight_averaging": None}


def test_a_script_gets_the_model_if_it_asks_for_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def ask(ckpt: Any, model: Any = None) -> Any:
        seen.append(model)
        return ckpt

    script(monkeypatch, ask)
    model = torch.nn.Linear(1, 1)
    load(path, migrate(model), lambda _: 1)
    load(path, migrate(), lambda _: 1)
    assert (seen[0], seen[-1]) == (model, None)


def test_what_a_script_raises_names_the_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, lambda ckpt: ckpt["never"])
    with pytest.raises(KeyError, match="never") as caught:
        load(path, migrate())
    assert f"in Anemoi's migration {FIRST}" in caught.value.__notes__


def test_what_cannot_be_migrated_says_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MismatchError, match="it lists no migrations"):
        migrate()({"state_dict": {}})
    newer = {**load(path), "migrations": [{"name": "1999999999_later"}]}
    with pytest.raises(MismatchError, match=r"1999999999_later.*install a newer anemoi-models"):
        migrate()(newer)
    with pytest.raises(TypeError, match="migrate takes a version or a module, not int"):
        migrate(3)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "anemoi.models.migrations", None)
    with pytest.raises(MissingPackageError, match="pip install anemoi-models"):
        load(path, migrate())
