"""What is built and installed: types that checkers see, one module of two names, a whole sdist."""

import importlib
import importlib.metadata
import os
import pickle
import shutil
import subprocess
import sys
import types
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import anemoi_ckpt
import needs
import strategies

ROOT = Path(anemoi_ckpt.__file__).parent
NOT_SOURCES = (".git", ".nox", ".*_cache", ".venv*", "__pycache__", "node_modules", "build")
NOT_SOURCES += ("*.egg-info", "*-stubs", ".hypothesis", ".coverage*")


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What a program says, which has to succeed; it finds no module by our PYTHONPATH."""
    variables = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "MYPYPATH"}}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**variables, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(folder: Path) -> Path:
    """A copy of the checkout, to build in."""
    needs.package("setuptools.build_meta", "pip install setuptools")
    ignored = shutil.ignore_patterns(*NOT_SOURCES)

    def ignore(parent: str, names: list[str]) -> set[str]:
        """Leave out virtual environments, too, whatever they are called."""
        return ignored(parent, names) | {n for n in names if Path(parent, n, "pyvenv.cfg").exists()}

    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in paths}


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the packages of this one, and ours from a build."""
    folder = tmp_path_factory.mktemp(request.param)
    sources = copy_sources(folder / "sources")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python3*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others))
    pip = [python, "-m", "pip"]
    options = ["-q", "--no-deps", "--no-build-isolation"]
    if request.param == "editable":
        run(*pip, "install", *options, "-e", sources, cwd=folder)
        (path,) = packages.glob("__editable__*")
        assert path.read_text().strip() == str(sources)  # a plain path, no import hook
    else:
        run(*pip, "wheel", *options, "-w", folder, sources, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_it_runs_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    code = "import anemoi_ckpt as a, strategies as s; print(a.__version__, a.strategies is s)"
    assert run(installed, "-c", code, cwd=tmp_path).split() == [anemoi_ckpt.__version__, "True"]


USERS_CODE = """
import anemoi_ckpt
import anemoi_ckpt.strategies as ours
import strategies
from anemoi_ckpt import load_into, peek
from anemoi_ckpt.strategies import include

reveal_type(load_into)
reveal_type(peek("a.ckpt"))
reveal_type(include("a"))
reveal_type(ours.exclude("a"))
reveal_type(anemoi_ckpt.strategies.drop("a"))
reveal_type(strategies.freeze)
reveal_type(anemoi_ckpt.__version__)
anemoi_ckpt.lod("a.ckpt")  # type: ignore[attr-defined]
include(1)  # type: ignore[arg-type]
"""
# mypy --strict calls an `ignore` that ignores nothing an error.
TYPES = [
    "-> _anemoi_ckpt.report.Report",
    "_anemoi_ckpt.contents.Contents",
    *["_anemoi_ckpt.steps.Step"] * 3,
    "*globs: str) -> list[str]",
    '"str"',
]


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What mypy has read of torch, which takes it a minute, for the tests here."""
    return {"MYPY_CACHE_DIR": str(tmp_path_factory.mktemp("mypy"))}


@pytest.mark.timeout(1800)
def test_type_checkers_see_types(installed: Path, mypy_cache, tmp_path: Path) -> None:
    needs.package("mypy", "pip install mypy")
    (tmp_path / "mine.py").write_text(USERS_CODE)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed]
    said = run(*mypy, "mine.py", cwd=tmp_path, env=mypy_cache).splitlines()
    assert said[-1].startswith("Success")
    for text, line in zip(TYPES, said[:-1], strict=True):
        assert text in line


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_the_stubs_say_what_is_there(installed: Path, mypy_cache, tmp_path: Path) -> None:
    needs.package("mypy", "pip install mypy")
    stubtest = [installed, "-m", "mypy.stubtest", "anemoi_ckpt", "strategies"]
    assert run(*stubtest, cwd=tmp_path, env=mypy_cache).startswith("Success")


def test_the_version() -> None:
    assert anemoi_ckpt.__version__ == importlib.metadata.version("anemoi-ckpt")
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = anemoi_ckpt.lod


def test_an_sdist_holds_what_pytest_needs(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "anemoi-ckpt")
    needed = files_in(sources)
    build = "import setuptools.build_meta as b; b.build_sdist(r'" + str(tmp_path) + "')"
    run(sys.executable, "-c", build, cwd=sources)
    (sdist,) = tmp_path.glob("*.tar.gz")
    run("tar", "-xf", str(sdist), cwd=tmp_path)
    (unpacked,) = tmp_path.glob("anemoi_ckpt-*/")
    assert needed - files_in(unpacked) == set()
    run(sys.executable, "-m", "pytest", "-q", "--collect-only", "tests", cwd=unpacked)


# ── anemoi_ckpt.strategies ────────────────────────────────────────────────────────────────────

USES = {
    "ours first": "import anemoi_ckpt.strategies as s; from anemoi_ckpt.strategies import include",
    "an attribute": "import anemoi_ckpt; s = anemoi_ckpt.strategies; include = s.include",
    "the other first": "import strategies; from anemoi_ckpt import strategies as s; "
    "include = s.include",
}
HIDING = {
    "nothing": "",
    "a module": "strategies.py",
    "a package": "strategies/__init__.py",
    "a folder": "strategies/notes.py",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("hiding", HIDING)
def test_ours_has_a_name_that_nothing_hides(use: str, hiding: str, tmp_path: Path) -> None:
    if hiding != "nothing":
        (tmp_path / HIDING[hiding]).parent.mkdir(exist_ok=True)
        (tmp_path / HIDING[hiding]).write_text("MINE = True\n")
    code = (
        f"{USES[use]}\nimport strategies, anemoi_ckpt, pickle\n"
        "assert repr(include('a')) == \"include('a')\"\n"
        "assert pickle.loads(pickle.dumps(include)) is include\n"
        "assert pickle.loads(pickle.dumps(s.prefer_ema)) is s.prefer_ema\n"
        "assert s is anemoi_ckpt.strategies\n"
        "print(hasattr(strategies, 'MINE'), strategies is s)"
    )
    is_hidden = hiding in {"a module", "a package"}  # a module beats a folder without __init__
    said = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert said.split() == [str(is_hidden), str(not is_hidden)]


def test_a_strategy_is_unpickled_where_ours_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "strategies.py").write_text("")
    both = strategies.compose(strategies.include("a"), strategies.prefer_ema, strategies.weights)
    (tmp_path / "strategy.pickle").write_bytes(pickle.dumps(both))
    code = "import pickle; print(pickle.load(open('strategy.pickle', 'rb')))"
    said = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert said.strip() == repr(both)


def test_hydra_finds_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    instantiate = needs.package("hydra.utils", "pip install hydra-core").instantiate
    monkeypatch.setitem(sys.modules, "strategies", types.ModuleType("strategies"))  # the user's
    choose = instantiate({"_target_": "anemoi_ckpt.strategies.include", "_args_": ["a"]})
    assert set(choose({"a": torch.ones(1), "b": torch.ones(1)})) == {"a"}


@pytest.mark.parametrize("loaded", ["ours", "not yet", "the user's"])
def test_both_names_are_one_module(loaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "anemoi_ckpt.strategies")
    monkeypatch.delattr(anemoi_ckpt, "strategies", raising=False)
    if loaded == "not yet":
        monkeypatch.delitem(sys.modules, "strategies")
    elif loaded == "the user's":
        monkeypatch.setitem(sys.modules, "strategies", types.ModuleType("strategies"))
    ours = importlib.import_module("anemoi_ckpt.strategies")
    assert ours.__file__ == str(ROOT / "strategies.py")
    assert (ours is sys.modules["strategies"]) == (loaded != "the user's")
    assert (ours is strategies) == (loaded == "ours")
