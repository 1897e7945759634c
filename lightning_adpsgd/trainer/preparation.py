"""What is looked at before training: whether the run can work, how long it is, and where its ranks are."""

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
    """Whether a fit is under way."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING


def check_module_is_ready(module: Module) -> None:
    """Raise ``MisconfigurationException`` if workers would initialize parameters each by itself."""
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise MisconfigurationException(
            f"{len(lazy)} parameter(s) of the model are still uninitialized at setup, the first of them {lazy[0]!r}:"
            " every worker would initialize its own at its first batch, and the average of those means nothing. Run a"
            " dummy forward pass in the constructor or in configure_model() of your LightningModule."
        )


def check_validation_is_not_timed(trainer: "pl.Trainer") -> None:
    """Raise ``MisconfigurationException`` if workers would validate at different steps."""
    if validates_by_the_clock(trainer):
        raise MisconfigurationException(
            "Trainer(val_check_interval=...) is a time: every worker looks at its own clock, and between two averaging"
            " rounds nobody keeps them at the same step, so they would validate at different ones. Give a number of"
            " batches, or a share of the epoch."
        )


def warn_of_sync_batchnorm(module: Module) -> None:
    """Warn if the model communicates in every forward pass."""
    if any(isinstance(part, SyncBatchNorm) for part in module.modules()):
        rank_zero_warn(
            "This model has SyncBatchNorm layers, which communicate in every forward pass and so cost the time that"
            " averaging only once in a while saves. Leave out Trainer(sync_batchnorm=True): running statistics are"
            " averaged in each round."
        )


def warn_of_a_missing_optimizer() -> None:
    """Warn that nothing will be averaged."""
    rank_zero_warn(
        "configure_optimizers() has returned no optimizer, and this strategy averages the parameters of optimizers:"
        " what you train by other means is not averaged, and every worker ends with a model of its own. Return your"
        " optimizers from configure_optimizers()."
    )


def warn_of_short_steps(optimizers: Sequence[Optimizer], optimizer_state: str, workers: WorkerGroup) -> None:
    """Warn if steps are divided by the root of second moments that see each worker's own noise."""
    adams = [each for each in optimizers if (kind := known(each)) and kind.second_moment]
    if optimizer_state == "estimate":
        adams = [each for each in adams if any(group.get("amsgrad") for group in each.param_groups)]
        advice = "Turn off amsgrad, whose largest second moment is not corrected"
    else:
        advice = 'Use ADPSGDStrategy(optimizer_state="estimate"), which corrects that and sends nothing more'
    if adams and workers.count > 1:
        most = math.sqrt(workers.count)
        rank_zero_warn(
            f"{type(adams[0]).__name__} divides by the root of a second moment. A worker's own holds all of its"
            f" gradients' noise, of which DDP's holds one part in {workers.count}, so steps are up to {most:.1f} times"
            f" shorter than with DDP at the same learning rate. {advice}, or tune the learning rate anew: try rates up"
            f" to {most:.1f} times as large."
        )


def warn_of_uneven_loaders(trainer: "pl.Trainer", workers: WorkerGroup) -> None:
    """Warn if some workers will run out of batches before others; all have to ask."""
    batches = workers.table([min(trainer.num_training_batches, 2**52)])[:, 0].long().tolist()
    if len(set(batches)) > 1:
        each = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(batches))
        rank_zero_warn(
            f"The workers' training data loaders have different numbers of batches ({each}). A worker that ends an"
            " epoch early leaves the others waiting, and training ends with an error that says so. Give all workers"
            f" equally many batches, with drop_last=True or Trainer(limit_train_batches={min(batches)})."
        )


def total_steps_of(trainer: "pl.Trainer") -> int | None:
    """K, the number of steps that each optimizer will take; None if it is not known beforehand."""
    estimate = trainer.estimated_stepping_batches
    if not math.isfinite(estimate):
        return None
    # Lightning counts the steps of all optimizers against max_steps; a rule counts those of one.
    estimate = _scheduled_steps(trainer) or estimate
    if trainer.max_steps > 0:
        estimate = min(estimate, -(-trainer.max_steps // max(1, len(trainer.optimizers))))
    return max(0, int(estimate))


def _scheduled_steps(trainer: "pl.Trainer") -> int | None:
    """The steps of a run whose accumulation of gradients changes from epoch to epoch; None for other runs."""
    schedules = [callback for callback in callbacks_of(trainer) if isinstance(callback, GradientAccumulationScheduler)]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not schedules or epochs is None or epochs < 0 or not math.isfinite(batches):
        return None
    return sum(-(-int(batches) // schedules[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
