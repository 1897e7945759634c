"""Runs elastic rounds: asks for a quorum, stages the means, and writes them back once all members have them."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging.staged import StagedMeans
from lightning_adpsgd.averaging.tensors import AveragedTensors
from lightning_adpsgd.elastic.admission import check_admitted, warn_of_twins
from lightning_adpsgd.elastic.lighthouse import AnsweredQuorum, Lighthouse, QuorumError
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.elastic.plan import MemberState, Plan, plan_of
from lightning_adpsgd.elastic.worker_state import JoinableState
from lightning_adpsgd.rounds.engine import RoundEngine
from lightning_adpsgd.rounds.measures import Measuring
from lightning_adpsgd.rounds.record import Trigger
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.quorum_group import QuorumGroup
from lightning_adpsgd.workers.reduction import CollectiveError, Reduction

SECONDS_BETWEEN_ATTEMPTS = 0.1

_log = logging.getLogger(__name__)

Outcome = Literal["committed", "aborted", "no quorum"]
"""How an attempted round has ended. Nothing was overwritten unless it was committed."""


class Rule(NamedTuple):
    """The averaging rule, as the engine sees it."""

    period: Callable[[], int]
    """Returns the period in force."""
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any], int], None]
    """Continues from a state, at a number of steps."""


class Meeting(NamedTuple):
    """How the workers meet."""

    lighthouse: Lighthouse
    transport: Any
    """torchft's ``CheckpointTransport``, which sends a worker's state to one that joins."""
    state: JoinableState
    rule: Rule
    options: ElasticOptions


class _Staged(NamedTuple):
    """The means of a round that is not known to be committed."""

    round: int
    tensors: AveragedTensors
    means: StagedMeans | None
    """None if there are none, because nobody else takes part."""
    local_steps: int
    """Local steps that the values sent had taken."""


class ElasticEngine(RoundEngine):
    """A :class:`RoundEngine` whose full rounds are among the workers of a quorum, and are committed or not at all.

    A round stages all means in buffers of their own. The members then reduce what they measure on them, which is their
    vote: nobody gets the result before all have all means. A worker that gets it commits: it writes the means back. One
    that does not is in doubt: it goes on with its own values, and holds the means until the next quorum, where it
    learns whether another worker has committed. If one has, so does this worker, and keeps the steps that it has taken
    meanwhile: w ← w + (w̄ − values sent).
    """

    _meeting: Meeting
    _workers: QuorumGroup
    committed = 0
    """Rounds that this worker has committed, the one in which it joined included; 0: it has not joined yet."""
    _staged: _Staged | None = None
    _not_before = 0  # the step before which no further quorum is asked for
    _connection = ""
    _writer = ""
    _lacks_lighthouse = False
    _met = 0  # workers in the latest quorum, if these were too few

    def attach(self, meeting: Meeting) -> None:
        """Set how the workers meet."""
        self._meeting = meeting
        self._warned_of: set[str] = set()

    @override
    def _is_due(self, period: int) -> bool:
        return super()._is_due(period) and self.steps >= self._not_before

    @override
    def run(self, trigger: Trigger, period: int, also: Sequence[Tensor] = (), later: bool = False) -> None:
        if also:
            raise ValueError(
                f"LocalSGD.average(also=...) with {len(also)} tensor(s): expected none, because an elastic round writes"
                " nothing back before all workers have all means. Put the tensors into the module, as buffers."
            )
        self.attempt(trigger)

    @torch.inference_mode(False)
    @torch.no_grad()
    def attempt(self, trigger: Trigger) -> Outcome:
        """Ask for a quorum, and take part in its round.

        Raises:
            WorkersDisagreeError: on a worker that does not average the same tensors as the others.
            WorkersDivergedError: on a worker whose parameters are not finite. The others go on without it.
        """
        meeting, group = self._meeting, self._workers
        tensors = self.tracker.current()
        stopwatch = Stopwatch(group.device, None)
        sent_before = group.payload_bytes
        stated = self._stated(trigger, tensors)
        try:
            quorum = meeting.lighthouse.ask(stated, meeting.options.quorum_timeout)
        except QuorumError as error:
            if not self._lacks_lighthouse:
                _log.warning("%s Training goes on locally.", error)
            self._lacks_lighthouse, self._met = True, 0
            return self._postpone()
        self._lacks_lighthouse = False
        plan = plan_of(quorum.members, meeting.lighthouse.name)
        check_admitted(plan, stated, meeting.lighthouse.name, self.tracker)
        warn_of_twins(plan, self._warned_of)
        self._settle(plan)
        least = meeting.options.min_workers
        if not plan.contributors:
            least = max(least, meeting.options.start_workers)
        if len(plan.members) < least:
            if len(plan.members) != self._met:
                _log.warning("%d worker(s) of at least %d have met.", len(plan.members), least)
            self._met = len(plan.members)
            return self._postpone()
        self._met = 0
        lost, numbers = None, None
        try:
            numbers = self._average(plan, quorum, tensors)
        except CollectiveError as error:
            lost = str(error)  # its traceback would keep connections open
        if numbers is None:
            _log.warning("Round %d lost a worker: %s", plan.round, lost)
            self._connection = ""
            group.disconnect()
            return "aborted"
        if plan.contributors:
            stopwatch.stop()
            self._measures.book_bytes_since(sent_before)
            self._measures.append(self._measuring(plan, tensors, numbers, stopwatch))
        self._start_from(self.steps)
        return "committed"

    def may_try_again(self, deadline: float) -> bool:
        """Whether another attempt may find others, before ``deadline`` (of ``time.monotonic()``).

        Not if too few have met. A lighthouse that does not answer may be about to start again: this waits a little.
        """
        if not self._lacks_lighthouse:
            return self.steps >= self._not_before
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        return time.monotonic() < min(deadline, self._meeting.lighthouse.latest)

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes for all: one of those of the latest round, until it is lost."""
        return self._writer == self._meeting.lighthouse.name

    @property
    def is_alone(self) -> bool:
        """Whether the latest quorum was too small, and of this worker alone."""
        return self._met == 1

    def hurry(self) -> None:
        """Wait no longer than ``leave_timeout`` for a quorum from now on. May be called by a signal handler."""
        self._meeting.lighthouse.hurry(self._meeting.options.leave_timeout)

    def leave(self) -> None:
        """Close the connections, and stop the heartbeats."""
        self._staged, self._connection = None, ""
        self._workers.disconnect()
        self._meeting.lighthouse.close()

    def _stated(self, trigger: Trigger, tensors: AveragedTensors) -> MemberState:
        rule = self._meeting.rule
        return MemberState(
            committed=self.committed,
            staged=0 if self._staged is None else self._staged.round,
            steps=self.steps,
            local_steps=self.local_steps,
            trigger=trigger,
            fingerprint=tensors.layout.fingerprint,
            tensors=len(tensors.tensors),
            finite=bool(tensors.layout.are_finite(self._workers.device)),
            connection=self._connection,
            writer=self._writer,
            period=rule.period(),
            rule=rule.state_dict(),
        )

    def _postpone(self) -> Outcome:
        """Train for another period before the next attempt."""
        self._not_before = self.steps + self._meeting.rule.period()
        return "no quorum"

    def _settle(self, plan: Plan) -> None:
        """Commit what was staged in an earlier round if others have committed it; discard it otherwise."""
        staged, self._staged = self._staged, None
        if staged is None:
            return
        means = staged.means
        if plan.commits_staged:
            since = self.local_steps - staged.local_steps
            self.tracker.rebind(staged.tensors)
            if means is not None and since > 0:
                means.write_late()
            elif means is not None:
                means.write()
            self.committed, self.local_steps = staged.round, since
            self._follow(plan)  # whose rule has seen that round: from now on this worker may lead
        elif means is not None:
            means.release()

    def _average(self, plan: Plan, quorum: AnsweredQuorum, tensors: AveragedTensors) -> Reduction:
        """Stage the means, vote, and write them back; return the round's measures, which have arrived."""
        assert plan.rank is not None
        group = self._workers
        self._connect(plan, quorum)
        self._follow(plan)
        self._writer = plan.writer
        self.restore(plan.steps, self.local_steps)
        contributors = plan.contributors or (plan.leader,)
        place = contributors.index(plan.rank) if plan.rank in contributors else None
        group.contribute(Contribution(len(contributors), place))
        self._hand_over(plan)
        means = None
        deviations: Sequence[float | Tensor] = [0.0] * tensors.averager.groups
        if len(plan.members) > 1 and plan.contributors:
            means = StagedMeans(tensors.averager, group)
            deviations = [*means.deviations()]
        try:
            # The vote: it completes only if all members have all means.
            numbers = self._measures.launch(deviations, group.all_contribute)
            numbers.wait()
        except CollectiveError:
            # This worker has all it needs, so it may commit late. One that has not joined yet starts over.
            if self.committed > 0:
                if means is not None:
                    means.keep_sent()
                self._staged = _Staged(plan.round, tensors, means, self.local_steps)
            raise
        if means is not None:
            means.write()
        self.committed, self.local_steps = plan.round, self.local_steps if plan.rank in plan.contributors else 0
        return numbers

    def _connect(self, plan: Plan, quorum: AnsweredQuorum) -> None:
        assert plan.rank is not None
        if plan.keeps_connection:
            return
        self._connection = ""
        store = plan.members[plan.leader].store_address
        names = [member.name for member in plan.members]
        self._workers.connect(f"{store}/adpsgd/{quorum.number}", names[plan.rank], plan.rank, len(names))
        self._connection = f"{quorum.number} {' '.join(names)}"

    def _follow(self, plan: Plan) -> None:
        """Continue from the leader's rule."""
        rule, leader = self._meeting.rule, plan.of_leader
        if rule.state_dict() != leader.rule:
            rule.load_state_dict(leader.rule, plan.steps)

    def _hand_over(self, plan: Plan) -> None:
        """Send the leader's state to the workers that join."""
        meeting = self._meeting
        if not plan.receivers:
            return
        try:
            if plan.rank == plan.leader:
                meeting.transport.send_checkpoint(
                    [*plan.receivers], plan.round, meeting.state.take(), meeting.options.round_timeout
                )
            elif plan.rank in plan.receivers:
                received = meeting.transport.recv_checkpoint(plan.leader, "", plan.round, meeting.options.round_timeout)
                meeting.state.restore(received)
        except RuntimeError as error:
            raise CollectiveError(str(error).splitlines()[0]) from error

    def _measuring(self, plan: Plan, tensors: AveragedTensors, numbers: Reduction, stopwatch: Stopwatch) -> Measuring:
        return Measuring(
            step=self.steps,
            trigger=plan.trigger,
            period=plan.of_leader.period,
            drift="a period" if plan.is_comparable else None,
            numbers=numbers,
            groups=tensors.averager.groups,
            read_at=self.steps,
            local_steps=self.local_steps,
            stopwatch=stopwatch,
            parameters=tensors.parameters,
        )
