"""How well does elastic training survive workers that are killed at random and started again?

    .venv/bin/python -m benchmarks.survival [--workers 4] [--seconds 120] [--every 15] [--seed 0] [--json FILE]

Workers train a small network on a regression task with `ElasticLocalSGD` over gloo, each a process of one thread that
sleeps for `--step-ms` in every step, as if it computed. Another process is torchft's lighthouse. Twice the same: once
undisturbed, and once while workers are killed by SIGKILL, one at a time, at intervals drawn from an exponential
distribution with the mean `--every` seconds (a Poisson process; the seed decides when and whom). A killed worker is
started again after `--pause` seconds, and joins the others. No checkpoint is read.

What is reported: the kills, and after how many of them the survivors had another round; goodput, which is the optimizer
steps per second of all workers' presence (from a process's first round to its kill or the end) and per second of the
whole run, each as a ratio to the undisturbed run; the median and largest time from a kill to the survivors' next round,
and from the start of a process (imports done) to its first round; the loss of the final average on data of its own, of
both runs; and the processes that were left.

The exit code is 0, 1 if a kill was not survived or a process was left, and 130 after Ctrl-C.
"""

import argparse
import random
import statistics
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import nn

from benchmarks.frame.command import NOT_AS_CLAIMED, Arguments, new_main, new_parser, number, settings
from benchmarks.frame.lighthouse import CONTEXT, lighthouse
from benchmarks.frame.results import write_json

CONTEXT.set_forkserver_preload(["benchmarks.survival", "lightning_adpsgd.elastic", "torchft"])


def samples(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the task."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return x, torch.sin(x.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)


def train(pipe: Connection, worker: int, incarnation: int, address: str, options: argparse.Namespace) -> None:
    """Train until the parent says stop; tell it of every round: when, after how many steps of this process."""
    from lightning_adpsgd.elastic import ElasticLocalSGD

    began = time.time()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    local_sgd = ElasticLocalSGD(
        optimizer,
        options.period,
        module=model,
        lighthouse=address,
        worker_id=f"w{worker}",
        hostname="localhost",
        start_workers=options.workers if incarnation == 0 else 1,
        quorum_timeout=timedelta(seconds=20),
        round_timeout=timedelta(seconds=20),
    )
    taken = 0
    local_sgd.subscribe(lambda record: pipe.send(("round", time.time(), taken, record.step)))
    local_sgd.broadcast()
    pipe.send(("joined", time.time(), began, None))
    while not pipe.poll():
        x, y = samples(hash((options.seed, worker, incarnation, taken)) % 2**31, 32)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        time.sleep(options.step_ms / 1e3)
        taken += 1
        local_sgd.step()
    local_sgd.average()
    with torch.no_grad():
        x, y = samples(options.seed + 10**6, 4096)
        loss = float(nn.functional.mse_loss(model(x), y))
    pipe.send(("ended", time.time(), taken, loss))
    pipe.recv()
    local_sgd.close()


class Run:
    """One run, disturbed or not."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lighthouse = ExitStack()
        self.address = self.lighthouse.enter_context(lighthouse(options.heartbeat_ms))
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, Connection] = {}
        self.incarnations = dict.fromkeys(range(options.workers), -1)
        self.steps: dict[tuple[int, int], int] = {}
        self.present: dict[tuple[int, int], list[float]] = {}  # from the first round to the end
        self.rounds: list[tuple[float, int]] = []  # when, and of which worker
        self.joins: list[float] = []
        self.losses: list[float] = []

    def start(self, worker: int) -> None:
        """Start a worker, or start it again."""
        self.incarnations[worker] += 1
        mine, theirs = CONTEXT.Pipe()
        arguments = (theirs, worker, self.incarnations[worker], self.address, self.options)
        self.processes[worker] = CONTEXT.Process(target=train, args=arguments)
        self.processes[worker].start()
        theirs.close()
        self.pipes[worker] = mine

    def listen(self, seconds: float) -> None:
        """Note what workers tell in that time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            workers = {pipe: worker for worker, pipe in self.pipes.items()}
            for pipe in wait([*workers], timeout=left):
                try:
                    self.note(workers[pipe], *pipe.recv())  # type: ignore[index,union-attr]
                except (EOFError, ConnectionResetError):
                    del self.pipes[workers[pipe]]  # type: ignore[arg-type]
            if not self.pipes:
                time.sleep(0.01)

    def note(self, worker: int, kind: str, when: float, first: Any, second: Any) -> None:
        """Note one message."""
        key = worker, self.incarnations[worker]
        if kind == "joined":
            self.present[key] = [when, when]
            if key[1] > 0:
                self.joins.append(when - first)
        elif kind == "round":
            self.rounds.append((when, worker))
            self.steps[key] = first
            self.present.setdefault(key, [when, when])[1] = when
        else:
            self.steps[key] = first
            self.losses.append(second)

    def end(self) -> int:
        """Stop all workers; return how many processes had to be killed."""
        for pipe in self.pipes.values():
            pipe.send("stop")
        deadline = time.monotonic() + 60
        while len(self.losses) < len(self.pipes) and time.monotonic() < deadline:
            self.listen(0.2)
        for pipe in self.pipes.values():
            pipe.send("close")
        left = 0
        for process in self.processes.values():
            process.join(10)
            if process.is_alive():
                left += 1
                process.kill()
        self.lighthouse.close()
        return left


def measure(options: argparse.Namespace, disturbed: bool) -> dict[str, Any]:
    """One run, in numbers."""
    run = Run(options)
    for worker in range(options.workers):
        run.start(worker)
    while len(run.present) < options.workers:
        run.listen(0.05)
    began = time.time()
    random_ = random.Random(options.seed)
    kills: list[tuple[float, int]] = []
    again: list[tuple[float, int]] = []
    next_kill = began + random_.expovariate(1 / options.every) if disturbed else float("inf")
    while time.time() < began + options.seconds:
        run.listen(0.02)
        now = time.time()
        alive = [worker for worker in run.pipes if (worker, run.incarnations[worker]) in run.present]
        if now >= next_kill and now < began + options.seconds - 5 and len(alive) > 2:
            worker = random_.choice(alive)
            run.processes[worker].kill()
            kills.append((time.time(), worker))
            run.listen(0.02)
            run.pipes.pop(worker, None)
            again.append((now + options.pause, worker))
            next_kill = now + random_.expovariate(1 / options.every)
        while again and again[0][0] <= now:
            run.start(again.pop(0)[1])
    lasted = time.time() - began
    left = run.end()
    gaps = []
    for when, victim in kills:
        later = [at for at, worker in run.rounds if at > when + 0.02 and worker != victim]
        gaps += [min(later) - when] if later else []
    steps = sum(run.steps.values())
    presence = sum(last - first for first, last in run.present.values())
    return {
        "kills": len(kills),
        "survived": len(gaps),
        "steps": steps,
        "steps_per_second": steps / lasted,
        "steps_per_second_of_presence": steps / presence,
        "kill_to_round_seconds": gaps,
        "start_to_first_round_seconds": run.joins,
        "loss": statistics.mean(run.losses) if run.losses else float("nan"),
        "processes_left": left,
    }


def _measure_and_print(options: argparse.Namespace) -> int:
    calm, wild = measure(options, disturbed=False), measure(options, disturbed=True)

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} (at most {max(values):.2f})" if values else "none"

    print(f"kills survived                        {wild['survived']} of {wild['kills']}")
    for name, key in (("of presence", "steps_per_second_of_presence"), ("of the run", "steps_per_second")):
        print(f"goodput per second {name:<18} {wild[key] / calm[key]:.3f}")
    print(f"seconds from a kill to the next round {spread(wild['kill_to_round_seconds'])}")
    print(f"seconds from start to first round     {spread(wild['start_to_first_round_seconds'])}")
    print(f"final loss, disturbed | undisturbed   {wild['loss']:.4f} | {calm['loss']:.4f}")
    print(f"processes left                        {wild['processes_left']} | {calm['processes_left']}")
    if options.json is not None:
        rows = [{"run": "undisturbed", **calm}, {"run": "disturbed", **wild}]
        write_json(options.json, "survival", settings(options), rows)
    return NOT_AS_CLAIMED if wild["survived"] < wild["kills"] or wild["processes_left"] > 0 else 0


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser("benchmarks.survival", (__doc__ or "").splitlines()[0])
    add, seconds = parser.add_argument, number(0.001, kind=float)
    add("--workers", type=number(2), default=4, metavar="N", help="(4)")
    add("--seconds", type=seconds, default=120.0, metavar="T", help="of each of the two runs (120)")
    add("--every", type=seconds, default=15.0, metavar="T", help="mean seconds between kills (15)")
    add("--pause", type=seconds, default=1.0, metavar="T", help="seconds until a killed worker is started again (1)")
    add("--period", type=number(1), default=8, metavar="P", help="steps between two rounds (8)")
    add("--step-ms", type=seconds, default=20.0, metavar="T", help="that a step sleeps (20)")
    add("--heartbeat-ms", type=number(1), default=1000, metavar="T", help="without one, a worker is dead (1000)")
    add("--seed", type=number(0), default=0, metavar="N", help="of the kills (0)")
    return parser.parse_args(arguments)


main = new_main(parse, _measure_and_print)

if __name__ == "__main__":
    sys.exit(main())
