"""Anemoi's own migrations: scripts of anemoi-models that bring a checkpoint up to date.

``anemoi.models.migrations.scripts`` has a module for each, whose name begins with a time, and whose
`migrate` takes and gives a checkpoint. A checkpoint lists those that it needs no more under
``migrations``. The scripts change dicts, and no tensor's values: they run on a hollow checkpoint.

see · run
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from _anemoi_ckpt.anatomy import like
from _anemoi_ckpt.errors import UNPLACED, MismatchError, MissingPackageError
from _anemoi_ckpt.pickles.editable import editable, inert

_PACKAGE = "anemoi.models.migrations"
_KEY = "migrations"  # of a checkpoint
_NAME = re.compile(r"\d+_\w+")  # of a script: a time, and what it does


# ── see ───────────────────────────────────────────────────────────────────────────────────────


def registered(checkpoint: Any) -> list[str] | None:
    """Give the names of the migrations that a checkpoint needs no more; None if it has no list."""
    entries = checkpoint.get(_KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        return None
    return [str(entry.get("name")) for entry in entries]


def missing(checkpoint: Any) -> tuple[str, ...]:
    """Give the names of the installed migrations that a checkpoint has not had; none if unknown."""
    known = registered(checkpoint)
    return () if known is None else tuple(name for name in _installed() if name not in known)


def _installed() -> list[str]:
    """List the scripts of the installed anemoi-models, oldest first; imports none of it."""
    spec = importlib.util.find_spec(_PACKAGE.partition(".")[0])
    folders = [Path(each, "models", "migrations", "scripts") for each in _locations(spec)]
    names = {path.stem for folder in folders for path in folder.glob("*.py")}
    return sorted(filter(_NAME.fullmatch, names))


def _locations(spec: Any) -> list[str]:
    return list(getattr(spec, "submodule_search_locations", None) or ())


# ── run ───────────────────────────────────────────────────────────────────────────────────────


def migrated(checkpoint: Any, to: torch.nn.Module | str | None) -> Any:
    """Run the migrations that a checkpoint has not had.

    Args:
        checkpoint: the checkpoint, which is not modified.
        to: the version of anemoi-models to migrate to; or a model, which some scripts ask.

    Raises:
        MismatchError: the checkpoint lists no migrations, or some that are not installed.
        MissingPackageError: there is no anemoi-models with migrations.
    """
    entries = _entries()
    known = registered(checkpoint)
    if known is None or not isinstance(checkpoint.get("hyper_parameters"), Mapping):
        raise MismatchError(
            UNPLACED,
            "it lists no migrations, as Anemoi's training checkpoints do",
            "migrate one that is older than that with the anemoi-models that wrote it",
        )
    newer = [name for name in known if name not in entries]
    if newer:
        raise MismatchError(
            UNPLACED,
            f"it has had migrations that the installed anemoi-models does not have: {newer}",
            "install a newer anemoi-models",
        )
    wanted = [name for name in entries if name not in known and _is_up_to(entries[name], to)]
    if not wanted:
        return checkpoint
    result = _open(checkpoint)
    for name in wanted:
        migrate = importlib.import_module(f"{_PACKAGE}.scripts.{name}").migrate
        takes_model = "model" in inspect.signature(migrate).parameters
        has_model = takes_model and isinstance(to, torch.nn.Module)
        try:
            result = migrate(result, model=to) if has_model else migrate(result)
        except Exception as err:
            err.add_note(f"in Anemoi's migration {name}")
            raise
        result[_KEY].append(entries[name])
    return _closed(result)


def _entries() -> dict[str, Any]:
    """Give what a checkpoint lists of each installed migration, by name."""
    try:
        migrator = importlib.import_module(_PACKAGE).Migrator()
    except ImportError as err:
        raise MissingPackageError(
            UNPLACED, f"{_PACKAGE} cannot be imported ({err})", "pip install anemoi-models"
        ) from err
    listed = migrator.register_migrations({_KEY: []})[_KEY]
    return {entry["name"]: entry for entry in listed}


def _is_up_to(entry: Any, to: torch.nn.Module | str | None) -> bool:
    if not isinstance(to, str):
        return True
    version = _numbers(entry["metadata"].versions["anemoi-models"])
    return version <= _numbers(to)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)][:3]


def _open(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the dicts that scripts change; inert objects like dicts are made to be changed, too."""
    parameters = checkpoint["hyper_parameters"]
    opened = {key: editable(value) for key, value in parameters.items()}
    shallow = {k: like(v, v) if isinstance(v, Mapping) else v for k, v in checkpoint.items()}
    changed = {"hyper_parameters": like(parameters, opened), _KEY: list(checkpoint[_KEY])}
    return like(checkpoint, {**shallow, **changed})


def _closed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    parameters = checkpoint["hyper_parameters"]
    closed = {key: inert(value) for key, value in parameters.items()}
    return like(checkpoint, {**checkpoint, "hyper_parameters": like(parameters, closed)})
