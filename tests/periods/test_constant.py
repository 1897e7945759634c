import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adpsgd import ConstantPeriod

quick = settings(deadline=None, max_examples=100)

# Rounds that a rule may be shown: (local steps since the one before, ratio, learning rate)
histories = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0.0, 1e300), st.sampled_from([0.0, 0.001, 0.1])), max_size=30
)


def show(rule, history, step=0):
    """The step and the period after each round of ``history``."""
    seen = []
    for gap, ratio, rate in history:
        step += gap
        rule.update(step, ratio=ratio, learning_rate=rate)
        seen.append((step, rule.value))
    return seen


@quick
@given(st.integers(1, 10**6), histories)
def test_period_is_the_one_given_whatever_is_measured(period, history):
    rule = ConstantPeriod(period)
    rule.setup(None)
    assert rule.value == period
    assert {value for _, value in show(rule, history)} <= {period}


def test_constant_period_has_no_target():
    rule = ConstantPeriod(8)
    rule.setup(100)
    rule.update(8, ratio=3.0, learning_rate=0.1)
    assert rule.target is None


@pytest.mark.parametrize(("warmup", "total_steps"), [(3, None), (3, 1000), (0.25, 12), (0.25, 15)])
def test_period_is_one_until_the_last_step_of_the_warm_up(warmup, total_steps):
    rule = ConstantPeriod(8, warmup=warmup)
    rule.setup(total_steps)
    assert rule.value == 1
    assert show(rule, [(1, 0.0, 0.1)] * 5) == [(1, 1), (2, 1), (3, 8), (4, 8), (5, 8)]


@quick
@given(st.integers(1, 20), st.integers(0, 20), histories)
def test_period_depends_on_nothing_but_the_step(period, warmup, history):
    rule = ConstantPeriod(period, warmup=warmup)
    rule.setup(None)
    assert all(value == (1 if step < warmup else period) for step, value in show(rule, history))


def test_share_of_a_run_of_unknown_length_is_an_error_that_names_the_argument_and_the_fix():
    with pytest.raises(ValueError, match=r"^ConstantPeriod\(warmup=0\.1\) is a share .* warmup=1000"):
        ConstantPeriod(8, warmup=0.1).setup(None)


@quick
@given(st.integers(1, 20), st.integers(0, 20) | st.floats(0.0, 1.0), st.integers(1, 99), histories, st.data())
def test_restored_rule_continues_as_if_there_had_been_no_interruption(period, warmup, total_steps, history, data):
    cut = data.draw(st.integers(0, len(history)))
    uninterrupted = ConstantPeriod(period, warmup)
    uninterrupted.setup(50)
    expected = show(uninterrupted, history)

    interrupted = ConstantPeriod(period, warmup)
    interrupted.setup(50)
    show(interrupted, history[:cut])
    restored = ConstantPeriod(period, warmup)
    restored.setup(total_steps)
    restored.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert restored.value == interrupted.value
    assert show(restored, history[cut:], step=expected[cut - 1][0] if cut else 0) == expected[cut:]


def test_restored_rule_has_the_period_it_was_made_with():
    short, long = ConstantPeriod(4), ConstantPeriod(16)
    long.load_state_dict(short.state_dict())
    assert long.value == 16


def test_repr_is_the_call_that_makes_the_rule():
    assert repr(ConstantPeriod(8, warmup=0.25)) == "ConstantPeriod(period=8, warmup=0.25)"
