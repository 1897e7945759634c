"""What do local steps, rounds and training cost on a GPU? Several ranks on one CUDA device.

    .venv/bin/python -m benchmarks.gpu [--parts local-step,round,training,trace] [--backend nccl] [--json FILE]

One GPU stands for several: each rank is a process on it, and they communicate over this machine's loopback, with gloo,
which copies to the host and back, or with NCCL over sockets, which is told that each rank is on its own host. Both
are far slower than NVLink, and ranks that compute at the same time share the GPU. So this measures what the package
does on a device, not how fast a cluster would be.

The parts
---------
- local-step: as in `local_step.py`, with the model on the GPU.
- round: as in `round.py`, with the model on the GPU. Extra memory is PyTorch's on the GPU; what the host takes as well
  (gloo's copies) is in the JSON file.
- training: the multilayer perceptron of `link.py` without communication, with DDP, with a constant period, and with
  `adpsgd` and its options. Shown are medians over `--turns` turns (A B C A B C): the time per step, and the speed
  relative to `none` and `ddp` in the same turn; rounds and bytes sent in the timed steps; and PyTorch's peak of memory
  in them.
- trace: whether the host waits for the device in a local step. PyTorch's profiler records `--steps` of them, and all
  calls that synchronize or read a value back (cudaStreamSynchronize, copies to the host, aten::item and so on) are
  counted. In the same steps PyTorch itself reports each synchronizing operation and its caller
  (`torch.cuda.set_sync_debug_mode`). There must be no more of them than with Lightning's single device; `control` reads
  a loss back at each step, which has to be detected. With `--traces` the first rank's traces are kept for
  chrome://tracing.

Times are the host's, which waits for the device before and after; the JSON file also has the times between two CUDA
events. `--rehearse` runs everything on the CPU, to see whether it works; the numbers are meaningless.

The exit code is 0; 1 if a local step makes the host wait; 2 if nothing could be measured.
"""

import argparse
import math
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import local_step, training
from benchmarks import round as averaging_round
from benchmarks.frame.command import (
    NOT_AS_CLAIMED,
    Arguments,
    folder,
    new_main,
    new_parser,
    number,
    one_of,
    say,
    settings,
    several,
)
from benchmarks.frame.connection import connect
from benchmarks.frame.device import Device, Timing
from benchmarks.frame.errors import NotMeasuredError
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, local_ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, bytes_readable, table
from benchmarks.frame.trainer import VARIANTS, Batches, Rounds, all_ranks, new_device_trainer, unknown_options
from benchmarks.frame.turns import median, speed, turns
from benchmarks.training import Recipe
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy

PARTS = ("local-step", "round", "training", "trace")
BACKENDS = ("gloo", "nccl")
DEVICE = "cuda:0"

TRAINED: dict[str, dict[str, Any]] = {"none": {}, "ddp": {}, "constant": {}, **VARIANTS}
"""The contenders of the training, with options of `ADPSGDStrategy`."""

TRACED = ("single", "adpsgd", "control")
WARMUP_PERIODS = 2
SYNCHRONIZING = (
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",  # blocks, unlike cudaMemcpyAsync
    "cudaStreamSynchronize",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
)
COPY_TO_HOST = "Memcpy DtoH"
READ_BACK = "aten::_local_scalar_dense"
WATCHED = "watched steps"
WARNING = "called a synchronizing CUDA operation"


def _where_averaged(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: None if row["contender"] in ("none", "ddp") else row[name]


TRAINING_COLUMNS = (
    Column("contender", "contender"),
    Column("step [ms]", "step_seconds", ".3f", 1e3),
    Column("vs none", "speed_vs_none", ".3f"),
    Column("vs ddp", "speed_vs_ddp", ".2f"),
    Column("rounds", _where_averaged("rounds"), ".0f"),
    Column("sent [MB]", _where_averaged("sent_bytes"), ".2f", 1e-6),
    Column("peak memory", "peak_bytes", bytes_readable),
)
TRACE_COLUMNS = (
    Column("contender", "contender"),
    Column("rank", "rank"),
    Column("steps", "steps"),
    Column("call", "call"),
    Column("count", "count"),
)


# Training


class Trained(NamedTuple):
    """A contender's timed steps on one rank."""

    timing: Timing
    rounds: int
    sent_bytes: int
    peak_bytes: int | None  # of PyTorch on the GPU; None on a CPU


class Watch(Callback):
    """Calls ``begin`` after ``warmup`` steps, at least one, and ``end`` after ``steps`` more."""

    def __init__(self, warmup: int, steps: int, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self._calls = {warmup - 1: begin, warmup + steps - 1: end}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        """Begin or end."""
        if batch_idx in self._calls:
            self._calls[batch_idx]()


def new_strategy(contender: str, period: int, device: Device) -> Strategy | None:
    """A contender's strategy; None is a single device's."""
    if contender == "none":
        return None
    if contender == "ddp":
        return DDPStrategy(**all_ranks(device))
    # The rule samples throughout, so the period keeps its first value.
    rule = period if contender == "constant" else AdaptivePeriod(initial=period, sampling=1.0)
    return ADPSGDStrategy(period=rule, **TRAINED[contender], **all_ranks(device))


def why_not(contender: str) -> str | None:
    """Why a contender cannot take part; None if it can."""
    return unknown_options(TRAINED[contender])


def train(order: Mapping[str, Any], meet: Callable[[], None], device: Device) -> Trained:
    """Train as a contender on the calling rank."""
    recipe, period = Recipe(**order["recipe"]), order["period"]
    warmup = WARMUP_PERIODS * period
    steps = recipe.steps - warmup
    rounds, stretch = Rounds(), local_step.Stretches(device, steps, 1, meet, warmup=warmup)
    peaks: list[int] = []
    callbacks: list[Callback] = [stretch, rounds]
    if device.is_cuda:
        reset = partial(torch.cuda.reset_peak_memory_stats, device.torch)
        note = partial(torch.cuda.max_memory_allocated, device.torch)
        callbacks.insert(0, Watch(warmup, steps, reset, lambda: peaks.append(note())))
    torch.manual_seed(recipe.seed + dist.get_rank())
    images = torch.randn(recipe.batch_size, 3, 32, 32, device=device.torch)
    labels = torch.randint(training.CLASSES, (recipe.batch_size,), device=device.torch)
    trainer = new_device_trainer(new_strategy(order["contender"], period, device), device, *callbacks)
    trainer.fit(training.Task(recipe), Batches((images, labels), recipe.steps))
    timed = rounds.between(warmup, recipe.steps)
    return Trained(stretch.timings[0], len(timed), sum(each.sent_bytes for each in timed), peaks[0] if peaks else None)


# The trace


class SyncWatch:
    """Records what makes the host wait for the device: calls that the profiler sees, and PyTorch's own warnings."""

    def __init__(self, device: Device) -> None:
        self.warnings: list[str] = []  # the caller of each synchronizing operation
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
        self._profile = profile(activities=activities)
        self._device = device
        self._entered = ExitStack()

    def begin(self) -> None:
        """Begin."""
        self._device.finish()
        self._profile.start()
        self._entered.enter_context(record_function(WATCHED))
        if self._device.is_cuda:
            self._entered.enter_context(self._warnings_kept())

    def end(self) -> None:
        """End."""
        self._entered.close()
        self._profile.stop()

    def counts(self) -> dict[str, int]:
        """How often each call that waits or reads back was made; those that were not made are left out."""
        events = self._profile.events()
        # Before and after these steps the profiler itself waits for the device.
        on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        span = next(event.time_range for event in on_host if event.name == WATCHED)
        return dict(
            count_synchronizing(event.name for event in events if span.start <= event.time_range.start < span.end)
        )

    def export(self, file: Path) -> None:
        """Write the trace for chrome://tracing."""
        self._profile.export_chrome_trace(str(file))

    @contextmanager
    def _warnings_kept(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def _note(self, message: Warning | str, *_: Any) -> None:
        if WARNING in str(message):
            self.warnings.append(_called_from(traceback.extract_stack()[:-1]))


def count_synchronizing(names: Iterable[str]) -> Counter:
    """How often each name of a call that waits or reads back occurs."""
    return Counter(
        COPY_TO_HOST if name.startswith(COPY_TO_HOST) else name
        for name in names
        if name in SYNCHRONIZING or name.startswith(COPY_TO_HOST)
    )


def _called_from(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frames, and the innermost one of this package if it is not among them."""
    ours = [frame for frame in stack if "lightning_adpsgd" in Path(frame.filename).parts][-1:]
    frames = [*(frame for frame in ours if frame not in stack[-3:]), *stack[-3:]]
    return " > ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames)


class ReadBack(Callback):
    """Reads the loss back after each step, which makes the host wait."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Wait for the device."""
        outputs["loss"].item()


def trace(order: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """Watch a contender's local steps on the calling rank."""
    watch, steps = SyncWatch(device), order["steps"]
    callbacks = [Watch(local_step.WARMUP_STEPS, steps, watch.begin, watch.end)]
    if order["contender"] == "control":
        callbacks.insert(0, ReadBack())
    batch = local_step.new_batch("few").to(device.torch)
    trainer = new_device_trainer(local_step.new_strategy(order["contender"], device), device, *callbacks)
    trainer.fit(local_step.Task(local_step.new_network("few")), Batches(batch, local_step.WARMUP_STEPS + steps + 1))
    if order["folder"] is not None and dist.get_rank() == 0:
        watch.export(Path(order["folder"]) / f"{order['contender']}.json")
    return {"counts": watch.counts(), "warnings": watch.warnings}


# Arithmetic


def training_rows(turns: Mapping[str, Sequence[Sequence[Trained]]], steps: int) -> list[dict[str, Any]]:
    """One row of numbers per contender, from the answers of all ranks in each turn."""
    seconds = {
        contender: [max(each.timing.seconds for each in answers) / steps for answers in runs]
        for contender, runs in turns.items()
    }
    rows = []
    for contender, runs in turns.items():
        answers = [each for run in runs for each in run]
        peaks = [each.peak_bytes for each in answers if each.peak_bytes is not None]
        on_device = [each.timing.device_seconds for each in answers if each.timing.device_seconds is not None]
        rows.append(
            {
                "part": "training",
                "contender": contender,
                "steps": steps,
                "step_seconds": median(seconds[contender]),
                "device_step_seconds": median(on_device) / steps if on_device else None,
                "speed_vs_none": speed(seconds.get("none"), seconds[contender]),
                "speed_vs_ddp": speed(seconds.get("ddp"), seconds[contender]),
                "rounds": median([each.rounds for each in answers]),
                "sent_bytes": median([each.sent_bytes for each in answers]),
                "peak_bytes": max(peaks) if peaks else None,
                "turns": seconds[contender],
            }
        )
    return rows


def trace_rows(traced: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """One row per contender and rank: what made the host wait in the watched steps."""
    return [
        {"part": "trace", "contender": contender, "rank": rank, "steps": steps, **answer}
        for contender, answers in traced.items()
        for rank, answer in enumerate(answers)
    ]


def calls(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of :func:`trace_rows` as rows of the table: one per kind of call."""
    reported = {"reported by PyTorch": len(row["warnings"])} if row["warnings"] else {}
    counts = {**row["counts"], **reported} or {"none": 0}
    return [{**row, "call": call, "count": count} for call, count in sorted(counts.items())]


def complaints(rows: Sequence[Mapping[str, Any]], on_cuda: bool) -> list[str]:
    """What is not as claimed in the trace; empty if all is. On a CPU, PyTorch reports no synchronizing operations."""
    found = []
    by_rank = {(row["contender"], row["rank"]): row for row in rows}
    for rank in sorted({row["rank"] for row in rows}):
        single, adpsgd, control = (by_rank[contender, rank] for contender in TRACED)
        for call, count in sorted(adpsgd["counts"].items()):
            if count > single["counts"].get(call, 0):
                found.append(
                    f"Rank {rank}: {call} was called {count} times in {adpsgd['steps']} local steps, and"
                    f" {single['counts'].get(call, 0)} times in as many steps of a single device."
                )
        if len(adpsgd["warnings"]) > len(single["warnings"]):
            places = "; ".join(f"{count} x {place}" for place, count in Counter(adpsgd["warnings"]).most_common(5))
            found.append(f"Rank {rank}: local steps make the host wait for the device: {places}.")
        seen, reported = control["counts"].get(READ_BACK, 0), len(control["warnings"])
        if seen < control["steps"] or (on_cuda and reported < control["steps"]):
            found.append(
                f"Rank {rank}: a loss was read back in each of {control['steps']} steps, but the profiler saw {seen}"
                f" and PyTorch reported {reported}. The measurement is blind: it cannot show that there is no"
                " synchronization."
            )
    return found


# The measurement


def measure_training(started: Ranks, common: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with the contenders in turn."""
    steps = math.ceil(options.steps / options.period) * options.period
    recipe = Recipe(
        model="mlp",
        parameters=options.training_parameters,
        batch_size=options.batch_size,
        learning_rate=0.01,
        seed=0,
        steps=WARMUP_PERIODS * options.period + steps,
    )
    contenders = [contender for contender in TRAINED if why_not(contender) is None]
    taken: dict[str, list[list[Trained]]] = {contender: [] for contender in contenders}
    for turn, contender in turns(contenders, 1 + options.turns):  # the first turn imports and compiles
        order = {**common, "contender": contender, "recipe": vars(recipe), "period": options.period}
        answers = [Trained(Timing(*timing), *rest) for timing, *rest in started.run(order)]
        if turn > 0:
            taken[contender].append(answers)
            say(f"training: turn {turn} of {options.turns}: {contender}")
    return training_rows(taken, steps)


def measure_trace(started: Ranks, common: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Watch local steps."""
    kept_in = None if options.traces is None else str(options.traces.absolute())
    traced = {}
    for contender in TRACED:
        say(f"trace: {contender}")
        order = {**common, "contender": contender, "steps": options.steps, "folder": kept_in}
        started.run(order)  # the profiler's first steps differ from later ones
        traced[contender] = started.run(order)
    return trace_rows(traced, options.steps)


def carry_out(order: Mapping[str, Any], parent: Parent) -> Any:
    """Carry out an order on the calling rank."""
    device = Device(order["device"])
    if device.is_cuda:
        torch.cuda.set_device(device.torch)
    if order["part"] == "local-step":
        return local_step.carry_out(order, parent)
    if order["part"] == "round":
        return averaging_round.carry_out(order, parent)
    connect(order["backend"])
    return train(order, parent.meet, device) if order["part"] == "training" else trace(order, device)


# The command


def _measure_and_print(options: argparse.Namespace) -> int:
    _require(options)
    rows = measure(options)
    found = complaints([row for row in rows if row["part"] == "trace"], on_cuda=not options.rehearse)
    print(_page(rows, options, found))
    if options.json is not None:
        given = settings(options, "traces") | {"device": _device_name(options), "found": found}
        write_json(options.json, "gpu", given, rows)
    return NOT_AS_CLAIMED if found else 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all parts that were asked for."""
    rows: list[dict[str, Any]] = []

    def add(part: str, measured: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
        if part in options.parts:
            common = {"part": part, "device": "cpu" if options.rehearse else DEVICE, "backend": options.backend}
            rows.extend({"part": part, **row} for row in measured(common))

    if "local-step" in options.parts:
        with local_ranks(local_step.processes(options), "benchmarks.gpu") as started:
            add("local-step", lambda common: local_step.measure(started, local_step.MODELS, options, common))
    if {*options.parts} - {"local-step"}:
        cases, turns = averaging_round.cases(options), options.turns
        with local_ranks(options.ranks, "benchmarks.gpu") as started:
            add("training", lambda common: measure_training(started, common, options))
            add("trace", lambda common: measure_trace(started, common, options))
            # Last, because it measures memory last.
            add("round", lambda common: averaging_round.measure(started, options.backend, cases, turns, common=common))
    return rows


def _require(options: argparse.Namespace) -> None:
    if options.rehearse:
        return
    if not torch.cuda.is_available():
        raise NotMeasuredError(
            f"PyTorch {torch.__version__} sees no CUDA device. This needs an NVIDIA GPU, its driver, and a PyTorch that"
            " is built for CUDA. To check without a GPU whether everything works: --rehearse."
        )
    if options.backend == "nccl" and not dist.is_nccl_available():
        raise NotMeasuredError(f"PyTorch {torch.__version__} is built without NCCL. Leave out --backend nccl.")


def _device_name(options: argparse.Namespace) -> str:
    return "cpu" if options.rehearse else torch.cuda.get_device_name(DEVICE)


def _page(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, found: Sequence[str]) -> str:
    columns = {"local-step": local_step.COLUMNS, "round": averaging_round.COLUMNS, "training": TRAINING_COLUMNS}
    text = [f"{options.ranks} ranks on one {_device_name(options)}, {options.backend}"]
    for part in PARTS:
        of_part = [row for row in rows if row["part"] == part]
        if part == "trace" and of_part:
            text.append(table([call for row in of_part for call in calls(row)], TRACE_COLUMNS))
            fine = "A local step makes the host wait no more often than a single device's step."
            text.append("\n".join(found or [fine]))
        elif of_part:
            text.append(table(of_part, columns[part]))
        if part == "training" and of_part:
            text += [f"left out: {name}: {reason}" for name in TRAINED if (reason := why_not(name)) is not None]
    return "\n\n".join(text)


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser(
        "benchmarks.gpu", "Measure local steps, averaging rounds and training of several ranks on one CUDA device."
    )
    add, parts, parameters = parser.add_argument, several(one_of(PARTS)), number(training.FEWEST_PARAMETERS)
    add("--parts", type=parts, default=[*PARTS], metavar="A,B", help=f"of {', '.join(PARTS)} (all)")
    add("--ranks", type=number(2, 64), default=2, metavar="N", help="processes on the device (2)")
    add("--backend", choices=BACKENDS, default="gloo", help="of the process group (gloo)")
    add("--turns", type=number(1), default=15, metavar="N", help="of each contender, timed (15)")
    local_step.add_turn_arguments(parser)
    averaging_round.add_case_arguments(parser)
    add("--training-parameters", type=parameters, default=10**7, metavar="N", help="training: of the model (10000000)")
    add("--batch-size", type=number(1), default=256, metavar="N", help="training: per rank (256)")
    add("--period", type=number(2), default=8, metavar="P", help="training: steps between two rounds (8)")
    add("--steps", type=number(1), default=64, metavar="N", help="training: timed; trace: watched (64)")
    add("--traces", type=folder, metavar="DIR", help="trace: keep the traces in this folder")
    add("--rehearse", action="store_true", help="run everything on the CPU")
    options = parser.parse_args(arguments)
    averaging_round.check_cases(parser, options)
    if options.rehearse and options.backend == "nccl":
        parser.error("--rehearse --backend nccl: NCCL is for GPUs only; leave one of them out.")
    return options


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
