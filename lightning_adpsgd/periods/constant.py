"""A constant averaging period: CPSGD, also known as local SGD."""

from collections.abc import Sequence
from typing import Any

from lightning_adpsgd.periods.base import AveragingPeriod, Observation, Steps, as_observation
from lightning_adpsgd.validation import check_int, check_state, check_total_steps


class ConstantPeriod(AveragingPeriod):
    """Average every ``period`` optimizer steps (CPSGD, local SGD).

    Args:
        period: optimizer steps between two rounds. 1 is full communication, which with plain SGD is the same as
            averaging gradients at every step.
        warmup: steps (int) or share of the run (float) at the start during which workers average after every step.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range.
    """

    def __init__(self, period: int, warmup: int | float = 0) -> None:
        self._period = check_int("ConstantPeriod", "period", period, at_least=1)
        self._warmup = Steps("ConstantPeriod", "warmup", warmup)

        # State
        self._warmup_steps = 0
        self._step = 0

    @property
    def value(self) -> int:
        """The averaging period in force."""
        return 1 if self._step < self._warmup_steps else self._period

    def setup(self, total_steps: int | None) -> None:
        """Turn a warm-up given as a share of the run into steps."""
        self._warmup_steps = self._warmup.of(check_total_steps(total_steps, "ConstantPeriod.setup"))

    def update(
        self,
        record: Observation | int,
        scalars: Sequence[float] = (),
        *,
        ratio: float | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Count the steps of the warm-up."""
        self._step = as_observation(record, ratio, learning_rate).step

    def state_dict(self) -> dict[str, Any]:
        """The latest step, and the length of the warm-up."""
        return {"step": self._step, "warmup_steps": self._warmup_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the warm-up; the period is the constructor's."""
        saved = check_state("ConstantPeriod", state, ("step", "warmup_steps"))
        where = "ConstantPeriod.load_state_dict"
        step = check_int(where, "step", saved["step"], at_least=0)
        self._warmup_steps = check_int(where, "warmup_steps", saved["warmup_steps"], at_least=0)
        self._step = step

    def __repr__(self) -> str:
        return f"ConstantPeriod(period={self._period}, warmup={self._warmup.amount})"
