"""A rule attached to one optimizer: sees the rounds that are comparable, and is restored from checkpoints."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning_adpsgd.periods.base import AveragingPeriod, Observation, report


class AttachedRule:
    """Passes rounds on to a rule."""

    def __init__(self, rule: AveragingPeriod) -> None:
        self._rule = rule
        self._restored: dict[str, Any] | None = None
        self._in_reserve: tuple[Observation, Sequence[float]] | None = None
        self._is_set_up = False
        self._early: list[tuple[Observation, Sequence[float]]] = []  # rounds before that, in which a worker has joined

    def setup(self, total_steps: int | None) -> None:
        """Tell the rule how long the run is. A restored state is kept."""
        self._rule.setup(total_steps)
        if self._restored is not None:
            self._rule.load_state_dict(self._restored)
        self._is_set_up = True
        early, self._early = self._early, []
        for record, scalars in early:
            self.see(record, scalars)

    def see(self, record: Observation, scalars: Sequence[float]) -> None:
        """Pass a comparable round to the rule."""
        self._in_reserve = None
        if not self._is_set_up:
            self._early.append((record, scalars))
            return
        report(self._rule, record, scalars)

    def reserve(self, record: Observation, scalars: Sequence[float]) -> None:
        """Keep a round that has drifted too long to be comparable, in case there is no other."""
        self._in_reserve = record, scalars

    def see_reserve(self) -> None:
        """Before a forced round, pass the reserved round to the rule: it is comparable with others of its kind."""
        if self._in_reserve is not None:
            self.see(*self._in_reserve)

    def forget_reserve(self) -> None:
        """Forget the reserved round, since all workers were given the same values."""
        self._in_reserve = None

    def state_dict(self) -> dict[str, Any]:
        """The name of the rule's class, and its state."""
        return {"rule": type(self._rule).__name__, "period": self._rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any], steps: int, warns: bool) -> None:
        """Restore the rule after ``steps`` optimizer steps; if it is not of the saved class, it starts anew.

        Then there is a warning, if this worker ``warns``.
        """
        name = type(self._rule).__name__
        if name == state["rule"]:
            self._rule.load_state_dict(state["period"])
            # A rule saved before its first step may not have known the run's length yet.
            self._restored = state["period"] if steps > 0 else None
        elif warns:
            warnings.warn(
                f"The saved averaging rule was {state['rule']}, this one is {name}: it starts anew at step {steps}. To"
                " continue the saved rule, pass the same kind of period as before.",
                stacklevel=3,
            )
