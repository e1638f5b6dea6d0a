"""What of a checkpoint goes into a model, and what does not.

Knows models and state dicts, and nothing of places.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from attrs import evolve, frozen

from _anemoi_ckpt.alignment import Alignment
from _anemoi_ckpt.anatomy import (
    OPTIMIZER,
    SCHEDULER,
    Part,
    beside_weights,
    is_extra_state,
    path_to_weights,
    states_of,
    weights_at,
    weights_of,
    without,
)
from _anemoi_ckpt.comparing import prefix_advice, shapes_of
from _anemoi_ckpt.configurations import (
    REMEDY,
    Roots,
    checks_of_edges,
    configured_otherwise,
    read_config,
    read_edges,
)
from _anemoi_ckpt.describing import Units, check_units, read_units
from _anemoi_ckpt.edges import check_optimizer, checks_of_graph, in_edge_order
from _anemoi_ckpt.errors import MismatchError
from _anemoi_ckpt.graphs import Edges, read_graph
from _anemoi_ckpt.leadtimes import Times, read_times
from _anemoi_ckpt.migrating import missing, registered
from _anemoi_ckpt.misplaced import misplaced
from _anemoi_ckpt.steps import alignment_of, parts_of, run
from _anemoi_ckpt.tables import folded
from _anemoi_ckpt.tensors import shape_of, view_key
from _anemoi_ckpt.variables import Variables, read_checkpoint

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape]]  # in the checkpoint, in the model
Dtypes = tuple[torch.dtype, torch.dtype]  # in the checkpoint, in the model
Receivers = Mapping[str, Sequence[Any]]  # the optimizers and schedulers that get their states

_PARTS: dict[str, Part] = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER}
_LISTED = 20  # names in a message; more than that nobody reads


# ── track ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class Original:
    """What a checkpoint's weights were before the strategies."""

    shapes: Mapping[str, Shape | None]
    names: Mapping[int, tuple[Callable[[], Any], str]]  # by id, with a weak reference
    variables: Mapping[str, Variables]  # in whose order the weights are
    config: Roots  # of the model that they are from, as far as it is known
    graph: tuple[Edges, ...]  # that they were trained on, likewise
    edges: Mapping[str, Any]  # what reads their attributes, of a module that was pickled whole
    alignment: Alignment  # with other variables, so far
    pending: tuple[str, ...]  # Anemoi's migrations that it has not had
    units: Units  # of the variables, as the last checkpoint that knew them had them
    times: Times  # of the steps of the weights, as far as they are known


@frozen
class Tracked:
    """A checkpoint on its way through strategies, and what it was before them."""

    checkpoint: Any
    original: Original


class Match(NamedTuple):  # so that torch's pytree finds the tensors in it
    """What of a checkpoint goes into a model, and what does not."""

    fitting: dict[str, Any]  # until it is installed
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Shapes
    renamed: Mapping[str, str]
    states: Mapping[str, Sequence[Any]]  # of optimizers and schedulers
    rest: Mapping[str, Any]
    original: Original
    on_meta: tuple[str, ...] = ()  # what is left there: buffers that no checkpoint has
    lossy: Mapping[str, Dtypes] = {}  # casts that lose more than they round
    moved_edges: tuple[str, ...] = ()  # values of edges that were put into the model's order
    checks: tuple[Callable[[], str], ...] = ()  # what only values tell to be wrong, if anything


@frozen
class Terms:
    """On which terms a model takes a checkpoint."""

    place: str  # whose it is, for errors
    strict: bool = False
    require: float = 0.0  # least share of the model's values
    owned: bool = False  # whether nobody else has the checkpoint's tensors
    hook: Callable[[Any], Any] | None = None  # the model's own, which may change the state dict


def tracked(strategies: Sequence[Callable[[Any], Any]]) -> list[Callable[[Any], Any]]:
    """Give strategies that carry along what a checkpoint was: from a checkpoint to a `Tracked`."""
    parts = [part for strategy in strategies for part in reversed(parts_of(strategy))]
    return [_begin, *(functools.partial(_step, part) for part in parts)]


def _begin(checkpoint: Any) -> Tracked:
    """Note names and shapes, to tell later what the strategies did with them."""
    path = path_to_weights(checkpoint)
    state_dict = {} if path is None else weights_at(checkpoint, path)
    tensors = {name: t for name, t in state_dict.items() if isinstance(t, torch.Tensor)}
    # weakly: what the strategies drop must not count as needed
    names = {id(tensor): (weakref.ref(tensor), name) for name, tensor in tensors.items()}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    variables, graph = read_checkpoint(checkpoint), read_graph(checkpoint)
    return Tracked(
        checkpoint,
        Original(
            shapes,
            names,
            variables,
            read_config(checkpoint),
            graph,
            read_edges(checkpoint, graph),
            Alignment({}, {}),
            missing(checkpoint),
            read_units(checkpoint),
            read_times(checkpoint),
        ),
    )


def _step(strategy: Callable[[Any], Any], tracked: Tracked) -> Tracked:
    alignment = alignment_of(strategy)
    original = tracked.original
    if alignment is not None:
        original = _realigned(original, alignment(tracked.checkpoint))
    with _advising(original):
        result = run(strategy, tracked.checkpoint)
    pending = original.pending if registered(result) is None else missing(result)
    if pending != original.pending:
        original = _migrated(original, weights_of(result))
    units = read_units(result) or original.units
    return Tracked(result, evolve(original, units=units, pending=pending))


def _migrated(original: Original, state_dict: Mapping[str, Any]) -> Original:
    """Forget the names that a migration dropped: no model has them any more."""
    known = {*state_dict, *_renamed(original, state_dict)}
    return evolve(original, shapes={n: s for n, s in original.shapes.items() if n in known})


@contextmanager
def _advising(original: Original) -> Iterator[None]:
    """Have an error about names or shapes tell of migrations that a checkpoint has not had."""
    try:
        yield
    except MismatchError as err:
        if original.pending:
            err.add_note(migration_advice(original.pending))
        raise


def migration_advice(pending: Sequence[str]) -> str:
    """Say what brings a checkpoint of an older anemoi-models up to date."""
    return (
        f"an older anemoi-models wrote it: migrate(model), before the other strategies, runs"
        f" {len(pending)} of Anemoi's migrations ({', '.join(pending)})"
    )


def _realigned(original: Original, alignment: Alignment) -> Original:
    """Note that a strategy puts the weights into the order of other variables."""
    if not alignment.pairs:
        return original
    so_far = original.alignment
    others = original.variables if len(original.variables) > 1 else {}  # one alone has any name
    first = {d: (so_far.pairs.get(d, pair)[0], pair[1]) for d, pair in alignment.pairs.items()}
    return evolve(
        original,
        variables={**others, **{d: new for d, (_, new) in alignment.pairs.items()}},
        alignment=Alignment(
            so_far.pairs | first,
            so_far.tensors | alignment.tensors,
            so_far.steps or alignment.steps,
            alignment.own or so_far.own,
        ),
    )


# ── match ─────────────────────────────────────────────────────────────────────────────────────


def matched(terms: Terms, model: torch.nn.Module, receivers: Receivers, tracked: Tracked) -> Match:
    """Compare what the strategies left with what the model has, as `_matched` does."""
    with _advising(tracked.original):
        return _matched(terms, model, receivers, tracked)


def _matched(terms: Terms, model: torch.nn.Module, receivers: Receivers, tracked: Tracked) -> Match:
    """Compare what the strategies left with what the model has.

    Names below a module that loads by itself, or that has hooks, are its own business: all of them
    are kept for it. The states of optimizers and schedulers are kept where there is one to receive
    them.

    Raises:
        MismatchError: a shape differs, or the order of variables; there are no weights at all,
            another number of states, or an optimizer that would lose its parameters; or the
            terms are not met.
    """
    place, checkpoint, original = terms.place, tracked.checkpoint, tracked.original
    _check_optimizers(place, receivers["optimizer"])
    path = path_to_weights(checkpoint)
    state_dict = {} if path is None else weights_at(checkpoint, path)
    if not state_dict:
        left = listed(checkpoint) if isinstance(checkpoint, Mapping) else ""
        raise MismatchError(
            place,
            f"the strategies left no weights, but {left or type(checkpoint).__name__}",
            prefix_advice(original.shapes, tensors_of(model))
            or "let the last of them give a checkpoint or a state dict",
        )
    more = checkpoint if path else {}  # what is no bare state dict, and no pickled module
    model_tensors = tensors_of(model)
    prefixes = loading_prefixes(model) if terms.hook is None else frozenset({""})
    ordered, moved = in_edge_order(place, model, state_dict, original.shapes)
    fitting = _fitting(place, ordered, model_tensors, prefixes)
    variables = read_checkpoint(checkpoint) or original.variables
    _check_variables(place, model, fitting, variables, state_dict)
    _check_config(place, model, fitting, original)
    checks = [
        *checks_of_graph(model, fitting, original.graph),
        *checks_of_edges(model, fitting, original.config, original.edges),
    ]
    check_units(place, model, fitting, original.units)
    renamed = _renamed(original, state_dict)
    unexpected = _unexpected(original, state_dict, renamed, model_tensors)
    excused = prefixes | _prefixes(model, has_post_hooks)  # which may fill what is missing
    sure = [n for n in model_tensors if n not in fitting and not is_below(excused, n)]
    states = {
        kind: _states(place, more, kind, len(several))
        for kind, several in receivers.items()
        if several
    }
    check_optimizer(place, moved, states.get("optimizer"))
    match = Match(
        fitting=fitting,
        missing=(),
        unexpected=tuple(name for name in unexpected if name not in fitting),
        mismatched={},
        renamed=renamed,
        states=states,
        rest=beside_weights(without(more, _PARTS.values()), path or ()),
        original=evolve(original, graph=(), edges={}),  # whose tensors would count as needed
        checks=tuple(checks),
        moved_edges=moved,
    )
    match = with_keys(match, model, sure, ())
    # BatchNorm fills its counter by itself, where an old checkpoint has none
    missing = tuple(n for n in match.missing if not n.endswith("num_batches_tracked"))
    check_enough(terms, model, match._replace(missing=missing))
    return match


def with_keys(
    match: Match, model: torch.nn.Module, missing: Iterable[str], unexpected: Iterable[str]
) -> Match:
    """Give a match with the keys that a model misses and does not expect.

    One of tied names fills all, though `load_state_dict` tells the others as missing.
    """
    model_tensors = tensors_of(model)
    missing = dict.fromkeys(missing)  # a hook may tell of some that are no tensors
    present = (value for name, value in model_tensors.items() if name not in missing)
    filled = set(map(_identity, present)) if missing else set()
    absent = {
        name
        for name in missing
        if name not in model_tensors or _identity(model_tensors[name]) not in filled
    }
    shapes = {name: match.original.shapes.get(name) for name in absent}
    mismatched = _differing(shapes, model_tensors)
    named = (*model.named_parameters(), *model.named_buffers())
    on_meta = {n: value for n, value in named if value.is_meta and n not in absent}
    fitting = (model_tensors[n] for n in match.fitting if n in model_tensors)
    to_come = set(map(_identity, fitting)) if on_meta else set()
    return match._replace(
        missing=tuple(n for n in (model_tensors | missing) if n in absent and n not in mismatched),
        unexpected=tuple(dict.fromkeys((*match.unexpected, *unexpected))),
        mismatched={name: mismatched[name] for name in model_tensors if name in mismatched},
        on_meta=tuple(n for n, value in on_meta.items() if _identity(value) not in to_come),
    )


def _identity(value: Any) -> Any:
    return view_key(value) if isinstance(value, torch.Tensor) and not _is_lazy(value) else id(value)


def _fitting(
    place: str,
    state_dict: Mapping[str, Any],
    model_tensors: Mapping[str, Any],
    prefixes: frozenset[str],
) -> dict[str, Any]:
    """Choose what the model takes.

    Raises:
        MismatchError: something has another shape or layout than the model's, or is no tensor.
    """
    known = {n: v for n, v in state_dict.items() if n in model_tensors}
    plain = {name: value for name, value in known.items() if not is_below(prefixes, name)}
    unfit = _differing({name: _shape(value) for name, value in plain.items()}, model_tensors)
    if unfit:
        raise MismatchError(
            place,
            f"{len(unfit)} shapes differ: {listed(compared(unfit))}",
            "load what fits with filter_shapes(model), or pad_or_slice(model) what does not",
        )
    strange = [
        name
        for name, value in plain.items()
        if not is_extra_state(name) and not _goes_into(value, model_tensors[name])
    ]
    if strange:
        raise MismatchError(
            place,
            f"{len(strange)} are no tensors of the model's layout: {listed(strange)}",
            "leave them out with exclude",
        )
    taken = {n: v for n, v in state_dict.items() if n in plain or is_below(prefixes, n)}
    return state_dict_like(state_dict, taken)


# ── model ─────────────────────────────────────────────────────────────────────────────────────


def loading_prefixes(model: torch.nn.Module) -> frozenset[str]:
    """Give the prefixes of modules that load by themselves: by hooks, or methods of their own.

    They may take names and shapes that they do not have now. torch's own layers are none of them.
    """
    found = _prefixes(model, lambda module: not loads_as_torch(module) or _has_pre_hooks(module))
    methods = (type(model).load_state_dict, type(model).state_dict)
    by_torch = methods == (torch.nn.Module.load_state_dict, torch.nn.Module.state_dict)
    return found if by_torch else found | {""}


def _prefixes(model: torch.nn.Module, holds: Callable[[torch.nn.Module], bool]) -> frozenset[str]:
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(f"{path}." if path else "" for path, module in modules if holds(module))


def _has_pre_hooks(module: torch.nn.Module) -> bool:
    return bool(module._load_state_dict_pre_hooks)  # noqa: SLF001 - no public one


def has_post_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a hook is called when a module has loaded."""
    return bool(module._load_state_dict_post_hooks)  # noqa: SLF001 - no public one


def loads_as_torch(module: torch.nn.Module) -> bool:
    """Tell whether a module takes its own tensors by a method of torch's layers."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")  # noqa: SLF001 - documented for subclasses


def is_below(prefixes: frozenset[str], name: str) -> bool:
    """Tell whether a name begins with one of the prefixes, which end with a dot or are empty."""
    if not prefixes:
        return False
    ends = (place + 1 for place, letter in enumerate(name) if letter == ".")
    return "" in prefixes or any(name[:end] in prefixes for end in ends)


def tensors_of(model: torch.nn.Module) -> dict[str, Any]:
    """Give a model's state dict with its own parameters and buffers in it."""
    return dict(model.state_dict(**accepted(model.state_dict, keep_vars=True)))


def accepted(method: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Give those of the options that a method takes, which a subclass may have overridden."""
    parameters = inspect.signature(method).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {name: value for name, value in options.items() if takes_any or name in parameters}


def _check_variables(
    place: str,
    model: torch.nn.Module,
    fitting: Iterable[str],
    variables: Mapping[str, Variables],
    state_dict: Mapping[str, Any],
) -> None:
    problem = misplaced(model, fitting, variables, shapes_of(state_dict))
    if problem:
        raise MismatchError(
            place,
            problem,
            "put align_variables(model=model) before all else, with a layout if the model is not"
            " Anemoi's, and new={'its name': 'the old one'} for a variable that was only renamed;"
            " where all is in order, give load_into a state dict, load(place, weights)",
        )


def _check_config(
    place: str, model: torch.nn.Module, fitting: Collection[str], original: Original
) -> None:
    pairs, variables = original.alignment.pairs, original.variables
    before = {d: pairs[d][0] if d in pairs else each for d, each in variables.items()}
    problem = configured_otherwise(model, fitting, original.config, variables, before)
    if problem:
        raise MismatchError(place, problem, REMEDY)


def check_values(place: str, match: Match) -> None:
    """Refuse what only values tell to be wrong.

    Raises:
        MismatchError: something is.
    """
    problems = [problem for check in match.checks if (problem := check())]
    if problems:
        raise MismatchError(place, "; ".join(problems), REMEDY)


def _check_optimizers(place: str, optimizers: Sequence[Any]) -> None:
    """Refuse what was made on parameters that are replaced, or that have their states in parts."""
    groups = [g for one in optimizers for g in getattr(one, "param_groups", ())]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(map(is_sharded, parameters)):
        raise MismatchError(
            place,
            "the optimizer's parameters are sharded, and the checkpoint's states are whole",
            "load them with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
        )
    count = sum(parameter.is_meta for parameter in parameters)
    if count:
        raise MismatchError(
            place,
            f"the optimizer was made on {count} parameters on the meta device, and load_into puts"
            " others in their place",
            "make the optimizer after load_into",
        )


def is_sharded(parameter: Any) -> bool:
    """Tell whether each rank has a part of it, as `fully_shard` leaves it."""
    # A model has such tensors only if it was imported; before 2.5 it had another name.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(parameter, kind)


def state_dict_like(original: Any, items: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Make a state dict with the versions of modules (``_metadata``) that the original has."""
    made = OrderedDict(items)
    made._metadata = getattr(original, "_metadata", None)  # type: ignore[attr-defined] # noqa: SLF001 - torch's
    return made


def _goes_into(value: Any, target: Any) -> bool:
    both = isinstance(value, torch.Tensor) and isinstance(target, torch.Tensor)
    if not both or value.is_nested or target.is_nested:  # torch copies no nested ones
        return False
    return _is_lazy(target) or value.layout == target.layout


def _states(place: str, checkpoint: Mapping[str, Any], kind: str, count: int) -> Sequence[Any]:
    """Find the states for so many receivers; none if the checkpoint has none."""
    states = states_of(_PARTS[kind], checkpoint)
    if states and len(states) != count:
        raise MismatchError(
            place,
            f"it holds the states of {len(states)} {kind}s, and {count} would take one",
            f"give as many, as a list: {kind}=[…]",
        )
    return states


def _shape(value: Any) -> Shape | None:
    """Give a tensor's shape; None if it has none yet (a lazy module's), as `shape_of` otherwise."""
    return None if _is_lazy(value) else shape_of(value)


def _is_lazy(value: Any) -> bool:
    return bool(torch.nn.parameter.is_lazy(value))


def _differing(shapes: Mapping[str, Shape | None], model_tensors: Mapping[str, Any]) -> Shapes:
    fixed = [n for n in shapes if n in model_tensors and not is_extra_state(n)]
    pairs = {n: (shapes[n], _shape(model_tensors[n])) for n in fixed}
    return {
        name: (shape, wanted)
        for name, (shape, wanted) in pairs.items()
        if shape is not None and wanted is not None and not _fits(shape, wanted)
    }


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Tell whether `load_state_dict` takes a shape; torch 0.3 had no tensors without dimensions."""
    return shape == wanted or (shape == (1,) and wanted == ())


def _renamed(original: Original, state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Find tensors that were there under another name."""
    renamed = {}
    for name, value in state_dict.items():
        reference, old = original.names.get(id(value), (lambda: None, ""))
        if name not in original.shapes and value is reference():
            renamed[old] = name
    return renamed


def _unexpected(
    original: Original,
    state_dict: Mapping[str, Any],
    renamed: Mapping[str, str],
    model_tensors: Mapping[str, Any],
) -> Iterable[str]:
    """List names that the model does not have, also those that a strategy left out for that."""
    origins = {*original.shapes, *renamed.values()}
    # otherwise nobody knows which name became which
    dropped = original.shapes if origins.issuperset(state_dict) else ()
    names = {**state_dict, **dict.fromkeys(dropped)}
    return [name for name in names if name not in model_tensors and name not in renamed]


def check_enough(terms: Terms, model: torch.nn.Module, match: Match) -> None:
    """Refuse what fills too little of a model.

    Raises:
        MismatchError: nothing fits, less than the required share of the model's values does, or
            (strict) anything is missing, unexpected or mismatched.
    """
    wrong = {
        "missing": match.missing,
        "unexpected": match.unexpected,
        "of another shape": compared(match.mismatched),
    }
    differences = "; ".join(f"{len(v)} {kind}: {listed(v)}" for kind, v in wrong.items() if v)
    if terms.strict and differences:
        remedy = prefix_advice(match.original.shapes, tensors_of(model))
        raise MismatchError(
            terms.place, differences, remedy or "leave out strict=True to load what fits"
        )
    sizes = {name: _values(value) for name, value in tensors_of(model).items()}
    absent = {*match.missing, *match.mismatched}
    share = sum(size for name, size in sizes.items() if name not in absent)
    total = sum(sizes.values())
    if sizes.keys() <= absent or share < terms.require * total:
        raise MismatchError(
            terms.place,
            f"only {share:,} of the model's {total:,} values would be loaded ({differences})",
            prefix_advice(match.original.shapes, sizes)
            or "compare the names; strip_prefix, add_prefix and rename change them",
        )


def _values(value: Any) -> int:
    return value.numel() if _shape(value) is not None else 0


def compared(shapes: Shapes) -> list[str]:
    return [f"{name} {a} in the checkpoint, {b} in the model" for name, (a, b) in shapes.items()]


def listed(names: Iterable[str]) -> str:
    lines = folded(names)
    more = f", … and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(lines[:_LISTED]) + more
