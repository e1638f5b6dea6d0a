"""Ctrl-C: a load stops within a second, and leaves no thread and no file."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import servers
from anemoi_ckpt import download, load, peek
from checkpoints import as_bytes

DATA = as_bytes({"state_dict": {"w": torch.rand(5_000_000), "v": torch.rand(5_000_000)}})
SERVERS = re.compile("^test-server|process_request_thread")  # ours, and moto's
REMOTE = ["http", "s3", "gcs", "azure"]
WAYS: dict[str, Callable[[str, Path], Any]] = {
    "load": lambda uri, folder: load(uri),
    "cached": lambda uri, folder: load(uri, cached=True),
    "peek": lambda uri, folder: peek(uri),
    "download": lambda uri, folder: download(uri, folder, resume=False),
}
SILENCES = {
    "before the headers": servers.Fault(delay=60),
    "in the body": servers.Fault(stall=60, stall_after=1000),
    "slow": servers.Fault(rate=50_000),
}


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell starts what it runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Presses Ctrl-C, and looks at what that leaves."""
    before = {thread.ident for thread in threading.enumerate()}
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        yield
    seconds = time.monotonic() - begun - after
    timer.join()
    left = [
        thread.name
        for thread in threading.enumerate()
        if thread.ident not in before and not SERVERS.search(thread.name)
    ]
    assert left == []
    assert seconds < 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", REMOTE, indirect=True)
@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_stops_what_waits(
    place, silence: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEMOI_CKPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "to").mkdir()
    uri = place.put("a.ckpt", DATA)
    later = 1 if way == "peek" else 3  # the first reads go well
    place.server.fault = lambda request: (
        SILENCES[silence] if len(place.server.log) >= later else None
    )
    with interrupted(after=0.3):
        WAYS[way](uri, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert not list((tmp_path / "cache").rglob("a.ckpt"))


def test_an_interrupted_process_ends(http_server: servers.HTTPServer, tmp_path: Path) -> None:
    uri = http_server.put("a.ckpt", DATA)
    http_server.fault = lambda request: (
        SILENCES["in the body"] if len(http_server.log) >= 3 else None
    )
    code = f"import anemoi_ckpt; print('begun', flush=True); anemoi_ckpt.load({uri!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(http_server.log) < 6:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, shown = process.communicate(timeout=20)
        assert time.monotonic() - begun < 1.5  # half of it for Python and torch to end
    assert shown.endswith("KeyboardInterrupt\n")
