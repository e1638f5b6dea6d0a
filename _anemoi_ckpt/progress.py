"""Progress: how many of the bytes have come, told to a function or shown by a bar."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from _anemoi_ckpt.errors import harmless
from _anemoi_ckpt.places import URI, Notify

Progress = bool | Callable[[int, int | None], object] | None

DELAY_SECONDS = 1.0  # a shorter load shows no bar


@contextmanager
def shown(uri: URI, total: int | None, progress: Progress) -> Iterator[Notify]:
    """Give what is to be called with each count of bytes that have come.

    Args:
        uri: where they come from.
        total: how many bytes are to come; None where the place does not tell.
        progress: a function of the bytes done and the total; True and False force and forbid a
            bar; None shows one in a terminal or notebook, after a while.
    """
    lock = threading.Lock()
    most = total or sys.maxsize  # records' headers come, too, and do not count
    if callable(progress):
        done = 0

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done = min(done + size, most)
                progress(done, total)

        yield count
    elif progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of text
            from tqdm.auto import tqdm  # noqa: PLC0415 - only where a bar is shown

        delay = DELAY_SECONDS if progress is None else 0
        name = harmless(uri.filename)
        with tqdm(total=total, desc=name, delay=delay, unit="B", unit_scale=True) as bar:

            def advance(size: int) -> None:
                with lock:
                    bar.update(min(size, most - bar.n))

            yield advance
    else:
        yield _ignore


def _ignore(_size: int) -> None:
    """Show nothing."""
