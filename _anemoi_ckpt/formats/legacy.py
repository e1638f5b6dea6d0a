"""The files of torch before 1.6: pickles in a row, and the storages behind them.

`torch.serialization._legacy_save` writes a magic number, a version, facts of the system, the
checkpoint, and the keys of its storages in the order of the file. Then come the storages, each
behind the count of its elements in eight bytes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, BinaryIO

import torch

from _anemoi_ckpt.errors import NotACheckpointError
from _anemoi_ckpt.formats import (
    Archive,
    Names,
    Record,
    blank_storage,
    storage_id,
    unpickled,
    unreadable,
)
from _anemoi_ckpt.pickles.reading import StorageOf, Trust, unpickle
from _anemoi_ckpt.pickles.rebuilds import StorageView
from _anemoi_ckpt.pickles.safe import BLANK

_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT_BYTES = 8


def read_legacy(place: object, file: BinaryIO, size: int) -> Archive:
    """Read the pickles, and where each storage lies.

    Args:
        place: for errors.
        file: a buffered one, at its start.
        size: of the file, in bytes.

    Raises:
        NotACheckpointError: a pickle, but not torch's.
        CorruptError: it makes no sense, or is not as long as it says.
    """
    sizes: dict[str, int] = {}
    blanks: dict[str, torch.UntypedStorage] = {}
    left = size

    def measured(pid: Any) -> Any:
        nonlocal left
        if pid[0] == "module":
            return pid[1]
        kind, key, count = storage_id(pid)
        if key not in sizes:
            sizes[key] = count * kind.itemsize
            left -= sizes[key]
            if left < 0:
                raise ValueError(f"its storages have more than the {size} bytes of the file")
            blanks[key] = blank_storage(sizes[key])
        return torch.storage.TypedStorage(wrap_storage=blanks[key], dtype=kind, _internal=True)

    pickles: Any = Within(file, size)
    with unreadable(place, "its pickle"):
        magic = unpickle(pickles, no_storage, trust={})
        if magic != _MAGIC:
            raise NotACheckpointError(
                place, "a pickle, but not one of torch.save", "write it with torch.save"
            )
        _version, system = (
            unpickle(pickles, no_storage, trust={}),
            unpickle(pickles, no_storage, trust={}),
        )
        begin = file.tell()
        unpickle(pickles, functools.partial(_viewed, measured), trust=BLANK)
        end = file.tell()
        keys = unpickle(pickles, no_storage, trust={})
        if any(type(key) is not str for key in keys):
            raise ValueError("the key of a storage is no text")
        offsets = itertools.accumulate(
            (sizes[key] + _COUNT_BYTES for key in keys), initial=file.tell() + _COUNT_BYTES
        )
        records = {
            key: Record(f"storage {key}", offset, offset, sizes[key], None)
            for key, offset in zip(keys, offsets, strict=False)
        }
        length = file.tell() + sum(sizes[key] + _COUNT_BYTES for key in keys)
        # torch.load reads the first of several objects in a row, and nothing of what follows
        if length > size or records.keys() != sizes.keys():
            raise ValueError(f"{length} bytes are needed, the file has {size}")
        file.seek(begin)
        pickled = file.read(end - begin)
        order = "little" if system["little_endian"] else "big"
    assemble = functools.partial(_assembled, pickled)
    return Archive(place, "torch legacy", records, assemble, byteorder=order)


class Within:
    """A file of which no more is asked for than it has: memory for that would be allocated."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        """Read from where the file is, up to a byte of it."""
        self._file, self._end = file, end
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        """Read as many bytes, or what is left."""
        return self._file.read(min(count, self._end - self._file.tell()))


def no_storage(pid: Any) -> Any:
    """Stand for what gives storages where a pickle has none.

    Raises:
        ValueError: it asks for one.
    """
    raise ValueError(f"a {type(pid).__name__} for a storage where none belongs")


def _assembled(pickled: bytes, storage_of: StorageOf, trust: Trust, names: Names) -> Any:
    return unpickled(pickled, functools.partial(_viewed, storage_of), trust, names)


def _viewed(storage_of: StorageOf, pid: Any) -> Any:
    """Give a storage, or the part of one that a persistent id of torch before 0.4 asks for."""
    *whole, view = pid  # of a module, the last is its source
    if type(view) is not tuple:
        return storage_of(pid)
    _key, first, count = view
    return StorageView(storage_of((*whole, None)), first, count)
