"""Adaptive periodic averaging on real handwritten digits, with two workers on a CPU: python examples/digits.py.

The data are scikit-learn's 1,797 images of 8x8 pixels, which come with the package. Compare with
`--strategy ddp` (full communication), with `--strategy 8` (a constant averaging period), and with
`--strategy proportional` (a period that adapts in proportion, rather than by one step per round).
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor


class DigitClassifier(L.LightningModule):
    """A small convolutional network; nothing in it knows how it is distributed."""

    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.test_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch of this worker's own share of the data."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)  # no sync_dist: it would communicate at every step
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Accuracy of the averaged model."""
        images, labels = batch
        self.test_accuracy(self.network(images), labels)
        self.log("test_accuracy", self.test_accuracy, on_epoch=True)

    def configure_optimizers(self) -> dict:
        """SGD with momentum; the learning rate warms up and decays twice, and the averaging period adapts to it."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams["learning_rate"], momentum=0.9, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (steps // 10 + 1)) * 0.1 ** ((step >= steps // 2) + (step >= steps * 3 // 4))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test images, shape (1, 8, 8), values 0 to 1."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=data.target)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def strategy_of(name: str) -> str | ADPSGDStrategy:
    """What `--strategy` stands for: "adpsgd", "ddp", "proportional", or an int for a constant averaging period."""
    if name in ("adpsgd", "ddp"):
        return name
    if name == "proportional":
        return ADPSGDStrategy(period=AdaptivePeriod(growth="proportional"))
    if name.isdecimal() and int(name) > 0:
        return ADPSGDStrategy(period=int(name))
    raise argparse.ArgumentTypeError(f"{name!r}: expected adpsgd, ddp, proportional, or an averaging period such as 8")


def positive(number: str) -> int:
    """An int of at least 1."""
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{number!r}: expected an int of at least 1")
    return int(number)


def main() -> None:
    """Train, then test the averaged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategy", default="adpsgd", type=strategy_of, help="adpsgd, ddp, proportional, or a constant period"
    )
    parser.add_argument("--workers", default=2, type=positive, help="processes on this machine's CPU")
    parser.add_argument("--epochs", default=20, type=positive)
    parser.add_argument("--seed", default=1, type=positive)
    arguments = parser.parse_args()

    L.seed_everything(arguments.seed)
    train, test = digits()
    trainer = L.Trainer(
        strategy=arguments.strategy,
        accelerator="cpu",
        devices=arguments.workers,
        max_epochs=arguments.epochs,
        logger=CSVLogger("logs", name="digits"),
        callbacks=[
            CommunicationMonitor(plot=True, progress_bar=True),
            LearningRateMonitor("step"),
            ModelCheckpoint(every_n_epochs=10),  # not often: workers average for every checkpoint too
        ],
        log_every_n_steps=5,
    )
    model = DigitClassifier()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True, drop_last=True))
    trainer.test(model, DataLoader(test, batch_size=64))


if __name__ == "__main__":
    main()
