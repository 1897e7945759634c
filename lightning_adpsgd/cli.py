"""LightningCLI with the strategy names registered: ``python -m lightning_adpsgd`` and the console script ``adpsgd``."""

import importlib
import sys
from typing import Any

from lightning_adpsgd import plot_command
from lightning_adpsgd.families import room_of_the_family_in_use


def main(args: Any = None) -> None:
    """Run LightningCLI of ``lightning``, or of ``pytorch_lightning`` where only that is installed.

    Where both are, ``python -m lightning_adpsgd.pytorch_lightning`` takes the latter's classes. ``adpsgd plot`` draws
    the run that a checkpoint tells of.

    Args:
        args: command line arguments as a list, or a configuration as a dict; None: ``sys.argv``.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["plot"]:
        plot_command.main(given[1:])
        return
    importlib.import_module(f"{room_of_the_family_in_use()}.cli").main(args)
