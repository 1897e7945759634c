"""What does an averaging round cost beyond its all-reduce? Both take turns, in the same processes, on the same link.

    .venv/bin/python -m benchmarks.round [--parameters 1,5,25,100] [--breakdown] [--json FILE]
    sudo .venv/bin/python -m benchmarks.round --rate-mbit 1000 --parameters 25

Without `--rate-mbit` the ranks communicate over this machine's loopback. With it, each rank has its own host behind a
link of that speed (network namespaces, see `frame/hosts.py`; Linux and root only). The backend is gloo; each rank
computes with one thread. There is no other work: this is the cost of a round where nothing hides it.

How it is measured
------------------
- all-reduce: a bare `torch.distributed.all_reduce` of one flat fp32 tensor with as many elements as the model has
  parameters. It is the lower bound: what has to cross the network, in one piece, without copying or computing.
- round: `LocalSGD.average()` as at the end of a period, after a local step that has moved every parameter by a
  different amount on each rank, from the call to its return: handshake, copies, reductions, variance, record. The model
  has `--tensors` parameters of nearly equal size.

They alternate (A B A B), `--turns` times after two untimed turns. Before each, all ranks wait for each other without
using the network; a turn takes from the last rank's start to the last rank's end. The ratio is that of the medians, and
the range the 95 % confidence interval of the median ratio within a turn; a goal within it is neither reached nor
missed.

- CPU: processor time of all threads of a rank, the backend's included; the mean over the ranks. Where there are no more
  processors than ranks, a round on loopback cannot be shorter: the network itself costs processor time.
- extra memory: the peak of the process during a model's first round, beyond what it used before (model and optimizer),
  after it has returned all freed memory to the system; the largest of the ranks. Linux only. Next to it what is
  kept after the round, and what the bare all-reduce takes for gloo's buffers.

With `--breakdown` the same number of rounds run again under PyTorch's profiler, which records the package's spans
(`adpsgd::pack` and so on). Their times include the profiler's own. "reduce" is the time that the round waited for the
network. A span that did not occur is named below the table.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.frame.command import FAILED, Arguments, new_main, new_parser, number, rate, say, settings, several
from benchmarks.frame.connection import connect
from benchmarks.frame.device import Device, Extra, Timing
from benchmarks.frame.errors import NotMeasuredError
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, linked_ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.spans import SPANS, Taken, recorded_spans
from benchmarks.frame.table import Column, bytes_readable, interval, table
from benchmarks.frame.trainer import NEVER
from benchmarks.frame.turns import median, median_interval, ratios, turns
from lightning_adpsgd import LocalSGD, WorkerGroup

CONTENDERS = ("all-reduce", "round")
WARMUP_TURNS = 2
GOAL_PARAMETERS = 25_000_000
GOALS = {"loopback": 1.25, "1000 Mbit/s": 1.05}  # for the ratio, by link

CASE_COLUMNS = (Column("link", "link"), Column("parameters", "parameters", ","), Column("tensors", "tensors", ","))
COLUMNS = (
    *CASE_COLUMNS,
    Column("all-reduce [ms]", "all_reduce_seconds", ".2f", 1e3),
    Column("its CPU [ms]", "all_reduce_cpu_seconds", ".2f", 1e3),
    Column("round [ms]", "round_seconds", ".2f", 1e3),
    Column("round CPU [ms]", "round_cpu_seconds", ".2f", 1e3),
    Column("ratio", "ratio", ".3f"),
    Column("95 %", interval("ratio_interval", ".3f")),
    Column("goal", "goal", ".2f"),
    Column("extra memory", lambda row: "unknown" if row["extra_bytes"] is None else bytes_readable(row["extra_bytes"])),
    Column("in buckets", "extra_buckets", ".2f"),
    Column("kept", "kept_bytes", bytes_readable),
    Column("all-reduce's", "all_reduce_extra_bytes", bytes_readable),
)
BREAKDOWN_COLUMNS = (
    *CASE_COLUMNS,
    Column("part", "part"),
    Column("calls", "calls", "d"),
    Column("time [ms]", "seconds", ".3f", 1e3),
    Column("share", "share", ".1%"),
)


class Case(NamedTuple):
    """What is averaged."""

    parameters: int
    tensors: int
    bucket_size_mb: float


class Durations(NamedTuple):
    """Seconds of each turn."""

    all_reduce: list[float]
    round: list[float]


# On each rank


class Subject:
    """A model that is averaged in rounds, and a flat tensor of its size that is only reduced."""

    def __init__(self, case: Case, device: Device) -> None:
        ends = [case.parameters * place // case.tensors for place in range(case.tensors + 1)]
        sizes = [end - begin for begin, end in itertools.pairwise(ends)]
        self.parameters = [nn.Parameter(torch.full((size,), 0.1, device=device.torch)) for size in sizes]
        self._flat = torch.empty(case.parameters, device=device.torch)
        self._drift = 1e-3 * (1 + (dist.get_rank() if dist.is_initialized() else 0))
        self._local_sgd = LocalSGD(
            torch.optim.SGD(self.parameters, lr=0.1),
            period=NEVER,
            bucket_size_mb=case.bucket_size_mb,
            workers=WorkerGroup(device=device.torch),
        )
        self.payload_bytes = 0  # of the latest round

    def prepare(self) -> None:
        """Take a local step, and fill the flat tensor."""
        torch._foreach_add_([parameter.data for parameter in self.parameters], self._drift)
        self._local_sgd.step()
        self._flat.fill_(1.0)

    def run(self, contender: str) -> None:
        """Reduce or average."""
        if contender == "all-reduce":
            dist.all_reduce(self._flat)
            return
        round_ = self._local_sgd.average("period")
        assert round_ is not None
        self.payload_bytes = round_.payload_bytes


def take_turns(case: Case, count: int, meet: Callable[[], None], device: Device) -> dict[str, Any]:
    """Time both contenders in turn on the calling rank; returns the timings of each, and the bytes of a round."""
    subject = Subject(case, device)
    timings: dict[str, list[Timing]] = {contender: [] for contender in CONTENDERS}
    for turn, contender in turns(CONTENDERS, WARMUP_TURNS + count):
        subject.prepare()
        device.finish()
        meet()
        timing = device.time(lambda contender=contender: subject.run(contender))
        if turn >= WARMUP_TURNS:
            timings[contender].append(timing)
    return {**timings, "payload_bytes": subject.payload_bytes}


def take_parts(case: Case, count: int, meet: Callable[[], None], device: Device) -> list[dict[str, Any]]:
    """Time the spans of rounds on the calling rank; of each round, the seconds of all and what each span took."""
    subject, rounds = Subject(case, device), []
    for _ in range(WARMUP_TURNS + count):
        subject.prepare()
        device.finish()
        meet()
        with recorded_spans() as parts:
            timing = device.time(lambda: subject.run("round"))
        rounds.append({"total": timing.seconds, "parts": parts})
    return rounds[WARMUP_TURNS:]


def take_memory(case: Case, device: Device) -> dict[str, Extra]:
    """Measure the memory that each contender takes on the calling rank."""
    subject = Subject(case, device)
    dist.all_reduce(torch.zeros(1, device=device.torch))  # a backend's first collective allocates what all of them use
    extra = {}
    for contender in CONTENDERS:
        subject.prepare()
        extra[contender] = device.extra_memory(lambda contender=contender: subject.run(contender))
    return extra


def carry_out(order: Mapping[str, Any], parent: Parent) -> Any:
    """Carry out an order on the calling rank."""
    device, case = Device(order["device"]), Case(*order["case"])
    connect(order["backend"])
    if order["measure"] == "memory":
        return take_memory(case, device)
    take = {"turns": take_turns, "parts": take_parts}[order["measure"]]
    return take(case, order["turns"], parent.meet, device)


# Arithmetic


def combine(answers: Sequence[Mapping[str, Any]]) -> tuple[Durations, Durations]:
    """Combine the answers of all ranks by :func:`take_turns`.

    Returns:
        Of each turn, the time from the last rank's start to the last rank's end; and the processor time, the mean over
        the ranks.
    """
    by_turn = [
        [[Timing(*timing) for timing in turn] for turn in zip(*(answer[contender] for answer in answers), strict=True)]
        for contender in CONTENDERS
    ]
    wall = [[max(t.ended for t in turn) - max(t.began for t in turn) for turn in each] for each in by_turn]
    cpu = [[statistics.fmean(t.cpu_seconds for t in turn) for turn in each] for each in by_turn]
    return Durations(*wall), Durations(*cpu)


def as_row(
    link: str,
    case: Case,
    durations: Durations,
    cpu: Durations,
    payload_bytes: int,
    extra: Sequence[Mapping[str, Sequence[int | None]]],
) -> dict[str, Any]:
    """All numbers of one case; ``extra`` has the answers of :func:`take_memory` from all ranks."""
    all_reduce, round_ = map(median, durations)
    rounds = [Extra(*each["round"]) for each in extra]
    extra_bytes = _largest([each.bytes for each in rounds])
    return {
        "link": link,
        **case._asdict(),
        "payload_bytes": payload_bytes,
        "all_reduce_seconds": all_reduce,
        "round_seconds": round_,
        "all_reduce_cpu_seconds": median(cpu.all_reduce),
        "round_cpu_seconds": median(cpu.round),
        "ratio": round_ / all_reduce,
        "ratio_interval": median_interval(ratios(durations.round, durations.all_reduce)),
        "goal": GOALS.get(link) if case.parameters == GOAL_PARAMETERS else None,
        "extra_bytes": extra_bytes,
        "extra_buckets": None if extra_bytes is None else extra_bytes / (case.bucket_size_mb * 2**20),
        "kept_bytes": _largest([each.kept_bytes for each in rounds]),
        "extra_host_bytes": _largest([each.host_bytes for each in rounds]),
        "all_reduce_extra_bytes": _largest([Extra(*each["all-reduce"]).bytes for each in extra]),
        "turns": {"all_reduce_seconds": durations.all_reduce, "round_seconds": durations.round},
    }


def _largest(values: Sequence[int | None]) -> int | None:
    return None if None in values else max(values)


def breakdown(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The spans of rounds, in order, and the rest: medians over the answer of :func:`take_parts` of one rank."""
    total = median([round_["total"] for round_ in rounds])
    rest = median([round_["total"] - sum(seconds for seconds, _ in round_["parts"].values()) for round_ in rounds])
    rows = []
    for name in dict.fromkeys([*SPANS, *(name for round_ in rounds for name in round_["parts"])]):
        taken = [Taken(*round_["parts"].get(name, ())) for round_ in rounds]
        rows.append((name, round(median([each.calls for each in taken])), median([each.seconds for each in taken])))
    return [
        {"part": name, "calls": calls, "seconds": seconds, "share": seconds / total}
        for name, calls, seconds in [*rows, ("the rest", None, rest), ("all", None, total)]
    ]


# The measurement


def measure(
    started: Ranks,
    link: str,
    cases: Sequence[Case],
    count: int,
    *,
    parts: bool = False,
    common: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure all cases on ranks that carry out orders with :func:`carry_out`.

    Args:
        started: the ranks.
        link: the name of the link between them.
        cases: what to average.
        count: timed turns.
        parts: whether to time the spans as well.
        common: entries of every order, by default a CPU and gloo.
    """
    common = {"device": "cpu", "backend": "gloo", **(common or {})}

    def take(what: str, case: Case) -> list[Any]:
        say(f"{link}: {case.parameters:,} parameters in {case.tensors:,}, {what}")
        return started.run({**common, "measure": what, "case": case, "turns": count})

    timings = [take("turns", case) for case in cases]
    by_part = [take("parts", case) for case in cases] if parts else []
    extra = [take("memory", case) for case in cases]  # last, because it slows down the process
    rows = [
        as_row(link, case, *combine(answers), answers[0]["payload_bytes"], memory)
        for case, answers, memory in zip(cases, timings, extra, strict=True)
    ]
    for row, answers in zip(rows, by_part, strict=False):
        row["breakdown"] = breakdown(answers[0])
        row["unknown_parts"] = [part["part"] for part in row["breakdown"] if part["calls"] == 0]
    return rows


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables."""
    text = table(rows, COLUMNS)
    parts = [{**row, **part} for row in rows for part in row.get("breakdown", ())]
    if parts:
        text += f"\n\nSpans of a round, on the first rank\n\n{table(parts, BREAKDOWN_COLUMNS)}"
    missing = sorted({name for row in rows for name in row.get("unknown_parts", ())})
    return f"{text}\n\nSpans that did not occur: {', '.join(missing)}" if missing else text


# The command


def _measure_and_print(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for speed in options.rate_mbit:
        link = "loopback" if speed is None else f"{speed:g} Mbit/s"
        try:
            with linked_ranks(options.ranks, speed, "benchmarks.round") as started:
                rows += measure(started, link, cases(options), options.turns, parts=options.breakdown)
        except NotMeasuredError as error:
            if rows:
                print(page(rows))
            say(f"Nothing was measured on {link}. {error}")
            return FAILED
    print(f"{options.ranks} ranks, buckets of {options.bucket_size_mb:g} MiB; {options.turns} turns\n")
    print(page(rows))
    if options.json is not None:
        write_json(options.json, "round", settings(options), rows)
    return 0


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    return [
        Case(round(millions * 1e6), tensors, options.bucket_size_mb)
        for millions in options.parameters
        for tensors in options.tensors
    ]


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about what is averaged."""
    add = parser.add_argument
    parameters, tensors = several(number(1e-6, 10**4, float)), several(number(1, 10**6))
    defaults = [1.0, 5.0, 25.0, 100.0]
    add("--parameters", type=parameters, default=defaults, metavar="M,M", help="of the model, in millions (1,5,25,100)")
    add("--tensors", type=tensors, default=[8, 5000], metavar="N,N", help="that hold the parameters (8,5000)")
    add("--bucket-size-mb", type=number(1e-6, 2**20, float), default=64.0, metavar="B", help="in MiB (64)")


def check_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error if a model has more tensors than parameters."""
    fewest, most = min(options.parameters), max(options.tensors)
    if most > round(fewest * 1e6):
        parser.error(f"--tensors {most}: expected at most as many as there are --parameters, got {fewest:g} millions.")


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.round", "Compare an averaging round with a bare all-reduce of the same bytes.")
    add = parser.add_argument
    add("--ranks", type=number(2, 250), default=2, metavar="N", help="processes (2)")
    add("--rate-mbit", type=several(rate), default=[None], metavar="R,R", help="of each link; none is loopback (none)")
    add_case_arguments(parser)
    add("--turns", type=number(1), default=15, metavar="N", help="of each contender, timed (15)")
    add("--breakdown", action="store_true", help="show how long each stage of a round takes")
    options = parser.parse_args(arguments)
    check_cases(parser, options)
    return options


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
