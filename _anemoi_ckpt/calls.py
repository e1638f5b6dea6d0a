"""What all public calls do alike: they name habits of `torch.load`, and hide the frames below."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from _anemoi_ckpt.errors import CheckpointError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Options of torch.load and Module.load_state_dict: what to do instead.
_HABITS = {
    "assign": "load_into gives a model on the meta device the tensors themselves",
    "device": "tensors are loaded to the CPU; load_into keeps the model's devices",
    "map_location": "tensors are loaded to the CPU; load_into keeps the model's devices",
    "mmap": "only the bytes that are used are read",
    "pickle_module": "the pickle is read without running its code; see trust",
    "weights_only": "no code of the checkpoint runs unless trust says so; strategies.weights gives"
    " the state dict alone",
}


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a public function.

    Its `CheckpointError` says where, what and what to do. The frames between the caller and the
    place where it was raised are left out of the traceback, and so are those of its causes, which
    keep their messages.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for habit in _HABITS.keys() & kwargs.keys():
            raise TypeError(f"{function.__name__} takes no {habit}: {_HABITS[habit]}")
        try:
            return function(*args, **kwargs)
        except CheckpointError as err:
            _drop_frames(err)
            raise

    return call


def _drop_frames(err: BaseException | None) -> None:
    """Leave frames out of an error, its causes and what was handled when they were raised."""
    seen: list[BaseException] = []  # they may be in a circle
    while err is not None and not any(err is each for each in seen):
        seen.append(err)
        err.__traceback__ = None
        err = err.__cause__ or (None if err.__suppress_context__ else err.__context__)
