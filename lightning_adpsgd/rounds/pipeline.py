"""Sends rounds in fragments that are in flight while training goes on."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.averager import BucketInFlight
from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker
from lightning_adpsgd.rounds.handshake import Handshake, RankState, naming_lost_workers
from lightning_adpsgd.rounds.schedule import DriftClock, Schedule
from lightning_adpsgd.workers.group import WorkerGroup

Drift = Literal["a period", "at least a period", "less"]
"""How long the values that a round sent had drifted.

In the first staggered round after all workers were the same, the first fragment is sent after one period, and each
further one a step later: "at least a period". From the next round on, each has drifted for "a period". A round that
starts because the averaged tensors have changed has drifted for "less".
"""


class Diverged(Exception):
    """A worker has sent parameters that are not finite. They were not adopted."""


@dataclass
class SpreadRound:
    """One averaging round: every element is sent once, in one or several fragments."""

    fragments: int
    delay: int
    period: int
    """The period in force when the round began."""
    drift: Drift
    deviations: Tensor
    """Σ ‖w̄ − w_i‖² of the values that this worker sent, per parameter group."""
    sent: int = 0
    landed: int = 0
    step: int = 0
    """The step after which its latest fragment was sent."""


class _Fragment(NamedTuple):
    """A fragment in flight."""

    round: SpreadRound
    tensors: AveragedTensors
    state: RankState
    handshake: Handshake
    buckets: list[BucketInFlight]
    step: int
    ahead: Sequence[float]
    """For each parameter group, how many times the latest step was added to the values sent; empty: not at all."""
    drifted: int
    """The number of steps over which the values sent had drifted."""

    @property
    def lands_at(self) -> int:
        """The step at which its mean is adopted."""
        return self.step + self.round.delay


class _Before(NamedTuple):
    """A fragment's values before the step after which it is sent."""

    tensors: AveragedTensors
    fragment: int
    fragments: int
    values: list[Tensor]

    def is_of(self, tensors: AveragedTensors, round_: SpreadRound) -> bool:
        """Whether these are the values of the next fragment of a round."""
        return self.tensors is tensors and (self.fragment, self.fragments) == (round_.sent, round_.fragments)


class Pipeline:
    """Sends fragments after local steps, and adopts their means a number of steps later.

    With momentum, a worker can predict a part of the steps that it takes while a fragment is in flight. It sends the
    fragment as momentum will move it, w + c · (w − w before the latest step), and later adds w̄ − (values sent). For SGD
    c = μ + … + μ^d; for other optimizers see :class:`LookAhead`. So velocities that differ do not drive the workers
    apart while a mean is in flight. The prediction does not move the workers' mean, because w̄ − (values sent) adds up
    to 0 over the workers.

    Each fragment has a handshake (see :class:`RankState`), which is read before anything is adopted. Fragments are
    reduced in a process group of their own: a rank that calls another collective instead is not paired with them, and
    the handshake finds that ranks disagree.

    Args:
        schedule: says which fragment is sent and adopted when.
        tracker: knows what is averaged.
        workers: the workers, in the process group of all handshakes.
        async_group: the same workers in a separate process group, for fragments.
        state: makes this rank's state from kind, trigger and period.
        policy: of the optimizer's state. Knows how far momentum will move a fragment, and corrects moments by a
            fragment's deviations.
    """

    def __init__(
        self,
        schedule: Schedule,
        tracker: TensorTracker,
        workers: WorkerGroup,
        async_group: WorkerGroup,
        state: Callable[..., RankState],
        policy: StatePolicy,
    ) -> None:
        # Configuration
        self._schedule = schedule
        self._tracker = tracker
        self._workers = workers
        self._async_group = async_group
        self._state = state
        self._policy = policy

        # State
        self.steps = 0
        """Local steps since all workers were last the same, from which the schedule counts."""
        self._sent_at = 0
        self._round: SpreadRound | None = None  # the one that is being sent
        self.clock = DriftClock()
        """Counts the steps over which fragments have drifted."""
        self.in_flight: deque[_Fragment] = deque()
        """Fragments, the oldest first."""
        self._known: AveragedTensors | None = None  # what all workers have agreed to average
        self._before: _Before | None = None  # of the fragment that is sent after the next step

    def restart(self) -> None:
        """Record that all workers are the same. What is still in flight is waited for, and dropped."""
        self._drop([*self.in_flight])
        self._begin_anew()

    def send(self, step: int, period: int) -> tuple[list[Handshake], list[SpreadRound]]:
        """Send a fragment if one is due.

        Args:
            step: the optimizer's step.
            period: p of a round that starts now.

        Returns:
            The handshakes of fragments that had to land before, and the rounds that have ended with them.
        """
        landed: tuple[list[Handshake], list[SpreadRound]] = ([], [])
        if not self._schedule.is_due(self.steps, self._sent_at, period):
            return landed
        fragments = self._schedule.fragments(period)
        tensors = self._tracker.current()
        changed = tensors is not self._known
        round_ = self._round
        if round_ is None or round_.sent == round_.fragments or changed:
            if changed or (round_ is not None and round_.fragments != fragments):
                # Fragments of another size, or of other tensors, would overlap those still in flight.
                landed = self._land(everything=True)
            if changed:
                self._make_known(tensors, period)
            drift: Drift = "a period"
            if fragments > 1 and (changed or self._sent_at == 0):
                drift = "at least a period" if self._sent_at == 0 else "less"
            delay = self._schedule.delay(period)
            none = torch.zeros(tensors.averager.groups, dtype=torch.float64, device=self._async_group.device)
            round_ = self._round = SpreadRound(fragments, delay, period, drift, none)
            self.clock.begin(fragments, delay)
        self._launch(round_, tensors, step)
        return landed

    def finish(self, step: int) -> tuple[list[Handshake], list[SpreadRound]]:
        """Send and adopt the rest of a first staggered round, if there is one: all of it has drifted for a period.

        Otherwise a full round that comes before its last fragment would discard it. If full rounds are frequent, no
        staggered round would ever end.

        Returns:
            The handshakes of fragments that have landed, and the rounds that have ended with them.

        Raises:
            Diverged: if a worker has sent values that are not finite. Nothing is in flight then.
        """
        handshakes: list[Handshake] = []
        ended: list[SpreadRound] = []
        round_, tensors = self._round, self._tracker.current()
        if round_ is not None and round_.drift == "at least a period" and tensors is self._known:
            self._before = None
            while round_.sent < round_.fragments:
                self._launch(round_, tensors, step)
                more_handshakes, more_ended = self._land(everything=True)
                handshakes += more_handshakes
                ended += more_ended
        return handshakes, ended

    def keep_for_look_ahead(self, period: int) -> None:
        """Keep the current values of the fragment due after the next step, if its momentum will be needed then."""
        self._before = None
        due = self._schedule.is_due(self.steps + 1, self._sent_at, period)
        if self._schedule.overlap == 0 or not due or not any(self._policy.look_ahead(1)):
            return
        tensors, round_ = self._tracker.current(), self._round
        fragment, fragments = 0, self._schedule.fragments(period)
        if round_ is not None and round_.sent < round_.fragments:
            fragment, fragments = round_.sent, round_.fragments
        values = tensors.averager.keep(fragment, fragments)
        self._before = _Before(tensors, fragment, fragments, values)

    def land(self, everything: bool = False) -> tuple[list[Handshake], list[SpreadRound]]:
        """Adopt the means that are due now.

        Args:
            everything: adopt all fragments in flight.

        Returns:
            The handshakes of the fragments that have landed, and the rounds that have ended with them.

        Raises:
            Diverged: if a worker has sent values that are not finite. Nothing is in flight then.
            WorkersDisagreeError: on every worker, if they have not sent the same fragment.
            WorkerLostError: if a worker is gone.
        """
        landed = self._land(everything)
        if everything:
            self._known = None  # as in a run that resumes from a checkpoint taken now
        return landed

    def handshakes(self) -> list[Handshake]:
        """Those in flight, the oldest first."""
        return [fragment.handshake for fragment in self.in_flight]

    # Details

    def _begin_anew(self) -> None:
        self.steps = self._sent_at = 0
        self.clock.restart()
        self._round = None
        self._before = None

    def _make_known(self, tensors: AveragedTensors, period: int) -> None:
        """Check that all workers average the same new tensors, before they send fragments of different sizes."""
        tensors.take_over()
        state = self._state("a change of what is averaged", "period", period, **tensors.stated)
        handshake = Handshake(self._workers, state).complete()
        handshake.check_tensors(
            "The workers do not average the same tensors.",
            lambda: self._tracker.describe(tensors.layout, tensors.tensors),
        )
        tensors.agree(handshake.know_the_same)
        self._known = tensors

    def _launch(self, round_: SpreadRound, tensors: AveragedTensors, step: int) -> None:
        state = self._state("a fragment of an averaging round", "period", round_.period)
        ahead = self._policy.look_ahead(round_.delay)
        before = self._before
        values = before.values if before is not None and before.is_of(tensors, round_) and any(ahead) else None
        drifted = self.clock.send(self.steps)
        with naming_lost_workers(self._workers, state, self.handshakes):
            buckets, finite = tensors.averager.send(round_.sent, round_.fragments, self._async_group, values, ahead)
        handshake = Handshake(self._workers, state._replace(finite=finite))
        ahead = [] if values is None else ahead
        self.in_flight.append(_Fragment(round_, tensors, state, handshake, buckets, self.steps, ahead, drifted))
        round_.sent += 1
        round_.step = step
        self._sent_at = self.steps

    def _land(self, everything: bool) -> tuple[list[Handshake], list[SpreadRound]]:
        handshakes: list[Handshake] = []
        ended: list[SpreadRound] = []
        for fragment in self.in_flight:
            # A reduction in two phases starts the second phase half-way.
            if self.steps - fragment.step >= -(-fragment.round.delay // 2):
                self._all(fragment.state, [bucket.reduction.advance for bucket in fragment.buckets])
        while self.in_flight and (everything or self.steps >= self.in_flight[0].lands_at):
            fragment = self.in_flight.popleft()
            handshakes.append(fragment.handshake.complete())
            if fragment.handshake.diverged:
                self._abandon(fragment)
            self._all(fragment.state, [lambda fragment=fragment: self._adopt(fragment)])  # type: ignore[misc]
            if fragment.round.landed == fragment.round.fragments:
                ended.append(fragment.round)
        return handshakes, ended

    def _adopt(self, fragment: _Fragment) -> None:
        round_ = fragment.round
        as_sent = self.steps == fragment.step and not fragment.ahead and not self._tracker.moved_by_others
        self._tracker.rebind(fragment.tensors)
        on_deviations = self._policy.estimate(
            fragment.tensors.tensors, fragment.drifted, self.steps - fragment.step, fragment.ahead
        )
        round_.deviations += fragment.tensors.averager.adopt(fragment.buckets, not as_sent, on_deviations)
        round_.landed += 1
        if round_.fragments == 1 and as_sent:
            self._begin_anew()

    def _abandon(self, fragment: _Fragment) -> None:
        """Wait for everything in flight, discard it, and raise ``Diverged``."""
        self._round = None
        self.clock.restart()  # a full round follows
        self._drop([fragment, *self.in_flight])
        raise Diverged

    def _drop(self, fragments: Sequence[_Fragment]) -> None:
        self.in_flight.clear()
        for each in fragments:
            each.handshake.complete()
            self._all(each.state, [bucket.reduction.wait for bucket in each.buckets])

    def _all(self, state: RankState, actions: Sequence[Callable[[], object]]) -> None:
        """Run actions that wait for other workers; raise the error for a lost worker if one is gone."""
        with naming_lost_workers(self._workers, state, self.handshakes):
            for action in actions:
                action()
