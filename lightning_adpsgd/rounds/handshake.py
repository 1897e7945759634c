"""Handshakes: before a joint operation, each rank states what it is about to do, and all check that they agree."""

import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from lightning_adpsgd.averaging.layout import Described, hash48
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.errors import WorkerLostError, WorkersDisagreeError
from lightning_adpsgd.rounds.record import TRIGGERS
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import CollectiveError

_log = logging.getLogger(__name__)

# Ranks notice a lost round at nearly the same time. A rank that has not answered by then will not answer.
_ROLL_CALL_SECONDS = 2.0
_LINGER_SECONDS = 2.0

Kind = Literal[
    "an averaging round",
    "a fragment of an averaging round",
    "a change of what is averaged",
    "the setup",
    "Lightning's barrier",
    "Lightning's broadcast",
    "Lightning's reduction",
    "Lightning's gathering",
    "a validation",
    "the end of an epoch",
    "the end of training",
    "a change of what is trained",
    "a pruning",
    "a comparison of untrained parameters",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_COMPARISON = KINDS.index("a comparison of untrained parameters")


class RankState(NamedTuple):
    """What one rank is about to do, and its state, as numbers that a float64 holds exactly.

    All handshakes have the same length: gloo ends the process if ranks call collectives of different sizes.
    """

    kind: int
    """Index in ``KINDS``: an averaging round, or something else that all workers do together."""
    step: int
    trigger: int = 0
    """Index in ``TRIGGERS``."""
    optimizer: int = 0
    period: int = 0
    fingerprint: int = 0
    """A hash of the tensors that it is about to average."""
    finite: "bool | Tensor" = True
    """Whether all of its parameters are finite."""
    flags: int = 0
    """The bits that it has raised."""
    learning_rates: "float | Tensor" = 0.0
    """Summed over the parameter groups."""
    has_state: bool = False
    """Whether its optimizer has any state."""
    known: int = 0
    """With a codec, a hash of the elements whose last average it knows."""

    def __str__(self) -> str:
        kind = KINDS[int(self.kind)]
        if kind == "an averaging round":
            return (
                f"the averaging round at step {int(self.step)} of optimizer {int(self.optimizer)}, asked for by"
                f" {TRIGGERS[int(self.trigger)]!r}, period {int(self.period)}"
            )
        if self.is_in_flight:
            return (
                f"{kind}, sent at step {int(self.step)} of optimizer {int(self.optimizer)}, period {int(self.period)}"
            )
        return f"{kind} at step {int(self.step)}"

    @property
    def is_in_flight(self) -> bool:
        """Whether the rank continues to train before it reads the others' states."""
        return KINDS[int(self.kind)] == "a fragment of an averaging round"


class SignalFlags:
    """Bits that any worker may raise at any time, and that all workers know after the next averaging round.

    They are sent with handshakes, so they cost no collective of their own.
    """

    def __init__(self) -> None:
        self.raised = 0
        """This worker's bits; may be set from a signal handler."""
        self.agreed = 0
        """The bits that any worker had raised when the latest round began."""


class Handshake:
    """Exchanges the states of all ranks before one joint operation.

    The constructor sends this rank's state. :meth:`complete` waits for the others.

    Args:
        workers: the workers that take part.
        state: this rank's state.
        where: the hook that this rank is in, for error messages.
    """

    def __init__(self, workers: WorkerGroup, state: RankState, where: str = "") -> None:
        self._workers = workers
        self._state = state
        self._where = where
        self.states: list[RankState] = []
        with naming_lost_workers(workers, state), span("handshake"):
            self._table = workers.launch_table(state)

    def complete(self) -> "Handshake":
        """Wait for every rank's state.

        Raises:
            WorkersDisagreeError: on every worker, if the ranks are not about to do the same thing.
            WorkerLostError: if a worker does not answer.
        """
        with naming_lost_workers(self._workers, self._state), span("handshake"):
            self._read()
        return self

    def peek(self) -> None:
        """Raise ``WorkersDisagreeError`` if the ranks disagree; do nothing if a worker is lost."""
        with suppress(CollectiveError):
            self._read()

    def _read(self) -> None:
        self.states = [RankState(*row) for row in self._table.wait().tolist()]
        if len({(s.kind, s.step, s.trigger, s.optimizer, s.period) for s in self.states}) > 1:
            raise WorkersDisagreeError(self._out_of_step())

    def _out_of_step(self) -> str:
        # Further handshakes may be in flight. Another collective would be paired with those.
        hooks = [""] * len(self.states)
        if not any(state.is_in_flight for state in self.states):
            hooks = self._workers.gather_objects(self._where)
        places = "; ".join(
            f"rank {rank}: {state}{' in ' + hook if hook else ''}"
            for rank, (state, hook) in enumerate(zip(self.states, hooks, strict=True))
        )
        if self._only_some_compare:
            return (
                f"Only some workers have parameters that no optimizer trains, such as a target network ({places})."
                " Build the same model and optimizer on every rank, and freeze, unfreeze, add or remove parameters on"
                " all ranks at the same step."
            )
        return (
            f"The workers are out of step ({places}). Every worker has to take the same number of optimizer"
            " steps, and to validate and save at the same steps. Usual causes: data loaders of different lengths (use"
            " drop_last=True or Trainer(limit_train_batches=...)), and steps, saves or stops that depend on one"
            " worker's own loss."
        )

    @property
    def _only_some_compare(self) -> bool:
        """Whether some compare untrained parameters, while others go on with what comes after that."""
        comparing, others = ([s for s in self.states if (s.kind == _COMPARISON) == yes] for yes in (True, False))
        rounds = KINDS.index("an averaging round")
        return bool(comparing and others) and all(
            other.trigger == comparing[0].trigger if other.kind == rounds else other.step == comparing[0].step
            for other in others
        )

    def check_tensors(self, what: str, describe: Callable[[], Sequence[Described]]) -> None:
        """Make sure that all workers are about to average the same tensors.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
        """
        if len({state.fingerprint for state in self.states}) > 1:
            with naming_lost_workers(self._workers, self._state):
                told = difference(self._workers, what, describe())
            raise WorkersDisagreeError(told)

    @property
    def diverged(self) -> list[int]:
        """The ranks whose parameters are not finite."""
        return [rank for rank, state in enumerate(self.states) if not state.finite]

    @property
    def diverged_workers(self) -> set[int]:
        """The workers of the ranks whose parameters are not finite."""
        return {self._workers.worker_of(rank) for rank in self.diverged}

    @property
    def contribution(self) -> Contribution:
        """What this worker contributes to the mean over those whose parameters are finite."""
        finite = sorted({*range(self._workers.count)} - self.diverged_workers)
        mine = self._workers.worker_of(self._workers.rank)
        return Contribution(len(finite), finite.index(mine) if mine in finite else None)

    @property
    def flags(self) -> int:
        """The bits that any worker had raised."""
        return functools.reduce(operator.or_, (int(state.flags) for state in self.states))

    @property
    def anybody_has_state(self) -> bool:
        """Whether any worker's optimizer has state."""
        return any(state.has_state for state in self.states)

    @property
    def know_the_same(self) -> bool:
        """Whether all workers know the last average of the same elements."""
        return len({state.known for state in self.states}) == 1

    @property
    def learning_rates(self) -> list[float]:
        """Each rank's learning rate, summed over its parameter groups."""
        return [float(state.learning_rates) for state in self.states]


@contextmanager
def naming_lost_workers(
    workers: WorkerGroup,
    what: RankState | str | Callable[[], RankState],
    in_flight: Callable[[], Iterable["Handshake"]] = tuple,
) -> Iterator[None]:
    """Raise ``WorkerLostError``, which names the missing workers, in place of ``CollectiveError``.

    Args:
        workers: among whom a collective may fail.
        what: what this rank is doing, in words or as its state.
        in_flight: the handshakes in flight. If one of them tells that ranks disagree, that is the error instead.
    """
    try:
        yield
    except CollectiveError as error:
        for handshake in in_flight():
            handshake.peek()
        raise _lost(workers, what() if callable(what) else what, error) from error


def _lost(workers: WorkerGroup, what: RankState | str, error: CollectiveError) -> WorkerLostError:
    """Make the error for a failed collective: tell the other ranks, and ask them which ranks are missing."""
    failed = f"Rank {workers.rank} could not finish {what}: {error}"
    # Log now: a launcher that notices the failure first ends this process without a message.
    _log.error(failed)
    workers.peers.post_status(f"could not finish {what}", failed=True)
    workers.peers.abort()  # others may be waiting for this worker
    statuses, answered = workers.peers.statuses(seconds=_ROLL_CALL_SECONDS)
    workers.peers.linger(seconds=_LINGER_SECONDS)
    told = [f"Rank {rank} {statuses[rank]}." for rank in sorted(statuses)]
    silent = sorted({*range(workers.size)} - {workers.rank, *statuses})
    if silent and not answered and workers.size > 2:
        told.append("No word from rank(s) 0, which would know of the others: killed, hanging, or gone early.")
    elif silent:
        told.append(f"No word from rank(s) {', '.join(map(str, silent))}: killed, hanging, or gone early.")
    return WorkerLostError(
        f"{failed} {' '.join(told)} Look for the first error of those ranks, and resume from the last checkpoint."
    )


def difference(workers: WorkerGroup, what: str, mine: Sequence[Described]) -> str:
    """Describe, after the sentence ``what``, where the workers' tensors differ. All ranks have to call this."""
    everybody = workers.gather_objects([*mine])
    reference = everybody[0]
    rank, theirs = next(
        (rank, other) for rank, other in enumerate(everybody) if _nameless(other) != _nameless(reference)
    )
    place = next(
        (i for i, (a, b) in enumerate(zip(_nameless(reference), _nameless(theirs), strict=False)) if a != b),
        min(len(reference), len(theirs)),
    )
    both = place < min(len(reference), len(theirs))
    in_memory = both and reference[place][1:4] == theirs[place][1:4]
    return (
        f"{what} Rank 0 has {len(reference)} tensors, rank {rank} has {len(theirs)}. They first differ at number"
        f" {place}: rank 0 {_describe(reference, place, in_memory)}, rank {rank} {_describe(theirs, place, in_memory)}."
        " Build the same model and optimizer on every rank, in the same memory format, and freeze, unfreeze or add"
        " parameters on all ranks at the same step."
    )


def check_module(workers: WorkerGroup, module: nn.Module) -> None:
    """Make sure that all workers have built the same module, before one worker's weights are broadcast.

    Raises:
        WorkersDisagreeError: on every worker, if they have not.
        WorkerLostError: if a worker does not answer.
    """
    mine: list[Described] = [
        (name, str(tensor.dtype), tuple(tensor.shape), None, ())
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    fingerprint = hash48(repr(_nameless(mine)).encode())
    state = RankState(KINDS.index("the setup"), 0, fingerprint=fingerprint)
    Handshake(workers, state).complete().check_tensors("The workers have built different models.", lambda: mine)


def _nameless(entries: Sequence[Described]) -> list[Described]:
    return [entry[1:] for entry in entries]


def _describe(entries: Sequence[Described], place: int, in_memory: bool) -> str:
    if place >= len(entries):
        return "has no such tensor"
    name, dtype, shape, group, order = entries[place]
    belongs = "no parameter group" if group is None else f"parameter group {group}"
    return f"has {name} ({dtype}, shape {shape}, {belongs}{f', order in memory {order}' if in_memory else ''})"
