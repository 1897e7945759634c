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
    except IsADirectoryError:
        parser.error(f"{options.checkpoint!r} is a folder; expected a checkpoint's file in it")
    except FileNotFoundError as error:
        parser.error(f"there is no file {options.checkpoint!r} ({error})")
    except pickle.UnpicklingError:
        parser.error(
            f"{options.checkpoint} is no checkpoint, or holds more than plain data, which could run code. If you know"
            " where it comes from, pass --trust."
        )
    except ImportError as error:  # matplotlib, or what fsspec needs for a URL
        parser.error(str(error))
    except (OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
        parser.error(
            f"{options.checkpoint} cannot be read ({_in_short(error)}); expected a checkpoint that a Trainer with a"
            " CommunicationMonitor has written, whole"
        )
    history = RoundHistory()
    state = _state_in(checkpoint) or parser.error(_without_rounds(options.checkpoint))
    try:
        history.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        parser.error(f"{options.checkpoint} holds a monitor's state that is damaged or not complete ({error!r})")
    print(history.report())
    try:
        draw(history.rounds, options.output)
    except (ImportError, OSError, ValueError) as error:
        parser.error(f"--output {options.output!r}: the picture could not be written ({_in_short(error)})")
    print(f"  plot            {options.output}")


def _state_in(checkpoint: Any) -> dict[str, Any] | None:
    """The first state of a monitor that has rounds."""
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    known = (state for state in states if isinstance(state, dict) and isinstance(state.get("ddp_bytes"), torch.Tensor))
    return next((state for state in known if state["ddp_bytes"].numel() > 0), None)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['it ends too early'])[0]}"


def _without_rounds(checkpoint: str) -> str:
    return (
        f"{checkpoint} tells of no averaging round: it was written before the first one, or the Trainer had no"
        " CommunicationMonitor among its callbacks"
    )
