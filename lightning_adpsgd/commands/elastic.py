"""The command ``adpsgd elastic``: workers of ``ElasticLocalSGD`` on this machine, started again when they die."""

import argparse
import importlib.util
import os
import sys
from urllib.parse import urlsplit

from lightning_adpsgd.commands.launcher import Launcher, Plan
from lightning_adpsgd.commands.lighthouse import add_timeouts, without_torchft
from lightning_adpsgd.commands.numbers import seconds, whole

_DESCRIPTION = """\
Run a script as several workers of ElasticLocalSGD on this machine, each a process of its own, and start those again
that die. A lighthouse is started for them on a free port of this machine, and ends with them.

Each worker has these environment variables; those of other launchers (RANK, WORLD_SIZE, MASTER_ADDR and so on) are
removed:
  TORCHFT_LIGHTHOUSE  the lighthouse's address, which ElasticLocalSGD reads
  REPLICA_GROUP_ID    the worker's number, from 0
  NUM_REPLICA_GROUPS  how many workers are started
  OMP_NUM_THREADS     unless it is set: the cores of this machine, divided among the workers
"""
_EPILOG = """\
example:
  adpsgd elastic --workers 4 train.py --lr 0.1

A worker that ends with an exit code other than 0, or by a signal, is started again, --max-restarts times at most; the
others go on. The exit code is 0 if all workers have ended with 0 at last, 1 if any has not, 2 if nothing could be
started, and 128 + N if signal N has ended the run: Ctrl-C and SIGTERM are passed on to the workers, which are killed
after --grace seconds, or at a second signal. What a worker has started is killed when the worker has ended.
"""


def main(arguments: list[str]) -> None:
    """Run workers, and exit with their common exit code.

    Args:
        arguments: those of the command line, after ``adpsgd elastic``.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error(f"{sys.platform} was found: expected Linux, as torchft has no wheels for others.")
    if not options.module and not os.path.isfile(options.script):
        parser.error(
            f"script {options.script!r}: there is no such file; expected a Python script, or -m and a module's name"
        )
    if options.min_workers > options.workers:
        parser.error(
            f"--min-workers {options.min_workers} with --workers {options.workers}: expected at most as many as there"
            " are workers, or there would never be a round"
        )
    sys.exit(Launcher(_plan(parser, options)).run())


def _plan(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Plan:
    return Plan(
        workers=options.workers,
        command=[sys.executable, *(["-m"] if options.module else []), options.script, *options.arguments],
        lighthouse=_address(parser, options) or _lighthouse(parser, options),
        max_restarts=options.max_restarts,
        restart_delay=options.restart_delay,
        grace=options.grace,
    )


def _address(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str | None:
    """The given address of a lighthouse, checked."""
    given = options.lighthouse
    if given is None:
        return None
    for name in ("min_workers", "join_timeout", "heartbeat_timeout"):
        if getattr(options, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} with --lighthouse: expected one of them, because the lighthouse at"
                f" {given} has its own. Start that one with the option, or leave --lighthouse out"
            )
    address = str(given) if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(address)
        complete = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        complete = None
    if not complete:
        parser.error(f"--lighthouse {given!r}: expected an address such as http://host:29510")
    return address


def _lighthouse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The command of a lighthouse that only this machine reaches."""
    if importlib.util.find_spec("torchft") is None:
        parser.error(without_torchft("it is not installed"))
    command = [sys.executable, "-m", "lightning_adpsgd", "lighthouse", "--host", "127.0.0.1", "--port", "0"]
    for name in ("min_workers", "join_timeout", "heartbeat_timeout"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "adpsgd elastic",
        usage="%(prog)s --workers N [options] [-m] script [arguments ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=whole(1, 4096), metavar="N", required=True, help="how many to start")
    parser.add_argument(
        "--max-restarts",
        type=whole(0),
        metavar="N",
        default=3,
        help="of each worker, and of the lighthouse (default: %(default)s)",
    )
    parser.add_argument(
        "--restart-delay",
        type=seconds(0),
        metavar="SECONDS",
        default=1.0,
        help="from an end to the next start (default: %(default)g)",
    )
    parser.add_argument(
        "--grace",
        type=seconds(0),
        metavar="SECONDS",
        default=10.0,
        help="that workers have to end after Ctrl-C or SIGTERM (default: %(default)g)",
    )
    parser.add_argument(
        "--lighthouse",
        metavar="ADDRESS",
        help="of one that runs already, such as http://host:29510; then none is started (TORCHFT_LIGHTHOUSE is not"
        " read)",
    )
    add_timeouts(parser)
    parser.add_argument("-m", "--module", action="store_true", help="script is a module's name, as for python -m")
    parser.add_argument("script", help="the Python script that each worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    return parser
