"""Many reads at once, which the first failure or interrupt ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from _anemoi_ckpt.errors import AccessDeniedError
from _anemoi_ckpt.places import LONG_PART_BYTES, connect, connections_of, forget_clients
from _anemoi_ckpt.threads import heard, run
from _anemoi_ckpt.transport import PART_BYTES, Source

_T = TypeVar("_T")


def part_bytes(source: Source, total: int) -> int:
    """Choose how much to ask for at once: a share for each connection, within bounds."""
    connections = connections_of(source.uri, source.transport.params)
    return min(max(total // connections, PART_BYTES), LONG_PART_BYTES)


def in_parallel(tasks: Sequence[Callable[[], _T]], source: Source) -> list[_T]:
    """Run tasks that read from a source, and give their results in order.

    The first failure or interrupt is raised at once, and stops the source and all that reads it.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    heard(partial(connect, source.uri, source.transport.params), source.stop)
    try:
        return run(tasks, connections_of(source.uri, source.transport.params), source.stop)
    except AccessDeniedError:
        forget_clients(source.uri)  # what was stopped may have made one since
        raise
