"""States this rank's part of a handshake, and acts on what the other ranks have stated."""

from typing import Any

from torch.optim import Optimizer

from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.rounds.guards import Guards
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, Kind, RankState, SignalFlags
from lightning_adpsgd.rounds.measures import learning_rates
from lightning_adpsgd.rounds.record import TRIGGERS, Trigger
from lightning_adpsgd.workers.group import WorkerGroup


class Contact:
    """Makes this rank's :class:`RankState` for one optimizer, and acts on the states of all ranks."""

    def __init__(
        self,
        optimizer: Optimizer,
        workers: WorkerGroup,
        policy: StatePolicy,
        guards: Guards,
        flags: SignalFlags,
        index: int,
    ) -> None:
        self._optimizer = optimizer
        self._workers = workers
        self._policy = policy
        self._guards = guards
        self._flags = flags
        self.index = index
        self.steps = 0
        """Optimizer steps attempted so far."""

    def state(self, kind: Kind, trigger: Trigger, period: int, **about: Any) -> RankState:
        """This rank's state now."""
        return RankState(
            KINDS.index(kind),
            self.steps,
            TRIGGERS.index(trigger),
            self.index,
            period,
            flags=self._flags.raised,
            learning_rates=sum(learning_rates(self._optimizer, self._workers.device)),
            has_state=self._policy.has_state,
            **about,
        )

    def heed(self, handshake: Handshake, full: bool = False) -> None:
        """Act on what all ranks have stated; if it is for a ``full`` round, flags of earlier rounds are forgotten."""
        self._guards.compare_learning_rates(handshake, self.steps)
        self._flags.agreed = handshake.flags | (0 if full else self._flags.agreed)
        self._policy.anybody_has_state = handshake.anybody_has_state
