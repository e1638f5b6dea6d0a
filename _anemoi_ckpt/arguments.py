"""Checks of the arguments of strategies, made when a strategy is built.

Ground floor: `strategies` imports this module, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from _anemoi_ckpt.anatomy import weights_of


def check_texts(function: str, texts: Sequence[Any]) -> None:
    """Check that there is at least one argument, and that all of them are strings.

    Raises:
        TypeError: one is not a string.
        ValueError: there is none.
    """
    if not texts:
        raise ValueError(f"{function} needs at least one name or glob")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{function} takes text, not {text!r}")


def check_prefix(function: str, prefix: Any) -> None:
    """Check that a prefix is a string that ends with a dot.

    Raises:
        TypeError: it is not a string.
        ValueError: it does not end with a dot.
    """
    check_texts(function, (prefix,))
    if not prefix.endswith("."):
        raise ValueError(
            f"{function} takes a prefix that ends with a dot, not {prefix!r}; see rename"
        )


def check_pattern(pattern: Any, replacement: Any) -> re.Pattern[str]:
    """Compile the pattern that `rename` is called with, and check the replacement.

    Raises:
        TypeError: the pattern is not a string, or the replacement neither a string nor a function.
        ValueError: one of them is malformed.
    """
    check_texts("rename", (pattern,))
    if not isinstance(replacement, str) and not callable(replacement):
        raise TypeError(f"rename takes text or a function to replace by, not {replacement!r}")
    try:
        compiled = re.compile(pattern)
        # re reads a replacement when it is used, so use it once here: the error comes early then
        compiled.sub(replacement if isinstance(replacement, str) else "", "")
    except (re.error, IndexError) as err:  # IndexError: the replacement names an unknown group
        raise ValueError(f"rename cannot replace {pattern!r} by {replacement!r}: {err}") from None
    return compiled


def read_indices(dim: Any, index: Any) -> list[int]:
    """Give the indices that `take` is called with as a list.

    Raises:
        TypeError: `dim` or an index is not an integer.
    """
    values = index.tolist() if isinstance(index, torch.Tensor) else index
    indices = list(values) if isinstance(values, Iterable) else [values]
    for value in (dim, *indices):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"take needs an integer for dim and for every index, not {value!r}")
    return indices


def state_dict_of(function: str, model: Any) -> Mapping[str, Any]:
    """Give the state dict of a model, which may be a module or a state dict itself.

    Raises:
        TypeError: the model is neither a module nor a dict.
        ValueError: it has no state dict.
    """
    if not isinstance(model, torch.nn.Module | Mapping):
        raise TypeError(f"{function} takes a module or a state dict, not {model!r}")
    return weights_of(model)
