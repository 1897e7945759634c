"""CPSGD with a given number of averaging rounds."""

from typing import Any

from typing_extensions import override

from lightning_adpsgd import AveragingPeriod
from lightning_adpsgd.validation import LARGEST_INT, check_int, check_state, check_total_steps


class EvenRounds(AveragingPeriod):
    """Spread a number of averaging rounds evenly over the K steps of the run.

    The n-th round is due at step ⌊n·K/rounds⌋, so that periods differ by one step at most and the last round is at step
    K. Like ``ConstantPeriod`` it is CPSGD, but with a mean period that need not be whole: for comparison with an
    adaptive run of as many rounds.

    A round that something else triggers (validation, a checkpoint) restarts the strategy's count of local steps, so the
    next round of the schedule is late by the steps counted until then; the one after it is on schedule again. Such a
    run has those extra rounds, and the period may trigger fewer than ``rounds``.

    Args:
        rounds: averaging rounds in the whole run.

    Raises:
        TypeError: if ``rounds`` is not an int.
        ValueError: if it is less than 1.
    """

    def __init__(self, rounds: int) -> None:
        # Configuration
        self._rounds = check_int("EvenRounds", "rounds", rounds, at_least=1, at_most=LARGEST_INT)

        # State
        self._total_steps: int | None = None
        self._step = 0

    @property
    @override
    def value(self) -> int:
        """Steps from the latest round to the next one that is due; 1 while the run's length is not known."""
        if self._total_steps is None:
            return 1
        # The first n with ⌊n·K/rounds⌋ > k. In a run longer than K steps rounds continue at the same pace.
        n = -(-(self._step + 1) * self._rounds // self._total_steps)
        return n * self._total_steps // self._rounds - self._step

    @override
    def setup(self, total_steps: int | None) -> None:
        """Store K; a ValueError if it is None, or if there are more rounds than steps."""
        steps = check_total_steps(total_steps, "EvenRounds.setup")
        if steps is None:
            raise ValueError(
                f"{self!r} spreads its rounds over the whole run, but the number of steps of this run is not known"
                " beforehand. Bound the run with Trainer(max_steps=...) or Trainer(max_epochs=...), or pass a constant"
                " period instead, for example period=8."
            )
        self._total_steps = self._with_room(steps)

    @override
    def update(self, step: int, *, ratio: float, learning_rate: float) -> None:
        """Store the step; the variance changes nothing."""
        self._step = step

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step and K."""
        return {"step": self._step, "total_steps": self._total_steps}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the saved schedule, even if the run is longer now; ``rounds`` is the constructor's.

        Raises:
            TypeError: if ``state`` or one of its entries is of the wrong type.
            ValueError: if an entry is missing or out of range; the rule is then unchanged.
        """
        saved = check_state("EvenRounds", state, ("step", "total_steps"))
        where = "EvenRounds.load_state_dict"
        step = check_int(where, "step", saved["step"], at_least=0)
        steps = check_total_steps(saved["total_steps"], where)
        if steps is not None:  # None was saved before the run's length was known
            self._total_steps = self._with_room(steps)
        self._step = step

    def _with_room(self, total_steps: int) -> int:
        if total_steps < self._rounds:
            raise ValueError(
                f"{self!r} in a run of {total_steps} optimizer steps: expected at most one round per step. Pass"
                f" rounds={max(1, total_steps)} or less, or train for longer."
            )
        return total_steps

    def __repr__(self) -> str:
        return f"EvenRounds(rounds={self._rounds})"
