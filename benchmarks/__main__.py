"""Short versions of the benchmarks that need neither a GPU nor a data set, one after the other, on one page.

    .venv/bin/python -m benchmarks [--json DIR]
    sudo .venv/bin/python -m benchmarks

It takes about six minutes on two cores. Runs are short, so the numbers are only a guide: each section names the
command of the full measurement, whose module says how. Three of them lay out hosts that are joined by links (network
namespaces, see `frame/hosts.py`), and one needs torchft. Where that is not possible (links need Linux and root), their
sections say what is missing and the others run. Progress goes to standard error, the page to standard output.

The exit code is 0 if everything that can be measured here was measured, 1 if something is not as the package claims,
2 if something failed, and 130 after Ctrl-C, which keeps the sections that were complete.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks import interface_bytes, link, local_step
from benchmarks import round as averaging_round
from benchmarks.frame.command import FAILED, INTERRUPTED, NOT_AS_CLAIMED, folder, say
from benchmarks.frame.errors import HostsUnavailableError
from benchmarks.frame.hosts import hosts
from benchmarks.frame.results import machine
from benchmarks.survival import __main__ as survival

RATE_MBIT, SLOW_RATE_MBIT = 1000, 300
SLOW_LINKS = f"--hosts 4 --rate-mbit {SLOW_RATE_MBIT} --parameters 400000 --pause-ms 40"
"""With these a step of DDP takes about twice as long as one without communication."""


class Benchmark(NamedTuple):
    """One section of the page."""

    title: str
    measures: str  # what, in one sentence
    module: ModuleType  # has a ``main`` that takes arguments, prints what it finds and returns its exit code
    short: str  # its arguments here
    full: str  # its arguments for the same measurement in full
    file: str  # the name of its file of results
    hosts: Mapping[str, Any] | None = None  # settings of the hosts that it lays out; None if it needs none
    needs: str | None = None  # a package that may be missing

    @property
    def name(self) -> str:
        """What is run, after ``python -m``."""
        return self.module.__name__.removesuffix(".__main__")

    @property
    def command(self) -> str:
        """The command that measures in full."""
        return f"python -m {self.name} {self.full}".rstrip()


BENCHMARKS = (
    Benchmark(
        "Local step",
        "What a step between two averaging rounds costs compared with Lightning's step on a single device: a ratio of 1"
        " means nothing extra.",
        local_step,
        short="--fits 3 --turns 5 --stretch-seconds 0.2",
        full="",
        file="local_step.json",
    ),
    Benchmark(
        "Averaging round, loopback",
        "What an averaging round takes, divided by what a bare all-reduce of the same bytes takes.",
        averaging_round,
        short="--parameters 5,25 --tensors 8 --turns 7",
        full="",
        file="round_loopback.json",
    ),
    Benchmark(
        f"Averaging round, links of {RATE_MBIT} Mbit/s",
        "The same between hosts, where only the all-reduce takes longer.",
        averaging_round,
        short=f"--rate-mbit {RATE_MBIT} --parameters 25 --tensors 8 --turns 5",
        full=f"--rate-mbit {RATE_MBIT}",
        file=f"round_{RATE_MBIT}mbit.json",
        hosts={"rate_mbit": RATE_MBIT},
    ),
    Benchmark(
        "Training on slow links",
        "The same training with many strategies, where communication takes about half of DDP's time.",
        link,
        short=f"{SLOW_LINKS} --steps 32 --turns 2",
        full=SLOW_LINKS,
        file="link.json",
        hosts={"rate_mbit": SLOW_RATE_MBIT},
    ),
    Benchmark(
        "Bytes on the network",
        "What each host's interface counts in averaging rounds and between them, and what the package reports.",
        interface_bytes,
        short="--steps 48",
        full="",
        file="interface_bytes.json",
        hosts={},
    ),
    Benchmark(
        "Faults",
        "How workers that come and go survive others being killed, stopped, and the lighthouse being killed.",
        survival,
        short="--workers 3 --seconds 8 --every 2 --away 2 --faults kill,stop,lighthouse",
        full="--kills 100 --seeds 3",
        file="survival.json",
        needs="torchft",
    ),
)


class Result(NamedTuple):
    """The outcome of a benchmark: its part of the page, and its exit code."""

    text: str
    code: int = 0


def run(benchmark: Benchmark, results: Path | None = None) -> Result:
    """Measure, if that is possible here, and write the numbers to the folder of results, if there is one."""
    missing = _missing(benchmark)
    if missing is not None:
        return Result(f"Not measured here. {missing}")
    arguments = benchmark.short.split()
    if results is not None:
        arguments += ["--json", str(results.absolute() / benchmark.file)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), _command_line(arguments):
            code = benchmark.module.main(arguments)
    except Exception:  # the others are still measured
        traceback.print_exc()
        code = FAILED
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code in (0, NOT_AS_CLAIMED):
        return Result(re.sub(r"\n{3,}", "\n\n", printed.getvalue().strip("\n")), code)
    return Result("Failed: standard error says why.", FAILED)


def _missing(benchmark: Benchmark) -> str | None:
    """Why what it needs is not here, or cannot be laid out; None if it can, or if it needs nothing."""
    if benchmark.needs is not None and find_spec(benchmark.needs) is None:
        return f"{benchmark.needs} is not installed."
    if benchmark.hosts is None:
        return None
    try:
        with hosts(2, **benchmark.hosts):
            return None
    except HostsUnavailableError as error:
        return str(error)


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make a benchmark record its own command in its file of results, not the one that was given here."""
    given, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = given


def run_all(results: Path | None = None) -> Iterator[Result]:
    """Measure everything, one after the other, with a message for each."""
    for place, benchmark in enumerate(BENCHMARKS, start=1):
        say(f"\n{place} of {len(BENCHMARKS)}: {benchmark.title} ({benchmark.name} {benchmark.short})")
        began = time.monotonic()
        result = run(benchmark, results)
        say(f"{time.monotonic() - began:.0f} s" if result.code != FAILED else "failed")
        yield result


def page(headline: str, results: Sequence[Result]) -> str:
    """The headline, and a section for each result, in order."""
    return "\n\n\n".join([headline, *map(section, BENCHMARKS, results)])


def section(benchmark: Benchmark, result: Result) -> str:
    """What was measured, and the result."""
    in_full = "In full" if benchmark.hosts is None else "In full, as root"
    head = [benchmark.title, "-" * len(benchmark.title), benchmark.measures, f"{in_full}: {benchmark.command}"]
    return "\n".join([*head, "", result.text])


def headline() -> str:
    """The machine and its load; to be called before anything is measured."""
    here = machine()
    versions = {"python": here["python"]} | here["versions"]
    versions |= {name: version(name) for name in link.PEERS if find_spec(name)}
    title = "Short versions of the benchmarks that need neither a GPU nor a data set"
    lines = {
        "cpu": f"{here['cpu']}, {here['cpus_usable']} of {here['cpu_count']} cores usable",
        "system": here["platform"],
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None),
        "load": _load(here["cpus_usable"]),
        "numbers": "only a guide; below each title is the command of the full measurement",
    }
    return "\n".join([title, "=" * len(title), *(f"{name:<10}{text}" for name, text in lines.items())])


def _load(cores: int) -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    disturbed = "; something else is running and affects the times below" if load > cores / 2 else ""
    return f"{load:.2f} before{disturbed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run short versions of the benchmarks that need neither a GPU nor a data set, and print one page.",
    )
    in_folder = "write all numbers to files in this folder, one per benchmark"
    parser.add_argument("--json", type=folder, metavar="DIR", help=in_folder)
    options = parser.parse_args(arguments)
    before = headline()
    results: list[Result] = []
    interrupted = False
    try:
        for result in run_all(options.json):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    say("")
    if results:
        print(page(before, results))
    return INTERRUPTED if interrupted else max(result.code for result in results)


if __name__ == "__main__":
    sys.exit(main())
