"""LightningCLI with the strategy names registered: ``python -m lightning_adpsgd`` and the console script ``adpsgd``."""

import importlib
import sys
from typing import Any

from lightning_adpsgd.families import room_of_the_family_in_use

COMMANDS = ("elastic", "lighthouse", "plot")
"""Those besides LightningCLI's. Each is a module of :mod:`lightning_adpsgd.commands`, imported when it is called."""


def main(args: Any = None) -> None:
    """Run LightningCLI of ``lightning``, or of ``pytorch_lightning`` where only that is installed.

    Where both are, ``python -m lightning_adpsgd.pytorch_lightning`` takes the latter's classes. ``adpsgd plot`` draws
    the run that a checkpoint tells of; ``adpsgd elastic`` and ``adpsgd lighthouse`` start workers that come and go,
    and the place where they meet.

    Args:
        args: command line arguments as a list, or a configuration as a dict; None: ``sys.argv``.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and given[0] in COMMANDS:
        importlib.import_module(f"lightning_adpsgd.commands.{given[0]}").main(given[1:])
        return
    importlib.import_module(f"{room_of_the_family_in_use()}.cli").main(args)
