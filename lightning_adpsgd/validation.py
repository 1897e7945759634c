"""Checks of arguments: each returns its argument, or raises an error that says what was given and what is expected.

A wrong type is a TypeError, a wrong value a ValueError. ``owner`` is the class or function that takes the argument, if
the message should name it. Numbers are instances of the ``numbers`` module's classes, including NumPy scalars, and are
returned as Python numbers; bools, tensors and arrays are not numbers.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

LARGEST_INT = 2**63 - 1
"""The largest number of steps: they are stored as 64-bit integers."""

_LONGEST_REPR = 600
_Given = TypeVar("_Given")


def given(name: str, value: object, owner: str | None = None) -> str:
    """An argument as shown in messages: ``name=value`` or ``Owner(name=value)``; long values are shortened."""
    try:
        text = repr(value)
    except Exception:  # the message must not fail: an int of 5000 digits, for example, has no repr
        text = f"<{type_of(value)} that cannot be shown>"
    text = re.sub(r"\s*\n\s*", " ", text)
    if len(text) > _LONGEST_REPR:
        text = f"{text[: _LONGEST_REPR // 2]}...{text[-_LONGEST_REPR // 4 :]}"
    return f"{name}={text}" if owner is None else f"{owner}({name}={text})"


def type_of(value: object) -> str:
    """The name of a value's type, with its module unless it is built in: NumPy has a bool, too."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def wrong_type(owner: str | None, name: str, value: object, expected: str) -> TypeError:
    """The error for an argument of the wrong type."""
    return TypeError(f"{given(name, value, owner)}: expected {expected}, got {type_of(value)}.")


def wrong_value(owner: str | None, name: str, value: object, expected: str) -> ValueError:
    """The error for an argument that is out of range."""
    return ValueError(f"{given(name, value, owner)}: expected {expected}.")


def check_int(
    owner: str | None, name: str, value: object, *, at_least: int, at_most: int = LARGEST_INT, or_else: str = ""
) -> int:
    """Return ``value`` as an int if it is within the bounds; ``or_else`` says what else the caller accepts."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong_type(owner, name, value, f"an int of at least {at_least}{or_else}")
    number = int(value)
    if not at_least <= number <= at_most:
        limit = f"at least {at_least}" if number < at_least else f"at most {at_most}"
        raise wrong_value(owner, name, value, f"an int of {limit}{or_else}")
    return number


def check_number(
    owner: str | None, name: str, value: object, expected: str, *, at_least: float, at_most: float = sys.float_info.max
) -> float:
    """Return ``value`` as a float if it is within the bounds; NaN never is, infinity only if it is a bound."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(owner, name, value, expected)
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond the range of floats
        number = math.nan
    if not at_least <= number <= at_most:
        raise wrong_value(owner, name, value, expected)
    return number


def check_instance(
    owner: str | None, name: str, value: _Given, kind: type, expected: str = "", *, optional: bool = False
) -> _Given:
    """Return ``value`` if it is an instance of ``kind``, or None if ``optional``."""
    if isinstance(value, kind) or (optional and value is None):
        return value
    expected = (expected or f"an instance of {kind.__name__}") + (" or None" if optional else "")
    if isinstance(value, type) and issubclass(value, kind):
        where = given(name, value, owner)
        raise TypeError(f"{where}: expected {expected}, got the class itself. Call it: {value.__name__}(...).")
    raise wrong_type(owner, name, value, expected)


def check_choice(owner: str | None, name: str, value: object, choices: tuple[str | None, ...]) -> Any:
    """Return ``value`` as a plain str if it is one of ``choices``."""
    if value is None and None in choices:
        return None
    *others, last = ("None" if choice is None else f'"{choice}"' for choice in choices)
    expected = f"{', '.join(others)} or {last}"
    if not isinstance(value, str):
        raise wrong_type(owner, name, value, expected)
    if value not in choices:
        raise wrong_value(owner, name, value, expected)
    return choices[choices.index(value)]


def check_listener(value: _Given) -> _Given:
    """Return ``value`` if it is callable."""
    return check_instance(None, "listener", value, Callable, "a function that takes an AveragingRound")  # type: ignore[arg-type]


def check_total_steps(value: object, owner: str | None = None) -> int | None:
    """Return ``value`` if it is None or can be a run's number of optimizer steps; 0 is allowed."""
    if value is None:
        return None
    return check_int(owner, "total_steps", value, at_least=0, or_else=", or None if it is not known")


def check_state(owner: str, state: object, names: Sequence[str]) -> Mapping[str, Any]:
    """Return ``state`` if it is a mapping with an entry for each of ``names``; others are ignored."""
    listed = ", ".join(map(repr, names))
    if not isinstance(state, Mapping):
        where = f"{owner}.load_state_dict"
        raise wrong_type(where, "state", state, f"a dict with {listed}, as state_dict() makes it")
    missing = ", ".join(repr(name) for name in names if name not in state)
    if missing:
        found = ", ".join(map(repr, sorted(map(str, state)))) or "nothing"
        raise ValueError(
            f"{owner}.load_state_dict: the saved state has no {missing}; expected {listed}, found {found}. It was"
            " probably saved by another version of lightning_adpsgd or by another rule. Load it with the one that saved"
            " it, or do not load it, to start the rule anew."
        )
    return state
