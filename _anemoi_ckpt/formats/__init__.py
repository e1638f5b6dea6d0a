"""What a file holds, and where in it each storage lies: a module for each format.

A format knows no places: it reads any seekable file, and gives an `Archive`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from attrs import field, frozen
from zlib_ng import zlib_ng

from _anemoi_ckpt.compat import MissingDtypeError
from _anemoi_ckpt.errors import (
    CheckpointError,
    CorruptError,
    MissingPackageError,
    UnsafeCheckpointError,
)
from _anemoi_ckpt.pickles.costs import CostlyError
from _anemoi_ckpt.pickles.reading import (
    ForbiddenGlobalError,
    LongNumberError,
    MissingClassError,
    OldTextError,
    StorageOf,
    Trust,
    TrustedCodeError,
    unpickle,
)

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
        return (
            "it is an HTML or XML page",
            "is the URL that of the file, not of its page or of a login?",
        )
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer", "run `git lfs pull`, or give the URL of the file"
    return None


def crc_matches(record: Record, data: Any) -> bool:
    """Tell whether a record's bytes are those that were written, as far as that is known."""
    return record.crc is None or zlib_ng.crc32(data) == record.crc


def check(place: object, record: Record, data: Any) -> None:
    """Raise a CorruptError where they are not."""
    if record.crc is not None:
        check_crc(place, record, zlib_ng.crc32(data))


def check_crc(place: object, record: Record, crc: int) -> None:
    """Raise a CorruptError where the CRC-32 of a record's bytes is not the one that is recorded."""
    if record.crc not in {None, crc}:
        raise CorruptError(
            place,
            f"the {record.size} bytes of record {record.name} from byte {record.start} on do not "
            f"match their checksum (CRC-32 {crc:08x}, recorded {record.crc:08x})",
            "the stored file is damaged: fetch or write it anew",
        )


@contextmanager
def unreadable(place: object, what: str) -> Iterator[None]:
    """Say why a part of a file could not be read, whatever it came to."""
    try:
        yield
    except (CheckpointError, MemoryError, RecursionError):
        raise
    except (ForbiddenGlobalError, CostlyError) as err:
        raise _unsafe(place, err) from err
    except (OldTextError, LongNumberError) as err:
        raise _unread(place, err) from err
    except MissingDtypeError as err:
        wanted = f"torch>={err.since}" if err.since else "a newer torch"
        raise MissingPackageError(place, str(err), f"install {wanted}") from err
    except MissingClassError as err:
        problem = f"it is trusted, and names {err}, which cannot be imported ({err.__cause__})"
        package = str(err).partition(".")[0]
        raise MissingPackageError(
            place,
            problem,
            f"install {package} as it was when the checkpoint was written, or load without trust:"
            " the object is then inert data",
        ) from err
    except TrustedCodeError as err:
        package = str(err).partition(".")[0] or "the package"
        raised = f"its trusted code{f' {err}' if str(err) else ''} raised {err.__cause__!r:.300}"
        if err.inert is None:
            advice = f"is {package} as it was when the checkpoint was written?"
        else:
            raised += f", and was given what is not trusted, {err.inert!r:.200}"
            advice = "add that to trust."
        raise CheckpointError(
            place, raised, f"{advice} Without trust, the object is inert data"
        ) from err
    except Exception as err:
        if "can't allocate memory" in str(err) or "not enough memory" in str(err):  # by torch
            raise MemoryError(str(err)) from err
        raise CorruptError(
            place, f"{what} cannot be read ({err!r:.300})", "fetch or write the file anew"
        ) from err


def _unread(place: object, err: Exception) -> CheckpointError:
    if isinstance(err, LongNumberError):
        return CheckpointError(
            place,
            f"its pickle has a number of more digits than Python reads ({err})",
            "call sys.set_int_max_str_digits(0) before, if you trust it",
        )
    return CheckpointError(
        place,
        f"it has text that is not UTF-8, as Python 2 wrote it ({err})",
        "load it without trust: such text comes as bytes",
    )


def _unsafe(place: object, err: Exception) -> UnsafeCheckpointError:
    if isinstance(err, CostlyError):
        return UnsafeCheckpointError(
            place,
            f"its pickle takes far more memory or time than its length explains: {err}",
            "do not trust it; trust=True reads it as Python does, and runs its code",
        )
    return UnsafeCheckpointError(
        place,
        f"its pickle names {err}, which no checkpoint needs and a hostile one wants",
        "do not trust it; trust=True would run it",
    )


def read_json(data: bytes, **options: Any) -> Any:
    """Read JSON of a file, which may be nested without end.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(data, **options)
    except RecursionError as err:
        raise ValueError("it is nested without end") from err


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


def blank_storage(size: int) -> torch.UntypedStorage:
    """Give zeros in place of values that are not read, for objects that cannot be built without.

    The system allots a page of them when something writes to it, which nothing does.
    """
    return torch.from_numpy(np.zeros(size, np.uint8)).untyped_storage()


def unpickled(pickled: bytes, storage_of: StorageOf, trust: Trust, names: Names) -> Any:
    """Read a pickle that is in memory; bound to its bytes, this is an archive's `assemble`."""
    return unpickle(io.BytesIO(pickled), storage_of, trust, names)
