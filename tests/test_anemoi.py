"""Transfer between real Anemoi models whose variables differ. Skipped without anemoi-models."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anemoi_ckpt
import needs
from anemoi_ckpt import load, load_into, metadata, peek, save
from checkpoints import assert_same, quiet_trainer
from strategies import (
    drop_optimizer,
    filter_shapes,
    refresh_processors,
    require_variables,
    variables,
    weights,
)
from weather import graph, interface

needs.anemoi()
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

VARIABLES = ["t_850", "z_500", "msl", "tp", "cos_lat"]  # the last two: diagnostic and forcing
OTHERS = ["z_500", "t_850", "msl", "tp", "cos_lat", "q_700"]  # two swapped, one more


@functools.cache
def trained(names: tuple[str, ...]) -> Any:
    """A Lightning module that has learned a little, as Anemoi's training wraps the interface."""
    import lightning
    from omegaconf import OmegaConf

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = interface(names)
            config = OmegaConf.create({"training": {"lr": 0.01, "devices": ["a", "b"]}})
            held = {"data_indices": self.model.data_indices, "config": config}
            self.save_hyperparameters({**held, "graph_data": graph()})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model({"data": batch[0]})["data"].square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Task()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning's Trainer saves of such a model."""
    folder = tmp_path_factory.mktemp("anemoi")
    task = trained(tuple(VARIABLES))
    inputs = len(task.model.data_indices["data"].model.input)
    batches = torch.randn(4, 2, 1, 6, inputs, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches), batch_size=2)
    trainer = quiet_trainer(max_epochs=1, default_root_dir=folder)
    trainer.fit(task, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    embed(folder / "last.ckpt")
    return folder / "last.ckpt"


def embed(path: Path) -> None:
    """Add metadata and arrays as Anemoi's training does."""
    from anemoi.utils.checkpoints import save_metadata

    arrays = {"data": {"lam_mask": np.arange(6) % 2 == 0}, "latitudes": np.linspace(-90, 90, 6)}
    told = {"version": "1.0", "run_id": "abc", "dataset": {"variables": VARIABLES}}
    save_metadata(str(path), told, supporting_arrays=arrays)


def task_state(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def test_variables_are_read(checkpoint: Path) -> None:
    names = {name: place for place, name in enumerate(VARIABLES)}
    assert load(checkpoint, variables) == {"data": names}


def test_other_variables_are_refused_by_name(checkpoint: Path) -> None:
    wanted = {name: place for place, name in enumerate(OTHERS)}
    with pytest.raises(ValueError, match=r"q_700") as caught:
        load(checkpoint, require_variables({"data": wanted}))
    said = str(caught.value)
    assert "t_850" in said
    assert "z_500" in said
    assert "msl" not in said
    assert load(checkpoint, require_variables(trained(tuple(VARIABLES))), weights)


def test_transfer_without_alignment_takes_what_fits_and_names_what_does_not(
    checkpoint: Path,
) -> None:
    model = torch.nn.ModuleDict({"model": interface([*VARIABLES, "q_700"])})
    saved = load(checkpoint, weights)
    differing = {
        name for name, tensor in model.state_dict().items() if saved[name].shape != tensor.shape
    }
    assert differing  # what runs over variables: embeddings, extraction, normalisers
    before = {name: model.state_dict()[name].clone() for name in differing}
    report = load_into(model, checkpoint, filter_shapes(model))
    assert set(report.mismatched) == differing
    assert (report.missing, report.unexpected) == ((), ())
    assert set(report.loaded) == set(model.state_dict()) - differing
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.get(name, saved[name]))


def test_processors_come_from_the_model(checkpoint: Path) -> None:
    model = torch.nn.ModuleDict({"model": interface(VARIABLES)})
    for name, tensor in model.state_dict().items():
        if "processors" in name and tensor.is_floating_point():
            tensor.fill_(42)
    state = load(checkpoint, refresh_processors(model, states=True), weights)
    refreshed = [name for name in state if "_norm_mul" in name]
    assert refreshed
    assert all((state[name] == 42).all() for name in refreshed)
    assert load(checkpoint, filter_shapes(model), weights).keys() == model.state_dict().keys()


# ── nothing of Anemoi's is imported ───────────────────────────────────────────────────────────

WITHOUT = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"anemoi", "omegaconf", "lightning", "torch_geometric",
                                      "pytorch_lightning", "hydra", "einops"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocked())
from anemoi_ckpt import load, metadata, peek
from strategies import variables, weights

checkpoint = load(sys.argv[1])
held = checkpoint["hyper_parameters"]
state = load(sys.argv[1], weights)
print(json.dumps({
    "variables": load(sys.argv[1], variables),
    "names": dict(held["data_indices"]["data"].name_to_index),
    "lr": held["config"]["training"].lr,
    "devices": list(held["config"].training.devices),
    "edges": list(held["graph_data"]._edge_store_dict["data", "to", "hidden"].edge_index.shape),
    "sums": {name: float(tensor.double().sum()) for name, tensor in state.items()},
    "metadata": metadata(sys.argv[1])["dataset"],
    "inert": [name for name, inert in peek(sys.argv[1]).classes.items() if inert],
    "module": len(load(sys.argv[2], weights)),
}))
"""


def test_a_checkpoint_opens_where_nothing_of_anemoi_is_installed(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = trained(tuple(VARIABLES)).model
    torch.save(whole, tmp_path / "inference-last.ckpt")
    root = Path(anemoi_ckpt.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(checkpoint), str(tmp_path / "inference-last.ckpt")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    names = {name: place for place, name in enumerate(VARIABLES)}
    assert found["variables"] == {"data": names}
    assert found["names"] == names
    assert (found["lr"], found["devices"], found["edges"]) == (0.01, ["a", "b"], [2, 18])
    assert found["metadata"] == {"variables": VARIABLES}
    assert "omegaconf.dictconfig.DictConfig" in found["inert"]
    assert "torch_geometric.data.hetero_data.HeteroData" in found["inert"]
    expected = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert found["sums"] == {name: float(t.double().sum()) for name, t in expected.items()}
    assert found["module"] == len(whole.state_dict())


def test_an_inference_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    model = trained(tuple(VARIABLES)).model
    torch.save(model, tmp_path / "inference-last.ckpt")
    found = load(tmp_path / "inference-last.ckpt", weights)
    assert_same(dict(found), dict(model.state_dict()))
    other = interface(VARIABLES)
    report = load_into(other, tmp_path / "inference-last.ckpt")
    assert (report.missing, report.unexpected) == ((), ())
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    names = {tensor.name for tensor in peek(tmp_path / "inference-last.ckpt").tensors}
    assert names.issuperset(model.state_dict())


def test_metadata_is_what_anemoi_utils_reads(checkpoint: Path) -> None:
    from anemoi.utils.checkpoints import load_metadata

    assert metadata(checkpoint) == load_metadata(str(checkpoint))
    told, arrays = metadata(checkpoint, arrays=True)
    expected, theirs = load_metadata(str(checkpoint), supporting_arrays=True)
    assert told == expected
    assert arrays.keys() == theirs.keys()
    assert_same(arrays["latitudes"], theirs["latitudes"])
    assert_same(arrays["data"], theirs["data"])


def test_what_is_saved_has_the_real_objects_again(checkpoint: Path, tmp_path: Path) -> None:
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.utils.checkpoints import load_metadata

    save(load(checkpoint, drop_optimizer), tmp_path / "light.ckpt", metadata=checkpoint)
    real = torch.load(tmp_path / "light.ckpt", weights_only=False)
    assert isinstance(real["hyper_parameters"]["data_indices"]["data"], IndexCollection)
    expected = drop_optimizer(torch.load(checkpoint, weights_only=False))
    del real["hyper_parameters"]["config"], expected["hyper_parameters"]["config"]  # nodes: no ==
    assert_same(real["state_dict"], expected["state_dict"])
    assert list(real) == list(expected)
    assert repr(real["hyper_parameters"]) == repr(expected["hyper_parameters"])
    told, arrays = load_metadata(str(tmp_path / "light.ckpt"), supporting_arrays=True)
    assert told["dataset"] == {"variables": VARIABLES}
    assert np.array_equal(arrays["latitudes"], np.linspace(-90, 90, 6))


def test_trusted_is_what_torch_loads(checkpoint: Path) -> None:
    ours = load(checkpoint, trust=True)
    expected = torch.load(checkpoint, weights_only=False)
    assert_same(ours["state_dict"], expected["state_dict"])
    assert_same(ours["optimizer_states"], expected["optimizer_states"])
    mine, theirs = ours["hyper_parameters"], expected["hyper_parameters"]
    assert mine["config"] == theirs["config"]
    assert repr(mine["graph_data"]) == repr(theirs["graph_data"])
    assert_same(
        mine["data_indices"]["data"].data.input.full, theirs["data_indices"]["data"].data.input.full
    )
