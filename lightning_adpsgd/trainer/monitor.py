"""Reports averaging rounds and their bytes: log entries, a progress bar's entry, a history, a summary and a plot."""

from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import override

from lightning_adpsgd.history import RoundHistory
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.validation import check_instance

from .family import Callback, pl


class CommunicationMonitor(RoundHistory, Callback):
    """Logs every averaging round to all of the Trainer's loggers, and prints a summary at the end of ``fit``.

    Each round logs, at the step at which Lightning logs that batch's loss: ``adpsgd/variance`` (S_k),
    ``adpsgd/variance_over_lr`` (S_k / γ_k), ``adpsgd/target`` (C₂, once there is one), ``adpsgd/period``,
    ``adpsgd/syncs`` (rounds so far), ``adpsgd/sent_bytes`` (by this rank so far), ``adpsgd/sent_bytes_ddp`` (what DDP's
    gradient all-reduce would have sent so far: one ring all-reduce of the trainable parameters' gradients per step) and
    ``adpsgd/round_seconds``. If workers were dropped (``on_divergence="drop"``), also ``adpsgd/dropped``, how many so
    far. With several optimizers the optimizer's index is appended: ``adpsgd/period_0``.

    Counts continue after a checkpoint is restored.

    Args:
        prefix: prefix of the log entries, and the plot's path: "train/adpsgd" is "adpsgd.png" in a folder "train".
            Characters that some file systems do not allow are refused.
        plot: whether to draw ``<prefix>.png`` in the Trainer's log directory at the end of ``fit``, in any file system
            that Lightning writes to (``s3://…``). Needs matplotlib. :meth:`plot` draws at any time.
        progress_bar: whether the Trainer's progress bar shows the period and the bytes saved against DDP, as of the
            latest round: ``adpsgd=period 26, 45.0 MB saved``. Loggers and ``callback_metrics`` do not get this entry.

    Raises:
        TypeError: if ``prefix`` is not a string, or ``plot`` or ``progress_bar`` not a bool.
        ValueError: if ``prefix`` is empty, or does not name a file within the log directory.
        ModuleNotFoundError: if ``plot`` is set and matplotlib is not installed.
    """

    def __init__(self, prefix: str = "adpsgd", plot: bool = False, progress_bar: bool = False) -> None:
        super().__init__(prefix, plot)
        # Configuration
        self._in_progress_bar = check_instance(
            "CommunicationMonitor", "progress_bar", progress_bar, bool, "True or False"
        )

        # State
        self._plot_path: str | None = None
        self._bar: tuple[Any, dict[str, Any]] | None = None
        """The progress bar with an entry of this monitor, and what the user had set on it."""

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._listen(trainer.strategy, partial(self._on_round, trainer), "Trainer")

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._plots_at_the_end and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of Trainer's own file
            # On all ranks, because Lightning broadcasts log_dir.
            folder = str(trainer.log_dir or trainer.default_root_dir)
            self._plot_path = f"{folder.rstrip('/')}/{self.prefix}.png"
        if self._in_progress_bar and (bar := trainer.progress_bar_callback) is not None:
            # Its method is what a progress bar shows, and what Lightning tells users to override. ``self.log`` would
            # make a tensor of each number, and write the names into ``callback_metrics``.
            self._bar = (bar, {name: value for name, value in vars(bar).items() if name == "get_metrics"})
            vars(bar)["get_metrics"] = partial(self._with_an_entry, bar.get_metrics)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._leave_the_bar()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._leave_the_bar()

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.is_global_zero and self.rounds:
            self._print_summary(self._plot_path)

    def _on_round(self, trainer: "pl.Trainer", round_: AveragingRound) -> None:
        metrics = self._note(round_, trainer.optimizers, trainer.world_size)
        if not trainer.loggers or not trainer.is_global_zero:
            return
        logged_step = getattr(trainer.strategy, "logged_step", None)
        step = trainer.global_step if logged_step is None else logged_step(round_)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _with_an_entry(self, get_metrics: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the progress bar shows, and the entry of this monitor; costs nothing between rounds."""
        told = self._in_brief()
        return {**get_metrics(*args, **kwargs), **({self.prefix: told} if told else {})}

    def _leave_the_bar(self) -> None:
        if self._bar is not None:
            bar, own = self._bar
            vars(bar).pop("get_metrics")
            vars(bar).update(own)
            self._bar = None
