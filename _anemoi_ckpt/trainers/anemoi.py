"""What anemoi-training takes: a callback, and two stages of its checkpoint pipeline.

`anemoi.training.checkpoint.pipeline` (anemoi-training 0.17, anemoi-core #1196) knows a stage by
`process`, and what it does by the name of its class: ``…Source`` or ``…Loader``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from _anemoi_ckpt.trainers.lightning import bases

log = logging.getLogger("anemoi_ckpt")

Fill = Callable[[Any], Any]  # loads into a model, and tells what was loaded


# ── callback ──────────────────────────────────────────────────────────────────────────────────


def make_callback(fill: Fill) -> Any:
    """Make a callback of Lightning's that fills the model before it is trained.

    Raises:
        MissingPackageError: Lightning is not installed.
    """
    found = bases("Callback", "lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
    return type("LoadCallback", (_LoadCallback, *found), {})(fill)


class _LoadCallback:
    """Fills the model before it is trained; Lightning fills it anew where a run is resumed."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to processes that are spawned."""
        return make_callback, (self._fill,)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's
        """Fill the model: it is on the CPU, and neither averaged nor has an optimizer yet."""
        if stage == "fit":  # whether the run is resumed is not known yet
            log.info("%s", self._fill(pl_module))


# ── stages ────────────────────────────────────────────────────────────────────────────────────


class PlaceSource:
    """A stage that brings a checkpoint."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    async def process(self, context: Any) -> Any:
        """Put the checkpoint into the context, and say what format it has."""
        context.checkpoint_data = self._read()
        context.checkpoint_format = _format_of(context.checkpoint_data)
        return context


def _format_of(checkpoint: Mapping[str, Any]) -> str:
    """Name the format as Anemoi's loaders do."""
    if "pytorch-lightning_version" in checkpoint:
        return "lightning"
    wrapped = any(key in checkpoint for key in ("state_dict", "model_state_dict", "model"))
    return "pytorch" if wrapped else "state_dict"


class PlaceLoader:
    """A stage that fills the model, straight from a place: it needs no source before it."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill

    async def process(self, context: Any) -> Any:
        """Fill the Lightning module where the context has one, else the model."""
        report = self._fill(context.model if context.pl_module is None else context.pl_module)
        if context.model is not None:
            context.model.weights_initialized = True  # what the pipeline looks for at its end
        context.update_metadata(loaded=report)
        return context
