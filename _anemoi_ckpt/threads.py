"""Calls that run in threads of their own, while the caller's thread does nothing but wait.

Python raises KeyboardInterrupt in the main thread, at any line. In the midst of an SDK it could
leave a lock taken for ever; and if it comes right before a system call that blocks, it waits for
that call to end. So the main thread runs none of them, and looks up a few times in a second.
"""

from __future__ import annotations

import _thread
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, TypeVar

from _anemoi_ckpt.places.interrupts import Stop, heeded

_T = TypeVar("_T")
_HEAR_SECONDS = 0.2  # a signal that comes just before a thread begins to wait does not wake it
_STOP_SECONDS = 0.7  # most that is waited for the calls that were stopped

# What the threads share is a deque and a SimpleQueue, which are C and take no lock of Python's.
# The classes of `threading` and `concurrent.futures` do: an interrupt that comes between two lines
# of `Condition.__enter__` leaves one taken, and whoever needs it next hangs (python/cpython#74174).
# `Thread.start` waits on such a lock, so a bare thread starts the first, and not the main thread.
_Calls = deque[tuple[int, Callable[[], Any]]]
_Outcomes = queue.SimpleQueue[tuple[int, Any, BaseException | None]]

# Python keeps a WeakSet of threads. An interrupt that comes while the main thread runs its callback
# for a thread that is freed there is lost. So the next one of our threads frees those that ended.
_ended: deque[threading.Thread] = deque()


def heard(call: Callable[[], _T], stop: Stop) -> _T:
    """Call a function so that Ctrl-C ends it within a second, if the reads in it heed a stop."""
    if threading.current_thread() is not threading.main_thread():
        return call()  # a thread that hears no interrupt
    return run([call], 1, stop)[0]


def run(calls: Sequence[Callable[[], _T]], count: int, stop: Stop) -> list[_T]:
    """Call functions in `count` threads that heed a stop, and give their results in order.

    The first failure or interrupt is raised at once; it sets the stop, if calls are left. What does
    not heed the stop goes on in its thread, which does not keep the process from ending.
    """
    todo: _Calls = deque(enumerate(calls))
    outcomes: _Outcomes = queue.SimpleQueue()
    waiting: deque[threading.Thread] = deque()
    begun: deque[threading.Thread] = deque()
    threads = [
        threading.Thread(
            target=_work,
            args=(todo, outcomes, stop, waiting, begun),
            name=f"anemoi-ckpt_{number}",
            daemon=True,
        )
        for number in range(min(count, len(calls)))
    ]
    waiting.extend(threads[1:])
    results: dict[int, Any] = {}
    try:
        for thread in threads[:1]:  # there may be no call
            _thread.start_new_thread(_start, (thread, outcomes, begun))
        while len(results) < len(calls):
            number, result, problem = _next(outcomes, threads[0], begun)
            results[number] = result
            if problem is not None:
                _raise(problem)
    except BaseException:
        try:
            _halt(todo, stop, len(calls) - len(results))
        finally:
            # a second interrupt may have ended the first attempt, or come before it
            _halt(todo, stop, len(calls) - len(results))
        raise
    finally:
        problem = None  # its traceback holds this frame: a cycle, which would keep tensors alive
        _join(threads, outcomes)
        waiting.clear()  # two more cycles
        begun.clear()
    return [results[number] for number in range(len(calls))]


def _start(thread: threading.Thread, outcomes: _Outcomes, begun: deque[threading.Thread]) -> None:
    try:
        thread.start()
        begun.append(thread)
    except BaseException as err:  # noqa: BLE001 - raised in the thread that waits
        outcomes.put((-1, None, err))


def _work(
    todo: _Calls,
    outcomes: _Outcomes,
    stop: Stop,
    waiting: deque[threading.Thread],
    begun: deque[threading.Thread],
) -> None:
    number = -1
    try:
        with stop.heeded():
            _ended.clear()
            # Each thread starts the next one: two that begin at once could both install the trace
            # function of a debugger or of coverage, which CPython before 3.12 may refuse.
            if todo and waiting:
                with suppress(RuntimeError):  # the system allows no more: these do the work
                    following = waiting.popleft()
                    following.start()
                    begun.append(following)
            while True:
                try:
                    number, call = todo.popleft()
                except IndexError:  # none is left
                    return
                outcomes.put((number, call(), None))
    except BaseException as err:  # noqa: BLE001 - raised in the thread that waits
        outcomes.put((number, None, err))


def _next(
    outcomes: _Outcomes, first: threading.Thread, begun: deque[threading.Thread]
) -> tuple[int, Any, BaseException | None]:
    """Wait for the next outcome, and hear an interrupt meanwhile, or the stop of an outer call."""
    outer = heeded()
    while True:
        if outer is not None and outer.is_set():
            raise CancelledError
        # A thread that has begun is alive, or has ended; what it started has begun, too, by then.
        ended = first in begun and not any(thread.is_alive() for thread in list(begun))
        with suppress(queue.Empty):
            return outcomes.get(timeout=_HEAR_SECONDS)
        if ended:  # a debugger's trace function has failed, say
            raise RuntimeError("the threads that read ended before their work was done")


def _raise(problem: BaseException) -> None:
    try:
        raise problem
    finally:
        del problem  # a cycle, as in `run`


def _halt(todo: _Calls, stop: Stop, left: int) -> None:
    """Stop the threads of the calls that are left, if any are.

    A bare thread does it: a second interrupt of this one could leave a socket half shut down.
    """
    if not left:
        return
    todo.clear()
    stop.refuse()
    try:
        _thread.start_new_thread(stop.set, ())
    except RuntimeError:  # the system allows no more threads
        stop.set()


def _join(threads: Sequence[threading.Thread], outcomes: _Outcomes) -> None:
    """Wait for the threads to end, unless one does not; forget what nobody asked for."""
    end = time.monotonic() + _STOP_SECONDS
    for thread in threads:
        with suppress(RuntimeError):  # an interrupt came before it had started
            thread.join(max(0, end - time.monotonic()))
    _ended.extend(threads)
    with suppress(queue.Empty):  # errors whose tracebacks hold the queue that holds them
        while True:
            outcomes.get_nowait()
