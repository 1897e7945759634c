"""All private or version-dependent names of Lightning and torch that the trainer uses, and why."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod

from lightning_adpsgd.averaging.layout import has_mean

from .family import AsyncCheckpointIO, ModelPruning, Timer, TrainerStatus, async_plugin, ddp_overrides, pl

Method = tuple[Any, str]
"""An object of Lightning, and the name of a method to replace on it."""

# Starts all ranks from the same weights, like the `DistributedDataParallel` wrapper. Lightning uses it where it leaves
# out that wrapper (validation, testing), as this package does.
sync_module_states = ddp_overrides._sync_module_states

# Forks or spawns processes. Lightning has no public way to bring further results back from them.
MultiProcessingLauncher = pl.strategies.launchers._MultiProcessingLauncher


def replace_launcher(strategy: "pl.strategies.DDPStrategy", kind: type[MultiProcessingLauncher]) -> None:
    """Replace the launcher that forks or spawns processes, if the strategy has one, by one of this ``kind``."""
    if type(strategy._launcher) is MultiProcessingLauncher:
        strategy._launcher = kind(strategy, start_method=strategy._launcher._start_method)


def trainer_of(module: "pl.LightningModule | None") -> "pl.Trainer | None":
    """The Trainer of a module, or None: the public ``module.trainer`` raises if there is none."""
    return None if module is None else module._trainer


def callbacks_of(trainer: "pl.Trainer") -> list[Any]:
    """The Trainer's callbacks. Lightning sets them outside of the Trainer's own file, so type checkers miss them."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def is_interrupted(trainer: "pl.Trainer | None") -> bool:
    """Whether this rank is handling an exception, which other ranks may not know of."""
    return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED


def validates_by_the_clock(trainer: "pl.Trainer") -> bool:
    """Whether ``val_check_interval`` is a time (from Lightning 2.6 on)."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def step_of_the_loss(trainer: "pl.Trainer") -> int:
    """The step at which Lightning logs the loss of the current batch: the number of earlier batches that led to a step.

    The public ``trainer.global_step`` counts the steps of all optimizers.
    """
    batches: int | None = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return trainer.global_step if batches is None else batches


def current_hook(module: "pl.LightningModule") -> str | None:
    """The hook that is running, which tells communication at every step from that once per epoch."""
    return getattr(module, "_current_fx_name", None)


def second_weights(trainer: "pl.Trainer") -> list[Tensor]:
    """The floating-point tensors of the models that ``WeightAveraging`` callbacks keep (from Lightning 2.6 on)."""
    kind = getattr(pl.callbacks, "WeightAveraging", None)
    models = [callback._average_model for callback in callbacks_of(trainer) if kind and isinstance(callback, kind)]
    modules = [model for model in models if isinstance(model, nn.Module)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers()) if has_mean(tensor)]


def prunes_after_training(callback: ModelPruning) -> bool:
    """Whether the callback prunes at the end of a training epoch, not of a validation."""
    return getattr(callback, "_prune_on_train_epoch_end", True)


def pruned(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that torch prunes, with the pruned parameter's name, which torch has no public way to find.

    Of a pruned ``weight`` torch keeps ``weight_orig``, the parameter; ``weight_mask``, a buffer; and as ``weight``
    their product at the latest forward pass.
    """
    return [
        (part, hook._tensor_name)
        for part in module.modules()
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod)
    ]


def snapshot(checkpoint: dict[str, Any], checkpoint_io: Any) -> dict[str, Any]:
    """The checkpoint for the plugin that writes files: a copy if it writes later, and makes no copy itself.

    In early Lightning 2.5, ``AsyncCheckpointIO`` writes the tensors' values at the time of writing.
    """
    if not isinstance(checkpoint_io, AsyncCheckpointIO) or hasattr(async_plugin, "_clone_tensor"):
        return checkpoint
    return apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())  # type: ignore[no-any-return]


def wrap_for_gradients_of(strategy: "pl.strategies.DDPStrategy", group: Any) -> None:
    """Wrap the model as ``DDPStrategy`` does, but average gradients only among the ranks of ``group``.

    The wrapper handles the parameters that required gradients when it was made: call this again after a change.
    """
    wrapper = strategy.model
    if isinstance(wrapper, DistributedDataParallel):
        # The wrapper may still be referenced somewhere, and its hooks would go on averaging.
        wrapper._remove_autograd_hooks()
        strategy.model = wrapper.module
    assert strategy.model is not None
    if any(parameter.requires_grad for parameter in strategy.model.parameters()):
        strategy._ddp_kwargs["process_group"] = group
        strategy.model = strategy._setup_model(strategy.model)


def signal_methods(trainer: "pl.Trainer") -> tuple[Method, Method, Method]:
    """Lightning's handlers of SIGTERM and of SLURM's requeue signal, and its broadcast of the former at every batch.

    They cannot be replaced in a public way. Lightning before 2.5.2 has no such broadcast.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    handlers = (connector, "_sigterm_notifier_fn"), (connector, "_slurm_sigusr_handler_fn")
    return (*handlers, (loop, "_broadcast_sigterm_tensor"))


def time_checks(trainer: "pl.Trainer") -> list[Method]:
    """The methods that ask rank 0 at every step whether the time is up, of all timers that have a limit."""
    timers = [timer for timer in callbacks_of(trainer) if isinstance(timer, Timer) and timer._interval == "step"]
    return [(timer, "_check_time_remaining") for timer in timers if timer.time_remaining() is not None]


def requeue_signal(trainer: "pl.Trainer") -> Any:
    """The signal by which SLURM announces a requeue; None outside of SLURM."""
    return getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)


def stop_as_after_sigterm(trainer: "pl.Trainer") -> None:
    """Have Lightning's loops raise ``SIGTERMException`` after the current batch; the public property is read-only."""
    trainer._signal_connector.received_sigterm = True


def stop_watching_children() -> None:
    """End the thread of Lightning's launcher that kills this process once a child has failed."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            vars(thread)["_run"] = lambda: True  # True: finished


def loaded_checkpoint(trainer: "pl.Trainer") -> dict[str, Any]:
    """The checkpoint file that the Trainer is about to continue from; empty if there is none."""
    return trainer._checkpoint_connector._loaded_checkpoint


def restore_later(trainer: "pl.Trainer", checkpoint: dict[str, Any]) -> None:
    """Continue from a checkpoint in memory, as if ``fit`` had been given its path; for ``Strategy.setup``.

    Lightning restores the loops, the optimizers and the schedulers after that.
    """
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    connector.restore_model()
    connector.restore_datamodule()
    connector.restore_callbacks()
    trainer.fit_loop._combined_loader = None  # made early, it would begin at the epoch's first batch


def restore_now(trainer: "pl.Trainer", checkpoint: dict[str, Any]) -> None:
    """Continue from a checkpoint in memory, but go on in the loops where they are; for a fit that is running."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    connector.restore_model()
    connector.restore_callbacks()
    connector.restore_precision_plugin_state()
    connector.restore_optimizers_and_schedulers()
    connector._loaded_checkpoint = {}


@contextmanager
def as_after_the_batch(trainer: "pl.Trainer") -> Iterator[bool]:
    """Within an optimizer's step, let the loops' counters look as when the callbacks' ``on_train_batch_end`` is called.

    Lightning can continue from there, but not from within a step. Yields whether this is within a step.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    steps = _steps_of(trainer)
    batch = progress.total.started - progress.total.processed
    step = steps.total.ready - steps.total.completed

    def add(sign: int) -> None:
        for each in (progress.total, progress.current):
            each.processed += sign * batch
        for each in (steps.total, steps.current):
            each.completed += sign * step

    add(1)
    try:
        yield batch > 0
    finally:
        add(-1)


def finish_schedules_of_the_batch(trainer: "pl.Trainer") -> None:
    """Step the learning-rate schedulers as the loop does between a batch and ``on_train_batch_end``."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers("step", update_plateau_schedulers=False)
    if loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


def step_plateaus_at_the_end_of_the_epoch(trainer: "pl.Trainer") -> None:
    """Have the loop step schedulers that watch a metric, if there is one; for ``on_train_epoch_end``.

    It leaves them out at the end of an epoch that it has not begun itself, because the metric may be missing then.
    """
    watched = {each.monitor for each in trainer.lr_scheduler_configs if each.reduce_on_plateau}
    if watched <= {*trainer.callback_metrics}:
        trainer.fit_loop._restarting = False


def first_batch(trainer: "pl.Trainer") -> tuple[int, int]:
    """The epoch in which training begins, and how many of its batches were trained on before."""
    epochs: Any = trainer.fit_loop.epoch_progress
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.current.started == epochs.current.processed:  # between two epochs
        return trainer.current_epoch, 0
    if batches.is_last_batch:
        return trainer.current_epoch + 1, 0
    return trainer.current_epoch, batches.current.processed


def skip_steps(trainer: "pl.Trainer", steps: int, scheduled: int) -> int:
    """Count further ``steps`` as done; for ``on_train_batch_end``. No data are loaded: the epoch ends sooner.

    From the end of the epoch on, only whole epochs are left out. Schedulers are stepped, except for the first
    ``scheduled`` steps.

    Returns:
        How many steps were counted.
    """
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
    batches, counted = loop.batch_progress, 0
    while counted < steps and batches.current.ready < trainer.num_training_batches:
        batches.increment_by(1, batches.is_last_batch)
        if not loop._should_accumulate():
            counted += 1
            _count_steps(trainer, 1)
        if counted > scheduled:
            finish_schedules_of_the_batch(trainer)
    per_epoch = len(range(0, int(min(trainer.num_training_batches, 2**52)), trainer.accumulate_grad_batches))
    left_out = (steps - counted) // max(1, per_epoch)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left_out = min(left_out, trainer.max_epochs - trainer.current_epoch - 1)
    if left_out > 0:
        epochs.increment_by(left_out)
        batches.total.increment_by(left_out * int(trainer.num_training_batches))
        _count_steps(trainer, left_out * per_epoch)
    return counted + max(0, left_out) * per_epoch


def _count_steps(trainer: "pl.Trainer", steps: int) -> None:
    progress = _steps_of(trainer)
    for each in (progress.total, progress.current):
        each.increment_by(steps)
    trainer.fit_loop.epoch_loop._batches_that_stepped += steps


def without_versions(trainer: "pl.Trainer") -> list[Any]:
    """The loggers that choose a version by themselves, and have not done so yet."""
    return [each for each in trainer.loggers if getattr(each, "_version", "") is None]


def forget_versions(loggers: "list[Any]") -> None:
    """Have loggers choose a version that does not exist yet, because some delete what they find in their folder."""
    for each in loggers:
        each._version = None


def is_older(checkpoint: Any, filepath: Any, time: float) -> bool:
    """Whether there is a file that was last written before a ``time``, where the ``ModelCheckpoint`` writes its own."""
    try:
        written: float = checkpoint._fs.modified(filepath).timestamp()
    except (OSError, NotImplementedError):  # the latter: no file system of that kind tells
        return False
    return written < time


def _steps_of(trainer: "pl.Trainer") -> Any:
    """The progress of optimizer steps from which ``trainer.global_step`` is computed."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step
    return loop.manual_optimization.optim_step_progress
