"""What a pickle may cost: copies, and comparisons of keys, no more than its length explains."""

from __future__ import annotations

import collections
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from _anemoi_ckpt.pickles.inert import NESTED, NESTING, set_alone
from _anemoi_ckpt.pickles.safe import ITEM_TYPES, LIST_TYPES, NUMPY, PLAIN

_COLLISIONS = 200  # most keys of a container with one hash, each of which is compared with all
_COPIED_LEAST = 1_000_000  # items or bytes that calls may copy from a pickle of any length, and
_COPIED = 8  # for each of its bytes: what is memoized can be copied again for six

# What copies its arguments, and which of these have a length.
_COPYING = {
    *PLAIN,
    *NUMPY,
    "_codecs.encode",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_device_tensor_from_numpy",
}
_SIZED = {str, bytes, bytearray, list, tuple, set, frozenset, dict, *ITEM_TYPES, *LIST_TYPES}
# What is made of a group of things that are hashed, and what Python hashes so that nobody finds
# many with one hash.
_OF_KEYS = ("builtins.set", "builtins.frozenset")
_SCATTERED = (str, bytes, float, bool, type(None))


def _is_group(arg: Any) -> bool:
    return type(arg) in (list, tuple, set, frozenset)


class Costs:
    """What the objects of one pickle cost, so far."""

    def __init__(self, tell: Callable[[], int]) -> None:
        """Take what tells how far the pickle was read."""
        self._tell = tell
        self._hashes: collections.Counter[tuple[int, int]] = collections.Counter()
        self._copied = 0
        self._copied_storages: dict[int, torch.Tensor] = {}  # a tensor of each, by its id

    def check_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Check what a class or a function, by its name, is about to copy or to hash."""
        if name in _COPYING:
            self.count_copies(args)
        if name in _OF_KEYS:
            for group in filter(_is_group, args):
                self.check_keys(args, group)

    def count_copies(self, parts: Any) -> None:
        """Count the items and bytes of what is about to be copied.

        Raises:
            UnpicklingError: there are far more than in the pickle, which copies some many times.
        """
        for part in parts:
            if isinstance(part, torch.Tensor):  # whose values are not in the pickle: once is free
                storage = part.untyped_storage()
                if self._copied_storages.setdefault(storage._cdata, part) is not part:
                    self._copied += part.numel() * part.itemsize
            elif isinstance(part, np.ndarray):
                self._copied += part.nbytes
            elif type(part) in _SIZED:
                self._copied += len(part)
        if self._copied > _COPIED_LEAST and self._copied > _COPIED * self._tell():
            raise pickle.UnpicklingError("objects that are copied without end")

    def check_keys(self, container: Any, keys: Any) -> None:
        """Check what is about to be hashed.

        Raises:
            UnpicklingError: that would take for ever, or too many of a container have one hash.
        """
        for key in keys:
            _refuse_endless(key)
            if type(key) in _SCATTERED or (type(key) is int and abs(key) < sys.hash_info.modulus):
                continue
            place = id(container), hash(key)
            self._hashes[place] += 1
            if self._hashes[place] > _COLLISIONS:
                raise pickle.UnpicklingError("keys that have one hash")


def _refuse_endless(value: Any) -> None:
    """Refuse a value that is about to be hashed where that would take for ever, or too deep.

    A tuple does not keep its hash: of a pair of twice the same pair, sixty deep, it takes 2**60
    steps, and 200 bytes of pickle make one.
    """
    if type(value) is str:
        return
    layer, count = [value], 0
    for _ in range(NESTING):
        for item in layer:
            set_alone(item)
        layer = [each for item in layer if isinstance(item, tuple | frozenset) for each in item]
        count += len(layer)
        if not layer:
            return
        if count > NESTED:
            break
    raise pickle.UnpicklingError("a key that is nested without end")
