"""A model's own `on_load_checkpoint` is called where training goes on, as Lightning calls it."""

import copy
import re
import types
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import needs
from _anemoi_ckpt.hooks import call_hook, remember
from _anemoi_ckpt.resuming import LIGHTNING
from anemoi_ckpt import MismatchError, load, load_into, save
from checkpoints import assert_same
from strategies import (
    cold_start,
    compose,
    keep_progress,
    transfer_learning,
    warm_start,
    weights_only,
)


class Rollout:
    def __init__(self) -> None:
        self.step, self.history, self.marks = 1, [1], {"start"}


class Training(torch.nn.Module):
    """A module like Lightning's, which takes from a checkpoint what no state dict has."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("edges", torch.zeros(3))
        self.rollout, self.fault, self.given = Rollout(), fault, []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.given.append(set(checkpoint))
        self.names = checkpoint["hyper_parameters"]["names"]
        self.rollout.step = checkpoint["task_state"]["rollout"]
        self.rollout.history.append(self.rollout.step)
        self.rollout.marks.add("loaded")
        checkpoint["task_state"].clear()
        state_dict = checkpoint["state_dict"]
        state_dict["edges"] = state_dict["edges"].flip(0)
        state_dict["layer.bias"].add_(1)
        for group in checkpoint.get("optimizer_states", []):
            group["param_groups"][0]["lr"] = 0.5
        if self.fault:
            self.edges.fill_(9)
            self.register_buffer("more", torch.ones(1))
            raise RuntimeError(self.fault)


def checkpoint() -> dict[str, Any]:
    model = Training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.zeros(2)}
    return {
        "epoch": 3,
        "state_dict": state | {"edges": torch.tensor([1.0, 2.0, 3.0])},
        "optimizer_states": [optimizer.state_dict()],
        "task_state": {"rollout": 4},
        "hyper_parameters": {"names": ["t", "z"], "mean": torch.ones(2)},
    }


@pytest.fixture(params=["a file", "in memory"])
def source(request, tmp_path: Path) -> Any:
    held = checkpoint()
    return held if request.param == "in memory" else save(held, tmp_path / "last.ckpt")


def test_a_warm_start_calls_the_hook_with_a_copy_before_the_weights_are_loaded(source: Any) -> None:
    model = Training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    report = load_into(model, source, warm_start(model), optimizer=optimizer, strict=True)
    assert model.names == ["t", "z"]
    assert (model.rollout.step, model.rollout.history) == (4, [1, 4])
    assert model.edges.tolist() == [3, 2, 1]
    assert model.layer.bias.tolist() == [1, 1]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert model.given == [set(checkpoint())]
    assert report.rest["task_state"] == {"rollout": 4}
    assert_same(source if isinstance(source, dict) else load(source), checkpoint())


def test_only_what_goes_on_with_training_calls_the_hook(source: Any) -> None:
    for strategies in ([weights_only], [cold_start], [transfer_learning(Training())], []):
        model = Training()
        load_into(model, source, *strategies)
        assert model.given == []
        assert model.edges.tolist() == [1, 2, 3]
    for strategies in ([keep_progress], [compose(lambda each: each, keep_progress)]):
        model = Training()
        load_into(model, source, *strategies)
        assert model.rollout.step == 4
        assert "optimizer_states" not in model.given[0]  # nobody asked for them


def test_keep_progress_is_seen_in_what_compose_hands_on(tmp_path: Path) -> None:
    place, model = save(checkpoint(), tmp_path / "last.ckpt"), Training()
    compose(keep_progress, load_into)(model, place)
    assert model.rollout.step == 4


@pytest.mark.parametrize("fault", ["the hook raises", "the optimizer refuses"])
def test_where_the_load_fails_the_model_is_as_before_the_hook(source: Any, fault: str) -> None:
    model = Training("no such rollout" if fault == "the hook raises" else "")
    state, rollout, names = copy.deepcopy(model.state_dict()), model.rollout, set(vars(model))
    other = torch.optim.SGD([model.layer.weight], lr=0.1)
    hook_raises = fault == "the hook raises"
    with pytest.raises(RuntimeError if hook_raises else MismatchError) as caught:
        load_into(model, source, warm_start(model), optimizer=other)
    if hook_raises:
        assert str(caught.value) == "no such rollout"
        (note,) = caught.value.__notes__
        assert re.match("raised by the model's on_load_checkpoint, while loading .*: leave", note)
        assert "out keep_progress and warm_start" in note
    assert_same(dict(model.state_dict()), dict(state))
    assert model.rollout is rollout
    assert (rollout.step, rollout.history, rollout.marks) == (1, [1], {"start"})
    assert set(vars(model)) == names
    assert model.given == []


def test_a_model_on_meta_gets_what_its_hook_leaves(source: Any) -> None:
    with torch.device("meta"):
        model = Training()
    load_into(model, source, warm_start(model))
    assert model.rollout.step == 4
    assert model.edges.tolist() == [3, 2, 1]


class Renaming(torch.nn.Linear):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint["state_dict"]
        for name in list(state_dict):
            state_dict[name.removeprefix("old.")] = state_dict.pop(name)


def test_a_hook_may_rename_what_the_model_does_not_know() -> None:
    held = {"epoch": 1, "optimizer_states": [{}]}
    names = {"old.weight": torch.ones(1, 2), "old.bias": torch.ones(1)}
    model = Renaming(2, 1)
    report = load_into(model, {**held, "state_dict": names}, keep_progress, strict=True)
    assert (report.missing, report.unexpected) == ((), ())
    assert model.weight.tolist() == [[1, 1]]


def test_a_hook_that_leaves_another_shape_is_refused_and_told_why() -> None:
    held = {"epoch": 1, "optimizer_states": [{}], "state_dict": {"old.weight": torch.ones(1, 3)}}
    model = Renaming(2, 1)
    with pytest.raises(MismatchError, match=r"size mismatch for weight"):
        load_into(model, held, keep_progress)


def test_a_training_module_of_anemoi_is_told_that_it_has_weights() -> None:
    class BaseTrainingModule(Training):
        __module__ = "anemoi.training.train.methods.base"

    model, other = BaseTrainingModule(), Training()
    assert not hasattr(model, "weights_initialized")
    load_into(model, checkpoint(), weights_only)
    assert model.weights_initialized is True
    load_into(other, checkpoint(), weights_only)
    assert not hasattr(other, "weights_initialized")


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_and_we_call_the_hook_alike(name: str, tmp_path: Path) -> None:
    lightning = needs.package(name, "pip install lightning pytorch-lightning")

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[Any] = []

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(4, 1))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class WithHook(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen.append((checkpoint["epoch"], set(checkpoint)))

    path, net = tmp_path / "last.ckpt", WithHook()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net)
    trainer.save_checkpoint(path)
    theirs = WithHook.load_from_checkpoint(path, weights_only=False)
    ours, plain = WithHook(), Net()
    load_into(ours, path, warm_start(ours), optimizer=torch.optim.Adam(ours.parameters()))
    [(epoch, keys)], [(their_epoch, their_keys)] = ours.seen, theirs.seen
    assert epoch == their_epoch == 1
    # nobody asked for the first; Lightning adds the second, empty
    assert their_keys - keys == {"lr_schedulers", "hyper_parameters"}
    load_into(plain, path, warm_start(plain))  # whose hook is Lightning's own, and does nothing
    assert_same(dict(plain.state_dict()), dict(theirs.state_dict()))
    with pytest.raises(MismatchError):
        load_into(net, path, warm_start(net), optimizer=torch.optim.Adam([net.layer.weight]))
    assert net.seen == []
    assert net._trainer is trainer  # what is undone leaves a trainer alone


# ── what is kept ──────────────────────────────────────────────────────────────────────────────


def test_a_hook_is_given_copies_of_tensors_unless_nobody_else_has_them() -> None:
    tensor = torch.ones(2, requires_grad=True) * 2  # no leaf, which deepcopy refuses
    for owned in (True, False):
        with ExitStack() as undo:
            given = call_hook(lambda _: None, torch.nn.Module(), {"w": [tensor]}, undo, owned=owned)
        assert given["w"][0].tolist() == [2, 2]
        assert (given["w"][0] is tensor) is owned


def test_what_a_model_holds_is_put_back_but_not_what_others_hold() -> None:
    model: Any = torch.nn.Module()
    model.ring = {"n": [1]}
    model.ring["self"] = model.ring
    model.library = types.ModuleType("library")
    trainer_class = type("Trainer", (), {"__module__": f"{min(LIGHTNING)}.trainer"})
    model.helper, model.trainer = types.SimpleNamespace(n=[1]), trainer_class()
    for holder in (model.library, model.trainer):
        holder.n = [1]
    holders = [model.helper, model.library, model.trainer]
    with ExitStack() as undo:
        remember(model, undo)
        model.ring["n"].append(2)
        model.ring["m"] = 3
        for holder in holders:
            holder.n.append(2)
    assert model.ring.keys() == {"n", "self"}
    assert model.ring["n"] == [1]
    assert [holder.n for holder in holders] == [[1], [1, 2], [1, 2]]
