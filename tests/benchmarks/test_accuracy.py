import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy import (
    COLUMNS,
    CONTENDERS,
    OPTIONS,
    REFERENCE,
    as_rows,
    combine,
    evaluate,
    main,
    measure,
    new_strategy,
)
from lightning_adpsgd import ADPSGDStrategy
from tests.benchmarks.helpers import FakeRanks, measured, shown
from tests.examples.test_image_classification import write_cifar10

SETTINGS = {"epochs": 2, "initial": 4, "period": None, "learning_rate": 0.1}


# The arithmetic


def an_answer(**changes):
    """Of one rank; the fifteen training images and ten test images are those of all ranks."""
    return {
        "steps": 12,
        "rounds": 3,
        "sent_bytes": 4000,
        "last_losses": [1.0, 2.0],
        "train_loss_sum": 20.0,
        "train_images": 15,
        "right": 3,
        "test_images": 10,
    } | changes


def test_losses_are_means_over_all_ranks_and_right_answers_are_added_up():
    run = combine([an_answer(), an_answer(last_losses=[4.0, 5.0], train_loss_sum=25.0, right=4)])
    assert run == {
        "steps": 12,
        "rounds": 3,
        "sent_bytes": 4000,
        "last_epoch_loss": 3.0,
        "final_loss": 3.0,
        "accuracy": 0.7,
    }


def a_run(accuracy, **changes):
    names = ("steps", "rounds", "sent_bytes", "last_epoch_loss", "final_loss")
    return dict.fromkeys(names, 1.0) | {"accuracy": accuracy} | changes


def test_row_has_mean_and_sample_deviation_over_the_seeds():
    runs = {0: a_run(0.5, rounds=10), 1: a_run(0.7, rounds=12), 2: a_run(0.9, rounds=17)}
    (row,) = as_rows({"overlap-1": runs})
    assert (row["contender"], row["seeds"]) == ("overlap-1", [0, 1, 2])
    assert row["runs"] == [*runs.values()]
    assert (row["accuracy"], row["accuracy_sd"]) == pytest.approx((0.7, 0.2))
    assert (row["rounds"], row["rounds_sd"]) == pytest.approx((13.0, 13**0.5))
    assert (row["final_loss"], row["final_loss_sd"]) == (1.0, 0.0)


def test_one_seed_has_no_deviation():
    (row,) = as_rows({REFERENCE: {0: a_run(0.5)}})
    assert row["accuracy_sd"] is None
    assert shown(row, COLUMNS)["accuracy [%]"] == "50.00"


def test_difference_to_plain_is_taken_within_a_seed():
    plain = {0: a_run(0.5), 1: a_run(0.9)}
    other = {1: a_run(0.8), 2: a_run(0.1)}  # the third seed has no plain run yet
    rows = as_rows({REFERENCE: plain, "stagger": other})
    assert [row["accuracy_vs_plain"] for row in rows] == [None, pytest.approx(-0.1)]


def test_without_plain_there_is_nothing_to_compare_with():
    (row,) = as_rows({"stagger": {0: a_run(0.5)}})
    assert row["accuracy_vs_plain"] is None
    assert shown(row, COLUMNS)["vs plain"] == ""


def test_table_shows_percent_megabytes_and_the_spread_of_several_seeds():
    plain = {0: a_run(0.5), 1: a_run(0.52)}
    other = {0: a_run(0.51, sent_bytes=2e6, steps=100.0), 1: a_run(0.54, sent_bytes=3e6, steps=100.0)}
    row = shown(as_rows({REFERENCE: plain, "stagger": other})[1], COLUMNS)
    assert (row["seeds"], row["steps"], row["sent [MB]"]) == ("2", "100", "2.5")
    assert (row["accuracy [%]"], row["vs plain"]) == ("52.50 ± 2.12", "+1.50")
    assert row["last epoch's loss"] == "1.000 ± 0.000"


# What is trained, and how it is judged


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_contender_has_a_strategy(contender):
    assert isinstance(new_strategy(contender, SETTINGS), ADPSGDStrategy) == (contender != "ddp")


def test_options_of_contenders_that_share_a_part_are_told_apart():
    told = {name: new_strategy(name, SETTINGS).transport for name in OPTIONS}
    assert told[REFERENCE] == "at once"
    assert len(set(told.values())) == len(OPTIONS)


class Images:
    """As many as requested, fetched several at a time."""

    def __init__(self, count):
        self.inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(count) % 2

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.inputs[indices], self.labels[indices]


def test_shares_of_all_ranks_add_up_to_all_images_in_evaluation_mode():
    images, network = Images(1203), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    shares = [evaluate(network, images, slice(rank, None, 3)) for rank in range(3)]
    network.eval()
    logits = network(images.inputs)
    assert sum(loss for loss, _ in shares) == pytest.approx(
        F.cross_entropy(logits, images.labels, reduction="sum").item(), rel=1e-5
    )
    assert sum(right for _, right in shares) == (logits.argmax(dim=1) == images.labels).sum()
    assert network[0].num_batches_tracked == 0


# Runs that are kept


def run_all(folder, names=("plain", "stagger"), seeds=(0, 1), settings=SETTINGS):
    """The contenders and seeds that were requested, the ranks' orders, and the runs."""
    ranks = FakeRanks(lambda count: [an_answer(right=count), an_answer(right=0)])
    runs = measure(ranks, names, seeds, settings, Path("data"), folder)
    return [(order["contender"], order["seed"]) for order in ranks.orders], ranks.orders, runs


def test_every_contender_is_run_with_every_seed_and_told_the_settings(tmp_path):
    asked, orders, runs = run_all(None)
    assert asked == [("plain", 0), ("stagger", 0), ("plain", 1), ("stagger", 1)]
    assert all(order["settings"] == SETTINGS and order["data"] == "data" for order in orders)
    assert {name: [*by_seed] for name, by_seed in runs.items()} == {"plain": [0, 1], "stagger": [0, 1]}
    assert runs["stagger"][0]["accuracy"] == 0.2


def test_run_that_is_kept_with_the_same_settings_is_not_run_again(tmp_path):
    _, _, first = run_all(tmp_path, seeds=(1,))
    asked, _, second = run_all(tmp_path, names=("stagger", "plain"), seeds=(0, 1))
    assert asked == [("stagger", 0), ("plain", 0)]
    assert [second[name][1] for name in ("plain", "stagger")] == [first[name][1] for name in ("plain", "stagger")]
    assert [*second["plain"]] == [0, 1]
    asked, _, third = run_all(tmp_path)
    assert asked == []
    assert third == second


def test_run_that_is_kept_with_other_settings_is_run_again(tmp_path):
    run_all(tmp_path, seeds=(0,))
    asked, _, runs = run_all(tmp_path, names=("stagger",), seeds=(0,), settings=SETTINGS | {"initial": 5})
    assert asked == [("stagger", 0)]
    assert runs["stagger"][0]["accuracy"] == 0.1  # the first answer of these ranks
    kept = json.loads((tmp_path / "stagger-seed0.json").read_text())
    assert kept == {"settings": SETTINGS | {"initial": 5}, "run": runs["stagger"][0]}


def test_run_that_is_not_to_be_kept_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_all(None)
    assert [*tmp_path.iterdir()] == []


# The command


@pytest.mark.workers
def test_contenders_are_trained_and_compared_and_their_runs_are_kept(tmp_path):
    write_cifar10(tmp_path)
    kept = tmp_path / "runs"
    options = (
        "--repacked --images 18 --contenders plain,stagger-overlap --seeds 1 --workers 2 --batch-size 3 --epochs 1"
    )
    places = ["--data", str(tmp_path), "--runs", str(kept)]
    printed, numbers = measured(main, tmp_path / "measured.json", *options.split(), "--initial", "2", *places)
    assert "resnet8, 2 workers with batches of 3, 1 epochs of 18 images, adaptive period, 2 at first" in printed

    assert numbers["benchmark"] == "accuracy"
    assert numbers["arguments"]["images"] == 18
    assert [row["contender"] for row in numbers["rows"]] == ["plain", "stagger-overlap"]
    for row in numbers["rows"]:
        assert row["contender"] in printed
        assert row["seeds"] == [0]
        assert row["steps"] == 3  # nine images each
        assert 0 < row["rounds"] <= row["steps"]
        assert row["last_epoch_loss"] > 0
        assert row["final_loss"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert (4 * row["accuracy"]).is_integer()  # of four test images
        content = json.loads((kept / f"{row['contender']}-seed0.json").read_text())
        assert content["run"] == row["runs"][0]
        assert content["settings"] | {"seeds": 1} == numbers["arguments"]
    plain, other = numbers["rows"]
    model = 4 * 78_042  # bytes of resnet8, whose parameters its own test counts, without BatchNorm's statistics
    assert plain["sent_bytes"] == pytest.approx(plain["rounds"] * model, rel=0.05)
    # What was in flight at the end has been sent too: a part of one more.
    assert other["rounds"] * model < other["sent_bytes"] < (other["rounds"] + 1) * model
    assert other["accuracy_vs_plain"] == pytest.approx(other["accuracy"] - plain["accuracy"])
