"""The settings of averaging rounds, and their checks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from numbers import Integral
from typing import Any, Literal, get_args

import torch

from lightning_adpsgd.averaging.codec import CastCodec, Codec
from lightning_adpsgd.averaging.int_codec import IntCodec
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.periods import AdaptivePeriod, AveragingPeriod, ConstantPeriod
from lightning_adpsgd.validation import check_choice, check_instance, check_int, check_number, wrong_type, wrong_value

OptimizerState = Literal["local", "average", "reset", "estimate"]
OnDivergence = Literal["raise", "drop"]
ReduceDtype = Literal["bf16", "fp16", "int8", "int4"]
WorkerKind = Literal["device", "node"]

_CODECS: dict[str, Callable[[], Codec]] = {
    "bf16": lambda: CastCodec(torch.bfloat16),
    "fp16": lambda: CastCodec(torch.float16),
    "int8": lambda: IntCodec(bits=8),
    "int4": lambda: IntCodec(bits=4),
}

# torch counts timeouts in whole milliseconds, and adds them to the time since 1970 in 64-bit nanoseconds.
_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = timedelta(milliseconds=1), timedelta(days=36_500)


@dataclass(frozen=True)
class AveragingOptions:
    """How to average; when to average is up to an :class:`AveragingPeriod`.

    Args:
        average_buffers: whether the module's persistent floating-point buffers (BatchNorm statistics) are averaged too.
        exclude_buffers: :mod:`fnmatch` patterns of the names of buffers that are not averaged.
        optimizer_state: what a round does to momentum and moments: leave them "local", "average" them over the workers,
            "reset" them to their values before the first step, or "estimate" from the drift of parameters how far first
            moments are from their mean, and correct them, which sends nothing.
        bucket_size_mb: size of the largest bucket, in MiB. At most two are in memory.
        on_divergence: what a round does if parameters of some workers are not finite: "raise" an error, or "drop" these
            workers from the mean.
        stagger: whether to spread each round over the period.
        overlap: d, the number of local steps during which a round, or a fragment of it, is in flight.
        reduce_dtype: the type in which rounds that the period asks for are sent: "bf16", "fp16", "int8", "int4", or a
            :class:`Codec` such as ``IntCodec(bits=4, block_size=64)``; None: that of the tensors, but at least fp32.
        update: what is done with the mean in rounds that the period asks for; None: it is adopted.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a setting is out of range, or cannot be combined with another one.
    """

    average_buffers: bool = True
    exclude_buffers: Sequence[str] = ()
    optimizer_state: OptimizerState = "local"
    bucket_size_mb: float = 64.0
    on_divergence: OnDivergence = "raise"
    stagger: bool = False
    overlap: int = 0
    reduce_dtype: ReduceDtype | Codec | None = None
    update: Update | None = None

    def __post_init__(self) -> None:
        checked = {
            "average_buffers": check_instance(None, "average_buffers", self.average_buffers, bool, "True or False"),
            "exclude_buffers": _check_patterns("exclude_buffers", self.exclude_buffers),
            "optimizer_state": check_choice(None, "optimizer_state", self.optimizer_state, get_args(OptimizerState)),
            "bucket_size_mb": _check_bucket_size(self.bucket_size_mb),
            "on_divergence": check_choice(None, "on_divergence", self.on_divergence, get_args(OnDivergence)),
            "stagger": check_instance(None, "stagger", self.stagger, bool, "True or False"),
            "overlap": check_int(None, "overlap", self.overlap, at_least=0),
            "reduce_dtype": _check_reduce_dtype(self.reduce_dtype),
            "update": check_instance(None, "update", self.update, Update, optional=True),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # NumPy numbers became Python numbers, lists tuples
        if self.optimizer_state == "average" and self.is_spread:
            asked = "stagger=True" if self.stagger else f"overlap={self.overlap}"
            raise ValueError(
                f'optimizer_state=\'average\' with {asked}: expected "local", "estimate" or "reset". The state is'
                " averaged in one piece, while training waits. Leave out one of the two."
            )

    def check_with(self, period: AveragingPeriod) -> None:
        """Raise ``ValueError`` if a round could arrive after ``period`` asks for the next one."""
        if isinstance(period, ConstantPeriod) and self.overlap >= period.value:
            raise ValueError(
                f"overlap={self.overlap} with {period!r}: expected fewer steps than the averaging period. A round has"
                " to arrive before the next one is sent."
            )

    @property
    def bucket_bytes(self) -> int:
        """Size of the largest bucket, in bytes."""
        return int(self.bucket_size_mb * 2**20)

    @property
    def codec(self) -> Codec | None:
        """The codec of rounds that the period asks for; None: they are sent unencoded."""
        if self.reduce_dtype is None or isinstance(self.reduce_dtype, Codec):
            return self.reduce_dtype
        return _CODECS[self.reduce_dtype]()

    @property
    def is_spread(self) -> bool:
        """Whether rounds are in flight while training goes on."""
        return self.stagger or self.overlap > 0

    @property
    def transport(self) -> str:
        """How rounds are sent, in words: "at once" if no option changes it."""
        told = [
            "spread over the period" if self.stagger else "",
            f"adopted {self.overlap} step(s) later" if self.overlap else "",
            f"in {_name_of(self.reduce_dtype)}" if self.reduce_dtype else "",
        ]
        return ", ".join(filter(None, told)) or "at once"


def options_of(options: AveragingOptions | None, **single: Any) -> AveragingOptions:
    """The options given either as one argument or as single ones.

    Raises:
        TypeError: if an option is of the wrong type.
        ValueError: if an option is out of range, or a single one is given besides ``options``.
    """
    made = AveragingOptions(**single)
    if options is None:
        return made
    check_instance(None, "options", options, AveragingOptions, optional=True)
    also = [f"{f.name}={getattr(made, f.name)!r}" for f in fields(made) if getattr(made, f.name) != f.default]
    if also:
        raise ValueError(
            f"options={options!r} with {', '.join(also)}: expected one or the other. Move the single options into"
            f" AveragingOptions({', '.join(also)})."
        )
    return options


def as_period(period: AveragingPeriod | int | None) -> AveragingPeriod:
    """The rule for a ``period`` argument: an int is a constant period; None is :class:`AdaptivePeriod`'s defaults.

    Raises:
        TypeError: if it is something else.
        ValueError: if it is an int below 1.
    """
    if period is None:
        return AdaptivePeriod()
    if isinstance(period, Integral) and not isinstance(period, bool):
        return ConstantPeriod(int(period))
    expected = "an AveragingPeriod, such as AdaptivePeriod(), or an int for a constant period"
    return check_instance(None, "period", period, AveragingPeriod, expected)  # type: ignore[return-value]  # not int


def check_timeout(value: timedelta | None) -> timedelta | None:
    """Return ``value`` if it is None or a timeout that torch can use. For others, torch's error blames the network.

    Raises:
        TypeError: if it is something else, such as a number of seconds.
        ValueError: if it is shorter than a millisecond or longer than a hundred years.
    """
    expected = "a datetime.timedelta, such as timedelta(seconds=1800)"
    timeout = check_instance(None, "timeout", value, timedelta, expected, optional=True)
    if timeout is not None and not _SHORTEST_TIMEOUT <= timeout <= _LONGEST_TIMEOUT:
        raise wrong_value(
            None, "timeout", value, "between a millisecond and a hundred years, as in timedelta(minutes=30)"
        )
    return timeout


def _check_reduce_dtype(value: object) -> Any:
    if isinstance(value, Codec):
        return value
    return check_choice(None, "reduce_dtype", value, (*get_args(ReduceDtype), None))


def _name_of(reduce_dtype: ReduceDtype | Codec) -> str:
    if isinstance(reduce_dtype, IntCodec):
        return repr(reduce_dtype)
    return reduce_dtype if isinstance(reduce_dtype, str) else type(reduce_dtype).__name__


def _check_bucket_size(value: object) -> float:
    expected = "a positive, finite number of MiB, less than 2**43"  # bytes are counted in 64 bits
    most = math.nextafter(2.0**43, 0.0)
    return check_number(None, "bucket_size_mb", value, expected, at_least=math.ulp(0.0), at_most=most)


def _check_patterns(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise wrong_type(None, name, value, 'a list of patterns of names, for example ["*.queue"]')
    return tuple(value)
