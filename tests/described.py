"""A checkpoint as lines of text: the same for the same values, whatever torch and numpy hold them.

It imports these two alone, for it runs with those that wrote `tests/data`, too.
"""

import datetime as dt
import decimal
import hashlib
import pathlib
import types
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, tuple, deque)
NAMESPACES = (Namespace, types.SimpleNamespace)
VALUES = (
    *(bool, int, float, complex, str, bytes, bytearray, type(None), range, slice, set, frozenset),
    *(dt.date, dt.time, dt.datetime, dt.timedelta, dt.timezone),
    *(decimal.Decimal, pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath),
    *(torch.dtype, torch.device, torch.layout, torch.qscheme, torch.Size),
)
PARTS = {
    "torch.sparse_coo": ("_indices", "_values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def described(checkpoint: object) -> dict[str, str]:
    """Gives a line for each thing in a checkpoint, in order, under its path (`state_dict.weight`).

    Of a tensor it tells dtype, shape, layout, strides, with which one before it shares its storage,
    and a digest of its values.  What is neither torch's nor numpy's nor Python's own is `foreign
    CLASS`, and what was loaded as inert data `inert CLASS`: nothing is told of what is in them.
    """
    return dict(_lines(checkpoint, "", {}))


def _lines(thing: Any, path: str, storages: dict[int, str]) -> Iterator[tuple[str, str]]:
    line, parts = _described(thing, path, storages)
    yield path, line
    if isinstance(thing, torch.Tensor | OrderedDict) and not line.startswith(("foreign", "inert")):
        parts = {**parts, **{f"__dict__.{name}": value for name, value in vars(thing).items()}}
    for name, part in parts.items():
        yield from _lines(part, f"{path}.{name}".removeprefix("."), storages)


def _described(thing: Any, path: str, storages: dict[int, str]) -> tuple[str, dict[str, Any]]:
    """What a thing is, and what it is made of."""
    kind = type(thing)
    inert = getattr(thing, "inert_class", None) or getattr(thing, "full_name", None)
    if inert is not None:
        return f"inert {inert}", {}
    if kind in (torch.Tensor, torch.nn.Parameter):
        return _tensor(thing, path, storages)
    if kind is np.ndarray:
        return _array(thing)
    if kind in (*MAPPINGS, *SEQUENCES, *NAMESPACES):
        return _container(thing)
    if kind in VALUES:
        return f"{kind.__name__} {thing!r}", {}
    if isinstance(thing, np.generic):
        return f"numpy {thing.dtype} {_digest(thing.tobytes())}", {}
    if isinstance(thing, np.dtype):
        return f"numpy dtype {thing}", {}
    named = thing if isinstance(thing, type | types.FunctionType) else kind
    return f"foreign {named.__module__}.{named.__qualname__}", {}


def _container(thing: Any) -> tuple[str, dict[str, Any]]:
    kind = type(thing)
    if kind in NAMESPACES:
        return kind.__name__, vars(thing)
    parts = dict(enumerate(thing)) if kind in SEQUENCES else thing
    made = {"default_factory": thing.default_factory} if kind is defaultdict else {}
    return f"{kind.__name__} of {len(thing)}", {**made, **{str(k): v for k, v in parts.items()}}


def _tensor(
    tensor: torch.Tensor, path: str, storages: dict[int, str]
) -> tuple[str, dict[str, Any]]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested:
        return f"{dtype} nested", {str(i): part for i, part in enumerate(tensor.unbind())}
    words = [dtype, str(tuple(tensor.shape))]
    words += [type(tensor).__name__] * (type(tensor) is not torch.Tensor)
    words += [word for word in ("requires_grad", "is_meta") if getattr(tensor, word)]
    words += [word for word in ("conj", "neg") if getattr(tensor, f"is_{word}")()]
    tensor = tensor.detach()
    if str(tensor.layout) in PARTS:
        words += [str(tensor.layout)]
        words += ["coalesced"] * (tensor.layout == torch.sparse_coo and tensor.is_coalesced())
        names = PARTS[str(tensor.layout)]
        return " ".join(words), {f"{name}()": getattr(tensor, name)() for name in names}
    words += [f"strides {tensor.stride()} offset {tensor.storage_offset()}"]
    if not tensor.is_meta and tensor.untyped_storage().nbytes():
        first = storages.setdefault(tensor.untyped_storage().data_ptr(), path)
        words += [f"of {first}"] * (first != path)
        words += [_digest(_bytes(tensor.int_repr() if tensor.is_quantized else tensor))]
    return " ".join(words), _quantization(tensor) if tensor.is_quantized else {}


def _quantization(tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.qscheme() == torch.per_tensor_affine:
        return {"q_scale()": tensor.q_scale(), "q_zero_point()": tensor.q_zero_point()}
    return {
        "q_per_channel_scales()": tensor.q_per_channel_scales().tolist(),
        "q_per_channel_zero_points()": tensor.q_per_channel_zero_points().tolist(),
        "q_per_channel_axis()": tensor.q_per_channel_axis(),
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    """The values as they lie in memory, one after the other."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _array(array: Any) -> tuple[str, dict[str, Any]]:
    words = f"array {array.dtype} {array.shape}"
    if array.dtype.hasobject or type(array.dtype).__name__ == "StringDType":  # no bytes: pointers
        return words, {str(i): value for i, value in enumerate(array.ravel().tolist())}
    words += " fortran" * (array.flags.f_contiguous and not array.flags.c_contiguous)
    return f"{words} {_digest(array.tobytes())}", {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
