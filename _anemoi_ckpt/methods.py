"""What Anemoi's processors do with each variable before the network reads it.

The tensors of a normaliser tell; a remapper and an imputer have none, and only their configuration
tells, or what such a module was made with (anemoi/models/preprocessing/__init__.py,
BasePreprocessor). What a post-processor does with an output, the weights do not depend on.

Ground floor: it imports torch and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from _anemoi_ckpt.variables import as_mapping

SETTINGS = ("default", "remap", "normalizer", "method_kwargs")  # the other keys are methods
NONE = "none"  # the method that does nothing


class Processor(NamedTuple):
    """A processor, and its method for each variable."""

    kind: str  # the name of its class
    default: str
    methods: Mapping[str, str]  # by variable
    options: Mapping[str, Any]  # by method

    def step(self, variable: str) -> str:
        """Say what it does with a variable; empty for nothing."""
        if self.kind.endswith("Postprocessor"):
            return ""
        if self.kind.endswith("Normalizer"):
            return self.kind
        method = self.methods.get(variable, self.default)
        options = as_mapping(self.options.get(method)).items()
        told = sorted(f"{name}={_as_text(value)}" for name, value in options)
        return "" if method == NONE else " ".join([self.kind, method, *told])


def _as_text(value: Any) -> str:
    """Write numbers that are the same alike."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def compared(
    theirs: Sequence[Processor], own: Sequence[Processor], variables: Iterable[str]
) -> dict[str, tuple[list[str], list[str]]]:
    """Give what each side does with the variables that it treats in another way than the other.

    What only one side imputes has no gaps on the other.
    """
    different = {}
    for variable in variables:
        sides = [[s for each in side if (s := each.step(variable))] for side in (theirs, own)]
        if not all(any("Imputer" in step for step in side) for side in sides):
            sides = [[step for step in side if "Imputer" not in step] for side in sides]
        if sides[0] != sides[1]:
            different[variable] = (sides[0] or [NONE], sides[1] or [NONE])
    return different
