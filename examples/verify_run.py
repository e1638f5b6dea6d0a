"""Verify all checkpoints of a run at once, with Dask, and tabulate it. Needs Dask.

pip install distributed && python examples/verify_run.py [FOLDER OR GLOB]

The workers are threads here: most of the time they wait for a store, or compute checksums, and let
other threads run meanwhile. What is sent to them and back can be pickled: give `Client` the address
of a cluster instead, and its workers read from the store themselves. Without a folder, a run of six
is made, one of which is damaged.
"""

import sys
import tempfile
from pathlib import Path

import torch

from anemoi_ckpt import Verified, find, save, verify

try:
    from distributed import Client, LocalCluster
except ImportError as err:
    raise SystemExit("this example needs Dask: pip install distributed") from err


def main() -> None:
    """Do it, and say what happened."""
    with tempfile.TemporaryDirectory() as made:
        entries = find(sys.argv[1] if len(sys.argv) > 1 else make_run(Path(made)))
        with (
            LocalCluster(processes=False, dashboard_address=None) as local,
            Client(local) as client,
        ):
            results = client.gather(client.map(verify, entries))
        print("\n".join(map(tabulated, results)))
    print(f"{sum(not found for found in results)} of {len(results)} checkpoints are damaged")


def make_run(folder: Path) -> Path:
    """Save six checkpoints, and flip one bit in one of them."""
    for epoch in range(6):
        state = {"weight": torch.full((250_000,), float(epoch)), "bias": torch.zeros(100)}
        save({"state_dict": state, "epoch": epoch}, folder / f"epoch={epoch}.ckpt")
    path = folder / "epoch=4.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return folder


def tabulated(found: Verified) -> str:
    """Give a row of the table."""
    name = found.place.rpartition("/")[2]
    verdict = "whole" if found else "; ".join(found.damaged)
    return f"{name}  {found.bytes / 1e6:6.1f} MB  {found.checked:3} checked  {verdict}"


if __name__ == "__main__":
    main()
