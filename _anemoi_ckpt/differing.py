"""What `diff` gives: how two checkpoints, or a checkpoint and a model, differ.

Tensors are told apart by the CRC-32, size and layout of their records, which both directories have:
no tensor is moved. Where these cannot tell, the values are fetched if they are asked for.

compare · sides · values
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch.multiprocessing.reductions import StorageWeakRef
from zlib_ng import zlib_ng

from _anemoi_ckpt.anatomy import path_to_weights, weights_at
from _anemoi_ckpt.compat import without_modes
from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.formats import Archive
from _anemoi_ckpt.loading import completed
from _anemoi_ckpt.metadata import find_metadata
from _anemoi_ckpt.opening import Opened
from _anemoi_ckpt.pickles.inert import walk
from _anemoi_ckpt.pickles.reading import Trust
from _anemoi_ckpt.pictures import Branch, as_text, as_tree, captioned, grown, joined, page
from _anemoi_ckpt.planning import Strategy, applied, planned, random_states
from _anemoi_ckpt.tables import Table, as_html, folded, plain, plain_fields, section, sized
from _anemoi_ckpt.tensors import dense, is_strided

BATCH_BYTES = 256 * 1024**2  # of values that are compared at once
_SHOWN = 40  # characters of a value
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in how an object prints
_ABSENT = "nothing"  # what an entry is that one side lacks

Described = tuple[tuple[Any, ...], torch.dtype]  # of a nested tensor, the shape of each part


@frozen
class Norms:
    """How far two tensors are from each other."""

    max: float  # of the absolute differences
    mean: float  # of these
    relative: float  # norm of the difference, of the norm of the first


plain.register(Norms, plain_fields)


@frozen(repr=False, eq=False)
class Difference(Table):
    """How two checkpoints differ. True in a condition if they do. Prints as a table.

    Tensors of the weights have their own names, all others are under their keys.
    """

    a: str
    b: str
    equal: tuple[str, ...]
    changed: tuple[str, ...]
    reshaped: Mapping[str, tuple[Described, Described]]  # of another shape or dtype
    added: tuple[str, ...]  # in b alone
    gone: tuple[str, ...]  # in a alone
    undecided: tuple[str, ...]  # no checksum tells, and values were not asked for
    norms: Mapping[str, Norms]  # of the changed tensors, if values were asked for
    entries: Mapping[str, tuple[str, str]]  # what is no tensor: metadata, hyper-parameters, epoch
    bytes_moved: int
    names: tuple[str, ...] = ()  # of all tensors, first of the weights, in the order of a and b

    @property
    def same(self) -> bool:
        """Whether nothing differs, for certain."""
        return not (
            self.changed
            or self.reshaped
            or self.added
            or self.gone
            or self.undecided
            or self.entries
        )

    def __bool__(self) -> bool:
        """Tell the opposite of `same`."""
        return not self.same

    def _rows(self) -> list[tuple[str, str]]:
        layers = joined(self._layers()).children
        drawn = as_text(evolve(each, children=()) for each in layers)
        several = len(layers) > 1 and not self.same
        return self._facts(section("layers", drawn) if several else [])

    def _layers(self) -> Branch:
        """Arrange the tensors by layer: a bar is the greatest relative change beneath it.

        Without values, it is the share of the tensors that differ. What is equal is one row.
        """
        fates = {
            **dict.fromkeys(self.equal, "equal"),
            **dict.fromkeys(self.changed, "changed"),
            **{n: f"{_told(old)} → {_told(new)}" for n, (old, new) in self.reshaped.items()},
            **dict.fromkeys(self.added, "added"),
            **dict.fromkeys(self.gone, "gone"),
            **dict.fromkeys(self.undecided, "undecided"),
        }
        leaves = []
        for name in self.names:
            told = fates[name]
            norms = self.norms.get(name)
            told_all = f"{told}: {_told_norms(norms)}" if norms else told
            relative = norms.relative if norms else 0.0
            leaves.append((name, _Fate(told_all, relative, 1, int(told != "equal"))))
        root: _Fate = grown(leaves, functools.partial(_drawn, self._full))
        return root.branch

    @property
    def _full(self) -> float | None:
        """The greatest relative change, of those of tensors that were not zero; None if unknown."""
        known = [e.relative for e in self.norms.values() if e.relative < math.inf]
        return max(known, default=1.0) if self.norms else None

    def _repr_html_(self) -> str:
        """Show the table in a notebook, and the layers as a tree with bars."""
        caption = (
            f"bar: relative change, {self._full:.3g} where it is full"
            if self.norms
            else "bar: share of the tensors that differ; values=True tells how far"
        )
        return page(as_html(self._facts([])), captioned(caption), as_tree(self._layers()))

    def _facts(self, layers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        shapes = [f"{n}: {_told(old)} → {_told(new)}" for n, (old, new) in self.reshaped.items()]
        far = sorted(self.norms, key=lambda name: -self.norms[name].relative)
        changed = [f"{n}  {_told_norms(self.norms[n])}" for n in far] or folded(self.changed)
        entries = [f"{name}: {old} → {new}" for name, (old, new) in self.entries.items()]
        sections: dict[str, Sequence[str]] = {
            "changed": changed,
            "reshaped": shapes,
            "added": folded(self.added),
            "gone": folded(self.gone),
            "undecided": folded(self.undecided),
            "entries": entries,
        }
        rows = [("a", self.a), ("b", self.b), ("moved", sized(self.bytes_moved))]
        rows += [("equal", f"{len(self.equal)} tensors"), *layers]
        for heading, lines in sections.items():
            if lines:
                rows += section(f"{heading} {len(getattr(self, heading))}", lines)
        if self.undecided:
            rows.append(("", "no checksum tells of these: values=True fetches them"))
        return [*rows, ("verdict", "the same" if self.same else "they differ")]


@frozen
class _Fate:
    """What became of a tensor, or of those of a layer."""

    told: str
    relative: float  # the greatest of the relative changes
    count: int
    differing: int
    branch: Branch = field(factory=Branch)


def _drawn(full: float | None, name: str, own: Sequence[_Fate], below: Sequence[_Fate]) -> _Fate:
    """Draw a layer, or a tensor, beside the relative change whose bar is full."""
    fates = [*own, *below]
    count, differing = sum(e.count for e in fates), sum(e.differing for e in fates)
    relative = max((each.relative for each in fates), default=0.0)
    if full is None:
        share = differing / max(1, count)
    else:
        share = 1.0 if relative > full else relative / (full or 1.0)
    if own and not below:
        return evolve(own[0], branch=Branch(name, own[0].told, share))
    far = f", relative {relative:.3g}" if relative else ""
    told = f"{differing} of {count} differ{far}" if differing else f"{count} equal"
    itself = [Branch(name, each.told, share) for each in own]
    rows = [*itself, *(each.branch for each in below)] if differing else []
    return _Fate(told, relative, count, differing, Branch(name, told, share, rows))


def _told(described: Described) -> str:
    shape, dtype = described
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def _told_norms(norms: Norms) -> str:
    return f"max {norms.max:.3g}, mean {norms.mean:.3g}, relative {norms.relative:.3g}"


# ── compare ───────────────────────────────────────────────────────────────────────────────────


def compared(a: Side, b: Side, *, values: bool) -> Difference:
    """Tell how two sides differ.

    Args:
        a: one of them.
        b: the other one.
        values: fetch what differs or may differ, and tell how far it is apart.

    Raises:
        CheckpointError: values cannot be fetched.
    """
    is_partial = a.is_partial or b.is_partial
    ours, theirs = (s.weights if is_partial else {**s.others, **s.weights} for s in (a, b))
    both = [name for name in ours if name in theirs]
    reshaped = {
        name: (ours[name].described, theirs[name].described)
        for name in both
        if ours[name].described != theirs[name].described
    }
    verdicts = {n: _is_equal(ours[n], theirs[n]) for n in both if n not in reshaped}
    norms: dict[str, Norms] = {}
    if values:
        for name, one, other in _pairs(a, b, [n for n, equal in verdicts.items() if not equal]):
            known = not (one.is_meta or other.is_meta)  # a tensor on meta has no values
            verdicts[name] = _same_values(one, other) if known else one.is_meta == other.is_meta
            if known and not verdicts[name]:
                norms[name] = _norms(one, other)
    return Difference(
        a=a.place,
        b=b.place,
        equal=tuple(name for name, equal in verdicts.items() if equal),
        changed=tuple(name for name, equal in verdicts.items() if equal is False),
        reshaped=reshaped,
        added=tuple(name for name in theirs if name not in ours),
        gone=tuple(name for name in ours if name not in theirs),
        undecided=tuple(name for name, equal in verdicts.items() if equal is None),
        norms=norms,
        entries={} if is_partial else _differing_entries(a.entries, b.entries),
        bytes_moved=a.bytes_moved() + b.bytes_moved(),
        names=tuple(dict.fromkeys((*a.weights, *b.weights, *ours, *theirs))),
    )


def _differing_entries(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    return {
        name: (_shown(ours, name), _shown(theirs, name))
        for name in dict.fromkeys((*ours, *theirs))
        if name not in ours or name not in theirs or not _same_entry(ours[name], theirs[name])
    }


def _same_entry(one: Any, other: Any) -> bool:
    """Compare two things that are no tensors; inert ones and arrays by how they print."""
    if type(one) is type(other) and isinstance(one, bool | int | float | str | bytes | None):
        return bool(one == other or (one != one and other != other))  # noqa: PLR0124 - a NaN
    return type(one) is type(other) and _ADDRESS.sub("", repr(one)) == _ADDRESS.sub("", repr(other))


def _shown(entries: Mapping[str, Any], name: str) -> str:
    if name not in entries:
        return _ABSENT
    text = redact(repr(entries[name]))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# ── sides ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Facts:
    """What is known of a tensor without its values."""

    described: Described
    # size, CRC-32 and byte order of the record that it is on, and its place there; None if unknown
    record: tuple[Any, ...] | None = None
    crc: int | None = None  # of its values, where they are all of a record, in their order
    bytes: int = 0


@frozen
class Side:
    """One of two things that are compared."""

    place: str
    weights: Mapping[str, _Facts]
    others: Mapping[str, _Facts]  # of optimizers, averages and callbacks
    entries: Mapping[str, Any]  # what is no tensor
    read: Callable[[Collection[str]], dict[str, torch.Tensor]]
    bytes_moved: Callable[[], int]
    is_partial: bool = False  # whether there are but weights, of a model, say


def in_memory(checkpoint: Any, place: str, strategies: Sequence[Strategy]) -> Side:
    """Describe a checkpoint, state dict or model in memory."""
    whole = checkpoint.state_dict() if isinstance(checkpoint, torch.nn.Module) else checkpoint
    found = applied(strategies, whole, place)
    side = _held(found, place, {}, lambda: 0)
    path = path_to_weights(found)
    # a state dict alone, with or without objects in it that have tensors
    return evolve(side, is_partial=path == () or not side.others)


def stored(checkpoint: Opened, strategies: Sequence[Strategy], trust: Trust) -> Side:
    """Describe an open checkpoint, by what its directory tells of the records.

    Raises:
        CheckpointError: it cannot be read.
    """
    archive = checkpoint.archive
    place = redact(str(archive.place))
    moved = lambda: checkpoint.bytes_moved  # noqa: E731 - a property, asked for later
    originals: set[StorageWeakRef] = set()
    rewind = random_states()
    found = planned(checkpoint, {}, [functools.partial(_note, originals), *strategies], trust)
    rewind()
    if found.result is None and found.needed:  # a strategy asked for values
        whole = completed(checkpoint, strategies, trust, progress=False).result
        return _held(whole, place, _metadata_of(archive, strategies, whole), moved)

    def describe(tensor: torch.Tensor) -> _Facts:
        described = _described(tensor)
        if not tensor.numel():
            return _Facts(described, crc=zlib_ng.crc32(b""))
        if not is_strided(tensor) or StorageWeakRef(tensor.untyped_storage()) not in originals:
            return _Facts(described)
        keys = found.ledger.keys_of(tensor)
        is_lazy = tensor.is_conj() or tensor.is_neg()
        if len(keys) != 1 or keys & found.ledger.written or is_lazy:
            return _Facts(described)
        record = archive.records[next(iter(keys))]
        size = tensor.numel() * tensor.element_size()
        if record.crc is None:
            return _Facts(described, bytes=size)
        layout = tensor.storage_offset(), tensor.stride()
        is_whole = tensor.is_contiguous() and size == record.size
        return _Facts(
            described,
            (record.size, record.crc, archive.byteorder, *layout),
            record.crc if is_whole and archive.byteorder == "little" else None,
            size,
        )

    def read(names: Collection[str]) -> dict[str, torch.Tensor]:
        pick = functools.partial(_picked, names)
        result = completed(checkpoint, [*strategies, pick], trust, progress=False).result
        return dict(result)

    weights, others, entries = _parts_of(found.result)
    return Side(
        place,
        {name: describe(tensor) for name, tensor in weights.items()},
        {name: describe(tensor) for name, tensor in others.items()},
        entries | _entries_of(_metadata_of(archive, strategies, found.result)),
        read,
        moved,
    )


def _metadata_of(archive: Archive, strategies: Sequence[Strategy], result: Any) -> dict[str, Any]:
    """Give what Anemoi embeds, unless strategies made a state dict: these are no part of it."""
    is_chosen = bool(strategies) and path_to_weights(result) == ()
    return {} if is_chosen else {"metadata": find_metadata(archive)}


def _note(originals: set[StorageWeakRef], checkpoint: Any) -> Any:
    """Note the storages of a checkpoint before the strategies, without keeping them."""
    tensors = [leaf for _, leaf in walk(checkpoint) if isinstance(leaf, torch.Tensor)]
    with without_modes():  # a hollow tensor has a storage, too
        originals |= {StorageWeakRef(t.untyped_storage()) for t in tensors if is_strided(t)}
    return checkpoint


def _held(checkpoint: Any, place: str, facts: Mapping[str, Any], moved: Callable[[], int]) -> Side:
    weights, others, entries = _parts_of(checkpoint)
    return Side(
        place,
        {name: _facts_of(tensor) for name, tensor in weights.items()},
        {name: _facts_of(tensor) for name, tensor in others.items()},
        entries | _entries_of(facts),
        functools.partial(_picked, checkpoint=checkpoint),
        moved,
    )


def _facts_of(tensor: torch.Tensor) -> _Facts:
    """Describe a tensor in memory by the CRC-32 of its values."""
    described = _described(tensor)
    if tensor.is_meta or not is_strided(tensor) or tensor.is_quantized:
        return _Facts(described)
    data = _bytes_of(tensor)
    return _Facts(described, None, zlib_ng.crc32(data), len(data))


def _described(tensor: torch.Tensor) -> Described:
    """Give shape and dtype; of a nested tensor, the shape of each part."""
    if tensor.is_nested and not tensor.is_meta:  # which has its shapes from values
        return tuple(tuple(part.shape) for part in tensor.unbind()), tensor.dtype
    return tuple(tensor.shape), tensor.dtype


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Give a tensor's values, one after the other, little-endian as torch stores them."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _parts_of(
    checkpoint: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Give the weights by name, all other tensors by path, and what is no tensor, by path."""
    path = path_to_weights(checkpoint)
    state_dict = {} if path is None else weights_at(checkpoint, path)
    weights = {str(n): each for n, each in state_dict.items() if isinstance(each, torch.Tensor)}
    others: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = {}
    for keys, leaf in walk(checkpoint):
        name = ".".join(map(str, keys))
        if not isinstance(leaf, torch.Tensor):
            entries[name] = leaf
        elif path is None or keys[:-1] != path:  # in an object that is no tensor, too
            others[name] = leaf
    return weights, others, entries


def _entries_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join(map(str, keys)): leaf for keys, leaf in walk(facts) if leaf is not None}


# ── values ────────────────────────────────────────────────────────────────────────────────────


def _is_equal(one: _Facts, other: _Facts) -> bool | None:
    """Tell whether two tensors of one shape and dtype are equal; None if nothing tells."""
    if one.record is not None and one.record == other.record:
        return True
    if one.crc is not None and other.crc is not None:
        return one.crc == other.crc
    return None


def _picked(names: Collection[str], checkpoint: Any) -> dict[str, torch.Tensor]:
    weights, others, _ = _parts_of(checkpoint)
    return {name: each for name, each in (others | weights).items() if name in names}


def _pairs(
    a: Side, b: Side, names: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Fetch the values of both sides, some at a time."""
    sizes = {name: facts.bytes for name, facts in (*a.others.items(), *a.weights.items())}
    batch: list[str] = []
    for number, name in enumerate(names, 1):
        batch.append(name)
        if sum(sizes[each] for each in batch) >= BATCH_BYTES or number == len(names):
            ours, theirs = a.read(batch), b.read(batch)
            yield from ((each, ours[each], theirs[each]) for each in batch)
            batch = []


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bit by bit, so that a NaN equals itself."""
    one, other = _dense(one), _dense(other)
    return _bytes_of(one) == _bytes_of(other)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    return dense(tensor)


def _norms(one: torch.Tensor, other: torch.Tensor) -> Norms:
    wide = torch.complex128 if one.is_complex() else torch.float64
    first, second = (_dense(each).detach().cpu().to(wide) for each in (one, other))
    apart = (second - first).abs()
    size = first.abs().norm().item()
    distance = apart.norm().item()
    return Norms(
        apart.max().item(),
        apart.mean().item(),
        distance / size if size else float("inf") * bool(distance),
    )
