"""Signals to one rank wait for an averaging round, and then all ranks act on them at the same step."""

import os
import signal
from typing import Any

import lightning as L
import pytest
import torch

from lightning_adpsgd import ADPSGDStrategy
from tests.training import Classifier, RoundsKept, identical, loader, seeded, trainer, weights

pytestmark = pytest.mark.workers


class SignalAt(L.Callback):
    """Sends this process a signal after a step, on one rank."""

    def __init__(self, rank: int, step: int, number: int = signal.SIGTERM) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def preempted(rank: int, step: int, accumulate: int) -> dict:
    model, kept = seeded(), RoundsKept()
    fitted = trainer(
        ADPSGDStrategy(5), max_epochs=4, callbacks=[SignalAt(rank, step), kept], accumulate_grad_batches=accumulate
    )
    handler = signal.getsignal(signal.SIGTERM)
    raised = None
    try:
        torch.manual_seed(0)
        fitted.fit(model, loader())
    except BaseException as error:
        raised = type(error).__name__
    return {
        "raised": raised,
        "step": fitted.global_step,
        "weights": weights(model),
        "handler_restored": signal.getsignal(signal.SIGTERM) == handler,
        "broadcast_restored": "_broadcast_sigterm_tensor" not in vars(fitted.fit_loop.epoch_loop),
        "notifier_restored": "_sigterm_notifier_fn" not in vars(fitted._signal_connector),
        "callbacks": [type(callback).__name__ for callback in fitted.callbacks],
        "round": kept.rounds[-1].step,
    }


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sigterm_to_one_rank_ends_all_at_the_next_round_with_the_average(pool, rank, accumulate):
    outcomes = pool.run_trainer(preempted, rank, 7, accumulate)
    for outcome in outcomes:
        assert outcome["raised"] == "SIGTERMException"
        assert outcome["step"] == outcome["round"] == 10
        assert outcome["handler_restored"]
        assert outcome["broadcast_restored"]
        assert outcome["notifier_restored"]
        assert "_FirstCallback" not in outcome["callbacks"]
    assert identical([outcome["weights"] for outcome in outcomes])


def preempted_at_the_end() -> dict:
    fitted = trainer(ADPSGDStrategy(100), max_steps=6, callbacks=[SignalAt(1, 6)])
    try:
        fitted.fit(seeded(), loader())
    except BaseException as error:
        return {"raised": type(error).__name__}
    return {"raised": None}


def test_sigterm_after_the_last_step_still_ends_every_rank(pool):
    assert pool.run_trainer(preempted_at_the_end) == [{"raised": "SIGTERMException"}] * 2


def requeued() -> dict:
    fitted = trainer(ADPSGDStrategy(5), max_steps=20)
    calls: list[int] = []
    connector = fitted._signal_connector
    original = type(connector)._slurm_sigusr_handler_fn
    type(connector)._slurm_sigusr_handler_fn = lambda self, *_: calls.append(fitted.global_step)

    class Requeue(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 7:
                connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

    fitted.callbacks.append(Requeue())
    try:
        fitted.fit(seeded(), loader(1024))
    finally:
        type(connector)._slurm_sigusr_handler_fn = original
    return {"calls": calls, "step": fitted.global_step}


def test_a_requeue_signal_is_handled_on_all_ranks_at_the_next_round(pool):
    assert pool.run_trainer(requeued) == [{"calls": [10], "step": 20}] * 2


class TwoOptimizers(Classifier):
    """The layers have optimizers of their own, and the second is stepped half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            if index == 0 or self.trainer.fit_loop.epoch_loop.total_batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 3)]


def preempted_with_two_optimizers() -> dict:
    torch.manual_seed(0)
    model = TwoOptimizers()
    fitted = trainer(ADPSGDStrategy(5), max_epochs=4, callbacks=[SignalAt(1, 10)])
    raised = None
    try:
        fitted.fit(model, loader())
    except BaseException as error:
        raised = type(error).__name__
    pending = [local_sgd.local_steps for local_sgd in fitted.strategy.local_sgd]
    return {"raised": raised, "weights": weights(model), "pending": pending}


def test_sigterm_leaves_the_average_of_every_optimizer(pool):
    outcomes = pool.run_trainer(preempted_with_two_optimizers)
    for outcome in outcomes:
        assert outcome["raised"] == "SIGTERMException"
        assert outcome["pending"] == [0, 0]
    assert identical([{k: v for k, v in o["weights"].items() if "running" not in k} for o in outcomes])
