"""The runs: done one after the other by the same ranks, kept as JSON, and not repeated."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import judgement
from benchmarks.frame.ranks import Ranks
from benchmarks.frame.results import machine
from benchmarks.frame.table import bytes_readable
from benchmarks.frame.turns import median
from benchmarks.paper.plan import ADPSGD, Run

Result = dict[str, Any]
"""Of a run, see :func:`combine`."""


class Store:
    """A folder with a file per run that is done; it is made when the first run is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, run: Run) -> Result | None:
        """The result of a run; None if it was not done, or with other settings than it has now."""
        settings = self.settings(run)
        file = self.folder / run.file
        if settings is None or not file.is_file():
            return None
        content = json.loads(file.read_text())
        return content["result"] if content["settings"] == settings else None

    def settings(self, run: Run) -> dict[str, Any] | None:
        """All that a run depends on; None if a run that it depends on is not done."""
        if run.contender.method != "matched":
            return run.settings(None)
        model = self.result(run._replace(contender=ADPSGD))
        return None if model is None else run.settings(model["rounds"])

    def keep(self, run: Run, result: Result, command: str, data: Mapping[str, Any]) -> None:
        """Write a run's file, completely or not at all, with the command that repeats this run only."""
        file = self.folder / run.file
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": command,
            "settings": self.settings(run),
            "data": dict(data),
            "machine": machine(),
            "result": result,
        }
        partial = file.with_suffix(".partial")
        partial.write_text(_compact(content))
        partial.replace(file)


def _compact(content: Mapping[str, Any]) -> str:
    """JSON with a line per entry of the two upper levels: short, with readable diffs."""
    lines = []
    for name, value in content.items():
        if name == "result":
            inner = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in value.items())
            lines.append(f'"result": {{\n  {inner}\n }}')
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def combine(answers: Sequence[Mapping[str, Any]]) -> Result:
    """Combine the answers of all ranks about one run.

    Returns:
        ``steps``, ``parameters``, ``rounds`` (averages over all workers, of parameters or of gradients), ``sent_bytes``
        (per rank), ``final_loss`` and ``accuracy`` (of the averaged model, on all training and on all test images),
        ``curve`` (a list with the entries of each epoch: the training loss, a mean over workers and steps, each on its
        own replica and augmented batches; bytes sent until then; and the averaged model's accuracy, or None), and
        ``averaging`` (a list for each property of the rounds).
    """
    first = answers[0]
    judged = judgement(answers)
    curve = [_point(points, first["test_images"]) for points in zip(*(a["curve"] for a in answers), strict=True)]
    curve[-1] |= {"accuracy": judged["accuracy"], "sent_bytes": first["sent_bytes"]}  # after the last round
    return {
        "steps": first["steps"],
        "parameters": first["parameters"],
        "rounds": first["rounds"],
        "sent_bytes": first["sent_bytes"],
        "final_loss": _rounded(judged["final_loss"]),
        "accuracy": judged["accuracy"],
        "curve": curve,
        "averaging": first["averaging"],
    }


def _point(points: Sequence[Mapping[str, Any]], test_images: int) -> dict[str, Any]:
    first = points[0]
    looked = first["right"] is not None
    return {
        "epoch": first["epoch"],
        "step": first["step"],
        "loss": _rounded(statistics.fmean(point["loss"] for point in points)),
        "sent_bytes": first["sent_bytes"],
        "accuracy": sum(point["right"] for point in points) / test_images if looked else None,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def do(
    missing: Sequence[Run],
    started: Ranks,
    store: Store,
    order: Mapping[str, Any],
    command_of: Callable[[Run], str],
    say: Callable[[str], None],
    limit: float = math.inf,
) -> Iterator[Run]:
    """Do the missing runs, first those that others depend on; keep each, and yield it when it is done.

    With a ``limit`` in seconds, no run begins that is likely to end after it, judging by the longest run so far of the
    same task, or of all tasks.

    Args:
        missing: the runs.
        started: the ranks.
        store: where to keep them.
        order: what all orders to the ranks have in common: data, verify, device, backend.
        command_of: the command that repeats this run only.
        say: prints the result of each, and how long the rest will take.
        limit: seconds.
    """
    seconds: dict[str, list[float]] = {}
    started_at = time.monotonic()
    for place, run in enumerate(missing):
        began = time.monotonic()
        known = seconds.get(run.task.name) or [each for of_task in seconds.values() for each in of_task]
        if began - started_at + max(known, default=0.0) > limit:
            say(f"The time is up: {len(missing) - place} of {len(missing)} runs are left. The same command continues.")
            return
        result = combine(started.run({**order, "settings": store.settings(run)}))
        store.keep(run, result, command_of(run), {"verified": order["verify"]})
        seconds.setdefault(run.task.name, []).append(time.monotonic() - began)
        left = time_left(missing[place + 1 :], seconds)
        say(
            f"{place + 1:>{len(str(len(missing)))}} of {len(missing)}  {run.task.title}, {run.contender.title}, seed"
            f" {run.seed}: {result['rounds']:,} rounds, {bytes_readable(result['sent_bytes'])},"
            f" loss {result['final_loss']:.4f}, accuracy {100 * result['accuracy']:.2f} %"
            f"  ({seconds[run.task.name][-1]:.0f} s; {_minutes(left)})"
        )
        yield run


def time_left(missing: Sequence[Run], seconds: Mapping[str, Sequence[float]]) -> float:
    """Seconds that the missing runs take if each takes as long as those of its task, or of all tasks, have taken."""
    overall = median([each for known in seconds.values() for each in known])
    return sum(median(seconds[run.task.name]) if run.task.name in seconds else overall for run in missing)


def _minutes(seconds: float) -> str:
    return f"about {math.ceil(seconds / 60)} min left" if seconds else "none left"
