"""The hollow checkpoint: built with any of its storages left out, and watched.

ledger · build
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from _ckpt_archive import Archive, Names, storage_id, unreadable
from _ckpt_errors import CheckpointError, CorruptError
from _ckpt_inert import Trust

# ── ledger ──────────────────────────────────────────────────────────────────────────────────────


class HollowError(Exception):
    """A checkpoint holds something that cannot be built without its values."""


def asks_for_values(err: Exception) -> bool:
    """Tell whether an error came of a tensor's being on the meta device."""
    if isinstance(err, HollowError | NotImplementedError):
        return True
    said = re.search(r"\bmeta\b|unallocated storage", str(err), re.IGNORECASE)
    torchs = isinstance(err, RuntimeError | TypeError | ValueError)
    return torchs and not isinstance(err, CheckpointError) and said is not None


class Ledger(TorchDispatchMode):
    """Knows of every living storage which records its values come from.

    Also lets a strategy mix hollow tensors with real ones: what it computes is then hollow.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch has no annotation here
        self._entries: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # by storage key
        self.asked = False  # for what a hollow tensor cannot tell
        self.awaited: set[str] = set()  # records whose values real tensors wait for

    def enter(self, storage: Any, keys: Iterable[str]) -> None:
        """Note that the values of a storage come from these records, too."""
        # a weak reference keeps the address from being given to another storage
        entry = self._entries.get(storage._cdata) or (StorageWeakRef(storage), set())  # noqa: SLF001 - as torch.multiprocessing does
        self._entries[storage._cdata] = entry  # noqa: SLF001
        entry[1].update(keys)

    def keys_of(self, tensor: torch.Tensor) -> set[str]:
        """Give the records that a tensor has its values from."""
        cells = [storage._cdata for storage in _storages(tensor)]  # noqa: SLF001
        return {key for cell in cells if cell in self._entries for key in self._entries[cell][1]}

    def origins(self) -> set[str]:
        """Give the records that living storages have their values from."""
        living = (keys for ref, keys in self._entries.values() if not ref.expired())
        return self.awaited.union(*living)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it made."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        keys = {
            key
            for tensor in given
            for storage in _storages(tensor)
            if storage._cdata in self._entries  # noqa: SLF001
            for key in self._entries[storage._cdata][1]  # noqa: SLF001
        }
        if not keys:
            return func(*args, **kwargs)
        schema = func._schema  # noqa: SLF001 - what tells that an operation writes
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_hollow, (args, kwargs))
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, NotImplementedError):
                self.asked = True
                raise
            if written and isinstance(written[0], torch.Tensor) and not written[0].is_meta:
                result = written[0]  # a real tensor stays real; its values come later
                self.awaited |= keys  # whoever reads them now would read what is not there yet
        else:
            result = func(*args, **kwargs)
        for tensor in filter(torch.is_tensor, tree_leaves((result, written))):
            for storage in _storages(tensor):
                self.enter(storage, keys)
        return result


def _hollow(leaf: Any) -> Any:
    """Put a tensor, or a device that an operation is to move to, on the meta device."""
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _storages(tensor: torch.Tensor) -> list[Any]:
    """Give all storages of a tensor: a sparse one has several."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones want it coalesced
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [part.untyped_storage() for part in parts]


# ── build ───────────────────────────────────────────────────────────────────────────────────────


def build(  # noqa: PLR0913, PLR0917 - what stays the same from round to round, and what does not
    archive: Archive,
    storages: Mapping[str, Any],
    fresh: Mapping[str, Any],
    ledger: Ledger,
    trust: Trust,
    names: Names | None = None,
) -> Any:
    """Build a checkpoint on the storages that are there.

    All others are on the meta device. The fresh ones among them are still in the byte order of
    the archive. Each is entered in the ledger under its record's key.

    Raises:
        HollowError: something cannot be built without its values (a quantized tensor, say).
        UnsafeCheckpointError: it names what nothing may run.
        CorruptError: the pickle makes no sense, or does not agree with the records.
    """
    loaded: dict[str, Any] = {}

    def storage_of(pid: Any) -> Any:
        if pid[0] == "module":  # legacy files: class, its source file, its source
            return pid[1]
        dtype, key, count = storage_id(pid)
        size = count * torch._utils._element_size(dtype)  # noqa: SLF001 - as torch.load does
        record = archive.records.get(key)
        if record is None or record.size != size:
            held = f"holds {record.size} bytes" if record else "is missing"
            raise CorruptError(
                archive.place,
                f"record data/{key} {held}, its tensor has {size}",
                "fetch the file anew",
            )
        if key not in loaded:
            storage = storages.get(key)
            if storage is None:
                storage = torch.UntypedStorage(size, device="meta")
            loaded[key] = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=dtype, _internal=True
            )
            ledger.enter(storage, [key])
            ledger.dtypes[key] = dtype
        return loaded[key]

    try:
        with unreadable(archive.place, "its pickle"):
            checkpoint = archive.assemble(storage_of, trust, {} if names is None else names)
            torch._utils._validate_loaded_sparse_tensors()  # noqa: SLF001 - as torch.load does
    except CorruptError as err:
        if isinstance(err.__cause__, RuntimeError) and len(storages) < len(archive.records):
            raise HollowError(err) from err
        raise
    finally:
        torch._utils._sparse_tensors_to_validate.clear()  # noqa: SLF001 - a failed one leaves some
    if archive.byteorder != sys.byteorder:
        for key in fresh.keys() & ledger.dtypes.keys():
            fresh[key].byteswap(ledger.dtypes[key])
    return checkpoint
