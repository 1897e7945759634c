"""Real processes, which are struck for real."""

import multiprocessing
import os
import signal

import pytest

from benchmarks.frame.errors import NotMeasuredError
from benchmarks.survival import __main__ as survival
from benchmarks.survival.contenders import why_not
from benchmarks.survival.faults import OWN_END, Draw
from benchmarks.survival.run import Run
from benchmarks.survival.task import Setup
from tests.benchmarks.helpers import measured

pytestmark = [
    pytest.mark.workers,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


BEFORE: set[multiprocessing.process.BaseProcess] = set()


@pytest.fixture(autouse=True)
def _children_of_other_tests():
    BEFORE.clear()
    BEFORE.update(multiprocessing.active_children())


def started_since():
    """Processes that this test has started, and that are alive."""
    return {*multiprocessing.active_children()} - BEFORE


def running(cluster, contender="adpsgd"):
    setup = Setup(contender, 3, period=4, step_seconds=0.01, heartbeat_ms=1000, timeout_seconds=20.0, seed=0)
    return Run(setup, cluster, pause=0.1, away=1.5)


def struck(*kinds, contender="adpsgd"):
    """A run of three workers in which worker 0 is struck, by one fault after the other."""
    options = survival.parse(["--workers", "3", "--faults", ",".join(kinds)])
    with survival.cluster_of(options) as cluster, running(cluster, contender) as run:
        for kind in kinds:
            before = len(run.log.faults)
            run.strike(lambda log, before=before: len(log.faults) > before, iter([Draw(0.0, kind, (0, 1, 2))] * 2))
        return run.end()


def assert_survived(log, *kinds):
    assert [(fault.kind, fault.reason) for fault in log.faults] == [(kind, "") for kind in kinds]
    for fault, recovery in zip(log.faults, log.recoveries(), strict=True):
        assert fault.worker == (None if fault.kind == "lighthouse" else 0)
        assert None not in recovery, fault.kind
    assert len(log.losses) == 3
    assert max(log.losses) == pytest.approx(min(log.losses))  # of one average
    assert log.processes_left == 0
    assert log.ports_left == []
    assert started_since() == set()


def test_stopped_worker_and_new_lighthouse_are_survived():
    assert_survived(struck("stop", "lighthouse"), "stop", "lighthouse")


@pytest.mark.network
def test_worker_that_is_cut_off_is_survived_and_comes_back(namespaces):
    log = struck("cut")
    assert_survived(log, "cut")
    assert log.faults[0].ended - log.faults[0].began >= 1.5
    (there,) = [presence for presence in log.presences if presence.worker == 0]
    assert there.steps > 0  # the same process


def test_torchft_goes_through_the_same():
    assert_survived(struck("kill", contender="torchft"), "kill")


def test_command_kills_as_often_as_asked_for_and_writes_all(tmp_path):
    options = ["--workers", "3", "--kills", "2", "--every", "0.2", "--period", "4", "--step-ms", "10"]
    text, written = measured(survival.main, tmp_path / "survival.json", *options)
    assert "survived: kill" in text
    assert "2 of 2" in text
    (row,) = written["rows"]
    assert [(run["seed"], run["run"], len(run["faults"])) for run in row["runs"]] == [
        (0, "undisturbed", 0),
        (0, "disturbed", 2),
    ]
    for run in row["runs"]:
        assert run["steps"] > 0
        assert run["loss"] < 2
    assert len(row["runs"][1]["start_seconds"]) == 2
    assert written["arguments"]["kills"] == 2
    assert started_since() == set()


def test_process_that_ends_by_itself_is_told_from_one_that_was_killed_and_started_again():
    with survival.cluster_of(survival.parse(["--workers", "3"])) as cluster, running(cluster) as run:
        os.kill(run.processes[1].pid, signal.SIGABRT)
        run.calm(0.5)
        run.strike(lambda log: True, iter([Draw(0.0, "kill", (0, 1, 2))]))  # nothing but waits until all are back
        log = run.end()
    (fault,) = log.faults
    assert (fault.kind, fault.worker, fault.reason) == (OWN_END, 1, f"exit code {-signal.SIGABRT}")
    assert log.recoveries()[0].back_seconds is not None


def test_workers_that_cannot_start_are_an_error_with_their_reason_and_leave_nothing():
    with (
        survival.cluster_of(survival.parse(["--workers", "3"])) as cluster,
        pytest.raises(NotMeasuredError, match=r"nothing could not start together\. KeyError: 'nothing'"),
    ):
        running(cluster, "nothing").__enter__()
    assert started_since() == set()


def test_processes_end_with_the_run_whatever_happens_even_one_that_is_stopped():
    def interrupted():
        with survival.cluster_of(survival.parse(["--workers", "3"])) as cluster, running(cluster) as run:
            os.kill(run.processes[1].pid, signal.SIGSTOP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started_since() == set()
