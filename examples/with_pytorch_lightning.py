"""A project that says ``import pytorch_lightning as pl``, as most published ones do: python with_pytorch_lightning.py.

Two lines make it average parameters: the import, and the strategy's name. What has to name a class takes it from
``lightning_adpsgd.pytorch_lightning``, because classes of the two families cannot be mixed.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_adpsgd.pytorch_lightning import CommunicationMonitor


class Digits(pl.LightningDataModule):
    """Scikit-learn's images of digits, shape (64,), values 0 to 1."""

    def setup(self, stage: str) -> None:
        """Split them in the same way on every worker."""
        images, labels = load_digits(return_X_y=True)
        digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
        self.train, self.val = random_split(digits, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        """Lightning gives each worker a share of its own."""
        return DataLoader(self.train, batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The fifth that is not trained on."""
        return DataLoader(self.val, batch_size=64)


class Classifier(pl.LightningModule):
    """A multilayer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Accuracy of the average: all workers have it before validation begins."""
        images, labels = batch
        accuracy = (self.network(images).argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, which `adpsgd_int4` brings together as the drift of the parameters tells it."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    """Train with two workers on a CPU, and validate every five epochs."""
    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy="adpsgd_int4",
        accelerator="cpu",
        devices=2,
        max_epochs=10,
        check_val_every_n_epoch=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[CommunicationMonitor()],
    )
    trainer.fit(Classifier(), Digits())
    if trainer.is_global_zero:
        print(f"accuracy {100 * float(trainer.callback_metrics['val_accuracy']):.1f} %")


if __name__ == "__main__":
    main()
