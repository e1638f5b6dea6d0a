"""The hollow checkpoint: built with any of its storages left out, and watched by a ledger.

ledger · questions · starts · build
"""

from __future__ import annotations

import _thread
import functools
import os
import re
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from _anemoi_ckpt.calls import is_by_raise
from _anemoi_ckpt.compat import casts_by_itself, without_dispatch, without_modes
from _anemoi_ckpt.errors import CheckpointError, CorruptError
from _anemoi_ckpt.formats import Archive, Names, blank_storage, storage_id, unreadable
from _anemoi_ckpt.pickles.reading import Trust
from _anemoi_ckpt.pickles.safe import BLANK

# ── ledger ────────────────────────────────────────────────────────────────────────────────────


class HollowError(Exception):
    """Something cannot be done without values that are not there."""


class AskedError(BaseException):
    """A hollow tensor was asked for its values. `except Exception` of a strategy does not end it.

    Should another handler end it: the ledger has noted what was asked for.
    """


class Ledger(TorchDispatchMode):
    """Knows of every living storage which absent records its values come from.

    As a mode it watches operations: what one computes from hollow tensors has its values from
    their records. It also lets them mix with real tensors; what comes of that is hollow, too.
    """

    def __init__(self) -> None:
        """Begin with no storages."""
        super().__init__()  # type: ignore[no-untyped-call] # torch has no annotation here
        self._entries: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self._records: set[int] = set()  # which of these storages are whole records
        self.asked: set[str] = set()  # records whose values were asked for
        self.living: set[str] = set()  # records that storages had their values from by then
        self.written: set[str] = set()  # records on whose storages something was written
        self._awaited: set[str] = set()  # records whose values a real tensor was to get

    def enter(self, storage: Any, keys: Iterable[str]) -> None:
        """Note that the values of a storage come from these records, too."""
        # a weak reference keeps the address from being given to another storage
        entry = self._entries.get(storage._cdata) or (StorageWeakRef(storage), set())  # noqa: SLF001 - as torch.multiprocessing does
        self._entries[storage._cdata] = entry  # noqa: SLF001 - likewise
        entry[1].update(keys)

    def enter_record(self, storage: Any, key: str) -> None:
        """Note that a storage is an absent record."""
        self.enter(storage, [key])
        self._records.add(storage._cdata)  # noqa: SLF001 - likewise

    def is_of_records(self, *tensors: torch.Tensor) -> bool:
        """Tell whether tensors are views of absent records, and not computed."""
        with without_modes():
            return all(
                storage._cdata in self._records  # noqa: SLF001 - likewise
                for tensor in tensors
                for storage in _storages(tensor)
            )

    def enter_all(self, tensors: Iterable[torch.Tensor], keys: Iterable[str]) -> None:
        """Note that the values of tensors come from these records, too."""
        with without_modes():
            for tensor in tensors:
                for storage in _storages(tensor):
                    self.enter(storage, keys)

    def keys_of(self, *tensors: torch.Tensor) -> set[str]:
        """Give the absent records that tensors have their values from."""
        with without_modes():
            return self.keys_at(each for tensor in tensors for each in _storages(tensor))

    def keys_at(self, storages: Iterable[Any]) -> set[str]:
        """Give the absent records that storages have their values from."""
        keys: set[str] = set()
        for storage in storages:
            entry = self._entries.get(storage._cdata)  # noqa: SLF001 - likewise
            if entry:
                keys |= entry[1]
        return keys

    def origins(self) -> set[str]:
        """Give the absent records that living storages have their values from."""
        living = (keys for ref, keys in self._entries.values() if not ref.expired())
        return self._awaited.union(*living)

    def ask(self, keys: Iterable[str]) -> None:
        """Note that the values of records were asked for."""
        self.asked.update(keys)
        self.living |= self.origins()

    def was_asked(self, err: BaseException | None = None) -> bool:
        """Tell whether values were asked for that are not there; an error may come of that."""
        if err is None or self.asked:
            return bool(self.asked)
        if not self._awaited and (is_by_raise(err) or not _asks_for_values(err)):
            return False
        self.ask(self.origins())
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it made and what it wrote into."""
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        keys = self.keys_of(*tensors)
        if not keys:
            return func(*args, **kwargs)
        if any(tensor.is_meta and not self.keys_of(tensor) for tensor in tensors):
            self.ask(keys)  # the user's own one on meta would stay so, and with real ones refuse
            raise AskedError(keys)
        written = list(_tensors(_written(func, args, kwargs)))
        self.written |= self.keys_of(*written)
        if any(tensor.is_meta for tensor in tensors):
            # a real tensor stays as it is: its values come in a later round, as do random numbers
            if not all(tensor.is_meta for tensor in written) or _draws(func):
                self._awaited |= keys
            result = self._run_on_meta(func, args, kwargs, keys)
        else:
            result = func(*args, **kwargs)
        self.enter_all((*_tensors(result), *written), keys)
        return result

    def _run_on_meta(self, func: Any, args: Any, kwargs: Any, keys: set[str]) -> Any:
        originals: dict[int, tuple[Any, torch.Tensor]] = {}

        def to_meta(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                if leaf.type != "cpu":
                    raise NotImplementedError(f"a hollow tensor does not move to {leaf}")
                return torch.device("meta")
            if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
                return leaf
            copy = leaf.to("meta")
            originals[id(copy)] = copy, leaf
            return copy

        args, kwargs = tree_map(to_meta, (args, kwargs))
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as err:
            self.ask(keys)
            raise AskedError(keys) from err
        if not originals:
            return result
        return tree_map(lambda leaf: originals.get(id(leaf), (None, leaf))[1], result)


def _leaves(tree: Any) -> Iterator[Any]:
    """Give what stands in lists, tuples and dicts (torch's own `tree_leaves` is slow)."""
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves([*tree.values()])
    else:
        yield tree


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in _leaves(tree) if isinstance(leaf, torch.Tensor))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Give the arguments that an operation writes into, as its schema tells."""
    schema = func._schema  # noqa: SLF001 - torch documents no other
    silent = _UNTOLD if "batch_norm" in schema.name else ()  # some of its schemas do not tell
    return [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.name in silent
        or (argument.alias_info is not None and argument.alias_info.is_write)
    ]


_UNTOLD = ("running_mean", "running_var")


def _draws(func: Any) -> bool:
    """Tell whether an operation draws random numbers: on the meta device it draws none."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _storages(tensor: torch.Tensor) -> list[Any]:
    """Give all storages of a tensor: a sparse one has several."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]  # noqa: SLF001 - the public ones want it coalesced
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [part.untyped_storage() for part in parts]


# What torch's errors say of a tensor on meta (the third comes of set_state of a random generator);
# the last comes of a dispatch mode, with which torch makes no subclass of a tensor that is there.
_BLAMED = r"\bmeta\b|unallocated storage|must be a torch\.\w+Tensor|associated to a python object"


def _asks_for_values(err: BaseException) -> bool:
    """Tell whether an error came of a tensor's being on the meta device."""
    if isinstance(err, HollowError | NotImplementedError):
        return True
    by_torch = isinstance(err, RuntimeError | TypeError | ValueError | BufferError)
    message = re.search(_BLAMED, str(err), re.IGNORECASE)
    return by_torch and not isinstance(err, CheckpointError) and message is not None


def _causes(err: BaseException) -> Iterator[BaseException]:
    """Give the errors that an error came of: trusted code may hide that it asked for values."""
    cause = err.__cause__ or err.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


# ── questions ─────────────────────────────────────────────────────────────────────────────────

# What a tensor tells without its values, and the same on the meta device.
_ANSWERED = frozenset(
    """
    __dir__ __hash__ __len__ __setitem__ _base _conj _is_view _version dense_dim dim dtype
    element_size grad grad_fn has_names is_coalesced is_complex
    is_floating_point is_inference is_leaf is_mkldnn is_nested
    is_quantized is_same_size is_signed is_sparse is_sparse_csr itemsize layout names nbytes ndim
    ndimension nelement numel output_nr requires_grad result_type retains_grad shape size sparse_dim
    """.split()  # noqa: SIM905 - a list would take a line for each
)
# What a view of a record tells as well. What was computed may be laid out in another way on the
# meta device (35 of torch's functions do so for some strides, in torch 2.13).
_ANSWERED_BY_RECORDS = frozenset(
    """
    dim_order is_conj is_contiguous is_neg is_non_overlapping_and_dense storage_offset stride
    """.split()  # noqa: SIM905 - as above
)
# What a real tensor on the CPU tells, whatever its values: one without values answers.
_ANSWERED_BY_ANOTHER = frozenset(
    ("device", "get_device", "is_cpu", "is_cuda", "is_meta", "is_pinned", "is_shared")
)


class _Questions(TorchFunctionMode):
    """Hears what strategies ask of hollow tensors, and does with them, that is no operation.

    A question that they cannot answer, and a function that is not known to be one that they can
    answer, asks for their values.
    """

    def __init__(self, ledger: Ledger) -> None:
        """Speak for the tensors of a ledger alone."""
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, run the function, or end the round."""
        kwargs = kwargs or {}
        name, is_setter = _name(func)
        if name in _ANSWERED and not is_setter:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        keys = self._keys_of(tensors) if tensors else None
        if not keys:
            with _as_without_ledger(func, tensors):
                return func(*args, **kwargs)
        if name in _ANSWERED_BY_RECORDS and self._ledger.is_of_records(*tensors):
            return func(*args, **kwargs)
        if name in _ANSWERED_BY_ANOTHER or (name == "type" and len(args) == 1 and not kwargs):
            return self._answered_by_another(func, tensors, keys)
        if name in ("cpu", "to") and all(tensor.is_meta for tensor in tensors):
            places = {str(each) for each in (*args, *kwargs.values()) if _is_device(each)}
            if places - {"cpu"}:
                raise self._asked(keys)
            if name == "cpu" or places:  # a real one would give itself
                func, args, kwargs = _moved_to_meta(args, kwargs)
        result = self._run(func, args, kwargs, keys)
        if is_setter or (result is None and name.startswith("_foreach_")):
            return result
        if not _is_of_tensors(result):
            raise self._asked(keys)
        self._enter_unknown(result, keys)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, keys: set[str]) -> Any:
        if casts_by_itself():  # it casts none on meta
            raise self._asked(keys)
        try:
            return func(*args, **kwargs)
        except (BufferError, RuntimeError, TypeError, ValueError) as err:  # the first of dlpack
            raise self._asked(keys) from err

    def _keys_of(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        try:
            return self._ledger.keys_of(*tensors)
        except (RuntimeError, NotImplementedError):  # within torch.func, or of another kind
            return self._ledger.origins()

    def _asked(self, keys: Iterable[str]) -> AskedError:
        self._ledger.ask(keys)
        return AskedError(sorted(keys))

    def _answered_by_another(self, func: Any, tensors: list[Any], keys: set[str]) -> Any:
        one = tensors[0]
        if len(tensors) > 1 or one.layout is not torch.strided or not _has_storage(one):
            raise self._asked(keys)
        return func(torch.empty(0, dtype=one.dtype, device="cpu"))

    def _enter_unknown(self, result: Any, keys: set[str]) -> None:
        """Enter what became meta without a hollow tensor in an operation: `real.to(hollow)`."""
        for tensor in _tensors(result):
            if tensor.is_meta and _has_storage(tensor) and not self._ledger.keys_of(tensor):
                self._ledger.enter_all([tensor], keys)


def _name(func: Any) -> tuple[str, bool]:
    """Give the name of a function or of the attribute that it reads or sets, and which it is."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        owner = func.__self__
        return getattr(owner, "__name__", ""), name != "__get__"
    return name, False


def _as_without_ledger(func: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Let a function of real tensors compute as it does outside a load.

    With a dispatch mode on, torch computes some values in another way, whose last bits differ.
    It stays on for Python code that the function may call, for subclasses of Tensor, and where the
    user's code has a mode on.
    """
    alone = torch._C._len_torch_dispatch_stack() == 1  # noqa: SLF001 - no public one
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return without_dispatch() if alone and plain and isinstance(func, _BUILTIN) else nullcontext()


_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType)


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device)


def _moved_to_meta(args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Let a move to the CPU leave hollow tensors where they are."""
    first, *others = ("meta" if _is_device(each) else each for each in args)
    kwargs = {key: "meta" if _is_device(each) else each for key, each in kwargs.items()}
    return torch.Tensor.to, (first, *others), kwargs


def _is_of_tensors(result: Any) -> bool:
    """Tell whether a result is tensors alone, which the ledger knows."""
    leaves = list(_leaves(result))
    others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return len(others) < max(len(leaves), 1) and all(leaf is None for leaf in others)


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        return bool(_storages(tensor))
    except (RuntimeError, NotImplementedError):
        return False


# ── starts ────────────────────────────────────────────────────────────────────────────────────

# Modes reach into no other thread or process, nor what TorchScript runs, and nothing else hears a
# tensor there. What `torch.compile` runs first with a mode on, it never compiles any more.
_STARTERS: list[tuple[Any, str]] = [
    (threading.Thread, "start"),
    (ThreadPoolExecutor, "submit"),  # to threads that run already
    (BaseProcess, "start"),
    (ProcessPoolExecutor, "submit"),
    (os, "fork"),
    (os, "forkpty"),
    (_thread, "start_new_thread"),
    (torch._C.ScriptFunction, "__call__"),  # noqa: SLF001 - no public one
    (torch._C.ScriptMethod, "__call__"),  # noqa: SLF001 - no public one
    (torch, "compile"),  # by which also torch.cond, scan and flex_attention run
]


def _starters() -> list[tuple[Any, str]]:
    """List them with what compiled functions begin with, where there can be any."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    names = ("set_eval_frame", "_maybe_set_eval_frame")
    return [*_STARTERS, *((dynamo, name) for name in names if dynamo is not None)]


class _Watched(threading.local):
    """The ledgers that watch this thread."""

    def __init__(self) -> None:
        """Begin with none."""
        self.ledgers: list[Ledger] = []


class _Starts:
    """What starts threads and processes, replaced while any ledger watches any thread.

    Audit hooks hear of the same, but stay for good, and each slows every call of `id`.
    """

    def __init__(self) -> None:
        """Begin with none replaced."""
        self._lock = threading.Lock()
        self._watches = 0
        self._originals: list[tuple[Any, str, Any, Any]] = []

    def begin(self) -> None:
        """Replace them, if no other watch has."""
        with self._lock:
            self._watches += 1
            if self._watches == 1:
                self._originals = [_guarded(*each) for each in _starters() if hasattr(*each)]

    def end(self) -> None:
        """Put them back after the last watch, but for what someone else has replaced since."""
        with self._lock:
            self._watches -= 1
            if not self._watches:
                for owner, name, original, guard in self._originals:
                    if vars(owner)[name] is guard:
                        setattr(owner, name, original)


_watched = _Watched()
_starts = _Starts()


_ENDS = (None, False)  # with which dynamo is told to compile nothing


def _guarded(owner: Any, name: str) -> tuple[Any, str, Any, Any]:
    original = vars(owner)[name]

    @functools.wraps(original)
    def guard(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or not any(args[0] is each for each in _ENDS):
            _refuse_hollow()
        return original(*args, **kwargs)

    setattr(owner, name, guard)
    return owner, name, original, guard


def _refuse_hollow() -> None:
    """Ask for the values of all hollow tensors of this thread, if there are any."""
    for ledger in _watched.ledgers:
        if ledger.origins():
            ledger.ask(ledger.origins())
            # threading takes back what it noted after an Exception alone
            raise HollowError(
                "another thread or process, or compiled code, would get hollow tensors"
            )


@contextmanager
def watching(ledger: Ledger) -> Iterator[None]:
    """Let a ledger hear all that this thread does with its hollow tensors."""
    _starts.begin()
    _watched.ledgers.append(ledger)
    try:
        with ledger, _Questions(ledger):
            yield
    finally:
        _watched.ledgers.remove(ledger)
        _starts.end()


@contextmanager
def unwatched() -> Iterator[None]:
    """Let this thread start others that get no hollow tensors: those of a load in a strategy."""
    ledgers, _watched.ledgers = _watched.ledgers, []
    try:
        yield
    finally:
        _watched.ledgers = ledgers


# ── build ─────────────────────────────────────────────────────────────────────────────────────


def build(
    archive: Archive,
    storages: Mapping[str, torch.UntypedStorage],
    ledger: Ledger,
    trust: Trust,
    names: Names | None = None,
) -> Any:
    """Build a checkpoint on the storages that are there; all others are on the meta device.

    Args:
        archive: what was read of the file.
        storages: by record key, in this machine's byte order.
        ledger: each storage that is not there is entered under its record's key.
        trust: which names of the pickle may be run.
        names: is told every class and function that the pickle names, and whether it is inert.

    Raises:
        HollowError: something cannot be built without its values (a quantized tensor, say).
        UnsafeCheckpointError: the pickle names what nothing may run.
        CorruptError: the pickle makes no sense, or does not agree with the records.
    """
    loaded: dict[str, torch.UntypedStorage] = {}
    typed: dict[tuple[str, torch.dtype], Any] = {}  # empty storages have several dtypes

    def storage_of(pid: Any) -> Any:
        if pid[0] == "module":  # legacy files: class, its source file, its source
            return pid[1]
        key, dtype = _checked_id(archive, pid)
        if key not in loaded:
            storage = storages.get(key)
            if storage is None:
                storage = torch.UntypedStorage(archive.records[key].size, device="meta")
            loaded[key] = storage
            if key not in storages:
                ledger.enter_record(storage, key)
        if (key, dtype) not in typed:
            made: Any = torch.storage.TypedStorage(
                wrap_storage=loaded[key], dtype=dtype, _internal=True
            )
            made.record_bytes = archive.records[key].size
            typed[key, dtype] = made
        return typed[key, dtype]

    try:
        with unreadable(archive.place, "its pickle"):
            return archive.assemble(storage_of, trust, {} if names is None else names)
    except CheckpointError as err:
        is_hollow = any(isinstance(e, RuntimeError) or _asks_for_values(e) for e in _causes(err))
        if is_hollow and len(storages) < len(archive.records):
            raise HollowError(err) from err
        raise


def dtypes_of(archive: Archive) -> dict[str, torch.dtype]:
    """Tell in which dtype each record's values are stored, as the pickle has it."""
    dtypes: dict[str, torch.dtype] = {}

    def storage_of(pid: Any) -> Any:
        if pid[0] == "module":
            return pid[1]
        key, dtype = _checked_id(archive, pid)
        dtypes[key] = dtype
        blank = blank_storage(archive.records[key].size)
        return torch.storage.TypedStorage(wrap_storage=blank, dtype=dtype, _internal=True)

    with unreadable(archive.place, "its pickle"):
        archive.assemble(storage_of, BLANK, {})
    return dtypes


def _checked_id(archive: Archive, pid: Any) -> tuple[str, torch.dtype]:
    """Read a persistent id, and compare it with the record that it names."""
    dtype, key, count = storage_id(pid)
    size = count * dtype.itemsize
    record = archive.records.get(key)
    if record is None or record.size != size:
        problem = f"holds {record.size} bytes" if record else "is missing"
        raise CorruptError(
            archive.place,
            f"record data/{key} {problem}, its tensor has {size}",
            "fetch the file anew",
        )
    return key, dtype
