"""Schedule-free AdamW, with its optimizer in training and evaluation mode where the module is: `schedulefree`."""

import lightning as L
import schedulefree
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.harness import Client, run


class Classifier(L.LightningModule):
    """Calls ``train()`` and ``eval()`` of the optimizer wherever Lightning calls those of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.01, warmup_steps=20)

    def on_train_start(self) -> None:
        self.optimizers().train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().eval()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().train()

    def on_train_end(self) -> None:
        self.optimizers().eval()


def pictures(size: int, seed: int) -> TensorDataset:
    """Ten noisy patterns."""
    patterns = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (size,), generator=generator)
    return TensorDataset(patterns[labels] + 2.0 * torch.randn(size, 32, generator=generator), labels)


def client() -> Client:
    module = Classifier()
    inputs, labels = pictures(2048, seed=2).tensors

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(module.net(inputs), labels).item()

    return Client(
        module,
        DataLoader(pictures(4096, seed=1), batch_size=32, shuffle=True, drop_last=True),
        loss,
        {
            "max_epochs": 4,
            "enable_checkpointing": True,
            "callbacks": [ModelCheckpoint("checkpoints", monitor="val_loss")],
        },
        validation=DataLoader(TensorDataset(inputs, labels), batch_size=256),
    )


if __name__ == "__main__":
    run(client, ("schedulefree",))
