"""Transfer learning with Anemoi: a trained model's weights into one with a variable more.

pip install -c constraints.txt -e '.[anemoi]' && python examples/transfer_anemoi.py
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anemoi_ckpt import load, load_into
from strategies import transfer_learning, variables

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
        "datasets": {"data": {"forcing": ["cos_lat"], "diagnostic": ["tp"], "processors": {}}}
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

    made, counts = HeteroData(), {"data": 12, "hidden": 4}
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

    roles = OmegaConf.create({"forcing": ["cos_lat"], "diagnostic": ["tp"]})
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


def main() -> None:
    """Do it, and say what happened."""
    warnings.simplefilter("ignore")
    nodes = graph()
    old = built(["t_850", "z_500", "msl", "tp", "cos_lat"], nodes)
    new = built(["t_850", "z_500", "msl", "tp", "cos_lat", "q_700"], nodes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        indices = {"data_indices": old.data_indices}
        torch.save({"state_dict": old.state_dict(), "hyper_parameters": indices}, path)
        print("the checkpoint knows", ", ".join(load(path, variables)["data"]))
        print(load_into(new, path, transfer_learning(new)))


if __name__ == "__main__":
    main()
