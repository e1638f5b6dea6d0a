"""torch's functions that rebuild tensors, each of which checks first what a pickle tells it.

torch's own believe it: a view that is longer than its storage makes the storage longer, by memory
that holds whatever was there before; the sizes of a quantized tensor are allocated as they stand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)


@dataclass(frozen=True)
class StorageView:
    """A part of a storage, as torch had them before 0.4: its first value, and how many it has."""

    storage: Any
    first: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        dtype: torch.dtype = self.storage.dtype
        return dtype


def _bytes_of(storage: Any) -> int:
    """Count the bytes of a storage; torch warns where a typed one is asked.

    On the meta device those of its record are noted: torch 2.2 takes it to be as long as the view
    that was made of it last.
    """
    size: int | None = getattr(storage, "record_bytes", None)
    untyped: Any = getattr(storage, "_untyped_storage", storage)
    return int(untyped.nbytes()) if size is None else size


def check_view(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype) -> None:
    """Check that a tensor lies within its storage.

    Raises:
        ValueError: it does not, or one of these is no number.
    """
    numbers = (offset, *size, *stride)
    if not isinstance(storage, torch.storage.TypedStorage | torch.UntypedStorage):
        raise ValueError("a tensor on what is no storage")  # noqa: TRY004 - one kind for what lies
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor whose size, strides or offset are none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(size) and (last + 1) * dtype.itemsize > _bytes_of(storage):
        raise ValueError(f"a tensor that ends {last + 1} values into {_bytes_of(storage)} bytes")


def _within_storage(rebuild: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that rebuilds a tensor on a storage check that the tensor lies within it."""

    @functools.wraps(rebuild)
    def checked(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        if isinstance(storage, StorageView):
            check_view(storage.storage, storage.first, (storage.count,), (1,), storage.dtype)
            within = torch.UntypedStorage(storage.count * storage.dtype.itemsize, device="meta")
            check_view(within, offset, size, stride, storage.dtype)
            offset, storage = offset + storage.first, storage.storage
        dtypes = [each for each in rest if isinstance(each, torch.dtype)]  # v3 names it
        check_view(storage, offset, size, stride, *dtypes or [storage.dtype])
        return rebuild(storage, offset, size, stride, *rest)

    return checked


def _rebuild_quantized(
    storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *rest: Any
) -> torch.Tensor:
    """Rebuild a quantized tensor whose values, scales and zero points are all there.

    Raises:
        ValueError: they are not.
    """
    check_view(storage, offset, size, stride, storage.dtype)
    if math.prod(size) * storage.dtype.itemsize > _bytes_of(storage):
        raise ValueError("a quantized tensor that has more values than its storage")
    if quantizer[0] in _PER_CHANNEL:
        _, scales, zeros, axis = quantizer
        if type(axis) is not int or not 0 <= axis < len(size):
            raise ValueError(f"a quantized tensor without an axis {axis!s:.20}")
        if {len(scales), len(zeros)} != {size[axis]}:
            raise ValueError("a quantized tensor with too many scales, or too few")
    rebuilt: torch.Tensor = torch._utils._rebuild_qtensor(
        storage, offset, size, stride, quantizer, *rest
    )
    return rebuilt


def rebuild_from_cpu(data: Any, dtype: Any, _device: Any, requires_grad: Any) -> Any:
    """Rebuild a tensor of a device without storages, such as an XLA one, on the CPU."""
    tensor = data.to(dtype=dtype)
    tensor.requires_grad = requires_grad
    return tensor


def rebuild_from_numpy(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Any:
    """Do likewise with what an older torch wrote as an array."""
    return rebuild_from_cpu(torch.from_numpy(data), dtype, device, requires_grad)


# What is called in place of torch's own.
CHECKED: dict[Any, Any] = {
    **{
        getattr(torch._utils, name): _within_storage(getattr(torch._utils, name))
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
    },
    torch._utils._rebuild_device_tensor_from_numpy: rebuild_from_numpy,
    torch._utils._rebuild_qtensor: _rebuild_quantized,
    # since 2.6
    getattr(torch._utils, "_rebuild_device_tensor_from_cpu_tensor", None): rebuild_from_cpu,
}
