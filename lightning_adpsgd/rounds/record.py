"""The immutable record of one averaging round."""

from typing import Literal, NamedTuple, get_args

Trigger = Literal["period", "validation", "checkpoint", "train_end", "pruning"]  # their order is that in saved files
TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)


class AveragingRound(NamedTuple):
    """What happened in one averaging round.

    Everything but ``seconds`` is the same on every rank. If nodes are workers, bytes are those of one rank's slices.
    """

    step: int
    """Number of optimizer steps attempted when the round ran."""
    optimizer: int
    """Index of the optimizer whose parameters were averaged."""
    trigger: Trigger
    """What the round was for: the period, a validation, a checkpoint, the end of training, or pruning."""
    local_steps: int
    """Optimizer steps since the previous round; 0 if only residuals, other tensors or optimizer state were averaged."""
    period: int
    """The averaging period in force when the round ran."""
    learning_rate: float
    """Mean over the workers of the rate of the first parameter group whose rate is not 0; 0 if there is none."""
    variance: float
    """S_k = (1/n) Σ_i ‖w̄_k − w_{k,i}‖², over all averaged parameters, before averaging (arXiv:2007.06134)."""
    ratio: float
    """r = Σ_g S_g / γ_g over the parameter groups with γ_g > 0."""
    target: float | None
    """C₂, the ratio that the rule aimed at when the round ran; None before the first sample, or if it has no target.

    If the number of workers has changed since the rule's first round, this is the target among those of this round."""
    payload_bytes: int
    """Bytes of all tensors that this rank put into collectives of this round."""
    sent_bytes: int
    """Bytes this rank sends for them in a ring all-reduce: 2(n−1)/n · payload."""
    seconds: float
    """Time for which the round held up training on this rank: GPU time for a full round on a GPU, else host time."""
    dropped: int = 0
    """Workers that were left out of the mean because their parameters were not finite."""


def ring_bytes(payload_bytes: int, workers: int) -> int:
    """Bytes that each of ``workers`` ranks sends in a ring all-reduce of ``payload_bytes``: 2(n−1)/n · payload.

    A ring all-reduce is a reduce-scatter and an all-gather of n−1 steps each, and in every step a rank sends one n-th
    of the tensor (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
    """
    return round(2 * (workers - 1) * payload_bytes / workers)
