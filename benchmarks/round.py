"""What does an averaging round cost beyond its all-reduce? Each in turn, in the same processes, on the same link.

    .venv/bin/python -m benchmarks.round [--parameters 1,5,25,100] [--breakdown] [--json FILE]
    sudo .venv/bin/python -m benchmarks.round --rate-mbit 1000 --parameters 25

Without `--rate-mbit` the ranks talk over this machine's loopback. With it, each has a host of its own behind a link of
that speed (network namespaces, see `hosts.py`; Linux and root only). The backend is gloo; each rank computes with one
thread. There is no other work: this is what a round costs where nothing hides it.

How it is measured
------------------
- all-reduce: a bare `torch.distributed.all_reduce` of one flat fp32 tensor with as many elements as the model has
  parameters. It is the floor: the least that has to cross the network, in one piece, with nothing copied or computed.
- round: `LocalSGD.average()` as a period's end calls it, after a local step that has moved every parameter by a
  different amount on each rank, from the call to the return: the workers' meeting, copies, reductions, the variance,
  the record. The model has `--tensors` parameters of nearly equal size: 8 are few, 5,000 are many.

They alternate (A B A B), `--turns` times after two that are not timed. Before each, all ranks wait for each other
without using the network; a turn takes from the last one's start to the last one's end. The ratio is that of the
medians. The range beside it is that of the quotients of turns: between its ends lies their median with 95 %
confidence, so a goal that lies within is neither reached nor missed.

- CPU: the time that all threads of a rank spent on a processor, the backend's own among them; the mean over the ranks.
  With no more processors than ranks, nothing can be shorter than that: it is the floor for a round on loopback, where
  the network costs a processor's time and cannot hide anything.
- extra memory: what the process takes at most during a model's first round, beyond what it took before (model and
  optimizer), after it was made to hand all freed memory back to the system; the largest of the ranks. Linux only.
  Beside it what of that is kept after the round, and what the bare all-reduce takes, which has buffers in gloo.

With `--breakdown` there are as many rounds again in which parts of the package are timed, each from outside and without
the parts that it calls. What crosses the network is waited for under "wait for mean", in so far as nothing else was
done meanwhile. A part that this version of the package does not have is named.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import report
from benchmarks.hosts import HostsUnavailableError, hosts
from benchmarks.machine import Device, Extra, Timing, connect, free_port, this_machine
from benchmarks.ranks import Parent, RankFailedError, Ranks, ranks, serve
from lightning_adpsgd import LocalSGD, Workers

CONTENDERS = ("all-reduce", "round")
WARMUP_TURNS = 2
NEVER = 10**9
"""A period that does not end."""

GOAL_PARAMETERS = 25_000_000
GOALS = {"loopback": 1.25, "1000 Mbit/s": 1.05}
"""For the ratio, by link."""
GOAL_BUCKETS = 2.0

COLUMNS = (
    "link",
    "parameters",
    "tensors",
    "all-reduce [ms]",
    "its CPU [ms]",
    "round [ms]",
    "round CPU [ms]",
    "ratio",
    "95 %",
    "goal",
    "extra memory",
    "in buckets",
    "kept",
    "all-reduce's",
)
BREAKDOWN_COLUMNS = ("link", "parameters", "tensors", "part", "calls", "time [ms]", "share")


class Part(NamedTuple):
    """A part of a round: a function, a method or a property of the package."""

    module: str
    name: str
    whole: bool = False
    """Whether the parts that it calls are counted as its own; if not, they are counted by themselves only."""


PARTS = {
    "payload": Part("lightning_adpsgd.averaging.tensors", "TensorTracker.current"),
    "fingerprint": Part("lightning_adpsgd.averaging.layout", "FlatLayout.fingerprint"),
    "finite?": Part("lightning_adpsgd.averaging.layout", "FlatLayout.are_finite"),
    "meeting: send": Part("lightning_adpsgd.workers.group", "WorkerGroup.launch_table", whole=True),
    "cut": Part("lightning_adpsgd.averaging.layout", "FlatLayout.cut"),
    "new buffer": Part("lightning_adpsgd.averaging.layout", "FlatLayout.new_buffer"),
    "pack and divide": Part("lightning_adpsgd.averaging.layout", "FlatLayout.pack"),
    "send": Part("lightning_adpsgd.workers.group", "WorkerGroup.sum_"),
    "wait for mean": Part("lightning_adpsgd.workers.reduction", "Reduction.wait"),
    "difference": Part("lightning_adpsgd.averaging.layout", "Chunk.difference"),
    "unpack": Part("lightning_adpsgd.averaging.layout", "Chunk.unpack"),
    "square and add up": Part("lightning_adpsgd.averaging.averager", "ParameterAverager.finish"),
    "rest of averaging": Part("lightning_adpsgd.averaging.averager", "ParameterAverager.average"),
    "small mean: send": Part("lightning_adpsgd.workers.group", "WorkerGroup.launch_mean", whole=True),
    "optimizer state": Part("lightning_adpsgd.local_sgd", "LocalSGD._treat_optimizer_state", whole=True),
    "rule and record": Part("lightning_adpsgd.local_sgd", "LocalSGD._finish", whole=True),
}


class Case(NamedTuple):
    """What is averaged."""

    parameters: int
    tensors: int
    bucket_size_mb: float


class Durations(NamedTuple):
    """Of each turn, over all ranks."""

    all_reduce: list[float]
    round: list[float]


# On each rank


class Subject:
    """A model that is averaged in rounds, and a flat tensor of its size that is only reduced.

    Args:
        case: the model.
        device: where it is.
    """

    def __init__(self, case: Case, device: Device) -> None:
        sizes = [
            case.parameters * (i + 1) // case.tensors - case.parameters * i // case.tensors for i in range(case.tensors)
        ]
        self._parameters = [nn.Parameter(torch.full((size,), 0.1, device=device.torch)) for size in sizes]
        self._flat = torch.empty(case.parameters, device=device.torch)
        self._drift = 1e-3 * (1 + (dist.get_rank() if dist.is_initialized() else 0))
        self._local_sgd = LocalSGD(
            torch.optim.SGD(self._parameters, lr=0.1),
            period=NEVER,
            bucket_size_mb=case.bucket_size_mb,
            workers=Workers(device=device.torch),
        )
        self.payload_bytes = 0
        """What the latest round has put into collectives."""

    def prepare(self) -> None:
        """Take a local step, and make the flat tensor anew."""
        torch._foreach_add_([parameter.data for parameter in self._parameters], self._drift)
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


def take_turns(case: Case, turns: int, meet: Callable[[], None], device: Device) -> dict[str, Any]:
    """Time both contenders in turn on the calling rank.

    Returns:
        For each contender the timings of all turns; and the bytes of a round.
    """
    subject = Subject(case, device)
    timings: dict[str, list[Timing]] = {contender: [] for contender in CONTENDERS}
    for turn, contender in report.turns(CONTENDERS, WARMUP_TURNS + turns):
        subject.prepare()
        device.finish()
        meet()
        timing = device.time(lambda contender=contender: subject.run(contender))
        if turn >= WARMUP_TURNS:
            timings[contender].append(timing)
    return {**timings, "payload_bytes": subject.payload_bytes}


def take_parts(case: Case, turns: int, meet: Callable[[], None], device: Device) -> dict[str, Any]:
    """Time the parts of rounds on the calling rank.

    Returns:
        Of each round, the seconds and calls of each part and the seconds of all; and the parts that there are not.
    """
    subject = Subject(case, device)
    rounds = []
    with Parts(PARTS, device) as parts:
        for turn in range(WARMUP_TURNS + turns):
            subject.prepare()
            device.finish()
            meet()
            parts.clear()
            timing = device.time(lambda: subject.run("round"))
            if turn >= WARMUP_TURNS:
                rounds.append({"total": timing.ended - timing.began, "parts": dict(parts.taken)})
    return {"rounds": rounds, "unknown": parts.unknown}


def take_memory(case: Case, device: Device) -> dict[str, Any]:
    """Find out what memory either contender takes on the calling rank."""
    subject = Subject(case, device)
    dist.all_reduce(torch.zeros(1, device=device.torch))  # a backend's first collective makes what all of them use
    extra = {}
    for contender in CONTENDERS:
        subject.prepare()
        extra[contender] = device.extra_memory(lambda contender=contender: subject.run(contender))
    return extra


def carry_out(order: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
    """Carry out an order on the calling rank."""
    device = Device(order["device"])
    connect(order["master_port"], order["backend"])
    case = Case(*order["case"])
    if order["measure"] == "memory":
        return take_memory(case, device)
    take = {"turns": take_turns, "parts": take_parts}[order["measure"]]
    return take(case, order["turns"], parent.meet, device)


# Where the time of a round goes


class Taken(NamedTuple):
    """What one part has taken."""

    seconds: float = 0.0
    calls: int = 0


class Parts:
    """Times calls of functions from outside, while it is entered.

    Args:
        parts: what to time.
        device: waited for before and after each call, which takes time by itself on an accelerator.
    """

    def __init__(self, parts: Mapping[str, Part], device: Device) -> None:
        self.taken: dict[str, Taken] = {}
        """By each part so far."""
        self.unknown: list[str] = []
        """Parts whose function there is not."""
        self._parts = parts
        self._device = device
        self._under_way: list[_Call] = []
        self._patches = ExitStack()

    def __enter__(self) -> "Parts":
        for name, part in self._parts.items():
            owner, attribute = _find(part)
            if owner is None:
                self.unknown.append(name)
                continue
            original = vars(owner)[attribute]
            setattr(owner, attribute, self._timed(name, original))
            self._patches.callback(setattr, owner, attribute, original)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def clear(self) -> None:
        """Begin anew."""
        self.taken.clear()

    def _timed(self, name: str, original: Any) -> Any:
        if isinstance(original, property):
            return property(self._timed(name, original.fget))

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._under_way and self._under_way[-1].whole:
                return original(*args, **kwargs)
            self._device.finish()
            self._under_way.append(_Call(self._parts[name].whole, time.perf_counter()))
            try:
                return original(*args, **kwargs)
            finally:
                self._device.finish()
                self._note(name, self._under_way.pop())

        return timed

    def _note(self, name: str, call: "_Call") -> None:
        seconds = time.perf_counter() - call.began
        if self._under_way:
            self._under_way[-1].inside += seconds
        before = self.taken.get(name, Taken())
        self.taken[name] = Taken(before.seconds + seconds - call.inside, before.calls + 1)


@dataclass
class _Call:
    whole: bool
    began: float
    inside: float = 0.0
    """Seconds of the parts that it has called."""


def _find(part: Part) -> tuple[Any, str]:
    """The module or class that holds a part, and its name there; None if there is no such thing."""
    *path, attribute = part.name.split(".")
    try:
        owner: Any = importlib.import_module(part.module)
        for name in path:
            owner = getattr(owner, name)
    except (ImportError, AttributeError):
        return None, attribute
    return (owner if attribute in vars(owner) else None), attribute


# Arithmetic


def combine(answers: Sequence[Mapping[str, Any]]) -> Durations:
    """Of each turn, the time from the last rank's start to the last rank's end.

    Args:
        answers: of :func:`take_turns`, from all ranks.
    """

    def durations(contender: str) -> list[float]:
        turns = zip(*(answer[contender] for answer in answers), strict=True)
        return [max(end for _, end, *_ in turn) - max(begin for begin, *_ in turn) for turn in turns]

    return Durations(*map(durations, CONTENDERS))


def on_processors(answers: Sequence[Mapping[str, Any]]) -> Durations:
    """Of each turn, the seconds on a processor, the mean over the ranks.

    Args:
        answers: of :func:`take_turns`, from all ranks.
    """

    def seconds(contender: str) -> list[float]:
        turns = zip(*(answer[contender] for answer in answers), strict=True)
        return [sum(Timing(*timing).cpu_seconds for timing in turn) / len(turn) for turn in turns]

    return Durations(*map(seconds, CONTENDERS))


def as_row(
    link: str,
    case: Case,
    durations: Durations,
    cpu: Durations,
    payload_bytes: int,
    extra: Sequence[Mapping[str, Sequence[int | None]]],
) -> dict[str, Any]:
    """Everything about one case, as numbers.

    Args:
        link: its name.
        case: what was averaged.
        durations: of all turns.
        cpu: seconds on a processor, of all turns.
        payload_bytes: of one round.
        extra: of :func:`take_memory`, from all ranks.
    """
    all_reduce, round_ = map(report.median, durations)
    quotients = [mine / bare for bare, mine in zip(*durations, strict=True)]
    rounds = [Extra(*each["round"]) for each in extra]
    extra_bytes = _largest([each.bytes for each in rounds])
    return {
        "link": link,
        **case._asdict(),
        "payload_bytes": payload_bytes,
        "all_reduce_seconds": all_reduce,
        "round_seconds": round_,
        "all_reduce_cpu_seconds": report.median(cpu.all_reduce),
        "round_cpu_seconds": report.median(cpu.round),
        "ratio": round_ / all_reduce,
        "ratio_interval": report.median_interval(quotients),
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
    """The parts of rounds, in order, and what is left: medians over the rounds.

    Args:
        rounds: of :func:`take_parts`, from one rank.
    """
    names = [name for name in PARTS if any(name in round_["parts"] for round_ in rounds)]
    total = report.median([round_["total"] for round_ in rounds])
    parts = {name: [Taken(*round_["parts"].get(name, (0.0, 0))) for round_ in rounds] for name in names}
    rest = [round_["total"] - sum(seconds for seconds, _ in round_["parts"].values()) for round_ in rounds]
    return [
        {
            "part": name,
            "calls": round(report.median([each.calls for each in taken])),
            "seconds": report.median([each.seconds for each in taken]),
            "share": report.median([each.seconds for each in taken]) / total,
        }
        for name, taken in parts.items()
    ] + [
        {"part": "the rest", "calls": None, "seconds": report.median(rest), "share": report.median(rest) / total},
        {"part": "all", "calls": None, "seconds": total, "share": 1.0},
    ]


def readable(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of numbers as a row of the table."""
    low, high = row["ratio_interval"]
    known = row["extra_bytes"] is not None
    return {
        "link": row["link"],
        "parameters": f"{row['parameters']:,}",
        "tensors": f"{row['tensors']:,}",
        "all-reduce [ms]": f"{1e3 * row['all_reduce_seconds']:.2f}",
        "its CPU [ms]": f"{1e3 * row['all_reduce_cpu_seconds']:.2f}",
        "round [ms]": f"{1e3 * row['round_seconds']:.2f}",
        "round CPU [ms]": f"{1e3 * row['round_cpu_seconds']:.2f}",
        "ratio": f"{row['ratio']:.3f}",
        "95 %": f"{low:.3f} to {high:.3f}",
        "goal": "" if row["goal"] is None else f"{row['goal']:.2f}",
        "extra memory": report.bytes_readable(row["extra_bytes"]) if known else "unknown",
        "in buckets": f"{row['extra_buckets']:.2f}" if known else "",
        "kept": report.bytes_readable(row["kept_bytes"]) if known else "",
        "all-reduce's": report.bytes_readable(row["all_reduce_extra_bytes"]) if known else "",
    }


def readable_parts(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parts of a row's rounds as rows of a table."""
    where = {"link": row["link"], "parameters": f"{row['parameters']:,}", "tensors": f"{row['tensors']:,}"}
    return [
        where
        | {
            "part": part["part"],
            "calls": "" if part["calls"] is None else str(part["calls"]),
            "time [ms]": f"{1e3 * part['seconds']:.3f}",
            "share": f"{part['share']:.1%}",
        }
        for part in row["breakdown"]
    ]


# The measurement


def measure(
    started: Ranks,
    link: str,
    cases: Sequence[Case],
    turns: int,
    *,
    parts: bool = False,
    common: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure all cases on ranks that carry out orders with :func:`carry_out`.

    Args:
        started: the ranks.
        link: the name of what joins them.
        cases: what to average.
        turns: timed ones.
        parts: whether to time the parts as well.
        common: what is in every order: the device and the backend; a CPU and gloo by default.

    Returns:
        A row per case.
    """
    common = {"device": "cpu", "backend": "gloo", "master_port": free_port(), **(common or {})}

    def take(what: str, case: Case) -> list[dict[str, Any]]:
        print(f"{link}: {case.parameters:,} parameters in {case.tensors:,}, {what}", file=sys.stderr, flush=True)
        return started.run({**common, "measure": what, "case": case, "turns": turns})

    timings = [take("turns", case) for case in cases]
    by_part = [take("parts", case) for case in cases] if parts else []
    extra = [take("memory", case) for case in cases]  # at last: afterwards a process is slower
    rows = [
        as_row(link, case, combine(answers), on_processors(answers), answers[0]["payload_bytes"], memory)
        for case, answers, memory in zip(cases, timings, extra, strict=True)
    ]
    for row, answers in zip(rows, by_part, strict=False):
        row["breakdown"] = breakdown(answers[0]["rounds"])
        row["unknown_parts"] = answers[0]["unknown"]
    return rows


@contextmanager
def linked(count: int, rate_mbit: float | None) -> Iterator[Ranks]:
    """Ranks on hosts that are linked at a rate; on this machine's loopback if there is none."""
    command = ["-m", "benchmarks.round", "--rank-process"]
    with ExitStack() as stack:
        if rate_mbit is None:
            yield stack.enter_context(ranks(stack.enter_context(this_machine()), count, command))
        else:
            cluster = stack.enter_context(hosts(count, rate_mbit=rate_mbit))
            yield stack.enter_context(ranks(cluster, 1, command))


def run_rank() -> None:
    """Carry out orders on this rank."""
    torch.set_num_threads(1)
    serve(carry_out)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _parse(list(sys.argv[1:] if arguments is None else arguments))
    if options.rank_process:
        run_rank()
        return 0
    rows: list[dict[str, Any]] = []
    try:
        for rate in options.rate_mbit:
            with linked(options.ranks, rate) as started:
                rows += measure(started, _name(rate), cases(options), options.turns, parts=options.breakdown)
    except (HostsUnavailableError, RankFailedError) as error:
        if rows:
            print(page(rows))
        print(f"Nothing was measured on {_name(rate)}. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the ranks are ended.", file=sys.stderr)
        return 130
    print(f"{options.ranks} ranks, buckets of {options.bucket_size_mb:g} MiB; {options.turns} turns\n")
    print(page(rows))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "rank_process")}
        report.write_json(options.json, "round", settings, rows)
    return 0


def cases(options: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    return [
        Case(round(millions * 1e6), tensors, options.bucket_size_mb)
        for millions in options.parameters
        for tensors in options.tensors
    ]


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that there is to read."""
    text = report.table([readable(row) for row in rows], COLUMNS)
    taken_apart = [row for row in rows if "breakdown" in row]
    if taken_apart:
        parts = [part for row in taken_apart for part in readable_parts(row)]
        text += f"\n\nParts of a round, on the first rank\n\n{report.table(parts, BREAKDOWN_COLUMNS)}"
        unknown = sorted({name for row in taken_apart for name in row["unknown_parts"]})
        if unknown:
            text += f"\n\nNot in this version of the package: {', '.join(unknown)}"
    return text


def _name(rate_mbit: float | None) -> str:
    return "loopback" if rate_mbit is None else f"{rate_mbit:g} Mbit/s"


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says what is averaged, and how often."""
    add = parser.add_argument
    add(
        "--parameters",
        type=report.several(report.number(1e-6, 10**4, float)),
        default=[1.0, 5.0, 25.0, 100.0],
        metavar="M,M",
        help="of the model, in millions (1,5,25,100)",
    )
    add(
        "--tensors",
        type=report.several(report.number(1, 10**6)),
        default=[8, 5000],
        metavar="N,N",
        help="that hold the parameters (8,5000)",
    )
    add("--bucket-size-mb", type=report.number(1e-6, 2**20, float), default=64.0, metavar="B", help="in MiB (64)")


def check_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error if a model has more tensors than parameters."""
    fewest, most = min(options.parameters), max(options.tensors)
    if most > round(fewest * 1e6):
        parser.error(f"--tensors {most}: expected at most as many as there are --parameters, got {fewest:g} millions.")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.round",
        description="Compare an averaging round with a bare all-reduce of the same bytes.",
    )
    add = parser.add_argument
    add("--ranks", type=report.number(2, 250), default=2, metavar="N", help="processes (2)")
    add(
        "--rate-mbit",
        type=report.several(_rate),
        default=[None],
        metavar="R,R",
        help="of each rank's link; none is loopback (none)",
    )
    add_case_arguments(parser)
    add("--turns", type=report.number(1), default=15, metavar="N", help="of each contender, timed (15)")
    add("--breakdown", action="store_true", help="say where the time of a round goes")
    add("--json", type=report.output_file, metavar="FILE", help="write all numbers to this file")
    add("--rank-process", action="store_true", help=argparse.SUPPRESS)  # how ranks are started
    options = parser.parse_args(arguments)
    check_cases(parser, options)
    return options


def _rate(given: str) -> float | None:
    return None if given == "none" else report.number(1, kind=float)(given)


if __name__ == "__main__":
    sys.exit(main())
