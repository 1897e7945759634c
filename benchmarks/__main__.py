"""Short versions of the benchmarks that need neither a GPU nor a data set, one after the other, on one page.

    .venv/bin/python -m benchmarks [--json DIR]
    sudo .venv/bin/python -m benchmarks

It takes about five minutes on two cores. Settings are short, so the numbers are for orientation: each section names
the command that measures in full, whose module says how. Three of them lay out hosts that are joined by links (network
namespaces, see `hosts.py`). Where that is not possible (it needs Linux and root), their sections say what is missing
and the others go on. What the benchmarks say meanwhile goes to standard error, the page to standard output.

The exit code is 0 if everything was measured that can be measured here, 1 if bytes were found not to be as the package
claims, 2 if something failed, and 130 after Ctrl-C, which leaves the sections that were complete.
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

from benchmarks import interface_bytes, link, local_step, report
from benchmarks import round as averaging_round
from benchmarks.hosts import HostsUnavailableError, hosts

NOT_AS_CLAIMED, FAILED, INTERRUPTED = 1, 2, 130
RATE_MBIT, SLOW_RATE_MBIT = 1000, 300
SLOW_LINKS = f"--hosts 4 --rate-mbit {SLOW_RATE_MBIT} --parameters 400000 --pause-ms 40"
"""With these a step of DDP takes about twice as long as one without communication."""


class Benchmark(NamedTuple):
    """What is measured in one section of the page."""

    title: str
    measures: str
    """In one sentence."""
    module: ModuleType
    """Has a ``main`` that takes arguments, prints what it finds and returns its exit code."""
    short: str
    """Its arguments here."""
    full: str
    """Its arguments for the same measurement in full."""
    file: str
    """What its numbers are called in a folder."""
    hosts: Mapping[str, Any] | None = None
    """Settings of the hosts that it lays out; None if it needs none."""

    @property
    def command(self) -> str:
        """What measures in full."""
        return f"python -m {self.module.__name__} {self.full}".rstrip()


BENCHMARKS = (
    Benchmark(
        "Local step",
        "What a step between two averaging rounds costs beyond Lightning's step on a single device: a ratio of 1 is"
        " nothing.",
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
        "The same between hosts, where the all-reduce takes longer and all else as long.",
        averaging_round,
        short=f"--rate-mbit {RATE_MBIT} --parameters 25 --tensors 8 --turns 5",
        full=f"--rate-mbit {RATE_MBIT}",
        file=f"round_{RATE_MBIT}mbit.json",
        hosts={"rate_mbit": RATE_MBIT},
    ),
    Benchmark(
        "Training on slow links",
        "The same training under many strategies, where communication takes about half of DDP's time.",
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
)


class Result(NamedTuple):
    """What came of a benchmark."""

    text: str
    """Its part of the page."""
    code: int = 0


# The measurement


def run(benchmark: Benchmark, folder: Path | None = None) -> Result:
    """Measure, unless that is not possible here.

    Args:
        benchmark: what.
        folder: where to write its numbers, if anywhere.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once everything that was started has ended.
    """
    missing = _missing(benchmark)
    if missing is not None:
        return Result(f"Not measured here. {missing}")
    arguments = benchmark.short.split()
    if folder is not None:
        arguments += ["--json", str(folder.absolute() / benchmark.file)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), _command_line(arguments):
            code = benchmark.module.main(arguments)
    except Exception:  # the others are to be measured all the same
        traceback.print_exc()
        code = FAILED
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code in (0, NOT_AS_CLAIMED):
        return Result(re.sub(r"\n{3,}", "\n\n", printed.getvalue().strip("\n")), code)
    return Result("Failed: standard error says why.", FAILED)


def _missing(benchmark: Benchmark) -> str | None:
    """Why the hosts that it needs cannot be laid out; None if they can, or if it needs none."""
    if benchmark.hosts is None:
        return None
    try:
        with hosts(2, **benchmark.hosts):
            return None
    except HostsUnavailableError as error:
        return str(error)


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Have the benchmark write down its own command, which is not the one that was given."""
    given, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = given


def run_all(folder: Path | None = None) -> Iterator[Result]:
    """Measure everything, one after the other, and say how far it is.

    Args:
        folder: where to write numbers, if anywhere.
    """
    for place, benchmark in enumerate(BENCHMARKS, start=1):
        _say(f"\n{place} of {len(BENCHMARKS)}: {benchmark.title} ({benchmark.module.__name__} {benchmark.short})")
        began = time.monotonic()
        result = run(benchmark, folder)
        _say(f"{time.monotonic() - began:.0f} s" if result.code != FAILED else "failed")
        yield result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# To read


def page(headline: str, results: Sequence[Result]) -> str:
    """All that there is to read.

    Args:
        headline: what is said of all of them.
        results: of the benchmarks, in order; of the first few if that is all there are.
    """
    return "\n\n\n".join([headline, *map(section, BENCHMARKS, results)])


def section(benchmark: Benchmark, result: Result) -> str:
    """What was found, and what that is."""
    in_full = "In full" if benchmark.hosts is None else "In full, as root"
    head = [benchmark.title, "-" * len(benchmark.title), benchmark.measures, f"{in_full}: {benchmark.command}"]
    return "\n".join([*head, "", result.text])


def headline() -> str:
    """What was measured on, and what may have disturbed it: to be asked for before anything is measured."""
    machine = report.machine()
    versions = {"python": machine["python"]} | machine["versions"]
    versions |= {name: version(name) for name in link.PEERS if find_spec(name)}
    title = "Short versions of the benchmarks that need neither a GPU nor a data set"
    lines = {
        "cpu": f"{machine['cpu']}, {machine['cpus_usable']} of {machine['cpu_count']} cores usable",
        "system": machine["platform"],
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None),
        "load": _load(machine["cpus_usable"]),
        "numbers": "for orientation; what measures in full stands below each title",
    }
    return "\n".join([title, "=" * len(title), *(f"{name:<10}{text}" for name, text in lines.items())])


def _load(cores: int) -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    disturbed = "; something else is running, and the times below are disturbed by it" if load > cores / 2 else ""
    return f"{load:.2f} before{disturbed}"


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _parse(list(sys.argv[1:] if arguments is None else arguments))
    before = headline()
    results: list[Result] = []
    interrupted = False
    try:
        for result in run_all(options.json):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    _say("")
    if results:
        print(page(before, results))
    return INTERRUPTED if interrupted else max(result.code for result in results)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run short versions of the benchmarks that need neither a GPU nor a data set, and print one page.",
    )
    parser.add_argument(
        "--json", type=_folder, metavar="DIR", help="write all numbers to files in this folder, one per benchmark"
    )
    return parser.parse_args(arguments)


def _folder(given: str) -> Path:
    path = Path(given)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{given}: there is no such folder; make it first")
    return path


if __name__ == "__main__":
    sys.exit(main())
