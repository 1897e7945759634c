"""Workers that come and go: each is a Trainer of one process, which is given the state of another one when it joins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.elastic.local_sgd import check_supported
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.elastic.session import ElasticSession
from lightning_adpsgd.elastic.shards import shard
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import Kind
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.session import CHECKPOINT_KEY, TrainingSession
from lightning_adpsgd.validation import check_instance
from lightning_adpsgd.workers.group import WorkerGroup

from .checkpoint_files import CheckpointFiles
from .compat import (
    as_after_the_batch,
    callbacks_of,
    finish_schedules_of_the_batch,
    first_batch,
    forget_versions,
    loaded_checkpoint,
    restore_later,
    restore_now,
    second_weights,
    skip_steps,
    step_plateaus_at_the_end_of_the_epoch,
    trainer_of,
    without_versions,
)
from .family import MisconfigurationException, ModelCheckpoint, ModelPruning, pl, rank_zero_only
from .nodes import NodeGradients
from .preparation import is_fitting
from .signals import REQUEUE, SIGTERM

_NO_FILE = "<no file>"


class ElasticWorkers(NodeGradients):
    """With ``elastic``, rounds are among the workers that are there; Lightning sees this worker's process alone."""

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._elastic: ElasticOptions | None = None
        self._is_writer = True
        self._is_joining = False
        self._has_joined = False  # in an epoch that has not ended yet
        self._taken: dict[str, Any] | None = None
        self._counts_from = 0  # Lightning's step at step 0 of the optimizer
        self._schedules_are_late = False
        self._scheduled = 0  # steps that are not counted yet, but for which schedulers were stepped
        self._loggers: list[Any] = []
        self._files = CheckpointFiles()

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self._is_writer if self._elastic is not None else super().is_global_zero

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each elastic worker trains on its share of the data, and validates on all of it."""
        if self._elastic is None:
            return super().distributed_sampler_kwargs
        trainer = trainer_of(self.lightning_module)
        if trainer is None or not trainer.training:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self._elastic.max_workers, "rank": self._elastic.worker}

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Have a worker that joins go on in its share of the data where the others are."""
        loader = super().process_dataloader(dataloader)
        trainer = trainer_of(self.lightning_module)
        if self._elastic is not None and trainer is not None and trainer.training:
            shard(loader, *first_batch(trainer))
        return loader

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._elastic is None:
            return
        self._elastic = self._elastic.with_environment()
        if self.world_size != 1:
            raise MisconfigurationException(
                f"{type(self).__name__}(elastic=...) in a Trainer of {self.world_size} processes: expected one, because"
                " each elastic worker is a launch of its own. Pass Trainer(devices=1, num_nodes=1), and start the"
                " script once per worker, for example by `adpsgd elastic --workers 4 script.py`. Within a cluster's"
                " launcher of several tasks, pass Trainer(plugins=[LightningEnvironment()]) too."
            )
        trainer = trainer_of(self.lightning_module)
        if trainer is None:
            return
        if self._session is None:
            self._loggers = without_versions(trainer)
            # Some loggers delete what they find in their folder when they are made, so in a fit nobody writes there
            # until it is known who does.
            is_safe = len(self._loggers) == len(trainer.loggers) or not is_fitting(trainer)
            self._set_writer(trainer, self._elastic.worker == 0 and is_safe)
        else:  # after a fit: Lightning has just said again that this process is the first one
            self._set_writer(trainer, self._is_writer)

    @override
    def handshake(self, kind: Kind) -> None:
        if self._elastic is None:
            super().handshake(kind)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if filepath is _NO_FILE:
            self._taken = checkpoint
        else:
            if self._elastic is not None:
                self._files.note(filepath, exists=True)
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        self._files.note(filepath, exists=False)
        super().remove_checkpoint(filepath)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._taken is None:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = trainer_of(self.lightning_module)
        if isinstance(self._session, ElasticSession) and trainer is not None:
            self._counts_from = trainer.global_step - self._session.steps
            if self._schedules_are_late:
                self._schedules_are_late = False
                finish_schedules_of_the_batch(trainer)

    @override
    def teardown(self) -> None:
        super().teardown()
        trainer = trainer_of(self.lightning_module)
        if trainer is not None:
            self._files.forget(_checkpoints_of(trainer))

    def follow_the_others(self) -> None:
        """Leave out as many batches as the other workers are ahead of this one."""
        trainer = trainer_of(self.lightning_module)
        if isinstance(self._session, ElasticSession) and trainer is not None:
            # They are ahead if this worker has missed rounds.
            ahead = self._session.steps + self._counts_from - trainer.global_step
            self._scheduled = max(0, self._scheduled - skip_steps(trainer, ahead, self._scheduled))

    def end_epoch(self) -> None:
        """Step all schedulers as the other workers do, even if this one has joined within the epoch."""
        trainer = trainer_of(self.lightning_module)
        if self._has_joined and trainer is not None:
            self._has_joined = False
            step_plateaus_at_the_end_of_the_epoch(trainer)

    def take_worker_state(self) -> dict[str, Any]:
        """What a worker that joins receives: a checkpoint that is not written, or the weights if nothing has begun."""
        trainer, module = trainer_of(self.lightning_module), self.lightning_module
        assert trainer is not None
        assert module is not None
        state: dict[str, Any] = {"paths": {each.state_key: each.dirpath for each in _checkpoints_of(trainer)}}
        if self._is_joining:
            state["checkpoint"] = loaded_checkpoint(trainer) or {"state_dict": module.state_dict()}
            return state
        self._taken = {}  # from now on, the weights are taken as they are
        try:
            with as_after_the_batch(trainer) as state["is_within_a_step"]:
                trainer.save_checkpoint(_NO_FILE)
            state["checkpoint"] = {key: value for key, value in self._taken.items() if key != CHECKPOINT_KEY}
        finally:
            self._taken = None
        return state

    def restore_worker_state(self, state: Mapping[str, Any]) -> None:
        """Continue from another worker's state, either before training begins or within a step."""
        trainer, checkpoint = trainer_of(self.lightning_module), state["checkpoint"]
        assert trainer is not None
        assert self.lightning_module is not None
        self._files.begin()
        for each in _checkpoints_of(trainer):
            each.dirpath = state["paths"].get(each.state_key, each.dirpath)
        if [*checkpoint] == ["state_dict"]:
            self.lightning_module.load_state_dict(checkpoint["state_dict"])
        elif self._is_joining:
            restore_later(trainer, checkpoint)
            self._schedules_are_late = self._has_joined = state.get("is_within_a_step", False)
        else:
            restore_now(trainer, checkpoint)
            with as_after_the_batch(trainer):
                self._scheduled = max(0, checkpoint["global_step"] - trainer.global_step)

    def _new_session(
        self,
        optimizers: Sequence[Optimizer],
        period: AveragingPeriod,
        options: AveragingOptions,
        workers: WorkerGroup,
        listeners: Sequence[Callable[[AveragingRound], None]],
    ) -> TrainingSession:
        module, trainer = self.lightning_module, trainer_of(self.lightning_module)
        assert module is not None
        if self._elastic is None or trainer is None:
            return TrainingSession(optimizers, period, options, module=module, workers=workers, listeners=listeners)
        if self._session is not None:
            raise MisconfigurationException(
                f"A second fit with one {type(self).__name__}(elastic=...): expected one per process, because other"
                " workers may still be in the first one. Start another run, with a lighthouse of its own, from a"
                " checkpoint."
            )
        _check_callbacks(trainer, type(self).__name__)
        return ElasticSession(
            optimizers,
            period,
            options,
            module=module,
            elastic=self._elastic,
            state=_WorkerState(self),
            listeners=[*listeners, lambda _: self._look_who_writes()],
        )

    def _join(self) -> None:
        """Start with the other workers, or join them."""
        trainer = trainer_of(self.lightning_module)
        if isinstance(self._session, ElasticSession) and trainer is not None:
            self._files.begin()
            self._files.watch(_checkpoints_of(trainer))
            self._is_joining = True
            self._session.join()
            self._is_joining = False
            self._look_who_writes()

    @override
    def _load_session(self, state: Mapping[str, Any] | None) -> None:
        if self._elastic is None or state is not None:
            super()._load_session(state)

    def _raise_flags(self, flags: int) -> None:
        """Raise flags of :mod:`.signals`; called by signal handlers."""
        if isinstance(self._session, ElasticSession):
            self._session.flags.agreed |= flags  # the others go on
            if flags & (SIGTERM | REQUEUE):
                self._session.leave_soon()
        elif self._session is not None:
            self._session.flags.raised |= flags

    def _look_who_writes(self) -> None:
        trainer = trainer_of(self.lightning_module)
        if isinstance(self._session, ElasticSession) and trainer is not None:
            self._set_writer(trainer, self._session.is_writer)

    def _set_writer(self, trainer: "pl.Trainer", is_writer: bool) -> None:
        if is_writer and not self._is_writer:
            forget_versions(self._loggers)  # others have written to the one that was chosen at the start
        if trainer.progress_bar_callback is not None and is_writer != self._is_writer:
            (trainer.progress_bar_callback.enable if is_writer else trainer.progress_bar_callback.disable)()
        self._is_writer = is_writer
        vars(rank_zero_only)["rank"] = 0 if is_writer else 1


class _WorkerState:
    """Takes and restores the state of a Trainer; see :class:`~lightning_adpsgd.elastic.worker_state.JoinableState`."""

    def __init__(self, strategy: ElasticWorkers) -> None:
        self._strategy = strategy

    def take(self) -> Any:
        return self._strategy.take_worker_state()

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        self._strategy.restore_worker_state(state)


def elastic_options(
    elastic: "ElasticOptions | bool | None", options: AveragingOptions, worker: str
) -> ElasticOptions | None:
    """Check the strategy's argument.

    Raises:
        TypeError: if it is of the wrong type.
        ValueError: if another argument does not go with it.
    """
    if elastic is None or elastic is False:
        return None
    if elastic is not True:
        expected = "ElasticOptions(...), or True; or None for workers that are all there from the start to the end"
        check_instance(None, "elastic", elastic, ElasticOptions, expected)
    if worker != "device":
        raise ValueError(
            f'worker={worker!r} with elastic=...: expected "device", because each elastic worker is one process. Leave'
            " one of them out."
        )
    check_supported(options)
    return ElasticOptions() if elastic is True else elastic


def _checkpoints_of(trainer: "pl.Trainer") -> list[ModelCheckpoint]:
    return [each for each in callbacks_of(trainer) if isinstance(each, ModelCheckpoint)]


def _check_callbacks(trainer: "pl.Trainer", strategy: str) -> None:
    pruning = [each for each in callbacks_of(trainer) if isinstance(each, ModelPruning)]
    if pruning or second_weights(trainer):
        found = "ModelPruning" if pruning else "WeightAveraging"
        raise MisconfigurationException(
            f"{found} with {strategy}(elastic=...): expected neither ModelPruning nor WeightAveraging, because their"
            " masks and second weights would differ between workers. Leave it out, or leave out elastic=..."
        )
