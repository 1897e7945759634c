"""A limit on time ends all ranks at the same step, and costs nothing between two rounds."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy
from tests.training import Classifier, RoundsKept, identical, loader, trainer, weights

pytestmark = pytest.mark.workers


class Slow(Classifier):
    """Counts collectives between the steps of a period."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        time.sleep(0.01 if self.global_rank == 0 else 0.02)
        self.collectives.append(dist.distributed_c10d._get_default_group()._get_sequence_number_for_group())
        return super().training_step(batch)


def limited(interval: str) -> dict:
    torch.manual_seed(0)
    model, kept = Slow(), RoundsKept()
    limit = {"max_time": timedelta(seconds=0.5)} if interval == "max_time" else {}
    timers = [] if limit else [Timer(timedelta(seconds=0.5), interval=interval)]
    fitted = trainer(ADPSGDStrategy(10), max_epochs=1000, callbacks=[kept, *timers], **limit)
    fitted.fit(model, loader())
    per_step = [after - before for before, after in zip(model.collectives[1:], model.collectives[2:], strict=False)]
    timer = next(callback for callback in fitted.callbacks if isinstance(callback, Timer))
    return {
        "step": fitted.global_step,
        "last": (kept.rounds[-1].step, kept.rounds[-1].trigger),
        "per_step": per_step,
        "weights": weights(model),
        "given_back": "_check_time_remaining" not in vars(timer),
    }


@pytest.mark.parametrize("interval", ["max_time", "step", "epoch"])
def test_a_limit_on_time_ends_all_ranks_at_the_same_round(pool, interval):
    outcomes = pool.run_trainer(limited, interval)
    steps = {outcome["step"] for outcome in outcomes}
    assert len(steps) == 1
    (step,) = steps
    assert 10 < step < 500
    assert step % (16 if interval == "epoch" else 10) == 0
    assert identical([outcome["weights"] for outcome in outcomes])
    for outcome in outcomes:
        assert outcome["last"][0] == step
        assert outcome["given_back"]


@pytest.mark.parametrize("interval", ["max_time", "step"])
def test_ranks_do_not_compare_clocks_between_two_rounds(pool, interval):
    for outcome in pool.run_trainer(limited, interval):
        between = [count for place, count in enumerate(outcome["per_step"][:40], start=2) if place % 10]
        assert set(between) == {0}, outcome["per_step"]
