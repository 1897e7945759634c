import math

import pytest

from benchmarks.survival.faults import OWN_END
from benchmarks.survival.log import Fault, Log, Presence, Recovery


def a_log(rounds, *faults, presences=None, ended=100.0):
    """Of three workers that were always there; rounds as (when, workers)."""
    log = Log(0.0, ended)
    for number, (when, workers) in enumerate(rounds):
        log.told += [(when + 0.001 * worker, worker, number) for worker in workers]
    log.faults += faults
    log.presences += presences or [Presence(worker, 0.0, ended) for worker in range(3)]
    return log


def only(log):
    (recovery,) = log.recoveries()
    return recovery


def seconds(value):
    return pytest.approx(value, abs=0.01)


def test_kill_is_survived_with_the_next_round_of_all_others():
    log = a_log([(9, {0, 1, 2}), (11, {0}), (12, {0, 1}), (16, {0, 1, 2})], Fault("kill", 2, 10.0, 13.0))
    assert only(log) == Recovery(seconds(2), seconds(3))


def test_fault_after_which_the_others_never_meet_is_not_survived():
    for rounds in ([(9, {0, 1, 2})], [(9, {0, 1, 2}), (12, {0}), (13, {1})], []):
        assert only(a_log(rounds, Fault("kill", 2, 10.0, 13.0))) == Recovery(None, None)


def test_round_in_flight_at_the_fault_shows_nothing():
    log = a_log([(10.01, {0, 1}), (15, {0, 1})], Fault("kill", 2, 10.0, 13.0))
    assert only(log) == Recovery(seconds(5), None)


def test_round_that_a_stopped_worker_only_ends_afterwards_does_not_bring_it_back():
    log = a_log([(9.9, {0, 1, 2}), (12, {0, 1}), (16, {0, 1, 2})], Fault("stop", 2, 10.0, 14.0))
    log.told = [(14.5, worker, number) if (worker, number) == (2, 0) else (when, worker, number)
                for when, worker, number in log.told]  # fmt: skip
    assert only(log) == Recovery(seconds(2), seconds(2))


def test_worker_alone_is_not_back():
    assert only(a_log([(12, {0, 1}), (14, {2})], Fault("cut", 2, 10.0, 13.0))).back_seconds is None


def test_worker_that_was_not_there_yet_need_not_be_in_the_round():
    presences = [Presence(0, 0, 100), Presence(1, 0, 100), Presence(2, 11, 100)]
    log = a_log([(12, {0, 1}), (16, {0, 1, 2})], Fault("lighthouse", None, 10.0, 11.0), presences=presences)
    assert only(log) == Recovery(seconds(2), seconds(1))


def test_worker_that_a_second_fault_strikes_meanwhile_need_not_be_in_the_round():
    first, second = Fault("kill", 2, 10.0, 20.0), Fault("stop", 1, 10.5, 15.0)
    presences = [Presence(worker, 0.0, 100.0) for worker in range(4)]
    log = a_log([(12, {0, 3}), (17, {0, 1, 3}), (21, {0, 1, 2, 3})], first, second, presences=presences)
    assert log.recoveries() == [Recovery(seconds(2), seconds(1)), Recovery(seconds(1.5), seconds(2))]


def test_worker_that_is_still_away_from_an_earlier_fault_need_not_be_in_the_round_but_one_that_is_back_must():
    earlier, later = Fault("kill", 1, 5.0, 6.0), Fault("kill", 2, 10.0, 20.0)
    away = a_log([(7, {0, 2}), (12, {0, 3}), (15, {0, 1, 3})], earlier, later, presences=[
        Presence(worker, 0.0, 100.0) for worker in range(4)])  # fmt: skip
    assert away.recoveries()[1].next_round_seconds == seconds(2)
    back = a_log([(7, {0, 1, 2}), (12, {0, 3}), (15, {0, 1, 3})], earlier, later, presences=[
        Presence(worker, 0.0, 100.0) for worker in range(4)])  # fmt: skip
    assert back.recoveries()[1].next_round_seconds == seconds(5)


def test_new_lighthouse_has_served_all_before_it_counts_as_back():
    log = a_log([(10.5, {0, 1, 2}), (14, {0, 1}), (17, {0, 1, 2})], Fault("lighthouse", None, 10.0, 12.0))
    assert only(log) == Recovery(seconds(0.5), seconds(5))


def test_time_away_is_no_time_to_train_in_but_time_of_waiting_is():
    faults = [
        Fault("stop", 0, 10.0, 14.0),
        Fault("cut", 1, 20.0, 25.0),
        Fault("lighthouse", None, 30.0, 40.0),
        Fault("kill", 2, 50.0, 51.0),
        Fault(OWN_END, 2, 60.0, math.inf),
    ]
    presences = [Presence(0, 0, 100), Presence(1, 0, 100), Presence(2, 0, 50), Presence(2, 55, 60)]
    assert a_log([], *faults, presences=presences).worker_seconds == 100 + 100 + 50 + 5 - 4 - 5
