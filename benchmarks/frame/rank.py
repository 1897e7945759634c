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
from importlib import import_module
from typing import Any

ADDRESS = "HOST_ADDRESS"  # the environment variable with the address of the rank's host
LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class Parent:
    """The process that gives the orders. Once it is made, everything else that this process prints goes to its log."""

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


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    serve(import_module(sys.argv[1]).carry_out)
