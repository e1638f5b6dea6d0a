"""What a real Anemoi model has learned goes along when its variables change. Skipped without it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anemoi_ckpt import load_into
from strategies import (
    align_variables,
)
from weather import KINDS, Variables, interface

pytest.importorskip("anemoi.models", reason="pip install -e '.[anemoi]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its dependencies, some dozens

ERA5 = Variables(
    ("t_850", "cos_lat", "z_500", "tp", "msl", "cp", "sin_lat"),
    forcing=("cos_lat", "sin_lat"),
    diagnostic=("tp", "cp"),
)
CERRA = Variables(("2t", "tp", "cos_lat", "cp", "10u"), diagnostic=("tp", "cp"))
DATASETS = {"single": {"data": ERA5}, "several": {"era5": ERA5, "cerra": CERRA}}
NEW = ["q_700", "u_10", "hcc", "sst", "ssrd"]
BOUNDED = {"normalizer": ["mean-std"], "min_val": [0.0], "variables": ["tp"]}
BOUNDING = [{"_target_": "anemoi.models.layers.bounding.NormalizedReluBounding", **BOUNDED}]


class Task(torch.nn.Module):
    """The interface under the name that Anemoi's Lightning module has it under."""

    def __init__(self, datasets: Mapping[str, Variables], kind: str, *, salt: int = 0) -> None:
        super().__init__()
        self.model = interface(datasets, kind, salt=salt, bounding=BOUNDING)


@functools.cache
def trained(kind: str, several: str) -> tuple[Task, dict[str, Any]]:
    """A model after a few steps, and its checkpoint."""
    torch.manual_seed(0)
    task = Task(DATASETS[several], kind)
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.05)
    for _ in range(5):
        batch = {
            name: torch.randn(2, 2, 1, 6, len(each.inputs), generator=draw)
            for name, each in DATASETS[several].items()
        }
        sum(given.square().mean() for given in task.model(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    hyper_parameters = {"data_indices": task.model.data_indices}
    state_dict = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    states = [optimizer.state_dict()]
    return task, {
        "epoch": 3,
        "state_dict": state_dict,
        "optimizer_states": states,
        "hyper_parameters": hyper_parameters,
    }


def knowledge_is_preserved(
    old: Any, new: Any, before: Mapping[str, Variables], after: Mapping[str, Variables]
) -> None:
    """On all inputs, the outputs of kept variables are the old ones: normalised, and in units."""
    draw = torch.Generator().manual_seed(2)
    values = {
        dataset: {
            name: torch.randn(2, 2, 6, generator=draw)
            * (1 if name in before[dataset].names else 50)
            for name in dict.fromkeys((*before[dataset].names, *each.names))
        }
        for dataset, each in after.items()
    }

    def batch(datasets: Mapping[str, Variables]) -> dict[str, torch.Tensor]:
        return {
            dataset: torch.stack([values[dataset][name] for name in each.inputs], -1)
            for dataset, each in datasets.items()
        }

    for model in (old, new):
        model.eval()
    with torch.no_grad():
        normal = [
            model({n: x[:, :, None] for n, x in batch(datasets).items()})
            for model, datasets in ((old, before), (new, after))
        ]
        in_units = [
            model.predict_step(batch(datasets)) for model, datasets in ((old, before), (new, after))
        ]
    for one, other in (normal, in_units):
        for dataset, each in after.items():
            kept = [name for name in each.outputs if name in before[dataset].outputs]
            was = one[dataset][..., [before[dataset].outputs.index(name) for name in kept]]
            now = other[dataset][..., [each.outputs.index(name) for name in kept]]
            torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5)
            assert was.std() > 0.01


@st.composite
def changed(draw: Callable[..., Any], datasets: Mapping[str, Variables]) -> dict[str, Variables]:
    """Other variables: in another order, some diagnostic ones gone, new ones of any role."""
    made = {}
    for dataset, old in datasets.items():
        gone = draw(st.sets(st.just("cp")))
        new = draw(st.lists(st.sampled_from(NEW), unique=True))
        roles = [draw(st.sampled_from(["prognostic", "forcing", "diagnostic"])) for _ in new]
        of = {
            role: [name for name, drawn in zip(new, roles, strict=True) if drawn == role]
            for role in ("forcing", "diagnostic")
        }
        kept = [name for name in old.names if name not in gone]
        made[dataset] = Variables(
            draw(st.permutations([*kept, *new])),
            (*old.forcing, *of["forcing"]),
            (*(name for name in old.diagnostic if name not in gone), *of["diagnostic"]),
        )
    return made


@pytest.mark.parametrize("several", DATASETS)
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_knowledge_is_preserved(kind: str, several: str, data: Any) -> None:
    task, checkpoint = trained(kind, several)
    datasets = data.draw(changed(DATASETS[several]))
    new = Task(datasets, kind, salt=5)  # with other statistics
    report = load_into(new, checkpoint, align_variables(model=new, new="zeros"), strict=True)
    assert set(report.loaded) == set(new.state_dict())
    knowledge_is_preserved(task.model, new.model, DATASETS[several], datasets)
