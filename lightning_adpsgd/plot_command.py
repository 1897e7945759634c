"""The command ``adpsgd plot``: draws the run that a checkpoint tells of."""

import argparse
import pickle
from typing import Any

import fsspec
import torch

from lightning_adpsgd.history import RoundHistory
from lightning_adpsgd.plot import check_matplotlib, draw


def main(arguments: list[str]) -> None:
    """Print the summary of a run, and draw it.

    Args:
        arguments: those of the command line, after ``adpsgd plot``.
    """
    parser = argparse.ArgumentParser("adpsgd plot", description="Draw the averaging rounds that a checkpoint tells of.")
    parser.add_argument("checkpoint", help="a file (or URL) of a Trainer with a CommunicationMonitor")
    parser.add_argument("--output", default="adpsgd.png", help="the picture (default: %(default)s)")
    parser.add_argument("--trust", action="store_true", help="load a checkpoint that holds more than plain data")
    options = parser.parse_args(arguments)
    try:
        check_matplotlib("adpsgd plot")
        with fsspec.open(options.checkpoint, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=not options.trust)
    except ModuleNotFoundError as error:
        parser.error(str(error))
    except FileNotFoundError:
        parser.error(f"there is no file {options.checkpoint}")
    except pickle.UnpicklingError:
        parser.error(
            f"{options.checkpoint} is no checkpoint, or holds more than plain data, which could run code. If you know"
            " where it comes from, pass --trust."
        )
    history = RoundHistory()
    history.load_state_dict(_state_in(checkpoint) or parser.error(_without_rounds(options.checkpoint)))
    print(history.report())
    draw(history.rounds, options.output)
    print(f"  plot            {options.output}")


def _state_in(checkpoint: Any) -> dict[str, Any] | None:
    """The first state of a monitor that has rounds."""
    states = checkpoint.get("callbacks", {}).values() if isinstance(checkpoint, dict) else ()
    with_rounds = (state for state in states if isinstance(state, dict) and len(state.get("ddp_bytes", ())))
    return next(with_rounds, None)


def _without_rounds(checkpoint: str) -> str:
    return (
        f"{checkpoint} tells of no averaging round: it was written before the first one, or the Trainer had no"
        " CommunicationMonitor among its callbacks"
    )
