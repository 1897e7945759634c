"""Real processes, which meet at torchft's lighthouse and are killed by SIGKILL."""

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from tests.elastic import member
from tests.elastic.crowd import Crowd, Lighthouse

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")
pytestmark = pytest.mark.workers


@pytest.fixture
def lighthouse() -> Iterator[Lighthouse]:
    lighthouse = Lighthouse()
    yield lighthouse
    lighthouse.kill()


@pytest.fixture
def crowd(lighthouse: Lighthouse) -> Iterator[Crowd]:
    crowd = Crowd(lighthouse.address)
    yield crowd
    crowd.end()


def gather(crowd, workers, **arguments):
    crowd.start(*workers, start_workers=len(workers), **arguments)
    return crowd.do("join", *workers)


def same(answers):
    """Whether all hold the same: weights, rule and steps. BatchNorm's count of batches is an int: it has no mean."""
    first, *others = answers.values()
    return all(
        torch.equal(a, b)
        for other in others
        for a, b in zip(first["weights"], other["weights"], strict=True)
        if a.is_floating_point()
    ) and all(other["rule"] == first["rule"] and other["steps"] == first["steps"] for other in others)


@pytest.mark.parametrize("period", [3, None])
@pytest.mark.parametrize("workers", [2, 3])
def test_without_faults_the_result_is_that_of_local_sgd_bit_for_bit(pool, crowd, workers, period):
    gather(crowd, range(workers), period=period)
    crowd.do(40, *range(workers))
    elastic = crowd.do("average", *range(workers))
    plain = pool.run(member.plain, 40, period, workers=workers)
    for rank in range(workers):
        assert all(map(torch.equal, elastic[rank]["weights"], plain[rank]["weights"]))
        assert all(map(torch.equal, elastic[rank]["momentum"], plain[rank]["momentum"]))
        assert elastic[rank]["rule"] == plain[rank]["rule"]
        measures = [
            [(r.step, r.trigger, r.local_steps, r.period, r.variance, r.ratio, r.target) for r in each["records"]]
            for each in (elastic[rank], plain[rank])
        ]
        assert measures[0] == measures[1]


def test_workers_start_from_the_first_ones_weights(crowd):
    answers = gather(crowd, [0, 1, 2])
    assert same(answers)
    assert torch.equal(answers[2]["weights"][0], member.network(0).state_dict()["0.weight"])


def test_the_others_go_on_after_a_worker_is_killed_between_rounds(crowd):
    gather(crowd, [0, 1, 2, 3])
    crowd.do(10, 0, 1, 2, 3)
    crowd.kill(3)
    began = time.monotonic()
    answers = crowd.do(2, 0, 1, 2)
    assert time.monotonic() - began < 15
    assert same(answers)
    assert [record.step for record in answers[0]["records"]] == [4, 8, 12]
    assert answers[0]["taken"] == answers[0]["steps"] == 12
    answers = crowd.do(4, 0, 1, 2)
    assert same(answers)
    assert [record.step for record in answers[0]["records"]] == [4, 8, 12, 16]


@pytest.mark.parametrize("method", ["sum_", "launch_mean"])
def test_a_round_that_loses_a_worker_overwrites_nothing_and_loses_no_step(crowd, method):
    gather(crowd, [0, 1, 2, 3])
    crowd.do(7, 0, 1, 2, 3)
    crowd.do(("kill", method), 3)
    before = crowd.do("look", 0, 1, 2)
    crowd.send(1, 0, 1, 2, 3)
    after = crowd.receive(0, 1, 2, seconds=10)  # they notice at once, not after a timeout
    crowd.processes[3].join(10)
    assert crowd.processes[3].exitcode == -9
    for worker in (0, 1, 2):
        assert [record.step for record in after[worker]["records"]] == [4]
        alone, _ = trained_on(before[worker], worker, 1)
        assert all(map(torch.equal, after[worker]["weights"], alone))
    answers = crowd.do(1, 0, 1, 2)
    assert same(answers)
    assert [record.step for record in answers[0]["records"]] == [4, 9]
    assert answers[0]["records"][-1].local_steps == 5
    assert same(crowd.do(4, 0, 1, 2))


def test_a_worker_killed_while_it_waits_for_a_quorum_holds_up_the_others_for_a_few_seconds(lighthouse, crowd):
    gather(crowd, [0, 1, 2])
    crowd.do(3, 0, 1, 2)
    crowd.send(1, 2)
    lighthouse.wait_for_requests()
    crowd.kill(2)
    crowd.send(2, 0, 1)
    answers = crowd.receive(0, 1, seconds=15)
    assert same(answers)
    assert len(answers[0]["records"]) == 1


def test_a_worker_that_does_not_hear_the_vote_commits_when_it_learns_that_another_has(crowd):
    gather(crowd, [0, 1])
    crowd.do(3, 0, 1)
    crowd.do(("fail", "launch_mean"), 0)
    sent = crowd.do("look", 0, 1)
    answers = crowd.do(1, 0, 1)
    assert not same(answers)
    assert [len(answers[worker]["records"]) for worker in (0, 1)] == [0, 1]
    mean = answers[1]["weights"]
    sent, _ = trained_on(sent[0], 0, 1)
    assert all(map(torch.equal, answers[0]["weights"], sent))
    moved, _ = trained_on(answers[0], 0, 1)
    theirs, _ = trained_on(answers[1], 1, 4)
    crowd.send(1, 0)
    crowd.send(4, 1)
    settled = crowd.receive(0, 1)
    assert same(settled)
    for place, name in enumerate(member.network(0).state_dict()):
        if "running" not in name and "num" not in name:
            mine = mean[place] + moved[place] - sent[place]
            torch.testing.assert_close(settled[0]["weights"][place], (mine + theirs[place]) / 2)
    assert settled[0]["taken"] == 5
    assert same(crowd.do(4, 0, 1))


def test_a_worker_that_commits_late_has_the_others_rule_even_if_the_next_round_is_lost(crowd):
    gather(crowd, [0, 1], period=None)
    crowd.do(3, 0, 1)
    crowd.do(("fail", "launch_mean"), 0)
    crowd.do(1, 0, 1)
    crowd.do(("fail", "connect"), 0)
    crowd.send(1, 0)
    crowd.send(4, 1)
    assert not same(crowd.receive(0, 1))
    crowd.send(3, 0)
    crowd.send(1, 1)
    answers = crowd.receive(0, 1)  # worker 0 has led, as its name is first
    assert same(answers)
    assert answers[0]["rule"]["samples"] == 1


def trained_on(answer, worker, steps):
    """What ``worker`` would hold after more steps without any averaging: its weights and its optimizer."""
    model, optimizer, _ = member.make(worker, 100, plain=True)
    model.load_state_dict(dict(zip(model.state_dict(), answer["weights"], strict=True)))
    for parameter, momentum in zip(model.parameters(), answer["momentum"], strict=True):
        optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
    for step in range(answer["taken"], answer["taken"] + steps):
        member.train_step(model, optimizer, worker, step)
    return [*model.state_dict().values()], optimizer


def test_a_straggler_misses_a_round_and_its_steps_count_in_the_next():
    hasty = Lighthouse(join_timeout_ms=1500)
    crowd = Crowd(hasty.address)
    try:
        gather(crowd, [0, 1, 2])
        crowd.do(4, 0, 1, 2)
        assert same(crowd.do(4, 0, 1))  # without worker 2, which has stopped in mid-period
        before = crowd.do("look", 0, 1, 2)
        each = [trained_on(before[worker], worker, 4)[0] for worker in (0, 1, 2)]
        crowd.send(4, 2)
        hasty.wait_for_requests()
        crowd.send(4, 0, 1)
        answers = crowd.receive(0, 1, 2)
        assert same(answers)
        mean = (each[0][0] + each[1][0] + each[2][0]) / 3
        torch.testing.assert_close(answers[0]["weights"][0], mean)
    finally:
        crowd.end()
        hasty.kill()


@pytest.mark.parametrize("period", [4, None])
def test_a_worker_that_starts_late_is_equal_to_the_others_after_its_first_round(pool, lighthouse, crowd, period):
    gather(crowd, [0, 1], period=period)
    crowd.do(8, 0, 1)
    crowd.start(2, period=period)
    crowd.do("look", 2)  # now it has started
    crowd.send("join", 2)
    lighthouse.wait_for_requests()
    crowd.send(4, 0, 1)
    joined = crowd.receive(0, 1, 2)
    assert same(joined)
    assert joined[2]["steps"] == 12
    assert joined[2]["taken"] == 0
    undisturbed = pool.run(member.plain, 12, period)  # what it brings along is not averaged
    assert all(map(torch.equal, joined[2]["weights"], undisturbed[0]["weights"]))
    assert any(joined[2]["momentum"][0].equal(joined[worker]["momentum"][0]) for worker in (0, 1))
    answers = crowd.do(4, 0, 1, 2)
    assert same(answers)
    assert answers[2]["records"][-1].local_steps == 4
    latest = [each["records"][-1] for each in answers.values()]
    assert len({record.variance for record in latest}) == 1
    assert [each["first_workers"] for each in answers.values()] == [2, 2, 2]
    if period is None:  # C₂ was measured among 2: among 3, it is (1 − 1/3) / (1 − 1/2) times as large
        assert [record.target for record in latest] == pytest.approx([joined[2]["rule"]["target"] * 4 / 3] * 3)


def test_a_worker_that_waits_to_join_does_not_make_the_others_meet_early():
    patient = Lighthouse(join_timeout_ms=8000)
    crowd = Crowd(patient.address)
    try:
        gather(crowd, [0, 1])
        crowd.start(2)
        crowd.send("join", 2)
        patient.wait_for_requests()
        time.sleep(9)  # longer than the lighthouse waits, counted from the first request
        crowd.send(4, 0)
        patient.wait_for_requests(2)
        crowd.send(4, 1)
        answers = crowd.receive(0, 1, 2)
        assert same(answers)
        assert [record.step for record in answers[1]["records"]] == [4]
    finally:
        crowd.end()
        patient.kill()


def test_a_worker_that_joins_the_only_one_is_not_taken_for_one_with_the_same_data(lighthouse, crowd):
    gather(crowd, [0])
    crowd.do(8, 0)
    crowd.start(1)
    crowd.do("look", 1)
    crowd.send("join", 1)
    lighthouse.wait_for_requests()
    crowd.send(4, 0)
    crowd.receive(0, 1)
    answers = crowd.do(4, 0, 1)
    assert same(answers)
    assert not any("identical" in text for text in answers[0]["warned"] + answers[1]["warned"])


def test_a_worker_that_is_killed_and_started_again_joins(lighthouse, crowd):
    gather(crowd, [0, 1, 2])
    crowd.do(6, 0, 1, 2)
    crowd.kill(0)  # the one that led the start
    assert same(crowd.do(2, 1, 2))
    crowd.start(0)
    crowd.do("look", 0)
    crowd.send("join", 0)
    lighthouse.wait_for_requests()
    crowd.send(4, 1, 2)
    assert same(crowd.receive(0, 1, 2))
    assert same(crowd.do(4, 0, 1, 2))


def test_a_worker_that_is_started_again_when_the_others_have_ended_does_not_begin_the_run_anew(crowd):
    crowd.start(0, restarts=1, quorum_timeout=timedelta(seconds=3))
    crowd.send("join", 0)
    crowd.processes[0].join(60)
    assert crowd.processes[0].exitcode == 1


def test_workers_that_are_all_started_again_begin_the_run_anew(crowd):
    crowd.start(0, 1, restarts=2)
    assert same(crowd.do("join", 0, 1))
    assert same(crowd.do(4, 0, 1))


def test_training_goes_on_without_a_lighthouse_and_averages_again_when_there_is_one(lighthouse, crowd):
    gather(crowd, [0, 1], quorum_timeout=timedelta(seconds=4))
    lighthouse.kill()
    answers = crowd.do(5, 0, 1)
    assert not same(answers)
    assert answers[0]["records"] == []
    assert answers[0]["taken"] == 5
    again = Lighthouse(port=lighthouse.port, min_replicas=2)  # or the first one to ask would be alone
    answers = crowd.do(3, 0, 1)
    assert same(answers)
    assert [record.step for record in answers[0]["records"]] == [8]
    again.kill()


def test_the_average_at_the_end_waits_for_a_lighthouse_that_is_starting_again(lighthouse, crowd):
    gather(crowd, [0, 1])
    crowd.do(6, 0, 1)
    lighthouse.kill()
    crowd.send("average", 0, 1)
    again = Lighthouse(port=lighthouse.port, min_replicas=2)
    answers = crowd.receive(0, 1)
    assert same(answers)
    assert [record.step for record in answers[0]["records"]] == [4, 6]
    again.kill()


def test_without_a_lighthouse_the_average_at_the_end_is_given_up_after_some_seconds(lighthouse, crowd):
    gather(crowd, [0, 1])
    crowd.do(6, 0, 1)
    lighthouse.kill()
    answers = crowd.do("average", 0, 1)
    assert not same(answers)
    assert answers[0]["steps"] == 6


def test_workers_exit_with_0(crowd):
    gather(crowd, [0, 1])
    crowd.do(5, 0, 1)
    crowd.end()
    assert [process.exitcode for process in crowd.processes.values()] == [0, 0]
