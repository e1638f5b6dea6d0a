"""Real models of anemoi-models 0.19, of every kind, on a graph of a few nodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weather import Variables, graph, statistics

MAPPERS = "anemoi.models.layers.mapper."
MODELS = "anemoi.models.models."
CHANNELS = 8
EDGES = {"trainable_size": 2, "sub_graph_edge_attributes": ["edge_length"]}
COMMON = {"num_channels": CHANNELS, "num_chunks": 1, "cpu_offload": False}
COMMON |= {"gradient_checkpointing": False, "mlp_implementation": "mlp"}
HEADS = {"num_heads": 2, "mlp_hidden_ratio": 1, "qk_norm": False}
PYG = {"graph_attention_backend": "pyg", "shard_strategy": "edges", "edge_pre_mlp": False}
FEATURES = ["prognostics", "coordinates", "forcings", "trainable_parameters", "encoded_data"]
ORNSTEIN = {"_target_": "anemoi.models.layers.residual.ScalarOrnsteinConnection", "theta_init": 0.3}

KINDS: dict[str, dict[str, Any]] = {
    "GNN": {"mlp_extra_layers": 0, "mlp_hidden_ratio": 1.0},
    "GraphTransformer": {**HEADS, **PYG},
    "Transformer": {**HEADS, "attention_implementation": "scaled_dot_product_attention"},
    "PointWise": {"mlp_hidden_ratio": 1},
}
# kind of mapper, model, and what else differs
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{kind: (kind, "AnemoiModelEncProcDec", {}) for kind in KINDS},
    "swiglu": ("GNN", "AnemoiModelEncProcDec", {"mlp_implementation": "swiglu"}),
    "extra layers": ("GNN", "AnemoiModelEncProcDec", {"mlp_extra_layers": 2}),
    "features": ("GraphTransformer", "AnemoiModelEncProcDec", {"features": FEATURES}),
    "features of equal size": (
        "Transformer",
        "AnemoiModelEncProcDec",
        {"features": ["forcings", "coordinates", "trainable_parameters", "prognostics"]},
    ),
    "coordinates": ("Transformer", "AnemoiModelEncProcDec", {"features": ["coordinates"]}),
    "ornstein": ("GNN", "AnemoiModelEncProcDec", {"residual": ORNSTEIN}),
    "regressors": (
        "GraphTransformer",
        "AnemoiModelEncProcDec",
        {"residual": {**ORNSTEIN, "regressors": ["sin_lat", "cos_lat"]}},
    ),
    **{f"{kind} ensemble": (kind, "AnemoiEnsModelEncProcDec", {}) for kind in KINDS},
    "transport": ("GraphTransformer", "AnemoiTransportModelEncProcDec", {}),
    "transport, Transformer": (
        "GraphTransformer",
        "AnemoiTransportModelEncProcDec",
        {"processor": "Transformer"},
    ),
    "tendency": ("GraphTransformer", "AnemoiTransportTendModelEncProcDec", {"condition": True}),
    "tendency alone": ("GraphTransformer", "AnemoiTransportTendModelEncProcDec", {}),
    "GNN hierarchical": ("GNN", "AnemoiModelEncProcDecHierarchical", {}),
    "GraphTransformer hierarchical": ("GraphTransformer", "AnemoiModelEncProcDecHierarchical", {}),
}
TRANSPORT = {
    "objective": "edm_diffusion",
    "noise_channels": 8,
    "noise_cond_dim": 4,
    "noise_embedder": {
        "_target_": "anemoi.models.layers.diffusion.SinusoidalEmbeddings",
        "num_channels": 8,
        "max_period": 1000,
    },
}
CONDITIONAL = {
    "LayerNorm": {
        "_target_": "anemoi.models.layers.normalization.ConditionalLayerNorm",
        "normalized_shape": CHANNELS,
        "condition_shape": 4,
        "zero_init": False,
        "autocast": False,
    }
}


def interface_019(  # noqa: PLR0913 - by keyword
    datasets: Mapping[str, Variables],
    configuration: str,
    *,
    salt: int = 0,
    bounding: Sequence[Any] = (),
    steps: tuple[int, int] = (2, 1),
    keys: Sequence[str] = "0123",
    nodes: int = 6,
    channels: int = CHANNELS,
    amend: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Any:
    """An encoder-processor-decoder of 0.19, with its processors.

    `amend` changes the configuration that it is made with.
    """
    from anemoi.models.data_indices.collection import IndexCollection
    from anemoi.models.interface import AnemoiModelInterface
    from anemoi.utils.config import DotDict
    from omegaconf import OmegaConf

    kind, model, options = CONFIGURATIONS[configuration]
    options = {**options, **changes}
    gated = {"mlp_implementation", "mlp_extra_layers"} & options.keys()
    layer = {**COMMON, **KINDS[kind], **{name: options[name] for name in gated}}
    layer["num_channels"] = channels
    layer["layer_kernels"] = CONDITIONAL if "Transport" in model else {}
    hierarchical = "Hierarchical" in model
    hidden = ["hidden", "coarse"] if hierarchical else "hidden"
    normalizer = "anemoi.models.preprocessing.normalizer.InputNormalizer"
    processors = {"normalizer": {"_target_": normalizer, "config": {"default": "mean-std"}}}
    roles = {
        name: {"forcing": list(each.forcing), "diagnostic": list(each.diagnostic)}
        for name, each in datasets.items()
    }
    mapper = {**layer, **EDGES}
    processor = options.get("processor", {"PointWise": "PointWiseMLP"}.get(kind, kind))
    residual = {"_target_": "anemoi.models.layers.residual.SkipConnection"}
    config: dict[str, Any] = {
        "data": {
            "datasets": {name: {**each, "processors": processors} for name, each in roles.items()}
        },
        "model": {
            "num_channels": channels,
            "condition_on_residual": options.get("condition", False),
            "enable_hierarchical_level_processing": True,
            "level_process_num_layers": 1,
            "node_trainable_parameters": {**dict.fromkeys(datasets, 2), "hidden": 2, "coarse": 2},
            "bounding": {"datasets": {name: list(bounding) for name in datasets}},
            "residual": {
                "datasets": {name: options.get("residual", residual) for name in datasets}
            },
            "model": {
                "_target_": MODELS + model,
                "hidden_nodes_name": hidden,
                "latent_skip": True,
                "transport": TRANSPORT,
            },
            "latent_aggregator": {"_target_": "anemoi.models.layers.aggregator.SumAggregator"},
            "noise_injector": {"_target_": "anemoi.models.layers.ensemble.NoOpNoiseInjector"},
            "encoders": {
                key: {
                    "source_datasets": [name],
                    "dataset_fusing_strategy": "not_supported",
                    "mapper": {"_target_": f"{MAPPERS}{kind}ForwardMapper", **mapper},
                }
                for key, name in zip(keys, datasets, strict=False)
            },
            "decoders": {
                key: {
                    "target_datasets": [name],
                    "target_node_features": options.get("features", ["encoded_data"]),
                    "mapper": {"_target_": f"{MAPPERS}{kind}BackwardMapper", **mapper},
                }
                for key, name in zip(keys, datasets, strict=False)
            },
            "processor": {
                "_target_": f"anemoi.models.layers.processor.{processor}Processor",
                "num_layers": 1,
                **layer,
                **KINDS.get(processor, {}),
                **EDGES,
            },
            "upscale_mapper": {"_target_": f"{MAPPERS}{kind}ForwardMapper", **mapper},
            "downscale_mapper": {"_target_": f"{MAPPERS}{kind}BackwardMapper", **mapper},
        },
    }
    if amend is not None:
        amend(config)
    return AnemoiModelInterface(
        config=DotDict(config),
        n_step_input=steps[0],
        n_step_output=steps[1],
        graph_data=_graph(list(datasets), kind, nodes, hierarchical=hierarchical),
        statistics={name: statistics(each.names, salt) for name, each in datasets.items()},
        data_indices={
            name: IndexCollection(
                OmegaConf.create(roles[name]),
                {variable: place for place, variable in enumerate(each.names)},
            )
            for name, each in datasets.items()
        },
        metadata={"metadata_inference": {name: {"timesteps": {}} for name in datasets}},
    )


def _graph(datasets: Sequence[str], kind: str, nodes: int, *, hierarchical: bool) -> Any:
    """That of `weather`, and below its hidden nodes a coarser level if asked for.

    Point-wise mappers need as many hidden nodes as others.
    """
    import torch

    made = graph(datasets, 3 if kind == "PointWise" else nodes)
    if hierarchical:
        draw = torch.Generator().manual_seed(3)
        made["coarse"].x = torch.rand(2, 2, generator=draw)
        for one, other in (("hidden", "coarse"), ("coarse", "hidden"), ("coarse", "coarse")):
            counts = [made[name].num_nodes for name in (one, other)]
            pairs = torch.cartesian_prod(*map(torch.arange, counts)).T
            made[one, "to", other].edge_index = pairs.contiguous()
            made[one, "to", other].edge_length = torch.rand(pairs.shape[1], 1, generator=draw)
    return made
