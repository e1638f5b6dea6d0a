"""The servers of the tests do what they say: ours by RFC 9110, the emulators by their SDKs."""

import gzip
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

import servers
from conftest import Place
from servers import Fault, HTTPServer

DATA = bytes(range(256)) * 40


@pytest.fixture
def url(http_server: HTTPServer) -> str:
    """Where `DATA` is."""
    return http_server.put("run 1/last.ckpt", DATA)


@pytest.fixture
def client() -> Iterator[requests.Session]:
    """Takes what comes: no retries, no decompression asked for."""
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        yield session


# ------------------------------------------------------------------------------ our own HTTP server


def test_get_gives_everything(url: str, client: requests.Session) -> None:
    reply = client.get(url)
    assert (reply.status_code, reply.content) == (200, DATA)
    assert reply.headers["Accept-Ranges"] == "bytes"
    assert reply.headers["Last-Modified"].endswith("GMT")
    assert client.head(url).headers["Content-Length"] == str(len(DATA))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-19", slice(10, 20)),
        ("bytes=10000-", slice(10000, None)),
        ("bytes=10000-99999", slice(10000, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-99999", slice(0, None)),
    ],
)
def test_range(url: str, client: requests.Session, asked: str, expected: slice) -> None:
    reply = client.get(url, headers={"Range": asked})
    start, stop, _ = expected.indices(len(DATA))
    assert (reply.status_code, reply.content) == (206, DATA[expected])
    assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_range_that_cannot_be_satisfied(url: str, client: requests.Session, asked: str) -> None:
    reply = client.get(url, headers={"Range": asked})
    assert (reply.status_code, reply.content) == (416, b"")
    assert reply.headers["Content-Range"] == f"bytes */{len(DATA)}"


@pytest.mark.parametrize(
    "asked", ["lines=0-1", "bytes=9-1", "bytes=-", "bytes=x-", "bytes=0-1,5-6"]
)
def test_range_that_is_ignored(url: str, client: requests.Session, asked: str) -> None:
    assert client.get(url, headers={"Range": asked}).status_code == 200


def test_conditions(url: str, client: requests.Session, http_server: HTTPServer) -> None:
    etag = client.get(url).headers["ETag"]

    def status(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.get(url, headers={"Range": "bytes=0-9", **named}).status_code

    assert status(If_Match=etag) == status(If_Match=f'"x", {etag}') == status(If_Match="*") == 206
    assert status(If_Range=etag) == 206
    assert status(If_None_Match=etag) == 304
    http_server.put("run 1/last.ckpt", DATA)  # the same bytes, but put anew
    assert status(If_Match=etag) == 412
    assert status(If_Range=etag) == 200
    assert status(If_Match=f"W/{client.get(url).headers['ETag']}") == 412


def test_log_keeps_requests_and_counts_bytes(
    url: str, client: requests.Session, http_server: HTTPServer
) -> None:
    client.get(f"{url}?X-Amz-Signature=abc&a=%20", headers={"Range": "bytes=0-99"})
    client.get(url)
    first, second = http_server.log
    assert (first.method, first.path) == ("GET", "/run%201/last.ckpt")
    assert (first.query, first.range) == ("X-Amz-Signature=abc&a=%20", "bytes=0-99")
    assert (first.status, first.bytes_sent, second.bytes_sent) == (206, 100, len(DATA))
    assert http_server.bytes_sent == 100 + len(DATA)
    http_server.reset()
    assert (http_server.log, http_server.bytes_sent) == ([], 0)


def test_connections_are_kept(http_server: HTTPServer, url: str, client: requests.Session) -> None:
    for _ in range(3):
        client.get(url)
    assert http_server.connections == 1


def test_missing_and_denied(url: str, client: requests.Session, http_server: HTTPServer) -> None:
    assert client.get(f"{url}-missing").status_code == 404
    assert client.put(url, b"x").status_code == 405
    http_server.deny("run 1/last.ckpt")
    assert client.get(url).status_code == 403
    http_server.reset()
    http_server.head_status = 403
    assert (client.head(url).status_code, client.get(url).status_code) == (403, 200)


# --------------------------------------------------------------------------------------- its faults


def test_faults_by_queue_then_by_function(
    url: str, client: requests.Session, http_server: HTTPServer
) -> None:
    http_server.faults += [Fault(status=503), None, servers.throttled(retry_after=7)]
    replies = [client.get(url) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [503, 200, 429, 200]
    assert replies[2].headers["Retry-After"] == "7"
    http_server.fault = lambda request: Fault(status=408) if request.range else None
    assert client.get(url, headers={"Range": "bytes=0-1"}).status_code == 408
    assert client.get(url).status_code == 200


@pytest.mark.parametrize("fault", [Fault(reset=True), Fault(reset=True, cut=0)])
def test_reset_connection(
    url: str, client: requests.Session, http_server: HTTPServer, fault: Fault
) -> None:
    http_server.faults.append(fault)
    with pytest.raises(requests.RequestException, match="reset"):
        client.get(url)
    assert client.get(url).content == DATA


@pytest.mark.parametrize("reset", [False, True])
def test_body_that_ends_early(url: str, http_server: HTTPServer, reset: bool) -> None:
    http_server.faults.append(Fault(cut=100, reset=reset))
    with socket.create_connection(("127.0.0.1", http_server.port)) as connection:
        connection.sendall(f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = b""
        try:
            while chunk := connection.recv(4096):
                received += chunk
        except ConnectionResetError:
            assert reset
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(DATA)}".encode() in head
    assert body == DATA[:100] or reset  # what a reset overtakes is lost
    assert http_server.bytes_sent == 100


def test_slow_answers(url: str, client: requests.Session, http_server: HTTPServer) -> None:
    http_server.faults += [
        Fault(delay=0.2),
        Fault(stall=0.2, stall_after=100),
        Fault(rate=len(DATA) / 0.2),
    ]
    for _ in range(3):
        started = time.monotonic()
        assert client.get(url).content == DATA
        assert time.monotonic() - started > 0.18


@pytest.mark.parametrize("fault", [Fault(delay=3600), Fault(stall=3600), Fault(rate=0.1)])
def test_a_silence_ends_with_its_test(url: str, http_server: HTTPServer, fault: Fault) -> None:
    http_server.faults.append(fault)
    with socket.create_connection(("127.0.0.1", http_server.port)) as connection:
        connection.sendall(f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while not http_server.log:
            time.sleep(0.01)
        http_server.reset()
        while connection.recv(4096):
            pass
    assert http_server.bytes_sent == 0


def test_wrong_answers(url: str, client: requests.Session, http_server: HTTPServer) -> None:
    asked = {"Range": "bytes=256-511"}

    def get(fault: Fault, **headers: str) -> requests.Response:
        http_server.faults.append(fault)
        return client.get(url, headers=asked | headers, stream=True)

    flipped = get(Fault(flip=8 * 3 + 1)).content
    assert [a ^ b for a, b in zip(flipped, DATA, strict=False)][:5] == [0, 0, 0, 2, 0]
    assert get(Fault(ignore_range=True)).content == DATA
    page = get(servers.html_page())
    assert (page.status_code, page.headers["Content-Type"][:9]) == (200, "text/html")
    zipped = get(Fault(gzip=True))
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.raw.read(decode_content=False)) == DATA
    sized = get(Fault(headers={"Content-Length": None}))
    assert "Content-Length" not in sized.headers
    assert sized.content == DATA[256:512]


def test_etag_faults(url: str, client: requests.Session, http_server: HTTPServer) -> None:
    strong = client.get(url).headers["ETag"]
    http_server.fault = lambda request: Fault(weak_etag=True)
    assert client.get(url).headers["ETag"] == f"W/{strong}"
    assert client.get(url, headers={"If-Match": f"W/{strong}"}).status_code == 412
    http_server.fault = lambda request: Fault(no_etag=True)
    assert "ETag" not in client.get(url).headers
    http_server.fault = lambda request: Fault(ignore_conditions=True)
    assert client.get(url, headers={"If-Match": '"other"'}).status_code == 200


def test_object_replaced_between_requests(
    url: str, client: requests.Session, http_server: HTTPServer
) -> None:
    etag = client.get(url).headers["ETag"]
    http_server.faults.append(Fault(before=lambda: http_server.put("run 1/last.ckpt", b"new")))
    assert client.get(url, headers={"If-Match": etag}).status_code == 412
    assert client.get(url).content == b"new"


def test_redirect_and_basic_auth(
    url: str, client: requests.Session, http_server: HTTPServer
) -> None:
    http_server.faults.append(servers.redirect(url, status=307))
    assert client.get(f"{http_server.url}/elsewhere").content == DATA
    http_server.fault = lambda request: Fault(auth="user:pass word")
    refused = client.get(url)
    assert (refused.status_code, refused.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    assert client.get(url, auth=("user", "pass word")).content == DATA


def test_stop_refuses_connections_and_start_listens_again(
    url: str, client: requests.Session, http_server: HTTPServer
) -> None:
    client.get(url)
    http_server.stop()
    with pytest.raises(requests.ConnectionError):
        client.get(url)
    http_server.start()
    assert client.get(url).content == DATA


# ---------------------------------------------------------------------- every place, by its own SDK


def _read_http(uri: str, start: int, stop: int) -> bytes:
    reply = requests.get(uri, headers={"Range": f"bytes={start}-{stop - 1}"}, timeout=60)
    reply.raise_for_status()
    return reply.content


def _read_s3(uri: str, start: int, stop: int) -> bytes:
    import boto3
    from botocore.config import Config

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    config = Config(retries={"max_attempts": 0})
    client = boto3.client("s3", config=config)
    reply = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    data: bytes = reply["Body"].read()
    return data


def _read_gcs(uri: str, start: int, stop: int) -> bytes:
    from google.cloud import storage

    bucket, _, name = uri.removeprefix("gs://").partition("/")
    blob = storage.Client().bucket(bucket).blob(name)
    data: bytes = blob.download_as_bytes(start=start, end=stop - 1, raw_download=True, retry=None)
    assert blob.generation
    return data


def _azure_blob(uri: str) -> Any:
    from azure.storage.blob import BlobServiceClient

    container, _, name = uri.removeprefix("az://").partition("/")
    service = BlobServiceClient.from_connection_string(
        os.environ["AZURE_STORAGE_CONNECTION_STRING"], retry_total=0
    )
    return service.get_blob_client(container, name)


def _read_azure(uri: str, start: int, stop: int) -> bytes:
    data: bytes = _azure_blob(uri).download_blob(offset=start, length=stop - start).readall()
    return data


def _read_local(uri: str, start: int, stop: int) -> bytes:
    with Path(uri).open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


READERS: dict[str, Callable[[str, int, int], bytes]] = {
    "local": _read_local,
    "http": _read_http,
    "s3": _read_s3,
    "gcs": _read_gcs,
    "azure": _read_azure,
}


def test_place_is_read_in_ranges(place: Place) -> None:
    uri = place.put("last.ckpt", DATA)
    read = READERS[place.kind]
    assert read(uri, 256, 300) == DATA[256:300]
    if place.server is not None:
        assert place.server.bytes_sent == 44
        assert place.server.log[-1].range == "bytes=256-299"
    place.replace(uri, b"other bytes")
    assert read(uri, 0, 5) == b"other"


def test_place_fails_as_it_should(place: Place) -> None:
    read = READERS[place.kind]
    with pytest.raises(Exception, match=r"404|NoSuchKey|No such file|BlobNotFound"):
        read(place.missing(), 0, 5)
    if (denied := place.denied()) is not None:
        with pytest.raises(Exception, match=r"403|AccessDenied|AuthorizationFailure|Permission"):
            read(denied, 0, 5)
    if (unreachable := place.unreachable()) is not None:
        with pytest.raises(Exception, match=r"refused|Could not connect"):
            read(unreachable, 0, 5)


@pytest.mark.parametrize("place", ["http", "s3", "gcs", "azure"], indirect=True)
def test_place_takes_faults(place: Place) -> None:
    uri, read = place.put("last.ckpt", DATA), READERS[place.kind]
    assert place.server is not None
    place.server.fault = lambda request: Fault(flip=0)
    assert read(uri, 256, 300) == b"\1" + DATA[257:300]
    for status, words in [
        (503, "503|SlowDown|ServerBusy"),
        (403, "403|AccessDenied|Authorization"),
    ]:
        place.server.fault = lambda request, status=status: Fault(status=status)
        with pytest.raises(Exception, match=words):
            read(uri, 0, 5)
    place.server.fault = lambda request: Fault(reset=True)
    with pytest.raises(Exception, match=r"(?i)reset|connection"):
        read(uri, 0, 5)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_s3_pins_denies_and_opens(place: Place) -> None:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import ClientError

    _, _, bucket, key = place.put("last.ckpt", DATA).split("/", 3)
    client = boto3.client("s3")
    etag = client.get_object(Bucket=bucket, Key=key, Range="bytes=-7")["ETag"]
    assert client.get_object(Bucket=bucket, Key=key, IfMatch=etag)["ETag"] == etag
    with pytest.raises(ClientError, match="InvalidRange"):
        client.get_object(Bucket=bucket, Key=key, Range="bytes=99999-")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.get_object(Bucket=bucket, Key=key, IfMatch='"other"')
    anonymous = boto3.client("s3", config=Config(signature_version=UNSIGNED))
    with pytest.raises(ClientError, match="403"):
        anonymous.get_object(Bucket=bucket, Key=key)
    place.store.sdk.put_object(Bucket=bucket, Key=key, Body=DATA, ACL="public-read")
    assert anonymous.get_object(Bucket=bucket, Key=key)["Body"].read() == DATA


@pytest.mark.parametrize("place", ["gcs"], indirect=True)
def test_gcs_pins_generations(place: Place) -> None:
    from google.api_core import exceptions
    from google.cloud import storage

    uri = place.put("last.ckpt", DATA)
    bucket = storage.Client().bucket(servers.BUCKET)
    name = uri.removeprefix(f"gs://{servers.BUCKET}/")
    blob = bucket.blob(name)
    assert blob.download_as_bytes(start=-7, raw_download=True) == DATA[-7:]
    first = int(blob.generation)
    assert blob.download_as_bytes(if_generation_match=first) == DATA  # and its crc32c is checked
    with pytest.raises(exceptions.RequestRangeNotSatisfiable):
        blob.download_as_bytes(start=99999, end=100000)
    place.replace(uri, b"other bytes")
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob(name).download_as_bytes(if_generation_match=first)
    with pytest.raises(exceptions.NotFound):
        bucket.blob(name, generation=first).download_as_bytes()
    with pytest.raises(exceptions.NotFound):
        blob.reload()  # it has seen the first generation, and asks for that


@pytest.mark.parametrize("place", ["azure"], indirect=True)
def test_azure_pins_etags(place: Place) -> None:
    from azure.core import MatchConditions
    from azure.core.exceptions import HttpResponseError, ResourceModifiedError

    uri = place.put("last.ckpt", DATA)
    pinned: Any = {"match_condition": MatchConditions.IfNotModified}
    pinned["etag"] = _azure_blob(uri).download_blob(offset=0, length=9).properties.etag
    assert _azure_blob(uri).download_blob(offset=9, length=9, **pinned).readall() == DATA[9:18]
    with pytest.raises(HttpResponseError) as unsatisfiable:
        _azure_blob(uri).download_blob(offset=99999, length=9)
    assert unsatisfiable.value.status_code == 416
    place.replace(uri, DATA)
    with pytest.raises(ResourceModifiedError):
        _azure_blob(uri).download_blob(offset=9, length=9, **pinned)


def test_a_port_where_nothing_listens_is_nobody_elses(http_server: HTTPServer) -> None:
    http_server.stop()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", http_server.port))
    with pytest.raises(ConnectionRefusedError), socket.socket() as client:
        client.connect(("127.0.0.1", http_server.port))
    http_server.start()
    with socket.socket() as client:
        client.connect(("127.0.0.1", http_server.port))
