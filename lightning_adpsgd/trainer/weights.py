"""Makes sure that whoever reads the weights sees the average, and writes what a run needs to resume."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.rounds.record import Trigger
from lightning_adpsgd.session import CHECKPOINT_KEY

from .communication import GuardedCommunication
from .compat import is_interrupted, second_weights, snapshot, trainer_of
from .family import rank_zero_info, rank_zero_warn


class AveragedWeights(GuardedCommunication):
    """Averages before the weights are read, and stores the session's state in checkpoints."""

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._second_weights_moved = False

    def average(self, trigger: Trigger, further: Sequence[Tensor] = ()) -> bool:
        """Average what has been trained since the latest round, if anything; see :meth:`TrainingSession.average`."""
        also = [*further]
        trainer = trainer_of(self.lightning_module)
        if self._second_weights_moved and trainer is not None:
            # The mean of moving averages is the moving average of means: averaging them before a read is enough.
            also += second_weights(trainer)
            self._second_weights_moved = False
        return self._session is not None and self._session.average(trigger, also)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The averaged weights; this rank's own after an exception, when others may be gone."""
        if not is_interrupted(trainer_of(self.lightning_module)):
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
        """Restore the weights; warn if they are not an average."""
        super().load_model_state_dict(checkpoint, strict=strict)
        state = checkpoint.get(CHECKPOINT_KEY, {})
        if not state.get("averaged", True):
            ranks = state.get("ranks", state["workers"])  # early files have no "ranks"
            rank_zero_warn(
                f"This checkpoint was saved when rank {state['rank']} of {ranks} failed: it holds the weights and the"
                " optimizer state of that worker alone, not the average. All workers continue from these. An earlier"
                " checkpoint may be a better start."
            )

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the optimizers and the rules; with a checkpoint of another strategy, the rules start anew."""
        super().load_optimizer_state_dict(checkpoint)
        self._load_session(checkpoint.get(CHECKPOINT_KEY))

    def _load_session(self, state: Mapping[str, Any] | None) -> None:
        if state is None:
            rank_zero_info(
                "This checkpoint holds no averaging period: it was written by another strategy, or by a process that"
                " has only launched a forked or spawned fit. Weights, optimizers and the Trainer's progress are"
                " restored as far as it holds them; the averaging rule and its count of steps start anew."
            )
            return
        if self._session is None:
            return
        self._session.load_state_dict(state)
        if (warning := self._session.workers_changed(state)) is not None:
            rank_zero_warn(warning)
