"""Whoever looks at the weights sees the average; checkpoints among them, which hold all that is needed to go on."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.rounds.record import Trigger

from .communication import GuardedCommunication
from .compat import second_weights, snapshot, trainer_of
from .family import rank_zero_info, rank_zero_warn

CHECKPOINT_KEY = "adpsgd"


class AveragedWeights(GuardedCommunication):
    """Averages before somebody reads weights, and keeps the session's state in checkpoints."""

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._second_weights_moved = False

    def average(self, trigger: Trigger, further: Sequence[Tensor] = ()) -> bool:
        """Average what has been trained since the latest round, if anything has.

        Args:
            trigger: who asks.
            further: tensors to average along, with which there is a round in any case.

        Returns:
            Whether there was a round, so that all workers are known to be at the same point.
        """
        also = [*further]
        trainer = trainer_of(self.lightning_module)
        if self._second_weights_moved and trainer is not None:
            # The mean of moving averages is the moving average of means: once, when somebody looks, is enough.
            also += second_weights(trainer)
            self._second_weights_moved = False
        return self._session is not None and self._session.average(trigger, also)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The averaged weights; after an exception, when peers may be gone, this rank's own."""
        if not self._is_alone():
            self.average("checkpoint")
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._session is not None and self._session.local_sgd:
            checkpoint[CHECKPOINT_KEY] = self._session.state_dict("optimizer_states" in checkpoint)
        checkpoint = snapshot(checkpoint, self.checkpoint_io)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the weights; say so if they are not an average."""
        super().load_model_state_dict(checkpoint, strict=strict)
        state = checkpoint.get(CHECKPOINT_KEY, {})
        if not state.get("averaged", True):
            ranks = state.get("ranks", state["workers"])  # files of an earlier version count ranks as workers
            rank_zero_warn(
                f"This checkpoint was saved when rank {state['rank']} of {ranks} failed: it holds the weights and the"
                " optimizer state of that worker alone, not the average. All workers go on from these. If you have an"
                " earlier checkpoint, it may be the better start."
            )

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers, and with them the rules; a checkpoint of another strategy starts the rules anew."""
        super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:
            rank_zero_info(
                "This checkpoint was written by another strategy: it holds no averaging period. Weights, optimizers and"
                " the Trainer's progress are restored; the averaging rule and its count of steps start anew."
            )
            return
        if self._session is None:
            return
        self._session.load_state_dict(state)
        count = self._session.workers.count
        if self._session.local_sgd and state["workers"] != count:
            rank_zero_warn(
                f"This checkpoint was written by {state['workers']} worker(s), and now there are {count}. All"
                " go on from its average, and the averaging rule goes on with its period and its target, which was"
                f" measured among {state['workers']}. The phases of the rule keep their lengths in steps, while an"
                " epoch now has another number of steps."
            )
