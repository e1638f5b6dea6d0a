"""One table of where a checkpoint keeps what, for strategies, load_into and peek alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from _anemoi_ckpt.anatomy import AVERAGES, OPTIMIZER, SCALER, SCHEDULER, WEIGHTS, states_of
from anemoi_ckpt import MismatchError, load, load_into, peek
from strategies import (
    drop_optimizer,
    keep_progress,
    prefer_ema,
    reset_progress,
    warm_start,
    weights,
)

MODEL = torch.nn.Linear(2, 2)
STATE = MODEL.state_dict()


def trained() -> tuple[torch.nn.Module, Any, Any]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("key", WEIGHTS.keys)
def test_weights_are_found_under_each_key(key: str) -> None:
    for checkpoint in ({key: STATE, "epoch": 3}, {"epoch": 3, key: {"model": STATE}}):
        assert list(weights(checkpoint)) == ["weight", "bias"]
        report = load_into(torch.nn.Linear(2, 2), checkpoint)
        assert report.loaded == ("weight", "bias")
        assert report.rest == {"epoch": 3}


def test_a_tensor_that_is_called_so_is_a_weight() -> None:
    bare = {"net": torch.ones(1), "optimizer": torch.ones(1), "amp": torch.ones(1)}
    assert weights(bare) is bare
    assert list(drop_optimizer(bare)) == ["net", "optimizer", "amp"]


@pytest.mark.parametrize("key", [*OPTIMIZER.keys, "optimizerG", "whatever it is called"])
def test_an_optimizer_is_dropped_kept_restored_and_shown(key: str, tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    checkpoint = {"state_dict": model.state_dict(), key: optimizer.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert set(load(tmp_path / "a.ckpt", drop_optimizer)) == {"state_dict", "epoch"}
    assert set(reset_progress(checkpoint)) == {"state_dict", "epoch"}
    assert keep_progress(checkpoint) is checkpoint
    fresh = torch.nn.Linear(2, 2)
    receiver = torch.optim.AdamW(fresh.parameters())
    report = load_into(fresh, tmp_path / "a.ckpt", warm_start(fresh), optimizer=receiver)
    assert report.restored == ("optimizer",)
    assert report.rest == {"epoch": 3}
    assert len(receiver.state) == 2
    assert f"optimizer {48 + 8} B" in str(peek(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("key", [*SCHEDULER.keys, "warmup"])
def test_a_scheduler_is_dropped_and_restored(key: str) -> None:
    model, optimizer, scheduler = trained()
    checkpoint = {"state_dict": model.state_dict(), key: scheduler.state_dict()}
    assert list(drop_optimizer(checkpoint)) == ["state_dict"]
    fresh = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert load_into(model, checkpoint, scheduler=fresh).restored == ("scheduler",)
    assert fresh.last_epoch == scheduler.last_epoch == 1


@pytest.mark.skipif(torch.__version__ < (2, 3), reason="torch.amp has a GradScaler since 2.3")
@pytest.mark.parametrize("key", [*SCALER.keys, "half precision"])
def test_a_gradient_scaler_is_dropped(key: str) -> None:
    state = torch.amp.GradScaler("cpu").state_dict()
    assert list(drop_optimizer({"state_dict": STATE, key: state})) == ["state_dict"]


@pytest.mark.parametrize("key", AVERAGES.keys)
def test_averaged_weights_take_the_place_of_the_weights(key: str) -> None:
    average = {name: torch.zeros_like(value) for name, value in STATE.items()}
    preferred = prefer_ema({"state_dict": STATE, key: average})
    assert not any(value.any() for value in preferred["state_dict"].values())


def test_the_states_of_several_optimizers() -> None:
    """As a list, by name, or each under a key of its own; the usual keys before the shape."""
    one, other = ({"state": {}, "param_groups": [{"lr": lr}]} for lr in (1.0, 2.0))
    assert states_of(OPTIMIZER, {"optimizer_states": [one, other]}) == [one, other]
    assert states_of(OPTIMIZER, {"optimizers": {"gen": one, "disc": other}}) == [one, other]
    assert states_of(OPTIMIZER, {"optim0": one, "optim1": other}) == [one, other]
    assert states_of(OPTIMIZER, {"best": other, "optimizer": one}) == [one]
    assert states_of(OPTIMIZER, {"optimizer_states": [], "optim0": one}) == [one]
    assert states_of(OPTIMIZER, {"epoch": 3}) == []


def test_an_optimizer_beside_the_weights_some_levels_below() -> None:
    """composer writes so."""
    model, optimizer, _ = trained()
    state = {"model": STATE, "optimizers": {"AdamW": optimizer.state_dict()}, "seed": 1}
    checkpoint = {"state": state, "rng": 2}
    assert drop_optimizer(checkpoint) == {"state": {"model": STATE, "seed": 1}, "rng": 2}
    receiver = torch.optim.AdamW(model.parameters())
    report = load_into(model, checkpoint, optimizer=receiver)
    assert report.restored == ("optimizer",)
    assert report.rest == {"state": {"seed": 1}, "rng": 2}
    assert len(receiver.state) == 2


def test_what_stands_beside_weights_some_levels_below_is_known_to_all(tmp_path: Path) -> None:
    _, optimizer, _ = trained()
    state = {"model": STATE, "optimizers": {"AdamW": optimizer.state_dict()}, "step": 7}
    checkpoint = {"state": state}
    assert keep_progress(checkpoint) is checkpoint
    torch.save(checkpoint, tmp_path / "a.pt")
    assert "weights" not in str(peek(tmp_path / "a.pt"))  # of the one key, which has all
    torch.save({"state": {"model": STATE}}, tmp_path / "a.pt")
    assert "weights 24 B" in str(peek(tmp_path / "a.pt"))


def test_what_is_called_weights_beside_other_state_dicts_may_be_anything() -> None:
    checkpoint = {"encoder": STATE, "weights": {"mse": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"no state dict under any of .* in encoder, weights"):
        weights(checkpoint)
    assert list(weights({**checkpoint, "state_dict": STATE})) == ["weight", "bias"]
    assert list(weights({"weights": STATE, "ema": STATE})) == ["weight", "bias"]
    deepspeed = {"module": STATE, "of some client": {"t": torch.ones(1)}}
    assert list(weights(deepspeed)) == ["weight", "bias"]


def test_optimizers_by_name_under_any_key() -> None:
    one = {"state": {}, "param_groups": []}
    assert list(drop_optimizer({"state_dict": STATE, "some": {"a": one, "b": one}})) == [
        "state_dict"
    ]
    empty: dict[str, Any] = {"state_dict": STATE, "some": {}, "others": []}
    assert drop_optimizer(empty) == empty


def test_an_optimizer_is_no_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"no state dict under any of .* in state, param_groups"):
        weights(torch.optim.SGD(MODEL.parameters()).state_dict())


def test_weights_beside_what_looks_like_a_scheduler_are_kept() -> None:
    inner = {"state_dict": STATE, "last_epoch": 3, "_last_lr": [0.1]}
    assert drop_optimizer({"model": inner}) == {"model": inner}


def test_lists_in_lists_are_no_optimizers() -> None:
    """Each level doubled the time, and a list that holds itself had no end."""
    nested: list[Any] = [{"state": {}, "param_groups": []}]
    for _ in range(60):
        nested = [nested, nested]
    nested.append(nested)
    checkpoint = {"state_dict": STATE, "x": nested}
    assert drop_optimizer(checkpoint).keys() == {"state_dict", "x"}
    assert load_into(torch.nn.Linear(2, 2), checkpoint).rest.keys() == {"x"}


def test_another_number_of_optimizers_is_refused() -> None:
    one = {"state": {}, "param_groups": []}
    optimizer = torch.optim.SGD(MODEL.parameters())
    with pytest.raises(MismatchError, match="the states of 2 optimizers, and 1 would take one"):
        load_into(MODEL, {"state_dict": STATE, "optim0": one, "optim1": one}, optimizer=optimizer)
