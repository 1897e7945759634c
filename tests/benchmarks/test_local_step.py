import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.local_step import (
    ROWS,
    WARMUP_STEPS,
    Batches,
    PerStep,
    Stretches,
    Task,
    as_rows,
    combine,
    new_batch,
    new_network,
    new_trainer,
    place_of,
    readable,
)
from benchmarks.machine import Device, divide

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240


# The arithmetic


def test_step_is_the_mean_over_the_ranks_in_each_turn():
    first = [[10.0, 20.0, 3.0, None], [30.0, 31.0, 1.0, None]]
    second = [[11.0, 31.0, 4.0, None], [31.0, 34.0, 1.0, None]]
    assert combine([first, second], steps=10) == [(1.5, 0.35, None), (0.2, 0.1, None)]
    assert combine([[[10.0, 20.0, 3.0, 5.0]], [[11.0, 31.0, 4.0, 7.0]]], steps=10) == [(1.5, 0.35, 0.6)]


def some_rows():
    turns = {
        "single": [PerStep(each, 0.5 * each, None) for each in (1.0, 10.0, 100.0)],
        "adpsgd": [PerStep(each, 0.5, None) for each in (1.5, 12.0, 101.0)],
    }
    return as_rows("few", 7, turns)


def test_ratios_and_overheads_are_taken_within_a_turn():
    single, adpsgd = some_rows()
    assert (single["wall"]["ratio"], single["wall"]["overhead_seconds"]) == (1.0, 0.0)
    assert adpsgd["wall"]["ratio"] == adpsgd["wall"]["ratio_of_medians"] == pytest.approx(1.2)
    assert adpsgd["wall"]["ratio_interval"] == (1.01, 1.5)
    assert (adpsgd["wall"]["overhead_seconds"], adpsgd["wall"]["overhead_interval"]) == (1.0, (0.5, 2.0))
    assert adpsgd["cpu"]["ratio"] == pytest.approx(0.1)
    assert adpsgd["device_step_seconds"] is None


def test_table_compares_with_a_single_device_and_shows_the_goal():
    single, adpsgd = map(readable, some_rows())
    assert "ratio" not in single
    assert (adpsgd["ratio"], adpsgd["95 %"], adpsgd["goal"]) == ("1.2000", "1.0100 to 1.5000", "1.01")
    assert (adpsgd["overhead [us]"], adpsgd["CPU ratio"]) == ("1000000.0", "0.1000")


# What is trained


@pytest.mark.parametrize(("model", "tensors"), [("few", 8), ("many", ROWS)])
def test_model_has_few_or_many_tensors_and_trains_them_all(model, tensors):
    network = new_network(model)
    network(new_batch(model)).square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert len(gradients) == tensors
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


class Recorded(Stretches):
    """Notes down what happens when."""

    def __init__(self, events, *args, **options):
        super().__init__(Device(), *args, lambda: events.append("meet"), **options)
        self._stopwatch = self
        self.events = events

    def start(self):
        self.events.append("start")

    def stop(self):
        self.events.append("stop")

    def fit(self):
        for index in range(self.total_steps):
            self.events.append("step")
            self.on_train_batch_end(None, None, None, None, index)
        return self.events


def test_stretch_begins_together_and_is_as_many_steps_as_asked_for():
    assert Recorded([], 2, 1, warmup=3).fit() == ["step"] * 3 + ["meet", "start", "step", "step", "stop", "meet"]


def test_steps_after_others_had_their_turn_are_not_timed():
    events = Recorded([], 1, 2, warmup=1, untimed=2).fit()
    stretch = ["meet", "step", "step", "start", "step", "stop"]
    assert events == ["step", *stretch, *stretch, "meet"]


def test_processes_that_take_turns_run_one_after_the_other():
    happened = {}
    for place in range(3):
        met = 0
        for event in Recorded([], 1, 4, warmup=1, place=place, places=3).fit():
            met += event == "meet"
            if event == "start":
                happened[met] = place  # after so many meetings, nobody else starts
        assert met == 4 * 3 + 1
    assert [happened[met] for met in sorted(happened)] == [0, 1, 2] * 4


def test_contenders_change_processes_from_fit_to_fit():
    contenders = [[place_of(group, fit) for group in range(3)] for fit in range(3)]
    assert all(sorted(each) == [0, 1, 2] for each in contenders)
    assert all(sorted(each) == [0, 1, 2] for each in zip(*contenders, strict=True))


@pytest.mark.parametrize(("rank", "group", "place_in_it"), [(0, 0, 0), (3, 1, 1), (4, 2, 0)])
def test_processes_are_divided_among_the_contenders(monkeypatch, rank, group, place_in_it):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 6}.items():
        monkeypatch.setenv(name, str(value))
    divide.cache_clear()
    assert [divide(2), divide(2)] == [group, group]
    assert [os.environ["RANK"], os.environ["LOCAL_RANK"]] == [str(place_in_it)] * 2
    assert [os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]] == ["2", "2"]
    divide.cache_clear()


def test_steps_of_a_trainer_are_timed(alone):
    stretches = Stretches(Device(), 2, 3, lambda: None, warmup=WARMUP_STEPS, untimed=1)
    batches = Batches(new_batch("few"), stretches.total_steps)
    new_trainer(None, Device(), stretches).fit(Task(new_network("few")), batches)
    assert len(stretches.timings) == 3
    for timing in stretches.timings:
        assert timing.ended > timing.began
        assert timing.cpu_seconds > 0
        assert timing.device_seconds is None


def test_batch_comes_as_often_as_asked_for():
    batch = torch.ones(2)
    batches = Batches(batch, 3)
    assert len(batches) == 3
    assert all(each is batch for each in batches)


# The command


@pytest.mark.workers
def test_local_step_is_compared_with_the_step_of_a_single_device(tmp_path):
    file = tmp_path / "measured.json"
    options = "--models few --fits 2 --turns 3 --stretch-seconds 0.02 --ranks 1"
    command = [sys.executable, "-m", "benchmarks.local_step", *options.split(), "--json", str(file)]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert finished.returncode == 0, finished.stderr
    numbers = json.loads(file.read_text())
    assert numbers["benchmark"] == "local_step"
    settings = {"ranks": 1, "models": ["few"], "fits": 2, "turns": 3, "stretch_seconds": 0.02}
    assert numbers["arguments"] == settings
    assert [row["contender"] for row in numbers["rows"]] == ["single", "adpsgd", "control"]
    for row in numbers["rows"]:
        assert row["contender"] in finished.stdout
        for times in (row["wall"], row["cpu"]):
            assert len(times["turns"]) == 6
            assert min(times["turns"]) > 0
            assert times["ratio_interval"][0] <= times["ratio"] <= times["ratio_interval"][1]
