"""Stops: a read registers the socket that it waits on, and a stop shuts that socket down.

No SDK can be told to give up a request that is on its way. But each of those that are used here
sends its requests through urllib3, whose pools can be given connections of another class. Ours
register their sockets with the stop that the current thread heeds. A client of the user's own is
left as it is: until its response begins, its read ends with the client's own timeout.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

_POLL_SECONDS = 0.1  # between two looks at a stop, where nothing wakes the thread
_local = threading.local()  # .stop: what the reads of a thread heed


# ── stop ──────────────────────────────────────────────────────────────────────────────────────


class Stop:
    """Ends the reads that heed it: those on a socket, those between two chunks, those to come.

    It takes no lock, because a signal handler or a finaliser may run at any line of it, in any
    thread. Each step is one operation of a dict, which CPython does not interrupt.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._sockets: dict[int, socket.socket] = {}  # by thread

    def is_set(self) -> bool:
        """Tell whether `set` was called."""
        return self._is_set

    def refuse(self) -> None:
        """Stop the reads to come, and those between two chunks."""
        self._is_set = True

    def set(self) -> None:
        """Stop, and shut down the sockets that threads wait on.

        A KeyboardInterrupt in the midst of it could leave a socket that is taken out, and not shut
        down: the main thread should have another thread call it.
        """
        self.refuse()
        with suppress(KeyError):  # no socket is left
            while True:
                # Who takes a socket out closes it. If the thread closed it while it is shut down
                # here, its descriptor could already be another file.
                _, taken = self._sockets.popitem()
                with taken, suppress(OSError):  # the server has hung up
                    taken.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float) -> bool:
        """Wait until `set` is called, or for so many seconds; tell whether it was called."""
        end = time.monotonic() + seconds
        while not self._is_set and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        return self._is_set

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Have the reads of this thread heed this stop, while the block lasts."""
        before, _local.stop = heeded(), self
        try:
            yield
        finally:
            _local.stop = before
            self._forget()

    def check(self) -> None:
        """Let a read go on.

        Raises:
            ConnectionAbortedError: `set` was called. SDKs take it for a lost connection.
        """
        if self._is_set:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the read was stopped")

    def register(self, descriptor: int) -> None:
        """Note the socket that this thread waits on from here on.

        Raises:
            ConnectionAbortedError: as `check`.
        """
        self._forget()
        # A descriptor of its own: TLS wraps the socket in another object, and SDKs close it.
        # Family and type do not matter to shutdown.
        twin = socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)
        self._sockets[threading.get_ident()] = twin
        if self._is_set:  # then set() may have been before the line above
            self._forget()
        self.check()

    def _forget(self) -> None:
        twin = self._sockets.pop(threading.get_ident(), None)
        if twin is not None:
            twin.close()


def heeded() -> Stop | None:
    """Give the stop that this thread heeds."""
    return getattr(_local, "stop", None)


def register(waited_on: Any) -> None:
    """Note the socket that this thread waits on from here on, if it heeds a stop.

    Args:
        waited_on: a socket, or what TLS makes of one. None, or closed: nothing is noted.
    """
    stop = heeded()
    descriptor = -1 if waited_on is None else waited_on.fileno()
    if stop is not None and descriptor >= 0:
        stop.register(descriptor)


# ── connections ───────────────────────────────────────────────────────────────────────────────


def interruptible(pool_classes: Mapping[str, Any]) -> dict[str, Any]:
    """Give classes of urllib3's pools, by scheme, whose connections register their sockets.

    For `urllib3.PoolManager.pool_classes_by_scheme`.
    """
    return {scheme: _interruptible_pool(each) for scheme, each in pool_classes.items()}


@functools.cache
def _interruptible_pool(pool_class: Any) -> Any:
    if getattr(pool_class.ConnectionCls, "registers_sockets", False):
        return pool_class
    connection_class = _interruptible_connection(pool_class.ConnectionCls)
    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": connection_class})


def _interruptible_connection(connection_class: Any) -> Any:
    import urllib3  # noqa: PLC0415 - comes with every SDK

    # Others, such as those of SOCKS, connect in their own way
    is_direct = connection_class._new_conn is urllib3.connection.HTTPConnection._new_conn  # noqa: SLF001 - urllib3 calls it to connect

    class Connection(connection_class):  # type: ignore[misc] # known at run time alone
        registers_sockets = True

        def _new_conn(self) -> socket.socket:
            made: socket.socket = _connected(self) if is_direct else super()._new_conn()
            try:
                register(made)  # TLS and the CONNECT of a proxy come next
            except OSError:
                made.close()
                raise
            return made

        def getresponse(self, *args: Any, **kwargs: Any) -> Any:
            register(self.sock)  # another thread may have made the connection
            return super().getresponse(*args, **kwargs)

    for name in ("__name__", "__qualname__", "__module__"):  # errors show them
        setattr(Connection, name, getattr(connection_class, name))
    return Connection


def _connected(connection: Any) -> socket.socket:
    """Connect as urllib3's `HTTPConnection._new_conn` does, but heed a stop.

    Raises:
        urllib3.exceptions.NewConnectionError: no address of the host answers, or it has none.
        urllib3.exceptions.ConnectTimeoutError: its last address does not answer in time.
        urllib3.exceptions.LocationParseError: this can be no host's name.
    """
    from urllib3 import exceptions  # noqa: PLC0415 - comes with every SDK

    try:
        made = _create_connection(connection)
    except socket.gaierror as err:
        kind = getattr(exceptions, "NameResolutionError", _no_such_host)  # since urllib3 2.0
        raise kind(connection.host, connection, err) from err
    except TimeoutError as err:
        raise exceptions.ConnectTimeoutError(
            connection,
            f"Connection to {connection.host} timed out. (connect timeout={connection.timeout})",
        ) from err
    except OSError as err:
        raise exceptions.NewConnectionError(
            connection, f"Failed to establish a new connection: {err}"
        ) from err
    sys.audit("http.client.connect", connection, connection.host, connection.port)
    return made


def _no_such_host(_host: str, connection: Any, err: OSError) -> Exception:
    from urllib3.exceptions import NewConnectionError  # noqa: PLC0415 - comes with every SDK

    return NewConnectionError(connection, f"Failed to establish a new connection: {err}")


def connect_socket(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a host for a protocol that is not HTTP, and heed a stop meanwhile.

    Raises:
        OSError: no address of the host answers, or it has none.
        ConnectionAbortedError: the read was stopped.
    """
    nodelay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are sent at once
    options = {"source_address": None, "socket_options": [nodelay]}
    return _create_connection(
        types.SimpleNamespace(_dns_host=host, port=port, timeout=timeout, **options)
    )


def _create_connection(connection: Any) -> socket.socket:
    """Connect to the first address that answers, as `urllib3.util.connection` does."""
    import urllib3  # noqa: PLC0415 - comes with every SDK

    host = connection._dns_host  # noqa: SLF001 - with its trailing dot, which DNS wants
    host = host.strip("[]") if host.startswith("[") else host
    try:
        host.encode("idna")
    except UnicodeError:
        problem = f"'{host}', label empty or too long"
        raise urllib3.exceptions.LocationParseError(problem) from None
    family = urllib3.util.connection.allowed_gai_family()
    failure = OSError("getaddrinfo returns an empty list")
    try:
        for *kind, _, address in socket.getaddrinfo(
            host, connection.port, family, socket.SOCK_STREAM
        ):
            try:
                return _connect(socket.socket(*kind), address, connection)
            except OSError as err:
                failure = err
        raise failure
    finally:
        del failure  # its traceback holds this frame: a cycle, which would keep sockets open


def _connect(made: socket.socket, address: Any, connection: Any) -> socket.socket:
    try:
        for option in connection.socket_options or ():
            made.setsockopt(*option)
        timeout = connection.timeout
        if timeout is not None and not isinstance(timeout, (int, float)):
            timeout = socket.getdefaulttimeout()  # urllib3's mark for it
        if connection.source_address:
            made.bind(connection.source_address)
        _wait_for_connection(made, address, timeout)
        made.settimeout(timeout)
    except BaseException:
        made.close()
        raise
    return made


def _wait_for_connection(made: socket.socket, address: Any, timeout: float | None) -> None:
    """Connect, and look at the stop meanwhile: not every system lets a shutdown end the wait."""
    import urllib3  # noqa: PLC0415 - comes with every SDK

    stop = heeded() or Stop()
    stop.check()
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    made.setblocking(False)
    code = made.connect_ex(address)
    if code in {errno.EINPROGRESS, errno.EWOULDBLOCK}:  # Windows says the second
        while not urllib3.util.wait.wait_for_write(made, _POLL_SECONDS):
            stop.check()
            if time.monotonic() > end:
                raise TimeoutError("timed out")
        code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
