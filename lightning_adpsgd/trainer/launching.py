"""Where processes are forked or spawned, rank 0's monitor tells the one in the process that called ``fit``."""

import pickle
from typing import Any

from typing_extensions import override

from lightning_adpsgd.history import RoundHistory

from .compat import MultiProcessingLauncher, callbacks_of, replace_launcher
from .family import DDPStrategy, pl

_KEY = "adpsgd_histories"


class HistoryLauncher(MultiProcessingLauncher):
    """Lightning's launcher, which brings back the weights and the metrics; and, with them, the averaging rounds."""

    @override
    def get_extra_results(self, trainer: "pl.Trainer") -> dict[str, Any]:
        """Add the histories of rank 0, as bytes, because tensors would be shared with a process that ends."""
        histories = [monitor.carried() for monitor in _monitors_of(trainer)]
        return {**super().get_extra_results(trainer), _KEY: pickle.dumps(histories)}

    @override
    def update_main_process_results(self, trainer: "pl.Trainer", extra: dict[str, Any]) -> None:
        """Give them to the monitors of this process."""
        super().update_main_process_results(trainer, extra)
        # Monitors of `configure_callbacks` exist in the other process alone.
        for monitor, history in zip(_monitors_of(trainer), pickle.loads(extra[_KEY]), strict=False):
            monitor.adopt(history)


class LaunchedProcesses(DDPStrategy):
    """Starts processes as DDP does."""

    @property
    @override
    def launcher(self) -> Any:
        """Lightning's, or the one that brings histories back."""
        replace_launcher(self, HistoryLauncher)
        return super().launcher


def _monitors_of(trainer: "pl.Trainer") -> list[RoundHistory]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, RoundHistory)]
