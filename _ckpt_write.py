"""How a checkpoint is written to a stream: as torch's zip, or as safetensors.

Knows the formats, and nothing of places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch.serialization import DEFAULT_PROTOCOL, _open_zipfile_writer, _save

import _ckpt_inert
from _ckpt_archive import DTYPES
from _ckpt_contents import ARRAY

_ROOT = "archive"  # what torch calls the folder in an archive that is written to a stream


def write_zip(checkpoint: Any, stream: BinaryIO, members: Mapping[str, Any]) -> None:
    """Write what `torch.save` writes, inert objects as what they were read from.

    Args:
        checkpoint: what to write.
        stream: need not be seekable.
        members: more records, by name beneath the archive's root.
    """
    with _open_zipfile_writer(stream) as archive:
        _save(checkpoint, archive, _ckpt_inert, DEFAULT_PROTOCOL, False)
        for name, data in members.items():
            archive.write_record(name, bytes(data), len(data))


def embedded(metadata: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Make the records of Anemoi's metadata (anemoi.utils.checkpoints.save_metadata).

    Args:
        metadata: with the paths of its arrays as they were in another archive.
        arrays: their bytes, by these paths.
    """
    moved = {path: path.partition("/")[2] for path in arrays}
    paths = _moved(metadata.get("supporting_arrays_paths", {}), moved)
    text = json.dumps({**metadata, "supporting_arrays_paths": paths})
    return {
        "anemoi-metadata/anemoi.json": text.encode(),
        **{moved[path]: data for path, data in arrays.items()},
    }


def _moved(entries: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Point to where the arrays are in the new archive."""
    return {
        key: _moved(entry, moved)
        if set(entry) != ARRAY
        else {**entry, "path": f"{_ROOT}/{moved[entry['path']]}"}
        for key, entry in entries.items()
    }


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(checkpoint: Any, stream: BinaryIO) -> None:
    """Write a state dict as safetensors, tensor by tensor.

    Raises:
        ValueError: it holds more than tensors by name, or a type that the format has no name for.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"safetensors holds tensors by name, not a {type(checkpoint).__name__}")  # noqa: TRY004 - one kind of error for what does not fit the format
    header: dict[str, Any] = {}
    end = 0
    for name, value in checkpoint.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in _NAMES:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"safetensors holds no {kind} such as {name}; save the weights alone")
        size = math.prod(value.shape) * value.element_size()
        shape = list(value.shape)
        header[str(name)] = {
            "dtype": _NAMES[value.dtype],
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
