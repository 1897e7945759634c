"""What a run has noted, and what follows from it for each fault. No processes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from benchmarks.survival.faults import OWN_END

IN_FLIGHT_SECONDS = 0.02
"""A round that ends this soon after a fault was in flight before it, and shows nothing."""


@dataclass
class Fault:
    """One fault. Times are in seconds, on the clock that all processes share."""

    kind: str
    worker: int | None  # None: the lighthouse
    began: float
    ended: float = math.inf  # when the process was started again or continued, or the host joined again
    reason: str = ""  # the error of a process that has ended by itself

    @property
    def ends_process(self) -> bool:
        """Whether a worker's process ends with it."""
        return self.kind in ("kill", OWN_END)


@dataclass
class Presence:
    """A worker's process from its first round to its end."""

    worker: int
    first: float
    last: float
    steps: int = 0  # that were averaged
    start_seconds: float | None = None  # from its start (imports done) to its first round; None for the first process


class Round(NamedTuple):
    """An averaging round: when each worker in it had it."""

    whens: dict[int, float]

    @property
    def began(self) -> float:
        """When the first of its workers had it."""
        return min(self.whens.values())

    @property
    def ended(self) -> float:
        """When the last of its workers had it."""
        return max(self.whens.values())


class Recovery(NamedTuple):
    """What followed a fault; None where it never came."""

    next_round_seconds: float | None  # from the fault until all live workers have had another round together
    back_seconds: float | None  # from the end of the fault until a round with the worker (the lighthouse: with all)


@dataclass
class Log:
    """One run."""

    began: float
    ended: float = math.inf
    told: list[tuple[float, int, int]] = field(default_factory=list)  # rounds: when, which worker, its number
    faults: list[Fault] = field(default_factory=list)
    presences: list[Presence] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    processes_left: int = 0
    ports_left: list[int] = field(default_factory=list)

    @cached_property
    def rounds(self) -> list[Round]:
        """All rounds, in order; ask for them when the run is over."""
        by_number: dict[int, dict[int, float]] = {}
        for when, worker, number in self.told:
            by_number.setdefault(number, {}).setdefault(worker, when)
        return sorted(map(Round, by_number.values()), key=lambda each: each.ended)

    @property
    def steps(self) -> int:
        """Steps of all workers that were averaged."""
        return sum(presence.steps for presence in self.presences)

    @property
    def worker_seconds(self) -> float:
        """Seconds that workers could have trained in: not those before a process's first round, nor stopped or cut."""
        here = sum(presence.last - presence.first for presence in self.presences)
        away = sum(
            fault.ended - fault.began
            for fault in self.faults
            if fault.worker is not None and not fault.ends_process and fault.ended < math.inf
        )
        return here - away

    def recoveries(self) -> list[Recovery]:
        """What followed each fault, in order."""
        back = [self._back(fault) for fault in self.faults]
        return [self._recovery(place, back) for place in range(len(self.faults))]

    def _back(self, fault: Fault) -> float:
        """When the worker of a fault was in a round with others again."""
        for each in self.rounds:
            if each.began >= fault.ended and fault.worker in each.whens and len(each.whens) > 1:
                return each.whens[fault.worker]
        return math.inf

    def _recovery(self, place: int, back: list[float]) -> Recovery:
        fault = self.faults[place]
        together = next((each.ended for each in self._after(fault.began) if self._is_of_all(each, place, back)), None)
        if fault.worker is None:  # a new lighthouse has served all of them
            later = (each.ended for each in self._after(fault.ended) if self._is_of_all(each, place, back))
            return Recovery(_since(fault.began, together), _since(fault.ended, next(later, None)))
        return Recovery(_since(fault.began, together), _since(fault.ended, back[place]))

    def _after(self, when: float) -> Iterable[Round]:
        return (each for each in self.rounds if each.began >= when + IN_FLIGHT_SECONDS)

    def _is_of_all(self, round_: Round, place: int, back: list[float]) -> bool:
        """Whether it has all workers that were there at a fault and were not struck, then or until this round."""
        when = self.faults[place].began
        struck = {
            other.worker
            for other, until in zip(self.faults, back, strict=True)
            if other.began <= round_.ended and until > when
        }
        here = {each.worker for each in self.presences if each.first <= when <= each.last}
        return len(round_.whens) > 1 and here - struck <= set(round_.whens)


def _since(began: float, when: float | None) -> float | None:
    return None if when is None or when == math.inf else when - began
