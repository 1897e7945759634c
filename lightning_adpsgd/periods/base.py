"""The interface of a rule that decides how many local steps lie between two averaging rounds."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from lightning_adpsgd.validation import LARGEST_INT, check_int, check_number, wrong_value


class Observation(Protocol):
    """What rules read of a round's record."""

    @property
    def step(self) -> int:
        """k, the optimizer steps attempted so far, counted from 1."""

    @property
    def ratio(self) -> float:
        """R = Σ_g S_g / γ_g over the parameter groups with γ_g > 0."""

    @property
    def learning_rate(self) -> float:
        """γ_k, the mean over the workers; 0 where every group's learning rate was 0."""


class _FormerObservation(NamedTuple):
    step: int
    ratio: float
    learning_rate: float


def as_observation(record: Observation | int, ratio: float | None, learning_rate: float | None) -> Observation:
    """A record, or what version 0.1 has given in place of one: ``update(step, ratio=…, learning_rate=…)``."""
    if not isinstance(record, Integral):
        return cast(Observation, record)
    if ratio is None or learning_rate is None:
        raise TypeError(f"update({record}): expected an AveragingRound, or a step with ratio=... and learning_rate=...")
    return _FormerObservation(int(record), ratio, learning_rate)


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

    def scalars(self) -> Sequence[float | Tensor]:
        """Numbers of this worker that are to ride along with the next round; :meth:`update` gets their means.

        A rule that needs the loss, for example, keeps the latest one that it was told, and returns it here.

        Returns:
            Always equally many, on all workers; floats, or tensors of one element that nobody need wait for.
        """
        return ()

    @abstractmethod
    def update(self, record: Observation, scalars: Sequence[float] = ()) -> None:
        """Learn from a round that the period asked for.

        Rules with the former signature, ``update(step, *, ratio, learning_rate)``, still work.

        Args:
            record: the whole :class:`AveragingRound`. Its ``step`` is k, its ``ratio`` S_k / γ_k, summed over the
                parameter groups whose learning rate is not 0; where that is 0 for all, ``learning_rate`` is 0, and
                ``ratio`` says nothing.
            scalars: the means over the workers of what :meth:`scalars` has returned when the round was measured.
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


def report(rule: AveragingPeriod, record: Observation, scalars: Sequence[float]) -> None:
    """Tell a rule of a round, in whichever way its ``update`` takes it."""
    parameters = inspect.signature(rule.update).parameters
    takes_anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "record" not in parameters and ("ratio" in parameters or takes_anything):  # the signature of version 0.1
        former: Any = rule
        former.update(record.step, ratio=record.ratio, learning_rate=record.learning_rate)
    elif len(parameters) == 1:
        rule.update(record)
    else:
        rule.update(record, scalars)


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
