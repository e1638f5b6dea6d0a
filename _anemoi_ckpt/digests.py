"""Digests of whole objects, computed as their bytes come by."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from zlib_ng import zlib_ng

_STRONGEST_FIRST = ("sha256", "sha512", "crc32c", "crc32", "md5")


class Hasher(Protocol):
    """What computes a digest, as those of hashlib do."""

    def update(self, data: Any, /) -> None:
        """Take the next bytes."""

    def digest(self) -> bytes:
        """Give the digest of all bytes so far."""


class _CRC32:
    """CRC-32, as zip and HTTP's Repr-Digest have it."""

    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: Any) -> None:
        self._crc = zlib_ng.crc32(data, self._crc)

    def digest(self) -> bytes:
        return int(self._crc).to_bytes(4, "big")


class _CRC32C:
    """CRC-32C, as Google's package computes it: that takes bytes alone."""

    def __init__(self, checksum: Any) -> None:
        self._checksum = checksum

    def update(self, data: Any) -> None:
        self._checksum.update(bytes(data))

    def digest(self) -> bytes:
        return bytes(self._checksum.digest())


def hasher(name: str) -> Hasher | None:
    """Begin a digest; None if no installed package can compute it."""
    if name == "crc32":
        return _CRC32()
    if name == "crc32c":
        try:
            return _CRC32C(importlib.import_module("google_crc32c").Checksum())
        except ImportError:
            return None
    return hashlib.new(name, usedforsecurity=False)


def strongest_first(digests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Give the digests of an object that we can compute, the strongest first."""
    return ((name, digests[name]) for name in _STRONGEST_FIRST if name in digests)
