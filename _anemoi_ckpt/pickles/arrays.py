"""numpy's dtypes, scalars and arrays, made by its public constructors.

numpy itself believes what a pickle tells it: a dtype whose state lies about its flags turns an
array's bytes into pointers. What is sound, but not known here (metadata that is no plain data,
objects in columns, dtypes of other packages), becomes inert data.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np

from _anemoi_ckpt.pickles.costs import CostlyError
from _anemoi_ckpt.pickles.inert import Inert, InertGlobal

NOTHING = object()
_NONE = type(None)
_ALIGNED = 0x80  # NPY_ALIGNED_STRUCT, in numpy/ndarraytypes.h
_FLAGS = 0xFF  # a pickle has these of a dtype's flags; before numpy 2 as a signed byte
_NESTING = 32  # most levels of a dtype in dtypes: numpy's own functions go through them recursively
_DTYPE = InertGlobal("numpy", "dtype")
_NDARRAY = InertGlobal("numpy", "ndarray")
_MAKE: Any = np.empty(0).__reduce__()[0]  # of numpy._core, or before numpy 2 of numpy.core
_RECONSTRUCT = InertGlobal(_MAKE.__module__, _MAKE.__name__)
# What a number's or a text's type is in metadata: h5py has {"vlen": str} for strings.
BUILTINS = {InertGlobal("builtins", each.__name__): each for each in (int, float, str, bool, bytes)}


class _UnknownError(Exception):
    """A numpy object that may be sound, and is not known here."""


def made_by_numpy(name: str, *args: Any) -> Any:
    """Make a dtype, a scalar or an array; where arguments are odd, nothing."""
    if name == "dtype" and isinstance(args[0], str) and "," not in args[0]:  # of one type, as
        # numpy pickles it: the columns of others come as its state
        return np.dtype(args[0], copy=True)  # its state changes it
    if name == "_reconstruct" and args[0] == _NDARRAY:
        return np.ndarray((0,), np.uint8)  # its state comes later
    if name == "scalar" and type(args[1]) in (bytes, str) and not args[0].hasobject:
        return np.frombuffer(_as_bytes(args[1]), args[0], count=1)[0]
    if name == "_frombuffer":
        raw, dtype, shape, order = args
        return np.frombuffer(bytearray(raw), dtype).reshape(shape, order=order)
    if name == "_convert_to_stringdtype_kwargs" and {*map(type, args)} <= {int, str, float, _NONE}:
        return _string_dtype(*args)
    return NOTHING


def _string_dtype(coerce: int, *missing: Any) -> Any:
    """Make the dtype of strings of any length; before numpy 2, that of objects, which they are."""
    kind = getattr(np.dtypes, "StringDType", None)
    if kind is None:
        return np.dtype("O", copy=True)
    return kind(coerce=bool(coerce), **({"na_object": missing[0]} if missing else {}))


def stated(obj: Any, state: Any) -> Any:
    """Give a numpy object its state, or what stands for both as inert data.

    Raises:
        UnpicklingError: the state contradicts itself.
    """
    try:
        if isinstance(obj, np.ndarray):
            *facts, raw = state
            state = (*facts, _as_bytes(raw))
            if _array_fits(*state):
                obj.__setstate__(state)
                return obj
        elif obj.kind != "T":  # which needs none
            dtype = _dtype_of_state(obj, *state)
            if dtype is not None:
                return dtype
    except _UnknownError:
        return _inert(obj, state)
    raise pickle.UnpicklingError("a numpy object whose state does not fit it")


def _as_bytes(raw: Any) -> Any:
    """Give the bytes of Python 2, whose `str` the machine takes for text where it is UTF-8."""
    return raw.encode() if type(raw) is str else raw


def _inert(obj: Any, state: Any) -> Inert:
    is_array = isinstance(obj, np.ndarray)
    args = (_NDARRAY, (0,), b"b") if is_array else (obj.__reduce__()[1][0], False, True)
    made = Inert(_RECONSTRUCT if is_array else _DTYPE, args)
    made._inert_state = state
    return made


def _array_fits(_version: Any, shape: Any, dtype: Any, _order: Any, raw: Any) -> bool:
    """Tell whether there are as many values as a shape says; numpy checks the types of the rest."""
    if isinstance(dtype, Inert):
        raise _UnknownError
    if not all(type(n) is int for n in shape):  # a text could be multiplied without end
        return False
    count = math.prod(shape)
    if dtype.kind == "T":
        return len(raw) == count and {*map(type, raw)} <= {str, float, _NONE}
    if not dtype.hasobject:
        return bool(len(raw) == count * dtype.itemsize)
    if dtype.names is not None:
        raise _UnknownError
    return bool(len(raw) == count)  # which numpy does not compare


def _dtype_of_state(obj: Any, *state: Any) -> Any:
    """Give the dtype that a state describes, with its order of bytes and its metadata."""
    version, order, subarray, names, fields, size, alignment, flags, *extra = state
    parts = [subarray[0]] if subarray else [fields[name][0] for name in names or ()]
    if any(isinstance(part, Inert) for part in parts):
        raise _UnknownError
    truth = _described(obj, parts, state)
    if _depth(truth) > _NESTING:
        raise CostlyError("a dtype that is nested without end")
    known_size = size in (truth.itemsize, -1) and alignment in (truth.alignment, -1)
    if not known_size or order not in "<>=|" or (flags ^ truth.flags) & _FLAGS:
        return None
    if subarray is not None:
        if names:
            return None
        if truth.hasobject:
            raise _UnknownError
    # the flags as this numpy has them: before numpy 2, their byte has a sign
    plain = (*state[1:7], truth.__reduce__()[2][7])
    if truth.kind in "mM":
        if extra[0][0]:  # metadata beside the unit of time, which is always there
            raise _UnknownError
        obj.__setstate__((version, *plain, extra[0]))
        return obj
    if names is not None and not names:
        obj = truth  # which has no columns, and numpy takes no state for that
    else:
        obj.__setstate__((3, *plain))
    return np.dtype(obj, metadata=_plain_metadata(extra[0])) if extra and extra[0] else obj


def _described(obj: Any, parts: Any, state: Any) -> Any:
    """Make the dtype that a state describes by numpy's public constructor."""
    _version, _order, subarray, names, fields, size, _alignment, flags, *_ = state
    if not all(isinstance(part, np.dtype) for part in parts):
        raise pickle.UnpicklingError("a numpy dtype with a part that is none")
    if subarray is not None:
        return np.dtype((parts[0], subarray[1]))
    if names is None:
        return obj
    description: Any = {
        "names": list(names),
        "formats": parts,
        "offsets": [fields[name][1] for name in names],
        "itemsize": size,
    }
    if any(fields[name][2:] for name in names):
        description["titles"] = [fields[name][2] if fields[name][2:] else None for name in names]
    return np.dtype(description, align=bool(flags & _ALIGNED))


def _depth(dtype: Any) -> int:
    """Count the levels of a dtype's parts, each of which was counted when it was made."""
    level, depth = [dtype], 0
    while level and depth <= _NESTING:
        depth += 1
        bases = [each.subdtype[0] for each in level if each.subdtype]
        columns = [field[0] for each in level if each.fields for field in each.fields.values()]
        level = list({id(each): each for each in (*bases, *columns)}.values())
    return depth


def _plain_metadata(told: Any) -> dict[str, Any]:
    """Give metadata that is plain data, and nests no further.

    Raises:
        _UnknownError: it is not.
    """
    found = {key: _plain(value) for key, value in dict(told).items()}
    if not all(type(key) is str for key in found):
        raise _UnknownError
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, InertGlobal):
        return BUILTINS.get(value, value)
    inner = [*value, *value.values()] if type(value) is dict else [value]
    if any(type(each) not in (str, int, float, bool, bytes, _NONE) for each in inner):
        raise _UnknownError
    return value
