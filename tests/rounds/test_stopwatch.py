import math
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.reduction import CollectiveError, Patience


def test_it_runs_from_its_construction_until_it_is_stopped():
    stopwatch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    stopwatch.stop()
    taken = stopwatch.seconds
    time.sleep(0.02)
    assert stopwatch.seconds == taken >= 0.02


def test_on_a_cpu_it_runs_on_while_the_host_waits():
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.stop()
    time.sleep(0.05)
    with stopwatch.waiting():
        time.sleep(0.02)
    assert 0.02 <= stopwatch.seconds < 0.06


class Event:
    """An event of a fake device that reaches each event one second after the previous one, unless it hangs."""

    made: "list[Event]"
    hangs = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = math.inf
        Event.made.append(self)

    def record(self) -> None:
        self.at = sum(event.at < math.inf for event in Event.made)

    def query(self) -> bool:
        return not Event.hangs

    def synchronize(self) -> None:
        assert not Event.hangs

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake device that only has events."""
    Event.made, Event.hangs = [], False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return Event


def test_on_a_gpu_the_hosts_waiting_is_not_counted_twice(events):
    stopwatch = Stopwatch(torch.device("cuda"))
    stopwatch.stop()
    with stopwatch.waiting():
        time.sleep(0.05)
    assert stopwatch.seconds == 1.0


def test_the_wait_for_a_gpu_that_hangs_ends(events):
    stopwatch = Stopwatch(torch.device("cuda"), Patience(0.05, lambda: None).wait_for)
    events.hangs = True
    stopwatch.stop()
    with pytest.raises(CollectiveError, match="has not ended"):
        _ = stopwatch.seconds
