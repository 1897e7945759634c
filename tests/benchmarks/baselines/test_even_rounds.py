import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.baselines import EvenRounds
from lightning_adpsgd import ADPSGDStrategy, LocalSGD
from tests.training import fit, seeded


def rounds_of(period, total_steps, start=0):
    """The steps at which a strategy averages, if nothing else triggers a round."""
    steps, step = [], start
    while step + period.value <= total_steps:
        step += period.value
        period.update(step, ratio=1.0, learning_rate=0.1)
        steps.append(step)
    return steps


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rounds_are_as_many_as_asked_for_and_even_and_the_last_is_at_the_end(data):
    total = data.draw(st.integers(1, 2000))
    rounds = data.draw(st.integers(1, total))
    period = EvenRounds(rounds)
    period.setup(total)
    steps = rounds_of(period, total)
    assert steps == [n * total // rounds for n in range(1, rounds + 1)]
    periods = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    assert steps[-1] == total
    assert max(periods) - min(periods) <= 1


@given(st.integers(1, 400), st.data())
def test_schedule_continues_where_it_was_saved(total, data):
    rounds = data.draw(st.integers(1, total))
    whole, first, second = EvenRounds(rounds), EvenRounds(rounds), EvenRounds(rounds)
    for period in (whole, first, second):
        period.setup(total)
    before = rounds_of(first, data.draw(st.integers(0, total)))
    second.load_state_dict(first.state_dict())
    assert before + rounds_of(second, total, start=before[-1] if before else 0) == rounds_of(whole, total)


def test_state_from_before_the_length_was_known_keeps_the_length():
    period = EvenRounds(5)
    period.setup(50)
    period.load_state_dict(EvenRounds(5).state_dict())
    assert rounds_of(period, 50) == [10, 20, 30, 40, 50]


def test_run_that_is_made_longer_keeps_the_saved_schedule():
    saved, longer = EvenRounds(3), EvenRounds(3)
    saved.setup(10)
    before = rounds_of(saved, 6)
    longer.setup(20)
    longer.load_state_dict(saved.state_dict())
    assert before + rounds_of(longer, 20, start=6) == [3, 6, 10, 13, 16, 20]


def test_round_that_comes_late_does_not_shift_those_after_it():
    period = EvenRounds(5)
    period.setup(50)
    period.update(10, ratio=1.0, learning_rate=0.1)
    # A validation at step 13 restarts the count, so that the round of step 20 takes place at 23.
    period.update(23, ratio=1.0, learning_rate=0.1)
    assert rounds_of(period, 50, start=23) == [30, 40, 50]


def test_run_that_outlives_its_length_keeps_the_pace():
    period = EvenRounds(3)
    period.setup(10)
    assert rounds_of(period, 20) == [3, 6, 10, 13, 16, 20]


@pytest.mark.parametrize(
    ("act", "error", "named"),
    [
        (lambda: EvenRounds(0), ValueError, r"EvenRounds\(rounds=0\): expected an int of at least 1"),
        (lambda: EvenRounds(2.0), TypeError, "expected an int of at least 1, got float"),
        (lambda: EvenRounds(5).setup(None), ValueError, r"EvenRounds\(rounds=5\).*not known.*Trainer\(max_steps="),
        (lambda: EvenRounds(5).setup(4), ValueError, r"rounds=5\) in a run of 4.*Pass rounds=4 or less"),
        (lambda: EvenRounds(5).load_state_dict({"step": 3}), ValueError, "no 'total_steps'"),
        (lambda: EvenRounds(5).load_state_dict({"step": -1, "total_steps": 9}), ValueError, "step=-1"),
        (lambda: EvenRounds(5).load_state_dict({"step": 1, "total_steps": 3}), ValueError, "in a run of 3"),
    ],
)
def test_wrong_schedule_is_refused_with_what_to_change(act, error, named):
    with pytest.raises(error, match=named):
        act()


def fit_evenly(rounds, options):
    fitted, kept = fit(ADPSGDStrategy(EvenRounds(rounds), **options), seeded(), max_epochs=2)
    return fitted.global_step, [(round_.step, round_.trigger) for round_ in kept]


@pytest.mark.workers
@pytest.mark.parametrize("options", [{}, {"overlap": 1}], ids=["plain", "overlap"])
def test_fit_has_the_rounds_it_was_asked_for(pool, options):
    for steps, rounds in pool.run_trainer(fit_evenly, 7, options):
        assert steps == 32
        assert [step for step, _ in rounds] == [n * 32 // 7 for n in range(1, 8)]


def test_plain_loop_can_have_even_rounds():
    parameter = nn.Parameter(torch.ones(1))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=0.1), EvenRounds(3), total_steps=10)
    rounds = [local_sgd.step() for _ in range(10)]
    assert [round_.step for round_ in rounds if round_ is not None] == [3, 6, 10]
