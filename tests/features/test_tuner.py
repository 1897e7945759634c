"""The tuner's trials leave the rule unchanged."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor
from tests.training import Classifier, fit, identical, loader, seeded, trainer, weights

pytestmark = pytest.mark.workers


class Start(L.Callback):
    """What the rule knows when training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = trainer.strategy.local_sgd[0].state_dict()
        self.weights = weights(pl_module)


def strategy() -> ADPSGDStrategy:
    return ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6))


class Counted(Classifier):
    """Records how many steps the rule has counted before each step, in the search and in the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def training_step(self, batch: Any) -> Tensor:
        self.counts.append(self.trainer.strategy.local_sgd[0].steps)
        return super().training_step(batch)


def find_rate_then_fit(folder: str) -> dict:
    torch.manual_seed(0)
    model, monitor, start = Counted(), CommunicationMonitor(), Start()
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=0.5)
    before = weights(model)
    fitted, _ = fit(strategy(), model, callbacks=[finder, monitor, start], default_root_dir=folder, max_epochs=2)
    return {
        "start": start.state,
        "unchanged": identical([before, start.weights]),
        "counts": model.counts,
        "rounds": [(r.step, r.trigger, r.period) for r in monitor.rounds],
        "rate": fitted.optimizers[0].param_groups[0]["lr"],
        "suggested": finder.optimal_lr.suggestion(),
        "weights": weights(model),
    }


def test_after_the_search_for_a_learning_rate_the_rule_and_the_history_are_as_before(pool, tmp_path):
    outcomes = pool.run_trainer(find_rate_then_fit, str(tmp_path))
    for outcome in outcomes:
        assert outcome["start"]["steps"] == outcome["start"]["local_steps"] == 0
        assert outcome["start"]["period"]["target"] == 0.0
        assert outcome["start"]["period"]["samples"] == 0
        assert outcome["unchanged"]
        searched = outcome["counts"].index(0, 1)
        trained = len(outcome["counts"]) - searched
        assert searched > 6  # steps and rounds took place while searching
        assert trained > 16
        assert outcome["counts"] == [*range(searched), *range(trained)]
        assert outcome["rounds"][-1][0] == trained
        assert outcome["rounds"][:2] == [(3, "period", 3), (6, "period", 3)]
        assert outcome["rate"] == outcomes[0]["rate"]
        assert outcome["suggested"] == outcomes[0]["suggested"]
    assert outcomes[0]["rounds"] == outcomes[1]["rounds"]
    assert identical([outcome["weights"] for outcome in outcomes])


def find_rate(folder: str) -> dict:
    model = seeded()
    tuned = trainer(strategy(), default_root_dir=folder)
    found = Tuner(tuned).lr_find(model, loader(), num_training=20, min_lr=1e-4, max_lr=0.5)
    tuned.fit(model, loader())
    return {"lr": model.lr, "suggested": found.suggestion(), "steps": tuned.strategy.local_sgd[0].steps}


def test_the_tuner_sets_the_same_rate_on_all_ranks_and_a_fit_starts_from_nothing(pool, tmp_path):
    first, second = pool.run_trainer(find_rate, str(tmp_path))
    assert first == second
    assert first["lr"] == first["suggested"]
    assert first["steps"] == 16


def scale_batch(how: str) -> None:
    model = seeded()
    model.batch_size = 8
    callbacks = [BatchSizeFinder()] if how == "callback" else []
    tuned = trainer(strategy(), callbacks=callbacks)
    if how == "callback":
        tuned.fit(model, loader())
    else:
        Tuner(tuned).scale_batch_size(model, loader())


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_the_search_for_a_batch_size_is_refused_as_under_every_distributed_strategy(pool, how):
    for outcome in pool.outcomes(scale_batch, how, trainer=True):
        assert outcome.kind in ("ValueError", "MisconfigurationException")
        assert "not supported with distributed strategies" in outcome.error
