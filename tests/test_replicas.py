"""Several servers behind one name: each gives one object a weak tag, or a date, of its own."""

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import _anemoi_ckpt.transport
import servers
from _anemoi_ckpt.transport import Transport, stream_pinned
from anemoi_ckpt import ChangedError, download, load, parse_uri, peek
from checkpoints import as_bytes, assert_same
from servers import Fault
from strategies import weights

CHECKPOINT = {"state_dict": {"w": torch.arange(300_000.0)}, "m": torch.rand(100_000), "epoch": 3}
DATA = as_bytes(CHECKPOINT)
OTHER = as_bytes({**CHECKPOINT, "epoch": 4})  # as large
DATES = ("Wed, 04 Jun 2025 10:00:00 GMT", "Wed, 04 Jun 2025 10:00:07 GMT")
Kept = Callable[[str, Path], Any]


def replicas(server: servers.HTTPServer, *headers: dict[str, str | None], first: int = 0) -> None:
    """Have the server answer as several: the first of them `first` times, and then in turns."""
    each: Iterator[dict[str, str | None]] = itertools.chain(
        itertools.repeat(headers[0], first), itertools.cycle(headers[::-1])
    )
    server.fault = lambda request: Fault(headers=next(each), ignore_conditions=True)


WEAK: list[dict[str, str | None]] = [{"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}]
DATED: list[dict[str, str | None]] = [{"ETag": None, "Last-Modified": date} for date in DATES]
MIXED: list[dict[str, str | None]] = [{"ETag": '"1"'}, {"ETag": 'W/"1"'}]
BARE: list[dict[str, str | None]] = [{"ETag": '"1"'}, {"ETag": None, "Last-Modified": None}]


def streamed(uri: str, _folder: Path) -> bytes:
    sink = io.BytesIO()
    stream_pinned(parse_uri(uri), sink, Transport())
    return sink.getvalue()


WAYS: dict[str, Callable[[str, Path], None]] = {
    "load": lambda uri, folder: assert_same(load(uri), CHECKPOINT),
    "weights": lambda uri, folder: assert_same(load(uri, weights), CHECKPOINT["state_dict"]),
    "peek": lambda uri, folder: assert_same(peek(uri).epoch, 3),
    "download": lambda uri, folder: assert_same(
        download(uri, folder / "a.ckpt").read_bytes() == DATA, True
    ),
    "cached": lambda uri, folder: assert_same(load(uri, cached=True), CHECKPOINT),
    "streamed": lambda uri, folder: assert_same(streamed(uri, folder) == DATA, True),
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "PART_BYTES", 2**19)


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("headers", [WEAK, DATED, MIXED, BARE], ids=["weak", "dates", "one", "no"])
@pytest.mark.parametrize("way", WAYS)
def test_one_object_with_tags_that_promise_nothing(
    http_server: servers.HTTPServer,
    tmp_path: Path,
    way: str,
    headers: list[dict[str, str | None]],
    first: int,
) -> None:
    uri = http_server.put("a.ckpt", DATA)
    replicas(http_server, *headers, first=first)
    WAYS[way](uri, tmp_path)
    assert http_server.bytes_sent < 2.5 * len(DATA)


@pytest.mark.parametrize("way", ["load", "download", "streamed"])
def test_strong_tags_that_differ_are_two_objects(
    http_server: servers.HTTPServer, tmp_path: Path, way: str
) -> None:
    uri = http_server.put("a.ckpt", DATA)
    replicas(http_server, {"ETag": '"1"'}, {"ETag": '"2"'})
    with pytest.raises(ChangedError, match="several servers answer for this name, and give it"):
        WAYS[way](uri, tmp_path)


@pytest.mark.parametrize("way", ["load", "streamed"])
def test_an_object_that_is_replaced_under_a_weak_tag(
    http_server: servers.HTTPServer, tmp_path: Path, way: str
) -> None:
    uri = http_server.put("a.ckpt", DATA)
    assert len(OTHER) == len(DATA)
    replicas(http_server, *WEAK, first=2)
    answer, seen = http_server.fault, itertools.count(1)

    def replaced(request: servers.Request) -> Fault | None:
        if next(seen) == 3:
            http_server.put("a.ckpt", OTHER)
        return answer(request)

    http_server.fault = replaced
    with pytest.raises(ChangedError, match="replaced while it was read"):
        WAYS[way](uri, tmp_path)


def test_a_stream_that_became_shorter(http_server: servers.HTTPServer) -> None:
    uri = http_server.put("a.ckpt", DATA)
    replicas(http_server, *WEAK, first=2)
    answer, seen = http_server.fault, itertools.count(1)

    def shorter(request: servers.Request) -> Fault | None:
        if next(seen) == 4:
            http_server.put("a.ckpt", DATA[: 2**19])  # all that was written is there
        return answer(request)

    http_server.fault = shorter
    with pytest.raises(ChangedError, match="replaced while it was read"):
        streamed(uri, Path())
