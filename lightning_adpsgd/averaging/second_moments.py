r"""Removes noise from second moments, so that they estimate those of the mean gradient.

Adam divides by the root of a mean of squared gradients. On one of n workers that mean is V = μ² + σ², where μ is the
gradient's mean and σ² the variance of its noise; with full communication, which averages gradients first, it is
μ² + σ²/n. Where noise dominates, as with small batches, local steps are up to √n shorter at the same learning rate;
where the signal is strong, they are as long. Averaging second moments does not change that.

How much of V is noise follows from a worker's drift. An element of w_i − w̄, times the divisor of its steps, has
variance (1 − 1/n) σ² D with a known D, the sum of the W_j² of :mod:`lightning_adpsgd.averaging.estimate`. So its square
over D estimates the excess of squared gradients. A mean R of these is kept as Adam keeps V, with the same β₂: after a
round of p steps

    R ← min(β₂^p R + (1 − β₂^p) (w_i − w̄)² v / D,  (1 − 1/n) V),    v ← V − R,

where v is the entry of the optimizer's state, and V is v plus what is left of the R subtracted before, β₂^p R. The
minimum keeps v at V / n or more. R is an entry of the state, too: it takes the memory of a third moment, and is in
checkpoints like v; nothing is sent. With a codec, the rounding error of w̄ adds to w_i − w̄ about as much as that of the
worker's own message, which is known, so its square is subtracted.

Parameters that move on no worker (without a gradient) are left alone, and so are those that a worker has not stepped
since the previous round. Moments from elsewhere, such as a run with full communication, have no R yet, and are taken
as v. AMSGrad's are left alone: its maximum is not a mean, and must not decrease.
"""

import torch
from torch import Tensor

from lightning_adpsgd.averaging.momentum import Group


def holds_noise(group: Group) -> bool:
    """Whether a parameter group's second moments are means from which noise can be subtracted."""
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
    """Subtract noise from second moments, in place.

    Args:
        moments: v of each parameter, or of a part of it.
        taken: R of each, of the same shape.
        deviations: w_i − w̄ of each, scaled so that its mean square is (1 − 1/n) σ²; at least fp32. Overwritten.
        rounding: the rounding error of the values sent, in the same units. Overwritten.
        kept: β₂^p.
        believed: whether deviations are those of gradients rather than rounding errors; a bool tensor of one element.
        workers: n.
    """
    moved = torch.stack(torch._foreach_norm(deviations)) > 0.0
    keeps = [*torch.where(moved, kept, 1.0).to(moments[0].dtype).unbind()]
    news = [*((1.0 - kept) * moved).to(deviations[0].dtype).unbind()]
    least = max(1.0 / workers, torch.finfo(moments[0].dtype).eps)  # so that rounding cannot leave 0
    for each in (deviations, rounding):
        torch._foreach_mul_(each, believed.to(each[0].dtype))  # before squares can overflow
    torch._foreach_mul_(deviations, deviations)
    torch._foreach_addcmul_(deviations, rounding, rounding, value=-1.0)
    torch._foreach_mul_(deviations, news)
    torch._foreach_mul_(taken, keeps)
    torch._foreach_add_(moments, taken)
    torch._foreach_add_(taken, deviations)
    torch._foreach_maximum_(taken, 0.0)
    torch._foreach_minimum_(taken, [*torch._foreach_mul(moments, 1.0 - least)])
    torch._foreach_sub_(moments, taken)
