"""What does a round without faults of `ElasticLocalSGD` cost beyond one of `LocalSGD`? Both take turns.

    .venv/bin/python -m benchmarks.elastic [--workers 2,4] [--parameters 0.01,1] [--turns 30] [--json FILE]

Both contenders run in the same processes, over gloo and this machine's loopback; each worker computes with one thread,
and torchft's lighthouse is another process. A turn is `average("period")`, after a local step that has moved every
parameter by a different amount on each worker. Turns alternate (A B A B), after two untimed ones of each. Before each,
all workers wait for each other without using the network; it takes from the last worker's start to the last one's end.

Before that, the last worker leaves and joins again, `--joins` times: how long does a round in which one joins take the
others, from their start to their end? The state that it receives are the parameters, 4 bytes each.

The ratio is that of the medians, and the range the 95 % confidence interval of the median ratio within a turn. CPU is
the processor time of all threads of a worker, the backend's and torchft's included: the mean over the workers. Where
there are fewer processors than workers, what a round computes is what it takes.

The exit code is 0, or 2 if nothing could be measured.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.frame.command import Arguments, new_main, new_parser, number, say, settings, several
from benchmarks.frame.connection import connect
from benchmarks.frame.device import Device, Timing
from benchmarks.frame.lighthouse import lighthouse
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, local_ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, interval, table
from benchmarks.frame.trainer import NEVER
from benchmarks.frame.turns import median, median_interval, ratios, turns
from lightning_adpsgd import LocalSGD
from lightning_adpsgd.elastic import ElasticLocalSGD

CONTENDERS = ("LocalSGD", "ElasticLocalSGD")
WARMUP_TURNS = 2
HEARTBEAT_MS = 5000  # a machine that is busy must not look dead

COLUMNS = (
    Column("workers", "workers", "d"),
    Column("parameters", "parameters", ","),
    Column("LocalSGD [ms]", "plain_seconds", ".2f", 1e3),
    Column("its CPU [ms]", "plain_cpu_seconds", ".2f", 1e3),
    Column("elastic [ms]", "elastic_seconds", ".2f", 1e3),
    Column("elastic CPU [ms]", "elastic_cpu_seconds", ".2f", 1e3),
    Column("extra [ms]", "extra_seconds", "+.2f", 1e3),
    Column("ratio", "ratio", ".3f"),
    Column("95 %", interval("ratio_interval", ".3f")),
    Column("one joins [ms]", "joining_seconds", ".1f", 1e3),
)


class Case(NamedTuple):
    """What is averaged."""

    parameters: int
    tensors: int


# On each worker


class Subject:
    """A model of one contender, of ``case.tensors`` parameters of nearly equal size."""

    def __init__(self, case: Case, worker: int, address: str | None) -> None:
        ends = [case.parameters * place // case.tensors for place in range(case.tensors + 1)]
        self._parameters = [nn.Parameter(torch.full((end - begin,), 0.1)) for begin, end in itertools.pairwise(ends)]
        self._drift = 1e-3 * (1 + worker)
        optimizer = torch.optim.SGD(self._parameters, lr=0.1)
        self._local_sgd = (
            LocalSGD(optimizer, NEVER)
            if address is None
            else ElasticLocalSGD(
                optimizer,
                NEVER,
                lighthouse=address,
                worker_id=f"w{worker}",
                hostname="localhost",
                start_workers=int(os.environ["WORLD_SIZE"]),
            )
        )

    def start(self) -> None:
        """Start from the first worker's values."""
        self._local_sgd.broadcast()

    def prepare(self) -> None:
        """Take a local step."""
        torch._foreach_add_([parameter.data for parameter in self._parameters], self._drift)
        self._local_sgd.step()

    def average(self) -> None:
        """Run a round."""
        assert self._local_sgd.average("period") is not None

    def close(self) -> None:
        """Leave."""
        self._local_sgd.close()


def take_turns(case: Case, count: int, joins: int, address: str, meet: Callable[[], None]) -> dict[str, list[Timing]]:
    """Time both contenders in turn on the calling worker."""
    worker, device = int(os.environ["RANK"]), Device()
    elastic = Subject(case, worker, address)  # before there is a process group, which it refuses
    elastic.start()
    joined = []
    for _ in range(joins):
        meet()
        if worker == int(os.environ["WORLD_SIZE"]) - 1:
            elastic.close()
            time.sleep(1.2e-3 * HEARTBEAT_MS)  # until then the others would wait for the one that has left
            elastic = Subject(case, worker, address)
            meet()
            elastic.start()
        else:
            elastic.prepare()
            meet()
            joined.append(device.time(elastic.average))
    connect("gloo")
    plain = Subject(case, worker, None)
    plain.start()
    subjects = dict(zip(CONTENDERS, (plain, elastic), strict=True))
    timings: dict[str, list[Timing]] = {contender: [] for contender in CONTENDERS}
    for turn, contender in turns(CONTENDERS, WARMUP_TURNS + count):
        subjects[contender].prepare()
        meet()
        timing = device.time(subjects[contender].average)
        if turn >= WARMUP_TURNS:
            timings[contender].append(timing)
    meet()  # whoever leaves early holds up nobody
    elastic.close()
    dist.destroy_process_group()
    return {**timings, "joined": joined}


def carry_out(order: Mapping[str, Any], parent: Parent) -> Any:
    """Carry out an order on the calling worker."""
    return take_turns(Case(*order["case"]), order["turns"], order["joins"], order["lighthouse"], parent.meet)


# Arithmetic


def as_row(workers: int, case: Case, answers: Sequence[Mapping[str, Sequence[Sequence[Any]]]]) -> dict[str, Any]:
    """All numbers of one case, from the answers of all workers by :func:`take_turns`."""
    wall, cpu = [], []
    for contender in CONTENDERS:
        by_turn = [
            [Timing(*timing) for timing in turn] for turn in zip(*(each[contender] for each in answers), strict=True)
        ]
        wall.append([max(t.ended for t in turn) - max(t.began for t in turn) for turn in by_turn])
        cpu.append([statistics.fmean(t.cpu_seconds for t in turn) for turn in by_turn])
    plain, elastic = map(median, wall)
    joined = [
        max(t.ended for t in turn) - min(t.began for t in turn)
        for turn in (
            [Timing(*timing) for timing in turn] for turn in zip(*(a["joined"] for a in answers[:-1]), strict=True)
        )
    ]
    return {
        "workers": workers,
        **case._asdict(),
        "plain_seconds": plain,
        "elastic_seconds": elastic,
        "plain_cpu_seconds": median(cpu[0]),
        "elastic_cpu_seconds": median(cpu[1]),
        "extra_seconds": elastic - plain,
        "ratio": elastic / plain,
        "ratio_interval": median_interval(ratios(wall[1], wall[0])),
        "joining_seconds": median(joined),
        "turns": {"plain_seconds": wall[0], "elastic_seconds": wall[1], "joining_seconds": joined},
    }


# The measurement


def measure(started: Ranks, address: str, workers: int, case: Case, count: int, joins: int) -> dict[str, Any]:
    """Measure a case on ranks that carry out orders with :func:`carry_out`."""
    say(f"{workers} workers, {case.parameters:,} parameters")
    return as_row(workers, case, started.run({"case": case, "turns": count, "joins": joins, "lighthouse": address}))


def _measure_and_print(options: argparse.Namespace) -> int:
    rows = []
    for workers in options.workers:
        with lighthouse(HEARTBEAT_MS, workers) as address, local_ranks(workers, "benchmarks.elastic") as started:
            for millions in options.parameters:
                case = Case(round(millions * 1e6), options.tensors)
                rows.append(measure(started, address, workers, case, options.turns, options.joins))
    print(f"{options.tensors} tensors; {options.turns} turns, {options.joins} joins\n\n{table(rows, COLUMNS)}")
    if options.json is not None:
        write_json(options.json, "elastic", settings(options), rows)
    return 0


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.elastic", (__doc__ or "").splitlines()[0])
    add, parameters = parser.add_argument, several(number(1e-6, 10**4, float))
    add("--workers", type=several(number(2, 250)), default=[2, 4], metavar="N,N", help="processes (2,4)")
    add("--parameters", type=parameters, default=[0.01, 1.0], metavar="M,M", help="of the model, in millions (0.01,1)")
    add("--tensors", type=number(1, 10**6), default=8, metavar="N", help="that hold the parameters (8)")
    add("--turns", type=number(1), default=30, metavar="N", help="of each contender, timed (30)")
    add("--joins", type=number(1), default=3, metavar="N", help="of the last worker, timed (3)")
    options = parser.parse_args(arguments)
    if options.tensors > round(min(options.parameters) * 1e6):
        parser.error(f"--tensors {options.tensors}: expected at most as many as there are --parameters.")
    return options


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
