"""Transfer between real Anemoi models whose variables differ. Skipped without anemoi-models."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anemoi_ckpt import load, load_into
from strategies import (
    filter_shapes,
    refresh_processors,
    require_variables,
    transfer_learning,
    variables,
    weights,
)

pytest.importorskip("anemoi.models", reason="pip install -e '.[anemoi]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

VARIABLES = ["t_850", "z_500", "msl", "tp", "cos_lat"]  # the last two: diagnostic and forcing
OTHERS = ["z_500", "t_850", "msl", "tp", "cos_lat", "q_700"]  # two swapped, one more


def interface(names: Sequence[str]) -> torch.nn.Module:
    """A real encoder-processor-decoder of a few nodes, with its processors."""
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.interface import AnemoiModelInterface
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf
    from torch_geometric.data import HeteroData

    draw = torch.Generator().manual_seed(0)
    graph = HeteroData()
    counts = {"data": 6, "hidden": 3}
    for name, count in counts.items():
        graph[name].x = torch.rand(count, 2, generator=draw)
    for one, other in [("data", "hidden"), ("hidden", "hidden"), ("hidden", "data")]:
        pairs = torch.cartesian_prod(torch.arange(counts[one]), torch.arange(counts[other])).T
        graph[one, "to", other].edge_index = pairs.contiguous()
        graph[one, "to", other].edge_length = torch.rand(pairs.shape[1], 1, generator=draw)
    layer = {"trainable_size": 2, "sub_graph_edge_attributes": ["edge_length"], "num_chunks": 1}
    layer |= {"mlp_extra_layers": 0, "layer_kernels": {}, "cpu_offload": False}
    mapper = "anemoi.models.layers.mapper.GNN{}Mapper"
    normalizer = "anemoi.models.preprocessing.normalizer.InputNormalizer"
    roles = {"forcing": ["cos_lat"], "diagnostic": ["tp"]}
    config = {
        "training": {"multistep_input": 2, "multistep_output": 1},
        "data": {
            "datasets": {
                "data": {
                    **roles,
                    "processors": {
                        "normalizer": {"_target_": normalizer, "config": {"default": "mean-std"}}
                    },
                }
            }
        },
        "model": {
            "num_channels": 8,
            "trainable_parameters": {"data": 2, "hidden": 2},
            "bounding": [],
            "residual": {"_target_": "anemoi.models.layers.residual.SkipConnection"},
            "model": {
                "_target_": "anemoi.models.models.AnemoiModelEncProcDec",
                "hidden_nodes_name": "hidden",
                "latent_skip": True,
            },
            "encoder": {"_target_": mapper.format("Forward"), **layer},
            "decoder": {"_target_": mapper.format("Backward"), **layer},
            "processor": {
                "_target_": "anemoi.models.layers.processor.GNNProcessor",
                "num_layers": 1,
                **layer,
            },
        },
    }
    index = {name: place for place, name in enumerate(names)}
    levels = np.arange(len(names), dtype=np.float32)
    statistics = {"minimum": levels - 9, "maximum": levels + 9, "mean": levels, "stdev": levels + 1}
    steps = {"relative_date_indices_training": [0, 1, 2]}
    model = AnemoiModelInterface(
        config=DotDict(config),
        graph_data=graph,
        statistics={"data": statistics},
        data_indices={"data": IndexCollection(OmegaConf.create(roles), index)},
        metadata={"metadata_inference": {"data": {"timesteps": steps}}},
    )
    assert isinstance(model, torch.nn.Module)
    return model


@functools.cache
def trained(names: tuple[str, ...]) -> Any:
    """A Lightning module that has learned a little, as Anemoi's training wraps the interface."""
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = interface(names)
            self.save_hyperparameters({"data_indices": self.model.data_indices})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model({"data": batch[0]})["data"].square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Task()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning's Trainer saves of such a model."""
    import lightning

    folder = tmp_path_factory.mktemp("anemoi")
    task = trained(tuple(VARIABLES))
    inputs = len(task.model.data_indices["data"].model.input)
    batches = torch.randn(4, 2, 1, 6, inputs, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches), batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


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


def test_transfer_takes_what_fits_and_names_what_does_not(checkpoint: Path) -> None:
    model = torch.nn.ModuleDict({"model": interface(OTHERS)})
    saved = load(checkpoint, weights)
    differing = {
        name for name, tensor in model.state_dict().items() if saved[name].shape != tensor.shape
    }
    assert differing  # what runs over variables: embeddings, extraction, normalisers
    before = {name: model.state_dict()[name].clone() for name in differing}
    report = load_into(model, checkpoint, transfer_learning(model))
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
