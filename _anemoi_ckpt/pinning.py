"""A checkpoint that a SHA-256 pins: what is loaded is of the very bytes that have the digest.

A CRC-32 tells damage. Whoever can write an object can write its CRC-32s, too, so only a digest that
the user has from elsewhere tells that an object is the one that was meant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import evolve

from _anemoi_ckpt.downloading import Transfer, download_to
from _anemoi_ckpt.errors import CorruptError
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.places import URI
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.progress import Progress
from _anemoi_ckpt.transport import PART_BYTES, Transport


@contextmanager
def brought(place: URI, transport: Transport, progress: Progress) -> Iterator[URI]:
    """Give where to read a place whose digest is asked for: from a copy that has it.

    What a server sends once it may send otherwise next time, so it is asked once. A file of this
    machine is where it is: `check_digest` reads it, and a later read of another one is an error.

    Raises:
        CorruptError: it has another digest.
        CheckpointError: it cannot be copied.
    """
    if transport.sha256 is None or transport.cached or isinstance(place, LocalURI):
        yield place
        return
    with TemporaryDirectory(prefix="anemoi-ckpt-") as folder:
        target = Path(folder, place.filename or "checkpoint")
        sha256 = transport.sha256
        download_to(target, Transfer(place, transport, progress, sha256, resume=False))
        yield LocalURI(place.text, str(target))  # errors name the place as it was given


def check_digest(checkpoint: Opened, place: URI) -> None:
    """Check the digest of a file that is read where it is, of the version that was opened.

    Raises:
        CorruptError: it has another one.
        ChangedError: the file was replaced since.
    """
    source = evolve(checkpoint.origin, moved=[])
    wanted = source.transport.sha256
    if wanted is None or source.transport.cached or not isinstance(place, LocalURI):
        return
    digest, room = hashlib.sha256(), memoryview(bytearray(min(PART_BYTES, source.size)))
    for start in range(0, source.size, PART_BYTES):
        view = room[: source.size - start]
        source.read(start, [view])
        digest.update(view)
    if digest.hexdigest() != wanted.lower():
        raise CorruptError(
            place,
            f"its sha256 is {digest.hexdigest()}, and not the one asked for, {wanted.lower()}",
            "the stored file is damaged, or another than was meant",
        )
