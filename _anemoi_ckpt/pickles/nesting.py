"""How deep objects are nested whose memory Python frees recursively.

Python frees lists, dicts, tuples and objects of classes one after another, however deep they are
nested. A deque, a defaultdict, a SimpleNamespace or an array of objects calls itself for what it
holds: 100,000 of them in each other overflow the stack of C, which ends the process.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from _anemoi_ckpt.pickles.costs import CostlyError
from _anemoi_ckpt.pickles.inert import Inert

MOST = 1000  # levels of them: sane ones have three, and a level takes up to 400 bytes of the stack
_KINDS = (collections.deque, collections.defaultdict, types.SimpleNamespace, np.ndarray)
_CONTAINERS = (dict, list, tuple, set, frozenset, Inert, *_KINDS)


def frees_recursively(obj: object) -> bool:
    """Tell whether an object is of such a kind."""
    return isinstance(obj, _KINDS)


def refuse_depth(objects: Sequence[Any]) -> None:
    """Refuse objects of which more than `MOST` are in each other, through whatever lies between.

    Raises:
        CostlyError: they are.
    """
    if len(objects) > MOST and _is_too_deep(objects):
        raise CostlyError("objects that are nested without end")


def _is_too_deep(objects: Sequence[Any]) -> bool:
    depths: dict[int, int] = {}  # by id; 0 while what an object holds is looked through
    for root in objects:
        if id(root) in depths:
            continue
        depths[id(root)] = 0
        todo: list[tuple[Any, Iterator[Any]]] = [(root, iter(_inside(root)))]
        below = [0]  # the deepest that was found in each of them
        while todo:
            obj, rest = todo[-1]
            child = next((each for each in rest if _is_deeper(each, depths, below)), None)
            if child is not None:
                depths[id(child)] = 0
                todo.append((child, iter(_inside(child))))
                below.append(0)
                continue
            todo.pop()
            depth = depths[id(obj)] = below.pop() + frees_recursively(obj)
            if depth > MOST:
                return True
            if below:
                below[-1] = max(below[-1], depth)
    return False


def _is_deeper(child: Any, depths: dict[int, int], below: list[int]) -> bool:
    """Tell whether a child is to be looked through; note the depth of one that was."""
    if id(child) in depths:
        below[-1] = max(below[-1], depths[id(child)])
        return False
    return isinstance(child, _CONTAINERS)


def _inside(obj: Any) -> Iterable[Any]:
    if isinstance(obj, Inert):
        return [*obj.__reduce__()[2]]
    if isinstance(obj, dict):
        return [*obj, *obj.values()]
    if isinstance(obj, np.ndarray):
        return obj.reshape(-1).tolist() if obj.dtype == object else ()
    return [*vars(obj).values()] if isinstance(obj, types.SimpleNamespace) else [*obj]


def take_apart(objects: Iterable[Any]) -> None:
    """Empty them, each while the caller still has all others: then none frees another."""
    for obj in objects:
        if isinstance(obj, np.ndarray):
            obj.fill(None)
        elif isinstance(obj, types.SimpleNamespace):
            vars(obj).clear()
        else:
            obj.clear()
