"""Objects in this process's memory: those that had to be taken whole, or decompressed."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from _anemoi_ckpt.places import URI, Buffers, Params, Version, read_range


@frozen
class MemoryURI(URI):
    """An object in memory, and the place that it is from."""

    origin: URI
    data: memoryview = field(repr=False, eq=False)

    @property
    def filename(self) -> str:
        """The name that it has at its place."""
        return self.origin.filename

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the bytes behind: another rank only learns that there is such an object."""
        return MemoryURI, (self.text, self.origin, b"")


@read_range.register
def read_memory_range(
    uri: MemoryURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,  # noqa: ARG001 - memory does not change
    transport_params: Params = None,  # noqa: ARG001 - memory needs none
) -> Version:
    """Copy a range."""
    size = len(uri.data)
    buffers.write(uri.data[max(0, size + offset) if offset < 0 else offset :])
    return Version(size)
