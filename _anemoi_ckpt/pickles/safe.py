"""The list of what a pickle may build for real: data, and tensors.

It is our own, for torch's differs from version to version: 2.2 knows no devices, 2.15 no nested
tensors. Each name stands for a class or function that does no harm with whatever arguments the
machine (`reading`) lets through. What other packages register with
`torch.serialization.add_safe_globals` is not on it.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import functools
import io
import os
import pathlib
import types
from _codecs import encode
from collections.abc import Mapping
from typing import Any

import torch
from torch.serialization import StorageType, _get_layout

from _anemoi_ckpt.compat import (
    rebuild_nested_tensor,
    rebuild_sparse_tensor,
    rebuild_unchecked_sparse_tensor,
)
from _anemoi_ckpt.pickles import rebuilds

# What no checkpoint needs, and nothing but trust=True lets through: as torch has it since 2.6.
FORBIDDEN_MODULES = frozenset({"nt", "os", "posix", "sys"})

_POSIX = pathlib.PurePosixPath if os.name == "nt" else pathlib.PosixPath
_WINDOWS = pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath
_GROUP = (list, tuple, set, frozenset)
_TIME = (int, bytes, str, dt.timezone)
# Standard classes that are data and no more: of which types their arguments may be. Nothing passes
# that allocates by a number (bytearray(10**12)) or walks without end (set(range(10**12))).
PLAIN: dict[str, tuple[type, tuple[type, ...]]] = {
    "_io.BytesIO": (io.BytesIO, ()),
    "argparse.Namespace": (argparse.Namespace, ()),
    "builtins.bytearray": (bytearray, (bytes,)),
    "builtins.bytes": (bytes, ()),  # protocol 2 writes empty bytes as this call
    "builtins.complex": (complex, (int, float)),
    "builtins.dict": (dict, (dict,)),
    "builtins.frozenset": (frozenset, _GROUP),
    "builtins.list": (list, _GROUP),
    "builtins.range": (range, (int,)),
    "builtins.set": (set, _GROUP),
    "builtins.slice": (slice, (int, type(None))),
    "builtins.tuple": (tuple, _GROUP),
    "collections.Counter": (collections.Counter, (dict,)),
    "collections.OrderedDict": (collections.OrderedDict, (dict, list)),
    "collections.defaultdict": (collections.defaultdict, (type, type(None))),
    "collections.deque": (collections.deque, (list, tuple, int, type(None))),
    "datetime.date": (dt.date, _TIME),
    "datetime.datetime": (dt.datetime, _TIME),
    "datetime.time": (dt.time, _TIME),
    "datetime.timedelta": (dt.timedelta, (int,)),
    "datetime.timezone": (dt.timezone, (dt.timedelta, str)),
    "decimal.Decimal": (decimal.Decimal, (str,)),
    "types.SimpleNamespace": (types.SimpleNamespace, ()),
    **{
        f"{module}.{name}": (kind, (str,))
        for module in ("pathlib", "pathlib._local")  # Python 3.13 alone writes the second
        for name, kind in {
            "PosixPath": _POSIX,  # a path of the other system is a pure one
            "WindowsPath": _WINDOWS,
            "PurePosixPath": pathlib.PurePosixPath,
            "PureWindowsPath": pathlib.PureWindowsPath,
        }.items()
    },
}
# Which of them take items from a pickle, by key or one after another.
ITEM_TYPES = {dict, collections.OrderedDict, collections.defaultdict, collections.Counter}
LIST_TYPES = {list, collections.deque}
NUMPY = {  # made by numpy's public constructors, which check what they are told
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
} | {"numpy.dtype", "numpy._core._internal._convert_to_stringdtype_kwargs"}
MEMORY = {*torch._tensor_classes, *torch._storage_classes, torch.Tensor}

# What is called in place of torch's own, which believe what they are told.
CHECKED: dict[Any, Any] = {
    **rebuilds.CHECKED,
    torch._utils._rebuild_nested_tensor: rebuild_nested_tensor,
    torch._utils._rebuild_sparse_tensor: rebuild_sparse_tensor,
}
# What a pickle is read with that has blank memory in place of its storages.
BLANK: Mapping[str, Any] = {
    "torch._utils._rebuild_nested_tensor": lambda buffer, *_: buffer,  # its sizes are values, too
    "torch._utils._rebuild_sparse_tensor": rebuild_unchecked_sparse_tensor,
}
_REBUILDS = (
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_wrapper_subclass",
)
_FROM_CPU = "_rebuild_device_tensor_from_cpu_tensor"
_UNTYPED = {torch.storage.TypedStorage, torch.UntypedStorage}  # which have no dtype of their own
_CONSTANTS = (torch.dtype, torch.qscheme)


@functools.cache
def known() -> dict[str, Any]:
    """Give what is built for real, by the name that a pickle has for it."""
    return {
        **{str(each): each for each in vars(torch).values() if isinstance(each, _CONSTANTS)},
        **{f"{kind.__module__}.{kind.__name__}": kind for kind in torch._tensor_classes},
        **{
            # in place of a class that warns of its own end when it is asked for its dtype
            f"{kind.__module__}.{kind.__name__}": StorageType(kind.__name__)
            for kind in torch._storage_classes - _UNTYPED
        },
        **{f"{kind.__module__}.{kind.__name__}": kind for kind in _UNTYPED},
        **{f"torch._utils.{name}": getattr(torch._utils, name) for name in _REBUILDS},
        # since 2.6; what was written by then loads before as well
        f"torch._utils.{_FROM_CPU}": getattr(torch._utils, _FROM_CPU, rebuilds.rebuild_from_cpu),
        "torch._utils._rebuild_xla_tensor": torch._utils._rebuild_device_tensor_from_numpy,
        "_codecs.encode": encode,  # for bytes
        "torch.Size": torch.Size,
        "torch.Tensor": torch.Tensor,
        "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
        "torch.device": torch.device,
        "torch.nn.parameter.Parameter": torch.nn.Parameter,
        "torch.serialization._get_layout": _get_layout,
        **{name: kind for name, (kind, _) in PLAIN.items()},
    }


@functools.cache
def known_names() -> dict[int, str]:
    """Give the name of what is built for real, by its id."""
    return {id(each): name for name, each in reversed(known().items())}
