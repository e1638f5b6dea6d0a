"""Trainable values of edges go to their edges. Models are shaped like those of anemoi-models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anemoi_ckpt import MismatchError, load, load_into
from checkpoints import assert_same
from strategies import (
    add_prefix,
    align_edges,
    drop_optimizer,
    exclude,
    filter_shapes,
    include,
    strip_prefix,
    transfer_learning,
    warm_start,
    weights,
)

PERM = [2, 0, 3, 1]
VALUES = torch.arange(8.0).reshape(4, 2)
NAME, MARK = "provider.trainable.trainable", "provider.trainable_layout_version"


class Provider(nn.Module):
    """As anemoi-models 0.16 has it; in the graph's own order, as 0.13 has it."""

    def __init__(self, *, in_order: bool = False, size: int = 2) -> None:
        super().__init__()
        self.register_buffer("edge_index_base", torch.zeros(2, 4), persistent=False)
        self.trainable = nn.Module()
        values = nn.Parameter(torch.full((4, size), -1.0)) if size else None
        self.trainable.register_parameter("trainable", values)
        if not in_order:
            self.register_buffer("perm", torch.tensor(PERM), persistent=False)
            self.register_buffer("trainable_layout_version", torch.tensor(1))


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.provider = Provider(**options)
        self.linear = nn.Linear(1, 1)
        self.register_buffer("latlons", torch.zeros(3))


def stored(tmp_path: Path, *, marked: bool = False, **more: Any) -> Path:
    """A checkpoint, in the graph's own order unless it is marked."""
    state_dict = {n: t.detach().clone() for n, t in Model(in_order=not marked).state_dict().items()}
    state_dict[NAME] = VALUES[PERM] if marked else VALUES
    torch.save({"state_dict": state_dict, "epoch": 3, **more}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_values_go_to_their_edges(tmp_path: Path) -> None:
    path = stored(tmp_path)
    for chain in ((), (weights,), (filter_shapes(Model()),), (transfer_learning(Model()),)):
        model = Model()
        report = load_into(model, path, *chain, strict=True)
        assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
        assert report.aligned == (NAME,)
        assert f"aligned 1 {NAME}" in " ".join(repr(report).split())
        assert report.unexpected == ()
    nested = nn.ModuleDict({"net": Model()})
    load_into(nested, path, add_prefix("net."), strict=True)
    assert torch.equal(nested["net"].provider.trainable.trainable, VALUES[PERM])


def test_sorted_values_stay(tmp_path: Path) -> None:
    path = stored(tmp_path, marked=True)
    for chain in ((), (exclude(MARK),), (align_edges(Model()),), (transfer_learning(Model()),)):
        model = Model()
        report = load_into(model, path, *chain)
        assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
        assert report.aligned == ()


def test_a_strategy_sorts_once(tmp_path: Path) -> None:
    path = stored(tmp_path)
    for strategy in (align_edges(Model()), transfer_learning(Model())):
        made = load(path, strategy)
        assert torch.equal(made["state_dict"][NAME], VALUES[PERM])
        assert made["state_dict"][MARK] == 1
        assert_same(strategy(made)["state_dict"], made["state_dict"])
        model = Model()
        load_into(model, made)
        assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
    whole = Model(in_order=True)
    whole.load_state_dict(load(path, weights))
    assert torch.equal(align_edges(Model())(whole)[NAME], VALUES[PERM])
    with pytest.raises(TypeError, match="align_edges takes a module, not OrderedDict"):
        align_edges(Model().state_dict())  # type: ignore[arg-type] - on purpose


def test_a_model_without_such_values_is_complete(tmp_path: Path) -> None:
    path = stored(tmp_path)
    model = Model(size=0)
    report = load_into(model, path, exclude(NAME))
    assert report.aligned == report.missing == ()
    assert MARK in report.loaded
    with pytest.raises(MismatchError, match=r"only 0 of the model's"):
        load_into(model, path, weights, lambda state_dict: {"other": state_dict[NAME]})
    # what has no values for them gets no mark: both are missing
    report = load_into(Model(), path, exclude(NAME))
    assert set(report.missing) == {NAME, MARK}


def test_other_edges_are_of_another_shape(tmp_path: Path) -> None:
    path = stored(tmp_path)
    more = Model()
    more.provider.perm = torch.tensor([*PERM, 4])
    more.provider.trainable.trainable = nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(MismatchError, match=r"provider\.trainable\.trainable \(4, 2\) in the"):
        load_into(more, path)


@pytest.mark.parametrize("strategy", [lambda _model: drop_optimizer, warm_start])
def test_an_optimizer_in_the_old_order_is_refused(tmp_path: Path, strategy: Any) -> None:
    states = {"state": {0: {"exp_avg": VALUES}}, "param_groups": [{"params": [0, 1, 2]}]}
    path = stored(tmp_path, optimizer_states=[states], loops={}, lr_schedulers=[], global_step=3)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    told = r"optimizer's states are in the graph's own order.*put drop_optimizer before"
    if strategy is warm_start:
        with pytest.raises(MismatchError, match=told):
            load(path, warm_start(model))
    with pytest.raises(MismatchError, match=told):
        load_into(model, path, optimizer=optimizer)
    assert (model.provider.trainable.trainable == -1).all()
    load_into(model, path, drop_optimizer, optimizer=optimizer)
    assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
    load_into(model, path)  # nobody takes the states
    marked = stored(tmp_path, marked=True, optimizer_states=[states], loops={}, global_step=3)
    assert load(marked, align_edges(model))["optimizer_states"]


def test_sorted_values_are_refused_where_nothing_is_sorted(tmp_path: Path) -> None:
    path = stored(tmp_path, marked=True)
    model = Model(in_order=True)
    told = r"sorted by destination.*not: provider\.trainable\.trainable; install a newer"
    for chain in ((), (exclude(MARK),)):
        with pytest.raises(MismatchError, match=told):
            load_into(model, path, *chain)
    with pytest.raises(ValueError, match=told):
        load(path, align_edges(model))
    assert load_into(model, path, exclude(NAME)).missing == (NAME,)
    load_into(model, stored(tmp_path))
    assert torch.equal(model.provider.trainable.trainable, VALUES)


def test_an_order_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with pytest.raises(MismatchError, match=r"order of edges is on the meta device: provider"):
        load_into(Model().to("meta"), path)
    parameters = dict(load(path, include(NAME), weights))
    with pytest.raises(MismatchError, match=r"nothing tells whether.*load the whole checkpoint"):
        load_into(Model(), parameters)
    bare = Model()
    del bare.latlons  # no buffers that could tell
    load_into(bare, parameters)
    assert torch.equal(bare.provider.trainable.trainable, VALUES[PERM])
    model = Model()
    load_into(model, path, include(NAME))  # the checkpoint has them
    assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
    load_into(model, path, add_prefix("a."), strip_prefix("a."))
    assert torch.equal(model.provider.trainable.trainable, VALUES[PERM])
