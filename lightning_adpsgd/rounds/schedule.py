"""Schedules: at which local step each fragment of a round is sent, and at which its mean is adopted."""

from abc import ABC, abstractmethod

from typing_extensions import override


class Schedule(ABC):
    """Divides a round into fragments, and says at which local step each is sent and adopted.

    A round of period p averages every element once, in one or several fragments. Schedules count local steps, not
    seconds, so that all workers do the same at the same step.

    Args:
        overlap: d, the number of local steps during which a fragment is in flight; limited to p − 1.
    """

    def __init__(self, overlap: int = 0) -> None:
        self.overlap = overlap

    def delay(self, period: int) -> int:
        """How many steps after a fragment was sent its mean is adopted."""
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
    """One of p fragments after each step. The first one is sent p steps after all workers were the same.

    Before that, values have hardly drifted: they are not worth sending, and their variance means little.
    """

    @override
    def fragments(self, period: int) -> int:
        return period

    @override
    def is_due(self, step: int, sent_at: int, period: int) -> bool:
        return sent_at > 0 or step >= period


class DriftClock:
    """Tells for how many steps a fragment's elements have drifted since they were last sent, in the round before.

    If the period has changed, the fragments of the two rounds have different bounds. The fragment's middle counts then.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Record that all workers are the same. Steps are counted from 0 again."""
        self._before = [0]
        self._now: list[int] = []
        self._fragments = self._delay = 0

    def begin(self, fragments: int, delay: int = 0) -> None:
        """Record that a round of ``fragments`` fragments begins, each of which is adopted ``delay`` steps later."""
        if self._now and len(self._now) == self._fragments:
            self._before = self._now
        self._now, self._fragments, self._delay = [], fragments, delay

    def send(self, step: int) -> int:
        """Record that the next fragment is sent at ``step``; return for how many steps it has drifted."""
        middle = (len(self._now) + 0.5) / self._fragments
        self._now.append(step)
        return step - self._before[int(middle * len(self._before))]

    def longest(self, step: int) -> int:
        """Return for how many steps any element has drifted at most; 0 if a mean was adopted before its time."""
        if self._fragments == 1 and self._now and step - self._now[0] < self._delay:
            return 0  # what was sent has looked ahead, beyond this step
        sent = len(self._now) / max(1, self._fragments)
        return step - (self._now[0] if sent == 1.0 else self._before[int(sent * len(self._before))])
