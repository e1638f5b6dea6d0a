"""Inert objects: what a pickle names and nobody trusts, as data.

inert objects · reading · writing

Nothing is imported because a pickle names it. What torch's restricted unpickler allows is built as
torch builds it, standard classes that are data and no more come back as themselves, and all else
is a name (`InertGlobal`) or what would have been made by one (`Inert`): arguments, items, state.
"""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import decimal
import functools
import itertools
import os
import pathlib
import pickle
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch._weights_only_unpickler import (
    _blocklisted_modules,
    _get_allowed_globals,
    _get_user_allowed_globals,
)

Trust = bool | Mapping[str, Any]  # all, nothing but torch's own list, or these names
StorageOf = Callable[[Any], Any]  # from a persistent id to a storage


# ── inert objects ─────────────────────────────────────────────────────────────────────────────


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


class Inert:
    """An object of a class that was not run: what its pickle says of it, and no behaviour.

    Its state is read as attributes. Where it is like a dict or a list (a subclass of one,
    OmegaConf's containers, torch_geometric's stores, `UserDict`), it can be walked as one:
    ``obj[key]``, ``len``, ``in``, iteration, ``keys``, ``values``, ``items``, ``get``. A pickled
    `torch.nn.Module` gives its parameters, buffers and submodules by name, and its
    ``state_dict()``. It cannot be changed. `copy` and `pickle` take it as the data it is, and
    `anemoi_ckpt.save` writes the object that it stands for.
    """

    __slots__ = ("_inert_args", "_inert_func", "_inert_items", "_inert_pairs", "_inert_state")

    def __init__(self, func: object = None, args: tuple[Any, ...] = ()) -> None:
        """Take what would have been called, and with what."""
        self._inert_func = func
        self._inert_args = args
        self._inert_items: list[Any] = []
        self._inert_pairs: dict[Any, Any] = {}
        self._inert_state: Any = None

    @property
    def inert_class(self) -> str:
        """`module.Name` of its class, or of the function that would have made it."""
        func = self._inert_func
        if func in (_NEW_OBJECT, _NEW_OBJECT_EX):
            func = self._inert_args[0]
        if isinstance(func, Inert):  # whose own name could nest without end
            return "an inert object's result"
        return func.full_name if isinstance(func, InertGlobal) else repr(func)

    def __getattr__(self, name: str) -> Any:
        """Give what the state holds under a name."""
        # dunders are never data: Python asks for them to find behaviour
        if not name.startswith(("__", "_inert_")):
            state, content = _attributes(self), _content(self)
            homes = [state, *(state.get(part) for part in _MODULE_PARTS), content]
            for home in homes:
                if isinstance(home, dict) and name in home:
                    return _plain(home[name])
            if name == "state_dict" and _is_module(self):
                return functools.partial(_state_dict, self)
            if isinstance(content, dict) and name in ("keys", "values", "items", "get"):
                return getattr({key: _plain(value) for key, value in content.items()}, name)
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
                for arg in self._inert_args[self._inert_func == _NEW_OBJECT :][:8]
            ]
        more = ", …" if len(names) > len(shown) else ""
        return f"<inert {self.inert_class}{': ' if shown else ''}{', '.join(shown)}{more}>"

    def __eq__(self, other: object) -> bool:
        """Compare data."""
        return isinstance(other, Inert) and _same(self, other)

    def __hash__(self) -> int:
        """Hash what equal ones have in common and nothing can change: an Enum's value, say."""
        return hash((self.inert_class, *(a for a in self._inert_args if type(a) in _SCALARS)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as data: empty first, filled afterwards, so that cycles survive."""
        return Inert, (), tuple(getattr(self, name) for name in Inert.__slots__)

    def __setstate__(self, held: tuple[Any, ...]) -> None:
        """Take what `__reduce__` gave."""
        for name, value in zip(Inert.__slots__, held, strict=True):
            setattr(self, name, value)


Inert.__module__ = InertGlobal.__module__ = "anemoi_ckpt"  # where users import them from

_NEW_OBJECT = InertGlobal("copyreg", "__newobj__")  # cls, *args: makes an object without __init__
_NEW_OBJECT_EX = InertGlobal("copyreg", "__newobj_ex__")  # cls, args, kwargs
_REBUILD_SUBCLASS = InertGlobal("torch._tensor", "_rebuild_from_type_v2")
_SCALARS = (str, int, float, bool, bytes, type(None))
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")
_NESTING = 100  # most levels of keys and of modules: sane ones have ten, hostile ones no end
_NESTED = 100_000  # most elements of a key, most modules of a module


def _attributes(obj: Inert) -> dict[Any, Any]:
    """Give the attributes in an object's state: its ``__dict__``, its slots, or both."""
    state = obj._inert_state
    if obj.inert_class == "functools.partial" and isinstance(state, tuple):
        return dict(zip(("func", "args", "keywords"), state, strict=False))
    parts = state if isinstance(state, tuple) and len(state) == 2 else [state]  # noqa: PLR2004 - with slots
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


def _is_module(obj: object) -> bool:
    state = _attributes(obj) if isinstance(obj, Inert) else {}
    return all(isinstance(state.get(part), dict) for part in _MODULE_PARTS)


def _state_dict(root: Inert) -> dict[str, Any]:
    """Collect parameters and persistent buffers in the order of `torch.nn.Module.state_dict`."""
    found: dict[str, Any] = {}
    todo: list[tuple[tuple[str, ...], Any]] = [((), root)]
    for count in itertools.count():
        if not todo:
            return found
        path, module = todo.pop()
        if count > _NESTED or len(path) > _NESTING:
            raise ValueError("its modules hold each other without end")
        state = _attributes(module)
        transient = state.get("_non_persistent_buffers_set") or ()
        buffers = {k: v for k, v in state["_buffers"].items() if k not in transient}
        for name, value in {**state["_parameters"], **buffers}.items():
            if isinstance(value, torch.Tensor):
                found[".".join((*path, str(name)))] = value.detach()
        children = [((*path, str(k)), v) for k, v in state["_modules"].items() if _is_module(v)]
        todo += reversed(children)
    raise AssertionError


def walk(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Give each thing in a checkpoint that is no container, and the keys on the way to it.

    However deep or cyclic it is: each container is entered once.
    """
    todo: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    seen = {}
    while todo:
        path, item = todo.pop()
        inside = _inside(item)
        if inside is None:
            yield path, item
        elif id(item) not in seen:
            seen[id(item)] = item  # kept, so that its id is no other's
            todo += reversed([((*path, key)[:_NESTING], value) for key, value in inside])


def _inside(item: Any) -> Iterable[tuple[Any, Any]] | None:
    """Give what a container holds, by key; None if it is no container."""
    if isinstance(item, Inert):
        state = _attributes(item) or {"": item._inert_state}
        if _is_module(item):  # whose parts go by the names that a state dict gives them
            parts = {name: value for part in _MODULE_PARTS for name, value in state[part].items()}
            state = {**parts, **{k: v for k, v in state.items() if k not in _MODULE_PARTS}}
        unnamed = enumerate((*item._inert_args, *item._inert_items))
        return [*state.items(), *item._inert_pairs.items(), *unnamed]
    if isinstance(item, Mapping):
        return item.items()
    if isinstance(item, list | tuple | set | frozenset | collections.deque):
        return enumerate(item)
    return vars(item).items() if type(item) in _NAMESPACES else None


def _held(obj: Inert) -> tuple[Any, ...]:
    return tuple(getattr(obj, name) for name in Inert.__slots__)


def _same(one: object, other: object) -> bool:
    """Tell whether two are the same data. Not recursive: either may be deep, or cyclic."""
    todo, seen = [(one, other)], set()
    while todo:
        a, b = todo.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        pairs = _pairs(a, b) if type(a) is type(b) else None
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


# ── reading ───────────────────────────────────────────────────────────────────────────────────
#
# The machine is the standard library's own, in Python (`pickle._Unpickler`, all protocols), cut
# down to the opcodes that only move data; each that calls, or writes into an object, is replaced.
# torch's (torch/_weights_only_unpickler.py) knows protocol 2 alone, and takes stand-ins through a
# registry of the whole process, which two threads would fight over.

_POSIX = pathlib.PurePosixPath if os.name == "nt" else pathlib.PosixPath
_WINDOWS = pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_GROUP = (list, tuple, set, frozenset)
_TIME = (int, bytes, str, dt.timezone)
# Standard classes that are data and no more: of which types their arguments may be. Nothing passes
# that allocates by a number (bytearray(10**12)) or walks without end (set(range(10**12))).
_PLAIN: dict[str, tuple[type, tuple[type, ...]]] = {
    "argparse.Namespace": (argparse.Namespace, ()),
    "builtins.bytearray": (bytearray, (bytes,)),
    "builtins.bytes": (bytes, ()),  # protocol 2 writes no bytes at all so
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
_NUMPY = {  # made by numpy's public constructors, which check what they are told
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
} | {"numpy.dtype"}
_MEMORY = {
    *torch._tensor_classes,
    *torch._storage_classes,
    torch.Tensor,
}  # as torch's own list has them
_ITEM_TYPES = {dict, collections.OrderedDict, collections.defaultdict, collections.Counter}
_LIST_TYPES = {list, collections.deque}


@functools.cache
def _known() -> dict[str, Any]:
    """Give what is built for real: torch's own list and the standard classes."""
    return {**_get_allowed_globals(), **{name: kind for name, (kind, _) in _PLAIN.items()}}


@functools.cache
def _known_names() -> dict[int, str]:
    return {id(each): name for name, each in reversed(_known().items())}


class ForbiddenGlobalError(ValueError):
    """A pickle names what torch refuses whatever is registered, such as `posix.system`."""


def trusted(trust: Any) -> Trust:
    """Give the names that may be run: all (True), or those of a list of classes and functions.

    A class stands under its own name, or is given as `torch.serialization.add_safe_globals` takes
    it: ``(cls, "module.Name")``. What is registered there is trusted as well.

    Raises:
        TypeError: an item of the list is no class or function.
    """
    if isinstance(trust, bool):
        return trust or _get_user_allowed_globals()
    named = {}
    for item in trust:
        each, name = item if isinstance(item, tuple) else (item, None)
        if not callable(each) or not hasattr(each, "__qualname__"):
            raise TypeError(f"trust is True, False, or a list of classes, not one of {item!r}")
        named[name or f"{each.__module__}.{each.__qualname__}"] = each
    return {**_get_user_allowed_globals(), **named}


def unpickle(
    file: BinaryIO, storage_of: StorageOf, trust: Trust, names: dict[str, bool] | None = None
) -> Any:
    """Read one pickle, and leave the file where it ends.

    Args:
        file: a buffered one.
        storage_of: asked for what each persistent id stands for.
        trust: True runs the pickle as Python would; else the names that may be run, with what
            each names.
        names: is told every class and function that the pickle names, and whether it is inert.

    Raises:
        ForbiddenGlobalError: it names what no checkpoint needs.
        Exception: as the machine meets them, with a pickle that makes no sense.
    """
    names = {} if names is None else names
    if trust is True:
        return _TrustingMachine(file, storage_of, names).load()
    return _Machine(file, storage_of, trust or {}, names).load()


_RENAMED_MODULES = {"torch.tensor": "torch._tensor"}  # as torch.load has it


class _TrustingMachine(pickle.Unpickler):
    """Python's own, as `torch.load(weights_only=False)` uses it."""

    def __init__(self, file: BinaryIO, storage_of: StorageOf, names: dict[str, bool]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage_of, self._names = storage_of, names

    def find_class(self, module: str, name: str, /) -> Any:
        self._names[f"{module}.{name}"] = False
        if module == "torch" and name.endswith("Storage"):
            return _known().get(f"torch.{name}") or super().find_class(module, name)
        return super().find_class(_RENAMED_MODULES.get(module, module), name)

    def persistent_load(self, pid: Any) -> Any:
        return self._storage_of(pid)


_PYTHON_MACHINE: Any = pickle._Unpickler  # nobody annotates it


class _Machine(_PYTHON_MACHINE):  # type: ignore[misc] # see above
    """The machine without the opcodes that run code; ours in their place."""

    # EXT*, which look into a registry of the process, the text PERSID and out-of-band buffers are
    # not among them, nor is whatever a later protocol will bring
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        opcode[0]: _PYTHON_MACHINE.dispatch[opcode[0]]
        for opcode in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
            *(pickle.DUP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT),
            *(pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
            *(pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING),
            *(pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
            *(pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
            *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT),
            *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL),
            *(pickle.INST, pickle.OBJ, pickle.BINPERSID),
        )
    }
    stack: list[Any]
    proto: int

    def __init__(
        self,
        file: BinaryIO,
        storage_of: StorageOf,
        trust: Mapping[str, Any],
        names: dict[str, bool],
    ) -> None:
        super().__init__(file, encoding="utf-8")  # as torch.load does
        self._storage_of, self._trust, self._names = storage_of, trust, names
        self._trusted_ids = {id(each) for each in trust.values()}

    def persistent_load(self, pid: Any) -> Any:
        return self._storage_of(pid)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # noqa: PLR2004 - names of Python 2, which protocol 2 still writes
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
        module = _RENAMED_MODULES.get(module, module)
        full_name = f"{module}.{name}"
        if not full_name.isprintable():  # written back as text, a newline would end the name
            raise pickle.UnpicklingError("a global whose name is no name")
        if module in _blocklisted_modules:
            raise ForbiddenGlobalError(full_name)
        found = self._trust.get(full_name, _known().get(full_name))
        self._names[full_name] = found is None and full_name not in _NUMPY
        return InertGlobal(module, name) if found is None else found

    def _is_trusted(self, obj: object) -> bool:
        return id(obj) in self._trusted_ids

    def _make(self, func: Any, args: Any, *, new: bool = False) -> Any:
        """Call what is harmless; all else becomes the data that the call is."""
        if type(args) is not tuple:
            raise pickle.UnpicklingError("a call whose arguments are no tuple")
        name = func.full_name if isinstance(func, InertGlobal) else _known_names().get(id(func), "")
        if not name and not isinstance(func, Inert):
            raise pickle.UnpicklingError(f"a call of a {type(func).__name__}")
        if name == "builtins.getattr" and len(args) == 2 and isinstance(args[0], InertGlobal):  # noqa: PLR2004 - object and name
            # how protocols below 4 write a nested class, and Python 3.12 an Enum's member
            return self.find_class(args[0].module, f"{args[0].name}.{args[1]}")
        made = _made_plain(name, args)
        if made is not _NOTHING:
            return made
        if name in _known() and name not in _PLAIN:
            made = _made_by_torch(func, args)
            if made is not _NOTHING:
                return made
        return Inert(_NEW_OBJECT, (func, *args)) if new else Inert(func, args)

    def _reduce(self) -> None:
        if self._is_trusted(self.stack[-2]):
            super().load_reduce()
        else:
            args = self.stack.pop()
            self.stack[-1] = self._make(self.stack[-1], args)

    def _new_object(self) -> None:
        if self._is_trusted(self.stack[-2]):
            super().load_newobj()
        else:
            args = self.stack.pop()
            self.stack[-1] = self._make(self.stack[-1], args, new=True)

    def _new_object_ex(self) -> None:
        if self._is_trusted(self.stack[-3]):
            super().load_newobj_ex()
        else:
            kwargs, args = self.stack.pop(), self.stack.pop()
            self.stack[-1] = self._make(_NEW_OBJECT_EX, (self.stack[-1], args, kwargs))

    def _instantiate(self, cls: Any, args: list[Any]) -> None:
        """Serve INST and OBJ, of protocols 0 and 1."""
        if self._is_trusted(cls):
            super()._instantiate(cls, args)
        else:
            self.stack.append(self._make(cls, tuple(args)))

    def _build(self) -> None:
        obj = self.stack[-2]
        kind: Any = type(obj)
        if self._is_trusted(kind):
            super().load_build()
            return
        state = self.stack.pop()
        if kind is Inert and obj._inert_func is None:  # one of ours, pickled as data
            obj.__setstate__(state)
        elif kind is Inert:
            obj._inert_state = state
        elif kind is torch.Tensor:
            obj.set_(*state)
        elif kind is torch.nn.Parameter:
            obj.__setstate__(state)
        elif issubclass(kind, np.dtype | np.ndarray):
            obj.__setstate__(_checked_state(obj, state))
        elif kind is collections.OrderedDict or kind in _NAMESPACES:
            vars(obj).update(state)
        else:
            raise pickle.UnpicklingError(f"state for a {kind.__name__}, which takes none")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            target = target._inert_pairs
        elif type(target) not in _ITEM_TYPES and not self._is_trusted(type(target)):
            raise pickle.UnpicklingError(f"items set on a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            target = target._inert_items
        elif type(target) not in _LIST_TYPES and not self._is_trusted(type(target)):
            raise pickle.UnpicklingError(f"items appended to a {type(target).__name__}")
        target.extend(items)

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError(f"items added to a {type(target).__name__}")
        target.update(map(_key, items))

    def _make_frozenset(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(map(_key, items)))

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def _bytearray8(self) -> None:  # the standard one allocates what the file claims
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new_object,
        pickle.NEWOBJ_EX[0]: _new_object_ex,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _make_frozenset,
        pickle.DICT[0]: _make_dict,
        pickle.BYTEARRAY8[0]: _bytearray8,
    }


def _key(value: Any) -> Any:
    """Give a value that is about to be hashed, unless that would take for ever, or too deep.

    A tuple does not keep its hash: of a pair of twice the same pair, sixty deep, it takes 2**60
    steps, and 200 bytes of pickle make one.
    """
    layer, count = [value], 0
    for _ in range(_NESTING):
        layer = [each for item in layer if isinstance(item, tuple | frozenset) for each in item]
        count += len(layer)
        if not layer:
            return value
        if count > _NESTED:
            break
    raise pickle.UnpicklingError("a key that is nested without end")


_NOTHING = object()


def _made_plain(name: str, args: tuple[Any, ...]) -> Any:
    """Give what a standard class, numpy or ours makes of arguments that are data, or nothing."""
    try:
        if name in _NUMPY:
            return _made_by_numpy(name.rpartition(".")[2], *args)
        if name in _OURS:
            return _OURS[name](*args)
        if name in ("_codecs.encode", "builtins.bytearray") and args and type(args[0]) is str:
            return _decoded(name, *args)
        return _made_standard(name, args)
    except Exception:  # noqa: BLE001 - whatever a class objects to stays data
        return _NOTHING


_OURS = {"anemoi_ckpt.Inert": Inert, "anemoi_ckpt.InertGlobal": InertGlobal}  # pickled as data


def _decoded(name: str, text: str, encoding: str) -> Any:
    """Give the bytes that protocol 2 writes as text (pickle.py, save_bytes)."""
    if encoding not in ("latin1", "latin-1"):
        return _NOTHING
    raw = text.encode("latin1")
    return raw if name == "_codecs.encode" else bytearray(raw)


def _made_standard(name: str, args: tuple[Any, ...]) -> Any:
    kind, types_of_args = _PLAIN.get(name, (None, ()))
    if kind is None or not all(type(arg) in types_of_args or isinstance(arg, type) for arg in args):
        return _NOTHING
    if kind is collections.defaultdict and not {*args} <= {*_ITEM_TYPES, *_LIST_TYPES, *_EMPTY}:
        return _NOTHING
    for group in args:
        if isinstance(group, list | tuple) and kind is not collections.OrderedDict:
            any(map(_key, group))
    return kind(*args)


_EMPTY = (set, tuple, int, float, str, bool, None)  # what makes a default from nothing


def _made_by_numpy(name: str, *args: Any) -> Any:
    """Make a dtype, a scalar or an array; where arguments are odd, nothing."""
    if name == "dtype" and isinstance(args[0], str):
        return np.dtype(args[0], copy=True)  # its state changes it
    if name == "_reconstruct" and args[0] == InertGlobal("numpy", "ndarray"):
        return np.ndarray((0,), np.uint8)  # its state comes later
    if name == "scalar" and type(args[1]) is bytes and not args[0].hasobject:
        return np.frombuffer(args[1], args[0], count=1)[0]
    if name == "_frombuffer":
        raw, dtype, shape, order = args
        return np.frombuffer(bytearray(raw), dtype).reshape(shape, order=order)
    return _NOTHING


def _checked_state(obj: Any, state: Any) -> Any:
    """Give the state of a numpy object, unless it lies: numpy itself believes what it is told.

    A dtype whose state lies about its flags turns an array's bytes into pointers.

    Raises:
        UnpicklingError: it lies.
    """
    if isinstance(obj, np.ndarray):
        *_, shape, dtype, _, raw = state
        count = functools.reduce(lambda a, b: a * b, shape, 1)
        if isinstance(dtype, np.dtype) and all(type(n) is int and n >= 0 for n in shape):
            if dtype.hasobject and dtype.names is None and type(raw) is list and len(raw) == count:
                return state
            if not dtype.hasobject and type(raw) is bytes and len(raw) == count * dtype.itemsize:
                return state
    else:
        _, order, subarray, names, fields, size, alignment, flags, *extra = state
        truth = obj
        if names:
            columns = [fields[name] for name in names]
            truth = np.dtype(
                {
                    "names": list(names),
                    "formats": [column[0] for column in columns],
                    "offsets": [column[1] for column in columns],
                    "itemsize": size,
                }
            )
        told = (size, alignment, flags)
        true = (truth.itemsize, truth.alignment, truth.flags)
        plain = all(a in (b, -1) for a, b in zip(told, true, strict=True)) and order in "<>=|"
        units = not extra or (obj.kind in "mM" and not extra[0][0])  # no more metadata
        if subarray is None and plain and units and flags == truth.flags:
            return state
    raise pickle.UnpicklingError("a numpy object whose state does not fit it")


def _made_by_torch(func: Any, args: tuple[Any, ...]) -> Any:
    """Call one of torch's own functions as its restricted unpickler does; or nothing."""
    if func is torch._tensor._rebuild_from_type_v2:
        rebuild, cls, given, _ = args  # it calls the first with the third
        if rebuild not in _known().values() or isinstance(rebuild, type):
            return _NOTHING
        if isinstance(cls, InertGlobal):
            # the tensor itself in place of how it is made, so that it is found and moved
            return Inert(_REBUILD_SUBCLASS, (_made_by_torch(rebuild, given), *args[1:2], args[3]))
    # torch asks things of what it is given, which must not answer from the pickle, nor be a
    # range as long as it likes
    if any(isinstance(arg, Inert | InertGlobal | range) for arg in args):
        return _NOTHING
    if args and func in _MEMORY:
        raise pickle.UnpicklingError(f"{func.__name__} called for memory, not for data")
    return func(*args)


# ── writing ───────────────────────────────────────────────────────────────────────────────────


_PYTHON_PICKLER: Any = pickle._Pickler  # likewise


class Pickler(_PYTHON_PICKLER):  # type: ignore[misc] # see above
    """Writes inert objects as what they were read from. `torch.save` takes this module for it."""

    dispatch: ClassVar[dict[type, Callable[[Any, Any], None]]] = dict(_PYTHON_PICKLER.dispatch)

    def _save_global(self, obj: InertGlobal) -> None:
        outer, _, inner = obj.name.rpartition(".")
        if outer and self.proto < 4:  # noqa: PLR2004 - which has no dotted names
            self.save_reduce(getattr, (InertGlobal(obj.module, outer), inner), obj=obj)
        elif self.proto < 4:  # noqa: PLR2004
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
            self.memoize(obj)

    def _save_inert(self, obj: Inert) -> None:
        func, args = obj._inert_func, obj._inert_args
        if func == _REBUILD_SUBCLASS and isinstance(args[0], torch.Tensor):
            rebuild, given = args[0].__reduce_ex__(self.proto)[:2]
            args = (rebuild, args[1], given, args[2])
        if func == _NEW_OBJECT:
            self.save(args[0])
            self.save(args[1:])
            self.write(pickle.NEWOBJ)
        else:
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
        if id(obj) in self.memo:  # it was among its own arguments
            self.write(pickle.POP + self.get(self.memo[id(obj)][0]))
        else:
            self.memoize(obj)
        self._batch_appends(obj._inert_items)
        self._batch_setitems(obj._inert_pairs.items())
        if obj._inert_state is not None:
            self.save(obj._inert_state)
            self.write(pickle.BUILD)

    dispatch |= {Inert: _save_inert, InertGlobal: _save_global}
