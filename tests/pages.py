"""README and the pages of docs, for the tests that run what they show."""

import re
from pathlib import Path

import anemoi_ckpt

ROOT = Path(anemoi_ckpt.__file__).parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
ALL = "\n".join(PAGES.values())
_FENCES = re.compile(r"(?:<!-- test: (\w+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def fences(text: str) -> list[tuple[str, str, str]]:
    """Give the blocks of a page: the mark of the test that runs it, or "", language and text."""
    return _FENCES.findall(text)


def marked(mark: str) -> str:
    """Give the one block that has a test of its own."""
    (block,) = [text for each, _, text in fences(ALL) if each == mark]
    return block
