"""A process that may be started several times, with what it prints."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from selectors import EVENT_READ, BaseSelector
from typing import IO, Any

from lightning_adpsgd.commands.output import Output, Pieces

_PR_SET_PDEATHSIG = 1
_AT_ONCE = 2**16
_READS_AFTER_THE_END = 64  # a pipe holds less; a process that has left the session may still write


class Child:
    """A process in a session of its own, which dies with its parent.

    Args:
        name: printed before each of its lines.
        command: its arguments, the program first.
        environment: its environment variables.
        outputs: where its stdout and its stderr go.
        selector: tells when there is something to read: call the registered data, a function, then.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        outputs: tuple[Output, Output],
        selector: BaseSelector,
    ) -> None:
        self.name = name
        self.command = [*command]
        self.restarts = 0
        self.start_at: float | None = 0.0
        """When it is due to be started, as ``time.monotonic``; None: it is not."""
        self.exit_code: int | None = None
        """Of its latest end, negative for a signal; None: it has not ended since it was started."""
        self.heard: Callable[[str], None] = lambda line: None
        """Called with each line of its stdout."""
        self.last_error = ""
        """The last line of its stderr."""
        self._environment = environment
        self._outputs = outputs
        self._selector = selector
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: list[tuple[IO[bytes], Pieces]] = []

    @property
    def is_running(self) -> bool:
        """Whether it was started, and has not been found to have ended."""
        return self._process is not None

    def start(self) -> None:
        """Start it. Call this in the main thread: the child dies with the thread that has started it."""
        self.start_at, self.exit_code, self.last_error = None, None, ""
        prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

        def die_with_parent() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has died meanwhile
                os.kill(os.getpid(), signal.SIGKILL)

        self._process = subprocess.Popen(
            self.command,
            bufsize=0,
            env={**self._environment, "ADPSGD_RESTARTS": str(self.restarts)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pipes = []
        for pipe, output in zip((self._process.stdout, self._process.stderr), self._outputs, strict=True):
            os.set_blocking(pipe.fileno(), False)
            pieces = Pieces(self.name, output)
            self._pipes.append((pipe, pieces))
            self._selector.register(pipe, EVENT_READ, self._reader(pipe, pieces))

    def signal(self, number: int) -> None:
        """Send it a signal, but not to the processes that it has started: those are its own affair."""
        if self._process is not None:
            self._process.send_signal(number)

    def has_ended(self) -> bool:
        """Whether it has just ended. Then all it has printed was passed on, and what it has started is killed."""
        process = self._process
        if process is None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """Kill it and what it has started, if it runs."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self.exit_code = process.wait()
        self._process = None
        for pipe, pieces in self._pipes:
            for _ in range(_READS_AFTER_THE_END):
                if pipe.closed or not self._read(pipe, pieces):
                    break
            self._close(pipe, pieces)
        self.last_error = self._pipes[1][1].last

    def _reader(self, pipe: IO[bytes], pieces: Pieces) -> Callable[[], Any]:
        return lambda: self._read(pipe, pieces)

    def _read(self, pipe: IO[bytes], pieces: Pieces) -> bool:
        """Pass on some of what there is to read; return whether there was any."""
        data = pipe.read(_AT_ONCE)
        if data == b"":  # all writers have closed it
            self._close(pipe, pieces)
        lines = pieces.feed(data or b"")
        if pipe is self._pipes[0][0]:
            for line in lines:
                self.heard(line)
        return bool(data)

    def _close(self, pipe: IO[bytes], pieces: Pieces) -> None:
        if not pipe.closed:
            self._selector.unregister(pipe)
            pipe.close()
            pieces.close()
