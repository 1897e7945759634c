"""When the fragments of a round leave, and when their means land: arithmetic of steps, without tensors or processes."""

from abc import ABC, abstractmethod

from typing_extensions import override


class Schedule(ABC):
    """Divides a round into fragments, and says at which local step each leaves and lands.

    A round of period p averages every element once, in one or several fragments. Everything is counted in local steps,
    not in time, so that all workers do the same at the same step.

    Args:
        overlap: d, the local steps that go on while a fragment travels; at most p − 1 are.
    """

    def __init__(self, overlap: int = 0) -> None:
        self.overlap = overlap

    def delay(self, period: int) -> int:
        """How many steps after it was sent a fragment's mean is adopted."""
        return min(self.overlap, period - 1)

    @abstractmethod
    def fragments(self, period: int) -> int:
        """How many fragments a round has."""

    @abstractmethod
    def is_due(self, step: int, sent_at: int, period: int) -> bool:
        """Whether a fragment is to be sent now.

        Args:
            step: local steps since all workers were last the same.
            sent_at: the step at which the latest fragment was sent; 0 if none was.
            period: p.
        """


class WholeRounds(Schedule):
    """Everything at once, every p steps."""

    @override
    def fragments(self, period: int) -> int:
        return 1

    @override
    def is_due(self, step: int, sent_at: int, period: int) -> bool:
        return step - sent_at >= period


class StaggeredRounds(Schedule):
    """One of p fragments after each step; the first one p steps after all workers were the same.

    What has hardly drifted is not worth sending, and its variance would say nothing.
    """

    @override
    def fragments(self, period: int) -> int:
        return period

    @override
    def is_due(self, step: int, sent_at: int, period: int) -> bool:
        return sent_at > 0 or step >= period


class DriftClock:
    """For how many steps the elements of a fragment have drifted: since they were last sent, in a round before.

    The fragments of two rounds have different bounds where the period has changed: the middle of a fragment counts.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Take note that all workers are the same; steps are counted from 0 again."""
        self._before = [0]
        self._now: list[int] = []
        self._fragments = self._delay = 0

    def begin(self, fragments: int, delay: int = 0) -> None:
        """Take note that a round begins, of as many fragments, each of which is to be adopted so many steps later."""
        if self._now and len(self._now) == self._fragments:
            self._before = self._now
        self._now, self._fragments, self._delay = [], fragments, delay

    def send(self, step: int) -> int:
        """Take note that the next fragment is sent at a step; return for how many steps it has drifted."""
        middle = (len(self._now) + 0.5) / self._fragments
        self._now.append(step)
        return step - self._before[int(middle * len(self._before))]

    def longest(self, step: int) -> int:
        """For how many steps any element has drifted at most; 0 where a mean has come earlier than it was to."""
        if self._fragments == 1 and self._now and step - self._now[0] < self._delay:
            return 0  # what was sent has looked ahead, beyond this step
        sent = len(self._now) / max(1, self._fragments)
        return step - (self._now[0] if sent == 1.0 else self._before[int(sent * len(self._before))])
