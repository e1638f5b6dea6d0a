"""Resume a Lightning run whose checkpoint is elsewhere. Needs Lightning.

pip install lightning && python examples/lightning_resume.py
"""

import logging
import tempfile
import warnings
from pathlib import Path

import torch
from quickstart import Server

from anemoi_ckpt import checkpoint_io

try:
    import lightning
except ImportError as err:
    raise SystemExit("this example needs Lightning: pip install lightning") from err


class Net(lightning.LightningModule):
    """As small as can be."""

    def __init__(self) -> None:
        """Make its one layer."""
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        """Learn to give back what came."""
        return torch.nn.functional.mse_loss(self.layer(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use AdamW, whose state is two thirds of a checkpoint."""
        return torch.optim.AdamW(self.parameters())


def trainer(folder: str, epochs: int) -> lightning.Trainer:
    """Make a trainer that is quiet, and writes where it is told to."""
    return lightning.Trainer(
        plugins=[checkpoint_io()],
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def main() -> None:
    """Do it, and say what happened."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        data = torch.utils.data.DataLoader(torch.randn(32, 64), batch_size=8)
        first = trainer(folder, epochs=2)
        first.fit(Net(), data)
        first.save_checkpoint(f"{folder}/last.ckpt")

        with Server(Path(folder) / "last.ckpt") as server:
            uri = f"http://127.0.0.1:{server.server_port}/last.ckpt"
            second = trainer(folder, epochs=3)
            second.fit(Net(), data, ckpt_path=uri)
            server.shutdown()
        print(f"went on at step {first.global_step}, and came to step {second.global_step}")


if __name__ == "__main__":
    main()
