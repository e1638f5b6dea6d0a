"""Which checkpoints there are: a listing, of which a glob chooses.

A glob is written as the shell has it: ``*`` and ``?`` stand for characters of one name, ``[ab]``
for one of some, and ``**`` for any part of a path.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _anemoi_ckpt.errors import redact
from _anemoi_ckpt.places import (
    CHECKPOINTS,
    URI,
    Entry,
    check_params,
    parse_folder,
    parse_uri,
    path_of,
    sibling,
)
from _anemoi_ckpt.tables import Table, plain, plain_fields, sized
from _anemoi_ckpt.transport import Transport, listed


class Entries(Table, list[Entry]):
    """What a listing tells of objects and folders, in the order of their paths.

    A list, which prints as a table, in notebooks, too.
    """

    def _rows(self) -> list[tuple[str, str]]:
        total = sized(sum(each.size or 0 for each in self))
        rows = [
            (
                redact(str(each.uri)),
                "" if each.is_folder else f"{sized(each.size or 0):>8}  {_time_of(each)}",
            )
            for each in self
        ]
        return [*rows, (f"{len(self)} found", f"{total:>8}")]

    def as_dict(self) -> Any:
        """Give a list of plain data, as JSON has it."""
        return [plain(each) for each in self]


plain.register(Entry, plain_fields)


def _time_of(entry: Entry) -> str:
    return f"{entry.modified:%Y-%m-%d %H:%M:%S}" if entry.modified else ""


def found(pattern: str | os.PathLike[str] | URI, transport: Transport) -> Iterator[Entry]:
    """Give the objects that a glob chooses, page by page as the place lists them.

    Args:
        pattern: a path or URL with a glob in it; or a folder, for all checkpoints beneath it.
        transport: how the place is reached.

    Raises:
        CheckpointError: the place cannot be listed.
    """
    chooses: Callable[[str], object]
    if not is_glob(pattern):
        beginning, recursive, chooses = parse_folder(pattern), True, _is_named_so
    else:
        beginning = _beginning(str(pattern))
        path = path_of(parse_uri(pattern))
        glob = path[len(path_of(beginning)) :]
        recursive = "/" in glob or "**" in glob
        chooses = re.compile(_as_regex(path), re.DOTALL).fullmatch
    check_params(beginning, transport.params)
    for entry in listed(beginning, transport, recursive=recursive):
        if not entry.is_folder and chooses(path_of(entry.uri)):
            yield entry


def is_glob(pattern: object) -> bool:
    """Tell whether a place has wildcards in it, and is no path that is there."""
    text = os.fspath(pattern) if isinstance(pattern, os.PathLike) else pattern
    return isinstance(text, str) and _first_magic(text) >= 0 and not Path(text).exists()


def _is_named_so(path: str) -> bool:
    return path.endswith(CHECKPOINTS)


def _first_magic(text: str) -> int:
    """Tell where a glob begins; -1 if there is none. In a URL, a question mark begins a query."""
    plain = text.partition("?")[0] if "://" in text else text
    found = re.search(r"[*?[]", plain)
    return found.start() if found else -1


def _beginning(text: str) -> URI:
    """Give what the paths that a glob chooses begin with: a store lists no others."""
    query = "".join(text.partition("?")[1:]) if "://" in text else ""
    folder, slash, name = text[: _first_magic(text)].rpartition("/")
    return sibling(parse_folder((folder or "/") + query) if slash else parse_uri("-"), name)


def _as_regex(glob: str) -> str:
    r"""Translate a glob.

    >>> _as_regex("run/**/epoch=*.ckpt")
    'run/(?:.*/)?epoch=[^/]*\\.ckpt'
    """
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", glob)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(part)
        or ("(?!/)" + fnmatch.translate(part)[4:-3] if part[:1] == "[" else re.escape(part))
        for part in parts
    )
