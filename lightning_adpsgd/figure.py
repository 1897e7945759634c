"""The figure of a run: averaging period, rounds, variance, its target and the learning rate, over optimizer steps.

Imported only where a run is drawn, because matplotlib is optional; :mod:`lightning_adpsgd.plot` is the way in.
"""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_adpsgd.rounds.record import AveragingRound


class RunFigure(Figure):
    """A figure that pyplot does not know of, so no window opens and none has to be closed; a notebook shows it."""

    def _repr_png_(self) -> bytes:
        """What IPython shows; it finds a plain ``Figure`` only once pyplot has been imported."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=80)
        return file.getvalue()


def new_figure(rounds: Sequence[AveragingRound], transport: str) -> RunFigure:
    """The history of a run; several optimizers are drawn side by side."""
    indices = sorted({round_.optimizer for round_ in rounds})
    figure = RunFigure(figsize=(9.0 * len(indices), 6.5), layout="constrained")
    axes = figure.subplots(2, len(indices), sharex="col", squeeze=False)
    for column, index in enumerate(indices):
        own = _end_to_end([round_ for round_ in rounds if round_.optimizer == index])
        title = f"optimizer {index}: " if len(indices) > 1 else ""
        title += f"{len(own)} averaging rounds in {own[-1].step} steps"
        _draw_period(axes[0][column], own, title if transport == "at once" else f"{title}, {transport}")
        _draw_variance(axes[1][column], own)
    return figure


def _end_to_end(rounds: Sequence[AveragingRound]) -> list[AveragingRound]:
    """The rounds of several runs one after the other, where a monitor has heard of more than one."""
    placed: list[AveragingRound] = []
    before = 0
    for former, round_ in zip([None, *rounds], rounds, strict=False):
        if former is not None and round_.step < former.step:
            before += former.step
        placed.append(round_._replace(step=before + round_.step))
    return placed


def _draw_period(axis: Any, rounds: Sequence[AveragingRound], title: str) -> None:
    steps = [round_.step for round_ in rounds]
    axis.step(steps, [round_.period for round_ in rounds], where="post", color="C0", label="averaging period p")
    axis.set_ylabel("averaging period p [steps]", color="C0")
    axis.set_ylim(bottom=0)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    count = axis.twinx()
    count.plot(steps, range(1, len(rounds) + 1), color="C1", label="averaging rounds so far")
    count.set_ylabel("averaging rounds so far", color="C1")
    count.set_ylim(bottom=0)
    axis.set_title(title)
    _legend(axis, count)


def _draw_variance(axis: Any, rounds: Sequence[AveragingRound]) -> None:
    periodic = [(r.step, r.variance) for r in rounds if r.trigger == "period" and r.variance > 0]
    others = [(r.step, r.variance) for r in rounds if r.trigger != "period" and r.variance > 0]
    targets = [(r.step, r.learning_rate * r.target) for r in rounds if r.target and r.learning_rate * r.target > 0]
    if periodic or others or targets:
        axis.set_yscale("log")
    _plot(axis, periodic, ".-", color="C2", lw=0.8, ms=4, label="variance $S_k$")
    if others:
        _plot(axis, others, "x", color="C2", alpha=0.6, ms=5, label="$S_k$, other rounds")
    if targets:
        _plot(axis, targets, "--", color="C3", label=r"$\gamma_k C_2$")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("variance among workers", color="C2")
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    _plot(rate, [(r.step, r.learning_rate) for r in rounds], "-", color="C4", lw=0.9, label=r"learning rate $\gamma_k$")
    rate.set_ylabel(r"learning rate $\gamma_k$", color="C4")
    rate.set_ylim(bottom=0)
    _legend(axis, rate)


def _plot(axis: Any, points: Sequence[tuple[int, float]], style: str, **options: Any) -> None:
    axis.plot([step for step, _ in points], [value for _, value in points], style, **options)


def _legend(left: Any, right: Any) -> None:
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc="best", fontsize="small", framealpha=0.85)
