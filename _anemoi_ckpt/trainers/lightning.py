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

from _anemoi_ckpt.errors import MissingPackageError
from _anemoi_ckpt.places import URI, Params, check_params, parse_uri, remove_object
from _anemoi_ckpt.places.local import LocalURI
from _anemoi_ckpt.saving import write_checkpoint
from _anemoi_ckpt.trainers.filesystem import register
from _anemoi_ckpt.transport import Transport, attempted

_PACKAGES = (
    "lightning.fabric.plugins",
    "lightning_fabric.plugins",
)  # each has a Trainer of its own


def make_checkpoint_io(read: Callable[[Any], Any], transport: Transport) -> Any:
    """Make what `Trainer(plugins=[…])` takes, of the packages of Lightning that are installed.

    Args:
        read: loads a checkpoint from where it is told.
        transport: how places are reached.

    Raises:
        MissingPackageError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    bases = tuple(_bases())
    if not bases:
        raise MissingPackageError(
            "checkpoint_io", "Lightning is not installed", "pip install lightning"
        )
    register(transport)
    return type("CheckpointIO", (_CheckpointIO, *bases), {})(read, transport)


def _bases() -> list[type]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(importlib.import_module(name).CheckpointIO)
        except ImportError:
            continue
    return found


class _CheckpointIO:
    """The methods that Lightning calls, on each rank; only rank 0 saves and removes."""

    def __init__(self, read: Callable[[Any], Any], transport: Transport) -> None:
        self._read, self._transport = read, transport

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
        write_checkpoint(checkpoint, uri, {}, params)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str] | URI,
        map_location: object = None,  # noqa: ARG002 - Lightning moves what it loads by itself
        weights_only: object = None,  # noqa: ARG002 - no code of the checkpoint runs
    ) -> Any:
        """Load a checkpoint to the CPU."""
        return self._read(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint."""
        uri = parse_uri(path)
        attempted(self._transport, lambda: remove_object(uri, self._transport.params))

    def teardown(self) -> None:
        """Close nothing: clients are shared."""
