"""How a worker meets others that come and go: a frozen dataclass, checked once."""

import dataclasses
import os
import uuid
from datetime import timedelta

from lightning_adpsgd.validation import check_instance, check_int, wrong_value

WORKER, MAX_WORKERS = "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"
"""The variables in which torchft's launchers say which worker this is, and how many there are at most."""

RESTARTS = ("ADPSGD_RESTARTS", "TORCHELASTIC_RESTART_COUNT")
"""The variables in which ``adpsgd elastic`` and torchrun say how often this worker was started again."""

_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = timedelta(milliseconds=100), timedelta(days=365)


@dataclasses.dataclass(frozen=True)
class ElasticOptions:
    """How a worker meets the others at a torchft lighthouse. In a YAML file, times are written as ``"0:01:00"``.

    Args:
        lighthouse: its address, such as ``http://host:29510``; None: the environment variable TORCHFT_LIGHTHOUSE.
        worker: this worker's number, from 0 to ``max_workers`` - 1, which decides on its share of the data; None: the
            environment variable REPLICA_GROUP_ID. A process that is started again has the number of the one that ended.
        max_workers: how many workers there are at most, and so into how many shares the data are divided; None: the
            environment variable NUM_REPLICA_GROUPS.
        min_workers: with fewer there is no round; each trains on by itself.
        start_workers: with fewer the run does not start. Later there may be fewer.
        quorum_timeout: how long a round waits for a quorum. Without one, the worker trains for another period. (For how
            long a quorum waits for stragglers is an option of the lighthouse, ``--join-timeout``.)
        round_timeout: how long a worker waits for another within a round.
        join_timeout: how long a worker that starts waits for the others' next round.
        leave_timeout: how long a worker that is asked to end, by SIGTERM, waits for a last round with the others.
        hostname: under which the others reach this worker; None: what the system calls itself.
        worker_id: this worker's name. Ranks follow the names' alphabetical order. None: ``worker``'s, or a random one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range.
    """

    lighthouse: str | None = None
    worker: int | None = None
    max_workers: int | None = None
    min_workers: int = 1
    start_workers: int = 1
    quorum_timeout: timedelta = timedelta(seconds=60)
    round_timeout: timedelta = timedelta(seconds=60)
    join_timeout: timedelta = timedelta(minutes=30)
    leave_timeout: timedelta = timedelta(seconds=15)
    hostname: str | None = None
    worker_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("quorum_timeout", "round_timeout", "join_timeout", "leave_timeout"):
            value = getattr(self, name)
            check_instance(None, name, value, timedelta, "a datetime.timedelta, such as timedelta(seconds=60)")
            if not _SHORTEST_TIMEOUT <= value <= _LONGEST_TIMEOUT:
                raise wrong_value(None, name, value, "between 0.1 s and a year, such as timedelta(seconds=60)")
        for name in ("min_workers", "start_workers"):
            check_int(None, name, getattr(self, name), at_least=1)
        if self.worker is not None:
            check_int(None, "worker", self.worker, at_least=0)
        if self.max_workers is not None:
            check_int(None, "max_workers", self.max_workers, at_least=1)
            if self.worker is not None and self.worker >= self.max_workers:
                raise wrong_value(None, "worker", self.worker, f"less than max_workers={self.max_workers}")
        for name in ("lighthouse", "worker_id", "hostname"):
            check_instance(None, name, getattr(self, name), str, optional=True)
        given = self.worker_id or ""
        if any(character in given for character in ": /") or not given.isascii():
            raise ValueError(f"worker_id={given!r}: expected ASCII without spaces, colons and slashes.")

    @property
    def is_of_a_restart(self) -> bool:
        """Whether this process replaces one that has ended: it joins others, and does not start a run alone."""
        restarts = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
        return restarts and self.max_workers != 1 and os.environ.get(MAX_WORKERS) != "1"

    @property
    def name(self) -> str:
        """``worker_id``, or a name for ``worker``, or a random one."""
        if self.worker_id:
            return self.worker_id
        # Names are ordered like texts, and so are ranks.
        return f"worker-{uuid.uuid4().hex[:8]}" if self.worker is None else f"worker-{self.worker:06d}"

    def with_environment(self) -> "ElasticOptions":
        """The same with ``worker`` and ``max_workers`` from the environment, if they are not given.

        Raises:
            ValueError: if they are in neither, or not numbers.
        """
        worker = _number(self.worker, "worker", WORKER)
        max_workers = _number(self.max_workers, "max_workers", MAX_WORKERS)
        return dataclasses.replace(self, worker=worker, max_workers=max_workers)


def _number(given: int | None, name: str, variable: str) -> int:
    if given is not None:
        return given
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise ValueError(
            f"{name}=None, and the environment variable {variable} is {repr(text) if text else 'not set'}: expected a"
            f" number in one of them, because each worker trains on its own share of the data. Start workers by"
            f" `adpsgd elastic --workers N script.py`, or set {WORKER} (from 0 on, another one for each worker) and"
            f" {MAX_WORKERS} (the same for all)."
        )
    return int(text)
