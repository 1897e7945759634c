"""The interface of rules that decide how many local steps lie between two averaging rounds."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from lightning_adpsgd.validation import LARGEST_INT, check_int, check_number, wrong_value


class Observation(Protocol):
    """The fields of a round's record that rules read."""

    @property
    def step(self) -> int:
        """k, the optimizer steps attempted so far, counted from 1."""

    @property
    def ratio(self) -> float:
        """R = Σ_g S_g / γ_g over the parameter groups with γ_g > 0."""

    @property
    def learning_rate(self) -> float:
        """γ_k, the mean over the workers; 0 if every group's learning rate is 0."""


class _FormerObservation(NamedTuple):
    step: int
    ratio: float
    learning_rate: float


def as_observation(record: Observation | int, ratio: float | None, learning_rate: float | None) -> Observation:
    """The record, which version 0.1 passed as ``update(step, ratio=…, learning_rate=…)``."""
    if not isinstance(record, Integral):
        return cast(Observation, record)
    if ratio is None or learning_rate is None:
        raise TypeError(f"update({record}): expected an AveragingRound, or a step with ratio=... and learning_rate=...")
    return _FormerObservation(int(record), ratio, learning_rate)


class AveragingPeriod(ABC):
    """How many local steps a worker takes between two averaging rounds.

    A rule sees only numbers that are reduced over the workers, so every worker's copy of the rule takes the same
    decision. It holds no tensors and never communicates.

    :meth:`setup` is called once before the first step, and :meth:`update` after each round that the period asked for.
    Rounds for a validation, a checkpoint or the end of training are not reported: they have drifted for less.
    """

    @property
    @abstractmethod
    def value(self) -> int:
        """The averaging period in force, in optimizer steps; at least 1."""

    @property
    def target(self) -> float | None:
        """The value near which the rule keeps ``ratio`` (C₂ in the paper); None if there is none (yet)."""
        return None

    def setup(self, total_steps: int | None) -> None:  # noqa: B027 - only rules with shares of the run need it
        """Set the length of the run.

        Args:
            total_steps: K, the number of optimizer steps of the whole run; None if it is not known.

        Raises:
            TypeError: if ``total_steps`` is neither an int nor None.
            ValueError: if it is negative, or None although the rule was given a share of the run.
        """

    def scalars(self) -> Sequence[float | Tensor]:
        """This worker's numbers to send along with the next round; :meth:`update` receives their means.

        A rule that needs the loss, for example, stores the latest loss and returns it here.

        Returns:
            Floats, or tensors of one element (read without a device sync); always as many, on all workers.
        """
        return ()

    @abstractmethod
    def update(self, record: Any, scalars: Sequence[float] = ()) -> None:
        """Adapt to a round that the period asked for.

        Rules with the former signature, ``update(step, *, ratio, learning_rate)``, still work.

        Args:
            record: the :class:`AveragingRound`. Its ``step`` is k; its ``ratio`` is S_k / γ_k, summed over the
                parameter groups whose learning rate is not 0. If all are 0, ``learning_rate`` is 0, and ``ratio`` means
                nothing. If the number of workers has changed, ``ratio`` is what is to be expected among the former.
            scalars: the means over the workers of what :meth:`scalars` returned when the round was measured.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The rule's state, as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`, so that the rule continues as if not interrupted.

        Raises:
            TypeError: if ``state`` or one of its entries is of the wrong type.
            ValueError: if an entry is missing or out of range. The rule is unchanged then.
        """


def report(rule: AveragingPeriod, record: Observation, scalars: Sequence[float]) -> None:
    """Pass a round to a rule, with the arguments that its ``update`` takes."""
    parameters = inspect.signature(rule.update).parameters
    kinds = {each.kind for each in parameters.values()}
    named_only = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    if "record" not in parameters and ("ratio" in parameters or named_only):  # the signature of version 0.1
        former: Any = rule
        former.update(record.step, ratio=record.ratio, learning_rate=record.learning_rate)
    elif len(parameters) == 1 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        rule.update(record)
    else:
        rule.update(record, scalars)


class Steps:
    """A number of optimizer steps, given as an int or as a share of the run (float from 0 to 1).

    Args:
        owner: the class that takes the argument, for error messages.
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
        """The number of steps in a run of ``total_steps``, rounded down.

        Raises:
            ValueError: if this is a share of the run, and ``total_steps`` is None.
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
        # 0.29 of 100 steps are 29 steps, although 0.29 * 100 < 29 in floating point.
        as_written = Fraction(repr(self.amount)) * total_steps
        return min(total_steps, max(int(self.amount * total_steps), int(as_written)))
