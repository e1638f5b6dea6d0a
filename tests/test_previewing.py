"""What `plan` foretells, compared with what the load then does."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
import strategies as s
from anemoi_ckpt import CheckpointError, MismatchError, load, load_into, plan, save
from checkpoints import as_bytes, lightning_checkpoint
from conftest import Place

SIZE = 300_000


def checkpoint() -> dict[str, Any]:
    state = {f"layers.{i}.weight": torch.full((SIZE,), float(i)) for i in range(9)}
    state |= {"layers.0.bias": torch.ones(3), "flag": torch.tensor(True)}
    return {"state_dict": state, "optimizer_states": [{"m": torch.zeros(5 * SIZE)}], "epoch": 1}


CHOICES: dict[str, tuple[Any, ...]] = {
    "all": (),
    "weights": (s.weights,),
    "some": (s.weights, s.include("layers.3", "layers.8.weight")),
    "every second": (s.weights, s.include(*(f"layers.{i}" for i in range(0, 9, 2)))),
    "none": (lambda c: c["epoch"],),
    "computed": (s.weights, s.cast(torch.bfloat16), s.include("layers.1")),
}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_a_plan_is_what_the_load_does(chosen: tuple[Any, ...], place: Place) -> None:
    uri = place.put("last.ckpt", as_bytes(checkpoint()))
    server = place.server
    if server is not None:
        load(uri, lambda c: c["epoch"])  # credentials and clients are asked for once
        server.log.clear()
        before = server.bytes_sent
    found = plan(uri, *chosen)
    assert found.complete
    if server is not None:
        assert server.bytes_sent - before < 300_000
        server.log.clear()
        before = server.bytes_sent
        load(uri, *chosen)
        names = ("Range", "x-ms-range")
        asked = [each for each in server.log if any(each.headers.get(name) for name in names)]
        assert found.requests == len(asked)
        moved = server.bytes_sent - before
        told = found.bytes_moved + found.bytes_to_move
        assert told <= moved <= told + 30_000  # headers of answers
    assert found.seconds(1e6) == (found.bytes_moved + found.bytes_to_move) / 1e6


def test_what_is_planned_is_named(tmp_path: Path) -> None:
    path = save(checkpoint(), tmp_path / "last.ckpt")
    found = plan(path, s.weights, s.include("layers.3", "layers.0.bias"))
    assert [each.name for each in found.tensors] == ["layers.3.weight", "layers.0.bias"]
    assert len(found.records) == 2
    assert found.bytes_to_move >= 4 * SIZE + 12
    assert found.report is None
    for rate in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="more than 0"):
            found.seconds(rate)
    text = repr(found)
    assert "tensors 2" in text
    assert "layers.3.weight" in text
    assert "at 1 Gbit/s" in text
    assert "or more" not in text
    whole = json.loads(json.dumps(found.as_dict()))
    assert whole["tensors"][0]["dtype"] == "float32"
    assert whole["tensors"][0]["shape"] == [SIZE]
    assert repr(pickle.loads(pickle.dumps(found))) == text
    assert "<table>" in found._repr_html_()


def test_a_strategy_that_asks_for_values(tmp_path: Path) -> None:
    """Which the plan does not have: it says so."""
    path = save(checkpoint(), tmp_path / "last.ckpt")

    def if_flagged(found: dict[str, Any]) -> Any:
        state = found["state_dict"]
        return state if state["flag"].item() else {}

    found = plan(path, if_flagged)
    assert not found.complete
    assert [each.name for each in found.tensors] == ["flag"]
    assert "or more: a strategy asks for values" in repr(found)


class Model(torch.nn.Module):
    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, size) for _ in range(2)])


def test_the_report_of_a_plan_is_that_of_the_load(tmp_path: Path) -> None:
    state = {"layers.0.weight": torch.ones(SIZE, 1), "layers.0.bias": torch.ones(SIZE)}
    path = save({"state_dict": {**state, "odd": torch.ones(SIZE)}, "epoch": 3}, tmp_path / "a.ckpt")
    model = Model()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = plan(path, model=model)
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
    assert found.report is not None
    done = load_into(model, path)
    for field in (
        "loaded",
        "missing",
        "unexpected",
        "mismatched",
        "renamed",
        "rest",
        "bytes_moved",
    ):
        assert getattr(found.report, field) == getattr(done, field), field
    assert [each.name for each in found.tensors] == list(state)
    assert "missing 2" in repr(found)


def test_a_plan_refuses_what_the_load_would(tmp_path: Path) -> None:
    path = save({"state_dict": {"layers.0.weight": torch.ones(7, 1)}}, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError):
        load_into(Model(), path)
    with pytest.raises(MismatchError):
        plan(path, model=Model())
    with pytest.raises(TypeError, match="model of plan is a module, not type"):
        plan(path, model=Model)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        plan(path, s.include)
    with pytest.raises(CheckpointError):
        plan(tmp_path / "none.ckpt")


def test_random_numbers_are_as_without_a_plan(tmp_path: Path) -> None:
    path = save(checkpoint(), tmp_path / "a.ckpt")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    plan(path, lambda c: (torch.rand(5), c)[1])
    assert torch.equal(torch.rand(3), expected)


def test_a_server_without_ranges(tmp_path: Path, http_server: servers.HTTPServer) -> None:
    """All has come by then."""
    data = lightning_checkpoint(tmp_path).read_bytes()
    uri = http_server.put("a.ckpt", data)
    http_server.fault = lambda _: servers.Fault(ignore_range=True)
    found = plan(uri)
    assert found.bytes_to_move == 0
    assert found.bytes_moved >= len(data)
