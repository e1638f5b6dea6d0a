"""The metadata that Anemoi embeds in a checkpoint, and the arrays that it describes.

anemoi.utils.checkpoints stores them: the metadata as JSON in a record named ``anemoi.json``, in any
folder of the archive; arrays as raw bytes in records whose paths, shapes and dtypes the JSON lists.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from _anemoi_ckpt.describing import SECTIONS, metadata_of, names_in
from _anemoi_ckpt.errors import CheckpointNotFoundError, CorruptError
from _anemoi_ckpt.fetching import fetched, memory
from _anemoi_ckpt.formats import Archive, Record, read_json, unreadable
from _anemoi_ckpt.formats.torch_zip import read_record
from _anemoi_ckpt.opening import Opened

_ROOT = "archive"  # what torch calls the folder in an archive that is written to a stream
_NAMES = ("anemoi.json", "ai-models.json")  # the second one: before 2024
NOTE = "anemoi.json"  # where safetensors' own metadata have it
_FOLDER = "anemoi-metadata"
_MEMBER = f"{_FOLDER}/anemoi.json"
_ARRAY = {"path", "shape", "dtype"}


# ── read ──────────────────────────────────────────────────────────────────────────────────────


def read_metadata(archive: Archive) -> dict[str, Any]:
    """Read Anemoi's metadata.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptError: there are two, or it is not JSON.
    """
    metadata = find_metadata(archive)
    if metadata is None:
        raise CheckpointNotFoundError(
            archive.place,
            "there is no anemoi.json in it",
            "anemoi.utils.checkpoints.save_metadata writes one",
        )
    return metadata


def read_arrays(opened: Opened, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Read the supporting arrays that metadata describe, nested as their description is.

    Raises:
        CorruptError: one is not there, or not of its shape.
    """
    data = read_array_bytes(opened, metadata)
    with unreadable(opened.archive.place, "its supporting_arrays_paths"):
        return _arrays(metadata.get("supporting_arrays_paths", {}), data)


def read_array_bytes(opened: Opened, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Read the bytes of the supporting arrays, by their paths.

    Raises:
        CorruptError: one is not there.
    """
    with unreadable(opened.archive.place, "its supporting_arrays_paths"):
        entries = metadata.get("supporting_arrays_paths", {})
        records = _array_records(opened.archive, entries)
    storages = fetched(opened.source, records)
    return {
        name: memory(storage) if storage.nbytes() else b"" for name, storage in storages.items()
    }


def _metadata_record(archive: Archive) -> Record | None:
    """Find the record that holds Anemoi's metadata.

    Raises:
        CorruptError: there are two.
    """
    for name in _NAMES:
        paths = [path for path in archive.members if posixpath.basename(path) == name]
        if len(paths) > 1:
            raise CorruptError(
                archive.place, f"there are {len(paths)} records {name}", "write the file anew"
            )
        if paths:
            return archive.members[paths[0]]
    return None


def metadata_name(archive: Archive) -> str:
    """Give the name of the record that holds Anemoi's metadata; empty if there is none."""
    record = _metadata_record(archive)
    return "" if record is None else record.name


def find_metadata(archive: Archive) -> dict[str, Any] | None:
    """Read Anemoi's metadata, if there is any.

    Raises:
        CorruptError: there are two, or it is not JSON.
    """
    noted = archive.notes.get(NOTE)
    record = _metadata_record(archive)
    if noted is not None:
        name, text = NOTE, noted.encode()
    elif record is not None and archive.file is not None:
        name, text = record.name, read_record(archive.place, archive.file, record)
    else:
        return None
    with unreadable(archive.place, f"its {name}"):
        return dict(read_json(text))


def _array_records(archive: Archive, entries: Any) -> dict[str, Record]:
    """Give the records of all supporting arrays, by name.

    Raises:
        CorruptError: one of them is not there.
    """
    records = {}
    for entry in _entries(entries):
        record = archive.members.get(entry["path"])
        if record is None:
            raise CorruptError(
                archive.place, f"the array {entry['path']} is missing", "write the file anew"
            )
        records[record.name] = record
    return records


def _entries(entries: Any) -> Iterator[Mapping[str, Any]]:
    for entry in entries.values():
        if isinstance(entry, dict) and set(entry) != _ARRAY:
            yield from _entries(entry)
        else:
            yield entry


def _arrays(entries: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Make the supporting arrays of their bytes, nested as their description is."""
    return {
        key: _arrays(entry, data)
        if set(entry) != _ARRAY
        else np.frombuffer(data[entry["path"]], np.dtype(entry["dtype"])).reshape(entry["shape"])
        for key, entry in entries.items()
    }


# ── write ─────────────────────────────────────────────────────────────────────────────────────


def embedded(metadata: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Make the records of Anemoi's metadata (anemoi.utils.checkpoints.save_metadata).

    Args:
        metadata: with the paths of its arrays as they were in another archive.
        arrays: their bytes, by these paths.
    """
    moved = {path: path.partition("/")[2] for path in arrays}
    paths = _moved(metadata.get("supporting_arrays_paths", {}), moved)
    whole = {**metadata, "supporting_arrays_paths": paths}
    return {_MEMBER: as_json(whole), **{moved[path]: data for path, data in arrays.items()}}


def embedded_new(metadata: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Make the records of metadata that a user gives, with arrays nested by dataset, or not."""
    records: dict[str, Any] = {}

    def described(arrays: Mapping[str, Any], folder: str) -> dict[str, Any]:
        entries = {}
        for name, array in arrays.items():
            if isinstance(array, Mapping):
                entries[name] = described(array, f"{folder}/{name}")
                continue
            values, path = np.asarray(array), f"{folder}/{name}.numpy"
            records[path] = values.tobytes()
            entry = {"shape": list(values.shape), "dtype": str(values.dtype)}
            entries[name] = {"path": f"{_ROOT}/{path}", **entry}
        return entries

    paths = described(arrays, _FOLDER)
    return {_MEMBER: as_json({**metadata, "supporting_arrays_paths": paths}), **records}


def as_notes(members: Mapping[str, Any]) -> dict[str, str]:
    """Give what safetensors' own metadata say of records for a torch zip: they hold no arrays."""
    if _MEMBER not in members:
        return {}
    told = {**read_json(members[_MEMBER]), "supporting_arrays_paths": {}}
    return {NOTE: json.dumps(told)}


def as_json(metadata: Any) -> bytes:
    """Write metadata as JSON; arrays as lists, and what JSON does not know as its text."""
    return json.dumps(metadata, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def brought_up_to_date(metadata: dict[str, Any], checkpoint: Any) -> dict[str, Any]:
    """Have metadata describe the variables of a checkpoint, where its own describe others."""
    own = metadata_of(checkpoint)
    if not own or names_in(own) == names_in(metadata):
        return metadata
    return metadata | {name: own[name] for name in SECTIONS if name in own and name in metadata}


def _moved(entries: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Point to where the arrays are in the new archive."""
    return {
        key: _moved(entry, moved)
        if set(entry) != _ARRAY
        else {**entry, "path": f"{_ROOT}/{moved[entry['path']]}"}
        for key, entry in entries.items()
    }
