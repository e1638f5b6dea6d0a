"""How much may come of compressed bytes: what becomes more is a bomb, and no weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from _anemoi_ckpt.errors import CorruptError

GZIP_MARK = b"\x1f\x8b\x08"  # how what gzip deflated begins (RFC 1952 2.3)
SNIFFED_BYTES = 4096  # more than a header of gzip takes, with the names in it
_RATIO = 8  # weights deflate by a tenth, and a checkpoint with many zeros to a half
_LEAST_BYTES = 64 * 1024**2  # which is never too much


def unzipped_start(start: bytes) -> bytes:
    """Give the first bytes of what gzip packed, of which the packed first bytes are given."""
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(start, len(GZIP_MARK))
    except zlib.error:
        return b""


def refuse_bomb(place: object, packed: int, unpacked: int) -> None:
    """Refuse what becomes far larger, unpacked, than weights do.

    Args:
        place: whose it is.
        packed: bytes of it that were read.
        unpacked: bytes that these became, or claim to become.

    Raises:
        CorruptError: it is too much.
    """
    if unpacked > max(_RATIO * packed, _LEAST_BYTES):
        raise CorruptError(
            place,
            f"{packed} bytes claim to be {unpacked} unpacked",  # or more, which were not unpacked
            "do not trust it; if you do, unpack it by other means and load the file",
        )


def bounded(read: Callable[..., bytes], packed: Callable[[], int], place: object) -> Any:
    """Make a function that reads unpacked bytes refuse a bomb.

    Args:
        read: gives some of them.
        packed: tells how many packed bytes were read by now.
        place: whose they are.
    """
    unpacked = 0

    def read_bounded(*args: Any, **options: Any) -> bytes:
        nonlocal unpacked
        data = read(*args, **options)
        unpacked += len(data)
        refuse_bomb(place, packed(), unpacked)
        return data

    return read_bounded
