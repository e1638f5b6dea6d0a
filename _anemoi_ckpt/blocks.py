"""The first and the last block of an object, and a file that reads on from there.

The first block of a torch zip holds the pickle, the last one the directory. Both are asked for at
once, and tell the object's size and version, too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, cast

from attrs import evolve
from zlib_ng import zlib_ng

from _anemoi_ckpt.parallel import in_parallel, part_bytes
from _anemoi_ckpt.places import URI, NoSuffixError, UnrangedError, Version, pinned
from _anemoi_ckpt.places.explained import empty_file
from _anemoi_ckpt.places.memory import MemoryURI
from _anemoi_ckpt.progress import Progress, shown
from _anemoi_ckpt.transport import (
    Source,
    Transport,
    find_version,
    naming_similar,
    stream_whole,
)

BLOCK_BYTES = 64 * 1024  # first and last block: holds pickle and directory of most checkpoints
AHEAD_BYTES = 4 * 1024  # read on past a record: the small ones after the pickle come with it


class Blocks(io.RawIOBase):
    """A seekable file over a source, which keeps what it has read and asks for the rest."""

    def __init__(self, source: Source, blocks: dict[int, memoryview]) -> None:
        """Take the blocks that are there, by their offsets."""
        self._source, self._blocks, self._position = source, blocks, 0
        self._next, self._ahead = -1, 0  # where the last request ended, and how much it asked for

    def seekable(self) -> bool:
        """Tell that it is."""
        return True

    def readable(self) -> bool:
        """Tell that it is."""
        return True

    def tell(self) -> int:
        """Give the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read from the blocks, and fetch what they do not have."""
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
        """Give what is there from a position on; if nothing is, fetch all up to what is there.

        Who reads on and on, as in a legacy file, which does not tell how long its pickle is, gets
        twice as much with each request. What is near the end comes with it: a zip's directory.
        """
        for start, block in self._blocks.items():
            if start <= position < start + len(block):
                return block[position - start :]
        self._ahead = max(BLOCK_BYTES, 2 * self._ahead if position == self._next else 0)
        end = min(start for start in (*self._blocks, self._source.size) if start > position)
        start = position
        if end == self._source.size:
            known = max(start + len(block) for start, block in self._blocks.items())
            start = min(position, max(known, end - BLOCK_BYTES))
        count = max(position - start + length + AHEAD_BYTES, self._ahead)
        block = memoryview(bytearray(min(end - start, count)))
        try:
            self._source.read(start, [block])
        except UnrangedError:
            self._source = whole(self._source)
            self._source.read(start, [block])
        self._blocks[start] = block
        self._next = start + len(block)
        return block[position - start :]


def first_and_last(uri: URI, transport: Transport) -> tuple[Source, BinaryIO]:
    """Ask for the first and the last block at once.

    Raises:
        CheckpointError: they cannot be read, or the object is empty.
        UnrangedError: the place can only give the whole object.
    """
    version = find_version(uri, transport) if uri.asked_first else None
    source = Source(uri, version, transport)
    head, tail = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    tasks: list[Callable[[], Any]] = [
        partial(source.read, 0, [head]),
        partial(_read_end, source, tail),
    ]
    with naming_similar(uri, transport):
        version, last = cast("tuple[Version, Version | None]", in_parallel(tasks, source))
    if not version.size:
        raise empty_file(uri)
    if last is None and version.size > BLOCK_BYTES:
        at_end = version.size - BLOCK_BYTES
        last = evolve(source, version=version).read(at_end, [tail])
    pinned(uri, last or version, version)
    first = memoryview(head)[: version.size]
    blocks = {0: first}
    if version.size > BLOCK_BYTES:  # otherwise the first block is all there is
        blocks[version.size - BLOCK_BYTES] = memoryview(tail)
    source = evolve(source, version=version, beginning=_beginning(first))
    return source, cast("BinaryIO", Blocks(source, blocks))


def _beginning(first: memoryview) -> tuple[int, int]:
    return len(first), zlib_ng.crc32(first)


def _read_end(source: Source, tail: bytearray) -> Version | None:
    """Read the end of an object; None where that is only given by its offset."""
    try:
        return source.read(-len(tail), [tail])
    except NoSuffixError:
        return None


def first_alone(source: Source) -> tuple[Source, BinaryIO]:
    """Ask for the first block.

    Raises:
        CheckpointError: it cannot be read, or the object is empty.
        UnrangedError: the place can only give the whole object.
    """
    head = bytearray(BLOCK_BYTES)
    version = source.read(0, [head])
    if not version.size:
        raise empty_file(source.uri)
    first = memoryview(head)[: version.size]
    source = evolve(source, version=version, beginning=_beginning(first))
    return source, cast("BinaryIO", Blocks(source, {0: first}))


def in_memory(uri: URI, data: bytes | bytearray) -> tuple[Source, BinaryIO]:
    """Make a source of an object's bytes.

    Raises:
        NotACheckpointError: there are none.
    """
    if not data:
        raise empty_file(uri)
    view = memoryview(data)
    source = Source(MemoryURI(uri.text, uri, view), Version(len(view)))
    return source, cast("BinaryIO", Blocks(source, {0: view}))


def read_whole(source: Source, progress: Progress) -> bytearray:
    """Read all of an object, in parallel parts."""
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


def whole(source: Source) -> Source:
    """Take a pinned object in one piece, whose server gives no more ranges that belong together.

    Raises:
        ChangedError: it has another size by now, or begins differently.
    """
    data = streamed(source.uri, source.transport, progress=False)
    source.require_beginning(data)
    source.moved.append(len(data))
    return in_memory(source.uri, data)[0]


def streamed(uri: URI, transport: Transport, progress: Progress) -> bytes:
    """Read all of an object from one stream.

    Raises:
        CheckpointError: as `open_stream`, after too many attempts that brought nothing.
    """
    data = io.BytesIO()
    with shown(uri, None, progress) as notify:
        stream_whole(uri, data, transport, notify)
    # BytesIO gives its memory away without a copy. A view of it (`getbuffer`) would keep the file,
    # too, which cannot be closed before the view is gone: if the garbage collector meets both at
    # once, Python reports a BufferError (since 3.13; before, it kept silent).
    return data.getvalue()
