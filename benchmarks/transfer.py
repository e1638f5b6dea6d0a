"""What a model knows after its variables changed, side by side with what a user would do instead.

    pip install -c constraints.txt -e '.[test,anemoi]'
    pip install --no-deps anemoi-models==0.19.0 anemoi-graphs==0.9.8  # or leave it at 0.13
    python benchmarks/transfer.py [--seeds N] [--kinds GNN …]

Trains a real encoder-processor-decoder of anemoi-models (of each kind of mapper) on made-up
weather: states of coupled variables on a few nodes, driven by forcings. Then it goes on with other
variables: most moved, two new ones (a prognostic, a forcing), one diagnostic one gone. Losses are
mean squared errors of a step on held-out data, normalised: before any training, of the variables
that both know, and of all; and of all after some steps of training. Means of the seeds.
"""

import argparse
import functools
import importlib.metadata
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from anemoi_ckpt import load_into  # noqa: E402 - found now
from strategies import transfer_learning  # noqa: E402 - likewise
from weather import KINDS, Variables, interface  # noqa: E402 - likewise
from weather_019 import interface_019  # noqa: E402 - likewise

FORCING, DIAGNOSTIC = ("cos_lat", "insolation"), ("tp", "cp")
BEFORE = Variables(
    ("t_850", "z_500", "msl", "u_10", "tp", "cp", "cos_lat"), ("cos_lat",), DIAGNOSTIC
)
AFTER = Variables(
    ("cos_lat", "z_500", "q_700", "insolation", "tp", "u_10", "t_850", "msl"), FORCING, ("tp",)
)
NODES, LEARNED, FURTHER = 12, 1500, 100  # the last two are steps of training


VERSION = tuple(map(int, importlib.metadata.version("anemoi-models").split(".")[:2]))
interface_of_today = interface_019 if VERSION >= (0, 19) else interface
build = functools.partial(interface_of_today, nodes=NODES, channels=32)

Weather = dict[str, torch.Tensor]  # of each variable (samples, 3, nodes): two steps, and the next


def inputs(drawn: Weather, variables: Variables) -> torch.Tensor:
    return torch.stack([drawn[name][:, :2] for name in variables.inputs], -1)[:, :, None]


def outputs(drawn: Weather, variables: Variables) -> torch.Tensor:
    return torch.stack([drawn[name][:, 2:] for name in variables.outputs], -1)[:, :, None]


def weather(samples: int, seed: int) -> Weather:
    """Draw states, and let them go on by the same laws."""
    laws, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    names = [n for n in dict.fromkeys((*BEFORE.names, *AFTER.names)) if n not in DIAGNOSTIC]
    moving = [place for place, name in enumerate(names) if name not in FORCING]
    coupling = torch.randn(len(names), len(names), generator=laws) * 0.35
    mixing = torch.softmax(torch.randn(NODES, NODES, generator=laws) * 2, -1)
    rain = torch.randn(len(names), len(DIAGNOSTIC), generator=laws) / len(names) ** 0.5
    states = [torch.randn(samples, NODES, len(names), generator=draw)]
    for _ in range(2):
        now = states[-1]
        after = now.clone()
        change = torch.tanh(mixing @ now @ coupling)[..., moving]
        after[..., moving] = 0.8 * now[..., moving] + 0.6 * change
        states.append(after)
    state = torch.stack(states, 1)
    values = {name: state[..., place] for place, name in enumerate(names)}
    fallen = torch.tanh(state @ rain)
    return values | {name: fallen[..., n] for n, name in enumerate(DIAGNOSTIC)}


def train(model: Any, variables: Variables, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = weather(32, 1_000_000 * seed + step)
        given = model({"data": inputs(batch, variables)})["data"]
        (given - outputs(batch, variables)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def losses(model: Any, variables: Variables) -> tuple[float, float]:
    """Give the losses on held-out data: of the variables that both know, and of all."""
    held_out = weather(512, 999)
    with torch.no_grad():
        given = model({"data": inputs(held_out, variables)})["data"]
    errors = (given - outputs(held_out, variables)).square()
    kept = [place for place, name in enumerate(variables.outputs) if name in BEFORE.outputs]
    return errors[..., kept].mean().item(), errors.mean().item()


# ── the competitors ───────────────────────────────────────────────────────────────────────────


def scratch(_model: Any, _path: Path) -> None:
    """Leave the model as it was made."""


def skip_mismatched(model: Any, path: Path) -> None:
    """Load what has the same name and shape, as Anemoi's transfer learning does today."""
    wanted = model.state_dict()
    held = torch.load(path, weights_only=False)["state_dict"]
    fits = {n: t for n, t in held.items() if n in wanted and t.shape == wanted[n].shape}
    model.load_state_dict(fits, strict=False)


def ours(new: str) -> Callable[[Any, Path], None]:
    def loaded(model: Any, path: Path) -> None:
        load_into(model, path, transfer_learning(model, new=new))

    return loaded


COMPETITORS = {
    "from scratch": scratch,
    "skip what has another shape": skip_mismatched,
    "`transfer_learning(model)`": ours("model"),
    '`transfer_learning(model, new="zeros")`': ours("zeros"),
}


def measured(kind: str, seed: int, folder: Path) -> dict[str, Sequence[float]]:
    torch.manual_seed(seed)
    old = build({"data": BEFORE}, kind)
    train(old, BEFORE, LEARNED, seed)
    path = folder / "last.ckpt"
    held = {"data_indices": old.data_indices}
    torch.save({"state_dict": old.state_dict(), "hyper_parameters": held}, path)
    found: dict[str, Sequence[float]] = {"before": (*losses(old, BEFORE), float("nan"))}
    for name, prepare in COMPETITORS.items():
        torch.manual_seed(100 + seed)
        new = build({"data": AFTER}, kind)
        prepare(new, path)
        first = losses(new, AFTER)
        train(new, AFTER, FURTHER, 500 + seed)
        found[name] = (*first, losses(new, AFTER)[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    print(f"anemoi-models {'.'.join(map(str, VERSION))}, {given.seeds} seeds")
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as folder:
            runs = [measured(kind, seed, Path(folder)) for seed in range(given.seeds)]
        before = sum(run["before"][0] for run in runs) / len(runs)
        print(f"\n**{kind} mappers** (the old model: {before:.3f} on its own variables)\n")
        print(
            f"| | kept variables | all | all, {FURTHER} steps later |\n| --- | ---: | ---: | ---: |"
        )
        for name in COMPETITORS:
            means = torch.tensor([run[name] for run in runs]).mean(0).tolist()
            print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
