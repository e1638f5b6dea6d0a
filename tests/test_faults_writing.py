"""Each fault, at each request of an upload, in each store: the object is whole, or the old one is
there and nothing is left of the new one.
"""

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

import _anemoi_ckpt.transport
from _anemoi_ckpt.places import uploading
from _anemoi_ckpt.places.interrupts import Stop
from anemoi_ckpt import (
    AccessDeniedError,
    CheckpointError,
    UnreachableError,
    load,
    open_stream,
    open_writer,
    parse_uri,
    save,
)
from pages import PAGES
from servers import Fault, Request
from test_interrupts import interrupted, own_client

CHECKPOINT = {"w": torch.rand(1_700_000)}  # more than one part of an upload
PARTS = {"s3": 5 * 1024**2, "azure": 2 * 1024**2, "gcs": 2 * 1024**2}  # bytes
STORES = tuple(PARTS)
STAGES = ("create", "part", "complete")
SILENCE_SECONDS = 120


def stage(request: Request) -> str | None:
    """Which request of an upload this is."""
    query = request.query
    if request.method == "POST":  # S3's, and the first of GCS
        if "uploadId=" in query:
            return "complete"
        return "create" if "uploads" in query or "uploadType=resumable" in query else None
    if request.method != "PUT":
        return None
    if "comp=blocklist" in query:
        return "complete"
    if "upload_id=" in query:  # of GCS; the last part has the object's size
        return "part" if (request.headers["Content-Range"] or "").endswith("/*") else "complete"
    return "part" if "partNumber=" in query or "comp=block&" in query else None


@pytest.fixture(autouse=True, scope="module")
def young_heap() -> Iterator[None]:
    """The garbage collector looks at what these tests make, and not at moto and torch."""
    gc.collect()
    gc.freeze()  # not in tests of hypothesis, which looks for what refers to an object
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)


def begin(place: Any, chosen: str, fault: Fault, *, handed_on: bool, once: bool) -> None:
    """Spoil the requests of a stage: each of them once, or always."""
    seen: set[object] = set()

    def spoil(request: Request) -> Fault | None:
        known = (request.target, request.headers["Content-Range"])
        if stage(request) != chosen or (once and known in seen):
            return None
        seen.add(known)
        if handed_on:  # the store does it, and nobody hears of that
            return attrs.evolve(fault, before=lambda: place.server.forward(request))
        return fault

    place.server.fault = spoil


def saved(place: Any, **patience: Any) -> str:
    uri = place.put("a.ckpt", b"before")
    params = {"min_part_size": PARTS[place.kind]}
    try:
        save(CHECKPOINT, uri, transport_params=params, **patience)
    except CheckpointError as err:
        assert str(err).startswith(f"{uri}: ")  # noqa: PT017 - or none is raised
        assert "<bound" not in str(err)  # noqa: PT017 - likewise
        return type(err).__name__
    return "equal"


def left(place: Any) -> tuple[str, list[Any]]:
    """What object is there, and which uploads are."""
    gc.collect()  # smart-open's streams are closed then, if they are not by now
    uri = place.put("other", b"")[: -len("other")] + "a.ckpt"
    place.server.reset()
    with open_stream(uri) as stream:
        data = bytes(stream.read())
    uploads = []
    if place.kind == "s3":
        sdk, bucket = place.store.sdk, uri.split("/")[2]
        found = sdk.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        uploads = [(each["Key"], each["UploadId"]) for each in found if uri.endswith(each["Key"])]
        for key, upload in uploads:  # nobody else finds them
            sdk.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
    if data == b"before":
        return "before", uploads
    assert load(uri)["w"].equal(CHECKPOINT["w"])
    return "equal", uploads


FAULTS: dict[str, tuple[Fault, bool]] = {  # and whether the store does what it is asked to
    **{str(status): (Fault(status=status), False) for status in (408, 429, 500, 502, 503, 504)},
    "400 RequestTimeout": (
        Fault(status=400, body=b"<Error><Code>RequestTimeout</Code></Error>"),
        False,
    ),
    "reset": (Fault(reset=True), False),
    "lost": (Fault(reset=True), True),
    "cut": (Fault(cut=0), False),
    "stalled": (Fault(delay=SILENCE_SECONDS), False),
}
CELLS = [
    (fault, each, place)
    for fault in FAULTS
    for each in STAGES
    for place in STORES
    if (each, place) != ("create", "azure")  # it has no such request
    and (place == "s3" or not fault.startswith("400"))
]
ALWAYS = [cell for cell in CELLS if cell[0] not in {"lost", "cut"}]  # the store has done those
WRITES = [cell[1:] for cell in CELLS if cell[0] == "reset"]
LASTING = (401, 403, 404, 410)
ROWS = [  # of the table in README: what fails, at which request, in which store
    *((f"{fault}, each request once", each, place) for fault, each, place in CELLS),
    *((f"{fault}, always", each, place) for fault, each, place in ALWAYS),
    *((f"{status}, always", each, place) for status in LASTING for each, place in WRITES),
]
OUTCOMES: dict[tuple[str, str, str], str] = {}


def note(row: str, each: str, place: Any, outcome: str) -> None:
    OUTCOMES[row, each, place.kind] = outcome


@pytest.mark.parametrize(("fault", "each", "place"), CELLS, indirect=["place"])
def test_a_request_that_fails_is_made_again(
    fault: str, each: str, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt, handed_on = FAULTS[fault]
    place.put("a.ckpt", b"before")
    place.server.reset()
    begin(place, each, spoilt, handed_on=handed_on, once=True)
    with caplog.at_level(logging.WARNING, "anemoi_ckpt"):
        outcome = saved(place, **({"timeout": 6} if fault == "stalled" else {}))
    asked = Counter((r.target, r.headers["Content-Range"]) for r in place.server.log if stage(r))
    note(f"{fault}, each request once", each, place, outcome)
    assert outcome == "equal"
    object_there, uploads = left(place)
    assert object_there == "equal"
    if each != "create" or fault not in {"lost", "cut"}:  # nobody knows that one's name
        assert uploads == []  # and it has no parts
    again = sum(asked.values()) - len(asked)
    told = [record.getMessage() for record in caplog.records]
    if fault != "stalled":  # a busy machine may be as silent
        assert len(told) == again  # one warning an attempt
        # an answer that has no body cannot be cut
        assert again >= 1 or fault == "cut"
    assert all(text.startswith("attempt 1 of 6 at ") for text in told)


@pytest.mark.parametrize(
    ("fault", "each", "place"),
    ALWAYS,
    indirect=["place"],
)
def test_what_fails_always_leaves_the_old_object(fault: str, each: str, place: Any) -> None:
    spoilt, _ = FAULTS[fault]
    place.put("a.ckpt", b"before")
    place.server.reset()
    begin(place, each, spoilt, handed_on=False, once=False)
    started = time.monotonic()
    patience = {"timeout": 0.9} if fault == "stalled" else {"retries": 1}
    outcome = saved(place, **patience)
    note(f"{fault}, always", each, place, outcome)
    assert outcome == "UnreachableError"
    assert time.monotonic() - started < SILENCE_SECONDS / 2
    asked = Counter(r.target for r in place.server.log if stage(r) == each)
    if fault != "stalled":
        assert max(asked.values()) == 2
    assert left(place) == ("before", [])


@pytest.mark.parametrize("status", LASTING)
@pytest.mark.parametrize(("each", "place"), WRITES, indirect=["place"])
def test_what_cannot_get_better_is_told_at_once(
    status: int, each: str, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place.put("a.ckpt", b"before")
    place.server.reset()
    begin(place, each, Fault(status=status), handed_on=False, once=False)
    with caplog.at_level(logging.WARNING, "anemoi_ckpt"):
        right = "AccessDeniedError" if status < 404 else "CheckpointNotFoundError"
        outcome = saved(place)
    note(f"{status}, always", each, place, outcome)
    assert outcome == right
    asked = Counter((r.target, r.headers["Content-Range"]) for r in place.server.log if stage(r))
    assert max(asked.values()) == 1
    assert caplog.records == []
    assert left(place) == ("before", [])


def table(outcomes: Mapping[tuple[str, str, str], str]) -> str:
    lines = ["| | S3 | Azure | GCS |", "| --- | --- | --- | --- |"]
    for row in dict.fromkeys(row for row, _, _ in ROWS):
        cells = []
        for store in STORES:
            found = {outcomes[cell] for cell in ROWS if (cell[0], cell[2]) == (row, store)}
            cells.append("; ".join(sorted(found)) or "-")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_in_readme() -> None:
    if set(OUTCOMES) != set(ROWS):
        pytest.skip("some cells were not run")
    assert f"<!-- writing -->\n{table(OUTCOMES)}\n<!-- /writing -->" in PAGES["docs/faults.md"]


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_store_that_goes_away_half_way(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    place.put("a.ckpt", b"before")
    place.server.reset()
    place.server.fault = lambda request: Fault(status=503) if stage(request) != "create" else None
    with caplog.at_level(logging.WARNING, "anemoi_ckpt"):
        assert saved(place, retries=1) == "UnreachableError"
    place.server.reset()
    gc.collect()  # closes smart-open's stream, whose upload was not aborted: S3 keeps its parts
    assert place.server.log == []
    assert left(place)[0] == "before"
    told = [record.getMessage() for record in caplog.records]
    assert any("parts of the upload may be left" in text for text in told) == (place.kind == "s3")


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_store_that_is_not_there_is_told(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    uri = place.unreachable()
    with (
        caplog.at_level(logging.WARNING, "anemoi_ckpt"),
        pytest.raises(UnreachableError, match="check the host, the endpoint") as info,
    ):
        save(CHECKPOINT, uri, retries=3)
    assert "<bound" not in str(info.value)
    assert [record.getMessage()[:14] for record in caplog.records] == [
        f"attempt {number} of 4" for number in (1, 2, 3)
    ]


UNKNOWN = Fault(
    status=404,
    body=b"<Error><Code>NoSuchUpload</Code><Message>The upload does not exist</Message></Error>",
)


def lose_answer_to_complete(place: Any, then: Callable[[], object]) -> None:
    """The store completes an upload, nobody hears of that, and it has forgotten the upload."""

    def spoil(request: Request) -> Fault | None:
        if stage(request) != "complete":
            return None
        if sum(stage(each) == "complete" for each in place.server.log) > 1:
            return UNKNOWN
        return Fault(before=lambda: (place.server.forward(request), then()), reset=True)

    place.server.fault = spoil


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_an_upload_that_was_completed_is_recognized(place: Any) -> None:
    place.put("a.ckpt", b"before")
    place.server.reset()
    lose_answer_to_complete(place, lambda: None)
    assert saved(place) == "equal"
    assert left(place) == ("equal", [])


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_another_object_is_not_taken_for_what_was_written(place: Any) -> None:
    uri = place.put("a.ckpt", b"before")
    place.server.reset()
    lose_answer_to_complete(place, lambda: place.replace(uri, b"another's"))
    with pytest.raises(UnreachableError, match="does not know the upload"):
        save(CHECKPOINT, uri, retries=2, transport_params={"min_part_size": PARTS["s3"]})
    with open_stream(uri) as stream:
        assert stream.read() == b"another's"


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_parts_whose_etags_are_no_digests_tell_nothing(place: Any) -> None:
    """As those of an object that a key of KMS encrypts."""
    uri = place.put("a.ckpt", b"before")
    place.server.reset()
    place.server.fault = lambda request: (
        UNKNOWN
        if stage(request) == "complete"
        else Fault(headers={"ETag": '"a-1"'})
        if stage(request) == "part"
        else None
    )
    with pytest.raises(UnreachableError, match="does not know the upload"):
        save(CHECKPOINT, uri, retries=1, transport_params={"min_part_size": PARTS["s3"]})
    assert left(place) == ("before", [])


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_a_stream_that_was_given_up_stays_closed(place: Any) -> None:
    uri = place.put("a.ckpt", b"before")
    place.server.fault = lambda request: Fault(status=403) if stage(request) == "part" else None
    data = bytes(PARTS[place.kind] + 1)
    params = {"min_part_size": PARTS[place.kind]}

    def write_twice() -> None:
        with open_writer(uri, params) as stream:
            with pytest.raises(CheckpointError):
                stream.write(data)
            place.server.reset()
            stream.write(data)  # as torch does, which writes the end of its archive

    with pytest.raises(AccessDeniedError):
        write_twice()
    assert [stage(request) for request in place.server.log if stage(request)] == []
    assert left(place) == ("before", [])


# ── Ctrl-C ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("each", "place"), WRITES, indirect=["place"])
@pytest.mark.parametrize("silence", ["of one request", "from then on"])
def test_an_interrupt_stops_an_upload(silence: str, each: str, place: Any) -> None:
    uri = place.put("a.ckpt", b"before")
    place.server.reset()
    silent = threading.Event()

    def at(request: Request) -> Fault | None:
        if stage(request) == each or (silent.is_set() and silence == "from then on"):
            silent.set()
            return Fault(delay=SILENCE_SECONDS)
        return None

    place.server.fault = at
    with interrupted(silent):
        save(CHECKPOINT, uri, transport_params={"min_part_size": PARTS[place.kind]})
    object_there, uploads = left(place)
    assert object_there == "before"
    assert silence == "from then on" or uploads == []


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_an_interrupt_does_not_wait_for_a_users_client_to_abort(place: Any) -> None:
    uri = place.put("a.ckpt", b"before")
    params = own_client(place) | {"min_part_size": PARTS[place.kind]}
    silent = threading.Event()

    def at(request: Request) -> Fault | None:
        if stage(request) == "part" or silent.is_set():
            silent.set()
            return Fault(delay=SILENCE_SECONDS)
        return None

    place.server.fault = at
    threads: list[threading.Thread] = []
    with interrupted(silent, threads):
        save(CHECKPOINT, uri, transport_params=params)
    assert left(place)[0] == "before"  # this ends the silence, too
    for thread in threads:
        thread.join(SILENCE_SECONDS / 2)
        assert not thread.is_alive()


def test_a_bare_thread_stops_an_abort() -> None:
    """Coverage does not see what runs in one."""
    stop = Stop()
    _anemoi_ckpt.transport._stop_after(stop, 0)
    assert stop.is_set()


def test_an_upload_that_has_ended_sends_nothing() -> None:
    sent: list[str] = []
    upload = uploading.Upload(parse_uri("s3://bucket/a.ckpt"))
    client = uploading.Requesting(SimpleNamespace(part=None), upload, {"part": sent.append})
    client.part("1")
    upload.end(SimpleNamespace(close=None))
    with pytest.raises(CheckpointError, match="its upload has ended; write it anew"):
        client.part("2")
    assert sent == ["1"]
