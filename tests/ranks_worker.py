"""What a rank does in tests of real processes: `torchrun … ranks_worker.py TASK ARGUMENTS`."""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anemoi_ckpt import CheckpointError, MismatchError, load, load_into
from strategies import weights


def equal(uri: str) -> dict[str, Any]:
    """Loads the weights; tells their digest."""
    state = load(uri, weights, group=dist.group.WORLD)
    data = b"".join(tensor.numpy().tobytes() for tensor in state.values())
    return {"sha256": hashlib.sha256(data).hexdigest()}


def killed(uri: str) -> dict[str, Any]:
    """Rank 1 is killed while it loads; the others tell what they meet."""

    def kill(_done: int, _total: int | None) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    begun = time.monotonic()
    try:
        load(uri, weights, group=dist.group.WORLD, progress=kill)
    except CheckpointError as err:
        return {"error": str(err), "kind": type(err).__name__, "after": time.monotonic() - begun}
    return {}


def sharded(uri: str, meta: str, width: str) -> dict[str, Any]:
    """Loads into a model under FSDP2; tells whether each rank has its parts, and its memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def made(size: int, device: str) -> torch.nn.Module:
        with torch.device(device):
            layers = [torch.nn.Linear(size, size) for _ in range(8)]
            model = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(size))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    small = made(4, "cpu")  # imports, and whatever is made once
    names = {name: tuple(value.shape) for name, value in small.state_dict().items()}
    load_into(small, {name: torch.ones(shape) for name, shape in names.items()})
    model = made(int(width), "meta" if meta == "True" else "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = load_into(model, uri, weights, group=dist.group.WORLD)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    expected = load(uri, weights)
    right = all(
        torch.equal(value.full_tensor() if hasattr(value, "full_tensor") else value, expected[name])
        for name, value in model.state_dict().items()
    )
    local = sum(p.to_local().nbytes for p in model.parameters())
    told = ""
    try:
        load_into(model, uri, weights, optimizer=torch.optim.AdamW(model.parameters()))
    except MismatchError as err:
        told = str(err)
    return {
        "right": right,
        "loaded": len(report.loaded),
        "local": local,
        "peak": peak * 1024,
        "of_optimizer": told,
    }


def run(task: Callable[..., dict[str, Any]], folder: str, *arguments: str) -> None:
    dist.init_process_group("gloo")
    result = task(*arguments)
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    if task is not killed:
        dist.destroy_process_group()


if __name__ == "__main__":
    run({"equal": equal, "killed": killed, "sharded": sharded}[sys.argv[1]], *sys.argv[2:])
