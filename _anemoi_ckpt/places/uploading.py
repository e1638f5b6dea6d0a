"""Uploads to a store through smart-open, committed where all went well and aborted otherwise."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from _anemoi_ckpt.errors import InvalidURIError
from _anemoi_ckpt.places import URI
from _anemoi_ckpt.places.explained import explained


@contextmanager
def committed(uri: URI, version: object, opened: Callable[[], Any]) -> Iterator[BinaryIO]:
    """Close a store's stream if the block ends well, which commits the upload; or abort it.

    Args:
        uri: where to.
        version: which version the URI names, if any: nothing can be written to that.
        opened: makes smart-open's stream.

    Raises:
        InvalidURIError: the URI names a version.
        CheckpointError: as the store has it.
    """
    if version is not None:
        raise InvalidURIError(uri, "names a version that is there", "leave the version out")
    with explained(uri):
        stream = opened()
    try:
        yield cast("BinaryIO", _ExplainedStream(uri, stream))
        with explained(uri):
            stream.close()
    except BaseException:
        with explained(uri):
            stream.terminate()
        raise


class _ExplainedStream(io.RawIOBase):
    """A store's stream: what the store raises is explained, what the writer raises is not."""

    def __init__(self, uri: URI, stream: Any) -> None:
        self._uri, self._stream = uri, stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with explained(self._uri):
            return int(self._stream.write(data))
