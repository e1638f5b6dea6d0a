"""Real models of `anemoi-models` on a graph of a few nodes, for any variables."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

LAYER = {"trainable_size": 2, "sub_graph_edge_attributes": ["edge_length"], "num_chunks": 1}
LAYER |= {"layer_kernels": {}, "cpu_offload": False}
HEADS = {"num_heads": 2, "mlp_hidden_ratio": 2, "qk_norm": False}
KINDS: dict[str, dict[str, Any]] = {
    "GNN": {"mlp_extra_layers": 0},
    "GraphTransformer": {**HEADS, "graph_attention_backend": "pyg"},
    "Transformer": {**HEADS, "attention_implementation": "scaled_dot_product_attention"},
}


class Variables(NamedTuple):
    """The variables of a dataset, in the order of their indices, and their roles."""

    names: Sequence[str]
    forcing: Sequence[str] = ("cos_lat",)
    diagnostic: Sequence[str] = ("tp",)

    @property
    def inputs(self) -> list[str]:
        return [name for name in self.names if name not in self.diagnostic]

    @property
    def outputs(self) -> list[str]:
        return [name for name in self.names if name not in self.forcing]


def graph(datasets: Sequence[str] = ("data",), nodes: int = 6) -> Any:
    """A few nodes, and all edges between them."""
    from torch_geometric.data import HeteroData

    draw = torch.Generator().manual_seed(0)
    made = HeteroData()
    counts = {**dict.fromkeys(datasets, nodes), "hidden": 3}
    for name, count in counts.items():  # the hidden ones stand where they do in other graphs
        seeded = torch.Generator().manual_seed(1) if name == "hidden" else draw
        made[name].x = torch.rand(count, 2, generator=seeded)
    edges = [pair for name in datasets for pair in ((name, "hidden"), ("hidden", name))]
    for one, other in [*edges, ("hidden", "hidden")]:
        pairs = torch.cartesian_prod(torch.arange(counts[one]), torch.arange(counts[other])).T
        made[one, "to", other].edge_index = pairs.contiguous()
        made[one, "to", other].edge_length = torch.rand(pairs.shape[1], 1, generator=draw)
    return made


def statistics(names: Sequence[str], salt: int = 0) -> dict[str, Any]:
    """Some for each variable, by its name."""
    seeds = [zlib.crc32(name.encode()) % 97 + salt for name in names]
    mean = np.array([seed % 7 - 3 for seed in seeds], dtype=np.float64)
    stdev = np.array([seed % 3 + 1 for seed in seeds], dtype=np.float64)
    return {"minimum": mean - 9, "maximum": mean + 9, "mean": mean, "stdev": stdev}


def interface(  # noqa: PLR0913 - by keyword
    datasets: Mapping[str, Variables] | Sequence[str],
    kind: str = "GNN",
    *,
    salt: int = 0,
    bounding: Sequence[Any] = (),
    nodes: int = 6,
    channels: int = 8,
    steps: int = 2,
    ensemble: bool = False,
) -> Any:
    """A real encoder-processor-decoder, with its processors."""
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.interface import AnemoiModelInterface
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf

    if not isinstance(datasets, Mapping):
        datasets = {"data": Variables(datasets)}
    layer = {**LAYER, **KINDS[kind]}
    mapper = f"anemoi.models.layers.mapper.{kind}{{}}Mapper"
    normalizer = "anemoi.models.preprocessing.normalizer.InputNormalizer"
    processors = {"normalizer": {"_target_": normalizer, "config": {"default": "mean-std"}}}
    roles = {
        name: {"forcing": list(each.forcing), "diagnostic": list(each.diagnostic)}
        for name, each in datasets.items()
    }
    config: dict[str, Any] = {
        "training": {"multistep_input": steps, "multistep_output": 1},
        "data": {
            "datasets": {name: {**each, "processors": processors} for name, each in roles.items()}
        },
        "model": {
            "num_channels": channels,
            "trainable_parameters": {"data": 2, "hidden": 2},  # of nodes, in every dataset
            "bounding": list(bounding),
            "residual": {"_target_": "anemoi.models.layers.residual.SkipConnection"},
            "model": {
                "_target_": "anemoi.models.models.AnemoiModelEncProcDec",
                "hidden_nodes_name": "hidden",
                "latent_skip": True,
            },
            "encoder": {"_target_": mapper.format("Forward"), **layer},
            "decoder": {"_target_": mapper.format("Backward"), **layer},
            "processor": {
                "_target_": f"anemoi.models.layers.processor.{kind}Processor",
                "num_layers": 1,
                **layer,
            },
        },
    }
    if ensemble:
        config["model"]["model"]["_target_"] = "anemoi.models.models.AnemoiEnsModelEncProcDec"
        injector = "anemoi.models.layers.ensemble.NoOpNoiseInjector"
        config["model"] |= {
            "noise_injector": {"_target_": injector},
            "condition_on_residual": False,
        }
    timesteps = {"timesteps": {"relative_date_indices_training": [0, 1, 2]}}
    return AnemoiModelInterface(
        config=DotDict(config),
        graph_data=graph(list(datasets), nodes),
        statistics={name: statistics(each.names, salt) for name, each in datasets.items()},
        data_indices={
            name: IndexCollection(
                OmegaConf.create(roles[name]),
                {variable: place for place, variable in enumerate(each.names)},
            )
            for name, each in datasets.items()
        },
        metadata={"metadata_inference": dict.fromkeys(datasets, timesteps)},
    )
