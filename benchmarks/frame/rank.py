"""One rank: carries out the orders that `ranks.py` gives it.

    python -m benchmarks.frame.rank benchmarks.round

The module that is named has a function ``carry_out(order, parent)``, which is given a dict and a :class:`Parent` and
returns what can be written as JSON. Orders arrive at standard input, one JSON object per line.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

ADDRESS = "HOST_ADDRESS"
"""The environment variable with the address of the rank's host."""
LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class Parent:
    """The process that gives the orders. While there is one, whatever else this process prints goes to its log."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def orders(self) -> Iterator[dict[str, Any]]:
        """The orders, until there are no more."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, kind: str, content: Any) -> None:
        """Send a "result", an "error" or a "meet"."""
        self._answers.write(json.dumps({kind: content}) + "\n")
        self._answers.flush()

    def meet(self) -> None:
        """Wait until all ranks have called this, without using the network."""
        self.answer("meet", True)
        if not sys.stdin.readline():
            raise SystemExit("The process that gives the orders has ended.")


def serve(carry_out: Callable[[dict[str, Any], Parent], Any]) -> None:
    """Carry out orders until there are no more, each with its own ``MASTER_PORT``."""
    parent = Parent()
    for order in parent.orders():
        os.environ["MASTER_PORT"] = str(order["port"])
        try:
            result = carry_out(order, parent)
        except Exception:
            parent.answer("error", traceback.format_exc())
        else:
            parent.answer("result", result)


@cache
def divide(group_size: int) -> int:
    """Split all ranks into groups, and make the calling rank a member of its group only.

    Args:
        group_size: ranks per group.

    Returns:
        The group's number.
    """
    group, rank = divmod(int(os.environ["RANK"]), group_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(group_size), "LOCAL_WORLD_SIZE": str(group_size)}
    return group


def connect(backend: str = "gloo", port: int | None = None) -> None:
    """Connect the calling rank with the others; it stays connected from order to order.

    Args:
        backend: "gloo" or "nccl". NCCL accepts no two ranks of one host on one GPU, so it is told that each rank is on
            a host of its own, reached over loopback.
        port: on which the first rank listens; the order's by default.
    """
    if dist.is_initialized():
        return
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    if os.environ.get(ADDRESS) == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK_INTERFACE
    if backend == "nccl":
        os.environ |= {
            "NCCL_HOSTID": f"rank-{os.environ['RANK']}",
            "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
            "NCCL_NET": "Socket",
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0",
        }
    dist.init_process_group(backend, device_id=torch.device("cuda:0") if backend == "nccl" else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(import_module(sys.argv[1]).carry_out)
