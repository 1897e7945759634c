"""The strategy's own callbacks: ahead of all others, and behind those that prune."""

from typing import TYPE_CHECKING

from torchmetrics import Metric
from typing_extensions import override

from .compat import callbacks_of, is_interrupted, pruned, prunes_after_training
from .family import Callback, ModelPruning, SIGTERMException, StochasticWeightAveraging, pl
from .signals import REQUEUE, SIGTERM, DeferredSignals

if TYPE_CHECKING:
    from lightning_adpsgd.trainer.weights import AveragedWeights


def insert_callbacks(trainer: "pl.Trainer", strategy: "AveragedWeights", signals: DeferredSignals) -> list[Callback]:
    """Have the strategy's callbacks called during a fit; return them."""
    first, after_pruning = FirstCallback(strategy, signals), AfterPruning(strategy)
    callbacks = callbacks_of(trainer)
    callbacks.insert(0, first)
    for callback in _pruning(trainer):
        callbacks.insert(callbacks.index(callback) + 1, after_pruning)
    return [first, after_pruning]


class _OwnCallback(Callback):
    """A callback that is not called at every step for nothing."""

    # Lightning opens a profiler's context around every hook of every callback, those that do nothing among them, unless
    # they cannot be called; at every step that would cost more than all else that this strategy does there.
    on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = None  # type: ignore[assignment]
    on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]

    def __init__(self, strategy: "AveragedWeights") -> None:
        self._strategy = strategy


class FirstCallback(_OwnCallback):
    """Averages before somebody looks at the weights, and acts on signals, ahead of every other callback.

    The strategy's own hooks come after the callbacks' and the module's: somebody may have read the weights by then.

    Args:
        strategy: whose rounds and handshakes.
        signals: that have been put off.
    """

    def __init__(self, strategy: "AveragedWeights", signals: DeferredSignals) -> None:
        super().__init__(strategy)
        self._signals = signals

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._signals.install_timers()

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        averaging = [each for each in callbacks_of(trainer) if isinstance(each, StochasticWeightAveraging)]
        if any(trainer.current_epoch >= each.swa_start for each in averaging):
            self._strategy.average("checkpoint")  # the callback is about to take a copy of the weights

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: object) -> None:
        if self._strategy.session is not None:
            self._strategy.session.note_forward()

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: object) -> None:
        # Not inside of the optimizer's step: a checkpoint that a signal asks for belongs behind it.
        self._act_on_signals()

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if any(isinstance(module, Metric) for module in pl_module.modules()):
            self._strategy.handshake("the end of an epoch")  # metrics that communicate by themselves may follow
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
            # For ranks that go on, although they should have ended too.
            steps = ", ".join(f"step {local_sgd.steps}" for local_sgd in session.local_sgd)
            session.workers.peers.post_status(f"had ended training at {steps}")
        if self._act_on_signals() & SIGTERM:
            raise SIGTERMException  # no loop of Lightning's is left to do so

    def _act_on_signals(self) -> int:
        """Act, on every rank, on the signals that any rank had received when the latest round began; return them."""
        session = self._strategy.session
        flags = 0 if session is None else session.flags.agreed
        if session is None or flags == 0:
            return 0
        if flags & (SIGTERM | REQUEUE):
            self._strategy.average("checkpoint")  # with several optimizers, only one of them may have had its round
        session.flags.agreed = 0
        session.flags.raised &= ~flags
        self._signals.act(flags)
        return flags

    def _average_before_pruning(self, module: "pl.LightningModule") -> None:
        """Average what is about to be pruned, and what it will be judged by, for all workers to judge alike.

        What was pruned before is judged by the masked weights of the latest forward pass: by those of one step before.
        """
        masked = [getattr(part, name) for part, name in pruned(module)]
        # Those of a validation are made of averaged weights, and cannot be written to.
        self._strategy.average("pruning", [tensor for tensor in masked if not tensor.is_inference()])


class AfterPruning(_OwnCallback):
    """Gives all workers rank 0's masks and weights, where they differ, right behind a callback that prunes.

    Masks do that are drawn by chance, and so do weights that go back to where each worker had begun.
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
