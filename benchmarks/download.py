"""How fast `download` is, side by side with what a user would run instead.

    python benchmarks/download.py [--size BYTES] [--rounds N]

Downloads the checkpoint of `benchmarks/load.py` from the same server with each competitor in a
fresh process, in turn. Seconds are the best of the rounds, without imports, and ours with all its
checks. Right before each run the disk is done writing, and memory for the file was used and freed:
a virtual machine's host may take seconds to give it. All must bring the same bytes.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ── the competitors ───────────────────────────────────────────────────────────────────────────


def ours(target: str) -> None:
    from anemoi_ckpt import download

    download("s3://bench/last.ckpt", target, progress=False)


def boto3(target: str) -> None:
    import boto3

    boto3.client("s3").download_file("bench", "last.ckpt", target)


def obstore(target: str) -> None:
    import obstore
    import obstore.store

    store = obstore.store.S3Store(
        "bench",
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "10 minutes"},
    )
    with Path(target).open("wb") as file:
        file.writelines(obstore.get(store, "last.ckpt").stream(min_chunk_size=8 * 1024**2))


def curl(target: str) -> None:
    url = f"{os.environ['AWS_ENDPOINT_URL']}/bench/last.ckpt"
    subprocess.run(["curl", "--silent", "--show-error", "--fail", "-o", target, url], check=True)


OURS = "anemoi-ckpt, checked"
COMPETITORS: dict[str, tuple[tuple[str, ...], Callable[[str], None]]] = {
    OURS: (("anemoi_ckpt", "boto3"), ours),
    "boto3 download_file": (("boto3",), boto3),
    "obstore to a file": (("obstore", "obstore.store"), obstore),
    "curl": ((), curl),
}


def child(name: str, target: str, size: str) -> None:
    """Download once, and print what it took."""
    modules, function = COMPETITORS[name]
    for module in modules:
        importlib.import_module(module)
    subprocess.run([sys.executable, "-c", f"b'1' * {2 * int(size)}"], check=True)
    begin = time.perf_counter()
    function(target)
    print(time.perf_counter() - begin)


# ── the scenarios ─────────────────────────────────────────────────────────────────────────────


def run(name: str, target: Path, size: int) -> float:
    """Run a competitor in a fresh process, on a machine that is as it was for the one before."""
    target.unlink(missing_ok=True)
    os.sync()
    command = [sys.executable, __file__, "--child", name, str(target), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Run both scenarios."""
    from benchmarks.load import Bench, made_checkpoint, serving

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.6e9, help="of the checkpoint, in bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    path = made_checkpoint(options.size)
    expected = digest(path)
    folder = Path(tempfile.mkdtemp(prefix="anemoi-ckpt-download-"))
    try:
        with serving(path.parent.parent) as url:
            bench = Bench(url, path, options.rounds)
            bench.say(f"A checkpoint of {bench.size / 1e9:.2f} GB, {os.cpu_count()} cores.")
            for title, rate in (("80 MB/s a connection", 80e6), ("Unlimited", 0.0)):
                found: dict[str, list[float]] = {name: [] for name in COMPETITORS}
                for _ in range(options.rounds):
                    for name in COMPETITORS:
                        bench.reset(rate=rate)
                        target = folder / "last.ckpt"
                        found[name].append(run(name, target, bench.size))
                        if digest(target) != expected:
                            raise SystemExit(f"{name} brought something else")
                bench.say(f"\n**{title}**\n\n| | seconds | times ours |\n| --- | ---: | ---: |")
                for name, seconds in found.items():
                    least = min(seconds)
                    bench.say(f"| {name} | {least:.2f} | {least / min(found[OURS]):.1f} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
