"""Putting weights into a model, all or nothing, and telling what became of them.

Knows models and state dicts, and nothing of places.
match · install · report
"""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from attrs import evolve, frozen

from _ckpt_errors import MismatchError
from _ckpt_tables import Table, folded, section
from _ckpt_variables import (
    Alignment,
    Variables,
    compare,
    misplaced,
    paired,
    read_checkpoint,
    read_model,
    recast,
    with_roles,
)

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape]]  # in the checkpoint, in the model

_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")  # in order of precedence
_STATES = {  # as Lightning names them, and as training loops of one's own do
    "optimizer": ("optimizer_states", "optimizer_state_dict", "optimizer"),
    "scheduler": (
        "lr_schedulers",
        "lr_scheduler_state_dict",
        "scheduler_state_dict",
        "lr_scheduler",
        "scheduler",
    ),
}
_STATE_KEYS = frozenset(itertools.chain(*_STATES.values()))
_EXTRA_STATE = "_extra_state"  # ends the name of what a module adds as it likes, in any shape
_BATCHES = 16  # in which a sharded model gets its parts: each looks at all of the model
_LISTED = 20  # names in a message; more than that nobody reads


# ── match ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class Before:
    """What a checkpoint's weights were before the strategies."""

    shapes: Mapping[str, Shape | None]
    names: Mapping[int, tuple[Callable[[], Any], str]]  # by id, with a weak reference
    variables: Mapping[str, Variables]  # those that the weights are in the order of
    alignment: Alignment  # with others, so far


class Match(NamedTuple):  # so that torch's pytree finds the tensors in it
    """What of a checkpoint goes into a model, and what does not."""

    fitting: dict[str, Any]  # until it is installed
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Shapes
    renamed: Mapping[str, str]
    states: Mapping[str, Sequence[Any]]  # of optimizers and schedulers
    rest: Mapping[str, Any]


def split(checkpoint: Any) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """Give the state dict, wherever the checkpoint holds it, and what stands beside it."""
    if not isinstance(checkpoint, Mapping) and callable(getattr(checkpoint, "state_dict", None)):
        return checkpoint.state_dict(), {}  # a module, or the inert data of one
    if not isinstance(checkpoint, Mapping):
        return None, {}
    for key in _WEIGHTS:
        found, inner = split(checkpoint.get(key))
        if found is not None:
            rest = {name: value for name, value in checkpoint.items() if name != key}
            return found, {**rest, key: inner} if inner else rest
    if any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return checkpoint, {}
    return None, dict(checkpoint)


def look(checkpoint: Any) -> Before:
    """Note names and shapes, to tell later what the strategies did with them."""
    found, _ = split(checkpoint)
    tensors = {name: t for name, t in (found or {}).items() if isinstance(t, torch.Tensor)}
    # weakly: what the strategies drop must not count as needed
    names = {id(tensor): (weakref.ref(tensor), name) for name, tensor in tensors.items()}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    return Before(shapes, names, read_checkpoint(checkpoint), Alignment({}, {}))


def realign(before: Before, alignment: Alignment) -> Before:
    """Note that a strategy puts the weights into the order of other variables."""
    if not alignment.pairs:
        return before
    so_far = before.alignment
    others = before.variables if len(before.variables) > 1 else {}  # one alone has any name
    first = {d: (so_far.pairs.get(d, pair)[0], pair[1]) for d, pair in alignment.pairs.items()}
    return evolve(
        before,
        variables={**others, **{d: new for d, (_, new) in alignment.pairs.items()}},
        alignment=Alignment(so_far.pairs | first, so_far.tensors | alignment.tensors),
    )


def match(
    place: str,
    model: torch.nn.Module,
    checkpoint: Any,
    before: Before,
    receivers: Mapping[str, Sequence[Any]],
) -> Match:
    """Compare what the strategies left with what the model has.

    The states of optimizers and schedulers are kept where there is one to receive them.

    Raises:
        MismatchError: a shape differs, or the order of variables; there are no weights at all,
            another number of states, or an optimizer that would lose its parameters.
    """
    _check_optimizers(place, receivers.get("optimizer", ()))
    found, rest = split(checkpoint)
    if found is None:
        raise MismatchError(
            place,
            f"the strategies left no weights, but {_listed(rest) or type(checkpoint).__name__}",
            "let the last of them give a checkpoint or a state dict",
        )
    model_tensors = model.state_dict(keep_vars=True)
    unfit = _differing({name: _shape(value) for name, value in found.items()}, model_tensors)
    if unfit:
        raise MismatchError(
            place,
            f"{len(unfit)} shapes differ: {_listed(_compared(unfit))}",
            "load what fits with filter_shapes(model), or pad_or_slice(model) what does not",
        )
    fitting = _like(found, {name: v for name, v in found.items() if name in model_tensors})
    strange = [
        name
        for name, value in fitting.items()
        if not name.endswith(_EXTRA_STATE) and not _goes_into(value, model_tensors[name])
    ]
    if strange:
        raise MismatchError(
            place,
            f"{len(strange)} are no tensors of the model's layout: {_listed(strange)}",
            "leave them out with exclude",
        )
    told = misplaced(model, fitting, read_checkpoint(checkpoint) or before.variables)
    if told:
        raise MismatchError(
            place,
            told,
            "put align_variables(model=model) before all else, with a layout if the model is not"
            " Anemoi's; where all is in order, give load_into a state dict, load(place, weights)",
        )
    filled = {id(model_tensors[name]) for name in fitting}  # one of tied names fills all
    absent = [name for name, value in model_tensors.items() if id(value) not in filled]
    mismatched = _differing({name: before.shapes.get(name) for name in absent}, model_tensors)
    renamed = _renamed(before, found)
    return Match(
        fitting,
        tuple(name for name in absent if name not in mismatched),
        tuple(_unexpected(before, found, renamed, model_tensors)),
        mismatched,
        renamed,
        {what: _states(place, rest, what, len(them)) for what, them in receivers.items() if them},
        {key: value for key, value in rest.items() if key not in _STATE_KEYS},
    )


def _check_optimizers(place: str, optimizers: Sequence[Any]) -> None:
    """Refuse what was made on parameters that are replaced, or that have their states in parts."""
    groups = [g for one in optimizers for g in getattr(one, "param_groups", ())]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(map(_is_sharded, parameters)):
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


def _like(original: Any, items: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Make a state dict with the versions of modules (``_metadata``) that the original has."""
    made = OrderedDict(items)
    made._metadata = getattr(original, "_metadata", None)  # type: ignore[attr-defined] # noqa: SLF001 - torch's
    return made


def _goes_into(value: Any, target: Any) -> bool:
    both = isinstance(value, torch.Tensor) and isinstance(target, torch.Tensor)
    return both and (torch.nn.parameter.is_lazy(target) or value.layout == target.layout)


def _states(place: str, rest: Mapping[str, Any], what: str, count: int) -> Sequence[Any]:
    """Find the states for so many receivers; none if the checkpoint has none."""
    found: Any = next((rest[key] for key in _STATES[what] if rest.get(key)), [])
    states = found if isinstance(found, list) else [found]
    if states and len(states) != count:
        raise MismatchError(
            place,
            f"it holds the states of {len(states)} {what}s, and {count} would take one",
            f"give as many, as a list: {what}=[…]",
        )
    return states


def _shape(value: Any) -> Shape | None:
    """Give a tensor's shape; None if it has none yet (a lazy module's), or is no tensor."""
    known = isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value)
    return tuple(value.shape) if known else None


def _differing(shapes: Mapping[str, Shape | None], model_tensors: Mapping[str, Any]) -> Shapes:
    fixed = [n for n in shapes if n in model_tensors and not n.endswith(_EXTRA_STATE)]
    pairs = {n: (shapes[n], _shape(model_tensors[n])) for n in fixed}
    return {n: (a, b) for n, (a, b) in pairs.items() if a is not None and b is not None and a != b}


def _renamed(before: Before, found: Mapping[str, Any]) -> dict[str, str]:
    """Find tensors that were there under another name."""
    renamed = {}
    for name, value in found.items():
        reference, old = before.names.get(id(value), (lambda: None, ""))
        if name not in before.shapes and value is reference():
            renamed[old] = name
    return renamed


def _unexpected(
    before: Before, found: Mapping[str, Any], renamed: Mapping[str, str], model: Mapping[str, Any]
) -> Iterable[str]:
    """List names that the model does not have, also those that a strategy left out for that."""
    origins = {*before.shapes, *renamed.values()}
    dropped = before.shapes if origins.issuperset(found) else ()  # else none knows what was renamed
    return [name for name in {**found, **dict.fromkeys(dropped)} if name not in {*model, *renamed}]


# ── install ───────────────────────────────────────────────────────────────────────────────────


def check_enough(
    place: str, model: torch.nn.Module, found: Match, share: float, *, strict: bool
) -> None:
    """Refuse what fills too little of a model.

    Raises:
        MismatchError: nothing fits, less than the share of the model's values does, or (strict)
            anything is missing, unexpected or mismatched.
    """
    wrong = {
        "missing": found.missing,
        "unexpected": found.unexpected,
        "of another shape": _compared(found.mismatched),
    }
    said = "; ".join(f"{len(v)} {kind}: {_listed(v)}" for kind, v in wrong.items() if v)
    if strict and said:
        raise MismatchError(place, said, "leave out strict=True to load what fits")
    sizes = {name: _values(value) for name, value in model.state_dict(keep_vars=True).items()}
    absent = {*found.missing, *found.mismatched}
    filled = sum(size for name, size in sizes.items() if name not in absent)
    total = sum(sizes.values())
    if not found.fitting or filled < share * total:
        raise MismatchError(
            place,
            f"only {filled:,} of the model's {total:,} values would be loaded ({said})",
            "compare the names; strip_prefix, add_prefix and rename change them",
        )


def _values(value: Any) -> int:
    return value.numel() if _shape(value) is not None else 0


def install(
    model: torch.nn.Module, found: Match, receivers: Mapping[str, Sequence[Any]]
) -> tuple[str, ...]:
    """Give the model its weights, and optimizers and schedulers their states; tell which got one.

    Tensors with memory are copied into, in their own dtype and on their own device; those on meta
    are replaced, in their own dtype, and share memory with nothing else but what they are tied
    to. If a state is refused, nothing has changed. The match is used up.
    """
    pairs = [
        (receiver, state)
        for what, states in found.states.items()
        for receiver, state in zip(receivers[what], states, strict=False)  # none, or as many
    ]
    before = [(receiver, copy.deepcopy(receiver.state_dict())) for receiver, _ in pairs]
    try:
        for receiver, state in pairs:
            receiver.load_state_dict(copy.deepcopy(state))
        _fill(model, found.fitting)
    except BaseException:
        for receiver, state in before:
            receiver.load_state_dict(state)
        raise
    return tuple(what for what, states in found.states.items() if states)


def _fill(model: torch.nn.Module, fitting: dict[str, Any]) -> None:
    if any(map(_is_sharded, model.parameters())):
        _fill_shards(model, fitting)
        return
    tied = _tied(model)
    extra = {name: value for name, value in fitting.items() if name.endswith(_EXTRA_STATE)}
    hollow, owned = {}, {}
    for name, target in model.state_dict(keep_vars=True).items():
        if name in fitting and name not in extra and target.is_meta:
            value = fitting.pop(name).detach()  # from here on only others keep the original alive
            if id(target) not in owned:  # else a name tied to this one
                owned[id(target)] = _own(value.to(target.dtype))
            hollow[name] = owned[id(target)]
    real = {name: value for name, value in fitting.items() if name not in extra}
    # first what a module may refuse
    model.load_state_dict(_like(fitting, extra), strict=False)
    model.load_state_dict(_like(fitting, real), strict=False)
    if not hollow:
        return
    model.load_state_dict(_like(fitting, hollow), strict=False, assign=True)
    for names in tied:
        filled = next((name for name in names if name in hollow), None)
        if filled:
            owner, _, attribute = filled.rpartition(".")
            value = getattr(model.get_submodule(owner), attribute)
            for name in names:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, value)


def _is_sharded(parameter: Any) -> bool:
    """Tell whether each rank has a part of it, as `fully_shard` leaves it."""
    tensor = sys.modules.get("torch.distributed.tensor")  # what nobody imported, nobody uses
    return tensor is not None and isinstance(parameter, tensor.DTensor)


def _fill_shards(model: torch.nn.Module, fitting: dict[str, Any]) -> None:
    """Give a sharded model this rank's parts, and let go of the whole as they are given."""
    from torch.distributed.checkpoint import state_dict as sharded  # noqa: PLC0415 - takes a while

    options = sharded.StateDictOptions(full_state_dict=True, strict=False)
    dtypes = {n: v.dtype for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    extra = {name: value for name, value in fitting.items() if name.endswith(_EXTRA_STATE)}
    model.load_state_dict(_like(fitting, extra), strict=False)
    # first those without dimensions: torch does not look at them to tell whether a model is on meta
    names = sorted((n for n in fitting if n not in extra), key=lambda n: fitting[n].dim() > 0)
    most = sum(fitting[name].nbytes for name in names) // _BATCHES
    batch: dict[str, Any] = {}
    for name in names:
        value = fitting.pop(name).detach()
        batch[name] = value.to(dtypes[name])
        if name == names[-1] or sum(each.nbytes for each in batch.values()) >= most:
            sharded.set_model_state_dict(model, batch, options=options)
            batch = {}


def _own(value: torch.Tensor) -> torch.Tensor:
    """Give a tensor a memory of its own: the one it has, if it has all of it alone."""
    if value.layout is not torch.strided:
        return value.clone()
    whole = value.untyped_storage().nbytes() == value.nbytes
    alone = _holders(value) == _holders(torch.empty(1)) and value.untyped_storage().resizable()
    return value if whole and alone else value.clone()


def _holders(value: torch.Tensor) -> int:
    """Count the tensors on a storage (and, alike for all, what this takes itself)."""
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata)  # noqa: SLF001 - no public one


def _tied(model: torch.nn.Module) -> list[list[str]]:
    """List the names that share one parameter or buffer."""
    names: dict[int, list[str]] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, value in itertools.chain(parameters, model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(value), []).append(name)
    return [group for group in names.values() if len(group) > 1]


# ── report ────────────────────────────────────────────────────────────────────────────────────


@frozen(repr=False, eq=False)
class Report(Table):
    """What `load_into` loaded, and what it did not. Prints as a table, in notebooks, too."""

    place: str
    loaded: tuple[str, ...]  # names in the model
    missing: tuple[str, ...]  # in the model, not in the checkpoint
    unexpected: tuple[str, ...]  # in the checkpoint, not in the model
    mismatched: Shapes  # name: shape in the checkpoint, shape in the model
    renamed: Mapping[str, str]  # name in the checkpoint: name in the model
    restored: tuple[str, ...]  # "optimizer", "scheduler"
    bytes_moved: int
    bytes_stored: int
    seconds: float
    rest: Mapping[str, Any]  # what the checkpoint held beside the weights
    # kept, of these moved and recast (in another role); new, gone: if both sides tell
    variables: Mapping[str, tuple[str, ...]]
    aligned: tuple[str, ...]  # tensors that were put into the order of the model's variables

    def _rows(self) -> list[tuple[str, str]]:
        moved, stored = self.bytes_moved / 1e6, self.bytes_stored / 1e6
        rows = [("checkpoint", self.place)]
        if stored:  # else it was in memory
            rows.append(("moved", f"{moved:,.1f} of {stored:,.1f} MB in {self.seconds:.2f} s"))
        sections: dict[str, Sequence[str]] = {
            "loaded": folded(self.loaded),
            "missing": folded(self.missing),
            "unexpected": folded(self.unexpected),
            "mismatched": _compared(self.mismatched),
            "renamed": _arrows(self.renamed),
            "restored": self.restored,
        }
        if self.variables:
            sections["aligned"] = folded(self.aligned)
        for heading, lines in sections.items():
            rows += section(f"{heading} {len(getattr(self, heading))}", lines)
        told = [f"{len(n)} {kind}: {_listed(n)}" for kind, n in self.variables.items() if n]
        rows += section("variables", told) if told else []
        return [*rows, ("rest", ", ".join(map(str, self.rest)))]


def variables_told(model: torch.nn.Module, before: Before) -> dict[str, tuple[str, ...]]:
    """List the variables by what became of them; nothing where one side does not tell."""
    known, pairs = read_model(model), before.alignment.pairs
    named = {dataset: pair for dataset, (pair, _) in paired(pairs, known).items()}  # as the model's
    both = paired(before.variables, known)
    held = {n: pair for n, pair in both.items() if n in before.variables or len(known) == 1}
    pairs = held | (named or pairs)
    told: dict[str, tuple[str, ...]] = {}
    for dataset, (old, new) in pairs.items():
        found = compare(old.index, new.index)
        kinds = {
            "kept": [name for name in new.index if name in old.index],
            "moved": found["moved"],
            "new": found["added"],
            "gone": found["removed"],
            "recast": recast(with_roles(old, new), with_roles(new, old)),
        }
        front = f"{dataset}." if len(pairs) > 1 else ""
        for kind, names in kinds.items():
            told[kind] = told.get(kind, ()) + tuple(front + name for name in names)
    return told


def _arrows(renamed: Mapping[str, str]) -> list[str]:
    old, new = folded(renamed), folded(renamed.values())
    pairs = zip(old, new, strict=True) if len(old) == len(new) else renamed.items()
    return [f"{before} → {after}" for before, after in pairs]


def _compared(shapes: Shapes) -> list[str]:
    return [f"{name} {a} in the checkpoint, {b} in the model" for name, (a, b) in shapes.items()]


def _listed(names: Iterable[str]) -> str:
    lines = folded(names)
    more = f", … and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(lines[:_LISTED]) + more
