import math
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.reduction import CollectiveError, Patience


def test_it_runs_from_when_it_is_made_until_it_is_stopped():
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
    """Of a device that comes to each event a second after the one before, unless it hangs."""

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
    """A device of events alone."""
    Event.made, Event.hangs = [], False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return Event


def test_on_a_gpu_what_the_host_waits_for_is_not_counted_twice(events):
    stopwatch = Stopwatch(torch.device("cuda"))
    stopwatch.stop()
    with stopwatch.waiting():
        time.sleep(0.05)
    assert stopwatch.seconds == 1.0


def test_on_a_gpu_that_hangs_nobody_waits_for_ever(events):
    stopwatch = Stopwatch(torch.device("cuda"), Patience(0.05, lambda: None).wait_for)
    events.hangs = True
    stopwatch.stop()
    with pytest.raises(CollectiveError, match="has not ended"):
        _ = stopwatch.seconds
