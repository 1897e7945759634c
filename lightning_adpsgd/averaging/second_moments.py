r"""Second moments as those of the mean gradient, which full communication would have: without its noise.

Adam divides by the root of a mean of squared gradients: on one of n workers V = μ² + σ², where μ is the gradient's mean
and σ² the variance of its noise. Full communication averages gradients first, and has μ² + σ²/n. Where noise is most of
it, as with small batches, local steps are up to √n shorter at the same learning rate, by another factor for every
element: where the signal is strong, steps are as long as those of full communication. Averaging second moments does not
change that.

How much of V is noise follows from how far a worker has drifted, which it knows after each round. An element of
w_i − w̄, times what steps are divided by, has a variance of (1 − 1/n) σ² times a known D, the sum of the W_j² of
:mod:`lightning_adpsgd.averaging.estimate`. So its square over D is what squared gradients hold too much of. Of that, a
mean R is kept as Adam keeps V, with the same β₂: after a round of p steps

    R ← min(β₂^p R + (1 − β₂^p) (w_i − w̄)² v / D,  (1 − 1/n) V),    v ← V − R,

where v is what the optimizer's state holds: V is v plus what is left of the R that was taken before, β₂^p R. By the
minimum, v is never less than V / n. R is an entry of the optimizer's state, so that memory is that of three moments
instead of two; like v, it is in checkpoints, and nothing is sent. In rounds of few bits, w̄ has also moved by what was
rounded: by about as much as a worker's own message, whose rounding is known, so that its square is subtracted.

What does not move on any worker (a parameter without a gradient) is left alone, and so is what a worker has not stepped
since the round before. A run may go on from moments that it has not made, such as those of full communication: there is
no R yet, so they are taken for v. AMSGrad's are left alone altogether: its largest second moment is not a mean that
changes in part, and may not become smaller.
"""

import torch
from torch import Tensor

from lightning_adpsgd.averaging.momentum import Group


def holds_noise(group: Group) -> bool:
    """Whether second moments of a parameter group are means from which noise can be taken."""
    return not group.get("amsgrad") and 0.0 < float(group["betas"][1]) < 1.0


def take_noise(
    moments: list[Tensor],
    taken: list[Tensor],
    deviations: list[Tensor],
    rounding: list[Tensor],
    kept: float,
    believed: Tensor,
    workers: int,
) -> None:
    """Take noise from second moments, in place.

    Args:
        moments: v of each parameter, or of a part of it.
        taken: R of each, of the same shape.
        deviations: w_i − w̄ of each, so that its square is (1 − 1/n) σ²; of the same shape, of at
            least 32 bits. Is overwritten.
        rounding: what rounding has added to what was sent, in the same units. Is overwritten.
        kept: β₂^p.
        believed: whether deviations are those of gradients, and not what rounding has done; a bool of one element.
        workers: n.
    """
    moved = torch.stack(torch._foreach_norm(deviations)) > 0.0
    keeps = [*torch.where(moved, kept, 1.0).to(moments[0].dtype).unbind()]
    news = [*((1.0 - kept) * moved).to(deviations[0].dtype).unbind()]
    least = max(1.0 / workers, torch.finfo(moments[0].dtype).eps)  # otherwise rounding might leave nothing
    for each in (deviations, rounding):
        torch._foreach_mul_(each, believed.to(each[0].dtype))  # before squares may be infinite
    torch._foreach_mul_(deviations, deviations)
    torch._foreach_addcmul_(deviations, rounding, rounding, value=-1.0)
    torch._foreach_mul_(deviations, news)
    torch._foreach_mul_(taken, keeps)
    torch._foreach_add_(moments, taken)
    torch._foreach_add_(taken, deviations)
    torch._foreach_maximum_(taken, 0.0)
    torch._foreach_minimum_(taken, [*torch._foreach_mul(moments, 1.0 - least)])
    torch._foreach_sub_(moments, taken)
