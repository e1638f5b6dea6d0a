"""How fast many ranks get the same weights, side by side with what a user would run instead.

    python benchmarks/ranks.py [--size BYTES] [--ranks N] [--rounds N]

Loads the weights of `benchmarks/load.py`'s checkpoint on so many processes of this machine, over
gloo, from the same server. Seconds are from when all are ready to when the last one has them, the
best of the rounds, without imports; bytes are what the server sent, as a multiple of the weights.
All must get the same, bit for bit.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.load import URI, Bench, boto3_file, checksum, made_checkpoint, serving  # noqa: E402 - found now

# ── the competitors ───────────────────────────────────────────────────────────────────────────


def shared(_path: str) -> Any:
    from anemoi_ckpt import load
    from strategies import weights

    return load(URI, weights, group=dist.group.WORLD, progress=False)


def alone(_path: str) -> Any:
    from anemoi_ckpt import load
    from strategies import weights

    return load(URI, weights, progress=False)


def boto3_each(path: str) -> Any:
    return boto3_file(path)["state_dict"]


OURS = "anemoi-ckpt, group="
COMPETITORS = {
    OURS: shared,
    "anemoi-ckpt, each rank for itself": alone,
    "each rank boto3 download_file + torch.load": boto3_each,
}


def child(name: str) -> None:
    """Load once, as one of the ranks, and print what it took."""
    for module in ("anemoi_ckpt", "strategies", "boto3"):
        importlib.import_module(module)
    dist.init_process_group("gloo")
    dist.barrier()
    begin = time.perf_counter()
    result = COMPETITORS[name](URI)
    dist.barrier()
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "sum": checksum(dict(result))}))
    dist.destroy_process_group()


# ── the scenarios ─────────────────────────────────────────────────────────────────────────────


def run(name: str, ranks: int, port: int) -> list[dict[str, Any]]:
    """Run a competitor on fresh processes."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", name],
            env={**os.environ, **world, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


def main() -> None:
    """Run both scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.6e9, help="of the checkpoint, in bytes")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    path = made_checkpoint(options.size)
    port = 29600
    with serving(path.parent.parent) as url:
        bench = Bench(url, path, options.rounds)
        weights = bench.size / 3
        bench.say(f"A checkpoint of {bench.size / 1e9:.2f} GB, {options.ranks} ranks.")
        for title, total in (("80 MB/s for the whole server", 80e6), ("Unlimited", 0.0)):
            bench.say(f"\n**{title}**\n")
            bench.say("| | seconds | times ours | sent / weights |")
            bench.say("| --- | ---: | ---: | ---: |")
            best: dict[str, float] = {}
            for name in COMPETITORS:
                for _ in range(options.rounds):
                    bench.reset(total=total)
                    port += 1
                    results = run(name, options.ranks, port)
                    if len({result["sum"] for result in results}) > 1:
                        raise SystemExit(f"{name} gives something else on some ranks")
                    seconds = max(result["seconds"] for result in results)
                    best[name] = min(best.get(name, seconds), seconds)
                    sent = sum(entry.get("bytes", 0) for entry in bench.log()) / weights
                ratio = best[name] / best[OURS]
                bench.say(f"| {name} | {best[name]:.2f} | {ratio:.1f} | {sent:.2f} |")


if __name__ == "__main__":
    main()
