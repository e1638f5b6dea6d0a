"""Average the last five checkpoints of a run, without moving any optimizer state. Needs no extra.

python examples/average.py
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from quickstart import Server, train

from anemoi_ckpt import load, save
from strategies import average, weights


def main() -> None:
    """Do it, and say what happened."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        paths = [Path(folder) / f"epoch={epoch}.ckpt" for epoch in range(8)]
        models = [train(path) for path in paths]
        run = [stack.enter_context(Server(path)) for path in paths]
        last_five = [f"http://127.0.0.1:{server.server_port}/last.ckpt" for server in run[-5:]]

        first, *others = last_five
        mean = load(first, weights, average(*(load(uri, weights) for uri in others)))
        save(mean, Path(folder) / "mean.safetensors")

        wanted = sum(model.state_dict()["0.weight"].double() for model in models[-5:]) / 5
        assert torch.equal(mean["0.weight"], wanted.float())
        moved, stored = (sum(each) / 1e6 for each in zip(*map(sizes, run[-5:]), strict=True))
        print(f"averaged {len(mean)} tensors of {len(last_five)} checkpoints")
        print(f"moved {moved:.1f} MB of {stored:.1f} MB stored ({moved / stored:.0%})")
        for server in run:
            server.shutdown()


def sizes(server: Server) -> tuple[int, int]:
    """Give what a server sent, and what it has, in bytes."""
    return server.sent, len(server.data)


if __name__ == "__main__":
    main()
