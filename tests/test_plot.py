"""The plot of a run."""

import struct
import warnings

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_adpsgd import AveragingRound
from lightning_adpsgd.plot import draw

SIZE = (1170, 845)  # one optimizer's


def a_round(**fields):
    defaults = {
        "step": 4,
        "optimizer": 0,
        "trigger": "period",
        "local_steps": 4,
        "period": 4,
        "learning_rate": 0.1,
        "variance": 0.02,
        "ratio": 0.2,
        "target": None,
        "payload_bytes": 440,
        "sent_bytes": 660,
        "seconds": 0.25,
    }
    return AveragingRound(**{**defaults, **fields})


# A run of four rounds of 100 fp32 parameters on four workers, where DDP would send 2·3/4·400 = 600 bytes per step
RUN = (
    a_round(),
    a_round(step=8, variance=0.03, ratio=0.3, target=0.2),
    a_round(step=13, local_steps=5, period=5, variance=0.0, ratio=0.0, target=0.25, seconds=0.5),
    a_round(step=15, local_steps=2, period=6, trigger="train_end", target=0.25, sent_bytes=700, seconds=1.0),
)
HISTORIES = {
    "adaptive": RUN,
    "without target": (a_round(), a_round(step=8), a_round(step=12)),
    "zero variance": [round_._replace(variance=0.0, ratio=0.0, target=0.0) for round_ in RUN],
    "forced rounds only": [round_._replace(trigger="validation") for round_ in RUN],
    "forced rounds only, none sampled": [round_._replace(trigger="train_end", target=None) for round_ in RUN],
    "one round": RUN[:1],
    "every rate zero": [round_._replace(learning_rate=0.0, ratio=0.0) for round_ in RUN],
}


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def drawn(monkeypatch, rounds, **options):
    """The axes of the figure, and the lines of each by label."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: figures.append(self))
    draw(rounds, "memory://nowhere.png", **options)
    (figure,) = figures
    return figure.axes, [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        for axes in figure.axes
    ]


@pytest.mark.parametrize("rounds", HISTORIES.values(), ids=HISTORIES)
def test_plot_of_any_history_is_a_picture_drawn_without_a_warning(rounds, tmp_path):
    path = tmp_path / "new folder" / "plot.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(list(rounds), path)
    assert png_size(path) == SIZE
    assert imread(path).std() > 0.05  # not a blank page


def test_two_optimizers_are_drawn_side_by_side(tmp_path):
    draw([*RUN, *(round_._replace(optimizer=1, period=9) for round_ in RUN)], tmp_path / "two.png")
    assert png_size(tmp_path / "two.png") == (2 * SIZE[0], SIZE[1])


def test_plot_shows_the_period_the_rounds_the_variance_its_target_and_the_rate(monkeypatch):
    lines = {label: line for axes in drawn(monkeypatch, RUN)[1] for label, line in axes.items()}
    assert lines == {
        "averaging period p": ([4, 8, 13, 15], [4, 4, 5, 6]),
        "averaging rounds so far": ([4, 8, 13, 15], [1, 2, 3, 4]),
        "variance $S_k$": ([4, 8], [0.02, 0.03]),
        "$S_k$, other rounds": ([15], [0.02]),
        r"$\gamma_k C_2$": ([8, 13, 15], [pytest.approx(0.02), pytest.approx(0.025), pytest.approx(0.025)]),
        r"learning rate $\gamma_k$": ([4, 8, 13, 15], [0.1] * 4),
    }


def test_runs_of_one_monitor_are_drawn_one_after_the_other(monkeypatch):
    axes, lines = drawn(monkeypatch, [*RUN, RUN[0], RUN[1]])
    assert lines[0]["averaging period p"] == ([4, 8, 13, 15, 19, 23], [4, 4, 5, 6, 4, 4])
    assert axes[0].get_title() == "6 averaging rounds in 23 steps"


def test_plot_of_two_optimizers_keeps_their_rounds_apart(monkeypatch):
    rounds = [RUN[0], RUN[1]._replace(optimizer=1, period=9), RUN[2], RUN[3]._replace(optimizer=1, period=10)]
    axes, lines = drawn(monkeypatch, rounds)
    periods = [of_axes["averaging period p"] for of_axes in lines if "averaging period p" in of_axes]
    assert periods == [([4, 13], [4, 5]), ([8, 15], [9, 10])]
    assert [a.get_title() for a in axes if a.get_title()] == [
        "optimizer 0: 2 averaging rounds in 13 steps",
        "optimizer 1: 2 averaging rounds in 15 steps",
    ]


@pytest.mark.parametrize(("transport", "suffix"), [("at once", ""), ("in bf16", ", in bf16")])
def test_title_has_the_number_of_rounds_and_how_they_were_sent(monkeypatch, transport, suffix):
    (first, *_), _ = drawn(monkeypatch, RUN, transport=transport)
    assert first.get_title() == f"4 averaging rounds in 15 steps{suffix}"


@pytest.mark.parametrize(("history", "scale"), [("adaptive", "log"), ("forced rounds only", "log"), ("none", "linear")])
def test_variance_is_on_a_logarithmic_scale_where_there_is_any(monkeypatch, history, scale):
    nothing = [round_._replace(variance=0.0, target=None) for round_ in RUN]
    (_, below, *_), _ = drawn(monkeypatch, HISTORIES.get(history, nothing))
    assert below.get_yscale() == scale
