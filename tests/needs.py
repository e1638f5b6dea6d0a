"""What a test needs that may not be here: packages, and servers that are no packages.

On one's own machine such a test is skipped.  In CI (`CI=true`) it fails: a suite that skips what it
was to test is green for nothing.  Excepted is what ANEMOI_CKPT_TESTS_WITHOUT names, with commas
between: there `noxfile.py` says, with reasons, what a session does without.
"""

import importlib
import inspect
import os
import shutil
from typing import Any, NoReturn

import pytest
import torch
import urllib3

SAFE = torch.__version__ >= (2, 6)
"""Whether `torch.load(weights_only=True)` knows all that the tests write; else they do without."""
with_crc32_options = pytest.mark.skipif(
    not hasattr(torch.serialization, "set_crc32_options"), reason="this torch writes all checksums"
)
with_urllib3_2 = pytest.mark.skipif(
    urllib3.__version__ < "2", reason="urllib3 1.26 tells auditors nothing"
)
with_fsdp2 = pytest.mark.skipif(torch.__version__ < (2, 6), reason="FSDP2 came with torch 2.6")


def package(name: str, install: str) -> Any:
    """The module of this name, or one beneath it; `install` is what to do where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as err:
        give_up(name.partition(".")[0], err, f"{name} is missing: {install}")


def program(name: str, install: str) -> str:
    """The path of a program; `install` is what to do where it is missing."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        give_up(name, FileNotFoundError(name), f"{name} is missing: {install}")
    return path


def anemoi() -> None:
    """anemoi-models, in the version whose models the tests build."""
    interface = package("anemoi.models.interface", "pip install -e '.[anemoi]'")
    if "n_step_input" in inspect.signature(interface.AnemoiModelInterface).parameters:
        reason = "anemoi-models is newer than 0.13, whose models these tests build"
        give_up("anemoi", ImportError(reason), reason)


def anemoi_sorting_edges() -> None:
    """anemoi-models from 0.16 on, which sorts edges; `noxfile.py` installs it after the others."""
    provider = package("anemoi.models.layers.graph_provider", "pip install -e '.[anemoi]'")
    if not hasattr(provider.StaticGraphProvider, "_TRAINABLE_LAYOUT_VERSION"):
        pytest.skip("anemoi-models is older than 0.16", allow_module_level=True)


def give_up(what: str, err: Exception, reason: str) -> NoReturn:
    """Skips the test (or the module that is being collected), or fails, in CI."""
    without = os.environ.get("ANEMOI_CKPT_TESTS_WITHOUT", "").split(",")
    if os.environ.get("CI") == "true" and what not in without:
        raise err
    pytest.skip(reason, allow_module_level=True)
