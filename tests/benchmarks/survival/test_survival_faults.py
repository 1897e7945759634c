from itertools import islice
from statistics import fmean

from benchmarks.survival.faults import KINDS, draws


def test_same_seed_draws_the_same_faults_and_another_seed_others():
    def first(seed):
        return list(islice(draws(seed, 15.0, [*KINDS], 4), 50))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_faults_are_as_far_apart_as_asked_for_and_strike_everybody_and_everything():
    drawn = list(islice(draws(0, 15.0, [*KINDS], 4), 4000))
    assert 14 < fmean(each.wait_seconds for each in drawn) < 16
    for start in range(0, 4000, 4):
        assert {each.kind for each in drawn[start : start + 4]} == set(KINDS)
    for kind in KINDS:
        assert 900 < sum(each.kind == kind for each in drawn[::4]) * 4 < 1100
    for worker in range(4):
        assert 900 < sum(each.order[0] == worker for each in drawn) < 1100
    assert all(sorted(each.order) == [0, 1, 2, 3] for each in drawn)


def test_only_the_kinds_that_are_asked_for_are_drawn():
    assert {each.kind for each in islice(draws(0, 1.0, ["stop", "cut"], 3), 100)} == {"stop", "cut"}
