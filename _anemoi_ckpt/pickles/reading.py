"""The machine that reads pickles: it moves data, and calls only what is known to be harmless."""

from __future__ import annotations

import collections
import enum
import functools
import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType, TracebackType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from _anemoi_ckpt.compat import DTYPES_SINCE, MissingDtypeError
from _anemoi_ckpt.pickles.arrays import BUILTINS, NOTHING, made_by_numpy, stated
from _anemoi_ckpt.pickles.costs import WEIGHTS, CostlyError, Costs
from _anemoi_ckpt.pickles.inert import (
    NAMESPACES,
    NEW_OBJECT,
    NEW_OBJECT_EX,
    REBUILD_SUBCLASS,
    Inert,
    InertGlobal,
    become_mapping,
)
from _anemoi_ckpt.pickles.nesting import frees_recursively, refuse_depth, take_apart
from _anemoi_ckpt.pickles.rebuilds import check_view
from _anemoi_ckpt.pickles.safe import (
    CHECKED,
    FORBIDDEN_MODULES,
    ITEM_TYPES,
    LIST_TYPES,
    MEMORY,
    NUMPY,
    PLAIN,
    known,
    known_names,
)

Trust = bool | Mapping[str, Any]  # all, nothing but torch's own list, or these names
StorageOf = Callable[[Any], Any]  # from a persistent id to a storage

# The machine is the standard library's own, in Python (`pickle._Unpickler`, all protocols), cut
# down to the opcodes that only move data; each that calls, or writes into an object, is replaced.
# torch's (torch/_weights_only_unpickler.py) knows protocol 2 alone, and takes stand-ins through a
# registry of the whole process, which two threads would fight over.


_OBJECT = InertGlobal("builtins", "object")
_GETATTR = InertGlobal("builtins", "getattr")
_SPENT_AT_ONCE = 100_000  # bytes of memory that opcodes take, and that are counted together
_NAME_LENGTH = 10_000  # most letters of a nested name: sane ones have a hundred


class ForbiddenGlobalError(ValueError):
    """A pickle names what torch, too, always refuses, such as `posix.system`."""


class MissingClassError(ImportError):
    """A pickle names a trusted class or function that is not installed."""


class OldTextError(ValueError):
    """A pickle of Python 2 has text that is not UTF-8, as torch.load wants it."""


class LongNumberError(ValueError):
    """A pickle of protocol 0 or 1 has a number of more digits than Python reads."""


class TrustedCodeError(Exception):
    """Code that a pickle names, and that is trusted, raised an error, which is the cause.

    `inert` is the first of what the code was given that is not trusted, if any.
    """

    def __init__(self, name: str, inert: Inert | InertGlobal | None = None) -> None:
        """Take the name of the code."""
        super().__init__(name)
        self.inert = inert


def trusted(trust: Any) -> Trust:
    """Give the names that may be run: all (True), or those of a list of classes and functions.

    A class stands under its own name, or is given as `torch.serialization.add_safe_globals` takes
    it: ``(cls, "module.Name")``. What is registered there is not looked at: whichever package is
    imported may register what it likes, and a load without trust would depend on it.

    Raises:
        TypeError: an item of the list is no class or function.
    """
    if isinstance(trust, bool):
        return trust
    named = {}
    for item in trust:
        match item:
            case (each, str(name)):
                named[name] = each
            case each if callable(each) and hasattr(each, "__qualname__"):
                named[f"{each.__module__}.{each.__qualname__}"] = each
            case _:
                raise TypeError(f"trust is True, False, or a list of classes, not one of {item!r}")
    return named


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
        CostlyError: it takes far more memory or time than its length explains.
        LongNumberError: it has a number of thousands of digits.
        OldTextError: with `trust=True`, it has text of Python 2 that is not UTF-8.
        MissingClassError: with `trust=True`, it names what is not installed.
        TrustedCodeError: trusted code raised.
        Exception: as the machine meets them, with a pickle that makes no sense.
    """
    names = {} if names is None else names
    machine = (
        _TrustingMachine(file, storage_of, names)
        if trust is True
        else _Machine(file, storage_of, trust or {}, names)
    )
    try:
        return machine.load()
    except ValueError as err:
        if "set_int_max_str_digits" in str(err):  # which a user can call; torch.load raises this
            raise LongNumberError(str(err)) from err
        raise


_RENAMED_MODULES = {"torch.tensor": "torch._tensor"}  # as torch.load has it


class _TrustingMachine(pickle.Unpickler):
    """Python's own, as `torch.load(weights_only=False)` uses it."""

    def __init__(self, file: BinaryIO, storage_of: StorageOf, names: dict[str, bool]) -> None:
        super().__init__(file, encoding="utf-8")  # as torch.load does
        self._storage_of, self._names = storage_of, names
        self._own: Exception | None = None  # what was raised here, and not by trusted code

    def load(self) -> Any:
        try:
            return super().load()
        except (MemoryError, RecursionError):
            raise
        except Exception as err:
            # where the machine itself raised it, no frame of other code is there
            frames = err.__traceback__.tb_next if err.__traceback__ else None
            if frames is None and isinstance(err, UnicodeDecodeError):
                raise OldTextError(str(err)) from err
            if err is self._own or frames is None:
                raise
            raise TrustedCodeError(_raised_in(frames)) from err

    def find_class(self, module: str, name: str, /) -> Any:
        with self._noting():
            return self._found(module, name)

    def _found(self, module: str, name: str) -> Any:
        self._names[f"{module}.{name}"] = False
        if module == "torch" and name.endswith("Storage"):
            return known().get(f"torch.{name}") or super().find_class(module, name)
        if module == "torch" and name in DTYPES_SINCE and not hasattr(torch, name):
            raise MissingDtypeError(name)
        try:
            each = super().find_class(_RENAMED_MODULES.get(module, module), name)
        except (ImportError, AttributeError) as err:
            raise MissingClassError(f"{module}.{name}") from err
        if module != "torch._utils" or each not in CHECKED:
            return each
        return functools.partial(self._checked, CHECKED[each])

    def _checked(self, rebuild: Any, *args: Any) -> Any:
        with self._noting():
            return rebuild(*args)

    def persistent_load(self, pid: Any) -> Any:
        with self._noting():
            return self._storage_of(pid)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:
            self._own = err
            raise


def _raised_in(trace: TracebackType | None) -> str:
    """Name the function of a traceback's first frame outside of this room."""
    while trace and trace.tb_frame.f_globals["__name__"] in (__name__, "pickle", "contextlib"):
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f"{trace.tb_frame.f_globals['__name__']}.{code.co_qualname}"


@contextmanager
def _running(given: Any) -> Iterator[None]:
    """Tell what trusted code raises, when it is given this, from what is wrong with a pickle."""
    try:
        yield
    except (MemoryError, RecursionError, pickle.UnpicklingError):
        raise
    except Exception as err:
        parts = [given, *(given if isinstance(given, tuple | list) else ())]
        inert = next((each for each in parts if isinstance(each, Inert | InertGlobal)), None)
        raise TrustedCodeError(_raised_in(err.__traceback__), inert) from err


_PYTHON_MACHINE: Any = pickle._Unpickler  # typeshed does not have it


class _First(dict[int, Callable[[Any], None]]):
    """What begins with any opcode."""

    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        return functools.partial(_run, opcode)


def _run(opcode: int, machine: _Machine) -> None:
    """Run a machine from an opcode on, and count what each takes, until one of them raises."""
    read, opcodes, costs = machine.read, machine.opcodes, machine.costs
    spent = 0
    while True:
        spent += WEIGHTS[opcode]
        if spent > _SPENT_AT_ONCE:
            costs.spend(spent)
            spent = 0
        opcodes[opcode](machine)
        following = read(1)
        if not following:
            raise EOFError
        opcode = following[0]


class _Machine(_PYTHON_MACHINE):  # type: ignore[misc] # see above
    """The machine without the opcodes that run code; ours in their place."""

    # Python's own loop hands the first opcode to ours, which goes on with all others.
    dispatch: ClassVar[Mapping[int, Callable[[Any], None]]] = _First()
    # EXT*, which look into a registry of the process, the text PERSID and out-of-band buffers are
    # not among them, nor is whatever a later protocol will bring
    opcodes: ClassVar[dict[int, Callable[[Any], None]]] = {
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
    memo: dict[int, Any]
    proto: int
    read: Callable[[int], bytes]

    def __init__(
        self,
        file: BinaryIO,
        storage_of: StorageOf,
        trust: Mapping[str, Any],
        names: dict[str, bool],
    ) -> None:
        super().__init__(file)
        self._storage_of, self._trust, self._names = storage_of, trust, names
        self._trusted_ids = {id(each) for each in trust.values()}
        self._memo_keys: dict[int, list[int]] = {}  # of numpy's objects, by id
        self.costs = Costs(file.tell)
        self._fragile: list[Any] = []  # what frees recursively what it holds

    def load(self) -> Any:
        """Read the pickle; leave nothing behind that overflows the stack of C when it is freed."""
        try:
            loaded = super().load()
            refuse_depth(self._fragile)
        except BaseException:
            take_apart(self._fragile)
            raise
        return loaded

    def persistent_load(self, pid: Any) -> Any:
        return self._storage_of(pid)

    def _decode_string(self, value: bytes) -> str | bytes:
        """Give a `str` of Python 2, which could hold any bytes: as text where it is UTF-8."""
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # noqa: PLR2004 - names of Python 2, which protocol 2 still writes
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
        module = _RENAMED_MODULES.get(module, module)
        if len(module) + len(name) > _NAME_LENGTH:
            raise CostlyError("a name that is nested without end")
        full_name = f"{module}.{name}"
        self.costs.spend(2 * len(full_name))
        if not full_name.isprintable():  # written back as text, a newline would end the name
            raise pickle.UnpicklingError("a global whose name is no name")
        if module in FORBIDDEN_MODULES:
            raise ForbiddenGlobalError(full_name)
        found = self._trust.get(full_name, known().get(full_name))
        self._names[full_name] = found is None and full_name not in NUMPY
        return InertGlobal(module, name) if found is None else found

    def _is_trusted(self, obj: object) -> bool:
        if isinstance(obj, MethodType):  # a new one each time that its class is asked for it
            return obj in self._trust.values()
        return id(obj) in self._trusted_ids

    def _make(self, func: Any, args: Any, *, new: bool = False) -> Any:
        """Call what is harmless; all else becomes the data that the call is."""
        if type(args) is not tuple:
            raise pickle.UnpicklingError("a call whose arguments are no tuple")
        name = func.full_name if isinstance(func, InertGlobal) else known_names().get(id(func), "")
        if not name and not isinstance(func, Inert) and not callable(func):  # by trusted code
            raise pickle.UnpicklingError(f"a call of a {type(func).__name__}")
        self.costs.check_call(name, args)
        for make in (self._made_by_trusted, _made_plain):
            made = make(name, args)
            if made is not NOTHING:
                self.costs.count_made(made)
                if frees_recursively(made) and not isinstance(made, np.ndarray):  # of data, so far
                    self._fragile.append(made)
                return made
        # what encodes makes only latin-1, above: others are imported by name, and one has no end
        if name in known() and name not in PLAIN and name != "_codecs.encode":
            made = _made_by_torch(func, args)
            if made is not NOTHING:
                self.costs.count_made(made)
                return made
        self.costs.count_inert(args if new else ())
        if name and not isinstance(func, InertGlobal):  # so that it is known by its name
            func = InertGlobal(*name.rsplit(".", 1))
        inert = Inert(NEW_OBJECT, (func, *args)) if new else Inert(func, args)
        become_mapping(inert)  # a subclass of Counter, say, which is made from a dict
        return inert

    def _made_by_trusted(self, name: str, args: tuple[Any, ...]) -> Any:
        """Make what a name or a function that is harmless by itself makes of what is trusted."""
        if name == "builtins.getattr" and [*map(type, args[1:])] == [str]:
            return self._attribute(*args)
        if name == "copyreg._reconstructor" and args[1:] == (_OBJECT, None):  # protocols 0 and 1
            return object.__new__(args[0]) if self._is_trusted(args[0]) else NOTHING
        if name == "torch._tensor._rebuild_from_type_v2" and self._is_trusted(args[0]):
            rebuild, cls, given, state = args
            with _running(given):
                if isinstance(cls, InertGlobal):
                    return Inert(REBUILD_SUBCLASS, (rebuild(*given), cls, state))
                return torch._tensor._rebuild_from_type_v2(*args)
        return NOTHING

    def _attribute(self, owner: Any, name: str) -> Any:
        """Give what protocols below 4 write as an attribute: a nested class, an Enum's member."""
        outer = owner
        if self._is_trusted(owner):
            outer = InertGlobal(owner.__module__, owner.__qualname__)
        if not isinstance(outer, InertGlobal):
            return NOTHING
        found = self.find_class(outer.module, f"{outer.name}.{name}")
        member = vars(owner).get(name) if isinstance(owner, type) else None
        is_member = isinstance(found, InertGlobal) and isinstance(member, enum.Enum)
        return member if is_member else found

    def _reduce(self) -> None:
        func, args = self.stack[-2:]
        if func is getattr and type(args) is tuple and isinstance(args[0], InertGlobal):
            func = _GETATTR  # of what nobody trusts
        if self._is_trusted(func):
            with _running(args):
                super().load_reduce()
        else:
            self.stack[-2:] = [self._make(func, args)]

    def _new_object(self) -> None:
        if self._is_trusted(self.stack[-2]):
            with _running(self.stack[-1]):
                super().load_newobj()
        else:
            args = self.stack.pop()
            self.stack[-1] = self._make(self.stack[-1], args, new=True)

    def _new_object_ex(self) -> None:
        if self._is_trusted(self.stack[-3]):
            with _running(self.stack[-2]):
                super().load_newobj_ex()
        else:
            kwargs, args = self.stack.pop(), self.stack.pop()
            self.stack[-1] = self._make(NEW_OBJECT_EX, (self.stack[-1], args, kwargs))

    def _instantiate(self, cls: Any, args: list[Any]) -> None:
        """Serve INST and OBJ, of protocols 0 and 1."""
        if self._is_trusted(cls):
            with _running(args):
                super()._instantiate(cls, args)
        else:
            self.stack.append(self._make(cls, tuple(args)))

    def _build(self) -> None:
        obj = self.stack[-2]
        kind: Any = type(obj)
        if self._is_trusted(kind):
            with _running(self.stack[-1]):
                super().load_build()
            return
        state = self.stack.pop()
        if issubclass(kind, Inert) and obj._inert_func is None:  # one of ours, pickled as data
            obj.__setstate__(state)
        elif issubclass(kind, Inert):
            obj._inert_state = state
            become_mapping(obj)
        elif kind is torch.Tensor:
            storage, offset, size, stride = state
            check_view(storage, offset, size, stride, obj.dtype)
            obj.set_(storage, offset, size, stride)
        elif kind is torch.nn.Parameter:
            obj.__setstate__(state)
        elif issubclass(kind, np.dtype | np.ndarray):
            self.costs.count_state(state)
            made = stated(obj, state)
            self._replace(obj, made)
            if isinstance(made, np.ndarray) and made.dtype == object:
                self._fragile.append(made)
        elif kind is io.BytesIO:
            self.costs.count_copies(state)
            obj.__setstate__(_checked_position(*state))
        elif kind is collections.OrderedDict or kind in NAMESPACES:
            self.costs.count_copies([state])
            vars(obj).update(state)
        else:
            raise pickle.UnpicklingError(f"state for a {kind.__name__}, which takes none")

    def _replace(self, old: Any, new: Any) -> None:
        """Put an object in the place of one whose state, which came after it, made it another."""
        self.stack[-1] = new
        for key in self._memo_keys.pop(id(old), ()):
            if self.memo[key] is old:
                self.memo[key] = new

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        kind = type(target)
        if not (issubclass(kind, Inert) or kind in ITEM_TYPES or self._is_trusted(kind)):
            raise pickle.UnpicklingError(f"items set on a {type(target).__name__}")
        pairs = target._inert_pairs if isinstance(target, Inert) else target
        keys, values = items[::2], items[1::2]
        with _running(items) if self._is_trusted(kind) else nullcontext():
            reserved = self.costs.reserve(pairs, keys)
            self.costs.check_keys(pairs, keys)
            for key, value in zip(keys, values, strict=True):
                pairs[key] = value
            self.costs.settle(pairs, reserved)
        if isinstance(target, Inert):
            become_mapping(target)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target._inert_items.extend(items)
        elif type(target) in LIST_TYPES:
            target.extend(items)
        elif self._is_trusted(type(target)):
            with _running(items):
                _append_all(target, items)
        else:
            raise pickle.UnpicklingError(f"items appended to a {type(target).__name__}")

    def _add_items(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError(f"items added to a {type(target).__name__}")
        reserved = self.costs.reserve(target, items)
        self.costs.check_keys(target, items)
        target.update(items)
        self.costs.settle(target, reserved)

    def _make_frozenset(self) -> None:
        items = self.pop_mark()
        self.costs.count_items(len(items))
        self.costs.check_keys(items, items)
        self.stack.append(frozenset(items))

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def _bytearray8(self) -> None:  # the standard one allocates what the file claims
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    opcodes |= {
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


def _append_all(target: Any, items: list[Any]) -> None:
    """Append items to an object as Python's unpickler in C does."""
    if hasattr(target, "extend"):
        target.extend(items)
    else:
        for item in items:
            target.append(item)


def _checked_position(data: Any, position: Any, attributes: Any) -> tuple[bytes, int, None]:
    """Give the state of a BytesIO, which fills it up to its position when it is written to."""
    if type(data) is bytes and type(position) is int and 0 <= position <= len(data):
        return data, position, None
    raise pickle.UnpicklingError(f"a BytesIO that lies, with a {type(attributes).__name__}")


def _noting(load_put: Callable[[Any], None]) -> Callable[[Any], None]:
    """Note where an opcode memoizes numpy's objects, which their state may replace."""

    def put(machine: _Machine) -> None:
        load_put(machine)
        value = machine.stack[-1]
        if isinstance(value, np.dtype | np.ndarray):
            machine._memo_keys.setdefault(id(value), []).append(next(reversed(machine.memo)))

    return put


for _opcode in (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE):
    _Machine.opcodes[_opcode[0]] = _noting(_Machine.opcodes[_opcode[0]])


def _made_plain(name: str, args: tuple[Any, ...]) -> Any:
    """Give what a standard class, numpy or ours makes of arguments that are data, or nothing."""
    try:
        if name in NUMPY:
            return made_by_numpy(name.rpartition(".")[2], *args)
        if name in _OURS:
            return _OURS[name](*args)
        if name in ("_codecs.encode", "builtins.bytearray") and args and type(args[0]) is str:
            return _decoded(name, *args)
        return _made_standard(name, args)
    except Exception:  # noqa: BLE001 - whatever a class objects to stays data
        return NOTHING


_OURS = {"anemoi_ckpt.Inert": Inert, "anemoi_ckpt.InertGlobal": InertGlobal}  # pickled as data


def _decoded(name: str, text: str, encoding: str) -> Any:
    """Give the bytes that protocol 2 writes as text (pickle.py, save_bytes)."""
    if encoding not in ("latin1", "latin-1"):
        return NOTHING
    raw = text.encode("latin1")
    return raw if name == "_codecs.encode" else bytearray(raw)


def _made_standard(name: str, args: tuple[Any, ...]) -> Any:
    kind, types_of_args = PLAIN.get(name, (None, ()))
    if kind is collections.defaultdict:
        args = tuple(map(_default, args))
    if kind is None or not all(type(arg) in types_of_args or isinstance(arg, type) for arg in args):
        return NOTHING
    if kind is collections.defaultdict and not {*args} <= {*ITEM_TYPES, *LIST_TYPES, *_EMPTY}:
        return NOTHING
    return kind(*args)


# What makes a default from nothing. A number's type is not known for itself: it has a maker of
# numbers of any size.
def _default(arg: Any) -> Any:
    return BUILTINS.get(arg, arg) if isinstance(arg, InertGlobal) else arg


_EMPTY = (set, tuple, *BUILTINS.values(), None)


def _made_by_torch(func: Any, args: tuple[Any, ...]) -> Any:
    """Call one of torch's own functions as its restricted unpickler does; or nothing."""
    if func is torch._tensor._rebuild_from_type_v2:
        rebuild, cls, given, state = args  # it calls the first with the third
        if rebuild is func or rebuild not in known().values() or isinstance(rebuild, type):
            return NOTHING
        if isinstance(cls, InertGlobal):
            # the tensor itself in place of how it is made, so that it is found and moved
            made = _made_by_torch(rebuild, given)
            return made if made is NOTHING else Inert(REBUILD_SUBCLASS, (made, cls, state))
        _refuse_missing_dtypes(given)
        if _has_inert(given):
            return NOTHING
        args = (CHECKED.get(rebuild, rebuild), cls, given, state)
    if func is not torch._utils._rebuild_wrapper_subclass:  # which is never built
        _refuse_missing_dtypes(args)
    if _has_inert(args):
        return NOTHING
    if args and func in MEMORY:
        raise pickle.UnpicklingError(f"{func.__name__} called for memory, not for data")
    if func in _CONSTANTS:
        return _constant(func, args)
    return CHECKED.get(func, func)(*args)


def _refuse_missing_dtypes(args: tuple[Any, ...]) -> None:
    for arg in args:
        if isinstance(arg, InertGlobal) and arg.module == "torch":
            raise MissingDtypeError(arg.name)


def _has_inert(args: tuple[Any, ...]) -> bool:
    """Tell whether torch is not to be given these.

    It asks things of what it is given, which must not answer from the pickle, nor be a range as
    long as it likes.
    """
    return any(isinstance(arg, Inert | InertGlobal | range) for arg in args)


def _constant(func: Any, args: tuple[Any, ...]) -> Any:
    try:
        return func(*args)
    except (RuntimeError, ValueError, TypeError, KeyError):
        return NOTHING


# A device of a backend that is not installed, a layout of a newer torch: data beside tensors.
_CONSTANTS = (torch.device, torch.serialization._get_layout)
