"""Tensors of a state dict: which of them share memory, and how new ones replace them.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from _anemoi_ckpt.anatomy import like
from _anemoi_ckpt.compat import without_modes
from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import few

# ── one tensor ────────────────────────────────────────────────────────────────────────────────


def is_strided(value: Any) -> bool:
    """Tell whether a value is a dense tensor."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_nested
    return is_tensor and value.layout is torch.strided


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Give the shape of a tensor; None for what is no tensor, or a nested one: it has several."""
    if not isinstance(value, torch.Tensor):
        return None
    with without_modes():  # which would answer the same, and take longer
        return None if value.is_nested else tuple(value.shape)


def is_inexact(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is floating-point or complex: it has a mean and may have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether no value of a tensor is NaN or infinite."""
    if not is_inexact(tensor) or tensor.dtype in ALL_FINITE:
        return True
    return bool(not_finite(dense(tensor)) == 0)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Give the values of a sparse tensor as a dense one; of a nested one, in a row."""
    if tensor.is_nested:  # of which torch makes no dense one, in either layout
        return torch.cat([part.reshape(-1) for part in tensor.unbind()])
    return tensor if is_strided(tensor) else tensor.to_dense()


def not_finite(values: torch.Tensor) -> int:
    """Count the values of a dense, floating-point or complex tensor that are NaN or infinite."""
    wide = values.float() if values.dtype.itemsize == 1 else values  # torch has no others for it
    return int(wide.isfinite().logical_not().sum())


ALL_FINITE = {getattr(torch, "float4_e2m1fn_x2", None)}  # dtypes without NaN and infinity


def view_key(tensor: torch.Tensor) -> Hashable:
    """Give a key that is equal for tensors that are the same view of the same memory."""
    with without_modes():  # a hollow tensor has a storage, too
        if not is_strided(tensor):
            return id(tensor)
        return (
            StorageWeakRef(tensor.untyped_storage()),  # equal for the same storage
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )


def snapshot(value: Any) -> Any:
    """Copy a model's value, so that the copy does not change when the model does."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


# ── a state dict ──────────────────────────────────────────────────────────────────────────────


def tensor_names(state_dict: Mapping[str, Any]) -> list[str]:
    """Give the names of the tensors in a state dict, which may also contain extra states."""
    return [name for name, value in state_dict.items() if isinstance(value, torch.Tensor)]


def change_tensors(
    state_dict: Mapping[str, Any],
    chosen: Mapping[str, Hashable],
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Change the tensors under the chosen names.

    Tied tensors stay tied: they are changed once if their values in `chosen` are equal. Parameters
    stay Parameters, and tensors that require a gradient still do, if their new dtype allows it.

    Args:
        state_dict: the state dict to change; it is not modified.
        chosen: the names, with what the change of each depends on besides the tensor itself.
        change: gives the new tensor for a name and its detached old tensor.
    """
    values: dict[Hashable, torch.Tensor] = {}  # by view: new values
    tensors: dict[Hashable, torch.Tensor] = {}  # by tensor: of the old one's class

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        view = view_key(tensor), chosen[name]
        if view not in values:
            values[view] = change(name, tensor.detach())
        whole = id(tensor), view
        if whole not in tensors:
            tensors[whole] = _of_same_kind(tensor, values[view])
        return tensors[whole]

    items = {name: changed(name, v) if name in chosen else v for name, v in state_dict.items()}
    return like(state_dict, items)


def _of_same_kind(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Make a new tensor a Parameter, or one that requires a gradient, if the old one is."""
    requires_grad = old.requires_grad and is_inexact(new)
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=requires_grad)
    return new.detach().requires_grad_() if requires_grad else new


# ── new values ────────────────────────────────────────────────────────────────────────────────


def mean(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the mean of tensors in double precision, and give it in the dtype of the first."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    total = tensor.to(wide)
    for other in others:
        total = total + other.detach().to(total.device, wide)
    count = 1 + len(others)
    # torch can multiply sparse tensors of any layout, but divide only few
    return (total / count if is_strided(total) else total * (1 / count)).to(tensor.dtype)


def resized(tensor: torch.Tensor, target: torch.Tensor, *, zeros: bool) -> torch.Tensor:
    """Give a tensor the shape of another, with as many dimensions.

    The part that both shapes have is kept. The rest gets zeros, or the values of the other tensor.
    """
    result = tensor.new_zeros(target.shape) if zeros else target.to(tensor, copy=True)
    common = tuple(map(slice, map(min, tensor.shape, target.shape)))
    result[common].copy_(tensor[common])
    return result


def select(name: str, tensor: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """Select indices along a dimension; negative ones count from the end.

    Raises:
        MismatchError: the tensor lacks the dimension, or one of the indices.
    """
    remedy = f"its shape is {_shape(tensor)}"
    if not -tensor.dim() <= dim < tensor.dim():
        raise MismatchError(UNPLACED, f"cannot take along dim {dim} of {name}", remedy)
    size = tensor.shape[dim]
    outside = [index for index in indices if not -size <= index < size]
    if outside:
        problem = f"cannot take {few(outside)} along dim {dim} of {name}"
        raise MismatchError(UNPLACED, problem, remedy)
    positions = [index % size for index in indices]
    return tensor.index_select(
        dim, torch.tensor(positions, dtype=torch.int64, device=tensor.device)
    )


# ── casts ─────────────────────────────────────────────────────────────────────────────────────

_IEEE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # with infinity, NaN and sign


def drops_parts(old: torch.dtype, new: torch.dtype) -> bool:
    """Tell whether a cast drops fractions (to integers or booleans) or imaginary parts."""
    if old.is_complex:
        return not new.is_complex
    return old.is_floating_point and not (new.is_floating_point or new.is_complex)


def casts_to(dtype: torch.dtype) -> bool:
    """Tell whether torch casts tensors to a dtype: to those of quantized tensors it does not."""
    try:
        torch.zeros(1, device="cpu").to(dtype)
    except RuntimeError:
        return False
    return True


def loses_values(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a cast changes values of a dense tensor by more than rounding.

    It may drop fractions or imaginary parts, overflow, lose a sign, or make a number of NaN.
    """
    if tensor.dtype == dtype or not tensor.numel():
        return False
    if tensor.is_complex() and not dtype.is_complex:
        return bool(tensor.imag.count_nonzero()) or loses_values(tensor.real, dtype)
    if dtype.is_complex and not tensor.is_complex():
        return loses_values(tensor, dtype.to_real())
    if not is_inexact(tensor) or drops_parts(tensor.dtype, dtype):
        return not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
    if dtype in _IEEE and tensor.dtype in _IEEE:
        limit, (least, most) = torch.finfo(dtype).max, torch.aminmax(tensor)
        if -limit <= least and most <= limit:
            return False
    old, new = (_as_doubles(each) for each in (tensor, tensor.to(dtype)))
    limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)  # what is rounded to the most
    overflows = (old.abs() > limit) & old.isfinite()
    return bool(overflows.any() or (old.sign() * new.sign() < 0).any()) or not (
        torch.equal(old.isnan(), new.isnan()) and torch.equal(old.isinf(), new.isinf())
    )


def _as_doubles(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj().to(torch.complex128))
    return tensor.to(torch.float64)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
