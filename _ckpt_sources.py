"""One object as a source of bytes: pinned to one version, read in parallel, tried again.

transport · source · blocks · parallel · progress
"""

from __future__ import annotations

import io
import logging
import os
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

from attrs import evolve, field, frozen

from _ckpt_errors import AccessDeniedError, UnreachableError
from _ckpt_places import (
    CHUNK_BYTES,
    LONG_PART_BYTES,
    TIMEOUT_SECONDS,
    URI,
    Buffers,
    Notify,
    Params,
    UnrangedError,
    Version,
    connect,
    empty_file,
    explained,
    forget_clients,
    open_stream,
    parse_uri,
    pinned,
    read_range,
    read_version,
    resolve,
)

log = logging.getLogger("anemoi_ckpt")

Progress = bool | Callable[[int, int | None], object] | None

_T = TypeVar("_T")
BLOCK_BYTES = 64 * 1024  # first and last block: holds pickle and directory of most checkpoints
AHEAD_BYTES = 4 * 1024  # read on past a record: the small ones after the pickle come with it
SHARD_BYTES = 1 << 48  # where in a joined source each object begins: far beyond the last one's end
PART_BYTES = 8 * 1024**2  # least for a request: long against a round trip
RETRIES = 5
BACKOFF_SECONDS = 0.2  # before the first attempt anew; twice as long before each one after
PROGRESS_DELAY_SECONDS = 1.0  # a shorter load shows no bar
_STOP_SECONDS = 0.8  # most that is waited for what an error or interrupt stopped


# ── transport ─────────────────────────────────────────────────────────────────────────────────


@frozen
class Transport:
    """How places are reached: with what client, and how patiently. One policy for all of them."""

    transport_params: Params = field(default=None, repr=False)
    retries: int = RETRIES  # how often in a row to try again what brought nothing
    timeout: float | None = None  # seconds without a new byte, over all attempts
    cached: bool = False  # or by way of a copy on this machine
    group: Any = field(default=None, repr=False)  # of processes, of which each reads a share

    @property
    def patience(self) -> float:
        """Give the seconds without a new byte after which a place counts as unreachable."""
        return 3 * TIMEOUT_SECONDS if self.timeout is None else self.timeout

    @property
    def params(self) -> Params:
        """Give what the handlers of places take: a silent connection leaves time for two more."""
        if self.timeout is None:
            return self.transport_params
        return {"timeout": self.timeout / 3, **(self.transport_params or {})}


class _Attempts:
    """Counts the attempts in a row that brought nothing, and waits before the next one."""

    def __init__(self, transport: Transport, stopped: threading.Event) -> None:
        self._transport, self._stopped = transport, stopped
        self._count, self._since = 0, time.monotonic()

    def wait(self, problem: UnreachableError, *, progressed: bool = False) -> None:
        """Wait twice as long as before, or as long as the server asks for; or give up.

        Args:
            problem: what went wrong.
            progressed: whether something came before it did: then that was no lost attempt.

        Raises:
            UnreachableError: the problem, after too many attempts, or too long.
        """
        if progressed:
            self._count, self._since = 0, time.monotonic()
        else:
            self._count += 1
        jitter = random.uniform(0.5, 1)  # noqa: S311 - so that ranks do not return all at once
        seconds = max(problem.retry_after, jitter * BACKOFF_SECONDS * 2 ** (self._count - 1))
        silence = time.monotonic() - self._since
        if self._stopped.is_set():
            raise problem
        if self._count > self._transport.retries or silence + seconds > self._transport.patience:
            problem.add_note(
                f"given up after {self._count} attempts in {silence:.0f} s that brought nothing"
                + (f"; the server asks to wait {seconds:.0f} s" if problem.retry_after else "")
            )
            raise problem
        if progressed:
            log.info("goes on at %s: %s", problem.place, problem.problem)
        else:
            tries = f"attempt {self._count} of {self._transport.retries + 1}"
            log.warning("%s at %s: %s", tries, problem.place, problem.problem)
        self._stopped.wait(seconds)


# ── source ────────────────────────────────────────────────────────────────────────────────────


@frozen
class Source:
    """One object, pinned: where all bytes of a load come from."""

    uri: URI
    version: Version | None = None
    transport: Transport = field(factory=Transport, repr=False)
    moved: list[int] = field(factory=list, repr=False)  # bytes, by each read
    stopped: threading.Event = field(factory=threading.Event, repr=False)  # by a failure elsewhere

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other ranks as what is read; how, and with what account, is each one's own."""
        return Source, (self.uri, self.version)

    @property
    def held(self) -> bool:
        """Tell whether it is in this process's memory, or part of it."""
        parts = self.uri.shards if isinstance(self.uri, JoinedURI) else ()
        return isinstance(self.uri, _HeldURI) or any(part.held for part in parts)

    @property
    def size(self) -> int:
        """Give the object's size in bytes (0 before anything was read)."""
        return self.version.size if self.version else 0

    def read(self, offset: int, arrays: Sequence[Any], notify: Notify | None = None) -> Version:
        """Fill the arrays from an offset on; where a read breaks off, go on with what is missing.

        Raises:
            CheckpointError: as `read_range`, after too many attempts that brought nothing.
        """
        return self._fill(offset, lambda: Buffers(*arrays, notify=self._hearing(notify)))

    def read_through(
        self, offset: int, size: int, views: Iterable[memoryview], notify: Notify
    ) -> None:
        """Read a pinned object's bytes through views that are filled one after the other."""
        buffers = Buffers.lazily(views, size, notify=self._hearing(notify))
        self._fill(offset, lambda: buffers)

    def _hearing(self, notify: Notify | None) -> Notify:
        def hear(count: int) -> None:
            if self.stopped.is_set():
                raise CancelledError
            if notify:
                notify(count)

        return hear

    def _fill(self, offset: int, make_buffers: Callable[[], Buffers]) -> Version:
        buffers = make_buffers()
        attempts, best = _Attempts(self.transport, self.stopped), 0
        while True:
            known = buffers.filled
            start = offset + known
            try:
                version = read_range(self.uri, start, buffers, self.version, self.transport.params)
            except UnreachableError as err:
                problem: UnreachableError = err
            else:
                first = max(0, version.size + offset) if offset < 0 else offset
                if buffers.filled >= min(buffers.size, version.size - first):
                    return version
                problem = UnreachableError(
                    self.uri,
                    f"the answer ended early, {buffers.filled} bytes after byte {first}",
                    "check the network and the server",
                )
            finally:
                self.moved.append(buffers.filled - known)
            attempts.wait(problem, progressed=buffers.filled > best)
            best = max(best, buffers.filled)
            if self.version is None:  # what came may be another object's than what is to come
                buffers = make_buffers()


def locate(place: str | os.PathLike[str] | URI, transport: Transport) -> URI:
    """Tell what place a text names, and where its bytes are.

    Raises:
        CheckpointError: as `parse_uri` and `resolve`, after too many attempts.
    """
    return _patiently(transport, partial(resolve, parse_uri(place), transport.params))


def find_version(uri: URI, transport: Transport) -> Version:
    """Ask a place, in one request, which object it has.

    Raises:
        CheckpointError: as `read_version`, after too many attempts that brought nothing; or it is
            empty.
        UnrangedError: it can tell only of what it gives whole.
    """
    version = _patiently(transport, partial(read_version, uri, transport.params))
    if not version.size:
        raise empty_file(uri)
    return version


def _patiently(transport: Transport, ask: Callable[[], _T]) -> _T:
    attempts = _Attempts(transport, threading.Event())
    while True:
        try:
            return ask()
        except UnreachableError as err:
            attempts.wait(err)


def stream_whole(uri: URI, sink: BinaryIO, transport: Transport, notify: Notify) -> None:
    """Copy all of an object that comes in no parts to a file."""
    attempts = _Attempts(transport, threading.Event())
    while True:
        sink.seek(0)
        sink.truncate()
        try:
            for chunk in _chunks(uri, transport):
                sink.write(chunk)
                notify(len(chunk))
        except UnreachableError as err:
            attempts.wait(err)
        else:
            return


def stream_pinned(uri: URI, sink: Any, transport: Transport) -> None:
    """Copy all of one version of an object to what can only be written on."""
    try:
        version = find_version(uri, transport)
        source = Source(uri, version, transport)
        room = memoryview(bytearray(min(PART_BYTES, version.size)))
        for start in range(0, version.size, PART_BYTES):
            part = room[: version.size - start]
            source.read(start, [part])
            sink.write(part)
    except UnrangedError:  # told before the first byte
        for chunk in _chunks(uri, transport):
            sink.write(chunk)


def _chunks(uri: URI, transport: Transport) -> Iterator[bytes]:
    with explained(uri), closing(open_stream(uri, transport.params)) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


# ── blocks ────────────────────────────────────────────────────────────────────────────────────


@frozen
class _HeldURI(URI):
    """A place in memory: an object that had to be taken whole."""

    origin: URI
    data: memoryview = field(repr=False, eq=False)

    @property
    def filename(self) -> str:
        return self.origin.filename

    def __reduce__(self) -> tuple[Any, ...]:
        """Stay where it is: another rank learns that there is such a thing."""
        return _HeldURI, (self.text, self.origin, b"")


@read_range.register
def _(
    uri: _HeldURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,  # noqa: ARG001 - memory does not change
    transport_params: Params = None,  # noqa: ARG001
) -> Version:
    size = len(uri.data)
    buffers.write(uri.data[max(0, size + offset) if offset < 0 else offset :])
    return Version(size)


@frozen
class JoinedURI(URI):
    """Several objects as one: each begins at a multiple of `SHARD_BYTES`."""

    shards: tuple[Source, ...] = field(repr=False, eq=False)

    @property
    def connections(self) -> int:  # type: ignore[override] # as many as its first one allows
        return self.shards[0].uri.connections

    @property
    def filename(self) -> str:
        return self.text.rpartition("/")[2]


@read_range.register
def _(
    uri: JoinedURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,  # noqa: ARG001 - each shard has its own
    transport_params: Params = None,
) -> Version:
    number, start = divmod(offset, SHARD_BYTES)
    shard = uri.shards[number]
    try:
        version = read_range(shard.uri, start, buffers, shard.version, transport_params)
    except UnrangedError as err:
        raise UnreachableError(
            shard.uri, "the server gave a range of it, and then another none", "try again"
        ) from err
    return Version(number * SHARD_BYTES + version.size)


@connect.register
def _(uri: JoinedURI, transport_params: Params = None) -> None:
    connect(uri.shards[0].uri, transport_params)


def join(place: URI, shards: Sequence[Source], account: Source) -> Source:
    """Make one source of several, which moves, and is stopped, on the account of one of them."""
    version = Version(sum(shard.size for shard in shards))
    return evolve(account, uri=JoinedURI(place.text, tuple(shards)), version=version)


class _Blocks(io.RawIOBase):
    """A seekable file over a source that keeps what it has read, and asks for the rest."""

    def __init__(self, source: Source, blocks: dict[int, memoryview]) -> None:
        self._source, self._blocks, self._position = source, blocks, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._source.size - self._position))
        filled = 0
        while filled < wanted:
            block = self._block(self._position, wanted - filled)[: wanted - filled]
            view[filled : filled + len(block)] = block
            filled += len(block)
            self._position += len(block)
        return filled

    def _block(self, position: int, length: int) -> memoryview:
        """Give what is known from a position on; if nothing is, fetch all up to what is."""
        for start, block in self._blocks.items():
            if start <= position < start + len(block):
                return block[position - start :]
        end = min(start for start in (*self._blocks, self._source.size) if start > position)
        block = memoryview(bytearray(min(end - position, max(length + AHEAD_BYTES, BLOCK_BYTES))))
        self._source.read(position, [block])
        self._blocks[position] = block
        return block


def open_source(uri: URI, transport: Transport) -> tuple[Source, BinaryIO]:
    """Ask for the first and the last block at once; they tell size and version, too."""
    known = find_version(uri, transport) if uri.asked_first else None
    source = Source(uri, known, transport)
    head, tail = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    tasks = [partial(source.read, 0, [head]), partial(source.read, -BLOCK_BYTES, [tail])]
    version, last = in_parallel(tasks, source)
    pinned(uri, last, version)
    if not version.size:
        raise empty_file(uri)
    blocks = {0: memoryview(head)[: version.size]}
    if version.size > BLOCK_BYTES:  # else the first block is all there is
        blocks[version.size - BLOCK_BYTES] = memoryview(tail)
    source = evolve(source, version=version)
    return source, cast("BinaryIO", _Blocks(source, blocks))


def open_first(source: Source) -> tuple[Source, BinaryIO]:
    """Ask for the first block, which tells size and version, too."""
    head = bytearray(BLOCK_BYTES)
    source = evolve(source, version=source.read(0, [head]))
    if not source.size:
        raise empty_file(source.uri)
    return source, cast("BinaryIO", _Blocks(source, {0: memoryview(head)[: source.size]}))


def hold(uri: URI, data: bytes | bytearray | memoryview) -> tuple[Source, BinaryIO]:
    """Make a source of bytes in memory."""
    if not data:
        raise empty_file(uri)
    view = memoryview(data)
    source = Source(_HeldURI(uri.text, uri, view), Version(len(view)))
    return source, cast("BinaryIO", _Blocks(source, {0: view}))


def read_whole(source: Source, progress: Progress) -> bytearray:
    """Take all of an object, in parallel parts."""
    data = bytearray(source.size)
    whole = memoryview(data)
    size = part_bytes(source, source.size)
    with shown(source.uri, source.size, progress) as notify:
        tasks = [
            partial(source.read, offset, [whole[offset : offset + size]], notify)
            for offset in range(0, source.size, size)
        ]
        in_parallel(tasks, source)
    return data


# ── parallel ──────────────────────────────────────────────────────────────────────────────────


def part_bytes(source: Source, total: int) -> int:
    """Choose how much to ask for at once: each connection a part, as far as that makes sense."""
    return min(max(total // source.uri.connections, PART_BYTES), LONG_PART_BYTES)


def in_parallel(tasks: Sequence[Callable[[], _T]], source: Source) -> list[_T]:
    """Run what reads from a source, and give the results in order.

    The first failure or interrupt is raised at once, and stops the source and all that reads it.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    connect(source.uri, source.transport.params)
    at_work: set[int] = set()  # identifiers of threads

    def run(task: Callable[[], _T]) -> _T:
        at_work.add(threading.get_ident())
        try:
            return task()
        finally:
            at_work.discard(threading.get_ident())

    pool = ThreadPoolExecutor(source.uri.connections, "anemoi-ckpt")
    futures = [pool.submit(run, task) for task in tasks]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException as err:
        source.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        running = [future for future in futures if not future.cancelled()]
        _stop(running, at_work)
        pool.shutdown(wait=all(future.done() for future in running))
        if isinstance(err, AccessDeniedError):
            forget_clients()  # what was stopped may have made one since
        raise
    pool.shutdown()
    return [future.result() for future in futures]


def _stop(futures: Sequence[Future[Any]], at_work: set[int]) -> None:
    """Wait for what was stopped; what waits for a silent server finds its socket shut."""
    end = time.monotonic() + _STOP_SECONDS
    while wait(futures, timeout=0.02).not_done and time.monotonic() < end:
        for ident, frame in sys._current_frames().items():  # noqa: SLF001 - documented
            for each in _frames(frame) if ident in at_work else ():
                _shut(each.f_locals)


def _frames(frame: Any) -> Iterator[Any]:
    """Give the frames of a thread that are in Python's own modules of sockets, innermost first."""
    while frame is not None and frame.f_globals.get("__name__") in {
        "socket",
        "ssl",
        "urllib3.util.connection",
    }:
        yield frame
        frame = frame.f_back


def _shut(names: dict[str, Any]) -> None:
    """Shut the socket that a function works on. No SDK can be told to let go of a request."""
    for name in ("self", "sock"):
        found = getattr(names.get(name), "_sock", names.get(name))
        if isinstance(found, socket.socket):
            with suppress(OSError):  # it is shut already
                found.shutdown(socket.SHUT_RDWR)


# ── progress ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def shown(uri: URI, total: int | None, progress: Progress) -> Iterator[Notify]:
    """Show how many of the bytes have come; the total is None where the place does not tell it."""
    lock = threading.Lock()
    if callable(progress):
        done = 0

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done = min(done + size, total or sys.maxsize)  # headers come, too
                progress(done, total)

        yield count
    elif progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a notebook without ipywidgets gets a bar of text
            from tqdm.auto import tqdm  # noqa: PLC0415 - only where it is shown

        delay = PROGRESS_DELAY_SECONDS if progress is None else 0
        with tqdm(total=total, desc=uri.filename, delay=delay, unit="B", unit_scale=True) as bar:

            def advance(size: int) -> None:
                with lock:
                    bar.update(min(size, (total or sys.maxsize) - bar.n))

            yield advance
    else:
        yield _ignore


def _ignore(_size: int) -> None:
    """Show nothing."""
