"""All private or version-dependent names of Lightning and torch that the trainer uses, and why."""

import threading
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
