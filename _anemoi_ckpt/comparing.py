"""Two state dicts are compared by their names and shapes.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from _anemoi_ckpt.anatomy import is_extra_state
from _anemoi_ckpt.tensors import shape_of
from _anemoi_ckpt.variables import few

_COMPILED = "_orig_mod."
Shapes = dict[str, tuple[int, ...] | None]  # None: not a tensor, or extra state of any shape


def shapes_of(state_dict: Mapping[str, Any]) -> Shapes:
    """Give the shape of each entry of a state dict, by name."""
    return {
        name: None if is_extra_state(name) else shape_of(value)
        for name, value in state_dict.items()
    }


def describe_differences(
    shapes: Shapes, wanted: Shapes, owner: str, *, missing: bool = True, unexpected: bool = True
) -> str:
    """Describe all names and shapes that differ, one line for each kind of difference.

    Args:
        shapes: of the checkpoint.
        wanted: of the model, or of the other checkpoint.
        owner: what `wanted` belongs to, for the text.
        missing: describe the names that only `wanted` has.
        unexpected: describe the names that only `shapes` has.

    Returns:
        The lines, each after a newline; empty if nothing differs.
    """
    kinds = {
        f"missing, in the {owner} only": [n for n in wanted if missing and n not in shapes],
        f"unexpected, not in the {owner}": [n for n in shapes if unexpected and n not in wanted],
        "mismatched": [
            f"{name} is {_shape_text(shape)}, the {owner}'s is {_shape_text(wanted[name])}"
            for name, shape in shapes.items()
            if name in wanted and wanted[name] != shape
        ],
    }
    return "".join(
        f"\n  {kind} ({len(lines)}): {few(lines)}" for kind, lines in kinds.items() if lines
    )


def prefix_advice(names: Iterable[str], wanted: Iterable[str]) -> str:
    """Name the strategy that would make more of the names those wanted; empty if none does.

    It may strip or add a prefix, and takes out ``_orig_mod.``, which `torch.compile` puts anywhere.
    """
    present, sought = set(names), set(wanted)
    plain = {name.replace(_COMPILED, "") for name in present}
    gains: Counter[str] = Counter()
    gains.update(f"strip_prefix({p!r})" for n in present for p, end in _cuts(n) if end in sought)
    gains.update(f"add_prefix({p!r})" for n in sought for p, end in _cuts(n) if end in present)
    gains[r"rename(r'_orig_mod\.', '')"] = len(plain & sought)  # the first of equals is told
    advice, gain = gains.most_common(1)[0]
    if gain <= len(present & sought):
        return ""
    return f"{advice} before would make {gain} of {len(sought)} names those of the model"


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Cut a name behind each of its dots."""
    ends = (place + 1 for place, letter in enumerate(name) if letter == ".")
    return ((name[:end], name[end:]) for end in ends)


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "not a tensor" if shape is None else str(shape)
