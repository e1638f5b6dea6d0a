"""Whether anything is lost, or grows, when a third of all requests fail.

    python benchmarks/soak.py [--loads N] [--downloads N] [--seed N]

Serves a checkpoint as HTTP, S3, GCS and Azure (by the servers of the tests, in a process of their
own), with a fault in a third of all requests: reset, cut off, silent, throttled, broken, a bit
flipped. Loads it again and again in one process, and looks at that process's open files, threads
and memory. Downloads it in processes that are killed (SIGKILL) at random moments and started again,
until one ends well. Everything that ends well must be right to the bit.
"""

import argparse
import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - after sys.path

import servers  # noqa: E402 - after sys.path
from anemoi_ckpt import CheckpointError, download, load, load_into  # noqa: E402 - after sys.path
from checkpoints import as_bytes  # noqa: E402 - after sys.path
from servers import Fault  # noqa: E402 - after sys.path
from strategies import weights  # noqa: E402 - after sys.path

FAULTY = 1 / 3  # of all requests
HANG_SECONDS = 60
PATIENCE = {"retries": 8, "timeout": 6.0}  # three in a row fail often; silence ends after 2 s

# ── what is served ────────────────────────────────────────────────────────────────────────────


def checkpoint() -> dict[str, Any]:
    """Give a checkpoint of 12 MB, a third of it weights; the same every time."""
    draw = torch.Generator().manual_seed(0)
    return {
        "epoch": 3,
        "state_dict": {
            "weight": torch.randn(1000, 999, generator=draw),
            "bias": torch.randn(1000, generator=draw),
        },
        "optimizer_states": [torch.randn(1000, 1000, generator=draw) for _ in range(2)],
    }


def any_fault(draw: random.Random) -> Fault:
    """Choose what goes wrong with a request."""
    return draw.choice(
        [
            Fault(reset=True),
            Fault(reset=True, cut=draw.randrange(1_000_000)),
            Fault(cut=draw.randrange(1_000_000)),
            Fault(cut=0),
            Fault(delay=draw.random() / 5),
            Fault(stall=30, stall_after=draw.randrange(1_000_000))
            if draw.random() < 0.1
            else Fault(rate=20e6),
            Fault(flip=draw.randrange(8_000_000)),
            servers.throttled(429, 0),
            Fault(status=draw.choice((408, 500, 502, 503, 504))),
        ]
    )


def serve(seed: int, pipe: Connection) -> None:
    """Serve in all places; tell how many requests failed when asked."""
    draw, count = random.Random(seed), Counter[str]()
    lock = threading.Lock()

    def fault(_request: servers.Request) -> Fault | None:
        with lock:
            wrong = draw.random() < FAULTY
            count[("right", "wrong")[wrong]] += 1
            return any_fault(draw) if wrong else None

    data = as_bytes(checkpoint())
    with contextlib.ExitStack() as stack:
        places = {}
        for start in (servers.http_store, servers.s3_store, servers.gcs_store, servers.azure_store):
            try:
                store = stack.enter_context(start())
            except servers.UnavailableError as err:
                print(f"left out: {err}", flush=True)
                continue
            store.write("soak.ckpt", data)
            store.server.fault = fault
            places[store.uri("soak.ckpt")] = store.environment
        pipe.send((places, hashlib.sha256(data).hexdigest()))
        pipe.recv()
        pipe.send(dict(count))
        pipe.recv()


# ── loads ─────────────────────────────────────────────────────────────────────────────────────


def resources() -> dict[str, int]:
    """Give what this process holds."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status.partition("Threads:")[2].split()[0]),
        "MB": int(status.partition("VmRSS:")[2].split()[0]) // 1024,
    }


def same(one: Any, other: Any) -> bool:
    """Tell whether two checkpoints are the same to the bit."""
    flat, spec = torch.utils._pytree.tree_flatten(one)
    others, other_spec = torch.utils._pytree.tree_flatten(other)
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(flat, others, strict=True)
    )


def load_once(uri: str, number: int, right: dict[str, Any]) -> bool:
    """Load in one of three ways, and tell whether what came is right."""
    if number % 3 == 0:
        return same(load(uri, **PATIENCE), right)
    if number % 3 == 1:
        return same(load(uri, weights, **PATIENCE), right["state_dict"])
    model = torch.nn.Linear(999, 1000)
    load_into(model, uri, **PATIENCE)
    return same(dict(model.state_dict()), right["state_dict"])


def soak_loads(places: list[str], count: int) -> Counter[str]:
    """Load again and again; show what that takes."""
    right, outcomes, longest = checkpoint(), Counter[str](), 0.0
    for number in range(count):
        begun = time.monotonic()
        try:
            uri = places[number % len(places)]
            outcomes["right" if load_once(uri, number, right) else "WRONG"] += 1
        except CheckpointError as err:
            outcomes[type(err).__name__] += 1
            print(f"- {err}", flush=True)
        longest = max(longest, time.monotonic() - begun)
        if number + 1 in {count // 5, count}:
            held = ", ".join(f"{size} {what}" for what, size in resources().items())
            print(f"- after {number + 1} loads: {held}", flush=True)
    outcomes["HANG"] += longest > HANG_SECONDS
    print(f"- the longest load took {longest:.1f} s", flush=True)
    return +outcomes


# ── downloads ─────────────────────────────────────────────────────────────────────────────────


def soak_downloads(places: list[str], count: int, digest: str, draw: random.Random) -> Counter[str]:
    """Download in processes that are killed, until one ends."""
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            target = Path(folder) / "soak.ckpt"
            target.unlink(missing_ok=True)
            for attempt in range(20):
                after = draw.random() / 3 if attempt < 3 and draw.random() < 0.7 else None
                ended = download_in_a_process(places[number % len(places)], target, after)
                outcomes[ended] += ended != "right"
                if ended == "right":
                    break
            whole = target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == digest
            outcomes["right" if whole else "WRONG"] += 1
            outcomes["LEFT OVER"] += len(list(Path(folder).iterdir())) - 1
    return +outcomes


def download_in_a_process(uri: str, target: Path, kill_after: float | None) -> str:
    """Fork, so that none has to import torch; tell how it ended."""
    pid = os.fork()
    if not pid:
        try:
            download(uri, target, progress=False, **PATIENCE)
        except CheckpointError:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {0: "right", 1: "an error"}.get(os.waitstatus_to_exitcode(status), "killed")
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "HANG"


def main() -> None:
    """Run both, and fail if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--downloads", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("anemoi_ckpt").setLevel(logging.ERROR)
    begun = time.monotonic()
    pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=serve, args=(options.seed, theirs), daemon=True).start()
    places, digest = pipe.recv()
    for environment in places.values():
        os.environ |= environment
    uris = list(places)
    downloads = soak_downloads(uris, options.downloads, digest, random.Random(options.seed))
    loads = soak_loads(uris, options.loads)
    pipe.send("how many?")
    requests = pipe.recv()
    share = requests["wrong"] / sum(requests.values())
    kinds = ", ".join(uri.partition(":")[0] for uri in uris)
    print(f"- {options.loads} loads from {kinds}: {dict(loads)}")
    print(f"- {options.downloads} downloads: {dict(downloads)}")
    print(f"- {sum(requests.values())} requests, {share:.0%} of them with a fault")
    print(f"- {time.monotonic() - begun:.0f} s")
    if any(name.isupper() for name in (*loads, *downloads)):
        sys.exit("something was wrong")


if __name__ == "__main__":
    main()
