"""What does it cost to encode and decode a round, compared with a plain copy and with the time it travels?

    .venv/bin/python -m benchmarks.codec [--numel 25000000] [--workers 2] [--gbit 1] [--turns 9] [--json FILE]

How it is measured
------------------
In one process on one core (`torch.set_num_threads(1)`), without a network: rounds of `--numel` fp32 parameters, bucket
by bucket (16 MiB), as one of `--workers` workers would run them. There are five times per codec:

- encode, decode: `encode_` of everything, which also finds what rounding cuts off, and `add_decoded_` of it, in pieces
  that fit into a cache, as a round does them.
- send, combine, receive: all that `DeltaCodec` does in one worker's round, without the transfer: differences from the
  last average, encoded; this worker's share of all workers' decoded, averaged and encoded again; the new average
  decoded. This worker's own bytes stand for those of the others.

`copy` is `Tensor.copy_` of as many fp32 numbers. GB/s are those of fp32 elements, 4 bytes each; of the whole round,
4 bytes times `--numel` divided by the sum of the three times. The travel time is what a ring takes at `--gbit`:
2 (n − 1) / n times the encoded bytes. Where `work / travel` is below 1, encoding and decoding take less time than
sending, and a pipeline can hide them behind it.

Contenders take turns (`--turns`), and each number is the median over the turns. Times are processor times, which
on an idle machine equal wall time; on a busy one they leave out the time that other processes take.

With `--device cuda` the same is measured on a GPU, between two events in its queue, without pieces. The exit code is 0.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.frame.command import Arguments, new_main, new_parser, number, one_of, settings, several
from benchmarks.frame.device import Device, Stopwatch
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, table
from benchmarks.frame.turns import median, turns
from lightning_adpsgd import AveragingOptions, Codec
from lightning_adpsgd.averaging.codec import PIECE, DeltaCodec
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction, TensorOp

COPY = "copy"
CODECS = ("bf16", "fp16", "int8", "int4")
PARTS = ("encode", "decode", "send", "combine", "receive")
WORK = PARTS[2:]
BUCKET_BYTES = 16 * 2**20
DRIFT = 1e-3  # of a parameter between two rounds

COLUMNS = (
    Column("codec", "codec"),
    Column("bytes / element", "bytes_per_element", ".3f"),
    Column("encode [GB/s]", "gb_per_second.encode", ".2f"),
    Column("decode [GB/s]", "gb_per_second.decode", ".2f"),
    *(Column(f"{part} [ms]", f"seconds.{part}", ".1f", 1e3) for part in WORK),
    Column("round [GB/s]", "gb_per_second.round", ".2f"),
    Column("travel [ms]", "travel_seconds", ".1f", 1e3),
    Column("work / travel", "work_to_travel", ".2f"),
)


class Alone(WorkerGroup):
    """One rank of several workers, the others of which do not exist: its own bytes stand for theirs."""

    def __init__(self, workers: int, device: torch.device) -> None:
        super().__init__(device=device)
        self.size = workers
        self.combine: Callable[[], Tensor] | None = None

    @override
    def exchange(self, rows: Tensor, combine: TensorOp, residuals: Sequence[Tensor], sizes: Sequence[int]) -> Reduction:
        received = rows[:1].expand(self.size, -1).contiguous()
        self.combine = partial(combine, received)
        return Reduction(rows, None)


class Contender(NamedTuple):
    """What is measured."""

    name: str
    bytes_per_element: float
    measure: Callable[[], dict[str, float]]  # seconds by part, of one turn


def contender(name: str, options: argparse.Namespace) -> Contender:
    """A codec, or the copy."""
    device = Device(options.device)
    timed = partial(_timed, device)
    if name == COPY:
        source = torch.randn(options.numel, device=device.torch)
        target = torch.empty_like(source)
        return Contender(name, 4.0, lambda: {COPY: timed(lambda: target.copy_(source))[0]})
    codec = AveragingOptions(reduce_dtype=name).codec
    assert codec is not None
    rounds = _Rounds(codec, options.numel, options.workers, device)
    encoded = codec.encode(torch.zeros(1, codec.block))
    return Contender(name, encoded.numel() / codec.block, rounds.measure)


class _Rounds:
    """Rounds of one worker."""

    def __init__(self, codec: Codec, numel: int, workers: int, device: Device) -> None:
        self._codec, self._device = codec, device
        self._parameters = torch.randn(numel, device=device.torch)
        self._layout = FlatLayout([self._parameters], [0])
        self._group = Alone(workers, device.torch)
        self._delta = DeltaCodec(self._layout, codec, self._group)
        self._delta.start()
        longest = min(numel, BUCKET_BYTES // 4)
        self._buffer = torch.empty(longest, device=device.torch)
        self._drift = DRIFT * torch.randn(longest, device=device.torch)

    def measure(self) -> dict[str, float]:
        """One round; seconds by part."""
        seconds = dict.fromkeys(PARTS, 0.0)

        def timed(part: str, work: Callable[[], Any]) -> Any:
            took, result = _timed(self._device, work)
            seconds[part] += took
            return result

        for bucket in self._layout.cut(BUCKET_BYTES):
            values = self._layout.pack(bucket, self._buffer[: len(bucket)]).add_(self._drift[: len(bucket)])
            _, cut_off = timed("send", partial(self._delta.send, bucket, values, self._group))
            assert self._group.combine is not None
            combined = timed("combine", self._group.combine)
            rows = combined.expand(self._group.size, -1).contiguous()
            timed("receive", partial(self._delta.receive, bucket, rows, cut_off))
            whole = len(bucket) // self._codec.block * self._codec.block
            longest = whole if self._device.is_cuda else PIECE // self._codec.block * self._codec.block
            pieces = self._drift[:whole].clone().split(longest)
            encoded = [self._codec.encode(piece[None]) for piece in pieces]
            timed("encode", partial(_each, self._codec.encode_, pieces, encoded))
            timed("decode", partial(_each, lambda piece, row: self._codec.add_decoded_(row, piece), pieces, encoded))
        return seconds


def _each(work: Callable[[Tensor, Tensor], None], pieces: Sequence[Tensor], encoded: Sequence[Tensor]) -> None:
    for piece, row in zip(pieces, encoded, strict=True):
        work(piece[None], row)


def _timed(device: Device, work: Callable[[], Any]) -> tuple[float, Any]:
    stopwatch = Stopwatch(device)
    stopwatch.start()
    result = work()
    timing = stopwatch.stop()
    return timing.cpu_seconds if timing.device_seconds is None else timing.device_seconds, result


# Arithmetic


def travel_seconds(numel: int, workers: int, bytes_per_element: float, gbit: float) -> float:
    """How long a ring all-reduce of this many encoded elements takes on links of this speed."""
    return 8 * numel * bytes_per_element * 2 * (workers - 1) / workers / (gbit * 1e9)


def as_row(name: str, bytes_per_element: float, taken: Sequence[Mapping[str, float]], options: Any) -> dict[str, Any]:
    """The numbers of a contender, from the seconds by part of each turn."""
    seconds = {part: median(turn[part] for turn in taken) for part in taken[0]}
    gigabytes = 4 * options.numel / 1e9
    row: dict[str, Any] = {"codec": name, "bytes_per_element": bytes_per_element, "seconds": seconds}
    if name == COPY:
        return {**row, "gb_per_second": {"round": gigabytes / seconds[COPY]}, "turns": [*taken]}
    work = median(sum(turn[part] for part in WORK) for turn in taken)
    travel = travel_seconds(options.numel, options.workers, bytes_per_element, options.gbit)
    rates = {part: gigabytes / seconds[part] for part in ("encode", "decode")}
    return {
        **row,
        "gb_per_second": {**rates, "round": gigabytes / work},
        "work_seconds": work,
        "travel_seconds": travel,
        "work_to_travel": work / travel,
        "turns": [*taken],
    }


# The command


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the copy and for each codec."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders = [contender(name, options) for name in (COPY, *options.codecs)]
        taken: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
        for turn, each in turns(contenders, options.turns + 1):
            seconds = each.measure()
            if turn > 0:  # the first one touches memory for the first time
                taken[each.name].append(seconds)
    finally:
        torch.set_num_threads(threads)
    return [as_row(each.name, each.bytes_per_element, taken[each.name], options) for each in contenders]


def _measure_and_print(options: argparse.Namespace) -> int:
    rows = measure(options)
    print(f"{options.numel:,} fp32 parameters, {options.workers} workers, {options.gbit:g} Gbit/s, {options.device}\n")
    print(table(rows, COLUMNS))
    if options.json is not None:
        write_json(options.json, "codec", settings(options), rows)
    return 0


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser(
        "benchmarks.codec", "Compare encoding and decoding of a round with a copy, and with its travel time."
    )
    add = parser.add_argument
    add(
        "--codecs",
        type=several(one_of(CODECS)),
        default=["bf16", "int8", "int4"],
        metavar="A,B",
        help="(bf16,int8,int4)",
    )
    add("--numel", type=number(1024), default=25_000_000, metavar="N", help="parameters (25000000)")
    add("--workers", type=number(2), default=2, metavar="N", help="how many there would be (2)")
    add("--gbit", type=number(1e-6, kind=float), default=1.0, metavar="R", help="of a link, in Gbit/s (1)")
    add("--turns", type=number(1), default=9, metavar="N", help="of each contender (9)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    return parser.parse_args(arguments)


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
