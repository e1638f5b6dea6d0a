"""How results show themselves: rows of a heading and a line, as text and in notebooks."""

from __future__ import annotations

import functools
import html
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from attrs import fields

from _anemoi_ckpt.errors import harmless, redact

LINES = 6  # of a section, at most


class Table(ABC):
    """Something that prints as rows of a heading and a line."""

    __slots__ = ()

    @abstractmethod
    def _rows(self) -> list[tuple[str, str]]:
        """Give the rows; an empty heading goes on with the one above."""

    def __repr__(self) -> str:
        """Show the table."""
        rows = [(harmless(heading), harmless(line)) for heading, line in self._rows()]
        width = max(len(heading) for heading, _ in rows)
        return "\n".join(f"{heading:<{width}}  {line}".rstrip() for heading, line in rows)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return as_html(self._rows())

    def as_dict(self) -> Any:
        """Give the fields as plain data, which JSON has, too."""
        return plain(self)


def as_html(rows: Iterable[tuple[str, str]]) -> str:
    """Write rows of a heading and a line as a table; whatever is in them stays text."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escaped(heading)}</th>"
        f"<td style='text-align:left'><code>{escaped(line)}</code></td></tr>"
        for heading, line in rows
    )
    return f"<table>{cells}</table>"


def escaped(text: str) -> str:
    """Escape a text for HTML."""
    return html.escape(harmless(text))


@functools.singledispatch
def plain(value: Any) -> Any:
    """Give a value as dicts, lists, texts and numbers; what has no such form is printed."""
    return redact(str(value))


@plain.register(type(None))
@plain.register(int)
@plain.register(str)
def _plain_scalar(value: Any) -> Any:
    return value


@plain.register
def _plain_float(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no others


@plain.register(Mapping)
def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain(each) for key, each in value.items()}


@plain.register(tuple)
@plain.register(list)
@plain.register(set)
@plain.register(frozenset)
def _plain_list(value: Iterable[Any]) -> list[Any]:
    return [plain(each) for each in value]


@plain.register
def _plain_time(value: datetime) -> str:
    return value.isoformat()


@plain.register
def _plain_dtype(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")


@plain.register(Table)
def plain_fields(value: Any) -> dict[str, Any]:
    """Give the fields of a result."""
    return {each.name: plain(getattr(value, each.name)) for each in fields(type(value))}


def section(heading: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Give the rows of a section, cut where it is long."""
    more = [f"… and {len(lines) - LINES} more"] if len(lines) > LINES else []
    first, *others = [*lines[:LINES], *more] or [""]
    return [(heading, first), *(("", line) for line in others)]


def folded(names: Iterable[str]) -> list[str]:
    """Fold runs of names that differ in one number alone.

    >>> folded([f"layers.{i}.{kind}" for i in range(24) for kind in ("weight", "bias")])
    ['layers.{0…23}.weight', 'layers.{0…23}.bias']
    """
    rows = [tuple(str(name).split(".")) for name in names]
    for place in range(max(map(len, rows), default=0)):
        runs: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for row in rows:
            numbered = place < len(row) and row[place].isdecimal()
            around = (row[:place], row[place + 1 :]) if numbered else (row, ())
            runs.setdefault(around, []).append(row[place] if numbered else "")
        rows = [
            (*start, *_run(numbers), *end) if numbers[0] else start
            for (start, end), numbers in runs.items()
        ]
    return [".".join(row) for row in rows]


def _run(numbers: Sequence[str]) -> Sequence[str]:
    first, last = int(numbers[0]), int(numbers[-1])
    if len(numbers) == 1:
        return numbers
    consecutive = [int(number) for number in numbers] == list(range(first, last + 1))
    return [f"{{{first}…{last}}}" if consecutive else f"{{{','.join(numbers)}}}"]


def sized(count: int) -> str:
    """Write a count of bytes as people read it.

    >>> sized(537_000_000), sized(12)
    ('537 MB', '12 B')
    """
    size, *larger = float(count), "kB", "MB", "GB", "TB"
    unit = "B"
    while size >= 999.5 and larger:  # noqa: PLR2004 - what rounds to four digits
        size, unit = size / 1000, larger.pop(0)
    return f"{size:.3g} {unit}"
