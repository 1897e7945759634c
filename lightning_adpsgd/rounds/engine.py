"""The one engine of averaging rounds: holds the handshake, moves what travels, and measures it for one record."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker
from lightning_adpsgd.rounds.guards import Guards, all_finite
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, Kind, RankState, SignalFlags, lost
from lightning_adpsgd.rounds.measures import Measures, Measuring, learning_rates
from lightning_adpsgd.rounds.pipeline import Diverged, Drift, Pipeline, SpreadRound
from lightning_adpsgd.rounds.record import TRIGGERS, AveragingRound, Trigger
from lightning_adpsgd.rounds.schedule import Schedule
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.group import CollectiveError, Numbers, WorkerGroup

_READS_LATER: bool | None = None
"""Whether a round's measures are read in the next step; None: on CUDA. Tests set it where there is no GPU."""


class RoundResult(NamedTuple):
    """What a round came to."""

    record: AveragingRound
    """All of it but the rule's target."""
    scalars: list[float]
    """The means of the numbers that the rule has sent along."""
    drift: Drift | None
    """For how long what was sent had drifted; None where that is not to be compared with other rounds at all."""
    parameters: list[Tensor]


class RoundEngine:
    """Averages one optimizer's parameters: everything at once when told to, or fragments as a schedule says.

    A round of everything holds the handshake before anything is overwritten, and streams bucket by bucket. Fragments
    travel beside training (see :class:`Pipeline`). Measuring, bookkeeping and records are the same for both.

    Args:
        optimizer: its parameters are averaged.
        tracker: knows which tensors are averaged.
        workers: with whom.
        policy: what is done with the optimizer's state.
        guards: look at handshakes.
        schedule: of fragments; None where every round is of everything.
        async_group: the same workers in a process group of its own, for fragments.
        drop: whether workers that have diverged are left out, instead of an error.
        bucket_bytes: the longest range averaged at once.
        flags: bits that ride along.
        index: the optimizer's index.
        scalars: the numbers that the rule sends along, now.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        tracker: TensorTracker,
        workers: WorkerGroup,
        policy: StatePolicy,
        guards: Guards,
        schedule: Schedule | None,
        async_group: WorkerGroup | None,
        drop: bool,
        bucket_bytes: int,
        flags: SignalFlags,
        index: int,
        scalars: Callable[[], Sequence[float | Tensor]],
    ) -> None:
        # Configuration
        self._optimizer = optimizer
        self._tracker = tracker
        self._workers = workers
        self._policy = policy
        self._guards = guards
        self._drop = drop
        self._bucket_bytes = bucket_bytes
        self._flags = flags
        self._index = index
        self._measures = Measures(optimizer, workers, index, scalars)
        self._pipeline: Pipeline | None = None
        if schedule is not None and async_group is not None:
            self._pipeline = Pipeline(
                schedule,
                tracker=tracker,
                workers=workers,
                async_group=async_group,
                state=self._state,
                look_ahead=policy.look_ahead,
            )
        # On CUDA the numbers of a round are read in the next step: the device has something to do meanwhile.
        self._reads_later = workers.device.type == "cuda" if _READS_LATER is None else _READS_LATER

        # State
        self.steps = 0
        """Optimizer steps attempted so far."""
        self.local_steps = 0
        """Optimizer steps attempted since the latest round."""
        self.handshakes = 0
        """How many rounds of everything there were. A record may be read later than that."""

    @property
    def has_trained(self) -> bool:
        """Whether there is something to average: steps since all workers were the same, or residuals of rounding."""
        if self.local_steps > 0 or self._tracker.has_residual or self._tracker.moved_by_others:
            return True
        return self._pipeline is not None and self._pipeline.steps > 0

    def restore(self, steps: int, local_steps: int) -> None:
        """Go on from a checkpoint's counters."""
        self.steps, self.local_steps = steps, local_steps
        self._policy.count(steps)

    def mark_synchronized(self) -> None:
        """Take note that all workers have been given the same, from a file for example."""
        self.local_steps = 0
        self._tracker.moved_by_others = False
        if self._pipeline is not None:
            self._pipeline.restart()
        if self._workers.count > 1:
            self._tracker.mark_synchronized()

    def count_step(self) -> None:
        """Count a step that the optimizer has attempted."""
        self.steps += 1
        self.local_steps += 1
        self._policy.count(self.steps)
        self._tracker.note_step()
        if self._pipeline is not None:
            self._pipeline.count_step()

    def launch(self, period: int) -> None:
        """Send what is due after a step: a round, or a fragment of one.

        Args:
            period: p, in force for a round that begins now.
        """
        if self._pipeline is not None:
            self._send(self._pipeline, period)
        elif self.local_steps >= period:
            self.run("period", period, later=self._reads_later)

    @torch.inference_mode(False)  # tensors that are made in inference mode could not be written to later
    @torch.no_grad()
    def _send(self, pipeline: Pipeline, period: int) -> None:
        with self._falling_back_to_a_whole_round(period), self._measures.booked():
            self._measure(*pipeline.send(self.steps, period))

    def land(self, period: int, everything: bool = False) -> list[RoundResult]:
        """Adopt what has arrived, and return what has been measured.

        Args:
            period: p, in force.
            everything: adopt all that is in flight, and wait for all measures.
        """
        # In a local step between two rounds there is nothing, and that has to cost nothing.
        return self._land(period, everything) if self._pipeline is not None or len(self._measures) > 0 else []

    @torch.inference_mode(False)
    @torch.no_grad()
    def _land(self, period: int, everything: bool) -> list[RoundResult]:
        if self._pipeline is not None:
            with self._falling_back_to_a_whole_round(period), self._measures.booked():
                if everything:
                    self._measure(*self._pipeline.finish(self.steps))
                self._measure(*self._pipeline.land(everything))
        return [self._read(measuring) for measuring in self._measures.pop_ready(self.steps, everything)]

    def keep_for_look_ahead(self, period: int) -> None:
        """After all is done for a step: keep what is needed to look ahead after the next one."""
        if self._pipeline is not None:
            with torch.inference_mode(False), torch.no_grad(), self._measures.booked():
                self._pipeline.keep_for_look_ahead(period)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, trigger: Trigger, period: int, also: Sequence[Tensor] = (), later: bool = False) -> None:
        """Average everything now. Nothing may be in flight.

        Args:
            trigger: who asks.
            period: p, in force.
            also: further tensors to average along.
            later: whether its measures are to be read after the next step.
        """
        tensors = self._tracker.current()
        tensors.take_over()
        stopwatch = Stopwatch(self._workers.device, self._workers.patience.wait_for)
        with self._measures.bytes_booked():
            numbers, dropped = self._average(trigger, period, tensors, also)
        stopwatch.stop()
        # The variance among fewer workers is another one, and so is that of a round which replaces fragments.
        comparable = trigger == "period" and dropped == 0 and self._pipeline is None
        self._measures.append(
            Measuring(
                step=self.steps,
                trigger=trigger,
                period=period,
                drift="a period" if comparable else None,
                numbers=numbers,
                groups=len(self._optimizer.param_groups),
                read_at=self.steps + later,
                local_steps=self.local_steps,
                dropped=dropped,
                stopwatch=stopwatch,
            )
        )
        if self._pipeline is not None:
            self._pipeline.restart()
        self._tracker.moved_by_others = False
        self._start_from(self.steps)

    # One round of everything

    def _average(
        self, trigger: Trigger, period: int, tensors: AveragedTensors, also: Sequence[Tensor]
    ) -> tuple[Numbers, int]:
        """Average everything; return what was measured, which is on its way, and how many workers were left out."""
        more = FlatLayout(also, [None] * len(also)) if also else None
        further = [tensor for tensor in also if isinstance(tensor, nn.Parameter)]
        stated = tensors.stated
        state = self._state(
            "an averaging round",
            trigger,
            period,
            fingerprint=stated["fingerprint"] ^ (0 if more is None else more.fingerprint),
            known=stated["known"],
            finite=self._workers.size == 1 or tensors.layout.are_finite(self._workers.device) & all_finite(further),
        )
        handshake = Handshake(self._workers, state).complete()
        self.handshakes += 1
        try:
            # Whatever has to be known of the others is known before anything is overwritten.
            described = partial(self._describe, tensors, more, also)
            what = f"The workers of optimizer {self._index} do not average the same tensors at step {self.steps}."
            handshake.check_tensors(what, described)
            tensors.agree(handshake.know_the_same)
            if handshake.diverged:
                watched = [*tensors.parameters, *further]
                self._guards.report_divergence(handshake, self.steps, watched, self._drop)
            self._heed(handshake)
            contribution = handshake.contribution
            deviations: Sequence[float | Tensor] = [0.0] * len(self._optimizer.param_groups)
            if self._workers.count > 1 and self.has_trained:
                as_it_is = trigger != "period" or contribution != self._workers.everybody
                deviations = [*tensors.averager.average(contribution, as_it_is)]
            numbers = self._measures.launch(deviations, contribution)
            if more is not None:
                ParameterAverager(more, 0, self._workers, self._bucket_bytes).average(contribution)
            self._policy.apply(contribution, self.has_trained, checkpoint=trigger == "checkpoint")
        except CollectiveError as error:
            raise self._lost(state, error) from error
        return numbers, len(handshake.diverged_workers)

    def _describe(self, tensors: AveragedTensors, more: FlatLayout | None, also: Sequence[Tensor]) -> list[Any]:
        described = self._tracker.describe(tensors.layout, tensors.tensors)
        return described if more is None else [*described, *self._tracker.describe(more, also)]

    # What workers know of each other

    def _state(self, kind: Kind, trigger: Trigger, period: int, **about: Any) -> RankState:
        """Where this rank stands now."""
        return RankState(
            KINDS.index(kind),
            self.steps,
            TRIGGERS.index(trigger),
            self._index,
            period,
            flags=self._flags.raised,
            learning_rates=sum(learning_rates(self._optimizer, self._workers.device)),
            has_state=self._policy.has_state,
            **about,
        )

    def _heed(self, handshake: Handshake) -> None:
        self._guards.compare_learning_rates(handshake, self.steps)
        self._flags.agreed |= handshake.flags
        self._policy.anybody_has_state = handshake.anybody_has_state

    def _lost(self, state: RankState, error: CollectiveError) -> Exception:
        return lost(self._workers, state, error) if self._pipeline is None else self._pipeline.lost(state, error)

    @contextmanager
    def _naming_lost_workers(self, kind: Kind, trigger: Trigger, period: int) -> Iterator[None]:
        try:
            yield
        except CollectiveError as error:
            state = self._state(kind, trigger, period)
            raise self._lost(state, error) from error

    @contextmanager
    def _falling_back_to_a_whole_round(self, period: int) -> Iterator[None]:
        """If some worker has sent what is not finite, deal with that in a round of everything."""
        try:
            yield
            return
        except Diverged:
            with self._naming_lost_workers("an averaging round", "period", period):
                self._measures.discard()
        self.run("period", period)

    def _measure(self, handshakes: Sequence[Handshake], ended: Sequence[SpreadRound]) -> None:
        """Take note of handshakes, and begin to find out what rounds whose last fragment has landed have measured."""
        for handshake in handshakes:
            self._heed(handshake)
        for round_ in ended:
            self._measures.append(
                Measuring(
                    step=round_.step,
                    trigger="period",
                    period=round_.period,
                    drift=round_.drift,
                    numbers=self._measures.launch([*round_.deviations]),
                    groups=len(round_.deviations),
                    # Nobody waits for numbers that are not needed before the next step.
                    read_at=self.steps + (round_.delay > 0),
                )
            )

    def _read(self, measuring: Measuring) -> RoundResult:
        with self._naming_lost_workers("an averaging round", measuring.trigger, measuring.period):
            means = self._measures.read(measuring)
        local_steps = measuring.local_steps
        if local_steps is None:
            self._policy.end_round()
            local_steps = self.local_steps - (self.steps - measuring.step)
            self._start_from(measuring.step)
        record = self._measures.record(measuring, means, local_steps)
        scalars = means[2 * measuring.groups :]
        return RoundResult(record, scalars, measuring.drift, self._tracker.current().parameters)

    def _start_from(self, step: int) -> None:
        """Take note of a round at a step: what is trained since then is what is averaged next."""
        self.local_steps = self.steps - step
        if not self.has_trained:
            self._tracker.note_averaged()
