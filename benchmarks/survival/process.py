"""What the processes of a run do: serve the lighthouse, or train until they are told to stop."""

import contextlib
import os
import signal
import time
from importlib import import_module
from multiprocessing.connection import Connection

import torch

from benchmarks.frame.hosts import Host
from benchmarks.frame.lighthouse import new_server
from benchmarks.survival.contenders import CONTENDERS
from benchmarks.survival.task import Place, Setup, Tally, final_loss, new_network, new_optimizer, training_loss

IMPORTED_LATER = (
    "lightning_adpsgd.elastic",
    "torch._dynamo",
    "torchft.checkpointing.pg_transport",
    "torchft.coordination",
    "torchft.local_sgd",
)
"""What a worker would import while it starts; it takes seconds, which say nothing about a contender."""


def serve_lighthouse(pipe: Connection, host: Host, port: int, heartbeat_ms: int) -> None:
    """Serve torchft's lighthouse, and tell the port, until this process is killed or its parent has ended."""
    _settle(host)
    server = new_server(heartbeat_ms, port=port)
    pipe.send(int(server.address().rpartition(":")[2]))
    with contextlib.suppress(EOFError):
        pipe.recv()


def train(pipe: Connection, setup: Setup, place: Place) -> None:
    """Train until the parent says stop.

    What is told, each with the time and the steps that count so far:

    - joined: seconds since all was imported, at the first round;
    - round: its number;
    - ended: the loss on test samples;
    - failed: the error that ends this process.
    """
    for name in IMPORTED_LATER:
        import_module(name)
    began = time.time()
    _settle(place.host)
    os.environ["GLOO_SOCKET_IFNAME"] = place.host.interface
    torch.set_num_threads(1)
    tally = Tally()

    def tell(kind: str, value: float | str) -> None:
        pipe.send((kind, time.time(), tally.useful, value))

    try:
        network = new_network(setup.seed)
        optimizer = new_optimizer(network)
        contender = CONTENDERS[setup.contender](
            network, optimizer, setup, place, tally, lambda number: tell("round", number)
        )
        contender.join()
        tell("joined", time.time() - began)
        latest = None
        while True:
            if latest is None and pipe.poll():
                latest = pipe.recv()
            if latest is not None and contender.may_end(latest):
                break  # with no further step: whoever is alone after the last round waits in vain
            optimizer.zero_grad()
            training_loss(network, setup, place, tally.taken).backward()
            time.sleep(setup.step_seconds)
            tally.taken += 1
            optimizer.step()
            contender.after_step()
        contender.average()
        tell("ended", final_loss(network))
        pipe.recv()
        contender.close()
    except (EOFError, BrokenPipeError):
        return  # the parent has ended
    except Exception as error:
        tell("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        os._exit(1)  # torchft's threads may wait for something


def _settle(host: Host) -> None:
    """Move this process onto its host, quietly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    host.enter()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # torchft prints several lines in every round
