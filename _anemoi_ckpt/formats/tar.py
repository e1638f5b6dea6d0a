"""The tar archives of torch 0.1: facts of the system, storages, tensors and a pickle.

`torch.serialization._legacy_load` (``legacy_load``) reads them: ``storages`` holds a count, for
each storage a pickle of its key, device and type, the count of its elements in eight bytes and its
values, and a list of views; ``tensors`` holds a count and each tensor's key, storage, sizes,
strides and offset. The persistent ids in ``pickle`` are the keys of both, as text.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from _anemoi_ckpt.errors import NotACheckpointError
from _anemoi_ckpt.formats import Archive, Names, Record, storage_id, unpickled, unreadable
from _anemoi_ckpt.formats.legacy import Within, no_storage
from _anemoi_ckpt.formats.others import what_tar
from _anemoi_ckpt.pickles.reading import StorageOf, Trust, unpickle
from _anemoi_ckpt.pickles.rebuilds import CHECKED, StorageView

_BLOCK_BYTES = 512  # of a header; a member's bytes are filled up to a multiple of it (POSIX ustar)
_HEADER = struct.Struct("<100s24x12s20xc")  # name, …, size as octal digits, …, type
_MARK_OFFSET = 257
_MEMBERS = {"sys_info", "pickle", "tensors", "storages"}
_COUNT = struct.Struct("<q")

# By key: a storage's persistent id, or a tensor's storage, offset, size and stride.
_Objects = Mapping[int, tuple[Any, ...]]


def looks_like_tar(start: bytes) -> bool:
    """Tell, from its first bytes, whether a file is a tar archive."""
    return start[_MARK_OFFSET:].startswith(b"ustar")


def read_tar(place: object, file: BinaryIO, size: int) -> Archive:
    """Read the pickles, and where each storage lies.

    Args:
        place: for errors.
        file: a buffered one, at its start.
        size: of the file, in bytes.

    Raises:
        NotACheckpointError: a tar archive, but not torch's.
        CorruptError: it makes no sense, or is not as long as it says.
    """
    with unreadable(place, "its tar archive"):
        extents = _extents(file, size)
    if not extents.keys() >= _MEMBERS:
        raise NotACheckpointError(place, *what_tar(extents))

    def within(member: str) -> Any:
        file.seek(extents[member].start)
        return Within(file, extents[member].stop)

    with unreadable(place, "its pickles"):
        system = unpickle(within("sys_info"), no_storage, trust={})
        ids, records = _read_storages(within("storages"), file)
        objects = {**ids, **_read_tensors(within("tensors"), ids)}
        within("pickle")
        pickled = file.read(len(extents["pickle"]))
        order = "little" if system["little_endian"] else "big"
    assemble = functools.partial(_assembled, pickled, objects)
    return Archive(place, "torch 0.1 tar", records, assemble, byteorder=order)


def _extents(file: BinaryIO, size: int) -> dict[str, range]:
    """Give where in the file each member's bytes are, by its name."""
    found = {}
    start = 0
    while looks_like_tar(header := file.read(_BLOCK_BYTES)):  # two blocks of zeros end the archive
        name, digits, kind = _HEADER.unpack_from(header)
        start += _BLOCK_BYTES
        length = int(digits.strip(b"\0 "), 8)
        if length < 0 or start + length > size:
            raise ValueError(f"a member of {length} bytes at byte {start} of {size}")
        if kind in b"0\0":  # a file: others tell of the next one what is not needed
            found[name.rstrip(b"\0").decode("utf-8", "replace")] = range(start, start + length)
        start += -(-length // _BLOCK_BYTES) * _BLOCK_BYTES
        file.seek(start)
    return found


def _read_storages(stored: Any, file: BinaryIO) -> tuple[_Objects, dict[str, Record]]:
    """Give the persistent id of each storage by its key, views among them, and the records."""
    ids: dict[int, Any] = {}
    records = {}
    for _ in range(unpickle(stored, no_storage, trust={})):
        key, location, kind = unpickle(stored, no_storage, trust={})
        (count,) = _COUNT.unpack(stored.read(_COUNT.size))
        pid = ("storage", kind, str(int(key)), location, count, None)
        dtype, name, _ = storage_id(pid)
        start, length = file.tell(), count * dtype.itemsize
        file.seek(start + length)  # where that is too far, no list of views follows
        ids[int(key)] = pid
        records[name] = Record(f"storage {name}", start, start, length, None)
    for key, root, first, count in unpickle(stored, no_storage, trust={}):
        ids[int(key)] = (*ids[int(root)][:5], (first, count))
    return ids, records


def _read_tensors(stored: Any, ids: _Objects) -> _Objects:
    tensors = {}
    for _ in range(unpickle(stored, no_storage, trust={})):
        key, storage, _ = unpickle(stored, no_storage, trust={})
        (ndim,) = struct.unpack("<i4x", stored.read(8))
        numbers = struct.Struct(f"<{ndim}q")
        size, stride = (numbers.unpack(stored.read(numbers.size)) for _ in range(2))
        (offset,) = _COUNT.unpack(stored.read(_COUNT.size))
        tensors[int(key)] = ids[int(storage)], offset, size, stride
    return tensors


def _assembled(
    pickled: bytes, objects: _Objects, storage_of: StorageOf, trust: Trust, names: Names
) -> Any:
    def storage(pid: Any) -> Any:
        *whole, view = pid
        found = storage_of((*whole, None))
        return found if view is None else StorageView(found, *view)

    @functools.cache
    def object_of(key: int) -> Any:
        told = objects[key]
        if told[0] == "storage":
            return storage(told)
        pid, *view = told
        return CHECKED[torch._utils._rebuild_tensor](storage(pid), *view)  # noqa: SLF001 - as a pickle of torch 0.2 calls it

    def of_persistent_id(pid: Any) -> Any:
        # a container is written with its source
        return pid[0] if type(pid) is tuple else object_of(int(pid))

    return unpickled(pickled, of_persistent_id, trust, names)
