"""Metrics that are logged while training, and what it costs to reduce them."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy
from tests.training import Classifier, fit

pytestmark = pytest.mark.workers


class Logs(Classifier):
    """Logs its loss with the given options."""

    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, **self.how)
        return loss


class LogsNowAndThen(Classifier):
    """Logs its loss at every third step."""

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        if self.global_step % 3 == 0:
            self.log("loss", loss, sync_dist=True)
        return loss


def log(on_step: bool | None) -> list[str]:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ADPSGDStrategy(4), LogsNowAndThen() if on_step is None else Logs(on_step=on_step, on_epoch=not on_step))
    return [str(warning.message) for warning in caught if "at every step" in str(warning.message)]


def test_a_metric_reduced_at_every_step_is_warned_of_once_on_the_first_rank(pool):
    first, second = pool.run_trainer(log, True)
    assert len(first) == 1
    assert "`training_step`" in first[0]
    assert "on_epoch=True" in first[0]
    assert second == []


def test_a_metric_reduced_at_the_end_of_an_epoch_is_not_warned_of(pool):
    assert pool.run_trainer(log, False) == [[], []]


def test_a_metric_reduced_occasionally_is_not_warned_of(pool):
    assert pool.run_trainer(log, None) == [[], []]
