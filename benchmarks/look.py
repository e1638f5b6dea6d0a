"""What it takes to look at a checkpoint: requests, bytes, seconds and memory of each question.

    python benchmarks/look.py [--size BYTES]

Each question is asked once in a fresh process, of the checkpoint of `benchmarks/load.py` on a
server of this machine that sends as fast as it can. Memory is what the process had at most beside
what it had after imports. `diff` compares the checkpoint with itself: two files.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
URI = "s3://bench/last.ckpt"


def questions() -> dict[str, Callable[[str], object]]:
    import anemoi_ckpt as a
    from strategies import weights

    return {
        "peek": lambda _: a.peek(URI),
        "plan": lambda _: a.plan(URI, weights),
        "diff": lambda _: a.diff(URI, URI),
        "verify": lambda _: a.verify(URI, progress=False),
        "download": lambda folder: a.download(URI, f"{folder}/last.ckpt", progress=False),
    }


def child(name: str, folder: str) -> None:
    """Ask once, and print seconds and bytes."""
    import boto3  # noqa: F401 - what the first request would import

    from benchmarks.load import peak_bytes

    ask = questions()[name]
    before = peak_bytes()
    begin = time.perf_counter()
    ask(folder)
    seconds = time.perf_counter() - begin
    print(seconds, peak_bytes() - before)


def main() -> None:
    """Ask all, and print a table."""
    from benchmarks.load import Bench, made_checkpoint, serving

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.6e9, help="of the checkpoint, in bytes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    path = made_checkpoint(options.size)
    with TemporaryDirectory() as folder, serving(path.parent.parent) as url:
        bench = Bench(url, path, 1)
        bench.say(f"A checkpoint of {bench.size / 1e9:.2f} GB, {os.cpu_count()} cores.\n")
        bench.say("| | requests | MB moved | seconds | MB of memory |")
        bench.say("| --- | ---: | ---: | ---: | ---: |")
        for name in questions():
            bench.reset()
            command = [sys.executable, __file__, "--child", name, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            seconds, peak = map(float, done.stdout.split()[-2:])
            log = bench.log()
            moved = sum(float(each.get("bytes", 0)) for each in log) / 1e6
            took = f"{moved:,.1f} | {seconds:.2f} | {peak / 1e6:.0f}"
            bench.say(f"| {name} | {len(log)} | {took} |")


if __name__ == "__main__":
    main()
