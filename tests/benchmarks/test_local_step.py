import pytest

from benchmarks.frame.device import Device
from benchmarks.frame.trainer import Batches, new_device_trainer
from benchmarks.local_step import (
    COLUMNS,
    ROWS,
    WARMUP_STEPS,
    PerStep,
    Stretches,
    Task,
    as_rows,
    combine,
    main,
    new_batch,
    new_network,
    place_of,
)
from tests.benchmarks.helpers import measured, shown

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
    single, adpsgd = (shown(row, COLUMNS) for row in some_rows())
    assert single["ratio"] == single["CPU overhead [us]"] == ""
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
    """Records what happens when."""

    def __init__(self, events, *args, **options):
        super().__init__(Device(), *args, lambda: events.append("meet"), **options)
        self.stopwatch = self
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
                happened[met] = place  # after this many meetings, no other one starts
        assert met == 4 * 3 + 1
    assert [happened[met] for met in sorted(happened)] == [0, 1, 2] * 4


def test_contenders_change_processes_from_fit_to_fit():
    contenders = [[place_of(group, fit) for group in range(3)] for fit in range(3)]
    assert all(sorted(each) == [0, 1, 2] for each in contenders)
    assert all(sorted(each) == [0, 1, 2] for each in zip(*contenders, strict=True))


def test_steps_of_a_trainer_are_timed(alone):
    stretches = Stretches(Device(), 2, 3, lambda: None, warmup=WARMUP_STEPS, untimed=1)
    batches = Batches(new_batch("few"), stretches.total_steps)
    new_device_trainer(None, Device(), stretches).fit(Task(new_network("few")), batches)
    assert len(stretches.timings) == 3
    for timing in stretches.timings:
        assert timing.ended > timing.began
        assert timing.cpu_seconds > 0
        assert timing.device_seconds is None


# The command


@pytest.mark.workers
def test_local_step_is_compared_with_the_step_of_a_single_device(tmp_path):
    options = "--models few --fits 2 --turns 3 --stretch-seconds 0.02 --ranks 1"
    printed, numbers = measured(main, tmp_path / "measured.json", *options.split())
    assert numbers["benchmark"] == "local_step"
    settings = {"ranks": 1, "models": ["few"], "fits": 2, "turns": 3, "stretch_seconds": 0.02}
    assert numbers["arguments"] == settings
    assert [row["contender"] for row in numbers["rows"]] == ["single", "adpsgd", "control"]
    for row in numbers["rows"]:
        assert row["contender"] in printed
        for times in (row["wall"], row["cpu"]):
            assert len(times["turns"]) == 6
            assert min(times["turns"]) > 0
            assert times["ratio_interval"][0] <= times["ratio"] <= times["ratio_interval"][1]
