import json
from dataclasses import replace
from itertools import takewhile

import pytest

from benchmarks.paper.plan import (
    ADPSGD,
    ADPSGD_INT4,
    AGAINST_BYTES,
    BF16,
    BYTES,
    CPSGD_8,
    FASTER,
    FULL,
    GRID,
    MATCHED,
    PAPER,
    QSGD,
    RARE,
    SCALES,
    Study,
    runs_of,
)
from tests.benchmarks.helpers import REPOSITORY
from tests.benchmarks.paper.samples import TASK


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
    assert {run.seed for run in runs_of(SCALES["cpu"])} == {0, 1, 2, 3, 4}
    assert {run.seed for run in runs_of(SCALES["cpu"], seeds=1)} == {0}


def test_grid_has_the_default_once_under_its_own_name():
    assert len({contender.name for contender in GRID}) == len(GRID) == 9
    assert ADPSGD in GRID
    assert RARE in GRID


def test_later_fields_are_settings_only_where_they_differ_from_their_default():
    (run,) = (run for run in runs_of(SCALES["cpu"], 1) if (run.task.name, run.contender) == ("resnet", FULL))
    assert {"reduce_dtype", "matrix_rank", "rate"}.isdisjoint(run.settings(None)["contender"])
    faster = run._replace(contender=FULL.at_rate(2)).settings(None)["contender"]
    assert (faster["name"], faster["rate"]) == ("full-x2", 2)
    assert run._replace(contender=replace(FULL, optimizer_state="local")).settings(None) == run.settings(None)


def test_all_stored_runs_have_the_current_settings():
    folder = REPOSITORY / "benchmarks" / "results" / "paper" / "cpu"
    runs = {run.file: run for run in runs_of(SCALES["cpu"])}
    files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.json"))]
    assert len(files) >= 114
    for file in files:
        kept = json.loads((folder / file).read_text())["settings"]
        assert json.loads(json.dumps(runs[file].settings(kept.get("rounds")))) == kept, file


def the_study_of_bytes(scale="cpu"):
    (study,) = (study for study in SCALES[scale] if study.name == "bytes")
    return study


def test_accuracy_against_bytes_covers_every_task_with_five_seeds():
    study = the_study_of_bytes()
    assert [task.name for task in study.tasks] == ["vgg", "googlenet", "resnet", "resnet-cosine", "vit-adamw"]
    assert study.seeds == 5
    assert {FULL, QSGD, BF16, ADPSGD, ADPSGD_INT4} <= set(BYTES)
    assert sorted(each.matrix_rank for each in BYTES if each.method == "powersgd") == [1, 2, 4]


def test_only_adamw_is_tuned():
    study = the_study_of_bytes()
    tuned = {task.name: {each.name for each in study.of(task) if each.rate != 1} for task in study.tasks}
    assert tuned.pop("vit-adamw") >= {"full-x2", "adpsgd-int4-x2", "powersgd-1-x2", "powersgd-4-x2"}
    assert set(map(len, tuned.values())) == {0}


def test_runs_that_are_compared_come_first_of_every_seed():
    runs = runs_of([the_study_of_bytes()])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    pair = {FULL, ADPSGD_INT4, *FASTER[FULL], *FASTER[ADPSGD_INT4]}
    for seed in range(5):
        of_seed = [run for run in runs if run.seed == seed]
        first = [*takewhile(lambda run: run.contender in pair, of_seed)]
        assert {run.task.name for run in first} == {"vgg", "googlenet", "resnet", "resnet-cosine", "vit-adamw"}
        assert len(first) == sum(run.contender in pair for run in of_seed) == 2 * 5 + 4


def test_contenders_of_some_tasks_are_run_for_these_only():
    other = replace(TASK, name="other")
    study = Study("some", "Some", [TASK, other], [ADPSGD], 1, more={"other": [FULL]}, first=[FULL])
    assert [(run.task.name, run.contender) for run in study.runs(0)] == [
        ("other", FULL),
        ("net", ADPSGD),
        ("other", ADPSGD),
    ]


def test_language_and_a_longer_run_are_studied_too():
    studies = {study.name: study for study in SCALES["cpu"]}
    (language,), (long,) = studies["language"].tasks, studies["long"].tasks
    assert (language.data, language.optimizer, language.schedule, language.workers) == ("text", "adamw", "cosine", 8)
    assert language.images * language.epochs // (language.workers * language.batch_size) == 1200
    assert (long.network, long.epochs) == ("resnet_tiny", 60)
    for name in AGAINST_BYTES:
        assert {FULL, ADPSGD_INT4} <= set(studies[name].contenders)
