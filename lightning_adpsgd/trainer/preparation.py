"""Checks and warnings before training, and the length of the run."""

import math
from collections.abc import Sequence

from torch.nn import Module, SyncBatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import known
from lightning_adpsgd.workers.group import WorkerGroup

from .compat import callbacks_of, validates_by_the_clock
from .family import (
    GradientAccumulationScheduler,
    MisconfigurationException,
    TrainerFn,
    TrainerStatus,
    pl,
    rank_zero_warn,
)


def is_fitting(trainer: "pl.Trainer") -> bool:
    """Whether a fit is running."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING


def check_module_is_ready(module: Module) -> None:
    """Raise ``MisconfigurationException`` if workers would initialize parameters independently."""
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"{len(lazy)} parameter(s) of the model are still uninitialized at setup, the first of them {lazy[0]!r}."
            " Every worker would initialize its own at its first batch, and their average would be meaningless. Run a"
            " dummy forward pass in the constructor or in configure_model() of your LightningModule."
        )


def check_validation_is_not_timed(trainer: "pl.Trainer") -> None:
    """Raise ``MisconfigurationException`` if workers would validate at different steps."""
    if validates_by_the_clock(trainer):
        raise MisconfigurationException(
            "Trainer(val_check_interval=...) is a time: every worker looks at its own clock, and is at its own step"
            " between two averaging rounds, so they would validate at different steps. Give a number of batches or a"
            " share of the epoch."
        )


def warn_of_sync_batchnorm(module: Module) -> None:
    """Warn if the model communicates in every forward pass."""
    if any(isinstance(part, SyncBatchNorm) for part in module.modules()):
        rank_zero_warn(
            "This model has SyncBatchNorm layers, which communicate in every forward pass, at the cost of the time that"
            " periodic averaging saves. Leave out Trainer(sync_batchnorm=True): running statistics are averaged in each"
            " round."
        )


def warn_of_a_missing_optimizer() -> None:
    """Warn that nothing will be averaged."""
    rank_zero_warn(
        "configure_optimizers() has returned no optimizer. This strategy averages the parameters of optimizers: what"
        " you train by other means is not averaged, and every worker ends with a different model. Return your"
        " optimizers from configure_optimizers()."
    )


def warn_of_short_steps(optimizers: Sequence[Optimizer], optimizer_state: str, workers: WorkerGroup) -> None:
    """Warn if steps are divided by the root of second moments that include each worker's own noise."""
    adams = [each for each in optimizers if (kind := known(each)) and kind.second_moment]
    if optimizer_state == "estimate":
        adams = [each for each in adams if any(group.get("amsgrad") for group in each.param_groups)]
        advice = "Turn off amsgrad, whose largest second moment is not corrected"
    else:
        advice = 'Use ADPSGDStrategy(optimizer_state="estimate"), which corrects this and sends nothing'
    if adams and workers.count > 1:
        most = math.sqrt(workers.count)
        rank_zero_warn(
            f"{type(adams[0]).__name__} divides by the root of a second moment, which includes the noise of a worker's"
            f" gradients. With DDP, gradients have 1/{workers.count} of that noise, so steps are up to {most:.1f} times"
            f" shorter than with DDP at the same learning rate. {advice}, or tune the learning rate again: try rates up"
            f" to {most:.1f} times as large."
        )


def warn_of_uneven_loaders(trainer: "pl.Trainer", workers: WorkerGroup) -> None:
    """Warn if some workers will run out of batches before others. All ranks have to call this."""
    batches = workers.table([min(trainer.num_training_batches, 2**52)])[:, 0].long().tolist()
    if len(set(batches)) > 1:
        each = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(batches))
        rank_zero_warn(
            f"The workers' training data loaders have different numbers of batches ({each}). When a worker ends an"
            " epoch before the others, training will stop with an error. Give all workers the same number of batches,"
            f" with drop_last=True or Trainer(limit_train_batches={min(batches)})."
        )


def total_steps_of(trainer: "pl.Trainer") -> int | None:
    """K, the number of steps of each optimizer; None if it is not known beforehand."""
    estimate = trainer.estimated_stepping_batches
    if not math.isfinite(estimate):
        return None
    # max_steps counts the steps of all optimizers, a rule those of one.
    estimate = _scheduled_steps(trainer) or estimate
    if trainer.max_steps > 0:
        estimate = min(estimate, -(-trainer.max_steps // max(1, len(trainer.optimizers))))
    return max(0, int(estimate))


def _scheduled_steps(trainer: "pl.Trainer") -> int | None:
    """The steps of a run whose gradient accumulation changes between epochs; None for other runs."""
    schedules = [callback for callback in callbacks_of(trainer) if isinstance(callback, GradientAccumulationScheduler)]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not schedules or epochs is None or epochs < 0 or not math.isfinite(batches):
        return None
    return sum(-(-int(batches) // schedules[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
