"""A small training job in which something goes wrong: the script that every rank runs, whoever starts it.

``python job.py '{"folder": …, "fault": …}'``: see :class:`Job`. It leaves in its folder what the tests need to know.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_adpsgd import ADPSGDStrategy
from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.rounds import engine

torch.set_num_threads(1)  # also before a rank is forked


class Job(NamedTuple):
    """What to run, and what is to go wrong in it."""

    folder: str
    fault: str = "none"
    at: tuple[int, ...] = (1,)
    """The ranks that have the fault."""
    step: int = 13
    """The optimizer step, from 1, at which they have it."""
    ranks: int = 2
    period: int = 5
    steps: int = 30
    epochs: int = 1
    save_every: int = 10
    timeout: float = 60.0
    """Seconds that a collective waits for other ranks."""
    validate: bool = False
    log_epoch: bool = False
    """Whether the mean of the loss over epoch and ranks is logged."""
    stagger: bool = False
    overlap: int = 0
    read_later: bool = False
    """Whether a round's measurements are read in the next step, as on a GPU."""
    metric: bool = False
    """Whether a metric object is logged, which gathers its state from all ranks without Lightning's strategy."""
    resume: bool = False
    """Whether to resume from the latest checkpoint, if there is one."""

    @property
    def attempt(self) -> int:
        """How often torchrun has restarted the ranks."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    @property
    def short(self) -> bool:
        """Whether some ranks have less data than others."""
        return self.fault in ("short", "short_stream")


class Rows(Dataset):
    """Random rows."""

    def __init__(self, length: int) -> None:
        self.rows = torch.randn(length, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows, as a stream of unknown length."""

    def __init__(self, length: int) -> None:
        self.rows = Rows(length).rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


class Model(L.LightningModule):
    """Two layers, in several buckets; a step takes 20 ms."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__()
        self.job, self.faulty = job, rank in job.at
        width = 24 if self.has("wider") else 16
        layers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
        if self.has("deeper"):
            layers.append(nn.Linear(3, 3))
        self.metric = MeanMetric() if job.metric else None
        self.name = "network" if self.has("renamed") else "net"
        setattr(self, self.name, layers)

    def has(self, fault: str) -> bool:
        """Whether this rank has that fault."""
        return self.faulty and self.job.fault == fault

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(getattr(self, self.name)(batch), batch[:, :3].argmax(dim=1))

    def training_step(self, batch: Tensor) -> Tensor:
        if self.faulty and self.global_step + 1 == self.job.step:
            self.fail()
        time.sleep(0.02)
        loss = self.loss(batch)
        if self.job.log_epoch:
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        if self.metric is not None:
            self.metric(loss.detach())
            self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with open(f"progress.{self.global_rank}", "a") as file:
            file.write(f"{self.job.attempt} {self.global_step}\n")
        if self.faulty and self.job.short and self.global_step == self.job.step:
            note_fault()

    def validation_step(self, batch: Tensor) -> None:
        self.raise_if("raise_in_validation", ValueError("a bad sample"))
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        self.raise_if("raise_in_setup", ValueError("a bad optimizer"))
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_step > self.job.step:
            self.raise_if("raise_in_save", OSError("no space left on device"))

    def fail(self) -> None:
        """Cause the fault, in mid-period."""
        fault = self.job.fault
        if fault in ("raise", "raise_and_catch"):
            note_fault()
            raise ValueError("a bad sample")
        if fault == "kill" or (fault == "kill_at_first_attempt" and self.job.attempt == 0):
            note_fault()
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault in ("terminate", "interrupt"):
            note_fault()
            os.kill(os.getpid(), signal.SIGTERM if fault == "terminate" else signal.SIGINT)
        elif fault == "terminate_launcher":
            note_fault()
            os.kill(os.getppid(), signal.SIGTERM)
        elif fault == "exit":
            note_fault()
            sys.exit(0)
        elif fault == "hang":
            note_fault()
            while True:
                time.sleep(1000)
        elif fault == "nan":
            note_fault()
            with torch.no_grad():
                self.net[2].bias[1] = float("nan")
        elif fault in ("kill_in_round", "raise_in_round"):
            self.fail_at_second_bucket()

    def fail_at_second_bucket(self) -> None:
        """Make this rank fail after the first bucket of the next round."""
        launch, launched = ParameterAverager.launch, []

        def failing(*args: Any) -> Any:
            launched.append(args)
            if len(launched) == 2:
                self.raise_if("raise_in_round", MemoryError("no memory for a bucket"))
                note_fault()
                os.kill(os.getpid(), signal.SIGKILL)
            return launch(*args)

        ParameterAverager.launch = failing

    def raise_if(self, fault: str, error: Exception) -> None:
        """Raise on a rank that has that fault."""
        if self.has(fault):
            note_fault()
            raise error


def note_fault() -> None:
    """Record the time of the first fault for the tests."""
    mine = Path(f"fault.{os.getpid()}")
    mine.write_text(str(time.time()))
    with suppress(FileExistsError):
        os.link(mine, "fault")  # completely or not at all


def loader(job: Job, rank: int) -> DataLoader:
    """Batches of eight for all steps, or for fewer. Lightning shares out what has a length, unless it is short."""
    batches = job.step if job.short and rank in job.at else job.steps
    if job.fault == "short_stream":
        return DataLoader(Stream(8 * batches), batch_size=8)
    return DataLoader(Rows(8 * batches * (1 if job.short else job.ranks)), batch_size=8)


def main(job: Job) -> None:
    """One rank's life."""
    os.chdir(job.folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # tests ask a rank that hangs for its stack
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    with open("processes", "a") as file:
        file.write(f"{job.attempt} {rank} {os.getpid()}\n")

    torch.manual_seed(rank)
    if job.fault in ("wider", "deeper"):
        note_fault()
    try:
        fit(job, rank)
    except ValueError:
        if job.fault != "raise_and_catch":
            raise
        fit(job._replace(fault="none"), rank)


def fit(job: Job, rank: int) -> None:
    """Train, and leave the weights."""
    engine._READS_LATER = job.read_later
    model = Model(job, rank)
    trainer = L.Trainer(
        strategy=ADPSGDStrategy(
            job.period,
            bucket_size_mb=2**-12,
            stagger=job.stagger,
            overlap=job.overlap,
            timeout=timedelta(seconds=job.timeout),
        ),
        accelerator="cpu",
        devices=job.ranks,
        max_epochs=job.epochs,
        use_distributed_sampler=not job.short,
        limit_val_batches=2 if job.validate else 0,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint("checkpoints", every_n_train_steps=job.save_every, save_top_k=-1, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(
            model,
            loader(job, rank),
            DataLoader(Rows(32), batch_size=8) if job.validate else None,
            ckpt_path="last" if job.resume else None,
        )
    finally:
        torch.save(model.state_dict(), f"weights.{rank}.pt")


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
