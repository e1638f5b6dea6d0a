"""What differs between versions of torch, numpy and Python makes no difference to who loads."""

import collections
import functools
import io
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch._weights_only_unpickler
import torch.distributed as dist
from pytest_mock import MockerFixture
from torch import nn

import needs
from _anemoi_ckpt import compat, installing
from _anemoi_ckpt.compat import (
    DTYPES_SINCE,
    NEWEST_TRIED,
    casts_by_itself,
    has_own_memory,
    rebuild_sparse_tensor,
    store_of,
    version_of,
    warn_if_untried,
)
from _anemoi_ckpt.formats import unreadable
from _anemoi_ckpt.formats.safetensors import DTYPES, write_safetensors
from _anemoi_ckpt.hollow import dtypes_of
from _anemoi_ckpt.opening import opened
from _anemoi_ckpt.pickles.rebuilds import check_view
from _anemoi_ckpt.pickles.safe import FORBIDDEN_MODULES, PLAIN, known
from _anemoi_ckpt.transport import Transport, locate
from anemoi_ckpt import (
    CorruptError,
    Inert,
    InertGlobal,
    MismatchError,
    MissingPackageError,
    UnsafeCheckpointError,
    diff,
    load,
    load_into,
    peek,
    plan,
    save,
)
from checkpoints import as_bytes, assert_same
from strategies import cast, exclude, require_finite, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*nested:UserWarning", "ignore:.*quantized:UserWarning"
)  # torch's own plans for them


class Call:
    """Pickles as a call of a function with whatever arguments."""

    def __init__(self, func: Callable[..., Any], *args: Any) -> None:
        self.call = func, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def sparse(layout: torch.layout, *parts: Any) -> Call:
    values = [torch.tensor(part) if isinstance(part, list) else part for part in parts]
    return Call(torch._utils._rebuild_sparse_tensor, layout, tuple(values))


def written(path: Path, checkpoint: Any, *, legacy: bool = False) -> Path:
    path.write_bytes(as_bytes(checkpoint, _use_new_zipfile_serialization=not legacy))
    return path


# ── sparse and nested tensors ─────────────────────────────────────────────────────────────────


def compressed(layout: torch.layout) -> dict[str, Call]:
    """Lies of a tensor of four values, or of as many blocks, in four by four of them."""
    block = layout in (torch.sparse_bsr, torch.sparse_bsc)
    values = torch.ones(4, 2, 2) if block else torch.ones(4)
    size = (8, 8) if block else (4, 4)
    make = functools.partial(sparse, layout)
    pointers, places = [0, 1, 2, 3, 4], [0, 1, 2, 3]
    name = str(layout).removeprefix("torch.sparse_")
    lies = {
        "beyond": make(pointers, [0, 1, 2, 4], values, size),
        "far beyond": make(pointers, [0, 1, 2, 2**40], values, size),
        "negative": make(pointers, [0, 1, 2, -1], values, size),
        "pointer beyond": make([0, 1, 2, 3, 9], places, values, size),
        "pointer negative": make([0, -1, 2, 3, 4], places, values, size),
        "pointers fall": make([0, 3, 2, 3, 4], places, values, size),
        "pointers too few": make([0, 1, 2, 4], places, values, size),
        "begins late": make([1, 1, 2, 3, 4], places, values, size),
        "twice the same": make([0, 2, 2, 3, 4], [1, 1, 2, 3], values, size),
    }
    return {f"{name} {what}": each for what, each in lies.items()}


COO = functools.partial(sparse, torch.sparse_coo)
HOSTILE_SPARSE = {
    "coo beyond": COO([[0, 2], [1, 0]], torch.ones(2), (2, 2)),
    "coo far beyond": COO([[0, 2**40], [1, 0]], torch.ones(2), (2, 2)),
    "coo negative": COO([[0, -1], [1, 0]], torch.ones(2), (2, 2)),
    "coo without a flag": COO([[0, 9]], torch.ones(2), (2,)),
    "coo said to be coalesced": COO([[1, 0], [1, 0]], torch.ones(2), (2, 2), True),
    **compressed(torch.sparse_csr),
    **compressed(torch.sparse_csc),
    **compressed(torch.sparse_bsr),
    **compressed(torch.sparse_bsc),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("lie", HOSTILE_SPARSE)
def test_a_sparse_tensor_whose_indices_lie_is_corrupt(
    tmp_path: Path, lie: str, legacy: bool
) -> None:
    held = {"s": HOSTILE_SPARSE[lie], "w": torch.ones(3)}
    path = written(tmp_path / "a.ckpt", held, legacy=legacy)
    for strategies, trust in (((), False), ((lambda c: c["s"],), False), ((), True)):
        with pytest.raises(CorruptError, match=r"a\.ckpt: its pickle cannot be read"):
            load(path, *strategies, trust=trust)


def test_a_sparse_tensor_that_a_strategy_drops_is_not_looked_at(tmp_path: Path) -> None:
    held = {"s": HOSTILE_SPARSE["coo beyond"], "w": torch.ones(3)}
    path = written(tmp_path / "a.ckpt", held)
    assert torch.equal(load(path, lambda c: c["w"]), torch.ones(3))


@pytest.mark.parametrize(
    "lie",
    [COO([[0, 1], [1, 0]], torch.ones(3), (2, 2)), COO([[0, 1]], torch.ones(2), (2, 2))],
    ids=["too many values", "too few dimensions"],
)
def test_a_sparse_tensor_whose_shapes_lie_is_corrupt(tmp_path: Path, lie: Call) -> None:
    path = written(tmp_path / "a.ckpt", {"s": lie, "w": torch.ones(3)})
    for strategies in ((), (dict,)):
        with pytest.raises(CorruptError):
            load(path, *strategies)


DENSE = torch.eye(4) + torch.eye(4).roll(1, 0)
SOUND = {
    "coo": DENSE.to_sparse(),
    "uncoalesced": torch.sparse_coo_tensor([[1, 0, 1]], [1.0, 2.0, 3.0], (2,)),
    "hybrid": torch.sparse_coo_tensor([[0, 1]], [[1.0, 2.0], [3.0, 4.0]], (3, 2)),
    "empty": torch.zeros(3, 3).to_sparse(),
    "csr": DENSE.to_sparse_csr(),
    "csc": DENSE.to_sparse_csc(),
    "bsr": DENSE.to_sparse_bsr((2, 2)),
    "bsc": DENSE.to_sparse_bsc((2, 2)),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_sound_sparse_tensors_of_all_layouts(tmp_path: Path, legacy: bool) -> None:
    path = written(tmp_path / "a.ckpt", SOUND, legacy=legacy)
    for checkpoint in (load(path), load(path, dict), load(path, trust=True)):
        assert_same(checkpoint, SOUND)
    assert {t.name for t in peek(path).tensors} == {*SOUND}
    with torch.sparse.check_sparse_tensor_invariants():
        assert_same(load(path), SOUND)


def test_sparse_tensors_are_checked_in_all_threads_and_no_flag_is_touched(tmp_path: Path) -> None:
    sound = written(tmp_path / "sound.ckpt", SOUND)
    hostile = [
        written(tmp_path / f"{number}.ckpt", {"s": each, "sound": SOUND})
        for number, each in enumerate(HOSTILE_SPARSE.values())
    ]

    def outcome(path: Path) -> Any:
        try:
            return load(path)
        except CorruptError as err:
            return str(err)

    before = torch.sparse.check_sparse_tensor_invariants.is_enabled()
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, [p for each in hostile for p in (sound, each)]))
    for good, bad in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert_same(good, SOUND)
        assert "its pickle cannot be read" in bad
    assert torch.sparse.check_sparse_tensor_invariants.is_enabled() == before
    torch.load(sound, weights_only=True)  # which would find what ours left for it to check


def test_a_sparse_tensor_with_attributes_is_checked_as_well(tmp_path: Path) -> None:
    for name, lie in HOSTILE_SPARSE.items():
        (rebuild, args), state = lie.call, {"note": 1}
        call = Call(torch._tensor._rebuild_from_type_v2, rebuild, torch.Tensor, args, state)
        with pytest.raises(CorruptError):
            load(written(tmp_path / f"{name}.ckpt", {"s": call}))


def nested(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> Call:
    tables = map(torch.tensor, (sizes, strides, offsets))
    return Call(torch._utils._rebuild_nested_tensor, buffer, *tables)


PARTS = [torch.arange(6.0).reshape(2, 3), torch.ones(1, 4)]
HOSTILE_NESTED = {
    "too long": nested(torch.ones(5), [[2], [4]], [[1], [1]], [0, 2]),
    "too long a step": nested(torch.ones(5), [[2], [3]], [[9], [1]], [0, 2]),
    "before the buffer": nested(torch.ones(5), [[2], [3]], [[1], [1]], [-2, 2]),
    "behind the buffer": nested(torch.ones(5), [[2], [3]], [[1], [1]], [0, 2**62]),
    "negative size": nested(torch.ones(5), [[-2], [3]], [[1], [1]], [0, 2]),
    "negative step": nested(torch.ones(5), [[2], [3]], [[-1], [1]], [1, 2]),
    "overflow": nested(torch.ones(5), [[2**62, 2**62]], [[4, 4]], [0]),
    "no table": nested(torch.ones(5), [2, 3], [1, 1], [0, 2]),
    "too few offsets": nested(torch.ones(5), [[2], [3]], [[1], [1]], [0]),
    "steps that are lists": nested(torch.ones(5), [[2**61]], [[[1]]], [0]),
    "no integers": nested(torch.ones(5), [[2.0], [3.0]], [[1], [1]], [0, 2]),
    "no row of values": nested(torch.ones(5, 1), [[2], [3]], [[1], [1]], [0, 2]),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("lie", HOSTILE_NESTED)
def test_a_nested_tensor_whose_sizes_lie_is_corrupt(tmp_path: Path, lie: str, legacy: bool) -> None:
    path = written(tmp_path / "a.ckpt", {"n": HOSTILE_NESTED[lie]}, legacy=legacy)
    for trust in (False, True):  # by our check: not every torch has one of its own
        with pytest.raises(CorruptError, match=r"a nested tensor (with a part|whose sizes)"):
            load(path, trust=trust)


def test_a_nested_tensor_may_end_in_a_part_without_values(tmp_path: Path) -> None:
    held = {"n": nested(torch.ones(3), [[1, 3], [2, 0]], [[3, 1], [1, 1]], [0, 3])}
    for trust in (False, True):
        parts = load(written(tmp_path / "a.ckpt", held), trust=trust)["n"].unbind()
        assert [tuple(part.shape) for part in parts] == [(1, 3), (2, 0)]


def test_a_sparse_tensor_of_a_pickle_that_does_not_say_whether_it_is_coalesced() -> None:
    data = (torch.tensor([[0, 2]]), torch.ones(2), (3,))  # of torch before 2.1
    assert rebuild_sparse_tensor(torch.sparse_coo, data).to_dense().tolist() == [1, 0, 1]


ENDLESS = torch.zeros(1, 1, dtype=torch.int64).expand(1, 10**13)
EXPANDED = {
    "coo": Call(
        torch._utils._rebuild_sparse_tensor,
        torch.sparse_coo,
        (ENDLESS, torch.ones(1).expand(10**13), (2,), False),
    ),
    "csr": Call(
        torch._utils._rebuild_sparse_tensor,
        torch.sparse_csr,
        (torch.tensor([0, 10**13]), ENDLESS[0], torch.ones(1).expand(10**13), (1, 10**13)),
    ),
    "nested": Call(
        torch._utils._rebuild_nested_tensor, torch.ones(2), ENDLESS.t(), ENDLESS.t(), ENDLESS[0]
    ),
    "nested buffer": Call(
        torch._utils._rebuild_nested_tensor,
        torch.ones(1).expand(10**13),
        *map(torch.tensor, ([[2]], [[1]], [0])),
    ),
}


@pytest.mark.parametrize("lie", EXPANDED)
def test_what_is_expanded_without_end_is_not_looked_through(tmp_path: Path, lie: str) -> None:
    path = written(tmp_path / "a.ckpt", {"w": EXPANDED[lie]})
    for trust in (False, True):
        with pytest.raises(CorruptError, match="expanded where its values are needed"):
            load(path, trust=trust)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_nested_tensor_comes_with_its_parts(tmp_path: Path, legacy: bool) -> None:
    held = {"n": torch.nested.nested_tensor(PARTS), "w": torch.ones(2), "s": SOUND["csr"]}
    path = written(tmp_path / "a.ckpt", held, legacy=legacy)
    for checkpoint in (load(path), load(path, dict)):
        assert_same([part.clone() for part in checkpoint["n"].unbind()], PARTS)
    # its sizes are values, which nobody has moved: what it holds stands for it, in a row
    shown = {t.name: t.shape for t in peek(path).tensors}
    assert shown == {"n": (10,), "w": (2,), "s": (4, 4)}
    archive = opened(locate(path, Transport()), Transport()).archive
    kinds = list(dtypes_of(archive).values())
    assert collections.Counter(kinds) == {torch.float32: 3, torch.int64: 5}


# ── what is safe to build ─────────────────────────────────────────────────────────────────────


def test_our_list_has_all_that_torch_builds_and_says_why_it_has_more() -> None:
    theirs = torch._weights_only_unpickler._get_allowed_globals()
    ours = known()
    assert not theirs.keys() - ours.keys()
    for name, each in theirs.items():
        if isinstance(each, torch.serialization.StorageType):
            assert ours[name].dtype == each.dtype
        else:
            assert ours[name] is each, name
    more = {
        name: each
        for name, each in ours.items()
        if name not in theirs and name not in PLAIN and not isinstance(each, torch.dtype)
    }
    if version_of(torch.__version__) >= (2, 13):
        # which torch no longer builds since 2.15, for it believes their sizes, or names differently
        names = ("_rebuild_nested_tensor", "_rebuild_xla_tensor")
        assert more.keys() <= {f"torch._utils.{name}" for name in names}


def test_modules_that_torch_refuses_are_refused() -> None:
    theirs = getattr(torch._weights_only_unpickler, "_blocklisted_modules", FORBIDDEN_MODULES)
    assert {*theirs} == FORBIDDEN_MODULES


@pytest.fixture
def registered() -> Iterator[None]:
    """What another package registers for torch.load changes nothing here."""
    if not hasattr(torch.serialization, "add_safe_globals"):
        pytest.skip("this torch has no register")
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([collections.defaultdict, random.Random, int, dict])
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


class Ran(nn.Linear):
    """A whole model, and what runs when it is built from a pickle."""

    ran: list[str] = []  # noqa: RUF012 - shared on purpose

    def __new__(cls, *args: Any) -> Self:
        cls.ran.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.ran.append("setstate")
        super().__setstate__(state)


def run_it(*args: Any) -> Any:
    Ran.ran.append("function")
    return args


class Reduced:
    def __reduce__(self) -> Any:
        return run_it, (1, [2])


class Setting:
    def __init__(self) -> None:
        self.value = 3


def test_whatever_is_registered_every_way_to_load_gives_the_same(
    tmp_path: Path, registered: None
) -> None:
    checkpoint = {"d": collections.defaultdict(int), "r": Reduced(), "e": Setting(), "n": {}}
    state = Ran(2, 2).state_dict()
    old = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, **checkpoint}, tmp_path / "zip.ckpt")
    old({"state_dict": state, **checkpoint}, tmp_path / "old.ckpt")
    torch.save(Ran(2, 2), tmp_path / "module.pt")
    old(Ran(2, 2), tmp_path / "module.old")
    torch.save({"weight": state["weight"], "r": Reduced()}, tmp_path / "1.bin")
    torch.save({"bias": state["bias"], "r": Reduced()}, tmp_path / "2.bin")
    index = {"weight_map": {"weight": "1.bin", "bias": "2.bin"}}
    (tmp_path / "model.bin.index.json").write_text(json.dumps(index))
    names = ("zip.ckpt", "old.ckpt", "module.pt", "module.old", "model.bin.index.json")

    def seen(place: Path) -> list[Any]:
        model = nn.Linear(2, 2)
        told = [load(place), peek(place), load(place, weights), plan(place).tensors]
        report = load_into(model, place)
        return [*map(repr, told), report.loaded, report.rest.keys(), diff(place, model).equal]

    torch.serialization.clear_safe_globals()
    before = [seen(tmp_path / name) for name in names]
    assert "inert" in before[0][1]
    everything = [Ran, nn.Linear, run_it, Setting, collections.defaultdict, int, set, getattr]
    torch.serialization.add_safe_globals(everything)
    Ran.ran.clear()
    assert type(torch.load(tmp_path / "zip.ckpt", weights_only=True)["e"]) is Setting
    assert Ran.ran == ["function"]
    assert [seen(tmp_path / name) for name in names] == before
    assert Ran.ran == ["function"]


@pytest.mark.parametrize("factory", [int, float, str, bool, list, dict, set, tuple, None])
def test_a_default_dict_comes_as_itself(tmp_path: Path, factory: Any) -> None:
    held = {"d": collections.defaultdict(factory, {"a": 1}), "w": torch.ones(2)}
    found = load(written(tmp_path / "a.ckpt", held))["d"]
    assert type(found) is collections.defaultdict
    assert found == {"a": 1}
    assert found.default_factory is factory
    save({"d": found}, tmp_path / "b.ckpt")
    assert load(tmp_path / "b.ckpt")["d"].default_factory is factory


def test_a_default_dict_of_what_is_unknown_is_inert(tmp_path: Path) -> None:
    held = {"d": collections.defaultdict(random.Random, {"a": 1})}
    found = load(written(tmp_path / "a.ckpt", held))["d"]
    assert found.inert_class == "collections.defaultdict"
    assert found["a"] == 1


def test_what_others_registered_changes_nothing(tmp_path: Path, registered: None) -> None:
    held = {"d": collections.defaultdict(int, {"a": 1}), "r": random.Random(3), "kind": int}
    path = written(tmp_path / "a.ckpt", held)
    found = load(path)
    assert found["d"] == {"a": 1}
    assert found["d"].default_factory is int
    assert found["r"].inert_class == "random.Random"
    assert found["kind"] == InertGlobal("builtins", "int")
    some = load(path, trust=[random.Random])
    assert some["r"].getstate() == random.Random(3).getstate()
    assert some["kind"] == InertGlobal("builtins", "int")
    assert peek(path).epoch is None


# ── devices of other packages ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device", ["xla:0", "hpu:0", "npu:0", "privateuseone:0", "cpu"])
def test_a_tensor_of_a_device_that_is_not_there_comes_on_the_cpu(
    tmp_path: Path, device: str
) -> None:
    name = "_rebuild_device_tensor_from_cpu_tensor"  # which torch has since 2.6
    value = torch.arange(3.0)
    whole = Inert(InertGlobal("torch._utils", name), (value, torch.bfloat16, device, True))
    array = (np.arange(3.0), torch.float32, device, False)
    older = Inert(InertGlobal("torch._utils", "_rebuild_device_tensor_from_numpy"), array)
    oldest = Inert(InertGlobal("torch._utils", "_rebuild_xla_tensor"), array)
    save({"w": whole, "n": older, "x": oldest, "v": torch.ones(2)}, tmp_path / "a.ckpt")
    for trust in (False, True) if hasattr(torch._utils, name) else (False,):
        found = load(tmp_path / "a.ckpt", trust=trust)
        assert_same(found["w"].detach(), value.bfloat16())
        assert found["w"].requires_grad
        assert_same(found["n"], value)
        assert_same(found["x"], value)
    assert load(tmp_path / "a.ckpt", lambda c: c["w"]).tolist() == [0, 1, 2]
    assert load(tmp_path / "a.ckpt", lambda c: c["v"]).tolist() == [1, 1]
    assert {t.name for t in peek(tmp_path / "a.ckpt").tensors} == {"w", "n", "x", "v"}


def test_a_device_or_layout_that_is_not_there_is_data(tmp_path: Path) -> None:
    device = Inert(InertGlobal("torch", "device"), ("npu_of_tomorrow", 0))
    layout = Inert(InertGlobal("torch.serialization", "_get_layout"), ("torch.of_tomorrow",))
    held = {"device": device, "layout": layout, "here": torch.device("cpu")}
    save(held, tmp_path / "a.ckpt")
    found = load(tmp_path / "a.ckpt")
    assert found == held
    assert found["device"].inert_class == "torch.device"


# ── views ─────────────────────────────────────────────────────────────────────────────────────


def view(offset: Any, size: Any, stride: Any, *, version: int = 2) -> Call:
    storage = torch.arange(6.0).storage()
    rebuild = f"_rebuild_tensor_v{version}" if version > 1 else "_rebuild_tensor"
    if version == 3:
        storage = storage.untyped()
    rest = (False, collections.OrderedDict(), torch.float32)[: version if version > 1 else 0]
    return Call(getattr(torch._utils, rebuild), storage, offset, size, stride, *rest)


HOSTILE_VIEWS = {
    "too long": (0, (7,), (1,)),
    "by far too long": (0, (10**12,), (1,)),
    "a step too far": (0, (3,), (3,)),
    "begins behind": (6, (1,), (1,)),
    "begins before": (-1, (1,), (1,)),
    "negative step": (2, (2,), (-1,)),
    "negative size": (0, (-1,), (1,)),
    "strides missing": (0, (2, 2), (1,)),
    "no numbers": (0, ("a",), (1,)),
    "overflow": (0, (2**62, 4), (2**62, 1)),
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("lie", HOSTILE_VIEWS)
def test_a_tensor_that_reaches_beyond_its_storage_is_corrupt(
    tmp_path: Path, lie: str, version: int
) -> None:
    held = {"v": view(*HOSTILE_VIEWS[lie], version=version), "w": torch.ones(3)}
    for legacy in (False, True):
        path = written(tmp_path / "a.ckpt", held, legacy=legacy)
        for read in (load, functools.partial(load, trust=True), peek):
            with pytest.raises(CorruptError, match="its pickle cannot be read"):
                read(path)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_views_that_share_expand_and_are_empty(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        held = {
            "expanded": view(1, (10**6, 2), (0, 1), version=version),
            "empty": view(6, (0, 5), (5, 1), version=version),
            "last": view(5, (), (), version=version),
        }
        found = load(written(tmp_path / "a.ckpt", held))
        assert found["expanded"].stride() == (0, 1)
        assert found["expanded"][-1].tolist() == [1, 2]
        assert found["empty"].shape == (0, 5)
        assert found["last"].item() == 5


def quantized(size: Any, stride: Any, *quantizer: Any, dtype: torch.dtype = torch.qint8) -> Call:
    values = torch.arange(6, dtype=torch.int8).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=values, dtype=dtype, _internal=True)
    hooks = collections.OrderedDict[Any, Any]()
    return Call(torch._utils._rebuild_qtensor, storage, 0, size, stride, quantizer, False, hooks)


LISTS = [0.5, 1.0], [0.0, 1.0]
QUANTIZED = {
    "expanded": quantized((4, 3), (0, 1), torch.per_tensor_affine, 0.5, 0),
    "four bits": quantized(
        (2, 6), (6, 1), torch.per_channel_affine_float_qparams, *LISTS, 0, dtype=torch.quint4x2
    ),
    "two bits": quantized((24,), (1,), torch.per_tensor_affine, 0.5, 0, dtype=torch.quint2x4),
    "lists": quantized((3, 2), (1, 3), torch.per_channel_affine, [0.5, 1.0], [0, 1], 1),
}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_tensor_comes_as_with_torch_load(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "a.ckpt", {"q": QUANTIZED[kind], "w": torch.ones(3)})
    expected = torch.load(path, weights_only=False)["q"]
    for trust in (False, True):
        found = load(path, trust=trust)["q"]
        assert (found.shape, found.stride()) == (expected.shape, expected.stride())
        assert (found.dtype, found.qscheme()) == (expected.dtype, expected.qscheme())
        if kind != "two bits":  # which torch can print no more than compute with
            assert str(found) == str(expected)
    assert peek(path).tensors[0].shape == expected.shape


def test_an_expanded_quantized_tensor_takes_no_memory(tmp_path: Path) -> None:
    lie = quantized((10**14,), (0,), torch.per_tensor_affine, 0.5, 0)
    assert load(written(tmp_path / "a.ckpt", {"q": lie}))["q"].shape == (10**14,)


SCALES = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
HOSTILE_QUANTIZED = {
    "too long": quantized((7,), (1,), torch.per_tensor_affine, 0.5, 0),
    "packed, and too long": quantized(
        (13,), (1,), torch.per_tensor_affine, 0.5, 0, dtype=torch.quint4x2
    ),
    "packed, and not in a row": quantized(
        (2, 3), (1, 4), torch.per_tensor_affine, 0.5, 0, dtype=torch.quint4x2
    ),
    "too few scales": quantized((3, 2), (2, 1), torch.per_channel_affine, *SCALES, 0),
    "too few zero points": quantized(
        (2, 3), (3, 1), torch.per_channel_affine, SCALES[0], SCALES[1][:1], 0
    ),
    "scales without end": quantized(
        (10**13,),
        (0,),
        torch.per_channel_affine,
        *(each[:1].expand(10**13) for each in SCALES),
        0,
    ),
    "an axis beyond": quantized((2, 3), (3, 1), torch.per_channel_affine, *SCALES, 2),
    "an axis that is none": quantized((2, 3), (3, 1), torch.per_channel_affine, *SCALES, "0"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("lie", HOSTILE_QUANTIZED)
def test_a_quantized_tensor_that_lies_is_corrupt(tmp_path: Path, lie: str) -> None:
    path = written(tmp_path / "a.ckpt", {"q": HOSTILE_QUANTIZED[lie], "w": torch.ones(3)})
    for trust in (False, True):
        with pytest.raises(CorruptError):
            load(path, trust=trust)


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("axis", [-1, 2, "0", True])
def test_a_quantized_tensor_has_an_axis(tmp_path: Path, axis: Any) -> None:
    scales = [0.5, 1.0], [0, 1]
    lie = quantized((2, 2), (2, 1), torch.per_channel_affine, *scales, axis)
    with pytest.raises(CorruptError, match="a quantized tensor without an axis"):
        load(written(tmp_path / "a.ckpt", {"q": lie}))


# ── dtypes ────────────────────────────────────────────────────────────────────────────────────


def of_dtype(name: str) -> dict[str, Any]:
    """A tensor as torch writes those of its newer dtypes: on bytes, with the dtype beside."""
    storage = torch.ones(2).untyped_storage()
    args = (storage, 0, (2,), (1,), False, collections.OrderedDict(), InertGlobal("torch", name))
    return {"w": Inert(InertGlobal("torch._utils", "_rebuild_tensor_v3"), args)}


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("float3_e1m1", "install a newer torch"), ("uint16", "torch>=2.3")]
)
def test_a_tensor_whose_dtype_torch_does_not_have_asks_for_a_newer_one(
    tmp_path: Path, dtype: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(known(), f"torch.{dtype}", raising=False)
    save(of_dtype(dtype), tmp_path / "a.ckpt")
    for read in (load, functools.partial(load, trust=[random.Random]), peek):
        with pytest.raises(MissingPackageError, match=rf"no dtype torch\.{dtype}; .*{remedy}"):
            read(tmp_path / "a.ckpt")


def test_trusted_code_that_wants_a_dtype_asks_for_a_newer_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DTYPES_SINCE, "float3_e1m1", "9.9")
    save(of_dtype("float3_e1m1"), tmp_path / "a.ckpt")
    with pytest.raises(MissingPackageError, match=r"no dtype torch\.float3_e1m1; .*torch>=9\.9"):
        load(tmp_path / "a.ckpt", trust=True)


def test_a_dtype_that_torch_does_not_have_is_inert_where_it_is_data(tmp_path: Path) -> None:
    held = {"precision": InertGlobal("torch", "float3_e1m1"), "half": torch.float16}
    save(held, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt") == held


def test_a_subclass_of_a_dtype_that_torch_does_not_have_stays_data(tmp_path: Path) -> None:
    args = (InertGlobal("some", "Tensor"), InertGlobal("torch", "float3_e1m1"), (2,))
    held = {"t": Inert(InertGlobal("torch._utils", "_rebuild_wrapper_subclass"), args)}
    save(held, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt") == held


def test_safetensors_of_a_dtype_that_torch_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    write_safetensors({"w": torch.ones(2, dtype=torch.uint8)}, stream)
    data = stream.getvalue().replace(b'"U8"', b'"F8_E8M0"')
    length = int.from_bytes(data[:8], "little") + len('"F8_E8M0"') - len('"U8"')
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    monkeypatch.delitem(DTYPES, "F8_E8M0", raising=False)
    with pytest.raises(MissingPackageError, match=r"no dtype torch\.float8_e8m0fnu; .*torch>=2\.7"):
        load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(stream.getvalue().replace(b'"U8"', b'"XX"'))
    with pytest.raises(CorruptError):
        load(tmp_path / "b.safetensors")


# ── numpy ─────────────────────────────────────────────────────────────────────────────────────

ALIGNED = np.dtype([("a", "i1"), ("b", "f8"), ("m", "f4", (2, 2))], align=True)


def test_numpy_dtypes_in_parts(tmp_path: Path) -> None:
    held = {
        "aligned": np.zeros(2, ALIGNED),
        "nested": np.zeros(2, np.dtype([("x", ALIGNED), ("y", "i2")], align=True)),
        "matrices": np.ones(3, np.dtype([("m", "f4", (2, 2)), ("n", "i4")])),
        "dtypes": [ALIGNED, np.dtype(("f4", (2, 3))), np.dtype([("m", "f4", (2, 2))])],
    }
    first = load(written(tmp_path / "a.ckpt", held))
    save(first, tmp_path / "b.ckpt")
    for found in (first, load(tmp_path / "b.ckpt")):
        for name in ("aligned", "nested", "matrices"):
            assert found[name].dtype == held[name].dtype
            assert found[name].dtype.isalignedstruct == held[name].dtype.isalignedstruct
            assert found[name].tobytes() == held[name].tobytes()
        assert found["dtypes"] == held["dtypes"]


def forged_dtype(name: str, *state: Any) -> Inert:
    forged = Inert(InertGlobal("numpy", "dtype"), (name, False, True))
    forged._inert_state = (3, *state)
    return forged


F4 = np.dtype("f4")
_COLUMNS = ("a",), {"a": (np.dtype("f8"), 0)}
HOSTILE_DTYPES = {
    "sub-array of another size": ("V24", "|", (F4, (2, 2)), None, None, 24, 4, 0),
    "sub-array of no dtype": ("V24", "|", ("f4", (2, 3)), None, None, 24, 4, 0),
    "sub-array with columns": ("V8", "|", (F4, (2,)), *_COLUMNS, 8, 4, 0),
    "sub-array without end": ("V24", "|", (F4, (2**62, 2**62)), None, None, 24, 4, 0),
    "said to be aligned": ("V9", "|", None, ("a",), {"a": (np.dtype("f8"), 1)}, 9, 8, 0x90),
    "another alignment": ("V8", "|", None, *_COLUMNS, 8, 64, 0x90),
    "said to be objects": ("V8", "|", None, None, None, 8, 1, 0x3F),
    "metadata that are none": ("u1", "|", None, None, None, -1, -1, 0, 3),
    "a time without its unit": ("M8", "<", None, None, None, -1, -1, 0),
    "another order": ("u2", "?", None, None, None, -1, -1, 0),
}


def of_parts(layout: torch.layout, first: int, value: float) -> torch.Tensor:
    parts = [torch.full((n, 3), value) for n in (first, 6 - first)]
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.parametrize(
    "layout",
    [
        torch.strided,
        pytest.param(
            torch.jagged,
            marks=pytest.mark.skipif(
                version_of(torch.__version__) < (2, 6), reason="torch pickles no such tensors"
            ),
        ),
    ],
)
def test_nested_tensors_of_either_layout_in_strategies_and_models(
    tmp_path: Path, layout: torch.layout
) -> None:
    def put(name: str, first: int, value: float) -> Path:
        torch.save({"w": torch.ones(2), "n": of_parts(layout, first, value)}, tmp_path / name)
        return tmp_path / name

    path, other = put("a", 2, 1.0), put("b", 2, 2.0)
    shorter, infinite = put("c", 3, 1.0), put("d", 2, float("inf"))
    loaded = load(path, require_finite, cast(torch.float64), trust=True)
    assert [part.tolist() for part in loaded["n"].unbind()] == [[[1.0] * 3] * 2, [[1.0] * 3] * 4]
    with pytest.raises(MismatchError, match="NaN or infinity in n"):
        load(infinite, require_finite, trust=True)
    model = torch.nn.Module()
    model.register_buffer("w", torch.zeros(2))
    model.register_buffer("n", of_parts(layout, 2, 0.0))
    with pytest.raises(MismatchError, match=r"no tensors of the model's layout: n"):
        load_into(model, path, trust=True)
    assert model.w.tolist() == [0, 0]
    load_into(model, path, exclude("n"), strict=False, trust=True)
    assert model.w.tolist() == [1, 1]
    assert [part.sum().item() for part in model.n.unbind()] == [0, 0]
    for values in (True, False):
        assert not diff(path, path, values=values).changed
        assert not diff(path, path, values=values).reshaped
        assert diff(path, shorter, values=values).reshaped
    changed = diff(path, other, values=True).changed
    assert {name[:1] for name in changed} == {"n"}


@pytest.mark.parametrize("lie", HOSTILE_DTYPES)
def test_a_numpy_dtype_that_lies_is_corrupt(tmp_path: Path, lie: str) -> None:
    save({"d": forged_dtype(*HOSTILE_DTYPES[lie])}, tmp_path / "a.ckpt")
    with pytest.raises(CorruptError):
        load(tmp_path / "a.ckpt")


_MULTIARRAY, _NDARRAY = "numpy.core.multiarray", InertGlobal("numpy", "ndarray")
_INTERNAL = "numpy._core._internal"


@pytest.mark.parametrize(
    ("module", "name", "args"),
    [
        (_MULTIARRAY, "_reconstruct", ("f4",)),
        (_MULTIARRAY, "_reconstruct", (InertGlobal("some", "Array"), (0,), b"b")),
        (_MULTIARRAY, "scalar", (_NDARRAY, bytes(4))),
        (_MULTIARRAY, "scalar", (F4, bytearray(4))),
        (_MULTIARRAY, "scalar", (np.dtype("O"), bytes(8))),
        ("numpy", "dtype", (("f4", (2,)),)),
        ("numpy", "dtype", ("i1,i1", 0, 1)),
        (_INTERNAL, "_convert_to_stringdtype_kwargs", (1, [])),
    ],
)
def test_what_numpy_would_make_of_odd_arguments_stays_data(
    module: str, name: str, args: tuple[Any, ...], tmp_path: Path
) -> None:
    save({"d": Inert(InertGlobal(module, name), args)}, tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt")["d"].inert_class == f"{module}.{name}"


@pytest.mark.parametrize(
    ("shape", "dtype", "raw"),
    [
        *(((-1, -2), F4, bytes(8)), ((2**62, "x"), F4, bytes(8)), ((2.0,), F4, bytes(8))),
        *(((2,), "f4", bytes(8)), (2, F4, bytes(8)), ((2**62, 4), F4, bytes(8))),
        *(((2,), F4, bytearray(8)), ((2,), F4, [0] * 8)),
        *(((2,), np.dtype("O"), raw) for raw in ([1], [1, 2, 3], (1, 2))),
    ],
)
def test_a_numpy_array_whose_shape_dtype_or_values_lie_is_corrupt(
    shape: Any, dtype: Any, raw: Any, tmp_path: Path
) -> None:
    forged = Inert(InertGlobal(_MULTIARRAY, "_reconstruct"), (_NDARRAY, (0,), b"b"))
    forged._inert_state = (1, shape, dtype, False, raw)
    save({"a": forged}, tmp_path / "a.ckpt")
    with pytest.raises(CorruptError):
        load(tmp_path / "a.ckpt")


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 1 has no such dtype")
def test_a_dtype_of_strings_takes_no_state_and_an_array_of_them_texts_alone(tmp_path: Path) -> None:
    kind: Any = np.dtypes.StringDType()
    forged = Inert(InertGlobal(_INTERNAL, "_convert_to_stringdtype_kwargs"), (1,))
    forged._inert_state = (3, "|", None, None, None, kind.itemsize, kind.alignment, kind.flags)
    array = Inert(InertGlobal(_MULTIARRAY, "_reconstruct"), (_NDARRAY, (0,), b"b"))
    array._inert_state = (1, (1,), kind, False, [[1, 2]])  # made texts of, lists have no end
    for held in (forged, array):
        save({"d": held}, tmp_path / "a.ckpt")
        with pytest.raises(CorruptError, match="state does not fit"):
            load(tmp_path / "a.ckpt")


def test_a_numpy_dtype_whose_parts_are_text_or_objects(tmp_path: Path) -> None:
    save({"d": forged_dtype("V4", "|", ("f4", (1,)), None, None, 4, 1, 0)}, tmp_path / "a.ckpt")
    with pytest.raises(CorruptError, match="a numpy dtype with a part that is none"):
        load(tmp_path / "a.ckpt")
    of_objects = np.dtype([("a", object, (2,))])
    assert isinstance(load(written(tmp_path / "a.ckpt", {"d": of_objects}))["d"], Inert)


def test_a_numpy_dtype_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    nested = np.dtype("f4")
    for _ in range(40):
        nested = np.dtype([("a", nested)])
    with pytest.raises(UnsafeCheckpointError, match="nested without end"):
        load(written(tmp_path / "a.ckpt", {"d": nested}))


H5PY = {  # what h5py reads has such metadata
    "text": np.array(["2t", "msl"], np.dtype("O", metadata={"vlen": str})),
    "bytes": np.array([b"2t"], np.dtype("S2", metadata={"h5py_encoding": "utf-8"})),
    "enum": np.array([0, 1], np.dtype("u1", metadata={"enum": {"A": 0}})),
    "big endian": np.array([0, 1], np.dtype(">u2", metadata={"enum": {"A": 0}})),
    "columns": np.zeros(2, np.dtype([("a", "f4")], metadata={"note": 1})),
}


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_dtypes_with_metadata(tmp_path: Path, protocol: int) -> None:
    both = {"one": H5PY, "again": [each.dtype for each in H5PY.values()]}
    path = tmp_path / "a.ckpt"
    torch.save(both, path, pickle_protocol=protocol)
    found = load(path)
    for name, array in H5PY.items():
        assert found["one"][name].dtype == array.dtype.newbyteorder("=")  # as numpy itself reads it
        assert found["one"][name].dtype.metadata == array.dtype.metadata
        assert found["one"][name].tolist() == array.tolist()
    assert found["again"] == [array.dtype for array in H5PY.values()]
    assert [d.metadata for d in found["again"]] == [a.dtype.metadata for a in H5PY.values()]


def test_columns_without_a_name_or_with_a_title(tmp_path: Path) -> None:
    titled = np.zeros(2, np.dtype([(("title", "a"), "f4"), ("b", "i2")]))
    held = {"titled": titled, "empty": np.dtype([]), "zeros": np.zeros(2, np.dtype([]))}
    found = load(written(tmp_path / "a.ckpt", held))
    assert found["titled"].dtype == titled.dtype
    assert found["titled"]["title"].tolist() == [0, 0]
    assert found["empty"] == held["empty"]
    assert found["zeros"].shape == (2,)


class Unknown:
    """A class of another package, in metadata."""


OTHERS = {
    "metadata of a class": np.array([1], np.dtype("u1", metadata={"ref": Unknown()})),
    "metadata without names": np.array([1], np.dtype("u1", metadata={3: "x"})),
    "metadata of time": np.array([1], np.dtype("M8[s]", metadata={"a": 1})),
    "columns of objects": np.zeros(2, [("a", object)]),
    "sub-arrays of objects": np.zeros(2, [("a", object, (2,))]),
    "columns of such": np.zeros(2, [("a", np.dtype("u1", metadata={"ref": Unknown()}))]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_of_numpy_is_not_known_comes_inert_and_the_rest_loads(
    tmp_path: Path, name: str
) -> None:
    value = OTHERS[name]
    held = {"a": value, "same": [value], "dtype": value.dtype, "w": torch.ones(2)}
    found = load(written(tmp_path / "a.ckpt", held))
    assert found["w"].tolist() == [1, 1]
    assert found["a"].inert_class.endswith("multiarray._reconstruct")
    assert found["same"][0] is found["a"]  # and in no place what it was before its state came
    assert [t.shape for t in peek(tmp_path / "a.ckpt").tensors] == [(2,)]
    save(found, tmp_path / "b.ckpt")
    again = torch.load(tmp_path / "b.ckpt", weights_only=False)
    assert again["a"].dtype == value.dtype
    assert repr(again["a"]) == repr(value)
    assert again["same"][0] is again["a"]


def test_a_dtype_of_another_package_comes_inert(tmp_path: Path) -> None:
    kind = Inert(InertGlobal("numpy", "dtype"), (InertGlobal("ml_dtypes", "bfloat16"), False, True))
    kind._inert_state = (3, "<", None, None, None, -1, -1, 0)
    scalar = Inert(InertGlobal("numpy._core.multiarray", "scalar"), (kind, b"ab"))
    array = string_array([])
    array._inert_state = (1, (2,), kind, False, b"abcd")
    save({"a": array, "s": scalar, "w": torch.ones(2)}, tmp_path / "a.ckpt")
    found = load(tmp_path / "a.ckpt")
    assert found["w"].tolist() == [1, 1]
    assert found["a"]._inert_state[2:] == (kind, False, b"abcd")
    assert found["s"] == scalar


def string_array(strings: list[Any], *kwargs: Any) -> Inert:
    """An array as numpy 2 writes one of strings of any length."""
    make = InertGlobal("numpy._core._internal", "_convert_to_stringdtype_kwargs")
    kind, b = (
        InertGlobal("numpy", "ndarray"),
        Inert(InertGlobal("_codecs", "encode"), ("b", "latin1")),
    )
    array = Inert(InertGlobal("numpy._core.multiarray", "_reconstruct"), (kind, (0,), b))
    array._inert_state = (1, (len(strings),), Inert(make, kwargs), False, strings)
    return array


@pytest.mark.parametrize("kwargs", [(1,), (0,), (1, None)])
def test_strings_of_any_length(tmp_path: Path, kwargs: tuple[Any, ...]) -> None:
    strings = ["a", "", "ü" * 50, *kwargs[1:]]
    save({"s": string_array(strings, *kwargs), "w": torch.ones(1)}, tmp_path / "a.ckpt")
    found = load(tmp_path / "a.ckpt")["s"]
    assert found.tolist() == strings
    if hasattr(np.dtypes, "StringDType"):
        options = {"na_object": kwargs[1]} if kwargs[1:] else {}
        assert found.dtype == np.dtypes.StringDType(coerce=bool(kwargs[0]), **options)
    else:
        assert found.dtype == object
    save({"s": found}, tmp_path / "b.ckpt")
    assert load(tmp_path / "b.ckpt")["s"].tolist() == strings


def test_strings_are_objects_before_numpy_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(np.dtypes, "StringDType", raising=False)
    save({"s": string_array(["a", "bc"], 1)}, tmp_path / "a.ckpt")
    found = load(tmp_path / "a.ckpt")["s"]
    assert (found.dtype, found.tolist()) == (np.dtype("O"), ["a", "bc"])


def test_strings_that_lie_are_corrupt(tmp_path: Path) -> None:
    several = string_array(["a"], 1)
    version, _, *rest = several._inert_state
    several._inert_state = (version, (3,), *rest)
    stated = string_array(["a"], 1)._inert_state[2]
    stated._inert_state = (3, "|", None, None, None, 16, 8, 107)
    for lie in (several, stated, string_array(["a", Inert()], 1)):
        if lie is stated and not hasattr(np.dtypes, "StringDType"):
            continue
        save({"s": lie}, tmp_path / "a.ckpt")
        with pytest.raises(CorruptError):
            load(tmp_path / "a.ckpt")


# ── writing ───────────────────────────────────────────────────────────────────────────────────


class Bag(list):
    """A list with a class of its own."""


class Box(dict):
    """A dict with a class of its own."""


@pytest.mark.parametrize("count", [0, 1, 2, 2500])
def test_inert_lists_and_dicts_are_written_with_all_they_hold(tmp_path: Path, count: int) -> None:
    held = {"bag": Bag(range(count)), "box": Box({n: str(n) for n in range(count)})}
    inert = load(written(tmp_path / "a.ckpt", held))
    assert isinstance(inert["bag"], Inert)
    save(inert, tmp_path / "b.ckpt")
    for real in (
        load(tmp_path / "b.ckpt", trust=[Bag, Box]),
        load(tmp_path / "b.ckpt", trust=True),
    ):
        assert type(real["bag"]) is Bag
        assert type(real["box"]) is Box
        assert real == held


def test_what_is_inert_is_written_under_torchs_own_names(tmp_path: Path) -> None:
    jagged = Call(
        torch._tensor._rebuild_from_type_v2,
        torch._utils._rebuild_sparse_tensor,
        random.Random,
        (torch.sparse_coo, (torch.tensor([[0]]), torch.ones(1), (2,), True)),
        {},
    )
    held = {"t": jagged, "f": torch._utils._rebuild_sparse_tensor}
    inert = load(written(tmp_path / "a.ckpt", held))
    assert inert["f"] is torch._utils._rebuild_sparse_tensor
    assert inert["t"].inert_class == "torch._tensor._rebuild_from_type_v2"
    save(inert, tmp_path / "b.ckpt")
    assert b"anemoi" not in (tmp_path / "b.ckpt").read_bytes()
    assert load(tmp_path / "b.ckpt")["t"].inert_class == inert["t"].inert_class


# ── models, memory and groups ─────────────────────────────────────────────────────────────────


def test_memory_that_a_tensor_has_alone() -> None:
    tensor = torch.ones(3)
    known_by_torch = hasattr(torch._C, "_storage_Use_Count") and hasattr(
        torch.UntypedStorage, "resizable"
    )
    assert has_own_memory(tensor) is known_by_torch
    view = tensor[1:]
    assert not has_own_memory(tensor)
    del view
    assert has_own_memory(tensor) is known_by_torch
    assert not has_own_memory(torch.from_numpy(np.ones(3)))


@pytest.mark.parametrize("absent", ["count", "resizable"])
def test_where_torch_does_not_tell_who_shares_memory_it_is_copied(
    absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name = {
        "count": (torch._C, "_storage_Use_Count"),
        "resizable": (torch.UntypedStorage, "resizable"),
    }[absent]
    monkeypatch.setattr(where, name, None, raising=False)
    assert not has_own_memory(torch.ones(3))
    given = nn.Linear(2, 3).state_dict()
    model = nn.Linear(2, 3, device="meta")
    load_into(model, given)
    assert_same(dict(model.state_dict()), dict(given))
    assert model.weight.data_ptr() != given["weight"].data_ptr()


class Mixed(nn.Module):
    """Some of its parameters are trained, some are not, and one is of integers."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.ones(2, device=device))
        self.frozen = nn.Parameter(torch.ones(2, device=device), requires_grad=False)
        self.steps = nn.Parameter(torch.arange(3, device=device), requires_grad=False)
        self.register_buffer("buffer", torch.ones(2, device=device))


@pytest.mark.skipif(torch.__version__ < (2, 3), reason="2.2 assigns no integers to a Parameter")
def test_a_model_on_meta_keeps_what_is_trained(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt", Mixed("cpu").state_dict())
    model = Mixed("meta")
    load_into(model, path)
    assert_same(dict(model.state_dict()), dict(Mixed("cpu").state_dict()))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert trained == {"trained": True, "frozen": False, "steps": False}
    assert not isinstance(model.buffer, nn.Parameter)


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_store_of_a_group(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(group).set("key", "value")
    monkeypatch.delattr(dist.ProcessGroup, "get_group_store", raising=False)  # as torch 2.2
    assert store_of(group).get("key") == b"value"


@needs.with_fsdp2
@pytest.mark.filterwarnings("ignore:.*_get_pg_default_device:UserWarning")  # torch's own call
@pytest.mark.filterwarnings("ignore:Multiple backends:UserWarning")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6, once
def test_a_sharded_model_on_meta_is_filled_at_once_where_torch_wants_that(
    group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mocker: MockerFixture
) -> None:
    from torch.distributed.checkpoint import state_dict as sharded
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(installing, "FILLS_MIXED_DEVICES", False)
    given = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).half().state_dict()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))  # takes twice the bytes
    calls = mocker.spy(sharded, "set_model_state_dict")
    mesh = dist.init_device_mesh("cpu", (1,))
    load_into(fully_shard(model, mesh=mesh), written(tmp_path / "a.ckpt", given))
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert_same(whole, {name: value.float() for name, value in given.items()})
    assert calls.call_count == 1


@pytest.mark.filterwarnings("ignore:torch.is_autocast_cpu_enabled:DeprecationWarning")
def test_autocast_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(torch, "is_autocast_cpu_enabled"):
        monkeypatch.setattr(compat, "AUTOCAST_BY_DEVICE", False)  # as torch 2.3
    assert not casts_by_itself()
    with torch.autocast("cpu"):
        assert casts_by_itself()


# ── versions ──────────────────────────────────────────────────────────────────────────────────


def test_a_torch_that_is_newer_than_any_that_was_tried_gives_a_warning() -> None:
    major, minor = NEWEST_TRIED
    with pytest.warns(
        UserWarning, match=rf"torch up to {major}\.{minor}, and this is torch {major}"
    ):
        warn_if_untried(f"{major}.{minor + 1}.0.dev20270101+cpu")
    with pytest.warns(UserWarning, match="newer anemoi-ckpt"):
        warn_if_untried(f"{major + 1}.0.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("2.2.2+cu121", f"{major}.{minor}.9", f"{major}.{minor}.0a0+git123"):
            warn_if_untried(version)


def test_the_warning_comes_once() -> None:
    code = (
        "import torch; torch.__version__ = '99.1.0'\n"
        "import strategies, anemoi_ckpt, anemoi_ckpt.strategies\n"
        "anemoi_ckpt.save({'w': torch.ones(2)}, 'memory.ckpt'); anemoi_ckpt.load('memory.ckpt')\n"
    )
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    with_paths = {"PYTHONPATH": ":".join(sys.path)}
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ran = run(
            [sys.executable, "-W", "always", "-c", code],
            cwd=folder,
            env={**os.environ, **with_paths},
        )
    assert ran.stderr.count("and this is torch 99.1.0") == 1


def test_a_tensor_on_what_is_no_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="on what is no storage"):
        check_view([1.0], 0, (1,), (1,), torch.float32)


def test_a_failed_allocation_of_torch_is_want_of_memory() -> None:
    with pytest.raises(MemoryError, match="can't allocate"), unreadable("a.ckpt", "its pickle"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    with pytest.raises(CorruptError, match="cannot be read"), unreadable("a.ckpt", "its pickle"):
        raise RuntimeError("anything else")
