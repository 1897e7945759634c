"""How a round begins: every worker states where it is, and all of them see whether they can go on together."""

import functools
import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from lightning_adpsgd.averaging import TRIGGERS, Share, Workers
from lightning_adpsgd.errors import WorkersDisagreeError

Described = tuple[object, ...]
"""A tensor as all workers have to have it: name, dtype, shape, parameter group, order in memory."""


class Call(NamedTuple):
    """What one worker states; all of it are numbers that a float64 holds exactly."""

    fingerprint: int
    """Of the tensors that it is about to average."""
    step: int
    trigger: int
    """Index in ``TRIGGERS``."""
    period: int
    finite: bool
    """Whether all of its parameters are."""
    notice: int
    """The bits it has raised."""
    learning_rates: float
    """Summed over the parameter groups."""
    has_state: bool
    """Whether its optimizer has any."""


class Meeting:
    """The calls of all workers, one round's worth.

    Args:
        workers: who meets.
        call: this worker's own.
    """

    def __init__(self, workers: Workers, call: Call) -> None:
        self._workers = workers
        self.calls = [Call(*row) for row in workers.table(call).tolist()]

    def check_round(self, optimizer: int) -> None:
        """Make sure that all workers are here for the same round.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
        """
        if len({(call.step, call.trigger, call.period) for call in self.calls}) == 1:
            return
        places = "; ".join(
            f"rank {rank}: step {int(call.step)}, asked for by {TRIGGERS[int(call.trigger)]!r}, period"
            f" {int(call.period)}"
            for rank, call in enumerate(self.calls)
        )
        raise WorkersDisagreeError(
            f"The workers met for different averaging rounds of optimizer {optimizer} ({places}). Every worker has to"
            " take the same number of optimizer steps, and to validate and save at the same ones. Usual causes: data"
            " loaders of different lengths (use drop_last=True or Trainer(limit_train_batches=...)), and steps, saves"
            " or stops that depend on one worker's own loss."
        )

    def check_tensors(self, what: str, describe: Callable[[], Sequence[Described]]) -> None:
        """Make sure that all workers are about to average the same tensors.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
        """
        if len({call.fingerprint for call in self.calls}) > 1:
            raise WorkersDisagreeError(difference(self._workers, what, describe()))

    @property
    def diverged(self) -> list[int]:
        """The ranks whose parameters are not finite."""
        return [rank for rank, call in enumerate(self.calls) if not call.finite]

    @property
    def share(self) -> Share:
        """What this worker contributes to the mean over those whose parameters are finite."""
        diverged = self.diverged
        return Share(len(self.calls) - len(diverged), self._workers.rank not in diverged)

    @property
    def notice(self) -> int:
        """The bits that any worker had raised."""
        return functools.reduce(operator.or_, (int(call.notice) for call in self.calls))

    @property
    def anybody_has_state(self) -> bool:
        """Whether any worker's optimizer has state."""
        return any(call.has_state for call in self.calls)

    @property
    def learning_rates(self) -> list[float]:
        """Of each worker, summed over the parameter groups."""
        return [call.learning_rates for call in self.calls]


def difference(workers: Workers, what: str, mine: Sequence[Described]) -> str:
    """Say where the workers' tensors differ, once it is known that they do; all workers have to ask.

    Args:
        workers: who differs.
        what: what does not fit, as the sentence's beginning.
        mine: this worker's tensors.
    """
    everybody = workers.gather_objects([*mine])
    reference = everybody[0]
    rank, theirs = next(
        (rank, other) for rank, other in enumerate(everybody) if _nameless(other) != _nameless(reference)
    )
    place = next(
        (i for i, (a, b) in enumerate(zip(_nameless(reference), _nameless(theirs), strict=False)) if a != b),
        min(len(reference), len(theirs)),
    )
    return (
        f"{what} Rank 0 has {len(reference)}, rank {rank} has {len(theirs)}; the first difference is number {place}:"
        f" rank 0 {_describe(reference, place)}, rank {rank} {_describe(theirs, place)}. Build the same model and"
        " optimizer on every rank, and freeze, unfreeze or add parameters on all ranks at the same step."
    )


def check_module(workers: Workers, module: nn.Module) -> None:
    """Make sure that all workers have built the same module, before one worker's weights go to all.

    Raises:
        WorkersDisagreeError: on every worker, if they have not.
    """
    mine: list[Described] = [
        (name, str(tensor.dtype), tuple(tensor.shape), None, ())
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    digest = hashlib.blake2b(repr(_nameless(mine)).encode(), digest_size=6).digest()
    if len(workers.table([int.from_bytes(digest, "big")]).unique()) > 1:
        raise WorkersDisagreeError(difference(workers, "The workers have built different models.", mine))


def _nameless(entries: Sequence[Described]) -> list[Described]:
    return [entry[1:] for entry in entries]


def _describe(entries: Sequence[Described], place: int) -> str:
    if place >= len(entries):
        return "has no such tensor"
    name, dtype, shape, group, _ = entries[place]
    belongs = "no parameter group" if group is None else f"parameter group {group}"
    return f"has {name} ({dtype}, shape {shape}, {belongs})"
