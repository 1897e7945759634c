"""What the public arguments may be: each check returns its argument, or says what to change."""

import math
from collections.abc import Callable
from datetime import timedelta
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.optim import Optimizer

from lightning_adpsgd.periods import AdaptivePeriod, AveragingPeriod, ConstantPeriod
from lightning_adpsgd.periods.checks import LARGEST_INT, check_int, check_number, check_total_steps, given, type_of

__all__ = [
    "REDUCE_DTYPES",
    "OnDivergence",
    "OptimizerState",
    "ReduceDtype",
    "StartMethod",
    "WorkerKind",
    "as_period",
    "check_backend",
    "check_bucket_size",
    "check_combination",
    "check_devices",
    "check_flag",
    "check_index",
    "check_listener",
    "check_on_divergence",
    "check_optimizer",
    "check_optimizer_state",
    "check_optional",
    "check_overlap",
    "check_patterns",
    "check_prefix",
    "check_reduce_dtype",
    "check_start_method",
    "check_timeout",
    "check_total_steps",
    "check_worker",
    "given",
    "type_of",
]

OptimizerState = Literal["local", "average", "reset"]
OnDivergence = Literal["raise", "drop"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
ReduceDtype = Literal["bf16", "fp16"]
WorkerKind = Literal["device", "node"]

REDUCE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Listener = TypeVar("Listener", bound=Callable[..., object])
Given = TypeVar("Given")

_NOT_IN_A_FILE_NAME = r'\:*?"<>|'
_LONGEST_PREFIX = 200  # bytes; most file systems take 255

# torch counts a timeout in whole milliseconds, and adds it to the time since 1970 in 64-bit nanoseconds.
_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = timedelta(milliseconds=1), timedelta(days=36_500)


def as_period(period: AveragingPeriod | int | None) -> AveragingPeriod:
    """The rule that an argument named ``period`` stands for.

    Args:
        period: a rule; an int for a constant period; None for :class:`AdaptivePeriod` with its defaults.

    Raises:
        TypeError: if it stands for none.
        ValueError: if it is an int below 1.
    """
    if period is None:
        return AdaptivePeriod()
    if isinstance(period, AveragingPeriod):
        return period
    if isinstance(period, Integral) and not isinstance(period, bool):
        return ConstantPeriod(int(period))
    expected = "expected an AveragingPeriod, such as AdaptivePeriod(), or an int for a constant period"
    if isinstance(period, type) and issubclass(period, AveragingPeriod):
        raise TypeError(
            f"{given('period', period)}: {expected}, got the class itself. Call it: {period.__name__}(...)."
        )
    raise TypeError(f"{given('period', period)}: {expected}, got {type_of(period)}.")


def check_optimizer_state(value: object) -> OptimizerState:
    """Return ``value`` if it is one of the policies for the optimizer's state.

    Args:
        value: the argument named ``optimizer_state``.

    Raises:
        TypeError: if it is not a str.
        ValueError: if it is another one.
    """
    policy: OptimizerState = _one_of("optimizer_state", value, get_args(OptimizerState))
    return policy


def check_on_divergence(value: object) -> OnDivergence:
    """Return ``value`` if it says what to do about workers that have diverged.

    Args:
        value: the argument named ``on_divergence``.

    Raises:
        TypeError: if it is not a str.
        ValueError: if it is another one.
    """
    policy: OnDivergence = _one_of("on_divergence", value, get_args(OnDivergence))
    return policy


def check_start_method(value: object) -> StartMethod:
    """Return ``value`` if it is one of Lightning's ways to start processes.

    Args:
        value: the argument named ``start_method``.

    Raises:
        TypeError: if it is not a str.
        ValueError: if it is another one.
    """
    method: StartMethod = _one_of("start_method", value, get_args(StartMethod))
    return method


def check_bucket_size(value: object) -> float:
    """Return ``value`` if it is a positive number of MiB.

    Args:
        value: the argument named ``bucket_size_mb``.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not positive and finite, or more bytes than 64 bits can count.
    """
    size = check_number(None, "bucket_size_mb", value, what="a positive, finite number of MiB")
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"{given('bucket_size_mb', value)}: expected a positive, finite number of MiB.")
    if size * 2**20 > LARGEST_INT:
        raise ValueError(f"{given('bucket_size_mb', value)}: expected a number of MiB, less than 2**43 of them.")
    return size


def check_flag(name: str, value: object, owner: str | None = None) -> bool:
    """Return ``value`` if it is True or False.

    Args:
        name: the argument's name.
        value: the argument.
        owner: the class the argument belongs to, if the message is to say so.

    Raises:
        TypeError: if it is anything else; 0, 1 and "yes" are.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{given(name, value, owner)}: expected True or False, got {type_of(value)}.")
    return value


def check_index(value: object) -> int:
    """Return ``value`` if it is an int of at least 0.

    Args:
        value: the argument named ``index``.

    Raises:
        TypeError: if it is not an int.
        ValueError: if it is negative, or too large.
    """
    return check_int(None, "index", value, at_least=0, at_most=LARGEST_INT)


def check_overlap(value: object) -> int:
    """Return ``value`` if it is a number of steps for which a round can travel.

    Args:
        value: the argument named ``overlap``.

    Raises:
        TypeError: if it is not an int.
        ValueError: if it is negative, or too large.
    """
    return check_int(None, "overlap", value, at_least=0, at_most=LARGEST_INT)


def check_patterns(name: str, value: object) -> list[str]:
    """Return patterns of names as a list.

    Raises:
        TypeError: if it is not a list or tuple of strings.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        found = type_of(value)
        raise TypeError(
            f'{given(name, value)}: expected a list of patterns of names, for example ["*.queue"], got {found}.'
        )
    return [*value]


def check_reduce_dtype(value: object) -> ReduceDtype | None:
    """Return ``value`` if it is a type in which rounds can travel, or None.

    Args:
        value: the argument named ``reduce_dtype``.

    Raises:
        TypeError: if it is neither a str nor None.
        ValueError: if it is another one.
    """
    if value is None:
        return None
    if isinstance(value, torch.dtype):
        expected = " or ".join(f'"{name}"' for name in REDUCE_DTYPES)
        raise TypeError(f"{given('reduce_dtype', value)}: expected None, {expected}, got torch's own.")
    dtype: ReduceDtype = _one_of("reduce_dtype", value, get_args(ReduceDtype))
    return dtype


def check_worker(value: object) -> WorkerKind:
    """Return ``value`` if it says what a worker is.

    Args:
        value: the argument named ``worker``.

    Raises:
        TypeError: if it is not a str.
        ValueError: if it is another one.
    """
    kind: WorkerKind = _one_of("worker", value, get_args(WorkerKind))
    return kind


def check_combination(stagger: bool, overlap: int, optimizer_state: OptimizerState, period: AveragingPeriod) -> None:
    """Make sure that these arguments, each of which is right by itself, can be had together.

    Raises:
        ValueError: if they cannot.
    """
    if optimizer_state == "average" and (stagger or overlap):
        asked = "stagger=True" if stagger else f"overlap={overlap}"
        raise ValueError(
            f'optimizer_state={optimizer_state!r} with {asked}: expected "local" or "reset". The state is averaged in'
            " one piece, while nobody trains. Leave out one of the two."
        )
    if isinstance(period, ConstantPeriod) and overlap >= period.value:
        raise ValueError(
            f"overlap={overlap} with {period!r}: expected fewer steps than the averaging period. A round has to arrive"
            " before the next one is sent."
        )


def check_timeout(value: object) -> timedelta | None:
    """Return ``value`` if it is a positive duration, or None.

    Args:
        value: the argument named ``timeout``.

    Raises:
        TypeError: if it is something else; a number of seconds is.
        ValueError: if it is shorter than a millisecond, or longer than a hundred years.
    """
    if value is None:
        return None
    if not isinstance(value, timedelta):
        raise TypeError(
            f"{given('timeout', value)}: expected a datetime.timedelta, such as timedelta(seconds=1800), or None, got"
            f" {type_of(value)}."
        )
    if not _SHORTEST_TIMEOUT <= value <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"{given('timeout', value)}: expected between a millisecond and a hundred years, such as"
            " timedelta(minutes=30)."
        )
    return value


def check_backend(value: object) -> str | None:
    """Return ``value`` if it can be the name of a backend of ``torch.distributed``, or is None.

    Args:
        value: the argument named ``process_group_backend``.

    Raises:
        TypeError: if it is neither a str nor None.
        ValueError: if it is blank.
    """
    if value is None:
        return None
    expected = 'expected the name of a torch.distributed backend, such as "gloo", or None for what suits the device'
    if not isinstance(value, str):
        raise TypeError(f"{given('process_group_backend', value)}: {expected}, got {type_of(value)}.")
    if not value.strip():
        raise ValueError(f"{given('process_group_backend', value)}: {expected}.")
    return value


def check_devices(value: object) -> list[torch.device] | None:
    """Return ``value`` if it is a list of devices, or None.

    Args:
        value: the argument named ``parallel_devices``.

    Raises:
        TypeError: if it is anything else.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(device, torch.device) for device in value):
        raise TypeError(
            f"{given('parallel_devices', value)}: expected a list of torch.device, or None to leave them to the"
            f" Trainer, got {type_of(value)}. The number of devices is Trainer(devices=...)."
        )
    return list(value)


def check_optimizer(value: object) -> Optimizer:
    """Return ``value`` if it is an optimizer.

    Args:
        value: the argument named ``optimizer``.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, Optimizer):
        raise TypeError(
            f"{given('optimizer', value)}: expected a torch.optim.Optimizer, such as"
            f" torch.optim.SGD(model.parameters(), lr=0.1), got {type_of(value)}."
        )
    return value


def check_optional(name: str, value: Given, kind: type) -> Given:
    """Return ``value`` if it is an instance of ``kind``, or None.

    Args:
        name: the argument's name.
        value: the argument.
        kind: what it has to be an instance of.

    Raises:
        TypeError: if it is anything else.
    """
    if value is not None and not isinstance(value, kind):
        expected = f"expected None or an instance of {kind.__name__}"
        if isinstance(value, type) and issubclass(value, kind):
            raise TypeError(f"{given(name, value)}: {expected}, got the class itself. Call it: {value.__name__}(...).")
        raise TypeError(f"{given(name, value)}: {expected}, got {type_of(value)}.")
    return value


def check_listener(value: Listener) -> Listener:
    """Return ``value`` if it can be called.

    Args:
        value: the argument named ``listener``.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(value):
        raise TypeError(
            f"{given('listener', value)}: expected a function that takes an AveragingRound, got {type_of(value)}."
        )
    return value


def check_prefix(value: object) -> str:
    """Return ``value`` if it can name log entries, and a file inside of a folder, on every file system.

    Args:
        value: the argument named ``prefix``.

    Raises:
        TypeError: if it is not a str.
        ValueError: if it is empty, too long, leads out of the folder, or has characters that no file name may have.
    """
    where = given("prefix", value, "CommunicationMonitor")
    if not isinstance(value, str):
        raise TypeError(f"{where}: expected a str, got {type_of(value)}.")
    complete = all(part.strip(". ") for part in value.split("/"))  # no part is "" or ".."
    writable = value.isprintable() and not set(value) & set(_NOT_IN_A_FILE_NAME)
    if not (complete and writable and len(value.encode()) <= _LONGEST_PREFIX):
        raise ValueError(
            f"{where}: expected a name for log entries and the plot's file, such as 'adpsgd' or 'train/adpsgd': at most"
            f" {_LONGEST_PREFIX} bytes, all of them printable, none of {_NOT_IN_A_FILE_NAME} and a name other than '..'"
            " on both sides of every slash."
        )
    return value


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> Any:
    *others, last = (f'"{choice}"' for choice in choices)
    expected = f"expected {', '.join(others)} or {last}"
    if not isinstance(value, str):
        raise TypeError(f"{given(name, value)}: {expected}, got {type_of(value)}.")
    if value not in choices:
        raise ValueError(f"{given(name, value)}: {expected}.")
    return choices[choices.index(value)]
