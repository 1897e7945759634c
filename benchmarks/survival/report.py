"""What the runs of a contender say: a row for each kind of fault, and numbers beside the goals. No processes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.frame.table import Column, table
from benchmarks.frame.turns import median
from benchmarks.survival.faults import KINDS, OWN_END
from benchmarks.survival.log import Log, Recovery

LONGEST_SECONDS = 5.0
LEAST_GOODPUT = 0.95
LEAST_GOODPUT_WITH_START = 0.85

FAULT_COLUMNS = (
    Column("contender", "contender"),
    Column("fault", "fault"),
    Column("faults", "count", "d"),
    Column("survived", "survived", "d"),
    Column("next round [s]", "next_round_seconds.median", ".2f"),
    Column("at most [s]", "next_round_seconds.most", ".2f"),
    Column("came back", "came_back", "d"),
    Column("back after [s]", "back_seconds.median", ".2f"),
    Column("at most [s]", "back_seconds.most", ".2f"),
)


class Pair(NamedTuple):
    """The two runs with one seed."""

    undisturbed: Log
    disturbed: Log


class Measure(NamedTuple):
    """A number and its goal."""

    name: str
    shown: str
    goal: str
    met: bool | None  # None: it could not be measured
    is_promised: bool = False  # whether missing it is an error, on any machine


# Arithmetic


def fault_rows(contender: str, logs: Sequence[Log]) -> list[dict[str, Any]]:
    """A row for each kind of fault that there was."""
    found = [
        (fault.kind, recovery) for log in logs for fault, recovery in zip(log.faults, log.recoveries(), strict=True)
    ]
    return [
        _fault_row(contender, kind, [recovery for each, recovery in found if each == kind])
        for kind in (*KINDS, OWN_END)
        if any(each == kind for each, _ in found)
    ]


def _fault_row(contender: str, kind: str, recoveries: Sequence[Recovery]) -> dict[str, Any]:
    next_round = [each.next_round_seconds for each in recoveries if each.next_round_seconds is not None]
    back = [each.back_seconds for each in recoveries if each.back_seconds is not None]
    return {
        "contender": contender,
        "fault": kind,
        "count": len(recoveries),
        "survived": len(next_round),
        "came_back": len(back),
        "next_round_seconds": _spread(next_round),
        "back_seconds": _spread(back),
    }


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    return {"median": median(values), "most": max(values), "all": list(values)} if values else None


def goodput(pairs: Sequence[Pair], with_start: bool, workers: int) -> float:
    """Averaged steps per second, as a ratio to the undisturbed runs.

    Args:
        pairs: the runs.
        with_start: count all seconds of all workers; otherwise only those in which a worker could have trained.
        workers: how many there are.
    """

    def rate(logs: Iterable[Log]) -> float:
        logs = list(logs)
        seconds = sum(workers * (log.ended - log.began) if with_start else log.worker_seconds for log in logs)
        return sum(log.steps for log in logs) / seconds if seconds > 0 else math.nan

    slow, fast = rate(pair.disturbed for pair in pairs), rate(pair.undisturbed for pair in pairs)
    return slow / fast if fast > 0 else math.nan


def measures(pairs: Sequence[Pair], workers: int, period_seconds: float) -> list[Measure]:
    """All numbers that have a goal.

    Args:
        pairs: the runs, one pair for each seed.
        workers: how many there are.
        period_seconds: what a period takes without faults.
    """
    disturbed, both = [pair.disturbed for pair in pairs], [log for pair in pairs for log in pair]
    rows = {row["fault"]: row for row in fault_rows("", disturbed)}
    own_ends = sum(fault.kind == OWN_END for log in both for fault in log.faults)
    starts = [each.start_seconds for log in disturbed for each in log.presences if each.start_seconds is not None]
    most = max(LONGEST_SECONDS, period_seconds)
    held = [port for log in both for port in log.ports_left]
    left = sum(log.processes_left for log in both)
    found = [_survived(kind, rows[kind]) for kind in KINDS if kind in rows]
    for name, with_start, least in (
        ("goodput without start", False, LEAST_GOODPUT),
        ("goodput with start", True, LEAST_GOODPUT_WITH_START),
    ):
        ratio = goodput(pairs, with_start, workers)
        found.append(Measure(name, f"{ratio:.3f}", f"at least {least}", ratio >= least))
    killed = rows.get("kill", {}).get("next_round_seconds")
    if "kill" in rows:
        found.append(_at_most("median s from a kill to the next round", killed and killed["all"], most))
        found.append(_at_most("median s from start to first round", starts, LONGEST_SECONDS))
    found.append(_final_loss(pairs))
    found.append(_none("processes that ended by themselves", own_ends))
    found.append(_none("processes left", left))
    found.append(_none("ports held", len(held)))
    return found


def _survived(kind: str, row: Mapping[str, Any]) -> Measure:
    is_met = row["survived"] == row["count"]
    return Measure(f"survived: {kind}", f"{row['survived']} of {row['count']}", "all", is_met, is_promised=True)


def _at_most(name: str, values: Sequence[float] | None, most: float) -> Measure:
    if not values:
        return Measure(name, "none", f"at most {most:g}", None)
    return Measure(name, f"{median(values):.2f}", f"at most {most:g}", median(values) <= most)


def _none(name: str, count: int) -> Measure:
    return Measure(name, str(count), "0", count == 0, is_promised=True)


def _final_loss(pairs: Sequence[Pair]) -> Measure:
    """The mean over the seeds, beside the spread of the undisturbed runs; lower is no fault."""
    name = "final loss"
    if not all(log.losses for pair in pairs for log in pair):
        return Measure(name, "none", "that of the undisturbed", None)
    calm, wild = ([fmean(log.losses) for log in logs] for logs in zip(*pairs, strict=True))
    shown = f"{fmean(wild):.4f}"
    if len(pairs) == 1:
        return Measure(name, shown, f"one seed; undisturbed {calm[0]:.4f}", None)
    return Measure(name, shown, f"undisturbed {min(calm):.4f} to {max(calm):.4f}", fmean(wild) <= max(calm))


# Output


def measure_table(found: Mapping[str, Sequence[Measure]]) -> str:
    """The measures of all contenders, those of one below the other's."""
    rows = [{"contender": name, **measure._asdict()} for name, all_ in found.items() for measure in all_]
    met = {None: "", True: "yes", False: "no"}
    columns = (
        Column("contender", "contender"),
        Column("measure", "name"),
        Column("found", "shown"),
        Column("goal", "goal"),
        Column("met", lambda row: met[row["met"]]),
    )
    return table(rows, columns)


def reasons(logs: Iterable[Log]) -> list[str]:
    """Why processes have ended by themselves: each error once, with how often it was seen."""
    given = [fault.reason for log in logs for fault in log.faults if fault.kind == OWN_END]
    return [f"{given.count(reason)} x {reason}" for reason in dict.fromkeys(given)]


def as_json(contender: str, pairs: Mapping[int, Pair], found: Sequence[Measure]) -> dict[str, Any]:
    """All that was measured with a contender, the runs by seed."""
    disturbed = [pair.disturbed for pair in pairs.values()]
    return {
        "contender": contender,
        "measures": [measure._asdict() for measure in found],
        "faults": fault_rows(contender, disturbed),
        "own_ends": reasons(log for pair in pairs.values() for log in pair),
        "runs": [
            {"seed": seed, "run": kind, **_run(log)}
            for seed, pair in pairs.items()
            for kind, log in pair._asdict().items()
        ],
    }


def _run(log: Log) -> dict[str, Any]:
    """The numbers of one run; times are seconds since it began."""
    faults = [
        {**asdict(fault), "began": fault.began - log.began, "ended": fault.ended - log.began, **recovery._asdict()}
        for fault, recovery in zip(log.faults, log.recoveries(), strict=True)
    ]
    return {
        "seconds": log.ended - log.began,
        "rounds": len(log.rounds),
        "steps": log.steps,
        "worker_seconds": log.worker_seconds,
        "start_seconds": [each.start_seconds for each in log.presences if each.start_seconds is not None],
        "loss": fmean(log.losses) if log.losses else None,
        "processes_left": log.processes_left,
        "ports_left": log.ports_left,
        "faults": faults,
    }
