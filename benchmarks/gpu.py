"""What do local steps, rounds and training cost on a GPU? Several ranks on one CUDA device.

    .venv/bin/python -m benchmarks.gpu [--parts local-step,round,training,trace] [--backend nccl] [--json FILE]

One GPU stands for several: each rank is a process of its own on it, and they talk over this machine's loopback. With
gloo, which copies to the host and back; or with NCCL over sockets, which takes each rank for a host of its own. Either
is far slower than NVLink, and ranks that compute at the same time share the GPU: what is measured here is what the
package does on a device, not how fast a cluster would be.

The parts
---------
- local-step: as in `local_step.py`, with the model on the GPU.
- round: as in `round.py`, with the model on the GPU. Extra memory is PyTorch's on the GPU; what the host takes beside
  it (gloo's copies) is in the JSON file.
- training: the multilayer perceptron of `link.py` under no communication, DDP, a constant period and `adpsgd` with its
  options. Shown are medians over `--turns` turns (A B C A B C): the time per step, and what it is to that of `none` and
  `ddp` in the same turn; rounds and bytes sent in the timed steps; and the most memory that PyTorch took in them.
- trace: whether the host waits for the device in a local step. PyTorch's profiler records `--steps` of them, and all
  calls are counted that synchronize or read a value back (cudaStreamSynchronize, copies to the host, aten::item and the
  like). Of the same steps PyTorch itself is asked to tell of each synchronizing operation, and from where it was called
  (`torch.cuda.set_sync_debug_mode`). There must be no more of them than with Lightning's single device; `control` reads
  a loss back at each step, and has to be seen. With `--traces` the first rank's traces are kept, for chrome://tracing.

Times are those of the host, which waits for the device before and after; the JSON file also has those between two CUDA
events. `--rehearse` goes through all of it on the CPU, where its numbers mean nothing, to see whether it works.

The exit code is 0; 1 if a local step makes the host wait; 2 if nothing could be measured.
"""

import argparse
import inspect
import math
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import local_step, report, training
from benchmarks import round as averaging_round
from benchmarks.local_step import Batches, Stretches, all_ranks, new_trainer
from benchmarks.machine import Device, Timing, connect, free_port, this_machine
from benchmarks.ranks import Parent, RankFailedError, Ranks, ranks, serve
from benchmarks.training import Recipe
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingRound

PARTS = ("local-step", "round", "training", "trace")
BACKENDS = ("gloo", "nccl")
DEVICE = "cuda:0"
COMMAND = ["-m", "benchmarks.gpu", "--rank-process"]

TRAINED = {
    "none": None,
    "ddp": None,
    "constant": {},
    "adpsgd": {},
    "adpsgd-overlap": {"overlap": 1},
    "adpsgd-stagger": {"stagger": True},
    "adpsgd-stagger-overlap": {"stagger": True, "overlap": 1},
    "adpsgd-bf16": {"reduce_dtype": "bf16"},
}
"""The contenders of the training, and the options of those that are this package's."""

TRACED = ("single", "adpsgd", "control")
WARMUP_PERIODS = 2
SYNCHRONIZING = (
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",  # the one that is waited for; others are cudaMemcpyAsync
    "cudaStreamSynchronize",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
)
COPY_TO_HOST = "Memcpy DtoH"
WATCHED = "watched steps"
WARNING = "called a synchronizing CUDA operation"

TRAINING_COLUMNS = ("contender", "step [ms]", "vs none", "vs ddp", "rounds", "sent [MB]", "peak memory")
TRACE_COLUMNS = ("contender", "rank", "steps", "call", "count")


class Unavailable(RuntimeError):
    """What is asked for cannot be measured here."""


# Training


class Trained(NamedTuple):
    """A contender's timed steps on one rank."""

    timing: Timing
    rounds: int
    sent_bytes: int
    peak_bytes: int | None
    """What PyTorch took on the GPU at most; None on a CPU."""


class Watch(Callback):
    """Has something begin at the end of one step, and end at the end of a later one.

    Args:
        warmup: steps before, at least one.
        steps: steps between.
        begin: called at the beginning.
        end: called at the end.
    """

    def __init__(self, warmup: int, steps: int, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self._calls = {warmup - 1: begin, warmup + steps - 1: end}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin or end."""
        if batch_idx in self._calls:
            self._calls[batch_idx]()


class Rounds(Callback):
    """Notes down the averaging rounds of a fit."""

    def __init__(self) -> None:
        self.noted: list[AveragingRound] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Be told of rounds, if there are any."""
        if isinstance(trainer.strategy, ADPSGDStrategy):
            trainer.strategy.subscribe(self.noted.append)

    def between(self, first: int, last: int) -> list[AveragingRound]:
        """Those that a period asked for after steps ``first`` + 1 to ``last``."""
        return [each for each in self.noted if each.trigger == "period" and first < each.step <= last]


def new_strategy(contender: str, period: int, device: Device) -> Strategy | None:
    """A contender's strategy; None is a single device's."""
    if contender == "none":
        return None
    if contender == "ddp":
        return DDPStrategy(**all_ranks(device))
    # While it samples, which is throughout, the period stays what it was at first.
    rule = period if contender == "constant" else AdaptivePeriod(initial=period, sampling=1.0)
    return ADPSGDStrategy(period=rule, **TRAINED[contender], **all_ranks(device))


def why_not(contender: str) -> str | None:
    """Why a contender cannot take part; None if it can."""
    known = inspect.signature(ADPSGDStrategy).parameters
    unknown = [f"{name}={value!r}" for name, value in (TRAINED[contender] or {}).items() if name not in known]
    return f"this version of lightning_adpsgd does not have {', '.join(unknown)}" if unknown else None


def train(order: Mapping[str, Any], meet: Callable[[], None], device: Device) -> Trained:
    """Train as a contender on the calling rank."""
    recipe, period = Recipe(**order["recipe"]), order["period"]
    warmup = WARMUP_PERIODS * period
    steps = recipe.steps - warmup
    rounds, stretch = Rounds(), Stretches(device, steps, 1, meet, warmup=warmup)
    peaks: list[int] = []
    memory = Watch(warmup, steps, *_peak_memory(device, peaks.append))
    torch.manual_seed(recipe.seed + dist.get_rank())
    images = torch.randn(recipe.batch_size, 3, 32, 32, device=device.torch)
    labels = torch.randint(training.CLASSES, (recipe.batch_size,), device=device.torch)
    trainer = new_trainer(new_strategy(order["contender"], period, device), device, memory, stretch, rounds)
    trainer.fit(training.Task(recipe), Batches((images, labels), recipe.steps))
    timed = rounds.between(warmup, recipe.steps)
    return Trained(stretch.timings[0], len(timed), sum(each.sent_bytes for each in timed), peaks[0] if peaks else None)


def _peak_memory(device: Device, note: Callable[[int], None]) -> tuple[Callable[[], None], Callable[[], None]]:
    if not device.is_cuda:
        return (lambda: None), (lambda: None)
    return (
        lambda: torch.cuda.reset_peak_memory_stats(device.torch),
        lambda: note(torch.cuda.max_memory_allocated(device.torch)),
    )


# The trace


class SyncWatch:
    """Notes down what makes the host wait for the device: calls that the profiler sees, and PyTorch's own warnings.

    Args:
        device: the device.
    """

    def __init__(self, device: Device) -> None:
        self.warnings: list[str] = []
        """From where each synchronizing operation was called."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
        self._profile = profile(activities=activities)
        self._device = device
        self._entered = ExitStack()

    def begin(self) -> None:
        """From here."""
        self._device.finish()
        self._profile.start()
        self._entered.enter_context(record_function(WATCHED))
        if self._device.is_cuda:
            self._entered.enter_context(self._telling())

    def end(self) -> None:
        """To here."""
        self._entered.close()
        self._profile.stop()

    def counts(self) -> dict[str, int]:
        """How often each call was made that waits or reads back; those that were not made are left out."""
        events = self._profile.events()
        # The profiler waits for the device as well, before and after.
        on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
        span = next(event.time_range for event in on_host if event.name == WATCHED)
        return dict(
            count_synchronizing(event.name for event in events if span.start <= event.time_range.start < span.end)
        )

    def export(self, file: Path) -> None:
        """Write the trace for chrome://tracing."""
        self._profile.export_chrome_trace(str(file))

    @contextmanager
    def _telling(self) -> Iterator[None]:
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


def count_synchronizing(names: Iterator[str]) -> Counter:
    """How often each name occurs that is a call which waits or reads back."""
    return Counter(
        COPY_TO_HOST if name.startswith(COPY_TO_HOST) else name
        for name in names
        if name in SYNCHRONIZING or name.startswith(COPY_TO_HOST)
    )


def _called_from(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frames, and the innermost of this package if it is none of these."""
    ours = [frame for frame in stack if "lightning_adpsgd" in Path(frame.filename).parts][-1:]
    frames = [*(frame for frame in ours if frame not in stack[-3:]), *stack[-3:]]
    return " > ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames)


class ReadBack(Callback):
    """Reads the loss back after each step, as one should not."""

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
    trainer = new_trainer(local_step.new_strategy(order["contender"], device), device, *callbacks)
    trainer.fit(local_step.Task(local_step.new_network("few")), Batches(batch, local_step.WARMUP_STEPS + steps + 1))
    if order["folder"] is not None and dist.get_rank() == 0:
        watch.export(Path(order["folder"]) / f"{order['contender']}.json")
    return {"counts": watch.counts(), "warnings": watch.warnings}


# Arithmetic


def training_rows(turns: Mapping[str, Sequence[Sequence[Trained]]], steps: int) -> list[dict[str, Any]]:
    """One row of numbers per contender.

    Args:
        turns: of each contender, for each turn what all ranks have answered.
        steps: that were timed.
    """
    seconds = {
        contender: [max(each.timing.ended - each.timing.began for each in answers) / steps for answers in runs]
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
                "step_seconds": report.median(seconds[contender]),
                "device_step_seconds": report.median(on_device) / steps if on_device else None,
                "speed_vs_none": _speed(seconds.get("none"), seconds[contender]),
                "speed_vs_ddp": _speed(seconds.get("ddp"), seconds[contender]),
                "rounds": report.median([each.rounds for each in answers]),
                "sent_bytes": report.median([each.sent_bytes for each in answers]),
                "peak_bytes": max(peaks) if peaks else None,
                "turns": seconds[contender],
            }
        )
    return rows


def _speed(reference: Sequence[float] | None, mine: Sequence[float]) -> float | None:
    if reference is None:
        return None
    return report.median([other / each for other, each in zip(reference, mine, strict=True)])


def readable_training(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of numbers as a row of the table."""
    averages = row["contender"] not in ("none", "ddp")
    return {
        "contender": row["contender"],
        "step [ms]": f"{1e3 * row['step_seconds']:.3f}",
        "vs none": "" if row["speed_vs_none"] is None else f"{row['speed_vs_none']:.3f}",
        "vs ddp": "" if row["speed_vs_ddp"] is None else f"{row['speed_vs_ddp']:.2f}",
        "rounds": f"{row['rounds']:.0f}" if averages else "",
        "sent [MB]": f"{row['sent_bytes'] / 1e6:.2f}" if averages else "",
        "peak memory": "" if row["peak_bytes"] is None else report.bytes_readable(row["peak_bytes"]),
    }


def trace_rows(traced: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """One row per contender and rank: what made the host wait.

    Args:
        traced: for each contender what all ranks have answered.
        steps: that were watched.
    """
    return [
        {"part": "trace", "contender": contender, "rank": rank, "steps": steps, **answer}
        for contender, answers in traced.items()
        for rank, answer in enumerate(answers)
    ]


def readable_trace(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row of numbers as rows of the table: one per call that was made."""
    where = {"contender": row["contender"], "rank": str(row["rank"]), "steps": str(row["steps"])}
    told = {"told by PyTorch": len(row["warnings"])} if row["warnings"] else {}
    calls = {**row["counts"], **told} or {"none": 0}
    return [where | {"call": call, "count": str(count)} for call, count in sorted(calls.items())]


def complaints(rows: Sequence[Mapping[str, Any]], on_cuda: bool) -> list[str]:
    """What is not as claimed in the trace; nothing if all is.

    Args:
        rows: of :func:`trace_rows`.
        on_cuda: whether PyTorch can tell of synchronizing operations.
    """
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
        seen = control["counts"].get("aten::_local_scalar_dense", 0) >= control["steps"]
        told = len(control["warnings"]) >= control["steps"] or not on_cuda
        if not (seen and told):
            found.append(
                f"Rank {rank}: a loss was read back in each of {control['steps']} steps, but seen in"
                f" {control['counts'].get('aten::_local_scalar_dense', 0)} and told of in {len(control['warnings'])}."
                " The measurement is blind: it cannot show that there is no synchronization."
            )
    return found


# The measurement


def measure_training(
    started: Ranks, common: Mapping[str, Any], contenders: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Let the contenders train in turn."""
    steps = math.ceil(options.steps / options.period) * options.period
    recipe = Recipe(
        model="mlp",
        parameters=options.training_parameters,
        batch_size=options.batch_size,
        learning_rate=0.01,
        seed=0,
        steps=WARMUP_PERIODS * options.period + steps,
    )
    turns: dict[str, list[list[Trained]]] = {contender: [] for contender in contenders}
    for turn, contender in report.turns(contenders, 1 + options.turns):  # the first one imports and compiles
        order = {**common, "contender": contender, "recipe": vars(recipe), "period": options.period}
        answers = [Trained(Timing(*timing), *rest) for timing, *rest in started.run(order)]
        if turn > 0:
            turns[contender].append(answers)
            print(f"training: turn {turn} of {options.turns}: {contender}", file=sys.stderr, flush=True)
    return training_rows(turns, steps)


def measure_trace(started: Ranks, common: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Watch local steps."""
    folder = None if options.traces is None else str(options.traces.absolute())
    traced = {}
    for contender in TRACED:
        print(f"trace: {contender}", file=sys.stderr, flush=True)
        order = {**common, "contender": contender, "steps": options.steps, "folder": folder}
        started.run(order)  # the profiler's first steps are not like the others
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
    connect(order["master_port"], order["backend"])
    return train(order, parent.meet, device) if order["part"] == "training" else trace(order, device)


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
    try:
        _require(options)
        rows = measure(options)
    except (Unavailable, RankFailedError) as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the ranks are ended.", file=sys.stderr)
        return 130
    found = complaints([row for row in rows if row["part"] == "trace"], on_cuda=not options.rehearse)
    print(_page(rows, options, found))
    if options.json is not None:
        hidden = ("json", "traces", "rank_process")
        settings = {name: value for name, value in vars(options).items() if name not in hidden}
        report.write_json(options.json, "gpu", settings | {"device": _device_name(options), "found": found}, rows)
    return 1 if found else 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all parts that were asked for."""
    rows: list[dict[str, Any]] = []
    with this_machine() as cluster:
        if "local-step" in options.parts:
            with ranks(cluster, local_step.processes(options.ranks), COMMAND) as started:
                rows += _measure_local_step(started, _common(options, "local-step"), options)
        if {*options.parts} - {"local-step"}:
            with ranks(cluster, options.ranks, COMMAND) as started:
                if "training" in options.parts:
                    names = [contender for contender in TRAINED if why_not(contender) is None]
                    rows += measure_training(started, _common(options, "training"), names, options)
                if "trace" in options.parts:
                    rows += measure_trace(started, _common(options, "trace"), options)
                if "round" in options.parts:  # at last, because it measures memory at last
                    rows += _measure_rounds(started, _common(options, "round"), options)
    return rows


def _common(options: argparse.Namespace, part: str) -> dict[str, Any]:
    device = "cpu" if options.rehearse else DEVICE
    return {"part": part, "device": device, "backend": options.backend, "master_port": free_port()}


def _measure_local_step(started: Ranks, common: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = local_step.measure(
        started,
        options.ranks,
        local_step.MODELS,
        fits=options.fits,
        turns=options.turns,
        stretch_seconds=options.stretch_seconds,
        common=common,
    )
    return [{"part": "local-step", **row} for row in measured]


def _measure_rounds(started: Ranks, common: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = averaging_round.cases(options)
    measured = averaging_round.measure(started, options.backend, cases, options.turns, common=common)
    return [{"part": "round", **row} for row in measured]


def _require(options: argparse.Namespace) -> None:
    if options.rehearse:
        return
    if not torch.cuda.is_available():
        raise Unavailable(
            f"PyTorch {torch.__version__} sees no CUDA device. This needs an NVIDIA GPU, its driver, and a PyTorch that"
            " is built for CUDA. To see without one whether it works: --rehearse."
        )
    if options.backend == "nccl" and not dist.is_nccl_available():
        raise Unavailable(f"PyTorch {torch.__version__} is built without NCCL. Leave out --backend nccl.")


def _device_name(options: argparse.Namespace) -> str:
    return "cpu" if options.rehearse else torch.cuda.get_device_name(DEVICE)


def _page(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, found: Sequence[str]) -> str:
    def of(part: str) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["part"] == part]

    text = [f"{options.ranks} ranks on one {_device_name(options)}, {options.backend}"]
    if of("local-step"):
        text.append(report.table([local_step.readable(row) for row in of("local-step")], local_step.COLUMNS))
    if of("round"):
        text.append(report.table([averaging_round.readable(row) for row in of("round")], averaging_round.COLUMNS))
    if of("training"):
        text.append(report.table([readable_training(row) for row in of("training")], TRAINING_COLUMNS))
        left_out = {contender: why_not(contender) for contender in TRAINED}
        text += [f"left out: {contender}: {reason}" for contender, reason in left_out.items() if reason is not None]
    if of("trace"):
        calls = [call for row in of("trace") for call in readable_trace(row)]
        text.append(report.table(calls, TRACE_COLUMNS))
        text.append("\n".join(found or ["A local step makes the host wait no more often than a single device's step."]))
    return "\n\n".join(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure local steps, averaging rounds and training of several ranks on one CUDA device.",
    )
    add = parser.add_argument
    add(
        "--parts",
        type=report.several(report.one_of(PARTS)),
        default=[*PARTS],
        metavar="A,B",
        help=f"of {', '.join(PARTS)} (all)",
    )
    add("--ranks", type=report.number(2, 64), default=2, metavar="N", help="processes on the device (2)")
    add("--backend", choices=BACKENDS, default="gloo", help="of the process group (gloo)")
    add("--turns", type=report.number(1), default=15, metavar="N", help="of each contender, timed (15)")
    local_step.add_turn_arguments(parser)
    averaging_round.add_case_arguments(parser)
    add(
        "--training-parameters",
        type=report.number(training.FEWEST_PARAMETERS),
        default=10**7,
        metavar="N",
        help="training: of the model (10000000)",
    )
    add("--batch-size", type=report.number(1), default=256, metavar="N", help="training: per rank (256)")
    add("--period", type=report.number(2), default=8, metavar="P", help="training: steps between two rounds (8)")
    add("--steps", type=report.number(1), default=64, metavar="N", help="training: timed; trace: watched (64)")
    add("--traces", type=_folder, metavar="DIR", help="trace: keep the traces in this folder")
    add("--rehearse", action="store_true", help="go through all of it on the CPU")
    add("--json", type=report.output_file, metavar="FILE", help="write all numbers to this file")
    add("--rank-process", action="store_true", help=argparse.SUPPRESS)  # how ranks are started
    options = parser.parse_args(arguments)
    averaging_round.check_cases(parser, options)
    if options.rehearse and options.backend == "nccl":
        parser.error("--rehearse --backend nccl: NCCL is for GPUs only; leave one of them out.")
    return options


def _folder(given: str) -> Path:
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"{given}: there is no such folder; make it first")
    return Path(given)


if __name__ == "__main__":
    sys.exit(main())
