"""What does a slow link cost? The same training with many strategies, on hosts joined by links of a given speed.

    sudo .venv/bin/python -m benchmarks.link --hosts 4 --rate-mbit 300 [--contenders none,ddp,adpsgd] [--json FILE]

Every host is a network namespace with its own interface, whose speed is limited in both directions (see
`frame/hosts.py`); the ranks use gloo. Linux and root only. Each contender (see `contenders.py`, also for where the
comparison is unfair) trains the same model from the same weights on the same batches (`training.py`): images of 32 by
32 pixels, random ones or CIFAR-10, with a multilayer perceptron or a small ResNet. Accelerate and torchft take part if
they are installed (`pip install accelerate torchft`).

The share of communication in a step depends on the rate, on `--parameters` (what is sent) and on `--batch-size` (what
is computed). Ranks and network share the cores of this machine: if there are as many ranks as cores, or more,
communication hidden behind computation still takes a core's time. `--pause-ms` stands for an accelerator: the
perceptron's layers sleep for that long per step, a third in the forward pass and the rest in the backward pass.

How it is measured
------------------
Ranks are processes with one thread that start once. All contenders run in turn, several times (A B C A B C), so that
slow drifts of the machine affect all of them alike. A run has a few steps that are not timed (two periods) and then
`--steps` steps (whole periods). All ranks begin the first step together; from then on only the contender itself makes
them wait for each other. Communication that is still in flight when the timed steps end was also in flight when they
began. The table shows medians over the turns:

- step: wall time of the timed steps on the slowest rank, per step, averaging rounds included.
- vs none: the time of a step without communication (`none`) divided by this one; 1 is the best possible.
- vs ddp: DDP's time divided by this one, that is, how many times as fast it is. Both ratios are taken within a turn.
- rounds: averages of parameters (DDP: of gradients) in the timed steps.
- reported: the bytes that a host has sent in them according to the contender. In a ring the ranks of a host are
  neighbours and one of them sends to the next host, so these are the bytes of one rank; where each rank of a host
  averages a slice with those of other hosts, they are the sum over the host's ranks.
- counted: the bytes that a host's interface has sent in the same steps, headers included; the mean over the hosts.
- ratio: counted to reported bytes; without headers: the same minus 66 bytes per packet. At a low rate the queue cuts
  TCP's data into packets of 1500 bytes, whose headers are 4.6 %; at higher rates segments of up to 64 KiB are counted
  with one header. Bytes that TCP sends again are in both.
- loss: training loss, each rank's on its own model and batch, the mean over the ranks and the last `--smooth` steps.

With `--until-loss X` also: time and bytes (per host, counted) from the first step until this loss is at most X.
With `--until-loss ddp`, X is the loss of DDP after two thirds of its steps. Each rank records its losses, which are
combined afterwards, so nothing is sent for them.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.contenders import CONTENDERS, Contender, Plan
from benchmarks.frame.command import Arguments, new_main, new_parser, number, one_of, rate, say, settings, several
from benchmarks.frame.hosts import HEADER_BYTES, Interface, hosts
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, table
from benchmarks.frame.turns import median, speed, turns
from benchmarks.training import FEWEST_PARAMETERS, MODELS, Recipe, Record, model_size

WARMUP_PERIODS = 2
FEWEST_WARMUP_STEPS = 4  # for contenders with a special start, such as PowerSGD
PEERS = ("accelerate", "torchft")
CURVES = ("losses", "seconds", "sent_bytes")  # what is written for each step, only if a loss is to be reached

COLUMNS = (
    Column("contender", "contender"),
    Column("step [ms]", "step_seconds", ".2f", 1e3),
    Column("vs none", "speed_vs_none", ".3f"),
    Column("vs ddp", "speed_vs_ddp", ".2f"),
    Column("rounds", "rounds", ".0f"),
    Column("reported [MB]", "reported_bytes", ".2f", 1e-6),
    Column("counted [MB]", "counted_bytes", ".2f", 1e-6),
    Column("ratio", "counted_over_reported", ".4f"),
    Column("without headers", "counted_over_reported_without_headers", ".4f"),
    Column("loss", "loss", ".4f"),
)
UNTIL_COLUMNS = (
    Column("until [s]", lambda row: "not reached" if row["until_seconds"] is None else f"{row['until_seconds']:.2f}"),
    Column("until [MB]", "until_bytes", ".1f", 1e-6),
)


class Run(NamedTuple):
    """One contender in one turn. Bytes are those of one host."""

    step_seconds: float  # wall time per timed step, on the slowest rank
    rounds: int  # in the timed steps
    reported_bytes: float  # in the timed steps
    counted_bytes: float  # in the timed steps, the mean over the hosts
    counted_packets: float  # in the timed steps, the mean over the hosts
    losses: list[float]  # of each step, the mean over the ranks
    seconds: list[float]  # after each step, since the first one began, on the slowest rank
    sent_bytes: list[float]  # after each step, since the first one began, the mean over the hosts


class Reached(NamedTuple):
    """When a loss was reached."""

    step: int
    seconds: float
    bytes: float


# Arithmetic


def combine(records: Sequence[Mapping[str, list]], plan: Plan, warmup: int, sends_in_slices: bool = False) -> Run:
    """Combine the records of all ranks (see :meth:`Record.as_json`), in order of rank."""
    timed = len(records[0]["losses"]) - warmup
    first_of_hosts = records[:: plan.ranks_per_host]
    reported = [record["sent_bytes"][-1] - record["sent_bytes"][warmup] for record in records]
    return Run(
        step_seconds=max(record["times"][-1] - record["times"][warmup] for record in records) / timed,
        rounds=records[0]["rounds"][-1] - records[0]["rounds"][warmup],
        reported_bytes=sum(reported) / (plan.hosts if sends_in_slices else plan.world_size),
        counted_bytes=fmean([record["tx_bytes"][-1] - record["tx_bytes"][warmup] for record in first_of_hosts]),
        counted_packets=fmean([record["tx_packets"][-1] - record["tx_packets"][warmup] for record in first_of_hosts]),
        losses=[fmean(losses) for losses in zip(*(record["losses"] for record in records), strict=True)],
        seconds=_since_start([record["times"] for record in records], max),
        sent_bytes=_since_start([record["tx_bytes"] for record in first_of_hosts], fmean),
    )


def _since_start(columns: Sequence[list[float]], over_ranks: Callable[[list[float]], float]) -> list[float]:
    elapsed = [[value - column[0] for value in column[1:]] for column in columns]
    return [over_ranks(list(values)) for values in zip(*elapsed, strict=True)]


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean over the last ``window`` steps, at each step; infinite where there are fewer."""
    return [math.inf if step < window else fmean(losses[step - window : step]) for step in range(1, len(losses) + 1)]


def reached(run: Run, loss: float, window: int) -> Reached | None:
    """When the smoothed loss was first at most ``loss``; None if it never was."""
    for index, value in enumerate(smoothed(run.losses, window)):
        if value <= loss:
            return Reached(index + 1, run.seconds[index], run.sent_bytes[index])
    return None


def loss_to_reach(until_loss: float | str, runs: Mapping[str, Sequence[Run]], window: int) -> float:
    """The loss itself, or for "ddp" the loss of DDP after two thirds of its steps."""
    if until_loss != "ddp":
        return float(until_loss)
    return median([smoothed(run.losses, window)[2 * len(run.losses) // 3 - 1] for run in runs["ddp"]])


def as_rows(runs: Mapping[str, Sequence[Run]], window: int, until_loss: float | None = None) -> list[dict[str, Any]]:
    """One row of numbers per contender: medians over the turns, and the turns themselves.

    Args:
        runs: of each contender, one per turn.
        window: steps over which the loss is smoothed.
        until_loss: the loss to reach, if any.
    """
    seconds = {name: [run.step_seconds for run in turns] for name, turns in runs.items()}
    hidden = CURVES if until_loss is None else ()
    return [
        {
            "contender": name,
            "step_seconds": median(seconds[name]),
            "speed_vs_none": speed(seconds.get("none"), seconds[name]),
            "speed_vs_ddp": speed(seconds.get("ddp"), seconds[name]),
            "rounds": median([run.rounds for run in turns]),
            "reported_bytes": median([run.reported_bytes for run in turns]),
            "counted_bytes": median([run.counted_bytes for run in turns]),
            "counted_over_reported": _quotient(turns),
            "counted_over_reported_without_headers": _quotient(turns, header_bytes=HEADER_BYTES),
            "loss": median([smoothed(run.losses, window)[-1] for run in turns]),
            "turns": [{key: value for key, value in run._asdict().items() if key not in hidden} for run in turns],
            **({} if until_loss is None else _until(turns, until_loss, window)),
        }
        for name, turns in runs.items()
    ]


def _quotient(turns: Sequence[Run], header_bytes: int = 0) -> float | None:
    quotients = [
        (run.counted_bytes - header_bytes * run.counted_packets) / run.reported_bytes
        for run in turns
        if run.reported_bytes > 0
    ]
    return median(quotients) if quotients else None


def _until(turns: Sequence[Run], loss: float, window: int) -> dict[str, Any]:
    found = [reached(run, loss, window) for run in turns]
    in_time = [each for each in found if each is not None]
    medians = Reached(*map(median, zip(*in_time, strict=True))) if len(in_time) == len(turns) else None
    return {
        "until_loss": loss,
        "until_step": medians and medians.step,
        "until_seconds": medians and medians.seconds,
        "until_bytes": medians and medians.bytes,
    }


# The measurement


def measure(started: Ranks, names: Sequence[str], plan: Plan, warmup: int, count: int) -> dict[str, list[Run]]:
    """Run the contenders in turn."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for turn, name in turns(names, count):
        records = started.run({"contender": name, "plan": plan.as_json()})
        runs[name].append(combine(records, plan, warmup, CONTENDERS[name].sends_in_slices))
        milliseconds = 1e3 * runs[name][-1].step_seconds
        say(f"turn {turn + 1} of {count}: {name:<22}{milliseconds:9.2f} ms per step")
    return runs


_interface = cache(Interface)


def carry_out(order: Mapping[str, Any], parent: Parent) -> dict[str, list]:
    """Train on the calling rank."""
    record = Record(parent.meet, _interface().counters)
    CONTENDERS[order["contender"]].train(Plan.from_json(order["plan"]), record)
    return record.as_json()


# The command


def _measure_and_print(options: argparse.Namespace) -> int:
    plan, warmup = new_plan(options)
    left_out = {} if options.contenders else _cannot(CONTENDERS.values(), plan)
    names = options.contenders or [name for name in CONTENDERS if name not in left_out]
    print(_headline(options, plan, warmup))
    with (
        hosts(options.hosts, rate_mbit=options.rate_mbit) as cluster,
        ranks(cluster, options.ranks_per_host, "benchmarks.link") as started,
    ):
        runs = measure(started, names, plan, warmup, options.turns)
    window = min(options.smooth, plan.recipe.steps)
    loss = None if options.until_loss is None else loss_to_reach(options.until_loss, runs, window)
    rows = as_rows(runs, window, loss)
    print(f"\n{table(rows, COLUMNS if loss is None else COLUMNS + UNTIL_COLUMNS)}\n")
    if loss is not None:
        print(f"until: training loss {loss:.4f}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if options.json is not None:
        derived = {
            "warmup_steps": warmup,
            "timed_steps": plan.recipe.steps - warmup,
            "model_parameters": model_size(plan.recipe),
            "peers": {name: version(name) for name in PEERS if find_spec(name)},
        }
        write_json(options.json, "link", settings(options) | derived, rows)
    return 0


def _cannot(contenders: Iterable[Contender], plan: Plan) -> dict[str, str]:
    reasons = {contender.name: contender.why_not(plan) for contender in contenders}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def new_plan(options: argparse.Namespace) -> tuple[Plan, int]:
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
    links = "links without a limit" if options.rate_mbit is None else f"links of {options.rate_mbit:g} Mbit/s"
    adapting = ", adapting" if plan.adapt else ""
    return (
        f"{plan.hosts} hosts with {plan.ranks_per_host} rank(s) each, {links}\n"
        f"{plan.recipe.model} of {model_size(plan.recipe):,} parameters, batch size {plan.recipe.batch_size} per"
        f" rank, pause {plan.recipe.pause_ms:g} ms, {plan.recipe.data or 'random images'}, seed {plan.recipe.seed}\n"
        f"{warmup} + {plan.recipe.steps - warmup} steps, period {plan.period}{adapting}; medians of {options.turns}"
        " turn(s); bytes per host\n"
    )


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.link", "Compare strategies on hosts that are joined by links of a given speed.")
    add, names, positive = parser.add_argument, several(one_of(CONTENDERS)), number(0, kind=float)
    mean_period = "steps per averaging round of the contender even, for example the mean of an adaptive run"
    until_loss = "show when this training loss is reached; ddp: that of DDP after two thirds of its steps"
    add("--hosts", type=number(2, 250), default=2, metavar="N", help="hosts (2)")
    add("--ranks-per-host", type=number(1), default=1, metavar="N", help="ranks on each host (1)")
    add("--rate-mbit", type=rate, default=1000.0, metavar="R", help="of each link, or none for no limit (1000)")
    add("--contenders", type=names, default=[], metavar="A,B", help=f"of {', '.join(CONTENDERS)} (all that can run)")
    add("--period", type=number(1), default=8, metavar="P", help="steps between two averaging rounds (8)")
    add("--mean-period", type=number(1, kind=float), metavar="X", help=mean_period)
    add("--adapt", action="store_true", help="let adpsgd adapt the period after a quarter of the run")
    add("--model", choices=MODELS, default="mlp", help="what is trained (mlp)")
    add("--parameters", type=number(FEWEST_PARAMETERS), default=10**6, metavar="N", help="of the mlp (1000000)")
    add("--batch-size", type=number(1), default=32, metavar="N", help="images per rank and step (32)")
    add("--pause-ms", type=positive, default=0.0, metavar="T", help="time that the mlp sleeps per step (0)")
    add("--learning-rate", type=positive, default=0.02, metavar="L", help="constant (0.02)")
    add("--seed", type=number(0), default=0, metavar="N", help="of weights and batches (0)")
    add("--steps", type=number(1), default=64, metavar="N", help="timed, rounded up to whole periods (64)")
    add("--turns", type=number(1), default=3, metavar="N", help="runs of each contender (3)")
    add("--data", type=Path, metavar="DIR", help="folder with CIFAR-10, instead of random images; needs torchvision")
    add("--repacked", action="store_true", help="its files hold the same images, repacked")
    add("--images", type=number(1), metavar="N", help="take only the first N of its training images")
    add("--until-loss", type=lambda x: x if x == "ddp" else positive(x), metavar="X", help=until_loss)
    add("--smooth", type=number(1), default=32, metavar="N", help="steps to average a loss over, at most all (32)")
    options = parser.parse_args(arguments)
    complaint = _contradiction(options)
    if complaint is not None:
        parser.error(complaint)
    return options


def _contradiction(options: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are valid one by one."""
    unable = _cannot([CONTENDERS[name] for name in options.contenders], new_plan(options)[0])
    if unable:
        return f"--contenders: {'; '.join(f'{name}: {reason}' for name, reason in unable.items())}."
    if options.until_loss == "ddp" and options.contenders and "ddp" not in options.contenders:
        return "--until-loss ddp: expected ddp to be among the --contenders."
    if options.pause_ms > 0 and options.model != "mlp":
        return f"--pause-ms {options.pause_ms:g}: only --model mlp can sleep; leave it out for {options.model}."
    if options.data is None and (options.repacked or options.images is not None):
        return "--repacked and --images describe the images in --data: give it too."
    if options.data is not None and not options.data.is_dir():
        return f"--data {options.data}: there is no such folder."
    if (options.data is not None or options.model != "mlp") and find_spec("torchvision") is None:
        return "--data and every --model but mlp need torchvision: pip install torchvision."
    return None


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
