"""Progress: how many of the bytes have come, told to a function or shown by a bar."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from _anemoi_ckpt.errors import harmless
from _anemoi_ckpt.places import URI, Notify

Progress = bool | Callable[[int, int | None], object] | None

DELAY_SECONDS = 1.0  # a shorter load shows no bar


def shown(uri: URI, total: int | None, progress: Progress) -> AbstractContextManager[Notify]:
    """Give what is to be called with each count of bytes that have come.

    Args:
        uri: where they come from.
        total: how many bytes are to come; None where the place does not tell.
        progress: a function of the bytes done and the total; True and False force and forbid a
            bar; None shows one in a terminal or notebook, after a while.
    """
    if callable(progress):
        return _Telling(progress, total)
    if progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        return _bar(uri, total, DELAY_SECONDS if progress is None else 0)
    return nullcontext(_ignore)


def _ignore(_size: int) -> None:
    """Show nothing."""


@contextmanager
def _bar(uri: URI, total: int | None, delay: float) -> Iterator[Notify]:
    lock = threading.Lock()
    most = _most(total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of text
        from tqdm.auto import tqdm  # noqa: PLC0415 - only where a bar is shown

    name = harmless(uri.filename)
    with tqdm(total=total, desc=name, delay=delay, unit="B", unit_scale=True) as bar:

        def advance(size: int) -> None:
            with lock:
                bar.update(min(size, most - bar.n))

        yield advance


def _most(total: int | None) -> int:
    return total or sys.maxsize  # records' headers come, too, and do not count


class RelayedError(BaseException):
    """What a function of the user's raised, on its way out of `shown`.

    An SDK, and what explains errors of the network and of the disk, would take it for one of
    theirs.
    """

    def __init__(self, problem: Exception) -> None:
        """Take what the function raised."""
        super().__init__(problem)
        self.problem = problem


class _Telling:
    """Tells a function of the user's how much has come; what it raises comes out as it is."""

    def __init__(self, progress: Callable[[int, int | None], object], total: int | None) -> None:
        self._progress, self._total = progress, total
        self._lock = threading.Lock()
        self._done = 0
        self._has_raised = False

    def __enter__(self) -> Notify:
        return self._count

    def __exit__(self, _kind: object, err: BaseException | None, _traceback: object) -> None:
        if isinstance(err, RelayedError):
            problem = err.problem
            context = problem.__context__
            try:
                raise problem
            finally:
                problem.__context__ = context
                del problem, err  # a cycle, which would keep tensors alive

    def _count(self, size: int) -> None:
        with self._lock:
            if self._has_raised:  # another thread's bytes came before the read was stopped
                return
            self._done = min(self._done + size, _most(self._total))
            try:
                self._progress(self._done, self._total)
            except Exception as err:  # noqa: BLE001 - raised at the end of the block
                self._has_raised = True
                raise RelayedError(err) from None
