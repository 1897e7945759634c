import statistics
from collections.abc import Sequence

import pytest
import torch

from lightning_adpsgd import AdaptivePeriod, AveragingRound
from lightning_adpsgd.periods.attached import AttachedRule


def a_round(step: int, ratio: float) -> AveragingRound:
    return AveragingRound(step, 0, "period", 4, 4, 0.1, 0.1 * ratio, ratio, None, 8, 8, 0.1)


def attached(**arguments) -> tuple[AttachedRule, AdaptivePeriod]:
    period = AdaptivePeriod(**{"sampling": 8, **arguments})
    rule = AttachedRule(period)
    rule.setup(100)
    return rule, period


def see(rule: AttachedRule, ratios: Sequence[float], workers: Sequence[int], first_step: int = 4) -> None:
    for place, (ratio, count) in enumerate(zip(ratios, workers, strict=True)):
        rule.see(a_round(first_step + 4 * place, ratio), (), count)


def variance_among(workers: int) -> float:
    """The mean of S_k over many rounds of workers whose noise is independent, of variance 1."""
    generator = torch.Generator().manual_seed(workers)
    values = torch.randn(200_000, workers, generator=generator, dtype=torch.float64)
    return float(values.var(dim=1, correction=0).mean())


def test_the_period_stays_when_half_of_the_workers_leave_and_nothing_else_changes():
    rule, period = attached(low=0.99, high=1.01)
    see(rule, [variance_among(4)] * 2, [4, 4])
    see(rule, [variance_among(2), variance_among(3), variance_among(8)] * 4, [2, 3, 8] * 4, first_step=12)
    assert period.value == 4
    assert variance_among(2) < 0.7 * variance_among(4)  # without a correction the period would have grown


def test_the_target_is_sampled_as_if_all_rounds_had_as_many_workers_as_the_first():
    rule, period = attached()
    see(rule, [0.75, 0.5], [4, 2])  # 1 - 1/n: as if one worker's variance were 1
    assert period.target == pytest.approx(0.75)
    assert rule.target_among(2) == pytest.approx(0.5)
    assert rule.target_among(4) == period.target


def test_rounds_of_one_number_of_workers_are_passed_on_as_they_are():
    rule, period = attached()
    ratios = [0.1, 0.7]
    see(rule, ratios, [3, 3])
    assert period.target == statistics.fmean(ratios)
    assert rule.target_among(3) == period.target


def test_a_worker_alone_changes_nothing_about_which_number_is_the_first():
    rule, period = attached()
    see(rule, [0.0, 0.5], [1, 2])
    assert rule.state_dict()["first_workers"] == 2
    assert rule.target_among(1) == period.target == 0.25


def test_the_first_number_of_workers_goes_along_with_the_state():
    rule, _ = attached()
    see(rule, [0.75, 0.75], [4, 4])
    other, period = attached()
    other.load_state_dict(rule.state_dict(), 8, warns=False)
    assert other.state_dict() == rule.state_dict()
    see(other, [0.5], [2], first_step=12)
    assert period.value == 4


def test_a_state_without_the_number_goes_on_with_that_of_the_next_round():
    rule, _ = attached()
    see(rule, [0.75, 0.75], [4, 4])
    state = rule.state_dict()
    del state["first_workers"]
    other, period = attached()
    other.load_state_dict(state, 8, warns=False)
    see(other, [0.5], [2], first_step=12)
    assert other.state_dict()["first_workers"] == 2
    assert period.value == 5


def test_a_wrong_number_is_named_and_the_rule_stays_as_it_is():
    rule, period = attached()
    see(rule, [0.75, 0.75], [4, 4])
    other, untouched = attached()
    with pytest.raises(TypeError, match="first_workers"):
        other.load_state_dict({**rule.state_dict(), "first_workers": "four"}, 8, warns=False)
    assert untouched.target is None
    assert period.target == 0.75
