"""Workers that come and go, on real handwritten digits: adpsgd elastic --workers 3 examples/elastic.py.

Each worker is a process of its own. Kill one while they train (`kill -9`, with the number that it has printed): the
others go on, and it is started again and joins them. `--lose 1` has worker 1 do so to itself, once, after 100 steps.
"""

import argparse
import os
import signal
from pathlib import Path

import lightning as L
from digits import DigitClassifier, digits
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor
from lightning_adpsgd.elastic import ElasticOptions


class Tell(Callback):
    """Tells when this worker has joined, and how many they were in the latest round."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training begins, or goes on where the others are."""
        print(f"process {os.getpid()} begins at step {trainer.global_step}", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """One more batch."""
        if trainer.global_step % 50 == 0:
            workers = trainer.strategy.session.workers.size
            print(f"step {trainer.global_step}, {workers} workers in the latest round", flush=True)


class LoseOnce(Callback):
    """Kills this process at a step, unless it has done so before."""

    def __init__(self, step: int, note: Path) -> None:
        self.step, self.note = step, note

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """One more batch."""
        if trainer.global_step == self.step and not self.note.exists():
            self.note.parent.mkdir(parents=True, exist_ok=True)
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train one worker, and test the average that it ends with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lose", type=int, help="a worker that is to be lost once")
    options = parser.parse_args()
    worker, workers = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
    L.seed_everything(0)
    train, test = digits()
    note = Path(f"logs/elastic/lost-{os.getppid()}")
    trainer = L.Trainer(
        strategy=ADPSGDStrategy(AdaptivePeriod(initial=4), elastic=ElasticOptions(start_workers=workers)),
        accelerator="cpu",
        devices=1,
        max_epochs=options.epochs,
        callbacks=[CommunicationMonitor(), Tell(), *([LoseOnce(100, note)] if worker == options.lose else [])],
        default_root_dir="logs/elastic",
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    model = DigitClassifier()
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))
    (metrics,) = trainer.test(model, DataLoader(test, batch_size=360), verbose=False)
    print(f"test accuracy {metrics['test_accuracy']:.2%}")


if __name__ == "__main__":
    main()
