"""Names that globs choose.

A glob chooses a name, or all names under it: ``encoder`` chooses ``encoder.weight``. It does not
choose ``model.encoder.weight``; ``model.encoder`` and ``*.encoder`` do. A key that is no text, as
that of an inner dict may be, is chosen by none.
"""

from __future__ import annotations

import bisect
import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from _anemoi_ckpt.errors import UNPLACED, MismatchError
from _anemoi_ckpt.variables import few

_NEIGHBOURS = 500  # names to either side of a mistyped one that are compared with it


def choose(
    names: Iterable[str],
    globs: Iterable[str],
    *,
    missing_ok: bool = False,
    owner: str = UNPLACED,
) -> set[str]:
    """Give the names that at least one glob chooses; `owner`, who has them, is for the error.

    Raises:
        MismatchError: a glob chooses no name, and `missing_ok` is False; the error suggests others.
    """
    names = [name for name in names if isinstance(name, str)]
    chosen: set[str] = set()
    for glob in globs:
        matching = {name for name in names if _is_chosen(name, glob)}
        if not matching and not missing_ok:
            problem = f"{glob!r} chooses nothing{_hint(names, glob)}"
            raise MismatchError(owner, problem, f"there are: {few(names)}")
        chosen |= matching
    return chosen


def _is_chosen(name: str, glob: str) -> bool:
    """Tell whether a glob matches the whole name, or one of the modules that it is in."""
    return any(fnmatch.fnmatchcase(path, glob) for path in (name, *_modules_of(name)))


def _hint(names: Sequence[str], glob: str) -> str:
    """Suggest globs that would choose something."""
    if any(_is_chosen(name, f"*.{glob}") for name in names):
        return f", though '*.{glob}' would"
    paths = dict.fromkeys(path for name in names for path in (name, *_modules_of(name)))
    found = similar(glob, paths, cutoff=0.8)
    return f", though {few(map(repr, found))} would" if found else ""


def similar(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Give up to three names that are like one. Of very many, those that begin or end as it does.

    Args:
        name: what they are like.
        names: to choose from.
        cutoff: least likeness, from 0 to 1, as `difflib.get_close_matches` measures it.
    """
    candidates = list(names)
    if len(candidates) > 2 * _NEIGHBOURS:  # each takes some 0.1 ms
        ends = _neighbours(name[::-1], [each[::-1] for each in candidates])
        candidates = [*{*_neighbours(name, candidates), *(each[::-1] for each in ends)}]
    return difflib.get_close_matches(name, candidates, cutoff=cutoff)


def suggestion(name: str, names: Iterable[str]) -> str:
    """Ask whether one of the names that are like a wrong one is meant; empty if none is."""
    found = similar(name, names)
    return f"is it one of these: {', '.join(found)}?" if found else ""


def _neighbours(name: str, names: Iterable[str]) -> list[str]:
    """Give the names around one in alphabetical order."""
    ordered = sorted(names)
    place = bisect.bisect(ordered, name)
    return ordered[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]


def _modules_of(name: str) -> list[str]:
    """Give the modules that a name is in: for ``a.b.c``, ``a`` and ``a.b``."""
    return [name[:position] for position, letter in enumerate(name) if letter == "."]
