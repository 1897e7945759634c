r"""Second moments as those of the mean gradient, which full communication would have: without its noise.

Adam divides by the root of a mean of squared gradients: on one of n workers V = μ² + σ², where μ is the gradient's mean
and σ² the variance of its noise. Full communication averages gradients first, and has μ² + σ²/n. Where noise is most of
it, as with small batches, local steps are up to √n shorter at the same learning rate. Averaging second moments does not
change that.

How much of V is noise follows from the drift, which rounds measure anyway. Steps of size γ / √v make workers drift
apart by σ² / v times a known D (see :mod:`lightning_adpsgd.averaging.estimate`), so with S_g of a parameter group that
has N elements, as a mean over these,

    σ² / v ≈ S_g / ((1 − 1/n) N D).

where only parameters count that were trained since the round before. After each round v is multiplied so that it
becomes f V, with f = 1 − (1 − 1/n) σ² / V, between 1/n and 1. What of V is new since the round before,
(1 − β₂^p) / (1 − β₂^t) after t steps of a parameter, p of them since then, is brought to f at once; the rest has been.
So v stays a mean over as many steps as before, and that of a parameter that has not been trained is left alone.

A run may go on from moments that it has not made, such as those of full communication. These are taken for f V already:
if they are not, they will be forgotten. AMSGrad's are left alone altogether: its largest second moment is not a mean,
of which a part is new, and may not become smaller.

With rounds in a few bits, S also holds what rounding has done to the mean. Where that is not small against the drift
(4 bits, and a gradient common to all workers that far outweighs its noise), the noise is taken for larger than it is,
and f for smaller, down to 1/n.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import Group, MomentumReader, known


class SecondMoments:
    """Takes the part of an optimizer's second moments that is noise which the mean over the workers does not have.

    Args:
        optimizer: whose second moments, if it has any.
        reader: of its settings.
        workers: n, how many there are.
        steps: says for how many steps this worker's moments have been gathered in this run.
    """

    def __init__(self, optimizer: Optimizer, reader: MomentumReader, workers: int, steps: Callable[[], int]) -> None:
        # Configuration
        kind = known(optimizer)
        self._name = "" if kind is None else kind.second_moment
        self._optimizer = optimizer
        self._reader = reader
        self._workers = workers
        self._own_steps = steps

        # State
        self._shares: list[Tensor | None] = []  # f of each parameter group, as of the latest round
        self._steps: list[Tensor | None] = []  # t then, of each of its parameters; None: there was no such round

    def correct(self, variances: Sequence[float], drifts: Sequence[float]) -> None:
        """Correct them after a round whose fragments have all drifted for a period.

        Args:
            variances: S_g of each parameter group.
            drifts: D of each parameter group.
        """
        groups = self._optimizer.param_groups if self._name and self._workers > 1 else []
        self._shares += [None] * (len(groups) - len(self._shares))
        self._steps += [None] * (len(groups) - len(self._steps))
        for place, (group, variance, drift) in enumerate(zip(groups, variances, drifts, strict=False)):
            if drift > 0.0 and not group.get("amsgrad"):
                self._correct(place, group, variance / drift)

    def forget(self) -> None:
        """Take note that this worker's moments begin anew."""
        self._steps = [None] * len(self._steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, besides the second moments."""
        shares, steps = ([None if each is None else each.tolist() for each in of] for of in (self._shares, self._steps))
        return {"shares": shares, "steps": steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._shares, self._steps = (
            [None if each is None else torch.tensor(each, dtype=torch.float32) for each in state.get(name, [])]
            for name in ("shares", "steps")
        )

    @torch.no_grad()
    def _correct(self, place: int, group: Group, noise: float) -> None:
        """Correct those of a group; nobody waits for the device that counts its steps.

        Args:
            place: of the group.
            group: its settings.
            noise: (1 − 1/n) σ² / v, the sum over all elements.
        """
        beta = self._reader.plain(group)["betas"][1]
        states = [self._optimizer.state.get(parameter, {}) for parameter in group["params"]]
        found = [state for state in states if state.get(self._name) is not None]
        if not found or not 0.0 < beta < 1.0:
            return
        none = torch.zeros_like(found[0]["step"], dtype=torch.float32)
        steps = torch.stack([state.get("step", none).to(none) for state in states])
        before = self._before(place, steps)
        # of each parameter, and of all elements that were trained
        fresh = ((1.0 - beta ** (steps - before)) / (1.0 - beta**steps)).where(steps > 0.0, 0.0)
        elements = [each.numel() * (2 if each.is_complex() else 1) for each in group["params"]]
        counts = torch.tensor(elements, pin_memory=none.is_cuda).to(none.device, non_blocking=True)
        trained = counts.where(steps > before, 0)
        count = trained.sum().clamp(min=1)
        new, noise_of_each = (fresh * trained).sum() / count, noise / count

        share = self._shares[place]
        if share is None:  # of which v is f V if f = 1 − (1 − 1/n) σ² / V, with that in (1 − new) f V + new V
            share = ((1.0 - noise_of_each * new) / (1.0 + noise_of_each * (1.0 - new))).clamp(1.0 / self._workers, 1.0)
        share = share.to(none)
        most = 1.0 - 1.0 / self._workers
        wanted = 1.0 - (noise_of_each * ((1.0 - new) * share + new)).clamp(max=most)
        factors = ((1.0 - fresh) * share + fresh * wanted) / ((1.0 - fresh) * share + fresh)
        self._shares[place], self._steps[place] = (1.0 - new) * share + new * wanted, steps
        mine = zip(states, factors.unbind(), strict=True)
        torch._foreach_mul_(
            [state[self._name] for state in found], [each for state, each in mine if state.get(self._name) is not None]
        )

    def _before(self, place: int, steps: Tensor) -> Tensor:
        """Of each parameter, the steps of which the second moments are known to be those of the mean gradient."""
        kept = self._steps[place]
        if kept is None:
            return (steps - self._own_steps()).clamp(min=0.0)
        before = kept.to(steps).expand(len(steps)) if kept.dim() == 0 else kept.to(steps)  # early files have but one
        before = torch.cat([before, before.new_zeros(max(0, len(steps) - len(before)))])[: len(steps)]
        return before.where(before <= steps, 0.0)  # the optimizer may have begun anew
