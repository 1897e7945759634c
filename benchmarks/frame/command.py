"""Commands: arguments that are checked, and exit codes."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frame.errors import NotMeasuredError

NOT_AS_CLAIMED, FAILED, INTERRUPTED = 1, 2, 130
"""Exit codes; 0 is success, and argparse exits with 2 for a wrong argument."""


Arguments = Sequence[str] | None


def new_main(
    parse: Callable[[Arguments], argparse.Namespace],
    measure: Callable[[argparse.Namespace], int],
    failed: str = "Nothing was measured.",
    interrupted: str = "All processes and hosts that were started are removed.",
) -> Callable[[Arguments], int]:
    """The function of a command: it takes arguments, measures, and returns the exit code.

    Args:
        parse: returns the options.
        measure: measures, prints and returns the exit code.
        failed: the message before that of a NotMeasuredError.
        interrupted: the message after Ctrl-C.
    """

    def main(arguments: Arguments = None) -> int:
        options = parse(arguments)
        try:
            return measure(options)
        except NotMeasuredError as error:
            say(f"{failed} {error}")
            return FAILED
        except KeyboardInterrupt:
            say(f"Interrupted. {interrupted}")
            return INTERRUPTED

    return main


def say(text: str) -> None:
    """Print progress, to standard error."""
    print(text, file=sys.stderr, flush=True)


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for ``python -m NAME`` that has ``--json FILE``."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all numbers to this file")
    return parser


def settings(options: argparse.Namespace, *hidden: str) -> dict[str, Any]:
    """The options as a dict, without ``json`` and those that are hidden."""
    return {name: value for name, value in vars(options).items() if name not in ("json", *hidden)}


# Types of arguments


def number(least: float, most: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """A number in a range."""

    def parse(given: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(given) <= most and math.isfinite(kind(given)):
                return kind(given)
        expected = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} {expected}, got {given!r}")

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list divided by commas; what is given twice is taken once."""
    return lambda given: list(dict.fromkeys(kind(each) for each in given.split(",")))


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """One of several names."""
    known = list(names)

    def parse(given: str) -> str:
        if given not in known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {given!r}")
        return given

    return parse


def rate(given: str) -> float | None:
    """The rate of a link in Mbit/s, or ``none``."""
    return None if given == "none" else number(1, kind=float)(given)


def output_file(given: str) -> Path:
    """A file to write, in a folder that exists."""
    folder(str(Path(given).absolute().parent))
    return Path(given)


def folder(given: str) -> Path:
    """A folder that exists."""
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {given}; make it first")
    return Path(given)
