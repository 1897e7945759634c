"""Checks of numbers: each returns a plain int or float, or says what was given, what is expected and what to change.

Numbers are what Python's ``numbers`` module calls so, which includes NumPy's scalars. A bool is not a number here, and
neither is a tensor or an array, even one of a single element.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

LARGEST_INT = 2**63 - 1
"""What counts of steps have to fit into: they are stored as 64-bit integers."""

_LONGEST_REPR = 600


def given(name: str, value: object, owner: str | None = None) -> str:
    """How a message names an argument: ``name=value`` or ``Owner(name=value)``; a long value is cut short."""
    try:
        text = repr(value)
    except Exception:  # a message about a wrong value must not fail itself; an int of 5000 digits has no repr
        text = f"<{type_of(value)} that cannot be shown>"
    text = re.sub(r"\s*\n\s*", " ", text)
    if len(text) > _LONGEST_REPR:
        text = f"{text[: _LONGEST_REPR // 2]}...{text[-_LONGEST_REPR // 4 :]}"
    return f"{name}={text}" if owner is None else f"{owner}({name}={text})"


def type_of(value: object) -> str:
    """The name of a value's type, with its module unless it is a built-in one: NumPy's bool is not Python's."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_int(
    owner: str | None, name: str, value: object, *, at_least: int, at_most: int | None = None, or_else: str = ""
) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``at_least``.

    Args:
        owner: the class (or function) the argument belongs to, for error messages.
        name: the argument's name, for error messages.
        value: the argument.
        at_least: the smallest value there may be.
        at_most: the largest value there may be; None means no limit.
        or_else: what else there may be, for error messages.

    Raises:
        TypeError: if it is not an int (a bool is not one).
        ValueError: if it is too small or too large.
    """
    expected = f"expected an int of at least {at_least}{or_else}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{given(name, value, owner)}: {expected}, got {type_of(value)}.")
    number = int(value)
    if number < at_least:
        raise ValueError(f"{given(name, value, owner)}: {expected}.")
    if at_most is not None and number > at_most:
        raise ValueError(f"{given(name, value, owner)}: expected an int of at most {at_most}{or_else}.")
    return number


def check_number(owner: str | None, name: str, value: object, *, what: str = "a finite number") -> float:
    """Return ``value`` as a float if it is a number; it may be infinite or NaN.

    Args:
        owner: the class (or function) the argument belongs to, for error messages.
        name: the argument's name, for error messages.
        value: the argument.
        what: what is expected, for error messages.

    Raises:
        TypeError: if it is not a number (a bool is not one).
        ValueError: if it is beyond what a float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{given(name, value, owner)}: expected {what}, got {type_of(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{given(name, value, owner)}: expected {what}.") from None


def check_total_steps(value: object, owner: str | None = None) -> int | None:
    """Return ``value`` if it can be the number of optimizer steps of a run; 0 is a run that takes none.

    Args:
        value: the argument.
        owner: the class (or method) the argument belongs to, for error messages.

    Raises:
        TypeError: if it is neither an int nor None.
        ValueError: if it is negative or too large.
    """
    if value is None:
        return None
    or_else = ", or None if it is not known"
    return check_int(owner, "total_steps", value, at_least=0, at_most=LARGEST_INT, or_else=or_else)


def check_state(owner: str, state: object, names: Sequence[str]) -> Mapping[str, Any]:
    """Return ``state`` if it is a saved state that has an entry for each of ``names``.

    Args:
        owner: the class whose state it is to be, for error messages.
        state: what was loaded.
        names: the entries that are needed; others are ignored.

    Raises:
        TypeError: if it is not a dict.
        ValueError: if entries are missing.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{given('state', state, f'{owner}.load_state_dict')}: expected a dict with {_listed(names)}, as"
            f" state_dict() makes it, got {type_of(state)}."
        )
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"{owner}.load_state_dict: the saved state has no {_listed(missing)}; expected {_listed(names)}, found"
            f" {_listed(sorted(map(str, state))) or 'nothing'}. It was probably saved by another version of"
            " lightning_adpsgd, or by another rule: load it with what saved it, or leave it out to start the rule anew."
        )
    return state


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
