"""Inert objects: classes, functions and objects that a pickle names, kept as data.

Nothing is imported because a pickle names it. What a pickle names and nobody trusts is loaded as
a name (`InertGlobal`), or as what a call of it was given (`Inert`): arguments, items and state.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from _anemoi_ckpt.errors import UNPLACED, MismatchError, harmless


class InertGlobal:
    """A class or function that a pickle names: `module` and `name` (qualified), no more."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        """Take both as the pickle has them."""
        self.module, self.name = module, name

    @property
    def full_name(self) -> str:
        """`module.Name`."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        """Show that it is inert, and what it is."""
        return f"<inert {self.full_name}>"

    def __eq__(self, other: object) -> bool:
        """Compare names."""
        return isinstance(other, InertGlobal) and self.full_name == other.full_name

    def __hash__(self) -> int:
        """Hash the name."""
        return hash(self.full_name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the name that it is."""
        return InertGlobal, (self.module, self.name)


_PARTS = ("_inert_args", "_inert_func", "_inert_items", "_inert_pairs", "_inert_state")


class Inert:
    """An object of a class that was not run: what its pickle says of it, and no behaviour.

    Its state is read as attributes. Where it is like a dict or a list (a subclass of one,
    OmegaConf's containers, torch_geometric's stores, `UserDict`), it can be walked as one:
    ``obj[key]``, ``len``, ``in``, iteration, ``keys``, ``values``, ``items``, ``get``. A pickled
    `torch.nn.Module` gives its parameters, buffers and submodules by name, and its
    ``state_dict()``, without what its class adds by code (``get_extra_state``, say). It cannot be
    changed. `copy` and `pickle` take it as the data it is, and `anemoi_ckpt.save` writes the object
    that it stands for.
    """

    __slots__ = (*_PARTS, "_inert_alone")

    def __init__(self, func: object = None, args: tuple[Any, ...] = ()) -> None:
        """Take what would have been called, and with what."""
        self._inert_func = func
        self._inert_args = args
        self._inert_items: list[Any] = []
        self._inert_pairs: dict[Any, Any] = {}
        self._inert_state: Any = None
        self._inert_alone = False  # whether it equals no other, as a key of a dict does

    @property
    def inert_class(self) -> str:
        """`module.Name` of its class, or of the function that would have made it."""
        func = self._inert_func
        if func in (NEW_OBJECT, NEW_OBJECT_EX):
            func = self._inert_args[0]
        if isinstance(func, Inert):  # whose own name could nest without end
            return "an inert object's result"
        return func.full_name if isinstance(func, InertGlobal) else repr(func)

    def __getattr__(self, name: str) -> Any:
        """Give what the state holds under a name."""
        # dunders are never data: Python asks for them to find behaviour
        if not name.startswith(("__", "_inert_")):
            state, content = _module_state(self) or _attributes(self), _content(self)
            homes = [state, *(state.get(part) for part in _MODULE_PARTS), content]
            for home in homes:
                if isinstance(home, dict) and name in home:
                    return _plain(home[name])
            if name == "state_dict" and _module_state(self) is not None:
                return functools.partial(_state_dict, self)
        raise AttributeError(f"{self!r} has no {name!r} in its state", name=name, obj=self)

    def __getitem__(self, key: Any) -> Any:
        """Walk it as the dict or list that it is like."""
        return _plain(_walked(self)[key])

    def __iter__(self) -> Iterator[Any]:
        """Walk it as the dict or list that it is like."""
        return map(_plain, _walked(self))

    def __len__(self) -> int:
        """Count what the dict or list that it is like holds."""
        return len(_walked(self))

    def __contains__(self, key: object) -> bool:
        """Ask the dict or list that it is like."""
        content = _walked(self)
        return key in (content if isinstance(content, dict) else map(_plain, content))

    def __bool__(self) -> bool:
        """Tell whether it holds anything; what is like no container is true."""
        content = _content(self)
        return content is None or bool(content)

    def __dir__(self) -> list[str]:
        """List the names in its state, too."""
        return [*super().__dir__(), *map(str, _attributes(self))]

    def __repr__(self) -> str:
        """Show its class and names, never values: those may hold it again, or a million others."""
        content = _content(self)
        names = list(_attributes(self)) or list(content if isinstance(content, dict) else ())
        shown = [str(name)[:40] if type(name) in (str, int) else "…" for name in names[:8]]
        if not shown:
            shown = [
                repr(arg)[:80] if type(arg) in _SCALARS else "…"
                for arg in self._inert_args[self._inert_func == NEW_OBJECT :][:8]
            ]
        more = ", …" if len(names) > len(shown) else ""
        told = harmless(", ".join(shown))
        return f"<inert {self.inert_class}{': ' if shown else ''}{told}{more}>"

    def __eq__(self, other: object) -> bool:
        """Compare data; a key of a pickled dict or set by identity, for its class told it apart."""
        return _same(self, other)

    def __hash__(self) -> int:
        """Hash what equal ones have in common and nothing can change: an Enum's value, say."""
        if self._inert_alone:
            return object.__hash__(self)
        return hash((self.inert_class, *(a for a in self._inert_args if type(a) in _SCALARS)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as data: empty first, filled afterwards, so that cycles survive."""
        return Inert, (), (*_held(self), self._inert_alone)

    def __setstate__(self, held: tuple[Any, ...]) -> None:
        """Take what `__reduce__` gave."""
        for name, value in zip((*_PARTS, "_inert_alone"), held, strict=True):
            setattr(self, name, value)
        become_mapping(self)


class InertMapping(Inert, Mapping[Any, Any]):
    """An object like a dict, of a class that was not run: what takes a mapping takes it."""

    __slots__ = ()


def set_alone(key: Any) -> None:
    """Make an object that is a key of a pickled dict or set, or in one, equal to no other.

    Two keys are never equal, whatever their data: a class without a comparison of its own compares
    by identity. What is made of texts and numbers alone, as an Enum's member is, is a value, and is
    looked for by those.
    """
    if isinstance(key, Inert):
        args = key._inert_args
        plain = all(type(each) in _SCALARS or isinstance(each, InertGlobal) for each in args)
        is_value = plain and any(type(each) in _SCALARS for each in args)
        key._inert_alone = not is_value or key._inert_state is not None


def become_mapping(obj: Inert) -> None:
    """Make an object an `InertMapping` if, by all that is known of it by now, it is like a dict."""
    is_shadowed = any(name in _attributes(obj) for name in _METHODS)  # by data of the same name
    by_keywords = obj._inert_func == NEW_OBJECT_EX  # which are no content
    is_none = is_shadowed or by_keywords or _module_state(obj) is not None
    is_mapping = isinstance(_content(obj), dict) and not is_none
    obj.__class__ = InertMapping if is_mapping else Inert


NEW_OBJECT = InertGlobal("copyreg", "__newobj__")  # cls, *args: makes an object without __init__
NEW_OBJECT_EX = InertGlobal("copyreg", "__newobj_ex__")  # cls, args, kwargs
REBUILD_SUBCLASS = InertGlobal("torch._tensor", "_rebuild_from_type_v2")
_SCALARS = (str, int, float, bool, bytes, type(None))
NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_METHODS = ("keys", "values", "items", "get")
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")
_QUANTIZED = re.compile(r"torch\.(\w+\.)*quantized\.")  # modules that pack their weights
NESTING = 100  # most levels of keys and of modules: sane ones have ten, hostile ones no end
NESTED = 100_000  # most elements of a key, most modules of a module


def _attributes(obj: Inert) -> dict[Any, Any]:
    """Give the attributes in an object's state: its ``__dict__``, its slots, or both."""
    state = obj._inert_state
    if obj.inert_class == "functools.partial" and isinstance(state, tuple):
        return dict(zip(("func", "args", "keywords"), state, strict=False))
    if isinstance(state, dict):  # as it stands: thousands of objects may have one of thousands
        return state
    parts = state if isinstance(state, tuple) and len(state) == 2 else ()  # noqa: PLR2004 - with slots
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def _content(obj: Inert) -> dict[Any, Any] | list[Any] | None:
    """Give the dict or list that an object is like, if any."""
    state = _attributes(obj)
    # OmegaConf's, torch_geometric's and collections' name for it; then what it was made from
    known = [state.get(name) for name in ("_content", "_mapping", "data")]
    for held in (obj._inert_pairs, obj._inert_items, *known, *obj._inert_args[-1:]):
        if isinstance(held, dict | list) and (held or any(held is each for each in known)):
            return held
    return None


def _walked(obj: Inert) -> dict[Any, Any] | list[Any]:
    content = _content(obj)
    if content is None:
        raise TypeError(f"{obj!r} holds no dict or list to walk")
    return content


def _plain(value: Any) -> Any:
    """Take a value out of the node that OmegaConf wraps it in."""
    if isinstance(value, Inert) and value.inert_class.startswith("omegaconf.nodes."):
        return _attributes(value).get("_val", value)
    return value


def _module_state(obj: object) -> dict[Any, Any] | None:
    """Give the ``__dict__`` of the module that an object stands for; None if it is no module.

    `torch.compile`'s modules and those of `torch.fx` are pickled as calls, of the module that was
    compiled and of the ``__dict__``.
    """
    if not isinstance(obj, Inert):
        return None
    state: Any = _attributes(obj)
    if not state and obj._inert_args:
        if obj.inert_class == "torch._dynamo.eval_frame.OptimizedModule":
            own = {"_orig_mod": obj._inert_args[0]}
            state = {"_parameters": {}, "_buffers": {}, "_modules": own}
        elif obj.inert_class.startswith("torch.fx.graph_module.reduce_"):
            state = obj._inert_args[0]
    is_module = isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in _MODULE_PARTS
    )
    return state if is_module else None


def _state_dict(root: Inert) -> dict[str, Any]:
    """Collect parameters and persistent buffers in the order of `torch.nn.Module.state_dict`.

    Raises:
        MismatchError: a part of it is pickled in a way that only its class knows.
    """
    found: dict[str, Any] = {}
    todo: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for count in itertools.count():
        if not todo:
            return found
        path, module = todo.pop()
        if count > NESTED or len(path) > NESTING:
            raise ValueError("its modules hold each other without end")
        state = _module_state(module)
        if state is None or _QUANTIZED.match(module.inert_class):
            raise MismatchError(
                UNPLACED,
                f"{'.'.join(path)} is pickled in a way that only its class knows: {module!r}",
                "trust=[…] with that class, or trust=True, runs its code",
            )
        transient = state.get("_non_persistent_buffers_set") or ()
        buffers = {k: v for k, v in state["_buffers"].items() if k not in transient}
        for name, value in {**state["_parameters"], **buffers}.items():
            if value is not None:
                found[".".join((*path, str(name)))] = _detached(value)
        children = [((*path, str(k)), v) for k, v in state["_modules"].items() if v is not None]
        todo += reversed(children)
    raise AssertionError


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def walk(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Give each thing in a checkpoint that is no container, and the keys on the way to it.

    However deep or cyclic it is: each container is entered once.
    """
    seen: dict[int, Any] = {}  # by id, which is no other's while it is kept
    inside = _inside(tree, seen)
    if inside is None:
        yield (), tree
        return
    seen[id(tree)] = tree
    # the containers that are open, one in another: the paths of a million elements are not kept
    levels: list[tuple[tuple[Any, ...], Iterator[Any]]] = [((), iter(inside))]
    while levels:
        outer, rest = levels[-1]
        for key, item in rest:
            if id(item) in seen:
                continue
            path = (*outer, key) if len(outer) < NESTING else outer
            inside = _inside(item, seen)
            if inside is not None:
                seen[id(item)] = item
                levels.append((path, iter(inside)))
                break
            yield path, item
        else:
            levels.pop()


def _inside(item: Any, seen: dict[int, Any]) -> Iterable[tuple[Any, Any]] | None:
    """Give what a container holds, by key; None if it is no container.

    Of an inert object, without those of its parts that were seen: thousands may share them.
    """
    if isinstance(item, Inert):
        module = _module_state(item)
        # those of what is like a dict go by their own keys, wherever it has them
        content = _content(item) if isinstance(item, InertMapping) else item._inert_pairs
        state = module or _attributes(item) or {"": item._inert_state}
        state = _unseen(item._inert_state, seen, state)
        if module is not None:  # whose parts go by the names that a state dict gives them
            parts = [_unseen(module[part], seen, module[part]) for part in _MODULE_PARTS]
            others = {k: v for k, v in state.items() if k not in _MODULE_PARTS}
            state = {name: value for part in (*parts, others) for name, value in part.items()}
        beside = [pair for pair in state.items() if pair[1] is not content]
        args = _unseen(item._inert_args, seen, item._inert_args)
        unnamed = [each for each in (*args, *item._inert_items) if each is not content]
        named = _unseen(content, seen, dict(content or {}))
        return [*beside, *named.items(), *enumerate(unnamed)]
    if isinstance(item, Mapping):
        return _items(item)
    if isinstance(item, list | tuple | set | frozenset | collections.deque):
        return enumerate(item)
    return vars(item).items() if type(item) in NAMESPACES else None


def _items(mapping: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Give what a mapping holds; of one of a trusted class that refuses, what it is made of.

    OmegaConf's raise for a value that refers to what is not there, or is missing (``???``).
    """
    if isinstance(mapping, dict):
        return mapping.items()
    try:
        return list(mapping.items())
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return getattr(mapping, "__dict__", {}).items()


def _unseen(part: Any, seen: dict[int, Any], inside: Any) -> Any:
    """Give what is inside a part of an object, the first time that it is met; then nothing."""
    if isinstance(part, dict | list | tuple):
        if id(part) in seen:
            return type(inside)()
        seen[id(part)] = part
    return inside


def _held(obj: Inert) -> tuple[Any, ...]:
    return tuple(getattr(obj, name) for name in _PARTS)


def _same(one: object, other: object) -> bool:
    """Tell whether two are the same data. Not recursive: either may be deep, or cyclic."""
    todo, seen = [(one, other)], set()
    while todo:
        a, b = todo.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        alone = isinstance(a, Inert) and isinstance(b, Inert) and (a._inert_alone or b._inert_alone)
        pairs = _pairs(a, b) if type(a) is type(b) and not alone else None
        if pairs is None:
            return False
        todo += pairs
    return True


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]] | None:
    """Give what must be the same within two of a type, for them to be; None if they are not."""
    if isinstance(a, Inert):
        return [*zip(_held(a), _held(b), strict=True)]
    if isinstance(a, list | tuple):
        return [*zip(a, b, strict=True)] if len(a) == len(b) else None
    if isinstance(a, dict):
        return [(value, b[key]) for key, value in a.items()] if a.keys() == b.keys() else None
    if isinstance(a, np.ndarray):
        return [(a.dtype, b.dtype), (a.shape, b.shape), (a.tolist(), b.tolist())]
    if isinstance(a, torch.Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return [] if alike and (a.is_meta or torch.equal(a, b)) else None
    return [] if a == b else None
