import pytest

from benchmarks.paper.against_bytes import (
    COLUMNS,
    Part,
    Point,
    best,
    byte_share,
    frontier,
    goals,
    missing,
    points,
    rows,
)
from benchmarks.paper.plan import ADPSGD, ADPSGD_INT4, BYTES, FASTER, FULL, POWERSGD, QSGD, Study
from tests.benchmarks.paper.samples import TASK, a_result, outcomes_of

STUDY = Study("bytes", "Bytes", [TASK], BYTES, 2, more={TASK.name: [*FASTER[FULL], *FASTER[ADPSGD_INT4]]})


def of(results):
    """Results by contender and seed, each as (final loss, accuracy, bytes)."""
    return {
        contender: [a_result(loss, right, sent) for loss, right, sent in by_seed]
        for contender, by_seed in results.items()
    }


def part_of(folder, results):
    return Part(STUDY, outcomes_of(folder, of(results)))


ENDS_ALIKE = {
    FULL: [(1.00, 0.600, 1000), (1.02, 0.610, 1000)],
    ADPSGD_INT4: [(1.01, 0.598, 50), (1.02, 0.608, 50)],
    POWERSGD[0]: [(1.10, 0.590, 40), (1.11, 0.600, 40)],
    POWERSGD[1]: [(1.05, 0.595, 100), (1.06, 0.606, 100)],
}


def verdicts(folder, changes=()):
    return [goal.verdict for goal in goals([part_of(folder, {**ENDS_ALIKE, **dict(changes)})])]


def test_goals_are_reached_by_matching_full_communication_with_a_twentieth_of_the_bytes(tmp_path):
    assert verdicts(tmp_path) == ["reached"] * 4


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(1.04, 0.598, 50), (1.05, 0.608, 50)], ["missed", "reached", "reached", "reached"]),  # the loss
        ([(1.01, 0.592, 50), (1.02, 0.602, 50)], ["missed", "missed", "reached", "missed"]),  # the accuracy
        ([(1.01, 0.598, 60), (1.02, 0.608, 60)], ["reached", "reached", "missed", "reached"]),  # the bytes
        ([(1.01, 0.594, 30), (1.02, 0.603, 30)], ["reached", "missed", "reached", "reached in 1 of 2 comparisons"]),
    ],
)
def test_each_goal_can_be_missed_by_itself(tmp_path, runs, expected):
    assert verdicts(tmp_path, {ADPSGD_INT4: runs}.items()) == expected


def test_goals_without_runs_are_not_measured(tmp_path):
    for results in ({}, {FULL: ENDS_ALIKE[FULL]}, {ADPSGD_INT4: ENDS_ALIKE[ADPSGD_INT4]}):
        found = goals([part_of(tmp_path / str(len(results)), results)])
        assert {goal.verdict for goal in found} == {"not measured"}
    assert {goal.verdict for goal in goals([])} == {"not measured"}


def test_one_seed_has_no_spread_to_be_judged_by(tmp_path):
    results = {contender: by_seed[:1] for contender, by_seed in ENDS_ALIKE.items()}
    assert goals([part_of(tmp_path, results)])[0].verdict == "not measured"


def test_goals_hold_in_every_study(tmp_path):
    other = {**ENDS_ALIKE, ADPSGD_INT4: [(1.2, 0.4, 70), (1.2, 0.4, 70)]}
    parts = [part_of(tmp_path / "first", ENDS_ALIKE), part_of(tmp_path / "second", other)]
    assert [goal.verdict for goal in goals(parts)] == [
        "reached in 1 of 2 tasks",
        "missed",
        "reached in 1 of 2 tasks",
        "reached in 1 of 2 comparisons",
    ]


def test_powersgd_that_sends_less_does_not_count(tmp_path):
    claim = goals([part_of(tmp_path, ENDS_ALIKE)])[3]
    assert claim.sentences[0].startswith("Net, against PowerSGD, rank 1, with 1.25 of its bytes: accuracy +0.80")
    assert claim.sentences[0].endswith("It sends less, so this does not count.")
    assert claim.sentences[1].endswith("(higher with 2 of 2 seeds): reached.")


def test_each_side_is_taken_at_the_rate_that_gives_it_the_smallest_loss(tmp_path):
    slow, fast = FASTER[ADPSGD_INT4]
    results = {ADPSGD_INT4: [(1.4, 0.5, 50)] * 2, slow: [(1.1, 0.58, 50)] * 2, fast: ENDS_ALIKE[ADPSGD_INT4]}
    part = part_of(tmp_path, {**ENDS_ALIKE, **results})
    assert best(part, TASK, ADPSGD_INT4) == fast
    assert best(part, TASK, FULL) == FULL
    assert best(part, TASK, QSGD) is None
    first = goals([part])[0]
    assert first.verdict == "reached"
    assert first.sentences[0].startswith(f"Net (rates × {fast.rate:g} and × 1): final loss")


def test_rows_have_bytes_spreads_and_differences_within_seeds(tmp_path):
    part = part_of(tmp_path, ENDS_ALIKE)
    by_title = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows(part, TASK)}
    assert [*by_title] == [FULL.title, POWERSGD[0].title, POWERSGD[1].title, ADPSGD_INT4.title]
    row = by_title[ADPSGD_INT4.title]
    assert row["bytes ÷ full"] == "0.050"
    assert row["accuracy [%]"] == "60.30 ± 0.71"
    assert row["loss − full"] == "+0.0050 ± 0.0071 (higher with 1 of 2 seeds)"
    assert row["accuracy − full [points]"] == "-0.20 ± 0.00 (lower with 2 of 2 seeds)"
    assert by_title[FULL.title]["loss − full"] == ""


def test_without_full_communication_there_is_nothing_to_relate_bytes_to(tmp_path):
    part = part_of(tmp_path, {ADPSGD: [(1.0, 0.6, 100)]})
    assert byte_share(part.outcomes, TASK, ADPSGD) is None
    assert points(part, TASK) == []
    (row,) = rows(part, TASK)
    assert row[2] == row[5] == row[6] == ""


def test_frontier_has_the_points_more_accurate_than_all_that_send_as_little():
    some = [Point(FULL, share, right, 0.1) for share, right in [(1, 63), (0.5, 64), (0.1, 60), (0.1, 61), (0.2, 60.5)]]
    assert [(each.share, each.accuracy) for each in frontier(some)] == [(0.1, 61), (0.5, 64)]
    assert frontier([]) == []


def test_missing_runs_are_counted_by_contender(tmp_path):
    results = {FULL: [a_result(), None], QSGD: [None, None]}
    said = missing([Part(STUDY, outcomes_of(tmp_path, results))])
    assert said == "**3 of the 4 runs of this section are not done yet** (full communication: 1; QSGD, 8 bits: 2)."
    assert missing([Part(STUDY, outcomes_of(tmp_path, {FULL: [a_result()]}))]) == ""
