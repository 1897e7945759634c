"""Adaptive periodic averaging under Ray Train: python with_ray_train.py.

As in Ray's guide to Lightning, every worker runs a function that makes a Trainer with Ray's environment and callback;
the strategy is this package's. After each epoch the workers hold the average and report it as a checkpoint. When a
worker fails, Ray starts all of them again, and they go on from the latest one.
"""

import os
import tempfile

import lightning as L
import ray.train
import torch
from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_adpsgd import AdaptivePeriod, CommunicationMonitor
from lightning_adpsgd.ray import RayADPSGDStrategy


class Classifier(L.LightningModule):
    """A multilayer perceptron for images of digits."""

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
        self.log("val_accuracy", (self.network(images).argmax(dim=1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def digits() -> list:
    """Scikit-learn's images of digits, shape (64,), values 0 to 1: four fifths to train on, one to validate."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    return random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))


def train_on_a_worker(settings: dict) -> None:
    """What every worker runs, again after a failure."""
    L.seed_everything(1)
    train, val = digits()
    trainer = L.Trainer(
        strategy=RayADPSGDStrategy(AdaptivePeriod(initial=4)),
        plugins=[RayLightningEnvironment()],
        callbacks=[RayTrainReportCallback(), CommunicationMonitor()],
        accelerator="auto",
        devices="auto",
        max_epochs=settings["epochs"],
        logger=False,
        enable_checkpointing=False,  # the callback saves
        enable_progress_bar=False,
    )
    trainer = prepare_trainer(trainer)
    loaders = DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(val, batch_size=64)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(Classifier(), *loaders)
    else:
        with checkpoint.as_directory() as folder:
            path = os.path.join(folder, RayTrainReportCallback.CHECKPOINT_NAME)
            trainer.fit(Classifier(), *loaders, ckpt_path=path)


def main() -> None:
    """Train with two workers on this machine's CPU."""
    trainer = TorchTrainer(
        train_on_a_worker,
        train_loop_config={"epochs": 10},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            storage_path=tempfile.mkdtemp(),  # in a cluster, a folder that all machines reach
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    result = trainer.fit()
    print(f"accuracy {100 * result.metrics['val_accuracy']:.1f} %")

    with result.checkpoint.as_directory() as folder:
        model = Classifier.load_from_checkpoint(os.path.join(folder, RayTrainReportCallback.CHECKPOINT_NAME))
    images, labels = digits()[1][:]
    accuracy = (model.network(images).argmax(dim=1) == labels).float().mean()
    print(f"accuracy {100 * accuracy:.1f} % of the model in {result.checkpoint.path}")


if __name__ == "__main__":
    main()
