"""Starts jobs in which something goes wrong, as real processes, and waits until none of them is left.

``python -m tests.faults.jobs LAUNCHER FAULT [option=value …]`` runs one job by hand and shows all its output.
"""

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.frame.ranks import free_port
from tests.pool import PRELOADED, announce

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("job.py")
STARTED_WITHIN = 120.0
"""Seconds that processes may take until they reach the fault."""

Launcher = Literal["none", "lightning", "torchrun"]
"""Who starts the ranks. "none" is the hardest: ranks are announced as by torchrun, but the end of one ends no other
(as under srun without --kill-on-bad-exit). They are forked from a process that has imported everything; the other
launchers take a dozen seconds to start."""

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "NODE_RANK")


class Ended(NamedTuple):
    """How a job ended."""

    seconds: float
    """From the fault (or the start, if there was none) until the last process that ended by itself had ended."""
    codes: dict[str, int]
    """Exit codes of what was started here: "launcher", or "rank 0", "rank 1", …; after it was killed if it had hung."""
    hung: list[str]
    """Which processes had not ended in time. Their stacks are in ``output``, and they were killed."""
    left_over: list[int]
    """Unknown processes of the job that were still there at the end; they were killed."""
    output: str
    """The output of all processes."""
    folder: Path

    def said(self, rank: int) -> str:
        """A rank's output; only without a launcher."""
        return (self.folder / f"output.{rank}").read_text(errors="replace")

    def progress(self, rank: int) -> list[tuple[int, int]]:
        """(attempt, step) of each step that a rank has taken."""
        lines = (self.folder / f"progress.{rank}").read_text().splitlines()
        return [(int(attempt), int(step)) for attempt, step in map(str.split, lines)]

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        """A rank's weights at its end."""
        return torch.load(self.folder / f"weights.{rank}.pt")

    def last_checkpoint(self) -> dict[str, Any]:
        """What a user would resume from."""
        return torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=False)


def run(
    folder: Path, launcher: Launcher, fault: str, *, bound: float = 60.0, stuck: tuple[int, ...] = (), **options: Any
) -> Ended:
    """Run a job until its processes have ended, or ``bound`` seconds have passed since the fault.

    Args:
        folder: for the job's files.
        launcher: who starts the ranks.
        fault: what goes wrong.
        bound: seconds after which a process that is left counts as hung.
        stuck: ranks that cannot end by themselves, and are not waited for.
        options: of the job.
    """
    job = {"folder": str(folder), "fault": fault, **options}
    with _started(job, launcher) as started:
        begun = time.time()
        ends: dict[str, float] = {}
        while True:
            time.sleep(0.02)
            pids = {name: process.pid for name, process in started.items()} | _announced(folder)
            ends |= {name: time.time() for name, pid in pids.items() if name not in ends and not _alive(pid)}
            fault_at = _fault_time(folder)
            waited_for = {name for name in pids if name not in {f"rank {rank}" for rank in stuck}}
            if waited_for <= ends.keys() or time.time() > (fault_at or begun + STARTED_WITHIN) + bound:
                break
        hung = sorted(pids.keys() - ends.keys())
        left_over = sorted(set(_marked(folder)) - set(pids.values()))
        for name in hung:
            if name != "launcher":
                os.kill(pids[name], signal.SIGUSR1)
        if hung:
            time.sleep(0.5)
    ended = Ended(
        seconds=round(max(ends.values(), default=time.time()) - (fault_at or begun), 2),
        codes={name: _exit_code(process) for name, process in started.items()},
        hung=hung,
        left_over=left_over,
        output="".join(file.read_text(errors="replace") for file in sorted(folder.glob("output*"))),
        folder=folder,
    )
    _record(job, launcher, ended)
    return ended


def _announced(folder: Path) -> dict[str, int]:
    """The ranks' processes, as they announced themselves."""
    pids = {}
    with suppress(FileNotFoundError):
        for line in (folder / "processes").read_text().splitlines():
            attempt, rank, pid = map(int, line.split())
            pids[f"rank {rank}" + f" (attempt {attempt + 1})" * (attempt > 0)] = pid
    return pids


def _alive(pid: int) -> bool:
    """Whether a process exists, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _marked(folder: Path) -> Iterator[int]:
    """All processes that were started, directly or indirectly, for the job in this folder."""
    mark = f"FAULT_JOB={folder}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            pid = int(environment.parent.name)
            if mark in environment.read_bytes().split(b"\0") and _alive(pid):
                yield pid


def _fault_time(folder: Path) -> float | None:
    with suppress(FileNotFoundError):
        return float((folder / "fault").read_text())
    return None


def _exit_code(process: Any) -> int:
    return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode


def _record(job: dict[str, Any], launcher: str, ended: Ended) -> None:
    """Add a line to the file that FAULT_TIMES names."""
    if name := os.environ.get("FAULT_TIMES"):
        options = {key: value for key, value in job.items() if key != "folder"}
        line = {**options, "launcher": launcher, "seconds": ended.seconds, "hung": ended.hung}
        with open(name, "a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def _started(job: dict[str, Any], launcher: str) -> Iterator[dict[str, Any]]:
    """The processes that were started, by name. None of the job's is left afterwards."""
    started = _ranks(job) if launcher == "none" else {"launcher": _launcher(job, launcher)}
    folder = Path(job["folder"])
    try:
        yield started
    finally:
        ours = {process.pid for process in started.values() if _alive(process.pid)}
        for pid in ours | set(_marked(folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started.values():
            process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _launcher(job: dict[str, Any], launcher: str) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.get("ranks", 2))]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    environment["FAULT_JOB"] = job["folder"]
    if job["fault"] == "kill_at_first_attempt":
        torchrun += ["--max-restarts", "1"]
        # Otherwise restarted ranks may read the addresses of the old ones: pytorch#135712, #167288.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with open(Path(job["folder"]) / "output", "w") as output:
        return subprocess.Popen(
            [sys.executable, *(torchrun if launcher == "torchrun" else []), str(SCRIPT), json.dumps(job)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ranks(job: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, size = free_port(), job.get("ranks", 2)
    ranks = {f"rank {rank}": context.Process(target=_rank, args=(job, rank, size, port)) for rank in range(size)}
    for process in ranks.values():
        process.start()
    return ranks


def _rank(job: dict[str, Any], rank: int, size: int, port: int) -> None:
    from tests.faults.job import Job, main

    os.setsid()
    with open(Path(job["folder"]) / f"output.{rank}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    announce(rank, size, port, "faults")
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    try:
        main(Job(**job))
    except Exception as error:
        sys.last_value = error  # as the interpreter does with an uncaught error
        raise
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        arguments = {key: json.loads(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
        outcome = run(Path(name), sys.argv[1], sys.argv[2], **arguments)  # type: ignore[arg-type]
        print(outcome.output, outcome._replace(output=""), sorted(os.listdir(name)), sep="\n")
