"""What plugs into anemoi-training and Hydra, with what they ask of it; without them installed.

`test_anemoi_training.py` has the same with the real ones.
"""

import asyncio
import importlib
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import omegaconf
import pytest
import torch

import anemoi_ckpt
import needs
from anemoi_ckpt import (
    CheckpointNotFoundError,
    MismatchError,
    MissingPackageError,
    checkpoint_io,
    load_callback,
    loading_stage,
    source_stage,
)
from strategies import add_prefix, drop_optimizer, standard, weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of a linear layer, whose weights are ones."""
    layer = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(layer.weight)
    checkpoint = {"state_dict": layer.state_dict(), "optimizer_states": [1], "epoch": 3}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def context(**fields: Any) -> Any:
    """As `anemoi.training.checkpoint.CheckpointContext`."""
    metadata: dict[str, Any] = {}
    fields = {"model": None, "pl_module": None, "metadata": metadata} | fields
    return types.SimpleNamespace(update_metadata=metadata.update, **fields)


# ── callback ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_a_callback_loads_before_training(name: str, path: Path, tmp_path: Path, s3) -> None:
    lightning = needs.package(name, "pip install lightning pytorch-lightning")
    s3.write("callback.ckpt", path.read_bytes())

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.began_with: list[torch.Tensor] = []

        def on_fit_start(self) -> None:
            self.began_with.append(self.layer.weight.detach().clone())

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            return self.layer(batch).mean()

        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.layer(batch)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(2, 4))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = load_callback(
        s3.uri("callback.ckpt"), weights, add_prefix("layer."), recipe=standard, retries=2
    )
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = lightning.Trainer(
            callbacks=[callback], max_epochs=1, default_root_dir=tmp_path, **options
        )
        first.fit(module := Module())
        assert torch.equal(module.began_with[0], torch.ones(1, 4))
        (last,) = tmp_path.rglob("epoch*.ckpt")
        second = lightning.Trainer(
            callbacks=[pickle.loads(pickle.dumps(callback))],
            max_epochs=2,
            default_root_dir=tmp_path,
            **options,
        )
        resumed = Module()
        second.fit(resumed, ckpt_path=str(last))
        other = Module()
        first.test(other, dataloaders=other.train_dataloader())
    assert torch.equal(resumed.began_with[0], module.layer.weight)  # its own, not the callback's
    assert not torch.equal(other.layer.weight, torch.ones(1, 4))  # nobody trains it
    s3.remove("callback.ckpt")


def test_what_a_callback_is_given_wrongly_is_told_at_once(monkeypatch) -> None:
    with pytest.raises(TypeError, match="trusted"):
        load_callback("a.ckpt", trusted=True)
    with pytest.raises(TypeError, match="load_callback"):
        load_callback("a.ckpt", "weights")
    for recipe in (["transfer_learning"], None):
        with pytest.raises(TypeError, match="recipe is a function of the model"):
            load_callback("a.ckpt", recipe=recipe)
    with pytest.raises(TypeError, match="trusted"):
        source_stage("a.ckpt", trusted=True)
    with pytest.raises(TypeError, match="source_stage"):
        source_stage("a.ckpt", None)
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", _no_lightning)
        with pytest.raises(MissingPackageError, match="pip install lightning"):
            load_callback("a.ckpt")


def _no_lightning(name: str) -> Any:
    raise ImportError(name)


def test_a_plugin_travels_to_processes_that_are_spawned(path: Path) -> None:
    needs.package("lightning.pytorch", "pip install lightning")
    plugin = pickle.loads(pickle.dumps(checkpoint_io(drop_optimizer, retries=0)))
    assert plugin.load_checkpoint(path).keys() == {"state_dict", "epoch"}
    assert plugin._transport.retries == 0


# ── stages ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ({"pytorch-lightning_version": "2.6.0", "state_dict": {}}, "lightning"),
        ({"model_state_dict": {}}, "pytorch"),
        ({"w": torch.ones(1)}, "state_dict"),
    ],
)
def test_a_source_brings_a_checkpoint(checkpoint: Any, name: str, tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "a.ckpt")
    stage = source_stage(tmp_path / "a.ckpt", dict)
    assert "Source" in type(stage).__name__
    result = asyncio.run(stage.process(context()))
    assert result.checkpoint_data.keys() == checkpoint.keys()
    assert result.checkpoint_format == name


def test_a_loader_fills_the_model(path: Path) -> None:
    stage = loading_stage(path, recipe=standard)
    assert "Loader" in type(stage).__name__
    model = torch.nn.Linear(4, 1)
    result = asyncio.run(stage.process(context(model=model)))
    assert torch.equal(model.weight, torch.ones(1, 4))
    assert model.weights_initialized is True
    assert result.metadata["loaded"].loaded == ("weight", "bias")


def test_a_recipe_that_tells_nothing_of_its_parameters(path: Path) -> None:
    stage = loading_stage(path, weights, recipe=lambda *model: dict)
    asyncio.run(stage.process(context(model=torch.nn.Linear(4, 1))))
    with pytest.raises(TypeError):  # it makes no strategy
        asyncio.run(loading_stage(path, recipe=dict).process(context(model=[])))


def test_recipes_follow_each_other(path: Path) -> None:
    order: list[str] = []

    def first(other: int = 1, *, model: Any) -> Any:
        order.append(f"first {type(model).__name__}")
        return weights

    def second(module: Any) -> Any:
        order.append(f"second {type(module).__name__}")
        return standard(module)

    model = torch.nn.Linear(4, 1)
    stage = loading_stage(path, drop_optimizer, recipe=[first, second])
    asyncio.run(stage.process(context(model=model)))
    assert order == ["first Linear", "second Linear"]
    assert torch.equal(model.weight, torch.ones(1, 4))


def test_a_loader_fills_the_module_around_the_model(path: Path) -> None:
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(4, 1)})
    stage = loading_stage(path, weights, add_prefix("model."))
    asyncio.run(stage.process(context(model=module["model"], pl_module=module)))
    assert torch.equal(module["model"].weight, torch.ones(1, 4))
    assert module["model"].weights_initialized is True
    asyncio.run(stage.process(context(pl_module=module)))


def test_a_stage_that_fails_leaves_the_model_as_it_was(tmp_path: Path, path: Path) -> None:
    model = torch.nn.Linear(4, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointNotFoundError):
        asyncio.run(loading_stage(tmp_path / "none.ckpt").process(context(model=model)))
    with pytest.raises(MismatchError):
        asyncio.run(loading_stage(path, recipe=standard).process(context(model=model)))
    assert torch.equal(model.weight, before)
    assert not hasattr(model, "weights_initialized")


# ── Hydra ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def resolver() -> Any:
    omegaconf.OmegaConf.clear_resolver("ckpt")
    module = importlib.import_module("hydra_plugins.anemoi_ckpt_resolver")
    yield importlib.reload(module)
    omegaconf.OmegaConf.clear_resolver("ckpt")


def test_a_configuration_names_a_checkpoint_in_a_store(s3, path: Path, resolver) -> None:
    s3.write("resolved/epoch=1.ckpt", path.read_bytes())
    texts = {
        "file": f"${{ckpt:'{s3.uri('resolved/epoch=1.ckpt')}'}}",
        "newest": f"${{ckpt:{s3.uri('resolved')}/}}",
    }
    config = omegaconf.OmegaConf.create(texts)
    assert Path(config.file).read_bytes() == path.read_bytes()
    assert config.newest == config.file
    s3.remove("resolved/epoch=1.ckpt")


def test_hydra_finds_the_resolver_by_itself() -> None:
    code = """
import hydra, sys
from omegaconf import OmegaConf
with hydra.initialize(version_base=None, config_path=None):
    hydra.compose()
assert OmegaConf.has_resolver("ckpt")
assert "torch" not in sys.modules  # only who uses it waits for torch
"""
    root = Path(anemoi_ckpt.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
