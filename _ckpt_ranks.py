"""Ranks of a process group that work as one: what one reads, all have; what one meets, all raise.

The caller's group says who they are. What they tell each other goes by a group of our own beside
it (gloo, which hears at once of a rank that is gone); bytes go by NCCL where the caller's has that.
"""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from _ckpt_errors import UnreachableError
from _ckpt_sources import Transport

_T = TypeVar("_T")
_LARGE_BYTES = 1024**2  # sent as it lies; what is smaller is packed first
_calls: Counter[tuple[str, int]] = Counter()  # of each rank of a group: names where they meet


@contextmanager
def joined(transport: Transport, place: object) -> Iterator[Ranks]:
    """Work with the other ranks of the transport's group, for as long as the block takes.

    Whoever waits for a rank that has left hears of it at once.
    """
    ranks = Ranks(transport, place)
    try:
        yield ranks
    finally:
        ranks.leave()


class Ranks:
    """The ranks of a group, as one of them sees them. All of them must call the same."""

    def __init__(self, transport: Transport, place: object) -> None:
        group = transport.group
        self.rank, self.size = group.rank(), group.size()
        self._place = place
        self._sent: list[list[Any]] = []
        self._nccl = group if _has_nccl(group) else None
        _calls[group.group_name, self.rank] += 1
        call = f"anemoi-ckpt/{group.group_name}/{_calls[group.group_name, self.rank]}"
        store = dist.PrefixStore(call, group.get_group_store())  # type: ignore[attr-defined] # it is public
        # twice: a rank that gives a silent place up is heard out
        silence = timedelta(seconds=2 * transport.patience)
        make = functools.partial(dist.ProcessGroupGloo, store, self.rank, self.size, silence)
        self._group: Any = self._reached(make)

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        for works in self._sent:
            works.clear()
        self._group = None

    def share(self, value: _T | None = None) -> _T:
        """Give rank 0's value to all."""
        data = _pickled(value) if not self.rank else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._wait(self._broadcast(size, 0))
        data = data if not self.rank else torch.empty(int(size), dtype=torch.uint8)
        self._wait(self._broadcast(data, 0))
        return cast("_T", value if not self.rank else _unpickled(data))

    def agree(self, value: _T, problem: Exception | None = None) -> list[_T]:
        """Give each rank's value to all; or raise the first rank's problem on all.

        Raises:
            Exception: the problem of the first rank that has one.
            UnreachableError: a rank is gone, or silent.
        """
        answers = self._gather((value, sendable(problem)))
        for rank, (_, found) in enumerate(answers):
            if found is not None:
                raise problem if rank == self.rank and problem else found
        return [each for each, _ in answers]

    def together(self, act: Callable[[], _T]) -> _T:
        """Do the same on each rank; what one of them meets, all raise."""
        result, problem = None, None
        try:
            result = act()
        except Exception as err:  # noqa: BLE001 - raised on all ranks
            problem = err
        self.agree(None, problem)
        return cast("_T", result)

    def send(self, views: Sequence[memoryview], owner: int) -> Callable[[], None]:
        """Begin to give what one rank has in memory to all others; they do so, too, to receive it.

        Args:
            views: memory of the same sizes on all ranks.
            owner: the rank that has it.

        Returns:
            What waits until it is there.
        """
        mine = owner == self.rank
        large = [view for view in views if len(view) >= _LARGE_BYTES and not self._nccl]
        small = [view for view in views if len(view) < _LARGE_BYTES or self._nccl]
        packed = torch.empty(sum(map(len, small)), dtype=torch.uint8)
        parts = packed.split([len(view) for view in small])
        if mine:
            for part, view in zip(parts, small, strict=True):
                part.copy_(_tensor(view))
        moved = packed.cuda() if self._nccl else packed
        works = [
            self._broadcast(each, owner) for each in (moved, *map(_tensor, large)) if len(each)
        ]
        self._sent.append(works)

        def finish() -> None:
            while works:
                self._wait(works.pop())
            if not mine and small:
                packed.copy_(moved)
                for part, view in zip(parts, small, strict=True):
                    _tensor(view).copy_(part)

        return finish

    def _broadcast(self, tensor: torch.Tensor, owner: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = owner
        group: Any = self._nccl if tensor.is_cuda else self._group
        return self._reached(lambda: group.broadcast([tensor], options))

    def _gather(self, value: Any) -> list[Any]:
        data = _pickled(value)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._allgather(sizes, torch.tensor([len(data)]))
        longest = max(map(int, sizes))
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._allgather(found, torch.nn.functional.pad(data, (0, longest - len(data))))
        return [_unpickled(each[: int(size)]) for each, size in zip(found, sizes, strict=True)]

    def _allgather(self, found: list[torch.Tensor], given: torch.Tensor) -> None:
        self._wait(self._reached(lambda: self._group.allgather([found], [given])))

    def _wait(self, work: Any) -> None:
        try:
            self._reached(work.wait)
        finally:
            del work  # an error keeps what its frames hold, and so the connections, open

    def _reached(self, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except RuntimeError as err:
            said = str(err)
        del ask  # as above
        raise UnreachableError(
            self._place, f"a rank of the group is gone, or silent ({said})", "see its own error"
        )


def _has_nccl(group: Any) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))


def _tensor(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())  # noqa: S301 - of another rank of the same program


def sendable(problem: Exception | None) -> Exception | None:
    """Give an error as it can travel: one that cannot be pickled, as what it says."""
    try:
        found: Exception | None = pickle.loads(pickle.dumps(problem))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever a class of its own raises
        return RuntimeError(repr(problem))
    return found
