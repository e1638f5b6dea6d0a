"""What all public calls do alike: they check their options, and hide the frames below.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.

options · tracebacks
"""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from traceback import walk_stack
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from _anemoi_ckpt.errors import CheckpointError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_PUBLIC: list[Callable[..., Any]] = []


def brief(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function, so that the tracebacks of its errors leave out what helps nobody.

    These are the frames between the caller and the place where an error was raised, and those of
    the causes of a `CheckpointError`, which keep their messages.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except CheckpointError as err:
            _drop_frames(err)
            raise
        except Exception as err:
            err.__traceback__ = _shortened(err)
            raise

    return call


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a public function: its options are checked before anything is moved."""
    parameters = inspect.signature(function).parameters
    known = tuple(parameters)
    takes_others = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    @brief
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not takes_others:
            _check_names(function.__name__, kwargs, known)
        _check_values(function.__name__, kwargs)
        return function(*args, **kwargs)

    _PUBLIC.append(call)
    return call


def is_public(function: Any) -> bool:
    """Tell whether this is a public function, which takes a place and not a checkpoint."""
    return any(function is each for each in _PUBLIC)


# ── options ───────────────────────────────────────────────────────────────────────────────────

# Options of torch.load, Module.load_state_dict and other libraries: what to do instead.
_HABITS = {
    "assign": "load_into gives a model on the meta device the tensors themselves",
    "cache_dir": "cached=True keeps a copy in the folder that ANEMOI_CKPT_CACHE names",
    "device": "tensors are loaded to the CPU; load_into keeps the model's devices",
    "dtype": "the strategy cast(dtype) converts",
    "map_location": "tensors are loaded to the CPU; load_into keeps the model's devices",
    "mmap": "only the bytes that are used are read",
    "pickle_module": "the pickle is read without running its code; see trust",
    "strict": "load_into does, which loads into a model",
    "weights_only": "no code of the checkpoint runs unless trust says so; strategies.weights gives"
    " the state dict alone",
}


def _check_names(caller: str, options: Iterable[str], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            advice = _HABITS.get(name) or (f"do you mean {like[0]}?" if like else "")
            if advice:  # otherwise Python's own error says all that is to say
                raise TypeError(f"{caller} takes no {name}: {advice}")


def _is_flag(value: Any) -> bool:
    return type(value).__name__ in {"bool", "bool_"}  # numpy's before 2.0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not _is_flag(value)


def _is_group(value: Any) -> bool:
    return value is None or (hasattr(value, "rank") and hasattr(value, "size"))


def _is_listed(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, Iterable) and not isinstance(value, str | type)
    )


# By name: of which kind a value is, and what to say of others.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "arrays": (_is_flag, "True or False"),
    "cached": (_is_flag, "True or False; ANEMOI_CKPT_CACHE names the folder of the copies"),
    "group": (_is_group, "a process group, such as torch.distributed.group.WORLD"),
    "key": (
        lambda value: value is None or callable(value),
        "a function of an entry, such as lambda entry: entry.size",
    ),
    "progress": (
        lambda value: value is None or _is_flag(value) or callable(value),
        "None, True, False or a function",
    ),
    "recursive": (_is_flag, "True or False"),
    "require": (_is_number, "a share from 0 to 1"),
    "resume": (_is_flag, "True or False"),
    "retries": (lambda value: isinstance(value, int) and not _is_flag(value), "a whole number"),
    "sha256": (lambda value: value is None or isinstance(value, str), "64 hexadecimal digits"),
    "strict": (_is_flag, "True or False"),
    "timeout": (lambda value: value is None or _is_number(value), "seconds, or None"),
    "transport_params": (
        lambda value: value is None or isinstance(value, Mapping),
        "a dict, such as {'client': …}",
    ),
    "trust": (_is_listed, "True, False, or a list of classes"),
    "values": (_is_flag, "True or False"),
}
# Likewise, of a value that is of the right kind.
_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "require": (lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    "retries": (lambda value: value >= 0, "0 or more"),
    "sha256": (
        lambda value: value is None or re.fullmatch("[0-9a-fA-F]{64}", value) is not None,
        "64 hexadecimal digits",
    ),
    "timeout": (lambda value: value is None or value > 0, "more than 0 seconds"),
}


def _check_values(caller: str, options: Mapping[str, Any]) -> None:
    for table, error in ((_KINDS, TypeError), (_BOUNDS, ValueError)):
        for name in table.keys() & options.keys():
            check, what = table[name]
            if not check(options[name]):
                raise error(f"{name} of {caller} is {what}, not {options[name]!r:.60}")


# ── tracebacks ────────────────────────────────────────────────────────────────────────────────

_HOUSE = Path(__file__).parent
_OURS = (
    f"{_HOUSE}{os.sep}",
    *(str(_HOUSE.with_name(f"{name}.py")) for name in ("anemoi_ckpt", "strategies")),
    "<attrs generated",
)
_LIBRARIES = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


_SHORTENED = "_anemoi_ckpt_shortened"  # attribute of an error that a call within has shortened


def _drop_frames(err: BaseException | None) -> None:
    """Leave frames out of an error, its causes and what was handled when they were raised.

    What was handled is left out itself where a cause is told: that may be it without its secrets.
    Causes keep the frames of the user's own functions: those of a model that refuses, say.
    """
    seen: list[BaseException] = []  # they may be in a circle
    while err is not None and not any(err is each for each in seen):
        err.__traceback__ = _of_user(_frames(err)) if seen else None
        seen.append(err)
        if err.__cause__ is not None:
            err.__context__ = None
        err = err.__cause__ or err.__context__


def _shortened(err: Exception) -> TracebackType | None:
    """Leave our frames out of the traceback of an error, where they help nobody.

    That is of an argument that we refuse, and of an error of the user's own functions. An error of
    our own code keeps them.
    """
    frames = _frames(err)
    last, users = frames[-1]
    ours = last.tb_frame.f_code.co_filename.startswith(_OURS)
    if not users and not (_SHORTENED in vars(err) or (ours and _is_raised(last))):
        return frames[0][0]
    vars(err)[_SHORTENED] = True
    return _of_user(frames)


def _frames(err: BaseException) -> list[tuple[TracebackType, bool]]:
    """List the frames of an error's traceback, each with whether it is of the user's functions."""
    traceback, frames, users = err.__traceback__, [], False
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        ours = file.startswith(_OURS)
        if ours or not file.startswith(_LIBRARIES):  # a library's frame is its caller's
            users = not ours
        frames.append((traceback, users))
        traceback = traceback.tb_next
    return frames


def _of_user(frames: Sequence[tuple[TracebackType, bool]]) -> TracebackType | None:
    kept = None
    for frame, of_user in reversed(frames):
        if of_user:
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept


def is_by_raise(err: BaseException) -> bool:
    """Tell whether a ``raise`` in a file of the user's, and no other error, brought about this one.

    A file of the user's is none of ours, of Python's and of the packages that are installed.
    """
    if err.__cause__ or err.__context__:
        return False
    last, _ = _frames(err)[-1]
    return _is_raised(last) and not last.tb_frame.f_code.co_filename.startswith(_OURS + _LIBRARIES)


def level_of_user() -> int:
    """Give the `stacklevel` with which the caller of this warns of the user's line."""
    files = [frame.f_code.co_filename for frame, _ in walk_stack(inspect.currentframe())]
    users = (level for level, file in enumerate(files) if not file.startswith(_OURS + _LIBRARIES))
    return next(users, 1)


def _is_raised(frame: TracebackType) -> bool:
    """Tell whether a frame's error comes of its `raise`, and not of what went wrong there."""
    return dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
