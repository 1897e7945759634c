"""A rule at work on one optimizer: told of the rounds that compare, and restored from a checkpoint."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning_adpsgd.periods.base import AveragingPeriod, Observation, report


class AttachedRule:
    """Passes rounds on to a rule.

    Args:
        rule: an averaging period.
    """

    def __init__(self, rule: AveragingPeriod) -> None:
        self._rule = rule
        self._restored: dict[str, Any] | None = None
        self._in_reserve: tuple[Observation, Sequence[float]] | None = None

    def setup(self, total_steps: int | None) -> None:
        """Tell the rule how long the run is; what it has learned, and has been restored, stays."""
        self._rule.setup(total_steps)
        if self._restored is not None:
            self._rule.load_state_dict(self._restored)

    def see(self, record: Observation, scalars: Sequence[float]) -> None:
        """Let the rule decide by a round whose drift compares with that of others."""
        self._in_reserve = None
        report(self._rule, record, scalars)

    def reserve(self, record: Observation, scalars: Sequence[float]) -> None:
        """Keep a round whose drift is too long to compare with others, in case that there are no others."""
        self._in_reserve = record, scalars

    def see_reserve(self) -> None:
        """Before a forced round: where there was nothing else to see, such rounds compare with their like."""
        if self._in_reserve is not None:
            self.see(*self._in_reserve)

    def forget_reserve(self) -> None:
        """All workers have been given the same: what was kept belongs to another run."""
        self._in_reserve = None

    def state_dict(self) -> dict[str, Any]:
        """The rule's class, by name, and its state."""
        return {"rule": type(self._rule).__name__, "period": self._rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any], steps: int, warns: bool) -> None:
        """Restore the rule, unless it is another one than the saved one: that starts anew, with a warning.

        Args:
            state: of :meth:`state_dict`.
            steps: optimizer steps that were taken.
            warns: whether this worker is the one to warn.
        """
        name = type(self._rule).__name__
        if name == state["rule"]:
            self._rule.load_state_dict(state["period"])
            # Before its first step, a rule may have been saved that did not know yet how long the run would be.
            self._restored = state["period"] if steps > 0 else None
        elif warns:
            warnings.warn(
                f"The saved averaging rule was {state['rule']}, this one is {name}: it starts anew at step {steps}. To"
                " go on where the run had stopped, pass the same kind of period as before.",
                stacklevel=3,
            )
