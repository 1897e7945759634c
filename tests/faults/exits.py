"""How processes end that do real work at their exit: the interpreter shuts down as it does for a user's script.

``python -m tests.faults.exits FOLDER CASE …`` runs two ranks for each case, all cases at once, and writes the exit
codes as JSON. ``python -m tests.faults.exits FOLDER "fit*200"`` runs one case 200 times, and prints how often it ended
in which way. Ranks are forked from a process that has imported everything, and leave by its last line.
"""

import atexit
import ctypes
import os
import sys
import time
from pathlib import Path

# What is registered first is called last, after the handlers of every package. Called without any Python code, and
# with the GIL held: a native thread that asks for it meanwhile gets it when the interpreter is shutting down.
HOLD_THE_LOCK = ctypes.c_uint(0)
atexit.register(ctypes.PyDLL(None).usleep, HOLD_THE_LOCK)
atexit.register(lambda: note(f"group {torch.distributed.is_initialized()}") if CHILD else None)
CHILD: list[int] = []

import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
from collections import Counter  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import lightning as L  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (which every rank would otherwise import by itself)
import torch.distributed as dist  # noqa: E402
from lightning.pytorch.utilities.exceptions import SIGTERMException  # noqa: E402

from benchmarks.frame.ranks import free_port  # noqa: E402
from lightning_adpsgd import ADPSGDStrategy  # noqa: E402
from lightning_adpsgd.trainer import lifecycle  # noqa: E402
from tests.pool import announce  # noqa: E402
from tests.training import Classifier, loader  # noqa: E402

AT_ONCE = 2
"""How many runs are in progress at once where one case is run many times."""


def note(text: str) -> None:
    """Write a line for the tests."""
    with open(f"notes.{CHILD[0]}", "a") as file:
        file.write(text + "\n")


class At(L.Callback):
    """Does something after the third step."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self.act()


def train(act: Any = None, devices: int = 2, **options: Any) -> L.Trainer:
    """A short fit."""
    trainer = L.Trainer(
        strategy=ADPSGDStrategy(4, **{"stagger": True, "overlap": 1, **options}),
        accelerator="cpu",
        devices=devices,
        max_steps=9,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[At(act)] if act else [],
    )
    trainer.fit(Classifier(), loader())
    return trainer


def fail() -> None:
    raise ValueError("a bad sample")


def upload() -> None:
    """What a logger does at exit; it takes longer than a hanging process is given."""
    time.sleep(3)
    note("uploaded")


def in_a_hurry() -> None:
    """Shorten waits that would take a test too long."""
    lifecycle._SECONDS_TO_EXIT = 1
    lifecycle._SECONDS_FOR_CHILDREN_TO_END = 0.2


def get_stuck() -> None:
    """Keep this process from ending after its interpreter, as a native thread that waits for a peer does."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: but not for longer than the process that has forked it
    ctypes.pythonapi.Py_AtExit(libc.pause)


class Case:
    """What each rank does, by name."""

    @staticmethod
    def fit(rank: int) -> None:
        train()

    @staticmethod
    def hurried(rank: int) -> None:
        """The last line of the script is a collective, whose tensors gloo's threads still hold."""
        train()
        for _ in range(20):
            dist.all_reduce(torch.ones(1000))

    @staticmethod
    def late(rank: int) -> None:
        """After a fit, rank 0 exits while a collective is in flight."""
        train()
        dist.barrier()
        if rank == 0:
            HOLD_THE_LOCK.value = 1_500_000
            dist.all_reduce(torch.ones(1000), async_op=True)
        else:
            time.sleep(0.3)
            dist.all_reduce(torch.ones(1000))

    @staticmethod
    def afterwards(rank: int) -> None:
        """The script continues after a fit: it fits again, and communicates itself, at its exit too."""
        atexit.register(Case.communicate)
        train()
        Case.communicate()
        train()

    @staticmethod
    def destroyed(rank: int) -> None:
        """After a fit, the script destroys the process group itself."""
        train()
        dist.barrier()
        time.sleep(0.1)  # for gloo's threads to release their tensors
        dist.destroy_process_group()

    @staticmethod
    def theirs(rank: int) -> None:
        """The script has made the process group itself."""
        dist.init_process_group("gloo")
        train()
        Case.communicate()

    @staticmethod
    def communicate() -> None:
        total = torch.ones(1)
        dist.all_reduce(total)
        note(f"sum {int(total)}")

    @staticmethod
    def caught(rank: int) -> None:
        """All ranks catch their error, and have exit handlers; rank 0 has started rank 1."""
        in_a_hurry()
        atexit.register(upload)
        strategies: list[ADPSGDStrategy] = []
        try:
            train(lambda: (strategies.append(trainer_strategy()), fail()))
        except ValueError:
            note("caught")
        if rank == 0:
            started = subprocess.Popen(["sh", "-c", "sleep 3; echo uploaded > notes.child"])
            strategies[0]._launcher = SimpleNamespace(procs=[started])

    @staticmethod
    def alone(rank: int) -> None:
        """One device, with an uncaught error."""
        in_a_hurry()
        atexit.register(upload)
        if rank == 0:
            os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
            train(fail, devices=1, stagger=False, overlap=0)

    @staticmethod
    def uncaught(rank: int) -> None:
        """Rank 0's error is uncaught, and a native thread does not end."""
        if rank == 0:
            in_a_hurry()
            atexit.register(upload)
            get_stuck()
        train(fail if rank == 0 else None)

    @staticmethod
    def preempted(rank: int) -> None:
        """SIGTERM, with Lightning's exception as in its release after 2.6 (pytorch-lightning#21623)."""
        SIGTERMException.__init__ = lambda self: SystemExit.__init__(self, 143)  # type: ignore[method-assign]
        train((lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else None)


def trainer_strategy() -> ADPSGDStrategy:
    """The strategy of the run in progress."""
    return next(found for found in gc.get_objects() if type(found) is ADPSGDStrategy)


def start(folder: Path, case: str) -> "list[int] | None":
    """Fork the ranks of a case; None in a rank, which then does its work."""
    port, pids = free_port(), []
    folder.mkdir(parents=True)
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            output = os.open(f"output.{rank}", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            announce(rank, 2, port, "exits")
            CHILD.append(rank)
            return None
        pids.append(pid)
    return pids


def ends(pids: list[int]) -> list[int]:
    """The exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(folder: Path, cases: list[str]) -> "str | None":
    """Run the cases; in a rank, return the name of its own."""
    signal.alarm(150)  # no process is left if the tests are interrupted; an alarm is not inherited
    if "*" in cases[0]:
        case, times = cases[0].split("*")
        codes: Counter[tuple[int, ...]] = Counter()
        signal.alarm(0)
        for number in range(0, int(times), AT_ONCE):
            started = []
            for index in range(number, min(number + AT_ONCE, int(times))):
                if (pids := start(folder / str(index), case)) is None:
                    return case
                started.append(pids)
            codes.update(tuple(ends(pids)) for pids in started)
            print(dict(codes), flush=True)
        return None
    running = {}
    for case in cases:
        if (running_here := start(folder / case, case)) is None:
            return case
        running[case] = running_here
    (folder / "codes.json").write_text(json.dumps({case: ends(pids) for case, pids in running.items()}))
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # so that no rank has to scan what has been imported
    mine = main(Path(sys.argv[1]).resolve(), sys.argv[2:])
    if mine is not None:
        getattr(Case, mine)(CHILD[0])
