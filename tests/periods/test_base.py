from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_adpsgd import AdaptivePeriod, AveragingPeriod, ConstantPeriod, LocalSGD
from lightning_adpsgd.periods.base import Steps, report

quick = settings(deadline=None, max_examples=100)


class Alternating(AveragingPeriod):
    """The smallest possible rule: 1, 2, 1, 2 ... It records what it is given."""

    def __init__(self):
        self.told = []

    @property
    def value(self):
        return 1 + len(self.told) % 2

    def update(self, step, *, ratio, learning_rate):
        self.told.append((step, ratio, learning_rate))

    def state_dict(self):
        return {"told": self.told}

    def load_state_dict(self, state):
        self.told = list(state["told"])


# The interface


@pytest.mark.parametrize("missing", ["value", "update", "state_dict", "load_state_dict"])
def test_rule_without_one_of_the_interfaces_members_cannot_be_made(missing):
    members = {name: Alternating.__dict__[name] for name in ("value", "update", "state_dict", "load_state_dict")}
    type("Complete", (AveragingPeriod,), members)()
    del members[missing]
    with pytest.raises(TypeError, match=f"abstract.*{missing}"):
        type("Incomplete", (AveragingPeriod,), members)()


def test_rule_without_a_target_or_a_share_need_not_define_them():
    rule = Alternating()
    rule.setup(None)
    rule.setup(100)
    assert rule.target is None


def test_rule_sees_the_rounds_that_it_triggered_and_no_others():
    parameter = torch.nn.Parameter(torch.zeros(2))
    rule = Alternating()
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=0.5), rule)
    rounds = [local_sgd.step() for _ in range(5)]
    assert [round_.step for round_ in rounds if round_ is not None] == [1, 3, 4]
    assert local_sgd.average("validation").step == 5
    assert rule.told == [(1, 0.0, 0.5), (3, 0.0, 0.5), (4, 0.0, 0.5)]


@pytest.mark.parametrize("rule", [AdaptivePeriod(), ConstantPeriod(8)])
def test_rules_of_the_package_are_averaging_periods(rule):
    assert isinstance(rule, AveragingPeriod)


# Numbers of steps, and shares of the run


@quick
@given(st.integers(0, 10**9), st.none() | st.integers(1, 10**9))
def test_number_of_steps_is_what_it_is_however_long_the_run(amount, total_steps):
    assert Steps("Owner", "name", amount).of(total_steps) == amount


@quick
@given(st.floats(0.0, 1.0), st.integers(1, 10**9))
@example(0.7, 350)
def test_share_of_the_run_is_a_whole_number_of_its_steps(share, total_steps):
    steps = Steps("Owner", "name", share).of(total_steps)
    assert isinstance(steps, int)
    assert 0 <= steps <= total_steps
    # 0.7 of 350 steps is 245, as written, although 0.7 * 350 < 245 in floating point.
    most = max(share * total_steps, Fraction(repr(share)) * total_steps)
    assert most - 1 < steps <= most


def test_share_of_the_run_is_the_number_of_steps_that_one_would_write():
    for share, total_steps, steps in (
        *((round(percent / 100, 2), 100, percent) for percent in range(101)),  # 0.29 * 100 is 28.999999999999996
        (0.1, 30, 3),
        (0.7, 10, 7),
        (1 / 3, 300, 100),
        (0.3, 3, 0),
        (0.999, 1, 0),
        (0.57, 10**9, 570_000_000),
        (1.0, 2**63 - 1, 2**63 - 1),
        (1e-9, 10**9, 1),
        (0.5, 0, 0),
    ):
        assert Steps("Owner", "name", share).of(total_steps) == steps, (share, total_steps)


def test_one_is_a_step_and_one_point_zero_is_the_whole_run():
    assert Steps("Owner", "name", 1).of(100) == 1
    assert Steps("Owner", "name", 1.0).of(100) == 100


def test_no_share_of_a_run_of_unknown_length_is_no_steps():
    assert Steps("Owner", "name", 0.0).of(None) == 0


@quick
@given(st.floats(0.0, 1.0, exclude_min=True))
def test_share_of_a_run_of_unknown_length_is_refused(share):
    with pytest.raises(ValueError, match=r"not known beforehand.*name=1000") as caught:
        Steps("Owner", "name", share).of(None)
    assert str(caught.value).startswith(f"Owner(name={share!r})")


# Rules of version 0.1, whose update took numbers


class Record(NamedTuple):
    step: int = 3
    ratio: float = 2.0
    learning_rate: float = 0.1


class FormerRule(ConstantPeriod):
    def update(self, step: int, *, ratio: float, learning_rate: float) -> None:
        super().update(step, ratio=ratio, learning_rate=learning_rate)
        self.seen = (step, ratio, learning_rate)


class RecordRule(ConstantPeriod):
    def update(self, record) -> None:
        self.seen = record


def test_a_rule_with_the_former_signature_gets_numbers_and_any_other_the_whole_record():
    former, whole, scalars = FormerRule(4), RecordRule(4), ConstantPeriod(4)
    for rule in (former, whole, scalars):
        report(rule, Record(), [1.0])
    assert former.seen == (3, 2.0, 0.1)
    assert whole.seen == Record()
    assert [rule.state_dict()["step"] for rule in (former, scalars)] == [3, 3]


class WrappedRule(ConstantPeriod):
    """A rule that passes on whatever it is given, as wrappers do."""

    def update(self, *args: Any, **named: Any) -> None:
        self.seen = args
        super().update(*args, **named)


def test_a_rule_that_takes_anything_gets_the_whole_record_too():
    rule = WrappedRule(4)
    report(rule, Record(), [1.0])
    assert rule.seen == (Record(), [1.0])
    assert rule.state_dict()["step"] == 3


def test_a_rule_that_is_called_in_neither_way_says_what_it_expects():
    with pytest.raises(TypeError, match=r"update\(3\): expected an AveragingRound, or a step with ratio="):
        ConstantPeriod(4).update(3, ratio=1.0)
