"""Types of numbers on the command line, whose errors say what was given and what is expected."""

import argparse
import math
from collections.abc import Callable

_LONGEST = 365 * 24 * 3600.0


def whole(least: int, most: int = 10**6) -> Callable[[str], int]:
    """A whole number within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} was given: expected a whole number from {least} to {most}")
        return value

    return parse


def seconds(least: float) -> Callable[[str], float]:
    """A time in seconds, at most a year."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= _LONGEST:
            raise argparse.ArgumentTypeError(f"{text!r} was given: expected seconds, from {least:g} to a year")
        return value

    return parse
