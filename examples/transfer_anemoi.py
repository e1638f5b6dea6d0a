"""Give a trained model of Anemoi one variable more, and train on. Needs anemoi-models.

pip install -c constraints.txt -e '.[anemoi]' && python examples/transfer_anemoi.py
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anemoi_ckpt import load_into
from strategies import transfer_learning

try:
    import anemoi.models  # noqa: F401 - whether it is there
except ImportError as err:
    raise SystemExit("this example needs anemoi-models: pip install anemoi-models") from err

FORCING, DIAGNOSTIC = ["cos_lat"], ["tp"]
BEFORE = ["t_850", "z_500", "msl", "tp", "cos_lat"]
AFTER = ["cos_lat", "msl", "q_700", "t_850", "tp", "z_500"]  # one more, and another order
NODES = 12
LAYER = {
    "trainable_size": 2,
    "sub_graph_edge_attributes": ["edge_length"],
    "num_chunks": 1,
    "mlp_extra_layers": 0,
    "layer_kernels": {},
    "cpu_offload": False,
}
MAPPER = "anemoi.models.layers.mapper.GNN{}Mapper"
CONFIG = {
    "training": {"multistep_input": 2, "multistep_output": 1},
    "data": {
        "datasets": {"data": {"forcing": FORCING, "diagnostic": DIAGNOSTIC, "processors": {}}}
    },
    "model": {
        "num_channels": 32,
        "trainable_parameters": {"data": 2, "hidden": 2},
        "bounding": [],
        "residual": {"_target_": "anemoi.models.layers.residual.SkipConnection"},
        "model": {
            "_target_": "anemoi.models.models.AnemoiModelEncProcDec",
            "hidden_nodes_name": "hidden",
            "latent_skip": True,
        },
        "encoder": {"_target_": MAPPER.format("Forward"), **LAYER},
        "decoder": {"_target_": MAPPER.format("Backward"), **LAYER},
        "processor": {
            "_target_": "anemoi.models.layers.processor.GNNProcessor",
            "num_layers": 2,
            **LAYER,
        },
    },
}


def graph() -> Any:
    """Make a graph of a few nodes, and all edges between them."""
    from torch_geometric.data import HeteroData

    made, counts = HeteroData(), {"data": NODES, "hidden": 4}
    for name, count in counts.items():
        made[name].x = torch.rand(count, 2)
    for one, other in [("data", "hidden"), ("hidden", "hidden"), ("hidden", "data")]:
        pairs = torch.cartesian_prod(torch.arange(counts[one]), torch.arange(counts[other])).T
        made[one, "to", other].edge_index = pairs.contiguous()
        made[one, "to", other].edge_length = torch.rand(pairs.shape[1], 1)
    return made


def built(names: list[str], nodes: Any) -> torch.nn.Module:
    """Build Anemoi's own encoder-processor-decoder for these variables."""
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.interface import AnemoiModelInterface
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf

    roles = OmegaConf.create({"forcing": FORCING, "diagnostic": DIAGNOSTIC})
    levels = np.arange(len(names), dtype=np.float32)
    statistics = {"minimum": levels - 9, "maximum": levels + 9, "mean": levels, "stdev": levels + 1}
    steps = {"relative_date_indices_training": [0, 1, 2]}
    indices = {name: place for place, name in enumerate(names)}
    model: torch.nn.Module = AnemoiModelInterface(
        config=DotDict(CONFIG),
        graph_data=nodes,
        statistics={"data": statistics},
        data_indices={"data": IndexCollection(roles, indices)},
        metadata={"metadata_inference": {"data": {"timesteps": steps}}},
    )
    return model


def weather(samples: int) -> dict[str, torch.Tensor]:
    """Make weather up: what each variable is at two steps and at the next, (samples, 3, nodes)."""
    steps = {name: [torch.randn(samples, NODES)] for name in (*AFTER, *BEFORE)}
    for _ in range(2):
        now = {name: values[-1] for name, values in steps.items()}
        steps["t_850"].append(0.8 * now["t_850"] + 0.4 * torch.tanh(now["z_500"]))
        steps["z_500"].append(0.8 * now["z_500"] - 0.4 * torch.tanh(now["t_850"] + now["q_700"]))
        steps["msl"].append(0.7 * now["msl"] + 0.3 * now["msl"].roll(1, -1) + 0.2 * now["cos_lat"])
        steps["q_700"].append(0.9 * now["q_700"] + 0.2 * torch.tanh(now["t_850"]))
        steps["tp"].append(torch.tanh(now["q_700"] + now["t_850"]))
        steps["cos_lat"].append(now["cos_lat"])
    return {name: torch.stack(values, 1) for name, values in steps.items()}


def loss(model: torch.nn.Module, names: list[str], drawn: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the mean squared error of the next step, of the variables that a model predicts."""
    read = [drawn[name][:, :2] for name in names if name not in DIAGNOSTIC]
    wanted = [drawn[name][:, 2:] for name in names if name not in FORCING]
    given = model({"data": torch.stack(read, -1)[:, :, None]})["data"]
    return (given - torch.stack(wanted, -1)[:, :, None]).square().mean()


def train(model: torch.nn.Module, names: list[str], steps: int) -> float:
    """Train a model for some steps, and give its loss on weather that it has not seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss(model, names, weather(32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss(model, names, weather(512)).item()


def main() -> None:
    """Do it, and say what happened."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    nodes = graph()
    old = built(BEFORE, nodes)
    print(f"trained: loss {train(old, BEFORE, 300):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        indices = {"data_indices": old.data_indices}
        torch.save({"state_dict": old.state_dict(), "hyper_parameters": indices}, path)
        new = built(AFTER, nodes)
        print(f"with q_700, from scratch: loss {train(new, AFTER, 0):.3f}")
        print(load_into(new, path, transfer_learning(new, new="zeros")))
    print(f"with q_700, transferred: loss {train(new, AFTER, 0):.3f}")
    print(f"and trained on: loss {train(new, AFTER, 200):.3f}")


if __name__ == "__main__":
    main()
