"""A checkpoint is written to a place, in the format that its name asks for."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from _anemoi_ckpt.errors import CheckpointError
from _anemoi_ckpt.formats.safetensors import write_safetensors
from _anemoi_ckpt.formats.torch_zip import write_zip
from _anemoi_ckpt.metadata import as_notes
from _anemoi_ckpt.opening import compression
from _anemoi_ckpt.places import URI, imported
from _anemoi_ckpt.places.explained import links
from _anemoi_ckpt.transport import Transport, open_for_writing


def write_checkpoint(
    checkpoint: Any, place: URI, members: Mapping[str, Any], transport: Transport
) -> None:
    """Stream a checkpoint to a place, all or nothing.

    Args:
        checkpoint: what to write.
        place: where to; the ending of its name tells format and compression.
        members: more records of a torch zip, by name beneath the archive's root; of these,
            safetensors get Anemoi's metadata, without its arrays.
        transport: how the place is reached.

    Raises:
        CheckpointError: the place cannot be written to, or the checkpoint not be serialized.
    """
    suffix = compression(place)
    zipped = functools.partial(write_zip, members=members)
    noted = functools.partial(write_safetensors, notes=as_notes(members))
    write = noted if is_safetensors(place) else zipped
    with open_for_writing(place, transport) as stream, _explained(place):
        if suffix:
            wrapper = imported("smart_open.compression", place).compression_wrapper
            with wrapper(stream, "wb", compression=suffix) as packed:
                write(checkpoint, packed)
        else:
            write(checkpoint, stream)


def is_safetensors(place: URI) -> bool:
    """Tell whether a place's name ends with ``.safetensors``, compressed or not."""
    return place.filename.removesuffix(compression(place)).endswith(".safetensors")


@contextmanager
def _explained(place: URI) -> Iterator[None]:
    """Say why a checkpoint could not be written."""
    try:
        yield
    except Exception as err:
        for link in links(err):  # torch's writer hides what its stream raised
            is_interrupt = not isinstance(link, Exception)
            if is_interrupt or isinstance(link, CheckpointError | OSError | MemoryError):
                raise link from link.__cause__
        raise CheckpointError(
            place,
            f"the checkpoint cannot be written ({err!r})",
            "leave that object out",
        ) from err
