r"""Second moments as those of the mean gradient, which full communication would have: without its noise.

Adam divides by the root of a mean of squared gradients: on one of n workers V = μ² + σ², where μ is the gradient's mean
and σ² the variance of its noise. Full communication averages gradients first, and has μ² + σ²/n. Where noise is most of
it, as with small batches, local steps are up to √n shorter at the same learning rate. Averaging second moments does not
change that.

How much of V is noise follows from the drift, which rounds measure anyway. Steps of size γ / √v make workers drift
apart by σ² / v times a known D (see :mod:`lightning_adpsgd.averaging.estimate`), so with S_g of a parameter group that
has N elements, as a mean over these,

    σ² / v ≈ S_g / ((1 − 1/n) N D).

After each round v is multiplied so that it becomes f V, with f = 1 − (1 − 1/n) σ² / V, between 1/n and 1. What of V is
new since the round before, (1 − β₂^p) / (1 − β₂^t) after t steps, is brought to f at once; the rest has been. So v
stays a mean over as many steps as before.

With rounds in a few bits, S also holds what rounding has done to the mean. Where that is not small against the drift
(4 bits, and a gradient common to all workers that far outweighs its noise), the noise is taken for larger than it is,
and f for smaller, down to 1/n.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_adpsgd.averaging.momentum import Group, MomentumReader, known


class SecondMoments:
    """Takes the part of an optimizer's second moments that is noise which the mean over the workers does not have.

    Args:
        optimizer: whose second moments, if it has any.
        reader: of its settings.
        workers: n, how many there are.
    """

    def __init__(self, optimizer: Optimizer, reader: MomentumReader, workers: int) -> None:
        # Configuration
        kind = known(optimizer)
        self._names = () if kind is None else kind.second_moments
        self._optimizer = optimizer
        self._reader = reader
        self._workers = workers

        # State
        self._shares: list[float] = []  # f of each parameter group, as of then
        self._steps: list[int] = []  # t of each parameter group when it was last corrected

    def correct(self, variances: Sequence[float], drifts: Sequence[float]) -> None:
        """Correct them after a round whose fragments have all drifted for a period.

        Args:
            variances: S_g of each parameter group.
            drifts: D of each parameter group.
        """
        groups = self._optimizer.param_groups if self._names and self._workers > 1 else []
        self._shares += [1.0] * (len(groups) - len(self._shares))
        self._steps += [0] * (len(groups) - len(self._steps))
        for place, (group, variance, drift) in enumerate(zip(groups, variances, drifts, strict=False)):
            elements = self._elements(group)
            if elements and drift > 0.0:
                noise = variance / ((1.0 - 1.0 / self._workers) * elements * drift)
                self._correct(place, group, noise)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, besides the second moments."""
        return {"shares": [*self._shares], "steps": [*self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._shares, self._steps = [*state.get("shares", [])], [*state.get("steps", [])]

    @torch.no_grad()
    def _correct(self, place: int, group: Group, noise: float) -> None:
        """Correct those of a group.

        Args:
            place: of the group.
            group: its settings.
            noise: σ² / v.
        """
        _, steps = self._reader.of(group)
        share, before = self._shares[place], self._steps[place]
        if before > steps:  # the optimizer has begun anew
            share, before = 1.0, 0
        beta = self._reader.plain(group)["betas"][1]
        if before == steps or not 0.0 < beta < 1.0:
            return
        fresh = (1.0 - beta ** (steps - before)) / (1.0 - beta**steps)
        mixed = (1.0 - fresh) * share + fresh
        wanted = 1.0 - (1.0 - 1.0 / self._workers) * min(1.0, noise * mixed)
        share = (1.0 - fresh) * share + fresh * wanted
        self._shares[place], self._steps[place] = share, steps
        states = [self._optimizer.state.get(parameter, {}) for parameter in group["params"]]
        found = [state[name] for state in states for name in self._names if state.get(name) is not None]
        if found:
            torch._foreach_mul_(found, share / mixed)

    def _elements(self, group: Group) -> int:
        return sum(
            parameter.numel() * (2 if parameter.is_complex() else 1)
            for parameter in group["params"]
            if parameter.requires_grad and self._names[0] in self._optimizer.state.get(parameter, {})
        )
