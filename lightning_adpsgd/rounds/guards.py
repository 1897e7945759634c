"""Detects problems of a run: warns once, on rank 0, or raises on all ranks."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import FlatLayout
from lightning_adpsgd.errors import WorkersDivergedError
from lightning_adpsgd.rounds.handshake import Handshake
from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.workers.group import WorkerGroup


class Guards:
    """Checks the handshakes and records of one optimizer."""

    def __init__(self, workers: WorkerGroup, index: int, name_of: Callable[[Tensor], str]) -> None:
        self._workers = workers
        self._index = index
        self._name_of = name_of
        self._has_drifted = False
        self._warned_of: set[str] = set()

    def check_variance(self, round_: AveragingRound) -> None:
        """Raise ``WorkersDivergedError`` if the workers are so far apart that their variance is not finite."""
        if not math.isfinite(round_.ratio):
            raise WorkersDivergedError(
                f"The variance of the parameters among the workers is not finite (S_k = {round_.variance}, S_k/γ_k ="
                f" {round_.ratio}) at step {round_.step} of optimizer {self._index}: the workers' parameters are"
                " finite, but so far apart that training has diverged. Lower the learning rate, clip gradients, or"
                " average more often (a smaller period, or a warm-up)."
            )

    def report_divergence(self, handshake: Handshake, step: int, watched: Sequence[Tensor], drop: bool) -> None:
        """Report the ranks whose parameters are not finite, before anything is overwritten.

        Args:
            handshake: the handshake that found them.
            step: the optimizer's step.
            watched: this worker's parameters.
            drop: whether to warn and continue with the mean of the other workers, if there are any.

        Raises:
            WorkersDivergedError: on every worker, unless the others continue.
        """
        ranks = handshake.diverged
        mine = [self._name_of(tensor) for tensor in watched if not all_finite([tensor])]
        first = self._workers.gather_objects(mine)[ranks[0]]
        found = (
            f"Parameters of rank(s) {', '.join(map(str, ranks))} are not finite at step {step} (optimizer"
            f" {self._index}). The first of {len(first)} on rank {ranks[0]}: {', '.join(first[:3])}."
        )
        advice = (
            "Training diverged there: lower the learning rate, clip gradients, or look for bad samples in that rank's"
            " data."
        )
        if not drop or len(handshake.diverged_workers) == self._workers.count:
            nobody = " There is no worker left to go on from." if drop else ""
            raise WorkersDivergedError(f"{found} No rank's parameters were overwritten.{nobody} {advice}")
        self._warn(
            f"{found} As on_divergence='drop' says, they are left out of this average, and continue from the others'."
            f" {advice}"
        )

    def compare_learning_rates(self, handshake: Handshake, step: int) -> None:
        """Warn, once, if workers train with different learning rates."""
        rates = handshake.learning_rates
        if len(set(rates)) > 1 and self._is_first("rates"):
            each = ", ".join(f"rank {rank}: {rate:g}" for rank, rate in enumerate(rates))
            self._warn(
                f"The workers' learning rates differ at step {step} (summed over the parameter groups: {each})."
                " All workers still use the same averaging period, because the rule sees the mean. But a checkpoint"
                " holds rank 0's rates. Usual cause: a scheduler such as ReduceLROnPlateau that watches a metric of one"
                " worker alone. Log the metric with sync_dist=True."
            )

    def look_for_drift(self, round_: AveragingRound, parameters: Sequence[Tensor], workers: int) -> None:
        """Warn, once, if the parameters of so many averaged ``workers`` are identical after local steps."""
        if self._has_drifted or "no drift" in self._warned_of:
            return
        if round_.learning_rate == 0.0 or round_.local_steps == 0 or not parameters:
            return
        if workers == 1:
            return
        # The mean of three equal numbers may differ from them: three divisions and two sums are rounded.
        noise = (2 * torch.finfo(torch.float32).eps) ** 2
        if round_.variance > noise * squared_norm(parameters):
            self._has_drifted = True
        elif self._is_first("no drift"):
            self._warn(
                f"After {round_.local_steps} local step(s) the parameters of all {workers} workers are"
                " identical. Probably every worker sees the same data: give each its own share, for example with"
                " torch.utils.data.DistributedSampler (Lightning's Trainer does so unless"
                " use_distributed_sampler=False), or with a different seed per worker for random or iterable data."
            )

    def _is_first(self, what: str) -> bool:
        first = what not in self._warned_of
        self._warned_of.add(what)
        return first

    def _warn(self, text: str) -> None:
        if self._workers.rank == 0:
            warnings.warn(text, stacklevel=2)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any tensor is NaN or infinite."""
    return bool(FlatLayout(tensors, [0] * len(tensors)).are_finite())


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """Σ ‖w‖² over all tensors."""
    norms = torch._foreach_norm([tensor.data for tensor in tensors]) if tensors else ()
    return sum(float(norm) ** 2 for norm in norms)
