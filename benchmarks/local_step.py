"""What does a local step cost beyond Lightning's step on a single device? Both take turns of a fraction of a second.

    .venv/bin/python -m benchmarks.local_step [--ranks 2] [--fits 3] [--turns 40] [--json FILE]

How it is measured
------------------
There are three contenders, each with `--ranks` processes of one thread:

- single: each process is a `Trainer(strategy=SingleDeviceStrategy(...))` that knows of no other process.
- adpsgd: they are the ranks of one `Trainer(strategy=ADPSGDStrategy(period=...))` with a period that never ends.
- control: `single` once more. Its difference from `single` is the noise of the measurement.

All of them are in the middle of a `fit`, but only one contender's processes run at a time, for about
`--stretch-seconds`; then they wait, and the next contender's continue (A B C A B C, `--turns` times). The first step of
a stretch is not timed. What is timed is whole steps, from the end of one to the end of a later one as a callback sees
them, with everything that the Trainer and the strategy do; batches are in memory. All this is repeated `--fits` times
with other weights and batches, and each time the contenders change processes.

Two models: `few` has 8 tensors (a perceptron), `many` has 5,000 small ones (a linear layer whose rows are separate
parameters). They are small, so that a step is short and the overhead of the Trainer and the strategy is visible.

The ratio of a turn is what a contender took per step in it, the mean over the ranks, divided by what `single` took. The
table shows the median of the ratios with its 95 % confidence interval; overhead is the median of the differences. If
1.01 lies within the interval, the machine is too noisy for so few turns: take more. If the control's interval does not
contain 1, something else disturbs the measurement. Processes are not equally fast, because of where their memory is:
with 3, 6, 9, … fits each contender has run on all of them equally often.

The same is shown for the processor time of all threads. A local step waits for nothing, so on an idle machine that is
the same; on a busy one it leaves out the time that other processes take.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from benchmarks.frame.command import Arguments, new_main, new_parser, number, one_of, say, settings, several
from benchmarks.frame.connection import connect, divide
from benchmarks.frame.device import Device, Stopwatch, Timing
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, free_port, local_ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, interval, table
from benchmarks.frame.trainer import NEVER, Batches, all_ranks, new_device_trainer
from benchmarks.frame.turns import median, median_interval, quartiles, ratios
from lightning_adpsgd import ADPSGDStrategy

REFERENCE = "single"
CONTENDERS = (REFERENCE, "adpsgd", "control")
MODELS = ("few", "many")
GOAL = 1.01

WIDTH, LAYERS = 512, 4  # of the perceptron
ROWS, ROW_LENGTH = 5000, 32  # of the layer with many tensors
BATCH_SIZE = 32
WARMUP_STEPS = 5
UNTIMED_STEPS = 1  # at the beginning of a stretch: others have used the caches meanwhile
TRIAL_STEPS = 10


def _clock_columns(clock: str, step: str, prefix: str) -> list[Column]:
    return [
        Column(step, f"{clock}.step_seconds", ".3f", 1e3),
        Column(f"{prefix}ratio", _unless_reference(f"{clock}.ratio"), ".4f"),
        Column(f"{prefix}95 %", _unless_reference(interval(f"{clock}.ratio_interval", ".4f"))),
        Column(f"{prefix}overhead [us]", _unless_reference(f"{clock}.overhead_seconds"), ".1f", 1e6),
    ]


def _unless_reference(value: str | Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    look_up = Column("", value).look_up
    return lambda row: None if row["contender"] == REFERENCE else look_up(row)


COLUMNS = (
    Column("model", "model"),
    Column("tensors", "tensors", ","),
    Column("contender", "contender"),
    *_clock_columns("wall", "step [ms]", ""),
    *_clock_columns("cpu", "CPU [ms]", "CPU "),
    Column("goal", "goal", ".2f"),
)


# What is trained


class Rows(nn.Module):
    """A linear layer; each of the ``rows`` of its weights, with ``columns`` inputs, is a separate parameter."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(columns) / columns**0.5 for _ in range(rows))

    def forward(self, inputs: Tensor) -> Tensor:
        """A matrix product."""
        return inputs @ torch.stack([*self.rows]).T


class Task(L.LightningModule):
    """Minimizes the outputs of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor) -> Tensor:
        """The mean square of the outputs."""
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, slow enough to run for any number of steps."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def new_network(model: str) -> nn.Module:
    """A network of one of ``MODELS``."""
    if model == "many":
        return Rows(ROWS, ROW_LENGTH)
    layers = [module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def new_batch(model: str) -> Tensor:
    """Its inputs."""
    return torch.randn(BATCH_SIZE, ROW_LENGTH if model == "many" else WIDTH)


# On each rank


@dataclass(eq=False)
class Stretches(Callback):
    """Times stretches of steps in turn with other processes, and waits while those run theirs."""

    device: Device
    steps: int  # to time in each stretch
    turns: int  # stretches
    meet: Callable[[], None]  # waits for all processes, those of other contenders among them
    warmup: int  # steps before the first stretch, at least one
    untimed: int = 0  # steps at the beginning of each stretch
    place: int = 0  # in the order of turns
    places: int = 1  # how many take turns
    timings: list[Timing] = field(default_factory=list)  # of the stretches so far

    def __post_init__(self) -> None:
        self.total_steps = self.warmup + self.turns * (self.untimed + self.steps)
        self.stopwatch = Stopwatch(self.device)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        """Stop, wait, start."""
        turn, within = divmod(batch_idx + 1 - self.warmup, self.untimed + self.steps)
        if not 0 <= turn <= self.turns:
            return
        if within == 0:
            if turn > 0:
                self.timings.append(self.stopwatch.stop())
            self._wait(turn)
        if within == self.untimed and turn < self.turns:
            self.stopwatch.start()

    def _wait(self, turn: int) -> None:
        """All processes meet before each stretch of any of them, and after the last one."""
        self.device.finish()
        if turn == 0:
            gc.collect()  # so that garbage of other fits is not collected later
        before = self.place + 1 if turn == 0 else 0
        after = self.places - self.place if turn == self.turns else 0
        between = self.places if 0 < turn < self.turns else 0
        for _ in range(before + between + after):
            self.meet()


def new_strategy(contender: str, device: Device) -> Strategy | None:
    """A contender's strategy; None is a single device's."""
    return ADPSGDStrategy(period=NEVER, **all_ranks(device)) if contender == "adpsgd" else None


def carry_out(order: Mapping[str, Any], parent: Parent) -> list[Timing]:
    """Time local steps on the calling process, as a rank of one of the contenders."""
    group, device = divide(order["ranks"]), Device(order["device"])
    place = place_of(group, order["seed"])
    connect(order["backend"], order["master_ports"][group])
    torch.manual_seed(1000 * order["seed"] + int(os.environ["RANK"]))
    stretches = Stretches(
        device,
        order["steps"],
        order["turns"],
        parent.meet,
        warmup=WARMUP_STEPS,
        untimed=UNTIMED_STEPS,
        place=place,
        places=len(CONTENDERS),
    )
    batches = Batches(new_batch(order["model"]).to(device.torch), stretches.total_steps)
    trainer = new_device_trainer(new_strategy(CONTENDERS[place], device), device, stretches)
    trainer.fit(Task(new_network(order["model"])), batches)
    return stretches.timings


def place_of(group: int, fit: int) -> int:
    """Which contender a group of processes is."""
    return (group + fit) % len(CONTENDERS)


# Arithmetic


class PerStep(NamedTuple):
    """What a step took in one turn, the mean over the ranks."""

    seconds: float
    cpu_seconds: float
    device_seconds: float | None  # None on a CPU


def combine(answers: Sequence[Sequence[Sequence[Any]]], steps: int) -> list[PerStep]:
    """Combine the timings of a contender's ranks, turn by turn; ``steps`` are those of a stretch."""
    return [_per_step([Timing(*answer) for answer in turn], steps) for turn in zip(*answers, strict=True)]


def _per_step(timings: Sequence[Timing], steps: int) -> PerStep:
    on_device = [timing.device_seconds for timing in timings if timing.device_seconds is not None]
    return PerStep(
        statistics.fmean(timing.seconds for timing in timings) / steps,
        statistics.fmean(timing.cpu_seconds for timing in timings) / steps,
        statistics.fmean(on_device) / steps if on_device else None,
    )


def as_rows(model: str, steps: int, turns: Mapping[str, Sequence[PerStep]]) -> list[dict[str, Any]]:
    """One row of numbers per contender, the reference included."""
    tensors = sum(1 for _ in new_network(model).parameters())
    rows = []
    for contender, mine in turns.items():
        on_device = [each.device_seconds for each in mine if each.device_seconds is not None]
        rows.append(
            {
                "model": model,
                "tensors": tensors,
                "contender": contender,
                "steps": steps,
                "wall": _compared([each.seconds for each in turns[REFERENCE]], [each.seconds for each in mine]),
                "cpu": _compared([each.cpu_seconds for each in turns[REFERENCE]], [each.cpu_seconds for each in mine]),
                "device_step_seconds": median(on_device) if on_device else None,
                "goal": GOAL if contender == "adpsgd" else None,
            }
        )
    return rows


def _compared(reference: Sequence[float], mine: Sequence[float]) -> dict[str, Any]:
    """The times of a contender, compared turn by turn."""
    quotients = ratios(mine, reference)
    overheads = [each - other for other, each in zip(reference, mine, strict=True)]
    return {
        "step_seconds": median(mine),
        "step_quartiles": quartiles(mine),
        "ratio": median(quotients),
        "ratio_interval": median_interval(quotients),
        "ratio_of_medians": median(mine) / median(reference),
        "overhead_seconds": median(overheads),
        "overhead_interval": median_interval(overheads),
        "turns": [*mine],
    }


# The measurement


def measure(
    started: Ranks, models: Sequence[str], options: argparse.Namespace, common: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Measure; a row per model and contender.

    Args:
        started: as many processes as :func:`processes` says, which carry out orders with :func:`carry_out`.
        models: what to train.
        options: ``ranks``, ``fits``, ``turns`` and ``stretch_seconds`` of the command.
        common: entries of every order, by default a CPU and gloo.
    """
    size, ports = options.ranks, [free_port() for _ in CONTENDERS]
    common = {"device": "cpu", "backend": "gloo", "ranks": size, "master_ports": ports, **(common or {})}

    def take(model: str, seed: int, turns: int, steps: int) -> dict[str, list[PerStep]]:
        answers = started.run({**common, "model": model, "seed": seed, "turns": turns, "steps": steps})
        groups = [answers[first : first + size] for first in range(0, len(answers), size)]
        return {CONTENDERS[place_of(group, seed)]: combine(each, steps) for group, each in enumerate(groups)}

    rows = []
    for model in models:
        # The first fit of a process is slower, because of imports and compilation.
        trials = [take(model, fit, turns=1, steps=TRIAL_STEPS) for fit in range(len(CONTENDERS))]
        fastest = min(turns[0].seconds for trial in trials for turns in trial.values())
        steps = max(1, round(options.stretch_seconds / fastest))
        taken: dict[str, list[PerStep]] = {contender: [] for contender in CONTENDERS}
        for fit in range(options.fits):
            say(f"{model}: fit {fit + 1} of {options.fits}, {options.turns} turns of {steps} steps")
            for contender, each in take(model, fit, options.turns, steps).items():
                taken[contender] += each
        rows += as_rows(model, steps, taken)
    return rows


def processes(options: argparse.Namespace) -> int:
    """How many are needed for all contenders."""
    return options.ranks * len(CONTENDERS)


# The command


def _measure_and_print(options: argparse.Namespace) -> int:
    with local_ranks(processes(options), "benchmarks.local_step") as started:
        rows = measure(started, options.models, options)
    turns = f"{options.fits} fits of {options.turns} turns of about {options.stretch_seconds:g} s"
    print(f"{options.ranks} processes at a time; {turns}\n")
    print(table(rows, COLUMNS))
    if options.json is not None:
        write_json(options.json, "local_step", settings(options), rows)
    return 0


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about how long local steps are measured."""
    add, seconds = parser.add_argument, number(1e-3, 3600, float)
    add("--fits", type=number(1), default=3, metavar="N", help="of each contender (3)")
    add("--stretch-seconds", type=seconds, default=0.25, metavar="T", help="of local steps in a turn, about (0.25)")


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.local_step", "Compare a local step with Lightning's step on a single device.")
    add, models = parser.add_argument, several(one_of(MODELS))
    add("--ranks", type=number(1), default=2, metavar="N", help="processes at a time (2)")
    add("--models", type=models, default=[*MODELS], metavar="A,B", help=f"of {', '.join(MODELS)} (both)")
    add("--turns", type=number(1), default=40, metavar="N", help="of each contender in a fit (40)")
    add_turn_arguments(parser)
    return parser.parse_args(arguments)


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
