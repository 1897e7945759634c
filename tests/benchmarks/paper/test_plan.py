import pytest

from benchmarks.paper.plan import (
    ADPSGD,
    CPSGD_8,
    FULL,
    GRID,
    MATCHED,
    PAPER,
    QSGD,
    RARE,
    SCALES,
    runs_of,
)


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
