"""Ranks of a process group share their work: each gets what one reads, and raises its errors.

The caller's group lists the ranks. They meet at its store, where each writes the arguments of its
call. Then they communicate by a gloo group of their own, whose operations fail at once if a process
is gone; bytes go by NCCL if the caller's group has it. While a rank reads or waits, it writes beats
to the store. A rank that stops beating counts as silent.

join · talk · beats
"""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from _anemoi_ckpt.compat import store_of
from _anemoi_ckpt.errors import CheckpointError, InvalidURIError, UnreachableError, redact
from _anemoi_ckpt.progress import RelayedError
from _anemoi_ckpt.transport import Transport

_T = TypeVar("_T")
_LARGE_BYTES = 1024**2  # sent from where it is; smaller views are packed into one first
_BEAT_SECONDS = 1.0  # between two beats, and between two checks of the others'
_POLL_SECONDS = 0.01  # between two checks of which ranks have come
_UNLIMITED = timedelta(days=365)  # for gloo: the beats show which rank is silent
_calls: Counter[tuple[str, int]] = (
    Counter()
)  # of each rank of a group: the number of the call at which they meet


# ── join ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def joined(transport: Transport, *asked: object) -> Iterator[Ranks]:
    """Work with the other ranks of the transport's group, for as long as the block takes.

    If a rank leaves, the operations of the ranks that wait for it fail at once.

    Args:
        transport: has the group, and for how long a rank may be silent.
        asked: the arguments of this rank's call, the place first; the same on all ranks.

    Raises:
        InvalidURIError: the ranks were asked for different things.
        UnreachableError: not all of them come.
    """
    ranks = Ranks(transport, asked)
    try:
        yield ranks
    finally:
        ranks.leave()


class Ranks:
    """The ranks of a group, as one of them sees them. All must call the same methods in order."""

    def __init__(self, transport: Transport, asked: Sequence[object]) -> None:
        """Meet the other ranks, and connect with them."""
        group = transport.group
        self.rank, self.size = group.rank(), group.size()
        self._place = asked[0]
        self._sent: list[list[Any]] = []
        self._nccl = group if _has_nccl(group) else None
        # twice: a rank first reports the error of a silent place
        self._silence = 2 * transport.patience
        self._pause = min(_BEAT_SECONDS, self._silence / 8)
        self._store: Any = self._reached(lambda: self._call(group))
        self._group: Any = None
        try:
            self._meet([redact(str(each)) for each in asked])
            make = functools.partial(dist.ProcessGroupGloo, self._store, self.rank, self.size)
            self._group = self._reached(lambda: make(_UNLIMITED))
        except CheckpointError:
            self.leave()
            raise

    def _call(self, group: Any) -> Any:
        """Give this call's part of the group's store: the next one that is not over.

        A rank that failed before it joined a call of the others has missed that number.
        """
        store, name = store_of(group), group.group_name
        while True:
            _calls[name, self.rank] += 1
            call = f"anemoi-ckpt/{name}/{_calls[name, self.rank]}"
            part = dist.PrefixStore(call, store)  # type: ignore[attr-defined] # it is public
            if not stored(part, "over"):
                return part

    def _meet(self, asked: list[str]) -> None:
        """Wait until all ranks have come, and compare what they were asked for."""
        self._reached(lambda: self._store.set(f"asked/{self.rank}", pickle.dumps(asked)))
        end = time.monotonic() + self._silence
        answers: dict[int, list[str]] = {}
        while len(answers) < self.size:
            if time.monotonic() > end:
                missing = [rank for rank in range(self.size) if rank not in answers]
                raise self._gone(f"rank {', '.join(map(str, missing))} did not come")
            for rank in range(self.size):
                answer = self._read(f"asked/{rank}")
                if answer:
                    answers[rank] = pickle.loads(answer)  # noqa: S301 - of another rank of the same program
            time.sleep(_POLL_SECONDS if len(answers) < self.size else 0)
        other = next((rank for rank, answer in answers.items() if answer != asked), None)
        if other is not None:
            raise InvalidURIError(
                self._place,
                f"rank {self.rank} was asked for {', '.join(asked)}, and rank {other} for "
                f"{', '.join(answers[other])}",
                "call it alike on all ranks",
            )

    def _read(self, key: str) -> bytes:
        """Read a key of the store, which may not be there yet."""
        return self._reached(lambda: stored(self._store, key))

    def leave(self) -> None:
        """Close the connections to the other ranks, and note that this call is over."""
        with suppress(UnreachableError):  # the store may be gone as well
            self._reached(lambda: self._store.set("over", b"1"))
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
        for rank, (_, received) in enumerate(answers):
            if received is not None:
                raise problem if rank == self.rank and problem else received
        return [answer for answer, _ in answers]

    def together(self, act: Callable[[], _T]) -> _T:
        """Call a function on each rank; if one of them raises, all raise its error."""
        result, problem = None, None
        try:
            with self.beating():
                result = act()
        except RelayedError as err:
            problem = err.problem
        except Exception as err:  # noqa: BLE001 - raised on all ranks
            problem = err
        self.agree(None, problem)
        return cast("_T", result)

    def send(self, views: Sequence[memoryview], owner: int) -> Callable[[], None]:
        """Begin to send one rank's memory to all others, which call this, too, to receive it.

        Args:
            views: memory of the same sizes on all ranks.
            owner: the rank that sends.

        Returns:
            A function that waits until the bytes have arrived.
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
            self._broadcast(tensor, owner)
            for tensor in (moved, *map(_tensor, large))
            if len(tensor)
        ]
        self._sent.append(works)

        def finish() -> None:
            while works:
                self._wait(works.pop(), by_gpu=moved.is_cuda)
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
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._allgather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
        return [_unpickled(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def _allgather(self, received: list[torch.Tensor], own: torch.Tensor) -> None:
        self._wait(self._reached(lambda: self._group.allgather([received], [own])))

    def _wait(self, work: Any, *, by_gpu: bool = False) -> None:
        try:  # NCCL has a watchdog of its own
            self._reached(work.wait if by_gpu else functools.partial(self._wait_for, work))
        finally:
            del work  # an error keeps its frames alive, and with them the open connections

    def _wait_for(self, work: Any) -> None:
        """Wait until an operation is done, and beat meanwhile, as long as the others do."""
        beats = _Beats(self._read, self.size)
        while True:
            try:
                work.wait(timedelta(seconds=self._pause))
            except RuntimeError:
                if work.is_completed():  # and failed
                    raise
                self._beat()
                silent = beats.silent(self._silence)
                if silent:
                    raise self._gone(f"rank {', '.join(map(str, silent))} is silent") from None
            else:
                return

    def _reached(self, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except RuntimeError as err:
            problem = str(err)
        del ask  # as above
        raise self._gone(problem)

    def _gone(self, problem: str) -> UnreachableError:
        return UnreachableError(
            self._place, f"a rank of the group is gone, or silent ({problem})", "see its own error"
        )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat from another thread while this one reads, which the place's time-out ends."""
        over = threading.Event()

        def beat() -> None:
            with suppress(UnreachableError):  # the next operation of the ranks raises it
                while not over.wait(self._pause):
                    self._beat()

        thread = threading.Thread(target=beat, name="anemoi-ckpt-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self) -> None:
        self._reached(lambda: self._store.set(f"beat/{self.rank}", str(time.monotonic_ns())))


def stored(store: Any, key: str) -> bytes:
    """Give what a store has under a key, in one request; nothing where it has no such key.

    The stores of torch 2.2 have no `check`, and their `wait` takes a slow answer for none.
    `compare_set` sets no key that is absent where it expects another value, and gives back that.

    Raises:
        RuntimeError: the store does not answer.
    """
    value = bytes(store.compare_set(key, _ABSENT, _ABSENT))
    return b"" if value == _ABSENT.encode() else value


_ABSENT = "\0absent"  # what nobody stores


class _Beats:
    """The beats of all ranks, since one of them began to wait."""

    def __init__(self, read: Callable[[str], bytes], size: int) -> None:
        self._read = read
        self._heard = dict.fromkeys(range(size), (b"", time.monotonic()))

    def silent(self, seconds: float) -> list[int]:
        """List the ranks that have not beaten for so many seconds."""
        now = time.monotonic()
        for rank, (beat, _) in self._heard.items():
            last = self._read(f"beat/{rank}")
            if last != beat:
                self._heard[rank] = last, now
        return [rank for rank, (_, since) in self._heard.items() if now - since > seconds]


def _has_nccl(group: Any) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))


def _tensor(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())  # noqa: S301 - of another rank of the same program


def sendable(problem: Exception | None) -> Exception | None:
    """Give an error that can be pickled: itself, or a RuntimeError with its repr."""
    try:
        copied: Exception | None = pickle.loads(pickle.dumps(problem))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever a class of its own raises
        return RuntimeError(repr(problem))
    return copied
