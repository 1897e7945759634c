"""The figures of the results page: means over seeds, with a band from the least to the greatest."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.paper.plan import Contender, Task
from benchmarks.paper.results import Outcomes
from benchmarks.paper.runs import Result

COLOURS = {
    "full": "#222222",
    "qsgd": "#228833",
    "cpsgd-8": "#ee6677",
    "cpsgd-matched": "#ccbb44",
    "adpsgd": "#4477aa",
    "adpsgd-p8-s0.25": "#66ccee",
}
"""Of each contender, everywhere; told apart by most people who see colours differently (P. Tol's "bright")."""
OTHERS = "#aa3377"
LEGEND_COLUMNS = 3
MEGABYTE = 1e6

Columns = tuple[Sequence[float], Sequence[float]]


def loss(outcomes: Outcomes, tasks: Sequence[Task], contenders: Sequence[Contender], file: Path) -> None:
    """Training loss against epochs, and against bytes sent per worker: a row per task."""

    def draw(axes: Axes, task: Task, horizontal: str) -> None:
        for contender in contenders:
            _curve(axes, outcomes, task, contender, lambda result: _points(result, horizontal, "loss"))
        axes.set_title(task.title)
        axes.set_ylabel("training loss")
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))

    figure, grid = _grid(len(tasks), 2)
    for row, task in enumerate(tasks):
        draw(grid[row][0], task, "epoch")
        grid[row][0].set_xlabel("epoch")
        draw(grid[row][1], task, "sent_bytes")
        _against_bytes(grid[row][1])
    _finish(figure, grid, file)


def accuracy(outcomes: Outcomes, tasks: Sequence[Task], contenders: Sequence[Contender], file: Path) -> None:
    """Accuracy of the averaged model against bytes sent per worker: a column per task."""
    figure, grid = _grid(1, len(tasks))
    for axes, task in zip(grid[0], tasks, strict=True):
        for contender in contenders:
            _curve(axes, outcomes, task, contender, lambda result: _points(result, "sent_bytes", "accuracy", 100))
        axes.set_title(task.title)
        axes.set_ylabel("test accuracy [%]")
        _against_bytes(axes)
    _finish(figure, grid, file)


def variance(outcomes: Outcomes, tasks: Sequence[Task], contenders: Sequence[Contender], file: Path) -> None:
    """S_k, S_k/γ_k with its target, and the period, over the steps: a row per task, one seed."""
    figure, grid = _grid(len(tasks), 3)
    for row, task in zip(grid, tasks, strict=True):
        for contender in contenders:
            result = _first(outcomes, task, contender)
            if result is None:
                continue
            steps, columns = _by_period(result)
            colour = _colour(contender)
            row[0].plot(steps, columns["variance"], color=colour, label=contender.title, linewidth=1)
            row[1].plot(steps, columns["ratio"], color=colour, label=contender.title, linewidth=1)
            row[2].step(steps, columns["period"], color=colour, label=contender.title, where="post", linewidth=1.2)
            if contender.method == "adaptive":
                known = [(step, value) for step, value in zip(steps, columns["target"], strict=True) if value]
                row[1].plot(*zip(*known, strict=True), color=colour, linestyle=":", label="its target C₂")
        for axes, label in zip(row, ("S_k", "S_k / γ_k", "averaging period p [steps]"), strict=True):
            axes.set_title(task.title)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
        row[0].set_yscale("log")
        row[1].set_yscale("log")
        _rate(row[2], outcomes, task, contenders)
    _finish(figure, grid, file)


def _rate(axes: Axes, outcomes: Outcomes, task: Task, contenders: Sequence[Contender]) -> None:
    """The learning rate in the background, which is what the period is to follow."""
    known = [result for contender in contenders if (result := _first(outcomes, task, contender)) is not None]
    if not known:
        return
    steps, columns = _by_period(max(known, key=lambda result: len(result["averaging"]["step"])))
    twin = axes.twinx()
    twin.plot(steps, columns["learning_rate"], color="#999999", linewidth=0.8, linestyle="--")
    twin.set_ylabel("γ_k (dashed)", color="#777777")
    twin.tick_params(colors="#777777")


def _first(outcomes: Outcomes, task: Task, contender: Contender) -> Result | None:
    results = outcomes.results(task, contender)
    return results[min(results)] if results else None


def _by_period(result: Result) -> tuple[list[int], Mapping[str, list[Any]]]:
    """Rounds that the period asked for: their steps, and their other properties."""
    averaging = result["averaging"]
    kept = [index for index, trigger in enumerate(averaging["trigger"]) if trigger == "period"]
    columns = {name: [values[index] for index in kept] for name, values in averaging.items()}
    return columns["step"], columns


def _colour(contender: Contender) -> str:
    return COLOURS.get(contender.name, OTHERS)


def _points(result: Result, horizontal: str, vertical: str, factor: float = 1.0) -> Columns:
    known = [point for point in result["curve"] if point[vertical] is not None]
    scale = 1 / MEGABYTE if horizontal == "sent_bytes" else 1.0
    return [scale * point[horizontal] for point in known], [factor * point[vertical] for point in known]


def _curve(
    axes: Axes,
    outcomes: Outcomes,
    task: Task,
    contender: Contender,
    points: Callable[[Result], Columns],
) -> None:
    results = outcomes.results(task, contender)
    if not results:
        return
    across, up = (np.array(each) for each in zip(*map(points, results.values()), strict=True))
    horizontal, colour = across.mean(axis=0), _colour(contender)
    axes.plot(horizontal, up.mean(axis=0), color=colour, marker="o", markersize=3, label=contender.title)
    axes.fill_between(horizontal, up.min(axis=0), up.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def _against_bytes(axes: Axes) -> None:
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis, (1, 2, 5))
    axes.set_xlabel("sent per worker [MB]")


def _plain_numbers(axis: Axis, multiples: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers, at these multiples of powers of ten."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _grid(rows: int, columns: int) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.3 * rows), squeeze=False)
    return figure, grid


def _finish(figure: Figure, grid: Sequence[Sequence[Axes]], file: Path) -> None:
    for row in grid:
        for axes in row:
            axes.grid(True, which="major", alpha=0.25)
    shown = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    rows = -(-len(shown) // LEGEND_COLUMNS)
    figure.legend(shown.values(), shown, loc="upper center", ncol=LEGEND_COLUMNS, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 * rows / figure.get_figheight()))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
