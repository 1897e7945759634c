"""Contenders that take turns, and the medians of what they took."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Contender = TypeVar("Contender")


def turns(contenders: Iterable[Contender], count: int) -> Iterator[tuple[int, Contender]]:
    """Yield the turn, from 0 on, and the contender: A B C A B C, so that a drift of the machine affects all alike."""
    order = list(contenders)
    for turn in range(count):
        for contender in order:
            yield turn, contender


def median(values: Iterable[float]) -> float:
    """The median; a ValueError if there are no values."""
    return float(statistics.median(_known(values, "median")))


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """The first and the third quartile; of one value, that value twice."""
    known = _known(values, "quartiles")
    if len(known) == 1:
        return known[0], known[0]
    first, _, third = statistics.quantiles(known, n=4, method="inclusive")
    return first, third


def median_interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the median by the sign test, which assumes nothing about the distribution.

    The values have to be independent. With fewer than six the interval goes from the smallest to the largest,
    and its confidence is below 95 %.
    """
    known = sorted(_known(values, "median_interval"))
    count, place, outside = len(known), 0, 0.0
    while place < (count - 1) // 2:
        outside += 2 * math.comb(count, place) / 2**count
        if outside + 2 * math.comb(count, place + 1) / 2**count > 1 - confidence:
            break
        place += 1
    return known[place], known[count - 1 - place]


def ratios(values: Sequence[float], references: Sequence[float]) -> list[float]:
    """Each value divided by the reference of the same turn."""
    return [value / reference for value, reference in zip(values, references, strict=True)]


def speed(reference: Sequence[float] | None, mine: Sequence[float]) -> float | None:
    """How many times as fast as the reference, the median over the turns; None without a reference."""
    return None if reference is None else median(ratios(reference, mine))


def _known(values: Iterable[float], name: str) -> list[float]:
    known = list(values)
    if not known:
        raise ValueError(f"{name}(): expected at least one value, got none.")
    return known
