"""What torch's and safetensors' files hold, and where in them each storage lies.

Knows the formats, and nothing of places: it reads any seekable file.
zip · pickles of old · safetensors · shards
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import operator
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import torch
from attrs import evolve, field, frozen
from zlib_ng import zlib_ng

from _ckpt_errors import CheckpointError, CorruptError, NotACheckpointError, UnsafeCheckpointError
from _ckpt_inert import ForbiddenGlobalError, Inert, StorageOf, Trust, unpickle

Names = dict[str, bool]  # classes and functions that a pickle names: are they inert?


@frozen
class Record:
    """Where one storage's bytes lie. All in bytes."""

    name: str
    header: int  # offset of the local header (APPNOTE 4.3.7), or of the bytes where none is
    start: int  # offset of the bytes: only the local header knows, this is what torch writes
    size: int
    crc: int | None  # CRC-32, None where the archive was written without


@frozen
class Archive:
    """A checkpoint that can be built with any of its storages left out."""

    place: object
    format: str
    records: Mapping[str, Record]  # by storage key
    assemble: Callable[[StorageOf, Trust, Names], Any] = field(repr=False)
    byteorder: str = "little"
    members: Mapping[str, Record] = field(factory=dict, repr=False)  # all of a zip's, by name
    file: BinaryIO | None = field(default=None, repr=False)  # to read members from
    notes: Mapping[str, str] = field(factory=dict)  # what the file says of itself


def what_instead(start: bytes) -> tuple[str, str] | None:
    """Tell, from its first bytes, what came instead of a file, and what to do."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is an HTML or XML page", "is the URL that of the file, and not of its page?"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer", "run `git lfs pull`, or give the URL of the file"
    return None


# ── zip ────────────────────────────────────────────────────────────────────────────────────────
#
# A torch zip (PyTorch's "Serialization semantics" note; PKWARE's APPNOTE for the zip) stores the
# pickle as `<root>/data.pkl` and each storage, uncompressed, as `<root>/data/<key>`. TorchScript's
# has the module there, and `<root>/code/…` and `<root>/constants.pkl` beside it.

LOCAL_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # …, length of name, length of extra field (APPNOTE 4.3.7)
_DIRECTORY_BYTES = 1024**2  # at the end: where it is damaged, nothing tells how long it is
_DESCRIPTOR_BYTES = 24  # of the longest: signature, CRC-32, two sizes (APPNOTE 4.3.9)


def read_directory(place: object, file: BinaryIO) -> zipfile.ZipFile:
    """Read what the archive holds (APPNOTE 4.3.12).

    Raises:
        CorruptError: there is no directory at its end, or one that makes no sense.
    """
    try:
        directory = zipfile.ZipFile(file)
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
    headers = {info.header_offset for info in directory.filelist}
    if min(len(headers), len(directory.NameToInfo)) < len(directory.filelist):
        # read in two ways by two readers, or, a million times the same megabyte, a zip bomb
        raise CorruptError(place, "two records have the same name or bytes", "do not trust it")
    return directory


def is_packed(directory: zipfile.ZipFile) -> bool:
    """Tell whether somebody compressed what torch only stores: all but TorchScript's code."""
    return any(info.compress_type and "/code/" not in info.filename for info in directory.filelist)


def unpacked(place: object, data: bytes | bytearray) -> bytes:
    """Write an archive that somebody compressed as torch would have stored it.

    Raises:
        CorruptError: it cannot be unpacked, or into more than weights can come of (a zip bomb).
    """
    plain = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed, zipfile.ZipFile(plain, "w") as stored:
            _refuse_bomb(place, len(data), packed.infolist())
            for info in packed.infolist():
                with stored.open(info.filename, "w") as copy:
                    _unpack(packed, info, copy)
    except CorruptError:
        raise
    except Exception as err:
        raise CorruptError(
            place, f"the archive cannot be unpacked ({err!r})", "fetch it anew"
        ) from err
    return plain.getvalue()


def _unpack(packed: zipfile.ZipFile, info: zipfile.ZipInfo, copy: IO[bytes]) -> None:
    with packed.open(info) as record:
        shutil.copyfileobj(record, copy)  # in pieces: its size may be a lie


def _refuse_bomb(place: object, size: int, infos: list[zipfile.ZipInfo]) -> None:
    claimed = sum(info.file_size for info in infos)
    if claimed > max(8 * size, 64 * 1024**2):  # weights deflate by a tenth
        raise CorruptError(place, f"{size} bytes claim to be {claimed} unpacked", "do not trust it")
    # of bzip2 and LZMA, which no checkpoint needs, zipfile unpacks more than it is asked for
    if any(info.compress_type > zipfile.ZIP_DEFLATED for info in infos):
        raise CorruptError(place, "it is compressed, and not by deflate", "zip it anew")


def read_zip(place: object, file: BinaryIO, directory: zipfile.ZipFile) -> Archive:
    """Read the pickle, and where each storage lies.

    Raises:
        NotACheckpointError: a zip, but not torch's.
        CorruptError: a record does not fit in the file, or does not match its checksum.
    """
    found = [name for name in directory.NameToInfo if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    if len(found) != 1:
        raise NotACheckpointError(
            place, "a zip archive without one data.pkl in it", "give a file that torch.save wrote"
        )
    root = found[0].removesuffix("data.pkl")
    members = _stored_records(place, directory)
    data = f"{root}data/"
    text = functools.partial(_text_record, place, file, members, root)
    scripted = f"{root}constants.pkl" in members
    pickled = read_record(place, file, members[found[0]])
    byteorder = text("byteorder") or "little"
    if byteorder not in {"little", "big"}:
        raise CorruptError(place, f"its byte order is {byteorder!r:.80}", "fetch it anew")
    assemble = functools.partial(_unpickled, pickled)
    if scripted:
        names = _script_names(_script_code(place, file, directory, f"{root}code/"))
        assemble = functools.partial(_script_weights, assemble, names)
    return Archive(
        place,
        "TorchScript" if scripted else "torch zip",
        {name.removeprefix(data): each for name, each in members.items() if name.startswith(data)},
        assemble,
        byteorder,
        members,
        file,
    )


def _stored_records(place: object, directory: zipfile.ZipFile) -> dict[str, Record]:
    """Give all records that are not compressed, by name."""
    infos = directory.NameToInfo
    # torch.serialization.set_crc32_options(False) leaves every CRC at zero
    checked = any(info.CRC for info in infos.values())
    headers = sorted(info.header_offset for info in infos.values())
    ends = dict(zip(headers, [*headers[1:], directory.start_dir], strict=True))
    return {
        name: _record(place, info, ends[info.header_offset], checked=checked)
        for name, info in infos.items()
        if not info.compress_type
    }


def find_damage(
    place: object, file: BinaryIO, data: memoryview
) -> list[tuple[range, CorruptError]]:
    """Check every record of a zip against its CRC-32.

    Args:
        place: whose it is.
        file: the archive.
        data: all of its bytes.

    Returns:
        The extents that are wrong, and what is wrong with them.
    """
    try:
        directory = read_directory(place, file)
        records = _stored_records(place, directory)
    except CorruptError as err:
        return [(range(max(0, len(data) - _DIRECTORY_BYTES), len(data)), err)]

    def problem(record: Record) -> tuple[range, CorruptError] | None:
        try:
            start = data_start(place, record, data[record.header : record.start])
            check(place, record, data[start : start + record.size])
        except CorruptError as err:
            return range(record.header, record.start + record.size), err
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(problem, records.values()) if found]


def _unpickled(pickled: bytes, storage_of: StorageOf, trust: Trust, names: Names) -> Any:
    return unpickle(io.BytesIO(pickled), storage_of, trust, names)


def _text_record(
    place: object, file: BinaryIO, members: Mapping[str, Record], root: str, name: str
) -> str:
    record = members.get(root + name)
    return read_record(place, file, record).decode("utf-8", "replace") if record else ""


def read_record(place: object, file: BinaryIO, record: Record) -> bytes:
    """Read one record whole, as a rule in one read, and check it.

    Raises:
        CorruptError: there is none, or not the one that was written.
    """
    file.seek(record.header)
    data = file.read(record.start + record.size - record.header)
    start = data_start(place, record, data)
    if start != record.start:  # not laid out as by torch
        file.seek(start)
        data = file.read(record.size)
    data = data[-record.size :] if record.size else b""
    check(place, record, data)
    return data


# TorchScript (torch/csrc/jit/docs/serialization.md): the pickle is the tree of modules, each an
# object of a class that `code/` declares, with its parameters and buffers among its attributes.

_SCRIPT_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", re.MULTILINE)
_SCRIPT_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)


def _script_code(
    place: object, file: BinaryIO, directory: zipfile.ZipFile, folder: str
) -> dict[str, str]:
    """Read the code that declares the classes: torch compresses it."""
    infos = [
        info
        for info in directory.filelist
        if info.filename.startswith(folder) and info.filename.endswith(".py")
    ]
    _refuse_bomb(place, file.seek(0, io.SEEK_END), infos)
    found = {}
    with unreadable(place, "its code"):
        for info in infos:
            text = io.BytesIO()
            _unpack(directory, info, text)
            name = info.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
            found[name] = text.getvalue().decode()
    return found


def _script_names(code: Mapping[str, str]) -> dict[str, list[str]]:
    """Give what of each class is a parameter or a buffer."""
    return {
        f"{module}.{name}": re.findall(r'"([^"]*)"', ",".join(_SCRIPT_NAMES.findall(body)))
        for module, text in code.items()
        for name, body in _SCRIPT_CLASS.findall(text)
    }


_SCRIPT_MODULES = 100_000  # most modules of a module: sane ones have thousands
_SCRIPT_NESTING = 100  # most levels of them: sane ones have ten


def _script_weights(
    assemble: Any,
    known: Mapping[str, list[str]],
    storage_of: StorageOf,
    trust: Trust,  # noqa: ARG001 - its classes are code in the archive, which is never run
    names: Names,
) -> dict[str, Any]:
    """Give the state dict of a module that TorchScript wrote."""
    found: dict[str, Any] = {}
    todo: list[tuple[tuple[str, ...], Inert]] = [((), assemble(storage_of, {}, names))]
    for count in itertools.count():
        if not todo:
            return found
        path, module = todo.pop()
        if count > _SCRIPT_MODULES or len(path) > _SCRIPT_NESTING:
            raise ValueError("its modules hold each other without end")
        state = module._inert_state  # noqa: SLF001 - as written
        for name in known[module.inert_class]:
            if isinstance(state[name], torch.Tensor):  # a buffer can be None
                found[".".join((*path, name))] = state[name].detach()
        todo += reversed(
            [
                ((*path, name), each)
                for name, each in state.items()
                if isinstance(each, Inert) and each.inert_class in known
            ]
        )
    raise AssertionError


def _record(place: object, info: zipfile.ZipInfo, end: int, *, checked: bool) -> Record:
    """Say where a record's bytes lie: they stand right before what follows, the record's end."""
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"  # APPNOTE appendix D
    name = info.orig_filename.encode(encoding)
    first = info.header_offset + _LOCAL_HEADER.size + len(name)
    if info.header_offset < 0 or first + info.file_size > end:
        raise CorruptError(
            place,
            f"record {info.filename} claims {info.file_size} bytes from byte {first} on, but what "
            f"follows it begins at byte {end}",
            "fetch or write the file anew",
        )
    wide = max(info.file_size, info.header_offset) >= 0xFFFFFFFF  # noqa: PLR2004 - zip64
    descriptor = (
        (_DESCRIPTOR_BYTES if wide else 16) if info.flag_bits & 0x08 and info.file_size else 0
    )
    start = max(first, end - descriptor - info.file_size)
    crc = info.CRC if checked else None
    return Record(info.filename, info.header_offset, start, info.file_size, crc)


def data_start(place: object, record: Record, header: Any) -> int:
    """Read where a record's bytes begin: only its local header knows (APPNOTE 4.3.7)."""
    known = len(header) >= _LOCAL_HEADER.size and header[:4] == LOCAL_SIGNATURE
    if not known:
        raise CorruptError(
            place, f"record {record.name} has no header at byte {record.header}", "fetch it anew"
        )
    name, extra = _LOCAL_HEADER.unpack_from(header)
    start = record.header + _LOCAL_HEADER.size + int(name) + int(extra)
    if start > record.start + _DESCRIPTOR_BYTES:  # it may have none, where one was allowed for
        raise CorruptError(
            place,
            f"the header of record {record.name} has its bytes begin at byte {start}, where "
            f"{record.size} bytes from byte {record.start} on are its own",
            "fetch or write the file anew",
        )
    return start


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


# ── pickles of old ─────────────────────────────────────────────────────────────────────────────
#
# torch before 1.6 (torch.serialization._legacy_save) wrote pickles in a row: a magic number, a
# version, facts of the system, the checkpoint, the keys of its storages in the order of the file.
# Then come the storages, each behind the count of its elements in eight bytes.

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
    made: dict[str, Any] = {}
    left = size

    def measured(pid: Any) -> Any:
        nonlocal left
        if pid[0] == "module":
            return pid[1]
        kind, key, count = storage_id(pid)
        if key not in sizes:
            sizes[key] = count * torch._utils._element_size(kind)  # noqa: SLF001 - as torch.load does
            left -= sizes[key]
            if left < 0:
                raise ValueError(f"its storages have more than the {size} bytes of the file")
            # a real one, for what cannot be built without; its memory is not touched
            made[key] = torch.storage.TypedStorage(
                wrap_storage=torch.UntypedStorage(sizes[key]), dtype=kind, _internal=True
            )
        return made[key]

    def none(pid: Any) -> Any:
        raise ValueError(f"a {type(pid).__name__} for a storage where none belongs")

    with unreadable(place, "its pickle"):
        magic = unpickle(file, none, trust={})
        if magic != _MAGIC:
            raise NotACheckpointError(
                place, "a pickle, but not one of torch.save", "write it with torch.save"
            )
        _version, system = unpickle(file, none, trust={}), unpickle(file, none, trust={})
        begin = file.tell()
        try:
            unpickle(file, measured, trust={})
        finally:
            torch._utils._sparse_tensors_to_validate.clear()  # noqa: SLF001 - they have no values yet
        end = file.tell()
        keys = unpickle(file, none, trust={})
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
        if length != size or records.keys() != sizes.keys():
            raise ValueError(f"{length} bytes are needed, the file has {size}")
        file.seek(begin)
        pickled = file.read(end - begin)
        order = "little" if system["little_endian"] else "big"
    return Archive(
        place, "torch legacy", records, functools.partial(_unpickled, pickled), byteorder=order
    )


@contextmanager
def unreadable(place: object, what: str) -> Iterator[None]:
    """Say why a part of a file could not be read, whatever it came to."""
    try:
        yield
    except CheckpointError:
        raise
    except ForbiddenGlobalError as err:
        raise UnsafeCheckpointError(
            place,
            f"its pickle names {err}, which no checkpoint needs and a hostile one wants",
            "do not trust it; trust=True would run it",
        ) from err
    except Exception as err:
        raise CorruptError(
            place, f"{what} cannot be read ({err!r:.300})", "fetch or write the file anew"
        ) from err


def storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """Read a persistent id: ("storage", type, key, location, count of elements, view).

    Raises:
        ValueError: it is another.
    """
    # nothing of it is shown or hashed before its type is known: 60 nested pairs have 2**60 leaves
    what, kind, key, _, count, *view = pid
    dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
    if what != "storage" or any(view) or type(count) is not int or count < 0:
        raise ValueError("a persistent id that is no storage's")
    if type(key) is not str or not isinstance(dtype, torch.dtype):
        raise ValueError("a storage whose key is no text, or whose type is none")
    return dtype, key, count


# ── safetensors ────────────────────────────────────────────────────────────────────────────────
#
# Eight bytes little-endian: the length of a JSON header; the header: name → dtype, shape, offsets
# from its end on (safetensors' README, "Format"); then the tensors, without gaps.

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def looks_like_safetensors(start: bytes) -> bool:
    """Tell from a file's first bytes whether it means to be one."""
    return re.match(rb'.{8}\{\s*["}]', start, re.DOTALL) is not None


def read_safetensors(place: object, file: BinaryIO, size: int) -> Archive:
    """Read the header.

    Args:
        place: for errors.
        file: at its start.
        size: of the file, in bytes.

    Raises:
        CorruptError: it makes no sense, or does not agree with the file.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise CorruptError(
            place, f"its header claims {length} bytes of {size}", "was its upload complete?"
        )
    with unreadable(place, "its header"):
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        notes = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        records = {}
        end = 8 + length
        for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[told["dtype"]], tuple(told["shape"])
            first, last = (8 + length + operator.index(offset) for offset in told["data_offsets"])
            if first != end or last - first != _count(shape) * dtype.itemsize:
                raise ValueError(f"{name!r:.80} is not as long as its shape, or stands in a gap")
            tensors[name] = dtype, shape
            records[name] = Record(name, first, first, last - first, None)
            end = last
        if end != size:
            raise ValueError(f"it describes {end} bytes of {size}")
        assemble = functools.partial(_tensors, {name: tensors[name] for name in header})
    return Archive(place, "safetensors", records, assemble, notes=notes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _count(shape: tuple[Any, ...]) -> int:
    count = 1
    for each in shape:
        if type(each) is not int or not 0 <= each < 1 << 62 or count * each >= 1 << 62:
            raise ValueError(f"{shape!s:.80} is no shape")
        count *= each
    return count


def _tensors(
    known: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    storage_of: StorageOf,
    _trust: Trust,
    _names: Names,
) -> dict[str, torch.Tensor]:
    made = {}
    for name, (dtype, shape) in known.items():
        storage = storage_of(("storage", _Kind(dtype), name, "cpu", _count(shape)))
        flat = torch._utils._rebuild_tensor(storage, 0, (_count(shape),), (1,))  # noqa: SLF001 - as torch.load does
        made[name] = flat.reshape(shape)
    return made


@frozen
class _Kind:
    """A type of storage, as a persistent id has it."""

    dtype: torch.dtype


# ── shards ─────────────────────────────────────────────────────────────────────────────────────
#
# `model.safetensors.index.json`, as `huggingface_hub.save_torch_state_dict` writes it: JSON of
# {"metadata": …, "weight_map": {name of a tensor: name of the file beside it that has it}}.


def looks_like_json(start: bytes) -> bool:
    """Tell from a file's first bytes whether it is JSON's object, and no safetensors file."""
    return start.lstrip().startswith(b"{") and not looks_like_safetensors(start)


def read_weight_map(place: object, file: BinaryIO) -> dict[str, str]:
    """Read which file has which tensor.

    Raises:
        NotACheckpointError: JSON, but of something else.
        CorruptError: it makes no sense, or names a file that is not beside it.
    """
    with unreadable(place, "its JSON"):
        text = file.read(_HEADER_LIMIT)
        index = json.loads(text)
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise NotACheckpointError(
            place, "JSON, and no index of shards", "give the file that has the weights"
        )
    for name in found.values():
        if type(name) is not str or {"", ".", ".."} & {*name.split("/")} or ":" in name:
            raise CorruptError(place, f"{name!r:.80} is no file beside it", "do not trust it")
    return found


def join_archives(
    place: object, weight_map: Mapping[str, str], shards: Mapping[str, Archive], stride: int
) -> Archive:
    """Make one archive of several, whose bytes lie a stride apart.

    Raises:
        CorruptError: they are in different byte orders.
    """
    records = {
        f"{number}/{key}": evolve(
            record,
            name=f"{record.name} of {name}",
            header=number * stride + record.header,
            start=number * stride + record.start,
        )
        for number, (name, archive) in enumerate(shards.items())
        for key, record in archive.records.items()
    }
    first, *others = {archive.byteorder: archive.format for archive in shards.values()}.items()
    if others:
        raise CorruptError(place, "its files are in two byte orders", "write them anew")
    assemble = functools.partial(
        _joined, weight_map, {name: archive.assemble for name, archive in shards.items()}
    )
    return Archive(place, f"{first[1]}, {len(shards)} shards", records, assemble, first[0])


def _joined(
    weight_map: Mapping[str, str],
    shards: Mapping[str, Any],
    storage_of: StorageOf,
    trust: Trust,
    names: Names,
) -> dict[str, Any]:
    held = {
        name: assemble(functools.partial(_storage_of_shard, storage_of, number), trust, names)
        for number, (name, assemble) in enumerate(shards.items())
    }
    for name, shard in weight_map.items():
        if not isinstance(held[shard], Mapping) or name not in held[shard]:
            raise ValueError(f"{shard!r:.80} has no {name!r:.80}")
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _storage_of_shard(storage_of: StorageOf, number: int, pid: Any) -> Any:
    if pid[0] == "module":
        return storage_of(pid)
    _, key, _ = storage_id(pid)
    return storage_of((*pid[:2], f"{number}/{key}", *pid[3:]))
