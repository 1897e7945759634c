import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import report
from benchmarks.baselines import EvenRounds, QSGDStrategy
from benchmarks.paper import __main__ as command
from benchmarks.paper import links as paper_links
from benchmarks.paper.claims import claims, verdict
from benchmarks.paper.networks import SMALL, new_network, parameter_count
from benchmarks.paper.page import HABITS, Page
from benchmarks.paper.plan import (
    ADPSGD,
    CPSGD_8,
    FULL,
    GRID,
    MATCHED,
    MOMENTUM,
    PAPER,
    QSGD,
    RARE,
    SCALES,
    Run,
    Study,
    Task,
    runs_of,
)
from benchmarks.paper.results import (
    Outcomes,
    by_quarter,
    final_loss,
    in_words,
    quarters_over_seeds,
    spread,
    until,
)
from benchmarks.paper.runs import Store, combine, do, time_left
from benchmarks.paper.training import averaged, new_period, new_strategy, rate_factor
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod
from tests.examples.test_image_classification import write_cifar10

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = Task("net", "Net", "resnet_tiny", workers=2, batch_size=3, images=18, epochs=2)
ORDER = {"data": "data", "verify": True, "device": "cpu", "backend": "gloo"}


# What is planned


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_a_scale_has_a_file_of_its_own_and_follows_the_one_it_depends_on(scale):
    runs = runs_of(SCALES[scale])
    files = [run.file for run in runs]
    assert len(set(files)) == len(files)
    for place, run in enumerate(runs):
        if run.contender is MATCHED:
            assert run._replace(contender=ADPSGD) in runs[:place]


@pytest.mark.parametrize("scale", SCALES)
def test_contenders_and_tasks_of_one_name_are_the_same(scale):
    contenders = {run.contender.name: run.contender for run in runs_of(SCALES[scale])}
    tasks = {run.task.name: run.task for run in runs_of(SCALES[scale])}
    for run in runs_of(SCALES[scale]):
        assert (run.contender, run.task) == (contenders[run.contender.name], tasks[run.task.name])


def test_full_comparison_has_the_papers_families_and_contenders_and_three_seeds():
    for scale, workers in (("cpu", 8), ("gpu", 16)):
        paper = next(study for study in SCALES[scale] if study.name == "paper")
        assert [task.name[:3] for task in paper.tasks] == ["vgg", "goo", "res"]
        assert {task.workers for task in paper.tasks} == {workers}
        assert {FULL, CPSGD_8, MATCHED, ADPSGD, QSGD} <= set(paper.contenders)
        assert paper.seeds >= 3


def test_short_comparison_has_one_network_and_one_seed():
    runs = runs_of(SCALES["short"])
    assert {run.task.network for run in runs} == {"resnet_tiny"}
    assert sorted(run.contender.name for run in runs) == sorted(contender.name for contender in PAPER)


def test_seeds_can_be_limited():
    assert {run.seed for run in runs_of(SCALES["cpu"])} == {0, 1, 2}
    assert {run.seed for run in runs_of(SCALES["cpu"], seeds=1)} == {0}


def test_grid_has_the_default_once_under_its_own_name():
    assert len({contender.name for contender in GRID}) == len(GRID) == 9
    assert ADPSGD in GRID
    assert RARE in GRID


# What is trained


@pytest.mark.parametrize("name", SMALL)
def test_networks_tell_ten_classes_of_small_images_apart(name):
    network = new_network(name)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert parameter_count(name) == sum(parameter.numel() for parameter in network.parameters())


def test_networks_for_a_cpu_are_small():
    counts = [parameter_count(task.network) for study in SCALES["cpu"] for task in study.tasks]
    assert max(counts) < 100_000


def rates(schedule, total=100, **changes):
    task = dataclasses.asdict(TASK) | {"schedule": schedule, "epochs": 10} | changes
    return [rate_factor(step, total, task) for step in range(total)]


def test_rate_warms_up_linearly_and_decays_to_a_tenth_twice():
    factors = rates("steps")
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert set(factors[10:50]) == {1.0}
    assert factors[50:75] == pytest.approx([0.1] * 25)
    assert factors[75:] == pytest.approx([0.01] * 25)


def test_cosine_goes_from_the_peak_to_almost_nothing():
    factors = rates("cosine")
    assert factors[:11] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001


def described(contender):
    return dataclasses.asdict(contender)


def test_every_contender_has_its_strategy():
    kinds = {contender: type(new_strategy(described(contender), 7, "gloo")).__name__ for contender in PAPER}
    assert kinds.pop(FULL) == "DDPStrategy"
    assert kinds.pop(QSGD) == QSGDStrategy.__name__
    assert set(kinds.values()) == {ADPSGDStrategy.__name__}


def test_periods_are_those_that_contenders_are_named_after():
    adaptive, rare = (new_period(described(contender), None) for contender in (ADPSGD, RARE))
    assert isinstance(adaptive, AdaptivePeriod)
    assert (adaptive.value, rare.value) == (4, 8)
    constant, matched = new_period(described(CPSGD_8), None), new_period(described(MATCHED), 7)
    assert isinstance(constant, ConstantPeriod)
    assert constant.value == 8
    assert isinstance(matched, EvenRounds)
    matched.setup(70)
    assert matched.value == 10


def test_contenders_that_average_momentum_do_so():
    states = {contender.name: new_strategy(described(contender), None, "gloo") for contender in MOMENTUM}
    assert [strategy._optimizer_state for strategy in states.values()] == ["local", "average", "average", "reset"]


def average_on_rank():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in network.state_dict().values():
        tensor.fill_(1 + 2 * dist.get_rank())
    result = averaged(network)
    return [{t.item() for t in each.state_dict()[name].flatten()} for each in (network, result) for name in NAMES]


NAMES = ("0.weight", "1.running_mean", "1.num_batches_tracked")


@pytest.mark.workers
def test_model_is_looked_at_as_the_mean_over_ranks_and_left_as_it_is(pool):
    first, second = pool.run(average_on_rank)
    assert first == [{1}, {1}, {1}, {2}, {2}, {1}]
    assert second == [{3}, {3}, {3}, {2}, {2}, {3}]


# Runs that are kept


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


def test_ranks_are_put_together_and_the_last_epoch_ends_when_all_have_met():
    other = an_answer(right=4, train_loss_sum=14.0, averaging={})
    other["curve"] = [point | {"loss": point["loss"] + 1} for point in other["curve"]]
    result = combine([an_answer(), other])
    assert (result["accuracy"], result["final_loss"]) == (0.7, 1.2)
    assert result["averaging"] == {"step": [2, 4, 6]}
    assert result["curve"] == [
        {"epoch": 1, "step": 3, "loss": 2.5, "sent_bytes": 100, "accuracy": 0.2},
        {"epoch": 2, "step": 6, "loss": 1.5, "sent_bytes": 200, "accuracy": 0.7},
    ]


class FakeRanks:
    """Ranks that note their orders; the rounds of a run are as many as it is late."""

    def __init__(self, fails_at=None):
        self.orders = []
        self._fails_at = fails_at

    def run(self, order):
        self.orders.append(order)
        if len(self.orders) == self._fails_at:
            raise KeyboardInterrupt
        return [an_answer(rounds=len(self.orders)), an_answer(rounds=len(self.orders))]


def some_runs(*contenders, seeds=(0,)):
    return [Run(TASK, contender, seed) for seed in seeds for contender in contenders]


def done(store, runs, ranks=None):
    ranks, said = ranks or FakeRanks(), []
    missing = [run for run in runs if store.result(run) is None]
    assert [*do(missing, ranks, store, ORDER, lambda run: f"do {run.file}", said.append)] == missing
    return ranks, said


def test_what_is_done_is_kept_with_its_settings_and_command_and_not_done_again(tmp_path):
    store, runs = Store(tmp_path), some_runs(FULL, CPSGD_8)
    ranks, _ = done(store, runs)
    content = json.loads((tmp_path / "net" / "full-seed0.json").read_text())
    assert content["command"] == "do net/full-seed0.json"
    assert content["settings"] == ranks.orders[0]["settings"] == json.loads(json.dumps(runs[0].settings(None)))
    assert content["result"] == store.result(runs[0])
    assert content["machine"] == json.loads(json.dumps(report.machine()))
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
    assert store.result(runs[1]) is None  # nobody knows yet how many rounds it is to have
    ranks, _ = done(store, runs)
    assert [order["settings"].get("rounds") for order in ranks.orders] == [None, 1, None, 3]


def test_matched_run_is_done_again_if_the_adaptive_one_had_other_rounds(tmp_path):
    store, runs = Store(tmp_path), some_runs(ADPSGD, MATCHED)
    done(store, runs)
    (tmp_path / runs[0].file).unlink()
    ranks = FakeRanks()
    ranks.orders = [None] * 5
    done(store, runs[:1], ranks)
    assert store.result(runs[1]) is None


def test_runs_before_an_interruption_are_kept_and_nothing_half_written(tmp_path):
    store, runs = Store(tmp_path), some_runs(FULL, QSGD, CPSGD_8)
    with pytest.raises(KeyboardInterrupt):
        done(store, runs, FakeRanks(fails_at=2))
    assert [store.result(run) is not None for run in runs] == [True, False, False]
    assert [file.name for file in tmp_path.rglob("*.*")] == ["full-seed0.json"]
    ranks, _ = done(store, runs)
    assert [order["settings"]["contender"]["name"] for order in ranks.orders] == ["qsgd", "cpsgd-8"]


def test_progress_names_the_run_what_came_of_it_and_the_time_left(tmp_path):
    _, said = done(Store(tmp_path), some_runs(FULL, QSGD))
    assert said[0].startswith("1 of 2  Net, full communication, seed 0: 1 rounds, 200 B, loss 1.0000, accuracy 60.00 %")
    assert said[0].endswith("about 1 min left)")
    assert said[1].endswith("none left)")


def test_time_left_goes_by_the_runs_of_the_same_task():
    other = dataclasses.replace(TASK, name="other")
    missing = [Run(TASK, FULL, 0), Run(TASK, QSGD, 0), Run(other, FULL, 0)]
    assert time_left(missing, {"net": [10.0, 12.0, 50.0]}) == 12 + 12 + 12
    assert time_left(missing, {"net": [10.0], "other": [100.0]}) == 10 + 10 + 100
    assert time_left([], {"net": [10.0]}) == 0


# The arithmetic of the page


def a_result(loss=1.0, right=0.5, sent=100, had=10, steps=40, curve=None, ratios=None):
    """Of a run with a round every so many steps, and the last one at the end of training."""
    every = steps // had
    averaging = {
        "step": [every * place for place in range(1, had + 1)],
        "trigger": ["period"] * (had - 1) + ["train_end"],
        "period": [every] * had,
        "learning_rate": [0.1] * had,
        "variance": [0.5] * had,
        "ratio": ratios or [5.0] * had,
        "target": [None] * (had // 2) + [5.0] * (had - had // 2),
    }
    curve = curve or [(1, 3.0, sent / 2, None), (2, 2.0, sent, right)]
    names = ("epoch", "loss", "sent_bytes", "accuracy")
    return {
        "steps": steps,
        "parameters": 50,
        "rounds": had,
        "sent_bytes": sent,
        "final_loss": loss,
        "accuracy": right,
        "curve": [dict(zip(names, point, strict=True)) for point in curve],
        "averaging": averaging,
    }


def outcomes_of(folder, results, task=TASK):
    """Outcomes with the given results, each a list by seed."""
    store = Store(folder)
    runs = []
    for contender, by_seed in results.items():
        for seed, result in enumerate(by_seed):
            runs.append(Run(task, contender, seed))
            if result is not None:
                store.keep(runs[-1], result, "command", {})
    return Outcomes(store, runs)


def test_spread_is_the_sample_deviation_and_one_run_has_none():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([1.0, 2.0, 3.0]).text(1, 10, sign=True) == "+20.0 ± 10.0"
    assert spread([2.0]).text(2) == "2.00"
    with pytest.raises(ValueError, match="expected one value at least"):
        spread([])


def test_differences_are_taken_within_a_seed_that_both_have(tmp_path):
    results = {FULL: [a_result(1.0), a_result(2.0), None], QSGD: [a_result(1.5), None, a_result(9.0)]}
    outcomes = outcomes_of(tmp_path, results)
    assert outcomes.differences(TASK, QSGD, FULL, final_loss) == [0.5]
    assert outcomes.differences(TASK, ADPSGD, FULL, final_loss) == []
    assert [(run.contender, run.seed) for run in outcomes.missing] == [(FULL, 2), (QSGD, 1)]
    assert outcomes.known(TASK, PAPER) == [FULL, QSGD]
    assert outcomes.of(TASK, FULL, final_loss) == (1.5, pytest.approx(0.5**0.5))


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-1.0, -2.0, 0.5], "-0.83 ± 1.26 (lower with 2 of 3 seeds)"),
        ([1.0, 2.0], "+1.50 ± 0.71 (higher with 2 of 2 seeds)"),
        ([0.25], "+0.25 (higher with 1 of 1 seeds)"),
    ],
)
def test_differences_are_told_with_how_many_seeds_agree(differences, words):
    assert in_words(differences, 2) == words


def test_loss_is_reached_on_a_straight_line_between_epochs():
    result = a_result(curve=[(1, 3.0, 100, None), (2, 1.0, 300, None), (3, 2.0, 500, None)])
    assert until(result, 3.5) == (1, 100)
    assert until(result, 1.5) == (1.75, 250)
    assert until(result, 1.0) == (2, 300)
    assert until(result, 0.9) is None


def test_quarters_hold_the_rounds_that_the_period_asked_for():
    # At steps 5, 10, …, 40; the last one is not the period's.
    ratios = [1.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 100.0]
    result = a_result(had=8, ratios=ratios)
    assert by_quarter(result, "ratio") == [2.0, 5.5, 7.5, 9.0]
    rare = a_result(had=2, ratios=[1.0, 2.0])  # at steps 20 and 40
    assert by_quarter(rare, "ratio") == [None, 1.0, None, None]
    assert quarters_over_seeds({0: result, 1: rare}, "ratio") == [None, 3.25, None, None]


# The claims


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        ([[1.0, 2.0], [0.5, 0.1]], "reproduced"),
        ([[1.0, 2.0], [0.5, -0.1]], "reproduced in part: 3 of 4 comparisons within a seed are as claimed"),
        ([[1.0, 2.0], [-0.5, -0.1]], "reproduced in part: 2 of 4 comparisons within a seed are as claimed"),
        ([[-1.0, 0.5], [-0.5, -0.1]], "not reproduced"),
        ([[0.0], [0.0]], "not reproduced"),
        ([[], []], "not measured"),
        ([], "not measured"),
    ],
)
def test_claim_is_reproduced_only_if_every_seed_of_every_comparison_says_so(better, expected):
    assert verdict(better) == expected


def test_adpsgd_is_judged_against_cpsgd_with_at_least_as_many_rounds(tmp_path):
    results = {
        ADPSGD: [a_result(1.0, 0.7, had=10)],
        MATCHED: [a_result(1.1, 0.6, had=10)],
        CPSGD_8: [a_result(0.9, 0.8, had=5)],  # better, but with half of the rounds: it says nothing about the claim
    }
    claim = claims(outcomes_of(tmp_path, results), [TASK], {})[0]
    assert claim.verdict == "reproduced"
    assert claim.sentences[0] == (
        "Net, ADPSGD, p_init = 4 (10 rounds) against CPSGD, as many rounds (10):"
        " final loss -0.1000 (lower with 1 of 1 seeds), accuracy +10.00 points (higher with 1 of 1 seeds)."
    )
    assert claim.sentences[1].endswith("Not part of the verdict, as it takes more rounds.")


def test_a_lower_loss_with_a_lower_accuracy_is_not_enough(tmp_path):
    results = {RARE: [a_result(1.0, 0.5, had=4)], CPSGD_8: [a_result(1.1, 0.6, had=5)]}
    assert claims(outcomes_of(tmp_path, results), [TASK], {})[0].verdict.startswith("reproduced in part: 1 of 2")


def test_qsgd_is_compared_in_loss_bytes_and_time(tmp_path):
    curve = [(1, 4.0, 10, None), (2, 2.0, 20, None), (3, 1.0, 30, 0.6)]
    slower = [(1, 5.0, 5, None), (2, 3.0, 10, None), (3, 1.0, 15, 0.6)]
    results = {
        QSGD: [a_result(0.9, 0.6, sent=30, curve=curve)],
        RARE: [a_result(1.1, 0.6, sent=15, curve=slower)],
        ADPSGD: [a_result(0.8, 0.6, sent=24, curve=slower)],
    }
    link = a_link(even=2.0, qsgd=1.25)
    claim = claims(outcomes_of(tmp_path, results), [TASK], {"10 Gbps": link})[1]
    assert claim.verdict == "not reproduced"
    assert "ADPSGD, p_init = 8, with 0.50 of QSGD's bytes" in claim.sentences[0]
    # QSGD has 2.0 after epoch 2 and 20 bytes; they, after 2.5 epochs and 12.5 bytes.
    assert "is there after 1.25 times its epochs and 0.62 times its bytes" in claim.sentences[0]
    assert "0.78 times its time on the link that stands for 10 Gbps" in claim.sentences[1]


# Links


def a_link(**speedups):
    return paper_links.Link(
        "link.json", "measure", "2 hosts", {n: 1 / s for n, s in speedups.items()}, speedups, 0.4, 5
    )


@pytest.mark.parametrize(("computes", "communicates", "period"), [(1.0, 1.0, 8), (3.0, 1.0, 4), (1.0, 5.0, 2)])
def test_share_of_communication_follows_from_the_speedup(computes, communicates, period):
    speedup = (computes + communicates) / (computes + communicates / period)
    share = communicates / (computes + communicates)
    assert paper_links.communication_share(speedup, period) == pytest.approx(share)


def test_middle_share_is_that_of_the_geometric_mean():
    assert paper_links.middle_share((1.2, 1.2)) == pytest.approx(paper_links.communication_share(1.2))
    assert paper_links.middle_share((1.0, 4.0)) == pytest.approx(paper_links.communication_share(2.0))


def write_link(folder, name):
    names = {"none": (1.0, 0.1), "ddp": (0.5, 0.2), "constant": (0.8, 0.125), "even": (0.9, 0.11), "qsgd": (0.7, 0.15)}
    rows = [
        {"contender": contender, "speed_vs_none": vs_none, "speed_vs_ddp": 0.2 / seconds, "step_seconds": seconds}
        for contender, (vs_none, seconds) in names.items()
    ]
    arguments = {"hosts": 2, "rate_mbit": 110.0, "model_parameters": 1000, "turns": 5, "timed_steps": 96}
    arguments["mean_period"] = 5.1
    content = {"command": ["python", "-m", "benchmarks.link"], "arguments": arguments, "rows": rows}
    (folder / paper_links.FILES[name]).write_text(json.dumps(content))


def test_measurements_on_links_are_read_from_their_files(tmp_path):
    assert paper_links.read_links(tmp_path) == {}
    write_link(tmp_path, "10 Gbps")
    (link,) = paper_links.read_links(tmp_path).values()
    assert link.command == "python -m benchmarks.link"
    assert (link.lost, link.mean_period) == (0.5, 5.1)
    assert link.speedup(ADPSGD) == link.speedup(MATCHED) == pytest.approx(0.2 / 0.11)
    assert link.speedup(CPSGD_8) == pytest.approx(1.6)
    assert link.speedup(RARE) is None
    assert link.seconds(QSGD) == 0.15


def test_speedups_below_the_papers_are_not_called_reproduced():
    outcomes = Outcomes(Store(Path("none")), [])
    reached = {"100 Gbps": a_link(even=1.2), "10 Gbps": a_link(even=1.6)}
    missed = reached | {"10 Gbps": a_link(even=1.4)}
    assert [claims(outcomes, [], each)[2].verdict for each in (reached, missed, {})] == [
        "reproduced for the shares that were set; the shares themselves are not testable here",
        "reproduced in part: 1 of 2 comparisons within a seed are as claimed",
        "not measured",
    ]


# The page


def page_of(folder, results, studies, links=None):
    tasks = {task.name: task for study in studies for task in study.tasks}
    store, runs = Store(folder), []
    for name, by_contender in results.items():
        for contender, by_seed in by_contender.items():
            for seed, result in enumerate(by_seed):
                runs.append(Run(tasks[name], contender, seed))
                store.keep(runs[-1], result, "command", {})
    return Page(studies, Outcomes(store, runs), links or {}, "runs", "the command", folder / "images")


COSINE = dataclasses.replace(TASK, name="net-cosine", title="Net, cosine", schedule="cosine")
STUDIES = (
    Study("paper", "The comparison", [TASK], PAPER, 2),
    Study("cosine", "Cosine", [COSINE], PAPER[:4], 1),
    Study("momentum", "Momentum", [TASK], MOMENTUM, 1),
    Study("rule", "Rule", [TASK], GRID, 1),
)


def test_page_has_a_row_per_contender_with_mean_spread_and_speedups(tmp_path):
    write_link(tmp_path, "10 Gbps")
    results = {
        "net": {
            ADPSGD: [a_result(1.0, 0.6, sent=2e6), a_result(1.2, 0.7, sent=2e6)],
            FULL: [a_result(0.8, 0.7, sent=10e6, had=40)],
        }
    }
    page = page_of(tmp_path, results, STUDIES, paper_links.read_links(tmp_path))
    text = page.text()
    row = "| ADPSGD, p_init = 4 | 2 | 10 ± 0 | 4.00 | 2.0 ± 0.0 | 0.200 | 1.1000 ± 0.1414 | 65.00 ± 7.07 | 1.82 |"
    assert row in text
    assert "| full communication | 1 | 40 | 1.00 | 10.0 | 1.000 | 0.8000 | 70.00 | 1.00 |" in text
    assert "`the command`" in text
    assert "65.00 ± 7.07" in page.overview()
    assert "## The rule under today's habits" not in text


def test_page_answers_every_study_that_has_runs(tmp_path):
    both = {ADPSGD: [a_result(1.0, ratios=[4.0] * 10)], CPSGD_8: [a_result(1.3, ratios=[8.0] * 3 + [2.0] * 7)]}
    others = {contender: [a_result(0.9)] for contender in (*MOMENTUM[1:], *GRID[:3])}
    page = page_of(tmp_path, {"net": both | others, "net-cosine": both}, STUDIES)
    text = page.text()
    for title in ("The comparison", "The rule under today's habits", "What averaging the optimizer's state does"):
        assert f"## {title}" in text
    assert "## p_init and sampling" in text
    assert "| Net, cosine | CPSGD, p = 8 | 1.60 | 1.00 |" not in text  # the second quarter is what it is relative to
    assert "| Net, cosine | CPSGD, p = 8 | 4.00 | 1.00 | 1.00 | 1.00 | 4.0 | 4.0 | 4.0 | 4.0 |" in text
    assert "| Net, cosine | ADPSGD, p_init = 4 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "- CPSGD, p = 16, state: average, against CPSGD, p = 8: final loss -0.4000" in text
    page.draw()
    drawn = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert drawn == sorted(["results-accuracy.png", HABITS, "results-loss.png", "results-variance.png"])
    for file in drawn:
        assert f"](images/{file})" in text


def test_page_says_how_many_runs_are_missing(tmp_path):
    store = Store(tmp_path)
    runs = some_runs(ADPSGD, FULL, QSGD)
    store.keep(runs[0], a_result(), "command", {})
    page = Page(STUDIES, Outcomes(store, runs), {}, "runs", "command", tmp_path / "images")
    assert "**2 of the runs that belong here are not done yet.**" in page.text()


RESULTS = ["--runs", "benchmarks/results/paper", "--page", "docs/results.md", "--page-only"]


def test_results_page_is_what_the_files_of_the_runs_say(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options = command.parse(RESULTS)
    page = command.new_page(options)
    assert options.page.read_text() == page.text()
    for shown in re.findall(r"\]\((images/.*?)\)", page.text()):
        assert (REPOSITORY / "docs" / shown).is_file()


# The command


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A scale that takes seconds, with images made up; arguments for it."""
    write_cifar10(tmp_path)
    study = Study("paper", "The comparison", [TASK], PAPER, 1)
    monkeypatch.setitem(command.SCALES, "short", (study,))
    return ["--scale", "short", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]


@pytest.mark.workers
def test_command_trains_all_contenders_writes_the_page_and_goes_on_where_it_was(tiny, tmp_path, capsys):
    assert command.main(tiny) == 0
    told = capsys.readouterr()
    assert "are not those that were published" in told.err
    folder = tmp_path / "runs" / "short"
    page = (folder / "results.md").read_text()
    kept = {file.stem: json.loads(file.read_text()) for file in (folder / "net").iterdir()}
    assert {content["settings"]["contender"]["name"] for content in kept.values()} == {each.name for each in PAPER}
    results = {name.removesuffix("-seed0"): content["result"] for name, content in kept.items()}
    assert {result["steps"] for result in results.values()} == {6}
    parameters = parameter_count("resnet_tiny")
    # Two workers: a ring sends each tensor once. QSGD sends a byte per gradient, and a norm per 512.
    assert results["full"]["sent_bytes"] == 6 * 4 * parameters
    assert results["qsgd"]["sent_bytes"] == pytest.approx(6 * parameters * 516 / 512, rel=0.02)
    assert results["adpsgd"]["rounds"] == results["cpsgd-matched"]["rounds"] == 2  # after 4 steps, and at the end
    assert results["adpsgd"]["averaging"]["step"] == [4, 6]
    assert kept["cpsgd-matched-seed0"]["settings"]["rounds"] == 2
    for result in results.values():
        assert result["curve"][-1]["accuracy"] == result["accuracy"]
        assert (4 * result["accuracy"]).is_integer()  # of four test images
        assert math.isfinite(result["final_loss"])
    for contender in PAPER:
        assert f"| {contender.title} | 1 |" in page
        assert contender.title in told.out
    assert (folder / "images" / "results-loss.png").stat().st_size > 1000

    def refuse(*_):
        raise AssertionError("no rank is to be started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "ranks", refuse)
        assert command.main(tiny) == 0
    assert "6 of 6 runs are done" in capsys.readouterr().err


def test_nothing_to_write_about_is_an_error(tiny, capsys):
    assert command.main([*tiny, "--page-only"]) == command.FAILED
    assert "no run of this kind is done" in capsys.readouterr().err


def test_images_that_are_missing_and_cannot_be_downloaded_are_an_error_that_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    def no_network(root, train, download):
        raise OSError("no route") if download else RuntimeError("not found")

    facts = command.DATASETS["cifar10"]._replace(original=no_network)
    monkeypatch.setitem(command.DATASETS, "cifar10", facts)
    code = command.main(["--scale", "short", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert code == command.FAILED
    told = capsys.readouterr().err
    assert "could not be downloaded (no route)" in told
    assert "make paper DATA=" in told
