import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.baselines import EvenRounds, QSGDStrategy
from benchmarks.paper import training
from benchmarks.paper.plan import (
    ADPSGD,
    ADPSGD_INT4,
    BETWEEN,
    BF16,
    BYTES,
    CPSGD_8,
    FULL,
    MATCHED,
    MOMENTUM,
    PAPER,
    POWERSGD,
    QSGD,
    RARE,
    Run,
)
from benchmarks.paper.text import CONTEXT, Windows
from benchmarks.paper.training import Classifier, averaged, judge_text, new_period, new_strategy, rate_factor
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod
from tests.benchmarks.paper.samples import TASK


def rates(schedule, total=100, **changes):
    task = dataclasses.asdict(TASK) | {"schedule": schedule, "epochs": 10} | changes
    return [rate_factor(step, total, task) for step in range(total)]


def test_rate_warms_up_linearly_and_decays_to_a_tenth_twice():
    factors = rates("steps")
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert set(factors[10:50]) == {1.0}
    assert factors[50:75] == pytest.approx([0.1] * 25)
    assert factors[75:] == pytest.approx([0.01] * 25)


def test_cosine_goes_from_the_peak_to_almost_nothing():
    factors = rates("cosine")
    assert factors[:11] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def described(contender):
    return dataclasses.asdict(contender)


def test_every_contender_has_its_strategy():
    kinds = {contender: type(new_strategy(described(contender), 7, "gloo")).__name__ for contender in PAPER}
    assert kinds.pop(FULL) == "DDPStrategy"
    assert kinds.pop(QSGD) == QSGDStrategy.__name__
    assert set(kinds.values()) == {ADPSGDStrategy.__name__}


def test_periods_are_those_that_contenders_are_named_after():
    adaptive, rare = (new_period(described(contender), None) for contender in (ADPSGD, RARE))
    assert isinstance(adaptive, AdaptivePeriod)
    assert (adaptive.value, rare.value) == (4, 8)
    constant, matched = new_period(described(CPSGD_8), None), new_period(described(MATCHED), 7)
    assert isinstance(constant, ConstantPeriod)
    assert constant.value == 8
    assert isinstance(matched, EvenRounds)
    matched.setup(70)
    assert matched.value == 10


def test_contenders_that_average_momentum_do_so(monkeypatch):
    monkeypatch.setattr(training, "ADPSGDStrategy", lambda **options: options["optimizer_state"])
    states = [new_strategy(described(contender), None, "gloo") for contender in MOMENTUM]
    assert states == ["local", "average", "average", "reset"]


def test_contenders_that_send_less_get_what_they_are_named_after(monkeypatch):
    monkeypatch.setattr(
        training, "ADPSGDStrategy", lambda **options: (options["reduce_dtype"], options["optimizer_state"])
    )
    made = {contender.name: new_strategy(described(contender), None, "gloo") for contender in (*BYTES, *BETWEEN)}
    assert made["adpsgd-int4"] == ("int4", "estimate")
    assert made["adpsgd-p2-int4"] == ("int4", "local")
    assert made["adpsgd-p2-s0.25"] == made["adpsgd"] == (None, "local")
    assert type(made[BF16.name]).__name__ == "BF16Strategy"
    assert [made[each.name]._reducer._rank for each in POWERSGD] == [1, 2, 4]


def test_the_contender_adpsgd_int4_is_what_the_strategys_name_stands_for():
    compared, named = new_strategy(described(ADPSGD_INT4), None, "gloo"), ADPSGDStrategy.int4()
    assert compared._options == named._options
    assert repr(compared._period) == repr(named._period)


def test_settings_without_later_fields_make_the_same_strategy():
    settings = Run(TASK, ADPSGD, 0).settings(None)["contender"]
    assert "reduce_dtype" not in settings
    assert new_strategy(settings, None, "gloo")._options.reduce_dtype is None
    assert new_period(Run(TASK, ADPSGD_INT4, 0).settings(None)["contender"], None).value == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rate_of_a_contender_multiplies_that_of_the_task(optimizer):
    for rate in (1.0, 4.0):
        model = Classifier(dataclasses.asdict(TASK) | {"optimizer": optimizer, "learning_rate": 0.2}, rate)
        model._trainer = SimpleNamespace(estimated_stepping_batches=10)
        (group,) = model.configure_optimizers()["optimizer"].param_groups
        assert group["initial_lr"] == pytest.approx(0.2 * rate)


class Repeats(nn.Module):
    """Is sure that each character is followed by the one after it in the alphabet."""

    def __init__(self):
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(100.0))

    def forward(self, characters):
        return (self.sure * nn.functional.one_hot(characters + 1, 100)).transpose(1, 2)


def test_language_model_is_judged_by_the_text_that_it_is_not_trained_on():
    tail = torch.arange(CONTEXT + 1).repeat(2)[: 2 * CONTEXT + 1]
    tail[-1] = 0  # it predicts the last one wrongly
    data = SimpleNamespace(val_set=Windows(tail))
    answers = [judge_text(Repeats(), data, SimpleNamespace(global_rank=rank, world_size=2)) for rank in (0, 1)]
    assert {answer["test_images"] for answer in answers} == {answer["train_images"] for answer in answers}
    assert answers[0]["test_images"] == 2 * CONTEXT
    wrong = 2 * CONTEXT - sum(answer["right"] for answer in answers)
    assert wrong == sum(int(tail[place + 1] != tail[place] + 1) for place in range(2 * CONTEXT)) > 0
    assert sum(answer["train_loss_sum"] for answer in answers) == pytest.approx(100.0 * wrong)


def average_on_rank():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in network.state_dict().values():
        tensor.fill_(1 + 2 * dist.get_rank())
    result = averaged(network)
    return [{t.item() for t in each.state_dict()[name].flatten()} for each in (network, result) for name in NAMES]


NAMES = ("0.weight", "1.running_mean", "1.num_batches_tracked")


@pytest.mark.workers
def test_model_is_evaluated_as_the_mean_over_ranks_and_left_as_it_is(pool):
    first, second = pool.run(average_on_rank)
    assert first == [{1}, {1}, {1}, {2}, {2}, {1}]
    assert second == [{3}, {3}, {3}, {2}, {2}, {3}]
