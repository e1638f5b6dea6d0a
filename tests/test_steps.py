"""Strategies read as they were written, can be pickled, and tell load what they are made of."""

import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import strategies
from anemoi_ckpt import load, load_into
from checkpoints import assert_same
from strategies import (
    add_prefix,
    align_edges,
    align_variables,
    average,
    cast,
    cold_start,
    compose,
    drop,
    drop_optimizer,
    exclude,
    filter_shapes,
    include,
    keep_progress,
    merge,
    on_weights,
    pad_or_slice,
    pipe,
    prefer_ema,
    refresh_processors,
    rename,
    require_finite,
    require_match,
    require_variables,
    reset_progress,
    standard,
    strip_prefix,
    take,
    training_weights,
    transfer_learning,
    warm_start,
    weights,
    weights_only,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
CHECKPOINT = {
    "state_dict": STATE,
    "ema": {"a.bias": torch.zeros(2)},
    "epoch": 3,
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "hyper_parameters": {"data_indices": {"data": SimpleNamespace(name_to_index={"t": 0})}},
}
PROCESSORS = {"pre_processors_tendencies.mean": torch.ones(1)}


def first(state_dict: Any) -> Any:
    """A strategy of a user's own, in a module."""
    return dict(list(state_dict.items())[:1])


@on_weights
def decorated(state_dict: Any) -> Any:
    """Another one."""
    return first(state_dict)


STEPS: dict[str, Callable[[Any], Any]] = {
    "weights": weights,
    "drop_optimizer": drop_optimizer,
    "prefer_ema": prefer_ema,
    "reset_progress": reset_progress,
    "keep_progress": keep_progress,
    "training_weights": training_weights,
    "weights_only": weights_only,
    "require_finite": require_finite,
    "cold_start": cold_start,
    "drop('epoch', 'loops', missing_ok=True)": drop("epoch", "loops", missing_ok=True),
    "include('a.weight')": include("a.weight"),
    "exclude('*.bias')": exclude("*.bias"),
    "filter_shapes(<2 weights>)": filter_shapes(STATE),
    "require_match(<2 weights>)": require_match(STATE),
    "pad_or_slice(<2 weights>, fill='zeros')": pad_or_slice(STATE, fill="zeros"),
    "take('a.weight', 0, [1, 0])": take("a.weight", 0, [1, 0]),
    "strip_prefix('a.')": strip_prefix("a."),
    "add_prefix('model.')": add_prefix("model."),
    "rename('^a', 'b')": rename("^a", "b"),
    "cast(torch.float16)": cast(torch.float16),
    "average(<2 weights>)": average(STATE),
    "merge(<1 weights>, clash='last')": merge({"b": torch.ones(1)}, clash="last"),
    "require_variables({'t': 0})": require_variables({"t": 0}),
    "align_edges(<Linear>)": align_edges(torch.nn.Linear(1, 1)),
    "align_variables({'t': 0}, {'t': 0}, {'a.bias': {0: ['all']}})": align_variables(
        {"t": 0}, {"t": 0}, {"a.bias": {0: ["all"]}}
    ),
    "refresh_processors(<1 weights>)": refresh_processors(PROCESSORS),
    "standard(<2 weights>)": standard(STATE),
    "transfer_learning(<2 weights>)": transfer_learning(STATE),
    "warm_start(<2 weights>)": warm_start(STATE),
    "on_weights(first)": on_weights(first),
    "compose(include('a.weight'), drop_optimizer)": compose(include("a.weight"), drop_optimizer),
}


@pytest.mark.parametrize("text", STEPS)
def test_a_strategy_is_pickled_as_what_it_is(text: str) -> None:
    strategy = STEPS[text]
    again = pickle.loads(pickle.dumps(strategy))
    assert_same(again(CHECKPOINT), strategy(CHECKPOINT))
    assert repr(again) == repr(strategy)
    assert repr(compose(strategy, load)) == f"compose({text}, load)"


def test_every_strategy_is_among_these() -> None:
    others = {"compose", "pipe", "freeze", "unfreeze", "variables", "anemoi_layout"}
    others |= {"migrate"}  # which refuses a checkpoint that is not Anemoi's: see test_migrating.py
    names = {text.partition("(")[0] for text in STEPS}
    assert set(strategies.__all__) - others == names - {"compose"}


def test_a_decorated_function_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert decorated.__name__ == "decorated"
    assert decorated.__doc__ == "Another one."


def test_what_has_no_short_text_is_shown_by_its_kind() -> None:
    assert repr(filter_shapes(torch.nn.Linear(2, 1))) == "filter_shapes(<Linear>)"
    assert repr(take("a", 0, list(range(100)))) == "take('a', 0, <list>)"
    assert repr(rename("a", lambda match: "b")) == "rename('a', <lambda>)"
    patient = functools.partial(load, retries=9)
    assert repr(compose(weights, patient)) == "compose(weights, partial(load, retries=9))"


def test_a_pool_of_processes_loads_with_strategies(tmp_path: Path) -> None:
    torch.save(CHECKPOINT["state_dict"], tmp_path / "a.ckpt")
    half = compose(cast(torch.float16), include("a.weight"), load)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        (result,) = pool.map(half, [str(tmp_path / "a.ckpt")])
    assert_same(result, {"a.weight": STATE["a.weight"].half()})


def test_functions_before_load_are_given_no_strategies(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": STATE, "epoch": 3}, path)
    assert_same(pipe(path, str, load, weights), STATE)
    assert_same(pipe(path, str, str.strip, load, weights), STATE)
    assert_same(compose(weights, load, str)(path), STATE)


def test_callables_that_cannot_be_hashed_are_composed() -> None:
    @dataclass
    class Keep:
        key: str

        def __call__(self, checkpoint: Any) -> Any:
            return checkpoint[self.key]

    assert compose(len, Keep("a"))({"a": [1, 2]}) == 2


def test_a_composition_has_a_name_that_wraps_copies() -> None:
    composed = compose(weights, load)

    @functools.wraps(composed)
    def wrapper() -> None: ...

    assert wrapper.__name__ == "compose"
    assert pickle.loads(pickle.dumps(composed)).parts == (weights, load)


def test_a_wrapper_of_load_is_not_handed_strategies(tmp_path: Path) -> None:
    """functools.wraps copies a function's attributes; whether it takes strategies is none."""
    torch.save(STATE, tmp_path / "a.ckpt")

    @functools.wraps(load)
    def mine(uri: Path) -> Any:
        return load(uri)

    assert_same(compose(first, mine)(tmp_path / "a.ckpt"), first(STATE))


def test_a_wrapper_of_an_alignment_is_a_function_like_any_other() -> None:
    """What it aligns is not told twice, or of another checkpoint: load_into sees a function."""
    align = align_variables({"t": 0, "z": 1}, {"z": 0, "t": 1}, {"bias": {0: ["all"]}}, new="zeros")
    model = torch.nn.Linear(1, 2)
    checkpoint = {"bias": torch.tensor([1.0, 2.0])}

    @functools.wraps(align)
    def twice(given: Any) -> Any:
        return align(given)

    assert load_into(model, checkpoint, align).aligned == ("bias",)
    assert load_into(model, checkpoint, twice).aligned == ()
    assert model.bias.tolist() == [2.0, 1.0]
