"""Which fragment leaves and lands at which step: plain arithmetic."""

import pytest

from lightning_adpsgd.rounds.schedule import Schedule, StaggeredRounds, WholeRounds


def sent(schedule: Schedule, periods: list[int]) -> list[int]:
    """The steps at which fragments leave, where ``periods`` says which period is in force at each step."""
    steps, latest = [], 0
    for step, period in enumerate(periods, 1):
        if schedule.is_due(step, latest, period):
            steps.append(step)
            latest = step
    return steps


def test_whole_rounds_leave_every_p_steps_and_follow_the_period_at_once():
    assert sent(WholeRounds(), [4] * 13) == [4, 8, 12]
    assert sent(WholeRounds(), [4] * 4 + [3] * 6 + [1] * 3) == [4, 7, 10, 11, 12, 13]
    assert sent(WholeRounds(), [1] * 3) == [1, 2, 3]


def test_fragments_leave_at_every_step_once_a_period_has_passed():
    assert sent(StaggeredRounds(), [4] * 9) == [4, 5, 6, 7, 8, 9]
    assert sent(StaggeredRounds(), [1] * 3) == [1, 2, 3]
    assert sent(StaggeredRounds(), [9] * 8) == []


def test_a_round_has_one_fragment_or_one_per_step_of_its_period():
    assert [WholeRounds().fragments(period) for period in (1, 4, 9)] == [1, 1, 1]
    assert [StaggeredRounds().fragments(period) for period in (1, 4, 9)] == [1, 4, 9]


@pytest.mark.parametrize("kind", [WholeRounds, StaggeredRounds])
def test_a_mean_lands_before_the_next_round_of_its_elements_leaves(kind):
    assert [kind().delay(period) for period in (1, 2, 9)] == [0, 0, 0]
    assert [kind(overlap=3).delay(period) for period in (1, 2, 4, 9)] == [0, 1, 3, 3]
