"""How well does elastic training survive workers that are killed at random and started again, and other faults?

    .venv/bin/python -m benchmarks.survival [--workers 4] [--seconds 120 | --kills 100] [--every 15] [--json FILE]
    sudo .venv/bin/python -m benchmarks.survival --faults kill,stop,cut,lighthouse --contender torchft --seeds 3

Workers train a small network on a regression task with `ElasticLocalSGD` over gloo, each a process of one thread that
sleeps for `--step-ms` in every step, as if it computed. Another process is torchft's lighthouse. Twice the same: first
while faults strike, one at a time, at intervals drawn from an exponential distribution with the mean `--every` seconds
(a Poisson process; the seed decides when, what and whom), and then undisturbed, for as long. No checkpoint is read.

The faults: `kill` ends a worker by SIGKILL, and it is started again after `--pause` seconds; `stop` stops one by
SIGSTOP and continues it after `--away` seconds; `cut` cuts a worker's host off from the network for `--away` seconds;
`lighthouse` kills the lighthouse and starts it again on the same port after `--pause` seconds. With `cut` among them,
the lighthouse and each worker have a host of their own, a network namespace (Linux and root only). A fault waits while
fewer than two other workers are healthy, that is, are not struck and have had a round since they were.

With `--kills N` the runs end after N kills, those of all seeds together; otherwise after `--seconds` each. After the
last fault, all workers may come back before the run ends. With `--seeds N`, all of this N times; the network, its
samples and the faults depend on the seed, the samples of the final loss do not. `--contender torchft` does the same
with torchft's own `LocalSGD`, struck by the same faults at the same intervals (see `contenders.py`).

What is reported, for each kind of fault
----------------------------------------
- survived: faults after which all workers that were there, and were not struck, have had another round together.
- next round: seconds from the fault until the last of them has had it.
- came back: faults whose worker was in a round with others afterwards. A process that was killed is another one then.
- back after: seconds until then from the end of the fault: the new process's start, SIGCONT, or the cable's return. For
  the lighthouse: from its start until a round of all workers.

An own end is a process that has ended by itself, by an error. It is started again like one that was killed.

What is reported beside the goals
---------------------------------
- goodput: optimizer steps that were averaged, per second, as a ratio to the undisturbed runs. Without start: per second
  in which a worker could have trained, from a process's first round to its kill or the end, without the seconds for
  which it was stopped or cut off. With start: per second of the whole run and worker.
- from start to first round: of processes that were started again, imports done.
- final loss: after an average at the end, the mean over workers and seeds. The goal is met if it is not above the
  range of the undisturbed runs over the seeds. These last as long but take more steps, so runs of less than a minute
  or two, in which the loss still falls, miss it for that reason alone.
- processes left: that have not ended within 10 s of being told to, and ports held: sockets of the run's processes that
  are still listened on after all processes have ended.

The exit code is 0; 1 if a fault was not survived, or processes have ended by themselves or were left, or ports are
held (those of the contender do not count; other goals depend on the machine and are only shown); 2 if nothing could be
measured, and 130 after Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.frame.command import (
    NOT_AS_CLAIMED,
    Arguments,
    new_main,
    new_parser,
    number,
    one_of,
    say,
    settings,
    several,
)
from benchmarks.frame.errors import NotMeasuredError
from benchmarks.frame.hosts import Host, hosts, termination_raises
from benchmarks.frame.ranks import this_machine
from benchmarks.frame.results import write_json
from benchmarks.frame.table import table
from benchmarks.survival.contenders import why_not
from benchmarks.survival.faults import KINDS, draws
from benchmarks.survival.log import Log
from benchmarks.survival.report import (
    FAULT_COLUMNS,
    Measure,
    Pair,
    as_json,
    fault_rows,
    measure_table,
    measures,
    reasons,
)
from benchmarks.survival.run import Run
from benchmarks.survival.task import Setup

OURS = "adpsgd"


@contextmanager
def cluster_of(options: argparse.Namespace) -> Iterator[Sequence[Host]]:
    """A host for the lighthouse and one for each worker: of their own if any is cut off, this machine otherwise."""
    count = 1 + options.workers
    if "cut" in options.faults:
        with hosts(count) as cluster:
            yield cluster
    else:
        with termination_raises(), this_machine() as (machine,):
            yield [machine] * count


def run_pair(options: argparse.Namespace, contender: str, seed: int, kills: int | None) -> Pair:
    """A disturbed run, and an undisturbed one that lasts as long."""
    setup = Setup(
        contender,
        options.workers,
        options.period,
        options.step_ms / 1e3,
        options.heartbeat_ms,
        options.timeout,
        seed,
    )

    def is_enough(log: Log) -> bool:
        if kills is not None:
            return sum(fault.kind == "kill" for fault in log.faults) >= kills
        return time.time() >= log.began + options.seconds

    with cluster_of(options) as cluster, Run(setup, cluster, options.pause, options.away) as run:
        run.strike(is_enough, draws(seed, options.every, options.faults, options.workers))
        disturbed = run.end()
    with cluster_of(options) as cluster, Run(setup, cluster, options.pause, options.away) as run:
        run.calm(disturbed.ended - disturbed.began)
        return Pair(run.end(), disturbed)


def _measure_and_print(options: argparse.Namespace) -> int:
    missing = why_not()
    if missing is not None:
        raise NotMeasuredError(missing)
    contenders = [OURS, *([] if options.contender is None else [options.contender])]
    pairs: dict[str, dict[int, Pair]] = {name: {} for name in contenders}
    for place in range(options.seeds):
        seed = options.seed + place
        for name in contenders:
            say(f"{name}, seed {seed} ({1 + place} of {options.seeds})")
            pairs[name][seed] = run_pair(options, name, seed, share(options, place))
    period_seconds = options.period * options.step_ms / 1e3
    found = {name: measures([*runs.values()], options.workers, period_seconds) for name, runs in pairs.items()}
    print(_text(options, pairs, found))
    if options.json is not None:
        rows = [as_json(name, runs, found[name]) for name, runs in pairs.items()]
        write_json(options.json, "survival", settings(options), rows)
    return NOT_AS_CLAIMED if any(each.is_promised and each.met is False for each in found[OURS]) else 0


def share(options: argparse.Namespace, place: int) -> int | None:
    """The kills in the run with one of the seeds, which together are all."""
    if options.kills is None:
        return None
    return options.kills // options.seeds + (place < options.kills % options.seeds)


def _text(options: argparse.Namespace, pairs: dict[str, dict[int, Pair]], found: dict[str, list[Measure]]) -> str:
    rows = [row for name, runs in pairs.items() for row in fault_rows(name, [pair.disturbed for pair in runs.values()])]
    where = "a host each" if "cut" in options.faults else "this machine"
    lines = [
        f"{options.workers} workers ({where}), period {options.period}, steps of {options.step_ms:g} ms, a fault every"
        f" {options.every:g} s ({', '.join(options.faults)}), {options.seeds} seed(s) from {options.seed}",
        "",
        table(rows, FAULT_COLUMNS) if rows else "No fault has struck.",
        "",
        measure_table(found),
    ]
    for name, runs in pairs.items():
        given = reasons(log for pair in runs.values() for log in pair)
        if given:
            lines += ["", f"{name}: processes that ended by themselves, and why:", *(f"  {reason}" for reason in given)]
    return "\n".join(lines)


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.survival", (__doc__ or "").splitlines()[0])
    add, seconds = parser.add_argument, number(0.001, kind=float)
    length = parser.add_mutually_exclusive_group()
    away, kinds = "seconds for which a worker is stopped or cut off (5)", several(one_of(KINDS))
    kills = "end after this many kills, those of all seeds together"
    timeout = "seconds that a quorum and a round may take (20)"
    pause = "seconds until a killed process is started again (1)"
    add("--workers", type=number(3, 200), default=4, metavar="N", help="(4)")
    length.add_argument("--seconds", type=seconds, default=120.0, metavar="T", help="of each run (120)")
    length.add_argument("--kills", type=number(1), metavar="N", help=kills)
    add("--faults", type=kinds, default=["kill"], metavar="A,B", help=f"of {', '.join(KINDS)} (kill)")
    add("--every", type=seconds, default=15.0, metavar="T", help="mean seconds between faults (15)")
    add("--pause", type=seconds, default=1.0, metavar="T", help=pause)
    add("--away", type=seconds, default=5.0, metavar="T", help=away)
    add("--period", type=number(1), default=8, metavar="P", help="steps between two rounds (8)")
    add("--step-ms", type=seconds, default=20.0, metavar="T", help="that a step sleeps (20)")
    add("--heartbeat-ms", type=number(1), default=1000, metavar="T", help="without one, a worker is dead (1000)")
    add("--timeout", type=number(1, 3600, kind=float), default=20.0, metavar="T", help=timeout)
    add("--contender", choices=["torchft"], help="what this package is compared with")
    add("--seeds", type=number(1), default=1, metavar="N", help="runs of each kind (1)")
    add("--seed", type=number(0), default=0, metavar="N", help="the first one (0)")
    options = parser.parse_args(arguments)
    if options.kills is not None and "kill" not in options.faults:
        parser.error(f"--kills {options.kills}: expected kill among the --faults.")
    if options.kills is not None and options.kills < options.seeds:
        parser.error(f"--kills {options.kills}: expected at least one for each of {options.seeds} seeds.")
    return options


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
