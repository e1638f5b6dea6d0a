"""The zip archives of `torch.save`, since torch 1.6, read and written.

PyTorch's "Serialization semantics" note describes the layout, PKWARE's APPNOTE the zip: the pickle
is stored as `<root>/data.pkl`, each storage, uncompressed, as `<root>/data/<key>`.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, BinaryIO

from torch.serialization import DEFAULT_PROTOCOL, _open_zipfile_writer, _save

from _anemoi_ckpt.errors import CheckpointError, CorruptError, NotACheckpointError
from _anemoi_ckpt.formats import Archive, Record, check, unpickled
from _anemoi_ckpt.formats.others import what_zip
from _anemoi_ckpt.pickles.writing import pickling
from _anemoi_ckpt.unpacking import refuse_bomb

LOCAL_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")  # …, length of name, length of extra field (APPNOTE 4.3.7)
_DIRECTORY_BYTES = 1024**2  # at the end: where it is damaged, nothing tells how long it is
_PLAIN_END_BYTES = 256  # more than an end without a comment has
_END = struct.Struct("<12xLL2x")  # …, size and offset of the directory, … (APPNOTE 4.3.16)
_WIDE_END = struct.Struct("<4s36xQQ")  # the same of zip64, and its mark (APPNOTE 4.3.14)
_LOCATOR_BYTES = 20  # between the two (APPNOTE 4.3.15)
_END_BYTES = 64 * 1024 + 200  # the longest end of an archive, with its comment (APPNOTE 4.3.16)
_ENCRYPTED = 1  # among a record's flags (APPNOTE 4.4.4)
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


def refuse_several(place: object, file: BinaryIO) -> None:
    """Refuse archives in a row, of which the directory at the end is that of the last alone.

    What has no directory is left to `read_directory`.

    Raises:
        NotACheckpointError: the directory stands behind the place where it says that it stands.
    """
    end = _place_of_end(file)
    if end < 0:
        return
    file.seek(end)
    count, told = _END.unpack(file.read(_END.size))
    wide = end - _LOCATOR_BYTES - _WIDE_END.size
    if wide >= 0:
        file.seek(wide)
        mark, wide_count, wide_told = _WIDE_END.unpack(file.read(_WIDE_END.size))
        if mark == b"PK\6\6":  # of an archive beyond 4 GiB, and of torch's
            count, told, end = wide_count, wide_told, wide
    start = end - count
    if start <= told:
        return
    file.seek(start)
    if file.read(4) == b"PK\1\2":  # where one entry of a directory begins
        raise NotACheckpointError(
            place,
            f"{start - told} bytes stand before its archive: it holds several archives in a row, or"
            " is part of one",
            "save each object to a file of its own; torch.load reads one after another from an open"
            " file",
        )


def _place_of_end(file: BinaryIO) -> int:
    """Find the record that ends an archive, behind which a comment may stand; -1 if none."""
    size = file.seek(0, os.SEEK_END)
    for length in (_PLAIN_END_BYTES, _END_BYTES):
        start = file.seek(max(0, size - length))
        found = file.read(length).rfind(b"PK\5\6", 0, 4 - _END.size)
        if found >= 0:
            return start + found
    return -1


def is_packed(directory: zipfile.ZipFile) -> bool:
    """Tell whether somebody packed what torch only stores: all but TorchScript's code."""
    packed = (i for i in directory.filelist if i.compress_type or i.flag_bits & _ENCRYPTED)
    return any("/code/" not in info.filename for info in packed)


def unpacked(place: object, data: bytes | bytearray) -> bytes:
    """Write an archive that somebody compressed as torch would have stored it.

    Raises:
        NotACheckpointError: it is compressed in a way that torch does not read.
        CorruptError: it cannot be unpacked, or into more than weights can come of (a zip bomb).
    """
    plain = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed, zipfile.ZipFile(plain, "w") as stored:
            check_claims(place, len(data), packed.infolist())
            for info in packed.infolist():
                with stored.open(info.filename, "w") as copy:
                    unpack(packed, info, copy)
    except (CheckpointError, MemoryError):
        raise
    except Exception as err:
        raise CorruptError(
            place, f"the archive cannot be unpacked ({err!r})", "fetch it anew"
        ) from err
    return plain.getvalue()


def unpack(packed: zipfile.ZipFile, info: zipfile.ZipInfo, copy: IO[bytes]) -> None:
    with packed.open(info) as record:
        shutil.copyfileobj(record, copy)  # in pieces: its size may be a lie


def check_claims(place: object, size: int, infos: list[zipfile.ZipInfo]) -> None:
    refuse_bomb(place, size, sum(info.file_size for info in infos))
    # of bzip2 and LZMA, which no checkpoint needs, zipfile unpacks more than it is asked for
    strange = (i.compress_type > zipfile.ZIP_DEFLATED or i.flag_bits & _ENCRYPTED for i in infos)
    if any(strange):
        raise NotACheckpointError(
            place,
            "it is compressed, and not by deflate, or encrypted, as no torch reads it",
            "unzip it, and zip it anew with zip -0",
        )


def read_zip(place: object, file: BinaryIO, directory: zipfile.ZipFile) -> Archive:
    """Read the pickle, and where each storage lies.

    Raises:
        NotACheckpointError: a zip, but not torch's.
        CorruptError: a record does not fit in the file, or does not match its checksum.
    """
    root = find_root(place, directory)
    members = _stored_records(place, directory)
    data = f"{root}data/"
    pickled = read_record(place, file, members[f"{root}data.pkl"])
    order = members.get(f"{root}byteorder")  # written since torch 2.1
    byteorder = read_record(place, file, order).decode("utf-8", "replace") if order else "little"
    if byteorder not in {"little", "big"}:
        raise CorruptError(place, f"its byte order is {byteorder!r:.80}", "fetch it anew")
    return Archive(
        place,
        "torch zip",
        {name.removeprefix(data): each for name, each in members.items() if name.startswith(data)},
        functools.partial(unpickled, pickled),
        byteorder,
        members,
        file,
    )


def find_root(place: object, directory: zipfile.ZipFile) -> str:
    """Find the folder in an archive that has its pickle: ``archive/``, or the file's own name.

    Raises:
        NotACheckpointError: a zip, but not torch's.
    """
    names = directory.NameToInfo
    roots = [found[1] for n in names if (found := re.fullmatch(r"((?:[^/]+/)?)data\.pkl", n))]
    if len(roots) != 1:
        raise NotACheckpointError(place, *what_zip(names))
    return roots[0]


def _stored_records(place: object, directory: zipfile.ZipFile) -> dict[str, Record]:
    """Give all records that are not compressed, by name."""
    infos = directory.NameToInfo
    headers = sorted(info.header_offset for info in infos.values())
    ends = dict(zip(headers, [*headers[1:], directory.start_dir], strict=True))
    return {
        name: _record(place, info, ends[info.header_offset])
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


def _record(place: object, info: zipfile.ZipInfo, end: int) -> Record:
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
    # torch.serialization.set_crc32_options(False) leaves every CRC at zero, and skip_data those of
    # the records that are filled in later: nothing is known of them
    return Record(info.filename, info.header_offset, start, info.file_size, info.CRC or None)


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


def write_zip(checkpoint: Any, stream: BinaryIO, members: Mapping[str, Any]) -> None:
    """Write what `torch.save` writes, inert objects as what they were read from.

    Args:
        checkpoint: what to write.
        stream: need not be seekable.
        members: more records, by name beneath the archive's root.
    """
    with _open_zipfile_writer(stream) as archive:
        _save(checkpoint, archive, pickling(checkpoint), DEFAULT_PROTOCOL, False)
        for name, data in members.items():
            archive.write_record(name, bytes(data), len(data))
