"""Stops of reads in the worst surroundings: none hangs, and none leaves a thread or an open file.

    python benchmarks/interrupts.py --stops 5000

A collection of garbage at every fifth object, sixty threads that make garbage, objects whose
finalisers take locks and use sockets, and a change of threads every 10 µs. In them a silent HTTP
server is read from, and each read is stopped: by Ctrl-C in the main thread (half of them twice in a
row), or by the failure of another read. A watchdog ends the process, with all stacks, if one stop
takes longer than 30 s. On Python 3.11 `sys._current_frames()` hangs within seconds of this
(python/cpython#106883).
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import faulthandler
import gc
import os
import queue
import random
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import ClassVar

from _anemoi_ckpt.parallel import in_parallel
from _anemoi_ckpt.places import Version
from _anemoi_ckpt.transport import Source
from anemoi_ckpt import parse_uri

BUSY_THREADS = 60
MOST_GARBAGE = 1000  # objects: on a slow machine it would grow faster than it is collected
AGAIN_SECONDS = 0.5
READS = 6
HANGS_SECONDS = 30

Signal = queue.SimpleQueue  # it takes no lock of Python's


class Finalised:
    """In a cycle, so that the collector calls its finaliser at any line of any thread."""

    lock = threading.RLock()  # reentrant: the collector may run while this thread has it
    alive: ClassVar[deque[None]] = deque()  # one item for each; a deque takes no lock

    def __init__(self, peer: tuple[str, int] | None) -> None:
        """Remember where to connect to, if anywhere."""
        self.cycle, self.peer = self, peer
        self.alive.append(None)

    def __del__(self) -> None:
        """Take a lock, let other threads run, and connect."""
        self.alive.pop()
        with self.lock:
            time.sleep(0)  # releases the GIL
        if self.peer is not None:
            with socket.socket() as own, contextlib.suppress(OSError):
                own.setblocking(False)
                own.connect_ex(self.peer)


def busy(ended: threading.Event, peer: tuple[str, int]) -> None:
    dice = random.Random(threading.get_ident())
    while not ended.wait(dice.random() * 0.05):
        for number in range(20 if len(Finalised.alive) < MOST_GARBAGE else 0):
            Finalised(peer if number == 0 else None)
            [[] for _ in range(20)]


def serve(listener: socket.socket) -> None:
    """Accept, answer every other request's beginning, and say no more."""
    kept: list[socket.socket] = []
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/1000\r\n"
    head += b"Content-Length: 100\r\n\r\nabc"
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            if len(kept) % 2:
                connection.sendall(head)
        kept.append(connection)
        if len(kept) > 200:
            kept.pop(0).close()


class FailedError(Exception):
    """What one of the reads raises."""


def fail(after: float) -> None:
    time.sleep(after)
    raise FailedError


def press(after: float, times: int, heard: Signal, over: Signal) -> None:
    """Press Ctrl-C so many times, and again while it is not heard: finalisers swallow some."""
    time.sleep(after)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    while True:
        try:
            heard.get(timeout=AGAIN_SECONDS)
            break
        except queue.Empty:
            os.kill(os.getpid(), signal.SIGINT)
    over.put(None)


def stopped(url: str, number: int, dice: random.Random) -> float:
    """Stop one set of reads; give the seconds from the stop on."""
    source = Source(parse_uri(url), Version(1000))
    after = dice.random() * 0.03
    reads = [partial(source.read, 0, [bytearray(100)]) for _ in range(READS)]
    by_failure = number % 4 == 3
    heard, over = Signal(), Signal()
    begun, ended_by = time.monotonic(), None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            if by_failure:
                in_parallel([*reads, partial(fail, after)], source)
            else:
                # a bare thread: Ctrl-C within `Thread.start` leaves a lock of Python's taken
                _thread.start_new_thread(press, (after, 1 + number % 2, heard, over))
                in_parallel(reads, source)
        except (FailedError, KeyboardInterrupt) as err:
            ended_by = type(err)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt as err:  # the second press, which may come at any line
        ended_by = type(err)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    seconds = time.monotonic() - begun - after
    assert ended_by is (FailedError if by_failure else KeyboardInterrupt), ended_by
    if not by_failure:
        heard.put(None)
        over.get()
    return seconds


def left() -> list[str]:
    """Name the threads of reads, after the time that those of a second interrupt need."""
    end = time.monotonic() + 5
    while True:
        names = [each.name for each in threading.enumerate() if "anemoi-ckpt" in each.name]
        if not names or time.monotonic() > end:
            return names
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=5000)
    parser.add_argument("--most-seconds", type=float, default=float("inf"))
    parser.add_argument("--switch-interval", type=float, default=1e-5)
    options = parser.parse_args()

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    url = "http://{}:{}/a.ckpt".format(*listener.getsockname())
    ended = threading.Event()
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    for _ in range(BUSY_THREADS):
        threading.Thread(target=busy, args=(ended, listener.getsockname()), daemon=True).start()
    sys.setswitchinterval(options.switch_interval)
    gc.set_threshold(5)

    dice, seconds = random.Random(1), []
    begun = time.monotonic()
    while len(seconds) < options.stops and time.monotonic() - begun < options.most_seconds:
        faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
        seconds.append(stopped(url, len(seconds), dice))
        if len(seconds) % 500 == 0:
            print(f"{len(seconds)} stops, {time.monotonic() - begun:.0f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - begun
    ended.set()
    gc.set_threshold(700)
    names = left()

    version = ".".join(map(str, sys.version_info[:3]))
    slow = sum(each > 1 for each in seconds)
    print(
        f"Python {version}: {len(seconds)} stops in {took:.0f} s, {BUSY_THREADS} busy threads, "
        f"switches every {options.switch_interval:g} s\n"
        f"none hangs; median {statistics.median(seconds):.3f} s, longest {max(seconds):.3f} s, "
        f"{slow} over a second; threads left: {names or 'none'}"
    )
    sys.exit(1 if names else 0)


if __name__ == "__main__":
    main()
