"""The workers of one quorum: a group whose members change from round to round, and the store at which they meet."""

import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.peers import ClosedGroup, close_without_waiting
from lightning_adpsgd.workers.reduction import collective


class QuorumGroup(WorkerGroup):
    """A :class:`WorkerGroup` that is connected anew when its members change. It is one worker until it is connected.

    Its process group is one of torchft's, not torch's default group, so it can fail without ending the process.

    Args:
        group: torchft's process group, such as ``ProcessGroupGloo``. Its timeout is how long :meth:`connect` waits.
        round_timeout: how long collectives wait.
        device: where small tensors are created.

    Raises:
        ValueError: if torch's default process group is initialized, and has other ranks than this one.
    """

    def __init__(self, group: Any, round_timeout: timedelta, device: torch.device | str = "cpu") -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "Elastic workers in a process group of several ranks: expected none, because each elastic"
                " worker is one process, and meets the others at the lighthouse. Do not call"
                " torch.distributed.init_process_group, and start each worker by itself."
            )
        super().__init__(None, device)
        self._elastic = group
        self._round_timeout = round_timeout
        self._contribution = super().all_contribute
        self.is_connected = False
        """Whether there is a connection that no worker is known to have left."""

    @property
    @override
    def all_contribute(self) -> Contribution:
        """What this worker contributes to a mean; a worker that has just joined contributes nothing."""
        return self._contribution

    def contribute(self, contribution: Contribution) -> None:
        """Set what this worker contributes from now on."""
        self._contribution = contribution

    def connect(self, store_address: str, name: str, rank: int, size: int) -> None:
        """Connect to the other workers of a quorum.

        Args:
            store_address: ``host:port/prefix`` of the store at which they meet; the prefix has to be new.
            name: this worker's name, for torchft's logs.
            rank: of this worker among them.
            size: how many they are.

        Raises:
            CollectiveError: if one of them does not come.
        """
        self.disconnect()
        with collective():
            self._elastic.configure(store_address, name, rank, size)
            # torchft knows one timeout. But a worker that was killed while it waited for the quorum is a member of it,
            # and never connects, whereas one that has connected may take long to send its state to one that joins.
            dist.ProcessGroup._get_backend(self._elastic.parent, self.device)._set_default_timeout(self._round_timeout)
        self._group, self.rank, self.size, self.is_connected = self._elastic, rank, size, True

    def disconnect(self) -> None:
        """Close the connections, so that workers that wait for this one notice at once."""
        self._group, self.is_connected = ClosedGroup(), False
        close_without_waiting(self._abort)

    def _abort(self) -> None:
        with suppress(RuntimeError):
            self._elastic.abort()


def serve_store(hostname: str | None, timeout: timedelta) -> tuple[Any, str]:
    """Serve a key-value store in this process, at which workers can meet; return it, and its ``host:port``.

    Args:
        hostname: the name under which the other workers reach this one; None: what the system calls itself.
        timeout: how long a worker waits for a key.
    """
    if hostname is None:
        hostname = socket.gethostname()
        try:
            socket.getaddrinfo(hostname, None)
        except OSError:
            hostname = "localhost"
    make: Any = dist.TCPStore  # type: ignore[attr-defined]  # which torch does not say it exports
    store = make(hostname, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, f"{hostname}:{store.port}"
