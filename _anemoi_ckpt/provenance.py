"""What a checkpoint tells of how it was made: by which versions, optimizers and averages."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from _anemoi_ckpt.anatomy import AVERAGES, AVERAGING, OPTIMIZER, states_of
from _anemoi_ckpt.formats import Archive

# ── versions ──────────────────────────────────────────────────────────────────────────────────


def writers_of(archive: Archive, top: Mapping[Any, Any], metadata: Any) -> dict[str, str]:
    """Tell the versions of what wrote a checkpoint: torch's, Lightning's, and Anemoi's packages'.

    Anemoi notes those of all modules that ran, under ``provenance_training``.
    """
    known = _noted_versions(metadata)
    ours = {name: version for name, version in known.items() if name.startswith("anemoi")}
    lightning = top.get("pytorch-lightning_version")
    found = {
        "torch": known.get("torch") or _torch_by_layout(archive),
        "lightning": lightning if isinstance(lightning, str) else None,
        **dict(sorted(ours.items())),
    }
    return {name: version for name, version in found.items() if version}


def _noted_versions(metadata: Any) -> dict[str, str]:
    provenance = metadata.get("provenance_training") if isinstance(metadata, Mapping) else None
    modules = provenance.get("module_versions") if isinstance(provenance, Mapping) else None
    noted = modules.items() if isinstance(modules, Mapping) else ()
    # anemoi-utils 0.5 notes {"version": …}
    plain = ((name, v.get("version") if isinstance(v, Mapping) else v) for name, v in noted)
    return {str(name): str(version) for name, version in plain if version}


def _torch_by_layout(archive: Archive) -> str | None:
    """Tell which torch wrote an archive: PyTorch's serialization note says which brought what."""
    members = {posixpath.basename(name) for name in archive.members}
    if archive.format == "torch legacy":
        return "before 1.6, or in its format"
    if archive.format == "torch 0.1 tar":
        return "0.1"
    if ".format_version" in members:
        return "2.7 or later"
    if "byteorder" in members:
        return "2.1 or later"
    return "1.6 or later" if members else None


# ── optimizers ────────────────────────────────────────────────────────────────────────────────

# What is in the parameter groups of torch.optim's (2.13), the more telling ones first. Those of
# Adam and AdamW differ in a value, which torch has written since 2.7.
_OPTIMIZERS = {
    "NAdam": {"betas", "momentum_decay"},
    "Adam or AdamW": {"betas", "amsgrad"},
    "RAdam": {"betas", "decoupled_weight_decay"},
    "SGD": {"momentum", "dampening", "nesterov"},
    "Muon": {"momentum", "nesterov", "ns_steps"},
    "RMSprop": {"alpha", "centered"},
    "Adadelta": {"rho", "eps"},
    "Adagrad": {"lr_decay", "initial_accumulator_value"},
    "ASGD": {"lambd", "t0"},
    "Rprop": {"etas", "step_sizes"},
    "LBFGS": {"history_size", "line_search_fn"},
}


def optimizers_of(top: Mapping[Any, Any]) -> list[str]:
    """Name the optimizers whose states a checkpoint has, by what is in their parameter groups."""
    return [_optimizer(state) for state in states_of(OPTIMIZER, top) if isinstance(state, Mapping)]


def _optimizer(state: Mapping[Any, Any]) -> str:
    groups = state.get("param_groups")
    groups = [each for each in groups or () if isinstance(each, Mapping)]
    parameters = [each.get("params") for each in groups]
    count = sum(len(each) for each in parameters if isinstance(each, list | tuple))
    first = groups[0] if groups else {}
    named = (name for name, keys in _OPTIMIZERS.items() if keys <= first.keys())
    name = next(named, "unknown")
    if name == "Adam or AdamW" and isinstance(first.get("decoupled_weight_decay"), bool):
        name = "AdamW" if first["decoupled_weight_decay"] else "Adam"
    rates = dict.fromkeys(each["lr"] for each in groups if isinstance(each.get("lr"), float))
    lr = f", lr {', '.join(f'{rate:.3g}' for rate in rates)}" if rates else ""
    return f"{name} of {count} parameters{lr}"


# ── averages ──────────────────────────────────────────────────────────────────────────────────


def averages_of(top: Mapping[Any, Any]) -> list[str]:
    """Tell where a checkpoint has averaged weights, as a path of keys.

    Lightning's `WeightAveraging` has them as the state dict, and says so beside it.
    """
    return [*_averages_of(top)]


def _averages_of(top: Mapping[Any, Any]) -> Iterator[str]:
    if any(key in top for key in AVERAGING.keys):
        yield "state_dict"
    yield from (str(key) for key in AVERAGES.of(top))
    callbacks = top.get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping):
            yield from (f"callbacks.{name}.{key}" for key in AVERAGES.of(state))
