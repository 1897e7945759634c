"""Asks torchft's lighthouse for a quorum, and lets torchft send the heartbeats."""

import contextlib
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from lightning_adpsgd.elastic.plan import Member, MemberState
from lightning_adpsgd.workers.quorum_group import serve_store

ENVIRONMENT = "TORCHFT_LIGHTHOUSE"
"""The variable that torchft reads the lighthouse's address from."""

_HEARTBEAT_INTERVAL = timedelta(milliseconds=100)
_CONNECT_TIMEOUT = timedelta(seconds=5)
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_RENEW = 2.0


class QuorumError(RuntimeError):
    """There is no quorum: the lighthouse does not answer, or too few workers have asked for one in time."""


class AnsweredQuorum(NamedTuple):
    """A quorum."""

    members: list[Member]
    """In the same order on all members."""
    number: str
    """Identifies this answer of the lighthouse; the same for all members."""


class Lighthouse:
    """This worker at the lighthouse. Nothing is sent before :meth:`ask`; from then on torchft sends heartbeats.

    Args:
        address: of the lighthouse, such as ``http://host:29510``; None: that of the environment variable.
        worker_id: this worker's name. A process that is started again may have the same one.
        hostname: under which other workers reach this one; None: what the system calls itself.
        timeout: how long workers wait for each other at the store.

    Raises:
        ValueError: if there is no address.
    """

    def __init__(self, address: str | None, worker_id: str, hostname: str | None, timeout: timedelta) -> None:
        found = address or os.environ.get(ENVIRONMENT)
        if not found:
            raise ValueError(
                f"lighthouse={address!r}, and the environment variable {ENVIRONMENT} is not set: expected the address"
                ' of a lighthouse, such as lighthouse="http://host:29510". Start one with "adpsgd lighthouse",'
                " or start the workers with `adpsgd elastic`."
            )
        self._address = found if "://" in found else f"http://{found}"
        self.name = f"{worker_id}:{uuid.uuid4()}"  # like torchft's: an earlier process's heartbeats are not this one's
        """This process's name at the lighthouse."""
        self._hostname = hostname
        self._timeout = timeout
        self._store: Any = None
        self._heart: Any = None
        self._client: Any = None
        self.latest = math.inf
        """When this worker is to end (of ``time.monotonic()``): it waits no longer."""

    def ask(self, state: MemberState, timeout: timedelta) -> AnsweredQuorum:
        """Ask for a quorum, and wait for it.

        A worker that has not joined asks again and again: the lighthouse counts its ``--join-timeout`` from the
        first request, and otherwise the others would meet before all of them have asked.

        Args:
            state: what this worker states.
            timeout: how long to wait.

        Raises:
            QuorumError: if there is none.
        """
        from torchft.coordination import LighthouseClient

        try:
            heart = self._beating()
            if self._client is None:
                self._client = LighthouseClient(self._address, connect_timeout=_CONNECT_TIMEOUT)
            ask = partial(
                self._client.quorum,
                replica_id=self.name,
                address=heart.address(),
                store_address=self._store_address,
                step=state.committed,
                world_size=1,
                shrink_only=False,
                data=state._asdict(),
            )
            quorum = self._answer(ask, timeout.total_seconds(), renews=state.committed == 0)
        except TimeoutError:
            raise QuorumError(
                f"The lighthouse at {self._address} has given no quorum: not enough other workers have asked for one in"
                " time."
            ) from None
        except (RuntimeError, OSError) as error:
            self._client = None  # it does not reconnect to a lighthouse that was restarted
            raise QuorumError(f"The lighthouse at {self._address} has given no quorum: {error}") from error
        members = [
            Member(each.replica_id, each.store_address, MemberState(**each.data))
            for each in sorted(quorum.participants, key=lambda each: each.replica_id)
            if each.data is not None and set(each.data) == set(MemberState._fields)
        ]
        created = quorum.created
        return AnsweredQuorum(members, f"{quorum.quorum_id}.{created.seconds}.{created.nanos}")

    def hurry(self, time_left: timedelta) -> None:
        """Wait no longer than ``time_left``, counted from now, in this and further calls of :meth:`ask`."""
        self.latest = min(self.latest, time.monotonic() + time_left.total_seconds())

    def _answer(self, ask: Callable[..., Any], seconds: float, renews: bool) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, min(deadline, self.latest) - time.monotonic())
            seconds = min(left, _SECONDS_TO_RENEW) if renews else left
            try:
                return self._in_a_thread(partial(ask, timeout=timedelta(seconds=seconds)))
            except TimeoutError:
                if seconds == left:
                    raise

    def _in_a_thread(self, ask: Callable[[], Any]) -> Any:
        """Call ``ask`` in a thread: torchft's client would hold up signals, such as Ctrl-C, until it returns.

        The thread is not a daemon, because the process would be aborted if an answer arrived while it exits.
        """
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((ask(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=work, name="adpsgd-quorum").start()
        while True:
            with contextlib.suppress(queue.Empty):
                answer, error = answers.get(timeout=_SECONDS_BETWEEN_LOOKS)
                if error is not None:
                    raise error
                return answer
            if time.monotonic() > self.latest:
                raise TimeoutError("this worker was asked to end, and the others have not met in time")

    def close(self) -> None:
        """Stop the heartbeats: when these are missed, the others no longer wait for this worker."""
        heart, self._heart, self._client, self._store = self._heart, None, None, None
        if heart is not None:
            with contextlib.suppress(RuntimeError):
                heart.shutdown()

    def _beating(self) -> Any:
        if self._heart is None:
            from torchft.coordination import ManagerServer

            self._store, self._store_address = serve_store(self._hostname, self._timeout)
            self._heart = ManagerServer(
                replica_id=self.name,
                lighthouse_addr=self._address,
                hostname=self._store_address.rpartition(":")[0],
                bind="[::]:0",
                store_addr=self._store_address,
                world_size=1,
                heartbeat_interval=_HEARTBEAT_INTERVAL,
                connect_timeout=_CONNECT_TIMEOUT,
                quorum_retries=0,
            )
        return self._heart
