"""What several tests of the benchmarks share."""

import contextlib
import io
import json
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACES = Path("/run/netns")
PATIENCE_SECONDS = 240


def measured(main, file, *options):
    """What a command prints and writes, with real ranks; the command itself runs in this process, which is faster."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        code = main([*options, "--json", str(file)])
    assert code == 0, said.getvalue() + printed.getvalue()
    return printed.getvalue(), json.loads(file.read_text())


def shown(row, columns):
    """The cells of a row, by title."""
    return {column.title: column.text(row) for column in columns}


def left_behind_by(pid):
    """Hosts of a process that still exist."""
    return [path.name for path in NAMESPACES.glob(f"adpsgd-{pid}-*")]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class FakeRanks:
    """Ranks that keep their orders, and whose answers are a function of the number of orders so far."""

    def __init__(self, answers, fails_at=None):
        self.orders = []
        self._answers = answers
        self._fails_at = fails_at

    def run(self, order):
        self.orders.append(order)
        if len(self.orders) == self._fails_at:
            raise KeyboardInterrupt
        return self._answers(len(self.orders))
