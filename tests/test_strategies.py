"""The vocabulary of strategies: what each does, and the laws that all of them keep."""

import copy
import doctest
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import needs
import servers
import strategies
from anemoi_ckpt import MismatchError, load, load_into
from checkpoints import as_bytes, assert_same, lightning_checkpoint, odd_checkpoint, quiet_trainer
from strategies import (
    Strategy,
    add_prefix,
    align_variables,
    average,
    cast,
    cold_start,
    compose,
    drop,
    drop_optimizer,
    exclude,
    filter_shapes,
    freeze,
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
    transfer_learning,
    unfreeze,
    variables,
    warm_start,
    weights,
    weights_only,
)

few = settings(max_examples=25)

# ── checkpoints to put through them ───────────────────────────────────────────────────────────

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    # torch 2.2 cannot index it
    torch.float8_e4m3fn if torch.__version__ >= (2, 3) else torch.float16,
    torch.complex64,
    torch.int64,
    torch.bool,
]
NAMES = [
    f"{front}{module}.{entry}"
    for front in ("", "model.", "module.part.")
    for module in ("encoder", "processor.0", "processor.1", "pre_processors.data")
    for entry in ("weight", "bias", "mean")
]


@st.composite
def state_dicts(draw: Callable[..., Any]) -> OrderedDict[str, Any]:
    """State dicts as modules give them: tied, viewed, with Parameters and a `_metadata`."""
    made: OrderedDict[str, Any] = OrderedDict()
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True)):
        shape = draw(st.sampled_from([(), (0,), (5,), (4, 3), (2, 3, 4)]))
        tensor = _numbers(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
        earlier = [each for each in made.values() if isinstance(each, Tensor)]
        kind = draw(st.sampled_from(["plain", "parameter", "tied", "alias", "view", "other"]))
        if kind == "parameter" and (tensor.is_floating_point() or tensor.is_complex()):
            tensor = nn.Parameter(tensor, requires_grad=draw(st.booleans()))
        elif kind == "tied" and earlier:
            tensor = draw(st.sampled_from(earlier))
        elif kind == "alias" and earlier:
            tensor = draw(st.sampled_from(earlier)).detach()
        elif kind == "view" and tensor.dim() > 1:
            tensor = tensor[1:].mT
        if kind == "other" and earlier:
            made[name.rpartition(".")[0] + "._extra_state"] = "anything"
        else:
            made[name] = tensor
    paths = {name.rpartition(".")[0] for name in made}
    vars(made)["_metadata"] = OrderedDict({path: {"version": 2} for path in ("", *sorted(paths))})
    return made


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 7 + start).reshape(shape).to(dtype)


def stored(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint around a state dict, as Lightning and Anemoi write it."""
    return {
        "epoch": 3,
        "global_step": 70,
        "loops": {"fit_loop": {}},
        "callbacks": {"EMA": {"decay": 0.9}, "none": None},
        "state_dict": state_dict,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "lr_schedulers": [{}],
        "ema": {k: v.detach().clone() for k, v in state_dict.items() if isinstance(v, Tensor)},
        "hyper_parameters": {"data_indices": {"data": {"name_to_index": {"2t": 0, "msl": 1}}}},
    }


def hollow(value: Any) -> Any:
    """A deep copy with its tensors on the meta device, sharing what they share."""
    storages: dict[int, Tensor] = {}
    tensors: dict[int, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in tensors:
                tensors[id(value)] = meta(value)
            return tensors[id(value)]
        if isinstance(value, dict):
            made = copy.copy(value)
            made.update({key: walk(each) for key, each in value.items()})
            return made
        return [walk(each) for each in value] if isinstance(value, list) else value

    def meta(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        base = storages.setdefault(
            storage._cdata, torch.empty(size, dtype=tensor.dtype, device="meta")
        )
        made = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made

    return walk(value)


def skeleton(value: Any) -> Any:
    """All of a checkpoint but values: keys, types, shapes, dtypes, and what is tied to what."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = seen.setdefault(id(value), len(seen))
            return type(value), value.shape, value.dtype, value.requires_grad, place
        if isinstance(value, dict):
            attributes = getattr(value, "__dict__", {})
            return type(value), [(k, walk(v)) for k, v in value.items()], attributes
        return [walk(each) for each in value] if isinstance(value, list) else value

    return walk(value)


def larger(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict: some of the same names, some of them in other shapes."""
    made = {}
    for place, (name, value) in enumerate(state_dict.items()):
        sized = isinstance(value, Tensor) and value.dim() and value.dtype != torch.bool
        shape = [size + place % 3 - 1 if size > 1 else 2 for size in value.shape] if sized else []
        made[name] = torch.full(shape, 9.0) if sized else value
    return made | {"head.weight": torch.ones(2)}


def first_rows(state_dict: Mapping[str, Any]) -> Strategy:
    """The first row of the first tensor that has one, or nothing to do."""
    sized = [n for n, v in state_dict.items() if isinstance(v, Tensor) and v.dim() and v.numel()]
    return take(sized[0], 0, [0]) if sized else compose()


def aligned(state_dict: Mapping[str, Any]) -> Strategy:
    """Other variables, along the first axis of all that are long enough for two."""
    long = {n: v for n, v in state_dict.items() if isinstance(v, Tensor) and v.dim() and len(v) > 1}
    layout = {name: {0: ["all", len(tensor) - 2]} for name, tensor in long.items()}
    target = {"msl": 0, "q": 1, "2t": 2}
    return align_variables(target=target, layout=layout, new="zeros") if layout else compose()


# ── all that ship ─────────────────────────────────────────────────────────────────────────────

ON_WEIGHTS: dict[str, Callable[[Mapping[str, Any]], Strategy]] = {
    "on_weights": lambda _s: on_weights(lambda s: dict(list(s.items())[:2])),
    "include": lambda s: include(next(iter(s))),
    "include a module": lambda _s: include("encoder", "*.encoder", missing_ok=True),
    "exclude": lambda s: exclude(next(iter(s))),
    "filter_shapes": lambda s: filter_shapes(larger(s)),
    "require_match": require_match,
    "pad_or_slice": lambda s: pad_or_slice(larger(s)),
    "pad with zeros": lambda s: pad_or_slice(larger(s), fill="zeros"),
    "take": first_rows,
    "strip_prefix": lambda _s: strip_prefix("module."),
    "add_prefix": lambda _s: add_prefix("net."),
    "rename": lambda _s: rename(r"processor\.(\d+)", r"layers.\1"),
    "cast": lambda _s: cast(torch.float16),
    "cast all": lambda _s: cast(torch.complex64, only_floating=False),
    "average": lambda s: average(s, stored(s)),
    "merge": lambda s: merge({"decoder.weight": torch.ones(2), **s}, clash="last"),
    "refresh_processors": lambda _s: refresh_processors(
        {
            "pre_processors.data.mean": torch.ones(2),
            "pre_processors_tendencies.a.mean": torch.ones(1),
        },
        states=True,
    ),
}
ON_CHECKPOINTS: dict[str, Callable[[Mapping[str, Any]], Strategy]] = {
    "align_variables": aligned,
    "weights": lambda _s: weights,
    "weights_only": lambda _s: weights_only,
    "drop_optimizer": lambda _s: drop_optimizer,
    "drop": lambda _s: drop("epoch", missing_ok=True),
    "prefer_ema": lambda _s: prefer_ema,
    "reset_progress": lambda _s: reset_progress,
    "cold_start": lambda _s: cold_start,
    "keep_progress": lambda _s: keep_progress,
    "require_variables": lambda _s: require_variables({"2t": 0, "msl": 1}),
    "variables": lambda _s: variables,
    "standard": standard,
    "warm_start": warm_start,
    "transfer_learning": lambda s: transfer_learning(larger(s)),
}
ALL = ON_WEIGHTS | ON_CHECKPOINTS
IDEMPOTENT = ALL.keys() - {  # an average moves on, and what was excluded is not there any more
    "add_prefix",
    "exclude",
    "variables",
    "average",
}


@pytest.mark.parametrize("name", ALL)
@few
@given(state_dict=state_dicts())
def test_none_changes_what_it_is_given(name: str, state_dict: Any) -> None:
    checkpoint = stored(state_dict)
    before = as_bytes(checkpoint)
    ALL[name](state_dict)(checkpoint)
    assert as_bytes(checkpoint) == before


@pytest.mark.parametrize("name", ALL)
@few
@given(state_dict=state_dicts())
def test_hollow_and_full_give_the_same_but_values(name: str, state_dict: Any) -> None:
    checkpoint, strategy = stored(state_dict), ALL[name](state_dict)
    assert skeleton(strategy(checkpoint)) == skeleton(strategy(hollow(checkpoint)))


@pytest.mark.parametrize("name", ALL)
@few
@given(state_dict=state_dicts())
def test_fused_with_load(name: str, tmp_path: Path, state_dict: Any) -> None:
    torch.save(stored(state_dict), tmp_path / "a.ckpt")
    strategy = ALL[name](state_dict)
    assert_same(load(tmp_path / "a.ckpt", strategy), strategy(load(tmp_path / "a.ckpt")))


@pytest.mark.parametrize("name", sorted(IDEMPOTENT))
@few
@given(state_dict=state_dicts())
def test_twice_is_once(name: str, state_dict: Any) -> None:
    strategy = ALL[name](state_dict)
    once = strategy(stored(state_dict))
    assert_same(strategy(once), once)


SIZE = 100_000
LAYERS = {f"layer.{place}.weight": torch.full((SIZE,), float(place)) for place in range(20)}


@pytest.mark.parametrize(
    ("strategy", "needed"),
    [
        (weights, 20),
        (weights_only, 20),
        (drop_optimizer, 40),  # the averaged weights stay
        (drop("state_dict", "optimizer_states"), 20),
        (include("layer.1"), 1 + 20 + 40),
        (exclude("layer.1*"), 9 + 20 + 40),  # 1 and 10 to 19
        (compose(weights, include("layer.?.weight")), 10),
        (compose(weights, prefer_ema), 20),
        (compose(weights, filter_shapes({"layer.3.weight": torch.ones(SIZE)})), 1),
        (compose(weights, rename("layer", "block"), include("layer.1", "layer.2")), 2),
        (compose(cast(torch.float16), include("layer.1"), weights), 1),
        (compose(take("layer.1", 0, [0]), include("layer.1"), weights), 1),
        (compose(pad_or_slice({"layer.1.weight": torch.ones(3)}), include("layer.1"), weights), 1),
        (compose(merge({"head": torch.ones(1)}), include("layer.1"), weights), 1),
        (compose(average({"layer.1.weight": torch.ones(SIZE)}), include("layer.1"), weights), 1),
        (compose(drop("ema"), cold_start), 20),
        (compose(drop("ema"), transfer_learning({"layer.1.weight": torch.ones(SIZE)})), 1),
        (compose(drop("ema"), drop_optimizer, standard(LAYERS)), 20),
        (warm_start(LAYERS), 80),
    ],
)
def test_only_what_survives_is_moved(
    strategy: Strategy, needed: int, http_server: servers.HTTPServer
) -> None:
    ema = {name: tensor + 1 for name, tensor in LAYERS.items()}
    moments = {n: {"exp_avg": t + 2, "exp_avg_sq": t + 3} for n, t in LAYERS.items()}
    checkpoint = {"epoch": 3, "state_dict": LAYERS, "ema": ema, "optimizer_states": [moments]}
    uri = http_server.put("all.ckpt", as_bytes(checkpoint))
    assert_same(load(uri, strategy), strategy(checkpoint))
    assert http_server.bytes_sent <= needed * SIZE * 4 * 1.02 + 1024**2


@pytest.mark.parametrize("name", ON_WEIGHTS)
@few
@given(state_dict=state_dicts())
def test_on_a_bare_state_dict_as_inside_a_checkpoint(name: str, state_dict: Any) -> None:
    strategy, checkpoint = ON_WEIGHTS[name](state_dict), stored(state_dict)
    result = strategy(checkpoint)
    assert_same(result["state_dict"], strategy(state_dict))
    assert list(result) == list(checkpoint)
    assert all(result[key] is checkpoint[key] for key in result if key != "state_dict")


@pytest.mark.parametrize("name", sorted(ON_WEIGHTS.keys() - {"on_weights"}))
@few
@given(state_dict=state_dicts())
def test_the_state_dict_keeps_its_order_type_and_metadata(name: str, state_dict: Any) -> None:
    result: Any = ON_WEIGHTS[name](state_dict)(state_dict)
    assert type(result) is OrderedDict
    assert isinstance(result._metadata, OrderedDict)
    old = [key for key in result if key in state_dict]
    assert old == [key for key in state_dict if key in old]


@pytest.mark.parametrize(
    "strategy",
    [
        take("*", 0, [1, 0]),
        cast(torch.float64),
        pad_or_slice({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}, fill="zeros"),
        average(dict.fromkeys("ab", torch.ones(2, 2))),
        rename("^", "x."),
        include("*"),
        prefer_ema,
    ],
)
def test_tied_stays_tied(strategy: Strategy) -> None:
    tied = torch.ones(2, 2)
    for entries in ({"a": tied, "b": tied}, {"a": tied, "b": tied.detach()}):
        one, other = weights(strategy({"state_dict": entries, "ema": entries})).values()
        assert one.data_ptr() == other.data_ptr()
        assert (one is other) or entries["a"] is not entries["b"]


def test_tied_to_a_parameter_shares_its_new_memory() -> None:
    parameter = nn.Parameter(torch.ones(2))
    made = cast(torch.float64)({"a": parameter, "b": parameter, "c": parameter.detach()})
    assert made["a"] is made["b"]
    assert isinstance(made["a"], nn.Parameter)
    assert made["a"].requires_grad
    assert not isinstance(made["c"], nn.Parameter)
    assert made["a"].data_ptr() == made["c"].data_ptr()


def test_what_requires_a_gradient_still_does_where_it_can() -> None:
    needs = torch.ones(2, requires_grad=True)
    assert cast(torch.float64)({"a": needs})["a"].requires_grad
    assert cast(torch.float64)({"a": needs})["a"].is_leaf
    whole = cast(torch.int64, lossy=True)({"a": nn.Parameter(torch.ones(2))})["a"]
    assert isinstance(whole, nn.Parameter)
    assert not whole.requires_grad


@pytest.mark.parametrize(
    "strategy",
    [
        cast(torch.bfloat16),
        cast(torch.complex64, only_floating=False),
        average(odd_checkpoint(), odd_checkpoint()),
        pad_or_slice(dict.fromkeys(odd_checkpoint()["state_dict"], torch.ones(3, 4))),
        compose(include("*"), rename("e", "E")),
        merge(odd_checkpoint(), clash="last"),
    ],
)
def test_awkward_tensors_pass_through(strategy: Strategy, tmp_path: Path) -> None:
    checkpoint = odd_checkpoint()
    before = as_bytes(checkpoint)
    (tmp_path / "odd.ckpt").write_bytes(before)
    result = strategy(load(tmp_path / "odd.ckpt"))
    assert len(weights(result)) == len(checkpoint["state_dict"])
    assert_same(load(tmp_path / "odd.ckpt", strategy), result)
    strategy(checkpoint)
    assert as_bytes(checkpoint) == before


def test_every_name_has_an_example_and_names_its_siblings() -> None:
    result = doctest.testmod(strategies)
    assert result.failed == 0
    for name in strategies.__all__:
        text = getattr(strategies, name).__doc__
        assert ">>> " in text, name
        siblings = text.split("See Also: ")[1].split("\n")[0].split(", ")
        assert set(siblings) <= set(strategies.__all__) - {name}, name


# ── compose ───────────────────────────────────────────────────────────────────────────────────


def test_compose_goes_from_right_to_left_and_pipe_from_left_to_right() -> None:
    assert compose(lambda x: x + 1, lambda x: x * 10)(1) == 11
    assert pipe(1, lambda x: x + 1, lambda x: x * 10) == 20
    assert compose()(5) == 5
    assert compose(compose(lambda x: x + 1), lambda x: x * 10)(1) == 11


def test_compose_takes_functions() -> None:
    with pytest.raises(TypeError, match="compose takes functions: 'weights' is text"):
        compose("weights")  # type: ignore[arg-type] # a wrong argument is the case


def test_compose_hands_load_its_strategies(tmp_path: Path) -> None:
    torch.save(stored({"a": torch.ones(2)}), tmp_path / "a.ckpt")
    said = compose(list, weights, load)(tmp_path / "a.ckpt")
    assert said == ["a"]


def test_on_weights_takes_a_function() -> None:
    with pytest.raises(TypeError, match="on_weights takes functions: 3 is not a function"):
        on_weights(3)  # type: ignore[arg-type] # a wrong argument is the case


def test_on_weights_copies_only_the_dicts_on_the_way() -> None:
    inner = {"model": {"a": torch.ones(1)}, "other": [1]}
    made = on_weights(dict)({"state_dict": inner, "epoch": 3})
    assert made["state_dict"] is not inner
    assert made["state_dict"]["other"] is inner["other"]
    assert list(made) == ["state_dict", "epoch"]


def test_on_weights_of_a_module_puts_its_state_dict_there() -> None:
    made = on_weights(list)({"model": nn.Linear(1, 1), "epoch": 3})
    assert made == {"model": ["weight", "bias"], "epoch": 3}


# ── choose ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"a": torch.ones(1)},
        {"state_dict": {"a": torch.ones(1)}, "model": {"b": torch.ones(1)}},
        {"model_state_dict": {"a": torch.ones(1)}, "epoch": 3},
        {"model": {"state_dict": {"a": torch.ones(1)}}},
        {"module": {"a": torch.ones(1)}},
        {"state_dict": {}, "model": {"a": torch.ones(1)}},
        {"model": "unet", "module": {"a": torch.ones(1)}},
    ],
)
def test_weights_are_found_wherever_they_are(checkpoint: dict[str, Any]) -> None:
    assert weights(checkpoint) == {"a": torch.ones(1)}


def test_an_empty_state_dict_is_one() -> None:
    assert weights({"state_dict": {}, "epoch": 3}) == {}
    assert include("*", missing_ok=True)({"state_dict": {}}) == {"state_dict": {}}


def test_no_weights_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"state_dict, model_state_dict, .* in epoch, config"):
        weights({"epoch": 3, "config": {}})
    with pytest.raises(ValueError, match="in list"):
        weights([1])


def test_a_bare_state_dict_keeps_its_buffers_named_like_an_optimizer() -> None:
    bare = {"scaler": torch.ones(1), "step": torch.ones(1), "loops": torch.ones(1)}
    assert drop_optimizer(bare) == bare
    assert reset_progress(bare) == bare


def test_a_checkpoint_that_is_no_dict_is_a_type_error() -> None:
    for strategy in (drop_optimizer, drop("epoch"), prefer_ema, reset_progress, keep_progress):
        with pytest.raises(TypeError, match="takes a checkpoint that is a dict, not Linear"):
            strategy(nn.Linear(1, 1))  # type: ignore[arg-type] # a wrong argument is the case


def test_any_mapping_will_do() -> None:
    made = include("a")(MappingProxyType({"a": torch.ones(1), "b": torch.ones(1)}))
    assert made == {"a": torch.ones(1)}


def test_drop_takes_keys_that_are_there() -> None:
    assert drop("a", "b")({"a": 1, "b": 2, "c": 3}) == {"c": 3}
    assert drop("z", missing_ok=True)({"c": 3}) == {"c": 3}
    with pytest.raises(ValueError, match="cannot drop y, z; its keys are: c, d"):
        drop("y", "z")({"c": 3, "d": 4})


def test_a_glob_takes_a_name_or_all_under_it_and_not_what_is_nested_elsewhere() -> None:
    names = ["encoder.a", "encoder.b.c", "encoder_2.a", "model.encoder.a"]
    state_dict = {name: torch.ones(1) for name in names}
    assert list(include("encoder")(state_dict)) == names[:2]
    assert list(include("encoder.b")(state_dict)) == names[1:2]
    assert list(include("model.encoder", "encoder.a")(state_dict)) == [names[0], names[3]]
    assert list(include("encoder*")(state_dict)) == names[:3]
    assert list(include("*.a")(state_dict)) == [names[0], names[2], names[3]]
    assert list(include("[em]*.a")(state_dict)) == [names[0], names[2], names[3]]
    assert list(exclude("*.encoder", "*.c")(state_dict)) == [names[0], names[2]]


@pytest.mark.parametrize("factory", [include, exclude])
def test_a_glob_that_chooses_nothing_is_an_error(factory: Callable[..., Strategy]) -> None:
    state_dict = {"model.encoder.weight": torch.ones(1), "model.head": torch.ones(1)}
    with pytest.raises(ValueError, match=r"'encoder' chooses nothing, though '\*.encoder' would"):
        factory("encoder")(state_dict)
    with pytest.raises(ValueError, match=r"chooses nothing, though 'model.encoder' would; there"):
        factory("model", "model.encodr")(state_dict)
    with pytest.raises(
        ValueError, match=r"'zzz' chooses nothing; there are: model.encoder.weight, model.head$"
    ):
        factory("zzz")(state_dict)
    assert len(factory("zzz", "model", missing_ok=True)(state_dict)) in (0, 2)


def test_long_lists_are_cut() -> None:
    state_dict = {f"layer{place}": torch.ones(1) for place in range(50)}
    with pytest.raises(ValueError, match=r"layer0, .*, layer19, \.\.\. and 30 more$"):
        include("zzz")(state_dict)


def test_keys_that_are_no_text_are_chosen_by_no_glob_and_keep_their_names() -> None:
    one, other, named = torch.ones(1), torch.ones(2), torch.ones(3)
    held = {0: one, ("a", 1): other, "m.w": named}
    assert include("m")(held) == {"m.w": named}
    assert exclude("m")(held) == {0: one, ("a", 1): other}
    assert strip_prefix("m.")(held) == {0: one, ("a", 1): other, "w": named}
    assert add_prefix("m.")(held) == {0: one, ("a", 1): other, "m.m.w": named}
    assert rename("w", "v")(held) == {0: one, ("a", 1): other, "m.v": named}
    with pytest.raises(ValueError, match="chooses nothing"):
        include("0")(held)
    model = nn.Linear(2, 2)
    report = load_into(model, {"state_dict": {**model.state_dict(), **held}})
    assert report.unexpected == (0, ("a", 1), "m.w")
    assert "('a', 1)" in str(report)


@pytest.mark.parametrize("factory", [include, exclude, drop])
def test_globs_are_checked_at_once(factory: Callable[..., Strategy]) -> None:
    with pytest.raises(ValueError, match=f"{factory.__name__} needs at least one name or glob"):
        factory()
    with pytest.raises(TypeError, match=f"{factory.__name__} takes text, not 3"):
        factory("a", 3)


@pytest.mark.parametrize("key", ["ema", "ema_state_dict", "model_ema", "state_dict_ema"])
def test_averaged_weights_beside_the_weights(key: str) -> None:
    checkpoint = {"model": {"a": torch.ones(1), "b": torch.tensor(3)}, key: {"a": torch.zeros(1)}}
    assert prefer_ema(checkpoint)["model"] == {"a": torch.zeros(1), "b": torch.tensor(3)}


def test_averaged_weights_in_a_callback() -> None:
    swa = {"average_model_state": {"a": torch.zeros(1)}}  # Lightning's StochasticWeightAveraging
    checkpoint = {"state_dict": {"a": torch.ones(1)}, "callbacks": {"x": 1, "SWA": swa}}
    assert prefer_ema(checkpoint)["state_dict"] == {"a": torch.zeros(1)}
    assert prefer_ema(checkpoint)["callbacks"]["SWA"] is swa


def test_averaged_weights_as_torch_keeps_them() -> None:
    model = nn.Linear(1, 1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for held in (averaged, averaged.state_dict()):
        made = prefer_ema({"state_dict": model.state_dict(), "ema": held})
        assert list(made["state_dict"]) == ["weight", "bias"]
        assert made["state_dict"]["weight"].data_ptr() == averaged.module.weight.data_ptr()


def test_averaged_weights_alone() -> None:
    made = prefer_ema({"ema": {"a": torch.ones(1)}})
    assert made["state_dict"] == {"a": torch.ones(1)}


def test_no_averaged_weights_is_an_error() -> None:
    callbacks = {"SWA": {}, "EMA": {"ema": {"n_averaged": torch.tensor(0)}}}
    checkpoint = {"state_dict": {"a": torch.ones(1)}, "ema": None, "callbacks": callbacks}
    with pytest.raises(
        ValueError, match=r"no averaged weights under .* are: state_dict, ema, call"
    ):
        prefer_ema(checkpoint)
    with pytest.raises(ValueError, match="not among the weights: b; the weights are: a"):
        prefer_ema(checkpoint | {"ema": {"b": torch.ones(1)}})


def test_lightnings_weight_averaging_needs_only_its_own_copy_dropped(tmp_path: Path) -> None:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            loss: Tensor = self.layer(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        averaging = EMAWeightAveraging(decay=0.5)
        trainer = quiet_trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[averaging])
        samples = torch.utils.data.TensorDataset(torch.ones(4, 2))
        net = Net()
        # saved before training ends, when the average takes the place of the weights
        net.on_train_epoch_end = lambda: trainer.save_checkpoint(tmp_path / "a.ckpt")  # type: ignore[method-assign] # a hook of this one module
        trainer.fit(net, torch.utils.data.DataLoader(samples, batch_size=2))
    checkpoint = load(tmp_path / "a.ckpt")
    assert {"current_model_state", "averaging_state"} <= checkpoint.keys()
    made = prefer_ema(checkpoint)
    assert checkpoint.keys() - made.keys() == {"current_model_state"}
    averaged = averaging._average_model
    assert averaged is not None
    assert torch.equal(made["state_dict"]["layer.weight"], averaged.module.layer.weight)


# ── fit ───────────────────────────────────────────────────────────────────────────────────────


def test_filter_shapes_keeps_what_fits() -> None:
    checkpoint = {"weight": torch.ones(3, 2), "bias": torch.ones(4), "other": torch.ones(1)}
    assert list(filter_shapes(nn.Linear(2, 3))(checkpoint)) == ["weight"]
    assert list(filter_shapes({"state_dict": {"bias": torch.ones(4)}})(checkpoint)) == ["bias"]


def test_a_hollow_model_has_shapes_too() -> None:
    model = nn.Linear(2, 3, device="meta")
    assert list(filter_shapes(model)({"weight": torch.ones(3, 2)})) == ["weight"]


def test_require_finite_names_what_is_not(tmp_path: Path) -> None:
    odd = {
        "nan": torch.tensor([1.0, float("nan")]),
        "inf": torch.tensor(float("-inf"), dtype=torch.bfloat16),
        "eight": torch.tensor([float("nan")]).to(torch.float8_e5m2),
        "sparse": torch.tensor([[0.0, float("inf")]]).to_sparse(),
        "complex": torch.tensor([complex(1, float("nan"))]),
    }
    good = {"a": torch.ones(3), "n": torch.arange(3), "flag": torch.tensor(True)}
    path = tmp_path / "a.ckpt"
    for name, wrong in odd.items():
        torch.save({"state_dict": {**good, name: wrong}, "epoch": 1}, path)
        with pytest.raises(MismatchError, match=f"infinity in {name};"):
            load(path, require_finite)
    torch.save({"state_dict": good, "epoch": 1}, path)
    assert_same(load(path, require_finite), {"state_dict": good, "epoch": 1})


def test_require_match_tells_all_at_once() -> None:
    model = {"a": torch.ones(2, 3), "b": torch.ones(1), "c": torch.ones(1), "e": "no tensor"}
    checkpoint = {"state_dict": {"a": torch.ones(2, 4), "d": torch.ones(1), "e": torch.ones(())}}
    with pytest.raises(ValueError, match="do not match") as caught:
        require_match(model)(checkpoint)
    assert str(caught.value) == (
        "the checkpoint: the weights do not match the model\n"
        "  missing, in the model only (2): b, c\n"
        "  unexpected, not in the model (1): d\n"
        "  mismatched (2): a is (2, 4), the model's is (2, 3), e is (), the model's is not a tensor"
        "\n  filter_shapes leaves out what differs, pad_or_slice resizes it"
    )
    with pytest.raises(ValueError, match=r"model\n  mismatched \(2\): a is"):
        require_match(model, missing=False, unexpected=False)(checkpoint)


def test_require_match_gives_back_what_matches() -> None:
    checkpoint = {"state_dict": nn.Linear(2, 3).state_dict()}
    assert_same(require_match(nn.Linear(2, 3))(checkpoint), checkpoint)


def test_extra_state_has_any_shape() -> None:
    model = {"a._extra_state": torch.ones(3), "b._extra_state": {}}
    held = {"a._extra_state": torch.ones(7), "b._extra_state": torch.ones(1)}
    assert require_match(model)(held) == held
    assert list(filter_shapes(model)(held)) == list(held)
    assert pad_or_slice({"a._extra_state": torch.ones(3)})(held) == held
    assert average({"a._extra_state": torch.ones(3), "b._extra_state": {}})(held) == held


def test_pad_or_slice_keeps_what_both_have() -> None:
    held = {"state_dict": {"a": torch.arange(6).reshape(2, 3).bfloat16(), "b": torch.ones(2)}}
    model = {"a": torch.full((3, 2), 9.0), "b": torch.zeros(2)}
    made = weights(pad_or_slice(model)(held))
    assert made["a"].tolist() == [[0, 1], [3, 4], [9, 9]]
    assert made["a"].dtype == torch.bfloat16
    assert made["b"] is held["state_dict"]["b"]
    zeros = weights(pad_or_slice(model, fill="zeros")(held))
    assert zeros["a"].tolist() == [[0, 1], [3, 4], [0, 0]]
    assert model["a"].tolist() == [[9, 9]] * 3


@few
@given(state_dict=state_dicts())
def test_pad_or_slice_gives_the_models_shapes(state_dict: Any) -> None:
    model = larger(state_dict)
    made = pad_or_slice(model)(state_dict)
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and value.dim() == model[name].dim():
            assert made[name].shape == model[name].shape
            both = tuple(map(slice, map(min, value.shape, model[name].shape)))
            assert torch.equal(made[name][both].cdouble(), value[both].cdouble())


def test_pad_or_slice_leaves_what_cannot_fit() -> None:
    held = {"a": torch.ones(2), "b": torch.eye(2).to_sparse(), "c": torch.ones(1)}
    model = {"a": torch.ones(2, 2), "b": torch.ones(3, 3), "c": torch.eye(2).to_sparse()}
    assert all(made is held[name] for name, made in pad_or_slice(model)(held).items())


def test_tied_here_and_not_in_the_model_is_filled_twice() -> None:
    tied = torch.ones(1)
    made = pad_or_slice({"a": torch.zeros(2), "b": torch.full((2,), 5.0)})({"a": tied, "b": tied})
    assert (made["a"].tolist(), made["b"].tolist()) == ([1, 0], [1, 5])


def test_pad_or_slice_fills_a_hollow_model_with_zeros_only() -> None:
    model = nn.Linear(2, 1, device="meta")
    assert pad_or_slice(model, fill="zeros")({"bias": torch.ones(2)})["bias"].tolist() == [1]
    with pytest.raises(ValueError, match="from a model on the meta device; use fill='zeros'"):
        pad_or_slice(model)
    with pytest.raises(ValueError, match="fills from 'model' or with 'zeros', not 'noise'"):
        pad_or_slice(model, fill="noise")  # type: ignore[arg-type] # a wrong argument is the case


@pytest.mark.parametrize(
    "factory", [filter_shapes, require_match, pad_or_slice, refresh_processors]
)
def test_models_are_checked_at_once(factory: Callable[..., Strategy]) -> None:
    with pytest.raises(
        TypeError, match=f"{factory.__name__} takes a module or a state dict, not 3"
    ):
        factory(3)
    with pytest.raises(ValueError, match="no state dict"):
        factory({"epoch": 3})


def test_take_reorders_and_selects() -> None:
    held = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)}
    made = take("encoder", 1, [2, 0])(held)
    assert made["encoder.weight"].tolist() == [[2, 0], [5, 3]]
    assert made["bias"] is held["bias"]
    assert take("encoder", -1, torch.tensor([-1]))(held)["encoder.weight"].tolist() == [[2], [5]]
    assert take("encoder", 0, range(0))(held)["encoder.weight"].shape == (0, 3)
    assert take("encoder", 0, torch.tensor(1))(held)["encoder.weight"].tolist() == [[3, 4, 5]]


@few
@given(order=st.permutations(range(5)), dim=st.sampled_from([0, 1, -1]))
def test_take_is_undone_by_the_order_back(order: list[int], dim: int) -> None:
    held = {"a": torch.arange(25.0).reshape(5, 5)}
    back = [order.index(place) for place in range(5)]
    there = take("a", dim, order)(held)
    assert torch.equal(take("a", dim, back)(there)["a"], held["a"])
    assert skeleton(there) == skeleton(take("a", dim, order)(hollow(held)))


def test_take_names_what_has_no_such_place() -> None:
    held = {"encoder": torch.ones(2, 3), "scalar": torch.ones(())}
    with pytest.raises(
        ValueError, match=r"cannot take 3, -4 along dim 1 of encoder; its shape is \(2, 3\)"
    ):
        take("encoder", 1, [0, 3, -4])(held)
    with pytest.raises(ValueError, match=r"cannot take along dim 2 of encoder; .* \(2, 3\)"):
        take("encoder", 2, [0])(held)
    with pytest.raises(ValueError, match=r"cannot take along dim 0 of scalar; .* \(\)"):
        take("scalar", 0, [])(held)
    with pytest.raises(ValueError, match=r"cannot take along dim -3 of encoder"):
        take("encoder", -3, [])(held)
    with pytest.raises(ValueError, match="'decoder' chooses nothing"):
        take("decoder", 0, [0])(held)


@pytest.mark.parametrize(("dim", "index"), [(0, [1.5]), ("0", [1]), (0, [True]), (0, None)])
def test_take_needs_integers(dim: Any, index: Any) -> None:
    with pytest.raises(TypeError, match="take needs an integer for dim and for every index, not"):
        take("a", dim, index)


# ── rename ────────────────────────────────────────────────────────────────────────────────────


@few
@given(
    state_dict=state_dicts(), prefix=st.sampled_from(["model.", "module.", "_orig_mod.", "a.b."])
)
def test_a_prefix_added_and_stripped_leaves_nothing_behind(state_dict: Any, prefix: str) -> None:
    added = add_prefix(prefix)(state_dict)
    assert list(added) == [prefix + name for name in state_dict]
    assert all(added[prefix + name] is value for name, value in state_dict.items())
    assert_same(strip_prefix(prefix)(added), state_dict)


def test_renamed_batch_norm_keeps_its_version() -> None:
    model = nn.Sequential(OrderedDict(model=nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))))
    made: Any = strip_prefix("model.")(model.state_dict())
    assert made._metadata == model.model.state_dict()._metadata
    assert add_prefix("model.")(made)._metadata["model.1"] == {"version": 2}


def test_torchs_own_prefixes() -> None:
    model = nn.Linear(1, 1)
    compiled = torch.compile(model).state_dict()
    assert_same(strip_prefix("_orig_mod.")(compiled).keys(), model.state_dict().keys())
    assert list(rename(r"_orig_mod\.", "")(compiled)) == ["weight", "bias"]
    parallel = nn.DataParallel(model).state_dict()
    assert list(strip_prefix("module.")(parallel)) == ["weight", "bias"]


def test_rename_as_re_sub() -> None:
    held = {"layers.0.a": torch.ones(1), "layers.1.a": torch.ones(1)}
    assert list(rename(r"layers\.(\d)", r"blocks.\1")(held)) == ["blocks.0.a", "blocks.1.a"]
    shifted = rename(r"\d", lambda match: str(int(match[0]) + 1))(held)
    assert list(shifted) == ["layers.1.a", "layers.2.a"]


def test_a_clash_names_both() -> None:
    held = {"a.x": torch.ones(1), "x": torch.ones(1), "b.x": torch.ones(1)}
    with pytest.raises(ValueError, match=r"names clash: a\.x and x both become x;"):
        strip_prefix("a.")(held)
    with pytest.raises(ValueError, match=r"a\.x and x both become x, x and b\.x both become x"):
        rename(r"^\w\.", "")(held)


@pytest.mark.parametrize("factory", [strip_prefix, add_prefix])
def test_a_prefix_ends_with_a_dot(factory: Callable[..., Strategy]) -> None:
    for prefix in ("model", ""):
        with pytest.raises(ValueError, match=f"a prefix that ends with a dot, not '{prefix}'"):
            factory(prefix)
    with pytest.raises(TypeError, match="takes text, not 3"):
        factory(3)


def test_rename_is_checked_at_once() -> None:
    for pattern, replacement in [("(", ""), ("a", r"\1"), ("a", r"\g<b>")]:
        with pytest.raises(ValueError, match="rename cannot replace"):
            rename(pattern, replacement)
    with pytest.raises(TypeError, match="rename takes text, not 3"):
        rename(3, "")  # type: ignore[arg-type] # a wrong argument is the case
    with pytest.raises(TypeError, match="text or a function to replace by, not 3"):
        rename("a", 3)  # type: ignore[arg-type] # a wrong argument is the case


# ── change values ─────────────────────────────────────────────────────────────────────────────


def test_cast_takes_floating_point_unless_asked() -> None:
    held = {"a": torch.tensor([1.5]), "b": torch.tensor([2]), "c": torch.tensor([1j])}
    made = cast(torch.bfloat16)(held)
    assert (made["a"].dtype, made["a"].item()) == (torch.bfloat16, 1.5)
    assert made["b"] is held["b"]
    assert made["c"] is held["c"]
    made = cast(torch.complex64, only_floating=False)(held)
    assert {value.dtype for value in made.values()} == {torch.complex64}
    assert cast(torch.float32)(held)["a"] is held["a"]


def test_cast_takes_globs() -> None:
    held = {"encoder.a": torch.ones(1), "decoder.a": torch.ones(1)}
    made = cast(torch.float16, "encoder")(held)
    assert [value.dtype for value in made.values()] == [torch.float16, torch.float32]
    with pytest.raises(ValueError, match="'head' chooses nothing"):
        cast(torch.float16, "head")(held)


def test_cast_is_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"that tensors can be cast to, not torch\.qint8"):
        cast(torch.qint8, lossy=True)
    with pytest.raises(TypeError, match=r"cast takes a torch.dtype, not 'bfloat16'"):
        cast("bfloat16")  # type: ignore[arg-type] # a wrong argument is the case
    with pytest.raises(TypeError, match="cast takes text, not 3"):
        cast(torch.float16, 3)  # type: ignore[arg-type] # a wrong argument is the case


def test_average_is_the_mean() -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(7), "z": torch.tensor([2j]), "t": "x"}
    second = {
        "a": torch.tensor([2.0, 2.0]),
        "n": torch.tensor(9),
        "z": torch.tensor([4j]),
        "t": "y",
    }
    third = {"state_dict": {**first, "a": torch.tensor([6.0, 2.0], dtype=torch.float64)}}
    made = average(second, third)(first)
    assert made["a"].tolist() == [3.0, 2.0]
    assert made["a"].dtype == torch.float32
    assert made["z"].tolist() == [pytest.approx(8j / 3)]
    assert (made["n"], made["t"]) == (7, "x")


def test_average_does_not_overflow_in_half_precision() -> None:
    big = {"a": torch.tensor([60000.0], dtype=torch.float16)}
    assert average(big, big)(big)["a"].tolist() == big["a"].tolist()


def test_average_needs_the_same_names_and_shapes() -> None:
    with pytest.raises(ValueError, match="at least one other checkpoint"):
        average()
    with pytest.raises(ValueError, match="no state dict"):
        average({"epoch": 3})
    one, two = {"a": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="do not match checkpoint 2 to average with") as caught:
        average(one, two)(one)
    assert "missing, in the other only (1): b" in str(caught.value)
    assert "mismatched (1): a is (1,), the other's is (2,)" in str(caught.value)


def test_merge_takes_each_from_its_own_place() -> None:
    made = merge({"state_dict": {"b": torch.zeros(1)}}, {"c": torch.ones(1)})({"a": torch.ones(2)})
    assert {name: value.tolist() for name, value in made.items()} == {
        "a": [1, 1],
        "b": [0],
        "c": [1],
    }


def test_merge_reports_clashes_and_lets_the_last_win() -> None:
    one, two = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.zeros(1)}
    with pytest.warns(
        UserWarning, match=r"names clash in merging \(1\), the last wins: a$"
    ) as told:
        assert merge(two)(one)["a"].item() == 0
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="names clash") as told:
        pipe(one, on_weights(merge(two)))
    assert {each.filename for each in told} == {__file__}
    assert merge(two, clash="last")(one)["a"].item() == 0
    assert merge(two, clash="first")(one)["a"].item() == 1
    with pytest.raises(ValueError, match=r"names clash in merging \(1\): a;"):
        merge(two, clash="error")(one)
    assert merge(one)(one) == one  # the very same tensors are no clash


def test_merge_keeps_the_versions_of_all_modules() -> None:
    one = add_prefix("encoder.")(nn.Linear(1, 1).state_dict())
    two = add_prefix("decoder.")(nn.BatchNorm1d(1).state_dict())
    assert merge(two)(one)._metadata == {"encoder": {"version": 1}, "decoder": {"version": 2}}


def test_merge_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="at least one other checkpoint"):
        merge()
    with pytest.raises(ValueError, match="clash='warn', 'last', 'first' or 'error', not 'both'"):
        merge({"a": torch.ones(1)}, clash="both")  # type: ignore[arg-type] # a wrong argument is the case


# ── progress ──────────────────────────────────────────────────────────────────────────────────


def test_reset_progress_of_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = load(lightning_checkpoint(tmp_path))
    made = reset_progress(checkpoint)
    gone = {"loops", "callbacks", "optimizer_states", "lr_schedulers"}
    assert checkpoint.keys() - made.keys() == gone
    assert (made["epoch"], made["global_step"]) == (0, 0)
    assert made["hyper_parameters"] == checkpoint["hyper_parameters"]
    assert keep_progress(checkpoint) is checkpoint


def test_keep_progress_needs_progress() -> None:
    with pytest.raises(ValueError, match="no epoch or step, no optimizer; its keys are: a"):
        keep_progress({"a": torch.ones(1)})
    with pytest.raises(ValueError, match="no optimizer; its keys are: model, step"):
        keep_progress({"model": {"a": torch.ones(1)}, "step": 3})


# ── Anemoi ────────────────────────────────────────────────────────────────────────────────────


def indexed(data_indices: Any) -> dict[str, Any]:
    return {"hyper_parameters": {"data_indices": data_indices}}


@pytest.mark.parametrize(
    "collection",
    [
        SimpleNamespace(name_to_index={"2t": 0}),
        SimpleNamespace(state={"name_to_index": {"2t": 0}}),  # a stand-in with its state as data
        {"name_to_index": {"2t": 0}},
    ],
)
def test_variables_by_dataset(collection: Any) -> None:
    assert variables(indexed(collection)) == {"data": {"2t": 0}}
    both = {"era5": collection, "cerra": collection}
    assert variables(indexed(both)) == {"era5": {"2t": 0}, "cerra": {"2t": 0}}


@pytest.mark.parametrize(
    "checkpoint",
    [{}, [], {"hyper_parameters": None}, indexed(None), indexed({}), indexed({"data": 3})],
)
def test_no_variables_is_an_error(checkpoint: Any) -> None:
    with pytest.raises(
        ValueError, match=r"no variables: neither hyper_parameters\['data_indices'\]"
    ):
        variables(checkpoint)


def test_variables_of_a_real_index_collection() -> None:
    collection = needs.package(
        "anemoi.models.data_indices.collection", "pip install -e '.[anemoi]'"
    )
    from omegaconf import OmegaConf

    config = OmegaConf.create({"forcing": ["z"], "diagnostic": [], "target": []})
    indices = collection.IndexCollection(config, {"2t": 1, "z": 0})
    checkpoint = indexed({"data": indices})
    assert variables(checkpoint) == {"data": {"z": 0, "2t": 1}}


def test_require_variables_says_which() -> None:
    checkpoint = indexed({"era5": {"name_to_index": {"2t": 0, "msl": 1, "tp": 2}}})
    assert require_variables({"era5": {"msl": 1, "tp": 2, "2t": 0}})(checkpoint) is checkpoint
    assert require_variables(checkpoint)(checkpoint) is checkpoint
    assert require_variables({"era5": {"name_to_index": {"2t": 0, "msl": 1, "tp": 2}}})(checkpoint)
    with pytest.raises(ValueError, match="not those wanted") as caught:
        require_variables({"era5": {"2t": 0, "tp": 1, "sst": 2}, "cerra": {"2t": 0}})(checkpoint)
    assert str(caught.value) == (
        "the checkpoint: its variables are not those wanted\n"
        "  era5: added sst; removed msl; moved tp from 2 to 1\n"
        "  cerra: added 2t\n"
        "  align_variables puts the weights into their order"
    )
    with pytest.raises(ValueError, match="data: added 2t\n  era5: removed 2t, msl, tp"):
        require_variables({"2t": 0})(checkpoint)


def test_require_variables_of_a_model() -> None:
    checkpoint = indexed({"name_to_index": {"2t": 0}})
    interface, module = nn.Module(), nn.Module()
    interface.data_indices = {"data": SimpleNamespace(name_to_index={"2t": 0})}  # type: ignore[assignment] # nn.Module declares its attributes as tensors or modules
    module.model = interface
    parallel = nn.DataParallel(module)
    for model in (interface, module, parallel, interface.data_indices["data"]):
        assert require_variables(model)(checkpoint) is checkpoint


@pytest.mark.parametrize("wanted", [nn.Linear(1, 1), {}, 3, {"a": "b"}, {"a": {"b": 1}, "c": "d"}])
def test_require_variables_is_checked_at_once(wanted: Any) -> None:
    with pytest.raises(TypeError, match="takes variables by name, or a model's, not "):
        require_variables(wanted)


def processors(value: float, front: str = "") -> dict[str, Any]:
    names = ["pre_processors.a.mean", "post_processors_tendencies.a.std", "encoder.weight"]
    return {front + name: torch.full((2,), value) for name in names}


def test_refresh_processors_takes_the_models_statistics() -> None:
    checkpoint, model = stored(processors(1, "model.")), processors(2)
    made = weights(refresh_processors(model)(checkpoint))
    assert [value[0].item() for value in made.values()] == [1, 2, 1]
    made = weights(refresh_processors(model, tendencies=False, states=True)(checkpoint))
    assert [value[0].item() for value in made.values()] == [2, 1, 1]
    made = weights(refresh_processors(processors(2, "model.model."), states=True)(checkpoint))
    assert [value[0].item() for value in made.values()] == [2, 2, 1]
    assert list(made) == list(processors(1, "model."))


def test_refreshed_statistics_are_a_copy() -> None:
    model = processors(2) | {"pre_processors._extra_state": {"a": [1]}}
    made = refresh_processors(model, states=True)(processors(1))
    made["pre_processors.a.mean"].zero_()
    made["pre_processors._extra_state"]["a"].append(2)
    assert model["pre_processors.a.mean"].tolist() == [2, 2]
    assert model["pre_processors._extra_state"] == {"a": [1]}


def test_refresh_processors_has_the_models_entries_and_no_others() -> None:
    model = {"pre_processors_tendencies.b.mean": torch.ones(1), "encoder.weight": torch.ones(1)}
    made = refresh_processors(model)(processors(1, "model."))
    assert list(made) == [
        "model.pre_processors.a.mean",
        "model.encoder.weight",
        "model.pre_processors_tendencies.b.mean",
    ]
    assert list(refresh_processors(model)({"head": torch.ones(1)})) == [
        "head",
        "pre_processors_tendencies.b.mean",
    ]


def test_refresh_processors_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="needs tendencies=True or states=True"):
        refresh_processors(processors(1), tendencies=False)
    with pytest.raises(ValueError, match=r"no pre_processors .*; it has: weight, bias"):
        refresh_processors(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cannot take values from a model on the meta device"):
        refresh_processors(hollow(processors(1)))


# ── recipes ───────────────────────────────────────────────────────────────────────────────────


def test_recipes_are_what_they_are_made_of() -> None:
    state_dict = {"a": torch.ones(2), "b": torch.ones(3)}
    checkpoint, model = stored(state_dict), {"a": torch.zeros(2), "b": torch.zeros(4)}
    assert_same(standard(state_dict)(checkpoint), checkpoint)
    assert_same(warm_start(state_dict)(checkpoint), checkpoint)
    assert_same(cold_start(checkpoint), reset_progress(checkpoint))
    assert weights_only(checkpoint) is state_dict
    made = transfer_learning(model)(checkpoint)
    assert_same(made, filter_shapes(model)(reset_progress(checkpoint)))
    assert list(made["state_dict"]) == ["a"]


def test_recipes_refuse_what_they_say() -> None:
    checkpoint = stored({"a": torch.ones(2), "b": torch.ones(3)})
    model = {"a": torch.zeros(2), "b": torch.zeros(4), "c": torch.zeros(1)}
    for strategy in (standard(model), warm_start(model)):
        with pytest.raises(ValueError, match=r"missing, in the model only \(1\): c\n.*b is \(3,\)"):
            strategy(checkpoint)
    with pytest.raises(ValueError, match=r"model\n  mismatched \(1\): b is \(3,\), .* \(4,\)\n"):
        transfer_learning(model, skip_mismatched=False)(checkpoint)
    only_names = {"a": torch.zeros(2), "c": torch.zeros(1)}
    made = transfer_learning(only_names, skip_mismatched=False)(checkpoint)
    assert list(made["state_dict"]) == ["a"]
    with pytest.raises(ValueError, match="cannot go on from it: no optimizer"):
        warm_start(checkpoint["state_dict"])(cold_start(checkpoint))


# ── freeze ────────────────────────────────────────────────────────────────────────────────────


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Linear(1, 1),
            "processor": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
            "act": nn.ReLU(),
        }
    )


def test_freeze_takes_exact_paths_and_globs() -> None:
    model = network()
    assert freeze(model, "processor.0", "*.bias") == [
        "encoder.bias",
        "processor.0.weight",
        "processor.0.bias",
        "processor.1.bias",
    ]
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["encoder.bias", "processor.0.weight", "processor.0.bias", "processor.1.bias"]


def test_freezing_what_is_frozen_is_nothing_new() -> None:
    model = network()
    assert len(freeze(model, "encoder")) == 2
    assert freeze(model, "encoder") == []
    assert unfreeze(model, "encoder.weight", "processor") == ["encoder.weight"]


def test_a_pattern_that_matches_nothing_changes_nothing() -> None:
    model = network()
    for strange in ("0", "act", "decoder"):
        with pytest.raises(ValueError, match=f"'{strange}' chooses nothing"):
            freeze(model, "encoder", strange)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tied_parameters_are_named_by_each_name_and_integers_by_none() -> None:
    model = network()
    model.decoder = model.encoder
    model.steps = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert freeze(model, "decoder.weight") == ["decoder.weight"]
    assert unfreeze(model, "*") == ["encoder.weight", "decoder.weight"]


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_freeze_is_checked_at_once(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__} takes a module, not {{}}"):
        function({}, "a")
    with pytest.raises(ValueError, match="needs at least one name or glob"):
        function(nn.Linear(1, 1))
