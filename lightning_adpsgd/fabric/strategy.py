"""The door to Fabric: turns a loop of one's own into local steps and averaging rounds."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.names import int4_settings, register
from lightning_adpsgd.options import AveragingOptions, as_period, check_timeout
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import Kind
from lightning_adpsgd.session import CHECKPOINT_KEY
from lightning_adpsgd.validation import check_instance
from lightning_adpsgd.workers.group import is_default

from .family import (
    STRATEGY_REGISTRY,
    Accelerator,
    CheckpointIO,
    ClusterEnvironment,
    Precision,
    rank_zero_info,
    rank_zero_warn,
)
from .steps import LocalSteps


class ADPSGDStrategy(LocalSteps):
    """Adaptive periodic parameter averaging (ADPSGD, arXiv:2007.06134) for Fabric, in place of gradient all-reduces.

    ``fabric.setup`` gives all workers the first worker's weights. Each step of an optimizer that was set up counts, and
    every p of them the workers average. To look at the average in between (to validate, for example), call
    ``average`` on all workers first; ``fabric.save`` does. Its checkpoints hold what is needed to go on as if the
    run had not stopped, under the key ``"adpsgd"``.

    Example::

        fabric = Fabric(strategy="adpsgd", devices=2)
        fabric.launch()
        fabric.strategy.set_total_steps(epochs * len(loader))
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(model(batch))
            optimizer.step()  # averages every p steps
        fabric.strategy.average("validation")

    Args:
        period: as for :class:`lightning_adpsgd.ADPSGDStrategy`, as are those that are not listed here. The last ones
            (``timeout``, ``process_group_backend``, ``start_method`` and others) are as for Fabric's ``DDPStrategy``.
        total_steps: K, the steps that each optimizer will take, if it is known. Rules that work with shares of the run
            need it: see ``set_total_steps``.

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
        reduce_dtype: Literal["bf16", "fp16", "int8", "int4"] | Codec | None = None,
        exclude_buffers: Sequence[str] = (),
        update: Update | None = None,
        total_steps: int | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        options = AveragingOptions(
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
        super().__init__(
            as_period(period),
            options,
            total_steps,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=check_instance(None, "checkpoint_io", checkpoint_io, CheckpointIO, optional=True),
            precision=check_instance(None, "precision", precision, Precision, optional=True),
            process_group_backend=process_group_backend,
            timeout=check_timeout(timeout),
            start_method=start_method,
        )

    @property
    def transport(self) -> str:
        """How rounds travel, in words."""
        return self._options.transport

    # Checkpoints

    @override
    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any | None = None, filter: Any | None = None
    ) -> None:
        """Save the average, and what the rules need to go on if ``state`` has optimizers.

        Raises:
            ValueError: if ``state`` has an entry of its own under the key that is used for this.
        """
        if CHECKPOINT_KEY in state:
            raise ValueError(
                f"fabric.save(..., state) was given an entry {CHECKPOINT_KEY!r}, under which the strategy saves the"
                " averaging rule. Choose another name for it."
            )
        if self._session is not None:
            self.average("checkpoint")
            with_optimizers = any(isinstance(each, Optimizer) for each in state.values())
            state = {**state, CHECKPOINT_KEY: self._session.state_dict(with_optimizers)}
        super().save_checkpoint(path, state, storage_options, filter)

    @override
    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Restore what is in ``state``, and the rules with it if it has optimizers."""
        remainder = super().load_checkpoint(path, state, *args, **kwargs)
        if isinstance(state, dict) and any(isinstance(each, Optimizer) for each in state.values()):
            self._restore(remainder.pop(CHECKPOINT_KEY, None))
        return remainder

    def _restore(self, saved: dict[str, Any] | None) -> None:
        session = self._begun()
        if saved is None or "optimizers" not in saved:
            rank_zero_info(
                "This checkpoint holds no averaging period: it was written by another strategy, without optimizers, or"
                " before the first step. Weights and optimizers are restored; the averaging rule and its count of steps"
                " start anew."
            )
            for local_sgd in session.local_sgd:
                local_sgd.mark_synchronized()
            return
        session.load_state_dict(saved)
        if (warning := session.workers_changed(saved)) is not None:
            rank_zero_warn(warning)

    # What Fabric itself communicates

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._handshake("Lightning's barrier")
        super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._handshake("Lightning's broadcast")
        return super().broadcast(obj, src)

    @override
    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        self._handshake("Lightning's reduction", group)
        return super().all_reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        self._handshake("Lightning's gathering", group)
        return super().all_gather(tensor, group, sync_grads)

    def _handshake(self, kind: Kind, group: Any | None = None) -> None:
        if self._session is not None and is_default(group):  # others do not come to what a subgroup does
            self._session.handshake(kind)

    # Other ways to make one

    @classmethod
    def int4(cls, **overrides: Any) -> Self:
        """What ``strategy="adpsgd_int4"`` stands for, with arguments of the class in place of its own or besides."""
        return cls(**{**int4_settings(), **overrides})

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any = STRATEGY_REGISTRY) -> None:
        """Register the names, among Fabric's own; a second time changes nothing."""
        register(cls, strategy_registry)
