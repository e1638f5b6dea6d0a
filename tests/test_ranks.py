"""Ranks of a process group: each byte is served once, and what one meets, all raise.

Most run the ranks in threads of one process, which gloo allows; some are real processes.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import _anemoi_ckpt.cache
import _anemoi_ckpt.downloading
import _anemoi_ckpt.fetching
import _anemoi_ckpt.ranks
import anemoi_ckpt
import needs
import servers
from _anemoi_ckpt.progress import shown
from _anemoi_ckpt.ranks import stored
from anemoi_ckpt import (
    CorruptError,
    InvalidURIError,
    MismatchError,
    UnreachableError,
    download,
    load,
    load_into,
    parse_uri,
)
from checkpoints import as_bytes, assert_same, odd_checkpoint
from strategies import align_variables, include, weights

ROOT = Path(anemoi_ckpt.__file__).parent
CHECKPOINT = {
    "state_dict": {
        **{f"large.{n}": torch.randn(700_000) for n in range(6)},
        **{f"small.{n}": torch.randn(300) for n in range(40)},
    },
    "optimizer_states": [torch.zeros(5_000_000)],
    "epoch": 3,
}
NEEDED = 4 * (6 * 700_000 + 40 * 300)
SOON_SECONDS = 60  # a second or two, but on a busy machine; who hears nothing waits for 360

_groups = iter(range(10**9))


class Group:
    """A process group as one of its ranks has it, here a thread: what `load` asks of it."""

    def __init__(self, store: dist.Store, rank: int, size: int, name: str) -> None:
        self.rank, self.size = lambda: rank, lambda: size
        self.group_name, self.get_group_store = name, lambda: store


def on_ranks(size: int, act: Callable[[int, Any], Any]) -> list[Any]:
    """What each of so many ranks gives back, or raises."""
    store, name = dist.HashStore(), f"threads-{next(_groups)}"

    def run(rank: int) -> Any:
        try:
            return act(rank, Group(store, rank, size, name))
        except Exception as err:
            return err

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _anemoi_ckpt.ranks, "_has_nccl", lambda group: False
    )  # these groups have none


# ── the store where they meet ─────────────────────────────────────────────────────────────────


def tcp_store(port: int | None = None) -> dist.TCPStore:
    """A server's store, or with its port a client's; by libuv where torch has it (Debian's not)."""
    make = functools.partial(dist.TCPStore, "127.0.0.1", port or 0, is_master=port is None)
    try:
        return make(wait_for_workers=False)
    except RuntimeError as err:
        if "libuv" not in str(err):
            raise
        return make(wait_for_workers=False, use_libuv=False)


STORES: dict[str, Callable[[Path], dist.Store]] = {
    "hash": lambda _: dist.HashStore(),
    "file": lambda path: dist.FileStore(str(path / "store"), 1),
    "tcp": lambda _: tcp_store(),
}


@pytest.mark.parametrize("kind", STORES)
def test_what_is_stored_under_a_key(tmp_path: Path, kind: str) -> None:
    store = dist.PrefixStore("a call", STORES[kind](tmp_path))
    for _ in range(2):  # asking makes no key
        assert stored(store, "key") == b""
    value = pickle.dumps(["anything", b"\0\xff"])
    store.set("key", value)
    assert stored(store, "key") == value == store.get("key")


@contextlib.contextmanager
def slowly(port: int) -> Iterator[int]:
    """Gives the port of a relay that holds back each packet for some milliseconds."""
    with contextlib.ExitStack() as ends:
        listener = ends.enter_context(socket.create_server(("127.0.0.1", 0)))

        def relay(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(2**16):
                    time.sleep(0.02)
                    target.sendall(data)

        def accept() -> None:
            near = ends.enter_context(listener.accept()[0])
            far = ends.enter_context(socket.create_connection(("127.0.0.1", port)))
            threading.Thread(target=relay, args=(far, near), daemon=True).start()
            relay(near, far)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_store_that_is_slow_has_what_it_has() -> None:
    """A wait of a millisecond, for torch 2.2's sake, took a slow answer for none."""
    server = tcp_store()
    server.set("key", "value")
    with slowly(server.port) as port:
        client = tcp_store(port)
        assert stored(client, "key") == b"value"
        assert stored(client, "other") == b""


def test_a_store_that_is_gone_is_an_error() -> None:
    server = tcp_store()
    client = tcp_store(server.port)
    del server
    with pytest.raises(RuntimeError):
        stored(client, "key")


# ── equal, and each byte once ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_has_all_and_the_store_serves_it_once(place, size: int) -> None:
    uri = place.put("last.ckpt", as_bytes(CHECKPOINT))
    if place.server:
        place.server.reset()
    results = on_ranks(size, lambda rank, group: load(uri, weights, group=group))
    for result in results:
        assert_same(result, CHECKPOINT["state_dict"])
    if place.server:
        assert place.server.bytes_sent <= 1.02 * NEEDED + 2**20


@given(sizes=st.lists(st.integers(0, 3_000_000), max_size=12), ranks=st.integers(2, 5))
@settings(max_examples=15)
def test_whatever_the_sizes(tmp_path_factory, sizes: list[int], ranks: int) -> None:
    path = tmp_path_factory.mktemp("ranks") / "a.ckpt"
    checkpoint = {
        str(n): torch.randint(0, 255, (size,), dtype=torch.uint8) for n, size in enumerate(sizes)
    }
    torch.save(checkpoint, path)
    for result in on_ranks(ranks, lambda rank, group: load(path, group=group)):
        assert_same(result, checkpoint)


def test_each_rank_reads_as_much_as_the_others(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))

    def moved(rank: int, group: Any) -> int:
        return load_into(like(CHECKPOINT["state_dict"]), uri, group=group).bytes_moved

    moved_by = on_ranks(4, moved)
    assert sum(moved_by) <= 1.02 * NEEDED + 2**20
    assert max(moved_by) < NEEDED / 4 + 3 * 2**20


def like(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module that has these names, all zeros."""
    model = torch.nn.Module()
    for name, tensor in state.items():
        owner, _, attribute = name.partition(".")
        if not hasattr(model, owner):
            setattr(model, owner, torch.nn.Module())
        setattr(getattr(model, owner), attribute, torch.nn.Parameter(torch.zeros_like(tensor)))
    return model


def in_waves(monkeypatch) -> None:
    monkeypatch.setattr("_anemoi_ckpt.fetching.WAVE_BYTES", 2**20)
    monkeypatch.setattr("_anemoi_ckpt.fetching.LEAST_BYTES", 2**18)
    monkeypatch.setattr("_anemoi_ckpt.fetching.PART_BYTES", 2**18)


def test_in_many_waves(http_server: servers.HTTPServer, monkeypatch) -> None:
    """A wave is given to the others while the next is read."""
    in_waves(monkeypatch)
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    for result in on_ranks(3, lambda rank, group: load(uri, group=group)):
        assert_same(result, CHECKPOINT)


def test_what_goes_by_a_gpu_is_packed(tmp_path: Path, monkeypatch) -> None:
    """No GPU is here: what would be copied to one is copied in memory, and sent by gloo."""
    in_waves(monkeypatch)
    monkeypatch.setattr(_anemoi_ckpt.ranks, "_has_nccl", lambda group: True)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    torch.save(CHECKPOINT, tmp_path / "a.ckpt")
    for result in on_ranks(3, lambda rank, group: load(tmp_path / "a.ckpt", group=group)):
        assert_same(result, CHECKPOINT)


def test_nccl_is_used_where_a_group_has_it(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(dist, "get_backend_config", lambda group: group)
    assert not _anemoi_ckpt.ranks._has_nccl("cpu:gloo,cuda:nccl")  # here is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _anemoi_ckpt.ranks._has_nccl("cpu:gloo,cuda:nccl")
    assert not _anemoi_ckpt.ranks._has_nccl("cpu:gloo")


def legacy(obj: Any) -> bytes:
    return as_bytes(obj, _use_new_zipfile_serialization=False)


STATE = {"a": torch.randn(500_000), "b": torch.randn(3), "e": torch.empty(0)}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("odd.ckpt", as_bytes(odd_checkpoint()), odd_checkpoint()),
        ("old.ckpt", legacy(STATE), STATE),
        ("a.safetensors", safetensors.torch.save(STATE), STATE),
        ("a.ckpt.gz", gzip.compress(as_bytes(STATE)), STATE),
    ],
    ids=["zip", "legacy", "safetensors", "gzip"],
)
def test_all_formats(http_server: servers.HTTPServer, name: str, data: bytes, expected) -> None:
    uri = http_server.put(name, data)
    for result in on_ranks(3, lambda rank, group: load(uri, group=group)):
        assert_same(result, expected)


def test_shards(http_server: servers.HTTPServer) -> None:
    http_server.put("1.safetensors", safetensors.torch.save({"a": STATE["a"]}))
    http_server.put("2.safetensors", safetensors.torch.save({"b": STATE["b"]}))
    index = b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    uri = http_server.put("index.json", index)
    for result in on_ranks(3, lambda rank, group: load(uri, group=group)):
        assert_same(result, {"a": STATE["a"], "b": STATE["b"]})
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    for result in on_ranks(3, lambda rank, group: load(uri, group=group)):
        assert_same(result, {"a": STATE["a"], "b": STATE["b"]})


def test_a_server_without_ranges_is_read_once(http_server: servers.HTTPServer) -> None:
    data = as_bytes(STATE)
    uri = http_server.put("a.ckpt", data)
    http_server.fault = lambda request: servers.Fault(ignore_range=True)
    for result in on_ranks(3, lambda rank, group: load(uri, group=group)):
        assert_same(result, STATE)
    assert [request.status for request in http_server.log].count(200) <= 3  # two were broken off


def test_a_server_that_forgets_ranges_is_read_whole_then(http_server, monkeypatch) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    http_server.faults.extend([None, None])  # the first and the last block
    http_server.fault = lambda request: (
        None if len(http_server.log) < 3 else servers.Fault(ignore_range=True)
    )
    for result in on_ranks(3, lambda rank, group: load(uri, weights, group=group)):
        assert_same(result, CHECKPOINT["state_dict"])


def test_each_rank_may_want_something_else(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))

    def one(rank: int, group: Any) -> Any:
        if rank == 2:
            return load(uri, lambda given: given["state_dict"]["large.2"].sum().item(), group=group)
        return load(uri, weights, include(f"large.{rank}"), group=group)

    first, second, third = on_ranks(3, one)
    assert_same(first, {"large.0": CHECKPOINT["state_dict"]["large.0"]})
    assert_same(second, {"large.1": CHECKPOINT["state_dict"]["large.1"]})
    assert third == CHECKPOINT["state_dict"]["large.2"].sum().item()


def test_one_bar_for_all_and_a_function_for_each(http_server, capsys) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    done: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    on_ranks(
        2, lambda rank, group: load(uri, group=group, progress=lambda *a: done[rank].append(a))
    )
    assert all(each[-1][0] == each[-1][1] > 30_000_000 for each in done.values())
    capsys.readouterr()
    on_ranks(3, lambda rank, group: load(uri, group=group, progress=True))
    shown = capsys.readouterr().err
    assert "last.ckpt: 100%" in shown
    assert shown.count("\n") == 1  # at a bar's end: 100 % itself may be drawn twice


# ── what one meets, all raise ─────────────────────────────────────────────────────────────────


def raised(size: int, act: Callable[[int, Any], Any]) -> set[str]:
    """The one error that all ranks raise."""
    begun = time.monotonic()
    results = on_ranks(size, act)
    assert time.monotonic() - begun < SOON_SECONDS
    assert {type(each) for each in results} == {type(results[0])}
    return {repr(each) for each in results}


def test_what_is_not_there_is_not_there_for_all(http_server: servers.HTTPServer) -> None:
    (said,) = raised(3, lambda rank, group: load(f"{http_server.url}/no.ckpt", group=group))
    assert said.startswith("CheckpointNotFoundError")
    assert len(http_server.log) <= 2


def test_a_read_of_one_rank_that_fails(http_server, monkeypatch) -> None:
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)

    def deny(request: servers.Request) -> servers.Fault | None:
        first = int(re.findall(r"\d+", request.range)[0])
        return servers.Fault(status=403) if 2**20 < first < len(data) // 8 else None

    http_server.fault = deny
    (said,) = raised(4, lambda rank, group: load(uri, weights, group=group))
    assert said.startswith("AccessDeniedError")
    in_waves(monkeypatch)  # while what came before is still on its way to the others
    (said,) = raised(4, lambda rank, group: load(uri, weights, group=group))
    assert said.startswith("AccessDeniedError")
    http_server.fault = lambda request: servers.Fault(stall=600) if deny(request) else None
    # The others wait twice as long for the rank that is told of the silence: time enough for it.
    (said,) = raised(4, lambda rank, group: load(uri, weights, group=group, timeout=4))
    assert said.startswith("UnreachableError")


def test_a_strategy_of_one_rank_that_fails(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))

    class OddError(Exception):
        def __init__(self, code: int, *, what: str) -> None:
            super().__init__(f"{code}: {what}")

    def fail(checkpoint: Any) -> Any:
        raise OddError(3, what="unlikely")

    def one(rank: int, group: Any) -> Any:
        return load(uri, *([fail] if rank == 1 else []), group=group)

    first, second, third = on_ranks(3, one)
    assert type(second) is OddError
    assert type(first) is type(third) is RuntimeError
    assert "3: unlikely" in str(first)


def test_a_progress_that_has_raised_is_not_told_of_what_still_comes() -> None:
    told: list[int] = []

    def tell(done: int, total: int | None) -> None:
        told.append(done)
        raise KeyError("mine")

    def read(notify: Any) -> None:
        try:
            notify(1)
        finally:
            notify(2)  # another thread's, whose bytes were on their way

    with pytest.raises(KeyError, match="mine"), shown(parse_uri("a.ckpt"), 3, tell) as notify:
        read(notify)
    assert told == [1]


@pytest.mark.parametrize("error", [KeyError("mine"), TimeoutError("mine"), MemoryError("mine")])
def test_a_progress_of_one_rank_that_raises(http_server, tmp_path: Path, error: Exception) -> None:
    """Also where it is told of what the other rank read."""
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    for last in (1, 3_000_000, NEEDED):
        first_told = []

        def tell(done: int, total: int | None, last: int = last, told: Any = first_told) -> None:
            if done >= last:
                told.append(done)
                raise error

        def one(rank: int, group: Any, tell: Any = tell) -> Any:
            return load(uri, weights, group=group, progress=tell if rank else None)

        first, second = on_ranks(2, one)
        assert second is error
        assert repr(first) == repr(error)
        assert len(first_told) == 1

        def whole(rank: int, group: Any, tell: Any = tell) -> Any:
            name = tmp_path / f"{rank}.ckpt"
            return download(uri, name, group=group, progress=None if rank else tell)

        first, second = on_ranks(2, whole)
        assert first is error
        assert repr(second) == repr(error)
        assert not list(tmp_path.glob("*.ckpt"))


def test_a_rank_without_memory_ends_the_others(http_server, monkeypatch) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    allotted, lock = _anemoi_ckpt.fetching._allotted, threading.Lock()

    def allot(*args: Any) -> Any:
        if lock.acquire(blocking=False):
            raise MemoryError("there is none")
        return allotted(*args)

    monkeypatch.setattr("_anemoi_ckpt.fetching._allotted", allot)
    (said,) = raised(3, lambda rank, group: load(uri, group=group))
    assert said == "MemoryError('there is none')"


def test_an_argument_of_one_rank_that_is_wrong_is_told_by_all_at_once(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "a.ckpt")
    model: Any = torch.nn.Linear(2, 2)
    for place in (state, tmp_path / "a.ckpt"):
        for right, wrong in (
            ({"model": model}, {"model": None}),
            ({"model": model, "optimizer": None}, {"model": model, "optimizer": torch.optim.SGD}),
        ):

            def one(rank: int, group: Any, place: Any = place, both: Any = (right, wrong)) -> Any:
                options = dict(both[rank == 1])
                return load_into(options.pop("model"), place, group=group, **options)

            (said,) = raised(2, one)
            assert said.startswith("TypeError")


def test_a_checkpoint_in_memory_is_refused_by_all_ranks() -> None:
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)]
    (said,) = raised(2, lambda rank, group: load_into(models[rank], state, group=group))
    assert said.startswith("MismatchError")

    def fail(checkpoint: Any) -> Any:
        raise OSError("mine")

    def one(rank: int, group: Any) -> Any:
        return load_into(models[0], state, *[fail][: rank == 1], group=group)

    assert raised(2, one) == {"OSError('mine')"}
    assert not torch.equal(models[0].weight, torch.ones(2, 2))
    ends = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    reports = on_ranks(2, lambda rank, group: load_into(ends[rank], state, group=group))
    assert [each.loaded for each in reports] == [("weight", "bias")] * 2
    assert all(torch.equal(each.weight, torch.ones(2, 2)) for each in ends)


def test_a_model_that_differs_on_one_rank(http_server: servers.HTTPServer) -> None:
    uri = http_server.put(
        "last.ckpt", as_bytes({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    )
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)]
    (said,) = raised(2, lambda rank, group: load_into(models[rank], uri, group=group))
    assert said.startswith("MismatchError")
    assert not torch.equal(models[0].weight, torch.ones(2, 2))


@pytest.mark.parametrize("always", [False, True])
def test_a_bit_that_flips_on_the_way(http_server, always: bool) -> None:
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)
    flips = []

    def flip(request: servers.Request) -> servers.Fault | None:
        extent = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range)
        if not extent or not int(extent[1]) < len(data) // 9 <= int(extent[2]):
            return None
        flips.append(request)
        wrong = 8 * (len(data) // 9 - int(extent[1]))
        return servers.Fault(flip=wrong) if always or len(flips) == 1 else None

    http_server.fault = flip
    results = on_ranks(3, lambda rank, group: load(uri, weights, group=group))
    if always:
        assert {type(each) for each in results} == {CorruptError}
        assert {str(each) for each in results} == {str(results[0])}
    else:
        for result in results:
            assert_same(result, CHECKPOINT["state_dict"])
    assert len(flips) == 2


def test_a_rank_that_is_gone_ends_the_others(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))

    def one(rank: int, group: Any) -> Any:
        if rank == 2:
            transport = anemoi_ckpt.Transport(group=group)
            with _anemoi_ckpt.ranks.joined(transport, uri, "cached=False") as ranks:
                ranks.together(lambda: None)
                return None
        return load(uri, group=group)

    begun = time.monotonic()
    first, second, _, fourth = on_ranks(4, one)
    assert {type(each) for each in (first, second, fourth)} == {UnreachableError}
    assert "a rank of the group is gone, or silent" in str(first)
    assert time.monotonic() - begun < SOON_SECONDS


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    def one(rank: int, group: Any) -> Any:
        return load(tmp_path / "a.ckpt", group=group, timeout=1) if rank else None

    torch.save(STATE, tmp_path / "a.ckpt")
    begun = time.monotonic()
    _, *others = on_ranks(3, one)
    assert {type(each) for each in others} == {UnreachableError}
    assert time.monotonic() - begun < SOON_SECONDS


def test_an_interrupt_of_the_first_rank_ends_the_others(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.ckpt")

    def interrupt(checkpoint: Any) -> Any:
        raise KeyboardInterrupt

    def one(rank: int, group: Any) -> Any:
        try:
            return load(tmp_path / "a.ckpt", *([] if rank else [interrupt]), group=group)
        except KeyboardInterrupt:
            return None

    first, second = on_ranks(2, one)
    assert first is None
    assert type(second) is UnreachableError


class RefusedError(Exception):
    """A model's own."""


@pytest.mark.parametrize("error", [RuntimeError("not here"), RefusedError("not here")])
def test_a_model_that_refuses_on_one_rank_leaves_all_as_they_were(http_server, error) -> None:
    class Refusing(torch.nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise error

    uri = http_server.put("last.ckpt", as_bytes(torch.nn.Linear(2, 2).state_dict()))
    models = [torch.nn.Linear(2, 2), Refusing(2, 2), torch.nn.Linear(2, 2)]
    before = [model.weight.clone() for model in models]
    results = on_ranks(3, lambda rank, group: load_into(models[rank], uri, group=group))
    for result in results:
        assert isinstance(result, type(error))
        assert "not here" in str(result)
        assert isinstance(result, MismatchError) == (type(error) is RuntimeError)
    for model, weight in zip(models, before, strict=True):
        assert torch.equal(model.weight, weight)


def test_arguments_that_differ_are_an_error_at_once(http_server: servers.HTTPServer) -> None:
    uris = [f"{http_server.url}/{name}.ckpt?sig=secret" for name in ("a", "b")]
    first, second = on_ranks(2, lambda rank, group: load(uris[rank], group=group))
    assert type(first) is type(second) is InvalidURIError
    assert "a.ckpt?sig=***" in str(first)
    assert "rank 1 was asked for" in str(second)
    assert "secret" not in str(first) + str(second)
    (said,) = {
        type(each)
        for each in on_ranks(2, lambda rank, group: load(uris[0], group=group, cached=rank == 1))
    }
    assert said is InvalidURIError
    assert http_server.log == []


def test_a_rank_that_errs_before_the_others_does_not_break_the_next_call(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.ckpt")

    def one(rank: int, group: Any) -> Any:
        strategies = ["a name"] if rank == 1 else []
        with pytest.raises(TypeError, match="'a name' is text"):  # on all of them
            load(tmp_path / "a.ckpt", *strategies, group=group)
        if rank == 1:  # and one that never comes
            load_into_nothing = pytest.raises(ValueError, match="share from 0 to 1")
            with load_into_nothing:
                load_into(torch.nn.Linear(1, 1), tmp_path / "a.ckpt", require=7, group=group)
        else:
            with pytest.raises(UnreachableError, match="rank 1 did not come"):
                load(tmp_path / "a.ckpt", group=group, timeout=0.2)
        time.sleep(1)  # the others have given up meanwhile
        return load(tmp_path / "a.ckpt", group=group)

    for result in on_ranks(3, one):
        assert_same(result, STATE)


def test_a_download_takes_longer_than_the_time_out_while_bytes_flow(http_server, tmp_path) -> None:
    data = as_bytes({"w": torch.randn(100_000)})
    uri = http_server.put("a.ckpt", data)
    # A busy machine may be silent for a second: the time-out is longer, and the download with it.
    timeout, rate = 4, 40_000
    assert len(data) / rate > 2 * timeout
    http_server.fault = lambda request: servers.Fault(rate=rate)
    paths = on_ranks(
        2, lambda rank, group: download(uri, tmp_path / "a.ckpt", group=group, timeout=timeout)
    )
    assert paths == [tmp_path / "a.ckpt"] * 2
    assert paths[0].read_bytes() == data


def test_a_rank_that_is_silent_ends_the_others(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.ckpt")
    over = threading.Event()

    def one(rank: int, group: Any) -> Any:
        transport = anemoi_ckpt.Transport(group=group, timeout=0.5)
        with _anemoi_ckpt.ranks.joined(transport, "here") as ranks:
            if rank == 1:  # neither reads nor waits
                over.wait(20)
                return None
            try:
                return ranks.agree(rank)
            finally:
                over.set()

    first, _, third = on_ranks(3, one)
    assert type(first) is type(third) is UnreachableError
    assert "rank 1 is silent" in str(first) + str(third)


# ── files ─────────────────────────────────────────────────────────────────────────────────────


def test_download_by_ranks_is_one_download(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)
    assert (
        on_ranks(3, lambda rank, group: download(uri, tmp_path / "a.ckpt", group=group))
        == [tmp_path / "a.ckpt"] * 3
    )
    assert (tmp_path / "a.ckpt").read_bytes() == data
    assert http_server.bytes_sent < len(data) + 100


def test_what_other_disks_lack_comes_from_the_first_rank(http_server, tmp_path: Path) -> None:
    """Ranks with other paths stand for ranks with other disks; two of them share one."""
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)
    folders = [tmp_path / name for name in ("one", "two", "two", "three")]
    for folder in set(folders):
        folder.mkdir()

    def one(rank: int, group: Any) -> Path:
        return download(uri, folders[rank], group=group)

    assert on_ranks(4, one) == [folder / "last.ckpt" for folder in folders]
    for folder in folders:
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
        assert (folder / "last.ckpt").read_bytes() == data
    assert http_server.bytes_sent < len(data) + 100


def test_a_disk_of_one_rank_that_cannot_be_written_to(http_server, tmp_path: Path) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    (tmp_path / "one").mkdir()
    places = [tmp_path / "one/a.ckpt", tmp_path / "none/a.ckpt", tmp_path / "one/b.ckpt"]
    (said,) = raised(3, lambda rank, group: download(uri, places[rank], group=group))
    assert said.startswith("CheckpointNotFoundError")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.ckpt"]


def test_a_disk_of_one_rank_that_is_full(http_server, tmp_path: Path, monkeypatch) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))

    @contextlib.contextmanager
    def full(place: Any) -> Any:
        class Sink:
            def write(self, data: Any) -> None:
                raise OSError(28, "No space left on device")

        yield Sink()

    monkeypatch.setattr("_anemoi_ckpt.downloading.open_writer", full)
    places = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    (said,) = raised(2, lambda rank, group: download(uri, places[rank], group=group))
    assert "No space left" in said


def test_what_is_not_there_is_downloaded_by_none(http_server, tmp_path: Path) -> None:
    (said,) = raised(
        2, lambda rank, group: download(f"{http_server.url}/no", tmp_path / "a", group=group)
    )
    assert said.startswith("CheckpointNotFoundError")


def test_a_file_that_gets_shorter_while_it_is_handed_on(http_server, tmp_path, monkeypatch) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    places = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    sees = _anemoi_ckpt.downloading._sees

    def cut(target: Path, first: Any) -> bool:
        if target == places[0]:
            os.truncate(target, 10)
        return sees(target, first)

    monkeypatch.setattr("_anemoi_ckpt.downloading._sees", cut)
    results = on_ranks(2, lambda rank, group: download(uri, places[rank], group=group))
    assert {type(each) for each in results} == {CorruptError}
    assert not places[1].exists()


def test_bytes_that_change_between_ranks(http_server, tmp_path: Path, monkeypatch) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    places = [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]
    send = _anemoi_ckpt.ranks.Ranks.send

    def flip(self: Any, views: Any, owner: int) -> Any:
        finish = send(self, views, owner)

        def finish_wrongly() -> None:
            finish()
            views[0][0] ^= self.rank

        return finish_wrongly

    monkeypatch.setattr(_anemoi_ckpt.ranks.Ranks, "send", flip)
    (said,) = raised(2, lambda rank, group: download(uri, places[rank], group=group))
    assert said.startswith("CorruptError")
    assert not places[1].exists()


def test_the_cache_of_each_machine(http_server: servers.HTTPServer, monkeypatch) -> None:
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)
    (path,) = set(on_ranks(3, lambda rank, group: download(uri, group=group)))
    assert path.read_bytes() == data
    for result in on_ranks(3, lambda rank, group: load(uri, weights, cached=True, group=group)):
        assert_same(result, CHECKPOINT["state_dict"])
    assert http_server.bytes_sent < len(data) + 1000
    http_server.deny("last.ckpt")
    (said,) = raised(3, lambda rank, group: load(uri, cached=True, group=group))
    assert said.startswith("AccessDeniedError")


def test_a_digest_with_a_group_takes_the_cache(http_server: servers.HTTPServer) -> None:
    data = as_bytes(CHECKPOINT)
    uri, digest = http_server.put("last.ckpt", data), hashlib.sha256(data).hexdigest()
    (said,) = raised(2, lambda rank, group: load(uri, sha256=digest, group=group))
    assert "sha256 with a group takes cached=True" in said
    told = {"sha256": digest, "cached": True}
    for result in on_ranks(2, lambda rank, group: load(uri, weights, group=group, **told)):
        assert_same(result, CHECKPOINT["state_dict"])


def test_a_cache_elsewhere_gets_a_note_of_where_its_file_is_from(
    http_server, tmp_path, monkeypatch
) -> None:
    data = as_bytes(CHECKPOINT)
    uri = http_server.put("last.ckpt", data)
    mine = threading.local()

    def folder() -> Path:
        return tmp_path / str(getattr(mine, "rank", 0))

    monkeypatch.setattr("_anemoi_ckpt.cache.cache_folder", folder)
    monkeypatch.setattr("anemoi_ckpt.cache_folder", folder)

    def one(rank: int, group: Any) -> Path:
        mine.rank = rank
        return download(uri, group=group)

    first, second = on_ranks(2, one)
    assert (first.parts[-3], second.parts[-3]) == ("0", "1")
    assert second.read_bytes() == data
    assert (second.parent / ".place").read_text() == uri


# ── sharded models ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def world() -> Any:
    """This process as the one rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@needs.with_fsdp2
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's: of several devices
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_sharded_model_of_one_rank(world: Any, tmp_path: Path, device: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    source = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64)).bfloat16()
    torch.save({"state_dict": source.state_dict(), "optimizer_states": [{}]}, tmp_path / "a.ckpt")
    with torch.device(device):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    report = load_into(model, tmp_path / "a.ckpt", group=world)
    assert report.loaded == tuple(source.state_dict())
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        wanted = source.state_dict()[name]
        assert_same(whole, wanted.float() if wanted.is_floating_point() else wanted)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(MismatchError, match="set_optimizer_state_dict"):
        load_into(model, tmp_path / "a.ckpt", optimizer=optimizer)


@needs.with_fsdp2
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's: of several devices
@pytest.mark.parametrize("new", ["model", "zeros"])
def test_a_sharded_model_of_other_variables(world: Any, tmp_path: Path, new: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    source, model = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
    own = model.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    before, after = {"t": 0, "z": 1, "u": 2}, {"u": 0, "q": 1, "t": 2, "z": 3}
    align = align_variables(before, after, {"weight": {1: ["all"]}}, model=model, new=new)
    load_into(model, tmp_path / "a.ckpt", align, group=world)
    weight = model.weight.full_tensor()
    assert torch.equal(weight[:, [2, 3, 0]], source.weight)
    assert torch.equal(weight[:, 1], own[:, 1] if new == "model" else torch.zeros(4))


# ── real processes ────────────────────────────────────────────────────────────────────────────


def processes(size: int, folder: Path, *task: str, torchrun: bool = False) -> list[Any]:
    """What each process gives back; None of one that gave nothing."""
    worker = [str(ROOT / "tests/ranks_worker.py"), task[0], str(folder), *task[1:]]
    bare = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if torchrun:
        options = ["--standalone", "--nproc-per-node", str(size)]
        commands = [[sys.executable, "-m", "torch.distributed.run", *options, *worker]]
        environments = [bare]
    else:
        port = str(servers.free_port())
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [[sys.executable, *worker]] * size
        environments = [{**bare, **world, "RANK": str(rank)} for rank in range(size)]
    running = [
        subprocess.Popen(command, env=environment)
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        for process in running:
            process.wait()
    finally:  # where the test has taken too long
        for process in running:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_four_processes(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    data = b"".join(tensor.numpy().tobytes() for tensor in CHECKPOINT["state_dict"].values())
    expected = {"sha256": hashlib.sha256(data).hexdigest()}
    assert processes(4, tmp_path, "equal", uri, torchrun=True) == [expected] * 4
    assert http_server.bytes_sent <= 1.02 * NEEDED + 2**20


def test_a_process_that_is_killed_ends_the_others(http_server, tmp_path: Path) -> None:
    uri = http_server.put("last.ckpt", as_bytes(CHECKPOINT))
    first, dead, *others = processes(4, tmp_path, "killed", uri)
    assert dead is None
    for told in (first, *others):
        assert told["kind"] == "UnreachableError"
        assert "a rank of the group is gone" in told["error"]
        assert told["after"] < SOON_SECONDS


@needs.with_fsdp2
@pytest.mark.parametrize("meta", [False, True])
def test_a_model_under_fsdp2_gets_its_parts(http_server, tmp_path: Path, meta: bool) -> None:
    width = 2200
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width) for _ in range(8)]
    state = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(width)).state_dict()
    uri = http_server.put("last.ckpt", as_bytes({"state_dict": dict(state)}))
    whole = sum(tensor.nbytes for tensor in state.values())
    for told in processes(2, tmp_path, "sharded", uri, str(meta), str(width)):
        assert told is not None
        assert told["right"]
        assert told["loaded"] == len(state)
        assert abs(told["local"] - whole / 2) < 0.01 * whole
        assert told["peak"] < 1.15 * whole + 2**25  # the weights once, what is on its way
        assert "set_optimizer_state_dict" in told["of_optimizer"]
