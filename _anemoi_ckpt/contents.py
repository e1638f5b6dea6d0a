"""What `peek` gives: the contents of a checkpoint, read from the hollow one."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen

from _anemoi_ckpt.anatomy import OPTIMIZER, WEIGHTS, is_module, path_to_weights, values_of
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.formats import Archive, Names, blank_storage, unreadable
from _anemoi_ckpt.hollow import HollowError, Ledger, build
from _anemoi_ckpt.metadata import NOTE, find_metadata
from _anemoi_ckpt.migrating import missing
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.pickles.inert import Inert, walk
from _anemoi_ckpt.pickles.safe import BLANK
from _anemoi_ckpt.tables import Table, folded, plain, plain_fields, section, sized


@frozen
class TensorInfo:
    """One tensor of a checkpoint."""

    key: str  # what it stands under at the top of the checkpoint; "" where that is a tensor itself
    name: str  # beneath that: of a state dict, the parameter's or buffer's
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # of its values; tied ones share them


plain.register(TensorInfo, plain_fields)


@frozen(repr=False, eq=False)
class Contents(Table):
    """What `peek` found. Prints as a table, in notebooks, too."""

    place: str
    format: str  # "torch zip", "torch legacy", "torch 0.1 tar", "TorchScript", "safetensors"
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
    parts: Mapping[str, str] = field(factory=dict)  # top-level key: "weights" or "optimizer"
    migrations: tuple[str, ...] = ()  # of the installed anemoi-models, which it has not had

    def _label(self, key: str) -> str:
        """Give the weights and the optimizer one name, whichever keys they are under."""
        return self.parts.get(key, key)

    def _rows(self) -> list[tuple[str, str]]:
        inert = [name for name, is_inert in self.classes.items() if is_inert]
        writers = [f"torch {self.torch}"] * bool(self.torch)
        writers += [f"lightning {self.lightning}"] * bool(self.lightning)
        at = {"epoch": self.epoch, "step": self.global_step}
        sizes: dict[str, int] = {}
        for key, size in self.keys.items():
            label = self._label(key)
            sizes[label] = sizes.get(label, 0) + size
        small = ", ".join(key for key, size in sizes.items() if not size)
        shown = [f"{key} {sized(size)}".lstrip() for key, size in sizes.items() if size]
        names = [tensor.name for tensor in self.tensors if self._label(tensor.key) == "weights"]
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
            *section(f"migrations missing {len(self.migrations)}", list(self.migrations)),
            ("says", " · ".join(f"{key} {value}" for key, value in self.notes.items())),
        ]
        return [(heading, line) for heading, line in rows if line and line != "0 inert"]


def _checks(checked: bool) -> str:
    return "CRC-32 recorded" if checked else "no checksums in it"


def _described(facts: Mapping[str, TensorInfo], name: str) -> str:
    """Describe shape, dtype and size of a tensor; a folded name has none in common."""
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


@frozen
class Hollow:
    """A checkpoint without its values, and which records each of its tensors has them from."""

    top: Mapping[Any, Any]  # its entries; none where it is no dict
    tensors: Mapping[tuple[str, str], torch.Tensor]  # by key and name, as in `TensorInfo`
    records: Mapping[tuple[str, str], frozenset[str]]  # keys of `Archive.records`
    names: Names


def hollow_of(archive: Archive) -> Hollow:
    """Build a checkpoint without reading its storages.

    Raises:
        CheckpointError: as for a load.
    """
    ledger, names = Ledger(), Names()
    try:
        checkpoint = build(archive, {}, ledger, {}, names)
    except HollowError:  # a quantized tensor, say
        blank = {key: blank_storage(record.size) for key, record in archive.records.items()}
        checkpoint = build(archive, blank, ledger, BLANK, names)
    top = checkpoint if isinstance(checkpoint, Mapping) else {}
    bare = all(isinstance(value, torch.Tensor) for value in top.values())
    with unreadable(archive.place, "its tree of modules"):
        tensors = _tensors({"": checkpoint} if bare else top)
    records = {name: frozenset(ledger.keys_of(each)) for name, each in tensors.items()}
    return Hollow(top, tensors, records, names)


def infos_of(hollow: Hollow) -> tuple[TensorInfo, ...]:
    """Describe the tensors of a checkpoint."""
    return tuple(
        TensorInfo(key, name, tuple(t.shape), t.dtype, t.numel() * t.element_size())
        for (key, name), t in hollow.tensors.items()
    )


def look_into(opened: Opened) -> Contents:
    """Describe the contents of a checkpoint, without reading its storages.

    Raises:
        CheckpointError: as for a load.
    """
    archive = opened.archive
    hollow = hollow_of(archive)
    top = hollow.top
    bare = all(isinstance(value, torch.Tensor) for value in top.values())
    keys = dict.fromkeys([""] if bare else map(str, top), 0)
    counted: set[str] = set()
    for (key, _), records in hollow.records.items():
        keys[key] += sum(archive.records[record].size for record in records - counted)
        counted |= records
    metadata = find_metadata(archive)
    return Contents(
        place=redact(str(archive.place)),
        format=archive.format,
        bytes=opened.bytes_stored,
        checked=any(record.crc is not None for record in archive.records.values()),
        torch=_torch_version(archive, metadata or {}),
        lightning=_scalar(top, "pytorch-lightning_version", str),
        epoch=_scalar(top, "epoch", int),
        global_step=_scalar(top, "global_step", int),
        keys=keys,
        tensors=infos_of(hollow),
        classes=dict(sorted(hollow.names.items())),
        metadata=metadata,
        notes={name: text for name, text in archive.notes.items() if name != NOTE},
        bytes_moved=opened.bytes_moved,
        parts=_parts_of(top),
        migrations=missing(top),
    )


def _parts_of(top: Mapping[Any, Any]) -> dict[str, str]:
    """Tell which top-level keys hold weights, and which an optimizer's state."""
    path = path_to_weights(top) or ()
    parts = {str(key): OPTIMIZER.name for key in OPTIMIZER.of(top)}
    if path and values_of(OPTIMIZER, top).keys() <= parts.keys():  # none beside the weights below
        parts[path[0]] = WEIGHTS.name
    return parts


def _tensors(top: Mapping[Any, Any]) -> dict[tuple[str, str], torch.Tensor]:
    """Give all tensors by key and name; those of a pickled module as its state dict has them."""
    tensors = {
        (str(key), name): tensor
        for key, value in top.items()
        if isinstance(value, Inert) and is_module(value)
        for name, tensor in value.state_dict().items()
    }
    for (key, *rest), value in walk(top):
        if isinstance(value, torch.Tensor):
            tensors.setdefault((str(key), ".".join(map(str, rest))), value)
    return tensors


def _scalar(top: Mapping[Any, Any], key: str, kind: type) -> Any:
    value = top.get(key)
    return value if type(value) is kind else None


def _torch_version(archive: Archive, metadata: Mapping[str, Any]) -> str | None:
    """Tell which torch wrote an archive: PyTorch's serialization note says which brought what."""
    provenance = metadata.get("provenance_training")
    modules = provenance.get("module_versions") if isinstance(provenance, dict) else None
    known = modules.get("torch") if isinstance(modules, dict) else None
    # anemoi-utils 0.5 notes {"version": …}
    known = known.get("version") if isinstance(known, dict) else known
    members = {posixpath.basename(name) for name in archive.members}
    if known:
        return str(known)
    if archive.format == "torch legacy":
        return "before 1.6, or in its format"
    if archive.format == "torch 0.1 tar":
        return "0.1"
    if ".format_version" in members:
        return "2.7 or later"
    if "byteorder" in members:
        return "2.1 or later"
    return "1.6 or later" if members else None
