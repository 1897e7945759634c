"""The figures of the results page: means over seeds, with a band from the lowest to the highest."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from benchmarks.paper.against_bytes import Brief, Point, frontier
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
    "ddp-bf16": "#777777",
    "powersgd-1": "#997700",
    "powersgd-2": "#997700",
    "powersgd-4": "#997700",
    "adpsgd-p2-s0.25": "#4477aa",
    "adpsgd-p2-int8": "#4477aa",
    "adpsgd-p2-int4": "#4477aa",
    "adpsgd-int4": "#cc3311",
}
"""Of each contender, everywhere; mostly safe for colour-blind readers (P. Tol's "bright")."""
OTHERS = "#aa3377"
NAMES_IN_BRIEF = {"full": "ddp", "adpsgd": "adpsgd", "adpsgd-int4": "adpsgd_int4"}  # as the Trainer knows them
LEGEND_COLUMNS = 3
PANELS = 2  # side by side, where points have names
DISTANCES = (6, 14, 22, 30, 40, 50, 60, 75, 90, 110, 130)  # of a name from its point, in typographic points
ANGLES = tuple(math.radians(degrees) for degrees in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240))
POINT_PIXELS = 4
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


def against_bytes(tasks: Mapping[Task, Sequence[Point]], file: Path) -> None:
    """Test accuracy against bytes ÷ full communication's: a panel per task, a labelled point per contender."""
    rows = -(-len(tasks) // PANELS)
    figure, grid = plt.subplots(
        rows, min(PANELS, len(tasks)), figsize=(6.6 * min(PANELS, len(tasks)), 4.6 * rows), squeeze=False
    )
    panels = [axes for row in grid for axes in row]
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, (task, points) in zip(panels, tasks.items(), strict=False):
        best = frontier(points)
        axes.plot(
            [each.share for each in best], [each.accuracy for each in best], color="#bbbbbb", linewidth=3, zorder=1
        )
        for point in points:
            colour, hollow = _colour(point.contender), point.contender.rate != 1.0
            axes.errorbar(
                point.share,
                point.accuracy,
                yerr=point.deviation,
                color=colour,
                marker="o",
                markersize=5,
                markerfacecolor="white" if hollow else colour,
                capsize=2,
                linewidth=1,
            )
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, (1, 2, 5))
        axes.set_xlim(min(each.share for each in points) / 1.8, 2)
        axes.margins(y=0.12)
        axes.grid(True, which="major", alpha=0.25)
        axes.set_title(task.title)
        axes.set_xlabel("bytes ÷ full communication's")
        axes.set_ylabel("test accuracy [%]")
    figure.tight_layout()
    figure.canvas.draw()
    for axes, points in zip(panels, tasks.values(), strict=False):
        _label(axes, points)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def in_brief(contenders: Sequence[Brief], file: Path) -> None:
    """Accuracy less full communication's against bytes: a small point per task, a large one for their mean."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    most = max(len(each.gains) for each in contenders)
    for contender, shares, gains in contenders:
        colour, mean = _colour(contender), (math.exp(np.mean(np.log(shares))), float(np.mean(gains)))
        axes.plot(shares, gains, "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
        axes.plot(*mean, "o", color=colour, markersize=10)
        of_tasks = f", {len(gains)} tasks" if len(gains) < most else ""
        told = f"{NAMES_IN_BRIEF.get(contender.name, contender.title)}{of_tasks}"
        if any(gains):
            told += f"\n{mean[1]:+.1f} points".replace("-", "−")
        axes.annotate(
            told,
            mean,
            (10, -8),
            textcoords="offset points",
            ha="left",
            va="top",
            color=colour,
            fontsize=10,
        )
    axes.axhline(0, color="#222222", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(0.04, 2)
    axes.margins(y=0.12)
    _plain_numbers(axes.xaxis, (1, 2, 5))
    axes.set_xlabel("bytes sent ÷ DDP’s (logarithmic)")
    axes.set_ylabel("test accuracy − DDP’s [points]")
    axes.set_title(f"Large: the mean of {most} tasks; small: each task", fontsize=10)
    axes.grid(True, which="major", alpha=0.25)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Name each point, as near to it as there is room; a line leads to a name that is far away."""
    taken = [*(_surroundings(axes, point) for point in points), *_along(axes, frontier(points))]
    for point in sorted(points, key=lambda each: each.share):
        for distance, angle in product(DISTANCES, ANGLES):
            text = _name(axes, point, distance, angle)
            box = _extent(text)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(each) for each in taken):
                break
            text.remove()
        else:
            text = _name(axes, point, DISTANCES[0], ANGLES[0])  # no room: better on top of something than missing
        taken.append(_extent(text))


def _name(axes: Axes, point: Point, distance: float, angle: float) -> Annotation:
    across, up = math.cos(angle), math.sin(angle)
    return axes.annotate(
        point.contender.title,
        (point.share, point.accuracy),
        xytext=(distance * across, distance * up),
        textcoords="offset points",
        ha="center" if abs(across) < 0.3 else "left" if across > 0 else "right",
        va="center" if abs(up) < 0.3 else "bottom" if up > 0 else "top",
        fontsize=8,
        color=_colour(point.contender),
        arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"} if distance > DISTANCES[0] else None,
    )


def _along(axes: Axes, line: Sequence[Point]) -> list[Bbox]:
    """What the line through these points covers, in pixels, as many small boxes."""
    corners = axes.transData.transform([(each.share, each.accuracy) for each in line])
    places = np.linspace(0, len(corners) - 1, 100 * len(corners))
    across, up = (np.interp(places, range(len(corners)), corners[:, axis]) for axis in (0, 1))
    return [Bbox([[x - 2, y - 2], [x + 2, y + 2]]) for x, y in zip(across, up, strict=True)]


def _extent(text: Annotation) -> Bbox:
    """What a name covers, in pixels, without the line that leads to it."""
    text.update_positions(text.figure.canvas.get_renderer())
    return Text.get_window_extent(text)


def _surroundings(axes: Axes, point: Point) -> Bbox:
    """What a point and its spread cover, in pixels."""
    (x, low), (_, high) = (
        axes.transData.transform((point.share, point.accuracy + side * point.deviation)) for side in (-1, 1)
    )
    return Bbox([[x - POINT_PIXELS, low - POINT_PIXELS], [x + POINT_PIXELS, high + POINT_PIXELS]])


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
    """The learning rate in the background, which the period responds to."""
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
    """Rounds that the period triggered: their steps, and their other properties."""
    averaging = result["averaging"]
    kept = [index for index, trigger in enumerate(averaging["trigger"]) if trigger == "period"]
    columns = {name: [values[index] for index in kept] for name, values in averaging.items()}
    return columns["step"], columns


def _colour(contender: Contender) -> str:
    return COLOURS.get(contender.name.partition("-x")[0], OTHERS)


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
