"""What crossed the network and why: averaging rounds as log entries, a history, a summary and a plot."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from os import PathLike
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.rounds.record import TRIGGERS, AveragingRound, ring_bytes
from lightning_adpsgd.validation import check_instance, wrong_type, wrong_value


class CommunicationMonitor(Callback):
    """Logs every averaging round to all of the Trainer's loggers, and sums up at the end of ``fit``.

    At each round, at the step at which Lightning logs the loss of that batch, are logged: ``adpsgd/variance`` (S_k),
    ``adpsgd/variance_over_lr`` (S_k / γ_k), ``adpsgd/target`` (C₂, once there is one), ``adpsgd/period``,
    ``adpsgd/syncs`` (rounds so far), ``adpsgd/sent_bytes`` (by this rank so far), ``adpsgd/sent_bytes_ddp`` (what DDP's
    gradient all-reduce would have sent so far: one ring all-reduce of the trainable parameters' gradients per step) and
    ``adpsgd/round_seconds``. Where workers have been dropped (``on_divergence="drop"``), also ``adpsgd/dropped``, how
    many so far. With several optimizers the optimizer's index is appended: ``adpsgd/period_0``.

    Counts go on after a checkpoint is restored.

    Args:
        prefix: what the names begin with, and what the plot's file is called; "train/adpsgd" makes it "adpsgd.png" in a
            folder "train". Characters that not every file system takes are refused.
        plot: at the end of ``fit``, draw ``<prefix>.png`` into the Trainer's log directory, which may be in any file
            system that Lightning writes to (``s3://…``). Needs matplotlib.

    Raises:
        TypeError: if ``prefix`` is not a string, or ``plot`` not a bool.
        ValueError: if ``prefix`` is empty, or would not name a file inside of the log directory.
        ModuleNotFoundError: if ``plot`` is set and matplotlib is not installed.
    """

    def __init__(self, prefix: str = "adpsgd", plot: bool = False) -> None:
        # Configuration
        self.prefix = _check_prefix(prefix)
        self.plot = check_instance("CommunicationMonitor", "plot", plot, bool, "True or False")
        if self.plot and find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "CommunicationMonitor(plot=True) draws with matplotlib, which is not installed. Install it"
                " (pip install matplotlib), or pass plot=False."
            )

        # State
        self.rounds: list[AveragingRound] = []
        """The record of every round so far, on every rank."""
        self._ddp_bytes: list[int] = []  # for each round: what DDP would have sent since the one before
        self._totals: dict[int, _Totals] = {}  # of each optimizer
        self._plot_path: str | None = None
        self._transport = "at once"

    # Lightning's hooks

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        subscribe = getattr(trainer.strategy, "subscribe", None)
        if subscribe is None:
            rank_zero_warn(
                f"CommunicationMonitor has nothing to record: {type(trainer.strategy).__name__} has no averaging"
                ' rounds. Use it with Trainer(strategy="adpsgd").'
            )
            return
        self._transport = getattr(trainer.strategy, "transport", self._transport)
        subscribe(partial(self._on_round, trainer))

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.plot and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of Trainer's own file
            # All ranks have to ask, because Lightning broadcasts the answer.
            folder = str(trainer.log_dir or trainer.default_root_dir)
            self._plot_path = f"{folder.rstrip('/')}/{self.prefix}.png"

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.is_global_zero or not self.rounds:
            return
        print(f"\n{self._report()}")
        if self._plot_path is not None:
            draw(self.rounds, self._plot_path, transport=self._transport)
            print(f"  plot            {self._plot_path}")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The history, one tensor per field: compact, and readable with ``torch.load(weights_only=True)``."""
        columns: dict[str, Any] = {"ddp_bytes": torch.tensor(self._ddp_bytes, dtype=torch.int64)}
        for name in AveragingRound._fields:
            values = [getattr(round_, name) for round_ in self.rounds]
            if name == "trigger":
                values = [TRIGGERS.index(value) for value in values]
            elif name == "target":
                values = [float("nan") if value is None else value for value in values]
            columns[name] = torch.tensor(values, dtype=torch.float64 if name in _FLOATS else torch.int64)
        return columns

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        columns = {name: state_dict[name].tolist() for name in AveragingRound._fields}
        columns["trigger"] = [TRIGGERS[index] for index in columns["trigger"]]
        columns["target"] = [None if value != value else value for value in columns["target"]]
        self.rounds, self._ddp_bytes, self._totals = [], [], {}
        for *values, ddp_bytes in zip(*columns.values(), state_dict["ddp_bytes"].tolist(), strict=True):
            self._add(AveragingRound(*values), ddp_bytes)

    # What is told

    def summary(self) -> dict[str, Any]:
        """The run in numbers.

        Returns:
            ``rounds``; ``steps`` (optimizer steps they cover); ``rounds_per_step``; ``first_period`` and
            ``last_period`` (of the first optimizer); ``sent_bytes`` and ``sent_bytes_ddp`` (per rank);
            ``factor_saved``, the ratio of the two, or None if nothing was sent; ``seconds`` for which rounds held up
            training; ``transport``, how rounds travelled, in words; ``dropped``, workers left out of rounds because
            they had diverged; ``triggers``, the number of rounds by what asked for them.
        """
        steps = sum(round_.local_steps for round_ in self.rounds)
        sent = sum(round_.sent_bytes for round_ in self.rounds)
        ddp = sum(self._ddp_bytes)
        periods = [round_.period for round_ in self.rounds if round_.optimizer == 0]
        return {
            "rounds": len(self.rounds),
            "steps": steps,
            "rounds_per_step": len(self.rounds) / steps if steps else 0.0,
            "first_period": periods[0] if periods else None,
            "last_period": periods[-1] if periods else None,
            "sent_bytes": sent,
            "sent_bytes_ddp": ddp,
            "factor_saved": ddp / sent if sent else None,
            "seconds": sum(round_.seconds for round_ in self.rounds),
            "transport": self._transport,
            "dropped": sum(round_.dropped for round_ in self.rounds),
            "triggers": {
                name: sum(round_.trigger == name for round_ in self.rounds)
                for name in TRIGGERS
                if any(round_.trigger == name for round_ in self.rounds)
            },
        }

    def _report(self) -> str:
        summary = self.summary()
        share, factor = summary["rounds_per_step"], summary["factor_saved"]
        asked_for = ", ".join(f"{name} {count}" for name, count in summary["triggers"].items())
        lines = {
            "rounds": f"{summary['rounds']} in {summary['steps']} steps ({share:.1%}): {asked_for}",
            "period": f"{summary['first_period']} at first, {summary['last_period']} at last",
            "sent per rank": _readable(summary["sent_bytes"]),
            "DDP would have": _readable(summary["sent_bytes_ddp"]),
            "factor saved": "nothing was sent" if factor is None else f"{factor:.1f}x",
            "held up for": f"{summary['seconds']:.2f} s",
        }
        if summary["transport"] != "at once":
            lines["rounds travel"] = summary["transport"]
        if summary["dropped"]:
            lines["dropped"] = f"{summary['dropped']} time(s) a worker that had diverged"
        return "\n".join(["Averaging rounds", *(f"  {name:<15} {value}" for name, value in lines.items())])

    def _on_round(self, trainer: "pl.Trainer", round_: AveragingRound) -> None:
        optimizer = trainer.optimizers[round_.optimizer]
        self._add(round_, ring_bytes(round_.local_steps * _gradient_bytes(optimizer), trainer.world_size))
        if not trainer.loggers or not trainer.is_global_zero:
            return
        suffix = f"_{round_.optimizer}" if len(trainer.optimizers) > 1 else ""
        metrics = {f"{self.prefix}/{name}{suffix}": value for name, value in self._metrics(round_).items()}
        logged_step = getattr(trainer.strategy, "logged_step", None)
        step = trainer.global_step if logged_step is None else logged_step(round_)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _add(self, round_: AveragingRound, ddp_bytes: int) -> None:
        self.rounds.append(round_)
        self._ddp_bytes.append(ddp_bytes)
        before = self._totals.get(round_.optimizer, _Totals(0, 0, 0, 0))
        self._totals[round_.optimizer] = _Totals(
            before.rounds + 1,
            before.sent_bytes + round_.sent_bytes,
            before.ddp_bytes + ddp_bytes,
            before.dropped + round_.dropped,
        )

    def _metrics(self, round_: AveragingRound) -> dict[str, float]:
        totals = self._totals[round_.optimizer]
        metrics: dict[str, float] = {
            "variance": round_.variance,
            "variance_over_lr": round_.ratio,
            "period": round_.period,
            "syncs": totals.rounds,
            "sent_bytes": totals.sent_bytes,
            "sent_bytes_ddp": totals.ddp_bytes,
            "round_seconds": round_.seconds,
        }
        if round_.target is not None:
            metrics["target"] = round_.target
        if totals.dropped:
            metrics["dropped"] = totals.dropped
        return metrics


class _Totals(NamedTuple):
    rounds: int
    sent_bytes: int
    ddp_bytes: int
    dropped: int


_NOT_IN_A_FILE_NAME = r'\:*?"<>|'
_LONGEST_PREFIX = 200  # bytes; most file systems take 255
_FLOATS = ("learning_rate", "variance", "ratio", "target", "seconds")


def _gradient_bytes(optimizer: Optimizer) -> int:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def draw(rounds: Sequence[AveragingRound], path: str | PathLike[str], transport: str = "at once") -> None:
    """Draw the history of a run: period and rounds over steps above; variance, γ·C₂ and learning rate below.

    Args:
        rounds: the records, in order; several optimizers are drawn side by side.
        path: the PNG file to write, a path or a URL (``s3://…``, with what fsspec needs for it installed); its folder
            is made if needed.
        transport: how rounds travelled, for the title (:attr:`ADPSGDStrategy.transport`).

    Raises:
        TypeError: if ``rounds`` is not a sequence of records, ``path`` not a path, or ``transport`` not a string.
        ValueError: if ``rounds`` is empty.
    """
    _check_rounds(rounds)
    if not isinstance(path, str | PathLike):
        raise wrong_type("draw", "path", path, "a str or a Path")
    check_instance("draw", "transport", transport, str, "a str")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    indices = sorted({round_.optimizer for round_ in rounds})
    figure = Figure(figsize=(9.0 * len(indices), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(indices), sharex="col", squeeze=False)
    for column, index in enumerate(indices):
        own = [round_ for round_ in rounds if round_.optimizer == index]
        title = f"optimizer {index}: " if len(indices) > 1 else ""
        _draw_period(axes[0][column], own, title, "" if transport == "at once" else f", {transport}")
        _draw_variance(axes[1][column], own)
    _save(figure, os.fspath(path))


def _save(figure: Any, path: str) -> None:
    folder, name = os.path.split(path)
    files = get_filesystem(path)
    if folder and not files.exists(folder):
        files.makedirs(folder, exist_ok=True)
    with files.open(path, "wb") as file:
        figure.savefig(file, dpi=130, format=os.path.splitext(name)[1][1:] or "png")


def _check_rounds(rounds: object) -> None:
    if not isinstance(rounds, Sequence) or not all(isinstance(round_, AveragingRound) for round_ in rounds):
        raise wrong_type("draw", "rounds", rounds, "a sequence of AveragingRound")
    if not rounds:
        expected = "at least one AveragingRound; a CommunicationMonitor has them once there was a round"
        raise wrong_value("draw", "rounds", rounds, expected)


def _check_prefix(value: str) -> str:
    """Return ``value`` if it can name log entries, and a file inside of a folder, on every file system."""
    check_instance("CommunicationMonitor", "prefix", value, str, "a str")
    complete = all(part.strip(". ") for part in value.split("/"))  # no part is "" or ".."
    writable = value.isprintable() and not set(value) & set(_NOT_IN_A_FILE_NAME)
    if not (complete and writable and len(value.encode()) <= _LONGEST_PREFIX):
        expected = (
            f"a name for log entries and the plot's file, such as 'adpsgd' or 'train/adpsgd': at most {_LONGEST_PREFIX}"
            f" bytes, all of them printable, none of {_NOT_IN_A_FILE_NAME} and a name other than '..' on both sides of"
            " every slash"
        )
        raise wrong_value("CommunicationMonitor", "prefix", value, expected)
    return value


def _draw_period(axis: Any, rounds: Sequence[AveragingRound], title: str, transport: str) -> None:
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
    axis.set_title(f"{title}{len(rounds)} averaging rounds in {steps[-1]} steps{transport}")
    _legend(axis, count)


def _draw_variance(axis: Any, rounds: Sequence[AveragingRound]) -> None:
    own = [round_ for round_ in rounds if round_.trigger == "period" and round_.variance > 0]
    forced = [round_ for round_ in rounds if round_.trigger != "period" and round_.variance > 0]
    aimed = [round_ for round_ in rounds if round_.learning_rate * (round_.target or 0.0) > 0]
    if own or forced or aimed:
        axis.set_yscale("log")
    axis.plot(_steps(own), [r.variance for r in own], ".-", color="C2", lw=0.8, ms=4, label="variance $S_k$")
    if forced:
        axis.plot(
            _steps(forced), [r.variance for r in forced], "x", color="C2", alpha=0.6, ms=5, label="$S_k$, other rounds"
        )
    if aimed:
        axis.plot(
            _steps(aimed),
            [r.learning_rate * (r.target or 0.0) for r in aimed],
            "--",
            color="C3",
            label=r"$\gamma_k C_2$",
        )
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("variance among workers", color="C2")
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(_steps(rounds), [r.learning_rate for r in rounds], color="C4", lw=0.9, label=r"learning rate $\gamma_k$")
    rate.set_ylabel(r"learning rate $\gamma_k$", color="C4")
    rate.set_ylim(bottom=0)
    _legend(axis, rate)


def _steps(rounds: Iterable[AveragingRound]) -> list[int]:
    return [round_.step for round_ in rounds]


def _legend(left: Any, right: Any) -> None:
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc="best", fontsize="small", framealpha=0.85)
