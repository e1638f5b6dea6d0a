"""Choose a checkpoint and its strategies in a Hydra configuration. Needs Hydra.

pip install hydra-core && python examples/hydra_config.py [pretrained=s3://bucket/last.ckpt]
"""

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from anemoi_ckpt import load_into

try:
    from hydra import compose, initialize
    from hydra.utils import instantiate
except ImportError as err:
    raise SystemExit("this example needs Hydra: pip install hydra-core") from err


def main(overrides: list[str]) -> None:
    """Build the model that the configuration describes, and load into it."""
    with initialize(config_path=".", version_base=None):
        config = compose("config", overrides)
    model = instantiate(config.model)

    def complete(strategy: Any) -> Any:
        return strategy(model) if isinstance(strategy, functools.partial) else strategy

    strategies = [complete(strategy) for strategy in instantiate(config.strategies)]
    print(load_into(model, config.pretrained, *strategies))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        state = {"model.weight": torch.ones(2, 4), "model.bias": torch.ones(3)}
        torch.save({"state_dict": state}, path)
        main(sys.argv[1:] or [f"pretrained={path}"])
