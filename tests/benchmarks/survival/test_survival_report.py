import pytest

from benchmarks.survival.faults import OWN_END
from benchmarks.survival.log import Fault, Log, Presence
from benchmarks.survival.report import (
    FAULT_COLUMNS,
    Pair,
    as_json,
    fault_rows,
    goodput,
    measure_table,
    measures,
    reasons,
)
from tests.benchmarks.helpers import shown


def calm(loss=1.0, steps=1000):
    """100 s of two workers."""
    presences = [Presence(worker, 0.0, 100.0, steps) for worker in range(2)]
    return Log(0.0, 100.0, presences=presences, losses=[loss, loss])


def wild(loss=1.0, gap=2.0, start=1.0, kills=1, **changes):
    """Worker 2 is killed every 10 s, and the others meet ``gap`` seconds later."""
    log = calm(loss)
    log.presences.append(Presence(2, 5.0, 100.0, 500, start))
    for kill in range(kills):
        log.faults.append(Fault("kill", 2, 10.0 * kill + 5, 10.0 * kill + 6))
        log.told += [(10.0 * kill + 5 + gap, worker, kill) for worker in range(3)]
    for name, value in changes.items():
        setattr(log, name, value)
    return log


def found(*pairs, period_seconds=0.2):
    return {measure.name: measure for measure in measures(pairs, 2, period_seconds)}


def test_row_of_a_kind_counts_the_faults_of_all_runs():
    second = wild(gap=4.0, kills=2)
    second.faults.append(Fault("stop", 1, 95.0, 96.0))
    kill, stop = fault_rows("adpsgd", [wild(), second])
    assert (kill["count"], kill["survived"], kill["came_back"]) == (3, 3, 3)
    assert shown(kill, FAULT_COLUMNS[:6]) == {
        "contender": "adpsgd",
        "fault": "kill",
        "faults": "3",
        "survived": "3",
        "next round [s]": "4.00",
        "at most [s]": "4.00",
    }
    assert (stop["count"], stop["survived"], stop["next_round_seconds"], stop["back_seconds"]) == (1, 0, None, None)


def test_goodput_is_per_second_that_a_worker_could_train_in_or_of_the_whole_run():
    slow = Log(0.0, 100.0, presences=[Presence(0, 0.0, 100.0, 1000), Presence(1, 0.0, 50.0, 400)])
    assert goodput([Pair(calm(), slow)], with_start=True, workers=2) == pytest.approx(1400 / 2000)
    assert goodput([Pair(calm(), slow)], with_start=False, workers=2) == pytest.approx((1400 / 150) / (2000 / 200))


def test_all_goals_are_met_where_nothing_is_lost():
    log = wild(presences=[Presence(worker, 0.0, 100.0, 1000, 1.0) for worker in range(2)])
    assert {name for name, each in found(Pair(calm(), log), Pair(calm(1.1), log)).items() if not each.met} == set()


def missed(*pairs, **options):
    return {name for name, each in found(*pairs, **options).items() if each.met is False}


def a_pair(start=1.0, **changes):
    best = {"presences": [Presence(worker, 0.0, 100.0, 1000, start) for worker in range(2)]}
    return Pair(calm(), wild(**{**best, **changes}))


@pytest.mark.parametrize(
    ("changes", "goals"),
    [
        ({"told": []}, {"survived: kill"}),
        ({"gap": 5.1}, {"median s from a kill to the next round"}),
        ({"start": 5.1}, {"median s from start to first round"}),
        ({"processes_left": 1}, {"processes left"}),
        ({"ports_left": [80]}, {"ports held"}),
        ({"presences": [Presence(0, 0.0, 100.0, 940), Presence(1, 0.0, 100.0, 940)]}, {"goodput without start"}),
        (
            {"presences": [Presence(0, 0.0, 100.0, 840), Presence(1, 0.0, 100.0, 840)]},
            {"goodput without start", "goodput with start"},
        ),
        ({"presences": [Presence(0, 0.0, 80.0, 840), Presence(1, 0.0, 80.0, 840)]}, {"goodput with start"}),
        ({"faults": [Fault(OWN_END, 2, 5.0, 6.0)]}, {"processes that ended by themselves"}),
    ],
)
def test_each_goal_can_be_missed_alone(changes, goals):
    assert missed(a_pair()) == set()
    assert missed(a_pair(**changes)) == goals


def test_longer_period_than_five_seconds_is_the_goal_for_the_next_round():
    assert missed(a_pair(gap=5.1), period_seconds=6.0) == set()
    assert missed(a_pair(gap=6.1), period_seconds=6.0) == {"median s from a kill to the next round"}


def test_promised_are_survival_and_that_nothing_is_left_on_any_machine():
    promised = {name for name, each in found(a_pair()).items() if each.is_promised}
    assert promised == {"survived: kill", "processes that ended by themselves", "processes left", "ports held"}


def test_final_loss_is_compared_with_the_spread_over_the_seeds():
    def met(*disturbed):
        pairs = [Pair(calm(loss), wild(its)) for loss, its in zip((1.0, 1.2, 1.1), disturbed, strict=True)]
        return found(*pairs)["final loss"]

    assert met(1.3, 1.1, 1.2).met
    assert met(0.5, 0.5, 0.5).met
    assert met(1.3, 1.1, 1.3).met is False
    assert met(1.3, 1.1, 1.2).goal == "undisturbed 1.0000 to 1.2000"
    assert met(1.3, 1.1, 1.2).shown == "1.2000"


def test_final_loss_of_one_seed_is_not_judged():
    assert found(Pair(calm(), wild(9.0)))["final loss"].met is None


def test_loss_that_no_worker_could_tell_is_missing_not_wrong():
    assert found(Pair(calm(), wild(losses=[])))["final loss"].shown == "none"


def test_table_has_a_line_for_each_measure_of_each_contender():
    given = measures([a_pair()], 2, 0.2)
    lines = measure_table({"adpsgd": given, "torchft": given}).splitlines()
    assert len(lines) == 2 + 2 * len(given)
    assert lines[2].split() == ["adpsgd", "survived:", "kill", "1", "of", "1", "all", "yes"]


def test_reasons_of_own_ends_are_counted():
    log = wild(faults=[Fault(OWN_END, 0, 1.0, reason=reason) for reason in ("a", "b", "a")])
    assert reasons([log, calm()]) == ["2 x a", "1 x b"]


def test_json_has_every_fault_with_what_followed():
    row = as_json("adpsgd", {7: Pair(calm(), wild())}, [])
    assert [(run["seed"], run["run"]) for run in row["runs"]] == [(7, "undisturbed"), (7, "disturbed")]
    (fault,) = row["runs"][1]["faults"]
    assert (fault["kind"], fault["began"], fault["ended"], fault["next_round_seconds"]) == ("kill", 5.0, 6.0, 2.0)
