"""The door to Lightning: turns the Trainer's hooks into local steps and averaging rounds."""

import copy
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd._lightning import SIGTERM, DeferredSignals, current_hook, sync_module_states
from lightning_adpsgd.arguments import as_period, check_bucket_size, check_optimizer_state
from lightning_adpsgd.averaging import AveragingRound, Trigger, Workers
from lightning_adpsgd.local_sgd import LocalSGD, Notice
from lightning_adpsgd.periods import AveragingPeriod

CHECKPOINT_KEY = "adpsgd"
_HOOKS_OF_A_STEP = ("on_train_batch_start", "training_step", "on_train_batch_end")


class ADPSGDStrategy(DDPStrategy):
    """Adaptive periodic parameter averaging (ADPSGD) in place of DDP's gradient all-reduce.

    Every process trains its own replica on its own share of the data, and no gradient crosses the network. Every p
    optimizer steps, p being the *averaging period*, the replicas are replaced by their mean. How often, is decided by
    the variance of the parameters among the workers: P. Jiang and G. Agrawal, "Adaptive Periodic Averaging: A Practical
    Approach to Reducing Communication in Distributed Learning", arXiv:2007.06134.

    This is **not** AD-PSGD, the asynchronous decentralized (gossip) method of Lian et al., arXiv:1710.06952.

    Workers also average before validation starts, before a checkpoint is taken and when training ends, so whoever looks
    at the model sees the average.

    Args:
        period: when to average. :class:`~lightning_adpsgd.AdaptivePeriod` if None; an int is a constant period
            (CPSGD, local SGD). Each optimizer gets a copy of its own.
        average_buffers: floating-point module buffers (BatchNorm statistics) join each round.
        optimizer_state: what a round does to momentum and moments: "local" leaves them to each worker, as the paper
            does; "average" averages them too (which sends as many bytes again for each); "reset" sets them to zero.
        bucket_size_mb: parameters are averaged in ranges of at most this many MiB; up to two are in memory.
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
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        # Configuration
        self._period = as_period(period)
        self._average_buffers = average_buffers
        self._optimizer_state = check_optimizer_state(optimizer_state)
        self._bucket_size_mb = check_bucket_size(bucket_size_mb)

        # State of one fit
        self._local_sgd: list[LocalSGD] = []
        self._notice = Notice()
        self._signals: DeferredSignals | None = None
        self._warned_of_reduction = False
        self._first_callback = _FirstCallback(self)

    @property
    def local_sgd(self) -> list[LocalSGD]:
        """One per optimizer, in the order of ``trainer.optimizers``; those of the latest ``fit``."""
        return self._local_sgd

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called, on every rank, with the record of each round of this fit."""
        for local_sgd in self._local_sgd:
            local_sgd.subscribe(listener)

    # Set up and tear down

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._notice = Notice()
        self._local_sgd = self._new_local_sgd(self.broadcast(_total_steps(trainer)))
        self._signals = DeferredSignals(trainer, self._raise_notice)
        self._signals.install()
        _callbacks(trainer).insert(0, self._first_callback)

    @override
    def configure_ddp(self) -> None:
        """No wrapper, hence no gradient all-reduce: all ranks only start from rank 0's weights."""
        assert self.model is not None
        sync_module_states(self.model)

    @override
    def teardown(self) -> None:
        if self._signals is not None:
            self._signals.remove()
            self._signals = None
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        if trainer is not None and self._first_callback in _callbacks(trainer):
            _callbacks(trainer).remove(self._first_callback)
        super().teardown()

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
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._local_sgd_of(optimizer).step()
        return output

    def average(self, trigger: Trigger) -> None:
        """Average what has been trained since the latest round, if anything has."""
        for local_sgd in self._local_sgd:
            local_sgd.average(trigger)

    def act_on_notice(self) -> int:
        """Act, on every rank, on the signals that any rank had received when the latest round began; return them."""
        notice = self._notice.agreed
        if notice == 0 or self._signals is None:
            return 0
        self.average("checkpoint")  # with several optimizers, only one of them may have had its round
        self._notice.agreed = 0
        self._notice.raised &= ~notice
        self._signals.act(notice)
        return notice

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        """Reduce a value for somebody else, with a warning if that happens at every step."""
        if not self._warned_of_reduction and self.lightning_module is not None and self.world_size > 1:
            hook = current_hook(self.lightning_module)
            if hook in _HOOKS_OF_A_STEP:
                self._warned_of_reduction = True
                rank_zero_warn(
                    f"Something in `{hook}` is reduced over the workers at every step, which takes the time that"
                    " averaging rarely is to save. If it is `self.log(..., on_step=True, sync_dist=True)`, leave"
                    " sync_dist out, or log the mean of the epoch: `self.log(..., on_step=False, on_epoch=True,"
                    " sync_dist=True)`."
                )
        return super().reduce(tensor, group, reduce_op)

    # Checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The averaged weights; after an exception, when peers may be gone, this rank's own."""
        assert self.lightning_module is not None
        trainer = self.lightning_module._trainer
        if trainer is None or trainer.state.status != TrainerStatus.INTERRUPTED:
            self.average("checkpoint")
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if "optimizer_states" in checkpoint and self._local_sgd:
            checkpoint[CHECKPOINT_KEY] = {"optimizers": [local_sgd.state_dict() for local_sgd in self._local_sgd]}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, and with them the rules; a checkpoint of another strategy starts the rules anew."""
        super().load_optimizer_state_dict(checkpoint)
        states = checkpoint.get(CHECKPOINT_KEY, {}).get("optimizers", [])
        for local_sgd, state in zip(self._local_sgd, states, strict=False):
            local_sgd.load_state_dict(state)

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

    def _new_local_sgd(self, total_steps: int | None) -> list[LocalSGD]:
        workers = Workers(device=self.root_device)
        return [
            LocalSGD(
                optimizer,
                copy.deepcopy(self._period),
                module=self.lightning_module,
                total_steps=total_steps,
                average_buffers=self._average_buffers,
                optimizer_state=self._optimizer_state,
                bucket_size_mb=self._bucket_size_mb,
                workers=workers,
                notice=self._notice,
                index=index,
            )
            for index, optimizer in enumerate(self.optimizers)
        ]

    def _local_sgd_of(self, optimizer: Optimizer) -> LocalSGD:
        for local_sgd in self._local_sgd:
            if local_sgd.optimizer is optimizer:
                return local_sgd
        raise MisconfigurationException(
            f"A {type(optimizer).__name__} was stepped that is none of the optimizers that configure_optimizers() had"
            f" returned when fit began. {type(self).__name__} keeps count of each optimizer's local steps: return all"
            " optimizers from configure_optimizers(), and change them in place (add_param_group) instead of replacing"
            " them."
        )

    def _raise_notice(self, notice: int) -> None:
        self._notice.raised |= notice


class _FirstCallback(Callback):
    """Averages before validation and at the end of training, and acts on signals, ahead of every other callback.

    The strategy's own hooks come after the callbacks' and the module's: somebody may have read the weights by then.
    """

    def __init__(self, strategy: ADPSGDStrategy) -> None:
        self._strategy = strategy

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        # Not inside of the optimizer's step: a checkpoint that a signal asks for belongs behind it.
        self._strategy.act_on_notice()

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.average("validation")
        self._strategy.act_on_notice()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.average("train_end")
        if self._strategy.act_on_notice() & SIGTERM:
            raise SIGTERMException  # no loop of Lightning's is left to do so


def _callbacks(trainer: "pl.Trainer") -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set outside of Trainer's own file


def _total_steps(trainer: "pl.Trainer") -> int | None:
    """K, the number of steps that each optimizer will take; None if it is not known beforehand."""
    estimate = trainer.estimated_stepping_batches
    if not math.isfinite(estimate) or estimate <= 0:
        return None
    # Lightning counts the steps of all optimizers against max_steps; a rule counts those of one.
    if trainer.max_steps > 0:
        estimate = min(estimate, -(-trainer.max_steps // max(1, len(trainer.optimizers))))
    return int(estimate)
