import random

import pytest

from benchmarks.frame.turns import median, median_interval, quartiles, ratios, speed, turns


def test_contenders_take_turns():
    assert list(turns("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_contenders_are_taken_from_an_iterator_in_every_turn():
    assert [contender for _, contender in turns(iter("AB"), 2)] == ["A", "B", "A", "B"]


def test_median_is_the_value_in_the_middle():
    assert median([5, 1, 2]) == 2.0
    assert median(iter([1.0, 2.0])) == 1.5


def test_quartiles_hold_the_middle_half():
    assert quartiles([1, 2, 3, 4, 5]) == (2, 4)
    assert quartiles([7]) == (7, 7)


@pytest.mark.parametrize("function", [median, quartiles, median_interval])
def test_nothing_has_no_median(function):
    with pytest.raises(ValueError, match="expected at least one value, got none"):
        function([])


# The places are those of published tables of the sign test's confidence intervals.
@pytest.mark.parametrize(("count", "place"), [(1, 0), (2, 0), (5, 0), (6, 0), (9, 1), (10, 1), (20, 5), (30, 9)])
def test_interval_leaves_out_as_many_values_as_the_binomial_distribution_allows(count, place):
    shuffled = random.Random(0).sample(range(count), count)
    assert median_interval(shuffled) == (place, count - 1 - place)


def test_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    intervals = [median_interval([draw.gauss(0, 1) for _ in range(15)]) for _ in range(1000)]
    assert sum(low <= 0 <= high for low, high in intervals) >= 940


def test_ratios_and_speeds_are_taken_within_a_turn():
    assert ratios([2.0, 40.0, 300.0], [1.0, 10.0, 100.0]) == [2.0, 4.0, 3.0]
    assert speed([1.0, 10.0, 100.0], [2.0, 40.0, 300.0]) == 1 / 3
    assert speed(None, [1.0]) is None
