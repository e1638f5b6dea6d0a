"""What a pickle may cost: memory, and comparisons of keys, no more than its length explains."""

from __future__ import annotations

import collections
import pickle
import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any

import numpy as np
import torch

from _anemoi_ckpt.pickles.inert import NAMESPACES, NESTED, NESTING, set_alone
from _anemoi_ckpt.pickles.safe import ITEM_TYPES, LIST_TYPES, NUMPY, PLAIN

_COLLISIONS = 200  # most keys of a container with one hash, each of which is compared with all
# Bytes of memory that a pickle of any length may take, and for each of its bytes. Of these, in
# protocols 2 and 4, weights count 19 and 30, Linear modules 27 and 46, the states of Adam 27 and
# 44, and those of SGD, which are empty, 26 and 46 (they do take 22 and 40: less would refuse what
# is sound). None of them needs the bytes that any pickle may take; 150,000 small sets or deques do.
_LEAST = 64 * 1024**2
_MOST = 48
_TENSOR = 500  # bytes, of a parameter's
_OBJECT = 220  # of an inert object with its empty containers
_DIMENSION = 16  # of a tensor's size and stride
_POINTER = 8  # of an element of a list or a tuple
_ITEM = 100  # of an item of a dict or a set, which is twice there while it grows


def _weights() -> list[int]:
    """Give the bytes that each opcode takes, beside those that are its own; marks until the end."""
    weights = [16] * 256  # of the stack, and of the container that takes it from there
    for weight, opcodes in (
        (48, (pickle.INT, pickle.BININT, pickle.BININT2, pickle.FLOAT, pickle.BINFLOAT)),
        (48, (pickle.LONG, pickle.LONG1, pickle.LONG4)),
        (80, (pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE)),
        (80, (pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8)),
        (80, (pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.BYTEARRAY8)),
        (72, (pickle.MARK, pickle.EMPTY_LIST, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)),
        (88, (pickle.EMPTY_DICT,)),
        (64, (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE)),
        (160, (pickle.FROZENSET,)),
        (200, (pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST, pickle.BINPERSID)),
        (240, (pickle.EMPTY_SET,)),
    ):
        for opcode in opcodes:
            weights[opcode[0]] = weight
    return weights


WEIGHTS = _weights()

# What copies its arguments, and what is made of it that has more bytes than an object.
_COPYING = {
    *NUMPY,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_device_tensor_from_numpy",
}
_STATED = {"torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"}
_WEIGHED = {bytes, torch.Size, *(kind for kind, _ in PLAIN.values())} - {*NAMESPACES}
_LISTS = {list, tuple, *LIST_TYPES}
# What is made of a group of things that are hashed, and what Python hashes so that nobody finds
# many with one hash.
_OF_KEYS = ("builtins.set", "builtins.frozenset")
_SCATTERED = (str, bytes, float, bool, type(None))


def _is_group(arg: Any) -> bool:
    return type(arg) in (list, tuple, set, frozenset)


def _parts(state: Any) -> Iterable[Any]:
    """Give the dicts in a state: of attributes, of slots, or both."""
    return state if type(state) is tuple else (state,)


class CostlyError(pickle.UnpicklingError):
    """A pickle takes far more memory or time than its length explains."""


class Costs:
    """What the objects of one pickle cost, so far."""

    def __init__(self, tell: Callable[[], int]) -> None:
        """Take what tells how far the pickle was read."""
        self._tell = tell
        self._hashes: collections.Counter[tuple[int, int]] = collections.Counter()
        self._spent = 0
        self._copied_storages: dict[int, torch.Tensor] = {}  # a tensor of each, by its id

    def spend(self, count: int) -> None:
        """Count bytes of memory.

        Raises:
            CostlyError: there are far more than in the pickle.
        """
        self._spent += count
        if self._spent > _LEAST and self._spent > _LEAST + _MOST * self._tell():
            raise CostlyError(
                f"{self._tell()} bytes of it take more than {self._spent / 1e6:.0f} MB of memory"
            )

    def check_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Check what a class or a function, by its name, is about to copy or to hash."""
        if name in _COPYING:
            self.count_copies(args)
        if name in _STATED:
            self.count_copies(part for arg in args[3:] for part in _parts(arg))
        if name in _OF_KEYS:
            for group in filter(_is_group, args):
                self.count_items(len(group))  # also of those that are the same: each is hashed
                self.check_keys(args, group)

    def count_made(self, made: Any) -> None:
        """Count what a call has made."""
        if type(made) in (set, frozenset):  # `check_call` has counted their items
            self.spend(sys.getsizeof(made) - _ITEM * len(made))
        elif type(made) in _WEIGHED or isinstance(made, np.generic):
            self.spend(sys.getsizeof(made))
        elif isinstance(made, torch.Tensor):
            self.spend(_TENSOR + _DIMENSION * made.dim())
        else:
            self.spend(_OBJECT)

    def count_inert(self, args: tuple[Any, ...]) -> None:
        """Count an inert object, and the arguments that are copied for it."""
        self.spend(_OBJECT + _POINTER * len(args))

    def count_items(self, count: int) -> None:
        """Count items that a dict or a set takes."""
        self.spend(_ITEM * count)

    def reserve(self, container: Any, items: Sized) -> int:
        """Count the most that a dict or a set takes for more items; give the bytes it then has."""
        most = _ITEM * len(items)
        self.spend(most)
        return sys.getsizeof(container) + most

    def settle(self, container: Any, reserved: int) -> None:
        """Count what it took instead: of a dict of twenty attributes, a third."""
        self.spend(sys.getsizeof(container) - reserved)

    def count_copies(self, parts: Iterable[Any]) -> None:
        """Count what is about to be copied."""
        for part in parts:
            if isinstance(part, torch.Tensor):  # whose values are not in the pickle: once is free
                storage = part.untyped_storage()
                if self._copied_storages.setdefault(storage._cdata, part) is not part:
                    self.spend(part.numel() * part.itemsize)
            elif isinstance(part, np.ndarray):
                self.spend(part.nbytes)
            elif type(part) in (str, bytes):
                self.spend(len(part))
            elif type(part) in _LISTS:
                self.spend(_POINTER * len(part))
            elif type(part) in ITEM_TYPES:
                self.count_items(len(part))

    def count_state(self, state: tuple[Any, ...]) -> None:
        """Count what a dtype or an array of numpy copies from its state."""
        self.count_copies(state)
        if getattr(state[2], "kind", None) == "T":  # texts, each however often it stands there
            self.count_copies(state[-1])

    def check_keys(self, container: Any, keys: Any) -> None:
        """Check what is about to be hashed.

        Raises:
            CostlyError: that would take for ever, or too many of a container have one hash.
        """
        for key in keys:
            _refuse_endless(key)
            if type(key) in _SCATTERED or (type(key) is int and abs(key) < sys.hash_info.modulus):
                continue
            place = id(container), hash(key)
            self._hashes[place] += 1
            if self._hashes[place] > _COLLISIONS:
                raise CostlyError("keys that have one hash")


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
    raise CostlyError("a key that is nested without end")
