"""LightningCLI with the strategy names registered: ``python -m lightning_adpsgd`` and the console script ``adpsgd``."""

import os
import sys
from typing import Any

from lightning.pytorch.cli import LightningCLI

import lightning_adpsgd  # noqa: F401 - registers the strategy names


def main(args: Any = None) -> None:
    """Run LightningCLI; the configuration names model and data by ``class_path``.

    Args:
        args: command line arguments as a list, or a configuration as a dict; None: ``sys.argv``.
    """
    # Unlike `python -m`, a console script does not find modules in the working directory, where the user's are.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    LightningCLI(args=args)
