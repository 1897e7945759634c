"""What the public arguments of strategy and hall may be: each check returns its argument, or says what to change."""

import math
from typing import Literal, get_args

from lightning_adpsgd.periods import AdaptivePeriod, AveragingPeriod, ConstantPeriod

OptimizerState = Literal["local", "average", "reset"]
OnDivergence = Literal["raise", "drop"]


def as_period(period: AveragingPeriod | int | None) -> AveragingPeriod:
    """The rule that an argument named ``period`` stands for.

    Raises:
        TypeError: if it stands for none.
    """
    if period is None:
        return AdaptivePeriod()
    if isinstance(period, AveragingPeriod):
        return period
    if isinstance(period, int) and not isinstance(period, bool):
        return ConstantPeriod(period)
    raise TypeError(
        f"period={period!r}: expected an AveragingPeriod, such as AdaptivePeriod(), or an int for a constant period,"
        f" got {type(period).__name__}."
    )


def check_optimizer_state(value: object) -> OptimizerState:
    """Return ``value`` if it is one of the policies for the optimizer's state.

    Raises:
        ValueError: if it is not.
    """
    for policy in get_args(OptimizerState):
        if value == policy:
            return policy  # type: ignore[no-any-return]
    raise ValueError(f'optimizer_state={value!r}: expected "local", "average" or "reset".')


def check_bucket_size(value: object) -> float:
    """Return ``value`` if it is a positive, finite number of MiB.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"bucket_size_mb={value!r}: expected a positive number of MiB, got {type(value).__name__}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"bucket_size_mb={value!r}: expected a positive, finite number of MiB.")
    return float(value)


def check_on_divergence(value: object) -> OnDivergence:
    """Return ``value`` if it says what to do about workers that have diverged.

    Raises:
        ValueError: if it does not.
    """
    for policy in get_args(OnDivergence):
        if value == policy:
            return policy  # type: ignore[no-any-return]
    raise ValueError(f'on_divergence={value!r}: expected "raise" or "drop".')
