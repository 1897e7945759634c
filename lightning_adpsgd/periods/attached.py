"""A rule attached to one optimizer: sees the rounds that are comparable, and is restored from checkpoints."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

from lightning_adpsgd.periods.base import AveragingPeriod, Observation, report
from lightning_adpsgd.validation import check_int


class AttachedRule:
    """Passes rounds on to a rule.

    S_k is measured among n workers. If their noise is independent, its mean is (1 − 1/n) times what one worker varies.
    So that a target goes on when workers come or go, the rule sees r · (1 − 1/n₁) / (1 − 1/n), the ratio to be expected
    among as many workers as were in the first round that it has seen. Records hold r, and the target among n workers.
    """

    def __init__(self, rule: AveragingPeriod) -> None:
        self._rule = rule
        self._first_workers = 0  # in the first round that the rule has seen; 0: none yet
        self._restored: dict[str, Any] | None = None
        self._in_reserve: tuple[Observation, Sequence[float], int] | None = None
        self._is_set_up = False
        self._early: list[tuple[Observation, Sequence[float], int]] = []  # before that, in which a worker has joined

    def setup(self, total_steps: int | None) -> None:
        """Tell the rule how long the run is. A restored state is kept."""
        self._rule.setup(total_steps)
        if self._restored is not None:
            self._rule.load_state_dict(self._restored)
        self._is_set_up = True
        early, self._early = self._early, []
        for each in early:
            self.see(*each)

    def see(self, record: Observation, scalars: Sequence[float], workers: int) -> None:
        """Pass a comparable round of so many workers to the rule."""
        self._in_reserve = None
        if not self._is_set_up:
            self._early.append((record, scalars, workers))
            return
        if self._first_workers == 0 and workers > 1:
            self._first_workers = workers
        factor = self._factor(workers)
        if factor != 1.0:
            record = cast(Any, record)._replace(ratio=record.ratio * factor)
        report(self._rule, record, scalars)

    def target_among(self, workers: int) -> float | None:
        """The rule's target for the ratio that is measured among so many workers; None if it has none."""
        return None if self._rule.target is None else self._rule.target / self._factor(workers)

    def reserve(self, record: Observation, scalars: Sequence[float], workers: int) -> None:
        """Keep a round that has drifted too long to be comparable, in case there is no other."""
        self._in_reserve = record, scalars, workers

    def see_reserve(self) -> None:
        """Before a forced round, pass the reserved round to the rule: it is comparable with others of its kind."""
        if self._in_reserve is not None:
            self.see(*self._in_reserve)

    def forget_reserve(self) -> None:
        """Forget the reserved round, since all workers were given the same values."""
        self._in_reserve = None

    def state_dict(self) -> dict[str, Any]:
        """The name of the rule's class, its state, and the number of workers in the first round that it has seen."""
        return {
            "rule": type(self._rule).__name__,
            "period": self._rule.state_dict(),
            "first_workers": self._first_workers,
        }

    def _factor(self, workers: int) -> float:
        """What a ratio among so many workers is multiplied by. One worker has none, and nothing to compare it with."""
        if workers == 1 or self._first_workers in (0, workers):
            return 1.0
        return (1 - 1 / self._first_workers) / (1 - 1 / workers)

    def load_state_dict(self, state: dict[str, Any], steps: int, warns: bool) -> None:
        """Restore the rule after ``steps`` optimizer steps; if it is not of the saved class, it starts anew.

        Then there is a warning, if this worker ``warns``.
        """
        name = type(self._rule).__name__
        if name == state["rule"]:
            first = state.get("first_workers", 0)  # missing in early files: then it is that of the next round
            first = check_int("LocalSGD.load_state_dict", "first_workers", first, at_least=0)
            self._rule.load_state_dict(state["period"])
            self._first_workers = first
            # A rule saved before its first step may not have known the run's length yet.
            self._restored = state["period"] if steps > 0 else None
        elif warns:
            warnings.warn(
                f"The saved averaging rule was {state['rule']}, this one is {name}: it starts anew at step {steps}. To"
                " continue the saved rule, pass the same kind of period as before.",
                stacklevel=3,
            )
