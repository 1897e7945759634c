"""What a worker of the Trainer's tests does: it trains as many steps as the test says, and tells where it stands."""

import os
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adpsgd import ADPSGDStrategy, CommunicationMonitor
from lightning_adpsgd.elastic import ElasticOptions
from tests.elastic.member import network

SAMPLES = 144
BATCH_SIZE = 4
MAX_WORKERS = 3
BATCHES = SAMPLES // MAX_WORKERS // BATCH_SIZE


def samples() -> TensorDataset:
    """Each holds its own number, by which a test knows who has trained on it."""
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(dim=1, keepdim=True), torch.arange(SAMPLES))


class Regression(LightningModule):
    def __init__(self, worker: int, manual: bool = False, plateau: bool = False) -> None:
        super().__init__()
        self.net = network(worker)
        self.automatic_optimization = not manual
        self.plateau = plateau
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, _: int) -> Any:
        x, y, numbers = batch
        self.seen.append((self.current_epoch, numbers.tolist()))
        loss = nn.functional.mse_loss(self.net(x), y)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        x, y, numbers = batch
        if not self.trainer.sanity_checking:
            self.validated += numbers.tolist()
        self.log("val", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        if self.plateau:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


class Obey(Callback):
    """Trains as many batches as the test says, and answers with where this worker stands."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.left = pipe, 0
        self.records: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        strategy.subscribe(self.records.append)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.left == 0:
            self.tell(trainer, pl_module)
            self.left = self.pipe.recv()
            if self.left == "end":
                os._exit(0)
        self.left -= 1

    def tell(self, trainer: Trainer, module: LightningModule, how: str = "training") -> None:
        strategy: Any = trainer.strategy
        checkpoint: Any = trainer.checkpoint_callback
        stopping: Any = trainer.early_stopping_callback
        monitor: Any = next(each for each in trainer.callbacks if isinstance(each, CommunicationMonitor))  # type: ignore[attr-defined]
        summary = monitor.summary()
        local_sgd = strategy.local_sgd[0]
        self.pipe.send(
            {
                "how": how,
                "weights": [tensor.clone() for tensor in module.state_dict().values()],
                "steps": local_sgd.steps,
                "rule": local_sgd.state_dict()["period"],
                "records": self.records,
                "global_step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
                "writes": trainer.is_global_zero,
                "seen": module.seen,
                "validated": module.validated,
                "val": trainer.callback_metrics.get("val"),
                "best": checkpoint.best_model_path,
                "waited": stopping.wait_count,
                "log_dir": trainer.log_dir,
                "bytes": (summary["sent_bytes"], summary["sent_bytes_ddp"]),
                "members": strategy.session.workers.size,
            }
        )


def fit(
    worker: int,
    pipe: Connection,
    address: str,
    folder: Path,
    period: Any = 4,
    epochs: int = 4,
    batches: int | None = None,
    manual: bool = False,
    plateau: bool = False,
    checkpoint: Path | None = None,
    every: int | None = None,
    start_workers: int = 1,
    patience: int = 1000,
    version: str | None = None,
    validates_again: bool = False,
    **trainer_options: Any,
) -> None:
    """Fit; see :class:`Obey`.

    Args:
        worker: its number.
        pipe: to the test.
        address: the lighthouse's.
        folder: for logs and checkpoints, the same for all.
        period: the averaging period.
        epochs: how many.
        batches: at most as many per epoch.
        manual: whether optimization is manual.
        plateau: whether the learning rate follows the validation.
        checkpoint: to continue from.
        every: write a checkpoint after as many steps; None: after each epoch.
        start_workers: as of ``ElasticOptions``.
        patience: of ``EarlyStopping``, which waits for a loss to rise.
        version: of the logger; None: it chooses one.
        validates_again: whether to call ``Trainer.validate`` after the fit.
        trainer_options: further arguments of the Trainer.
    """
    torch.set_num_threads(1)
    os.environ.update(REPLICA_GROUP_ID=str(worker), NUM_REPLICA_GROUPS=str(MAX_WORKERS), TORCHFT_LIGHTHOUSE=address)
    elastic = ElasticOptions(
        start_workers=start_workers,
        quorum_timeout=timedelta(seconds=20),
        round_timeout=timedelta(seconds=20),
        join_timeout=timedelta(seconds=60),
        leave_timeout=timedelta(seconds=5),
        hostname="localhost",
    )
    obey = Obey(pipe)
    trainer = Trainer(
        strategy=ADPSGDStrategy(period, elastic=elastic),
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_train_batches=batches,
        logger=CSVLogger(folder, version=version),
        log_every_n_steps=1,
        callbacks=[
            obey,
            CommunicationMonitor(),
            EarlyStopping("val", patience=patience, mode="max"),
            ModelCheckpoint(monitor="val", save_top_k=1, every_n_train_steps=every),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **trainer_options,
    )
    module = Regression(worker, manual, plateau)
    data = samples()
    how = "finished"
    try:
        trainer.fit(module, DataLoader(data, BATCH_SIZE, shuffle=True), DataLoader(data, 32), ckpt_path=checkpoint)
        if validates_again:
            trainer.validate(module, DataLoader(data, 32), verbose=False)
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
    obey.tell(trainer, module, how)
    pipe.recv()
