"""The strategy's own callbacks: one before all others, and one after those that prune."""

from typing import TYPE_CHECKING

from torchmetrics import Metric
from typing_extensions import override

from .compat import callbacks_of, is_interrupted, pruned, prunes_after_training
from .family import Callback, ModelPruning, SIGTERMException, StochasticWeightAveraging, pl
from .signals import REQUEUE, SIGTERM, DeferredSignals

if TYPE_CHECKING:
    from lightning_adpsgd.trainer.elastic import ElasticWorkers


def insert_callbacks(trainer: "pl.Trainer", strategy: "ElasticWorkers", signals: DeferredSignals) -> list[Callback]:
    """Insert the strategy's callbacks for a fit; return them."""
    first, after_pruning = FirstCallback(strategy, signals), AfterPruning(strategy)
    callbacks = callbacks_of(trainer)
    callbacks.insert(0, first)
    for callback in _pruning(trainer):
        callbacks.insert(callbacks.index(callback) + 1, after_pruning)
    return [first, after_pruning]


def remove_callbacks(trainer: "pl.Trainer | None", callbacks: list["pl.Callback"]) -> None:
    """Take them out again."""
    if trainer is not None:
        callbacks_of(trainer)[:] = [each for each in callbacks_of(trainer) if each not in callbacks]


class _OwnCallback(Callback):
    """A callback without unused hooks at every step."""

    # Lightning opens a profiler context around every callable hook of every callback, even if it does nothing. At every
    # step, that would cost more than everything else that this strategy does.
    on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = None  # type: ignore[assignment]
    on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]

    def __init__(self, strategy: "ElasticWorkers") -> None:
        self._strategy = strategy


class FirstCallback(_OwnCallback):
    """Averages before the weights are read, and acts on signals, before every other callback.

    The strategy's own hooks run after those of callbacks and the module, which may read the weights.

    Args:
        strategy: runs the rounds and handshakes.
        signals: the deferred signals.
    """

    def __init__(self, strategy: "ElasticWorkers", signals: DeferredSignals) -> None:
        super().__init__(strategy)
        self._signals = signals

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._signals.install_timers()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        averaging = [each for each in callbacks_of(trainer) if isinstance(each, StochasticWeightAveraging)]
        if any(trainer.current_epoch >= each.swa_start for each in averaging):
            self._strategy.average("checkpoint")  # the callback is about to copy the weights

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: object) -> None:
        if self._strategy.session is not None:
            self._strategy.session.note_forward()

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: object) -> None:
        self._strategy.follow_the_others()
        # Not within the optimizer's step: a checkpoint that a signal asks for has to follow it.
        self._act_on_signals()

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._strategy.end_epoch()
        if any(isinstance(module, Metric) for module in pl_module.modules()):
            self._strategy.handshake("the end of an epoch")  # metrics may communicate next
        if any(map(prunes_after_training, _pruning(trainer))):
            self._average_before_pruning(pl_module)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._strategy.average("validation"):
            self._strategy.handshake("a validation")
        self._act_on_signals()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._strategy.average("train_end"):
            self._strategy.handshake("the end of training")
        session = self._strategy.session
        if session is not None:
            # For ranks that continue, although they should have ended, too.
            steps = ", ".join(f"step {local_sgd.steps}" for local_sgd in session.local_sgd)
            session.workers.peers.post_status(f"had ended training at {steps}")
        if self._act_on_signals() & SIGTERM:
            raise SIGTERMException  # Lightning's loops, which would raise it, have ended

    def _act_on_signals(self) -> int:
        """Act on the signals that any rank had received when the latest round began, on all ranks; return them."""
        session = self._strategy.session
        flags = 0 if session is None else session.flags.agreed
        if session is None or flags == 0:
            return 0
        if flags & (SIGTERM | REQUEUE):
            self._strategy.average("checkpoint")  # of several optimizers, only one may have had its round
        session.flags.agreed = 0
        session.flags.raised &= ~flags
        self._signals.act(flags)
        return flags

    def _average_before_pruning(self, module: "pl.LightningModule") -> None:
        """Average what is about to be pruned and the weights that decide on it, so that all workers prune alike.

        Where a mask exists already, the masked weights of the latest forward pass decide, from before the latest step.
        """
        masked = [getattr(part, name) for part, name in pruned(module)]
        # Those of a validation's forward pass are averaged already, and read-only.
        self._strategy.average("pruning", [tensor for tensor in masked if not tensor.is_inference()])


class AfterPruning(_OwnCallback):
    """Gives all workers rank 0's masks and weights, if they differ, right after a callback that prunes.

    They differ if masks are random, or if weights are reset to each worker's initial ones.
    """

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        session = self._strategy.session
        if session is None or session.workers.size == 1 or is_interrupted(trainer):
            return
        self._strategy.handshake("a pruning")
        places = pruned(pl_module)
        session.adopt_first([getattr(part, name + suffix) for part, name in places for suffix in ("_orig", "_mask")])

    @override
    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.sanity_checking:
            self.on_train_epoch_end(trainer, pl_module)


def _pruning(trainer: "pl.Trainer") -> list[ModelPruning]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelPruning)]
