"""The format of safetensors, read and written (safetensors' README, "Format").

Eight bytes, little-endian, give the length of a JSON header; the header has for each name dtype,
shape and offsets from its end on; then come the tensors, without gaps.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from attrs import frozen

from _anemoi_ckpt.compat import MissingDtypeError
from _anemoi_ckpt.errors import CorruptError
from _anemoi_ckpt.formats import Archive, Names, Record, read_json, unreadable
from _anemoi_ckpt.pickles.reading import StorageOf, Trust

_FIELDS = {"dtype", "shape", "data_offsets"}
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
_DTYPES = {  # the names of torch's, of which an older one does not have all
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F4": "float4_e2m1fn_x2",  # two values in a byte, which the shape counts
    "F6_E2M3": "float6_e2m3fn",  # not in torch, so far
    "F6_E3M2": "float6_e3m2fn",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in _DTYPES.items() if hasattr(torch, dtype)
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
    if length > min(size - 8, HEADER_LIMIT):
        raise CorruptError(
            place, f"its header claims {length} bytes of {size}", "was its upload complete?"
        )
    with unreadable(place, "its header"):
        header = read_json(file.read(length), object_pairs_hook=_compact)
        notes = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        records = {}
        end = 8 + length
        # those without bytes first, which stand where another begins
        for name in sorted(header, key=lambda name: header[name].data_offsets):
            told = header[name]
            dtype, shape = _dtype(told.dtype), told.shape
            if told.dtype == "F4":
                _count(shape)
                *outer, inner = shape
                shape = (*outer, inner // 2 if inner % 2 == 0 else "an odd count")
            first, last = (8 + length + operator.index(offset) for offset in told.data_offsets)
            if first != end or last - first != _count(shape) * dtype.itemsize:
                raise ValueError(f"{name!r:.80} is not as long as its shape, or stands in a gap")
            tensors[name] = dtype, shape
            records[name] = Record(name, first, first, last - first, None)
            end = last
        if end != size:
            raise ValueError(f"it describes {end} bytes of {size}")
        assemble = functools.partial(_tensors, {name: tensors[name] for name in header})
    return Archive(place, "safetensors", records, assemble, notes=notes)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise MissingDtypeError(_DTYPES[name])  # a KeyError where the name is none at all
    return DTYPES[name]


class _Told(NamedTuple):
    """What the header tells of a tensor: a third of the memory that a dict and two lists take."""

    dtype: str
    shape: tuple[Any, ...]
    data_offsets: tuple[Any, ...]


def _compact(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Told:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    if found.keys() >= _FIELDS and type(found["shape"]) is list:  # and no metadata, which is text
        return _Told(found["dtype"], tuple(found["shape"]), tuple(found["data_offsets"]))
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


_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    checkpoint: Any, stream: BinaryIO, notes: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors, tensor by tensor.

    Args:
        checkpoint: what to write.
        stream: need not be seekable.
        notes: what the file is to say of itself.

    Raises:
        ValueError: it holds more than tensors by name, or a type that the format has no name for.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"safetensors holds tensors by name, not a {type(checkpoint).__name__}")  # noqa: TRY004 - one kind of error for what does not fit the format
    told = {"format": "pt", **(notes or {})}  # as torch's own writers have it
    header: dict[str, Any] = {"__metadata__": told}
    end = 0
    for name, value in checkpoint.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPE_NAMES:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"safetensors holds no {kind} such as {name}; save the weights alone")
        if str(name) in header:
            raise ValueError(f"safetensors holds one tensor called {name}, and not __metadata__")
        size = math.prod(value.shape) * value.element_size()
        shape = list(value.shape)
        if _DTYPE_NAMES[value.dtype] == "F4":
            shape[-1] *= 2
        header[str(name)] = {
            "dtype": _DTYPE_NAMES[value.dtype],
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    stream.write(len(text).to_bytes(8, "little") + text)
    for value in checkpoint.values():
        plain = value.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        stream.write(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
