"""The table of private names in CONTRIBUTING.md is that of the code, and each has its test."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import _anemoi_ckpt
import anemoi_ckpt

ROOT = Path(anemoi_ckpt.__file__).parent
ROOMS = [ROOT / "anemoi_ckpt.py", ROOT / "strategies.py", *(ROOT / "_anemoi_ckpt").rglob("*.py")]
TREES = [ast.parse(path.read_text("utf-8")) for path in ROOMS]
ROWS = re.findall(
    r"^\| (`.*?) \|.*\| `(.*?)` \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE
)
FIELDS = {"_replace"}  # of named tuples and urlsplit's results: documented


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> Iterator[str]:
    """What our own code defines: functions, classes, variables, attributes."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(name)) if name.startswith("_inert_"):
                yield name


def foreign_names() -> Iterator[str]:
    """Private names that our code uses and does not define."""
    own = {*own_names(), *FIELDS}
    for node in (node for tree in TREES for node in ast.walk(tree)):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                if is_private(name):  # our class overrides it
                    yield name
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield name
            case ast.keyword(arg=str(name)) if is_private(name) and name not in own:
                yield name
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                if is_private(name) and name not in own:
                    yield name
            case ast.ImportFrom(module=str(module), names=names):
                if not module.startswith("_anemoi_ckpt"):
                    yield from (each.name for each in names if is_private(each.name))
                    yield from [module] * any(map(is_private, module.split(".")))


def test_each_private_name_is_in_the_table() -> None:
    listed = {name for row, _ in ROWS for name in re.findall("`(.*?)`", row)}
    assert listed == set(foreign_names())


def room_of(path: Path) -> str:
    """Name the room that a module of the private package belongs to: the first name below it."""
    return path.relative_to(ROOT / "_anemoi_ckpt").with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Name the rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.ImportFrom(module="_anemoi_ckpt", names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module)) if module.startswith("_anemoi_ckpt."):
                yield module.split(".")[1]


def test_rooms_import_only_from_those_below() -> None:
    """The map is the docstring of the private package."""
    order = re.findall("``([a-z]+)``", str(_anemoi_ckpt.__doc__))
    paths = [p for p in (ROOT / "_anemoi_ckpt").rglob("*.py") if room_of(p) != "__init__"]
    assert sorted(order) == sorted({*map(room_of, paths)})
    for path in paths:
        room = order.index(room_of(path))
        above = [each for each in imports_of(path) if order.index(each) < room]
        assert not above, f"{path.name} imports {above}"


def test_each_row_names_a_test_that_is_there() -> None:
    for _, test in ROWS:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text("utf-8"), test
