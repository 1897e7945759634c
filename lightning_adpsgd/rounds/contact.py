"""What workers learn of each other in a round of one optimizer, besides where they stand."""

from typing import Any

from torch.optim import Optimizer

from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.rounds.guards import Guards
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, Kind, RankState, SignalFlags
from lightning_adpsgd.rounds.measures import learning_rates
from lightning_adpsgd.rounds.record import TRIGGERS, Trigger
from lightning_adpsgd.workers.group import WorkerGroup


class Contact:
    """Makes this rank's state, and takes note of the others'.

    Args:
        optimizer: whose rounds.
        workers: with whom.
        policy: needs to know whether anybody's optimizer has state.
        guards: look at learning rates.
        flags: bits that ride along.
        index: the optimizer's index.
    """

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
        """Where this rank stands now."""
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
        """Take note of what the others have stated.

        Args:
            handshake: of a round, or of a fragment.
            full: whether it is of a round of everything, after which flags of rounds before it are forgotten.
        """
        self._guards.compare_learning_rates(handshake, self.steps)
        self._flags.agreed = handshake.flags | (0 if full else self._flags.agreed)
        self._policy.anybody_has_state = handshake.anybody_has_state
