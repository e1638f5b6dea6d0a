"""Uploads to a store through smart-open, committed where all went well and aborted otherwise.

Each request of an upload is attempted by the one policy of retries, so a part that fails is sent
again, and not all that came before it. That policy is a room above this one, and registered here.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from _anemoi_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidURIError,
    UnreachableError,
)
from _anemoi_ckpt.places import URI
from _anemoi_ckpt.places.explained import explained

log = logging.getLogger("anemoi_ckpt")

_T = TypeVar("_T")
_ABORT_SECONDS = 0.5  # after a Ctrl-C: enough for one request of a store that answers


# ── attempts ──────────────────────────────────────────────────────────────────────────────────


class Attempts(Protocol):
    """A policy: calls a function until it goes well; `once`, or for at most so many seconds."""

    def __call__(
        self, call: Callable[[], Any], *, once: bool = False, seconds: float | None = None
    ) -> Any:
        """Give what the function gives."""


_chosen: ContextVar[Attempts] = ContextVar("_chosen")
_usual: list[Attempts] = []  # what `register_attempts` was given


def register_attempts(attempts: Attempts) -> None:
    """Set the policy of uploads for which `attempting` chooses none."""
    _usual[:] = [attempts]


@contextmanager
def attempting(attempts: Attempts) -> Iterator[None]:
    """Have the uploads that begin in the block follow a policy."""
    token = _chosen.set(attempts)
    try:
        yield
    finally:
        _chosen.reset(token)


# ── upload ────────────────────────────────────────────────────────────────────────────────────


class Upload:
    """The requests of one upload, of which none is sent once it has ended."""

    def __init__(self, uri: URI) -> None:
        """Take the policy that is chosen now."""
        self._uri, self._attempts, self._ended = uri, _chosen.get(_usual[0]), False

    def request(self, call: Callable[[], _T]) -> _T:
        """Send one request, as often as the policy has it.

        Raises:
            CheckpointError: as the store has it; or the upload has ended.
        """

        def attempt() -> _T:
            with explained(self._uri):
                return call()

        if self._ended:
            raise CheckpointError(self._uri, "its upload has ended", "write it anew")
        return cast("_T", self._attempts(attempt))

    def abort(self, terminate: Callable[[], object], problem: BaseException) -> None:
        """Remove what was sent, as far as what went wrong lets expect an answer to that."""

        def attempt() -> None:
            with explained(self._uri):
                terminate()

        heard = isinstance(problem, Exception)  # no KeyboardInterrupt
        once = not heard or isinstance(problem, UnreachableError)
        try:
            self._attempts(attempt, once=once, seconds=None if heard else _ABORT_SECONDS)
        except CheckpointNotFoundError:
            pass  # an attempt before has removed it, and its answer was lost
        except Exception as err:  # noqa: BLE001 - the problem is what the caller is to hear of
            said = getattr(err, "problem", type(err).__name__)
            log.warning("%r: parts of the upload may be left there: %s", self._uri, said)

    def end(self, stream: Any) -> None:
        """Send nothing from here on.

        The garbage collector closes a stream of smart-open's whose abort failed. That would commit
        the part of the object that was sent, and Python 3.13 prints what a finalizer raises.
        """
        self._ended = True
        stream.close = lambda: None


class Requesting:
    """An SDK's client some of whose methods are requests of an upload."""

    def __init__(self, client: Any, upload: Upload, requests: Mapping[str, Any]) -> None:
        """Take the client, and what is called for each of those methods."""
        self._client, self._upload, self._requests = client, upload, requests

    def __getattr__(self, name: str) -> Any:
        """Give a method that attempts a request, or the client's own attribute."""
        call = self._requests.get(name)
        if call is None:
            return getattr(self._client, name)

        def request(*args: Any, **kwargs: Any) -> Any:
            return self._upload.request(lambda: call(*args, **kwargs))

        return request


@contextmanager
def committed(uri: URI, version: object, opened: Callable[[Upload], Any]) -> Iterator[BinaryIO]:
    """Close a store's stream if the block ends well, which commits the upload; or abort it.

    Args:
        uri: where to.
        version: which version the URI names, if any: nothing can be written to that.
        opened: makes smart-open's stream, whose requests are the upload's.

    Raises:
        InvalidURIError: the URI names a version.
        CheckpointError: as the store has it.
    """
    if version is not None:
        raise InvalidURIError(uri, "names a version that is there", "leave the version out")
    upload = Upload(uri)
    with explained(uri):
        stream = opened(upload)
    try:
        yield cast("BinaryIO", _ExplainedStream(uri, stream))
        with explained(uri):
            stream.close()
    except BaseException as err:
        upload.abort(stream.terminate, err)
        raise
    finally:
        upload.end(stream)


class _ExplainedStream(io.RawIOBase):
    """A store's stream: what the store raises is explained, what the writer raises is not.

    A write that failed fails again at once: torch writes the end of its archive after an error,
    too, and would wait for the store once more.
    """

    def __init__(self, uri: URI, stream: Any) -> None:
        self._uri, self._stream = uri, stream
        self._problem: BaseException | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._problem is not None:
            raise self._problem
        try:
            with explained(self._uri):
                return int(self._stream.write(data))
        except BaseException as err:
            self._problem = err
            raise
