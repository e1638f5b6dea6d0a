"""One object as a source of bytes: pinned to one version, and tried again by one policy.

transport · attempts · source · write
"""

from __future__ import annotations

import _thread
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, BinaryIO, TypeVar

from attrs import evolve, field, frozen
from zlib_ng import zlib_ng

from _anemoi_ckpt.errors import (
    ChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    UnreachableError,
)
from _anemoi_ckpt.globs import suggestion
from _anemoi_ckpt.places import (
    CHUNK_BYTES,
    TIMEOUT_SECONDS,
    URI,
    Buffers,
    Entry,
    Notify,
    Page,
    Params,
    UnknownParamError,
    UnrangedError,
    Version,
    all_pages,
    check_params,
    list_page,
    open_stream,
    open_writer,
    read_range,
    read_version,
    resolve,
    sibling,
)
from _anemoi_ckpt.places.explained import empty_file, explained
from _anemoi_ckpt.places.interrupts import Stop, heeded
from _anemoi_ckpt.places.joined import JoinedURI
from _anemoi_ckpt.places.memory import MemoryURI
from _anemoi_ckpt.places.streams import Place, parse_place
from _anemoi_ckpt.places.uploading import attempting, register_attempts
from _anemoi_ckpt.threads import heard

log = logging.getLogger("anemoi_ckpt")

_T = TypeVar("_T")
PART_BYTES = 8 * 1024**2  # least for one request: long against a round trip
RETRIES = 5
BACKOFF_SECONDS = 0.2  # before the first attempt anew; twice as long before each one after
LONGEST_BACKOFF_SECONDS = 30.0  # a server may ask for longer with Retry-After
SAME_SECONDS = 5.0  # in which requests that fail side by side have one cause, told once
_Told = dict[tuple[str, int], float]  # when a place's attempt of this number was told as failed
_random = random.SystemRandom()  # for jitter: forked processes wait differently; no seed changes


# ── transport ─────────────────────────────────────────────────────────────────────────────────


@frozen
class Transport:
    """How places are reached: with what client, and how patiently. One policy for all of them."""

    transport_params: Params = field(default=None, repr=False)
    retries: int = RETRIES  # attempts in a row that bring nothing, after the first
    timeout: float | None = None  # seconds without a new byte, over all attempts
    cached: bool = False  # by way of a copy on this machine
    group: Any = field(default=None, repr=False)  # of processes, each of which reads a share
    sha256: str | None = None  # of the whole object, which must have it

    @property
    def patience(self) -> float:
        """Seconds without a new byte after which a place counts as unreachable."""
        return 3 * TIMEOUT_SECONDS if self.timeout is None else self.timeout

    @property
    def params(self) -> Params:
        """What the handlers of places take: a silent connection leaves time for two more."""
        if self.timeout is None:
            return self.transport_params
        return {"timeout": self.timeout / 3, **(self.transport_params or {})}


# ── attempts ──────────────────────────────────────────────────────────────────────────────────


def attempted(
    transport: Transport,
    attempt: Callable[[], _T],
    stop: Stop | None = None,
    told: _Told | None = None,
) -> _T:
    """Attempt something until it goes well: the one loop of retries.

    One that brought something before it failed (`UnreachableError.progressed`) counts as none.
    Before each attempt anew this waits twice as long as before the last one, or as long as the
    server asks for.

    Args:
        transport: the policy.
        attempt: what is tried. It raises an `UnreachableError` where another attempt may go well.
        stop: ends it; that of the thread, if none is given.
        told: warnings, of this and of what is attempted beside it: of one attempt there is one.

    Raises:
        UnreachableError: the last one, after too many attempts that brought nothing, or too long.
    """
    stop = stop or heeded() or Stop()
    told = {} if told is None else told
    return heard(partial(_attempted, transport, attempt, stop, told), stop)


def _attempted(transport: Transport, attempt: Callable[[], _T], stop: Stop, told: _Told) -> _T:
    count, since = 0, time.monotonic()
    while True:
        try:
            return attempt()
        except UnreachableError as err:
            problem = err
        if problem.progressed:
            count, since = 0, time.monotonic()
        else:
            count += 1
        seconds = _backoff(count, problem.retry_after)
        silence = time.monotonic() - since
        if stop.is_set() or problem.lasting:
            raise problem
        if count > transport.retries or silence + seconds > transport.patience:
            raise _given_up(problem, count, silence, seconds)
        _tell(problem, count, transport, told)
        stop.wait(seconds)


def _backoff(count: int, retry_after: float) -> float:
    """Give the seconds to wait, of which a random share, so that ranks do not return at once."""
    longest = min(BACKOFF_SECONDS * 2.0 ** (min(count, 16) - 1), LONGEST_BACKOFF_SECONDS)
    return max(retry_after, _random.uniform(0.5, 1) * longest)


def _given_up(
    problem: UnreachableError, count: int, silence: float, seconds: float
) -> UnreachableError:
    problem.add_note(
        f"given up after {count} attempts in {silence:.0f} s that brought nothing"
        + (f"; the server asks to wait {seconds:.0f} s" if problem.retry_after else "")
    )
    return problem


def _tell(problem: UnreachableError, count: int, transport: Transport, told: _Told) -> None:
    if count:
        now, key = time.monotonic(), (problem.place, count)
        before = told.setdefault(key, now)  # in one step, which no other thread interrupts
        if before is not now and now - before < SAME_SECONDS:
            return
        told[key] = now
        tries = f"attempt {count} of {transport.retries + 1}"
        log.warning("%s at %s: %s", tries, problem.place, problem.problem)
    else:
        log.info("goes on at %s: %s", problem.place, problem.problem)


# ── source ────────────────────────────────────────────────────────────────────────────────────


@frozen
class Source:
    """One object, pinned: where all bytes of a load come from."""

    uri: URI
    version: Version | None = None
    transport: Transport = field(factory=Transport, repr=False)
    moved: list[int] = field(factory=list, repr=False)  # bytes, by each read
    stop: Stop = field(factory=Stop, repr=False)  # of all its reads, where one of them fails
    told: _Told = field(factory=dict, repr=False, eq=False)  # warnings of all its reads
    beginning: tuple[int, int] = (0, 0)  # how many of its first bytes were read, and their CRC-32

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other ranks as what is read. How, and with what account, each one knows."""
        return partial(Source, beginning=self.beginning), (self.uri, self.version)

    def require_beginning(self, data: Any) -> None:
        """Compare an object that came in one piece with what was read of the pinned one.

        Raises:
            ChangedError: it is another: its size or its beginning differ.
        """
        size, crc = self.beginning
        if len(data) != self.size or zlib_ng.crc32(memoryview(data)[:size]) != crc:
            raise ChangedError(
                self.uri,
                f"the object was replaced while it was read ({self.size} bytes are now"
                f" {len(data)}, or begin differently)",
                self.uri.when_changed,
            )

    @property
    def in_memory(self) -> bool:
        """Whether it, or a part of it, is in this process's memory."""
        parts = [part for part, _ in self.uri.parts] if isinstance(self.uri, JoinedURI) else []
        return any(isinstance(each, MemoryURI) for each in (self.uri, *parts))

    @property
    def size(self) -> int:
        """The object's size in bytes; 0 before anything was read."""
        return self.version.size if self.version else 0

    def read(self, offset: int, arrays: Sequence[Any], notify: Notify | None = None) -> Version:
        """Fill the arrays from an offset on; where a read breaks off, go on with what is missing.

        Raises:
            CheckpointError: as `read_range`, after too many attempts that brought nothing.
            CancelledError: the source was stopped.
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
            if self.stop.is_set():
                raise CancelledError
            if notify:
                notify(count)

        return hear

    def _fill(self, offset: int, make_buffers: Callable[[], Buffers]) -> Version:
        buffers = make_buffers()
        best = 0

        def fill() -> Version:
            nonlocal buffers, best
            if self.version is None and buffers.filled:
                buffers = make_buffers()  # what came may be of another object than what is to come
            if self.version is not None and buffers.size and buffers.filled == buffers.size:
                return self.version  # the last attempt failed after the last byte
            try:
                return self._fill_once(offset, buffers)
            except UnreachableError as err:
                err.progressed = buffers.filled > best
                best = max(best, buffers.filled)
                raise

        return attempted(self.transport, fill, self.stop, self.told)

    def _fill_once(self, offset: int, buffers: Buffers) -> Version:
        filled = buffers.filled
        try:
            version = read_range(
                self.uri, offset + filled, buffers, self.version, self.transport.params
            )
        finally:
            self.moved.append(buffers.filled - filled)
        first = max(0, version.size + offset) if offset < 0 else offset
        if buffers.filled < min(buffers.size, version.size - first):
            raise UnreachableError(
                self.uri,
                f"the answer ended early, {buffers.filled} bytes after byte {first}",
                "check the network and the server",
            )
        return version


def locate(place: Place, transport: Transport) -> URI:
    """Tell what place a text names, and where its bytes are.

    Raises:
        TypeError: it is no place, or one that does not read some of the transport_params.
        CheckpointError: as `parse_uri` and `resolve`, after too many attempts.
    """
    uri = parse_place(place)
    check_params(uri, transport.params)
    with naming_similar(uri, transport):
        located = attempted(transport, partial(resolve, uri, transport.params))
    check_params(located, transport.params)
    return located


def find_version(uri: URI, transport: Transport) -> Version:
    """Ask a place, in one request, which object it has.

    Raises:
        CheckpointError: as `read_version`, after too many attempts that brought nothing; or it is
            empty.
        UnrangedError: the place can only give the whole object.
    """
    with naming_similar(uri, transport):
        version = attempted(transport, partial(read_version, uri, transport.params))
    if not version.size:
        raise empty_file(uri)
    return version


@contextmanager
def naming_similar(uri: URI, transport: Transport) -> Iterator[None]:
    """Have the error of an object that is not there name those beside it whose names are like its.

    That takes one listing. Where it is refused, or the place lists nothing, no names are told;
    where it says that the bucket is missing, which an answer to HEAD cannot, the error says so.
    """
    try:
        yield
    except CheckpointNotFoundError as err:
        if err.lacks == "object":
            ask = partial(list_page, sibling(uri, ""), None, transport.params)
            try:
                page = attempted(evolve(transport, retries=0), ask)
            except CheckpointNotFoundError as other:
                if other.lacks == "bucket":
                    err.problem, err.remedy = other.problem, other.remedy
            except (CheckpointError, UnknownParamError) as other:
                log.debug("no similar names are told: %s", other)
            else:
                names = [_name_in(entry) for entry in page.entries]
                err.remedy = suggestion(uri.filename, names) or err.remedy
            err.name_place(err.place)
        raise


def _name_in(entry: Entry) -> str:
    """Give a name in a folder, with a slash if it is itself one."""
    return entry.uri.filename + "/" * entry.is_folder


def listed(uri: URI, transport: Transport, *, recursive: bool = False) -> Iterator[Entry]:
    """List the objects whose paths begin with that of `uri`, page by page as they are asked for.

    Raises:
        CheckpointError: as `list_page`, after too many attempts at one page.
    """

    def ask(token: str | None) -> Page:
        listing = partial(list_page, uri, token, transport.params, recursive=recursive)
        return attempted(transport, listing)

    # recursive: a store's marks of empty folders, and links to folders
    yield from (each for each in all_pages(ask) if not (recursive and each.is_folder))


def stream_whole(uri: URI, sink: BinaryIO, transport: Transport, notify: Notify) -> None:
    """Copy an object that comes in one piece to a file, from its beginning at each attempt."""

    def copy() -> None:
        sink.seek(0)
        sink.truncate()
        for chunk in _chunks(uri, transport):
            sink.write(chunk)
            notify(len(chunk))

    with naming_similar(uri, transport):
        attempted(transport, copy)


def stream_pinned(uri: URI, sink: Any, transport: Transport) -> None:
    """Copy all of one version of an object to a stream that cannot seek."""
    known: Version | None = None
    written = crc = 0
    try:
        known = find_version(uri, transport)
        source = Source(uri, known, transport)
        room = memoryview(bytearray(min(PART_BYTES, known.size)))
        for start in range(0, known.size, PART_BYTES):
            part = room[: known.size - start]
            source.read(start, [part])
            sink.write(part)
            written, crc = start + len(part), zlib_ng.crc32(part, crc)
    except UnrangedError:
        size = begun = 0
        for chunk in _chunks(uri, transport):
            again = chunk[: max(0, written - size)]  # which is written already
            size, begun = size + len(chunk), zlib_ng.crc32(again, begun)
            if size >= written and begun != crc:
                break
            sink.write(chunk[len(again) :])
        if begun != crc or (known is not None and known.size != size):
            problem = f"the object was replaced while it was read (byte {written} is now another's)"
            raise ChangedError(uri, problem, uri.when_changed) from None


def _chunks(uri: URI, transport: Transport) -> Iterator[bytes]:
    with explained(uri), closing(open_stream(uri, transport.params)) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if stop := heeded():
                stop.check()
            yield chunk


# ── write ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def open_for_writing(uri: URI, transport: Transport) -> Iterator[BinaryIO]:
    """Open a place for writing, all or nothing: each request of an upload is attempted anew.

    Raises:
        CheckpointError: as `open_writer`, after too many attempts at one request.
    """
    policy = partial(_upload_attempted, transport)
    with attempting(policy), open_writer(uri, transport.params) as stream:
        yield stream


def _upload_attempted(
    transport: Transport,
    call: Callable[[], _T],
    *,
    once: bool = False,
    seconds: float | None = None,
) -> _T:
    """Attempt a request of an upload; or only once, or for at most so many seconds."""
    patience = evolve(transport, retries=0) if once else transport
    if seconds is None:
        return attempted(patience, call)
    stop = Stop()
    _thread.start_new_thread(_stop_after, (stop, seconds))  # a bare one: as `threads` says
    with stop.heeded():
        return attempted(patience, call, Stop())


def _stop_after(stop: Stop, seconds: float) -> None:
    time.sleep(seconds)
    stop.set()


register_attempts(partial(_upload_attempted, Transport()))
