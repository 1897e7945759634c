"""Tables for a terminal."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

_NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*( ?(%|[kMGT]?B|[mu]?s))?( (to|±) .*)?")


class Column(NamedTuple):
    """A column of a table."""

    title: str
    value: str | Callable[[Row], Any]  # the row's key, ``a.b`` for a key of a nested row, or a function of the row
    form: str | Callable[[Any], str] = ""  # a format specification, or a function that makes the text
    scale: float | None = None  # what the value is multiplied by

    def look_up(self, row: Row) -> Any:
        """The value of a row, unscaled; None if it is missing."""
        return self.value(row) if callable(self.value) else _look_up(row, self.value)

    def text(self, row: Row) -> str:
        """The cell; empty where the value is None or missing."""
        value = self.look_up(row)
        if value is None or isinstance(value, str):
            return value or ""
        if self.scale is not None:
            value *= self.scale
        return self.form(value) if callable(self.form) else format(value, self.form)


def _look_up(row: Row, path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = None if value is None else value.get(key)
    return value


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Rows as aligned text: numbers to the right, words to the left."""
    cells = [[column.text(row) for column in columns] for row in rows]
    titles = [column.title for column in columns]
    widths = [max(map(len, (title, *(line[place] for line in cells)))) for place, title in enumerate(titles)]
    to_the_right = [any(_NUMBER.fullmatch(line[place]) for line in cells) for place in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, to_the_right, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in aligned).rstrip()

    return "\n".join([line(titles), "  ".join("-" * width for width in widths), *map(line, cells)])


def interval(path: str, form: str) -> Callable[[Row], str | None]:
    """A column's value for two numbers: ``low to high``."""

    def text(row: Row) -> str | None:
        ends = _look_up(row, path)
        return None if ends is None else " to ".join(format(end, form) for end in ends)

    return text


def bytes_readable(count: float) -> str:
    """Bytes with a suitable unit, in powers of 1000: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
