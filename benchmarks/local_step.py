"""What does a local step cost beyond Lightning's step on a single device? Both in turn, a fraction of a second each.

    .venv/bin/python -m benchmarks.local_step [--ranks 2] [--fits 3] [--turns 40] [--json FILE]

How it is measured
------------------
Three contenders, each with `--ranks` processes of one thread:

- single: each process is a `Trainer(strategy=SingleDeviceStrategy(...))` that knows of no other one.
- adpsgd: they are the ranks of one `Trainer(strategy=ADPSGDStrategy(period=...))` with a period that does not end.
- control: `single` once more. What it differs by is the noise of this measurement.

All of them are in the middle of a `fit`, but only one contender's processes run at a time, for about
`--stretch-seconds`; then they wait and the next contender's go on (A B C A B C, `--turns` times). So all meet the same
moods of the machine. The first step of a stretch is not timed. What is timed, is whole steps, from the end of one to
the end of a later one as a callback sees them, with all that the Trainer and the strategy do; batches are in memory.
This is done `--fits` times with other weights and batches; from one to the next the contenders change processes.

Two models: `few` has 8 tensors (a perceptron), `many` has 5,000 small ones (a linear layer whose rows are parameters of
their own). They are small, so that a step is short and what the Trainer and the strategy do in it has weight.

A turn's ratio is the quotient of what a contender and `single` took per step in it, the mean over the ranks. The table
shows the median of the ratios, and between which two of them the true median lies with 95 % confidence; overhead is
the median of the differences. If 1.01 lies within the interval, the machine is too noisy for so few turns: take more.
If the control's interval does not hold 1, something else disturbs the measurement. Processes are not equally fast,
for the memory they were given: with 3, 6 or more fits each contender has had all of them equally often.

The same is shown for the time that the processes spent on a processor, all their threads together. A local step waits
for nothing, so on an idle machine that is the same; on a busy one it leaves out the time that others take.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from benchmarks import report
from benchmarks.machine import Device, Stopwatch, Timing, connect, divide, free_port, this_machine
from benchmarks.ranks import Parent, RankFailedError, Ranks, ranks, serve
from lightning_adpsgd import ADPSGDStrategy

REFERENCE = "single"
CONTENDERS = (REFERENCE, "adpsgd", "control")
MODELS = ("few", "many")
NEVER = 10**9
"""A period that does not end."""
GOAL = 1.01

WIDTH, LAYERS = 512, 4  # of the perceptron
ROWS, COLUMNS_OF_A_ROW = 5000, 32  # of the layer with many tensors
BATCH_SIZE = 32
WARMUP_STEPS = 5
UNTIMED_STEPS = 1  # of a stretch: others have had the caches meanwhile
TRIAL_STEPS = 10

COLUMNS = (
    "model",
    "tensors",
    "contender",
    "step [ms]",
    "ratio",
    "95 %",
    "overhead [us]",
    "CPU [ms]",
    "CPU ratio",
    "CPU 95 %",
    "CPU overhead [us]",
    "goal",
)


# What is trained


class Rows(nn.Module):
    """A linear layer, each row of whose weights is a parameter of its own.

    Args:
        rows: how many, which are the layer's outputs.
        columns: its inputs.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(columns) / columns**0.5 for _ in range(rows))

    def forward(self, inputs: Tensor) -> Tensor:
        """A matrix product."""
        return inputs @ torch.stack([*self.rows]).T


class Task(L.LightningModule):
    """Brings a network's outputs close to 0.

    Args:
        network: what to train.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor) -> Tensor:
        """The mean square of the outputs."""
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, slow enough to go on for ever."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def new_network(model: str) -> nn.Module:
    """A network of one of ``MODELS``."""
    if model == "many":
        return Rows(ROWS, COLUMNS_OF_A_ROW)
    layers = [module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def new_batch(model: str) -> Tensor:
    """Its inputs."""
    return torch.randn(BATCH_SIZE, COLUMNS_OF_A_ROW if model == "many" else WIDTH)


class Batches:
    """The same batch, time and again, at no cost.

    Args:
        batch: where the model is.
        count: how often.
    """

    def __init__(self, batch: Any, count: int) -> None:
        self._batch = batch
        self._count = count

    def __len__(self) -> int:
        """How often."""
        return self._count

    def __iter__(self) -> Iterator[Any]:
        """The batch."""
        for _ in range(self._count):
            yield self._batch


# On each rank


class Stretches(Callback):
    """Times stretches of steps in turn with other processes: waits while they run theirs.

    Args:
        device: what the steps run on.
        steps: to time in each stretch.
        turns: stretches.
        meet: waits for all processes, those of other contenders among them.
        warmup: steps before the first stretch, at least one.
        untimed: steps at the beginning of each stretch.
        place: whose turn comes first, second and so on.
        places: how many take turns.
    """

    def __init__(
        self,
        device: Device,
        steps: int,
        turns: int,
        meet: Callable[[], None],
        *,
        warmup: int,
        untimed: int = 0,
        place: int = 0,
        places: int = 1,
    ) -> None:
        self.timings: list[Timing] = []
        """Of the stretches so far."""
        self.total_steps = warmup + turns * (untimed + steps)
        self._device = device
        self._stopwatch = Stopwatch(device)
        self._steps = steps
        self._turns = turns
        self._meet = meet
        self._warmup = warmup
        self._untimed = untimed
        self._place = place
        self._places = places

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, wait, start."""
        turn, within = divmod(batch_idx + 1 - self._warmup, self._untimed + self._steps)
        if not 0 <= turn <= self._turns:
            return
        if within == 0:
            if turn > 0:
                self.timings.append(self._stopwatch.stop())
            self._wait(turn)
        if within == self._untimed and turn < self._turns:
            self._stopwatch.start()

    def _wait(self, turn: int) -> None:
        """All meet before each stretch of any, and after the last one."""
        self._device.finish()
        if turn == 0:
            gc.collect()  # what other fits have left is not collected meanwhile
        before = self._place + 1 if turn == 0 else 0
        after = self._places - self._place if turn == self._turns else 0
        between = self._places if 0 < turn < self._turns else 0
        for _ in range(before + between + after):
            self._meet()


def new_trainer(strategy: Strategy | None, device: Device, *callbacks: Callback) -> L.Trainer:
    """A Trainer that does nothing but train, on ranks that are all on one device.

    Args:
        strategy: of several processes, and made for :func:`all_ranks`; None is a single device's.
        device: which one.
        callbacks: of the Trainer.
    """
    plugins = []
    if strategy is None:
        strategy, plugins = SingleDeviceStrategy(device.torch), [LightningEnvironment()]
    return L.Trainer(
        accelerator="gpu" if device.is_cuda else "cpu",
        devices=1,
        strategy=strategy,
        plugins=plugins,
        callbacks=[*callbacks],
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def all_ranks(device: Device) -> dict[str, Any]:
    """What tells a strategy that all ranks are on one device: the Trainer itself would want one for each."""
    return {
        "parallel_devices": [device.torch] * int(os.environ["WORLD_SIZE"]),
        "process_group_backend": torch.distributed.get_backend(),
    }


def new_strategy(contender: str, device: Device) -> Strategy | None:
    """A contender's strategy; None is a single device's."""
    return ADPSGDStrategy(period=NEVER, **all_ranks(device)) if contender == "adpsgd" else None


def take_turns(order: Mapping[str, Any], place: int, meet: Callable[[], None], device: Device) -> list[Timing]:
    """Time a contender's local steps on the calling rank."""
    torch.manual_seed(1000 * order["seed"] + int(os.environ["RANK"]))
    stretches = Stretches(
        device,
        order["steps"],
        order["turns"],
        meet,
        warmup=WARMUP_STEPS,
        untimed=UNTIMED_STEPS,
        place=place,
        places=len(CONTENDERS),
    )
    batches = Batches(new_batch(order["model"]).to(device.torch), stretches.total_steps)
    trainer = new_trainer(new_strategy(CONTENDERS[place], device), device, stretches)
    trainer.fit(Task(new_network(order["model"])), batches)
    return stretches.timings


def carry_out(order: Mapping[str, Any], parent: Parent) -> list[Timing]:
    """Carry out an order on the calling process, as a rank of one of the contenders."""
    group = divide(order["ranks"])
    connect(order["master_ports"][group], order["backend"])
    return take_turns(order, place_of(group, order["seed"]), parent.meet, Device(order["device"]))


def place_of(group: int, fit: int) -> int:
    """Which contender a group of processes is."""
    return (group + fit) % len(CONTENDERS)


# Arithmetic


class PerStep(NamedTuple):
    """What a step took in one turn, the mean over the ranks."""

    seconds: float
    cpu_seconds: float
    device_seconds: float | None
    """None on a CPU."""


def combine(answers: Sequence[Sequence[Sequence[Any]]], steps: int) -> list[PerStep]:
    """Put the timings of a contender's ranks together, turn by turn.

    Args:
        answers: of :func:`take_turns`, from each rank.
        steps: in each stretch.
    """
    return [_per_step([Timing(*answer) for answer in turn], steps) for turn in zip(*answers, strict=True)]


def _per_step(timings: Sequence[Timing], steps: int) -> PerStep:
    on_device = [timing.device_seconds for timing in timings if timing.device_seconds is not None]

    def mean(seconds: Sequence[float]) -> float:
        return sum(seconds) / len(seconds) / steps

    return PerStep(
        mean([timing.ended - timing.began for timing in timings]),
        mean([timing.cpu_seconds for timing in timings]),
        mean(on_device) if on_device else None,
    )


def as_rows(model: str, steps: int, turns: Mapping[str, Sequence[PerStep]]) -> list[dict[str, Any]]:
    """One row of numbers per contender.

    Args:
        model: what was trained.
        steps: in each stretch.
        turns: of each contender, the one that it is compared with among them.
    """
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
                "device_step_seconds": report.median(on_device) if on_device else None,
                "goal": GOAL if contender == "adpsgd" else None,
            }
        )
    return rows


def _compared(reference: Sequence[float], mine: Sequence[float]) -> dict[str, Any]:
    """The times of a contender, compared turn by turn."""
    ratios = [each / other for other, each in zip(reference, mine, strict=True)]
    overheads = [each - other for other, each in zip(reference, mine, strict=True)]
    return {
        "step_seconds": report.median(mine),
        "step_quartiles": report.quartiles(mine),
        "ratio": report.median(ratios),
        "ratio_interval": report.median_interval(ratios),
        "ratio_of_medians": report.median(mine) / report.median(reference),
        "overhead_seconds": report.median(overheads),
        "overhead_interval": report.median_interval(overheads),
        "turns": [*mine],
    }


def readable(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of numbers as a row of the table."""
    texts = {"model": row["model"], "tensors": f"{row['tensors']:,}", "contender": row["contender"]}
    for clock, name, prefix in (("wall", "step", ""), ("cpu", "CPU", "CPU ")):
        numbers = row[clock]
        texts[f"{name} [ms]"] = f"{1e3 * numbers['step_seconds']:.3f}"
        if row["contender"] != REFERENCE:
            low, high = numbers["ratio_interval"]
            texts[f"{prefix}ratio"] = f"{numbers['ratio']:.4f}"
            texts[f"{prefix}95 %"] = f"{low:.4f} to {high:.4f}"
            texts[f"{prefix}overhead [us]"] = f"{1e6 * numbers['overhead_seconds']:.1f}"
    return texts | {"goal": "" if row["goal"] is None else f"{row['goal']:.2f}"}


# The measurement


def measure(
    started: Ranks,
    per_contender: int,
    models: Sequence[str],
    *,
    fits: int,
    turns: int,
    stretch_seconds: float,
    common: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure on processes that carry out orders with :func:`carry_out`.

    Args:
        started: the processes, ``per_contender`` for each contender.
        per_contender: how many run at a time.
        models: what to train.
        fits: of each contender.
        turns: in each fit.
        stretch_seconds: about how long to time in each turn.
        common: what is in every order: the device and the backend; a CPU and gloo by default.

    Returns:
        A row per model and contender.
    """
    common = {"device": "cpu", "backend": "gloo", "ranks": per_contender, **(common or {})}
    common["master_ports"] = [free_port() for _ in CONTENDERS]

    def take(model: str, seed: int, turns: int, steps: int) -> dict[str, list[PerStep]]:
        answers = started.run({**common, "model": model, "seed": seed, "turns": turns, "steps": steps})
        groups = [answers[first : first + per_contender] for first in range(0, len(answers), per_contender)]
        return {CONTENDERS[place_of(group, seed)]: combine(each, steps) for group, each in enumerate(groups)}

    rows = []
    for model in models:
        # The first fit of a process imports and compiles what later ones have.
        trials = [take(model, fit, turns=1, steps=TRIAL_STEPS) for fit in range(len(CONTENDERS))]
        fastest = min(turns[0].seconds for trial in trials for turns in trial.values())
        steps = max(1, round(stretch_seconds / fastest))
        taken: dict[str, list[PerStep]] = {contender: [] for contender in CONTENDERS}
        for fit in range(fits):
            print(f"{model}: fit {fit + 1} of {fits}, {turns} turns of {steps} steps", file=sys.stderr, flush=True)
            for contender, each in take(model, fit, turns, steps).items():
                taken[contender] += each
        rows += as_rows(model, steps, taken)
    return rows


def processes(per_contender: int) -> int:
    """How many are needed so that each contender has so many."""
    return per_contender * len(CONTENDERS)


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
    command = ["-m", "benchmarks.local_step", "--rank-process"]
    try:
        with this_machine() as cluster, ranks(cluster, processes(options.ranks), command) as started:
            rows = measure(
                started,
                options.ranks,
                options.models,
                fits=options.fits,
                turns=options.turns,
                stretch_seconds=options.stretch_seconds,
            )
    except RankFailedError as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the ranks are ended.", file=sys.stderr)
        return 130
    turns = f"{options.fits} fits of {options.turns} turns of about {options.stretch_seconds:g} s"
    print(f"{options.ranks} processes at a time; {turns}\n")
    print(report.table([readable(row) for row in rows], COLUMNS))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "rank_process")}
        report.write_json(options.json, "local_step", settings, rows)
    return 0


def add_turn_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how long to measure local steps."""
    parser.add_argument("--fits", type=report.number(1), default=3, metavar="N", help="of each contender (3)")
    parser.add_argument(
        "--stretch-seconds",
        type=report.number(1e-3, 3600, float),
        default=0.25,
        metavar="T",
        help="about how long to time local steps in a turn (0.25)",
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.local_step",
        description="Compare a local step with Lightning's step on a single device.",
    )
    add = parser.add_argument
    add("--ranks", type=report.number(1), default=2, metavar="N", help="processes at a time (2)")
    add(
        "--models",
        type=report.several(report.one_of(MODELS)),
        default=[*MODELS],
        metavar="A,B",
        help=f"of {', '.join(MODELS)} (both)",
    )
    add("--turns", type=report.number(1), default=40, metavar="N", help="of each contender in a fit (40)")
    add_turn_arguments(parser)
    add("--json", type=report.output_file, metavar="FILE", help="write all numbers to this file")
    add("--rank-process", action="store_true", help=argparse.SUPPRESS)  # how ranks are started
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
