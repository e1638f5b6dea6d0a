"""What differs between versions of torch: each with the version that ends it.

Ground floor: this module imports torch and the standard library alone. When the lowest torch that
is supported rises, what it ends is deleted here.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

NEWEST_TRIED = (2, 15)  # the newest torch that the tests have passed with

# The torch that brought each dtype which the lowest torch, 2.2, does not have.
DTYPES_SINCE = {
    **dict.fromkeys(("uint16", "uint32", "uint64", *(f"uint{n}" for n in range(1, 8))), "2.3"),
    **dict.fromkeys((f"int{n}" for n in range(1, 8)), "2.6"),
    "float8_e8m0fnu": "2.7",
    "float4_e2m1fn_x2": "2.8",
    "bcomplex32": "2.15",
}


def version_of(text: str) -> tuple[int, int]:
    """Read major and minor of a version.

    >>> version_of("2.16.0.dev20270101+cpu")
    (2, 16)
    """
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def warn_if_untried(version: str) -> None:
    """Warn of a torch that is newer than any that was tried."""
    if version_of(version) > NEWEST_TRIED:
        newest = ".".join(map(str, NEWEST_TRIED))
        warnings.warn(
            f"anemoi-ckpt was tried with torch up to {newest}, and this is torch {version}: if a"
            " checkpoint cannot be loaded, look for a newer anemoi-ckpt",
            stacklevel=2,
        )


warn_if_untried(torch.__version__)  # once: a module is imported once

# Until 2.7, set_model_state_dict refuses a model of which some is on meta and some is filled.
FILLS_MIXED_DEVICES = version_of(torch.__version__) >= (2, 7)


AUTOCAST_BY_DEVICE = version_of(torch.__version__) >= (2, 4)


class MissingDtypeError(ValueError):
    """A tensor has a dtype that the running torch does not have."""

    def __init__(self, name: str) -> None:
        """Take its name without ``torch.``, and look up which torch has it."""
        self.name, self.since = name, DTYPES_SINCE.get(name)
        super().__init__(f"torch {torch.__version__} has no dtype torch.{name}")


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Tell whether no other tensor is on a tensor's storage, and torch itself allocated it.

    False where torch cannot tell: 2.2 has no `resizable`, and some builds have no count.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)  # noqa: SLF001 - no public one
    resizable = getattr(torch.UntypedStorage, "resizable", None)
    if count is None or resizable is None:
        return False
    fresh = torch.empty(1)  # alone on its storage, so that what asking takes itself counts for both
    counts = [count(each.untyped_storage()._cdata) for each in (tensor, fresh)]  # noqa: SLF001 - as torch.multiprocessing does
    return counts[0] == counts[1] and bool(resizable(tensor.untyped_storage()))


def without_modes() -> Any:
    """Keep modes from hearing what is asked of tensors meanwhile (no public one does)."""
    return torch._C.DisableTorchFunction()  # noqa: SLF001 - torch's own subclasses use it


def without_dispatch() -> Any:
    """Keep modes from hearing operations meanwhile (no public one does)."""
    return torch._C._DisableTorchDispatch()  # noqa: SLF001 - as torch's own modes use it


def casts_by_itself() -> bool:
    """Tell whether autocast is on for the CPU (until 2.4, by a function of another name)."""
    if AUTOCAST_BY_DEVICE:
        return torch.is_autocast_enabled("cpu")
    return torch.is_autocast_cpu_enabled()


def store_of(group: Any) -> Any:
    """Give the store that a process group was made with (2.2 has no `get_group_store`)."""
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return torch.distributed.distributed_c10d._get_process_group_store(group)  # noqa: SLF001 - as above


_check_coo: Any = torch._validate_sparse_coo_tensor_args  # noqa: SLF001 - no public one
_check_compressed: Any = torch._validate_sparse_compressed_tensor_args  # noqa: SLF001 - likewise
# Without check_pinning, which 2.2 does not take, the validators of later versions initialise CUDA.
_SCHEMA = torch.ops.aten._validate_sparse_coo_tensor_args.default._schema  # noqa: SLF001 - no public one
_PINNING: dict[str, Any] = {"check_pinning": False} if "check_pinning" in str(_SCHEMA) else {}


def rebuild_sparse_tensor(layout: torch.layout, data: tuple[Any, ...]) -> torch.Tensor:
    """Build a sparse tensor of a pickle, as `torch._utils._rebuild_sparse_tensor`, but check it.

    torch's own lists the tensors to check for the whole process (until 2.15: for the thread), and
    checks them or not as the version and a flag of the whole process say. A tensor on the meta
    device has no indices to check.

    Raises:
        RuntimeError: indices lie outside its size, or are out of order, too many or too few.
        ValueError: there are more of them than bytes that tell them.
    """
    *parts, size = data[:3] if layout is torch.sparse_coo else data
    if not any(part.is_meta for part in parts):
        check_dense(*parts[:-1])
        if layout is torch.sparse_coo:
            coalesced = data[3] if data[3:] else None  # since 2.1
            _check_coo(*parts, size, coalesced, **_PINNING)
        else:
            _check_compressed(*parts, size, layout, **_PINNING)
    return rebuild_unchecked_sparse_tensor(layout, data)


def rebuild_unchecked_sparse_tensor(layout: torch.layout, data: tuple[Any, ...]) -> torch.Tensor:
    """Build a sparse tensor whose values are not there: nothing may look at its indices."""
    if layout is not torch.sparse_coo:
        return torch.sparse_compressed_tensor(*data, layout=layout, check_invariants=False)
    indices, values, size, *coalesced = data
    return torch.sparse_coo_tensor(
        indices,
        values,
        size,
        check_invariants=False,
        is_coalesced=coalesced[0] if coalesced else None,
    )


def check_dense(*tensors: torch.Tensor) -> None:
    """Check that no tensor is expanded: what goes through it or copies it would have no end.

    Raises:
        ValueError: one is.
    """
    if any(each.numel() * each.itemsize > each.untyped_storage().nbytes() for each in tensors):
        raise ValueError("a tensor that is expanded where its values are needed")


def rebuild_nested_tensor(
    buffer: torch.Tensor, sizes: torch.Tensor, strides: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Build a nested tensor of a pickle, as `torch._utils._rebuild_nested_tensor`, but check it.

    torch believes the sizes: wrong ones read memory that is not the tensor's, which is why torch
    2.15 no longer builds nested tensors with weights_only=True.

    Raises:
        NotImplementedError: its sizes are on the meta device.
        ValueError: a part lies outside the buffer.
    """
    parts = (buffer, sizes, strides, offsets)
    if any(part.is_meta for part in parts):
        raise NotImplementedError("a nested tensor has its shape from values on the meta device")
    check_dense(*parts)
    shapes_fit = sizes.shape == strides.shape and offsets.shape == sizes.shape[:1]
    integers = all(part.dtype is torch.int64 for part in parts[1:])
    if not (integers and shapes_fit and sizes.dim() == 2 and buffer.dim() == 1):  # noqa: PLR2004 - a row for each part
        raise ValueError("a nested tensor whose sizes are no table")
    for size, stride, offset in zip(
        sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True
    ):
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(*size, *stride, offset, 0) < 0 or (all(size) and last >= buffer.numel()):
            raise ValueError(f"a nested tensor with a part outside its {buffer.numel()} values")
    return torch._nested_view_from_buffer(*map(torch.Tensor.contiguous, parts))  # noqa: SLF001 - as torch.load does
