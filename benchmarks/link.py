"""What does a slow link cost whom? The same training under many strategies, on hosts joined by links of a given speed.

    sudo .venv/bin/python -m benchmarks.link --hosts 4 --rate-mbit 300 [--contenders none,ddp,adpsgd] [--json FILE]

Every host is a network namespace with an interface of its own, whose speed is limited in either direction (see
`hosts.py`); the ranks talk gloo. Linux and root only. Each contender (`contenders.py` says what they are, and where
comparing them is unfair) trains the same model from the same weights on the same batches (`training.py`): images of 32
by 32 pixels, random ones or CIFAR-10, into a multilayer perceptron or a small ResNet. Accelerate and torchft take part
if they are installed (`pip install accelerate torchft`).

How much of a step is communication, is chosen by the rate, by `--parameters` (what is sent) and by `--batch-size` (what
is computed). Ranks and network share the cores of this machine: where there are more ranks than cores, or as many,
communication that is hidden behind computation still takes a core's time. `--pause-ms` stands for an accelerator: the
perceptron's layers sleep for so long per step, a third in the forward pass and the rest in the backward pass.

How it is measured
------------------
Ranks are processes with one thread that are started once. All contenders run in turn, several times (A B C A B C), each
time for a few steps that are not timed (two periods) and then for `--steps` steps (whole periods), so that slow drifts
of the machine reach all of them alike. All ranks begin the first step together; from then on only the contender itself
makes them wait for each other. What a contender has under way when the timed steps end, it had under way as well when
they began. The table shows medians over the turns:

- step: wall time of the timed steps on the slowest rank, per step, averaging rounds included.
- vs none: the time of a step without communication (`none`), divided by this one; 1 is the floor.
- vs ddp: DDP's time divided by this one: how many times as fast it is. Both quotients are taken within a turn.
- rounds: averages of parameters (of gradients: DDP) in the timed steps.
- reported: what the contender says that a host has sent meanwhile. In a ring the ranks of a host are neighbours: one of
  them sends to the next host, so it is what that one sends; where each rank of a host averages a slice with those of
  other hosts, it is the sum over the host's ranks.
- counted: what a host's interface has sent in the same steps, headers included; the mean over the hosts.
- ratio: counted to reported bytes; without headers: the same after taking off 66 bytes per packet. Where the rate is
  low, the queue cuts what TCP hands over into packets of 1500 bytes, whose headers are 4.6 %; at higher ones segments
  of up to 64 KiB are counted with one header. What TCP sends again is in both.
- loss: training loss, each rank's on its own model and batch, the mean over the ranks and the last `--smooth` steps.

With `--until-loss X` also: the time and the bytes (per host, counted) from the first step on until this loss is at most
X. `--until-loss ddp` takes for X what DDP has after two thirds of the steps of its run. The loss is noted down on each
rank and put together afterwards, so nothing is sent for it.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.contenders import CONTENDERS, Contender, Plan
from benchmarks.hosts import HostsUnavailableError, hosts
from benchmarks.ranks import Parent, RankFailedError, Ranks, ranks, serve
from benchmarks.report import number, one_of, several
from benchmarks.training import FEWEST_PARAMETERS, MODELS, Interface, Recipe, Record, parameter_count

HEADER_BYTES = 66  # of one packet: Ethernet, IPv4, TCP with time stamps
WARMUP_PERIODS = 2
FEWEST_WARMUP_STEPS = 4  # for what has a start of its own, such as PowerSGD
PEERS = ("accelerate", "torchft")
COLUMNS = (
    "contender",
    "step [ms]",
    "vs none",
    "vs ddp",
    "rounds",
    "reported [MB]",
    "counted [MB]",
    "ratio",
    "without headers",
    "loss",
)
UNTIL_COLUMNS = ("until [s]", "until [MB]")


class Run(NamedTuple):
    """One contender in one turn. Bytes are those of one host."""

    step_seconds: float
    """Wall time per timed step on the slowest rank."""
    rounds: int
    """In the timed steps."""
    reported_bytes: float
    """In the timed steps."""
    counted_bytes: float
    """In the timed steps, the mean over the hosts."""
    counted_packets: float
    """The same."""
    losses: list[float]
    """Of each step, the mean over the ranks."""
    seconds: list[float]
    """After each step, since the first one began, on the slowest rank."""
    sent_bytes: list[float]
    """After each step, since the first one began, the mean over the hosts."""


class Reached(NamedTuple):
    """When a loss was reached."""

    step: int
    seconds: float
    bytes: float


# Arithmetic


def combine(records: Sequence[Mapping[str, list]], plan: Plan, warmup: int, sends_in_slices: bool = False) -> Run:
    """Put the records of all ranks together.

    Args:
        records: in order of rank; see :meth:`Record.as_json`.
        plan: the run.
        warmup: steps before the timed ones.
        sends_in_slices: whether every rank of a host sends something of its own to other hosts.
    """
    timed = len(records[0]["losses"]) - warmup
    first_of_hosts = records[:: plan.ranks_per_host]
    reported = [record["sent_bytes"][-1] - record["sent_bytes"][warmup] for record in records]
    return Run(
        step_seconds=max(record["times"][-1] - record["times"][warmup] for record in records) / timed,
        rounds=records[0]["rounds"][-1] - records[0]["rounds"][warmup],
        reported_bytes=sum(reported) / (plan.hosts if sends_in_slices else plan.world_size),
        counted_bytes=_mean([record["tx_bytes"][-1] - record["tx_bytes"][warmup] for record in first_of_hosts]),
        counted_packets=_mean([record["tx_packets"][-1] - record["tx_packets"][warmup] for record in first_of_hosts]),
        losses=[_mean(losses) for losses in zip(*(record["losses"] for record in records), strict=True)],
        seconds=_since_start([record["times"] for record in records], max),
        sent_bytes=_since_start([record["tx_bytes"] for record in first_of_hosts], _mean),
    )


def _since_start(columns: Sequence[list[float]], over_ranks: Callable[[list[float]], float]) -> list[float]:
    elapsed = [[value - column[0] for value in column[1:]] for column in columns]
    return [over_ranks(list(values)) for values in zip(*elapsed, strict=True)]


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each step and those before, ``window`` in all; infinite where there are fewer."""
    return [math.inf if step < window else _mean(losses[step - window : step]) for step in range(1, len(losses) + 1)]


def reached(run: Run, loss: float, window: int) -> Reached | None:
    """When the smoothed loss was ``loss`` or less for the first time; None if it never was."""
    for index, value in enumerate(smoothed(run.losses, window)):
        if value <= loss:
            return Reached(index + 1, run.seconds[index], run.sent_bytes[index])
    return None


def loss_to_reach(until_loss: float | str, runs: Mapping[str, Sequence[Run]], window: int) -> float:
    """The loss itself, or for "ddp" what it has after two thirds of its steps."""
    if until_loss != "ddp":
        return float(until_loss)
    return report.median([smoothed(run.losses, window)[2 * len(run.losses) // 3 - 1] for run in runs["ddp"]])


def as_rows(runs: Mapping[str, Sequence[Run]], window: int, until_loss: float | None = None) -> list[dict[str, Any]]:
    """One row of numbers per contender: medians over the turns, and the turns themselves.

    Args:
        runs: of each contender one per turn, in order.
        window: steps over which the loss is smoothed.
        until_loss: the loss to reach, if one was asked for.
    """
    return [
        {
            "contender": name,
            "step_seconds": report.median([run.step_seconds for run in turns]),
            "speed_vs_none": _speed(runs.get("none"), turns),
            "speed_vs_ddp": _speed(runs.get("ddp"), turns),
            "rounds": report.median([run.rounds for run in turns]),
            "reported_bytes": report.median([run.reported_bytes for run in turns]),
            "counted_bytes": report.median([run.counted_bytes for run in turns]),
            "counted_over_reported": _quotient(turns),
            "counted_over_reported_without_headers": _quotient(turns, header_bytes=HEADER_BYTES),
            "loss": report.median([smoothed(run.losses, window)[-1] for run in turns]),
            "turns": [run._asdict() if until_loss is not None else _without_curves(run) for run in turns],
            **({} if until_loss is None else _until(turns, until_loss, window)),
        }
        for name, turns in runs.items()
    ]


def _speed(reference: Sequence[Run] | None, turns: Sequence[Run]) -> float | None:
    if reference is None:
        return None
    pairs = zip(reference, turns, strict=True)
    return report.median([other.step_seconds / run.step_seconds for other, run in pairs])


def _quotient(turns: Sequence[Run], header_bytes: int = 0) -> float | None:
    quotients = [
        (run.counted_bytes - header_bytes * run.counted_packets) / run.reported_bytes
        for run in turns
        if run.reported_bytes > 0
    ]
    return report.median(quotients) if quotients else None


def _until(turns: Sequence[Run], loss: float, window: int) -> dict[str, Any]:
    found = [reached(run, loss, window) for run in turns]
    in_time = [each for each in found if each is not None]
    medians = Reached(*map(report.median, zip(*in_time, strict=True))) if len(in_time) == len(turns) else None
    return {
        "until_loss": loss,
        "until_step": medians and medians.step,
        "until_seconds": medians and medians.seconds,
        "until_bytes": medians and medians.bytes,
    }


def _without_curves(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run._asdict().items() if name not in ("losses", "seconds", "sent_bytes")}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def readable(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of numbers as a row of the table."""
    texts = {
        "contender": row["contender"],
        "step [ms]": f"{1e3 * row['step_seconds']:.2f}",
        "vs none": _text(row["speed_vs_none"], ".3f"),
        "vs ddp": _text(row["speed_vs_ddp"], ".2f"),
        "rounds": f"{row['rounds']:.0f}",
        "reported [MB]": f"{row['reported_bytes'] / 1e6:.2f}",
        "counted [MB]": f"{row['counted_bytes'] / 1e6:.2f}",
        "ratio": _text(row["counted_over_reported"], ".4f"),
        "without headers": _text(row["counted_over_reported_without_headers"], ".4f"),
        "loss": f"{row['loss']:.4f}",
    }
    if "until_loss" in row:
        missed = row["until_seconds"] is None
        texts["until [s]"] = "not reached" if missed else f"{row['until_seconds']:.2f}"
        texts["until [MB]"] = "" if missed else f"{row['until_bytes'] / 1e6:.1f}"
    return texts


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# The measurement


def measure(started: Ranks, names: Sequence[str], plan: Plan, warmup: int, turns: int) -> dict[str, list[Run]]:
    """Let the contenders run in turn."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn, name in report.turns(names, turns):
        records = started.run({"contender": name})
        runs[name].append(combine(records, plan, warmup, CONTENDERS[name].sends_in_slices))
        milliseconds = 1e3 * runs[name][-1].step_seconds
        print(f"turn {turn + 1} of {turns}: {name:<22}{milliseconds:9.2f} ms per step", file=sys.stderr, flush=True)
    return runs


def run_rank(plan: Plan) -> None:
    """Train, on this rank, as one contender after the other."""
    torch.set_num_threads(1)
    interface = Interface()

    def train(order: dict[str, Any], parent: Parent) -> dict[str, list]:
        record = Record(parent.meet, interface.sent)
        CONTENDERS[order["contender"]].train(plan, record)
        return record.as_json()

    serve(train)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    plan, warmup = _plan(options)
    if options.rank_process:
        run_rank(plan)
        return 0
    left_out = {} if options.contenders else _cannot(CONTENDERS.values(), plan)
    names = options.contenders or [name for name in CONTENDERS if name not in left_out]
    print(_headline(options, plan, warmup))
    try:
        with (
            hosts(options.hosts, rate_mbit=options.rate_mbit) as cluster,
            ranks(cluster, options.ranks_per_host, ["-m", "benchmarks.link", *arguments, "--rank-process"]) as started,
        ):
            runs = measure(started, names, plan, warmup, options.turns)
    except (HostsUnavailableError, RankFailedError) as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the hosts are removed.", file=sys.stderr)
        return 130
    window = min(options.smooth, plan.recipe.steps)
    loss = None if options.until_loss is None else loss_to_reach(options.until_loss, runs, window)
    rows = as_rows(runs, window, loss)
    columns = COLUMNS if loss is None else COLUMNS + UNTIL_COLUMNS
    print(f"\n{report.table([readable(row) for row in rows], list(columns))}\n")
    if loss is not None:
        print(f"until: training loss {loss:.4f}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if options.json is not None:
        report.write_json(options.json, "link", _as_arguments(options, plan, warmup), rows)
    return 0


def _cannot(contenders: Iterable[Contender], plan: Plan) -> dict[str, str]:
    reasons = {contender.name: contender.why_not(plan) for contender in contenders}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _plan(options: argparse.Namespace) -> tuple[Plan, int]:
    """The run, and how many of its steps are not timed; both numbers of steps are whole periods."""
    warmup = _whole(max(WARMUP_PERIODS * options.period, FEWEST_WARMUP_STEPS), options.period)
    recipe = Recipe(
        model=options.model,
        parameters=options.parameters,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        steps=warmup + _whole(options.steps, options.period),
        pause_ms=options.pause_ms,
        data=None if options.data is None else str(options.data),
        verify=not options.repacked,
        images=options.images,
    )
    plan = Plan(recipe, options.hosts, options.ranks_per_host, options.period, options.adapt, options.mean_period)
    return plan, warmup


def _whole(steps: int, period: int) -> int:
    return -(-steps // period) * period


def _headline(options: argparse.Namespace, plan: Plan, warmup: int) -> str:
    rate = "links without a limit" if options.rate_mbit is None else f"links of {options.rate_mbit:g} Mbit/s"
    adapting = ", adapting" if plan.adapt else ""
    return (
        f"{plan.hosts} hosts with {plan.ranks_per_host} rank(s) each, {rate}\n"
        f"{plan.recipe.model} of {parameter_count(plan.recipe):,} parameters, batch size {plan.recipe.batch_size} per"
        f" rank, pause {plan.recipe.pause_ms:g} ms, {plan.recipe.data or 'random images'}, seed {plan.recipe.seed}\n"
        f"{warmup} + {plan.recipe.steps - warmup} steps, period {plan.period}{adapting}; medians of {options.turns}"
        " turn(s); bytes per host\n"
    )


def _as_arguments(options: argparse.Namespace, plan: Plan, warmup: int) -> dict[str, Any]:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    del given["rank_process"], given["json"]
    return {
        **given,
        "warmup_steps": warmup,
        "timed_steps": plan.recipe.steps - warmup,
        "model_parameters": parameter_count(plan.recipe),
        "peers": {name: version(name) for name in PEERS if find_spec(name)},
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.link",
        description="Compare strategies on hosts that are joined by links of a given speed.",
    )
    add = parser.add_argument
    add("--hosts", type=number(2, 250), default=2, metavar="N", help="hosts (2)")
    add("--ranks-per-host", type=number(1), default=1, metavar="N", help="ranks on each host (1)")
    add("--rate-mbit", type=_rate, default=1000.0, metavar="R", help="of each link, or none for no limit (1000)")
    add(
        "--contenders",
        type=several(one_of(CONTENDERS)),
        default=[],
        metavar="A,B",
        help=f"of {', '.join(CONTENDERS)} (all that can run)",
    )
    add("--period", type=number(1), default=8, metavar="P", help="steps between two averaging rounds (8)")
    add(
        "--mean-period",
        type=number(1, kind=float),
        metavar="X",
        help="steps per averaging round of the contender even, for example those that an adaptive run has had",
    )
    add("--adapt", action="store_true", help="let adpsgd adapt the period after a quarter of the run")
    add("--model", choices=MODELS, default="mlp", help="what is trained (mlp)")
    add("--parameters", type=number(FEWEST_PARAMETERS), default=10**6, metavar="N", help="of the mlp (1000000)")
    add("--batch-size", type=number(1), default=32, metavar="N", help="images per rank and step (32)")
    add("--pause-ms", type=number(0, kind=float), default=0.0, metavar="T", help="for which the mlp sleeps a step (0)")
    add("--learning-rate", type=number(0, kind=float), default=0.02, metavar="L", help="constant (0.02)")
    add("--seed", type=number(0), default=0, metavar="N", help="of weights and batches (0)")
    add("--steps", type=number(1), default=64, metavar="N", help="timed, rounded up to whole periods (64)")
    add("--turns", type=number(1), default=3, metavar="N", help="runs of each contender (3)")
    add("--data", type=Path, metavar="DIR", help="folder with CIFAR-10, instead of random images; needs torchvision")
    add("--repacked", action="store_true", help="its files hold the same images but were packed anew")
    add("--images", type=number(1), metavar="N", help="take only the first so many of its training images")
    add(
        "--until-loss",
        type=_loss,
        metavar="X",
        help="say when this training loss is reached; ddp: its own at two thirds",
    )
    add("--smooth", type=number(1), default=32, metavar="N", help="steps that a loss is the mean of, at most all (32)")
    add("--json", type=report.output_file, metavar="FILE", help="write all numbers to this file")
    add("--rank-process", action="store_true", help=argparse.SUPPRESS)  # how ranks are started
    options = parser.parse_args(arguments)
    complaint = _contradiction(options)
    if complaint is not None:
        parser.error(complaint)
    return options


def _contradiction(options: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are right one by one."""
    plan, _ = _plan(options)
    unable = _cannot([CONTENDERS[name] for name in options.contenders], plan)
    if unable and not options.rank_process:
        return f"--contenders: {'; '.join(f'{name}: {reason}' for name, reason in unable.items())}."
    if options.until_loss == "ddp" and options.contenders and "ddp" not in options.contenders:
        return "--until-loss ddp: expected ddp to be among the --contenders."
    if options.pause_ms > 0 and options.model != "mlp":
        return f"--pause-ms {options.pause_ms:g}: only --model mlp can sleep; leave it out for {options.model}."
    if options.data is None and (options.repacked or options.images is not None):
        return "--repacked and --images are about the images in --data: give it too."
    if options.data is not None and not options.data.is_dir():
        return f"--data {options.data}: there is no such folder."
    if (options.data is not None or options.model != "mlp") and find_spec("torchvision") is None:
        return "--data and every --model but mlp need torchvision: pip install torchvision."
    return None


def _rate(given: str) -> float | None:
    return None if given == "none" else number(1, kind=float)(given)


def _loss(given: str) -> float | str:
    return given if given == "ddp" else number(0, kind=float)(given)


if __name__ == "__main__":
    sys.exit(main())
