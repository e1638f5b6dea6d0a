"""A file that is written part by part, under a name of its own, and then takes another's place."""

from __future__ import annotations

import posixpath
import uuid
from typing import Any, Protocol

from _anemoi_ckpt.places import LONGEST_NAME
from _anemoi_ckpt.places.uploading import Upload

PART_BYTES = 8 * 1024**2  # in one attempt

_ENDING_BYTES = 60  # more than ".", ".part" and what makes a name the call's own


def hidden_name(path: str) -> str:
    """Name a hidden file beside a file, which no other call writes to."""
    folder, name = posixpath.split(path)
    kept = name.encode()[: LONGEST_NAME - _ENDING_BYTES].decode(errors="ignore")
    return posixpath.join(folder, f".{kept}.{uuid.uuid4().hex}.part")


class Parted(Protocol):
    """What a place does with such a file; each of these may be tried again."""

    def begin(self) -> None:
        """Make it, empty."""

    def store(self, offset: int, part: bytes) -> None:
        """Write a part of it; it has `offset` bytes, or more if an attempt before got so far."""

    def finish(self, size: int, *, again: bool) -> None:
        """Give it the target's name, where it has `size` bytes.

        With `again`, an attempt before may have done so, and its answer was lost.
        """

    def remove(self) -> None:
        """Remove it, if it is there."""


class PartWriter:
    """A stream as `uploading.committed` wants it: closing it commits, terminating it removes."""

    def __init__(self, file: Parted, upload: Upload) -> None:
        """Take a file, and the upload whose policy has each part tried again."""
        self._file, self._upload = file, upload
        self._room, self._offset, self._finished = bytearray(), 0, False
        upload.request(file.begin)

    def write(self, data: Any) -> int:
        """Take bytes, and send the parts that are full."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PART_BYTES):
            self._room += view[start : start + PART_BYTES]
            if len(self._room) >= PART_BYTES:
                self._send(PART_BYTES)
        return len(view)

    def _send(self, count: int) -> None:
        part = bytes(self._room[:count])
        self._upload.request(lambda: self._file.store(self._offset, part))
        self._offset += count
        del self._room[:count]

    def close(self) -> None:
        """Send what is left, and give the file the target's name."""
        if self._room:
            self._send(len(self._room))
        self._upload.request(self._finish)

    def _finish(self) -> None:
        again, self._finished = self._finished, True
        self._file.finish(self._offset, again=again)

    def terminate(self) -> None:
        """Remove the file."""
        self._file.remove()
