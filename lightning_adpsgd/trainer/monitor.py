"""Reports averaging rounds and their bytes: log entries, a progress bar's entry, a history, a summary and a plot."""

from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import override

from lightning_adpsgd.history import RoundHistory
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.validation import check_instance

from .compat import callbacks_of
from .family import Callback, pl


class CommunicationMonitor(RoundHistory, Callback):
    """Logs every averaging round to all of the Trainer's loggers, and prints a summary at the end of ``fit``.

    Each round logs, at the step at which Lightning logs that batch's loss: ``adpsgd/variance`` (S_k),
    ``adpsgd/variance_over_lr`` (S_k / γ_k), ``adpsgd/target`` (C₂, once there is one), ``adpsgd/period``,
    ``adpsgd/syncs`` (rounds so far), ``adpsgd/sent_bytes`` (by this rank so far), ``adpsgd/sent_bytes_ddp`` (what DDP's
    gradient all-reduce would have sent so far: one ring all-reduce of the trainable parameters' gradients per step) and
    ``adpsgd/round_seconds``. If workers were dropped (``on_divergence="drop"``), also ``adpsgd/dropped``, how many so
    far. With several optimizers the optimizer's index is appended: ``adpsgd/period_0``.

    Counts continue when a run is resumed; a checkpoint that is tested or validated leaves them alone. Several monitors
    of one Trainer need a prefix each.

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
        self._is_fitting = True

    @property
    @override
    def state_key(self) -> str:
        """Under which checkpoints hold the history: one for each prefix, so that a Trainer may have several."""
        return super().state_key if self.prefix == "adpsgd" else f"{super().state_key}[{self.prefix}]"

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._is_fitting = stage == "fit"

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # Version 0.1 had one key for all prefixes.
        states, former = checkpoint.get("callbacks", {}), super().state_key
        alone = all(former != each.state_key for each in callbacks_of(trainer))
        if alone and self.state_key not in states and former in states:
            self.load_state_dict(states[former])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a history that was saved; what a file that is tested tells of its own run is ignored."""
        if self._is_fitting:
            super().load_state_dict(state_dict)

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
            _BarMetrics.add(self, bar)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._leave_the_bar(trainer)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._leave_the_bar(trainer)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.is_global_zero and self.rounds:
            self._print_summary(self._plot_path)

    def _on_round(self, trainer: "pl.Trainer", round_: AveragingRound) -> None:
        session = getattr(trainer.strategy, "session", None)
        ranks = trainer.world_size if session is None else session.workers.size  # elastic ones come and go
        metrics = self._note(round_, trainer.optimizers, ranks)
        if not trainer.loggers or not trainer.is_global_zero:
            return
        logged_step = getattr(trainer.strategy, "logged_step", None)
        step = trainer.global_step if logged_step is None else logged_step(round_)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _leave_the_bar(self, trainer: "pl.Trainer") -> None:
        metrics = getattr(trainer.progress_bar_callback, "get_metrics", None)
        if isinstance(metrics, _BarMetrics):
            metrics.remove(self)


class _BarMetrics:
    """Stands in for a progress bar's ``get_metrics`` during training, and adds the monitors' entries.

    The method is what a bar shows, and what Lightning tells users to override. ``self.log`` would make a tensor of each
    number, and write the names into ``callback_metrics``.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._get_metrics: Callable[..., dict[str, Any]] = bar.get_metrics
        self._is_set = "get_metrics" in vars(bar)  # by the user, on this bar alone
        self._monitors: list[CommunicationMonitor] = []

    @classmethod
    def add(cls, monitor: CommunicationMonitor, bar: Any) -> None:
        """Show an entry of a monitor."""
        if not isinstance(bar.get_metrics, cls):
            vars(bar)["get_metrics"] = cls(bar)
        bar.get_metrics._monitors.append(monitor)

    def remove(self, monitor: CommunicationMonitor) -> None:
        """Show its entry no longer; without any, the bar is as it was."""
        self._monitors = [each for each in self._monitors if each is not monitor]
        if not self._monitors:
            del vars(self._bar)["get_metrics"]
            if self._is_set:
                vars(self._bar)["get_metrics"] = self._get_metrics

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the bar shows; costs nothing between rounds."""
        entries = {monitor.prefix: monitor.in_brief() for monitor in self._monitors}
        return {**self._get_metrics(*args, **kwargs), **{name: told for name, told in entries.items() if told}}
