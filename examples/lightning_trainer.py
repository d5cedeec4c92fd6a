"""Float16 in Lightning: masters from the float32 originals, a clip, a schedule that waits.

python examples/lightning_trainer.py FOLDER
"""

import sys

import mpcore
import torch
from lightning import LightningModule, Trainer
from mpcore.integrations.lightning import MasterWeightsPrecision
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

STEPS = 300


class Adder(LightningModule):
    """Learns to add up its inputs."""

    def __init__(self) -> None:
        """Makes a small network in float32."""
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def configure_optimizers(self):
        """Wraps AdamW and makes the model 16-bit: its float32 weights become the masters."""
        self.optimizer = mpcore.MixedPrecisionOptimizer(
            torch.optim.AdamW(self.net.named_parameters(), lr=1e-2)
        )
        mpcore.cast_model(self.net, torch.float16, self.optimizer)
        schedule = CosineAnnealingLR(self.optimizer, STEPS)
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler, metric):
        """Has the schedule wait while a step is skipped; without it, it moves on."""
        mpcore.step_scheduler(scheduler, self.optimizer.last_step)

    def training_step(self, batch, batch_idx):
        """Computes the loss in float32."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x.half()).float(), y)


def main(folder: str) -> None:
    """Trains and prints the loss."""
    torch.manual_seed(0)
    x = torch.randn(32 * STEPS, 16)
    rows = TensorDataset(x, x.sum(dim=1, keepdim=True))
    module = Adder()
    trainer = Trainer(
        plugins=MasterWeightsPrecision(),
        gradient_clip_val=1.0,
        max_epochs=1,
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=32))
    optimizer = module.optimizer
    with torch.no_grad():
        loss = module.cpu().training_step(rows[:512], 0)
    print(f"{optimizer.steps} steps, of which {optimizer.skipped_steps} skipped; loss {loss:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
