"""The arithmetic behind the page: means and spreads over seeds, differences within seeds.

A spread is the sample standard deviation over the seeds. A difference is taken within a seed, where both runs began
with the same weights and saw the same batches.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

from benchmarks.frame.turns import median
from benchmarks.paper.plan import Contender, Run, Task
from benchmarks.paper.runs import Result, Store

QUARTERS = 4
POINTS = 100  # per cent

Value = Callable[[Result], float]


final_loss: Value = itemgetter("final_loss")
"""Cross-entropy of the averaged model on all training images."""
accuracy: Value = itemgetter("accuracy")
"""Share of the test images that the averaged model gets right."""
rounds: Value = itemgetter("rounds")
"""Averages over all workers, of parameters or of gradients."""
sent_bytes: Value = itemgetter("sent_bytes")
"""By each worker."""


def mean_period(result: Result) -> float:
    """Steps per round."""
    return result["steps"] / result["rounds"]


class Spread(NamedTuple):
    """A number of several runs."""

    mean: float
    deviation: float | None  # None if there is only one run

    def text(self, digits: int, factor: float = 1.0, sign: bool = False) -> str:
        """As ``mean ± deviation``."""
        mean = f"{factor * self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.{digits}f}"


def spread(values: Iterable[float]) -> Spread:
    """The mean and the sample standard deviation.

    Raises:
        ValueError: if there are no values.
    """
    known = list(values)
    if not known:
        raise ValueError("spread(): expected at least one value, got none.")
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def in_words(differences: Sequence[float], digits: int, factor: float = 1.0, unit: str = "") -> str:
    """Differences as text: mean, spread, and with how many seeds they had the mean's sign."""
    mean = statistics.fmean(differences)
    alike = sum(difference * mean > 0 for difference in differences)
    word = "lower" if mean < 0 else "higher"
    text = spread(differences).text(digits, factor, sign=True)
    return f"{text}{unit} ({word} with {alike} of {len(differences)} seeds)"


class Outcomes:
    """The results of those ``runs`` that are done, from a ``store``."""

    def __init__(self, store: Store, runs: Iterable[Run]) -> None:
        self.missing: list[Run] = []  # runs that are not done
        self._results: dict[tuple[str, str], dict[int, Result]] = {}
        for run in runs:
            result = store.result(run)
            if result is None:
                self.missing.append(run)
            else:
                self._results.setdefault((run.task.name, run.contender.name), {})[run.seed] = result

    def of_runs(self, runs: Iterable[Run]) -> "Outcomes":
        """Those of some of the runs: a study's own seeds, where another one has more."""
        wanted = {(run.task.name, run.contender.name, run.seed) for run in runs}
        part = copy.copy(self)
        part.missing = [run for run in self.missing if (run.task.name, run.contender.name, run.seed) in wanted]
        part._results = {
            names: {seed: result for seed, result in by_seed.items() if (*names, seed) in wanted}
            for names, by_seed in self._results.items()
        }
        return part

    def results(self, task: Task, contender: Contender) -> Mapping[int, Result]:
        """The results of a contender with a task, by seed; empty if nothing is done."""
        return self._results.get((task.name, contender.name), {})

    def known(self, task: Task, contenders: Iterable[Contender]) -> list[Contender]:
        """The contenders that have results."""
        return [contender for contender in contenders if self.results(task, contender)]

    def of(self, task: Task, contender: Contender, value: Value) -> Spread:
        """A number over the seeds.

        Raises:
            ValueError: if no run is done.
        """
        return spread(map(value, self.results(task, contender).values()))

    def differences(self, task: Task, contender: Contender, other: Contender, value: Value) -> list[float]:
        """A number of a contender less that of another one, for each seed that both have."""
        first, second = self.results(task, contender), self.results(task, other)
        return [value(first[seed]) - value(second[seed]) for seed in sorted(first.keys() & second.keys())]

    def against(self, task: Task, contender: Contender, other: Contender) -> str:
        """Differences of loss and accuracy from another contender, as text; they need a seed in common."""
        losses = self.differences(task, contender, other, final_loss)
        gains = self.differences(task, contender, other, accuracy)
        return f"final loss {in_words(losses, 4)}, accuracy {in_words(gains, 2, POINTS, ' points')}"


class Reached(NamedTuple):
    """When the training loss of an epoch was at most a given one for the first time."""

    epochs: float
    sent_bytes: float


def until(result: Result, loss: float) -> Reached | None:
    """When a loss is reached, on straight lines between the epochs; None if it is not."""
    before = None
    for point in result["curve"]:
        if point["loss"] <= loss:
            if before is None:
                return Reached(point["epoch"], point["sent_bytes"])
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return Reached(*(before[name] + share * (point[name] - before[name]) for name in ("epoch", "sent_bytes")))
        before = point
    return None


def by_quarter(result: Result, name: str) -> list[float | None]:
    """The median of a property of the rounds in each quarter of the run; None where there was no round.

    Rounds that the period did not trigger are left out, as workers have drifted for fewer steps before them.
    """
    averaging, steps = result["averaging"], result["steps"]
    quarters: list[list[float]] = [[] for _ in range(QUARTERS)]
    for step, trigger, value in zip(averaging["step"], averaging["trigger"], averaging[name], strict=True):
        if trigger == "period":
            quarters[min(QUARTERS - 1, (step - 1) * QUARTERS // steps)].append(value)
    return [median(values) if values else None for values in quarters]


def quarters_over_seeds(results: Mapping[int, Result], name: str) -> list[float | None]:
    """The mean over the seeds of :func:`by_quarter`; None where a seed has none."""
    columns = zip(*(by_quarter(result, name) for result in results.values()), strict=True)
    return [None if None in column else statistics.fmean(column) for column in columns]
