"""Real servers for the tests: our own HTTP server, and emulators behind a proxy that can fail.

Every server listens on a free loopback port, keeps a log of the requests it got and the bytes it
sent, and does what a `Fault` says: from a queue (`server.faults`), one a request, or from a
function of the request (`server.fault`).  The emulators of S3 (moto), GCS (gcp-storage-emulator)
and Azure Blob (Azurite) are real servers too; readers reach them through a `FaultProxy`, so
that every store can be given every fault, while the tests write to them behind the proxy's back:
the log holds the reader's requests only.

    with http_store() as store:
        store.write("last.ckpt", b"...")
        store.server.faults.append(Fault(status=503, headers={"Retry-After": "0"}))
        anemoi_ckpt.load(store.uri("last.ckpt"))
        assert [request.status for request in store.server.log] == [503, 206, 206]
"""

import base64
import contextlib
import gzip
import hashlib
import http.client
import http.server
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.message import Message
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attrs
import filelock

HOST_ENVIRONMENT = dict(os.environ)
"""The tester's own environment, kept before the tests change theirs: npm needs its HOME and
registry, and tests against real clouds need their credentials."""

BUCKET = "checkpoints"
"""The bucket or container that every emulator starts with."""

_CHUNK_BYTES = 64 * 1024
_START_SECONDS = 240  # Node takes two seconds to start Azurite, a busy machine many times that
_NPM_SECONDS = 280  # 190 MB of node_modules, once a checkout; below the limit of a test
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
_HTML_PAGE = b"<!doctype html><html><head><title>Sign in</title></head><body>Sign in</body></html>"


class UnavailableError(Exception):
    """A server cannot be started here; the message says what to install."""


# ------------------------------------------------------------------ what is asked, what is answered


@attrs.define
class Request:
    """One request as a server got it, and what became of it."""

    method: str
    path: str
    """As sent: percent-encoded, without the query."""
    query: str
    headers: http.client.HTTPMessage
    body: bytes = attrs.field(default=b"", repr=lambda body: str(len(body)))
    status: int | None = None
    """None while nothing was answered, and for ever where the connection was reset first."""
    bytes_sent: int = 0
    """Bytes of the answer's body."""

    @property
    def range(self) -> str | None:
        """The range asked for, as sent (`bytes=0-99`); Azure's SDK sends it as `x-ms-range`."""
        return self.headers["x-ms-range"] or self.headers["Range"]

    @property
    def target(self) -> str:
        """Path and query, as they stood in the request line."""
        return f"{self.path}?{self.query}" if self.query else self.path


@attrs.frozen(kw_only=True)
class Fault:
    """What goes wrong with one answer.  Fields combine: `Fault(reset=True, cut=100)`."""

    delay: float = 0
    """Seconds before anything is answered."""
    before: Callable[[], object] | None = None
    """Called before the request is looked at: to replace the object between two requests, say."""
    reset: bool = False
    """The connection is reset (TCP RST): before the headers, or where `cut` says."""
    cut: int | None = None
    """The connection ends after so many bytes of the body; 0 is right after the headers."""
    stall: float = 0
    """Seconds of silence in the body, after `stall_after` bytes of it."""
    stall_after: int = 0
    rate: float | None = None
    """Bytes per second a connection."""
    flip: int | None = None
    """This bit of the body (modulo its length) is wrong."""
    status: int | None = None
    """This status with the store's own words for it, instead of the object."""
    body: bytes | None = None
    """This body, instead of the store's own."""
    headers: Mapping[str, str | None] = attrs.field(factory=dict)
    """Headers to add or replace; None takes one out."""
    auth: str | None = None
    """`user:password`; 401 where the request does not bring them (HTTP basic)."""
    ignore_range: bool = False
    """200 with everything, whatever range was asked for."""
    ignore_conditions: bool = False
    """If-Match and its like are not looked at."""
    weak_etag: bool = False
    no_etag: bool = False
    gzip: bool = False
    """200 with everything, compressed, though nobody asked for that (`Content-Encoding: gzip`)."""


def redirect(location: str, status: int = 302) -> Fault:
    """The object is said to be at another path or another host and port."""
    return Fault(status=status, body=b"", headers={"Location": location})


def html_page() -> Fault:
    """200 and a page for people, as portals and expired sessions answer."""
    return Fault(status=200, body=_HTML_PAGE, headers={"Content-Type": "text/html; charset=utf-8"})


def throttled(status: int = 429, retry_after: float | str = 0) -> Fault:
    """Too many requests; `retry_after` in seconds or as an HTTP date."""
    return Fault(status=status, headers={"Retry-After": str(retry_after)})


def deny_unsigned(request: Request) -> Fault | None:
    """403 for every request without credentials: `server.fault = deny_unsigned`."""
    signed = request.headers["Authorization"] or re.search("Signature=|sig=", request.query)
    return None if signed else Fault(status=403)


@attrs.define
class Reply:
    """An answer before its fault."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes | memoryview = b""


def _headers(items: Mapping[str, str]) -> http.client.HTTPMessage:
    message = http.client.HTTPMessage()
    for name, value in items.items():
        message[name] = value
    return message


def _without(headers: Message, *names: str) -> http.client.HTTPMessage:
    dropped = {name.lower() for name in names}
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        if name.lower() not in dropped:
            message[name] = value
    return message


def byte_range(text: str | None, size: int) -> range | None:
    """The offsets that a `Range` header selects of `size` bytes (RFC 9110, 14.1.2 and 14.2).

    None where the header is to be ignored: absent, another unit, malformed, or several ranges
    (a server may answer those with everything).  An empty range cannot be satisfied: 416.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (text or "").replace(" ", ""))
    if not match or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1) if last else size)


def _matches(condition: str, etag: str | None) -> bool:
    """Strong comparison with a list of ETags (RFC 9110, 8.8.3.2): a weak one equals nothing."""
    if etag is None or etag.startswith("W/"):
        return condition.strip() == "*"
    return condition.strip() == "*" or etag in [one.strip() for one in condition.split(",")]


def representation(
    asked: http.client.HTTPMessage, data: bytes, etag: str | None, modified: str
) -> Reply:
    """Answers a GET or HEAD for `data`, in the order of RFC 9110, 13.2.2: If-Match, then
    If-None-Match, then Range under If-Range."""
    headers = _headers({"Accept-Ranges": "bytes", "Last-Modified": modified})
    if etag is not None:
        headers["ETag"] = etag
    if (condition := asked["If-Match"]) is not None and not _matches(condition, etag):
        return Reply(412, headers)
    if (condition := asked["If-None-Match"]) is not None and _matches(condition, etag):
        return Reply(304, headers)
    headers["Content-Type"] = "application/octet-stream"
    selected = byte_range(asked["Range"], len(data))
    unchanged = asked["If-Range"] in (None, modified) or _matches(asked["If-Range"], etag)
    if selected is None or not unchanged:
        return Reply(200, headers, data)
    if not selected:
        headers["Content-Range"] = f"bytes */{len(data)}"
        return Reply(416, headers)
    headers["Content-Range"] = f"bytes {selected.start}-{selected.stop - 1}/{len(data)}"
    return Reply(206, headers, memoryview(data)[selected.start : selected.stop])


# Which words each store finds for a status. The SDKs decide by them what to raise and retry.
_S3_CODES = {
    400: "BadRequest",
    401: "InvalidToken",
    403: "AccessDenied",
    404: "NoSuchKey",
    408: "RequestTimeout",
    412: "PreconditionFailed",
    416: "InvalidRange",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}
_AZURE_CODES = {
    400: "InvalidInput",
    401: "NoAuthenticationInformation",
    403: "AuthorizationFailure",
    404: "BlobNotFound",
    408: "OperationTimedOut",
    412: "ConditionNotMet",
    416: "InvalidRange",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServerBusy",
}


def error_reply(kind: str, status: int) -> Reply:
    """An error as the store of this kind words it."""
    phrase = http.client.responses.get(status, "Error")
    if kind == "s3":
        code = _S3_CODES.get(status, phrase.replace(" ", ""))
        text = f"<Error><Code>{code}</Code><Message>{phrase}</Message></Error>"
        headers = {"Content-Type": "application/xml"}
    elif kind == "azure":
        code = _AZURE_CODES.get(status, phrase.replace(" ", ""))
        text = f"<Error><Code>{code}</Code><Message>{phrase}</Message></Error>"
        headers = {"Content-Type": "application/xml", "x-ms-error-code": code}
    elif kind == "gcs":
        text = json.dumps({"error": {"code": status, "message": phrase}})
        headers = {"Content-Type": "application/json"}
    else:
        text = f"{status} {phrase}\n"
        headers = {"Content-Type": "text/plain"}
    return Reply(status, _headers(headers), text.encode())


# -------------------------------------------------------------------------------------- the servers


class _Listener(http.server.ThreadingHTTPServer):
    """One listening socket, a thread a connection, and all connections closed with it."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, owner: "Server", port: int) -> None:
        self.owner = owner
        self.open_connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_connections.add(request)
        self.owner.connections += 1  # only ever here, in the one thread that accepts
        # Named, so that a test that counts what a load leaves behind can tell ours from its own.
        threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name=f"test-server-{self.server_port}",
            daemon=True,
        ).start()

    def shutdown_request(self, request: Any) -> None:
        self.open_connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is what these servers are for; all else is a bug of theirs.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.open_connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads a request, asks the server for its answer and sends that, as its fault allows."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def serve(self) -> None:
        owner = self.server.owner
        self._reset_by_test = owner.reset_by_test
        path, _, query = self.path.partition("?")
        headers = _without(self.headers)
        request = Request(self.command, path, query, headers, self._read_body())
        fault = owner.admit(request)
        owner.count(1)
        try:
            reply = self._awaited(request, fault)
        finally:
            owner.count(-1)
        if reply is None:
            return
        request.status = reply.status
        try:
            self._send(request, reply, fault)
        except OSError:  # the client went away
            self.close_connection = True

    def _awaited(self, request: Request, fault: Fault) -> Reply | None:
        """The answer, after its delay; None where there is none."""
        owner = self.server.owner
        if self._reset_by_test.wait(fault.delay):
            self.close_connection = True
            return None
        if fault.before is not None:
            fault.before()
        if fault.reset and fault.cut is None:
            self._reset()
            return None
        return owner.reply(request, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = serve  # noqa: N815 - http.server's names

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return b"".join(chunks)
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _send(self, request: Request, reply: Reply, fault: Fault) -> None:
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers and reply.status not in (204, 304):
            self.send_header("Connection", "close")  # and that is where the body ends
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD" and reply.status not in (204, 304):
            self._send_body(request, memoryview(reply.body), fault)

    def _send_body(self, request: Request, body: memoryview, fault: Fault) -> None:
        stop = len(body) if fault.cut is None else min(fault.cut, len(body))
        stall_after = min(fault.stall_after, stop) if fault.stall else stop
        chunk = _CHUNK_BYTES if fault.rate is None else max(1, int(fault.rate / 20))
        started = time.monotonic()
        offset = 0
        while True:
            if fault.stall and offset == stall_after:
                self._pause(fault.stall)
                stall_after = stop + 1
            if offset == stop:
                break
            end = min(offset + chunk, stop, stall_after if stall_after > offset else stop)
            if fault.rate is not None:
                self._pause(max(0, started + end / fault.rate - time.monotonic()))
            self.server.owner.send(request, self.connection, body[offset:end])
            offset = end
        if stop < len(body):
            self.close_connection = True
            if fault.reset:
                self._reset()

    def _pause(self, seconds: float) -> None:
        if self._reset_by_test.wait(seconds):
            raise ConnectionAbortedError

    def _reset(self) -> None:
        # A zero linger time makes close() send RST, once nothing else holds the socket open.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as http.server has it
        """Says nothing: `server.log` has it all."""


class Server:
    """What all our servers share: a port, a log and faults.  `answer` makes the difference."""

    kind = "http"

    def __init__(self) -> None:
        self.port = 0
        self.log: list[Request] = []
        self.connections = 0
        """Connections taken since the last `reset`."""
        self.at_once, self.most_at_once = 0, 0
        """Requests that wait for the first byte of their answer, and the most of them."""
        self.faults: deque[Fault | None] = deque()
        """One a request, in turn; None is a request that goes well."""
        self.fault: Callable[[Request], Fault | None] | None = None
        """Asked before `faults`, which is used where this gives None."""
        self.reset_by_test = threading.Event()
        """Set by the next `reset` or `stop`: no delay and no stall outlives the test that wanted
        it."""
        self._denied: set[str] = set()
        self._lock = threading.Lock()
        self._listener: _Listener | None = None
        self._switching = threading.Lock()  # a timer may start it while a test resets it
        self._reserved: int | None = None
        """Keeps the port from others while nothing listens there."""

    def answer(self, request: Request, fault: Fault) -> Reply:
        """The answer of a server that works."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def bytes_sent(self) -> int:
        """Bytes of all bodies since the last `reset`."""
        with self._lock:
            return sum(request.bytes_sent for request in self.log)

    def start(self) -> None:
        """Listens, on the same port as the last time; does nothing where it listens already."""
        with self._switching:
            if self._listener is not None:
                return
            self._release_port()
            self._listener = _Listener(self, self.port)
            self.port = self._listener.server_port
            # The poll interval is how long stop() takes.
            threading.Thread(
                target=partial(self._listener.serve_forever, poll_interval=0.02),
                name=f"test-server-{self.port}",
                daemon=True,
            ).start()

    def stop(self) -> None:
        """Closes the port and every connection: from here on connections are refused."""
        self._end_pauses()
        with self._switching:
            if self._listener is None:
                return
            self._listener.close()
            self._listener = None
            with socket.socket() as reserving:
                reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserving.bind(("127.0.0.1", self.port))
                self._reserved = reserving.detach()

    def close(self) -> None:
        """Stops for good."""
        self.stop()
        self._release_port()

    def _release_port(self) -> None:
        if self._reserved is not None:
            os.close(self._reserved)
            self._reserved = None

    def _end_pauses(self) -> None:
        ended, self.reset_by_test = self.reset_by_test, threading.Event()
        ended.set()

    def reset(self) -> None:
        """Forgets log, faults and denials, ends what they keep waiting, and listens again."""
        self._end_pauses()
        with self._lock:
            self.connections = self.at_once = self.most_at_once = 0
            self.log.clear()
            self.faults.clear()
        self.fault = None
        self._denied.clear()
        self.start()

    def deny(self, name: str) -> None:
        """403 for every path that ends with this (decoded) name."""
        self._denied.add(name)

    def count(self, more: int) -> None:
        """Counts the requests that wait for an answer."""
        with self._lock:
            self.at_once += more
            self.most_at_once = max(self.most_at_once, self.at_once)

    def admit(self, request: Request) -> Fault:
        """Writes the request down and picks its fault."""
        with self._lock:
            self.log.append(request)
        if any(urllib.parse.unquote(request.path).endswith(name) for name in self._denied):
            return Fault(status=403)
        fault = self.fault(request) if self.fault is not None else None
        with self._lock:
            if fault is None and self.faults:
                fault = self.faults.popleft()
        return fault or Fault()

    def send(self, request: Request, connection: socket.socket, chunk: memoryview) -> None:
        """Sends and counts; counts first, so that a reader who has it all finds it counted."""
        with self._lock:
            request.bytes_sent += len(chunk)
        try:
            connection.sendall(chunk)
        except OSError:
            with self._lock:
                request.bytes_sent -= len(chunk)
            raise

    def reply(self, request: Request, fault: Fault) -> Reply:
        """The answer as the fault has it."""
        dropped: tuple[str, ...] = ()
        if fault.ignore_range or fault.gzip:
            dropped += ("Range", "x-ms-range", "If-Range")
        if fault.ignore_conditions:
            dropped += ("If-Match", "If-None-Match", "If-Range")
        credentials = base64.b64encode((fault.auth or "").encode()).decode()
        if fault.auth is not None and request.headers["Authorization"] != f"Basic {credentials}":
            reply = error_reply(self.kind, 401)
            reply.headers["WWW-Authenticate"] = 'Basic realm="checkpoints"'
        elif fault.status is not None:
            reply = error_reply(self.kind, fault.status)
        else:
            known = attrs.evolve(request, headers=_without(request.headers, *dropped))
            reply = self.answer(known, fault)
        return _spoiled(reply, fault, head=request.method == "HEAD")


def _spoiled(reply: Reply, fault: Fault, *, head: bool) -> Reply:
    """The faults that change headers or bytes."""
    headers, body = reply.headers, reply.body
    if fault.body is not None:
        body = fault.body
    if fault.gzip:
        body = gzip.compress(body)
        headers = _without(headers, "Accept-Ranges", "Content-Length")
        headers["Content-Encoding"] = "gzip"
    if fault.flip is not None and len(body):
        wrong = bytearray(body)
        wrong[fault.flip // 8 % len(wrong)] ^= 1 << fault.flip % 8
        body = bytes(wrong)
    etag = headers["ETag"]
    if etag and (fault.no_etag or fault.weak_etag):
        headers = _without(headers, "ETag")
        if fault.weak_etag:
            headers["ETag"] = _weak(etag)
    if reply.status not in (204, 304) and not (head and "Content-Length" in headers):
        headers = _without(headers, "Content-Length")
        headers["Content-Length"] = str(len(body))
    if "Date" not in headers:
        headers["Date"] = format_datetime(datetime.now(UTC), usegmt=True)
    for name, value in fault.headers.items():
        headers = _without(headers, name)
        if value is not None:
            headers[name] = value
    return Reply(reply.status, headers, body)


def _weak(etag: str) -> str:
    return etag if etag.startswith("W/") else f"W/{etag}"


@attrs.frozen
class StoredObject:
    """What an `HTTPServer` has under a name."""

    data: bytes
    etag: str
    modified: str


class HTTPServer(Server):
    """Serves the objects that `put` gives it: GET and HEAD, ranges and conditions (RFC 9110)."""

    _versions: ClassVar = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, StoredObject] = {}
        self.head_status: int | None = None
        """What HEAD is answered with, where not 200: a URL presigned for GET says 403."""

    def put(self, name: str, data: bytes) -> str:
        """Stores or replaces an object, with a new ETag in any case; gives its URL."""
        etag = f'"{next(self._versions):x}-{len(data):x}"'
        modified = format_datetime(datetime.now(UTC), usegmt=True)
        self.objects[name] = StoredObject(data, etag, modified)
        return f"{self.url}/{urllib.parse.quote(name)}"

    def reset(self) -> None:
        """Forgets log, faults and denials, but no objects."""
        super().reset()
        self.head_status = None

    def answer(self, request: Request, fault: Fault) -> Reply:
        if request.method not in ("GET", "HEAD"):
            reply = error_reply(self.kind, 405)
            reply.headers["Allow"] = "GET, HEAD"
            return reply
        if request.method == "HEAD" and self.head_status is not None:
            return error_reply(self.kind, self.head_status)
        stored = self.objects.get(urllib.parse.unquote(request.path).removeprefix("/"))
        if stored is None:
            return error_reply(self.kind, 404)
        etag = None if fault.no_etag else stored.etag
        if etag is not None and fault.weak_etag:
            etag = _weak(etag)
        return representation(request.headers, stored.data, etag, stored.modified)


class FaultProxy(Server):
    """Stands before an emulator: hands requests on, and spoils the answers as it is told."""

    def __init__(self, kind: str, host: str, port: int) -> None:
        super().__init__()
        self.kind = kind
        self.upstream = (host, port)

    def answer(self, request: Request, fault: Fault) -> Reply:
        del fault  # all that a fault does to a proxied answer is done outside
        return self.forward(request)

    def forward(self, request: Request) -> Reply:
        """Hands the request on as it is.  `Host` too: signatures and links depend on it."""
        upstream = http.client.HTTPConnection(*self.upstream, timeout=_START_SECONDS)
        dropped = _HOP_BY_HOP | {"expect", "content-length"}
        try:
            upstream.putrequest(
                request.method, request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                if name.lower() not in dropped:
                    upstream.putheader(name, value)
            if request.body or request.method in ("PUT", "POST", "PATCH"):
                upstream.putheader("Content-Length", str(len(request.body)))
            upstream.putheader("Connection", "close")
            upstream.endheaders(request.body or None)
            response = upstream.getresponse()
            body = response.read()
            return Reply(response.status, _without(response.headers, *_HOP_BY_HOP), body)
        except OSError:
            return error_reply(self.kind, 502)
        finally:
            upstream.close()


class GCSProxy(FaultProxy):
    """Adds what gcp-storage-emulator leaves out of a read and GCS does: generations and their
    preconditions (404, 412, 304), suffix ranges, 416, and the `X-Goog-*` headers and ETag.

    https://cloud.google.com/storage/docs/json_api/v1/objects/get

    And of a resumable upload: bytes that are there already may be sent again, and an upload that
    is finished answers as it did.

    https://cloud.google.com/storage/docs/performing-resumable-uploads
    """

    _OBJECT = re.compile(r"(?:/download)?(?:/storage/v1)?(/b/[^/]+/o/[^/]+)")

    def __init__(self, host: str, port: int) -> None:
        super().__init__("gcs", host, port)
        self._one_at_a_time = threading.Lock()
        self._uploads: dict[str, Reply] = {}
        """The last answer to each part of a resumable upload, by its session and range."""
        self._kept: dict[tuple[str, str], tuple[dict[str, Any], bytes]] = {}

    def keep(self, bucket: str, name: str) -> int:
        """Keeps the live generation as a bucket with versions does; gives its number."""
        path = f"/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        host = _headers({"Host": self.url.removeprefix("http://")})
        described = self.forward(Request("GET", f"/storage/v1{path}", "", host))
        media = self.forward(Request("GET", f"/storage/v1{path}", "alt=media", host))
        resource = json.loads(bytes(described.body))
        self._kept[path, resource["generation"]] = resource, bytes(media.body)
        return int(resource["generation"])

    def forward(self, request: Request) -> Reply:
        """One at a time: the emulator has one thread and a short queue."""
        part = f"{request.target} {request.headers['Content-Range']}"
        with self._one_at_a_time:
            if part in self._uploads:
                return self._uploads[part]
            reply = super().forward(request)
            if request.method == "PUT" and "upload_id=" in request.query and reply.status < 400:
                self._uploads[part] = reply
            return reply

    def answer(self, request: Request, fault: Fault) -> Reply:
        found = self._OBJECT.fullmatch(request.path)
        if request.method != "GET" or found is None:
            return super().answer(request, fault)
        path = f"/storage/v1{found.group(1)}"
        host = _headers({"Host": request.headers["Host"] or ""})
        described = self.forward(Request("GET", path, "", host))
        if described.status != 200:
            return error_reply(self.kind, described.status)
        resource = json.loads(bytes(described.body))
        query = dict(urllib.parse.parse_qsl(request.query))
        live = resource["generation"]
        kept = self._kept.get((found.group(1), query.get("generation", live)))
        if kept is not None and query["generation"] != live:
            resource = kept[0]
        generation = resource["generation"]
        # a precondition is of the live one, as in Google's own testbench
        refused = _refused_generation(query, generation, live)
        if refused == 404 or (refused and not fault.ignore_conditions):
            return error_reply(self.kind, refused)
        if query.get("alt") != "media":
            return Reply(200, described.headers, json.dumps(resource).encode())
        media = self.forward(Request("GET", path, "alt=media", host))
        if generation != live and kept is not None:
            media.body = kept[1]
        if media.status != 200:
            return error_reply(self.kind, media.status)
        modified = format_datetime(datetime.fromisoformat(resource["updated"]), usegmt=True)
        reply = representation(request.headers, bytes(media.body), f'"{generation}"', modified)
        reply.headers["X-Goog-Generation"] = generation
        reply.headers["X-Goog-Metageneration"] = resource["metageneration"]
        reply.headers["X-Goog-Hash"] = f"crc32c={resource['crc32c']},md5={resource['md5Hash']}"
        reply.headers["X-Goog-Stored-Content-Encoding"] = "identity"
        reply.headers["X-Goog-Stored-Content-Length"] = str(resource["size"])
        return reply


def _refused_generation(query: Mapping[str, str], generation: str, live: str) -> int | None:
    """The status for a request that asks for another generation than there is."""
    if query.get("generation", generation) != generation:
        return 404
    if query.get("ifGenerationMatch", live) != live:
        return 412
    if query.get("ifGenerationNotMatch") == live:
        return 304
    return None


def free_port() -> int:
    """A loopback port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --------------------------------------------------------------------------------------- the stores


@attrs.frozen(kw_only=True)
class Store:
    """A running store, and how to write to it past its faults and its log."""

    kind: str
    uri: Callable[[str], str]
    """From an object's name to its URI's text."""
    write: Callable[[str, bytes], object]
    """Stores or replaces the object of this name."""
    remove: Callable[[str], object] = lambda name: None
    server: Server | None = None
    """Our server or proxy that readers reach it through; None for real clouds."""
    environment: Mapping[str, str] = attrs.field(factory=dict)
    """What a reader needs to reach it."""
    nowhere: Mapping[str, str] = attrs.field(factory=dict)
    """What leads a reader of a real cloud to a port where nothing listens."""
    denied_prefix: str | None = None
    """Names that the store itself lets nobody read; None: our server denies by name."""
    sdk: Any = None
    """The SDK's client that writes go through."""


@contextlib.contextmanager
def http_store() -> Iterator[Store]:
    """Our own HTTP server."""
    server = HTTPServer()
    server.start()
    try:
        yield Store(
            kind="http",
            uri=lambda name: f"{server.url}/{urllib.parse.quote(name)}",
            write=server.put,
            remove=lambda name: server.objects.pop(name, None),
            server=server,
        )
    finally:
        server.close()


@contextlib.contextmanager
def s3_store() -> Iterator[Store]:
    """S3 by moto (https://docs.getmoto.org/en/latest/docs/server_mode.html) behind a proxy.

    Unsigned reads are denied as S3 does, by moto itself; write with `sdk.put_object(...,
    ACL="public-read")` for an object that anybody may read.
    """
    moto = _import("moto.server", "pip install 'moto[s3,server]'")
    boto3 = _import("boto3", "pip install boto3")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    emulator = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    emulator.start()
    host, port = emulator.get_host_and_port()
    proxy = FaultProxy("s3", host, port)
    proxy.start()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    sdk = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
    sdk.create_bucket(Bucket=BUCKET)
    sdk.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(_deny_reads(f"{BUCKET}/denied/*")))
    try:
        yield Store(
            kind="s3",
            uri=lambda name: f"s3://{BUCKET}/{name}",
            write=lambda name, data: sdk.put_object(Bucket=BUCKET, Key=name, Body=data),
            remove=lambda name: sdk.delete_object(Bucket=BUCKET, Key=name),
            server=proxy,
            environment={
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_DEFAULT_REGION": "us-east-1",
                **{name.upper(): value for name, value in keys.items()},
            },
            denied_prefix="denied/",
            sdk=sdk,
        )
    finally:
        proxy.close()
        emulator.stop()


def _deny_reads(resource: str) -> dict[str, Any]:
    denial = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{resource}",
    }
    return {"Version": "2012-10-17", "Statement": [denial]}


@contextlib.contextmanager
def gcs_store() -> Iterator[Store]:
    """gcp-storage-emulator (https://github.com/oittaa/gcp-storage-emulator) behind a proxy."""
    module = _import("gcp_storage_emulator.server", "pip install gcp-storage-emulator")
    storage = _import("google.cloud.storage", "pip install google-cloud-storage")
    credentials = _import("google.auth.credentials", "pip install google-auth")
    for name in ("gcp_storage_emulator", "api"):  # a line for every request and every 404
        logging.getLogger(name).setLevel(logging.CRITICAL)
    port = free_port()
    emulator = module.create_server("127.0.0.1", port, in_memory=True)
    emulator.start()
    proxy = GCSProxy("127.0.0.1", port)
    proxy.start()
    sdk = storage.Client(
        project="testing",
        credentials=credentials.AnonymousCredentials(),
        client_options={"api_endpoint": f"http://127.0.0.1:{port}"},
    )
    bucket = sdk.create_bucket(BUCKET)
    try:
        yield Store(
            kind="gcs",
            uri=lambda name: f"gs://{BUCKET}/{name}",
            write=lambda name, data: bucket.blob(name).upload_from_string(data),
            remove=bucket.delete_blob,
            server=proxy,
            environment={
                "STORAGE_EMULATOR_HOST": proxy.url,
                # Else the SDK asks for the bucket from a thread behind every client's first
                # read, for its traces, and takes the fault that was meant for the read.
                "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",
            },
            sdk=sdk,
        )
    finally:
        proxy.close()
        emulator.stop()


# Azurite's own account, the same on every machine:
# https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
_AZURITE_ACCOUNT = "devstoreaccount1"
_AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def azurite_connection_string(url: str) -> str:
    """What `AZURE_STORAGE_CONNECTION_STRING` is for an Azurite at this URL."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName={_AZURITE_ACCOUNT};"
        f"AccountKey={_AZURITE_KEY};BlobEndpoint={url}/{_AZURITE_ACCOUNT};"
    )


@contextlib.contextmanager
def azure_store() -> Iterator[Store]:
    """Azurite (https://github.com/Azure/Azurite) behind a proxy; npm installs it when first
    asked for, in tests/node_modules."""
    blob = _import("azure.storage.blob", "pip install azure-storage-blob")
    options = [
        *("--silent", "--skipApiVersionCheck", "--loose"),
        *("--inMemoryPersistence", "--disableTelemetry"),
        *("--blobHost", "127.0.0.1", "--blobPort", "0"),
    ]
    with contextlib.ExitStack() as stack:
        said = r"successfully listens on http://\S+:(\d+)"
        port = stack.enter_context(node_server("azurite/dist/src/blob/main.js", options, said))
        proxy = FaultProxy("azure", "127.0.0.1", port)
        proxy.start()
        stack.callback(proxy.stop)
        upstream = "http://{}:{}".format(*proxy.upstream)
        sdk = blob.BlobServiceClient.from_connection_string(azurite_connection_string(upstream))
        stack.callback(sdk.close)
        container = sdk.create_container(BUCKET)
        yield Store(
            kind="azure",
            uri=lambda name: f"az://{BUCKET}/{name}",
            write=lambda name, data: container.upload_blob(name, data, overwrite=True),
            remove=container.delete_blob,
            server=proxy,
            environment={"AZURE_STORAGE_CONNECTION_STRING": azurite_connection_string(proxy.url)},
            sdk=sdk,
        )


@contextlib.contextmanager
def node_server(script: str, options: list[str], said: str) -> Iterator[int]:
    """Starts a server of Node.js that npm has, or installs; gives the port that it says.

    `script` is its path in node_modules; `said` finds the port in what it prints once it listens.
    """
    node = shutil.which("node", path=HOST_ENVIRONMENT.get("PATH"))
    if node is None:
        raise UnavailableError(
            "The tests' servers need Node.js 20 or newer: install it from https://nodejs.org"
        )
    command = [node, str(_installed(script)), *options]
    with contextlib.ExitStack() as stack:
        # In a folder of its own: Azurite leaves files where it runs.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = folder / "server.log"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=folder, stdout=sink, stderr=sink, env=HOST_ENVIRONMENT
            )
        stack.callback(_end, process)
        yield _said_port(process, output, said)


def _installed(name: str) -> Path:
    """A script of node_modules; installed here where it is not yet, by one process at a time."""
    folder = Path(__file__).parent
    script = folder / "node_modules" / name
    if script.exists():
        return script
    npm = shutil.which("npm", path=HOST_ENVIRONMENT.get("PATH"))
    if npm is None:
        raise UnavailableError(
            f"{name} needs npm: install it, or run `npm ci --prefix tests` elsewhere"
        )
    # Under pytest-xdist one installs; the others wait, then find it.  The lock lies in the
    # checkout: one in the shared temporary folder would belong to the machine's first user.
    with filelock.FileLock(folder / "node_modules.lock"):
        if not script.exists():
            install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            _run_npm(install, folder)
    return script


def _run_npm(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=HOST_ENVIRONMENT,
            check=True,
            capture_output=True,
            text=True,
            timeout=_NPM_SECONDS,
        )
    except subprocess.CalledProcessError as err:
        raise UnavailableError(f"`npm ci --prefix tests` failed: {err.stderr[-500:]}") from err
    except subprocess.TimeoutExpired as err:
        raise UnavailableError(f"`npm ci --prefix tests` took over {_NPM_SECONDS} s") from err


def _said_port(process: subprocess.Popen[bytes], output: Path, said: str) -> int:
    """The port that a server says once it listens."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(said, output.read_text()):
            return int(found.group(1))
        time.sleep(0.05)
    raise UnavailableError(
        f"It did not start (Node.js 20 or newer is needed): {output.read_text()[-500:]}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _import(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise UnavailableError(f"{err}: {remedy}") from err


# ---------------------------------------------------------------------- real clouds, when asked for


def cloud_stores() -> dict[str, str]:
    """From the kinds of place that the tester has given a real one of to its URI (a prefix to
    write below; for http the URL of one file): ANEMOI_CKPT_TEST_S3, _GCS, _AZURE and _HTTP."""
    given = {
        kind: HOST_ENVIRONMENT.get(f"ANEMOI_CKPT_TEST_{kind.upper()}", "").rstrip("/")
        for kind in ("http", "s3", "gcs", "azure")
    }
    return {kind: uri for kind, uri in given.items() if uri}


def cloud_store(kind: str, uri: str) -> Store:
    """A real cloud, below `uri`, with the credentials of the tester's own environment."""
    parts = urllib.parse.urlsplit(uri)
    bucket, prefix = parts.netloc, parts.path.strip("/")
    make = {"s3": _cloud_s3, "gcs": _cloud_gcs, "azure": _cloud_azure}
    if kind == "http":
        return Store(kind=kind, uri=lambda name: uri, write=partial(_check_uploaded, uri))
    return make[kind](uri, bucket, lambda name: f"{prefix}/{name}".lstrip("/"))


def _cloud_s3(uri: str, bucket: str, key: Callable[[str], str]) -> Store:
    sdk = _import("boto3", "pip install boto3").client("s3")
    return Store(
        kind="s3",
        uri=lambda name: f"{uri}/{name}",
        write=lambda name, data: sdk.put_object(Bucket=bucket, Key=key(name), Body=data),
        remove=lambda name: sdk.delete_object(Bucket=bucket, Key=key(name)),
        nowhere={"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"},
        sdk=sdk,
    )


def _cloud_gcs(uri: str, bucket: str, key: Callable[[str], str]) -> Store:
    sdk = _import("google.cloud.storage", "pip install google-cloud-storage").Client()
    objects = sdk.bucket(bucket)
    return Store(
        kind="gcs",
        uri=lambda name: f"{uri}/{name}",
        write=lambda name, data: objects.blob(key(name)).upload_from_string(data),
        remove=lambda name: objects.delete_blob(key(name)),
        nowhere={"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{free_port()}"},
        sdk=sdk,
    )


def _cloud_azure(uri: str, bucket: str, key: Callable[[str], str]) -> Store:
    sdk = _azure_client(_import("azure.storage.blob", "pip install azure-storage-blob"))
    container = sdk.get_container_client(bucket)
    port = free_port()
    return Store(
        kind="azure",
        uri=lambda name: f"{uri}/{name}",
        write=lambda name, data: container.upload_blob(key(name), data, overwrite=True),
        remove=lambda name: container.delete_blob(key(name)),
        nowhere={
            "AZURE_STORAGE_CONNECTION_STRING": azurite_connection_string(f"http://127.0.0.1:{port}")
        },
        sdk=sdk,
    )


def _azure_client(blob: Any) -> Any:
    """By the variables that Azure's own command line reads, then by azure-identity."""
    if connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
        return blob.BlobServiceClient.from_connection_string(connection)
    account = os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    secret = os.environ.get("AZURE_STORAGE_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    if not secret:
        secret = _import("azure.identity", "pip install azure-identity").DefaultAzureCredential()
    return blob.BlobServiceClient(f"https://{account}.blob.core.windows.net", credential=secret)


def _check_uploaded(url: str, name: str, data: bytes) -> None:
    """Nothing can be written over HTTP: the file must be there already, with these very bytes."""
    requests = _import("requests", "pip install requests")
    found = hashlib.sha256(requests.get(url, timeout=60).content).digest()
    if found != hashlib.sha256(data).digest():
        raise UnavailableError(
            f"{name} is not the file at ANEMOI_CKPT_TEST_HTTP, and cannot be put"
        )
