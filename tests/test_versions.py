"""What torch 2.2, 2.6 and 2.15 wrote is read as they read it, by whatever torch runs.

`tests/data/write.py` wrote the files, and beside them what each torch itself loads of its own.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anemoi_ckpt import MissingPackageError, load, peek, save
from described import described

# torch warns of complex32 (experimental) and of quantized tensors (deprecated) as it makes them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FILES = sorted(Path(__file__).parent.glob("data/torch-*/*.pt"))
INERT = re.compile(r"inert [\w.]+")
TENSOR = re.compile(r"(\w+ \([\d, ]*\)) .*")


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


# ── what is right ─────────────────────────────────────────────────────────────────────────────


def truth_of(path: Path) -> dict[str, str]:
    """What the torch that wrote it has loaded, see `described`."""
    truth: dict[str, str] = json.loads((path.parent / "truth.json").read_text("utf-8"))[path.stem]
    return truth


def is_newer(where: str, line: str) -> bool:
    """Whether a line tells of a dtype that the running torch or numpy does not have."""
    name = where.rpartition(".")[2]
    newer_torch = re.match(rf"(dtype torch\.)?{re.escape(name)}\b", line)
    if name and newer_torch:
        return not hasattr(torch, name)
    return "StringDType" in line and not hasattr(np.dtypes, "StringDType")


def right(loaded: dict[str, str], truth: dict[str, str]) -> dict[str, str]:
    """The truth, where classes that are foreign and dtypes that are newer may be inert data."""
    inert = {
        where: loaded[where]
        for where, line in truth.items()
        if INERT.fullmatch(loaded.get(where, ""))
        and (line.startswith("foreign ") or is_newer(where, line))
    }
    within = tuple(f"{where}." for where in inert)
    return {
        where: inert.get(where, line)
        for where, line in truth.items()
        if not where.startswith(within)
    }


def assert_right(checkpoint: Any, path: Path) -> None:
    loaded, truth = described(checkpoint), truth_of(path)
    assert list(loaded.items()) == list(right(loaded, truth).items())


@contextmanager
def skip_newer(path: Path) -> Iterator[None]:
    """Skip the test where an error says, rightly, that a tensor's dtype takes a newer torch."""
    try:
        yield
    except MissingPackageError as err:
        assert any(is_newer(*item) for item in truth_of(path).items())
        assert re.search(r"has no dtype torch\.\w+; install torch>=2", str(err))  # noqa: PT017 - or nothing is raised
        pytest.skip(str(err))


def read(path: Path, *strategies: Any) -> Any:
    """Load a file, or skip the test where `skip_newer` does, or numpy has none of its dtypes."""
    if path.stem == "text_arrays" and not hasattr(np.dtypes, "StringDType"):
        pytest.skip("numpy 1 has no StringDType")
    with skip_newer(path):
        checkpoint = load(path, *strategies)
    # The truth is what TorchScript itself tells of a module: a plain dict.
    return dict(checkpoint) if path.stem == "torchscript" else checkpoint


# ── and is read ───────────────────────────────────────────────────────────────────────────────


def test_all_versions_have_their_files() -> None:
    counts = {folder.name: len(list(folder.glob("*.pt"))) for folder in {f.parent for f in FILES}}
    assert counts == {"torch-2.2": 13, "torch-2.6": 16, "torch-2.15": 17}


def test_what_is_loaded(path: Path) -> None:
    assert_right(read(path), path)


def test_what_is_loaded_through_a_strategy(path: Path) -> None:
    assert_right(read(path, lambda checkpoint: checkpoint), path)


def test_what_peek_tells(path: Path) -> None:
    with skip_newer(path):
        contents = peek(path)
    told = {
        f"{tensor.key}.{tensor.name}".strip("."): f"{tensor.dtype} {tensor.shape}"
        for tensor in contents.tensors
    }
    truth = truth_of(path)
    nested = tuple(f"{where}." for where, line in truth.items() if line.endswith(" nested"))
    for where, line in truth.items():
        tensor = TENSOR.fullmatch(line)
        # parts of a tensor, and its attributes; of a nested one, peek tells all values as one
        hidden = "()" in where or "__dict__" in where or where.startswith(nested)
        if tensor and not hidden and not is_newer(where, line):
            assert told[where] == f"torch.{tensor[1]}"


def test_what_is_saved_and_loaded_again(path: Path, tmp_path: Path) -> None:
    loaded = read(path)
    save(loaded, tmp_path / "again.pt")
    assert list(described(load(tmp_path / "again.pt")).items()) == list(described(loaded).items())
