"""How ranks communicate when collectives may hang, and how connections are closed."""

import atexit
import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: see `closed_at_exit`

from lightning_adpsgd.workers.reduction import CollectiveError, backend_of
from lightning_adpsgd.workers.spare_threads import keep_spare_threads, run_aside

_SECONDS_TO_CLOSE = 2.0
_SECONDS_TO_RELEASE = 0.05


class Peers:
    """The other ranks, reached through the process group's key-value store, which works when collectives do not."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size, self._device = rank, size, device
        # torch has no public way to get it, and none at all after abort().
        self._store: Any = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _NoStore()
        self._has_lingered = False
        if size > 1:
            _connected.add(os.getpid())
            keep_spare_threads()

    def post_status(self, text: str, failed: bool = False) -> None:
        """Post a line for the others' :meth:`statuses`; with ``failed``, they stop waiting for this rank."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_key("status", self._rank), text)
            if failed:
                self._store.set(self._failed_key, str(self._rank))

    def who_failed(self) -> str | None:
        """Which other rank has failed in this run, if any, in words. Does not wait."""
        try:
            key = self._failed_key
            who = self._store.get(key).decode() if self._store.check([key]) else str(self._rank)
        except RuntimeError:
            return "the key-value store of rank 0 no longer answers"
        return None if who == str(self._rank) else f"rank {who} has failed meanwhile"

    def statuses(self, seconds: float) -> tuple[dict[int, str], bool]:
        """The other ranks' statuses, by rank, waiting ``seconds`` for them; and whether the store has answered."""
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
            return statuses, False  # the process that serves the store is gone

    def is_ending(self, rank: int) -> bool:
        """Whether another rank is about to exit: it has posted a status or lingers. Does not wait."""
        with contextlib.suppress(RuntimeError):
            return any(self._store.check([_key(kind, rank)]) for kind in ("status", "lingers"))
        return False

    def clear_status(self) -> None:
        """Begin another run: delete this rank's status, and forget failures. All ranks have to call this."""
        self._has_lingered = False
        with contextlib.suppress(RuntimeError):
            self._store.add(_key("runs", self._rank), 1)
            self._store.delete_key(_key("status", self._rank))
            self._store.delete_key(_key("lingers", self._rank))

    @property
    def _failed_key(self) -> str:
        """The key for failures in this run, so that the next run ignores them; all ranks count their runs alike."""
        return _key("failed", self._store.add(_key("runs", self._rank), 0))

    def abort(self) -> None:
        """Close this rank's connections, so that ranks waiting for it notice; :meth:`statuses` still works."""
        backend = backend_of(self._device) if self._size > 1 and dist.is_initialized() else ""
        if backend == "gloo":
            close_without_waiting(dist.destroy_process_group)
        elif backend == "nccl":  # destroying would wait for collectives; torch has no public way to abort them
            close_without_waiting(dist.distributed_c10d._abort_process_group)

    def linger(self, seconds: float) -> None:
        """On rank 0, which serves the store, wait up to ``seconds`` until the others linger too; only once."""
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
    """Stands in for the store if there is only one process."""

    def set(self, key: str, value: str) -> None:
        pass

    def add(self, key: str, amount: int) -> int:
        return 0

    def check(self, keys: list[str]) -> bool:
        return False

    def delete_key(self, key: str) -> None:
        pass


def _key(kind: str, number: int) -> str:
    # torchrun may keep its store when it restarts the workers; earlier entries must not be read.
    return f"lightning_adpsgd/{kind}/{number}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def close_without_waiting(close: Callable[[], None]) -> None:
    """Close connections in a thread: it may wait for a collective that never ends."""
    run_aside(close).wait(_SECONDS_TO_CLOSE)


def close_groups(groups: list[Any]) -> None:
    """Destroy process groups, and empty the list, since a group's threads end with the last reference to it."""
    while groups:
        with contextlib.suppress(RuntimeError, ValueError):  # already destroyed if a worker was lost
            dist.destroy_process_group(groups.pop())


class ClosedGroup:
    """Stands in for a closed process group."""

    def __getattr__(self, name: str) -> Any:
        raise CollectiveError("these connections were closed (WorkerGroup.close)")


# A gloo thread releases a collective's tensors some time after the collective has ended, which takes the GIL. If the
# interpreter exits first, the thread is killed inside a destructor, and the process aborts with "terminate called
# without an active exception" (pytorch#190489). So the group and its threads are destroyed at exit. The threads end
# with the last reference to the group, which `torch.distributed.nn` would hold if it were first imported when there is
# one, as the default of its arguments; optimizers import it in their first step.

_opened: "list[tuple[int, weakref.ref[Any]]]" = []
_connected: set[int] = set()  # the ids of processes, since a fork copies this


@contextlib.contextmanager
def closed_at_exit() -> Iterator[None]:
    """Close the default process group at exit if it is created in this context."""
    before = dist.group.WORLD
    yield
    made = dist.group.WORLD
    if made is not None and made is not before:
        _opened[:] = [(os.getpid(), weakref.ref(made))]
        keep_spare_threads()


@atexit.register  # at import, so that it runs after the exit handlers of scripts and loggers
def _close_what_was_opened() -> None:
    if not dist.is_initialized() and os.getpid() not in _connected:
        return
    # Let threads take the GIL now, also those of groups that are not closed here, or that the script has destroyed
    # and something else still holds. gloo of torch 2.4 may hang if it is closed before its threads have released their
    # tensors.
    time.sleep(_SECONDS_TO_RELEASE)
    # A forked process inherits the group but not its threads, for which closing would wait.
    world = dist.group.WORLD  # None if the script has destroyed it
    if world is not None and any(process == os.getpid() and made() is world for process, made in _opened):
        close_without_waiting(dist.destroy_process_group)
