"""What `peek` knows of how a checkpoint was made: parameters, variables, versions, optimizers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anemoi_ckpt import peek, save
from test_formats import tarred

FACTS = {"tp": {"units": "m"}, "lsm": {}, "q_850": {"units": "kg kg**-1"}}


def optimized(kind: Any, **options: Any) -> dict[str, Any]:
    module = torch.nn.Linear(3, 2)
    optimizer = kind(module.parameters(), **options)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step(lambda: torch.zeros(()))
    state: dict[str, Any] = optimizer.state_dict()
    return state


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.5}),
        ("NAdam", {"lr": 0.5}),
        ("RMSprop", {"lr": 0.5}),
        ("Adadelta", {"lr": 0.5}),
        ("Adagrad", {"lr": 0.5}),
        ("ASGD", {"lr": 0.5}),
        ("Rprop", {"lr": 0.5}),
        ("LBFGS", {"lr": 0.5}),
    ],
)
def test_optimizers_by_their_groups(name: str, options: Any, tmp_path: Path) -> None:
    state = optimized(getattr(torch.optim, name), **options)
    found = peek(save({"optimizer_states": [state]}, tmp_path / "a.ckpt"))
    assert found.optimizers == (f"{name} of 2 parameters, lr 0.5",)
    assert f"optimizer   {name} of 2" in repr(found)


def test_adam_and_adamw_are_told_apart_where_torch_writes_which(tmp_path: Path) -> None:
    groups = [
        {"betas": (0.9, 0.99), "amsgrad": False, "lr": lr, "params": [0], **more}
        for lr, more in ((1e-3, {"decoupled_weight_decay": True}), (2e-3, {}))
    ]
    states = {
        "AdamW of 2 parameters, lr 0.001, 0.002": groups,
        "Adam or AdamW of 1 parameters, lr 0.002": groups[1:],
        "Adam of 1 parameters": [groups[1] | {"decoupled_weight_decay": False, "lr": None}],
        "unknown of 0 parameters": [{"lr": torch.ones(1)}],
    }
    several = [{"state": {}, "param_groups": each} for each in states.values()]
    checkpoint = {"optimizer_states": [*several, {"param_groups": "odd"}, 3]}
    found = peek(save(checkpoint, tmp_path / "a.ckpt"))
    assert found.optimizers == (*states, "unknown of 0 parameters")


def test_averages_by_where_they_are(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    checkpoint = {
        "state_dict": state,
        "averaging_state": {"n_averaged": 3},
        "ema": {"w": torch.ones(2)},
        "callbacks": {"SWA": {"average_model_state": dict(state)}, "odd": 3},
    }
    found = peek(save(checkpoint, tmp_path / "a.ckpt"))
    assert found.averages == ("state_dict", "ema", "callbacks.SWA.average_model_state")
    assert "averages    state_dict, ema" in repr(found)


def test_parameters_are_counted_once_and_of_the_weights_alone(tmp_path: Path) -> None:
    weight = torch.ones(4, 5)
    state = {
        "a.weight": weight,
        "tied.weight": weight,
        "a.half": torch.ones(3).half(),
        "flat.a": torch.arange(6.0)[:2],  # of one storage, at different places
        "steps": torch.tensor(7),  # no number of floating point
        "sparse": torch.eye(2).to_sparse(),
    }
    checkpoint = {"state_dict": state, "ema": {"a.weight": torch.ones(9)}, "loss": torch.ones(2)}
    assert peek(save(checkpoint, tmp_path / "a.ckpt")).parameters == 20 + 3 + 2 + 4
    assert peek(save(state, tmp_path / "b.ckpt")).parameters == 29
    torch.save(torch.nn.Linear(3, 2), tmp_path / "c.pt")
    assert peek(tmp_path / "c.pt").parameters == 8


def test_variables_with_their_units_and_versions_as_anemoi_notes_them(tmp_path: Path) -> None:
    names = ["tp", "lsm", "q_850"]
    modules = {"torch": "2.5.1", "anemoi.models": "0.9", "anemoi.training": {"version": "0.6"}}
    told = {
        "dataset": {"data": {"variables": names, "variables_metadata": FACTS}, "more": {}},
        "provenance_training": {"module_versions": {**modules, "numpy": "2.0"}},
    }
    checkpoint = {"state_dict": {"w": torch.ones(1)}, "pytorch-lightning_version": "2.6.0"}
    found = peek(save(checkpoint, tmp_path / "a.ckpt", metadata=told))
    assert found.variables == {"data": {"tp": "m", "lsm": "", "q_850": "kg kg**-1"}}
    assert found.writers == {
        "torch": "2.5.1",
        "lightning": "2.6.0",
        "anemoi.models": "0.9",
        "anemoi.training": "0.6",
    }
    assert "data: 3: tp (m), lsm, q_850 (kg kg**-1)" in repr(found)
    assert "torch 2.5.1 · lightning 2.6.0 · anemoi.models 0.9 · anemoi.training 0.6" in repr(found)
    inside = checkpoint | {"hyper_parameters": {"metadata": {"dataset": {"variables": ["t"] * 9}}}}
    inside["hyper_parameters"]["metadata"]["dataset"]["variables"] = [f"t_{i}" for i in range(9)]
    found = peek(save(inside, tmp_path / "b.ckpt"))
    assert list(found.variables["data"]) == [f"t_{i}" for i in range(9)]
    assert "t_7, … and 1 more" in repr(found)


def test_metadata_that_are_odd_tell_nothing(tmp_path: Path) -> None:
    for odd in ({"dataset": 3}, {"dataset": {"variables": 3}}, {"provenance_training": [1]}):
        path = save({"w": torch.ones(1)}, tmp_path / "a.ckpt", metadata=odd)
        assert peek(path).variables == {}


def test_a_tar_is_of_torch_0_1(tmp_path: Path) -> None:
    assert peek(tarred(tmp_path / "a.ckpt")).writers["torch"] == "0.1"
