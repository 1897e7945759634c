"""What the workers of Ray's tests run, and what they write down for the test."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import ray.train
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

from lightning_adpsgd import ADPSGDStrategy, CommunicationMonitor, ConstantPeriod
from lightning_adpsgd.ray import RayADPSGDStrategy
from tests.training import Classifier, fit, loader, weights

EPOCHS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "int4": {"period": 3, "reduce_dtype": "int4", "optimizer_state": "estimate"},
    "in flight": {"period": ConstantPeriod(4), "stagger": True, "overlap": 2, "reduce_dtype": "bf16"},
    "dropped": {"period": 5, "average_buffers": False, "optimizer_state": "reset", "on_divergence": "drop"},
    "one node": {"period": 4, "worker": "node", "bucket_size_mb": 1.0},
}


class Faulty(Classifier):
    """Something goes wrong on rank 1, at a step between two rounds."""

    def __init__(self, fault: str | None = None, at_step: int = -1) -> None:
        super().__init__(momentum=0.9)
        self.fault, self.at_step = fault, at_step

    def training_step(self, batch: Any) -> torch.Tensor:
        if self.fault is not None and self.global_step == self.at_step and self.global_rank == 1:
            ray.train.get_all_reported_checkpoints()  # waits until Ray has noted the latest one, within two seconds
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a bad sample")
        return super().training_step(batch)


class WithoutRay(LightningEnvironment):
    """Takes the ranks from the variables that Ray has set for torch, and leaves these for the next run."""

    def teardown(self) -> None:
        pass


class Watch(L.Callback):
    """Keeps the weights of each epoch's end, once they are reported, and the error that ends a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epochs: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(weights(pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        told = {"rank": trainer.global_rank, "kind": type(exception).__name__, "message": str(exception)}
        write(self.folder, f"error of {os.getpid()}.json", json.dumps(told))


def write(folder: Path, name: str, text: str) -> None:
    """Write a file that is there as a whole or not at all, since any process may be killed."""
    (folder / f"{name}.part").write_text(text)
    (folder / f"{name}.part").rename(folder / name)


def resumable(folder: Path, fault: str | None = None, at_step: int = -1) -> None:
    """Train as Ray's guide has it; rank 0 or 1 writes what has come of it to the folder."""
    torch.manual_seed(0)
    monitor, watch = CommunicationMonitor(), Watch(folder)
    trainer = prepare_trainer(
        L.Trainer(
            strategy=RayADPSGDStrategy(3),
            plugins=[RayLightningEnvironment()],
            callbacks=[RayTrainReportCallback(), monitor, watch],
            accelerator="cpu",
            devices="auto",
            max_epochs=EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    )
    checkpoint = ray.train.get_checkpoint()
    file = None if checkpoint is None else Path(checkpoint.path, RayTrainReportCallback.CHECKPOINT_NAME)
    model = Faulty(fault, at_step)
    rank = ray.train.get_context().get_world_rank()
    epoch = 0 if file is None else torch.load(file, weights_only=False)["epoch"] + 1
    write(folder, f"start of {os.getpid()}.json", json.dumps({"rank": rank, "epoch": epoch, "fault": fault}))
    trainer.fit(model, loader(), ckpt_path=file)
    outcome = {
        "weights": weights(model),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "epochs": watch.epochs,
        "rounds": [(r.step, r.trigger, r.period, r.variance) for r in monitor.rounds],
        "steps": trainer.global_step,
    }
    torch.save(outcome, folder / f"outcome.{rank}")


def with_faults(config: dict[str, Any]) -> None:
    """In each attempt another fault, until none is left."""
    folder = Path(config["folder"])
    attempt = len([*folder.glob("start of *")]) // 2
    torch.distributed.barrier()  # both ranks have counted
    resumable(folder, *config["faults"][attempt])


def all_settings(config: dict[str, Any]) -> None:
    """Train without a fault, then with many settings, each under Ray's class and under the plain one; then fail."""
    folder = Path(config["folder"])
    resumable(folder)
    outcomes: dict[str, list[Any]] = {}
    for name, settings in SETTINGS.items():
        outcomes[name] = []
        for kind, devices, environment in (
            (RayADPSGDStrategy, "auto", RayLightningEnvironment()),
            (ADPSGDStrategy, 2, WithoutRay()),
        ):
            torch.manual_seed(1)
            model = Classifier(momentum=0.9)
            trainer, rounds = fit(kind(**settings), model, devices=devices, plugins=[environment])
            kept = [(r.step, r.trigger, r.period, r.variance, r.sent_bytes) for r in rounds]
            outcomes[name].append({"weights": weights(model), "rounds": kept, "steps": trainer.global_step})
    torch.save(outcomes, folder / f"settings.{ray.train.get_context().get_world_rank()}")
    fit(
        RayADPSGDStrategy(3),
        Faulty("raised", 7),
        devices="auto",
        plugins=[RayLightningEnvironment()],
        callbacks=[Watch(folder)],
    )
