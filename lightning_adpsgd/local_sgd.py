"""One optimizer's life between averaging rounds. Knows no Lightning: a plain PyTorch loop can use it as it is."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.averaging.momentum import LookAhead, check_known_moments
from lightning_adpsgd.averaging.optimizer_state import (
    average_moments,
    forget,
    has_state,
    moments,
    reset_moments,
    share_state,
    state_at_start,
)
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker, all_finite, squared_norm
from lightning_adpsgd.errors import WorkersDivergedError
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.periods.checks import check_state
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, Kind, RankState, check_module, lost, naming_lost_workers
from lightning_adpsgd.rounds.pipeline import Cycles, Diverged
from lightning_adpsgd.rounds.record import TRIGGERS, AveragingRound, Trigger, ring_bytes
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.validation import (
    REDUCE_DTYPES,
    OnDivergence,
    OptimizerState,
    ReduceDtype,
    as_period,
    check_bucket_size,
    check_combination,
    check_flag,
    check_index,
    check_listener,
    check_on_divergence,
    check_optimizer,
    check_optimizer_state,
    check_optional,
    check_overlap,
    check_patterns,
    check_reduce_dtype,
    check_total_steps,
)
from lightning_adpsgd.workers.group import Contribution, WorkerGroup
from lightning_adpsgd.workers.reduction import CollectiveError, Reduction

_READS_LATER: bool | None = None
"""Whether a round's measures are read in the next step; None: on CUDA. Tests set it where there is no GPU."""


class SignalFlags:
    """Bits that any worker may raise at any time, and that all workers know after the next averaging round.

    They ride with the round, so they cost no collective of their own.
    """

    def __init__(self) -> None:
        self.raised = 0
        """This worker's bits; may be set from a signal handler."""
        self.agreed = 0
        """The bits that any worker had raised when the latest round began."""


class LocalSGD:
    """Counts an optimizer's local steps, and averages its parameters over the workers when the period is over.

    Call :meth:`step` after every step of the optimizer, and :meth:`average` before you validate, save, or stop::

        local_sgd = LocalSGD(optimizer, AdaptivePeriod(), module=model, total_steps=len(loader) * epochs)
        local_sgd.broadcast()  # all workers start from the first worker's parameters
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            local_sgd.step()
        local_sgd.average()

    Every worker has to call these methods in the same order, and to have built the same optimizer.

    Args:
        optimizer: its parameters are averaged. Its parameter groups need a learning rate (``"lr"``).
        period: the rule; an int is a constant period; None is :class:`AdaptivePeriod` with its defaults.
        module: its floating-point buffers (BatchNorm statistics) join each round, and errors use its parameters' names.
        total_steps: K, the optimizer steps of the whole run; None if it is not known; "later" if :meth:`setup` will be
            called before the first step.
        average_buffers: whether the module's buffers join the rounds: floating-point ones that it saves. Caches
            (``register_buffer(..., persistent=False)``) and integers stay each worker's own.
        exclude_buffers: names of buffers that stay each worker's own, as patterns of :mod:`fnmatch`, in which ``*`` is
            any text: ``["*.queue", "memory.*"]``.
        optimizer_state: what a round does to momentum and moments: leave them "local"; "average" them over the workers
            (floating-point state tensors of a parameter's shape); or "reset" them to what they are before the first
            step, for optimizers of torch.optim and those derived from one. A round for a checkpoint averages all state.
        on_divergence: what a round does when parameters of some workers are not finite: "raise" an error, or "drop"
            these workers from the mean, and have them go on from that of the others, with the optimizer's state as
            before the first step.
        bucket_size_mb: the longest range of parameters reduced at once, in MiB. At most two are in memory.
        stagger: spread each round over the period: after each step one p-th of all elements is averaged.
        overlap: d, how many local steps go on while a round, or a part of it, travels; at most p − 1 are.
        reduce_dtype: "bf16" or "fp16": in rounds that the period asks for, differences from the last average travel in
            that type, and what rounding cuts off travels in the next round. Takes two more copies of what is averaged.
        workers: whom to average with; None is the default process group.
        carrier: the same workers on connections of their own, for what travels while training goes on; made if needed.
        notice: bits for all workers to learn at the next round.
        owners: one dict for all optimizers of a run, in which they note who averages a parameter that several have.
        index: the optimizer's index, for the records.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, a parameter group has no learning rate, ``period`` needs to know
            ``total_steps``, or ``optimizer_state`` is "reset" and it is not known what are the optimizer's moments.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: AveragingPeriod | int | None = None,
        *,
        module: nn.Module | None = None,
        total_steps: int | Literal["later"] | None = None,
        average_buffers: bool = True,
        exclude_buffers: Sequence[str] = (),
        optimizer_state: OptimizerState = "local",
        on_divergence: OnDivergence = "raise",
        bucket_size_mb: float = 64.0,
        stagger: bool = False,
        overlap: int = 0,
        reduce_dtype: ReduceDtype | None = None,
        workers: WorkerGroup | None = None,
        carrier: WorkerGroup | None = None,
        notice: SignalFlags | None = None,
        owners: dict[int, Any] | None = None,
        index: int = 0,
    ) -> None:
        # Configuration
        self.optimizer = check_optimizer(optimizer)
        self.period = as_period(period)
        self.optimizer_state = check_optimizer_state(optimizer_state)
        self.on_divergence = check_on_divergence(on_divergence)
        self.index = check_index(index)
        self.workers = check_optional("workers", workers, WorkerGroup) or WorkerGroup()
        self.stagger = check_flag("stagger", stagger)
        self.overlap = check_overlap(overlap)
        self.reduce_dtype = check_reduce_dtype(reduce_dtype)
        check_combination(self.stagger, self.overlap, self.optimizer_state, self.period)
        if self.optimizer_state == "reset":
            check_known_moments(optimizer)
        self._module = check_optional("module", module, nn.Module)
        self._bucket_bytes = int(check_bucket_size(bucket_size_mb) * 2**20)
        owners = check_optional("owners", owners, dict)
        self._payloads = TensorTracker(
            optimizer,
            buffers_of=module if check_flag("average_buffers", average_buffers) else None,
            exclude_buffers=check_patterns("exclude_buffers", exclude_buffers),
            names_of=module,
            workers=self.workers,
            bucket_bytes=self._bucket_bytes,
            reduce_dtype=None if self.reduce_dtype is None else REDUCE_DTYPES[self.reduce_dtype],
            # Two corrections of one parameter that are under way at the same time would add up.
            owners=owners if self.overlap > 0 else None,
        )
        carrier = check_optional("carrier", carrier, WorkerGroup)
        self._notice = check_optional("notice", notice, SignalFlags) or SignalFlags()
        self._listeners: list[Callable[[AveragingRound], None]] = []

        # State
        self.steps = 0
        """Optimizer steps attempted so far."""
        self.local_steps = 0
        """Optimizer steps attempted since the latest round."""
        self._state_shared_at = 0  # the step of the latest round for a checkpoint
        self._anybody_has_state = True  # as far as is known
        self._state_at_start = state_at_start(optimizer) if self.on_divergence == "drop" else {}
        # The steps at which moments began anew: on all workers, by a reset; and on this one, when it was dropped.
        self._reset_at = self._forgot_at = 0
        self._has_drifted = False
        self._warned_of_no_drift = False
        self._warned_of_different_rates = False

        self.handshakes = 0
        """How many times the workers have met for a round of everything. A record may be read later than that."""
        self._restored_rule: dict[str, Any] | None = None
        self._in_reserve: AveragingRound | None = None  # for the rule, if it sees no better one before a forced round
        self._bytes_booked = 0
        self._seconds_booked = 0.0
        # On CUDA the numbers of a round are read in the next step: the device has something to do meanwhile.
        self._reads_later = self.workers.device.type == "cuda" if _READS_LATER is None else _READS_LATER
        self._unread: _Unread | None = None
        self._cycles: Cycles | None = None
        if (self.stagger or self.overlap) and self.workers.count > 1:
            if carrier is None:
                with naming_lost_workers(self.workers, f"opening connections for optimizer {self.index}"):
                    carrier = self.workers.new_async_group()
            self._cycles = Cycles(
                stagger=self.stagger,
                overlap=self.overlap,
                payloads=self._payloads,
                workers=self.workers,
                carrier=carrier,
                call=self._call,
                learning_rates=partial(_learning_rates, optimizer, self.workers.device),
                look_ahead=LookAhead(optimizer, lambda: self.steps - max(self._reset_at, self._forgot_at)).factors,
            )

        _learning_rates(optimizer, self.workers.device)
        if not (isinstance(total_steps, str) and total_steps == "later"):
            self.setup(total_steps)

    def setup(self, total_steps: int | None) -> None:
        """Tell the rule how long the run is; what it has learned, and has been restored, stays.

        Raises:
            TypeError: if ``total_steps`` is neither an int nor None.
            ValueError: if it is negative, or None where the rule needs to know it.
        """
        self.period.setup(check_total_steps(total_steps))
        if self._restored_rule is not None:
            self.period.load_state_dict(self._restored_rule)

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called with the record of every round, on every worker, after the rule has seen it."""
        self._listeners.append(check_listener(listener))

    def broadcast(self) -> None:
        """Give every worker the first worker's parameters and buffers.

        Raises:
            WorkersDisagreeError: on every worker, if they have built different modules.
            WorkerLostError: if a worker does not come.
        """
        tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in self._payloads.parameters()}
        if self._module is not None:
            check_module(self.workers, self._module)
            tensors |= {id(tensor): tensor for tensor in (*self._module.parameters(), *self._module.buffers())}
        with naming_lost_workers(self.workers, f"the broadcast of the parameters of optimizer {self.index}"):
            self.workers.broadcast_(tensors.values())
        self.mark_synchronized()

    def step(self) -> AveragingRound | None:
        """Count a step that the optimizer has attempted, and average if the period is over.

        An attempt counts whether or not a gradient scaler let it through, so that workers never disagree.

        Returns:
            A round's record, or None if there is none: that of the round that took place now; on CUDA, that of the
            latest step's; with ``stagger`` or ``overlap``, that of a round that has ended.
        """
        read = self._read_unread()
        self.steps += 1
        self.local_steps += 1
        self._payloads.note_step()
        if self._cycles is not None:
            return self._exchange(self._cycles)
        if self.local_steps < self.period.value:
            return read
        return self._average("period", (), later=self._reads_later) or read

    def average(self, trigger: Trigger = "train_end", also: Sequence[Tensor] = ()) -> AveragingRound | None:
        """Average now, unless no step was taken since the latest round.

        A round for a "checkpoint" averages the optimizer's state too, whatever the policy, and every worker goes on
        from the average. So the state that is saved afterwards is that of all workers, and a run that goes on from the
        file is the run that was not interrupted. Such a round takes place even if only the state is not averaged yet.

        Args:
            trigger: who asks, for the record. Only rounds asked for by the "period" are shown to the rule.
            also: further floating-point tensors to average in this round, which then takes place in any case.

        Returns:
            The round's record. If there was no round, that of one before whose measures were still under way, or None.

        Raises:
            WorkersDisagreeError: on every worker, if they have not taken the same steps or not built the same model.
            WorkersDivergedError: on every worker, if any worker's parameters are not finite (with ``on_divergence``
                "drop": all workers'), in which case nothing is overwritten; or if they are so far apart that their
                variance is not, which shows only afterwards.
            WorkerLostError: if a worker has failed, was killed, or did not come before the process group's timeout.
        """
        if trigger not in TRIGGERS:
            raise ValueError(
                f"LocalSGD.average(trigger={trigger!r}): expected one of {', '.join(map(repr, TRIGGERS))}."
            )
        arrived = self._read_unread() if self._cycles is None else self._receive(self._cycles, everything=True)
        if self._in_reserve is not None:
            self._show(self._in_reserve)
        unshared = trigger == "checkpoint" and self.steps > self._state_shared_at and self._anybody_has_state
        if not self.has_trained and not also and not unshared:
            return arrived
        return self._average(trigger, also)

    def state_dict(self) -> dict[str, Any]:
        """The counters and the rule's state, as plain numbers and the name of the rule's class."""
        return {
            "steps": self.steps,
            "local_steps": self.local_steps,
            "state_shared_at": self._state_shared_at,
            "moments_since": self._reset_at,
            "rule": type(self.period).__name__,
            "period": self.period.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a rule of another class than the saved one starts anew, with a warning.

        Raises:
            ValueError: if an entry is missing, and nothing is changed then.
        """
        check_state("LocalSGD", state, ("steps", "local_steps", "state_shared_at", "rule", "period"))
        self.steps = state["steps"]
        self.local_steps = state["local_steps"]
        self._state_shared_at = state["state_shared_at"]
        self._reset_at, self._forgot_at = state.get("moments_since", 0), 0  # files of earlier versions do not say
        rule = type(self.period).__name__
        if rule == state["rule"]:
            self.period.load_state_dict(state["period"])
            # Before its first step, a rule may have been saved that did not know yet how long the run would be.
            self._restored_rule = state["period"] if self.steps > 0 else None
        elif self.workers.rank == 0:
            warnings.warn(
                f"The saved averaging rule was {state['rule']}, this one is {rule}: it starts anew at step"
                f" {self.steps}. To go on where the run had stopped, pass the same kind of period as before.",
                stacklevel=2,
            )

    @property
    def has_trained(self) -> bool:
        """Whether there is something to average: a step was taken since all workers adopted the same.

        With ``reduce_dtype`` also, whether they owe each other what rounding has cut off.
        """
        if self.local_steps > 0 or self._payloads.owes or self._payloads.moved_by_others:
            return True
        return self._cycles is not None and not self._cycles.fresh

    @property
    def is_complete(self) -> bool:
        """Whether no step was taken since a checkpoint's round: all that is saved now is that of all workers."""
        return not self.has_trained and (self._state_shared_at == self.steps or not self._anybody_has_state)

    def mark_synchronized(self) -> None:
        """Take note that all workers have been given the same weights and optimizer state, from a file for example."""
        self.local_steps = 0
        self._state_shared_at = self.steps
        self._in_reserve = None
        self._payloads.moved_by_others = False
        if self._cycles is not None:
            self._cycles.restart()
        if self.workers.count > 1:
            self._payloads.mark_synchronized()

    # Rounds that are under way while training goes on

    @torch.inference_mode(False)
    @torch.no_grad()
    def _exchange(self, cycles: Cycles) -> AveragingRound | None:
        """After a step: adopt what has arrived, and send what is due."""
        cycles.step()
        round_ = self._receive(cycles)
        try:
            with self._booked():
                self._take_note(cycles.send(self.steps, self.period.value))
        except Diverged:
            return self._average("period", ())
        round_ = self._receive(cycles) or round_
        with self._booked():
            cycles.look_ahead(self.period.value)
        return round_

    @torch.inference_mode(False)
    @torch.no_grad()
    def _receive(self, cycles: Cycles, everything: bool = False) -> AveragingRound | None:
        """Adopt what has arrived; if some worker has sent what is not finite, deal with that in a round of its own."""
        try:
            with self._booked():
                finished = cycles.finish(self.steps) if everything else []
                meetings, measures = cycles.receive(self.steps, everything)
        except Diverged:
            return self._average("period", ())
        self._take_note([*finished, *meetings])
        round_ = None
        for measured in measures:
            if self.optimizer_state == "reset":
                self._reset()
            since = self.local_steps - (self.steps - measured.step)
            self._start_from(measured.step)
            round_ = self._record(
                step=measured.step,
                trigger="period",
                local_steps=since,
                period=measured.period,
                measured=_measured(measured.means),
            )
            self._finish(round_, self._payloads.current(), shown=measured.drift == "a period")
            if measured.drift == "at least a period":
                # Compared with others it is too large. Where there are no others, it compares with its like.
                self._in_reserve = round_
        return round_

    def _take_note(self, meetings: Sequence[Handshake]) -> None:
        for meeting in meetings:
            self._warn_of_different_rates(meeting.learning_rates)
            self._notice.agreed |= meeting.notice
            self._anybody_has_state = meeting.anybody_has_state

    # What a round costs, and its record

    @contextmanager
    def _booked(self) -> Iterator[None]:
        """Book the time that passes, and the bytes that are sent, to the next record."""
        started, sent_before = time.perf_counter(), self.workers.payload_bytes
        try:
            yield
        finally:
            self._seconds_booked += time.perf_counter() - started
            self._bytes_booked += self.workers.payload_bytes - sent_before

    def _record(
        self, *, step: int, trigger: Trigger, local_steps: int, period: int, measured: "_Measured", dropped: int = 0
    ) -> AveragingRound:
        round_ = AveragingRound(
            step=step,
            optimizer=self.index,
            trigger=trigger,
            local_steps=local_steps,
            period=period,
            learning_rate=measured.learning_rate,
            variance=measured.variance,
            ratio=measured.ratio,
            target=self.period.target,
            payload_bytes=self._bytes_booked,
            sent_bytes=ring_bytes(self._bytes_booked, self.workers.count),
            seconds=self._seconds_booked,
            dropped=dropped,
        )
        self._bytes_booked, self._seconds_booked = 0, 0.0
        return round_

    def _call(self, kind: Kind, trigger: Trigger, period: int, **about: Any) -> RankState:
        """What this worker states now."""
        return RankState(
            KINDS.index(kind),
            self.steps,
            TRIGGERS.index(trigger),
            self.index,
            period,
            notice=self._notice.raised,
            learning_rates=sum(_learning_rates(self.optimizer, self.workers.device)),
            has_state=has_state(self.optimizer),
            **about,
        )

    # One round, part by part

    @torch.inference_mode(False)  # tensors that are made in inference mode could not be written to later
    @torch.no_grad()
    def _average(self, trigger: Trigger, also: Sequence[Tensor], later: bool = False) -> AveragingRound | None:
        """Average; return the record, unless it is to be read later."""
        payload = self._payloads.current()
        payload.take_over()
        sent_before = self.workers.payload_bytes
        stopwatch = Stopwatch(self.workers.device, self.workers.patience.wait_for)
        numbers, dropped = self._average_all(trigger, payload, also)
        stopwatch.stop()
        self._bytes_booked += self.workers.payload_bytes - sent_before
        self._unread = _Unread(
            step=self.steps,
            trigger=trigger,
            local_steps=self.local_steps,
            period=self.period.value,
            dropped=dropped,
            numbers=numbers,
            payload=payload,
            stopwatch=stopwatch,
        )
        if self._cycles is not None:
            self._cycles.restart()
        self._payloads.moved_by_others = False
        self._start_from(self.steps)
        return None if later else self._read_unread()

    def _read_unread(self) -> AveragingRound | None:
        """Read what the latest round has measured, if that was not done yet, and let the rule decide."""
        unread, self._unread = self._unread, None
        if unread is None:
            return None
        try:
            with unread.stopwatch.waiting():
                means = unread.numbers.wait().tolist()
            self._seconds_booked += unread.stopwatch.seconds
        except CollectiveError as error:
            raise lost(self.workers, self._call("an averaging round", unread.trigger, unread.period), error) from error
        round_ = self._record(
            step=unread.step,
            trigger=unread.trigger,
            local_steps=unread.local_steps,
            period=unread.period,
            measured=_measured(means),
            dropped=unread.dropped,
        )
        self._finish(round_, unread.payload, shown=self._cycles is None)
        return round_

    def _start_from(self, step: int) -> None:
        """Take note of a round at a step: what is trained since then is what is averaged next."""
        self.local_steps = self.steps - step
        if not self.has_trained:
            self._payloads.note_averaged()

    def _average_all(self, trigger: Trigger, payload: AveragedTensors, also: Sequence[Tensor]) -> tuple[Reduction, int]:
        """Average all there is; return what was measured, which is under way, and how many workers were left out."""
        more = FlatLayout(also, [None] * len(also)) if also else None
        further = [tensor for tensor in also if isinstance(tensor, nn.Parameter)]
        watched = [*payload.parameters, *further]
        stated = payload.stated
        call = self._call(
            "an averaging round",
            trigger,
            self.period.value,
            fingerprint=stated["fingerprint"] ^ (0 if more is None else more.fingerprint),
            known=stated["known"],
            finite=self.workers.size == 1 or payload.layout.are_finite(self.workers.device) & all_finite(further),
        )
        meeting = Handshake(self.workers, call).hold()
        self.handshakes += 1
        try:
            self._conclude(meeting, payload, more, also, watched)
            numbers = self._average_and_measure(trigger, payload, meeting.share)
            if more is not None:
                ParameterAverager(more, 0, self.workers, self._bucket_bytes).average(meeting.share)
            self._treat_optimizer_state(trigger, meeting.share)
        except CollectiveError as error:
            raise lost(self.workers, call, error) from error
        return numbers, len(meeting.diverged_workers)

    def _conclude(
        self,
        meeting: Handshake,
        payload: AveragedTensors,
        more: FlatLayout | None,
        also: Sequence[Tensor],
        watched: list[Tensor],
    ) -> None:
        """Draw the conclusions from what the workers have stated, before anything is overwritten."""
        what = f"The workers of optimizer {self.index} do not average the same tensors at step {self.steps}."
        described = self._payloads.describe
        meeting.check_tensors(
            what,
            lambda: [
                *described(payload.layout, payload.tensors),
                *([] if more is None else described(more, also)),
            ],
        )
        payload.agree(meeting.know_the_same)
        if meeting.diverged:
            self._deal_with_divergence(meeting, watched)
        self._warn_of_different_rates(meeting.learning_rates)
        self._notice.agreed = meeting.notice
        self._anybody_has_state = meeting.anybody_has_state

    def _average_and_measure(self, trigger: Trigger, payload: AveragedTensors, share: Contribution) -> Reduction:
        """Replace all tensors by their means; begin to find out S_g and γ_g of all groups, means over the workers."""
        rates = _learning_rates(self.optimizer, self.workers.device)
        deviations: list[float | Tensor] = [0.0] * len(rates)
        if self.workers.count > 1 and self.has_trained:
            as_it_is = trigger != "period" or share != self.workers.all_contribute
            deviations = [*payload.averager.average(share, as_it_is)]
        return self.workers.launch_mean([*deviations, *rates], share)

    def _treat_optimizer_state(self, trigger: Trigger, share: Contribution) -> None:
        if not share.contributes:
            forget(self.optimizer, self._state_at_start)
            self._forgot_at = self.steps
        if self.optimizer_state == "average" and self.has_trained and self._anybody_has_state:
            average_moments(self.optimizer, self.workers, self._bucket_bytes, share)
        if self.optimizer_state == "reset" and self.has_trained:
            self._reset()
        if trigger == "checkpoint":
            if self._anybody_has_state:
                averaged = {id(m) for m in moments(self.optimizer)} if self.optimizer_state == "average" else set()
                share_state(self.optimizer, self.workers, self._bucket_bytes, averaged, share)
                self._forgot_at = 0  # it has been given the others' moments
            self._state_shared_at = self.steps

    def _reset(self) -> None:
        reset_moments(self.optimizer)
        self._reset_at = self.steps

    def _finish(self, round_: AveragingRound, payload: AveragedTensors, shown: bool) -> None:
        if not math.isfinite(round_.ratio):
            raise WorkersDivergedError(
                f"The variance of the parameters among the workers is not finite (S_k = {round_.variance}, S_k/γ_k ="
                f" {round_.ratio}) at step {round_.step} of optimizer {self.index}: the workers' parameters are finite,"
                " but so far apart that training has diverged. Lower the learning rate, clip gradients, or average more"
                " often (a smaller period, or a warm-up)."
            )
        if shown and round_.trigger == "period" and round_.dropped == 0:
            # The variance among fewer workers is another one: a round that has left some out is not shown to the rule.
            self._show(round_)
        self._warn_of_no_drift(round_, payload)
        for listener in self._listeners:
            listener(round_)

    def _show(self, round_: AveragingRound) -> None:
        """Let the rule decide."""
        self._in_reserve = None
        self.period.update(round_.step, ratio=round_.ratio, learning_rate=round_.learning_rate)

    # What can go wrong

    def _deal_with_divergence(self, meeting: Handshake, watched: list[Tensor]) -> None:
        ranks = meeting.diverged
        mine = [self._payloads.name_of(tensor) for tensor in watched if not all_finite([tensor])]
        names = self.workers.gather_objects(mine)
        first = names[ranks[0]]
        found = (
            f"Parameters of rank(s) {', '.join(map(str, ranks))} are not finite at step {self.steps} (optimizer"
            f" {self.index}); on rank {ranks[0]} the first of {len(first)} are: {', '.join(first[:3])}."
        )
        advice = (
            "Training diverged there: lower the learning rate, clip gradients, or look for bad samples in that rank's"
            " data."
        )
        if self.on_divergence == "raise" or len(meeting.diverged_workers) == self.workers.count:
            everybody = " There is no worker left to go on from." if self.on_divergence == "drop" else ""
            raise WorkersDivergedError(f"{found} No rank's parameters were overwritten.{everybody} {advice}")
        if self.workers.rank == 0:
            warnings.warn(
                f"{found} As on_divergence='drop' says, they are left out of this average and go on from the others'."
                f" {advice}",
                stacklevel=2,
            )

    def _warn_of_different_rates(self, rates: list[float]) -> None:
        if self._warned_of_different_rates or len(set(rates)) == 1:
            return
        self._warned_of_different_rates = True
        if self.workers.rank == 0:
            each = ", ".join(f"rank {rank}: {rate:g}" for rank, rate in enumerate(rates))
            warnings.warn(
                f"The workers' learning rates differ at step {self.steps} (summed over the parameter groups: {each})."
                " All workers still take the same decisions, from the mean; but a checkpoint holds rank 0's rates."
                " Usual cause: a scheduler such as ReduceLROnPlateau that goes by a metric of one worker alone. Log"
                " the metric with sync_dist=True.",
                stacklevel=2,
            )

    def _warn_of_no_drift(self, round_: AveragingRound, payload: AveragedTensors) -> None:
        if self._warned_of_no_drift or round_.learning_rate == 0.0 or round_.local_steps == 0 or not payload.parameters:
            return
        if self.workers.count - round_.dropped == 1 or self._has_drifted:
            return
        # The mean of three equal numbers is not quite that number: three divisions and two sums, rounded each.
        noise = (2 * torch.finfo(torch.float32).eps) ** 2
        if round_.variance > noise * squared_norm(payload.parameters):
            self._has_drifted = True
            return
        self._warned_of_no_drift = True
        if self.workers.rank == 0:
            warnings.warn(
                f"After {round_.local_steps} local step(s) the parameters of all {self.workers.count} workers are"
                " identical. Probably every worker sees the same data: give each its own share, for example with"
                " torch.utils.data.DistributedSampler (Lightning's Trainer does so unless"
                " use_distributed_sampler=False), or with a different seed per worker for random or iterable data.",
                stacklevel=2,
            )


class _Unread(NamedTuple):
    """A round whose measures are under way."""

    step: int
    trigger: Trigger
    local_steps: int
    period: int
    dropped: int
    numbers: Reduction
    """S_g of each parameter group, then γ_g of each."""
    payload: AveragedTensors
    stopwatch: Stopwatch


class _Measured(NamedTuple):
    variance: float
    ratio: float
    learning_rate: float


def _measured(means: Sequence[float]) -> _Measured:
    """S_k = Σ_g S_g and r = Σ_g S_g / γ_g, over the parameter groups with γ_g > 0.

    Args:
        means: over the workers: S_g of each group, then γ_g of each.
    """
    variances, rates = means[: len(means) // 2], means[len(means) // 2 :]
    ratio = sum(variance / rate for variance, rate in zip(variances, rates, strict=True) if rate > 0.0)
    return _Measured(sum(variances), ratio, next((rate for rate in rates if rate > 0.0), 0.0))


def _learning_rates(optimizer: Optimizer, device: torch.device) -> list[float | Tensor]:
    rates = []
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if not isinstance(rate, int | float | Tensor):
            raise ValueError(
                f"Parameter group {index} of {type(optimizer).__name__} has lr={rate!r}: expected a number. The"
                " averaging rule needs the learning rate; use an optimizer that keeps it in its parameter groups."
            )
        rates.append(_number(rate, device))
    return rates


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """As a float, unless it is on the device that trains, which the host would have to wait for."""
    return value.detach() if isinstance(value, Tensor) and value.device.type == device.type else float(value)
