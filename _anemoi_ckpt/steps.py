"""The protocol between `compose`, `align_variables`, `load` and `load_into`.

A strategy may be any function. Those that `strategies` builds are steps. A step is called like a
function, prints as the call that built it, and is pickled as that call. It also knows the functions
that it is composed of, and the alignment of variables that it will make. `load` and `load_into` are
marked as taking strategies, so `compose` passes strategies on to them.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

from _anemoi_ckpt.alignment import Alignment
from _anemoi_ckpt.calls import brief

_P = ParamSpec("_P")
_F = TypeVar("_F", bound=Callable[..., Any])
_SHOWN = 60  # characters of an argument that has no short repr


# ── step ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Call:
    """A call of a function, as it was written."""

    factory: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Write the call."""
        named = [f"{name}={_shown(value)}" for name, value in self.kwargs.items()]
        return f"{_shown(self.factory)}({', '.join([*map(_shown, self.args), *named])})"


class Step:
    """A function that knows which call built it.

    It is no dataclass: Hydra passes what it instantiates to OmegaConf, which takes a dataclass for
    a configuration.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        call: Call,
        parts: tuple[Callable[..., Any], ...] = (),
        alignment: Callable[[Any], Alignment] | None = None,
    ) -> None:
        """Take the name and docstring of the function, or of the call if the function has none.

        Args:
            function: the function to run.
            call: the call that built the step.
            parts: the parts of a composition; the part that runs last is first.
            alignment: gives the alignment of variables that the step makes of a checkpoint, if any.
        """
        self.function, self.call, self.parts, self.alignment = function, call, parts, alignment
        named = function if hasattr(function, "__name__") else call.factory  # no partial has one
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            vars(self)[name] = getattr(named, name)

    @brief
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        """Show the call."""
        return str(self.call)

    def __reduce__(self) -> Any:
        """Pickle as the call, or as the global name that a decorated function has."""
        name = vars(self)["__qualname__"]
        if getattr(sys.modules.get(self.__module__), str(name), None) is self:
            return name
        return _call, (self.call,)


def _call(call: Call) -> Any:
    return call.factory(*call.args, **call.kwargs)


def factory(build: Callable[_P, Callable[[Any], Any]]) -> Callable[_P, Step]:
    """Decorate a function that builds strategies, so that it returns them as steps."""

    @no_strategy
    @brief
    @functools.wraps(build)
    def build_step(*args: _P.args, **kwargs: _P.kwargs) -> Step:
        strategy = build(*args, **kwargs)
        call = Call(build_step, args, kwargs)
        if isinstance(strategy, Step):
            return Step(strategy.function, call, strategy.parts, strategy.alignment)
        return Step(strategy, call)

    return build_step


def with_alignment(strategy: Callable[[Any], Any], alignment: Callable[[Any], Alignment]) -> Step:
    """Make a step of a strategy that aligns variables and a function that gives the alignment."""
    return Step(strategy, Call(strategy), alignment=alignment)


def parts_of(function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Give the functions that a function is composed of, the one that runs last first.

    A function that is not a composition is its own only part.
    """
    return function.parts if isinstance(function, Step) and function.parts else (function,)


def alignment_of(function: Callable[..., Any]) -> Callable[[Any], Alignment] | None:
    """Give the function that tells how a strategy will align a checkpoint, if it aligns any."""
    return function.alignment if isinstance(function, Step | Final) else None


def run_chain(
    strategies: tuple[Callable[[Any], Any], ...],
    chain: tuple[Callable[..., Any], ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a chain of functions from right to left.

    The first function gets the arguments. The last one, `load`, gets the strategies behind its own.
    """
    if not chain:
        (value,) = args
        return value
    *inner, first = chain
    strategies = tuple(map(Final, strategies[:1])) + strategies[1:]
    if not inner:
        return first(*args, *reversed(strategies), **kwargs)
    value = first(*args, **kwargs)
    for function in reversed(inner[1:]):
        value = function(value)
    return inner[0](value, *reversed(strategies))


# ── run ───────────────────────────────────────────────────────────────────────────────────────


class Final:
    """The last function of a composition: it may return None, as `print` does."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Take the function, whose alignment this is, too."""
        self.function, self.alignment = function, alignment_of(function)

    def __call__(self, checkpoint: Any) -> Any:
        """Run the function."""
        return self.function(checkpoint)


def run(strategy: Callable[[Any], Any], checkpoint: Any) -> Any:
    """Run a strategy.

    Raises:
        TypeError: it returned None, as a function does that changes what it is given.
    """
    result = strategy(checkpoint)
    if result is None and checkpoint is not None and not isinstance(strategy, Final):
        raise TypeError(
            f"the strategy {_shown(strategy)} returned None: a strategy returns a checkpoint. Write"
            " pipe(uri, load, …) to end with a function that returns None"
        )
    return result


# ── what is no strategy ───────────────────────────────────────────────────────────────────────

_CALLED_FIRST: list[Callable[..., Any]] = []


def no_strategy(function: _F) -> _F:
    """Mark a function of ours that is no strategy itself: it builds one, or does something else."""
    _CALLED_FIRST.append(function)
    return function


def check_strategies(caller: str, functions: Iterable[Any]) -> None:
    """Check that these can be strategies, as far as one can tell without calling them.

    Raises:
        TypeError: one is no function, or one that is to be called first; says what to write.
    """
    for function in functions:
        advice = _advice(function)
        if advice:
            raise TypeError(f"{caller} takes functions: {advice}")


def _advice(function: Any) -> str:
    """Tell what is wrong with a strategy; nothing if nothing is."""
    whole = function
    while isinstance(whole, functools.partial):
        whole = whole.func
    if any(whole is each for each in _CALLED_FIRST):
        parameters = inspect.signature(function).parameters.values()
        untyped = [each.replace(annotation=each.empty) for each in parameters]
        call = f"{whole.__name__}{inspect.Signature(untyped)}"
        return f"call {whole.__name__} before you pass it on, as {call}"
    if _is_location(function):
        return "load gives tensors on the CPU, and load_into keeps the model's device"
    for kind, advice in _NO_STRATEGIES:
        if isinstance(function, kind):
            return advice.format(function)
    return "" if callable(function) else f"{_shown(function)} is not a function"


_NO_STRATEGIES: tuple[tuple[Any, str], ...] = (
    (torch.nn.Module, "a model is not one; load_into(model, uri) loads into a model"),
    (Mapping, "a dict is not one; filter_shapes(state_dict) leaves what does not fit one"),
    (torch.dtype, "cast({!r}) makes one of a dtype"),
    (list | tuple, "pass them one by one, not in a list"),
    (bool, "{0!r} is an option's value: options are given by name, as trust={0!r}"),
    (str, "{!r} is text; those of the module strategies are written without quotes"),
)


def _is_location(value: Any) -> bool:
    """Tell whether this is what `torch.load` takes as its map_location."""
    if isinstance(value, Mapping):
        return all(isinstance(each, str | torch.device) for each in (*value, *value.values()))
    try:
        return isinstance(value, str | torch.device) and bool(torch.device(value))
    except RuntimeError:  # a text that names no device
        return False


# ── functions that take strategies ────────────────────────────────────────────────────────────

_TAKERS: set[Callable[..., Any]] = set()  # the functions themselves: functools.wraps copies no mark


def takes_strategies(function: _F) -> _F:
    """Mark a function as one that takes strategies after its other arguments."""
    _TAKERS.add(function)
    return function


def is_taker(function: Any) -> bool:
    """Tell whether a function, or what it is a `functools.partial` of, takes strategies."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(function is taker for taker in _TAKERS)  # some callables cannot be hashed


# ── shown ─────────────────────────────────────────────────────────────────────────────────────


def _shown(value: Any) -> str:
    """Write an argument briefly, as in the source of a call where that is possible."""
    if isinstance(value, functools.partial):
        return str(Call(functools.partial, (value.func, *value.args), value.keywords))
    if isinstance(value, Step):
        return repr(value)
    if isinstance(value, torch.nn.Module):
        return f"<{type(value).__name__}>"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__).rpartition("<locals>.")[2]
    if isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values()):
        return f"<{len(value)} weights>"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"<{type(value).__name__}>"
