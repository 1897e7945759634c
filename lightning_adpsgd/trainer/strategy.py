"""Lightning's strategy: turns the Trainer's hooks into local steps and averaging rounds."""

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from typing_extensions import Self, override

from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.names import int4_settings, register
from lightning_adpsgd.options import AveragingOptions, WorkerKind, as_period, check_timeout
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import check_module, naming_lost_workers
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.validation import check_choice, check_instance, check_listener
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.peers import closed_at_exit

from .callbacks import insert_callbacks, remove_callbacks
from .compat import trainer_of
from .elastic import ElasticWorkers, elastic_options
from .family import CheckpointIO, ClusterEnvironment, Precision, StrategyRegistry, TrainerFn, pl
from .lifecycle import forget_failure, report_failure
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


class ADPSGDStrategy(ElasticWorkers):
    """Adaptive periodic parameter averaging (ADPSGD) in place of DDP's gradient all-reduce.

    Every process trains its own replica on its own share of the data, and sends no gradients. Every p optimizer steps
    (the *averaging period*), the replicas are replaced by their mean. The period adapts to the variance of the
    parameters among the workers: P. Jiang and G. Agrawal, "Adaptive Periodic Averaging: A Practical Approach to
    Reducing Communication in Distributed Learning", arXiv:2007.06134.

    This is **not** AD-PSGD, the asynchronous decentralized (gossip) method of Lian et al., arXiv:1710.06952.

    Workers also average before a validation, before a checkpoint and at the end of training, so whoever reads the
    weights sees the average. For a checkpoint they also average the optimizer's state, and continue from the average:
    resuming from the file is the same as not having stopped.

    Example:
        >>> from lightning import Trainer
        >>> from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy
        >>> trainer = Trainer(strategy=ADPSGDStrategy(period=8), accelerator="cpu", devices=2)  # CPSGD, local SGD
        >>> careful = ADPSGDStrategy(AdaptivePeriod(initial=2), optimizer_state="average")
        >>> hidden = ADPSGDStrategy(stagger=True, overlap=1)  # training goes on while rounds travel
        >>> small = ADPSGDStrategy.int4(worker="node")  # "adpsgd_int4", between nodes instead of devices
        >>> small.transport
        'in int4, between nodes'

    Args:
        period: when to average. :class:`~lightning_adpsgd.AdaptivePeriod` if None; an int is a constant period
            (CPSGD, local SGD). Each optimizer gets its own copy.
        average_buffers: whether floating-point buffers (BatchNorm statistics) are averaged too. Caches
            (``register_buffer(..., persistent=False)``) and integers never are.
        exclude_buffers: :mod:`fnmatch` patterns of the names of buffers that are not averaged (queues, hidden states),
            such as ``["*.queue", "memory.*"]``. A checkpoint holds rank 0's.
        optimizer_state: what a round does to momentum and moments: "local" leaves them alone, as in the paper;
            "average" averages them too (as many bytes as the parameters for each); "estimate" corrects them by what the
            drift of parameters tells, and sends nothing; "reset" sets them to their values before the first step.
        bucket_size_mb: size of the largest bucket, in MiB; up to two are in memory.
        on_divergence: what a round does if parameters of some ranks are not finite: "raise" an error on every rank,
            before anything is overwritten; or "drop" these ranks from the mean, from which they then continue.
        stagger: spread each round over the period: after each step one p-th of all elements is averaged.
        overlap: d, the number of local steps during which a round (or a fragment of it) is in flight; at most p − 1.
            A snapshot is sent, and when the mean w̄ arrives, each worker adds w̄ − (its snapshot), which keeps those
            steps. Best with ``stagger=True``: alone, it costs accuracy unless d is small compared to p.
        worker: what is averaged: each "device", or each "node", whose devices then average their gradients after every
            backward pass, as in DDP. A node sends the model once per round.
        reduce_dtype: "bf16", "fp16", "int8", "int4" or a ``Codec``: in rounds that the period asks for, the change
            since the last average is sent in this type, and the rounding error in the next round. Keeps two copies of
            the parameters.
        update: what is done with the mean in rounds that the period asks for; None: it is adopted. Each optimizer gets
            its own copy.
        elastic: workers come and go, each a launch of its own with a Trainer of one process: how they meet, or True for
            :class:`~lightning_adpsgd.elastic.ElasticOptions` as the environment says. Experimental.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: as for ``DDPStrategy``.
        checkpoint_io: as for ``DDPStrategy``.
        precision_plugin: as for ``DDPStrategy``.
        process_group_backend: "nccl" or "gloo"; None: what suits the device.
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
        elastic: ElasticOptions | bool | None = None,
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
            # Lightning would notice at the end of training, or never.
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
        self._elastic = elastic_options(elastic, self._options, worker)

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
        """How rounds are sent, in words: "at once" if no option changes it."""
        told = (self._options.transport, "between nodes" if self._worker == "node" else "at once")
        return ", ".join(each for each in told if each != "at once") or "at once"

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Call ``listener`` on every rank with the record of each round.

        A listener that subscribes before ``fit`` hears the rounds of all further fits; one that subscribes during a
        fit, for example in a callback's hook, hears those of that fit.
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
        """Connect the ranks until the script ends: it may fit, validate or communicate again."""
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
        """Post a status for the other ranks, which may be waiting for this one."""
        super().on_exception(exception)
        if self._workers is not None:
            report_failure(self, self._workers, self._session, exception)

    @override
    def teardown(self) -> None:
        self._fitting = False
        if self._signals is not None:
            self._signals.remove()
            self._signals = None
        remove_callbacks(trainer_of(self.lightning_module), self._callbacks)
        self._step_watch.stop()
        super().teardown()
        if self._session is not None:
            self._session.close()
        if self._nodes is not None:
            self._nodes.close()

    @override
    def on_train_start(self) -> None:
        """Tell the rule how long the run is. Not earlier: counting the steps sets up and restores the loaders."""
        super().on_train_start()
        trainer = trainer_of(self.lightning_module)
        if trainer is None or self._workers is None or self._session is None or not self._fitting:
            return
        total_steps = total_steps_of(trainer)
        with naming_lost_workers(self._workers, "the start of training"):
            warn_of_uneven_loaders(trainer, self._workers)
            total_steps = self._workers.broadcast_object(total_steps, 0)
        self._session.setup(total_steps)

    # Alternative constructors

    @classmethod
    def int4(cls, **overrides: Any) -> Self:
        """The strategy named "adpsgd_int4", meant to send about a twentieth of full communication's bytes.

        Rounds in 4 bits, estimated moments, and a period that starts at 2 and grows proportionally.

        Args:
            overrides: arguments of the class, which override these settings.
        """
        return cls(**{**int4_settings(), **overrides})

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any = StrategyRegistry) -> None:
        """Register the strategy names with Lightning; may be called again."""
        register(cls, strategy_registry, elastic=True)

    # Details

    def _set_up_fit(self, trainer: "pl.Trainer", workers: WorkerGroup) -> None:
        assert self.lightning_module is not None
        self._fitting = True
        warn_of_sync_batchnorm(self.lightning_module)
        former = self._session
        # If configure_optimizers() returns none, Lightning substitutes a mock without parameter groups.
        optimizers = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        listeners = [*self._listeners, *self._listeners_of_this_fit]
        self._session = self._new_session(optimizers, self._period, self._options, workers, listeners)
        self._signals = DeferredSignals(trainer, self._raise_flags)
        self._signals.install()
        self._callbacks = insert_callbacks(trainer, self, self._signals)
        self._watch_steps(local_sgd.optimizer for local_sgd in self._session.local_sgd)
        if not self._session.local_sgd and workers.size > 1:
            warn_of_a_missing_optimizer()
        warn_of_short_steps(self.optimizers, self._options.optimizer_state, workers)
        if former is not None and former.module is self.lightning_module and trainer.global_step > 0:
            self._session.go_on_from(former)
        self._join()
