"""Each fault, in each place, for each way to read: equal bytes or the error that is right.

One test a cell; the last one compares what came out with the table in README.
"""

import hashlib
import itertools
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import _anemoi_ckpt.progress
import _anemoi_ckpt.transport
import servers
from anemoi_ckpt import CheckpointError, download, load, peek
from checkpoints import as_bytes, assert_same
from pages import PAGES
from servers import Fault, Request
from strategies import weights

CHECKPOINT = {
    "state_dict": {"w": torch.rand(250_000), "v": torch.rand(125_000)},
    "optimizer_states": [torch.rand(375_000)],
    "epoch": 3,
}
DATA = as_bytes(CHECKPOINT)  # 3 MB
PICKLE = DATA.index(b"optimizer_states")
TENSOR = DATA.index(CHECKPOINT["state_dict"]["w"].numpy().tobytes())  # type: ignore[index] # CHECKPOINT is a dict of objects to mypy
PLACES = {"http": "HTTP", "s3": "S3", "gcs": "GCS", "azure": "Azure"}
LARGE = 100_000  # bytes: more than a block
OUTCOMES: dict[tuple[str, str, str], str] = {}


# ── ways to read ──────────────────────────────────────────────────────────────────────────────


def look(uri: str, folder: Path, **patience: Any) -> None:
    found = peek(uri, **patience)
    assert found.keys == {"state_dict": 1_500_000, "optimizer_states": 1_500_000, "epoch": 0}
    assert [each.name for each in found.tensors] == ["w", "v", "0"]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()  # what differs is shown, and not by megabytes


WAYS: dict[str, Callable[..., None]] = {
    "load": lambda uri, folder, **kw: assert_same(load(uri, **kw), CHECKPOINT),
    "weights": lambda uri, folder, **kw: assert_same(
        load(uri, weights, **kw), CHECKPOINT["state_dict"]
    ),
    "peek": look,
    "download": lambda uri, folder, **kw: assert_same(
        digest(download(uri, folder / "a.ckpt", **kw).read_bytes()), digest(DATA)
    ),
}


# ── faults ────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Case:
    """A fault that a place shall have, and what is right then."""

    begin: Callable[[Any], None]
    right: str = "equal"
    but: dict[str, str] = attrs.field(factory=dict)  # by way, or by place and way
    places: tuple[str, ...] = tuple(PLACES)
    patience: dict[str, Any] = attrs.field(factory=dict)
    tries: int | None = None  # most of one request


def always(fault: Fault) -> Callable[[Any], None]:
    def begin(place: Any) -> None:
        place.server.fault = lambda request: fault

    return begin


def each_once(fault: Fault) -> Callable[[Any], None]:
    """Every request fails the first time that it is made."""

    def begin(place: Any) -> None:
        seen = set()

        def first(request: Request) -> Fault | None:
            known = (request.method, request.path, request.range)
            if known in seen:
                return None
            seen.add(known)
            return fault

        place.server.fault = first

    return begin


def where(
    chosen: Callable[[Request], bool], fault: Fault, count: int = 9999
) -> Callable[[Any], None]:
    def begin(place: Any) -> None:
        left = [count]

        def some(request: Request) -> Fault | None:
            if not chosen(request) or not left[0]:
                return None
            left[0] -= 1
            return fault

        place.server.fault = some

    return begin


def is_large(request: Request) -> bool:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
    return found is not None and int(found[2]) - int(found[1]) > LARGE


def is_pinned(request: Request) -> bool:
    return bool(request.headers["If-Match"]) or "generation=" in request.query


def refused(place: Any) -> None:
    place.server.stop()


def refused_for_a_moment(place: Any) -> None:
    _anemoi_ckpt.transport.BACKOFF_SECONDS = 0.5  # 8 s at least until all attempts are made
    place.server.stop()
    threading.Timer(0.1, place.server.start).start()


def replaced(place: Any) -> None:
    log = place.server.log

    def put() -> None:
        while log[0].status is None:  # the first answer is of the first version
            time.sleep(0.01)
        place.put("a.ckpt", as_bytes({**CHECKPOINT, "epoch": 4}))

    second = Fault(before=put)
    place.server.fault = lambda request: second if len(log) > 1 and request is log[1] else None


def stored(*flipped: int) -> Callable[[Any], None]:
    def begin(place: Any) -> None:
        data = bytearray(DATA)
        for byte in flipped:
            data[byte] ^= 1
        place.put("a.ckpt", bytes(data))

    return begin


def elsewhere(place: Any) -> None:
    other = servers.HTTPServer()
    other.start()
    url = other.put("b", DATA)
    place.server.fault = lambda request: servers.redirect(url)


def in_turns(*tags: str) -> Callable[[Any], None]:
    def begin(place: Any) -> None:
        each = itertools.cycle(tags)
        place.server.fault = lambda request: Fault(headers={"ETag": next(each)})

    return begin


MIDDLE = 8 * 400_000  # a bit of what is large
SILENCE_SECONDS = 120
SOON_SECONDS = SILENCE_SECONDS / 2  # some seconds, but on a busy machine
QUICK = {"timeout": 0.6}
ONCE = {"retries": 1}
CASES: dict[str, Case] = {
    "connection refused": Case(refused, "UnreachableError", patience=ONCE),
    "connection refused for a moment": Case(refused_for_a_moment),
    "reset before the answer, each request once": Case(each_once(Fault(reset=True))),
    "reset before the answer, always": Case(
        always(Fault(reset=True)), "UnreachableError", patience=ONCE, tries=2
    ),
    "reset in the body, each request once": Case(each_once(Fault(reset=True, cut=300_000))),
    "body ends early, each request once": Case(each_once(Fault(cut=300_000))),
    "body ends early, always": Case(always(Fault(cut=200_000))),  # something comes each time
    "no body, each request once": Case(each_once(Fault(cut=0))),
    "no body, always": Case(always(Fault(cut=0)), "UnreachableError", patience=ONCE, tries=2),
    "silence before the answer, each request once": Case(
        each_once(Fault(delay=SILENCE_SECONDS)), patience={"timeout": 1.5}
    ),
    "silence before the answer, always": Case(
        always(Fault(delay=SILENCE_SECONDS)), "UnreachableError", patience=QUICK
    ),
    "silence in the body, each request once": Case(
        each_once(Fault(stall=SILENCE_SECONDS, stall_after=100)), patience={"timeout": 1.5}
    ),
    "silence in the body, always": Case(
        always(Fault(stall=SILENCE_SECONDS)), "UnreachableError", patience=QUICK
    ),
    "10 MB/s": Case(always(Fault(rate=10_000_000))),
    **{
        f"{status}, each request once": Case(each_once(Fault(status=status)))
        for status in (408, 429, 500, 502, 503, 504)
    },
    "503, always": Case(always(Fault(status=503)), "UnreachableError", patience=ONCE, tries=2),
    "429 with Retry-After: 1": Case(where(lambda request: True, servers.throttled(429, 1), 1)),
    "503 with Retry-After: 3600": Case(
        always(servers.throttled(503, 3600)), "UnreachableError", tries=1
    ),
    "401": Case(always(Fault(status=401)), "AccessDeniedError", tries=1),
    "403": Case(always(Fault(status=403)), "AccessDeniedError", tries=1),
    "404": Case(always(Fault(status=404)), "CheckpointNotFoundError", tries=1),
    "410": Case(always(Fault(status=410)), "CheckpointNotFoundError", tries=1),
    "412 to what is pinned": Case(
        where(is_pinned, Fault(status=412)),
        "ChangedError",
        but={"http peek": "equal", "s3 peek": "equal"},  # two reads at once, which are compared
        tries=1,
    ),
    "the object is replaced meanwhile": Case(replaced, "ChangedError"),
    "a bit flips on the way, once": Case(where(is_large, Fault(flip=MIDDLE), 1)),
    "a bit flips on the way, always": Case(
        where(is_large, Fault(flip=MIDDLE)), "CorruptError", but={"peek": "equal"}
    ),
    "a bit is wrong in a stored tensor": Case(
        stored(TENSOR + 1000), "CorruptError", but={"peek": "equal"}
    ),
    "a bit is wrong in the stored pickle": Case(stored(PICKLE), "CorruptError"),
    "an HTML page": Case(always(servers.html_page()), "NotACheckpointError", places=("http", "s3")),
    "ranges are ignored": Case(always(Fault(ignore_range=True)), places=("http", "s3")),
    "compressed, though nobody asked": Case(always(Fault(gzip=True)), places=("http",)),
    "no ETag": Case(always(Fault(no_etag=True)), places=("http",)),
    "a weak ETag": Case(always(Fault(weak_etag=True)), places=("http",)),
    "replicas whose weak ETags differ": Case(in_turns('W/"1"', 'W/"2"'), places=("http",)),
    "redirected to another host": Case(elsewhere, places=("http",)),
}
CELLS = [
    (fault, kind, way) for fault, case in CASES.items() for kind in case.places for way in WAYS
]


@pytest.mark.parametrize(("fault", "place", "way"), CELLS, indirect=["place"], ids=str)
def test_a_fault(
    fault: str,
    place: Any,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    monkeypatch.setattr(_anemoi_ckpt.transport, "PART_BYTES", 1024**2)
    case = CASES[fault]
    right = case.but.get(f"{place.kind} {way}", case.but.get(way, case.right))
    outcome = outcome_of(case, place, tmp_path, way, case.patience)
    if right == "equal" and outcome == "UnreachableError" and "timeout" in case.patience:
        # A busy machine is as silent as that, too: more patience tells the one from the other.
        outcome = outcome_of(case, place, tmp_path, way, {"timeout": 12})
    tries = Counter((r.method, r.path, r.query, r.range) for r in place.server.log)
    assert case.tries is None or max(tries.values()) <= case.tries
    OUTCOMES[fault, place.kind, way] = outcome
    assert outcome == right


def outcome_of(case: Case, place: Any, folder: Path, way: str, patience: dict[str, Any]) -> str:
    uri = place.put("a.ckpt", DATA)
    place.server.reset()
    case.begin(place)
    begun = time.monotonic()
    try:
        WAYS[way](uri, folder, **patience)
    except CheckpointError as err:
        outcome = type(err).__name__
        assert str(err).startswith(f"{uri}: ")  # noqa: PT017 - or none is raised
        assert not (folder / "a.ckpt").exists()
    else:
        outcome = "equal"
    assert time.monotonic() - begun < SOON_SECONDS
    assert [t.name for t in threading.enumerate() if t.name.startswith("anemoi-ckpt")] == []
    return outcome


# ── the table ─────────────────────────────────────────────────────────────────────────────────


def table() -> str:
    lines = [f"| | {' | '.join(PLACES.values())} |", "| --- | --- | --- | --- | --- |"]
    for fault in CASES:
        cells = []
        for kind in PLACES:
            found = {way: OUTCOMES.get((fault, kind, way), "-") for way in WAYS}
            usual = Counter(found.values()).most_common(1)[0][0]
            other = [f"{way}: {outcome}" for way, outcome in found.items() if outcome != usual]
            cells.append("; ".join([usual, *other]))
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    counts = Counter(OUTCOMES.values())
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    return "\n".join([*lines, "", f"{len(OUTCOMES)} cells: {total}."])


def test_the_table_in_readme(capsys: pytest.CaptureFixture[str]) -> None:
    if set(OUTCOMES) != set(CELLS):
        pytest.skip("some cells were not run")
    with capsys.disabled():
        sys.stdout.write(f"\n{table()}\n")
    assert f"<!-- faults -->\n{table()}\n<!-- /faults -->" in PAGES["docs/faults.md"]
