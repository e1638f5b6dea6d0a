"""Places: what a text names, how it is opened and read in parts, and what is said when it fails."""

import contextlib
import email.utils
import gc
import http.client
import io
import json
import logging
import os
import pickle
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st

import _anemoi_ckpt.places
import _anemoi_ckpt.progress
import _anemoi_ckpt.transport
import anemoi_ckpt
import needs
import servers
from _anemoi_ckpt.blocks import streamed
from _anemoi_ckpt.globs import similar
from _anemoi_ckpt.places import forget_clients
from _anemoi_ckpt.places.explained import without_secrets
from _anemoi_ckpt.places.interrupts import Stop
from _anemoi_ckpt.places.joined import JoinedURI
from _anemoi_ckpt.places.s3 import client_of
from _anemoi_ckpt.transport import Transport
from anemoi_ckpt import (
    GCSURI,
    HTTPURI,
    S3URI,
    URI,
    AccessDeniedError,
    AzureURI,
    Buffers,
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    InvalidURIError,
    LocalURI,
    MissingPackageError,
    NotACheckpointError,
    UnreachableError,
    Version,
    download,
    load,
    open_stream,
    parse_uri,
    read_range,
    register_scheme,
    save,
)
from checkpoints import as_bytes, assert_same

# ── what a text names ─────────────────────────────────────────────────────────────────────────

PLACES = {
    "last.ckpt": LocalURI("last.ckpt", "last.ckpt"),
    "a b/../ü?#%20.ckpt": LocalURI("a b/../ü?#%20.ckpt", "a b/../ü?#%20.ckpt"),
    "C:\\run\\last.ckpt": LocalURI("C:\\run\\last.ckpt", "C:\\run\\last.ckpt"),
    "file:///run/a%20b.ckpt": LocalURI("file:///run/a%20b.ckpt", "/run/a b.ckpt"),
    "file://localhost/a?b#c": LocalURI("file://localhost/a?b#c", "/a?b#c"),
    "http://host/a.ckpt?sig=x%2F": HTTPURI("http://host/a.ckpt?sig=x%2F"),
    "HTTPS://me:pw@host:8443/a": HTTPURI("HTTPS://me:pw@host:8443/a"),
    "s3://bucket/run/a b?c#d%20é.ckpt": S3URI(
        "s3://bucket/run/a b?c#d%20é.ckpt", "bucket", "run/a b?c#d%20é.ckpt"
    ),
    "s3://bucket/a?versionId=v.1": S3URI("s3://bucket/a?versionId=v.1", "bucket", "a", "v.1"),
    "gs://bucket/dir/a.ckpt": GCSURI("gs://bucket/dir/a.ckpt", "bucket", "dir/a.ckpt"),
    "gs://bucket/a#b.ckpt#17": GCSURI("gs://bucket/a#b.ckpt#17", "bucket", "a#b.ckpt", 17),
    "gcs://bucket/a": GCSURI("gcs://bucket/a", "bucket", "a"),
    "az://container/dir/a b": AzureURI("az://container/dir/a b", "container", "dir/a b"),
    "azure://c/a": AzureURI("azure://c/a", "c", "a"),
    "abfss://c@acc.dfs.core.windows.net/d/a": AzureURI(
        "abfss://c@acc.dfs.core.windows.net/d/a", "c", "d/a", "https://acc.blob.core.windows.net"
    ),
    "https://acc.blob.core.windows.net/c/d%20e?sv=1&sig=s": AzureURI(
        "https://acc.blob.core.windows.net/c/d%20e?sv=1&sig=s",
        "c",
        "d e",
        "https://acc.blob.core.windows.net",
        "sv=1&sig=s",
    ),
}


@pytest.mark.parametrize("text", PLACES)
def test_a_text_names_a_place_and_the_place_keeps_the_text(text: str) -> None:
    uri = parse_uri(text)
    assert uri == PLACES[text]
    assert str(uri) == text
    assert parse_uri(uri) is uri
    assert hash(uri) == hash(PLACES[text])


def test_paths_and_the_home_directory() -> None:
    home = os.environ["HOME"]
    assert parse_uri("~/a.ckpt") == LocalURI("~/a.ckpt", f"{home}/a.ckpt")
    assert parse_uri(Path("run") / "a.ckpt") == LocalURI("run/a.ckpt", "run/a.ckpt")
    assert parse_uri(Path("s3://b/k")) == LocalURI("s3:/b/k", "s3:/b/k")  # a path is a path


keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda key: not key.endswith("/") and "?versionId=" not in key
)


@given(scheme=st.sampled_from(["s3", "gs", "az"]), key=keys)
def test_every_key_comes_through_as_it_is(scheme: str, key: str) -> None:
    text = f"{scheme}://bucket/{key}"
    uri = parse_uri(text)
    found = uri.key if isinstance(uri, S3URI) else getattr(uri, "name", getattr(uri, "blob", None))
    generation = getattr(uri, "generation", None)
    assert str(uri) == text
    assert found + ("" if generation is None else key.removeprefix(found)) == key


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the path is empty"),
        ("gopher://host/a", "unknown (known: abfs, abfss, az, azure, file, ftp, ftps, gcs, gs, "),
        ("gopher://host/a", "add it with register_scheme('gopher', parser)"),
        ("s3://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("s3://bucket", "names no object"),
        ("gs://bucket/", "names no object"),
        ("s3://bucket/a.ckpt?versionId=", "names no version; name it, or leave"),
        ("az://container/run/", "names a folder; add the name of the checkpoint"),
        ("https:///a", "the URL has no host"),
        ("https://[half/a", "no URL (Invalid IPv6 URL); check it"),
        ("file://other/a", "names no file on this machine"),
        ("s3://***@bucket/a", "has credentials in it; set AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_text_that_names_no_place(text: str, said: str) -> None:
    with pytest.raises(InvalidURIError) as caught:
        parse_uri(text)
    assert said in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert text in str(caught.value)


def test_a_scheme_with_one_slash_is_a_folder_unless_there_is_none(
    tmp_path: Path, monkeypatch
) -> None:
    with pytest.raises(CheckpointNotFoundError, match="write s3:// with two slashes"):
        load("s3:/bucket/a.ckpt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:/a.ckpt").write_bytes(as_bytes({"epoch": 3}))
    assert load("s3:/a.ckpt") == {"epoch": 3}


def test_a_scheme_of_ones_own_needs_a_parser_and_a_handler(tmp_path: Path) -> None:
    class MemoryURI(URI):
        """`memory://name`."""

    data = as_bytes({"a": 1})
    register_scheme("memory", MemoryURI)
    try:
        with pytest.raises(InvalidURIError, match="no handler opens a MemoryURI; write one with @"):
            load("memory://a")
        open_stream.register(MemoryURI, lambda uri, transport_params=None: io.BytesIO(data))
        assert load("memory://a") == {"a": 1}
        assert load("MEMORY://a") == {"a": 1}
    finally:
        del _anemoi_ckpt.places._PARSERS["memory"]
    with pytest.raises(ValueError, match="'c' is no scheme"):
        register_scheme("c", MemoryURI)  # that is a drive of Windows


# ── secrets ───────────────────────────────────────────────────────────────────────────────────

SECRETS = [
    "https://me:hunter2@host/a",
    "https://host/a?X-Amz-Signature=hunter2&X-Amz-Date=1",
    "https://acc.blob.core.windows.net/c/b?sv=1&sig=hunter2",
    "https://host/a?access_token=hunter2",
    "https://me:p@hunter2@host/a",
    "https://host/a?api_key=hunter2",
]


@pytest.mark.parametrize("text", SECRETS)
def test_no_secret_shows(text: str) -> None:
    uri = parse_uri(text)
    assert "hunter2" not in repr(uri)
    assert "hunter2" in str(uri)
    assert "hunter2" not in str(CheckpointError(uri, f"GET {text}", "try again"))


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "hf", "file", "https", "runs"])
def test_no_field_of_a_place_shows_a_signature(scheme: str) -> None:
    shown = repr(
        parse_uri(
            f"{scheme}:///a/b/c.ckpt?sig=hunter2"
            if scheme == "file"
            else f"{scheme}://a/b/c.ckpt?sig=hunter2"
        )
    )
    assert "hunter2" not in shown
    assert "c.ckpt?sig=***" in shown


def test_a_kind_of_place_may_have_a_repr_of_its_own() -> None:
    class Named(URI):
        def __repr__(self) -> str:
            return "mine"

    class Plain(URI):
        pass

    assert repr(Named("a")) == "mine"
    assert repr(Plain("a?sig=hunter2")).endswith("Plain(text='a?sig=***')")


def test_no_secret_shows_in_a_log_or_a_cause(
    http_server: servers.HTTPServer, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    http_server.stop()
    with caplog.at_level(logging.DEBUG), pytest.raises(UnreachableError) as caught:
        load(f"{http_server.url}/a.ckpt?sig=hunter2")
    links = [caught.value, caught.value.__cause__]
    assert links[1] is not None
    assert not any("hunter2" in f"{link} {link!r}" for link in links)
    assert f"attempt 1 of 6 at {http_server.url}/a.ckpt?sig=***: no useful" in caplog.text
    # urllib3 logs the URL itself, at the level DEBUG, where nobody but a developer looks
    assert not any("hunter2" in r.getMessage() for r in caplog.records if "anemoi" in r.name)


def test_what_a_client_refuses_to_ask_is_not_asked_again(s3: servers.Store) -> None:
    with pytest.raises(CheckpointError, match="Invalid bucket name") as caught:
        load("s3://no bucket/a.ckpt")
    assert not isinstance(caught.value, UnreachableError)
    assert s3.server.log == []


def refusing(how: int | str, size: int, data: bytes) -> Any:
    """A server's answer to a range from the end; others it gives."""

    def fault(request: servers.Request) -> servers.Fault | None:
        if not (request.range or "").startswith("bytes=-"):
            return None
        if how == "everything":
            return servers.Fault(ignore_range=True)
        if isinstance(how, int):
            return servers.Fault(status=how)
        extent = f"bytes 0-65535/{size}"
        return servers.Fault(status=206, body=data[:65536], headers={"Content-Range": extent})

    return fault


@pytest.mark.parametrize("place", ["http", "s3"], indirect=True)
@pytest.mark.parametrize("how", [400, 405, 416, 500, 501, "as 0-N", "everything"])
def test_a_server_that_gives_no_range_from_the_end(place, how: int | str) -> None:
    checkpoint = {"w": torch.arange(100_000), "rest": torch.zeros(2_000_000)}
    data = as_bytes(checkpoint)
    uri = place.put("a.ckpt", data)
    place.server.fault = refusing(how, len(data), data)
    place.server.log.clear()
    assert_same(load(uri, lambda c: c["w"]), checkpoint["w"])
    assert len(place.server.log) == 4  # the first block, twice the last one, and the record
    whole = len(data) if how == "everything" else 0  # of which the reader takes nothing
    assert place.server.bytes_sent - whole < 1_200_000
    assert anemoi_ckpt.peek(uri).bytes == len(data)


@pytest.mark.parametrize("place", ["http", "s3"], indirect=True)
def test_an_empty_object_is_one_however_its_end_is_refused(place) -> None:
    uri = place.put("a.ckpt", b"")
    place.server.fault = refusing(416, 0, b"")
    with pytest.raises(CheckpointError, match="empty"):
        load(uri)


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:s3:us-west-2:123456789012:accesspoint/my-ap",
        "arn:aws:s3:us-west-2:123456789012:accesspoint:my-ap",
        "arn:aws:s3::123456789012:accesspoint/my-mrap.mrap",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01/accesspoint/my-ap",
        "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/my-ap",
    ],
)
def test_an_access_point_is_a_bucket(arn: str) -> None:
    uri = parse_uri(f"s3://{arn}/run/last.ckpt?versionId=7")
    assert isinstance(uri, S3URI)
    assert (uri.bucket, uri.key, uri.version_id) == (arn, "run/last.ckpt", "7")


def test_what_every_request_to_s3_says(s3: servers.Store, tmp_path: Path) -> None:
    s3.write("paid/a.ckpt", as_bytes({"w": torch.ones(2)}))
    pays = {"RequestPayer": "requester"}
    names = ("get_object", "head_object", "list_objects_v2", "delete_object")
    params = {"client_kwargs": {f"S3.Client.{name}": pays for name in names}}
    uri = s3.uri("paid/a.ckpt")
    s3.server.log.clear()
    load(uri, transport_params=params)
    anemoi_ckpt.download(uri, tmp_path / "a.ckpt", transport_params=params)
    with open_stream(uri, params) as stream:
        stream.read()
    anemoi_ckpt.list_objects(s3.uri("paid"), transport_params=params)
    anemoi_ckpt.remove_object(parse_uri(uri), params)
    said = [request.headers["x-amz-request-payer"] for request in s3.server.log]
    assert len(said) >= 6
    assert set(said) == {"requester"}


def test_keys_in_an_s3_uri() -> None:
    for text in ("s3://AKIA:abc@bucket/key", "s3://AKIA:ab/c+d@bucket/key"):
        with pytest.raises(InvalidURIError, match="has credentials in it") as caught:
            parse_uri(text)
        assert "ab" not in str(caught.value).replace("AKIA", "")
    assert parse_uri("s3://bucket/a:b@c").key == "a:b@c"
    arn = "arn:aws:s3:eu-west-1:123456789012:accesspoint/mine"
    assert parse_uri(f"s3://{arn}/a@b").text.endswith("/a@b")


def test_a_garbled_answer_is_asked_for_again(gcs: servers.Store) -> None:
    gcs.write("a.ckpt", as_bytes({"a": 1}))
    gcs.server.faults.append(servers.Fault(body=b"{"))
    assert load(gcs.uri("a.ckpt")) == {"a": 1}


def test_a_snapshot_of_a_blob(azure: servers.Store, tmp_path: Path) -> None:
    before, after = as_bytes({"a": 1}), as_bytes({"a": 2})
    azure.write("a.ckpt", before)
    blob = azure.sdk.get_blob_client(servers.BUCKET, "a.ckpt")
    uri = f"{azure.uri('a.ckpt')}?snapshot={blob.create_snapshot()['snapshot']}"
    azure.write("a.ckpt", after)
    assert load(uri) == {"a": 1}
    assert download(uri, tmp_path / "a.ckpt").read_bytes() == before
    with contextlib.closing(open_stream(uri)) as stream:
        assert stream.read() == before
    assert load(azure.uri("a.ckpt")) == {"a": 2}
    with pytest.raises(InvalidURIError, match="names a version"):
        save({}, uri)


def test_what_follows_a_blobs_name() -> None:
    url = "https://a.blob.core.windows.net/c/b"
    given = parse_uri(f"{url}?snapshot=2026-11-24T00%3A00&sv=1&sig=ab%2B")
    assert (given.sas, given.snapshot, given.version_id) == (
        "sv=1&sig=ab%2B",
        "2026-11-24T00:00",
        None,
    )
    given = parse_uri(f"{url}?versionid=2026")
    assert (given.sas, given.snapshot, given.version_id) == (None, None, "2026")
    assert parse_uri("az://c/what?.ckpt").blob == "what?.ckpt"
    given = parse_uri("az://c/b?sv=1&sig=ab")
    assert (given.blob, given.sas) == ("b", "sv=1&sig=ab")


def test_credentials_of_google_without_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.package("google.cloud.storage", "pip install google-cloud-storage")
    user = dict.fromkeys(("client_id", "client_secret", "refresh_token"), "x")
    (tmp_path / "user.json").write_text(json.dumps({"type": "authorized_user", **user}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "user.json"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no gcloud to ask, either
    client = _anemoi_ckpt.places.gcs.client_of(parse_uri("gs://bucket/a.ckpt"), None)
    assert client._credentials.refresh_token == "x"


# ── streams and ranges ────────────────────────────────────────────────────────────────────────

DATA = bytes(range(256)) * 300


def test_a_stream_gives_all(place) -> None:
    # gcp-storage-emulator writes no right link to an object with ? or # in its name
    name = "a b%é.bin" if place.kind == "gcs" else "a b?#%é.bin"
    with contextlib.closing(open_stream(place.put(name, DATA))) as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 10), (1000, 70_000), (-10, 10), (len(DATA) - 3, 10), (-99_999, 99_999)],
)
def test_a_range_fills_buffers_with_what_is_there(place, offset: int, length: int) -> None:
    uri = parse_uri(place.put("a.bin", DATA))
    first, second = bytearray(length // 2), bytearray(length - length // 2)
    buffers = Buffers(first, second)
    version = read_range(uri, offset, buffers)
    start = max(0, len(DATA) + offset) if offset < 0 else offset
    expected = DATA[start : start + length]
    assert version.size == len(DATA)
    assert version.tag
    assert buffers.filled == len(expected)
    assert (first + second)[: len(expected)] == expected


def test_a_range_of_an_empty_object_in_gcs_is_empty(gcs: servers.Store) -> None:
    gcs.write("empty.bin", b"")
    buffer = bytearray(b"unchanged")
    assert read_range(parse_uri(gcs.uri("empty.bin")), 0, Buffers(buffer)).size == 0
    assert buffer == b"unchanged"


def test_a_place_of_ones_own_has_ranges_by_seeking(monkeypatch) -> None:
    class SeekableURI(URI):
        """Has a stream, and no handler of ranges."""

    open_stream.register(SeekableURI, lambda uri, transport_params=None: io.BytesIO(DATA))
    for offset, length in [(0, 10), (-10, 10), (5, 7), (-(10**6), 10), (10**6, 10)]:
        buffer = bytearray(length)
        buffers = Buffers(buffer)
        assert read_range(SeekableURI("x"), offset, buffers) == Version(len(DATA))
        start = max(0, len(DATA) + offset) if offset < 0 else offset
        assert buffer[: buffers.filled] == DATA[start : start + length]
    with pytest.raises(ChangedError):
        read_range(SeekableURI("x"), 0, Buffers(bytearray(1)), Version(7))


def test_a_stream_that_always_ends_early_is_given_up(monkeypatch) -> None:
    class ShortURI(URI):
        """Says that it is longer than it is."""

    class Short(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            return super().seek(80 if whence == io.SEEK_END else offset)

    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    open_stream.register(ShortURI, lambda uri, transport_params=None: Short(b"x" * 30))
    with pytest.raises(UnreachableError, match="the answer ended early, 30 bytes after byte 0"):
        load(ShortURI("x"))


def test_a_stream_that_cannot_seek_is_taken_whole(tmp_path: Path) -> None:
    class PipeURI(URI):
        """A stream from its first to its last byte."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    checkpoint = {"state_dict": {"a": 1}}
    data = as_bytes(checkpoint)
    counts: list[tuple[int, int | None]] = []
    open_stream.register(PipeURI, lambda uri, transport_params=None: Pipe(data))
    assert load(PipeURI("x"), progress=lambda *c: counts.append(c)) == checkpoint
    assert counts == [(len(data), None)]


def test_what_was_streamed_owns_its_memory(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(DATA)
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    data = streamed(parse_uri(path), Transport(), progress=False)
    assert type(data) is bytes  # a view of a file in memory is reported by Python 3.13 and newer
    assert data == DATA
    cycle: list[Any] = [memoryview(data)]
    cycle.append(cycle)
    del data, cycle
    gc.collect()
    assert reported == []


def test_buffers_take_what_an_sdk_pushes_and_leave_the_rest() -> None:
    first, second, seen = bytearray(2), bytearray(3), []
    buffers = Buffers(first, bytearray(), second, notify=seen.append)
    assert buffers.write(b"abc") == 3
    assert buffers.write(b"defgh") == 5
    assert (first, second, buffers.filled, buffers.size) == (b"ab", b"cde", 5, 5)
    assert seen == [2, 1, 2]


def test_an_object_replaced_between_two_reads_is_an_error(place) -> None:
    uri = place.put("a.bin", DATA)
    version = read_range(parse_uri(uri), 0, Buffers(bytearray(10)))
    if place.kind == "local":
        os.utime(uri, ns=(1, 1))
    else:
        place.replace(uri, DATA[::-1])
    for offset in (0, -10):
        with pytest.raises(ChangedError, match="replaced"):
            read_range(parse_uri(uri), offset, Buffers(bytearray(10)), version)


def test_an_object_removed_between_two_reads_is_an_error(place) -> None:
    uri = place.put("a.bin", DATA)
    version = read_range(parse_uri(uri), 0, Buffers(bytearray(10)))
    with pytest.raises((ChangedError, CheckpointNotFoundError)):
        read_range(parse_uri(place.missing()), 0, Buffers(bytearray(10)), version)


# ── faults, by all places ─────────────────────────────────────────────────────────────────────

CHECKPOINT = {"state_dict": {f"layer.{i}": as_bytes([i]) for i in range(3)}, "epoch": 3}
FAULTS = {
    "missing": (CheckpointNotFoundError, FileNotFoundError, "missing.ckpt"),
    "denied": (AccessDeniedError, PermissionError, ""),
    "unreachable": (UnreachableError, ConnectionError, "no useful answer"),
    "empty": (NotACheckpointError, ValueError, "the file is empty"),
    "page": (NotACheckpointError, ValueError, "an HTML or XML page"),
    "text": (NotACheckpointError, ValueError, "begins with b'hello world', as no checkpoint does"),
    "pointer": (NotACheckpointError, ValueError, "a Git LFS pointer; run `git lfs pull`"),
    "truncated": (CorruptError, ValueError, "no readable directory in its"),
    "legacy truncated": (CorruptError, ValueError, "bytes are needed, the file has"),
    "a zip without a pickle": (NotACheckpointError, ValueError, "without one data.pkl"),
    "flipped": (CorruptError, ValueError, "record archive/data/0 from byte"),
}


def faulty(fault: str, place) -> str | None:
    import zipfile

    import torch

    tensors = as_bytes({"w": torch.arange(100_000), "v": torch.ones(3)})
    match fault:
        case "missing" | "denied" | "unreachable":
            return getattr(place, fault)()
        case "empty":
            return place.put("a.ckpt", b"")
        case "page":
            return place.put("a.ckpt", b"\n<!DOCTYPE html><html></html>")
        case "text":
            return place.put("a.ckpt", b"hello world")
        case "pointer":
            return place.put("a.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
        case "truncated":
            return place.put("a.ckpt", tensors[:-100_000])
        case "legacy truncated":
            data = as_bytes({"w": torch.ones(99)}, _use_new_zipfile_serialization=False)
            return place.put("a.ckpt", data[:-50])
        case "a zip without a pickle":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("readme.txt", "hello")
            return place.put("a.ckpt", buffer.getvalue())
        case "flipped":
            spoiled = bytearray(tensors)
            spoiled[tensors.index(torch.arange(100, 110).numpy().tobytes())] ^= 1
            return place.put("a.ckpt", bytes(spoiled))
    raise AssertionError(fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_alike_in_all_places(place, fault: str, monkeypatch) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    uri = faulty(fault, place)
    if uri is None:
        pytest.skip("there is no such thing here")
    kind, builtin, said = FAULTS[fault]
    with pytest.raises(kind) as caught:
        load(uri)
    err = caught.value
    assert isinstance(err, builtin)
    assert said in str(err)
    assert str(err).startswith(f"{uri}: ")
    assert err.place == uri
    again = pickle.loads(pickle.dumps(err))
    assert (type(again), str(again), again.place) == (type(err), str(err), err.place)
    if fault in ("missing", "denied", "unreachable"):
        assert err.__cause__ is not None


REMOTE = ["http", "s3", "gcs", "azure"]


@pytest.mark.parametrize("place", REMOTE, indirect=True)
@pytest.mark.parametrize(
    "fault",
    [
        servers.Fault(reset=True),
        servers.Fault(cut=1000),
        servers.Fault(reset=True, cut=30_000),
        servers.Fault(status=503),
        servers.throttled(429),
    ],
    ids=["reset", "cut", "reset-half-way", "503", "429"],
)
def test_a_failure_that_passes_is_waited_for(place, fault: servers.Fault, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    checkpoint = {"w": torch.arange(50_000.0), "v": torch.ones(30_000)}
    uri = place.put("a.ckpt", as_bytes(checkpoint))
    place.server.faults.extend([fault, None, fault, fault, None, fault])
    assert_same(load(uri), checkpoint)


class Waits(Stop):
    """Notes how long one would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return False


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_a_server_says_how_long_to_wait(place) -> None:
    uri = parse_uri(place.put("a.bin", DATA))
    begun = time.time()
    date = email.utils.formatdate(begun + 30, usegmt=True)
    place.server.faults.extend(
        [servers.throttled(503, 7), servers.throttled(429, 7), servers.throttled(503, date)]
    )
    waits, buffer = Waits(), bytearray(9)
    _anemoi_ckpt.transport.Source(uri, stop=waits).read(0, [buffer])
    assert buffer == DATA[:9]
    assert waits.seconds[:2] == [7, 7]
    # Less what has passed since, and a date has no fractions of a second.
    assert 29 - (time.time() - begun) <= waits.seconds[2] <= 30


def test_a_server_that_asks_to_wait_for_too_long(http_server: servers.HTTPServer) -> None:
    http_server.fault = lambda request: servers.throttled(503, 3600)
    with pytest.raises(UnreachableError) as caught:
        load(f"{http_server.url}/a.ckpt")
    assert "the server asks to wait 3600 s" in caught.value.__notes__[0]


def test_waits_double_and_have_jitter(http_server: servers.HTTPServer) -> None:
    waits = Waits()
    http_server.stop()
    source = _anemoi_ckpt.transport.Source(parse_uri(f"{http_server.url}/a"), stop=waits)
    with pytest.raises(UnreachableError) as caught:
        source.read(0, [bytearray(1)])
    assert "given up after 6 attempts in " in caught.value.__notes__[0]
    assert len(waits.seconds) == _anemoi_ckpt.transport.RETRIES
    assert all(0.1 * 2**n <= wait <= 0.2 * 2**n for n, wait in enumerate(waits.seconds))


def test_no_wait_is_longer_than_half_a_minute_and_no_seed_is_used(http_server) -> None:
    waits = Waits()
    http_server.stop()
    transport = _anemoi_ckpt.transport.Transport(retries=40, timeout=1e9)
    uri = parse_uri(f"{http_server.url}/a")
    before = random.getstate()
    with pytest.raises(UnreachableError):
        _anemoi_ckpt.transport.Source(uri, transport=transport, stop=waits).read(0, [bytearray(1)])
    assert len(waits.seconds) == 40
    assert max(waits.seconds) <= 30
    assert min(waits.seconds[20:]) >= 15
    assert random.getstate() == before


def test_a_read_that_brings_something_each_time_goes_on(
    http_server: servers.HTTPServer, monkeypatch
) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    uri = parse_uri(http_server.put("a.bin", DATA))
    http_server.fault = lambda request: servers.Fault(cut=7000)
    buffer = bytearray(len(DATA))
    version = read_range(uri, 0, Buffers(bytearray(1)))
    http_server.log.clear()
    _anemoi_ckpt.transport.Source(uri, version).read(0, [buffer])
    assert buffer == DATA
    assert len(http_server.log) == 11  # of 7,000 bytes each: nothing came twice
    assert http_server.bytes_sent == len(DATA)


def test_a_read_that_fails_after_its_last_byte_asks_for_nothing_more() -> None:
    """Azure answered the zero bytes that were left with an InvalidRange."""
    asked = []

    class LateURI(URI):
        """All bytes come, and the connection breaks before the answer has ended."""

    @read_range.register
    def _(uri: LateURI, offset, buffers, pin=None, transport_params=None) -> Version:
        asked.append(offset)
        buffers.write(DATA[offset:][: buffers.size])
        raise UnreachableError(uri, "the connection broke", "try again")

    buffer, version = bytearray(100), Version(len(DATA))
    source = _anemoi_ckpt.transport.Source(LateURI("late://a"), version, stop=Waits())
    assert source.read(50, [buffer]) == version
    assert (buffer, asked) == (DATA[50:150], [50])


def test_causes_that_go_round_in_a_circle_end() -> None:
    one, other = ValueError("token=hunter2"), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert "hunter2" not in str(without_secrets(one))
    assert without_secrets(other) is not other


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(as_bytes({"epoch": 3}))
    assert load(path) == {"epoch": 3}  # imports what it needs, from folders that may be root's
    path.chmod(0)
    with as_an_ordinary_user(), pytest.raises(AccessDeniedError, match="the file may not be read"):
        load(path)


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="embedded null byte; check the path"):
        load(f"{tmp_path}/a\0b")


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_the_object_replaced_while_it_is_loaded(http_server: servers.HTTPServer) -> None:
    import torch

    old = as_bytes({"w": torch.zeros(100_000)})
    new = as_bytes({"w": torch.ones(100_000)})
    uri = http_server.put("a.ckpt", old)

    def replace() -> None:
        http_server.put("a.ckpt", new)

    http_server.fault = lambda request: (
        servers.Fault(before=replace) if len(http_server.log) == 3 else None
    )
    with pytest.raises(ChangedError, match=r"replaced or removed while it was read.*load it again"):
        load(uri)


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["ignore_range", "gzip"])
def test_a_server_without_ranges_is_read_once_as_a_stream(
    http_server: servers.HTTPServer, kind: str
) -> None:
    import torch

    draw = torch.Generator().manual_seed(0)
    checkpoint = {"w": torch.randn(8_000_000, generator=draw), "v": torch.ones(3)}
    data = as_bytes(checkpoint)
    uri = http_server.put("a.ckpt", data)
    http_server.fault = lambda request: servers.Fault(**{kind: True})
    assert_same(load(uri), checkpoint)
    # what lay in the sockets of the two ranged requests, when they were closed, was sent, too
    assert http_server.bytes_sent < 2 * len(data)


def test_a_sharded_checkpoint_forgets_the_clients_of_its_store(s3) -> None:
    part = parse_uri(s3.uri("a.safetensors"))
    before = client_of(part, None)
    assert client_of(part, None) is before
    forget_clients(JoinedURI("s3://bucket/index.json", ((part, None),)))
    assert client_of(part, None) is not before


def test_a_store_that_speaks_s3_without_ranges(s3) -> None:
    import torch

    checkpoint = {"w": torch.arange(300_000)}
    s3.write("a.ckpt", as_bytes(checkpoint))
    s3.server.fault = lambda request: servers.Fault(ignore_range=True)
    assert_same(load(s3.uri("a.ckpt")), checkpoint)


def test_a_stream_that_breaks_is_begun_anew(http_server: servers.HTTPServer, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    checkpoint = {"w": torch.arange(300_000)}
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    count = iter(range(99))

    def fault(request: servers.Request) -> servers.Fault:
        cut = 100_000 if not request.range and next(count) < 2 else None
        return servers.Fault(ignore_range=True, cut=cut, reset=cut is not None)

    http_server.fault = fault
    assert_same(load(uri), checkpoint)
    http_server.fault = lambda request: (
        servers.Fault(ignore_range=True) if request.range else servers.Fault(status=503)
    )
    with pytest.raises(UnreachableError):
        load(uri)


def test_the_answer_to_a_stream_that_is_refused_is_closed(http_server, mocker) -> None:
    """smart-open 8.0.0 left it to the collector of garbage, which warned of its socket."""
    uri = parse_uri(http_server.put("a.ckpt", b"much"))
    http_server.fault = lambda request: servers.Fault(status=503)
    closed = mocker.spy(requests.Response, "close")
    with pytest.raises(UnreachableError):
        open_stream(uri, {})
    assert closed.called


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_server_that_forgets_ranges_is_read_whole_then(http_server, after: int) -> None:
    """While it is opened, before its records are read, and among them."""
    import torch

    checkpoint = {"w": torch.arange(3_000_000), "v": torch.ones(3_000_000), "text": "x" * 400_000}
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    http_server.fault = lambda request: (
        servers.Fault(ignore_range=True) if len(http_server.log) >= after else None
    )
    assert_same(load(uri), checkpoint)


def test_an_object_that_is_replaced_by_a_server_that_forgets_ranges(http_server) -> None:
    import torch

    uri = http_server.put("a.ckpt", as_bytes({"w": torch.arange(3_000_000)}))

    def fault(request: servers.Request) -> servers.Fault | None:
        if len(http_server.log) < 3:
            return None
        http_server.put("a.ckpt", as_bytes({"w": torch.arange(5)}))
        return servers.Fault(ignore_range=True, ignore_conditions=True, no_etag=True)

    http_server.fault = fault
    with pytest.raises(ChangedError, match=r"was replaced while it was read \(24\d+ bytes are now"):
        load(uri)


def test_redirects_queries_and_basic_auth(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    http_server.put("real.ckpt", as_bytes({"a": 1}))
    place = f"{http_server.url}/link.ckpt?sig=a%2Fb"
    http_server.fault = lambda request: (
        servers.redirect("/real.ckpt?sig=a%2Fb", 307) if "link" in request.path else None
    )
    assert load(place) == {"a": 1}
    assert {request.query for request in http_server.log} == {"sig=a%2Fb"}

    http_server.fault = lambda request: servers.Fault(auth="me:pass word")
    host = http_server.url.removeprefix("http://")
    assert load(f"http://me:pass%20word@{host}/real.ckpt") == {"a": 1}
    params = {"user": "me", "password": "pass word"}
    assert load(f"{http_server.url}/real.ckpt", transport_params=params) == {"a": 1}
    with pytest.raises(AccessDeniedError, match=r"401 .*~/\.netrc"):
        load(f"{http_server.url}/real.ckpt")
    netrc = Path(os.environ["HOME"]) / ".netrc"
    netrc.write_text('machine 127.0.0.1 login me password "pass word"\n')
    netrc.chmod(0o600)
    assert load(f"{http_server.url}/real.ckpt") == {"a": 1}


def test_a_range_that_was_not_asked_for(http_server: servers.HTTPServer) -> None:
    import torch

    checkpoint = {"w": torch.arange(300_000)}
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    wrong = {"Content-Range": f"bytes 7-70000/{len(as_bytes(checkpoint))}"}
    http_server.fault = lambda request: servers.Fault(headers=wrong) if request.range else None
    assert_same(load(uri), checkpoint)


def test_a_header_wins_over_netrc(http_server: servers.HTTPServer) -> None:
    netrc = Path(os.environ["HOME"]) / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    uri = parse_uri(http_server.put("a", DATA))
    read_range(uri, 0, Buffers(bytearray(1)), None, {"headers": {"Authorization": "Bearer t"}})
    assert {request.headers["Authorization"] for request in http_server.log} == {"Bearer t"}


def test_headers_and_a_session_of_ones_own(http_server: servers.HTTPServer) -> None:
    import requests

    uri = http_server.put("a.ckpt", as_bytes({"a": 1}))
    with requests.Session() as session:
        session.headers["X-From"] = "session"
        params = {"session": session, "headers": {"Authorization": "Bearer t"}, "timeout": 60}
        assert load(uri, transport_params=params) == {"a": 1}
        with contextlib.closing(open_stream(uri, params)) as stream:
            stream.read(1)
    for request in http_server.log:
        assert request.headers["Authorization"] == "Bearer t"
        assert request.headers["X-From"] == "session"


def test_a_reply_that_has_no_socket_and_one_that_is_longer_than_asked(http_server) -> None:
    import requests

    buffer = bytearray(3)
    _anemoi_ckpt.places.responses.read_socket(io.BytesIO(b"abcdef"), Buffers(buffer))
    assert buffer == b"abc"
    with requests.get(http_server.put("a", b"xyzxyz"), stream=True, timeout=60) as reply:
        _anemoi_ckpt.places.responses.read_socket(reply.raw, Buffers(buffer))
        assert buffer == b"xyz"


@pytest.mark.parametrize("place", ["http", "s3", "azure"], indirect=True)
def test_bodies_are_read_from_the_socket(place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through urllib3 and the SDK, which copy each byte: private names of theirs lead there."""
    streams = []

    def readfrom(self: Buffers, stream: object) -> None:
        streams.append(type(stream))
        original(self, stream)

    original = Buffers.readfrom
    monkeypatch.setattr(Buffers, "readfrom", readfrom)
    load(place.put("a.ckpt", as_bytes({"w": [0] * 100_000})))
    assert set(streams) == {http.client.HTTPResponse}


def test_a_url_presigned_for_get_alone(http_server: servers.HTTPServer) -> None:
    http_server.head_status = 403
    assert load(http_server.put("a.ckpt", as_bytes({"a": 1}))) == {"a": 1}
    assert {request.method for request in http_server.log} == {"GET"}


@pytest.mark.parametrize("fault", [servers.Fault(weak_etag=True), servers.Fault(no_etag=True)])
def test_weak_and_no_etags(http_server: servers.HTTPServer, fault: servers.Fault) -> None:
    import torch

    checkpoint = {"w": torch.arange(300_000)}
    uri = http_server.put("a.ckpt", as_bytes(checkpoint))
    http_server.fault = lambda request: fault
    assert_same(load(uri), checkpoint)
    assert not any(request.headers["If-Match"] for request in http_server.log)


def test_a_signed_url_that_has_expired(http_server: servers.HTTPServer) -> None:
    http_server.fault = lambda request: servers.Fault(status=403)
    with pytest.raises(AccessDeniedError, match="ask for a new one if the URL is a signed one"):
        load(f"{http_server.url}/a.ckpt?X-Amz-Signature=1")


@pytest.mark.parametrize("status", [400, 418])
def test_an_answer_that_nobody_foresaw(http_server: servers.HTTPServer, status: int) -> None:
    http_server.fault = lambda request: servers.Fault(status=status)
    with pytest.raises(CheckpointError, match=f"the server answered {status}"):
        load(f"{http_server.url}/a.ckpt")


# ── local ─────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_path_names_what_is_there(tmp_path: Path) -> None:
    for name in ("last.ckpt", "last-v1.ckpt", "other.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match=r"is it one of these: last\.ckpt, last-v1"):
        load(tmp_path / "lasst.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="there is no such file; check the name"):
        load(tmp_path / "zzzzzzzz")
    with pytest.raises(CheckpointNotFoundError, match=r"the directory .*nowhere does not exist"):
        load(tmp_path / "nowhere" / "a.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"the directory .*last.ckpt does not exist"):
        load(tmp_path / "last.ckpt" / "a.ckpt")
    with pytest.raises(InvalidURIError, match="this is a folder; add the name"):
        load(tmp_path)


def test_a_file_that_may_not_be_read_and_a_disk_that_fails(tmp_path: Path, monkeypatch) -> None:
    def refuse(err: OSError) -> None:
        def fail(*args: object, **kw: object) -> None:
            raise err

        monkeypatch.setattr("builtins.open", fail)

    refuse(PermissionError(13, "Permission denied"))
    with pytest.raises(AccessDeniedError, match="may not be read; make the file readable"):
        open_stream("a.ckpt")
    refuse(OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"Input/output error\); check the disk"):
        open_stream("a.ckpt")


def test_files_by_url_home_and_link(tmp_path: Path) -> None:
    target = Path(os.environ["HOME"]) / "a b.ckpt"
    target.write_bytes(as_bytes({"a": 1}))
    (tmp_path / "link.ckpt").symlink_to(target)
    url = target.as_uri()
    assert "%20" in url
    assert [load(p) for p in ("~/a b.ckpt", url, tmp_path / "link.ckpt")] == [{"a": 1}] * 3


# ── S3, GCS, Azure ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_a_wrong_bucket(place) -> None:
    scheme = place.missing().partition("://")[0]
    with pytest.raises((CheckpointNotFoundError, AccessDeniedError)) as caught:
        load(f"{scheme}://no-such-bucket/a.ckpt")
    assert "no-such-bucket/a.ckpt" in str(caught.value)


@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_a_client_of_ones_own(place, monkeypatch) -> None:
    uri = place.put("a.ckpt", as_bytes({"a": 1}))
    clients = {
        "s3": _anemoi_ckpt.places.s3.client_of,
        "gcs": _anemoi_ckpt.places.gcs.client_of,
        "azure": _anemoi_ckpt.places.azure.client_of,
    }
    client = clients[place.kind](parse_uri(uri), None)
    for name in list(place.store.environment):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_port()}")
    assert load(uri, transport_params={"client": client}) == {"a": 1}
    with contextlib.closing(open_stream(uri, {"client": client})) as stream:
        assert stream.read() == as_bytes({"a": 1})


@pytest.mark.parametrize("place", ["s3", "gcs", "azure"], indirect=True)
def test_clients_are_made_once_for_a_setting_of_the_environment(place, monkeypatch) -> None:
    uri = parse_uri(place.missing())
    make = {
        "s3": _anemoi_ckpt.places.s3.client_of,
        "gcs": _anemoi_ckpt.places.gcs.client_of,
        "azure": _anemoi_ckpt.places.azure.client_of,
    }[place.kind]
    client = make(uri, None)
    assert make(uri, None) is client
    for name in ("AWS_REGION", "GOOGLE_CLOUD_QUOTA_PROJECT", "AZURE_CLIENT_ID"):
        monkeypatch.setenv(name, "other-1")
    assert make(uri, None) is not client


def test_a_public_bucket_needs_no_credentials(s3_store, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_store.server.url)
    s3_store.server.reset()
    s3_store.sdk.put_object(
        Bucket=servers.BUCKET, Key="public.ckpt", Body=as_bytes({"a": 1}), ACL="public-read"
    )
    assert load(f"s3://{servers.BUCKET}/public.ckpt") == {"a": 1}
    assert not any(request.headers["Authorization"] for request in s3_store.server.log)
    s3_store.sdk.put_object(Bucket=servers.BUCKET, Key="private.ckpt", Body=as_bytes({"a": 1}))
    with pytest.raises(AccessDeniedError, match="AWS_ACCESS_KEY_ID"):
        load(f"s3://{servers.BUCKET}/private.ckpt")


def test_a_profile_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDeniedError, match=r"nobody.*set AWS_PROFILE"):
        load("s3://bucket/a.ckpt")


def test_credentials_that_come_after_a_denial_are_found(s3, tmp_path: Path, monkeypatch) -> None:
    s3.write("late.ckpt", as_bytes({"a": 1}))
    s3.server.fault = servers.deny_unsigned
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in keys:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(AccessDeniedError):
        load(s3.uri("late.ckpt"))
    # as by `aws configure`: the environment, by which clients are remembered, stays as it is
    lines = [f"{name.lower()} = {value}" for name, value in keys.items()]
    (tmp_path / "credentials").write_text("\n".join(["[default]", *lines]))
    assert load(s3.uri("late.ckpt")) == {"a": 1}


def test_a_version_of_an_object_in_s3(s3) -> None:
    s3.sdk.create_bucket(Bucket="versioned")
    s3.sdk.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    put = s3.sdk.put_object
    first = put(Bucket="versioned", Key="a.ckpt", Body=as_bytes({"a": 1}))["VersionId"]
    put(Bucket="versioned", Key="a.ckpt", Body=as_bytes({"a": 2}))
    assert load("s3://versioned/a.ckpt") == {"a": 2}
    assert load(f"s3://versioned/a.ckpt?versionId={first}") == {"a": 1}
    with contextlib.closing(open_stream(f"s3://versioned/a.ckpt?versionId={first}")) as stream:
        assert stream.read() == as_bytes({"a": 1})
    uri = parse_uri(f"s3://versioned/a.ckpt?versionId={first}")
    assert _anemoi_ckpt.places.read_version(uri).size == len(as_bytes({"a": 1}))


def test_a_generation_of_an_object_in_gcs(gcs) -> None:
    gcs.write("a.ckpt", as_bytes({"a": 1}))
    uri = parse_uri(gcs.uri("a.ckpt"))
    generation = read_range(uri, 0, Buffers(bytearray(1))).tag
    assert load(f"{uri}#{generation}") == {"a": 1}
    with pytest.raises(CheckpointNotFoundError):
        load(f"{uri}#{int(generation) + 1}")


def test_gcs_without_credentials_is_anonymous(monkeypatch) -> None:
    needs.package("google.cloud.storage", "pip install google-cloud-storage")
    client = _anemoi_ckpt.places.gcs.client_of(parse_uri("gs://bucket/a"), None)
    assert client._credentials.token is None


KEY = "c2VjcmV0"


@pytest.mark.parametrize(
    ("text", "environment", "url", "credential"),
    [
        (
            "az://c/b",
            {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY},
            "https://acc.blob.core.windows.net/",
            "SharedKeyCredentialPolicy",
        ),
        (
            "az://c/b",
            {"AZURE_STORAGE_ACCOUNT_NAME": "acc", "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=s"},
            "https://acc.blob.core.windows.net/?sv=1&sig=s",
            None,
        ),
        (
            "abfss://c@acc.dfs.core.windows.net/b",
            {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acc;AccountKey={KEY}"},
            "https://acc.blob.core.windows.net/",
            "SharedKeyCredentialPolicy",
        ),
        (  # another account's credentials are not shown to this one
            "abfss://c@other.dfs.core.windows.net/b",
            {
                "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acc;AccountKey={KEY}",
                "AZURE_STORAGE_ACCOUNT": "acc",
                "AZURE_STORAGE_KEY": KEY,
            },
            "https://other.blob.core.windows.net/",
            None,
        ),
        (  # a host that only looks like the account's gets nothing
            "abfss://c@acc.evil.example/b",
            {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY},
            "https://acc.evil.example/",
            None,
        ),
        (
            "https://acc.dfs.core.windows.net/c/b",
            {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY},
            "https://acc.blob.core.windows.net/",
            "SharedKeyCredentialPolicy",
        ),
        (
            "https://acc.blob.core.windows.net/c/b?sv=1&sig=s",
            {},
            "https://acc.blob.core.windows.net/?sv=1&sig=s",
            None,
        ),
    ],
)
def test_credentials_of_azure(text, environment, url, credential, monkeypatch) -> None:
    needs.package("azure.storage.blob", "pip install azure-storage-blob")
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = _anemoi_ckpt.places.azure.client_of(parse_uri(text), None)
    assert client.url == url
    assert (type(client.credential).__name__ if client.credential else None) == credential


def test_azure_identity_where_it_is_installed(
    monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    exceptions = needs.package("azure.core.exceptions", "pip install azure-storage-blob")
    logins = ["a token"]

    class Identity(ModuleType):
        class DefaultAzureCredential:
            """As Azure's: where nobody is logged in, it raises."""

            def get_token(self, scope: str) -> str:
                assert scope == "https://storage.azure.com/.default"
                if logins:
                    return logins[0]
                raise exceptions.ClientAuthenticationError("nobody is logged in; sig=hunter2")

    monkeypatch.setitem(sys.modules, "azure.identity", Identity("azure.identity"))
    credential = _anemoi_ckpt.places.azure.default_credential()
    assert isinstance(credential, Identity.DefaultAzureCredential)
    uri = parse_uri("abfss://c@acc.dfs.core.windows.net/a.ckpt")
    forget_clients(uri)
    assert isinstance(
        _anemoi_ckpt.places.azure.client_of(uri, None).credential, Identity.DefaultAzureCredential
    )
    logins.clear()
    forget_clients(uri)
    with caplog.at_level(logging.INFO, "anemoi_ckpt"):
        assert _anemoi_ckpt.places.azure.client_of(uri, None).credential is None
    assert "finds none: nobody is logged in; sig=***" in caplog.text
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    assert _anemoi_ckpt.places.azure.default_credential() is None


def test_the_blobs_of_an_account_share_a_client(monkeypatch) -> None:
    needs.package("azure.storage.blob", "pip install azure-storage-blob")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acc")
    client_of = _anemoi_ckpt.places.azure.client_of
    one = client_of(parse_uri("az://c/a.ckpt"), None)
    assert client_of(parse_uri("az://d/b.ckpt?versionid=3"), None) is one
    signed = client_of(parse_uri("az://c/a.ckpt?sig=1"), None)
    assert client_of(parse_uri("az://c/b.ckpt?sig=1"), None) is signed
    assert len({one, signed, client_of(parse_uri("az://c/a.ckpt?sig=2"), None)}) == 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CONNECTION_STRING", "hunter2", "AZURE_STORAGE_CONNECTION_STRING is no connection string"),
        ("CONNECTION_STRING", "AccountName=a;AccountKey=hunter2!;BlobEndpoint=x", "no base64"),
        ("KEY", "hunter2!", "the account's key is no base64"),
    ],
)
def test_keys_of_azure_that_are_none_are_told_at_once(
    name: str, value: str, said: str, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs.package("azure.storage.blob", "pip install azure-storage-blob")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "a")
    monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    with caplog.at_level(logging.INFO), pytest.raises(AccessDeniedError, match=said) as caught:
        load("az://c/a.ckpt")
    told = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in caplog.text + told
    assert "attempt" not in caplog.text


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "ResourceNotFound", "or it may not be read without a login"),
        (409, "PublicAccessNotPermitted", "access is denied"),
    ],
)
def test_what_azure_says_without_a_login(
    azure: servers.Store, status: int, code: str, said: str
) -> None:
    assert azure.server is not None
    azure.write("a.ckpt", b"")
    azure.server.fault = lambda request: servers.Fault(
        status=status, headers={"x-ms-error-code": code}
    )
    with pytest.raises(AccessDeniedError, match=said):
        load(azure.uri("a.ckpt"))


def test_azure_without_an_account(monkeypatch) -> None:
    needs.package("azure.storage.blob", "pip install azure-storage-blob")
    with pytest.raises(AccessDeniedError, match=r"no storage account.*CONNECTION_STRING"):
        load("az://container/a.ckpt")


# ── packages ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "module", "remedy"),
    [
        ("s3://b/k", "boto3", r"pip install 'anemoi-ckpt\[s3\]'"),
        ("gs://b/k", "google.cloud.storage", r"pip install 'anemoi-ckpt\[gcs\]'"),
        ("az://c/b", "azure.storage.blob", r"pip install 'anemoi-ckpt\[azure\]'"),
        ("https://h/a", "requests", r"pip install 'anemoi-ckpt\[http\]'"),
    ],
)
def test_a_missing_package_says_what_to_install(text, module, remedy, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for read in (load, open_stream):
        with pytest.raises(MissingPackageError, match=remedy) as caught:
            read(text)
        assert isinstance(caught.value, ImportError)


def test_an_answer_of_gcs_without_a_body_is_asked_for_again(
    mocker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_anemoi_ckpt.transport, "BACKOFF_SECONDS", 0)
    blob = mocker.Mock(spec=["reload"])  # has no properties
    client = mocker.Mock()
    client.bucket.return_value.blob.return_value = blob
    with pytest.raises(UnreachableError, match=r"the answer has no body"):
        load("gs://bucket/a.ckpt", transport_params={"client": client}, timeout=9, retries=2)
    assert blob.reload.call_count == 3


def test_a_mistyped_name_among_very_many_is_found() -> None:
    names = [f"epoch={n:06d}.ckpt" for n in range(50_000)]
    assert similar("epoch=012345,ckpt", names)[0] == "epoch=012345.ckpt"
    assert similar("epochs=012345.ckpt", names)[0] == "epoch=012345.ckpt"
    assert similar("epoch=049999", names)[0] == "epoch=049999.ckpt"
    assert similar("weights", names) == []
    assert similar("last.ckpt", ["lasst.ckpt", "other"]) == ["lasst.ckpt"]
