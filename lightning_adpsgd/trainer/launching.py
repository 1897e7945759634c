"""Where processes are forked or spawned, rank 0's monitor tells the one in the process that called ``fit``."""

import os
import tempfile
from typing import Any

import torch
from typing_extensions import override

from lightning_adpsgd.history import RoundHistory

from .compat import MultiProcessingLauncher, callbacks_of, replace_launcher
from .family import DDPStrategy, pl

_KEY = "adpsgd_histories"


class HistoryLauncher(MultiProcessingLauncher):
    """Lightning's launcher, which brings back the weights and the metrics; and, with them, the averaging rounds."""

    @override
    def get_extra_results(self, trainer: "pl.Trainer") -> dict[str, Any]:
        """Add a file with the histories of rank 0.

        Lightning reads its queue when the other processes have ended, and a process does not end before what it has put
        into the queue, if that is more than 64 KiB, has been read.
        """
        descriptor, path = tempfile.mkstemp(prefix="adpsgd_", suffix=".pt")
        with os.fdopen(descriptor, "wb") as file:
            torch.save([monitor.carried() for monitor in _monitors_of(trainer)], file)
        return {**super().get_extra_results(trainer), _KEY: path}

    @override
    def update_main_process_results(self, trainer: "pl.Trainer", extra: dict[str, Any]) -> None:
        """Give them to the monitors of this process."""
        super().update_main_process_results(trainer, extra)
        histories = torch.load(extra[_KEY], weights_only=True)
        os.remove(extra[_KEY])
        # Monitors of `configure_callbacks` exist in the other process alone.
        for monitor, history in zip(_monitors_of(trainer), histories, strict=False):
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
