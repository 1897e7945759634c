import pytest

from benchmarks.paper.plan import ADPSGD, FULL, PAPER, QSGD
from benchmarks.paper.results import by_quarter, final_loss, in_words, quarters_over_seeds, spread, until
from tests.benchmarks.paper.samples import TASK, a_result, outcomes_of


def test_spread_is_the_sample_deviation_and_one_run_has_none():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([1.0, 2.0, 3.0]).text(1, 10, sign=True) == "+20.0 ± 10.0"
    assert spread([2.0]).text(2) == "2.00"
    with pytest.raises(ValueError, match="expected at least one value"):
        spread([])


def test_differences_are_taken_within_a_seed_that_both_have(tmp_path):
    results = {FULL: [a_result(1.0), a_result(2.0), None], QSGD: [a_result(1.5), None, a_result(9.0)]}
    outcomes = outcomes_of(tmp_path, results)
    assert outcomes.differences(TASK, QSGD, FULL, final_loss) == [0.5]
    assert outcomes.differences(TASK, ADPSGD, FULL, final_loss) == []
    assert [(run.contender, run.seed) for run in outcomes.missing] == [(FULL, 2), (QSGD, 1)]
    assert outcomes.known(TASK, PAPER) == [FULL, QSGD]
    assert outcomes.of(TASK, FULL, final_loss) == (1.5, pytest.approx(0.5**0.5))


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-1.0, -2.0, 0.5], "-0.83 ± 1.26 (lower with 2 of 3 seeds)"),
        ([1.0, 2.0], "+1.50 ± 0.71 (higher with 2 of 2 seeds)"),
        ([0.25], "+0.25 (higher with 1 of 1 seeds)"),
    ],
)
def test_differences_say_how_many_seeds_agree(differences, words):
    assert in_words(differences, 2) == words


def test_loss_is_reached_on_a_straight_line_between_epochs():
    result = a_result(curve=[(1, 3.0, 100, None), (2, 1.0, 300, None), (3, 2.0, 500, None)])
    assert until(result, 3.5) == (1, 100)
    assert until(result, 1.5) == (1.75, 250)
    assert until(result, 1.0) == (2, 300)
    assert until(result, 0.9) is None


def test_quarters_hold_the_rounds_that_the_period_triggered():
    # At steps 5, 10, …, 40; the last one is not the period's.
    ratios = [1.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 100.0]
    result = a_result(had=8, ratios=ratios)
    assert by_quarter(result, "ratio") == [2.0, 5.5, 7.5, 9.0]
    rare = a_result(had=2, ratios=[1.0, 2.0])  # at steps 20 and 40
    assert by_quarter(rare, "ratio") == [None, 1.0, None, None]
    assert quarters_over_seeds({0: result, 1: rare}, "ratio") == [None, 3.25, None, None]
