import pytest

from lightning_adpsgd.elastic.admission import warn_of_twins
from lightning_adpsgd.elastic.plan import Member, MemberState, plan_of


def state(**changes):
    usual = {
        "committed": 3,
        "staged": 0,
        "steps": 16,
        "local_steps": 4,
        "trigger": "period",
        "fingerprint": 7,
        "tensors": 2,
        "finite": True,
        "connection": "9 a b c",
        "writer": "b",
        "period": 4,
        "rule": {},
    }
    return MemberState(**{**usual, **changes})


def plans(*states):
    names = "abcdef"[: len(states)]
    quorum = [Member(name, f"host-{name}:1", each) for name, each in zip(names, states, strict=True)]
    return [plan_of(quorum, name) for name in names]


def test_workers_that_are_at_the_same_point_are_all_averaged_over_the_connection_they_have():
    for rank, plan in enumerate(plans(state(), state(), state())):
        assert (plan.rank, plan.contributors, plan.receivers, plan.round) == (rank, (0, 1, 2), (), 4)
        assert plan.is_comparable
        assert plan.keeps_connection
        assert not plan.commits_staged


@pytest.mark.parametrize("connection", ["", "8 a b", "8 a b c d"])
def test_a_connection_among_other_workers_or_none_is_made_anew(connection):
    assert not plans(state(), state(), state(connection=connection))[0].keeps_connection
    assert not plans(*[state(connection=connection)] * 3)[0].keeps_connection


def test_the_first_worker_gives_its_state_to_the_others_at_the_start():
    plan = plans(*[state(committed=0, steps=0, local_steps=0)] * 3)[0]
    assert (plan.leader, plan.contributors, plan.receivers, plan.round) == (0, (), (1, 2), 1)
    assert not plan.is_comparable


def test_a_worker_that_joins_receives_and_is_not_averaged():
    plan = plans(state(committed=0, steps=0, local_steps=0, period=9), state(), state())[0]
    assert (plan.leader, plan.contributors, plan.receivers) == (1, (1, 2), (0,))
    assert plan.of_leader.period == 4
    assert plan.steps == 16
    assert plan.is_comparable


def test_a_worker_in_doubt_commits_what_it_has_staged_if_another_has_committed_it():
    settled = plans(state(committed=4, local_steps=1), state(staged=4), state(staged=4))
    assert [plan.commits_staged for plan in settled] == [False, True, True]
    assert settled[0].contributors == (0, 1, 2)
    assert settled[0].round == 5


def test_a_staged_round_is_discarded_by_all_if_nobody_is_known_to_have_committed_it():
    settled = plans(state(staged=4), state(staged=4), state(staged=4))
    assert not any(plan.commits_staged for plan in settled)
    assert settled[0].round == 4


def test_a_round_staged_long_ago_is_not_committed():
    plan = plans(state(committed=6), state(committed=3, staged=4))[1]
    assert not plan.commits_staged
    assert plan.receivers == (1,)


def test_a_worker_that_has_missed_one_round_is_averaged_and_one_that_has_missed_two_receives():
    plan = plans(state(committed=5), state(committed=4), state(committed=3))[0]
    assert plan.contributors == (0, 1)
    assert plan.receivers == (2,)


def test_a_worker_in_doubt_does_not_lead_because_its_rule_has_not_seen_the_latest_round():
    assert plans(state(staged=4), state(committed=4), state(committed=4))[0].leader == 1


def test_a_round_after_unequal_numbers_of_steps_is_not_shown_to_the_rule():
    assert not plans(state(), state(local_steps=5))[0].is_comparable
    assert not plans(state(local_steps=5), state(local_steps=5))[0].is_comparable
    assert not plans(state())[0].is_comparable


def test_a_round_for_the_end_of_training_on_one_worker_is_not_shown_to_the_rule_of_any():
    for plan in plans(state(), state(trigger="train_end")):
        assert plan.trigger == "train_end"
        assert not plan.is_comparable


@pytest.mark.parametrize("change", [{"finite": False}, {"fingerprint": 8}])
def test_a_worker_that_cannot_be_averaged_is_left_out_and_knows_it(change):
    left_out = plans(state(), state(**change), state())
    assert [plan.rank for plan in left_out] == [0, None, 1]
    assert [member.name for member in left_out[0].members] == ["a", "c"]


def test_a_worker_that_has_diverged_does_not_decide_which_tensors_are_averaged():
    left_out = plans(state(committed=9, finite=False, fingerprint=8), state(), state())
    assert [plan.rank for plan in left_out] == [None, 0, 1]


def test_the_worker_that_writes_goes_on_to_write_until_it_is_lost():
    assert {plan.writer for plan in plans(state(), state(), state())} == {"b"}
    assert {plan.writer for plan in plans(state(writer="z"), state(writer="z"))} == {"a"}
    # What the furthest worker knows counts, not what one says that starts, or that has been away.
    late, started = state(committed=1, writer="a"), state(committed=0, writer="")
    assert {plan.writer for plan in plans(late, state(writer="c"), started)} == {"c"}
    assert {plan.writer for plan in plans(started, started)} == {"a"}


def test_two_processes_that_are_one_worker_are_warned_of_once(caplog):
    names = ["worker-000000:1", "worker-000001:2", "worker-000001:3"]
    plan = plan_of([Member(name, "host:1", state()) for name in names], names[0])
    warned_of = set()
    for _ in range(2):
        warn_of_twins(plan, warned_of)
    (record,) = caplog.records
    assert "2 processes are worker 'worker-000001', and train on the same share" in record.getMessage()
    warn_of_twins(plans(state(), state())[0], set())
    assert len(caplog.records) == 1
