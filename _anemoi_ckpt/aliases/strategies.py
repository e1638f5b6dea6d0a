"""The name `anemoi_ckpt.strategies`: our `strategies.py`, whatever else is called so on the path.

A user's own ``strategies.py`` or ``strategies/`` hides ours from ``import strategies``. Where it
does not, both names are one module. This file gives way to the module that it finds.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import cast

_OURS = Path(__file__).resolve().parents[2] / "strategies.py"


def _is_hidden() -> bool:
    """Tell whether `import strategies` gives another module than ours, or none."""
    loaded = sys.modules.get("strategies")
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
    else:
        spec = importlib.util.find_spec("strategies")
        file = None if spec is None else spec.origin
    return file is None or Path(file).resolve() != _OURS


def _from_file() -> ModuleType:
    loader = SourceFileLoader(__name__, str(_OURS))
    spec = importlib.util.spec_from_file_location(__name__, _OURS, loader=loader)
    module = importlib.util.module_from_spec(cast(ModuleSpec, spec))  # the loader is given
    sys.modules[__name__] = module
    loader.exec_module(module)
    return module


# What the import system then gives for this name.
sys.modules[__name__] = _from_file() if _is_hidden() else importlib.import_module("strategies")
