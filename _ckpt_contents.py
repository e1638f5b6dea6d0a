"""What is in a checkpoint, told from the hollow one, and the metadata that Anemoi embeds.

contents · metadata
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from attrs import frozen

from _ckpt_archive import Archive, Names, Record, read_record, unreadable
from _ckpt_errors import CorruptError, redact
from _ckpt_hollow import HollowError, Ledger, build
from _ckpt_inert import Inert, walk
from _ckpt_tables import Table, folded, section, sized

# ── contents ──────────────────────────────────────────────────────────────────────────────────


@frozen
class TensorInfo:
    """One tensor of a checkpoint."""

    key: str  # what it stands under at the top of the checkpoint; "" where that is a tensor itself
    name: str  # beneath that: of a state dict, the parameter's or buffer's
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # of its values; tied ones share them


@frozen(repr=False, eq=False)
class Contents(Table):
    """What `peek` found. Prints as a table, in notebooks, too."""

    place: str
    format: str  # "torch zip", "torch legacy", "TorchScript", "safetensors"
    bytes: int  # of the file
    checked: bool  # are there checksums that a load compares?
    torch: str | None  # version that wrote it: as Anemoi noted it, or as the layout tells
    lightning: str | None  # version that wrote it
    epoch: int | None
    global_step: int | None
    keys: Mapping[str, int]  # top-level key: bytes of its tensors, each storage counted once
    tensors: tuple[TensorInfo, ...]
    classes: Mapping[str, bool]  # classes and functions that it names: would they be inert?
    metadata: Mapping[str, Any] | None  # Anemoi's
    notes: Mapping[str, str]  # what a safetensors file says of itself
    bytes_moved: int

    def _rows(self) -> list[tuple[str, str]]:
        inert = [name for name, is_inert in self.classes.items() if is_inert]
        writers = [f"torch {self.torch}"] * bool(self.torch)
        writers += [f"lightning {self.lightning}"] * bool(self.lightning)
        at = {"epoch": self.epoch, "step": self.global_step}
        held = {_LABELS.get(key, key): size for key, size in self.keys.items()}
        small = ", ".join(key for key, size in held.items() if not size)
        shown = [f"{key} {sized(size)}".lstrip() for key, size in held.items() if size]
        names = [tensor.name for tensor in self.tensors if _LABELS.get(tensor.key) == "weights"]
        names = names or [tensor.name for tensor in self.tensors]
        facts = {tensor.name: tensor for tensor in reversed(self.tensors)}
        lines = [f"{name}  {_described(facts, name)}" for name in folded(names)]
        rows = [
            ("checkpoint", self.place),
            ("format", f"{self.format}, {sized(self.bytes)}, {_checks(self.checked)}"),
            ("written by", " · ".join(writers)),
            ("at", " · ".join(f"{what} {n}" for what, n in at.items() if n is not None)),
            ("holds", " · ".join(shown)),
            ("and", small),
            *section(f"tensors {len(self.tensors)}", lines),
            *section(f"classes {len(self.classes)}", [f"{len(inert)} inert", *inert]),
            ("anemoi", _summary(self.metadata)),
            ("says", " · ".join(f"{key} {value}" for key, value in self.notes.items())),
        ]
        return [(heading, line) for heading, line in rows if line and line != "0 inert"]


_LABELS = {
    "state_dict": "weights",
    "model_state_dict": "weights",
    "model": "weights",
    "module": "weights",
    "optimizer_states": "optimizer",
    "optimizer_state_dict": "optimizer",
}


def _checks(checked: bool) -> str:
    return "CRC-32 recorded" if checked else "no checksums in it"


def _described(facts: Mapping[str, TensorInfo], name: str) -> str:
    """Tell shape and type of a tensor; of a folded name, nothing that might differ."""
    tensor = facts.get(name)
    if tensor is None:
        return ""
    return f"{tensor.shape} {str(tensor.dtype).removeprefix('torch.')} {sized(tensor.bytes)}"


def _summary(metadata: Mapping[str, Any] | None) -> str:
    if metadata is None:
        return ""
    arrays = metadata.get("supporting_arrays_paths") or {}
    version, run = metadata.get("version", "unknown"), metadata.get("run_id", "unknown")
    return f"metadata version {version}, run {run}, {len(arrays)} supporting arrays"


def look_into(archive: Archive, size: int) -> Contents:
    """Tell what an archive holds, without any of its storages.

    Args:
        archive: what was read of it.
        size: of the file, in bytes.

    Raises:
        CheckpointError: as for a load.
    """
    ledger, names = Ledger(), Names()
    try:
        checkpoint = build(archive, {}, {}, ledger, {}, names)
    except HollowError:  # a quantized tensor, say; memory that nobody touches costs nothing
        blank = {key: torch.UntypedStorage(each.size) for key, each in archive.records.items()}
        checkpoint = build(archive, blank, {}, ledger, {}, names)
    top = checkpoint if isinstance(checkpoint, Mapping) else {}
    bare = all(isinstance(value, torch.Tensor) for value in top.values())
    tensors = []
    keys = dict.fromkeys([""] if bare else map(str, top), 0)
    counted: set[str] = set()
    with unreadable(archive.place, "its tree of modules"):
        found = _tensors({"": checkpoint} if bare else top)
    for (key, name), value in found.items():
        size_of_values = value.numel() * value.element_size()
        tensors.append(TensorInfo(key, name, tuple(value.shape), value.dtype, size_of_values))
        fresh = ledger.keys_of(value) - counted
        counted |= fresh
        keys[key] += sum(archive.records[record].size for record in fresh)
    metadata = find_metadata(archive)
    return Contents(
        place=redact(str(archive.place)),
        format=archive.format,
        bytes=size,
        checked=any(record.crc is not None for record in archive.records.values()),
        torch=_torch_version(archive, metadata or {}),
        lightning=_scalar(top, "pytorch-lightning_version", str),
        epoch=_scalar(top, "epoch", int),
        global_step=_scalar(top, "global_step", int),
        keys=keys,
        tensors=tuple(tensors),
        classes=dict(sorted(names.items())),
        metadata=metadata,
        notes=archive.notes,
        bytes_moved=0,
    )


def _tensors(top: Mapping[Any, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """Give all tensors by key and name; those of a pickled module as its state dict has them."""
    found = {
        (str(key), name): tensor
        for key, value in top.items()
        if isinstance(value, Inert) and hasattr(value, "state_dict")
        for name, tensor in value.state_dict().items()
    }
    for (key, *rest), value in walk(top):
        if isinstance(value, torch.Tensor):
            found.setdefault((str(key), ".".join(map(str, rest))), value)
    return found


def _scalar(top: Mapping[Any, Any], key: str, kind: type) -> Any:
    value = top.get(key)
    return value if type(value) is kind else None


def _torch_version(archive: Archive, metadata: Mapping[str, Any]) -> str | None:
    """Tell which torch wrote an archive: PyTorch's serialization note says which brought what."""
    provenance = metadata.get("provenance_training")
    modules = provenance.get("module_versions") if isinstance(provenance, dict) else None
    known = modules.get("torch") if isinstance(modules, dict) else None
    members = {posixpath.basename(name) for name in archive.members}
    if known:
        return str(known)
    if archive.format == "torch legacy":
        return "before 1.6, or in its format"
    if ".format_version" in members:
        return "2.7 or later"
    if "byteorder" in members:
        return "2.1 or later"
    return "1.6 or later" if members else None


# ── metadata ──────────────────────────────────────────────────────────────────────────────────
#
# As anemoi.utils.checkpoints has it: JSON in a record of this name, in whatever folder; arrays as
# raw bytes in records that it points to.

_NAMES = ("anemoi.json", "ai-models.json")  # the second before 2024
ARRAY = {"path", "shape", "dtype"}


def metadata_record(archive: Archive) -> Record | None:
    """Find the record that holds Anemoi's metadata.

    Raises:
        CorruptError: there are two.
    """
    for name in _NAMES:
        found = [each for each in archive.members if posixpath.basename(each) == name]
        if len(found) > 1:
            raise CorruptError(
                archive.place, f"there are {len(found)} records {name}", "write the file anew"
            )
        if found:
            return archive.members[found[0]]
    return None


def find_metadata(archive: Archive) -> dict[str, Any] | None:
    """Read Anemoi's metadata, if there is any.

    Raises:
        CorruptError: there are two, or it is no JSON.
    """
    record = metadata_record(archive)
    if record is None or archive.file is None:
        return None
    text = read_record(archive.place, archive.file, record)
    with unreadable(archive.place, f"its {record.name}"):
        return dict(json.loads(text))


def array_records(archive: Archive, entries: Any) -> dict[str, Record]:
    """Give the records of all supporting arrays, by name.

    Raises:
        CorruptError: one of them is not there.
    """
    found = {}
    for entry in _entries(entries):
        record = archive.members.get(entry["path"])
        if record is None:
            raise CorruptError(
                archive.place, f"the array {entry['path']} is missing", "write the file anew"
            )
        found[record.name] = record
    return found


def _entries(entries: Any) -> Iterator[Mapping[str, Any]]:
    for entry in entries.values():
        if isinstance(entry, dict) and set(entry) != ARRAY:
            yield from _entries(entry)
        else:
            yield entry


def arrays_of(entries: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Make the supporting arrays of their bytes, nested as their description is."""
    return {
        key: arrays_of(entry, data)
        if set(entry) != ARRAY
        else np.frombuffer(data[entry["path"]], np.dtype(entry["dtype"])).reshape(entry["shape"])
        for key, entry in entries.items()
    }
