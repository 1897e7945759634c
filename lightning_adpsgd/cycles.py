"""Averaging rounds that are spread over the period, or that are under way while training goes on."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging import CollectiveError, InFlight, Workers
from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.meeting import Call, Meeting, lost
from lightning_adpsgd.payload import Payload, Payloads


class Measured(NamedTuple):
    """What the workers have measured in one cycle."""

    step: int
    """The step after which its last part was sent."""
    period: int
    """The period in force when the cycle began."""
    variance: float
    """S_k, the variance of what was sent; summed over the parts."""
    ratio: float
    """r = Σ_g S_g / γ_g, each part with the learning rates at which it was adopted."""
    learning_rate: float
    """γ_k when the cycle ended, of the first group whose rate was not 0."""
    comparable: bool
    """Whether everything that was sent had drifted for a whole period."""


class Diverged(Exception):
    """Some worker has sent parameters that are not finite; nothing of it was adopted."""


@dataclass
class _Cycle:
    """One averaging round: every element is sent once, in one or several parts."""

    parts: int
    delay: int
    period: int
    comparable: bool
    variance: Tensor
    ratio: Tensor
    sent: int = 0
    adopted: int = 0
    step: int = 0
    measures: Meeting | None = None
    """Where the workers tell each other what they have measured, once everything is adopted."""
    settled_at: int = 0
    """The step from which on they are to be read."""


class _Part(NamedTuple):
    """What is under way of a cycle."""

    cycle: _Cycle
    payload: Payload
    call: Call
    meeting: Meeting
    in_flight: list[InFlight]
    step: int
    looked_ahead: bool
    """Whether what was sent is what the part was expected to become."""


class _Before(NamedTuple):
    """What a part held before the step after which it is sent."""

    payload: Payload
    part: int
    parts: int
    values: list[Tensor]

    def is_of(self, payload: Payload, cycle: _Cycle) -> bool:
        """Whether it is of the next part of a cycle."""
        return self.payload is payload and (self.part, self.parts) == (cycle.sent, cycle.parts)


class Cycles:
    """Sends parts of what is averaged after local steps, and adopts their means a number of steps later.

    A *cycle* is one averaging round. Staggered, it has p parts, one of which is sent after each local step; otherwise
    it has one part, which is sent every p steps. Each part's mean is adopted ``overlap`` steps after it was sent (at
    most p − 1). Both are counted in steps, not in time, so that all workers do the same at the same step.

    With momentum, a worker knows a part of the steps that it will take while a part travels: the momentum's. It sends
    what the part will have become by then, w + c · (w − w before the latest step), where c = μ + … + μ^d for SGD (for
    others see :class:`LookAhead`), and adds w̄ − (what it sent). So velocities that differ do not drive the workers
    apart while a mean is under way, and the workers' mean moves as it would by itself, whatever they expect, because
    w̄ − (what was sent) adds up to 0 over the workers.

    What the workers state (see :class:`Call`) travels beside each part, and is looked at before anything is adopted.
    Parts have connections of their own: a worker that is somewhere else instead is met there, and noticed.

    Args:
        stagger: whether a cycle has p parts.
        overlap: d, the steps for which a part travels.
        payloads: what is averaged.
        workers: with whom, and where they meet.
        carrier: the same workers, on connections of their own.
        call: makes what this worker states, of a kind, trigger and period.
        learning_rates: of each parameter group, now.
        look_ahead: for each parameter group, now, which multiple of the latest step its momentum will add to a part in
            a number of steps; 0 where that is not known.
    """

    def __init__(
        self,
        *,
        stagger: bool,
        overlap: int,
        payloads: Payloads,
        workers: Workers,
        carrier: Workers,
        call: Callable[..., Call],
        learning_rates: Callable[[], list[float]],
        look_ahead: Callable[[int], list[float]],
    ) -> None:
        # Configuration
        self.stagger = stagger
        self.overlap = overlap
        self._payloads = payloads
        self._workers = workers
        self._carrier = carrier
        self._call = call
        self._learning_rates = learning_rates
        self._ahead = look_ahead

        # State
        self._steps = 0
        """Local steps since all workers were last the same, which is where cycles start."""
        self._sent_at = 0
        self._cycle: _Cycle | None = None  # the one that is being sent
        self._parts: deque[_Part] = deque()  # under way, oldest first
        self._unsettled: deque[_Cycle] = deque()
        self._known: Payload | None = None  # what all workers are known to average
        self._before: _Before | None = None  # of what is sent after the next step

    @property
    def fresh(self) -> bool:
        """Whether all workers are the same."""
        return self._steps == 0

    def restart(self) -> None:
        """Take note that all workers are the same. Nothing may be under way."""
        assert not self._parts
        self._begin_anew()

    def step(self) -> None:
        """Take note of a local step."""
        self._steps += 1

    def send(self, step: int, period: int) -> list[Meeting]:
        """Send a part if one is due.

        Args:
            step: of the optimizer, as the workers count.
            period: p, in force for a cycle that begins now.

        Returns:
            The meetings that were held of parts that had to be adopted for that.
        """
        held: list[Meeting] = []
        if not self.stagger and self._steps - self._sent_at < period:
            return held
        parts = period if self.stagger else 1
        payload = self._payloads.current()
        changed = payload is not self._known
        cycle = self._cycle
        if cycle is None or cycle.sent == cycle.parts or changed:
            if changed or (cycle is not None and cycle.parts != parts):
                # Parts of another size, or of other tensors, would overlap what is still under way.
                held += self._adopt(step, everything=True)
            if changed:
                self._make_known(payload, period)
            cycle = self._cycle = self._new_cycle(parts, period, began_fresh=changed or self._sent_at == 0)
        self._launch(cycle, payload, step)
        return held

    def look_ahead(self, period: int) -> None:
        """Keep what the part holds that is sent after the next step, if its momentum is to be looked at then.

        Args:
            period: p, as far as is known, when that part is sent.
        """
        self._before = None
        payload, cycle = self._known, self._cycle
        is_due = self.stagger or self._steps + 1 - self._sent_at >= period
        if payload is None or self.overlap == 0 or not is_due or not any(self._ahead(1)):
            return
        part, parts = 0, period if self.stagger else 1
        if cycle is not None and cycle.sent < cycle.parts:
            part, parts = cycle.sent, cycle.parts
        self._before = _Before(payload, part, parts, payload.averager.keep(part, parts))

    def receive(self, step: int, everything: bool = False) -> tuple[list[Meeting], list[Measured]]:
        """Adopt the means that are due now, and return what was measured in cycles that have ended.

        Args:
            step: of the optimizer, as the workers count.
            everything: adopt all that is under way, and wait for its measures.

        Returns:
            The meetings of the parts that were adopted, and the measures.

        Raises:
            Diverged: if some worker has sent what is not finite. Nothing is under way any more then.
            WorkersDisagreeError: on every worker, if they have not sent the same.
            WorkerLostError: if some worker is gone.
        """
        held = self._adopt(step, everything)
        if everything:
            self._known = None  # as in a run that goes on from a checkpoint that is taken now
        measured = []
        while self._unsettled and (everything or self._unsettled[0].settled_at <= step):
            measured.append(self._settle(self._unsettled.popleft()))
        return held, measured

    # Details

    def _begin_anew(self) -> None:
        self._steps = self._sent_at = 0
        self._cycle = None
        self._before = None

    def _new_cycle(self, parts: int, period: int, began_fresh: bool) -> _Cycle:
        return _Cycle(
            parts=parts,
            delay=min(self.overlap, period - 1),
            period=period,
            # What is sent j steps after all were the same has drifted for j steps only.
            comparable=parts == 1 or not began_fresh,
            variance=torch.zeros(1, dtype=torch.float64, device=self._carrier.device),
            ratio=torch.zeros(1, dtype=torch.float64, device=self._carrier.device),
        )

    def _make_known(self, payload: Payload, period: int) -> None:
        """Compare what is averaged, which is new, before parts of different sizes can meet."""
        call = self._call("a change of what is averaged", "period", period, fingerprint=payload.layout.fingerprint)
        meeting = Meeting(self._workers, call).hold()
        meeting.check_tensors(
            "The workers do not average the same tensors.",
            lambda: self._payloads.describe(payload.layout, payload.tensors),
        )
        self._known = payload

    def _launch(self, cycle: _Cycle, payload: Payload, step: int) -> None:
        call = self._call("a part of an averaging round", "period", cycle.period)
        ahead = self._ahead(cycle.delay)
        before = self._before
        values = before.values if before is not None and before.is_of(payload, cycle) and any(ahead) else None
        try:
            in_flight, finite = payload.averager.send(cycle.sent, cycle.parts, self._carrier, values, ahead)
        except CollectiveError as error:
            raise self._lost(call, error) from error
        meeting = Meeting(self._workers, call._replace(finite=finite))
        self._parts.append(_Part(cycle, payload, call, meeting, in_flight, self._steps, values is not None))
        cycle.sent += 1
        cycle.step = step
        self._sent_at = self._steps

    def _adopt(self, step: int, everything: bool = False) -> list[Meeting]:
        held = []
        for part in self._parts:
            if self._steps - part.step >= -(-part.cycle.delay // 2):
                self._advance(part)
        while self._parts and (everything or self._steps - self._parts[0].step >= self._parts[0].cycle.delay):
            part = self._parts.popleft()
            held.append(part.meeting.hold())
            if part.meeting.diverged:
                self._abandon(part)
            try:
                self._adopt_part(part, step)
            except CollectiveError as error:
                raise self._lost(part.call, error) from error
        return held

    def _advance(self, part: _Part) -> None:
        """What travels in two phases begins the second one half-way."""
        try:
            for in_flight in part.in_flight:
                in_flight.reduction.advance()
        except CollectiveError as error:
            raise self._lost(part.call, error) from error

    def _adopt_part(self, part: _Part, step: int) -> None:
        cycle = part.cycle
        as_sent = self._steps == part.step and not part.looked_ahead
        deviations = part.payload.averager.adopt(part.in_flight, moved=not as_sent)
        rates = self._learning_rates()  # perhaps of groups, too, that were added since it was sent
        cycle.variance += deviations.sum()
        for deviation, rate in zip(deviations, rates, strict=False):
            if rate > 0.0:
                cycle.ratio += deviation / rate
        cycle.adopted += 1
        if cycle.adopted == cycle.parts:
            if cycle.parts == 1 and as_sent:
                self._begin_anew()
            call = self._call("the end of a round under way", "period", cycle.period)
            rate = next((rate for rate in rates if rate > 0.0), 0.0)
            call = call._replace(variance=cycle.variance, ratio=cycle.ratio, learning_rate=rate)
            cycle.measures = Meeting(self._workers, call)
            # Nobody waits for numbers that are not needed before the next step.
            cycle.settled_at = step + (cycle.delay > 0)
            self._unsettled.append(cycle)

    def _settle(self, cycle: _Cycle) -> Measured:
        assert cycle.measures is not None
        calls = cycle.measures.hold().calls
        return Measured(
            step=cycle.step,
            period=cycle.period,
            variance=sum(float(call.variance) for call in calls) / len(calls),
            ratio=sum(float(call.ratio) for call in calls) / len(calls),
            learning_rate=sum(call.learning_rate for call in calls) / len(calls),
            comparable=cycle.comparable,
        )

    def _abandon(self, part: _Part) -> None:
        """Wait for what is under way, and throw it away."""
        remaining = [part, *self._parts]
        self._parts.clear()
        self._cycle = None
        try:
            for each in remaining:
                if each is not part:
                    each.meeting.hold()
                for in_flight in each.in_flight:
                    in_flight.reduction.wait()
            for cycle in self._unsettled:
                if cycle.measures is not None:
                    cycle.measures.hold()
            self._unsettled.clear()
        except CollectiveError as error:
            raise self._lost(part.call, error) from error
        raise Diverged

    def _lost(self, call: Call, error: CollectiveError) -> WorkerLostError:
        """Say that a worker is gone, unless it is known already that it has gone because workers disagree."""
        for part in self._parts:
            part.meeting.look()
        return lost(self._workers, call, error)
