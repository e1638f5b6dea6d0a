"""The pickler that writes inert objects as the objects that they were read from.

A tensor that is a view of a larger storage is written without the rest of the storage, if nothing
else in the checkpoint has a part of that.

pickler · views
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from _anemoi_ckpt.pickles.inert import (
    NEW_OBJECT,
    REBUILD_SUBCLASS,
    Inert,
    InertGlobal,
    InertMapping,
    walk,
)
from _anemoi_ckpt.tensors import is_strided, view_key

# ── pickler ───────────────────────────────────────────────────────────────────────────────────

_PYTHON_PICKLER: Any = pickle._Pickler  # typeshed does not have it


class Pickler(_PYTHON_PICKLER):  # type: ignore[misc] # it is Any
    """Writes inert objects as what they were read from."""

    dispatch: ClassVar[dict[type, Callable[[Any, Any], None]]] = dict(_PYTHON_PICKLER.dispatch)

    def _save_global(self, obj: InertGlobal) -> None:
        outer, _, inner = obj.name.rpartition(".")
        if outer and self.proto < 4:  # noqa: PLR2004 - which has no dotted names
            self.save_reduce(getattr, (InertGlobal(obj.module, outer), inner), obj=obj)
        elif self.proto < 4:  # noqa: PLR2004 - likewise
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
            self.memoize(obj)

    def _save_inert(self, obj: Inert) -> None:
        func, args = obj._inert_func, obj._inert_args
        if func == REBUILD_SUBCLASS and isinstance(args[0], torch.Tensor):
            rebuild, given = args[0].__reduce_ex__(self.proto)[:2]
            args = (rebuild, args[1], given, args[2])
        if func == NEW_OBJECT:
            self.save(args[0])
            self.save(args[1:])
            self.write(pickle.NEWOBJ)
        else:
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
        if id(obj) in self.memo:  # it was among its own arguments
            self.write(pickle.POP + self.get(self.memo[id(obj)][0]))
        else:
            self.memoize(obj)
        self._save_batch(obj._inert_items, pickle.APPENDS)
        pairs = obj._inert_pairs.items()
        self._save_batch([each for pair in pairs for each in pair], pickle.SETITEMS)
        if obj._inert_state is not None:
            self.save(obj._inert_state)
            self.write(pickle.BUILD)

    def _save_batch(self, items: list[Any], opcode: bytes) -> None:
        """Write items and the opcode that adds them: Python 3.14 changed its own batches."""
        if items:
            self.write(pickle.MARK)
            for item in items:
                self.save(item)
            self.write(opcode)

    dispatch |= {Inert: _save_inert, InertMapping: _save_inert, InertGlobal: _save_global}


# ── views ─────────────────────────────────────────────────────────────────────────────────────


def pickling(checkpoint: Any) -> SimpleNamespace:
    """Give what `torch.save` takes as the module that pickles."""
    if not any(_is_part(leaf) for _, leaf in walk(checkpoint)):
        return SimpleNamespace(Pickler=Pickler)
    survey = _Survey(io.BytesIO(), protocol=2)
    survey.dump(checkpoint)
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in survey.tensors:
        by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    alone: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for tensors in by_storage.values():
        if all(map(_is_part, tensors)) and len(set(map(view_key, tensors))) == 1:
            values = _values(tensors[0])
            alone |= {id(each): (each, _like(each, values)) for each in tensors}
    return SimpleNamespace(Pickler=type("Pickler", (_Compact,), {"alone": alone}))


class _Survey(Pickler):
    """Writes to nowhere, and notes the tensors that it meets, in objects of any class."""

    def __init__(self, file: Any, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.tensors: list[torch.Tensor] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if is_strided(obj):
            self.tensors.append(obj)
        super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        """Leave storages out."""
        return "storage" if torch.is_storage(obj) else None


class _Compact(Pickler):
    """Writes other tensors in the place of some."""

    # by id: what is not written, kept so that its id is no other's, and what is in its place
    alone: ClassVar[Mapping[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        _, obj = self.alone.get(id(obj), (None, obj))
        super().save(obj, save_persistent_id)


def _is_part(tensor: Any) -> bool:
    """Tell whether this is a tensor with less values than its storage, and nothing else to it."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and is_strided(tensor)
        and not (
            tensor.is_nested
            or tensor.is_meta
            or tensor.is_quantized
            or tensor.is_conj()
            or tensor.is_neg()
        )
        and not vars(tensor)
        and _span(tensor) * tensor.itemsize < tensor.untyped_storage().nbytes()
    )


def _span(tensor: torch.Tensor) -> int:
    """Count the values from a tensor's first to its last, or its own where these are less."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return min(1 + sum((size - 1) * stride for size, stride in steps), tensor.numel())


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Give the same values in memory of their own, with the same strides if these have no gaps."""
    held, span = tensor.detach(), _span(tensor)
    if span == tensor.numel():
        return held.clone()
    flat = held.as_strided((span,), (1,))  # of an expanded one
    return flat.clone().as_strided(held.shape, held.stride())


def _like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(values.detach(), requires_grad=tensor.requires_grad)
    return values.detach().requires_grad_(tensor.requires_grad)
