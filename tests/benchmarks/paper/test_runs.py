import dataclasses
import json
import math

import pytest

from benchmarks.frame.results import machine
from benchmarks.paper.plan import ADPSGD, CPSGD_8, FULL, MATCHED, QSGD, Run
from benchmarks.paper.runs import Store, combine, do, time_left
from tests.benchmarks.helpers import FakeRanks
from tests.benchmarks.paper.samples import TASK, some_runs

ORDER = {"data": "data", "verify": True, "device": "cpu", "backend": "gloo"}


def an_answer(**changes):
    """Of one of two ranks."""
    curve = [
        {"epoch": 1, "step": 3, "loss": 2.0, "sent_bytes": 100, "right": 1},
        {"epoch": 2, "step": 6, "loss": 1.0, "sent_bytes": 150, "right": None},
    ]
    return {
        "steps": 6,
        "parameters": 50,
        "rounds": 3,
        "sent_bytes": 200,
        "curve": curve,
        "averaging": {"step": [2, 4, 6]},
        "train_loss_sum": 10.0,
        "train_images": 20,
        "right": 3,
        "test_images": 10,
    } | changes


def test_answers_of_ranks_are_combined_and_the_last_epoch_includes_the_last_round():
    other = an_answer(right=4, train_loss_sum=14.0, averaging={})
    other["curve"] = [point | {"loss": point["loss"] + 1} for point in other["curve"]]
    result = combine([an_answer(), other])
    assert (result["accuracy"], result["final_loss"]) == (0.7, 1.2)
    assert result["averaging"] == {"step": [2, 4, 6]}
    assert result["curve"] == [
        {"epoch": 1, "step": 3, "loss": 2.5, "sent_bytes": 100, "accuracy": 0.2},
        {"epoch": 2, "step": 6, "loss": 1.5, "sent_bytes": 200, "accuracy": 0.7},
    ]


def new_ranks(fails_at=None):
    """Ranks each of whose runs has one round more."""
    return FakeRanks(lambda count: [an_answer(rounds=count)] * 2, fails_at)


def done(store, runs, ranks=None):
    ranks, said = ranks or new_ranks(), []
    missing = [run for run in runs if store.result(run) is None]
    assert [*do(missing, ranks, store, ORDER, lambda run: f"do {run.file}", said.append)] == missing
    return ranks, said


def test_run_is_kept_with_its_settings_and_command_and_not_repeated(tmp_path):
    store, runs = Store(tmp_path), some_runs(FULL, CPSGD_8)
    ranks, _ = done(store, runs)
    content = json.loads((tmp_path / "net" / "full-seed0.json").read_text())
    assert content["command"] == "do net/full-seed0.json"
    assert content["settings"] == ranks.orders[0]["settings"] == json.loads(json.dumps(runs[0].settings(None)))
    assert content["result"] == store.result(runs[0])
    assert content["machine"] == json.loads(json.dumps(machine()))
    assert content["data"] == {"verified": True}
    again, _ = done(store, [*runs, *some_runs(FULL, seeds=(1,))])
    assert [order["settings"]["seed"] for order in again.orders] == [1]


def test_run_with_other_settings_is_done_again(tmp_path):
    store = Store(tmp_path)
    done(store, some_runs(FULL))
    (run,) = some_runs(FULL)
    assert store.result(run._replace(task=dataclasses.replace(TASK, epochs=3))) is None
    assert store.result(run._replace(contender=dataclasses.replace(FULL, period=3))) is None


def test_matched_run_is_told_the_rounds_of_the_adaptive_one_with_its_seed(tmp_path):
    store = Store(tmp_path)
    runs = some_runs(ADPSGD, MATCHED, seeds=(0, 1))
    assert store.result(runs[1]) is None  # its number of rounds is not known yet
    ranks, _ = done(store, runs)
    assert [order["settings"].get("rounds") for order in ranks.orders] == [None, 1, None, 3]


def test_matched_run_is_done_again_if_the_adaptive_one_had_other_rounds(tmp_path):
    store, runs = Store(tmp_path), some_runs(ADPSGD, MATCHED)
    done(store, runs)
    (tmp_path / runs[0].file).unlink()
    ranks = new_ranks()
    ranks.orders = [None] * 5
    done(store, runs[:1], ranks)
    assert store.result(runs[1]) is None


def test_runs_before_an_interruption_are_kept_and_nothing_half_written(tmp_path):
    store, runs = Store(tmp_path), some_runs(FULL, QSGD, CPSGD_8)
    with pytest.raises(KeyboardInterrupt):
        done(store, runs, new_ranks(fails_at=2))
    assert [store.result(run) is not None for run in runs] == [True, False, False]
    assert [file.name for file in tmp_path.rglob("*.*")] == ["full-seed0.json"]
    ranks, _ = done(store, runs)
    assert [order["settings"]["contender"]["name"] for order in ranks.orders] == ["qsgd", "cpsgd-8"]


@pytest.mark.parametrize(("limit", "begun"), [(5, 1), (19, 1), (20, 2), (39, 3), (math.inf, 4)])
def test_no_run_begins_that_would_end_after_the_limit_and_the_rest_is_done_next_time(
    tmp_path, monkeypatch, limit, begun
):
    clock = [0.0]

    def take_ten_seconds(count):
        clock[0] += 10
        return [an_answer()] * 2

    monkeypatch.setattr("benchmarks.paper.runs.time.monotonic", lambda: clock[0])
    store, runs, said = Store(tmp_path), some_runs(FULL, QSGD, CPSGD_8, ADPSGD), []
    ranks = FakeRanks(take_ten_seconds)
    assert [*do(runs, ranks, store, ORDER, lambda run: "", said.append, limit)] == runs[:begun]
    if begun < 4:
        assert said[-1] == f"The time is up: {4 - begun} of 4 runs are left. The same command continues."
    done(store, runs, ranks)
    assert len(ranks.orders) == 4


def test_progress_shows_the_run_its_result_and_the_time_left(tmp_path):
    _, said = done(Store(tmp_path), some_runs(FULL, QSGD))
    assert said[0].startswith("1 of 2  Net, full communication, seed 0: 1 rounds, 200 B, loss 1.0000, accuracy 60.00 %")
    assert said[0].endswith("about 1 min left)")
    assert said[1].endswith("none left)")


def test_time_left_is_computed_from_runs_of_the_same_task():
    other = dataclasses.replace(TASK, name="other")
    missing = [Run(TASK, FULL, 0), Run(TASK, QSGD, 0), Run(other, FULL, 0)]
    assert time_left(missing, {"net": [10.0, 12.0, 50.0]}) == 12 + 12 + 12
    assert time_left(missing, {"net": [10.0], "other": [100.0]}) == 10 + 10 + 100
    assert time_left([], {"net": [10.0]}) == 0
