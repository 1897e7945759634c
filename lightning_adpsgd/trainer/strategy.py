"""The door to Lightning: turns the Trainer's hooks into local steps and averaging rounds."""

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from typing_extensions import Self, override

from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.names import int4_settings, register
from lightning_adpsgd.options import AveragingOptions, WorkerKind, as_period, check_timeout
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import check_module, naming_lost_workers
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.validation import check_choice, check_instance, check_listener
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.peers import closed_at_exit

from .callbacks import insert_callbacks
from .compat import (
    callbacks_of,
    trainer_of,
)
from .family import CheckpointIO, ClusterEnvironment, Precision, SIGTERMException, StrategyRegistry, TrainerFn, pl
from .lifecycle import end_others_at_exit, forget_failure
from .nodes import NodeGradients
from .preparation import (
    check_module_is_ready,
    check_validation_is_not_timed,
    is_fitting,
    total_steps_of,
    warn_of_a_missing_optimizer,
    warn_of_short_steps,
    warn_of_sync_batchnorm,
    warn_of_uneven_loaders,
)
from .signals import DeferredSignals

_log = logging.getLogger(__name__)


class ADPSGDStrategy(NodeGradients):
    """Adaptive periodic parameter averaging (ADPSGD) in place of DDP's gradient all-reduce.

    Every process trains its own replica on its own share of the data, and no gradient crosses the network. Every p
    optimizer steps, p being the *averaging period*, the replicas are replaced by their mean. How often is decided by
    the variance of the parameters among the workers: P. Jiang and G. Agrawal, "Adaptive Periodic Averaging: A Practical
    Approach to Reducing Communication in Distributed Learning", arXiv:2007.06134.

    This is **not** AD-PSGD, the asynchronous decentralized (gossip) method of Lian et al., arXiv:1710.06952.

    Workers also average before validation starts, before a checkpoint is taken and when training ends, so whoever looks
    at the model sees the average. For a checkpoint they average the optimizer's state too, and go on from the average:
    going on from the file is the same as not having stopped.

    Args:
        period: when to average. :class:`~lightning_adpsgd.AdaptivePeriod` if None; an int is a constant period
            (CPSGD, local SGD). Each optimizer gets a copy of its own.
        average_buffers: floating-point module buffers (BatchNorm statistics) join each round; caches
            (``register_buffer(..., persistent=False)``) and integers stay each worker's own.
        exclude_buffers: names of buffers that stay each worker's own (queues, hidden states), as patterns of
            :mod:`fnmatch`, in which ``*`` is any text: ``["*.queue", "memory.*"]``. A checkpoint holds rank 0's.
        optimizer_state: what a round does to momentum and moments: "local" leaves them to each worker, as the paper
            does; "average" averages them too (as many bytes again for each); "estimate" brings momentum together as the
            drift of parameters tells it, without a byte; "reset" makes them what they are before the first step.
        bucket_size_mb: parameters are averaged in ranges of at most this many MiB; up to two are in memory.
        on_divergence: what a round does when parameters of some ranks are not finite: "raise" an error on every rank,
            before anything is overwritten; or "drop" these ranks from the mean, for them to go on from that.
        stagger: spread each round over the period: after each step one p-th of all elements is averaged.
        overlap: d, the number of local steps that go on while a round (or a fragment of it) travels; at most p − 1.
            What is sent is a snapshot, and when the mean w̄ arrives, each worker adds w̄ − (its snapshot), which keeps
            those steps. Best with ``stagger=True``: alone, it costs accuracy where d is not small against p.
        worker: what drifts and is averaged: each "device", or each "node", whose devices then average their gradients
            after every backward pass, as DDP does. A node sends the model once per round.
        reduce_dtype: "bf16", "fp16", "int8" or "int4" (or a ``Codec``): in rounds that the period asks for, differences
            from the last average travel in it; what rounding cuts off travels in the next round. Keeps two more copies.
        update: what is done with the mean in rounds that the period asks for; None: it is adopted. Each optimizer gets
            a copy of its own.
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
        optimizer_state: Literal["local", "average", "reset", "estimate"] = "local",
        bucket_size_mb: float = 64.0,
        on_divergence: Literal["raise", "drop"] = "raise",
        stagger: bool = False,
        overlap: int = 0,
        worker: Literal["device", "node"] = "device",
        reduce_dtype: Literal["bf16", "fp16", "int8", "int4"] | Codec | None = None,
        exclude_buffers: Sequence[str] = (),
        update: Update | None = None,
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
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            # Checked here because Lightning would find out at the end of training, or never.
            checkpoint_io=check_instance(None, "checkpoint_io", checkpoint_io, CheckpointIO, optional=True),
            precision_plugin=check_instance(None, "precision_plugin", precision_plugin, Precision, optional=True),
            process_group_backend=process_group_backend,
            timeout=check_timeout(timeout),
            start_method=start_method,
        )
        # Configuration
        self._period = as_period(period)
        self._options = AveragingOptions(
            average_buffers=average_buffers,
            exclude_buffers=exclude_buffers,
            optimizer_state=optimizer_state,
            bucket_size_mb=bucket_size_mb,
            on_divergence=on_divergence,
            stagger=stagger,
            overlap=overlap,
            reduce_dtype=reduce_dtype,
            update=update,
        )
        self._options.check_with(self._period)
        self._worker: WorkerKind = check_choice(None, "worker", worker, get_args(WorkerKind))

        # State
        self._listeners: list[Callable[[AveragingRound], None]] = []  # of all fits
        self._listeners_of_this_fit: list[Callable[[AveragingRound], None]] = []
        self._signals: DeferredSignals | None = None
        self._callbacks: list[pl.Callback] = []

    @property
    def local_sgd(self) -> list[LocalSGD]:
        """One per optimizer, in the order of ``trainer.optimizers``; those of the latest ``fit``."""
        return [] if self._session is None else self._session.local_sgd

    @property
    def transport(self) -> str:
        """How rounds travel, in words: "at once" where neither of the options that change it is set."""
        told = [self._options.transport] if self._options.transport != "at once" else []
        return ", ".join([*told, *(["between nodes"] if self._worker == "node" else [])]) or "at once"

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called, on every rank, with the record of each round.

        Given before ``fit``, it hears the rounds of every fit to come. Given while a fit is under way, in a hook of a
        callback for example, it hears those of that fit.
        """
        check_listener(listener)
        trainer = trainer_of(self.lightning_module)
        if self._fitting and self._session is not None:
            self._session.subscribe(listener)
        elif trainer is not None and is_fitting(trainer):
            self._listeners_of_this_fit.append(listener)
        else:
            self._listeners.append(listener)

    # Set up and tear down

    @override
    def setup_environment(self) -> None:
        """Connect the ranks, until the script ends: it may fit, validate or communicate again before it does."""
        self._listeners_of_this_fit = []
        with closed_at_exit():
            super().setup_environment()

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        forget_failure()
        self._workers = self._new_workers(self._worker)
        self._workers.peers.clear_status()
        fitting = trainer.state.fn == TrainerFn.FITTING
        assert self.lightning_module is not None
        if self._workers.size > 1:
            check_module_is_ready(self.lightning_module)
            if fitting:
                check_validation_is_not_timed(trainer)
            check_module(self._workers, self.lightning_module)
        super().setup(trainer)
        if fitting:
            self._set_up_fit(trainer, self._workers)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Post a status for the other ranks, who may be waiting for this one."""
        super().on_exception(exception)
        if self._workers is None:
            return
        end_others_at_exit(self, self._workers, exception)
        if isinstance(exception, WorkerLostError):
            return  # it was lost by the others as well, and has been told
        where = self._session.progress if self._session is not None and self._session.local_sgd else "setup"
        what = f"{type(exception).__name__}: {exception}".splitlines()[0]
        self._workers.peers.post_status(f"had failed at {where}: {what}", failed=True)
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            _log.error(f"Rank {self.global_rank} failed at {where}: {what}")

    @override
    def teardown(self) -> None:
        self._fitting = False
        if self._signals is not None:
            self._signals.remove()
            self._signals = None
        trainer = trainer_of(self.lightning_module)
        if trainer is not None:
            callbacks_of(trainer)[:] = [each for each in callbacks_of(trainer) if each not in self._callbacks]
        self._stop_watching()
        super().teardown()
        if self._session is not None:
            self._session.close()
        if self._nodes is not None:
            self._nodes.close()

    @override
    def on_train_start(self) -> None:
        """Tell the rule how long the run is. Not before: counting the steps sets up the loaders, and restores them."""
        super().on_train_start()
        trainer = trainer_of(self.lightning_module)
        if trainer is None or self._workers is None or self._session is None or not self._fitting:
            return
        total_steps = total_steps_of(trainer)
        with naming_lost_workers(self._workers, "the start of training"):
            warn_of_uneven_loaders(trainer, self._workers)
            total_steps = self._workers.broadcast_object(total_steps, 0)
        self._session.setup(total_steps)

    # Other ways to make one

    @classmethod
    def int4(cls, **overrides: Any) -> Self:
        """What ``strategy="adpsgd_int4"`` stands for: meant for about a twentieth of full communication's bytes.

        Rounds in 4 bits, estimated moments, and a period of 2 at first that follows in proportion.

        Args:
            overrides: arguments of the class that take the place of these, or are given besides.
        """
        return cls(**{**int4_settings(), **overrides})

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any = StrategyRegistry) -> None:
        """Register the names, among Lightning's own; a second time changes nothing."""
        register(cls, strategy_registry)

    # Details

    def _set_up_fit(self, trainer: "pl.Trainer", workers: WorkerGroup) -> None:
        assert self.lightning_module is not None
        self._fitting = True
        warn_of_sync_batchnorm(self.lightning_module)
        former = self._session
        self._session = TrainingSession(
            # Lightning stands in for an optimizer where configure_optimizers() returns none.
            [optimizer for optimizer in self.optimizers if optimizer.param_groups],
            self._period,
            self._options,
            module=self.lightning_module,
            workers=workers,
            listeners=[*self._listeners, *self._listeners_of_this_fit],
        )
        self._signals = DeferredSignals(trainer, self._raise_flags)
        self._signals.install()
        self._callbacks = insert_callbacks(trainer, self, self._signals)
        self._watch_steps(self._session)
        if not self._session.local_sgd and workers.size > 1:
            warn_of_a_missing_optimizer()
        warn_of_short_steps(self.optimizers, self._options.optimizer_state, workers)
        if former is not None and former.module is self.lightning_module and trainer.global_step > 0:
            self._session.go_on_from(former)

    def _raise_flags(self, flags: int) -> None:
        if self._session is not None:
            self._session.flags.raised |= flags
