"""Every precision of Lightning's, on CPUs, compared with a run by hand in the same precision."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy
from tests.features.outcomes import (
    by_hand,
    check,
    check_by_hand,
    in_order_loaders,
    outcome_of,
    periods,
    share,
)
from tests.training import Classifier, seeded

pytestmark = pytest.mark.workers

ONE_BY_ONE = [[index] for index in range(16)]
ROUNDS = [4, 8, 12, 16]


class Precision(NamedTuple):
    """A precision of Lightning's, and its equivalent by hand."""

    name: str
    dtype: torch.dtype
    """Of parameters and data."""
    autocast: Callable[[], Any]


PRECISIONS = [
    Precision("32-true", torch.float32, partial(torch.autocast, "cpu", enabled=False)),
    Precision("bf16-mixed", torch.float32, partial(torch.autocast, "cpu", torch.bfloat16)),
    Precision("bf16-true", torch.bfloat16, partial(torch.autocast, "cpu", enabled=False)),
    Precision("16-true", torch.float16, partial(torch.autocast, "cpu", enabled=False)),
    Precision("64-true", torch.float64, partial(torch.autocast, "cpu", enabled=False)),
]


def trained_in(name: str, dtype: torch.dtype) -> dict:
    return outcome_of(seeded(), precision=name, loaders=in_order_loaders(dtype=dtype))


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_training_in_any_precision_averages_what_it_trains(pool, precision):
    outcomes = pool.run_trainer(trained_in, precision.name, precision.dtype)
    check(outcomes, periods(16))
    floating = {tensor.dtype for tensor in outcomes[0]["weights"].values() if tensor.is_floating_point()}
    assert floating == {precision.dtype}
    batches = [share(rank, dtype=precision.dtype) for rank in range(2)]
    model = seeded().to(precision.dtype)
    check_by_hand(outcomes, by_hand(model, ONE_BY_ONE, ROUNDS, batches=batches, autocast=precision.autocast))


# The gradient scaler


class Overflows(Classifier):
    """The gradients of one rank are infinite at some steps, and its scaler skips those."""

    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return loss * float("inf") if self.global_rank == 1 and step in (1, 3, 6) else loss


def scaler_skips() -> dict:
    torch.manual_seed(0)
    model = Overflows()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    result = outcome_of(model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], loaders=in_order_loaders())
    return {**result, "scale": scaler.get_scale()}


def test_a_step_skipped_by_the_scaler_of_one_rank_counts_like_any_other(pool):
    outcomes = pool.run_trainer(scaler_skips)
    check(outcomes, periods(16))
    assert [outcome["scale"] for outcome in outcomes] == [4.0, 0.5]  # the second rank has skipped three steps
    expected = by_hand(
        seeded(),
        ONE_BY_ONE,
        ROUNDS,
        autocast=partial(torch.autocast, "cpu", torch.float16),
        skipped=lambda rank, step: rank == 1 and step in (2, 4, 7),
    )
    check_by_hand(outcomes, expected)


class OverflowsAtFirst(Classifier):
    """One rank's scaler skips the first step, as it often does until it has found its scale."""

    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        first = self.trainer.fit_loop.epoch_loop.total_batch_idx == 0
        return loss * float("inf") if self.global_rank == 1 and first else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def scaler_skips_at_first(policy: str) -> dict:
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "loaders": in_order_loaders()}
    return outcome_of(OverflowsAtFirst(), ADPSGDStrategy(1, optimizer_state=policy), **options)


@pytest.mark.parametrize(
    "policy",
    ["local", "average", "reset"],
)
def test_a_round_may_come_before_every_rank_has_taken_a_step(pool, policy):
    outcomes = pool.run_trainer(scaler_skips_at_first, policy)
    check(outcomes, periods(16, period=1))
