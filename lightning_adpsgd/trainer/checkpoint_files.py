"""Which checkpoint files there are, for workers that do not write them."""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from .compat import is_older
from .family import ModelCheckpoint, pl

_MARGIN = 1.0  # clocks differ a little, those of files and of processes, too


class CheckpointFiles:
    """Lets all elastic workers choose the same names for checkpoints.

    ``ModelCheckpoint`` counts up a version in a file's name until there is no such file. Here nobody can ask the worker
    that writes, which may have just written that very file, or be about to. So the others look at those files only that
    are older than their part in the run, and know themselves which were written since.
    """

    def __init__(self) -> None:
        self._since = time.time()
        self._written: dict[str, bool] = {}  # False: removed again

    def begin(self) -> None:
        """From now on, this worker writes and removes what the others do, if only in its mind."""
        self._since = time.time()
        self._written.clear()

    def note(self, path: Any, exists: bool) -> None:
        """Note that the workers have written a file, or removed it."""
        self._written[str(path)] = exists

    def watch(self, checkpoints: Iterable[ModelCheckpoint]) -> None:
        """Have the callbacks ask here."""
        for each in checkpoints:
            vars(each)["file_exists"] = partial(self._exists, each)

    def forget(self, checkpoints: Iterable[ModelCheckpoint]) -> None:
        """Have them look themselves again; may be called more than once."""
        for each in checkpoints:
            vars(each).pop("file_exists", None)

    def _exists(self, checkpoint: ModelCheckpoint, filepath: Any, trainer: "pl.Trainer") -> bool:
        if trainer.is_global_zero:
            return type(checkpoint).file_exists(checkpoint, filepath, trainer)
        noted = self._written.get(str(filepath))
        return is_older(checkpoint, filepath, self._since - _MARGIN) if noted is None else noted
