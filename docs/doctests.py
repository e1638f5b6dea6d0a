"""Shows the doctests of docstrings as code, on the reference pages.

`mkdocstrings` takes a docstring for Markdown, in which ``>>>`` begins a quotation.
"""

import re
from typing import Any

from griffe import Extension, Object

_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # up to an empty line


class Doctests(Extension):
    """An extension of griffe, which reads the docstrings."""

    def on_object(self, *, obj: Object, **_others: Any) -> None:
        """Put the doctests of an object's docstring into blocks of code."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """Put doctests into blocks of code."""
    return _DOCTEST.sub(r"```pycon\n\g<0>\n```", docstring)
