"""What ranks can tell each other when collectives cannot be relied on, and how connections are closed."""

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from lightning_adpsgd.workers.reduction import CollectiveError, backend_of

_SECONDS_TO_CLOSE = 2.0
_SECONDS_TO_RELEASE = 0.05


class Peers:
    """The other ranks, reached through the process group's key-value store, which works when collectives do not."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size, self._device = rank, size, device
        # There is no public way to it. It is kept because abort takes it from the process group.
        connected = dist.is_initialized()
        self._store: Any = dist.distributed_c10d._get_default_store() if connected else _NoStore()
        self._has_lingered = False

    def post_status(self, text: str, failed: bool = False) -> None:
        """Leave a line for others' :meth:`statuses`; if it has ``failed``, nobody need wait for this rank any more."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_key("status", self._rank), text)
            if failed:
                self._store.set(self._failed_key, str(self._rank))

    def who_failed(self) -> str | None:
        """Say which other rank has failed in this run, if one has. Waits for nobody."""
        try:
            key = self._failed_key
            who = self._store.get(key).decode() if self._store.check([key]) else str(self._rank)
        except RuntimeError:
            return "the store that rank 0 serves does not answer any more"
        return None if who == str(self._rank) else f"rank {who} has failed meanwhile"

    def statuses(self, seconds: float) -> tuple[dict[int, str], bool]:
        """What other ranks have posted within some seconds, by rank, and whether the store has answered."""
        statuses: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        try:
            while True:
                for rank in {*range(self._size)} - {self._rank, *statuses}:
                    if self._store.check([_key("status", rank)]):
                        statuses[rank] = self._store.get(_key("status", rank)).decode()
                if len(statuses) == self._size - 1 or time.monotonic() > deadline:
                    return statuses, True
                time.sleep(0.05)
        except RuntimeError:
            return statuses, False  # the process that serves it is gone

    def is_ending(self, rank: int) -> bool:
        """Whether another rank has posted a status or lingers: it ends by itself. Waits for nobody."""
        with contextlib.suppress(RuntimeError):
            return any(self._store.check([_key(kind, rank)]) for kind in ("status", "lingers"))
        return False

    def clear_status(self) -> None:
        """Begin another run: take back this rank's status, and forget failures; all ranks have to."""
        self._has_lingered = False
        with contextlib.suppress(RuntimeError):
            self._store.add(_key("runs", self._rank), 1)
            self._store.delete_key(_key("status", self._rank))
            self._store.delete_key(_key("lingers", self._rank))

    @property
    def _failed_key(self) -> str:
        """Of this run: a failure in one is not taken for one in the next. All ranks have begun equally many."""
        return _key("failed", self._store.add(_key("runs", self._rank), 0))

    def abort(self) -> None:
        """Close this rank's connections, so that whoever waits for it notices; :meth:`statuses` still works."""
        backend = backend_of(self._device) if self._size > 1 and dist.is_initialized() else ""
        if backend == "gloo":
            close_without_waiting(dist.destroy_process_group)
        elif backend == "nccl":  # closing would wait for what is under way; there is no public way to abort it
            close_without_waiting(dist.distributed_c10d._abort_process_group)

    def linger(self, seconds: float) -> None:
        """On rank 0, whose process serves the store, wait some seconds for the others to linger too; only once."""
        if self._has_lingered:
            return
        self._has_lingered = True
        with contextlib.suppress(RuntimeError):
            self._store.set(_key("lingers", self._rank), "")
            deadline = time.monotonic() + seconds
            others = [_key("lingers", rank) for rank in range(1, self._size) if self._rank == 0]
            while others and not self._store.check(others) and time.monotonic() < deadline:
                time.sleep(0.02)


class _NoStore:
    """Where there is one process: nobody posts anything, and nobody reads it."""

    def set(self, key: str, value: str) -> None:
        pass

    def add(self, key: str, amount: int) -> int:
        return 0

    def check(self, keys: list[str]) -> bool:
        return False

    def delete_key(self, key: str) -> None:
        pass


def _key(kind: str, number: int) -> str:
    # torchrun may keep its store when it restarts the workers: what was said then is not meant for now.
    return f"lightning_adpsgd/{kind}/{number}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def close_without_waiting(close: Callable[[], None]) -> None:
    """Close connections in a thread, as that can wait for a collective that never ends."""
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(_SECONDS_TO_CLOSE)


def close_groups(groups: list[Any]) -> None:
    """Destroy process groups, and empty the list: a group's threads end with the last reference to it."""
    while groups:
        with contextlib.suppress(RuntimeError, ValueError):  # all are closed where a worker was lost
            dist.destroy_process_group(groups.pop())


class ClosedGroup:
    """Stands in for a process group that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise CollectiveError("these connections were closed (WorkerGroup.close)")


# At exit. A thread of gloo releases a collective's tensors some time after the collective is over, and needs Python's
# lock for that. If the interpreter ends meanwhile, the thread is ended inside of a destructor, and the process aborts:
# "terminate called without an active exception" (pytorch#190489). No thread, no abort.

_opened: "list[tuple[int, weakref.ref[Any]]]" = []


@contextlib.contextmanager
def closed_at_exit() -> Iterator[None]:
    """If the default process group is made in this context, have it closed when the script ends. No other ever is."""
    before = dist.group.WORLD
    yield
    made = dist.group.WORLD
    if made is not None and made is not before:
        _opened[:] = [(os.getpid(), weakref.ref(made))]


@atexit.register  # when this package is imported, so that it runs after what scripts and loggers register later
def _close_what_was_opened() -> None:
    if not dist.is_initialized():
        return
    # Threads of groups that others have made get the lock now. gloo of torch 2.4 may wait for its own threads for ever
    # if it is closed before they have released their tensors.
    time.sleep(_SECONDS_TO_RELEASE)
    # A process that the script has forked inherits the group, but not its threads: closing would wait for them.
    if any(process == os.getpid() and made() is dist.group.WORLD for process, made in _opened):
        close_without_waiting(dist.destroy_process_group)
