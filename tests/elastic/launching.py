"""``adpsgd elastic`` and ``adpsgd lighthouse`` as a user calls them, in the working directory of a test."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lightning_adpsgd"]
NO_LIGHTHOUSE = ["--lighthouse", "http://127.0.0.1:1", "--restart-delay", "0"]
STARTED: list[subprocess.Popen] = []
COUNTED = """
import os, sys
from pathlib import Path

worker = os.environ["REPLICA_GROUP_ID"]
with open(f"starts.{worker}", "a") as file:
    file.write(f"{os.getpid()}\\n")
starts = len(Path(f"starts.{worker}").read_text().split())
"""


def end_all():
    """End what a test has started."""
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate(timeout=60)
    for pid in [pid for file in Path().glob("starts.*") for pid in file.read_text().split()]:
        if is_alive(pid):  # after a failure
            os.kill(int(pid), signal.SIGKILL)


def start(script, *options, workers=2, arguments=(), command="elastic"):
    """The command, running. Its output goes to files, which a test may read meanwhile."""
    if command == "elastic":
        Path("script.py").write_text(textwrap.dedent(script))
        options = ["--workers", str(workers), *options, "script.py", *arguments]
    with open("out", "w") as out, open("err", "w") as err:
        process = subprocess.Popen([*COMMAND, command, *options], stdout=out, stderr=err)
    STARTED.append(process)
    return process


def finish(process, seconds=180):
    """The command's exit code, stdout and stderr."""
    code = process.wait(timeout=seconds)
    return code, Path("out").read_text(), Path("err").read_text()


def run(script, *options, **more):
    return finish(start(script, *options, **more))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, Path("err").read_text()
        time.sleep(0.02)
    return found


def read(name):
    return Path(name).read_text() if Path(name).exists() else ""


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listens(address):
    host, _, port = address.rpartition("//")[2].rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def children_of(process):
    return read(f"/proc/{process.pid}/task/{process.pid}/children").split()


def blocks(pid, number):
    return int(read(f"/proc/{pid}/status").partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1
