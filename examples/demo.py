"""What averaging saves, and what it costs: python examples/demo.py, in under a minute.

Trains the network of `digits.py` in three ways, from the same weights and on the same batches, with two workers on a
CPU: with DDP, with `adpsgd` and with `adpsgd_int4`. Prints a table and draws a picture.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from digits import DigitClassifier, digits, positive
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adpsgd import CommunicationMonitor

STRATEGIES = {"ddp": "#222222", "adpsgd": "#4477aa", "adpsgd_int4": "#cc3311"}  # and their colours
WORKERS = 2
VALIDATIONS = 5  # of a run: workers average for each
MB = 1e6


class ValidatedClassifier(DigitClassifier):
    """The same, validated now and then."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Accuracy of the averaged model."""
        images, labels = batch
        self.test_accuracy(self.network(images), labels)
        self.log("accuracy", self.test_accuracy)


class Progress(L.Callback):
    """Notes the time of a run, and after each validation what has been sent and the accuracy."""

    def __init__(self, monitor: CommunicationMonitor | None) -> None:
        self.monitor = monitor  # none: DDP
        self.sent_bytes: list[float] = []
        self.accuracy: list[float] = []
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Note how far it has come; a ring all-reduce among n workers sends 2(n-1)/n of all gradients."""
        gradients = sum(parameter.nbytes for parameter in model.parameters())
        of_ddp = trainer.global_step * 2 * (trainer.world_size - 1) / trainer.world_size * gradients
        self.sent_bytes.append(self.monitor.summary()["sent_bytes"] if self.monitor else of_ddp)
        self.accuracy.append(100 * float(trainer.callback_metrics["accuracy"]))

    def on_train_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.started


class LinePerEpoch(ProgressBar):
    """A progress bar for output that is no terminal."""

    def disable(self) -> None:
        """Say nothing: this is not the first worker."""
        self.silent = True

    def on_train_epoch_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Say what a progress bar would show."""
        if not getattr(self, "silent", False):
            shown = self.get_metrics(trainer, model).items()
            told = [f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in shown]
            print(f"  epoch {trainer.current_epoch + 1:>2}: {', '.join(told)}", flush=True)


def train(strategy: str, arguments: argparse.Namespace) -> tuple[Progress, CommunicationMonitor | None]:
    """One run."""
    L.seed_everything(1, verbose=False)
    monitor = None if strategy == "ddp" else CommunicationMonitor(progress_bar=True)
    progress = Progress(monitor)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=WORKERS,
        max_epochs=arguments.epochs,
        check_val_every_n_epoch=max(1, arguments.epochs // VALIDATIONS),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            *([monitor] if monitor else []),
            progress,
            *([] if sys.stdout.isatty() else [LinePerEpoch()]),
        ],
    )
    if trainer.is_global_zero:
        print(f"\nTraining with {strategy}", flush=True)
    training, test = digits()
    trainer.fit(
        ValidatedClassifier(),
        DataLoader(training, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=64),
    )
    return progress, monitor


def table(runs: dict[str, tuple[Progress, CommunicationMonitor | None]], steps: int) -> str:
    """A row per strategy."""
    lines = [f"{'':<13}{'accuracy':>10}{'sent per worker':>18}{'of DDP’s':>10}{'rounds':>8}{'time':>9}"]
    for strategy, (progress, monitor) in runs.items():
        sent, share = progress.sent_bytes[-1], progress.sent_bytes[-1] / runs["ddp"][0].sent_bytes[-1]
        rounds = monitor.summary()["rounds"] if monitor else steps
        lines.append(
            f"{strategy:<13}{progress.accuracy[-1]:>8.1f} %{sent / MB:>15.1f} MB{share:>10.2f}{rounds:>8}"
            f"{progress.seconds:>7.1f} s"
        )
    return "\n".join(lines)


def picture(runs: dict[str, tuple[Progress, CommunicationMonitor | None]]) -> Figure:
    """Accuracy against bytes; and what the averaging period follows, over the steps."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    accuracy, period = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    variance = figure.add_subplot(grid[1, 1], sharex=period)
    for strategy, (progress, monitor) in runs.items():
        style: dict[str, Any] = {"color": STRATEGIES[strategy], "label": strategy}
        megabytes = [sent / MB for sent in progress.sent_bytes]
        accuracy.plot(megabytes, progress.accuracy, "o-", markersize=5, **style)
        told = f"{strategy}\n{progress.accuracy[-1]:.1f} %, {megabytes[-1]:.1f} MB"
        end = (megabytes[-1], progress.accuracy[-1])
        accuracy.annotate(told, end, (0, 9), textcoords="offset points", ha="center", color=STRATEGIES[strategy])
        if monitor:
            rounds = [round_ for round_ in monitor.rounds if round_.trigger == "period"]
            steps = [round_.step for round_ in rounds]
            period.step(steps, [round_.period for round_ in rounds], where="post", **style)
            variance.plot(steps, [round_.variance for round_ in rounds], ".-", lw=0.8, ms=3, **style)
    accuracy.set(
        xscale="log", xlabel="sent per worker [MB]", ylabel="test accuracy [%]", title="Accuracy against bytes"
    )
    accuracy.margins(x=0.18, y=0.14)
    accuracy.xaxis.set_major_formatter("{x:g}")
    period.set(ylabel="period [steps]", ylim=(0, None), title="As workers drift apart less, they average less often")
    period.legend(frameon=False)
    variance.set(yscale="log", xlabel="optimizer step", ylabel="variance among workers")
    for axes in (accuracy, period, variance):
        axes.grid(alpha=0.25)
    return figure


def main() -> None:
    """Train three times, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", default=20, type=positive)
    parser.add_argument("--output", default="logs/demo.png", help="the picture (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # hints for larger trainings

    runs = {strategy: train(strategy, arguments) for strategy in STRATEGIES}
    if rank_zero_only.rank != 0:
        return
    steps = arguments.epochs * (1437 // WORKERS // 32)
    print(f"\n{table(runs, steps)}\n")
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    picture(runs).savefig(arguments.output, dpi=130)
    print(f"picture: {arguments.output}")
    print("Both workers are on this machine. Over a network, bytes take more time: docs/performance.md has links.")


if __name__ == "__main__":
    main()
