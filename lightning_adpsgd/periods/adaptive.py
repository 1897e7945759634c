"""ADPSGD's rule: adapt the averaging period to the variance of the parameters among the workers."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from lightning_adpsgd.periods.base import AveragingPeriod, Observation, Steps, as_observation
from lightning_adpsgd.validation import (
    LARGEST_INT,
    check_choice,
    check_instance,
    check_int,
    check_number,
    check_state,
    check_total_steps,
)

LARGEST_FACTOR = 2.0
"""With ``growth="proportional"``, the largest factor by which one round changes the period."""
RISE = 1.001
"""A learning rate counts as risen if it is this many times the highest so far; less may be rounding."""


class AdaptivePeriod(AveragingPeriod):
    """Adapts the period so that S_k / γ_k stays near a target (ADPSGD).

    During the *sampling phase*, the first ``sampling`` steps, the period stays at ``initial``, and the target C₂ is the
    mean of the ratios r = S_k / γ_k of the rounds so far. Afterwards, at every round, the period grows by one step if
    r < ``low`` · C₂, and shrinks by one if r > ``high`` · C₂.

    The defaults are the paper's setting, as we read it: P. Jiang and G. Agrawal, "Adaptive Periodic Averaging: A
    Practical Approach to Reducing Communication in Distributed Learning", arXiv:2007.06134.

    A round at which every learning rate is 0 is ignored. If no round could be sampled during the sampling phase (a very
    short run, or a warm-up as long), the first round after both phases alone sets the target.

    Two options are not in the paper. A change by one step per round is slow if r is far from its target, as after a
    strong decay of the learning rate. With ``growth="proportional"`` the new period is p · √(C₂ / r), rounded, but at
    least p / 2, at most 2 p, and not p. That meets the target in one round if workers drift apart evenly (r ∝ p²), and
    approaches it from one side if their steps are independent (r ∝ p).

    While the learning rate warms up, workers usually drift less than at its peak, and rounds sampled then lower the
    target for the rest of the run. With ``skip_rising=True``, sampling restarts whenever the learning rate is higher
    than at all earlier rounds, so the mean includes only rounds from its peak on. A rate that does not rise changes
    nothing.

    Args:
        initial: p_init, the period during the sampling phase. A larger one means less communication in the whole run,
            since the target is the ratio after ``initial`` steps of drift.
        sampling: K_s, length of the sampling phase in steps (int) or as a share of the run (float).
        low: below ``low`` · C₂ the period grows.
        high: above ``high`` · C₂ the period shrinks.
        minimum: the period never falls below this.
        maximum: the period never grows above this; None means no cap.
        warmup: steps (int) or share of the run (float) at the start during which workers average after every step;
            these rounds are not sampled. Has to be shorter than ``sampling``, which also counts from the first step.
            This is only checked if both are given in the same unit.
        growth: "additive", one step per round, or "proportional", by a factor.
        skip_rising: whether to discard samples taken before the learning rate rose.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, or contradicts another one.
    """

    def __init__(
        self,
        initial: int = 4,
        sampling: int | float = 0.25,
        low: float = 0.7,
        high: float = 1.3,
        minimum: int = 1,
        maximum: int | None = None,
        warmup: int | float = 0,
        growth: Literal["additive", "proportional"] = "additive",
        skip_rising: bool = False,
    ) -> None:
        # Configuration
        name = "AdaptivePeriod"
        self._initial = check_int(name, "initial", initial, at_least=1)
        self._sampling = Steps(name, "sampling", sampling)
        grows = "a number from 0 to 1, because the period grows if the ratio is below low times the target"
        self._low = check_number(name, "low", low, grows, at_least=0.0, at_most=1.0)
        shrinks = (
            "a finite number of at least 1, because the period shrinks if the ratio is above high times the target"
        )
        self._high = check_number(name, "high", high, shrinks, at_least=1.0)
        self._minimum = check_int(name, "minimum", minimum, at_least=1)
        self._maximum = maximum
        if maximum is not None:
            self._maximum = check_int(name, "maximum", maximum, at_least=1, or_else=", or None")
        self._warmup = Steps(name, "warmup", warmup)
        self._growth = check_choice(name, "growth", growth, ("additive", "proportional"))
        self._skip_rising = check_instance(name, "skip_rising", skip_rising, bool, "True or False")
        _check_bounds(self._initial, self._minimum, self._maximum)
        _check_phases(self._warmup.amount, self._sampling.amount)

        # State, with the paper's names
        self._p = self._initial
        self._c2 = 0.0
        self._m = 0
        self._k = 0
        self._highest_rate = 0.0  # of the sampled rounds
        self._sampling_steps = 0
        self._warmup_steps = 0

    @property
    def value(self) -> int:
        """The averaging period in force: p, or 1 during the warm-up."""
        return 1 if self._k < self._warmup_steps else self._p

    @property
    def target(self) -> float | None:
        """C₂, the mean of the sampled ratios; None until the first sample."""
        return self._c2 if self._m > 0 else None

    def setup(self, total_steps: int | None) -> None:
        """Turn shares of the run into steps."""
        k = check_total_steps(total_steps, "AdaptivePeriod.setup")
        self._sampling_steps, self._warmup_steps = self._sampling.of(k), self._warmup.of(k)

    def update(
        self,
        record: Observation | int,
        scalars: Sequence[float] = (),
        *,
        ratio: float | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Sample the ratio or adapt the period to it (arXiv:2007.06134)."""
        observation = as_observation(record, ratio, learning_rate)
        step, ratio = observation.step, observation.ratio
        self._k = step
        if step <= self._warmup_steps or observation.learning_rate == 0.0:
            return
        if step <= self._sampling_steps or self._m == 0:
            self._sample(ratio, observation.learning_rate)
        elif ratio < self._low * self._c2:
            self._p = self._within_bounds(max(self._p + 1, self._proportional(ratio)))
        elif ratio > self._high * self._c2:
            self._p = self._within_bounds(min(self._p - 1, self._proportional(ratio)))

    def _sample(self, ratio: float, learning_rate: float) -> None:
        if learning_rate > RISE * self._highest_rate:
            self._highest_rate = learning_rate
            if self._skip_rising:
                self._c2, self._m = 0.0, 0
        self._c2 = (self._m * self._c2 + ratio) / (self._m + 1)
        self._m += 1

    def _proportional(self, ratio: float) -> int:
        """The period p · √(C₂ / r), rounded; p itself with additive growth."""
        if self._growth == "additive":
            return self._p
        factor = math.sqrt(self._c2 / ratio) if ratio > 0.0 else LARGEST_FACTOR
        return round(self._p * min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR))

    def _within_bounds(self, period: int) -> int:
        return min(max(self._minimum, period), self._maximum or LARGEST_INT)

    def state_dict(self) -> dict[str, Any]:
        """Period, target, number of samples and their highest rate, last step, and the phases' lengths in steps."""
        return {
            "period": self._p,
            "target": self._c2,
            "samples": self._m,
            "highest_rate": self._highest_rate,
            "step": self._k,
            "sampling_steps": self._sampling_steps,
            "warmup_steps": self._warmup_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the saved rule.

        The phases keep their saved lengths: a resumed run that is longer does not sample again. The bounds are this
        rule's own: a saved period beyond them is moved to the nearest.
        """
        names = tuple(name for name in self.state_dict() if name != "highest_rate")  # not in files of version 0.1
        saved = check_state("AdaptivePeriod", state, names)
        where = "AdaptivePeriod.load_state_dict"
        period = check_int(where, "period", saved["period"], at_least=1)
        target = check_number(
            where, "target", saved["target"], "a number of at least 0", at_least=0.0, at_most=math.inf
        )
        rate = check_number(
            where, "highest_rate", saved.get("highest_rate", 0.0), "a number of at least 0", at_least=0.0
        )
        samples, step, sampling_steps, warmup_steps = (
            check_int(where, name, saved[name], at_least=0)
            for name in ("samples", "step", "sampling_steps", "warmup_steps")
        )
        self._p = self._within_bounds(period)
        self._c2, self._m, self._k, self._highest_rate = target, samples, step, rate
        self._sampling_steps, self._warmup_steps = sampling_steps, warmup_steps

    def __repr__(self) -> str:
        return (
            f"AdaptivePeriod(initial={self._initial}, sampling={self._sampling.amount}, low={self._low},"
            f" high={self._high}, minimum={self._minimum}, maximum={self._maximum}, warmup={self._warmup.amount},"
            f" growth={self._growth!r}, skip_rising={self._skip_rising})"
        )


def _check_bounds(initial: int, minimum: int, maximum: int | None) -> None:
    if initial < minimum or (maximum is not None and initial > maximum):
        raise ValueError(
            f"AdaptivePeriod(initial={initial}, minimum={minimum}, maximum={maximum}): expected"
            " minimum <= initial <= maximum. Move initial between the bounds, or widen them."
        )


def _check_phases(warmup: int | float, sampling: int | float) -> None:
    # Steps and shares can only be compared once the run's length is known. That is too late for an error: a short trial
    # of a long run has to work. Its target is the ratio of the first round after both phases.
    if warmup > 0 and isinstance(warmup, int) == isinstance(sampling, int) and warmup >= sampling:
        raise ValueError(
            f"AdaptivePeriod(warmup={warmup!r}, sampling={sampling!r}): expected warmup < sampling. Both count from the"
            " first step, and warm-up rounds are not sampled, so no round would be. Make sampling longer than warmup."
        )
