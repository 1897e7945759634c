import copy
import io
import json
import math
import pickle
from fractions import Fraction
from itertools import pairwise, product
from statistics import fmean

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_adpsgd import AdaptivePeriod, ConstantPeriod, LocalSGD

quick = settings(deadline=None, max_examples=100)


def drive(rule, ratios, learning_rate=0.1, first_step=1, local_steps=0):
    """Take local steps, and show the rule one ratio per round: the steps at which rounds ran, and the periods after."""
    rounds = []
    step = first_step - 1
    for ratio in ratios:
        while True:
            step += 1
            local_steps += 1
            if local_steps >= rule.value:
                break
        rule.update(step, ratio=ratio, learning_rate=learning_rate)
        rounds.append((step, rule.value))
        local_steps = 0
    return rounds


def after_sampling(target=1.0, **arguments):
    """A rule that has sampled ``target`` at step 10 and has finished sampling."""
    rule = AdaptivePeriod(sampling=10, **arguments)
    rule.setup(None)
    rule.update(10, ratio=target, learning_rate=0.1)
    return rule


# The rule, against traces made by hand


def test_defaults_are_the_papers_setting_as_we_read_it():
    assert repr(AdaptivePeriod()) == (
        "AdaptivePeriod(initial=4, sampling=0.25, low=0.7, high=1.3, minimum=1, maximum=None, warmup=0,"
        " growth='additive', skip_rising=False)"
    )


def test_whole_trace_is_the_one_computed_by_hand():
    rule = AdaptivePeriod()
    rule.setup(48)  # hence 12 steps of sampling

    sampled = drive(rule, [2.0, 4.0, 3.0])
    assert sampled == [(4, 4), (8, 4), (12, 4)]
    assert rule.target == pytest.approx(3.0)

    # C₂ = 3: the period grows below 2.1 and shrinks above 3.9
    acted = drive(rule, [2.0, 2.0, 3.0, 4.0, 9.0, 0.0, 2.2, 3.8], first_step=13)
    assert acted == [(16, 5), (21, 6), (27, 6), (33, 5), (38, 4), (42, 5), (47, 5), (52, 5)]
    assert rule.target == pytest.approx(3.0)


def test_target_is_the_mean_of_the_ratios_sampled_so_far():
    rule = AdaptivePeriod(sampling=100)
    rule.setup(None)
    ratios = [0.3, 5.0, 1.1, 0.0, 2.6]
    assert rule.target is None
    for count, (step, ratio) in enumerate(zip(range(4, 100, 4), ratios, strict=False), start=1):
        rule.update(step, ratio=ratio, learning_rate=0.1)
        assert rule.target == pytest.approx(fmean(ratios[:count]))


def test_round_at_the_last_step_of_sampling_is_sampled_and_the_next_step_is_not():
    rule = AdaptivePeriod(sampling=8)
    rule.setup(None)
    rule.update(7, ratio=1.0, learning_rate=0.1)
    rule.update(8, ratio=3.0, learning_rate=0.1)
    assert (rule.target, rule.value) == (2.0, 4)
    rule.update(9, ratio=1.0, learning_rate=0.1)
    assert (rule.target, rule.value) == (2.0, 5)


def test_sampling_as_a_share_ends_at_that_share_of_the_run():
    rule = AdaptivePeriod(sampling=0.25)
    rule.setup(100)
    rule.update(25, ratio=1.0, learning_rate=0.1)
    assert rule.target == 1.0
    rule.update(26, ratio=0.0, learning_rate=0.1)
    assert (rule.target, rule.value) == (1.0, 5)


def test_period_does_not_change_during_sampling_however_far_the_ratios_lie_apart():
    rule = AdaptivePeriod(sampling=1000)
    rule.setup(None)
    assert [period for _, period in drive(rule, [1.0, 100.0, 0.0, 1e9, 1e-9])] == [4] * 5


def test_period_grows_below_low_and_shrinks_above_high_and_stays_at_both():
    changes = {0.0: 1, math.nextafter(0.5, 0.0): 1, 0.5: 0, 1.0: 0, 1.5: 0, math.nextafter(1.5, 2.0): -1, 1e300: -1}
    for ratio, change in changes.items():
        rule = after_sampling(target=1.0, low=0.5, high=1.5)
        rule.update(14, ratio=ratio, learning_rate=0.1)
        assert rule.value == 4 + change, ratio


def test_default_thresholds_are_seven_and_thirteen_tenths_of_the_target():
    for ratio, change in {1.39: 1, 1.41: 0, 2.59: 0, 2.61: -1}.items():
        rule = after_sampling(target=2.0)
        rule.update(14, ratio=ratio, learning_rate=0.1)
        assert rule.value == 4 + change, ratio


def test_period_falls_to_one_and_no_further_without_a_minimum():
    rule = after_sampling()
    assert [period for _, period in drive(rule, [9.0] * 6, first_step=11)] == [3, 2, 1, 1, 1, 1]


def test_period_falls_to_the_minimum_and_no_further():
    rule = after_sampling(minimum=3)
    assert [period for _, period in drive(rule, [9.0] * 3, first_step=11)] == [3, 3, 3]


def test_period_grows_to_the_maximum_and_no_further():
    rule = after_sampling(maximum=6)
    assert [period for _, period in drive(rule, [0.0] * 4, first_step=11)] == [5, 6, 6, 6]


def test_period_grows_without_end_if_there_is_no_maximum():
    rule = after_sampling()
    assert drive(rule, [0.0] * 200, first_step=11)[-1][1] == 204


def test_target_does_not_move_after_sampling():
    rule = after_sampling(target=1.0)
    drive(rule, [0.1, 7.0, 3.0], first_step=11)
    assert rule.target == 1.0


# Proportional growth


def proportional(p, ratio, **arguments):
    """The period after a round with that ratio, for a target of 1."""
    rule = after_sampling(initial=p, growth="proportional", **arguments)
    rule.update(14, ratio=ratio, learning_rate=0.1)
    return rule.value


def test_period_is_multiplied_by_the_root_of_target_over_ratio():
    assert {ratio: proportional(100, ratio) for ratio in (0.25, 0.64, 0.5, 2.0, 1.5625, 4.0)} == {
        0.25: 200,
        0.64: 125,
        0.5: 141,
        2.0: 71,
        1.5625: 80,
        4.0: 50,
    }


def test_period_at_most_doubles_or_halves_however_far_the_ratio_is_from_its_target():
    assert [proportional(20, ratio) for ratio in (0.0, 5e-324, 0.01, 100.0, 1e300)] == [40, 40, 40, 10, 10]


def test_period_that_is_to_change_changes_by_at_least_a_step():
    assert [proportional(1, 0.69), proportional(2, 0.69), proportional(2, 1.31), proportional(3, 1.31)] == [2, 3, 1, 2]


def test_proportional_period_stays_between_low_and_high():
    assert [proportional(100, ratio) for ratio in (0.7, 1.0, 1.3)] == [100] * 3
    assert proportional(100, 0.5, low=0.4) == proportional(100, 2.0, high=2.5) == 100


def test_proportional_period_stays_within_its_bounds():
    assert proportional(8, 0.0, maximum=11) == 11
    assert proportional(8, 100.0, minimum=6) == 6
    assert proportional(1, 100.0) == 1


def test_period_that_doubles_forever_is_still_a_number_of_steps():
    rule = after_sampling(growth="proportional")
    for step in range(11, 111):
        rule.update(step, ratio=0.0, learning_rate=0.1)
    restored = after_sampling(growth="proportional")
    restored.load_state_dict(rule.state_dict())
    assert restored.value == rule.value == 2**63 - 1


def test_drift_that_grows_with_the_square_of_the_period_meets_its_target_in_one_round():
    rule = after_sampling(initial=8, growth="proportional")
    rule.update(20, ratio=0.4 * (rule.value / 8) ** 2, learning_rate=0.1)
    assert 0.4 * (rule.value / 8) ** 2 == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("power", [1, 2])
def test_proportional_rule_settles_where_the_additive_one_does_and_sooner(power):
    took = {}
    for growth in ("additive", "proportional"):
        rule = after_sampling(growth=growth)
        for count in range(200):
            ratio = 1e-3 * rule.value**power
            if 0.7 <= ratio <= 1.3:
                break
            rule.update(11 + count, ratio=ratio, learning_rate=0.1)
        took[growth] = count
        assert (0.7e3) ** (1 / power) <= rule.value <= (1.3e3) ** (1 / power) or (power, growth) == (1, "additive")
    assert took["proportional"] <= 9
    assert took["additive"] >= 22


# Samples of a rising learning rate


def sampled(rates, ratios, **arguments):
    """The rule after a sampling phase with these rates and ratios."""
    rule = AdaptivePeriod(sampling=1000, **arguments)
    rule.setup(None)
    for step, (rate, ratio) in enumerate(zip(rates, ratios, strict=True), start=1):
        rule.update(4 * step, ratio=ratio, learning_rate=rate)
    return rule


def test_samples_before_the_rate_has_risen_are_left_out_if_asked_for():
    rates, ratios = [0.02, 0.06, 0.1, 0.1, 0.1, 0.05], [1.0, 2.0, 5.0, 6.0, 7.0, 2.0]
    assert sampled(rates, ratios).target == pytest.approx(fmean(ratios))
    assert sampled(rates, ratios, skip_rising=True).target == pytest.approx(fmean(ratios[2:]))


def test_target_is_the_last_sample_while_the_rate_keeps_rising():
    rule = sampled([0.01, 0.02, 0.03], [1.0, 2.0, 3.0], skip_rising=True)
    assert rule.target == 3.0
    rule.update(1001, ratio=30.0, learning_rate=0.1)  # sampling is over: the rule responds
    assert (rule.target, rule.value) == (3.0, 3)


def test_rate_that_does_not_rise_has_all_of_its_samples_taken():
    for rates in ([0.1] * 4, [0.1, 0.08, 0.09, 0.01], [0.1, 0.1 * (1 + 1e-7), 0.1, 0.1]):
        assert sampled(rates, [1.0, 2.0, 3.0, 4.0], skip_rising=True).target == 2.5


def test_rule_restored_in_the_middle_of_a_warm_up_knows_how_high_the_rate_was():
    rule = sampled([0.05, 0.1], [1.0, 4.0], skip_rising=True)
    restored = AdaptivePeriod(skip_rising=True)
    restored.load_state_dict(rule.state_dict())
    restored.update(12, ratio=6.0, learning_rate=0.1)
    restored.update(16, ratio=2.0, learning_rate=0.08)
    assert restored.target == 4.0


def test_state_of_a_version_that_did_not_keep_the_highest_rate_is_taken():
    state = sampled([0.1, 0.1], [1.0, 3.0]).state_dict()
    del state["highest_rate"]
    rule = AdaptivePeriod()
    rule.load_state_dict(state)
    rule.update(12, ratio=5.0, learning_rate=0.2)
    assert rule.target == 3.0


# Warm-up


@pytest.mark.parametrize(("warmup", "total_steps"), [(5, None), (5, 100), (0.05, 100)])
def test_workers_average_after_every_step_of_the_warm_up_and_none_is_sampled(warmup, total_steps):
    sampling = 13 if isinstance(warmup, int) else 0.13
    rule = AdaptivePeriod(sampling=sampling, warmup=warmup)
    rule.setup(total_steps)
    assert rule.value == 1
    assert drive(rule, [9.0] * 4) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    rule.update(5, ratio=9.0, learning_rate=0.1)
    assert (rule.value, rule.target) == (4, None)
    assert drive(rule, [2.0, 4.0], first_step=6) == [(9, 4), (13, 4)]
    assert rule.target == 3.0


def test_warm_up_may_average_more_often_than_the_minimum():
    rule = AdaptivePeriod(initial=4, minimum=4, sampling=8, warmup=2)
    rule.setup(None)
    assert drive(rule, [1.0, 1.0]) == [(1, 1), (2, 4)]


def test_warm_up_in_steps_that_outlasts_a_sampled_share_leaves_the_target_to_the_round_after_it():
    rule = AdaptivePeriod(sampling=0.1, warmup=20)
    rule.setup(100)
    drive(rule, [5.0] * 20)
    assert (rule.value, rule.target) == (4, None)
    rule.update(24, ratio=2.0, learning_rate=0.1)
    assert (rule.value, rule.target) == (4, 2.0)
    rule.update(28, ratio=0.1, learning_rate=0.1)
    assert (rule.value, rule.target) == (5, 2.0)


# Rounds without information


def test_round_at_which_every_rate_is_zero_changes_nothing_but_the_step():
    for step, ratio in product([4, 8, 12, 20], [0.0, 1.0, 1e9]):
        rule = AdaptivePeriod(sampling=12, warmup=4)
        rule.setup(None)
        drive(rule, [1.0] * min(step, 4))
        if step > 12:
            drive(rule, [1.0, 3.0], first_step=5)
        before = rule.state_dict()
        rule.update(step, ratio=ratio, learning_rate=0.0)
        assert rule.state_dict() == {**before, "step": step}, ratio


def test_round_of_the_warm_up_ends_it_even_if_every_rate_is_zero():
    rule = AdaptivePeriod(sampling=12, warmup=2)
    rule.setup(None)
    rule.update(1, ratio=0.0, learning_rate=0.0)
    assert rule.value == 1
    rule.update(2, ratio=0.0, learning_rate=0.0)
    assert rule.value == 4


def test_first_usable_round_sets_the_target_if_none_was_sampled():
    rule = AdaptivePeriod(initial=4, sampling=3)
    rule.setup(None)
    rule.update(4, ratio=0.0, learning_rate=0.0)
    assert rule.target is None
    rule.update(8, ratio=2.0, learning_rate=0.1)
    assert (rule.target, rule.value) == (2.0, 4)
    rule.update(12, ratio=1.0, learning_rate=0.1)
    assert (rule.target, rule.value) == (2.0, 5)


# The length of the run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "sampling=0.25"),
        ({"sampling": 0.5}, "sampling=0.5"),
        ({"sampling": 100, "warmup": 0.1}, "warmup=0.1"),
    ],
)
def test_share_of_a_run_of_unknown_length_is_an_error_that_names_the_argument_and_the_fix(arguments, named):
    name = named.partition("=")[0]
    with pytest.raises(ValueError, match="share of all optimizer steps") as caught:
        AdaptivePeriod(**arguments).setup(None)
    message = str(caught.value)
    assert message.startswith(f"AdaptivePeriod({named})")
    assert "not known" in message
    assert f"{name}=1000" in message
    assert "Trainer(max_steps=...)" in message


def new_local_sgd(rule, total_steps):
    return LocalSGD(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1), rule, total_steps=total_steps)


def test_run_of_no_steps_is_a_run():
    for rule in (AdaptivePeriod(), ConstantPeriod(8, warmup=0.1)):
        rule.setup(0)
        assert rule.state_dict()["warmup_steps"] == 0


def test_warm_up_that_outlasts_sampling_leaves_the_target_to_the_first_round_after_it():
    for arguments in (
        {"warmup": 20, "sampling": 0.1},
        {"warmup": 20, "sampling": 0.2},
        {"warmup": 0.2, "sampling": 10},
        {"warmup": 0.2, "sampling": 0},
        {"warmup": 0.2, "sampling": 0.201},
        {"warmup": 20, "sampling": 0.0},
    ):
        local_sgd = new_local_sgd(AdaptivePeriod(**arguments), total_steps=100)
        rounds = [round_ for round_ in (local_sgd.step() for _ in range(24)) if round_ is not None]
        assert [round_.step for round_ in rounds] == [*range(1, 21), 24], arguments
        assert {round_.target for round_ in rounds} == {None}, arguments
        assert local_sgd.period.state_dict()["samples"] == 1, arguments
        local_sgd.period.update(28, ratio=1.0, learning_rate=0.1)
        assert local_sgd.period.state_dict()["samples"] == 1, arguments


def test_trial_of_a_few_steps_works_with_the_settings_of_a_long_run():
    for total_steps in (0, 1, 2, 5):
        rule = AdaptivePeriod(warmup=1000, sampling=0.25)
        local_sgd = new_local_sgd(rule, total_steps=total_steps)
        assert [local_sgd.step().step for _ in range(total_steps)] == [*range(1, total_steps + 1)]


def test_numbers_of_steps_need_no_length_of_the_run():
    rule = AdaptivePeriod(sampling=8, warmup=2)
    rule.setup(None)
    assert drive(rule, [1.0] * 4) == [(1, 1), (2, 4), (6, 4), (10, 4)]


def test_longer_run_resumed_from_a_checkpoint_does_not_sample_again():
    first = AdaptivePeriod(sampling=0.25)
    first.setup(40)
    drive(first, [1.0, 3.0, 1.0, 1.0])
    assert (first.target, first.value) == (2.0, 6)

    longer = AdaptivePeriod(sampling=0.25)
    longer.setup(4000)
    longer.load_state_dict(first.state_dict())
    longer.update(22, ratio=50.0, learning_rate=0.1)
    assert (longer.target, longer.value) == (2.0, 5)


def test_longer_run_resumed_from_a_checkpoint_does_not_warm_up_again():
    first = AdaptivePeriod(warmup=0.1, sampling=0.2)
    first.setup(20)
    drive(first, [1.0, 1.0, 1.0])

    longer = AdaptivePeriod(warmup=0.1, sampling=0.2)
    longer.setup(4000)
    longer.load_state_dict(first.state_dict())
    assert longer.value == 4


@pytest.mark.parametrize(
    ("bounds", "period"),
    [({}, 10), ({"maximum": 10}, 10), ({"maximum": 6}, 6), ({"initial": 12, "minimum": 12}, 12), ({"minimum": 2}, 10)],
)
def test_saved_period_beyond_the_bounds_of_the_restored_rule_is_moved_to_the_nearest(bounds, period):
    saved = after_sampling()
    drive(saved, [0.0] * 6, first_step=11)
    assert saved.value == 10
    restored = AdaptivePeriod(sampling=10, **bounds)
    restored.load_state_dict(saved.state_dict())
    assert (restored.value, restored.target) == (period, saved.target)


# For any configuration, and any numbers


@st.composite
def configurations(draw):
    minimum = draw(st.integers(1, 5))
    initial = minimum + draw(st.integers(0, 4))
    maximum = draw(st.none() | st.integers(initial, initial + 4))
    if draw(st.booleans()):
        sampling = draw(st.integers(0, 40))
        warmup = draw(st.integers(0, max(0, sampling - 1)))
    else:
        sampling = draw(st.floats(0.0, 1.0))
        warmup = draw(st.floats(0.0, sampling))
        assume(warmup < sampling or warmup == 0.0)
    return {
        "initial": initial,
        "sampling": sampling,
        # A product with a number close to zero is rounded, and may decide otherwise in other units.
        "low": draw(st.floats(0.0, 1.0).map(lambda low: low if low > 1e-6 else 0.0)),
        "high": draw(st.floats(1.0, 3.0)),
        "minimum": minimum,
        "maximum": maximum,
        "warmup": warmup,
        "growth": draw(st.sampled_from(["additive", "proportional"])),
        "skip_rising": draw(st.booleans()),
    }


@st.composite
def histories(draw, rates=(0.0, 0.001, 0.1), ratios=None):
    """Rounds that a rule may be shown: (step, ratio, learning rate), in order of the steps."""
    ratios = ratios if ratios is not None else st.floats(0.0, 10.0) | st.floats(0.0, 1e300)
    rounds = draw(st.lists(st.tuples(st.integers(1, 9), ratios, st.sampled_from(rates)), max_size=40))
    step = 0
    history = []
    for gap, ratio, rate in rounds:
        step += gap
        history.append((step, ratio, rate))
    return history


run_lengths = st.integers(1, 200)


def made(arguments, total_steps):
    rule = AdaptivePeriod(**arguments)
    rule.setup(total_steps)
    return rule


def show(rule, history):
    """The periods and targets after each round of ``history``."""
    seen = []
    for step, ratio, rate in history:
        rule.update(step, ratio=ratio, learning_rate=rate)
        seen.append((rule.value, rule.target))
    return seen


def steps_of(amount, total_steps):
    """As written: 0.29 of 100 steps is 29, although 0.29 * 100 < 29 in floating point."""
    return amount if isinstance(amount, int) else int(max(amount * total_steps, Fraction(repr(amount)) * total_steps))


@quick
@given(configurations(), run_lengths, histories())
def test_period_is_one_during_the_warm_up_and_within_its_bounds_after_it(arguments, total_steps, history):
    rule = made(arguments, total_steps)
    warmup = steps_of(arguments["warmup"], total_steps)
    for (step, _, _), (period, _) in zip(
        [(0, 0, 0), *history], [(rule.value, None), *show(rule, history)], strict=True
    ):
        assert isinstance(period, int)
        if step < warmup:
            assert period == 1
        else:
            assert arguments["minimum"] <= period
            assert arguments["maximum"] is None or period <= arguments["maximum"]


@quick
@given(configurations(), run_lengths, histories())
def test_period_changes_by_at_most_one_per_round_after_the_warm_up(arguments, total_steps, history):
    rule = made({**arguments, "growth": "additive"}, total_steps)
    warmup = steps_of(arguments["warmup"], total_steps)
    periods = [period for (step, _, _), (period, _) in zip(history, show(rule, history), strict=True) if step >= warmup]
    assert all(abs(after - before) <= 1 for before, after in pairwise(periods))


@quick
@given(configurations(), run_lengths, histories())
def test_proportional_period_moves_as_the_additive_one_does_and_at_least_as_far(arguments, total_steps, history):
    rule = made({**arguments, "growth": "proportional"}, total_steps)
    for step, ratio, rate in history:
        by_steps = made({**arguments, "growth": "additive"}, total_steps)
        by_steps.load_state_dict(rule.state_dict())
        before = by_steps.value
        for each in (rule, by_steps):
            each.update(step, ratio=ratio, learning_rate=rate)
        if before != 1 or step > steps_of(arguments["warmup"], total_steps):
            assert (rule.value - before) * (by_steps.value - before) >= 0
            assert abs(rule.value - before) >= abs(by_steps.value - before)
            assert (before - 1) / 2 <= rule.value <= max(2 * before, by_steps.value)


@quick
@given(configurations(), run_lengths, histories())
def test_period_is_the_initial_one_during_sampling(arguments, total_steps, history):
    rule = made(arguments, total_steps)
    warmup, sampling = (steps_of(arguments[name], total_steps) for name in ("warmup", "sampling"))
    for (step, _, _), (period, _) in zip(history, show(rule, history), strict=True):
        if warmup <= step <= sampling:
            assert period == arguments["initial"]


@quick
@given(configurations(), run_lengths, histories(ratios=st.floats(0.0, 1e6)))
def test_target_is_the_mean_of_the_usable_ratios_of_the_sampling_phase(arguments, total_steps, history):
    rule = made(arguments, total_steps)
    warmup, sampling = (steps_of(arguments[name], total_steps) for name in ("warmup", "sampling"))
    usable = [each for each in history if each[0] > warmup and each[2] > 0.0]
    usable = [each for each in usable if each[0] <= sampling] or usable[:1]
    if arguments["skip_rising"] and usable:
        highest = max(rate for _, _, rate in usable)
        usable = usable[[rate for _, _, rate in usable].index(highest) :]
    sampled = [ratio for _, ratio, _ in usable]
    show(rule, history)
    assert rule.target == (pytest.approx(fmean(sampled)) if sampled else None)


@quick
@given(
    st.lists(st.floats(0.0, 10.0), max_size=60),
    st.integers(1, 6),
    st.integers(4, 40),
    st.floats(0.0, 1.0),
    st.floats(1.0, 2.0),
)
def test_rule_takes_the_decisions_of_the_papers_pseudocode(ratios, p_init, sampling, low, high):
    rule = AdaptivePeriod(initial=p_init, sampling=max(sampling, p_init), low=low, high=high)
    rule.setup(None)
    rounds = drive(rule, ratios)

    # arXiv:2007.06134, with S_k / γ_k given
    expected = []
    p, cnt, c2, m, k = p_init, 0, 0.0, 0, 0
    remaining = list(ratios)
    while remaining:
        k += 1
        cnt += 1
        if cnt == p:
            r = remaining.pop(0)
            if k <= max(sampling, p_init):
                c2 = (m * c2 + r) / (m + 1)
                m += 1
            elif r < low * c2:
                p += 1
            elif r > high * c2:
                p = max(1, p - 1)
            cnt = 0
            expected.append((k, p))
    assert rounds == expected


@quick
@given(
    configurations(),
    run_lengths,
    histories(ratios=st.floats(0.0, 1e6, allow_subnormal=False).map(lambda ratio: ratio if ratio > 1e-6 else 0.0)),
    st.integers(-40, 40),
)
def test_ratios_in_other_units_give_the_same_periods(arguments, total_steps, history, exponent):
    factor = 2.0**exponent  # exact, so that rounding decides nothing
    scaled = [(step, ratio * factor, rate) for step, ratio, rate in history]
    ours = show(made(arguments, total_steps), history)
    theirs = show(made(arguments, total_steps), scaled)
    assert [period for period, _ in theirs] == [period for period, _ in ours]
    assert [target for _, target in theirs] == [None if target is None else target * factor for _, target in ours]


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("transport", [copy.deepcopy, through_json, through_torch])
@quick
@given(configurations(), run_lengths, run_lengths, histories(), st.data())
def test_restored_rule_continues_as_if_there_had_been_no_interruption(
    transport, arguments, total_steps, other_total_steps, history, data
):
    cut = data.draw(st.integers(0, len(history)))
    uninterrupted = made(arguments, total_steps)
    expected = show(uninterrupted, history)[cut:]

    interrupted = made(arguments, total_steps)
    show(interrupted, history[:cut])
    restored = made(arguments, other_total_steps)
    restored.load_state_dict(transport(interrupted.state_dict()))
    assert (restored.value, restored.target) == (interrupted.value, interrupted.target)
    assert show(restored, history[cut:]) == expected
    assert restored.state_dict() == uninterrupted.state_dict()


@quick
@given(configurations(), run_lengths, histories())
def test_saved_state_does_not_change_with_the_rule(arguments, total_steps, history):
    rule = made(arguments, total_steps)
    state = rule.state_dict()
    before = dict(state)
    show(rule, history)
    assert state == before


@quick
@given(configurations(), run_lengths, histories(), histories())
def test_copies_decide_alike_and_share_nothing(arguments, total_steps, history, other_history):
    original = made(arguments, total_steps)
    duplicate = copy.deepcopy(original)
    pickled = pickle.loads(pickle.dumps(original))
    expected = show(original, history)
    show(made(arguments, total_steps), other_history)  # another worker's rule, of another run
    assert show(duplicate, history) == expected
    assert show(pickled, history) == expected


# What the constructor takes


def test_arguments_at_the_edge_of_what_is_allowed_make_a_rule():
    for arguments in (
        {"initial": 1},
        {"initial": 3, "minimum": 3, "maximum": 3},
        {"low": 0, "high": 1},
        {"low": 1.0, "high": 1.0},
        {"sampling": 0},
        {"sampling": 0.0},
        {"sampling": 1.0},
        {"sampling": 1, "warmup": 0},
        {"warmup": 9, "sampling": 10},
        {"warmup": 1000, "sampling": 0.25},  # comparable only when the run's length is known
    ):
        assert AdaptivePeriod(**arguments).value == arguments.get("initial", 4)


@given(configurations())
@quick
def test_repr_is_the_call_that_makes_the_rule(arguments):
    rule = AdaptivePeriod(**arguments)
    again = eval(repr(rule), {"AdaptivePeriod": AdaptivePeriod})
    assert repr(again) == repr(rule)
    assert all(f"{name}={value!r}" in repr(rule) for name, value in arguments.items())
