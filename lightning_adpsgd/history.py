"""The history of a run's averaging rounds: totals, numbers to log, a summary; the same behind every door."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_adpsgd.plot import check_matplotlib, draw, figure_of
from lightning_adpsgd.rounds.record import TRIGGERS, AveragingRound, ring_bytes
from lightning_adpsgd.validation import check_instance, wrong_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOT_IN_A_FILE_NAME = r'\:*?"<>|'
_LONGEST_PREFIX = 200  # bytes; most file systems take 255


class RoundHistory:
    """Keeps the record of every round, on every rank. The base of a ``CommunicationMonitor``.

    Args:
        prefix: what the names of log entries begin with, and what the plot's file is called.
        plot: whether to draw the run at its end. Needs matplotlib.

    Raises:
        TypeError: if ``prefix`` is not a string, or ``plot`` not a bool.
        ValueError: if ``prefix`` is empty, or would not name a file inside of the log directory.
        ModuleNotFoundError: if ``plot`` is set and matplotlib is not installed.
    """

    def __init__(self, prefix: str = "adpsgd", plot: bool = False) -> None:
        # Configuration
        self.prefix = _check_prefix(prefix)
        self._plots_at_the_end = check_instance("CommunicationMonitor", "plot", plot, bool, "True or False")
        if plot:
            check_matplotlib("CommunicationMonitor(plot=True)", ", or pass plot=False")

        # State
        self.rounds: list[AveragingRound] = []
        """The record of every round so far, on every rank."""
        self._ddp_bytes: list[int] = []  # what DDP would have sent, for each round
        self._totals: dict[int, Counter[str]] = {}  # by optimizer
        self._periods: dict[int, int] = {}  # the latest, by optimizer
        self._transport = "at once"

    def state_dict(self) -> dict[str, Any]:
        """The history, one tensor per field, readable with ``torch.load(weights_only=True)``."""
        columns: dict[str, Any] = {"ddp_bytes": torch.tensor(self._ddp_bytes, dtype=torch.int64)}
        for name in AveragingRound._fields:
            values = [getattr(round_, name) for round_ in self.rounds]
            if name == "trigger":
                values = [TRIGGERS.index(value) for value in values]
            elif name == "target":
                values = [float("nan") if value is None else value for value in values]
            columns[name] = torch.tensor(values, dtype=torch.float64 if name in _FLOATS else torch.int64)
        return columns

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a history that was saved."""
        columns = {name: state_dict[name].tolist() for name in AveragingRound._fields}
        columns["trigger"] = [TRIGGERS[index] for index in columns["trigger"]]
        columns["target"] = [None if value != value else value for value in columns["target"]]
        self.rounds, self._ddp_bytes, self._totals, self._periods = [], [], {}, {}
        for *values, ddp_bytes in zip(*columns.values(), state_dict["ddp_bytes"].tolist(), strict=True):
            self._add(AveragingRound(*values), ddp_bytes)

    def carried(self) -> tuple[dict[str, Any], str]:
        """The history and how rounds were sent, for the same monitor in another process."""
        return self.state_dict(), self._transport

    def adopt(self, carried: tuple[dict[str, Any], str]) -> None:
        """Take over what :meth:`carried` tells."""
        state, self._transport = carried
        RoundHistory.load_state_dict(self, state)

    def summary(self) -> dict[str, Any]:
        """The run in numbers.

        Returns:
            ``rounds``; ``steps`` (optimizer steps they cover); ``rounds_per_step``; ``first_period`` and
            ``last_period`` (of the first optimizer); ``sent_bytes`` and ``sent_bytes_ddp`` (per rank);
            ``factor_saved``, their ratio, or None if nothing was sent; ``seconds`` for which rounds held up training;
            ``transport``, how rounds were sent, in words; ``dropped``, workers left out of rounds because they had
            diverged; ``triggers``, the number of rounds by trigger.
        """
        steps = sum(round_.local_steps for round_ in self.rounds)
        sent = sum(round_.sent_bytes for round_ in self.rounds)
        ddp = sum(self._ddp_bytes)
        periods = [round_.period for round_ in self.rounds if round_.optimizer == 0]
        triggers = Counter(round_.trigger for round_ in self.rounds)
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
            "triggers": {name: triggers[name] for name in TRIGGERS if name in triggers},
        }

    def plot(self) -> "Figure":
        """Draw the run so far: period and rounds over steps above; variance, its target and the learning rate below.

        Returns:
            A matplotlib figure, which a notebook shows where it is a cell's last line, and ``savefig`` writes. It is
            not one of pyplot's: no window opens.

        Raises:
            ValueError: if there has been no round yet.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        if not self.rounds:
            raise ValueError(
                "CommunicationMonitor.plot() has nothing to draw: there has been no averaging round yet. Call it after"
                " the first one, on a monitor among the callbacks of what trains."
            )
        check_matplotlib("CommunicationMonitor.plot()")
        return figure_of(self.rounds, self._transport)

    def in_brief(self) -> str:
        """The latest period and the bytes saved, for a progress bar; "" before the first round."""
        if not self.rounds:
            return ""
        periods = ", ".join(str(period) for _, period in sorted(self._periods.items()))
        saved = sum(totals["sent_bytes_ddp"] - totals["sent_bytes"] for totals in self._totals.values())
        told = f"{_readable(saved)} saved" if saved >= 0 else f"{_readable(-saved)} more than DDP"
        return f"period {periods}, {told}"

    def report(self) -> str:
        """The summary in words."""
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
            "rounds travel": summary["transport"] if summary["transport"] != "at once" else None,
            "dropped": f"{summary['dropped']} time(s) a worker that had diverged" if summary["dropped"] else None,
        }
        return "\n".join(["Averaging rounds", *(f"  {name:<15} {text}" for name, text in lines.items() if text)])

    def _listen(self, strategy: Any, listener: Callable[[AveragingRound], None], door: str) -> bool:
        """Have a strategy tell of its rounds, or warn that it has none; returns whether it has."""
        subscribe = getattr(strategy, "subscribe", None)
        if subscribe is None:
            rank_zero_warn(
                f"CommunicationMonitor has nothing to record: {type(strategy).__name__} has no averaging rounds. Use it"
                f' with {door}(strategy="adpsgd").'
            )
            return False
        self._transport = getattr(strategy, "transport", self._transport)
        subscribe(listener)
        return True

    def _print_summary(self, plot_path: str | None) -> None:
        """Print the summary, and draw the plot if there is a path for it."""
        print(f"\n{self.report()}")
        if plot_path is not None:
            try:
                draw(self.rounds, plot_path, transport=self._transport)
            except (ImportError, OSError, ValueError) as error:  # the weights are worth more than their picture
                rank_zero_warn(
                    f"The plot could not be written to {plot_path} ({type(error).__name__}: {error}). The run is not"
                    " affected: CommunicationMonitor.plot() returns the figure, and adpsgd plot draws it from a"
                    " checkpoint."
                )
            else:
                print(f"  plot            {plot_path}")

    def _note(self, round_: AveragingRound, optimizers: Sequence[Optimizer], ranks: int) -> dict[str, float]:
        """Keep a record, and return what to log of it, by name."""
        groups = optimizers[round_.optimizer].param_groups
        gradient_bytes = sum(p.nbytes for group in groups for p in group["params"] if p.requires_grad)
        self._add(round_, ring_bytes(round_.local_steps * gradient_bytes, ranks))
        suffix = f"_{round_.optimizer}" if len(optimizers) > 1 else ""
        return {f"{self.prefix}/{name}{suffix}": value for name, value in self._metrics(round_).items()}

    def _add(self, round_: AveragingRound, ddp_bytes: int) -> None:
        self.rounds.append(round_)
        self._ddp_bytes.append(ddp_bytes)
        totals = self._totals.setdefault(round_.optimizer, Counter())
        self._periods[round_.optimizer] = round_.period
        totals.update(syncs=1, sent_bytes=round_.sent_bytes, sent_bytes_ddp=ddp_bytes, dropped=round_.dropped)

    def _metrics(self, round_: AveragingRound) -> dict[str, float]:
        totals = self._totals[round_.optimizer]
        metrics = {
            "variance": round_.variance,
            "variance_over_lr": round_.ratio,
            "period": round_.period,
            **{name: totals[name] for name in ("syncs", "sent_bytes", "sent_bytes_ddp")},
            "round_seconds": round_.seconds,
            "target": round_.target,
            "dropped": totals["dropped"] or None,
        }
        return {name: value for name, value in metrics.items() if value is not None}


_FLOATS = ("learning_rate", "variance", "ratio", "target", "seconds")


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _check_prefix(value: str) -> str:
    """Return ``value`` if it can name log entries, and a file inside of a folder, on every file system."""
    check_instance("CommunicationMonitor", "prefix", value, str, "a str")
    complete = all(part.strip(". ") for part in value.split("/"))  # no part is "" or ".."
    writable = value.isprintable() and not set(value) & set(_NOT_IN_A_FILE_NAME)
    if not (complete and writable and len(value.encode()) <= _LONGEST_PREFIX):
        expected = (
            f"a name for log entries and the plot's file, such as 'adpsgd' or 'train/adpsgd': at most {_LONGEST_PREFIX}"
            f" bytes, printable, without any of {_NOT_IN_A_FILE_NAME}, and with a name other than '..' on both sides of"
            " every slash"
        )
        raise wrong_value("CommunicationMonitor", "prefix", value, expected)
    return value
