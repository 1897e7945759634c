"""Local SGD for one optimizer, in any training loop; needs no Lightning."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.former_names import FormerNames, former_arguments
from lightning_adpsgd.options import AveragingOptions, OnDivergence, OptimizerState, ReduceDtype, as_period, options_of
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.periods.attached import AttachedRule
from lightning_adpsgd.rounds.engine import RoundEngine, RoundResult
from lightning_adpsgd.rounds.handshake import SignalFlags, check_module, naming_lost_workers
from lightning_adpsgd.rounds.record import TRIGGERS, AveragingRound, Trigger
from lightning_adpsgd.validation import check_instance, check_int, check_listener, check_state, check_total_steps
from lightning_adpsgd.workers.group import WorkerGroup


class LocalSGD(FormerNames):
    """Counts an optimizer's local steps, and averages its parameters over the workers at the end of each period.

    Call :meth:`step` after every optimizer step, and :meth:`average` before you validate, save or stop, in the same
    order on every worker::

        local_sgd = LocalSGD(optimizer, AdaptivePeriod(), module=model, total_steps=len(loader) * epochs)
        local_sgd.broadcast()  # all workers start from the first worker's parameters
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            local_sgd.step()
        local_sgd.average()

    Args:
        optimizer: its parameters are averaged. Its parameter groups need a learning rate (``"lr"``).
        period: the rule; an int is a constant period; None is :class:`AdaptivePeriod` with its defaults.
        module: its floating-point buffers (BatchNorm statistics) join each round, and errors use its parameters' names.
        total_steps: K, the optimizer steps of the whole run; None if not known; "later": set by :meth:`setup`.
        average_buffers: this and the arguments up to ``update`` are the fields of :class:`AveragingOptions`.
        options: all of these fields, in place of single ones.
        workers: the workers to average over; None is the default process group.
        async_group: the same workers in a separate process group, for fragments; created if needed.
        flags: bits that all workers learn at the next round.
        owners: one dict for all optimizers of a run: which of them averages a parameter that several have.
        index: the optimizer's index, for the records.
        former: ``carrier`` and ``notice``, former names of ``async_group`` and ``flags``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, a group has no learning rate, ``period`` needs ``total_steps``, or
            ``optimizer_state`` is "reset" or "estimate" and the optimizer's moments are not known.
    """

    _engine_type: ClassVar[type[RoundEngine]] = RoundEngine  # a subclass may run its rounds in another way

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
        reduce_dtype: ReduceDtype | Codec | None = None,
        update: Update | None = None,
        options: AveragingOptions | None = None,
        workers: WorkerGroup | None = None,
        async_group: WorkerGroup | None = None,
        flags: SignalFlags | None = None,
        owners: dict[int, Any] | None = None,
        index: int = 0,
        **former: Any,
    ) -> None:
        async_group, flags = former_arguments(former, carrier=async_group, notice=flags)
        expected = "a torch.optim.Optimizer, such as torch.optim.SGD(model.parameters(), lr=0.1)"
        self.optimizer = check_instance(None, "optimizer", optimizer, Optimizer, expected)
        self.period = as_period(period)
        self.options = options_of(
            options,
            average_buffers=average_buffers,
            exclude_buffers=exclude_buffers,
            optimizer_state=optimizer_state,
            on_divergence=on_divergence,
            bucket_size_mb=bucket_size_mb,
            stagger=stagger,
            overlap=overlap,
            reduce_dtype=reduce_dtype,
            update=update,
        )
        self.options.check_with(self.period)
        self.index = check_int(None, "index", index, at_least=0)
        self.workers = check_instance(None, "workers", workers, WorkerGroup, optional=True) or WorkerGroup()
        self._module = check_instance(None, "module", module, nn.Module, optional=True)
        check_instance(None, "owners", owners, dict, optional=True)
        check_instance(None, "async_group", async_group, WorkerGroup, optional=True)
        flags = check_instance(None, "flags", flags, SignalFlags, optional=True)
        self._engine = self._engine_type(
            optimizer,
            self.options,
            module=module,
            workers=self.workers,
            async_group=async_group,
            flags=flags or SignalFlags(),
            owners=owners,
            index=self.index,
            scalars=self.period.scalars,
        )
        self._listeners: list[Callable[[AveragingRound], None]] = []
        self._rule = AttachedRule(self.period)
        if not (isinstance(total_steps, str) and total_steps == "later"):
            self.setup(total_steps)

    @property
    def steps(self) -> int:
        """Optimizer steps attempted so far."""
        return self._engine.steps

    @property
    def local_steps(self) -> int:
        """Optimizer steps attempted since the latest round."""
        return self._engine.local_steps

    @property
    def handshakes(self) -> int:
        """How many handshakes of full rounds were completed. A round's record may be read later."""
        return self._engine.handshakes

    @property
    def has_trained(self) -> bool:
        """Whether there is something to average: local steps, or rounding residuals that have not been sent yet."""
        return self._engine.has_trained

    @property
    def averaged(self) -> list[Tensor]:
        """The tensors that a round would average now."""
        return self._engine.tracker.current().tensors

    @property
    def is_complete(self) -> bool:
        """Whether a checkpoint saved now holds the state of all workers: no step was taken since its round."""
        return not self.has_trained and self._engine.state_policy.is_shared()

    def setup(self, total_steps: int | None) -> None:
        """Tell the rule how long the run is; raises if it has to know, but ``total_steps`` is None."""
        self._rule.setup(check_total_steps(total_steps))

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Call ``listener`` with every round's record, on every worker, after the rule has seen it."""
        self._listeners.append(check_listener(listener))

    def broadcast(self) -> None:
        """Give every worker the first worker's parameters and buffers.

        Raises:
            WorkersDisagreeError, WorkerLostError: if modules differ, or a worker is gone.
        """
        tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in self._engine.tracker.parameters()}
        if self._module is not None:
            check_module(self.workers, self._module)
            tensors |= {id(tensor): tensor for tensor in (*self._module.parameters(), *self._module.buffers())}
        with naming_lost_workers(self.workers, f"the broadcast of the parameters of optimizer {self.index}"):
            self.workers.broadcast_(tensors.values())
        self.mark_synchronized()

    def step(self) -> AveragingRound | None:
        """Count an attempted step (a gradient scaler may have skipped it), and average if the period is over.

        Returns:
            The record of a round that took place now (on CUDA: at the previous step; if spread: has ended), or None.
        """
        arrived = self._emit(self._engine.read_full_round())
        self._engine.count_step()
        if self._engine.is_busy(self.period.value):
            arrived = self._emit(self._engine.land(self.period.value)) or arrived
            self._engine.launch(self.period.value)
            arrived = self._emit(self._engine.land(self.period.value)) or arrived
            self._engine.keep_for_look_ahead(self.period.value)
        return arrived

    def average(self, trigger: Trigger = "train_end", also: Sequence[Tensor] = ()) -> AveragingRound | None:
        """Average now, unless no step was taken since the latest round.

        A round for a "checkpoint" also averages the optimizer's state, whatever the policy, even if there is nothing
        else to average. All workers continue from the average, so resuming from the file equals not having stopped. If
        the optimizer has methods ``train`` and ``eval`` that change the weights (schedule-free ones), so does any call.

        Args:
            trigger: what the round is for. The rule only sees those of "period".
            also: further floating-point tensors to average; if there are any, there is a round in any case.

        Returns:
            The round's record. If there was no round, the record of an earlier one that was not read yet, or None.

        Raises:
            WorkersDisagreeError: on every worker, if they have not taken the same steps or not built the same model.
            WorkersDivergedError: on every worker, if any worker's parameters (with "drop": all workers') are not
                finite, before anything is overwritten; or if their variance is not, after averaging.
            WorkerLostError: if a worker has failed, was killed, or did not join within the process group's timeout.
        """
        if trigger not in TRIGGERS:
            raise ValueError(
                f"LocalSGD.average(trigger={trigger!r}): expected one of {', '.join(map(repr, TRIGGERS))}."
            )
        arrived = self._emit(self._engine.land(self.period.value, everything=True))
        self._rule.see_reserve()
        policy = self._engine.state_policy
        if self.has_trained or also or (policy.shares_for(trigger) and not policy.is_shared()):
            self._engine.run(trigger, self.period.value, also)
            arrived = self._emit(self._engine.land(self.period.value)) or arrived
        return arrived

    def mark_synchronized(self) -> None:
        """Record that all workers were given the same weights and optimizer state, for example from a file."""
        self._engine.state_policy.shared_at = self.steps
        self._rule.forget_reserve()
        self._engine.mark_synchronized()

    def state_dict(self) -> dict[str, Any]:
        """The counters and the rule's state, as plain numbers and the name of the rule's class."""
        return {
            "steps": self.steps,
            "local_steps": self.local_steps,
            "state_shared_at": self._engine.state_policy.shared_at,
            "moments_since": self._engine.state_policy.reset_at,
            **self._rule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`; a rule of another class starts anew, with a warning.

        Raises:
            ValueError: if an entry is missing. Nothing is changed then.
        """
        check_state("LocalSGD", state, ("steps", "local_steps", "state_shared_at", "rule", "period"))
        self._engine.restore(state["steps"], state["local_steps"])
        reset_at = state.get("moments_since", 0)  # missing in early files
        self._engine.state_policy.restored(state["state_shared_at"], reset_at)
        self._rule.load_state_dict(state, self.steps, warns=self.workers.rank == 0)

    def close(self) -> None:
        """Close the connections that were opened for this optimizer; only full rounds may follow."""
        self._engine.close()

    def _emit(self, results: Sequence[RoundResult]) -> AveragingRound | None:
        """Pass results to the rule and the listeners; return the latest record."""
        if not results:
            return None
        with torch.inference_mode(False), torch.no_grad():  # listeners may write to parameters
            return [self._emit_one(result) for result in results][-1]

    def _emit_one(self, result: RoundResult) -> AveragingRound:
        record = result.record._replace(target=self._rule.target_among(result.workers))
        self._engine.guards.check_variance(record)
        if result.drift == "a period":
            self._rule.see(record, result.scalars, result.workers)
        self._engine.guards.look_for_drift(record, result.parameters, result.workers)
        for listener in self._listeners:
            listener(record)
        if result.drift == "at least a period":
            # Its variance is larger than others'. If there are no others, it is comparable with its like.
            self._rule.reserve(record, result.scalars, result.workers)
        return record
