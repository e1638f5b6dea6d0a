"""Lightning's Trainer reads and writes its checkpoints at any place.

Lightning reads and writes through a `CheckpointIO` (`Trainer(plugins=[…])`), and looks for files
through fsspec: whether one exists, and what is in a folder.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from _anemoi_ckpt.errors import MissingPackageError
from _anemoi_ckpt.places import URI, Params, check_params, parse_uri, remove_object
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.saving import write_checkpoint
from _anemoi_ckpt.trainers.filesystem import register, unchained
from _anemoi_ckpt.transport import Transport, attempted


def make_checkpoint_io(read: Callable[[Any], Any], transport: Transport) -> Any:
    """Make what `Trainer(plugins=[…])` takes, of the packages of Lightning that are installed.

    Args:
        read: loads a checkpoint from where it is told.
        transport: how places are reached.

    Raises:
        MissingPackageError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    found = bases("CheckpointIO", "lightning.fabric.plugins", "lightning_fabric.plugins")
    register(transport)
    return type("CheckpointIO", (_CheckpointIO, *found), _NAMED)(read, transport)


def bases(name: str, *modules: str) -> list[type]:
    """Give a class of Lightning's from each of its packages that is installed.

    Raises:
        MissingPackageError: none is.
    """
    found = []
    for module in modules:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    if not found:
        raise MissingPackageError(name, "Lightning is not installed", "pip install lightning")
    return found


_NAMED = {"__module__": "anemoi_ckpt"}  # as it prints


class _CheckpointIO:
    """The methods that Lightning calls, on each rank; only rank 0 saves and removes."""

    def __init__(self, read: Callable[[Any], Any], transport: Transport) -> None:
        self._read, self._transport = read, transport

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to processes that are spawned."""
        return make_checkpoint_io, (self._read, self._transport)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, Any],
        path: str | os.PathLike[str],
        storage_options: Params = None,
    ) -> None:
        """Write a checkpoint, all or nothing; `storage_options` are `transport_params`."""
        uri = parse_uri(path)
        params = storage_options or self._transport.transport_params
        check_params(uri, params, writing=True)
        if isinstance(uri, LocalURI):
            Path(uri.path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, uri, {}, evolve(self._transport, transport_params=params))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str] | URI,
        map_location: object = None,  # noqa: ARG002 - Lightning moves what it loads by itself
        weights_only: object = None,  # noqa: ARG002 - no code of the checkpoint runs
    ) -> Any:
        """Load a checkpoint to the CPU."""
        return self._read(unchained(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        uri = parse_uri(path)
        attempted(self._transport, lambda: remove_object(uri, self._transport.params))

    def teardown(self) -> None:
        """Close nothing: clients are shared."""
