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

from _anemoi_ckpt.compat import check_dense

_PER_CHANNEL = {  # dtypes of the scales and of the zero points
    torch.per_channel_affine: (torch.double, torch.long),
    torch.per_channel_affine_float_qparams: (torch.float, torch.float),
}
_PACKED = {torch.quint4x2: 2, torch.quint2x4: 4}  # values in a byte


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
    values = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    packed = _PACKED.get(dtype, 1)
    # a kernel reads packed values as such where they stand in a row from the first byte on
    if packed > 1 and offset == 0 and values == math.prod(size):
        values = -(-values // packed)
    if all(size) and values * dtype.itemsize > _bytes_of(storage):
        raise ValueError(f"a tensor that ends {values} values into {_bytes_of(storage)} bytes")


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


def _rebuild_quantized(storage: Any, *args: Any) -> torch.Tensor:
    """Rebuild a quantized tensor.

    torch's own allocates as many values as the sizes tell, of an expanded tensor, too.
    """
    offset, size, stride, quantizer, requires_grad, backward_hooks = args
    check_view(storage, offset, size, stride, storage.dtype)
    rebuilt: torch.Tensor = _empty_quantized(storage, size, *quantizer)
    rebuilt.set_(storage, offset, size, stride)
    rebuilt.requires_grad = requires_grad
    rebuilt._backward_hooks = backward_hooks
    return rebuilt


def _empty_quantized(storage: Any, size: Any, scheme: Any, *params: Any) -> Any:
    """Give a quantized tensor without values, for a storage that has them.

    Raises:
        ValueError: it has not as many scales and zero points as its axis is long.
    """
    kind: Any = {"dtype": storage.dtype, "device": storage._untyped_storage.device}
    if scheme not in _PER_CHANNEL:
        scale, zero = params
        return torch._empty_affine_quantized([0], scale=scale, zero_point=zero, **kind)
    scales, zeros, axis = params
    if type(axis) is not int or not 0 <= axis < len(size):
        raise ValueError(f"a quantized tensor without an axis {axis!s:.20}")
    if {len(scales), len(zeros)} != {size[axis]}:
        raise ValueError("a quantized tensor with too many scales, or too few")
    if type(scales) is list:  # as torch 1.3 wrote them
        of_scales, of_zeros = _PER_CHANNEL[scheme]
        scales, zeros = torch.tensor(scales, dtype=of_scales), torch.tensor(zeros, dtype=of_zeros)
    elif not scales.is_meta:
        check_dense(scales, zeros)
    none = [0] * axis + [len(scales)] + [0] * (len(size) - axis - 1)
    return torch._empty_per_channel_affine_quantized(
        none, scales=scales, zero_points=zeros, axis=axis, **kind
    )


def rebuild_from_cpu(data: Any, dtype: Any, _device: Any, requires_grad: Any) -> Any:
    """Rebuild a tensor of a device without storages, such as an XLA one, on the CPU."""
    check_dense(data)
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
