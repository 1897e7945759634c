"""Averaging rounds that are spread over the period, or that are under way while training goes on."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.averager import BucketInFlight
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker
from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.rounds.handshake import Handshake, RankState, lost
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import CollectiveError, Reduction

Drift = Literal["a period", "at least a period", "less"]
"""For how long everything that a cycle has sent had drifted.

After all workers were the same, the first part of a staggered cycle is sent when it has drifted for a period, and the
others one step after the other: at least a period. From the next cycle on, each part has drifted for just a period.
"""


class Measured(NamedTuple):
    """What the workers have measured in one cycle."""

    step: int
    """The step after which its last part was sent."""
    period: int
    """The period in force when the cycle began."""
    means: list[float]
    """S_g of what was sent, of each parameter group, then γ_g of each when its last part was adopted."""
    drift: Drift


class Diverged(Exception):
    """Some worker has sent parameters that are not finite; nothing of it was adopted."""


@dataclass
class _Cycle:
    """One averaging round: every element is sent once, in one or several parts."""

    parts: int
    delay: int
    period: int
    drift: Drift
    deviations: Tensor
    """Σ ‖w̄ − w_i‖² of what this worker has sent, per parameter group."""
    sent: int = 0
    adopted: int = 0
    step: int = 0
    measures: Reduction | None = None
    """What the workers have measured, on its way once everything is adopted."""
    settled_at: int = 0
    """The step from which on they are to be read."""


class _Part(NamedTuple):
    """What is under way of a cycle."""

    cycle: _Cycle
    payload: AveragedTensors
    call: RankState
    meeting: Handshake
    in_flight: list[BucketInFlight]
    step: int
    looked_ahead: bool
    """Whether what was sent is what the part was expected to become."""


class _Before(NamedTuple):
    """What a part held before the step after which it is sent."""

    payload: AveragedTensors
    part: int
    parts: int
    values: list[Tensor]

    def is_of(self, payload: AveragedTensors, cycle: _Cycle) -> bool:
        """Whether it is of the next part of a cycle."""
        return self.payload is payload and (self.part, self.parts) == (cycle.sent, cycle.parts)


class Cycles:
    """Sends parts of what is averaged after local steps, and adopts their means a number of steps later.

    A *cycle* is one averaging round. Staggered, it has p parts, one of which is sent after each local step (the first
    cycle waits for p steps after all workers were the same: what has hardly drifted is not worth sending); otherwise it
    has one part, which is sent every p steps. Each part's mean is adopted ``overlap`` steps after it was sent (at
    most p − 1). Both are counted in steps, not in time, so that all workers do the same at the same step.

    With momentum, a worker knows a part of the steps that it will take while a part travels: the momentum's. It sends
    what the part will have become by then, w + c · (w − w before the latest step), where c = μ + … + μ^d for SGD (for
    others see :class:`LookAhead`), and adds w̄ − (what it sent). So velocities that differ do not drive the workers
    apart while a mean is under way, and the workers' mean moves as it would by itself, whatever they expect, because
    w̄ − (what was sent) adds up to 0 over the workers.

    What the workers state (see :class:`RankState`) travels beside each part, and is read before anything is adopted.
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
        payloads: TensorTracker,
        workers: WorkerGroup,
        carrier: WorkerGroup,
        call: Callable[..., RankState],
        learning_rates: Callable[[], list[float | Tensor]],
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
        self._known: AveragedTensors | None = None  # what all workers are known to average
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

    def send(self, step: int, period: int) -> list[Handshake]:
        """Send a part if one is due.

        Args:
            step: of the optimizer, as the workers count.
            period: p, in force for a cycle that begins now.

        Returns:
            The meetings that were held of parts that had to be adopted for that.
        """
        held: list[Handshake] = []
        if not self._is_due(self._steps, period):
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
            drift: Drift = "a period"
            if parts > 1 and (changed or self._sent_at == 0):
                drift = "at least a period" if self._sent_at == 0 else "less"
            cycle = self._cycle = self._new_cycle(payload, parts, period, drift)
        self._launch(cycle, payload, step)
        return held

    def finish(self, step: int) -> list[Handshake]:
        """Send and adopt what is left of a cycle, if all of it has drifted for a period already.

        A cycle that began when all workers were the same would otherwise come to nothing where somebody asks for a
        round before its last part: and if that goes on, to nothing ever.

        Args:
            step: of the optimizer, as the workers count.

        Returns:
            The meetings that were held of parts that were adopted.

        Raises:
            Diverged: if some worker has sent what is not finite. Nothing is under way any more then.
        """
        cycle, payload = self._cycle, self._payloads.current()
        held: list[Handshake] = []
        if cycle is None or cycle.drift != "at least a period" or payload is not self._known:
            return held
        self._before = None
        while cycle.sent < cycle.parts:
            self._launch(cycle, payload, step)
            held += self._adopt(step, everything=True)
        return held

    def look_ahead(self, period: int) -> None:
        """Keep what the part holds that is sent after the next step, if its momentum is to be looked at then.

        Args:
            period: p, as far as is known, when that part is sent.
        """
        self._before = None
        if self.overlap == 0 or not self._is_due(self._steps + 1, period) or not any(self._ahead(1)):
            return
        payload, cycle = self._payloads.current(), self._cycle
        part, parts = 0, period if self.stagger else 1
        if cycle is not None and cycle.sent < cycle.parts:
            part, parts = cycle.sent, cycle.parts
        self._before = _Before(payload, part, parts, payload.averager.keep(part, parts))

    def receive(self, step: int, everything: bool = False) -> tuple[list[Handshake], list[Measured]]:
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

    def _is_due(self, steps: int, period: int) -> bool:
        """Whether a part is to be sent when so many steps were taken since all workers were the same."""
        if self.stagger and self._sent_at > 0:
            return True
        return steps - self._sent_at >= period

    def _new_cycle(self, payload: AveragedTensors, parts: int, period: int, drift: Drift) -> _Cycle:
        return _Cycle(
            parts=parts,
            delay=min(self.overlap, period - 1),
            period=period,
            drift=drift,
            deviations=torch.zeros(payload.averager.groups, dtype=torch.float64, device=self._carrier.device),
        )

    def _make_known(self, payload: AveragedTensors, period: int) -> None:
        """Compare what is averaged, which is new, before parts of different sizes can meet."""
        payload.take_over()
        call = self._call("a change of what is averaged", "period", period, **payload.stated)
        meeting = Handshake(self._workers, call).hold()
        meeting.check_tensors(
            "The workers do not average the same tensors.",
            lambda: self._payloads.describe(payload.layout, payload.tensors),
        )
        payload.agree(meeting.know_the_same)
        self._known = payload

    def _launch(self, cycle: _Cycle, payload: AveragedTensors, step: int) -> None:
        call = self._call("a part of an averaging round", "period", cycle.period)
        ahead = self._ahead(cycle.delay)
        before = self._before
        values = before.values if before is not None and before.is_of(payload, cycle) and any(ahead) else None
        try:
            in_flight, finite = payload.averager.send(cycle.sent, cycle.parts, self._carrier, values, ahead)
        except CollectiveError as error:
            raise self._lost(call, error) from error
        meeting = Handshake(self._workers, call._replace(finite=finite))
        self._parts.append(_Part(cycle, payload, call, meeting, in_flight, self._steps, values is not None))
        cycle.sent += 1
        cycle.step = step
        self._sent_at = self._steps

    def _adopt(self, step: int, everything: bool = False) -> list[Handshake]:
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
        as_sent = self._steps == part.step and not part.looked_ahead and not self._payloads.moved_by_others
        self._payloads.rebind(part.payload)
        cycle.deviations += part.payload.averager.adopt(part.in_flight, moved=not as_sent)
        cycle.adopted += 1
        if cycle.adopted == cycle.parts:
            if cycle.parts == 1 and as_sent:
                self._begin_anew()
            # Of the groups that were sent: others may have come or gone since, perhaps on one worker alone.
            groups = len(cycle.deviations)
            rates = [*self._learning_rates()[:groups], *[0.0] * groups][:groups]
            cycle.measures = self._workers.launch_mean([*cycle.deviations, *rates])
            # Nobody waits for numbers that are not needed before the next step.
            cycle.settled_at = step + (cycle.delay > 0)
            self._unsettled.append(cycle)

    def _settle(self, cycle: _Cycle) -> Measured:
        assert cycle.measures is not None
        try:
            means = cycle.measures.wait().tolist()
        except CollectiveError as error:
            raise self._lost(self._call("a part of an averaging round", "period", cycle.period), error) from error
        return Measured(cycle.step, cycle.period, means, cycle.drift)

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
                    cycle.measures.wait()
            self._unsettled.clear()
        except CollectiveError as error:
            raise self._lost(part.call, error) from error
        raise Diverged

    def _lost(self, call: RankState, error: CollectiveError) -> WorkerLostError:
        """Say that a worker is gone, unless it is known already that it has gone because workers disagree."""
        for part in self._parts:
            part.meeting.look()
        return lost(self._workers, call, error)
