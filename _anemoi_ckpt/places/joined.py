"""Several objects as one: the shards of a checkpoint, each pinned to its own version."""

from __future__ import annotations

from attrs import field, frozen

from _anemoi_ckpt.errors import UnreachableError
from _anemoi_ckpt.places import (
    URI,
    Buffers,
    Params,
    UnrangedError,
    Version,
    connect,
    forget_clients,
    read_range,
)

STRIDE_BYTES = 1 << 48  # each object begins at a multiple of it, far beyond the last one's end


@frozen
class JoinedURI(URI):
    """Several objects as one: each begins at a multiple of `STRIDE_BYTES`."""

    parts: tuple[tuple[URI, Version | None], ...] = field(repr=False, eq=False)

    @property
    def connections(self) -> int:  # type: ignore[override] # as many as its first part allows
        """How many reads at once the first of its parts allows."""
        return self.parts[0][0].connections


@read_range.register
def read_joined_range(
    uri: JoinedURI,
    offset: int,
    buffers: Buffers,
    pin: Version | None = None,  # noqa: ARG001 - each part has its own
    transport_params: Params = None,
) -> Version:
    """Read a range of one of the parts."""
    number, start = divmod(offset, STRIDE_BYTES)
    part, version = uri.parts[number]
    try:
        version = read_range(part, start, buffers, version, transport_params)
    except UnrangedError as err:
        raise UnreachableError(
            part,
            "the server gave one range of it, and then refused another, or gave a version of its"
            " own",
            part.when_changed,
        ) from err
    return Version(number * STRIDE_BYTES + version.size)


@connect.register
def connect_joined(uri: JoinedURI, transport_params: Params = None) -> None:
    """Make the client of the first part's store."""
    connect(uri.parts[0][0], transport_params)


@forget_clients.register
def forget_joined_clients(uri: JoinedURI) -> None:
    """Forget the clients of the first part's store."""
    forget_clients(uri.parts[0][0])
