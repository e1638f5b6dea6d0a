"""What is forgotten or mistaken in a call: an error of a few lines, before anything is moved."""

import functools
import io
import json
import pickle
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import servers
import strategies
from anemoi_ckpt import (
    CheckpointError,
    CheckpointNotFoundError,
    MismatchError,
    diff,
    download,
    edit_metadata,
    latest,
    list_objects,
    load,
    load_into,
    loading_stage,
    metadata,
    parse_uri,
    peek,
    register_scheme,
    save,
    verify,
)
from checkpoints import as_bytes, assert_same
from strategies import (
    average,
    cast,
    compose,
    drop_optimizer,
    include,
    keep_progress,
    on_weights,
    pipe,
    prefer_ema,
    rename,
    require_match,
    strip_prefix,
    take,
    training_weights,
    transfer_learning,
    variables,
    warm_start,
    weights,
)

CHECKPOINT = {"state_dict": {"a": torch.ones(200), "b": torch.zeros(3)}, "epoch": 3}
STRATEGIES = {
    *("weights", "weights_only", "drop_optimizer", "prefer_ema", "training_weights"),
    *("reset_progress", "keep_progress", "cold_start", "variables", "require_finite"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(CHECKPOINT, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


# ── what is no strategy ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted({*strategies.__all__} - STRATEGIES))
def test_what_is_to_be_called_first_is_named(path: Path, name: str) -> None:
    function = getattr(strategies, name)
    for call in (load, functools.partial(load_into, nn.Linear(1, 1))):
        with pytest.raises(TypeError, match=name) as caught:
            call(path, function)
        assert len(str(caught.value)) < 300


def test_the_call_to_write_is_shown(path: Path) -> None:
    told = (
        r"^load takes functions: call include before .*, as include\(\*globs, missing_ok=False\)$"
    )
    with pytest.raises(TypeError, match=told):
        load(path, include)
    with pytest.raises(TypeError, match=r"^compose takes functions: call take before"):
        compose(weights, functools.partial(take, dim=0), load)
    with pytest.raises(TypeError, match=r"^on_weights takes functions: call cast before"):
        on_weights(cast)


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("weights", "'weights' is text; those of the module strategies are written without quotes"),
        ([weights, drop_optimizer], "one by one, not in a list"),
        ((weights,), "one by one, not in a list"),
        (None, "None is not a function"),
        (nn.Linear(1, 1), r"load_into\(model, uri\) loads into a model"),
        (torch.device("cpu"), "load gives tensors on the CPU"),
        ("cuda:1", "load gives tensors on the CPU"),
        ({"cuda:0": "cpu"}, "load gives tensors on the CPU"),
        ({"weight": torch.ones(1)}, r"a dict is not one; filter_shapes\(state_dict\)"),
        (torch.float16, r"cast\(torch.float16\) makes one"),
        (True, "options are given by name, as trust=True"),
    ],
)
def test_what_is_no_function(path: Path, strategy: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        load(path, strategy)
    with pytest.raises(TypeError, match=told):
        load_into(nn.Linear(1, 1), CHECKPOINT, strategy)
    with pytest.raises(TypeError, match=told):
        compose(strategy, load)


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (peek, "peek is none; call it by itself"),
        (load, "load is none; call it by itself"),
        (lambda: 1, r"<lambda> is none; its arguments are \(\) \(too many"),
        (lambda c, factor: c, r"its arguments are \(c, factor\) \(missing .*'factor'"),
    ],
)
def test_what_is_no_function_of_a_checkpoint(path: Path, strategy: Any, told: str) -> None:
    for call in (load, functools.partial(load_into, nn.Linear(1, 1))):
        with pytest.raises(TypeError, match=told):
            call(path, strategy)


def test_functions_that_tell_nothing_of_their_arguments_are_run(path: Path) -> None:
    assert load(path, dict)["epoch"] == CHECKPOINT["epoch"]


def test_nothing_is_asked_of_the_place(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    http_server.reset()
    for call in (
        lambda: load(uri, include),
        lambda: load(uri, "weights"),  # type: ignore[arg-type] # the case
        lambda: load_into(uri, nn.Linear(1, 1)),  # type: ignore[arg-type] # the case
        lambda: load(uri, map_location="cpu"),  # type: ignore[call-arg] # the case
        lambda: load(uri, progress=3),  # type: ignore[arg-type] # the case
        lambda: load(uri, lambda: 1),  # type: ignore[arg-type, misc] # the case
        lambda: load_into(nn.Linear(1, 1), uri, optimizer="adam"),
        lambda: load(uri, timeout=0),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert http_server.log == []


# ── None ──────────────────────────────────────────────────────────────────────────────────────


def forget(checkpoint: dict[str, Any]) -> None:
    {**checkpoint}.pop("epoch")


def test_a_strategy_that_returns_none_is_named(path: Path) -> None:
    told = r"the strategy forget returned None: .* pipe\(uri, load, …\)"
    for call in (
        lambda: load(path, forget),
        lambda: load(path, forget, weights),
        lambda: load_into(nn.Linear(1, 1), path, forget),
        lambda: pipe(path, load, forget, weights),
    ):
        with pytest.raises(TypeError, match=told):
            call()


def test_a_composition_may_end_with_a_function_that_returns_none(path: Path) -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        assert pipe(path, load, weights, list, print) is None
        assert compose(print, list, weights, load)(path) is None
    assert out.getvalue().splitlines()[-1] == "['a', 'b']"
    target = path.with_name("copy.ckpt")
    pipe(path, load, weights, functools.partial(torch.save, f=target))
    assert list(load(target)) == ["a", "b"]
    assert load(save({"x": None}, path), lambda checkpoint: checkpoint["x"] or 5) == 5
    none = path.with_name("none.ckpt")
    assert load(save(None, none)) is None
    assert repr(strategies.compose(print, load)) == "compose(print, load)"


def test_an_error_behind_the_last_function_names_it(path: Path) -> None:
    def fail(_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(path, load, fail)


# ── arguments ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("map_location", "on the CPU|to the CPU"),
        ("weights_only", "no code of the checkpoint runs"),
        ("mmap", "only the bytes that are used"),
        ("assign", "load_into gives a model on the meta device"),
        ("device", "to the CPU"),
        ("pickle_module", "without running its code"),
    ],
)
@pytest.mark.parametrize("call", [load, functools.partial(load_into, nn.Linear(1, 1)), peek])
def test_options_of_torch_load(
    call: Callable[..., Any], path: Path, option: str, told: str
) -> None:
    with pytest.raises(TypeError, match=f"^(load|load_into|peek) takes no {option}: .*({told})"):
        call(path, **{option: None})


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("trsut", "load takes no trsut: do you mean trust?"),
        ("strict", "load takes no strict: load_into does"),
        ("dtype", r"load takes no dtype: the strategy cast\(dtype\)"),
        ("cache_dir", "cached=True keeps a copy in the folder that ANEMOI_CKPT_CACHE names"),
        ("zzz", "unexpected keyword argument 'zzz'"),
    ],
)
def test_an_option_that_load_does_not_take(path: Path, option: str, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        load(path, **{option: True})  # type: ignore[arg-type] # the case


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("trust", "Foo", "trust of load_into is True, False, or a list of classes, not 'Foo'"),
        ("trust", None, "not None"),
        ("trust", dict, "not <class 'dict'>"),
        ("cached", "/tmp/copies", "ANEMOI_CKPT_CACHE names the folder of the copies"),
        ("group", "nccl", "group of load_into is a process group"),
        ("retries", "3", "retries of load_into is a whole number, not '3'"),
        ("retries", True, "not True"),
        ("retries", -1, "retries of load_into is 0 or more, not -1"),
        ("timeout", "5", "timeout of load_into is seconds, or None, not '5'"),
        ("timeout", False, "not False"),
        ("timeout", 0, "timeout of load_into is more than 0 seconds, not 0"),
        ("transport_params", "x", "transport_params of load_into is a dict"),
        ("progress", "yes", "progress of load_into is None, True, False or a function"),
        ("strict", "yes", "strict of load_into is True or False, not 'yes'"),
        ("require", "all", "require of load_into is a share from 0 to 1, not 'all'"),
        ("require", True, "not True"),
        ("require", 1.5, "require of load_into is a share from 0 to 1, not 1.5"),
        ("require", -0.5, "not -0.5"),
        ("optimizer", "adam", "optimizer of load_into has a load_state_dict, unlike 'adam'"),
        ("optimizer", torch.optim.Adam, "unlike <class"),
        ("scheduler", [3], "scheduler of load_into has a load_state_dict, unlike 3"),
    ],
)
def test_a_value_that_no_option_has(path: Path, option: str, value: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        load_into(nn.Linear(1, 1), path, **{option: value})


@pytest.mark.parametrize("option", ["resume", "sha256"])
def test_a_value_that_no_option_of_download_has(path: Path, option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} of download is .*, not 3"):
        download(path, path.with_name("copy"), **{option: 3})  # type: ignore[arg-type] # the case


def test_flags_of_numpy_are_flags(path: Path) -> None:
    assert load(path, cached=np.False_, progress=np.False_)["epoch"] == CHECKPOINT["epoch"]
    with pytest.raises(TypeError, match="arrays of metadata is True or False, not 1"):
        metadata(path, arrays=1)  # type: ignore[arg-type] # the case


def test_save_takes_the_checkpoint_first(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="save takes the checkpoint first"):
        save(str(tmp_path / "a.ckpt"), {"a": 1})  # type: ignore[arg-type] # the case
    save("a text", tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt") == "a text"


def test_the_model_comes_first(path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"load_into takes the model first, .*: PosixPath is not a model"
    ):
        load_into(path, nn.Linear(1, 1))  # type: ignore[arg-type] # the case


@pytest.mark.parametrize("place", [None, 3, nn.Linear(1, 1), b"last.ckpt", ["last.ckpt"]])
def test_what_is_no_place(place: Any) -> None:
    for call in (load, peek, metadata, download, parse_uri):
        with pytest.raises(TypeError, match=f"such as .*last.ckpt', not {type(place).__name__}"):
            call(place)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (None, "NoneType: is a variable"),
        (b"last.ckpt", "bytes: os.fsdecode"),
        (["last.ckpt"], "list: give one place"),
        (weights, "function: the place comes first, and then the strategies"),
        (3, "int$"),
    ],
)
def test_what_to_do_with_what_is_no_place(path: Path, place: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"not {told}"):
        load(place, path)  # type: ignore[arg-type] # the case
    with pytest.raises(TypeError, match=f"not {told}"):
        load_into(nn.Linear(1, 1), place)


def test_an_open_file_cannot_be_written_to() -> None:
    with pytest.raises(TypeError, match="not BytesIO: give the path of an open file"):
        save({}, io.BytesIO())  # type: ignore[arg-type] # the case


def test_a_module_serves_as_a_checkpoint(path: Path) -> None:
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    assert load_into(model, source).loaded == ("weight", "bias")
    assert_same(model.state_dict(), source.state_dict())
    other = nn.Linear(3, 2)
    torch.save(source, path)
    load_into(other, load(path))
    assert_same(other.state_dict(), source.state_dict())
    with pytest.raises(MismatchError, match="left no weights, but InertGlobal"):
        load_into(other, {"x": 1}, lambda _: load(save(nn.Linear, path)))


# ── what a strategy finds wrong ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "strategy",
    [
        weights,
        drop_optimizer,
        keep_progress,
        prefer_ema,
        variables,
        include("missing"),
        take("a", 1, [0]),
        take("a", 0, [999]),
        rename("a|b", "c"),
        require_match({"a": torch.ones(1)}),
        average({"a": torch.ones(1)}),
        cast(torch.int8),
        strategies.drop("missing"),
        strategies.merge({"a": torch.ones(1)}, clash="error"),
        strategies.require_variables({"t": 0}),
        strategies.align_variables({"t": 0}, {"z": 0}, {"c": {0: ["all"]}}),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_it_is_a_checkpoint_error_that_names_the_place(
    path: Path, strategy: Callable[[Any], Any]
) -> None:
    held = [CHECKPOINT["epoch"]] if strategy in (weights, drop_optimizer) else CHECKPOINT
    with pytest.raises(MismatchError, match=r"^the checkpoint: ") as alone:
        strategy(held)
    with pytest.raises(MismatchError, match=r"last.ckpt: ") as caught:
        load(save(held, path), strategy)
    assert str(caught.value) == str(alone.value).replace("the checkpoint", str(path), 1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_it_is_the_error_that_python_has_for_it_as_well() -> None:
    with pytest.raises(TypeError, match="a dict, not list"):
        drop_optimizer([1])  # type: ignore[arg-type] # the case
    with pytest.raises(ValueError, match="no state dict"):
        weights([1])


def test_a_load_within_a_strategy_names_its_own_place(path: Path) -> None:
    missing = path.with_name("missing.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"missing.ckpt") as caught:
        load(path, lambda checkpoint: load(missing) or checkpoint)
    assert caught.value.__notes__ == [f"while loading {path}"]


# ── a prefix ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("model.{}", "strip_prefix('model.')"),
        ("model._orig_mod.{}", "strip_prefix('model._orig_mod.')"),
        ("_orig_mod.{}", "strip_prefix('_orig_mod.')"),
        ("{}", "add_prefix('net.')"),
        ("net._orig_mod.{}", r"rename(r'_orig_mod\.', '')"),
    ],
)
def test_a_prefix_that_would_make_names_fit_is_named(path: Path, name: str, strategy: str) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    values = {name.format(n): v + 1 for n, v in net.state_dict().items()}
    model = nn.ModuleDict({"net": net}) if "net" in name + strategy else net
    torch.save({"state_dict": values, "epoch": 1, "optimizer_states": [{}]}, path)
    advice = f"{strategy} before would make 60 of 60 names those of the model"
    for steps in ((), (transfer_learning(model),), (require_match(model),), (warm_start(model),)):
        with pytest.raises(MismatchError) as caught:
            load_into(model, path, *steps)
        assert str(caught.value).endswith(advice)
        assert len(str(caught.value)) < 1200
    with pytest.raises(MismatchError) as caught:
        load_into(model, path, strict=True)
    assert str(caught.value).endswith(advice)
    report = load_into(model, path, eval(strategy, vars(strategies)))
    assert len(report.loaded) == 60


def test_no_prefix_is_named_where_none_helps(path: Path) -> None:
    with pytest.raises(MismatchError, match="compare the names; strip_prefix, add_prefix and"):
        load_into(nn.Linear(2, 2), path)
    model = {"a": torch.ones(200), "other": torch.ones(1)}
    with pytest.raises(MismatchError, match="filter_shapes leaves out what differs"):
        load(path, require_match(model))


# ── averages and what they are of ─────────────────────────────────────────────────────────────

AVERAGED = {
    "state_dict": {"m.weight": torch.full((1, 2), 5.0), "m.bias": torch.full((1,), 5.0)},
    "current_model_state": {"m.weight": torch.ones(1, 2), "m.bias": torch.ones(1)},
    "averaging_state": {"n_averaged": torch.tensor(3)},
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "epoch": 1,
}


def test_a_warm_start_goes_on_from_the_weights_being_trained(path: Path) -> None:
    model = nn.ModuleDict({"m": nn.Linear(2, 1)})
    load_into(model, save(AVERAGED, path), warm_start(model))
    assert_same(dict(model.state_dict()), AVERAGED["current_model_state"])
    load_into(model, path, prefer_ema)
    assert_same(dict(model.state_dict()), AVERAGED["state_dict"])


def test_what_changes_the_weights_drops_their_second_copy(path: Path) -> None:
    save(AVERAGED, path)
    for strategy in (strip_prefix("m."), cast(torch.float16), include("m")):
        assert "current_model_state" not in load(path, strategy)
    assert "current_model_state" in load(path, require_match(AVERAGED["state_dict"]))
    nested = {"model": {**AVERAGED}, "epoch": 1}
    assert "current_model_state" not in load(save(nested, path), strip_prefix("m."))["model"]


def test_without_averages_the_weights_are_those_being_trained() -> None:
    assert training_weights(CHECKPOINT) is CHECKPOINT
    alone = {"state_dict": {"a": torch.ones(1)}, "current_model_state": {"a": torch.zeros(1)}}
    assert training_weights(alone) is alone
    kept = training_weights(AVERAGED)
    assert list(kept) == ["state_dict", "optimizer_states", "epoch"]
    assert_same(kept["state_dict"], AVERAGED["current_model_state"])


# ── casts ─────────────────────────────────────────────────────────────────────────────────────


def test_a_cast_that_drops_fractions_is_refused_unless_asked_for() -> None:
    held = {"w": torch.tensor([0.1, 0.9]), "n": torch.tensor([3]), "c": torch.tensor([1 + 2j])}
    for dtype in (torch.int8, torch.bool, torch.int64):
        with pytest.raises(MismatchError, match=r"to cast w to torch.* pass lossy=True"):
            cast(dtype)(held)
    with pytest.raises(MismatchError, match=r"to cast c to torch.float32 would drop"):
        cast(torch.float32, only_floating=False)(held)
    with pytest.raises(MismatchError, match=r"to cast w, c to torch.int16 would drop"):
        cast(torch.int16, only_floating=False)(held)
    given = cast(torch.bool, "w", lossy=True)(held)
    assert_same(given, {**held, "w": torch.tensor([True, True])})
    wide = cast(torch.complex128, only_floating=False)(held)
    assert {value.dtype for value in wide.values()} == {torch.complex128}


LOSSES: dict[str, tuple[torch.Tensor, torch.dtype, bool]] = {
    "imaginary parts": (torch.tensor([1 + 2j, 3j]), torch.float32, True),
    "no imaginary parts": (torch.tensor([1 + 0j, 3]), torch.float32, False),
    "NaN to integer": (torch.tensor([float("nan"), 1.0]), torch.int64, True),
    "fraction": (torch.tensor([0.5, 1.0]), torch.int64, True),
    "whole numbers": (torch.tensor([2.0, -1.0]), torch.int64, False),
    "overflow of half": (torch.tensor([1e30, 1.0]), torch.float16, True),
    "infinity stays": (torch.tensor([float("inf"), -float("inf")]), torch.float16, False),
    "NaN stays": (torch.tensor([float("nan"), 1e5]), torch.bfloat16, False),
    "NaN and overflow": (torch.tensor([float("nan"), 1e5]), torch.float16, True),
    "rounding": (torch.tensor([0.1, 1e-8]), torch.float16, False),
    "rounds to the largest": (torch.tensor([65519.0, 1.0]), torch.float16, False),
    "a negative to unsigned": (torch.tensor([-1, 3]), torch.uint8, True),
    "an integer to narrower": (torch.tensor([300, 3]), torch.int8, True),
    "an integer that fits": (torch.tensor([100, 3]), torch.int8, False),
    "an integer to half": (torch.tensor([70000, 3]), torch.float16, True),
    "an integer to bool": (torch.tensor([2, 0]), torch.bool, True),
    "complex overflow": (
        torch.tensor([1e200], dtype=torch.complex128),
        torch.complex64,
        True,
    ),
    "complex rounding": (
        torch.tensor([0.1 + 0j, 1], dtype=torch.complex128),
        torch.complex64,
        False,
    ),
    "nothing": (torch.zeros(0), torch.int8, False),
    "eight bits": (torch.tensor([1e30, 1.0]), torch.float8_e4m3fn, True),
    "infinity to eight bits": (torch.tensor([float("inf"), 1.0]), torch.float8_e4m3fn, True),
    "from eight bits": (torch.ones(2).to(torch.float8_e5m2), torch.float32, False),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_cast_into_a_model_tells_what_it_loses(case: str, recwarn: Any) -> None:
    values, dtype, lost = LOSSES[case]
    model = nn.Module()
    model.register_buffer("b", torch.zeros(values.shape, dtype=dtype))
    report = load_into(model, {"b": values})
    assert report.lossy == ({"b": (values.dtype, dtype)} if lost else {})
    text = f"b: {values.dtype} to {dtype}".replace("torch.", "")
    assert (text in str(report)) is lost


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no float8_e8m0fnu")
def test_a_sign_that_is_lost_is_told() -> None:
    model = nn.Module()
    model.register_buffer("b", torch.ones(2).to(torch.float8_e8m0fnu))
    assert load_into(model, {"b": torch.tensor([-2.0, 4.0])}).lossy
    assert not load_into(model, {"b": torch.tensor([2.0, 4.0])}).lossy


# ── tracebacks ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", [load, peek, metadata, download])
def test_the_traceback_ends_with_the_users_line(
    call: Callable[..., Any], http_server: servers.HTTPServer
) -> None:
    with pytest.raises(CheckpointError) as caught:
        call(http_server.put("a.ckpt", b"").replace("a.ckpt", "missing.ckpt"))
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert len(lines) < 20
    assert not any("_anemoi_ckpt" in line for line in lines if line.lstrip().startswith("File"))
    assert lines[-1].startswith("anemoi_ckpt.CheckpointNotFoundError")


def test_a_users_own_error_keeps_its_frames(path: Path) -> None:
    def fail(_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        load(path, fail)
    assert [entry.name for entry in caught.traceback][1:] == ["fail"]  # and none of ours
    assert caught.value.__notes__ == [f"while loading {path}"]


@pytest.mark.parametrize(
    "call",
    [
        lambda path: load(path, cast),
        lambda path: load(path, map_location="cpu"),
        lambda path: load(path, forget),
        lambda path: load(3),  # type: ignore[arg-type] # the case
        lambda path: cast("float16"),  # type: ignore[arg-type] # the case
        lambda path: include(),
        lambda path: rename("(", ")"),
        lambda path: load(path, undefined),  # type: ignore[name-defined] # noqa: F821 - the case
    ],
)
def test_a_refused_argument_takes_few_lines(path: Path, call: Callable[[Path], Any]) -> None:
    with pytest.raises((TypeError, ValueError, NameError)) as caught:
        call(path)
    assert {entry.path for entry in caught.traceback} == {Path(__file__)}
    assert len("".join(traceback.format_exception(caught.value)).splitlines()) < 20


@pytest.mark.parametrize(
    "call",
    [
        lambda path: compose(cast, load),
        lambda path: pipe(path, load, "weights"),
        compose(include("c"), load),
        compose(include("a"), forget, load),
        lambda path: pipe(path, load, forget, include("c")),
        lambda path: include("c")(CHECKPOINT),
    ],
)
def test_a_composition_hides_our_frames_as_well(path: Path, call: Callable[[Path], Any]) -> None:
    with pytest.raises((TypeError, CheckpointError)) as caught:
        call(path)
    assert {entry.path for entry in caught.traceback} == {Path(__file__)}


@pytest.mark.parametrize(
    "call",
    [weights, include("a"), drop_optimizer, compose(load, weights), compose(load, include("a"))],
)
def test_a_place_is_no_checkpoint(path: Path, call: Callable[[Any], Any]) -> None:
    for place in (path, str(path)):
        with pytest.raises(MismatchError, match=r"is where one is: load\(place, strategy\)"):
            call(place)
    with pytest.raises(MismatchError, match="'https://host/a\\?sig=\\*\\*\\*'"):
        call("https://host/a?sig=secret")


def test_an_error_of_our_own_code_keeps_its_frames(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("_anemoi_ckpt.loading.trusted", None)
    with pytest.raises(TypeError) as caught:
        load(path)
    assert [entry.name for entry in caught.traceback][-1] == "checked_steps"


def test_an_error_of_a_package_that_we_called_keeps_its_frames(
    path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("_anemoi_ckpt.loading.trusted", json.loads)
    with pytest.raises(TypeError) as caught:
        load(path, trust=[])
    assert [entry.name for entry in caught.traceback][-2:] == ["checked_steps", "loads"]


def test_causes_keep_their_messages_and_a_circle_of_them_ends() -> None:
    from _anemoi_ckpt.calls import public

    @public
    def fail() -> None:
        err, cause = CheckpointError("p", "q", "r"), OSError("deep")
        cause.__context__ = err
        raise err from cause

    with pytest.raises(CheckpointError) as caught:
        fail()
    assert str(caught.value.__cause__) == "deep"
    assert caught.value.__cause__.__traceback__ is None


# ── transport_params ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["clent", "anon", "profile", "endpoint_url", "headers"])
def test_params_that_a_store_does_not_read_are_named(name: str) -> None:
    told = rf"transport_params\['{name}'\] means nothing when a S3URI is read; .*what does: client"
    for call in (load, peek, metadata, download, functools.partial(load_into, nn.Linear(1, 1))):
        with pytest.raises(TypeError, match=told):
            call("s3://bucket/a.ckpt", transport_params={name: 1})
    with pytest.raises(TypeError, match=r"GCSURI is written; .*what does: client"):
        save({}, "gs://bucket/a.ckpt", transport_params={name: 1})


def test_params_are_those_of_the_kind_of_place(http_server: servers.HTTPServer, path: Path) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    options = {"headers": {"X-Mine": "1"}, "timeout": 30}
    assert load(uri, transport_params=options)["epoch"] == 3
    with pytest.raises(TypeError, match=r"'client'\] means nothing when a HTTPURI is read"):
        load(uri, transport_params={"client": 1})
    assert load(path, transport_params={"client": 1})["epoch"] == 3  # a file needs none


def test_params_for_writing_are_not_for_the_metadatas_place(path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):  # and no TypeError before
        save(
            {},
            "s3://bucket/a.ckpt",
            metadata=path.with_name("missing.ckpt"),
            transport_params={"min_part_size": 5 * 2**20},
        )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: save(str(path), f"{path}.copy"), "save takes the checkpoint first"),
        (lambda path: save("s3://bucket/a", f"{path}.copy"), "save takes the checkpoint first"),
        (lambda path: save(Path(path), f"{path}.copy"), r"save\(load\(place\), uri\)"),
        (lambda path: save(load, f"{path}.copy"), "and load is none"),
        (lambda path: edit_metadata(path, {"a": 1}), "takes a function of the metadata, not {'a'"),
        (lambda path: latest(Path(path).parent, key="modified"), "key of latest is a function"),
        (
            lambda path: list_objects(Path(path).parent, recursive="yes"),
            "recursive of list_objects",
        ),
        (lambda path: diff(path, path, values="yes"), "values of diff is True or False"),
        (lambda path: verify(path, values="yes"), "values of verify is True or False"),
        (lambda path: load(Path(path).read_bytes()), "io.BytesIO a file of a checkpoint's bytes"),
        (lambda path: register_scheme("s3", None), "takes a text and a function"),
        (lambda path: register_scheme(3, parse_uri), "takes a text and a function"),
        (lambda path: loading_stage(path, recipe="transfer_learning"), "not 'transfer_learning'"),
        (
            lambda path: loading_stage(path, recipe=strategies.drop("epoch")),
            r"and drop\('epoch'\) one of a checkpoint",
        ),
    ],
)
def test_what_is_given_in_the_place_of_something_else(
    call: Callable[[Path], Any], said: str, path: Path
) -> None:
    with pytest.raises(TypeError, match=said) as caught:
        call(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path(f"{path}.copy").exists()
    assert parse_uri("s3://bucket/a.ckpt").text == "s3://bucket/a.ckpt"
