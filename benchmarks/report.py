"""What the measurements share: arguments, turns, medians, a table to read and a file to keep."""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Contender = TypeVar("Contender")

DISTRIBUTIONS = {
    "torch": "torch",
    "lightning": "lightning",
    "lightning_adpsgd": "lightning-adpsgd",
    "numpy": "numpy",
}
_NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*( ?(%|[kMGT]?B|[mu]?s))?( to .*)?")


def turns(contenders: Iterable[Contender], count: int) -> Iterator[tuple[int, Contender]]:
    """Every contender once, then every one once more, and so on: A B C A B C.

    What drifts in the machine, its clock or its neighbours, then reaches all of them alike.

    Args:
        contenders: in order.
        count: how many turns each of them has.

    Yields:
        The turn, from 0 on, and the contender.
    """
    order = list(contenders)
    for turn in range(count):
        for contender in order:
            yield turn, contender


def median(values: Iterable[float]) -> float:
    """The value in the middle, or the mean of the two there.

    Raises:
        ValueError: if there are none.
    """
    known = list(values)
    if not known:
        raise ValueError("median(): expected one value at least, got none.")
    return float(statistics.median(known))


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """Between which two values the middle half lies; the one value twice if there is only one.

    Raises:
        ValueError: if there are none.
    """
    known = list(values)
    if len(known) < 2:
        return median(known), median(known)
    first, _, third = statistics.quantiles(known, n=4, method="inclusive")
    return first, third


def median_interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float]:
    """Between which two of the values the median of all that could have been measured lies.

    By counting only, whatever the distribution: each value is above that median or not, with equal chances. Of fewer
    than six values, the smallest and the largest are all that can be said at 95 %, and it is less then.

    Args:
        values: measured independently of each other.
        confidence: how sure.

    Raises:
        ValueError: if there are none.
    """
    known = sorted(values)
    if not known:
        raise ValueError("median_interval(): expected one value at least, got none.")
    count, place, outside = len(known), 0, 0.0
    while place < (count - 1) // 2:
        outside += 2 * math.comb(count, place) / 2**count
        if outside + 2 * math.comb(count, place + 1) / 2**count > 1 - confidence:
            break
        place += 1
    return known[place], known[count - 1 - place]


# What is asked for


def number(least: float, most: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """The type of an argument that is a number in a range."""

    def parse(given: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(given) <= most and math.isfinite(kind(given)):
                return kind(given)
        expected = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} {expected}, got {given!r}")

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an argument that is a list, divided by commas; what is given twice is taken once."""
    return lambda given: list(dict.fromkeys(kind(each) for each in given.split(",")))


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an argument that is one of several names."""
    known = list(names)

    def parse(given: str) -> str:
        if given not in known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {given!r}")
        return given

    return parse


def output_file(given: str) -> Path:
    """The type of an argument that is a file to write."""
    path = Path(given)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{given}: there is no folder {path.absolute().parent}; make it first")
    return path


# To read


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text: numbers to the right, words to the left.

    Args:
        rows: a value per column; one that is missing or None is left empty. Text is shown as it is, a float with four
            digits that count.
        columns: which ones, in order; also what stands above them.
    """
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, (column, *(line[place] for line in cells)))) for place, column in enumerate(columns)]
    to_the_right = [any(_NUMBER.fullmatch(line[place]) for line in cells) for place in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, to_the_right, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in aligned).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def bytes_readable(count: float) -> str:
    """Bytes with a unit that suits them, in powers of 1000: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_readable(seconds: float) -> str:
    """Seconds with a unit that suits them: ``1.23 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{seconds * 1e6:.3f} us" if seconds else "0 s"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


# To keep


def write_json(
    path: str | Path, benchmark: str, arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write what was measured, with what, and on what.

    Args:
        path: the file.
        benchmark: its name.
        arguments: the settings it ran with, defaults included.
        rows: the numbers.
    """
    content = {
        "benchmark": benchmark,
        "command": [Path(sys.executable).name, "-m", f"benchmarks.{benchmark}", *sys.argv[1:]],
        "arguments": dict(arguments),
        "machine": machine(),
        "rows": [dict(row) for row in rows],
    }
    Path(path).write_text(json.dumps(content, indent=1, default=str) + "\n")


def machine() -> dict[str, Any]:
    """What a measurement depends on: versions and processors."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(distribution) for name, distribution in DISTRIBUTIONS.items()},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
