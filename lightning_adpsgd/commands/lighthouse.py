"""The command ``adpsgd lighthouse``: torchft's lighthouse, at which the workers of ``ElasticLocalSGD`` meet."""

import argparse
import signal

from lightning_adpsgd.commands.numbers import seconds, whole

ANNOUNCEMENT = "TORCHFT_LIGHTHOUSE="
"""What the address is printed after: the variable that workers read it from."""
ENDING = (signal.SIGINT, signal.SIGTERM)
_ANY = ("::", "0.0.0.0")

_DESCRIPTION = """\
Run torchft's lighthouse, at which the workers of ElasticLocalSGD meet once per averaging round. It prints the
address that each worker needs in its environment, and serves until Ctrl-C or SIGTERM, which is its normal end
(exit code 0). It uses little; a small machine that is not taken away suits it best.
"""


def add_timeouts(parser: argparse.ArgumentParser) -> None:
    """Add the options that a lighthouse has wherever it is started."""
    parser.add_argument(
        "--min-workers",
        type=whole(1),
        metavar="N",
        default=1,
        help="with fewer there is no averaging round, and each trains alone (default: %(default)s)",
    )
    parser.add_argument(
        "--join-timeout",
        type=seconds(0.001),
        metavar="SECONDS",
        default=60.0,
        help="how long a round waits for a worker that is alive but slow. Make it longer than workers differ in the"
        " time that a period takes them (default: %(default)g)",
    )
    parser.add_argument(
        "--heartbeat-timeout",
        type=seconds(0.2),
        metavar="SECONDS",
        default=2.0,
        help="without a heartbeat for this long a worker is dead, and the others go on. Workers send one every 0.1 s"
        " (default: %(default)g)",
    )


def main(arguments: list[str]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        arguments: those of the command line, after ``adpsgd lighthouse``.
    """
    parser = argparse.ArgumentParser("adpsgd lighthouse", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--port", type=whole(0, 65535), default=29510, help="0: a free one (default: %(default)s)")
    parser.add_argument("--host", default="::", help="address to listen on (default: %(default)s, which is all)")
    add_timeouts(parser)
    parser.add_argument(
        "--tick",
        type=whole(1, 60_000),
        metavar="MILLISECONDS",
        default=100,
        help="how often it looks for dead and late workers while others wait (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    # Blocked here, so that none of torchft's threads receives them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        _serve(parser, options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    try:
        from torchft.coordination import LighthouseServer
    except ImportError as error:
        parser.error(without_torchft(error))
    try:
        server = LighthouseServer(
            bind=f"{in_url(options.host)}:{options.port}",
            min_replicas=options.min_workers,
            join_timeout_ms=round(options.join_timeout * 1e3),
            quorum_tick_ms=options.tick,
            heartbeat_timeout_ms=round(options.heartbeat_timeout * 1e3),
        )
    except RuntimeError as error:
        parser.error(
            f"--host {options.host} --port {options.port}: the lighthouse cannot listen there ({error}); expected a"
            " port that is free and an address of this machine. If another lighthouse runs there, use that one;"
            " otherwise choose another --port (0: any that is free), or --host 0.0.0.0 where there is no IPv6."
        )
    address = server.address()
    if options.host not in _ANY:  # torchft names the machine, whatever it listens on
        address = f"http://{in_url(options.host)}:{address.rpartition(':')[2]}"
    print(f"{ANNOUNCEMENT}{address}", flush=True)
    signal.sigwait(ENDING)
    server.shutdown()


def in_url(host: str) -> str:
    """A host as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def without_torchft(why: object) -> str:
    """What to do where torchft cannot be imported."""
    return (
        f"torchft is needed ({why}): pip install 'lightning-adpsgd[elastic]'. It has wheels for Linux on x86-64, up to"
        " Python 3.13."
    )
