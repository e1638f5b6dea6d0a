"""Open files and streams of the caller's own: `io.BytesIO`, fsspec's, a member of a tar."""

from __future__ import annotations

import io
import os
import threading
from typing import Any, BinaryIO, ClassVar, TypeAlias, cast

from attrs import field, frozen

from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Entry,
    Params,
    UnrangedError,
    Version,
    open_stream,
    parse_uri,
    pinned,
    read_range,
)
from _anemoi_ckpt.places.explained import explained

Place: TypeAlias = "str | os.PathLike[str] | URI | Entry | BinaryIO"

# ── URI ───────────────────────────────────────────────────────────────────────────────────────


@frozen
class StreamURI(URI):
    """A binary stream that is open, from where it stands. It is left where it was, and open."""

    stream: Any = field(repr=False, eq=id)
    start: int | None = None  # None where it cannot seek
    _lock: Any = field(factory=threading.Lock, repr=False, eq=False)

    connections: ClassVar[int] = 1
    is_users: ClassVar[bool] = True

    @property
    def filename(self) -> str:
        """The last part of its name, if it has one."""
        return self.text.rpartition("/")[2].strip("<>")

    def __reduce__(self) -> Any:
        """Refuse: a stream is this process's own."""
        raise TypeError(f"{self.text} is open in this process alone; give a path or a URL")


# ── parse ─────────────────────────────────────────────────────────────────────────────────────


_FILES = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


def is_stream(place: object) -> bool:
    """Tell whether something is an open file, rather than the name of one."""
    return hasattr(place, "read") and not isinstance(place, str | os.PathLike | URI | Entry)


def parse_stream(stream: Any) -> StreamURI:
    """Take a stream as a place.

    Raises:
        TypeError: it is a stream of text.
    """
    # an unpacking stream, such as gzip's, has the name of what it reads, not of what it gives
    name = getattr(stream, "name", None) if isinstance(stream, _FILES) else None
    text = name if isinstance(name, str) else f"<{type(stream).__name__}>"
    if isinstance(stream, io.TextIOBase):
        raise TypeError(f"{text} is open as text; open it with mode 'rb'")
    seekable = getattr(stream, "seekable", None)
    return StreamURI(text, stream, stream.tell() if seekable and seekable() else None)


def parse_place(place: Any) -> URI:
    """Tell what kind of place a text names, or take an open file as one.

    Raises:
        TypeError: it is none of these.
        InvalidURIError: as `parse_uri`.
    """
    return parse_stream(place) if is_stream(place) else parse_uri(place)


# ── open ──────────────────────────────────────────────────────────────────────────────────────


class _Borrowed(io.RawIOBase):
    """A stream that stays open when this is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@open_stream.register
def open_borrowed(uri: StreamURI, transport_params: Params = None) -> BinaryIO:  # noqa: ARG001 - it is open
    """Give the stream from where it stands."""
    return cast("BinaryIO", _Borrowed(uri.stream))


# ── range ─────────────────────────────────────────────────────────────────────────────────────


@read_range.register
def read_stream_range(
    uri: StreamURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,
    transport_params: Params = None,  # noqa: ARG001 - it is open
) -> Version:
    """Seek, and read; then seek back."""
    if uri.start is None:
        raise UnrangedError
    with uri._lock, explained(uri):  # noqa: SLF001 - of this module
        uri.stream.seek(0, os.SEEK_END)
        size = uri.stream.tell() - uri.start
        try:
            version = pinned(uri, Version(size), pin)
            uri.stream.seek(uri.start + (max(0, size + offset) if offset < 0 else offset))
            buffers.readfrom(_Borrowed(uri.stream))
        finally:
            uri.stream.seek(uri.start)
    return version
