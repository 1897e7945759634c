"""The interface of a rule that decides how many local steps lie between two averaging rounds."""

from abc import ABC, abstractmethod
from fractions import Fraction
from numbers import Integral
from typing import Any

from lightning_adpsgd.validation import LARGEST_INT, check_int, check_number, wrong_value


class AveragingPeriod(ABC):
    """How many local steps a worker takes between two averaging rounds.

    A rule sees only numbers that were reduced over the workers first, so that every worker, holding its own copy of the
    rule, takes the same decision. It keeps no tensors and never communicates.

    The life of a rule: :meth:`setup` once before the first step; then, after each round that the period itself asked
    for, :meth:`update`. Rounds asked for by something else (validation, a checkpoint, the end of training) are not
    reported: their variance belongs to a shorter drift.
    """

    @property
    @abstractmethod
    def value(self) -> int:
        """The averaging period in force, in optimizer steps; at least 1."""

    @property
    def target(self) -> float | None:
        """The value at which the rule holds ``ratio`` (C₂ in the paper), or None where there is none (yet)."""
        return None

    def setup(self, total_steps: int | None) -> None:  # noqa: B027 - a rule without shares of the run needs nothing
        """Take note of the length of the run.

        Args:
            total_steps: K, the number of optimizer steps the whole run will take; None if it is not known.

        Raises:
            TypeError: if ``total_steps`` is neither an int nor None.
            ValueError: if it is negative, or None while the rule was given a share of the run.
        """

    @abstractmethod
    def update(self, step: int, *, ratio: float, learning_rate: float) -> None:
        """Learn from a round that the period asked for.

        Args:
            step: k, the optimizer steps attempted so far, counted from 1.
            ratio: S_k / γ_k, summed over the parameter groups whose learning rate is not 0.
            learning_rate: γ_k, the mean over the workers; 0 where every group's learning rate was 0, in which case
                ``ratio`` says nothing.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the rule has learned, as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` as if there had been no interruption.

        Raises:
            TypeError: if ``state`` or one of its entries is of the wrong type.
            ValueError: if an entry is missing or out of range. The rule is then as it was before.
        """


class Steps:
    """A number of optimizer steps, given as such (int) or as a share of the run (float between 0 and 1).

    Args:
        owner: the class the argument belongs to, for error messages.
        name: the argument's name, for error messages.
        amount: the number of steps, or the share of all steps.

    Raises:
        TypeError: if ``amount`` is not a number.
        ValueError: if it is out of range.
    """

    def __init__(self, owner: str, name: str, amount: int | float) -> None:
        self.owner = owner
        self.name = name
        self.amount: int | float
        if isinstance(amount, Integral) and not isinstance(amount, bool):
            self.amount = check_int(owner, name, amount, at_least=0)
            return
        expected = "a number of steps (int) or a share of the run (float between 0 and 1)"
        self.amount = check_number(owner, name, amount, expected, at_least=0.0)
        if self.amount > 1.0:
            meant = int(amount) if amount < LARGEST_INT else 1000
            hint = f"A number of steps has no decimal point, as in {name}={meant}"
            raise wrong_value(owner, name, amount, f"{expected}. {hint}")

    def of(self, total_steps: int | None) -> int:
        """The number of steps in a run of ``total_steps``; a part of a step does not count.

        Raises:
            ValueError: if this is a share of the run and the run's length is not known.
        """
        if isinstance(self.amount, int):
            return self.amount
        if self.amount == 0.0:
            return 0
        if total_steps is None:
            raise ValueError(
                f"{self.owner}({self.name}={self.amount!r}) is a share of all optimizer steps, but the number of steps"
                f" of this run is not known beforehand. Pass a number of steps instead, for example"
                f" {self.name}=1000, or bound the run with Trainer(max_steps=...) or Trainer(max_epochs=...)."
            )
        # 0.29 of 100 steps are 29, as written, although 0.29 * 100 < 29 in floating point.
        as_written = Fraction(repr(self.amount)) * total_steps
        return min(total_steps, max(int(self.amount * total_steps), int(as_written)))
