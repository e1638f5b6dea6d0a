"""Trees and bars, as text and as HTML for notebooks: no script, no dependency, nothing fetched.

Colours are the theme's own, or are readable on a light and on a dark ground. What is drawn is
bounded: a checkpoint can have any number of tensors, and a notebook keeps all that it is given.

grow · bound · text · html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from attrs import evolve, field, frozen

from _anemoi_ckpt.errors import harmless
from _anemoi_ckpt.tables import escaped

ROWS = 2000  # of a tree, at most; what is beyond is counted
_CHILDREN = 500  # of one branch, at most, so that others have rows, too
_LEVELS = 32  # what is deeper keeps dots in its name: a hostile name has any number of them
_CELLS = 10  # of a bar of text
_T = TypeVar("_T")
_R = TypeVar("_R")


@frozen
class Branch:
    """What is drawn as one row, and the rows beneath it."""

    name: str = ""
    note: str = ""
    share: float | None = None  # of the bar, from 0 to 1; None for no bar
    children: Sequence[Branch] = ()


# ── grow ──────────────────────────────────────────────────────────────────────────────────────


@frozen
class _Node:
    leaves: list[object] = field(factory=list)
    below: dict[str, _Node] = field(factory=dict)


def grown(
    leaves: Iterable[tuple[str, _T]], make: Callable[[str, Sequence[_T], Sequence[_R]], _R]
) -> _R:
    """Make a tree of leaves by their names, from its leaves to its root.

    Args:
        leaves: names, with dots between their parts, and what they name.
        make: called with the part of a name, what has just this name, and what was made of the
            names that go on.

    >>> grown([("a.x", 1), ("a.y", 2), ("b", 3)], lambda _, own, below: sum((*own, *below)))
    6
    """
    root = _Node()
    for name, leaf in leaves:
        node = root
        for part in name.split(".", _LEVELS) if name else ():
            node = node.below.setdefault(part, _Node())
        node.leaves.append(leaf)
    return _made("", root, make)


def _made(name: str, node: _Node, make: Callable[[str, Sequence[_T], Sequence[_R]], _R]) -> _R:
    below = [_made(part, each, make) for part, each in node.below.items()]
    own: Sequence[_T] = node.leaves  # type: ignore[assignment] # they are what the caller gave
    return make(name, own, below)


# ── bound ─────────────────────────────────────────────────────────────────────────────────────


def joined(branch: Branch) -> Branch:
    """Draw a branch with a single child, which is a branch itself, and that child as one row."""
    row = _joined(branch)
    return evolve(row, name=row.name or "all")


def _joined(branch: Branch) -> Branch:
    name = branch.name
    while len(branch.children) == 1 and branch.children[0].children:
        branch = branch.children[0]
        name = ".".join(filter(None, (name, branch.name)))
    return evolve(branch, name=name, children=[*map(_joined, branch.children)])


def bounded(branch: Branch, rows: int = ROWS) -> Branch:
    """Keep the rows that are nearest to the root, and count the others where they were."""
    kept: dict[int, int] = {}
    level = [branch]
    for each in level:  # it grows: nearest first
        kept[id(each)] = min(len(each.children), rows, _CHILDREN)
        rows -= kept[id(each)]
        level.extend(each.children[: kept[id(each)]])
    return _cut(branch, kept)


def _cut(branch: Branch, kept: dict[int, int]) -> Branch:
    count = kept[id(branch)]
    children = [_cut(each, kept) for each in branch.children[:count]]
    left = len(branch.children) - count
    return evolve(branch, children=children + [Branch(f"… and {left} more")] * bool(left))


# ── text ──────────────────────────────────────────────────────────────────────────────────────


def as_text(branches: Iterable[Branch]) -> list[str]:
    r"""Draw branches as lines: an indented name, a bar and a note.

    >>> print(*as_text([Branch("a", "all", 1.0, [Branch("b", "half", 0.5)])]), sep="\n")
    a    ██████████  all
      b  █████       half
    """
    rows = [row for branch in branches for row in _lines(branch, "")]
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"{name:<{width}}  {bar:<{_CELLS}}  {note}".rstrip() for name, bar, note in rows]


def _lines(branch: Branch, indent: str) -> list[tuple[str, str, str]]:
    row = (indent + harmless(branch.name), text_bar(branch.share), harmless(branch.note))
    below = (line for child in branch.children for line in _lines(child, indent + "  "))
    return [row, *below]


def text_bar(share: float | None, rest: str = "") -> str:
    """Draw a bar; of what is little, but not nothing, a thin one.

    >>> text_bar(0.52), text_bar(0.001), text_bar(0.3, rest="░")
    ('█████', '▏', '███░░░░░░░')
    """
    drawn = ("█" * round(share * _CELLS) or "▏") if share else ""
    return drawn + rest * (_CELLS - len(drawn))


# ── html ──────────────────────────────────────────────────────────────────────────────────────

# Blue and ochre with 3:1 or better against white and against black (WCAG 2.2, 1.4.11).
_STYLE = """<style>
.anemoi-ckpt{max-width:60em;color:inherit}
.anemoi-ckpt summary{cursor:pointer}
.anemoi-ckpt details>div{margin-left:1.2em}
.anemoi-ckpt .leaf{padding-left:1.05em}
.anemoi-ckpt .row{display:inline-flex;width:calc(100% - 1.5em);gap:1em;align-items:center}
.anemoi-ckpt .leaf .row{width:calc(100% - .45em)}
.anemoi-ckpt .row>span{flex:1;overflow-wrap:anywhere;font-family:monospace}
.anemoi-ckpt .row>small{width:28em;overflow-wrap:anywhere}
.anemoi-ckpt .bar{display:inline-block;height:.7em;background:rgba(128,128,128,.25);width:24em}
.anemoi-ckpt .row>.bar{flex:none;width:8em}
.anemoi-ckpt .bar>i{display:block;float:left;height:100%;background:#4a86cf}
.anemoi-ckpt .bar>i+i{background:#b07a1c}
</style>"""


def captioned(text: str) -> str:
    """Tell what a picture shows."""
    return f"<p>{escaped(text)}</p>"


def page(*parts: str) -> str:
    """Put parts of HTML together, with the style that they need."""
    return f'<div class="anemoi-ckpt">{_STYLE}{"".join(parts)}</div>'


def bar(*shares: float) -> str:
    """Draw a bar of shares, one beside the other."""
    filled = "".join(f'<i style="width:{min(max(s, 0), 1):.1%}"></i>' for s in shares)
    return f'<span class="bar">{filled}</span>'


def as_tree(branch: Branch) -> str:
    """Draw a branch as rows that unfold; those right beneath it are there at once."""
    return _unfolding(bounded(joined(branch)), is_open=True)


def _unfolding(branch: Branch, *, is_open: bool = False) -> str:
    drawn = "" if branch.share is None else bar(branch.share)
    row = f"<span>{escaped(branch.name)}</span>{drawn}<small>{escaped(branch.note)}</small>"
    if not branch.children:
        return f'<div class="leaf"><span class="row">{row}</span></div>'
    below = "".join(map(_unfolding, branch.children))
    start = "<details open>" if is_open else "<details>"
    return f'{start}<summary><span class="row">{row}</span></summary><div>{below}</div></details>'
