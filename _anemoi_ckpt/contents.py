"""What `peek` gives: the contents of a checkpoint, read from the hollow one.

show · look
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from attrs import evolve, field, frozen

from _anemoi_ckpt.anatomy import OPTIMIZER, WEIGHTS, is_module, path_to_weights, values_of
from _anemoi_ckpt.describing import metadata_of, variables_in
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.formats import Archive, Names, blank_storage, unreadable
from _anemoi_ckpt.hollow import HollowError, Ledger, build
from _anemoi_ckpt.metadata import NOTE, find_metadata
from _anemoi_ckpt.migrating import missing
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.pickles.inert import Inert, walk
from _anemoi_ckpt.pickles.safe import BLANK
from _anemoi_ckpt.pictures import as_tree, page
from _anemoi_ckpt.provenance import averages_of, optimizers_of, writers_of
from _anemoi_ckpt.tables import Table, as_html, folded, section, sized
from _anemoi_ckpt.tensors import is_strided
from _anemoi_ckpt.trees import TensorInfo, Tree, branch_of, tree_of

# ── show ──────────────────────────────────────────────────────────────────────────────────────

_VARIABLES = 8  # of a dataset, in a table


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
    # values of the weights, of tied ones once; with buffers: a state dict does not tell them apart
    parameters: int = 0
    # "torch", "lightning", "anemoi.models", …: the version of each that wrote it, if that is told
    writers: Mapping[str, str] = field(factory=dict)
    optimizers: tuple[str, ...] = ()  # names and learning rates, as their parameter groups tell
    averages: tuple[str, ...] = ()  # where averaged weights are, as paths of keys
    variables: Mapping[str, Mapping[str, str]] = field(
        factory=dict
    )  # Anemoi's: dataset: name: unit

    def tree(self) -> Tree:
        """Arrange the tensors by module, and sum up what they take; nothing more is moved."""
        return tree_of(self.tensors)

    def _label(self, key: str) -> str:
        """Give the weights and the optimizer one name, whichever keys they are under."""
        return self.parts.get(key, key)

    def _rows(self) -> list[tuple[str, str]]:
        names = [tensor.name for tensor in self.tensors if self._label(tensor.key) == "weights"]
        names = names or [tensor.name for tensor in self.tensors]
        facts = {tensor.name: tensor for tensor in reversed(self.tensors)}
        lines = [f"{name}  {_described(facts, name)}" for name in folded(names)]
        return self._facts(section(f"tensors {len(self.tensors)}", lines))

    def _facts(self, tensors: list[tuple[str, str]]) -> list[tuple[str, str]]:
        inert = [name for name, is_inert in self.classes.items() if is_inert]
        at = {"epoch": self.epoch, "step": self.global_step}
        sizes: dict[str, int] = {}
        for key, size in self.keys.items():
            label = self._label(key)
            sizes[label] = sizes.get(label, 0) + size
        small = ", ".join(key for key, size in sizes.items() if not size)
        shown = [f"{key} {sized(size)}".lstrip() for key, size in sizes.items() if size]
        rows = [
            ("checkpoint", self.place),
            ("format", f"{self.format}, {sized(self.bytes)}, {_checks(self.checked)}"),
            ("written by", " · ".join(f"{name} {v}" for name, v in self.writers.items())),
            ("at", " · ".join(f"{what} {n}" for what, n in at.items() if n is not None)),
            ("holds", " · ".join(shown)),
            ("and", small),
            ("parameters", f"{self.parameters:,}" if self.parameters else ""),
            ("optimizer", " · ".join(self.optimizers)),
            ("averages", ", ".join(self.averages)),
            *tensors,
            *section(f"classes {len(self.classes)}", [f"{len(inert)} inert", *inert]),
            ("anemoi", _summary(self.metadata)),
            *_told_variables(self.variables),
            *section(f"migrations missing {len(self.migrations)}", list(self.migrations)),
            ("says", " · ".join(f"{key} {value}" for key, value in self.notes.items())),
        ]
        return [(heading, line) for heading, line in rows if line and line != "0 inert"]

    def _repr_html_(self) -> str:
        """Show the table in a notebook, and the tensors as a tree that unfolds."""
        facts = self._facts([("tensors", f"{len(self.tensors)}")])
        return page(as_html(facts), as_tree(branch_of(self.tree())))


def _told_variables(variables: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """Give a row for each dataset, of variables and their units."""
    lines = []
    for dataset, units in variables.items():
        told = [f"{name} ({unit})" if unit else name for name, unit in units.items()]
        more = f", … and {len(told) - _VARIABLES} more" if len(told) > _VARIABLES else ""
        lines.append(f"{dataset}: {len(told)}: {', '.join(told[:_VARIABLES])}{more}")
    return section("variables", lines) if lines else []


def _checks(checked: bool) -> str:
    return "CRC-32 recorded" if checked else "no checksums in it"


def _described(facts: Mapping[str, TensorInfo], name: str) -> str:
    """Describe shape, dtype and size of a tensor; a folded name has none in common."""
    return facts[name].described if name in facts else ""


def _summary(metadata: Mapping[str, Any] | None) -> str:
    if metadata is None:
        return ""
    arrays = metadata.get("supporting_arrays_paths") or {}
    version, run = metadata.get("version", "unknown"), metadata.get("run_id", "unknown")
    return f"metadata version {version}, run {run}, {len(arrays)} supporting arrays"


# ── look ──────────────────────────────────────────────────────────────────────────────────────


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
    first: dict[Any, str] = {}  # of the tensors at one place of a record
    infos = []
    for (key, name), tensor in hollow.tensors.items():
        size = tensor.numel() * tensor.element_size()
        info = TensorInfo(key, name, tuple(tensor.shape), tensor.dtype, size)
        records = hollow.records[key, name]
        if size and records and is_strided(tensor):
            same = records, tensor.storage_offset(), size
            info = evolve(info, tied=first.get(same, ""))
            first.setdefault(same, info.path)
        infos.append(info)
    return tuple(infos)


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
        size = sum(archive.records[record].size for record in records - counted)
        keys[key] = keys.get(key, 0) + size  # an inert object has arguments beside its entries
        counted |= records
    metadata = find_metadata(archive)
    noted = metadata or metadata_of(top)
    writers = writers_of(archive, top, noted)
    tensors = infos_of(hollow)
    path = path_to_weights(top) or ()
    return Contents(
        place=redact(str(archive.place)),
        format=archive.format,
        bytes=opened.bytes_stored,
        checked=any(record.crc is not None for record in archive.records.values()),
        torch=writers.get("torch"),
        lightning=writers.get("lightning"),
        epoch=_scalar(top, "epoch", int),
        global_step=_scalar(top, "global_step", int),
        keys=keys,
        tensors=tensors,
        classes=dict(sorted(hollow.names.items())),
        metadata=metadata,
        notes={name: text for name, text in archive.notes.items() if name != NOTE},
        bytes_moved=opened.bytes_moved,
        parts=_parts_of(top),
        migrations=missing(top),
        parameters=_count_parameters(tensors, ".".join(path)),
        writers=writers,
        optimizers=tuple(optimizers_of(top)),
        averages=tuple(averages_of(top)),
        variables=variables_in(noted),
    )


def _count_parameters(tensors: Iterable[TensorInfo], path: str) -> int:
    """Count the values of the tensors of a state dict, those that are numbers of floating point."""
    return sum(
        each.bytes // each.dtype.itemsize
        for each in tensors
        if (each.path.startswith(f"{path}.") if path else not (each.key and each.name))
        and not each.tied
        and (each.dtype.is_floating_point or each.dtype.is_complex)
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
