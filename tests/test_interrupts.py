"""Ctrl-C: a load stops within a second, and leaves no thread and no file.

On a busy machine it takes longer than a second, yet nothing like the minutes of silence that it
stops. So that is what the tests tell apart.
"""

import contextlib
import dis
import gc
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import requests
import torch
import urllib3

import needs
import servers
from _anemoi_ckpt import threads
from _anemoi_ckpt.places import CONNECTIONS, Buffers, open_stream, read_range, read_version
from _anemoi_ckpt.places.interrupts import Stop, heeded, interruptible, register
from _anemoi_ckpt.places.responses import register_body
from _anemoi_ckpt.places.sessions import mounted
from _anemoi_ckpt.threads import run
from anemoi_ckpt import UnreachableError, download, load, parse_uri, peek
from checkpoints import as_bytes

DATA = as_bytes({"state_dict": {"w": torch.rand(5_000_000), "v": torch.rand(5_000_000)}})
SERVERS = re.compile("^test-server|process_request_thread")  # ours, and moto's
REMOTE = ["http", "s3", "gcs", "azure"]
WAYS: dict[str, Callable[[str, Path], Any]] = {
    "load": lambda uri, folder: load(uri),
    "cached": lambda uri, folder: load(uri, cached=True),
    "peek": lambda uri, folder: peek(uri),
    "download": lambda uri, folder: download(uri, folder, resume=False),
}
SILENCE_SECONDS = 120
SOON_SECONDS = 20
SILENCES = {
    "before the headers": servers.Fault(delay=SILENCE_SECONDS),
    "in the body": servers.Fault(stall=SILENCE_SECONDS, stall_after=1000),
    "slow": servers.Fault(rate=len(DATA) / 10 / SILENCE_SECONDS),
}


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell starts what it runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interrupted(
    silent: threading.Event | None = None, left: list[threading.Thread] | None = None
) -> Iterator[None]:
    """Presses Ctrl-C once the place is silent, and looks at what that leaves.

    Without an event it presses after a while; with a list it puts there what is left.
    """
    pressed = []

    def press() -> None:
        if silent is None:
            time.sleep(0.3)
        else:
            silent.wait()
            time.sleep(0.1)  # by then most of what reads in parallel waits, too
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = {thread.ident for thread in threading.enumerate()}
    finger = threading.Thread(target=press, daemon=True)
    finger.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - pressed[0] < SOON_SECONDS
    finger.join()
    if left is not None:
        left.extend(others(before))
    while left is None and (lasting := others(before)):
        assert time.monotonic() - pressed[0] < SOON_SECONDS, lasting
        time.sleep(0.01)


def others(before: set[int | None]) -> list[threading.Thread]:
    """The threads that were not there before, but for those of servers."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.ident not in before and not SERVERS.search(thread.name)
    ]


@pytest.mark.parametrize("place", REMOTE, indirect=True)
@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_stops_what_waits(
    place, silence: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "to").mkdir()
    uri = place.put("a.ckpt", DATA)
    later = 1 if way == "peek" else 3  # the first reads go well
    place.server.fault, silent = silent_from(later, place, SILENCES[silence])
    with interrupted(silent):
        WAYS[way](uri, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert not list((tmp_path / "cache").rglob("a.ckpt"))


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_an_interrupt_stops_the_first_request(place) -> None:
    uri = place.put("a.ckpt", DATA)
    place.server.fault, silent = silent_from(1, place, servers.Fault(delay=SILENCE_SECONDS))
    with interrupted(silent):
        load(uri)


def silent_from(
    later: int, place: Any, fault: servers.Fault
) -> tuple[Callable[[servers.Request], servers.Fault | None], threading.Event]:
    """Give what makes a place silent from a request on, and what tells when it is."""
    silent = threading.Event()

    def at(request: servers.Request) -> servers.Fault | None:
        if len(place.server.log) < later:
            return None
        silent.set()
        return fault

    return at, silent


# ── before there is a request ─────────────────────────────────────────────────────────────────


@contextmanager
def silent_server() -> Iterator[str]:
    """Its system accepts connections; nobody reads what they bring."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def full_server() -> Iterator[str]:
    """Its system does not answer those who want to connect."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def reached_at(kind: str, url: str) -> tuple[str, Mapping[str, str]]:
    """Give the URI of an object in a store at a URL, and what leads a reader there."""
    connection = servers.azurite_connection_string(url)
    scheme = url.partition("://")[0]
    return {
        "http": (f"{url}/a.ckpt", {}),
        "s3": (
            "s3://bucket/a.ckpt",
            {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
            },
        ),
        "gcs": ("gs://bucket/a.ckpt", {"STORAGE_EMULATOR_HOST": url}),
        "azure": (
            "az://container/a.ckpt",
            {"AZURE_STORAGE_CONNECTION_STRING": connection.replace("http;", f"{scheme};")},
        ),
    }[kind]


# what happens: the server, the URL's scheme, the variable that names the server as a proxy
PHASES: dict[str, tuple[Any, str, str | None]] = {
    "connecting": (full_server, "http", None),
    "connecting with TLS": (full_server, "https", None),
    "the handshake of TLS": (silent_server, "https", None),
    "connecting to a proxy": (full_server, "http", "HTTP_PROXY"),
    "a silent proxy": (silent_server, "http", "HTTP_PROXY"),
    "the CONNECT to a proxy": (silent_server, "https", "HTTPS_PROXY"),
}


SDKS = {"gcs": "google.cloud.storage", "azure": "azure.storage.blob"}


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_stops_what_has_no_connection_yet(
    kind: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in SDKS:  # the other tests of a store have its server, or are skipped
        needs.package(SDKS[kind], "pip install 'anemoi-ckpt[all]'")
    server, scheme, proxy = PHASES[phase]
    with server() as address:
        uri, environment = reached_at(kind, f"{scheme}://{'store.invalid' if proxy else address}")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if proxy:
            monkeypatch.setenv(proxy, f"http://{address}")
            monkeypatch.setenv(proxy.lower(), f"http://{address}")
        with interrupted():
            load(uri)


# ── a client of the user's own ────────────────────────────────────────────────────────────────


def own_client(place: Any) -> Mapping[str, Any]:
    """Give the parameters that bring a client of the user's own, which waits for 2 seconds."""
    url = place.server.url
    match place.kind:
        case "http":
            return {"session": requests.Session(), "timeout": 2}
        case "s3":
            import boto3
            from botocore.config import Config

            config = Config(read_timeout=2, retries={"total_max_attempts": 1})
            return {"client": boto3.client("s3", endpoint_url=url, config=config)}
        case "gcs":
            from google.auth.credentials import AnonymousCredentials
            from google.cloud import storage

            options = {"api_endpoint": url}
            client = storage.Client("testing", AnonymousCredentials(), client_options=options)
            return {"client": client, "timeout": 2}
        case _:
            from azure.storage.blob import BlobServiceClient

            string = servers.azurite_connection_string(url)
            client = BlobServiceClient.from_connection_string(string, read_timeout=2, retry_total=0)
            return {"client": client}


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_an_interrupt_stops_a_body_that_a_users_client_reads(place) -> None:
    uri = place.put("a.ckpt", DATA)
    params = own_client(place)
    place.server.fault, silent = silent_from(3, place, SILENCES["in the body"])
    with interrupted(silent):
        load(uri, transport_params=params)


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_an_interrupt_does_not_wait_for_a_users_client(place) -> None:
    uri = place.put("a.ckpt", DATA)
    params = own_client(place)
    place.server.fault, silent = silent_from(3, place, servers.Fault(delay=SILENCE_SECONDS))
    left: list[threading.Thread] = []
    with interrupted(silent, left):
        load(uri, transport_params=params)
    for thread in left:  # it ends with the client's own time limit
        thread.join(SOON_SECONDS)
        assert not thread.is_alive()


# ── the ways that an SDK goes ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", REMOTE, indirect=True)
@pytest.mark.parametrize("ask", ["the version", "a range"])
def test_a_request_has_its_socket_registered(place, ask: str) -> None:
    uri = parse_uri(place.put("a.ckpt", DATA))
    stop, at_request = Stop(), []

    def look(request: servers.Request) -> None:
        begun, ports = time.monotonic(), []
        while not ports and time.monotonic() - begun < SOON_SECONDS:
            # the client registers its socket when it connects, and anew when it begins to wait
            with contextlib.suppress(OSError, RuntimeError):
                ports = [each.getpeername()[1] for each in stop._sockets.values()]
        at_request.append(ports)

    with stop.heeded():
        for _ in range(2):  # on a new connection, and on the same one
            place.server.fault = None
            pin = read_version(uri)
            place.server.fault = look
            if ask == "the version":
                read_version(uri)
            else:
                read_range(uri, 0, Buffers(bytearray(100)), pin)
    # before the server has answered, so that no body has registered it
    assert at_request == [[place.server.port]] * 2
    assert not stop._sockets


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_a_body_of_a_users_client_has_its_socket_registered(place) -> None:
    uri = parse_uri(place.put("a.ckpt", DATA))
    params = own_client(place)
    pin = read_version(uri, params)
    stop, ports = Stop(), []

    def look(count: int) -> None:
        ports.extend(each.getpeername()[1] for each in stop._sockets.values())

    with stop.heeded():
        read_range(uri, 0, Buffers(bytearray(100), notify=look), pin, params)
    assert ports == [place.server.port]


def test_a_response_that_comes_after_the_stop_is_closed(http_server: servers.HTTPServer) -> None:
    response = urllib3.PoolManager().request(
        "GET", http_server.put("a.ckpt", DATA), preload_content=False
    )
    stop = Stop()
    stop.set()
    with stop.heeded(), pytest.raises(ConnectionAbortedError, match="stopped"):
        register_body(response)
    assert response.closed


@pytest.mark.parametrize("place", ["http", "s3"], indirect=True)
def test_a_stream_has_its_socket_registered(place) -> None:
    uri = parse_uri(place.put("a.ckpt", DATA))
    stop = Stop()
    with stop.heeded(), contextlib.closing(open_stream(uri, own_client(place))) as stream:
        (registered,) = stop._sockets.values()
        assert registered.getpeername()[1] == place.server.port
        assert stream.read(10) == DATA[:10]


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_as_many_connections_are_kept_as_there_are_reads(
    place, caplog: pytest.LogCaptureFixture
) -> None:
    uri = parse_uri(place.put("a.ckpt", DATA))
    pin = read_version(uri)
    together = threading.Barrier(CONNECTIONS)

    def read() -> None:
        room = bytearray(100)
        together.wait(20)
        read_range(uri, 0, Buffers(room), pin)
        assert room == DATA[:100]

    for _ in range(2):
        run([read] * CONNECTIONS, CONNECTIONS, Stop())
    assert not [each for each in caplog.messages if "pool is full" in each]
    assert place.server.connections <= CONNECTIONS + 1  # of which each served two reads


def test_an_sdks_own_adapter_stays() -> None:
    class Certified(requests.adapters.HTTPAdapter):
        """As google-auth mounts one for a client's certificate."""

    session, own = requests.Session(), Certified()
    session.mount("https://", own)
    mounted(session, requests)
    assert session.get_adapter("https://host") is own
    for scheme in ("https", "http"):
        manager = session.get_adapter(f"{scheme}://host").poolmanager
        pool = manager.connection_from_host("host", 1, scheme)
        assert pool.ConnectionCls.registers_sockets
    proxied = session.get_adapter("http://host").proxy_manager_for("http://proxy:1")
    assert proxied.connection_from_url("http://host").ConnectionCls.registers_sockets
    assert interruptible(manager.pool_classes_by_scheme) == manager.pool_classes_by_scheme


# ── connecting, as urllib3 does ───────────────────────────────────────────────────────────────


def _refusing() -> Any:
    return contextlib.nullcontext(f"127.0.0.1:{servers.free_port()}")


CONNECTIONS_TO: dict[str, tuple[Any, Callable[[str], str], Mapping[str, Any]]] = {
    "an address": (silent_server, lambda at: at, {}),
    "localhost, whose ::1 refuses": (silent_server, lambda at: f"localhost:{at[10:]}", {}),
    "one that refuses": (_refusing, lambda at: at, {}),
    "an address of no host": (_refusing, lambda at: f"255.255.255.255:{at[10:]}", {}),
    "IPv6": (_refusing, lambda at: f"[::1]:{at[10:]}", {}),
    "one that does not answer": (full_server, lambda at: at, {"timeout": 0.3}),
    "no such host": (_refusing, lambda at: "nowhere.invalid", {}),
    "a name with a dot at its end": (_refusing, lambda at: "nowhere.invalid.", {}),
    "a name that IDNA refuses": (_refusing, lambda at: "a" * 70 + ".invalid", {}),
    "a name of other letters": (_refusing, lambda at: "bücher.invalid", {}),
    "from an address": (silent_server, lambda at: at, {"source_address": ("127.0.0.2", 0)}),
    "from another's address": (silent_server, lambda at: at, {"source_address": ("192.0.2.1", 0)}),
    "an option of sockets": (
        silent_server,
        lambda at: at,
        {"socket_options": [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]},
    ),
    "no option of sockets": (silent_server, lambda at: at, {"socket_options": None}),
    "no time limit": (silent_server, lambda at: at, {"timeout": None}),
    "the default time limit": (silent_server, lambda at: at, {"timeout": urllib3.Timeout()}),
}


def connected(url: str, options: Mapping[str, Any], wrap: Callable[[Any], Any]) -> Any:
    """Tell what comes of a connection."""
    manager = urllib3.PoolManager(**options)
    manager.pool_classes_by_scheme = wrap(manager.pool_classes_by_scheme)
    try:
        connection = manager.connection_from_url(url)._get_conn()
        connection.connect()
    except Exception as err:
        cause = err.__cause__ or err.__context__  # urllib3 1.26 tells no cause
        return type(err), re.sub("0x[0-9a-f]+", "", str(err)), type(cause)
    with contextlib.closing(connection):
        made = connection.sock
        keep_alive = made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        no_delay = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        return made.getsockname()[0], made.gettimeout(), keep_alive, no_delay


@pytest.mark.parametrize("to", CONNECTIONS_TO)
def test_connections_are_made_as_urllib3_makes_them(to: str) -> None:
    server, place, options = CONNECTIONS_TO[to]
    with server() as address:
        url = f"http://{place(address)}/"
        assert connected(url, options, interruptible) == connected(url, options, lambda same: same)


@needs.with_urllib3_2
def test_an_audit_hears_of_a_connection_as_from_urllib3() -> None:
    """In a process of its own: a hook for audits cannot be taken out again."""
    with silent_server() as address:
        code = f"""
import sys, urllib3
from _anemoi_ckpt.places.interrupts import interruptible
heard = []
sys.addaudithook(lambda event, args: event == "http.client.connect" and heard.append(args[1:]))
for wrap in (dict, interruptible):
    manager = urllib3.PoolManager()
    manager.pool_classes_by_scheme = wrap(manager.pool_classes_by_scheme)
    connection = manager.connection_from_url("http://{address}")._get_conn()
    connection.connect()
    connection.close()
print(heard[0] == heard[1], len(heard))
"""
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert shown.stdout.split() == [b"True", b"2"]


def test_the_default_time_limit_of_sockets_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_server() as address:
        connection = interruptible(urllib3.PoolManager().pool_classes_by_scheme)["http"](
            *address.split(":")
        )._get_conn()
        connection.timeout = object()  # as urllib3 1.26 marks it
        socket.setdefaulttimeout(7)
        try:
            connection.connect()
        finally:
            socket.setdefaulttimeout(None)
        assert connection.sock.gettimeout() == 7
        connection.close()


def test_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])
    ours, theirs = (
        connected("http://host/", {}, wrap) for wrap in (interruptible, lambda same: same)
    )
    assert ours == theirs
    assert ours[0] is urllib3.exceptions.NewConnectionError


def test_urllib3_before_2_knows_no_error_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(urllib3.exceptions, "NameResolutionError", raising=False)
    kind, text, cause = connected("http://nowhere.invalid/", {}, interruptible)
    assert (kind, cause) == (urllib3.exceptions.NewConnectionError, socket.gaierror)
    assert "Failed to establish a new connection: [Errno" in text


def test_a_proxy_of_another_kind_makes_its_own_connections() -> None:
    class Socks(urllib3.connection.HTTPConnection):
        """As urllib3's for SOCKS, which needs PySocks."""

        def _new_conn(self) -> socket.socket:
            return socket.create_connection(proxy)

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Socks

    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = listener.getsockname()
        pool, stop = interruptible({"http": Pool})["http"]("store.invalid"), Stop()
        connection = pool._get_conn()
        with stop.heeded():
            connection.connect()
            (registered,) = stop._sockets.values()
            assert registered.getpeername() == connection.sock.getpeername() == proxy
            stop.set()
            assert connection.sock.recv(1) == b""
            connection.close()
            with pytest.raises(ConnectionAbortedError, match="stopped"):
                connection.connect()
        connection.close()


def test_an_unreachable_host_is_named(http_server: servers.HTTPServer) -> None:
    port = servers.free_port()
    with pytest.raises(UnreachableError, match=r"Connection refused[^$]*check the host"):
        load(f"http://127.0.0.1:{port}/a.ckpt", retries=0)
    with pytest.raises(UnreachableError, match=r"nowhere\.invalid.*(resolve|not known)"):
        load("http://nowhere.invalid/a.ckpt", retries=0)


# ── stops ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_ends_a_read_that_waits() -> None:
    stop, begun = Stop(), threading.Event()
    ours, theirs = socket.socketpair()

    def read() -> bytes:
        register(ours)
        begun.set()
        return ours.recv(1)

    with ours, theirs:
        halt = threading.Thread(target=lambda: (begun.wait(), stop.set()))
        halt.start()
        assert run([read], 1, stop) == [b""]
        halt.join()
        with stop.heeded(), pytest.raises(ConnectionAbortedError):
            register(ours)  # what comes later does not begin
        assert not stop._sockets


def test_nothing_is_registered_without_a_stop_or_a_socket() -> None:
    assert heeded() is None
    with socket.socket() as unheeded:
        register(unheeded)
    with Stop().heeded():
        register(None)
        register(unheeded)  # closed
        assert heeded()._sockets == {}


def test_a_stop_ends_the_wait_for_another_attempt() -> None:
    stop = Stop()
    assert not stop.wait(0.15)
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    begun = time.monotonic()
    assert stop.wait(SILENCE_SECONDS)
    assert time.monotonic() - begun < SOON_SECONDS
    timer.join()


def test_a_stop_of_an_outer_call_ends_an_inner_one() -> None:
    outer, inner, begun = Stop(), Stop(), threading.Event()

    def wait() -> None:
        begun.set()
        inner.wait(30)

    def nested() -> None:
        run([wait, wait], 2, inner)

    def halt() -> None:
        begun.wait()
        outer.set()

    with pytest.raises(CancelledError):
        run([nested, halt], 2, outer)
    assert inner.is_set()
    assert not [each for each in threading.enumerate() if each.name.startswith("anemoi-ckpt")]


@pytest.mark.parametrize("problem", [MemoryError("no room"), SystemExit(3), ValueError("x")])
def test_what_a_call_raises_is_raised_as_it_is(problem: BaseException) -> None:
    stop = Stop()

    def fail() -> None:
        raise problem

    with pytest.raises(type(problem)) as raised:
        run([*[lambda: stop.wait(30)] * 3, fail, *[lambda: stop.wait(30)] * 3], 4, stop)
    assert raised.value is problem
    assert stop.is_set()


def test_a_failure_leaves_nothing_for_the_collector() -> None:
    class FailureError(Exception):
        pass

    def fail() -> None:
        raise FailureError

    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with contextlib.suppress(FailureError):
                run([fail, fail, fail], 3, Stop())
        assert not [each for each in gc.get_objects() if type(each) is FailureError]
    finally:
        gc.enable()


@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_a_progress_that_raises_is_raised_as_it_is(place) -> None:
    uri = place.put("a.ckpt", DATA)
    problem = MemoryError("no room for a bar")

    def fail(*args: Any) -> None:
        raise problem

    with pytest.raises(MemoryError) as raised:
        load(uri, progress=fail)
    assert raised.value is problem


def test_a_second_interrupt_is_heard_while_the_first_one_stops() -> None:
    stop, release = Stop(), threading.Event()

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.is_set():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Timer(0.2, press)
    finger.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        run([lambda: release.wait(SILENCE_SECONDS)] * 2, 2, stop)  # they heed no stop
    assert isinstance(raised.value.__context__, KeyboardInterrupt)
    release.set()
    finger.join()


@contextmanager
def interrupted_again(place: int) -> Iterator[list[str]]:
    """Interrupts `run` as it handles an error, where CPython hears signals: after a call.

    Of those places it takes the one of this number; the list that it gives is empty if there are
    not so many.
    """
    instructions = list(dis.get_instructions(run))
    after_calls = {
        each.offset for before, each in pairwise(instructions) if before.opname.startswith("CALL")
    }
    places, failed, pressed = count(), [], []

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        if frame.f_code is not run.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "exception":
            failed.append(frame.f_lineno)
        if event == "opcode" and failed and frame.f_lasti in after_calls and next(places) == place:
            pressed.append(f"line {frame.f_lineno}")
            raise KeyboardInterrupt
        return trace

    before, here = sys.gettrace(), sys._getframe()
    here.f_trace_opcodes = True  # Python 3.12 asks for it before, in any frame
    sys.settrace(trace)
    try:
        yield pressed
    finally:
        sys.settrace(before)


def test_a_second_interrupt_at_any_place_leaves_no_thread() -> None:
    """One between the first and its handling left the threads that were waiting."""

    def fail() -> None:
        raise OSError

    for place in count():
        stop = Stop()
        with pytest.raises((OSError, KeyboardInterrupt)), interrupted_again(place) as pressed:
            run([partial(stop.wait, 30), fail], 2, stop)
        end = time.monotonic() + SOON_SECONDS
        while not stop.is_set() and time.monotonic() < end:
            time.sleep(0.001)
        assert stop.is_set(), pressed
        if not pressed:
            break
    assert place > 2


def starting(monkeypatch: pytest.MonkeyPatch, most: int, problem: BaseException) -> list[Any]:
    """Has threads start, up to so many; gives those that did."""
    started: list[threading.Thread] = []

    class Thread(threading.Thread):
        def start(self) -> None:
            if len(started) == most:
                raise problem
            started.append(self)
            super().start()

    monkeypatch.setattr(threads.threading, "Thread", Thread)
    return started


def test_an_interrupt_before_a_thread_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, started = Stop(), starting(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run([lambda: stop.wait(30)] * 5, 5, stop)
    assert (started, stop.is_set()) == ([], True)


def test_the_main_thread_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C within `Thread.start` became a RuntimeError: "release unlocked lock"."""
    starters = []

    class Thread(threading.Thread):
        def start(self) -> None:
            starters.append(threading.get_ident())
            super().start()

    monkeypatch.setattr(threads.threading, "Thread", Thread)
    assert run([lambda: 1, lambda: 2], 2, Stop()) == [1, 2]
    assert starters
    assert threading.main_thread().ident not in starters


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    starting(monkeypatch, 0, RuntimeError("can't start new thread"))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run([lambda: 1], 1, Stop())


def test_the_main_thread_shuts_no_socket_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C came between taking it out and shutting it down: its thread was left."""
    callers = []

    class Noting(Stop):
        def set(self) -> None:
            callers.append(threading.get_ident())
            super().set()

    stop = Noting()

    def fail() -> None:
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        run([fail, lambda: stop.wait(30)], 2, stop)
    assert stop.is_set()
    assert threading.get_ident() not in callers
    callers.clear()
    monkeypatch.setattr(threads._thread, "start_new_thread", starts_none)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run([fail], 1, Noting())
    assert set(callers) == {threading.get_ident()}  # rather than not at all


def starts_none(*args: Any) -> int:
    raise RuntimeError("can't start new thread")


def test_a_bare_thread_tells_how_another_started() -> None:
    """No trace function, coverage's included, sees what a bare thread runs: here it is called."""
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread = threading.Thread(target=outcomes.put, args=("ran",))
    begun: deque[threading.Thread] = deque()
    threads._start(thread, outcomes, begun)
    thread.join()
    threads._start(thread, outcomes, begun)
    assert list(begun) == [thread]
    assert outcomes.get_nowait() == "ran"
    number, result, problem = outcomes.get_nowait()
    assert (number, result) == (-1, None)
    with pytest.raises(RuntimeError, match="threads can only be started once"):
        raise problem


def test_a_thread_that_is_about_to_start_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython says for a moment, or longer where many threads want to run, that it is not alive."""

    class Thread(threading.Thread):
        has_started = False

        def start(self) -> None:
            super().start()
            time.sleep(0.5)
            self.has_started = True

        def is_alive(self) -> bool:
            return self.has_started and super().is_alive()

    monkeypatch.setattr(threads.threading, "Thread", Thread)
    assert run([lambda: time.sleep(1)], 1, Stop()) == [None]


def test_fewer_threads_do_the_work_where_no_more_can_start(monkeypatch) -> None:
    started = starting(monkeypatch, 2, RuntimeError("can't start new thread"))
    calls = [lambda number=number: (time.sleep(0.05), number)[1] for number in range(5)]
    assert run(calls, 5, Stop()) == [0, 1, 2, 3, 4]
    assert len(started) == 2
    assert run([], 5, Stop()) == []


def test_threads_that_end_before_their_work_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.threading.Thread, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="ended before their work was done"):
        run([lambda: 1], 1, Stop())


def test_what_fails_before_the_calls_is_raised() -> None:
    with pytest.raises(AttributeError, match="heeded"):
        run([lambda: 1], 1, threading.Event())  # no Stop
    assert run([lambda: 1], 1, Stop()) == [1]


def test_an_interrupt_that_comes_before_the_wait_is_heard() -> None:
    """No signal wakes the main thread: its handler is all there is to hear."""
    pending = []

    def call() -> None:
        time.sleep(0.3)
        pending.append(1)

    before = signal.signal(signal.SIGUSR1, lambda *args: pending.append(0))
    try:
        # The kernel hands it to another thread, so that no system call of ours is interrupted.
        def kill() -> None:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            call()

        run([kill], 1, Stop())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pending == [0, 1]  # within the 0.3 s, though nothing woke the main thread


# ── many ──────────────────────────────────────────────────────────────────────────────────────


def descriptors() -> int:
    """Count this process's open files."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@pytest.mark.parametrize("place", REMOTE, indirect=True)
def test_loads_and_stops_leave_no_file_open(place) -> None:
    uri = place.put("a.ckpt", as_bytes({"w": torch.rand(1000)}))

    def fail(*args: Any) -> None:
        raise OSError

    for _ in range(3):  # makes the clients
        load(uri)
    before = descriptors()
    for _ in range(50):
        load(uri)
        with contextlib.suppress(OSError):
            load(uri, progress=fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
    # a pool of connections may have grown, by one socket here and one in the server
    assert descriptors() <= before + 4


@pytest.mark.timeout(600)
def test_no_stop_hangs() -> None:
    """The whole is `benchmarks/interrupts.py`, with 5,000 stops: see there."""
    script = Path(__file__).parents[1] / "benchmarks" / "interrupts.py"
    shown = subprocess.run(
        [sys.executable, script, "--stops", "100", "--most-seconds", "60"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr


# ── a process ─────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_process_ends(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: (
        SILENCES["in the body"] if len(http_server.log) >= 3 else None
    )
    code = f"import anemoi_ckpt; print('begun', flush=True); anemoi_ckpt.load({uri!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(http_server.log) < 6:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, shown = process.communicate()
        assert time.monotonic() - begun < SOON_SECONDS
    assert shown.endswith("KeyboardInterrupt\n")
