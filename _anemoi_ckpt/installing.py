"""Putting weights into a model as `load_state_dict` does, all or nothing.

The model takes the state dict by one call, so its hooks run once, under the checkpoint's names. As
a rule it does so with ``assign=True``, and nothing that it has is written over: if all went well,
on all ranks, the values are copied into the tensors that it had, and these take their places again.
A model that would see the checkpoint's tensors meanwhile is written into, and copies are kept.
Whatever fails is undone.

install · model · receivers · shards
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from math import inf
from typing import Any, cast

import torch
from attrs import frozen

from _anemoi_ckpt.anatomy import is_extra_state
from _anemoi_ckpt.compat import FILLS_MIXED_DEVICES, has_own_memory
from _anemoi_ckpt.errors import CheckpointError, MismatchError, refusal
from _anemoi_ckpt.hooks import STATES, call_hook, remember
from _anemoi_ckpt.matching import (
    Dtypes,
    Match,
    Receivers,
    Terms,
    accepted,
    check_enough,
    check_values,
    has_post_hooks,
    is_below,
    is_sharded,
    loading_prefixes,
    loads_as_torch,
    state_dict_like,
    tensors_of,
    with_keys,
)
from _anemoi_ckpt.nodes import check_nodes
from _anemoi_ckpt.ranks import Ranks
from _anemoi_ckpt.tensors import is_inexact, is_strided, loses_values

_BATCHES = 16  # in which a sharded model gets its parts: each looks at all of the model


# ── install ───────────────────────────────────────────────────────────────────────────────────


def install(
    model: torch.nn.Module,
    match: Match,
    receivers: Receivers,
    terms: Terms,
    ranks: Ranks | None = None,
) -> Match:
    """Give the model its weights, and optimizers and schedulers their states.

    Tensors with memory are copied into, in their own dtype and on their own device; those on meta
    are replaced, in their own dtype, and share memory with nothing else but what they are tied
    to. The match is used up; the result is the match as the model itself tells it.

    Raises:
        MismatchError: the model, an optimizer or a scheduler refused, or the model's nodes are in
            other places, or its edges others. Where they refused by a built-in error, it is of
            that kind, too.
        Exception: an error of the user's own class, as it is.

    Whatever is raised, nothing has changed then, here or on the other ranks.
    """
    take = _take_shards if any(map(is_sharded, model.parameters())) else _take
    with ExitStack() as undo:

        def act() -> _Taken:
            hooked = _hooked(model, match, terms, undo)
            check_nodes(terms.place, tensors_of(model), hooked.fitting)
            check_values(terms.place, match)
            return take(model, hooked, receivers, terms, undo)

        taken = act() if ranks is None else ranks.together(act)
        undo.pop_all()
    with torch.no_grad():
        for old, new in taken.copies:
            old.copy_(new)
    return taken.match


def _hooked(model: torch.nn.Module, match: Match, terms: Terms, undo: ExitStack) -> Match:
    """Have the model's own hook see the checkpoint, where a strategy resumes training.

    Raises:
        Exception: what the hook raises, as it is.
    """
    if terms.hook is None:
        return match
    for tensor in (*model.parameters(), *model.buffers()):
        if not (tensor.is_meta or torch.nn.parameter.is_lazy(tensor)):
            undo.callback(_put_back, tensor, tensor.detach().clone())
    states = {STATES[kind]: list(several) for kind, several in match.states.items()}
    checkpoint = {**match.rest, "state_dict": match.fitting, **states}
    try:
        whole = call_hook(terms.hook, model, checkpoint, undo, owned=terms.owned)
    except Exception as err:
        err.add_note(
            f"raised by the model's on_load_checkpoint, while loading {terms.place}: leave out"
            " keep_progress and warm_start to load without that hook"
        )
        raise
    states = {kind: whole[STATES[kind]] for kind in match.states}
    return match._replace(fitting=whole["state_dict"], states=states)


_Copy = tuple[torch.Tensor, torch.Tensor]  # into, from
_PLAIN_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


@frozen
class _Taken:
    """What a model took, and what is left to be copied: that cannot fail."""

    match: Match
    copies: list[_Copy]


def _take(
    model: torch.nn.Module, match: Match, receivers: Receivers, terms: Terms, undo: ExitStack
) -> _Taken:
    """Do all that can fail."""
    try:
        match = match._replace(lossy=_lossy(model, match.fitting))
        slots = list(_slots(model))
        keys = _assign(model, slots, match.fitting, undo)
        match.fitting.clear()  # from here on only others keep the checkpoint's tensors alive
        copies = _settle(slots, undo)
        taken = with_keys(match, model, *keys)
        check_enough(terms, model, taken)
        _restore(receivers, match, terms, undo)
    except (CheckpointError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as err:
        if type(err).__module__.partition(".")[0] in {"builtins", "torch"}:
            raise _refused(terms, err) from err
        err.add_note(f"while loading {terms.place}")  # it is of a class of the user's own
        raise
    return _Taken(taken, copies)


def _lossy(model: torch.nn.Module, values: Mapping[str, Any]) -> dict[str, Dtypes]:
    """Find the values that lose more than rounding in the dtypes of the model's tensors."""
    targets = {n: t for n, t in tensors_of(model).items() if n in values and is_strided(t)}
    pairs = {name: (values[name], target.dtype) for name, target in targets.items()}
    return {
        name: (value.dtype, dtype)
        for name, (value, dtype) in pairs.items()
        if is_strided(value) and not value.is_quantized and loses_values(value, dtype)
    }


def _refused(terms: Terms, err: Exception) -> MismatchError:
    problem = f"the model refused it ({type(err).__name__}: {err})"
    return refusal(type(err), terms.place, problem, "leave out with exclude what it does not take")


# ── model ─────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Slot:
    """Where a module keeps a parameter or a buffer, and what stood there."""

    module: torch.nn.Module
    store: dict[str, Any]
    key: str
    tensor: torch.Tensor

    @property
    def now(self) -> Any:
        return self.store.get(self.key)

    def put(self, tensor: torch.Tensor) -> None:
        if type(self.module).__setattr__ is not torch.nn.Module.__setattr__:
            with suppress(Exception):  # as it may like: an RNN lists its parameters once more
                setattr(self.module, self.key, tensor)
        self.store[self.key] = tensor


def _slots(model: torch.nn.Module) -> Iterator[_Slot]:
    for _, module in model.named_modules(remove_duplicate=False):  # as torch loads them
        if isinstance(module, torch.jit.ScriptModule):  # whose dicts are views that cannot be set
            continue
        for store in (module._parameters, module._buffers):  # noqa: SLF001 - nn.Module's own for decades
            for key, tensor in store.items():
                if tensor is not None:
                    yield _Slot(module, store, key, tensor)


def _assign(
    model: torch.nn.Module, slots: list[_Slot], values: dict[str, Any], undo: ExitStack
) -> tuple[Sequence[str], Sequence[str]]:
    """Have the model take values by one call; give the missing and the unexpected keys.

    Its own tensors are set aside meanwhile. Those that may be written into (by modules that load
    by themselves, or all of them where the modules would see the checkpoint's tensors) are kept
    as copies, too.
    """
    prefixes = loading_prefixes(model)
    on_meta = any(slot.tensor.is_meta for slot in slots)
    sees_tensors = "" in prefixes or any(map(_sees_tensors, model.modules()))
    assign = on_meta or not sees_tensors
    for slot in slots:
        undo.callback(slot.put, _as_before(slot.tensor))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        written = not assign or is_below(prefixes, name)
        if written and not torch.nn.parameter.is_lazy(tensor):
            undo.callback(_put_back, tensor, tensor.detach().clone())
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in filter(is_extra_state, values):
        module = modules.get(name.rpartition(".")[0])
        if module is not None:
            remember(module, undo)  # it may add what it is given to what it has
            kept = copy.deepcopy(module.get_extra_state())
            undo.callback(_give_back, module.set_extra_state, kept)
    names = tensors_of(model)
    values = state_dict_like(
        values, {n: _assignable(value, names.get(n)) for n, value in values.items()}
    )
    options = accepted(model.load_state_dict, strict=False, **({"assign": True} if assign else {}))
    keys = model.load_state_dict(values, **options)
    if keys is None:  # a method of the model's own
        return [name for name in names if name not in values], ()
    return keys.missing_keys, keys.unexpected_keys


def _sees_tensors(module: torch.nn.Module) -> bool:
    """Tell whether a module may look at its tensors, or keep or refuse them, as it loads them.

    These are to be its own then, of its dtype and on its device, as without ``assign=True``.
    """
    assigns_as_torch = type(module).__setattr__.__module__.startswith("torch.")
    return not (assigns_as_torch and loads_as_torch(module)) or has_post_hooks(module)


def _as_before(tensor: torch.Tensor) -> torch.Tensor:
    """Give what to put back: a lazy tensor gets its memory itself, so another one like it."""
    if not torch.nn.parameter.is_lazy(tensor):
        return tensor
    if isinstance(tensor, torch.nn.Parameter):
        return copy.deepcopy(tensor)
    kind: Any = torch.nn.parameter.UninitializedBuffer  # untyped
    return cast(torch.Tensor, kind(device=tensor.device, dtype=tensor.dtype))


def _put_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.shape != values.shape:  # an observer takes the checkpoint's size
        with torch.no_grad():
            tensor.resize_(values.shape)
    _write(tensor, values)


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    # outside of its mode, torch writes into an inference tensor before it refuses to
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def _assignable(value: Any, target: Any) -> Any:
    """Make a value one that the model can take in the place of its own, and keep apart from it.

    A parameter of the checkpoint does not become one of the model, and one of the model does not
    become an integer, which has no gradient.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(target, torch.nn.Parameter) and target.requires_grad and not is_inexact(value):
        return value.to(target.dtype)
    return value.detach()


def _give_back(take: Callable[[Any], Any], state: Any) -> None:
    with suppress(Exception):  # what refuses its own state has refused the other, too
        take(state)


def _settle(slots: list[_Slot], undo: ExitStack) -> list[_Copy]:
    """Put the model's own tensors back into their places; give what is to be copied into them.

    Tied slots keep one tensor. One on meta is replaced, as is one that a module itself has given
    another shape. A copy that may be refused is made here, where it can be undone.
    """
    tied: dict[int, list[_Slot]] = {}
    for slot in slots:
        tied.setdefault(id(slot.tensor), []).append(slot)
    copies: list[_Copy] = []
    for group in tied.values():
        old = group[0].tensor
        assigned = [slot.now for slot in group if slot.now is not None and slot.now is not old]
        if not assigned:  # not in the checkpoint, or the module has written into it
            continue
        new = assigned[-1]  # as torch: it copies one after the other
        stays = not old.is_meta and old.shape == new.shape
        final = old if stays else _owned(old, new)
        for slot in group:
            slot.put(final)
        if stays and _is_plain(old) and _is_plain(new):
            copies.append((old, new))
        elif stays:
            before = old.detach().clone()
            _write(old, new)
            undo.callback(_put_back, old, before)
    return copies


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a copy into or out of a tensor cannot fail."""
    if not is_strided(tensor) or tensor.is_inference() or tensor.dtype not in _PLAIN_DTYPES:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride or size == 1 or not tensor.numel() for size, stride in sizes)  # not expanded


def _owned(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Make of an assigned tensor what takes the place of the model's: of its dtype and kind.

    Its memory is its own: the assigned one's, if that has all of it alone.
    """
    cast = new if new.dtype == old.dtype else new.detach().to(old.dtype)
    whole = is_strided(cast) and cast.untyped_storage().nbytes() == cast.nbytes
    value = cast if whole and has_own_memory(cast) else cast.detach().clone()
    value = value.detach() if value.requires_grad else value
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=old.requires_grad)
    return value


# ── receivers ─────────────────────────────────────────────────────────────────────────────────


def _restore(receivers: Receivers, match: Match, terms: Terms, undo: ExitStack) -> None:
    """Give optimizers and schedulers their states."""
    for kind, states in match.states.items():
        for receiver, state in zip(receivers[kind], states, strict=False):  # none, or as many
            undo.callback(_give_back, receiver.load_state_dict, _kept_state(receiver))
            # torch's optimizers keep the tensors that they are given
            receiver.load_state_dict(state if terms.owned else copy.deepcopy(state))


def _kept_state(receiver: Any) -> Any:
    """Give the state to come back to. torch's own optimizers replace it, and write into none."""
    kind = type(receiver)
    replaces = getattr(kind, "load_state_dict", None) is torch.optim.Optimizer.load_state_dict
    return receiver.state_dict() if replaces else copy.deepcopy(receiver.state_dict())


# ── shards ────────────────────────────────────────────────────────────────────────────────────


def _take_shards(
    model: torch.nn.Module, match: Match, receivers: Receivers, terms: Terms, undo: ExitStack
) -> _Taken:
    """Give a sharded model this rank's parts, and let go of the whole as they are given."""
    from torch.distributed.checkpoint import state_dict as sharded  # noqa: PLC0415 - takes a while

    _restore(receivers, match, terms, undo)
    match = match._replace(lossy=_lossy(model, match.fitting))
    fitting = match.fitting
    options = sharded.StateDictOptions(full_state_dict=True, strict=False)
    dtypes = {n: v.dtype for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    extra = {name: value for name, value in fitting.items() if is_extra_state(name)}
    model.load_state_dict(state_dict_like(fitting, extra), strict=False)
    # first those without dimensions: torch does not look at them to tell whether a model is on meta
    names = sorted((n for n in fitting if n not in extra), key=lambda n: fitting[n].dim() > 0)
    at_once = any(each.is_meta for each in model.parameters()) and not FILLS_MIXED_DEVICES
    most = inf if at_once else sum(fitting[name].nbytes for name in names) / _BATCHES
    batch: dict[str, Any] = {}
    for name in names:
        value = fitting.pop(name).detach()
        batch[name] = value.to(dtypes[name])
        if name == names[-1] or sum(each.nbytes for each in batch.values()) >= most:
            sharded.set_model_state_dict(model, batch, options=options)
            batch = {}
    return _Taken(match, [])
