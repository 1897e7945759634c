"""The door to Lightning: turns the Trainer's hooks into local steps and averaging rounds."""

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric
from typing_extensions import override

from lightning_adpsgd.averaging.layout import hash48
from lightning_adpsgd.averaging.tensors import averaged_buffers
from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.local_sgd import LocalSGD, SignalFlags
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, Kind, RankState, check_module, naming_lost_workers
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.trainer.compat import (
    REQUEUE,
    SIGTERM,
    DeferredSignals,
    callbacks_of,
    current_hook,
    end_others_at_exit,
    forget_failure,
    is_interrupted,
    pruned,
    prunes_after_training,
    second_weights,
    snapshot,
    step_of_the_loss,
    sync_module_states,
    trainer_of,
    validates_by_the_clock,
    wrap_for_gradients_of,
)
from lightning_adpsgd.validation import (
    as_period,
    check_backend,
    check_bucket_size,
    check_combination,
    check_devices,
    check_flag,
    check_listener,
    check_on_divergence,
    check_optimizer_state,
    check_optional,
    check_overlap,
    check_patterns,
    check_reduce_dtype,
    check_start_method,
    check_timeout,
    check_worker,
)
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.nodes import NodeWorkerGroup
from lightning_adpsgd.workers.peers import closed_at_exit

CHECKPOINT_KEY = "adpsgd"
_HOOKS_OF_A_STEP = ("on_train_batch_start", "training_step", "on_train_batch_end")
_LATEST_STEPS = 16

_log = logging.getLogger(__name__)


class ADPSGDStrategy(DDPStrategy):
    """Adaptive periodic parameter averaging (ADPSGD) in place of DDP's gradient all-reduce.

    Every process trains its own replica on its own share of the data, and no gradient crosses the network. Every p
    optimizer steps, p being the *averaging period*, the replicas are replaced by their mean. How often, is decided by
    the variance of the parameters among the workers: P. Jiang and G. Agrawal, "Adaptive Periodic Averaging: A Practical
    Approach to Reducing Communication in Distributed Learning", arXiv:2007.06134.

    This is **not** AD-PSGD, the asynchronous decentralized (gossip) method of Lian et al., arXiv:1710.06952.

    Workers also average before validation starts, before a checkpoint is taken and when training ends, so whoever looks
    at the model sees the average. For a checkpoint they average the optimizer's state too, and go on from the average:
    going on from the file is the same as not having stopped.

    A worker that fails waits for nobody, and the others find out in their next round: it ends with an error that names
    the rank and the round.

    Args:
        period: when to average. :class:`~lightning_adpsgd.AdaptivePeriod` if None; an int is a constant period
            (CPSGD, local SGD). Each optimizer gets a copy of its own.
        average_buffers: floating-point module buffers (BatchNorm statistics) join each round; caches
            (``register_buffer(..., persistent=False)``) and integers stay each worker's own.
        exclude_buffers: names of buffers that stay each worker's own (queues, hidden states), as patterns of
            :mod:`fnmatch`, in which ``*`` is any text: ``["*.queue", "memory.*"]``. A checkpoint holds rank 0's.
        optimizer_state: what a round does to momentum and moments: "local" leaves them to each worker, as the paper
            does; "average" averages them too (which sends as many bytes again for each); "reset" makes them what they
            are before the first step, for optimizers of torch.optim and those derived from one.
        bucket_size_mb: parameters are averaged in ranges of at most this many MiB; up to two are in memory.
        on_divergence: what a round does when parameters of some ranks are not finite: "raise" an error on every rank,
            before anything is overwritten; or "drop" these ranks from the mean, and have them go on from that of the
            others, with a fresh optimizer state. If no rank is left, that is an error in any case.
        stagger: spread each round over the period: after each step one p-th of all elements is averaged, each element
            once in p steps. The same bytes, but a trickle in place of bursts.
        overlap: d, the number of local steps that go on while a round (or a part of it) travels; at most p − 1. What
            is sent is a snapshot, and when the mean w̄ arrives, each worker adds w̄ − (its snapshot), which keeps those
            steps. Best with ``stagger=True``: alone, it costs accuracy where d is not small against p.
        worker: what drifts and is averaged: each "device", or each "node", whose devices then average their gradients
            after every backward pass, as DDP does, over the node's own fast links. A node sends the model once per
            round, not once per device. Every node needs the same number of devices.
        reduce_dtype: "bf16" or "fp16": in rounds that the period asks for, differences from the last average travel in
            that type, which halves the bytes; what rounding cuts off travels in the next round. Keeps two more copies
            of what is averaged. Rounds for a validation, a checkpoint or the end travel as they are.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: as for ``DDPStrategy``.
        checkpoint_io: as for ``DDPStrategy``.
        precision_plugin: as for ``DDPStrategy``.
        process_group_backend: "nccl" or "gloo"; by default what suits the device.
        timeout: how long a collective waits for other ranks.
        start_method: how processes are started: "popen", "spawn", "fork" or "forkserver".

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        period: AveragingPeriod | int | None = None,
        average_buffers: bool = True,
        optimizer_state: Literal["local", "average", "reset"] = "local",
        bucket_size_mb: float = 64.0,
        on_divergence: Literal["raise", "drop"] = "raise",
        stagger: bool = False,
        overlap: int = 0,
        worker: Literal["device", "node"] = "device",
        reduce_dtype: Literal["bf16", "fp16"] | None = None,
        exclude_buffers: Sequence[str] = (),
        accelerator: "pl.accelerators.Accelerator | None" = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=check_optional("accelerator", accelerator, pl.accelerators.Accelerator),
            parallel_devices=check_devices(parallel_devices),
            cluster_environment=check_optional("cluster_environment", cluster_environment, ClusterEnvironment),
            checkpoint_io=check_optional("checkpoint_io", checkpoint_io, CheckpointIO),
            precision_plugin=check_optional("precision_plugin", precision_plugin, Precision),
            process_group_backend=check_backend(process_group_backend),
            timeout=check_timeout(timeout),
            start_method=check_start_method(start_method),
        )
        # Configuration
        self._period = as_period(period)
        self._average_buffers = check_flag("average_buffers", average_buffers)
        self._exclude_buffers = check_patterns("exclude_buffers", exclude_buffers)
        self._optimizer_state = check_optimizer_state(optimizer_state)
        self._bucket_size_mb = check_bucket_size(bucket_size_mb)
        self._on_divergence = check_on_divergence(on_divergence)
        self._stagger = check_flag("stagger", stagger)
        self._overlap = check_overlap(overlap)
        self._worker = check_worker(worker)
        self._reduce_dtype = check_reduce_dtype(reduce_dtype)
        check_combination(self._stagger, self._overlap, self._optimizer_state, self._period)

        # State of all fits
        self._listeners: list[Callable[[AveragingRound], None]] = []

        # State of one fit
        self._early_listeners: list[Callable[[AveragingRound], None]] = []
        self._workers: WorkerGroup | None = None
        self._carriers: list[WorkerGroup] = []
        self._node_workers: NodeWorkerGroup | None = None
        self._local_sgd: list[LocalSGD] = []
        self._wrapped_for: set[int] = set()
        self._fitted: Module | None = None
        self._notice = SignalFlags()
        self._signals: DeferredSignals | None = None
        self._fitting = False
        self._step_hooks: list[RemovableHandle] = []
        self._stepping = False
        self._logged_steps: dict[int, deque[tuple[int, int]]] = {}  # of each optimizer's latest steps
        self._second_weights_moved = False
        self._buffers_moved = False
        self._communicated_at: int | None = None
        self._warned_of_communication = False
        self._first_callback = _FirstCallback(self)
        self._after_pruning = _AfterPruning(self)

    @property
    def local_sgd(self) -> list[LocalSGD]:
        """One per optimizer, in the order of ``trainer.optimizers``; those of the latest ``fit``."""
        return self._local_sgd

    @property
    def transport(self) -> str:
        """How rounds travel, in words: "at once" where neither of the options that change it is set."""
        told = [
            "spread over the period" if self._stagger else "",
            f"adopted {self._overlap} step(s) later" if self._overlap else "",
            f"in {self._reduce_dtype}" if self._reduce_dtype else "",
            "between nodes" if self._worker == "node" else "",
        ]
        return ", ".join(filter(None, told)) or "at once"

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called, on every rank, with the record of each round.

        Given before ``fit``, it hears the rounds of every fit to come. Given while a fit is under way, in a hook of a
        callback for example, it hears those of that fit.
        """
        check_listener(listener)
        trainer = trainer_of(self.lightning_module)
        if self._fitting:
            for local_sgd in self._local_sgd:
                local_sgd.subscribe(listener)
        elif trainer is not None and _fit_is_under_way(trainer):
            self._early_listeners.append(listener)
        else:
            self._listeners.append(listener)

    def logged_step(self, round_: AveragingRound) -> int:
        """The step at which to log a round of this fit, on the axis of the loss: that of the batch it came after.

        Lightning counts batches that led to a step there, where ``trainer.global_step`` counts the steps of all
        optimizers. The record of a round that the period asks for may come some steps after the round.
        """
        if round_.trigger == "period":
            for step, logged_step in self._logged_steps.get(round_.optimizer, ()):
                if step == round_.step:
                    return logged_step
        trainer = trainer_of(self.lightning_module)
        return round_.step if trainer is None else step_of_the_loss(trainer)

    # Set up and tear down

    @override
    def setup_environment(self) -> None:
        """Connect the ranks, until the script ends: it may fit, validate or communicate again before it does."""
        self._early_listeners = []
        with closed_at_exit():
            super().setup_environment()

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        forget_failure()
        self._workers = self._new_workers()
        self._workers.peers.clear_status()
        fitting = trainer.state.fn == TrainerFn.FITTING
        assert self.lightning_module is not None
        if self._workers.size > 1:
            _check_materialized(self.lightning_module)
            if fitting and validates_by_the_clock(trainer):
                raise MisconfigurationException(
                    "Trainer(val_check_interval=...) is a time: every worker looks at its own clock, and between two"
                    " averaging rounds nobody keeps them at the same step, so they would validate at different ones."
                    " Give a number of batches, or a share of the epoch."
                )
            check_module(self._workers, self.lightning_module)
        super().setup(trainer)
        if fitting:
            self._set_up_fit(trainer, self._workers)

    @override
    def configure_ddp(self) -> None:
        """No wrapper, hence no gradient all-reduce, except inside of a node that is one worker.

        All ranks start from rank 0's weights.
        """
        assert self.model is not None
        sync_module_states(self.model)
        if isinstance(self._workers, NodeWorkerGroup) and self._workers.size > 1:
            self._wrap(self._workers)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Wrap again where layers have been frozen or unfrozen: a wrapper knows those that were trained at first."""
        super().on_train_batch_start(batch, batch_idx)
        if (
            isinstance(self._workers, NodeWorkerGroup)
            and self._workers.size > 1
            and self._trained() != self._wrapped_for
        ):
            self.meet("a change of what is trained")
            self._wrap(self._workers)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Leave word for the other ranks, who may be waiting for this one."""
        super().on_exception(exception)
        if self._workers is not None:
            end_others_at_exit(self, self._workers, exception)
        if self._workers is None or isinstance(exception, WorkerLostError):
            return  # the latter was lost by the others as well, and has been told
        steps = ", ".join(f"step {s.steps}, {s.local_steps} after its latest averaging round" for s in self._local_sgd)
        what = f"{type(exception).__name__}: {exception}".splitlines()[0]
        self._workers.peers.post_status(f"had failed at {steps or 'setup'}: {what}", failed=True)
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            _log.error(f"Rank {self.global_rank} failed at {steps or 'setup'}: {what}")

    @override
    def teardown(self) -> None:
        self._fitting = False
        if self._signals is not None:
            self._signals.remove()
            self._signals = None
        trainer = trainer_of(self.lightning_module)
        if trainer is not None:
            own = (self._first_callback, self._after_pruning)
            callbacks_of(trainer)[:] = [callback for callback in callbacks_of(trainer) if callback not in own]
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        super().teardown()
        for workers in filter(None, (*self._carriers, self._node_workers)):
            workers.close()
        self._carriers = []

    @override
    def on_train_start(self) -> None:
        """Tell the rule how long the run is. Not before: counting the steps sets up the loaders, and restores them."""
        super().on_train_start()
        trainer = trainer_of(self.lightning_module)
        if trainer is None or self._workers is None or not self._fitting:
            return
        total_steps = _total_steps(trainer)
        with naming_lost_workers(self._workers, "the start of training"):
            _warn_of_uneven_loaders(trainer, self._workers)
            total_steps = self._workers.broadcast_object(total_steps, 0)
        for local_sgd in self._local_sgd:
            local_sgd.setup(total_steps)
            local_sgd.mark_synchronized()

    def on_training_begins(self) -> None:
        """Put off what looks at the clock at every batch."""
        if self._signals is not None:
            self._signals.install_timers()

    def on_batch_begins(self) -> None:
        """Take note that forward passes are about to move buffers."""
        self._buffers_moved = True

    def on_epoch_ends(self) -> None:
        """Make sure that all workers have ended it, if metrics that they gather by themselves are to follow."""
        assert self.lightning_module is not None
        if any(isinstance(module, Metric) for module in self.lightning_module.modules()):
            self.meet("the end of an epoch")

    def on_training_ends(self) -> None:
        """Leave word for ranks that go on, although they should have ended too."""
        if self._workers is not None:
            steps = ", ".join(f"step {local_sgd.steps}" for local_sgd in self._local_sgd)
            self._workers.peers.post_status(f"had ended training at {steps}")

    # Local steps and rounds

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer, then count the attempt, which averages if the period is over."""
        self._stepping = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._stepping = False
        self._count_step(optimizer)
        return output

    def average(self, trigger: Trigger, further: Sequence[Tensor] = ()) -> bool:
        """Average what has been trained since the latest round, if anything has.

        Args:
            trigger: who asks.
            further: tensors to average along, with which there is a round in any case.

        Returns:
            Whether there was a round, so that all workers have met.
        """
        also = [*further]
        trainer = trainer_of(self.lightning_module)
        if self._second_weights_moved and trainer is not None:
            # The mean of moving averages is the moving average of means: it is enough to meet when somebody looks.
            also += second_weights(trainer)
            self._second_weights_moved = False
        if self._buffers_moved and self._average_buffers and not any(ls.has_trained for ls in self._local_sgd):
            # Forward passes move BatchNorm's statistics, also where no step follows before somebody looks.
            assert self.lightning_module is not None
            also += [buffer for _, buffer in averaged_buffers(self.lightning_module, self._exclude_buffers)]
        self._buffers_moved = False
        handshakes = sum(local_sgd.handshakes for local_sgd in self._local_sgd)
        for place, local_sgd in enumerate(self._local_sgd):
            local_sgd.average(trigger, also if place == 0 else ())
        return sum(local_sgd.handshakes for local_sgd in self._local_sgd) > handshakes

    def average_before_pruning(self) -> None:
        """Average what is about to be pruned, and what it will be judged by, for all workers to judge alike.

        What was pruned before is judged by the masked weights of the latest forward pass: by those of one step before.
        """
        assert self.lightning_module is not None
        masked = [getattr(module, name) for module, name in pruned(self.lightning_module)]
        # Those of a validation are made of averaged weights, and cannot be written to.
        self.average("pruning", [tensor for tensor in masked if not tensor.is_inference()])

    def agree_on_what_is_pruned(self) -> None:
        """Give all workers rank 0's masks and weights, where they differ.

        Masks do that are drawn by chance, and so do weights that go back to where each worker had begun.
        """
        if self._workers is None or self._workers.size == 1 or self._is_alone():
            return
        assert self.lightning_module is not None
        self.meet("a pruning")
        of_pruned = pruned(self.lightning_module)
        tensors = [getattr(module, name + suffix) for module, name in of_pruned for suffix in ("_orig", "_mask")]
        if len(self._workers.table([_hash(tensors)]).unique()) > 1:
            check_module(self._workers, self.lightning_module)
            self._workers.broadcast_(tensors)

    def meet(self, kind: Kind) -> None:
        """Make sure, while fitting, that all workers are about to do the same; warn if it happens at every step.

        Args:
            kind: what they are about to do.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
            WorkerLostError: if a worker does not come.
        """
        if not self._fitting or self._workers is None or self._workers.size == 1:
            return
        self._warn_of_communication()
        hook = None if self.lightning_module is None else current_hook(self.lightning_module)
        step = sum(local_sgd.steps for local_sgd in self._local_sgd)
        Handshake(self._workers, RankState(KINDS.index(kind), step), f"`{hook}`" if hook else "").hold()

    def act_on_notice(self) -> int:
        """Act, on every rank, on the signals that any rank had received when the latest round began; return them."""
        notice = self._notice.agreed
        if notice == 0 or self._signals is None:
            return 0
        if notice & (SIGTERM | REQUEUE):
            self.average("checkpoint")  # with several optimizers, only one of them may have had its round
        self._notice.agreed = 0
        self._notice.raised &= ~notice
        self._signals.act(notice)
        return notice

    # What Lightning communicates. A rank on its way out of an exception takes part in nothing: peers may not either.
    # While fitting, workers make sure first that they do it together: where one is in a round, and another one in
    # something else, they would wait for each other, or end each other's process.

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_alone():
            self.meet("Lightning's barrier")
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._is_alone():
            return obj
        self.meet("Lightning's broadcast")
        return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        if self._is_alone():
            return tensor
        self.meet("Lightning's reduction")
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._is_alone() else super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._is_alone():
            return tensor.unsqueeze(0)
        self.meet("Lightning's gathering")
        return super().all_gather(tensor, group, sync_grads)

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The averaged weights; after an exception, when peers may be gone, this rank's own."""
        if not self._is_alone():
            self.average("checkpoint")
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._local_sgd:
            complete = all(local_sgd.is_complete for local_sgd in self._local_sgd)
            state: dict[str, Any] = {
                "workers": self._local_sgd[0].workers.count,
                "ranks": self.world_size,
                "averaged": complete,
                "rank": self.global_rank,
            }
            if "optimizer_states" in checkpoint:
                state["optimizers"] = [local_sgd.state_dict() for local_sgd in self._local_sgd]
            checkpoint[CHECKPOINT_KEY] = state
        checkpoint = snapshot(checkpoint, self.checkpoint_io)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the weights; say so if they are not an average."""
        super().load_model_state_dict(checkpoint, strict=strict)
        state = checkpoint.get(CHECKPOINT_KEY, {})
        if not state.get("averaged", True):
            ranks = state.get("ranks", state["workers"])  # files of an earlier version count ranks as workers
            rank_zero_warn(
                f"This checkpoint was saved when rank {state['rank']} of {ranks} failed: it holds the weights and the"
                " optimizer state of that worker alone, not the average. All workers go on from these. If you have an"
                " earlier checkpoint, it may be the better start."
            )

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, and with them the rules; a checkpoint of another strategy starts the rules anew."""
        super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:
            rank_zero_info(
                "This checkpoint was written by another strategy: it holds no averaging period. Weights, optimizers and"
                " the Trainer's progress are restored; the averaging rule and its count of steps start anew."
            )
            return
        for local_sgd, saved in zip(self._local_sgd, state["optimizers"], strict=False):
            local_sgd.load_state_dict(saved)
            local_sgd.mark_synchronized()
        count = self._local_sgd[0].workers.count if self._local_sgd else state["workers"]
        if state["workers"] != count:
            rank_zero_warn(
                f"This checkpoint was written by {state['workers']} worker(s), and now there are {count}. All"
                " go on from its average, and the averaging rule goes on with its period and its target, which was"
                f" measured among {state['workers']}. The phases of the rule keep their lengths in steps, while an"
                " epoch now has another number of steps."
            )

    # Registration

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any = StrategyRegistry) -> None:
        """Register the names, among Lightning's own; a second time changes nothing."""
        for name, start_method in (
            ("adpsgd", "popen"),
            ("adpsgd_spawn", "spawn"),
            ("adpsgd_fork", "fork"),
            ("adpsgd_notebook", "fork"),
            ("adaptive_local_sgd", "popen"),
        ):
            strategy_registry.register(
                name,
                cls,
                description=f"Adaptive periodic parameter averaging (ADPSGD) with `start_method` '{start_method}'",
                override=True,
                start_method=start_method,
            )

    # Details

    def _set_up_fit(self, trainer: "pl.Trainer", workers: WorkerGroup) -> None:
        assert self.lightning_module is not None
        self._fitting = True
        if any(isinstance(module, SyncBatchNorm) for module in self.lightning_module.modules()):
            rank_zero_warn(
                "This model has SyncBatchNorm layers, which communicate in every forward pass: that takes the time that"
                " averaging rarely is to save. Leave out Trainer(sync_batchnorm=True): running statistics are averaged"
                " in each round."
            )
        self._notice = SignalFlags()
        self._signals = DeferredSignals(trainer, self._raise_notice)
        self._signals.install()
        callbacks_of(trainer).insert(0, self._first_callback)
        for pruning in _pruning(trainer):
            callbacks_of(trainer).insert(callbacks_of(trainer).index(pruning) + 1, self._after_pruning)

        previous = self._local_sgd if self._fitted is self.lightning_module and trainer.global_step > 0 else []
        self._fitted = self.lightning_module
        self._local_sgd = self._new_local_sgd(workers)
        self._logged_steps = {}
        for local_sgd in self._local_sgd:
            for listener in (*self._listeners, *self._early_listeners):
                local_sgd.subscribe(listener)
            with suppress(AttributeError):  # a wrapper around an optimizer may not have made what hooks need
                self._step_hooks.append(local_sgd.optimizer.register_step_post_hook(self._on_unseen_step))
        if not self._local_sgd and workers.size > 1:
            rank_zero_warn(
                "configure_optimizers() has returned no optimizer, and this strategy averages the parameters of"
                " optimizers: what you train by other means is not averaged, and every worker ends with a model of its"
                " own. Return your optimizers from configure_optimizers()."
            )
        if len(previous) == len(self._local_sgd):
            for local_sgd, former in zip(self._local_sgd, previous, strict=True):
                local_sgd.load_state_dict(former.state_dict())
                local_sgd.mark_synchronized()

    def _new_workers(self) -> WorkerGroup:
        if self._worker == "device":
            return WorkerGroup(device=self.root_device)
        with naming_lost_workers(WorkerGroup(device=self.root_device), "finding out about nodes"):
            if self._node_workers is None:
                self._node_workers = self._new_node_workers()
            self._node_workers.open()
        return self._node_workers

    def _new_node_workers(self) -> NodeWorkerGroup:
        """The nodes as workers, as the Trainer was told and the cluster has placed the ranks."""
        everybody = WorkerGroup(device=self.root_device)
        places = everybody.table([self.node_rank, self.local_rank]).long().tolist()
        nodes = [node for node, _ in places]
        sizes = {node: nodes.count(node) for node in sorted(set(nodes))}
        ranks_per_node = max(sizes.values())
        in_order = [[node, place] for node in range(len(sizes)) for place in range(ranks_per_node)]
        if places != in_order:
            each = ", ".join(f"node {node}: {size}" for node, size in sizes.items())
            raise MisconfigurationException(
                f'{type(self).__name__}(worker="node") found nodes with different numbers of ranks, or ranks that are'
                f" not numbered node by node (ranks of {each}). Every node has to run as many as the others,"
                " Trainer(devices=...), and ranks have to be numbered from the first node to the last."
            )
        if len(sizes) == 1 and everybody.size > 1:
            rank_zero_warn(
                f'{type(self).__name__}(worker="node") on one node: there is no other worker to average with, so this'
                " trains as DDP does, with a gradient all-reduce at every step. For workers inside of a node leave out"
                ' worker="node"; for several nodes pass Trainer(num_nodes=...).'
            )
        return NodeWorkerGroup(ranks_per_node, self.root_device)

    def _wrap(self, workers: NodeWorkerGroup) -> None:
        self._wrapped_for = self._trained()
        wrap_for_gradients_of(self, workers.node)

    def _trained(self) -> set[int]:
        """The parameters that require a gradient."""
        assert self.lightning_module is not None
        return {id(parameter) for parameter in self.lightning_module.parameters() if parameter.requires_grad}

    def _new_local_sgd(self, workers: WorkerGroup) -> list[LocalSGD]:
        owners: dict[int, Any] = {}
        return [
            LocalSGD(
                optimizer,
                copy.deepcopy(self._period),
                module=self.lightning_module,
                total_steps="later",
                average_buffers=self._average_buffers,
                exclude_buffers=self._exclude_buffers,
                optimizer_state=self._optimizer_state,
                on_divergence=self._on_divergence,
                bucket_size_mb=self._bucket_size_mb,
                stagger=self._stagger,
                overlap=self._overlap,
                reduce_dtype=self._reduce_dtype,
                workers=workers,
                carrier=self._carrier_of(index, workers),
                notice=self._notice,
                owners=owners,
                index=index,
            )
            for index, optimizer in enumerate(self.optimizers)
            if optimizer.param_groups  # Lightning stands in for an optimizer where configure_optimizers returns none
        ]

    def _carrier_of(self, index: int, workers: WorkerGroup) -> WorkerGroup | None:
        """Connections for what travels while training goes on, until the end of this fit; one set per optimizer.

        Where ranks step their optimizers in different orders, parts of different sizes would meet on shared ones, for
        which gloo ends the process before anybody has seen that the workers disagree.
        """
        if not (self._stagger or self._overlap):
            return None
        while len(self._carriers) <= index:
            with naming_lost_workers(workers, f"opening connections for optimizer {index}"):
                self._carriers.append(workers.new_async_group())
        return self._carriers[index]

    def _on_unseen_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Count a step that was taken past Lightning, with ``self.optimizers(use_pl_optimizer=False)`` for example."""
        if not self._stepping:
            self._count_step(optimizer)

    def _count_step(self, optimizer: Optimizer) -> None:
        self._second_weights_moved = True
        local_sgd = self._local_sgd_of(optimizer)
        if local_sgd is not None:
            self._note_logged_step(local_sgd)
            local_sgd.step()
            if not local_sgd.has_trained:
                self._buffers_moved = False

    def _note_logged_step(self, local_sgd: LocalSGD) -> None:
        trainer = trainer_of(self.lightning_module)
        if trainer is not None:
            latest = self._logged_steps.setdefault(local_sgd.index, deque(maxlen=self._overlap + _LATEST_STEPS))
            latest.append((local_sgd.steps + 1, step_of_the_loss(trainer)))

    def _local_sgd_of(self, optimizer: Optimizer) -> LocalSGD | None:
        for local_sgd in self._local_sgd:
            if local_sgd.optimizer is optimizer:
                return local_sgd
        if not optimizer.param_groups:
            return None
        raise MisconfigurationException(
            f"A {type(optimizer).__name__} was stepped that is none of the optimizers that configure_optimizers() had"
            f" returned when fit began. {type(self).__name__} keeps count of each optimizer's local steps: return all"
            " optimizers from configure_optimizers(), and change them in place (add_param_group) instead of replacing"
            " them."
        )

    def _is_alone(self) -> bool:
        return is_interrupted(trainer_of(self.lightning_module))

    def _warn_of_communication(self) -> None:
        """Warn if somebody communicates at two batches in a row."""
        trainer = trainer_of(self.lightning_module)
        if self._warned_of_communication or self.lightning_module is None or trainer is None:
            return
        hook = current_hook(self.lightning_module)
        if hook not in _HOOKS_OF_A_STEP:
            return
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        if self._communicated_at == batch - 1:
            self._warned_of_communication = True
            rank_zero_warn(
                f"Something in `{hook}` communicates with all workers at every step, which takes the time that"
                " averaging rarely is to save. If it is `self.log(..., on_step=True, sync_dist=True)`, leave sync_dist"
                " out, or log the mean of the epoch: `self.log(..., on_step=False, on_epoch=True, sync_dist=True)`."
                " If it is `ModelCheckpoint(train_time_interval=...)`, use `every_n_train_steps`."
            )
        self._communicated_at = batch

    def _raise_notice(self, notice: int) -> None:
        self._notice.raised |= notice


class _OwnCallback(Callback):
    """A callback of the strategy's own, which is not called at every step for nothing."""

    # Lightning opens a profiler's context around every hook of every callback, those that do nothing among them, unless
    # they cannot be called; at every step that would cost more than all else that this strategy does there.
    on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = None  # type: ignore[assignment]
    on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]

    def __init__(self, strategy: ADPSGDStrategy) -> None:
        self._strategy = strategy


class _FirstCallback(_OwnCallback):
    """Averages before somebody looks at the weights, and acts on signals, ahead of every other callback.

    The strategy's own hooks come after the callbacks' and the module's: somebody may have read the weights by then.
    """

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.on_training_begins()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if any(trainer.current_epoch >= swa.swa_start for swa in _weight_averaging(trainer)):
            self._strategy.average("checkpoint")  # the callback is about to take a copy of the weights

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", *_: Any) -> None:
        self._strategy.on_batch_begins()

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        # Not inside of the optimizer's step: a checkpoint that a signal asks for belongs behind it.
        self._strategy.act_on_notice()

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.on_epoch_ends()
        if any(map(prunes_after_training, _pruning(trainer))):
            self._strategy.average_before_pruning()

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._strategy.average("validation"):
            self._strategy.meet("a validation")
        self._strategy.act_on_notice()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._strategy.average("train_end"):
            self._strategy.meet("the end of training")
        self._strategy.on_training_ends()
        if self._strategy.act_on_notice() & SIGTERM:
            raise SIGTERMException  # no loop of Lightning's is left to do so


class _AfterPruning(_OwnCallback):
    """Comes right behind a callback that prunes."""

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.agree_on_what_is_pruned()

    @override
    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.sanity_checking:
            self._strategy.agree_on_what_is_pruned()


def _pruning(trainer: "pl.Trainer") -> list[ModelPruning]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelPruning)]


def _hash(tensors: Sequence[Tensor]) -> int:
    """A hash of all bytes."""
    each = [
        hash48(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for tensor in tensors
    ]
    return hash48(repr(each).encode())


def _fit_is_under_way(trainer: "pl.Trainer") -> bool:
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING


def _weight_averaging(trainer: "pl.Trainer") -> list[StochasticWeightAveraging]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging)]


def _check_materialized(module: Module) -> None:
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"{len(lazy)} parameter(s) of the model are still uninitialized at setup, the first of them {lazy[0]!r}:"
            " every worker would initialize its own at its first batch, and the average of those means nothing. Run a"
            " dummy forward pass in the constructor or in configure_model() of your LightningModule."
        )


def _warn_of_uneven_loaders(trainer: "pl.Trainer", workers: WorkerGroup) -> None:
    batches = workers.table([min(trainer.num_training_batches, 2**52)])[:, 0].long().tolist()
    if len(set(batches)) > 1:
        each = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(batches))
        rank_zero_warn(
            f"The workers' training data loaders have different numbers of batches ({each}). A worker that ends an"
            " epoch early leaves the others waiting, and training ends with an error that says so. Give all workers"
            f" equally many batches, with drop_last=True or Trainer(limit_train_batches={min(batches)})."
        )


def _scheduled_steps(trainer: "pl.Trainer") -> int | None:
    """The steps of a run whose accumulation of gradients changes from epoch to epoch; None for other runs."""
    schedules = [callback for callback in callbacks_of(trainer) if isinstance(callback, GradientAccumulationScheduler)]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not schedules or epochs is None or epochs < 0 or not math.isfinite(batches):
        return None
    return sum(-(-int(batches) // schedules[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))


def _total_steps(trainer: "pl.Trainer") -> int | None:
    """K, the number of steps that each optimizer will take; None if it is not known beforehand."""
    estimate = trainer.estimated_stepping_batches
    if not math.isfinite(estimate):
        return None
    # Lightning counts the steps of all optimizers against max_steps; a rule counts those of one.
    estimate = _scheduled_steps(trainer) or estimate
    if trainer.max_steps > 0:
        estimate = min(estimate, -(-trainer.max_steps // max(1, len(trainer.optimizers))))
    return max(0, int(estimate))
