"""Pickles: what is harmless comes as itself, all else as data, and nothing of it runs."""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import io
import itertools
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import omegaconf
import pytest
import torch
from torch import nn

import _anemoi_ckpt.pickles.writing
from _anemoi_ckpt.pickles import costs
from _anemoi_ckpt.pickles.costs import CostlyError
from _anemoi_ckpt.pickles.inert import walk
from _anemoi_ckpt.pickles.reading import ForbiddenGlobalError, trusted, unpickle
from anemoi_ckpt import (
    CheckpointError,
    CorruptError,
    Inert,
    InertGlobal,
    MismatchError,
    MissingPackageError,
    UnsafeCheckpointError,
    load,
    load_into,
    metadata,
    peek,
    save,
)
from checkpoints import as_bytes, assert_same
from strategies import drop, drop_optimizer, weights

PROTOCOLS = range(6)
HERE = __name__


def none(pid: Any) -> Any:
    raise AssertionError(pid)


def read(data: bytes, trust: Any = False) -> Any:
    return unpickle(io.BytesIO(data), none, trusted(trust))


def rewritten(value: Any, protocol: int) -> bytes:
    """What our pickler makes of what our machine read."""
    out = io.BytesIO()
    _anemoi_ckpt.pickles.writing.Pickler(out, protocol).dump(value)
    return out.getvalue()


# ── what is harmless ──────────────────────────────────────────────────────────────────────────

HARMLESS: list[Any] = [
    *(None, True, 7, -(2**70), 2.5, "text", b"bytes", bytearray(b"array"), 1 + 2j),
    *((1, (2, ())), [1, [2]], {"a": {"b": 1}}, {1, 2}, frozenset({3}), range(1, 9, 2)),
    collections.OrderedDict(a=1, b=2),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {"a": 1}),
    collections.Counter("abca"),
    collections.deque([1, 2], maxlen=3),
    argparse.Namespace(a=1),
    types.SimpleNamespace(a=1),
    pathlib.PosixPath("/a/b"),
    pathlib.PureWindowsPath("c:/a"),
    dt.date(2026, 11, 23),
    dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC),
    dt.time(1, 2, 3),
    dt.timedelta(days=1, seconds=2),
    dt.timezone(dt.timedelta(hours=1), "CET"),
    decimal.Decimal("1.50"),
    *(torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.strided, dict, set),
    *(np.float32(1.5), np.int64(3), np.bool_(1), np.datetime64("2026-11-23", "h")),
    *(np.dtype("<f4"), np.dtype(">i8"), np.dtype("U5"), np.dtype("M8[ns]"), np.dtype("O")),
    np.dtype([("a", "<f4"), ("b", ">i2")]),
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array(["a", "bcd"]),
    np.array([], np.float16),
    np.array([None, "x", 3], dtype=object),
    np.array(["2026-11-23"], "M8[D]"),
    np.array([(1.0, 2)], dtype=[("a", "<f4"), ("b", "<i2")]),
    slice(1, None, 2),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", HARMLESS, ids=lambda value: repr(value)[:40])
def test_what_is_harmless_comes_as_itself(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    expected = pickle.loads(data)
    if protocol < 2 and not same(read(data), expected):
        assert isinstance(read(data), Inert)  # protocols that no torch writes: as data
        return
    assert same(read(data), expected)
    assert same(read(rewritten(read(data), protocol)), expected)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.tolist() == other.tolist()
            and one.flags.f_contiguous == other.flags.f_contiguous
        )
    return type(one) is type(other) and one == other


@pytest.mark.skipif(os.name == "nt", reason="there it is the other way round")
def test_a_path_of_another_system_is_a_pure_one() -> None:
    data = b"\x80\x04cpathlib\nWindowsPath\nX\x03\x00\x00\x00c:/\x85R."
    assert read(data) == pathlib.PureWindowsPath("c:/")


# ── what is not ───────────────────────────────────────────────────────────────────────────────


class Plain:
    def __init__(self) -> None:
        self.name_to_index = {"t": 0}
        self.values = [1, 2]


class Slotted:
    __slots__ = ("__dict__", "a")

    def __init__(self) -> None:
        self.a, self.b = 1, 2


class OnlySlots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Colour(enum.Enum):
    RED = "red"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as most versions of Python do; 3.11.3 and older name the member, by `getattr`."""
        return (self.__class__, (self._value_,))


@dataclasses.dataclass
class Config:
    lr: float
    steps: tuple[int, ...]


class Pair(NamedTuple):
    first: int
    second: str


class Dotted(dict):  # type: ignore[type-arg] # the base is the class itself, as in a user's code
    pass


class Listed(list):  # type: ignore[type-arg] # the base is the class itself, as in a user's code
    pass


class Reduced:
    def __reduce__(self) -> Any:
        return made, (3, "x")


class Keyword:
    def __new__(cls, *, a: int = 0) -> Self:
        self = super().__new__(cls)
        self.a = a
        return self

    def __getnewargs_ex__(self) -> Any:
        return (), {"a": self.a}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyword) and self.a == other.a

    __hash__ = None  # type: ignore[assignment] # how Python marks a class as not hashable


class Outer:
    class Inner:
        def __init__(self) -> None:
            self.a = 1


def made(*args: Any) -> Any:
    return ["made", *args]


class Ring:
    def __init__(self) -> None:
        self.itself = self
        self.group = [self]


def inert(value: Any, protocol: int = 2) -> Any:
    found = read(pickle.dumps(value, protocol))
    assert isinstance(found, Inert)
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_state_is_read_as_attributes(protocol: int) -> None:
    plain = inert(Plain(), protocol)
    assert plain.name_to_index == {"t": 0}
    assert plain.values == [1, 2]
    assert inert(Config(0.1, (1, 2)), protocol).steps == (1, 2)
    ring = inert(Ring(), protocol)
    assert ring.itself is ring
    assert ring.group[0] is ring
    with pytest.raises(AttributeError, match=r"Plain: name_to_index, values> has no 'x'"):
        _ = inert(Plain()).x
    if protocol > 1:
        assert (inert(Slotted(), protocol).a, inert(Slotted(), protocol).b) == (1, 2)
        assert inert(OnlySlots(), protocol).a == 1
    assert {"name_to_index", "values", "inert_class"} <= set(dir(inert(Plain())))


def test_what_an_inert_object_is() -> None:
    assert repr(inert(Plain())) == f"<inert {HERE}.Plain: name_to_index, values>"
    assert repr(inert(Colour.RED)) == f"<inert {HERE}.Colour: 'red'>"
    assert repr(inert(Pair(1, "x"))) == f"<inert {HERE}.Pair: 1, 'x'>"
    assert repr(inert(Reduced())) == f"<inert {HERE}.made: 3, 'x'>"
    assert repr(inert(Dotted({i: [i] for i in range(9)}))).endswith(
        "Dotted: 0, 1, 2, 3, 4, 5, 6, 7, …>"
    )
    assert repr(inert(Dotted({(1,): 2}))).endswith("Dotted: …>")
    assert repr(read(pickle.dumps(made))) == f"<inert {HERE}.made>"
    assert repr(inert(Keyword(a=2), 4)).startswith(f"<inert {HERE}.Keyword: a")
    partial = inert(functools.partial(made, 1, a=2))
    assert partial.inert_class == "functools.partial"
    assert (partial.func, partial.args, partial.keywords) == (
        read(pickle.dumps(made)),
        (1,),
        {"a": 2},
    )
    called = read(b"\x80\x02cx\ny\n)R)R.")  # what an inert function gave is called again
    assert repr(called) == "<inert an inert object's result>"


def test_what_is_like_a_container_is_walked() -> None:
    for found in (inert(Dotted(a=1, b=[2])), inert(collections.UserDict(a=1, b=[2]))):
        assert (found["a"], found.b, len(found), "a" in found, bool(found)) == (
            1,
            [2],
            2,
            True,
            True,
        )
        assert list(found) == list(found.keys()) == ["a", "b"]
        assert list(found.values()) == [1, [2]]
        assert dict(found.items()) == dict(found) == {"a": 1, "b": [2]}
        assert found.get("c", 3) == 3
        with pytest.raises(KeyError):
            found["c"]
    for found in (inert(Listed([1, 2])), inert(collections.UserList([1, 2]))):
        assert (found[1], list(found), 2 in found, 3 in found) == (2, [1, 2], True, False)
    assert not inert(collections.UserDict())
    assert inert(Plain())
    hiding = inert(Plain())
    hiding._inert_state = {"__array__": 1, "_inert_x": 2, "x": 3}
    names = ("x", "__array__", "_inert_x")  # of which Python and we look for the others
    assert [hasattr(hiding, name) for name in names] == [True, False, False]
    with pytest.raises(TypeError, match="holds no dict or list to walk"):
        len(inert(Plain()))


def test_a_configuration_is_walked() -> None:
    config = omegaconf.OmegaConf.create({"training": {"lr": 0.1, "devices": [1, "x"]}})
    found = inert(config)
    assert found.training.lr == found["training"]["lr"] == 0.1
    assert list(found.training.devices) == [1, "x"]
    assert "x" in found.training.devices
    assert dict(found.training.items())["lr"] == 0.1
    assert found == inert(config)
    assert pickle.loads(rewritten(found, 2)) == config


def test_inert_objects_compare_and_hash() -> None:
    ring = inert(Ring())
    assert ring == inert(Ring())
    assert inert(Colour.RED) == inert(Colour.RED)
    assert {inert(Colour.RED): 1}[inert(Colour.RED)] == 1
    assert InertGlobal("a", "B") == InertGlobal("a", "B") != InertGlobal("a", "C")
    assert {InertGlobal("a", "B")} == {InertGlobal("a", "B")}
    others = [
        ([1], [2]),
        ([1], [1, 2]),
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        ({"a": [1]}, {"a": [2]}),
        (np.arange(2), np.arange(3)),
        (np.array([1, 2]), np.array([1, 3])),
        (1, 1.0),
    ]
    for one, other in others:
        assert inert(made_of(one)) == inert(made_of(one))
        assert inert(made_of(one)) != inert(made_of(other))
    assert inert(Plain()) != 3
    tensors = [torch.ones(2), torch.zeros(2), torch.ones(3), torch.ones(2, device="meta")]
    held = [Inert(InertGlobal("a", "B"), (tensor,)) for tensor in tensors]
    again = [Inert(InertGlobal("a", "B"), (tensor.clone(),)) for tensor in tensors]
    assert [[one == other for other in again] for one in held] == torch.eye(4).bool().tolist()


def test_an_inert_object_shows_and_hashes_its_scalars_alone() -> None:
    name = InertGlobal("a", "B")
    made = Inert(name, ("x", 2, [3]))
    assert repr(made) == "<inert a.B: 'x', 2, …>"
    assert hash(made) == hash(Inert(name, ("x", 2, [4]))) != hash(Inert(name, ("x", 3, [3])))


class Text(str):
    """Pickled as a new object of a text."""

    __slots__ = ()


class OfList:
    """Hashed by identity, and pickled as a call with a number and a list."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OfList, (1, [2])


class OfState:
    """Hashed by identity, and pickled as a call with a number, and a state."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OfState, (1,), {"x": 1}


class Bare:
    """Hashed by identity, and pickled as nothing but its class."""


class ByKeywords:
    """Made by keywords."""

    def __new__(cls, *, x: int = 0) -> Any:
        return object.__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, int]]:
        return (), {"x": 1}


class WithData(torch.nn.Module):
    """A module with an attribute that elsewhere is what an object like a dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.data = {"a": 1}


def test_modules_and_what_is_made_by_keywords_are_like_no_dict() -> None:
    for each in (WithData(), ByKeywords()):
        assert not isinstance(read(pickle.dumps(each, 4)), Mapping)
    assert inert(WithData()).data == {"a": 1}


def test_only_omegaconfs_nodes_are_taken_for_their_values() -> None:
    held = Inert(InertGlobal("a", "Holder"))
    for module, found in (("omegaconf.nodes", 1), ("a.nodes", None)):
        node = Inert(InertGlobal(module, "AnyNode"))
        node._inert_state = {"_val": 1}
        held._inert_pairs = {"k": node}
        assert held["k"] == (found or node)


def test_names_of_python_2_are_those_of_its_protocols() -> None:
    for protocol, module in ((2, "queue"), (4, "Queue")):
        found = read(b"\x80" + bytes([protocol]) + b"cQueue\nQueue\n.")
        assert found == InertGlobal(module, "Queue")


def test_a_state_of_three_parts_is_none_of_attributes_and_slots() -> None:
    made = Inert(InertGlobal("a", "B"))
    for state, has_x in (((None, {"x": 1}), True), ((None, {"x": 1}, None), False)):
        made._inert_state = state
        assert hasattr(made, "x") is has_x


def test_an_inert_key_is_a_value_where_it_is_made_of_scalars_alone() -> None:
    for protocol in (2, 4):
        assert read(pickle.dumps({Text("a"): 1}, protocol))[inert(Text("a"))] == 1
        for kind in (OfList, OfState, Bare):
            assert len(read(pickle.dumps({kind(): 1, kind(): 2}, protocol))) == 2


def test_inert_keys_are_told_apart_as_their_class_does() -> None:
    alike = [Plain(), Plain(), Plain()]
    held = {
        "dict": dict(zip(alike, range(3), strict=True)),
        "set": {*alike},
        "frozen": frozenset(alike),
        "pairs": {(alike[0], 1): "a", (alike[1], 1): "b"},
        "same": alike,
    }
    for protocol in (2, 4):
        found = read(pickle.dumps(held, protocol))
        for each in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert [len(value) for value in each.values()] == [3, 3, 3, 2, 3]
            assert [each["dict"][key] for key in each["same"]] == [0, 1, 2]
            assert {*each["same"]} == each["set"] == each["frozen"]
            assert each["same"][0] != each["same"][1]
        again = pickle.loads(rewritten(found, protocol))
        assert [again["dict"][key] for key in again["same"]] == [0, 1, 2]
    colours = read(pickle.dumps({"by": {Colour.RED: 1}, "set": {Colour.RED}}, 4))
    assert colours["by"][inert(Colour.RED)] == 1  # a value, of whichever pickle
    assert inert(Colour.RED) in colours["set"]


def test_many_keys_of_one_class() -> None:
    one = b"cx\ny\n)\x81}" + text("a") + b"M%bsb"
    keys = b"".join(one.replace(b"%b", place.to_bytes(2, "little")) + b"N" for place in range(9999))
    assert len(read(b"\x80\x02}(" + keys + b"u.")) == 9999


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


def made_of(held: Any) -> Any:
    return Holder(held)


def test_inert_objects_copy_and_pickle_as_data() -> None:
    for value in (Ring(), Plain(), Colour.RED, Dotted(a=1), Listed([1]), Keyword(a=3)):
        found = inert(value)
        assert copy.copy(found) == found
        assert copy.deepcopy(found) == found
        assert pickle.loads(pickle.dumps(found)) == found
        assert read(pickle.dumps(found)) == found  # also by our own machine
    ring = copy.deepcopy(inert(Ring()))
    assert ring.itself is ring
    with pytest.raises(AttributeError):
        ring.itself = 3


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_written_back_is_the_real_thing(protocol: int) -> None:
    values = [Plain(), Config(0.1, (1,)), Colour.RED, Pair(1, "x"), Dotted(a=1), Listed([1])]
    values += [Keyword(a=3), Slotted(), functools.partial(made, 1, a=2), Outer.Inner, made, Outer()]
    for value in values:
        back = pickle.loads(rewritten(read(pickle.dumps(value, protocol)), protocol))
        assert type(back) is type(value)
        if type(value).__eq__ is not object.__eq__:
            assert back == value
        elif isinstance(value, functools.partial):
            assert repr(back) == repr(value)
        else:
            assert getattr(back, "__dict__", None) == getattr(value, "__dict__", None)
    ring = pickle.loads(rewritten(inert(Ring(), protocol), protocol))
    assert type(ring) is Ring
    assert ring.group[0] is ring.itself is ring
    inner = pickle.loads(rewritten(read(pickle.dumps(Outer.Inner(), protocol)), 6 - protocol))
    assert type(inner) is Outer.Inner
    assert pickle.loads(rewritten(read(pickle.dumps(Reduced())), protocol)) == ["made", 3, "x"]


def test_an_object_among_its_own_arguments_is_written_back() -> None:
    found = inert(Plain())
    around = Inert(InertGlobal(HERE, "made"), ([],))
    around._inert_args[0].append(around)
    again = read(rewritten([found, around], 2))
    assert again[1]._inert_args[0][0]._inert_func == InertGlobal(HERE, "made")


class Named(torch.Tensor):
    pass


def test_tensor_subclasses_hold_their_tensor(tmp_path: Path) -> None:
    named = torch.arange(3.0).as_subclass(Named)
    named.unit = "K"  # type: ignore[attr-defined] # an attribute that the class does not declare is the case
    (tmp_path / "a").write_bytes(as_bytes({"t": named, "u": torch.ones(2)}))
    found = load(tmp_path / "a")["t"]
    assert torch.equal(found._inert_args[0], torch.arange(3.0))
    assert type(load(tmp_path / "a", trust=[Named])["t"]) is Named
    torch.save({"t": found}, tmp_path / "b", pickle_module=_anemoi_ckpt.pickles.writing)
    back = torch.load(tmp_path / "b", weights_only=False)["t"]
    assert (type(back), back.unit, back.tolist()) == (Named, "K", [0, 1, 2])


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.rand(2))
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("lost", torch.rand(2), persistent=False)
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.tied = self.layers[0]
        self.absent = None
        self.register_module("gone", None)


class Parts(torch.nn.Module):
    """A module with parts that are pickled in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(2, 2)
        self.compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        self.traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="torch 2.2 pickles no compiled module")
def test_compiled_and_traced_parts_of_a_module_give_their_weights(tmp_path: Path) -> None:
    net = Parts()
    torch.save(net, tmp_path / "a")
    assert_same(dict(load(tmp_path / "a", weights)), dict(net.state_dict()))
    whole = load(tmp_path / "a")
    origin = net.compiled._orig_mod[0]
    assert torch.equal(getattr(whole.compiled._orig_mod, "0").weight, origin.weight)
    assert peek(tmp_path / "a").tensors[2].name == "compiled._orig_mod.0.weight"
    assert (hasattr(whole, "state_dict"), hasattr(whole, "forward")) == (True, False)
    torch.save(net.compiled, tmp_path / "b")
    assert_same(dict(load(tmp_path / "b", weights)), dict(net.compiled.state_dict()))
    other = Parts()
    load_into(other, tmp_path / "a", strict=True)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))


class Own(torch.nn.Module):
    """Is pickled in a way that only it knows."""

    def __reduce__(self) -> Any:
        return Own, ()


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantization
@pytest.mark.parametrize("make", [Own, lambda: torch.ao.nn.quantized.Linear(2, 2)])
def test_what_only_its_class_knows_is_not_left_out_in_silence(tmp_path: Path, make: Any) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), make()), tmp_path / "a")
    with pytest.raises(MismatchError, match=r"a: 1 is pickled in a way that only its class knows"):
        load(tmp_path / "a", weights)
    with pytest.raises(MismatchError, match=r"trust=True, runs its code$"):
        load_into(torch.nn.Linear(2, 2), tmp_path / "a")
    odd = torch.nn.Sequential(torch.nn.Linear(2, 2))
    odd._modules["odd"] = 3  # type: ignore[assignment] # the case
    torch.save(odd, tmp_path / "a")
    with pytest.raises(
        MismatchError, match=r"odd is pickled in a way that only its class knows: 3"
    ):
        load(tmp_path / "a", weights)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_gives_its_state_dict(tmp_path: Path, legacy: bool) -> None:
    net = Net()
    (tmp_path / "a").write_bytes(as_bytes(net, _use_new_zipfile_serialization=not legacy))
    found = load(tmp_path / "a", weights)
    assert_same(dict(found), dict(net.state_dict()))
    whole = load(tmp_path / "a")
    assert torch.equal(whole.own, net.own)
    assert torch.equal(getattr(whole.layers, "0").weight, net.layers[0].weight)
    assert torch.equal(whole.lost, net.lost)


def test_modules_that_hold_each_other_without_end(tmp_path: Path) -> None:
    net = torch.nn.Module()
    net._modules["again"] = net
    torch.save(net, tmp_path / "a")
    with pytest.raises(ValueError, match="hold each other without end"):
        load(tmp_path / "a", weights)
    with pytest.raises(CheckpointError, match="without end"):
        peek(tmp_path / "a")
    wide = torch.nn.Module()
    for _ in range(40):
        wide, inner = torch.nn.Module(), wide
        wide._modules |= {"a": inner, "b": inner}
    torch.save(wide, tmp_path / "a")
    with pytest.raises(ValueError, match="without end"):
        load(tmp_path / "a", weights)


def test_walking_enters_each_container_once() -> None:
    shared = [1]
    held: dict[str, Any] = {"a": shared, "b": (shared, {2}), "n": argparse.Namespace(x=3)}
    held["itself"] = held
    held["inert"] = inert(Dotted(k=4))
    assert list(walk(held)) == [
        (("a", 0), 1),
        (("b", 1, 0), 2),
        (("n", "x"), 3),
        (("inert", ""), None),
        (("inert", "k"), 4),
        (("inert", 0), read(pickle.dumps(Dotted))),
    ]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert list(walk(deep)) == []


# ── trust ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_trusted_classes_are_real_and_no_others(protocol: int) -> None:
    held = [Plain(), Ring(), Dotted(a=1), Listed([1]), Slotted()]
    data = pickle.dumps(held, protocol)
    found = read(data, [Plain, Dotted, Listed, Slotted])
    kinds = [type(each).__name__ for each in found]
    assert kinds == ["Plain", "Inert", "Dotted", "Listed", "Slotted"]
    assert found[0].name_to_index == {"t": 0}
    assert (found[2], found[3], found[4].a) == ({"a": 1}, [1], 1)
    assert [type(each) for each in read(data, trust=True)] == [type(each) for each in held]
    alias = read(pickle.dumps(Plain(), protocol), [(Ring, f"{HERE}.Plain")])
    assert type(alias) is Ring
    keyword = read(pickle.dumps(Keyword(a=3), 4), [Keyword])
    assert (type(keyword), keyword.a) == (Keyword, 3)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_trusted_is_what_torch_loads(tmp_path: Path, protocol: int, legacy: bool) -> None:
    corpus = [*HARMLESS, Plain(), Ring(), Slotted(), Config(0.1, (1,)), Colour.RED, Pair(1, "x")]
    corpus += [Dotted(a=1), Listed([1]), Reduced(), Keyword(a=3), Outer.Inner(), Net()]
    corpus += [omegaconf.OmegaConf.create({"a": [1]}), functools.partial(made, 1, a=2)]
    for value in corpus:
        held = {"v": value, "t": torch.ones(2)}
        torch.save(
            held,
            tmp_path / "a",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=not legacy,
        )
        expected = torch.load(tmp_path / "a", weights_only=False)
        found = load(tmp_path / "a", trust=True)
        assert type(found["v"]) is type(expected["v"])
        if isinstance(value, Net):
            assert_same(dict(found["v"].state_dict()), dict(expected["v"].state_dict()))
        elif type(value).__eq__ is object.__eq__ and hasattr(found["v"], "__dict__"):
            assert same_vars(found["v"], expected["v"])
        else:
            assert same(found["v"], expected["v"]) or repr(found["v"]) == repr(expected["v"])


def same_vars(one: Any, other: Any) -> bool:
    mine, theirs = vars(one), vars(other)
    return mine.keys() == theirs.keys() and all(
        mine[name] == theirs[name] or (mine[name] is one and theirs[name] is other)
        for name in mine
        if name != "group"
    )


def test_trusted_functions_and_old_instances() -> None:
    assert read(pickle.dumps(Reduced()), [made]) == ["made", 3, "x"]
    old = f"(i{HERE}\nConfig\n.".encode()
    assert isinstance(read(old, [Config]), Config)
    assert read(old).inert_class == f"{HERE}.Config"
    outer = read(pickle.dumps(Outer.Inner(), 2), [Outer.Inner])
    assert type(outer) is Outer.Inner


def test_tensors_of_the_first_torches() -> None:
    """Made empty, and set by their state."""
    storage = torch.arange(4.0).untyped_storage()
    held = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    data = b"\x80\x02ctorch\nTensor\n)R(K\x07QK\x01K\x02\x85K\x01\x85tb."
    found = unpickle(io.BytesIO(data), lambda pid: held, trusted(False))
    assert found.tolist() == [1, 2]
    data = b"\x80\x02ctorch.nn.parameter\nParameter\nctorch\nTensor\n)R\x85\x81"
    data += b"(\x89N" + call("collections", "OrderedDict", b"") + b"tb."
    found = read(data)
    assert (type(found), found.requires_grad) == (torch.nn.Parameter, False)


class Raising:
    """Its state is refused when it is read."""

    def __setstate__(self, state: Any) -> None:
        raise LookupError(f"of an older version: {state}")


class Careful:
    """It looks at its values when it is read."""

    def __init__(self) -> None:
        self.weight = torch.arange(3.0)

    def __setstate__(self, state: Any) -> None:
        self.total = float(state["weight"].sum())


class RaisingItems(dict):
    """It refuses items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise LookupError("no items")


class RaisingList(list):
    """It refuses items."""

    def extend(self, items: Any) -> None:
        raise LookupError("no items")

    append = extend


def raising(*_args: Any) -> Any:
    raise LookupError("never")


def decoding(*_args: Any) -> Any:
    return b"\xff".decode()


def raising_items() -> Any:
    return dict.__new__(RaisingItems)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_trusted_code_raises_is_told_and_the_file_is_not_called_corrupt(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raiser = Raising()
    raiser.x = 1  # type: ignore[attr-defined] # state, so that it is set
    items = RaisingItems()
    dict.__setitem__(items, "a", 1)
    listed = RaisingList([1, 2])
    held = {"v": raiser, "call": ReduceEx(raising, (1,)), "items": items, "list": listed}
    for name, value in held.items():
        torch.save({name: value, "w": torch.ones(2)}, tmp_path / "a", pickle_protocol=protocol)
        for trust in (True, [Raising, raising, RaisingItems, RaisingList]):
            with pytest.raises(CheckpointError, match=r"trusted code .*LookupError") as caught:
                load(tmp_path / "a", trust=trust)
            assert not isinstance(caught.value, CorruptError)
            assert isinstance(caught.value.__cause__.__cause__, LookupError)  # type: ignore[union-attr] # it has one
            assert HERE.partition(".")[0] in str(caught.value)
        assert load(tmp_path / "a")["w"].tolist() == [1, 1]


class OfNumber:
    """Takes no state, and has one that is no container."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OfNumber, (), 5

    def __setstate__(self, state: int) -> None:
        raise LookupError(state)


class OfDict(dict[str, int]):
    """A subclass of dict, which protocol 1 writes as a call with a dict."""


def test_only_getattr_gives_attributes_and_only_what_protocol_1_writes_is_made_anew(
    tmp_path: Path,
) -> None:
    made, of_object = InertGlobal("a", "make"), (InertGlobal("builtins", "object"), None)
    calls = [Inert(made, (InertGlobal("a", "B"), "x")), Inert(made, (OfNumber, *of_object))]
    named = Inert(InertGlobal("copyreg", "_reconstructor"), (OfDict, dict, {"a": 1}))
    save([*calls, named], tmp_path / "a")
    for trust in ([], [OfNumber, OfDict]):
        found = load(tmp_path / "a", trust=trust)
        assert [each.inert_class for each in found[:2]] == ["a.make", "a.make"]
        assert found[2]["a"] == 1


def test_trusted_code_may_refuse_a_state_that_is_no_container(tmp_path: Path) -> None:
    torch.save(OfNumber(), tmp_path / "a")
    for trust in (True, [OfNumber]):
        with pytest.raises(CheckpointError, match=r"trusted code .*LookupError\(5\)"):
            load(tmp_path / "a", trust=trust)


class FloatStorage:
    """Of the name of one of torch's."""


def test_trusted_classes_are_known_by_their_module_and_missing_ones_told(tmp_path: Path) -> None:
    torch.save(FloatStorage(), tmp_path / "a")
    assert type(load(tmp_path / "a", trust=True)) is FloatStorage
    known = {name: getattr(torch, name) for name in ("uint16", "float32") if hasattr(torch, name)}
    torch.save(known, tmp_path / "a")
    assert load(tmp_path / "a", trust=True) == known
    (tmp_path / "a").write_bytes(archived(b"\x80\x02ctorch\nno_such_thing\n."))
    with pytest.raises(CheckpointError, match=r"torch\.no_such_thing, which cannot be imported"):
        load(tmp_path / "a", trust=True)


def test_text_that_trusted_code_cannot_decode_is_none_of_the_pickle(tmp_path: Path) -> None:
    torch.save(ReduceEx(decoding, (1,)), tmp_path / "a")
    for trust in (True, [decoding]):
        with pytest.raises(CheckpointError, match=r"trusted code .*UnicodeDecodeError"):
            load(tmp_path / "a", trust=trust)


def test_what_trusted_classes_in_c_raise_is_told_as_well(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(archived(pickle.dumps(ReduceEx(int, ("x",)), 2)))
    with pytest.raises(CheckpointError, match=r"code .*raised ValueError\(.*is the package"):
        load(tmp_path / "a", trust=[int])


class Hiding:
    """It looks at its values, and hides what comes of that."""

    def __init__(self) -> None:
        self.weight = torch.arange(3.0)

    def __setstate__(self, state: Any) -> None:
        try:
            self.total = float(state["weight"].sum())
        except Exception as err:
            raise KeyError("no total") from err


def test_trusted_code_that_hides_that_it_asks_for_values_gets_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)  # which raises a SystemError without them
    torch.save({"v": Hiding(), "rng": generator, "w": torch.ones(2)}, tmp_path / "a")
    for trust in (True, [Hiding, torch.Generator]):
        found = load(tmp_path / "a", trust=trust)
        assert found["v"].total == 3
        assert found["rng"].initial_seed() == 7


class OneByOne:
    """Items are appended to it, and it takes no others."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def append(self, item: Any) -> None:
        self.items.append(("appended", item))

    def __reduce__(self) -> Any:
        return OneByOne, (), None, iter([item for _, item in self.items])


class Extended(OneByOne):
    """It takes many at once in another way."""

    def extend(self, items: Any) -> None:
        self.items += [("extended", item) for item in items]

    def __reduce__(self) -> Any:
        return Extended, (), None, iter([item for _, item in self.items])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [OneByOne, Extended])
def test_items_are_appended_to_a_trusted_object_as_by_python(
    kind: Any, count: int, protocol: int
) -> None:
    obj = kind()
    for item in range(count):
        obj.append(item)
    data = pickle.dumps(obj, protocol)
    assert read(data, [kind]).items == pickle.loads(data).items


class Sentinel:
    """The one object of its kind, pickled by its name."""

    def __reduce__(self) -> str:
        return "NOTHING_HERE"


NOTHING_HERE = Sentinel()


class ByClassmethod:
    """It is made by a method of its class."""

    def __reduce__(self) -> Any:
        return ByClassmethod.make, (1,)

    @classmethod
    def make(cls, _: int) -> Any:
        return cls()

    @staticmethod
    def without_class(_: int) -> Any:
        return ByClassmethod()


def test_an_object_is_trusted_by_the_name_that_is_given_with_it() -> None:
    """As `torch.serialization.add_safe_globals` takes it."""
    data = pickle.dumps(NOTHING_HERE)
    assert read(data, [(NOTHING_HERE, f"{HERE}.NOTHING_HERE")]) is NOTHING_HERE
    for item in ("Sentinel", NOTHING_HERE, (Sentinel,), (Sentinel, None), (Sentinel, "a", "b")):
        with pytest.raises(TypeError, match="a list of classes"):
            trusted([item])


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("name", ["make", "without_class"])
def test_what_a_trusted_function_finds_is_not_trusted_for_that(protocol: int, name: str) -> None:
    """With `getattr` trusted, protocols below 4 get at all methods of the classes that are."""
    data = pickle.dumps(ReduceEx(getattr(ByClassmethod, name), (1,)), protocol)
    assert isinstance(read(data, [ByClassmethod, getattr]), Inert)
    trust = [ByClassmethod, getattr, getattr(ByClassmethod, name)]
    assert isinstance(read(data, trust), ByClassmethod)


def test_trusted_code_that_is_given_what_is_not_trusted_says_so(tmp_path: Path) -> None:
    save({"call": functools.partial(made, 1)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"code raised .*<inert {HERE}.made>; add that"):
        load(tmp_path / "a", trust=[functools.partial])
    assert load(tmp_path / "a", trust=[functools.partial, made])["call"](2) == ["made", 1, 2]


def test_trusted_code_that_asks_for_values_gets_them(tmp_path: Path) -> None:
    torch.save({"v": Careful(), "w": torch.ones(2)}, tmp_path / "a")
    for trust in (True, [Careful]):
        assert load(tmp_path / "a", trust=trust)["v"].total == 3
        assert load(tmp_path / "a", lambda c: c["v"].total, trust=trust) == 3


def test_a_trusted_class_that_is_not_installed_is_named_and_the_copy_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    missing = {
        "not_here.sub.Table": InertGlobal("not_here.sub", "Table"),
        "collections.Gone": InertGlobal("collections", "Gone"),
    }
    for name, each in missing.items():
        save({"t": Inert(each, (1,)), "w": torch.ones(2)}, tmp_path / "a.ckpt")
        package = name.partition(".")[0]
        with pytest.raises(MissingPackageError, match=rf"{name}, which cannot.*install {package}"):
            load(tmp_path / "a.ckpt", trust=True)
        assert load(tmp_path / "a.ckpt")["t"].inert_class == name


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyboardInterrupt])
def test_want_of_memory_is_not_called_corrupt(tmp_path: Path, error: Any) -> None:
    def refuse(state: Any) -> None:
        raise error

    class_ = type("Refusing", (), {"__setstate__": lambda self, state: refuse(state)})
    class_.__module__, class_.__qualname__ = HERE, "Refusing"
    globals()["Refusing"] = class_
    value = class_()
    value.x = 1
    torch.save({"v": value}, tmp_path / "a")
    for trust in (True, [class_]):
        with pytest.raises(error):
            load(tmp_path / "a", trust=trust)


def test_a_lie_is_corrupt_also_where_all_is_trusted(tmp_path: Path) -> None:
    for data in (
        b"\x80\x02]K\x01K\x02u.",
        b"\x80\x02K\x01.."[:-2],
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01Q.",
    ):
        (tmp_path / "a").write_bytes(archived(data))
        with pytest.raises(CorruptError):
            load(tmp_path / "a", trust=True)


class Made:
    """Made by a class method, and with classes within."""

    class Within:
        """Its own."""

    def __init__(self, value: int) -> None:
        self.value = value

    @classmethod
    def double(cls, value: int) -> Self:
        return cls(2 * value)

    class Kind(enum.Enum):
        """Of two."""

        ONE = 1


def old_attribute(*names: str) -> bytes:
    """An attribute of an attribute, as protocol 2 writes it."""
    first, *others = names
    made = f"c{HERE}\n{first}\n".encode()
    for name in others:
        made = b"c__builtin__\ngetattr\n(" + made + text(name) + b"tR"
    return made


def test_attributes_of_trusted_classes() -> None:
    method = b"\x80\x02" + old_attribute("Made", "double") + b"K\x03\x85R."
    assert read(method).inert_class == f"{HERE}.Made.double"
    for trust in ([Made.double], [Made.double, Made]):
        assert read(method, trust).value == 6
    assert read(method, [Made]).inert_class == f"{HERE}.Made.double"  # which is not on the list
    assert read(method, [Made, getattr, Made.double]).value == 6
    member = b"\x80\x02" + old_attribute("Made", "Kind", "ONE") + b"."
    assert read(member) == InertGlobal(HERE, "Made.Kind.ONE")
    assert read(member, [Made]) == InertGlobal(HERE, "Made.Kind.ONE")
    assert read(member, [Made.Kind]) is Made.Kind.ONE
    assert read(member, [Made.Kind, getattr]) is Made.Kind.ONE
    within = b"\x80\x02" + old_attribute("Made", "Within") + b")\x81."
    assert type(read(within, [Made.Within])) is Made.Within
    assert read(within, [getattr]).inert_class == f"{HERE}.Made.Within"
    for protocol in (0, 1):
        assert type(read(pickle.dumps(Plain(), protocol), [Plain])) is Plain
        assert isinstance(read(pickle.dumps(Plain(), protocol), [Made]), Inert)


def test_names_that_are_nested_without_end() -> None:
    deep = old_attribute("Made", *["x" * 1000] * 12)
    with pytest.raises(pickle.UnpicklingError, match="without end"):
        read(b"\x80\x02" + deep + b".")
    for strange in (old_attribute("Made"), b"K\x03" + text("real")):
        data = b"\x80\x02c__builtin__\ngetattr\n(" + strange + b"tR."
        assert read(data).inert_class == "builtins.getattr"


class Marked(torch.Tensor):
    """A tensor that is rebuilt by a function of its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.as_subclass(torch.Tensor)
        rebuild = torch._tensor._rebuild_from_type_v2
        return rebuild, (rebuild_marked, Marked, (plain, "mark"), {"note": 1})


def rebuild_marked(plain: torch.Tensor, mark: str) -> Any:
    made = plain.as_subclass(Marked)
    made.mark = mark  # type: ignore[attr-defined] # what the class has more
    return made


def test_a_tensor_subclass_with_a_rebuild_function_of_its_own(tmp_path: Path) -> None:
    torch.save({"m": torch.arange(3.0).as_subclass(Marked)}, tmp_path / "a")
    found = load(tmp_path / "a", trust=[Marked, rebuild_marked])["m"]
    assert (type(found), found.tolist(), found.mark, found.note) == (Marked, [0, 1, 2], "mark", 1)
    partly = load(tmp_path / "a", trust=[rebuild_marked])["m"]
    assert partly.inert_class == "torch._tensor._rebuild_from_type_v2"
    assert isinstance(load(tmp_path / "a")["m"], Inert)


@pytest.mark.parametrize("cls", [torch.Tensor, InertGlobal("x", "y")])
def test_a_rebuilt_tensor_whose_arguments_are_inert_stays_inert(tmp_path: Path, cls: Any) -> None:
    func = InertGlobal("torch._tensor", "_rebuild_from_type_v2")
    parameter = torch._utils._rebuild_parameter
    state = {"note": 1}

    def found(rebuild: Any, *given: Any) -> Any:
        save({"t": Inert(func, (rebuild, cls, given, state))}, tmp_path / "a")
        return load(tmp_path / "a")["t"]

    made = found(parameter, torch.arange(3.0), True, collections.OrderedDict())
    tensor = made if cls is torch.Tensor else made._inert_args[0]
    assert type(tensor) is (torch.Tensor if cls is torch.Tensor else nn.Parameter)
    assert tensor.tolist() == [0, 1, 2]
    odd = Inert(InertGlobal("x", "Data"), (1,))
    for given in ((odd, True, {}), (InertGlobal("x", "Data"), True, {}), (range(9), True, {})):
        kept = found(parameter, *given)
        assert kept.inert_class == func.full_name
        assert kept._inert_args == (parameter, cls, given, state)
    deep: Any = (parameter, cls, (torch.ones(1), True, {}), state)
    for _ in range(300):
        deep = (torch._tensor._rebuild_from_type_v2, cls, deep, state)
    save({"t": Inert(func, deep)}, tmp_path / "a")
    assert load(tmp_path / "a")["t"].inert_class == func.full_name
    with pytest.raises(MissingPackageError, match=r"no dtype torch\.new"):
        found(torch._utils._rebuild_meta_tensor_no_storage, InertGlobal("torch", "new"), (), (), 0)


# ── dicts and files of a class ────────────────────────────────────────────────────────────────


class Attributes(dict):
    """A dict whose items are attributes, too."""


class Wrapped(collections.UserDict):  # type: ignore[type-arg] # a base at run time, too
    """A dict in an object."""


class Ordered(collections.OrderedDict):  # type: ignore[type-arg] # likewise
    """An ordered dict with a class of its own."""


class Shadowed(dict):
    """A dict with an attribute of the name of a method."""


@pytest.mark.parametrize("kind", [Attributes, Wrapped, Ordered])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_dict_of_a_class_is_taken_for_a_dict(tmp_path: Path, kind: Any, protocol: int) -> None:
    sd = nn.Linear(2, 2).state_dict()
    for held in (kind(state_dict=sd, epoch=3, optimizer={}), {"state_dict": kind(sd), "epoch": 3}):
        torch.save(held, tmp_path / "a.ckpt", pickle_protocol=protocol)
        found = load(tmp_path / "a.ckpt")
        assert isinstance(found, Mapping)
        assert {*found["state_dict"]} == {"weight", "bias"}
        assert {*load(tmp_path / "a.ckpt", weights)} == {"weight", "bias"}
        assert "optimizer" not in load(tmp_path / "a.ckpt", drop_optimizer)
        model = nn.Linear(2, 2)
        assert load_into(model, tmp_path / "a.ckpt").missing == ()
        assert torch.equal(model.weight, sd["weight"])
        assert peek(tmp_path / "a.ckpt").epoch == 3
        assert len(peek(tmp_path / "a.ckpt").tensors) == 2
        for same in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), copy.copy(found)):
            assert isinstance(same, Mapping)
            assert same.keys() == found.keys()
        save(found, tmp_path / "b.ckpt")
        again = torch.load(tmp_path / "b.ckpt", weights_only=False)
        assert type(again) is type(held)
        assert type(again["state_dict"]) is type(held["state_dict"])


def test_what_is_no_dict_is_not_taken_for_one() -> None:
    shadowed = Shadowed(a=1)
    shadowed.values = 3  # type: ignore[method-assign,assignment] # what a careless class does
    found = inert(shadowed)
    assert not isinstance(found, Mapping)
    assert found.values == 3
    assert not isinstance(inert(Keyword(a=3)), Mapping)
    assert not isinstance(inert(Plain()), Mapping)
    assert not isinstance(inert(nn.ModuleDict({"a": nn.Linear(1, 1)})), Mapping)


def test_a_file_in_memory_comes_as_itself() -> None:
    stream = io.BytesIO(b"abc")
    stream.seek(2)
    found = read(pickle.dumps(stream, 2))
    assert (type(found), found.tell(), found.getvalue()) == (io.BytesIO, 2, b"abc")
    for data, position in ((b"abc", 10**12), (b"abc", -1), ("abc", 0), (b"abc", "0")):
        with pytest.raises(pickle.UnpicklingError, match="a BytesIO that lies"):
            read(pickle.dumps(ReduceEx(io.BytesIO, (), (data, position, None)), 2))


def of_python_2(value: bytes) -> bytes:
    return pickle.SHORT_BINSTRING + bytes([len(value)]) + value


FLOATS = (
    b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)


def array_of_python_2(raw: bytes) -> bytes:
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    return made + b"(K\x01K\x02\x85" + FLOATS + b"\x89" + of_python_2(raw) + b"tb"


def test_text_of_python_2_is_text_where_it_is_utf_8_and_bytes_elsewhere(tmp_path: Path) -> None:
    for data, value in (
        (of_python_2("Zürich".encode()), "Zürich"),
        (of_python_2("Zürich".encode("latin1")), "Zürich".encode("latin1")),
        (b"T\2\0\0\0\xff\xfe", b"\xff\xfe"),
        (b"S'\\xe9'\n", b"\xe9"),
        (
            b"cdatetime\ndatetime\n" + of_python_2(b"\x07\xdf\2\3\4\5\6\0\0\0") + b"\x85R",
            dt.datetime(2015, 2, 3, 4, 5, 6),  # noqa: DTZ001 - as Python 2 wrote them
        ),
    ):
        assert read(b"\x80\x02" + data + b".") == value
    for numbers in ([1.0, -1.5], [0.0, 4e-41]):  # bytes that are no text, and bytes that are
        raw = np.array(numbers, "<f4").tobytes()
        found = read(b"\x80\x02" + array_of_python_2(raw) + b".")
        assert (found.dtype, found.tobytes()) == (np.dtype("<f4"), raw)
        scalar = b"cnumpy.core.multiarray\nscalar\n" + FLOATS + of_python_2(raw[4:]) + b"\x86R."
        assert read(b"\x80\x02" + scalar).tobytes() == raw[4:]
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + of_python_2(b"\xe9") + b".")
    assert load(tmp_path / "a.ckpt") == b"\xe9"
    with pytest.raises(CheckpointError, match=r"text that is not UTF-8.*load it without trust"):
        load(tmp_path / "a.ckpt", trust=True)


# ── hostile ───────────────────────────────────────────────────────────────────────────────────

RAN: list[str] = []


def canary(*_args: Any, **_kwargs: Any) -> Any:
    RAN.append("ran")


class SetState:
    def __setstate__(self, state: Any) -> None:
        canary()


class ReduceEx:
    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.how


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def deep_key() -> bytes:
    return b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u."


def wide_key(opcode: bytes) -> bytes:
    return b"\x80\x04}(K\x01\x85" + (b"q\x01h\x01" + opcode) * 60 + b"K\x01u."


touch = "touch it-ran"
STATE = SetState()
STATE.x = 1  # type: ignore[attr-defined] # an attribute that the class does not declare is the case
MUCH = b"\x8a\x05\0\0\0\0\x7f"  # half a trillion
HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps(ReduceEx(os.system, (touch,)), 2),
    "posix.system": b"\x80\x02" + call("posix", "system", text(touch)) + b".",
    "sys.modules": b"\x80\x02csys\nmodules\n.",
    "eval": pickle.dumps(ReduceEx(eval, (f"__import__('os').system({touch!r})",)), 4),
    "exec": b"\x80\x02" + call("__builtin__", "exec", text("raise SystemExit")) + b".",
    "Popen": pickle.dumps(ReduceEx(subprocess.Popen, (["touch", "it-ran"],)), 4),
    "__import__": b"\x80\x02" + call("builtins", "__import__", text("antigravity")) + b".",
    "getattr": b"\x80\x02"
    + call("builtins", "getattr", b"c__main__\nx\n" + text("__globals__")) + b".",
    "getattr of a module that is refused": b"\x80\x02"
    + call("builtins", "getattr", b"cos\npath\n" + text("join")) + b".",
    "setstate": pickle.dumps(STATE, 4),
    "reduce_ex": pickle.dumps(ReduceEx(canary, (1,)), 4),
    "state by a function": pickle.dumps(ReduceEx(dict, (), {"a": 1}), 2),
    "state setter": pickle.dumps(ReduceEx(Plain, (), {"a": 1}, None, None, canary), 4),
    "BUILD on a class": b"\x80\x02ccollections\nOrderedDict\n}" + text("x") + b"K\x01sb.",
    "BUILD on torch.Tensor": b"\x80\x02ctorch\nTensor\n}" + text("add") + b"K\x01sb.",
    "BUILD on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}"
    + text("__code__") + b"Ns\x86b.",
    "BUILD on a type": b"\x80\x02ctorch\nfloat32\n}" + text("x") + b"K\x01sb.",
    "a name in __main__": b"\x80\x02" + call("__main__", "main", b"") + b".",
    "a name in torch": b"\x80\x02" + call("torch", "load", text("/etc/passwd")) + b".",
    "a name of two lines": b"\x80\x04" + text("a") + text("b\nc") + b"\x93.",
    "torch.hub": b"\x80\x02" + call("torch.hub", "load", text("a/b")) + b".",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call with a list": b"\x80\x02cx\ny\n]R.",
    "numpy's load": b"\x80\x02" + call("numpy", "load", text("x.npy")) + b".",
    "memory by bytearray": b"\x80\x02" + call("builtins", "bytearray", MUCH) + b".",
    "memory by Tensor": b"\x80\x02" + call("torch", "Tensor", MUCH) + b".",
    "memory by storage": b"\x80\x02" + call("torch.storage", "UntypedStorage", MUCH) + b".",
    "a set of a range": b"\x80\x02"
    + call("builtins", "set", call("builtins", "range", MUCH)) + b".",
    "a size of a range": b"\x80\x02"
    + call("torch", "Size", call("builtins", "range", MUCH)) + b".",
    "a parameter of data": b"\x80\x02"
    + call("torch._utils", "_rebuild_parameter", b"cx\ny\n)R\x88N") + b".",
    "rebuild by a class": b"\x80\x02"
    + call("torch._tensor", "_rebuild_from_type_v2", b"ctorch\nTensor\ncx\ny\n)}") + b".",
    "bytes that are none": b"\x80\x02" + call("_codecs", "encode", text("x") + text("zip")) + b".",
    "a default by a function": b"\x80\x02"
    + call("collections", "defaultdict", b"ctorch\nTensor\n") + b".",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "LONG_BINPUT": b"\x80\x02]r\xff\xff\xff\xff.",
    "EXT": b"\x80\x02\x82\x01.",
    "PERSID": b"\x80\x02P1\n.",
    "a persistent id that is a number": b"\x80\x02K\x01Q.",
    "a persistent id of another": b"\x80\x02(" + text("file") + b"NNNNtQ.",
    "an unknown opcode": b"\x80\x02\xff.",
    "no end": b"\x80\x02]" * 9,
    "an empty stack": b"\x80\x02u.",
    "a deep key": deep_key(),
    "a wide key": wide_key(b"\x86"),
    "a wide set": b"\x80\x04\x8f(K\x01\x85" + b"q\x01h\x01\x86" * 60 + b"\x90.",
    "a wide frozenset": b"\x80\x04(K\x01\x85" + b"q\x01h\x01\x86" * 60 + b"\x91.",
    "a wide set by a call": b"\x80\x02"
    + call("builtins", "set", b"](K\x01\x85" + b"q\x01h\x01\x86" * 60 + b"e") + b".",
    "items set on a tuple": b"\x80\x02)K\x01K\x02s.",
    "items appended to a dict": b"\x80\x02}K\x01a.",
    "items added to a list": b"\x80\x04](K\x01\x90.",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "a dict in itself": b"\x80\x02}q\0(K\x01h\0u.",
    "lists nested deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "nested pickles": pickle.dumps(pickle.dumps(pickle.dumps(ReduceEx(canary, ())))),
    "a dtype that lies about its flags": b"\x80\x02"
    + call("numpy", "dtype", text("V8") + b"\x89\x88")
    + b"(K\x03" + text("|") + b"NNNK\x08K\x01K?tb.",
    "a dtype that lies about its size": b"\x80\x02"
    + call("numpy", "dtype", text("S1") + b"\x89\x88")
    + b"(K\x03" + text("|") + b"NNNM\xff\xffK\x01K\x00tb.",
    "an array that lies": b"\x80\x02"
    + call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85" + text("b"))
    + b"(K\x01M\xff\xff\x85" + call("numpy", "dtype", text("f8")) + b"\x89" + text("x") + b"tb.",
    "an array of no type": b"\x80\x02"
    + call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85" + text("b"))
    + b"(K\x01K\x01\x85NNNtb.",
    "an array of pointers": b"\x80\x02"
    + call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85" + text("b"))
    + b"(K\x01K\x01\x85" + call("numpy", "dtype", text("O")) + b"\x89"
    + call("_codecs", "encode", text("12345678") + text("latin1")) + b"tb.",
    "a scalar of a pointer": b"\x80\x02"
    + call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("O")) + b"N") + b".",
    "an array of another class": b"\x80\x02"
    + call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nmatrix\nK\x00\x85" + text("b"))
    + b".",
}  # fmt: skip


def archived(data: bytes) -> bytes:
    """A torch zip with this pickle."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def legacy(data: bytes) -> bytes:
    """A legacy file with this pickle."""
    magic, version, system, _checkpoint, keys = (
        pickle.dumps(each, 2)
        for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, None, [])
    )
    return magic + version + system + data + keys


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a call of a number", "a call of a int"),
        ("a call with a list", "a call whose arguments are no tuple"),
        ("a name of two lines", "a global whose name is no name"),
        ("items set on a tuple", "items set on a tuple"),
        ("items appended to a dict", "items appended to a dict"),
        ("items added to a list", "items added to a list"),
    ],
)
def test_what_is_wrong_with_a_pickle_is_named(name: str, said: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=said):
        unpickle(io.BytesIO(HOSTILE[name]), none, trusted(False))


@pytest.mark.parametrize("function", [("_codecs", "encode"), ("builtins", "bytearray")])
def test_text_in_another_encoding_stays_data(function: tuple[str, str]) -> None:
    for encoding in ("utf-16", "punycode", "rot13"):
        data = b"\x80\x02" + call(*function, text("a") + text(encoding)) + b"."
        assert isinstance(unpickle(io.BytesIO(data), none, trusted(False)), Inert)


def test_a_default_that_is_no_empty_container_stays_data() -> None:
    data = b"\x80\x02" + call("collections", "defaultdict", b"ctorch\nSize\n") + b"."
    assert isinstance(unpickle(io.BytesIO(data), none, trusted(False)), Inert)


def test_items_are_set_on_no_namespace() -> None:
    data = b"\x80\x02" + call("types", "SimpleNamespace", b"") + b"K\x01K\x02s."
    with pytest.raises(pickle.UnpicklingError, match="items set on a SimpleNamespace"):
        unpickle(io.BytesIO(data), none, trusted(False))


@pytest.mark.parametrize("form", [archived, legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_pickle_runs(
    name: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), dir(torch.Tensor), dir(collections.OrderedDict)
    (tmp_path / "a.ckpt").write_bytes(form(HOSTILE[name]))
    attempts = {
        "load": lambda: load("a.ckpt"),
        "strategies": lambda: load("a.ckpt", weights),
        "dropping": lambda: load("a.ckpt", drop("x", missing_ok=True)),
        "peek": lambda: repr(peek("a.ckpt")),
        "metadata": lambda: metadata("a.ckpt", arrays=True),
    }
    for what, attempt in attempts.items():
        try:
            found = attempt()
        except CheckpointError:
            found = None
        except (TypeError, ValueError, AttributeError):  # of a strategy that was given no dict
            if what not in ("strategies", "dropping"):
                raise
            found = None
        if what == "load" and found is not None:
            assert not isinstance(found, subprocess.Popen)
            assert len(repr(found) if name != "lists nested deep" else "") < 1000
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]
    assert RAN == []
    assert before == (dict(os.environ), dir(torch.Tensor), dir(collections.OrderedDict))


def objects_in_each_other(kind: str, count: int) -> bytes:
    """A hundred thousand of these, freed at once, overflow the stack of C."""
    array = pickle.dumps(np.empty(1, object), 2)[2:-1]
    empty = array[: array.index(b"(K\x01K\x01")]  # without its state
    dtype = pickle.dumps(np.dtype("O"), 2)[2:-1]
    begin, end = {
        "deque": (b"ccollections\ndeque\n)R", b"a"),
        "defaultdict": (b"ccollections\ndefaultdict\n)RK\x01", b"s"),
        "namespace": (b"ctypes\nSimpleNamespace\n)R}" + text("a"), b"sb"),
        "array": (empty + b"(K\x01K\x01\x85" + dtype + b"\x89]", b"atb"),
        "a list and a deque": (b"]ccollections\ndeque\n)R", b"aa"),
        "an object and a deque": (b"cx\ny\n)R}" + text("a") + b"ccollections\ndeque\n)R", b"asb"),
    }[kind]
    return b"\x80\x02" + begin * count + b"N" + end * count + b"."


@pytest.mark.parametrize(
    "kind",
    ["deque", "defaultdict", "namespace", "array", "a list and a deque", "an object and a deque"],
)
def test_what_would_overflow_the_stack_when_it_is_freed_is_refused(
    tmp_path: Path, kind: str
) -> None:
    assert read(objects_in_each_other(kind, 900)) is not None
    for count in (1100, 3000):
        data = objects_in_each_other(kind, count)
        with pytest.raises(pickle.UnpicklingError, match="nested without end"):
            read(data)
        with pytest.raises((EOFError, IndexError)):
            read(data[:-1])
    (tmp_path / "a.ckpt").write_bytes(archived(objects_in_each_other(kind, 1100)))
    for opening in (load, peek):
        with pytest.raises(UnsafeCheckpointError, match="nested without end"):
            opening(tmp_path / "a.ckpt")


def test_many_objects_beside_each_other_are_no_nest() -> None:
    inner = collections.deque([collections.deque()])
    held = [inner, *(collections.deque([inner, 1]) for _ in range(1200))]
    ring: Any = collections.defaultdict(list)
    ring[1] = ring
    assert len(read(pickle.dumps([held, ring], 2))[0]) == 1201
    rings = [collections.deque() for _ in range(1200)]
    for one, other in zip(rings, rings[1:] + rings[:1], strict=True):
        one.append(other)
    opcodes = b"\x80\x02(" + b"".join(
        b"ccollections\ndeque\n)Rr" + place.to_bytes(4, "little") for place in range(1200)
    )
    for place in range(1200):  # the outer ones are filled first
        begin, then = place.to_bytes(4, "little"), ((place + 1) % 1200).to_bytes(4, "little")
        opcodes += b"j" + begin + b"j" + then + b"a0"
    with pytest.raises(pickle.UnpicklingError, match="nested without end"):
        read(opcodes + b"t.")


@pytest.mark.parametrize("name", ["os.system", "posix.system", "sys.modules"])
def test_what_torch_refuses_is_refused_here(name: str) -> None:
    with pytest.raises(ForbiddenGlobalError, match=r"(posix|sys)\."):
        read(HOSTILE[name])


def test_hostile_pickles_take_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    def peak(data: bytes) -> int:
        tracemalloc.start()
        with contextlib.suppress(Exception):
            read(data)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    for name, data in HOSTILE.items():
        # threads of other tests' packages count, too: not each time
        assert min(peak(data) for _ in range(3)) < 100 * len(data) + 1_000_000, name


MANY = b"](" + b"K\x01" * 20_000 + b"eq\0"


@pytest.mark.parametrize(
    "made",
    [
        MANY + b"0(" + b"c__builtin__\nlist\nh\0\x85R" * 300 + b"l.",
        MANY + b"0(" + b"c__builtin__\nset\nh\0\x85R" * 300 + b"l.",
        b"}(" + b"".join(b"X\6\0\0\0%06dN" % n for n in range(20_000)) + b"uq\x000("
        b"" + b"ctypes\nSimpleNamespace\n)Rh\0b" * 300 + b"l.",
        b"T" + struct.pack("<i", 20_000) + b"x" * 20_000 + b"q\x000("
        b"" + b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R" * 300 + b"l.",
        b"T" + struct.pack("<i", 20_000) + b"x" * 20_000 + b"q\x000("
        b"" + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01M\x20\x4e\x85cnumpy\ndtype\nU\x02u1K\0K\x01\x87R\x89h\0tb" * 300 + b"l.",
        MANY + b"0cnumpy\ndtype\nU\x02O8K\0K\x01\x87Rq\x010("
        b"" + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01M\x20\x4e\x85h\x01\x89h\0tb" * 300 + b"l.",
    ],
)
def test_what_copies_a_part_of_itself_without_end_is_refused(
    made: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_LEAST", 1_000_000)
    with pytest.raises(CostlyError, match=r"bytes of it take more than \d+ MB of memory"):
        read(b"\x80\x02" + made)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_that_are_copied_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_LEAST", 1_000_000)
    rebuild = InertGlobal("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")
    of_numpy = InertGlobal("torch._utils", "_rebuild_device_tensor_from_numpy")
    values, array = torch.ones(100_000), np.ones(100_000, "f4")

    def put(func: Any, *data: Any) -> Path:
        save([Inert(func, (each, torch.float64, "xla:0", False)) for each in data], path)
        return path

    path = tmp_path / "a.ckpt"
    for func, data in ((rebuild, values), (of_numpy, array)):
        assert load(put(func, data, data))[1].dtype is torch.float64
    for func, many in ((rebuild, [values[:] for _ in range(150)]), (of_numpy, [array] * 150)):
        with pytest.raises(UnsafeCheckpointError, match="of memory"):
            load(put(func, *many))
    for func, some in (
        (rebuild, [values.clone() for _ in range(60)]),
        (of_numpy, [array.copy() for _ in range(60)]),
    ):
        assert len(load(put(func, *some))) == 60
    expanded = Inert(rebuild, (torch.ones(1).expand(10**13), torch.float64, "xla:0", False))
    save(expanded, tmp_path / "a.ckpt")
    with pytest.raises(CorruptError, match="expanded where its values are needed"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("with_slots", [False, True])
def test_states_of_parameters_that_are_copied_without_end_are_refused(
    with_slots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = {f"a{n}": n for n in range(2000)}
    state = (attributes, {}) if with_slots else attributes
    rebuild = InertGlobal("torch._utils", "_rebuild_parameter_with_state")
    made = Inert(rebuild, (torch.ones(1), True, collections.OrderedDict(), state))
    save([made], tmp_path / "a.ckpt")
    monkeypatch.setattr(costs, "_LEAST", 1_000_000)
    assert load(tmp_path / "a.ckpt")[0].a1999 == 1999
    save([Inert(rebuild, made._inert_args) for _ in range(100)], tmp_path / "a.ckpt")
    with pytest.raises(UnsafeCheckpointError, match="of memory"):
        load(tmp_path / "a.ckpt")


def test_tensors_of_thousands_of_dimensions_are_refused_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = InertGlobal("torch._utils", "_rebuild_parameter")
    deep = torch.ones((1,) * 2000)
    for count in (2, 100):
        made = [Inert(rebuild, (deep, True, collections.OrderedDict())) for _ in range(count)]
        save(made, tmp_path / f"{count}.ckpt")
    monkeypatch.setattr(costs, "_LEAST", 500_000)
    assert load(tmp_path / "2.ckpt")[1].dim() == 2000
    with pytest.raises(UnsafeCheckpointError, match="of memory"):
        load(tmp_path / "100.ckpt")


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 1 has no such dtype")
def test_one_text_that_stands_in_an_array_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = np.dtypes.StringDType()
    make = InertGlobal("numpy.core.multiarray", "_reconstruct")
    monkeypatch.setattr(costs, "_LEAST", 500_000)
    for count, is_sound in ((10, True), (1000, False)):
        array = Inert(make, (InertGlobal("numpy", "ndarray"), (0,), b"b"))
        array._inert_state = (1, (count,), kind, False, ["x" * 5000] * count)
        save([array], tmp_path / "a.ckpt")
        if is_sound:
            assert load(tmp_path / "a.ckpt")[0].tolist() == ["x" * 5000] * count
        else:
            with pytest.raises(UnsafeCheckpointError, match="of memory"):
                load(tmp_path / "a.ckpt")


MEMOIZED = {
    "inert": b"cx\ny\nq\x000",
    "deque": b"ccollections\ndeque\nq\x000",
    "namespace": b"ctypes\nSimpleNamespace\nq\x000",
    "dtype": b"cnumpy\ndtype\nq\0U\2f4q\x0100",
    "columns": b"cnumpy\ndtype\nq\0" + text("i1," * 500) + b"q\x0100",
    "many": b"(" + b"K\1" * 5000 + b"tq\1" + b"\x85q\x020ctorch\nSize\nq\x000",
    "new": b"(" + b"K\1" * 5000 + b"tq\x010cx\ny\nq\x000",
    "bytes": b"B" + struct.pack("<I", 5000) + b"x" * 5000 + b"K\0N\x87q\0c_io\nBytesIO\nq\x0100",
    "letters": text("x" * 5000) + b"q\x000",
    "scalar": b"cnumpy.core.multiarray\nscalar\nq\x000cnumpy\ndtype\n"
    + text("S5000")
    + b"\x85R"
    + b"B"
    + struct.pack("<I", 5000)
    + b"x" * 5000
    + b"\x86q\x010",
    "item": text("a") + b"q\x000",
}
# Opcodes that make a great deal of a few bytes, each many times; and what stands before them.
DENSE = {
    "sets": ("", b"\x8f"),
    "dicts": ("", b"}"),
    "lists": ("", b"]"),
    "marks": ("", b"("),  # all of which but one stay open
    "tuples of one": ("", b")\x85\x85\x85\x85"),
    "memos": ("", b"N" + b"\x94" * 20),
    "sets with an item": ("", b"\x8f(N\x90"),
    "frozensets": ("", b"(N\x91"),
    "dicts with an item": ("item", b"}h\0Ns"),
    "calls": ("inert", b"h\0)R"),
    "objects": ("inert", b"h\0)\x81"),
    "objects with arguments": ("new", b"h\0h\1\x81"),
    "deques": ("deque", b"h\0)R"),
    "namespaces": ("namespace", b"h\0)R"),
    "dtypes": ("dtype", b"h\0h\1\x85R"),
    "dtypes with columns": ("columns", b"h\0h\1\x85R"),
    "sizes": ("many", b"h\0h\2R"),
    "files in memory": ("bytes", b"h\1)Rh\0b"),
    "scalars": ("scalar", b"h\0h\1R"),
    "names": ("letters", b"h\0\x8c\x01%c\x93"),
}


def dense(name: str, length: int) -> bytes:
    """A pickle of a tuple of things that take few bytes each."""
    before, each = DENSE[name]
    opcodes = [each.replace(b"%c", bytes([33 + n % 94])) for n in range(length // len(each))]
    return b"\x80\x04" + MEMOIZED.get(before, b"") + b"(" + b"".join(opcodes) + b"t."


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "make", [collections.deque, lambda: collections.deque([1, 2, 3]), lambda: set(range(5)), dict]
)
def test_many_small_containers_are_sound(make: Callable[[], Any], protocol: int) -> None:
    several = [make() for _ in range(60_000)]
    assert read(pickle.dumps(several, protocol)) == several


@pytest.mark.parametrize("name", DENSE)
def test_a_pickle_takes_no_more_memory_than_its_length_explains(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr(costs, "_LEAST", 250_000)
    data = dense(name, 15_000)
    tracemalloc.start()
    with contextlib.suppress(CostlyError):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 250_000 + 90 * len(data)  # a dict is there twice while it grows


@pytest.mark.parametrize(
    "name", ["sets", "marks", "objects with arguments", "deques", "scalars", "names"]
)
def test_what_is_made_of_a_few_bytes_is_refused_when_it_is_too_much(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_LEAST", 0)
    data = dense(name, 50_000)
    with pytest.raises(CostlyError, match="bytes of it take more than"):
        read(data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_checkpoints_are_made_of_is_far_from_too_costly(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_LEAST", 0)
    weights = {f"layers.{n}.weight": torch.nn.Parameter(torch.zeros(2)) for n in range(300)}
    zeros = torch.zeros(2)
    states = {n: {"step": zeros[0], "exp_avg": zeros, "exp_avg_sq": zeros} for n in range(300)}
    nodes = {}
    for n in range(300):
        nodes[f"key_{n}"] = node = Inert(InertGlobal("omegaconf.nodes", "AnyNode"), ())
        node._inert_state = {"_val": n, "_parent": None, "_metadata": {"flags": None, "key": n}}
    numbers = [[float(n), n, str(n)] for n in range(300)]
    of_sgd: dict[int, Any] = {n: {} for n in range(300)}
    modules = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(300)))
    for part in (weights, states, nodes, numbers, of_sgd, modules):
        torch.save(part, tmp_path / "a.ckpt", pickle_protocol=protocol)
        found = load(tmp_path / "a.ckpt")
        assert len(found._modules if part is modules else found) == 300


def test_an_error_of_what_is_too_costly_names_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_LEAST", 1_000_000)
    (tmp_path / "a.ckpt").write_bytes(archived(b"\x80\x04(" + b"\x8f" * 10_000 + b"t."))
    with pytest.raises(UnsafeCheckpointError, match=r"a\.ckpt: .*memory.*trust=True") as caught:
        load(tmp_path / "a.ckpt")
    assert not isinstance(caught.value, CorruptError)
    assert len(load(tmp_path / "a.ckpt", trust=True)) == 10_000


@pytest.mark.parametrize("trust", [False, True])
def test_a_number_of_thousands_of_digits_is_told_and_read_where_python_reads_it(
    tmp_path: Path, trust: bool
) -> None:
    digits = "1" + 5000 * "0"
    (tmp_path / "a.ckpt").write_bytes(archived(f"L{digits}L\n.".encode()))
    with pytest.raises(CheckpointError, match=r"more digits than .*max_str_digits\(0\)") as caught:
        load(tmp_path / "a.ckpt", trust=trust)
    assert not isinstance(caught.value, CorruptError)
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        assert load(tmp_path / "a.ckpt", trust=trust) == 10**5000
    finally:
        sys.set_int_max_str_digits(limit)
    save(10**5000, tmp_path / "a.ckpt")  # protocol 2 has no digits
    assert load(tmp_path / "a.ckpt", trust=trust) == 10**5000


def test_a_name_without_end_is_refused() -> None:
    with pytest.raises(CostlyError, match="nested without end"):
        read(b"\x80\x04" + text("x" * 9_000) + text("y" * 2_000) + b"\x93.")


def test_keys_of_one_hash_are_refused_and_others_are_not() -> None:
    colliding = [n * sys.hash_info.modulus for n in range(1, 300)]
    for keys in (colliding, [(n,) for n in colliding]):
        for made in (dict.fromkeys(keys), set(keys), frozenset(keys)):
            for protocol in (2, 4):
                with pytest.raises(CostlyError, match="keys that have one hash"):
                    read(pickle.dumps(made, protocol))
    same = b"cx\nA\n\x8a\x0c%b\x85RN"
    inert = b"".join(same % n.to_bytes(12, "little") for n in colliding)
    with pytest.raises(CostlyError, match="keys that have one hash"):
        read(b"\x80\x02}(" + inert + b"u.")
    sound = [*range(1000), *(n + 2**64 for n in range(1000)), *((n, -n) for n in range(1000))]
    assert read(pickle.dumps([dict.fromkeys(sound), set(sound)], 4)) == [
        dict.fromkeys(sound),
        set(sound),
    ]
    shared = [{("layer", 1): n} for n in range(1000)]
    assert read(pickle.dumps(shared, 2)) == shared


@pytest.mark.parametrize(
    "parts",
    [
        b"(" + b"K\x01" * 20_000 + b"tq\x000(" + b"cx\nA\nh\0R" * 1000,  # arguments
        b"}(" + b"".join(b"I%d\nN" % n for n in range(20_000)) + b"uq\x000("
        b"" + b"cx\nA\n)\x81h\0b" * 1000,  # states
        MANY + b"0cx\nA\nh\0\x85Rq\x010(" + b"h\1" * 100_000,  # the object
        MANY + b"0(" + b"cx\nA\n(h\0NNh\0tR" * 1000,  # a list among the arguments
    ],
)
def test_what_many_objects_share_is_walked_once(parts: bytes) -> None:
    tree = read(b"\x80\x02" + parts + b"l.")
    assert 20_000 <= len(list(itertools.islice(walk(tree), 10**6))) <= 25_000
