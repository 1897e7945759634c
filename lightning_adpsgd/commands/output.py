"""Passes on what several processes print, line by line, each line with its process's name before it."""

import contextlib
import os
import re
from typing import TextIO

_PIECE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r(?=[^\n]))")  # a \r at the very end may be half of \r\n
_ERASE_TO_END_OF_LINE = b"\x1b[K"


class Output:
    """Where lines of all processes go.

    What ends with a carriage return, such as a progress bar, is passed on as it is, so that the next piece takes its
    place on a terminal. Whole lines still start at the beginning of a line.

    Args:
        stream: such as ``sys.stdout``.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._erase = _ERASE_TO_END_OF_LINE if stream.isatty() else b""
        self._bar_of: str | None = None
        self.is_closed = False
        """Whether nobody reads it any more."""

    def write(self, name: str, text: bytes, ending: bytes = b"\n") -> None:
        """Write one piece of a process."""
        is_bar = ending == b"\r"
        before = b"\n" if self._bar_of not in (None, name) and not is_bar else b""
        self._bar_of = name if is_bar else None
        self._put(before + f"[{name}] ".encode() + text + self._erase + ending)

    def say(self, text: str) -> None:
        """Write lines of the launcher itself."""
        before = b"\n" if self._bar_of is not None else b""
        self._bar_of = None
        self._put(before + text.encode() + b"\n")

    def _put(self, data: bytes) -> None:
        if self.is_closed:
            return
        try:
            self._stream.buffer.write(data)
            self._stream.buffer.flush()
        except BrokenPipeError:
            self.is_closed = True
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # or Python's last flush would fail again


class Pieces:
    """Cuts what one process prints into pieces.

    Args:
        name: of the process.
        output: where the pieces go.
    """

    def __init__(self, name: str, output: Output) -> None:
        self._name = name
        self._output = output
        self._rest = b""
        self.last = ""
        """The last piece that is not blank."""

    def feed(self, data: bytes) -> list[str]:
        """Pass on all pieces that are complete, and return them."""
        data = self._rest + data
        end = 0
        pieces = []
        for found in _PIECE.finditer(data):
            end = found.end()
            pieces.append(self._pass_on(found[1], found[2]))
        self._rest = data[end:]
        return pieces

    def close(self) -> None:
        """Pass on what is left, as a line."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        if rest:
            self._pass_on(rest, b"\n")

    def _pass_on(self, text: bytes, ending: bytes) -> str:
        if text or ending != b"\r":  # bars begin with \r
            self._output.write(self._name, text, b"\r" if ending == b"\r" else b"\n")
        piece = text.decode(errors="replace")
        if piece.strip():
            self.last = piece.strip()
        return piece
