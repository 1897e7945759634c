"""A small model, its data and a Trainer, for tests that fit on several ranks."""

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_adpsgd import ADPSGDStrategy, AveragingRound


class Classifier(L.LightningModule):
    """Two layers with BatchNorm between them."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.0, batch_norm: bool = True) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16) if batch_norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 3)
        )

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs).float(), labels)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def data(size: int = 256, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 8, generator=generator)
    return TensorDataset(inputs.to(dtype), inputs[:, :3].argmax(dim=1))


def loader(size: int = 256, batch_size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader:
    return DataLoader(data(size, dtype), batch_size=batch_size, shuffle=True, drop_last=True)


class RoundsKept(L.Callback):
    """Keeps the record of every round."""

    def __init__(self) -> None:
        self.rounds: list[AveragingRound] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.subscribe(self.rounds.append)


def trainer(strategy: ADPSGDStrategy | str, **options: Any) -> L.Trainer:
    """A quiet Trainer over the ranks that a test's processes were announced as."""
    callbacks = options.pop("callbacks", [])
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ["WORLD_SIZE"]),
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(strategy=strategy, callbacks=callbacks, **{**defaults, **options})


def fit(
    strategy: ADPSGDStrategy | str, model: L.LightningModule, *, seed: int = 0, loaders: Any = None, **options: Any
) -> tuple[L.Trainer, list[AveragingRound]]:
    """Fit, and return the Trainer and the rounds."""
    kept = RoundsKept()
    callbacks = [*options.pop("callbacks", []), *([kept] if strategy != "ddp" else [])]
    fitted = trainer(strategy, callbacks=callbacks, **options)
    torch.manual_seed(seed)
    loaders = loaders if loaders is not None else {"train_dataloaders": loader()}
    fitted.fit(model, **loaders)
    return fitted, kept.rounds


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def identical(states: list[dict[str, Tensor]]) -> bool:
    """Whether all ranks' floating tensors are the same, bit for bit."""
    first = floats(states[0])
    return all(torch.equal(first[name], state[name]) for state in states for name in first)


def seeded(seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(**options)
