import pytest

from benchmarks.elastic import CONTENDERS, Case, as_row, main
from tests.benchmarks.helpers import measured

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")


def an_answer(*, late=0.0, slow=0.0, cpu=0.1):
    """Of two turns on one worker."""
    return {
        "LocalSGD": [[10.0 + late, 12.0 + slow, cpu, None], [30.0 + late, 33.0 + slow, cpu, None]],
        "ElasticLocalSGD": [[20.0 + late, 24.0 + slow, cpu, None], [40.0 + late, 43.0 + slow, cpu, None]],
        "joined": [[50.0 + late, 57.0 + slow, cpu, None]],
    }


def test_turn_is_from_the_last_start_to_the_last_end_and_ratio_is_that_of_the_medians():
    joins = an_answer() | {"joined": []}  # the last worker, whose own time is not counted
    row = as_row(2, Case(1000, 7), [an_answer(cpu=0.3), an_answer(late=0.5, slow=0.25)])
    assert row["turns"].pop("joining_seconds") == [7.0]
    assert as_row(3, Case(1000, 7), [an_answer(), an_answer(late=0.5, slow=0.25), joins])["joining_seconds"] == 7.25
    assert row["turns"] == {"plain_seconds": [1.75, 2.75], "elastic_seconds": [3.75, 2.75]}
    assert (row["plain_seconds"], row["elastic_seconds"], row["extra_seconds"]) == (2.25, 3.25, 1.0)
    assert row["ratio"] == pytest.approx(3.25 / 2.25)
    assert row["plain_cpu_seconds"] == row["elastic_cpu_seconds"] == pytest.approx(0.2)


@pytest.mark.workers
def test_both_contenders_are_measured_in_the_same_processes(tmp_path):
    options = "--workers 2 --parameters 0.001,0.01 --tensors 3 --turns 3 --joins 1"
    printed, numbers = measured(main, tmp_path / "measured.json", *options.split())
    assert numbers["benchmark"] == "elastic"
    assert [(row["workers"], row["parameters"]) for row in numbers["rows"]] == [(2, 1000), (2, 10_000)]
    for row in numbers["rows"]:
        assert [len(turns) for turns in row["turns"].values()] == [3] * len(CONTENDERS) + [1]
        assert row["ratio"] == pytest.approx(row["elastic_seconds"] / row["plain_seconds"])
        assert row["elastic_cpu_seconds"] > 0
    assert "ratio" in printed
