"""LightningCLI with the strategy names registered."""

import os
import sys
from typing import Any

from lightning_adpsgd import __version__

from .family import LightningCLI
from .strategy import ADPSGDStrategy

_EPILOG = (
    "Further commands, each with a --help of its own: adpsgd plot CHECKPOINT draws the averaging rounds that a"
    " checkpoint tells of; adpsgd elastic --workers N SCRIPT runs workers of ElasticLocalSGD on this machine, and"
    " starts those again that die; adpsgd lighthouse runs the place where they meet."
)


def main(args: Any = None) -> None:
    """Run LightningCLI; model and data are named in the configuration by their ``class_path``.

    Args:
        args: command line arguments as a list, or a configuration as a dict; None takes ``sys.argv``.
    """
    ADPSGDStrategy.register_strategies()
    # A console script finds modules next to itself, `python -m` those of the working directory, where the user's are.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    LightningCLI(args=args, parser_kwargs={"prog": "adpsgd", "version": __version__, "epilog": _EPILOG})
