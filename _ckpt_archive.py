"""What torch's zip archive holds, and how to build its checkpoint with any storage left out.

Knows the format, and nothing of places: it reads any seekable file.
directory · hollow
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from attrs import frozen
from torch._weights_only_unpickler import (
    Unpickler,
    _get_allowed_globals,
    _get_user_allowed_globals,
    get_globals_in_pkl,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from zlib_ng import zlib_ng

from _ckpt_errors import CheckpointError, CorruptError, NotACheckpointError, UnsafeCheckpointError

# ── directory ──────────────────────────────────────────────────────────────────────────────────
#
# A torch zip (PyTorch's "Serialization semantics" note; PKWARE's APPNOTE for the zip) stores the
# pickle as `<root>/data.pkl` and each storage, uncompressed, as `<root>/data/<key>`.


@frozen
class Record:
    """Where one storage's bytes lie. All in bytes."""

    name: str
    header: int  # offset of the local header (APPNOTE 4.3.7)
    start: int  # offset of the bytes: only the local header knows, this is what torch writes
    size: int
    crc: int | None  # CRC-32, None where the archive was written without


@frozen
class Archive:
    """A checkpoint that can be built with any of its storages left out."""

    place: object
    records: Mapping[str, Record]  # by storage key
    pickle: bytes
    byteorder: str


def read_directory(place: object, file: BinaryIO) -> zipfile.ZipFile:
    """Read what the archive holds (APPNOTE 4.3.12).

    Raises:
        CorruptError: there is no directory at its end, or one that makes no sense.
    """
    try:
        return zipfile.ZipFile(file)
    except (
        zipfile.BadZipFile,
        ValueError,
        OverflowError,
        struct.error,
        NotImplementedError,
    ) as err:
        raise CorruptError(
            place,
            f"the zip archive has no readable directory in its {file.seek(0, 2)} bytes ({err})",
            "was its upload or download complete?",
        ) from err


def is_packed(directory: zipfile.ZipFile) -> bool:
    """Tell whether somebody compressed what torch only stores."""
    return any(info.compress_type != zipfile.ZIP_STORED for info in directory.infolist())


def unpacked(place: object, data: bytes | bytearray) -> bytes:
    """Write an archive that somebody compressed as torch would have stored it.

    Raises:
        CorruptError: it cannot be unpacked, or into more than weights can come of (a zip bomb).
    """
    plain = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed, zipfile.ZipFile(plain, "w") as stored:
            _refuse_bomb(place, len(data), sum(info.file_size for info in packed.infolist()))
            for info in packed.infolist():
                stored.writestr(info.filename, packed.read(info))
    except CorruptError:
        raise
    except Exception as err:
        raise CorruptError(
            place, f"the archive cannot be unpacked ({err!r})", "fetch it anew"
        ) from err
    return plain.getvalue()


def _refuse_bomb(place: object, size: int, claimed: int) -> None:
    if claimed > 64 * max(size, 1024**2):  # weights deflate by a tenth
        raise CorruptError(place, f"{size} bytes claim to be {claimed} unpacked", "do not trust it")


def read_archive(place: object, file: BinaryIO, directory: zipfile.ZipFile) -> Archive:
    """Read the pickle, and where each storage lies.

    Raises:
        NotACheckpointError: a zip, but not torch's.
        CorruptError: a record does not fit in the file, or does not match its checksum.
    """
    infos = {info.filename: info for info in directory.infolist()}
    found = [name for name in infos if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(found) != 1:
        raise NotACheckpointError(
            place, "a zip archive without one data.pkl in it", "give a file that torch.save wrote"
        )
    root = found[0].removesuffix("data.pkl")
    # torch.serialization.set_crc32_options(False) leaves every CRC at zero
    checked = any(info.CRC for info in infos.values())
    headers = sorted(info.header_offset for info in infos.values())
    ends = dict(zip(headers, [*headers[1:], directory.start_dir], strict=True))
    records = {
        name: _record(place, info, ends[info.header_offset], checked=checked)
        for name, info in infos.items()
        if name.startswith(f"{root}data/") or name in (found[0], f"{root}byteorder")
    }
    data = _small_record(place, file, records.pop(found[0]))
    byteorder = records.pop(f"{root}byteorder", None)
    return Archive(
        place,
        {name.removeprefix(f"{root}data/"): record for name, record in records.items()},
        data,
        _small_record(place, file, byteorder).decode("ascii", "replace") if byteorder else "little",
    )


def _record(place: object, info: zipfile.ZipInfo, end: int, *, checked: bool) -> Record:
    """Say where a record's bytes lie: they stand right before what follows, the record's end."""
    first = info.header_offset + _LOCAL_HEADER.size + len(info.orig_filename.encode())
    if first + info.file_size > end:
        raise CorruptError(
            place,
            f"record {info.filename} claims {info.file_size} bytes from byte {first} on, but what "
            f"follows it begins at byte {end}",
            "fetch or write the file anew",
        )
    wide = max(info.file_size, info.header_offset) >= 0xFFFFFFFF  # noqa: PLR2004 - zip64
    descriptor = (24 if wide else 16) if info.flag_bits & 0x08 and info.file_size else 0
    start = max(first, end - descriptor - info.file_size)
    crc = info.CRC if checked else None
    return Record(info.filename, info.header_offset, start, info.file_size, crc)


LOCAL_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # …, length of name, length of extra field (APPNOTE 4.3.7)


def _small_record(place: object, file: BinaryIO, record: Record) -> bytes:
    file.seek(record.header)
    file.seek(data_start(place, record, file.read(_LOCAL_HEADER.size)))
    data = file.read(record.size)
    check(place, record, data)
    return data


def data_start(place: object, record: Record, header: Any) -> int:
    """Read where a record's bytes begin: only its local header knows (APPNOTE 4.3.7)."""
    known = len(header) >= _LOCAL_HEADER.size and header[:4] == LOCAL_SIGNATURE
    if not known:
        raise CorruptError(
            place, f"record {record.name} has no header at byte {record.header}", "fetch it anew"
        )
    name, extra = _LOCAL_HEADER.unpack_from(header)
    return record.header + _LOCAL_HEADER.size + int(name) + int(extra)


def crc_matches(record: Record, data: Any) -> bool:
    """Tell whether a record's bytes are those that were written, as far as that is known."""
    return record.crc is None or zlib_ng.crc32(data) == record.crc


def check(place: object, record: Record, data: Any) -> None:
    """Raise a CorruptError where they are not."""
    if not crc_matches(record, data):
        raise CorruptError(
            place,
            f"the {record.size} bytes of record {record.name} from byte {record.start} on do not "
            f"match their checksum (CRC-32 {zlib_ng.crc32(data):08x}, recorded {record.crc:08x})",
            "the stored file is damaged: fetch or write it anew",
        )


# ── hollow ──────────────────────────────────────────────────────────────────────────────────────


class HollowError(Exception):
    """A checkpoint holds something that cannot be built without its values."""


def asks_for_values(err: Exception) -> bool:
    """Tell whether an error came of a tensor's being on the meta device."""
    if isinstance(err, HollowError | NotImplementedError):
        return True
    said = re.search(r"\bmeta\b|unallocated storage", str(err), re.IGNORECASE)
    return isinstance(err, RuntimeError | TypeError | ValueError) and said is not None


class Ledger(TorchDispatchMode):
    """Knows of every living storage which records its values come from.

    Also lets a strategy mix hollow tensors with real ones: what it computes is then hollow.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch has no annotation here
        self._entries: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # by storage key
        self.asked = False  # for what a hollow tensor cannot tell

    def enter(self, storage: Any, keys: Iterable[str]) -> None:
        """Note that the values of a storage come from these records, too."""
        # a weak reference keeps the address from being given to another storage
        entry = self._entries.get(storage._cdata) or (StorageWeakRef(storage), set())  # noqa: SLF001 - as torch.multiprocessing does
        self._entries[storage._cdata] = entry  # noqa: SLF001
        entry[1].update(keys)

    def origins(self) -> set[str]:
        """Give the records that living storages have their values from."""
        return {key for ref, keys in self._entries.values() if not ref.expired() for key in keys}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it made."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        keys = {
            key
            for tensor in given
            for storage in _storages(tensor)
            if storage._cdata in self._entries  # noqa: SLF001
            for key in self._entries[storage._cdata][1]  # noqa: SLF001
        }
        if not keys:
            return func(*args, **kwargs)
        schema = func._schema  # noqa: SLF001 - what tells that an operation writes
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_hollow, (args, kwargs))
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, NotImplementedError):
                self.asked = True
                raise
            if written and isinstance(written[0], torch.Tensor) and not written[0].is_meta:
                result = written[0]  # a real tensor stays real; its values come later
        else:
            result = func(*args, **kwargs)
        for tensor in filter(torch.is_tensor, tree_leaves((result, written))):
            for storage in _storages(tensor):
                self.enter(storage, keys)
        return result


def _hollow(leaf: Any) -> Any:
    """Put a tensor, or a device that an operation is to move to, on the meta device."""
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _storages(tensor: torch.Tensor) -> list[Any]:
    """Give all storages of a tensor: a sparse one has several."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones want it coalesced
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [part.untyped_storage() for part in parts]


def build(
    archive: Archive, storages: Mapping[str, Any], fresh: Mapping[str, Any], ledger: Ledger
) -> Any:
    """Unpickle a checkpoint with torch's restricted unpickler, on the storages that are there.

    All others are on the meta device. The fresh ones among them are still in the byte order of
    the archive. Each is entered in the ledger under its record's key.

    Raises:
        HollowError: something cannot be built without its values (a quantized tensor, say).
        UnsafeCheckpointError: it names what torch does not allow.
        CorruptError: the pickle makes no sense, or does not agree with the records.
    """
    place = archive.place
    loaded: dict[str, Any] = {}

    def storage_of(saved: tuple[Any, ...]) -> Any:
        """Answer a persistent id: ("storage", type, key, location, count of elements)."""
        _, kind, key, _, count = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        size = count * torch._utils._element_size(dtype)  # noqa: SLF001 - as torch.load does
        record = archive.records.get(key)
        if record is None or record.size != size:
            held = f"holds {record.size} bytes" if record else "is missing"
            raise CorruptError(
                place, f"record data/{key} {held}, its tensor has {size}", "fetch the file anew"
            )
        if key not in loaded:
            storage = storages.get(key)
            if storage is None:
                storage = torch.UntypedStorage(size, device="meta")
            loaded[key] = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=dtype, _internal=True
            )
            ledger.enter(storage, [key])
            ledger.dtypes[key] = dtype
        return loaded[key]

    unpickler = Unpickler(io.BytesIO(archive.pickle), encoding="utf-8")
    unpickler.persistent_load = storage_of  # type: ignore[method-assign]
    try:
        checkpoint = unpickler.load()
        torch._utils._validate_loaded_sparse_tensors()  # noqa: SLF001 - as torch.load does
    except CheckpointError:
        raise
    except Exception as err:
        hollow = len(storages) < len(archive.records)
        raise _explain(archive, err, hollow=hollow) from err
    finally:
        torch._utils._sparse_tensors_to_validate.clear()  # noqa: SLF001 - a failed one leaves some
    if archive.byteorder != sys.byteorder:
        for key in fresh.keys() & ledger.dtypes.keys():
            fresh[key].byteswap(ledger.dtypes[key])
    return checkpoint


def _explain(archive: Archive, err: Exception, *, hollow: bool) -> Exception:
    """Say why a pickle could not be loaded."""
    unsafe = unsafe_globals(archive.pickle)
    if unsafe:
        return UnsafeCheckpointError(
            archive.place,
            f"it names what torch does not know to be safe: {', '.join(unsafe)}",
            "allow what you trust with torch.serialization.add_safe_globals([…])",
        )
    if isinstance(err, RuntimeError) and hollow:
        return HollowError(err)
    return CorruptError(archive.place, f"its pickle cannot be read ({err!r})", "fetch it anew")


def unsafe_globals(data: bytes) -> list[str]:
    """List what a pickle names that torch's restricted unpickler refuses."""
    try:
        named = get_globals_in_pkl(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - any garbage may be in there
        return []
    return sorted(named - _get_allowed_globals().keys() - _get_user_allowed_globals().keys())
