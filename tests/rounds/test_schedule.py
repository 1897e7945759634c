"""At which step each fragment is sent and adopted: plain arithmetic."""

import pytest

from lightning_adpsgd.rounds.schedule import DriftClock, Schedule, StaggeredRounds, WholeRounds


def sent(schedule: Schedule, periods: list[int]) -> list[int]:
    """The steps at which fragments are sent; ``periods`` has the period in force at each step."""
    steps, latest = [], 0
    for step, period in enumerate(periods, 1):
        if schedule.is_due(step, latest, period):
            steps.append(step)
            latest = step
    return steps


def test_whole_rounds_are_sent_every_p_steps_and_follow_the_period_at_once():
    assert sent(WholeRounds(), [4] * 13) == [4, 8, 12]
    assert sent(WholeRounds(), [4] * 4 + [3] * 6 + [1] * 3) == [4, 7, 10, 11, 12, 13]
    assert sent(WholeRounds(), [1] * 3) == [1, 2, 3]


def test_fragments_are_sent_at_every_step_once_a_period_has_passed():
    assert sent(StaggeredRounds(), [4] * 9) == [4, 5, 6, 7, 8, 9]
    assert sent(StaggeredRounds(), [1] * 3) == [1, 2, 3]
    assert sent(StaggeredRounds(), [9] * 8) == []


def test_a_round_has_one_fragment_or_one_per_step_of_its_period():
    assert [WholeRounds().fragments(period) for period in (1, 4, 9)] == [1, 1, 1]
    assert [StaggeredRounds().fragments(period) for period in (1, 4, 9)] == [1, 4, 9]


@pytest.mark.parametrize("kind", [WholeRounds, StaggeredRounds])
def test_a_mean_is_adopted_before_its_elements_are_sent_again(kind):
    assert [kind().delay(period) for period in (1, 2, 9)] == [0, 0, 0]
    assert [kind(overlap=3).delay(period) for period in (1, 2, 4, 9)] == [0, 1, 3, 3]


def test_a_fragment_has_drifted_since_its_elements_were_last_sent():
    clock = DriftClock()
    clock.begin(4)
    assert [clock.send(step) for step in (4, 5, 6, 7)] == [4, 5, 6, 7]  # since all workers were the same
    clock.begin(4)
    assert [clock.send(step) for step in (8, 9, 10, 11)] == [4, 4, 4, 4]
    clock.begin(2)  # the middles of the halves were in fragments 1 and 3
    assert [clock.send(step) for step in (12, 13)] == [3, 2]
    clock.begin(3)  # a round that is not sent completely does not count
    clock.send(14)
    clock.begin(2)
    assert [clock.send(step) for step in (16, 17)] == [4, 4]
    clock.restart()
    clock.begin(1)
    assert clock.send(3) == 3


def test_what_has_drifted_for_longest_was_sent_first_or_is_still_to_be_sent():
    clock = DriftClock()
    assert clock.longest(7) == 7
    clock.begin(4)
    for step in (7, 8, 9, 10):
        assert clock.longest(step) == step
        clock.send(step)
    assert clock.longest(10) == 3
    clock.begin(4)
    assert clock.longest(11) == 4
    clock.send(11)
    assert clock.longest(11) == 3
    assert clock.longest(14) == 6
    clock.restart()
    assert clock.longest(2) == 2
    clock.begin(1, delay=2)
    clock.send(4)
    assert [clock.longest(step) for step in (4, 5, 6, 7)] == [0, 0, 2, 3]  # until it has come when it was to come
