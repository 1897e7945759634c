"""One optimizer's life between averaging rounds. Knows no Lightning: a plain PyTorch loop can use it as it is."""

import functools
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.arguments import OptimizerState, as_period, check_bucket_size, check_optimizer_state
from lightning_adpsgd.averaging import (
    TRIGGERS,
    AveragingRound,
    FlatLayout,
    ParameterAverager,
    Trigger,
    Workers,
    ring_bytes,
)
from lightning_adpsgd.errors import WorkersDisagreeError, WorkersDivergedError
from lightning_adpsgd.periods import AveragingPeriod


class Notice:
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
        total_steps: K, the optimizer steps of the whole run; None if it is not known.
        average_buffers: whether the module's buffers join the rounds.
        optimizer_state: what a round does to floating-point state tensors of a parameter's shape (momentum, Adam's
            moments): leave them "local", "average" them over the workers, or "reset" them to zero. Step counters are
            never touched.
        bucket_size_mb: the longest range of parameters reduced at once, in MiB. At most two are in memory.
        workers: whom to average with; None is the default process group.
        notice: bits for all workers to learn at the next round.
        index: the optimizer's index, for the records.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, a parameter group has no learning rate, or ``period`` needs to know
            ``total_steps``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: AveragingPeriod | int | None = None,
        *,
        module: nn.Module | None = None,
        total_steps: int | None = None,
        average_buffers: bool = True,
        optimizer_state: OptimizerState = "local",
        bucket_size_mb: float = 64.0,
        workers: Workers | None = None,
        notice: Notice | None = None,
        index: int = 0,
    ) -> None:
        # Configuration
        self.optimizer = optimizer
        self.period = as_period(period)
        self.optimizer_state = check_optimizer_state(optimizer_state)
        self.index = index
        self.workers = workers if workers is not None else Workers()
        self._module = module
        self._average_buffers = average_buffers
        self._bucket_bytes = int(check_bucket_size(bucket_size_mb) * 2**20)
        self._notice = notice if notice is not None else Notice()
        self._listeners: list[Callable[[AveragingRound], None]] = []

        # State
        self.steps = 0
        """Optimizer steps attempted so far."""
        self.local_steps = 0
        """Optimizer steps attempted since the latest round."""
        self._averaged_last = {id(parameter) for parameter in self._parameters() if parameter.requires_grad}
        self._payload: _Payload | None = None
        self._warned_of_no_drift = False

        _learning_rates(optimizer)
        self.period.setup(total_steps)

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called with the record of every round, on every worker, after the rule has seen it."""
        self._listeners.append(listener)

    def broadcast(self) -> None:
        """Give every worker the first worker's parameters and buffers."""
        tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in self._parameters()}
        if self._module is not None:
            tensors |= {id(tensor): tensor for tensor in (*self._module.parameters(), *self._module.buffers())}
        self.workers.broadcast_(tensors.values())

    def step(self) -> AveragingRound | None:
        """Count a step that the optimizer has attempted, and average if the period is over.

        An attempt counts whether or not a gradient scaler let it through, so that workers never disagree.

        Returns:
            The round's record, or None if there was no round.
        """
        self.steps += 1
        self.local_steps += 1
        return self.average("period") if self.local_steps >= self.period.value else None

    def average(self, trigger: Trigger = "train_end") -> AveragingRound | None:
        """Average now, unless no step was taken since the latest round.

        Args:
            trigger: who asks, for the record. Only rounds asked for by the "period" are shown to the rule.

        Returns:
            The round's record, or None if there was no round.

        Raises:
            WorkersDisagreeError: on every worker, if they have not taken the same steps or not built the same model.
            WorkersDivergedError: on every worker, if any worker's parameters are not finite, in which case nothing is
                overwritten, or if they are so far apart that their variance is not, which shows only afterwards.
        """
        if trigger not in TRIGGERS:
            raise ValueError(
                f"LocalSGD.average(trigger={trigger!r}): expected one of {', '.join(map(repr, TRIGGERS))}."
            )
        if self.local_steps == 0:
            return None
        started = time.perf_counter()
        payload_before = self.workers.payload_bytes

        payload = self._current_payload()
        self._meet(trigger, payload)
        measured = self._average_and_measure(payload)
        if self.optimizer_state == "reset":
            for state in self._moments():
                state.zero_()

        payload_bytes = self.workers.payload_bytes - payload_before
        round_ = AveragingRound(
            step=self.steps,
            optimizer=self.index,
            trigger=trigger,
            local_steps=self.local_steps,
            period=self.period.value,
            learning_rate=measured.learning_rate,
            variance=measured.variance,
            ratio=measured.ratio,
            target=self.period.target,
            payload_bytes=payload_bytes,
            sent_bytes=ring_bytes(payload_bytes, self.workers.size),
            seconds=time.perf_counter() - started,
        )
        self._finish(round_)
        return round_

    def state_dict(self) -> dict[str, Any]:
        """The counters and the rule's state, as plain numbers and the name of the rule's class."""
        return {
            "steps": self.steps,
            "local_steps": self.local_steps,
            "rule": type(self.period).__name__,
            "period": self.period.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a rule of another class than the saved one starts anew, with a warning."""
        self.steps = state["steps"]
        self.local_steps = state["local_steps"]
        rule = type(self.period).__name__
        if rule == state["rule"]:
            self.period.load_state_dict(state["period"])
        elif self.workers.rank == 0:
            warnings.warn(
                f"The saved averaging rule was {state['rule']}, this one is {rule}: it starts anew at step"
                f" {self.steps}. To go on where the run had stopped, pass the same kind of period as before.",
                stacklevel=2,
            )

    # One round, part by part

    def _meet(self, trigger: Trigger, payload: "_Payload") -> None:
        """Make sure that all workers are here for the same round, with the same tensors, all finite."""
        if self.workers.size == 1:
            self._notice.agreed = self._notice.raised
            return
        finite = _all_finite(payload.parameters)
        table = self.workers.table(
            [
                payload.layout.fingerprint,
                self.steps,
                TRIGGERS.index(trigger),
                self.period.value,
                float(finite),
                self._notice.raised,
            ]
        )
        fingerprints, steps, triggers, periods, finites, notices = table.unbind(dim=1)
        if any(len(column.unique()) > 1 for column in (steps, triggers, periods)):
            raise WorkersDisagreeError(self._different_rounds(steps, triggers, periods))
        if len(fingerprints.unique()) > 1:
            raise WorkersDisagreeError(self._different_payloads(payload))
        if not finites.all():
            raise WorkersDivergedError(self._not_finite(finites, payload))
        self._notice.agreed = functools.reduce(operator.or_, map(int, notices.tolist()))

    def _average_and_measure(self, payload: "_Payload") -> "_Measured":
        """Replace all tensors by their means; S_k and r from values reduced over the workers."""
        rates = _learning_rates(self.optimizer)
        if self.workers.size == 1:
            deviations = torch.zeros(len(rates), dtype=torch.float64)
        else:
            deviations = payload.averager.average()
        means = self.workers.mean(torch.cat([deviations, torch.tensor(rates, dtype=torch.float64)])).tolist()
        variances, rates = means[: len(rates)], means[len(rates) :]
        return _Measured(
            variance=sum(variances),
            ratio=sum(variance / rate for variance, rate in zip(variances, rates, strict=True) if rate > 0.0),
            learning_rate=next((rate for rate in rates if rate > 0.0), 0.0),
        )

    def _finish(self, round_: AveragingRound) -> None:
        self.local_steps = 0
        self._averaged_last = {id(parameter) for parameter in self._parameters() if parameter.requires_grad}
        if not math.isfinite(round_.ratio):
            raise WorkersDivergedError(
                f"The variance of the parameters among the workers is not finite (S_k = {round_.variance}, S_k/γ_k ="
                f" {round_.ratio}) at step {round_.step} of optimizer {self.index}: the workers' parameters are finite,"
                " but so far apart that training has diverged. Lower the learning rate, clip gradients, or average more"
                " often (a smaller period, or a warm-up)."
            )
        if round_.trigger == "period":
            self.period.update(round_.step, ratio=round_.ratio, learning_rate=round_.learning_rate)
        self._warn_of_no_drift(round_)
        for listener in self._listeners:
            listener(round_)

    # What is averaged

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _current_payload(self) -> "_Payload":
        """What this round averages, rebuilt if it is not what the latest round averaged."""
        tensors: list[Tensor] = []
        groups: list[int | None] = []
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                # A parameter that was frozen since the latest round may have drifted before: it joins once more.
                if parameter.requires_grad or id(parameter) in self._averaged_last:
                    tensors.append(parameter)
                    groups.append(index)
        parameters = list(tensors)
        tensors += self._buffers()
        if self.optimizer_state == "average":
            tensors += self._moments()
        groups += [None] * (len(tensors) - len(groups))

        key = [(id(tensor), tensor.data_ptr(), group) for tensor, group in zip(tensors, groups, strict=True)]
        if self._payload is None or self._payload.key != key:
            layout = FlatLayout(tensors, groups)
            group_count = len(self.optimizer.param_groups)
            averager = ParameterAverager(layout, group_count, self.workers, self._bucket_bytes)
            self._payload = _Payload(key, parameters, tensors, layout, averager)
        return self._payload

    def _buffers(self) -> list[Tensor]:
        if self._module is None or not self._average_buffers:
            return []
        return [buffer for buffer in self._module.buffers() if buffer.is_floating_point() or buffer.is_complex()]

    def _moments(self) -> list[Tensor]:
        """Floating-point state tensors of their parameter's shape, in the order of parameters and of their names."""
        moments = []
        for parameter in self._parameters():
            state = self.optimizer.state.get(parameter, {})
            for name in sorted(state, key=str):
                value = state[name]
                if (
                    name != "step"
                    and isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and (value.is_floating_point() or value.is_complex())
                ):
                    moments.append(value)
        return moments

    # What can go wrong

    def _warn_of_no_drift(self, round_: AveragingRound) -> None:
        drifted = round_.variance > 0.0 or round_.learning_rate == 0.0 or self.workers.size == 1
        if drifted or self._warned_of_no_drift:
            return
        self._warned_of_no_drift = True
        if self.workers.rank == 0:
            warnings.warn(
                f"After {round_.local_steps} local step(s) the parameters of all {self.workers.size} workers are"
                " identical. Probably every worker sees the same data: give each its own share, for example with"
                " torch.utils.data.DistributedSampler (Lightning's Trainer does so unless"
                " use_distributed_sampler=False), or with a different seed per worker for random or iterable data.",
                stacklevel=2,
            )

    def _different_rounds(self, steps: Tensor, triggers: Tensor, periods: Tensor) -> str:
        places = "; ".join(
            f"rank {rank}: step {int(step)}, asked for by {TRIGGERS[int(trigger)]!r}, period {int(period)}"
            for rank, (step, trigger, period) in enumerate(zip(steps, triggers, periods, strict=True))
        )
        return (
            f"The workers met for different averaging rounds of optimizer {self.index} ({places}). Every worker has to"
            " take the same number of optimizer steps, and to validate and save at the same ones. Usual causes: data"
            " loaders of different lengths (use drop_last=True or Trainer(limit_train_batches=...)), and steps, saves"
            " or stops that depend on one worker's own loss."
        )

    def _different_payloads(self, payload: "_Payload") -> str:
        mine = [(self._name_of(tensor), *entry) for tensor, entry in payload.laid_out()]
        everybody = self.workers.gather_objects(mine)
        reference = everybody[0]
        rank, theirs = next((rank, other) for rank, other in enumerate(everybody) if other != reference)
        place = next(
            (i for i, (a, b) in enumerate(zip(reference, theirs, strict=False)) if a != b),
            min(len(reference), len(theirs)),
        )
        return (
            f"The workers of optimizer {self.index} do not average the same tensors at step {self.steps}. Rank 0 has"
            f" {len(reference)}, rank {rank} has {len(theirs)}; the first difference is number {place}: rank 0"
            f" {_describe(reference, place)}, rank {rank} {_describe(theirs, place)}. Build the same model and"
            " optimizer on every rank, and freeze, unfreeze or add parameters on all ranks at the same step."
        )

    def _not_finite(self, finites: Tensor, payload: "_Payload") -> str:
        mine = [self._name_of(parameter) for parameter in payload.parameters if not _all_finite([parameter])]
        names = self.workers.gather_objects(mine)
        ranks = [rank for rank, finite in enumerate(finites.tolist()) if not finite]
        first = ", ".join(names[ranks[0]][:3])
        return (
            f"Parameters of rank(s) {', '.join(map(str, ranks))} are not finite at step {self.steps} (optimizer"
            f" {self.index}); on rank {ranks[0]} the first of {len(names[ranks[0]])} are: {first}. No rank's parameters"
            " were overwritten. Training diverged there: lower the learning rate, clip gradients, or look for bad"
            " samples in that rank's data."
        )

    def _name_of(self, tensor: Tensor) -> str:
        if self._module is not None:
            for name, candidate in (*self._module.named_parameters(), *self._module.named_buffers()):
                if candidate is tensor:
                    return name
        for g, group in enumerate(self.optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                if parameter is tensor:
                    return f"parameter {p} of group {g}"
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    if value is tensor:
                        return f"{name} of {self._name_of(parameter)}"
        return "unnamed tensor"


class _Payload(NamedTuple):
    """The tensors of a round, and the machinery built for them."""

    key: list[tuple[int, int, int | None]]
    parameters: list[Tensor]
    tensors: list[Tensor]
    layout: FlatLayout
    averager: ParameterAverager

    def laid_out(self) -> Iterator[tuple[Tensor, tuple[object, ...]]]:
        """The tensors that take part, each with its entry in the layout's signature."""
        for index, entry in zip(self.layout.indices, self.layout.signature, strict=True):
            yield self.tensors[index], entry


class _Measured(NamedTuple):
    variance: float
    ratio: float
    learning_rate: float


def _learning_rates(optimizer: Optimizer) -> list[float]:
    rates = []
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if not isinstance(rate, int | float | Tensor):
            raise ValueError(
                f"Parameter group {index} of {type(optimizer).__name__} has lr={rate!r}: expected a number. The"
                " averaging rule needs the learning rate; use an optimizer that keeps it in its parameter groups."
            )
        rates.append(float(rate))
    return rates


def _all_finite(tensors: list[Tensor]) -> bool:
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > 0:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.data)
    # The largest magnitude of a tensor is NaN or infinite exactly if one of its elements is.
    largest = [torch.stack(torch._foreach_norm(same, float("inf"))) for same in by_kind.values()]
    return all(bool(torch.isfinite(norms).all()) for norms in largest)


def _describe(entries: list[tuple[object, ...]], place: int) -> str:
    if place >= len(entries):
        return "has no such tensor"
    name, dtype, shape, group, _ = entries[place]
    belongs = "no parameter group" if group is None else f"parameter group {group}"
    return f"has {name} ({dtype}, shape {shape}, {belongs})"
