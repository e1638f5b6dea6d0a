"""Show the doctests of our docstrings as code: they stand there without a heading of their own."""

import textwrap
from typing import Any

import griffe

PROMPT = ">>> "


def with_heading(docstring: str) -> str:
    """Put the doctests at the end of a docstring below the heading of Google's style."""
    before, prompt, doctests = docstring.partition(f"\n{PROMPT}")
    code, see, after = doctests.partition("\n\nSee Also:")
    if not prompt:
        return docstring
    indented = textwrap.indent(f"{PROMPT}{code}", " " * 4)
    return f"{before}\nExamples:\n{indented}\n{see}{after}"


class Doctests(griffe.Extension):
    """Changes docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = with_heading(obj.docstring.value)
