"""The Trainer's strategy among workers that come and go: real processes, commanded batch by batch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.elastic.crowd import Crowd, Lighthouse
from tests.elastic.test_elastic import same
from tests.elastic.trainer_member import BATCH_SIZE, BATCHES, SAMPLES, fit

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")
pytestmark = pytest.mark.workers


@pytest.fixture
def lighthouse() -> Iterator[Lighthouse]:
    lighthouse = Lighthouse(join_timeout_ms=10_000)
    yield lighthouse
    lighthouse.kill()


@pytest.fixture
def crowd(lighthouse: Lighthouse, tmp_path: Path) -> Iterator[Crowd]:
    crowd = Crowd(lighthouse.address, target=fit, folder=tmp_path)
    yield crowd
    crowd.end()


def gather(crowd, workers, **arguments):
    crowd.start(*workers, start_workers=len(workers), **arguments)
    return crowd.receive(*workers)


def position(answer):
    return {key: answer[key] for key in ("steps", "global_step", "epoch", "rate", "rule", "waited")}


def test_workers_train_on_shares_of_the_data_and_validate_on_all_of_it(crowd, tmp_path):
    gather(crowd, [0, 1, 2], epochs=2)
    answers = crowd.do(BATCHES, 0, 1, 2)
    assert same(answers)
    assert sorted(n for each in answers.values() for _, numbers in each["seen"] for n in numbers) == [*range(SAMPLES)]
    assert all(each["validated"] == [*range(SAMPLES)] for each in answers.values())
    assert len({float(each["val"]) for each in answers.values()}) == 1
    ended = crowd.do(BATCHES, 0, 1, 2)
    assert same(ended)
    assert [each["how"] for each in ended.values()] == ["finished"] * 3
    assert position(ended[0]) == position(ended[1]) == position(ended[2])
    assert ended[0]["bytes"] == (ended[1]["bytes"][0], ended[2]["bytes"][1])
    assert ended[0]["bytes"][1] > 2 * ended[0]["bytes"][0] > 0
    assert [each["writes"] for each in ended.values()] == [True, False, False]
    assert len([*tmp_path.rglob("*.ckpt")]) == 1
    assert len([*tmp_path.rglob("metrics.csv")]) == 1
    best = torch.load(ended[1]["best"], weights_only=False)
    assert best["adpsgd"]["averaged"]


def test_all_workers_have_the_same_names_for_checkpoints_whoever_writes_them(crowd, tmp_path):
    folder = tmp_path / "lightning_logs" / "mine" / "checkpoints"
    folder.mkdir(parents=True)
    former = folder / f"epoch=0-step={BATCHES}.ckpt"
    former.write_text("of an earlier run")
    os.utime(former, (0, 0))
    gather(crowd, [0, 1], epochs=1, version="mine")
    ended = crowd.do(BATCHES, 0, 1)
    assert ended[0]["best"] == ended[1]["best"] == str(folder / f"epoch=0-step={BATCHES}-v1.ckpt")
    assert former.read_text() == "of an earlier run"


def test_a_worker_that_is_started_again_deletes_no_log_of_the_one_that_writes(lighthouse, crowd, tmp_path):
    gather(crowd, [0, 1], version="mine")
    crowd.do(1, 0, 1)
    crowd.kill(0)
    crowd.do(BATCHES, 1)
    log = tmp_path / "lightning_logs" / "mine" / "metrics.csv"
    written = log.read_text()
    crowd.start(0, version="mine")
    lighthouse.wait_for_requests()
    assert log.read_text() == written


def test_one_worker_writes_after_the_fit_too(crowd, tmp_path):
    gather(crowd, [0, 1], epochs=1, validates_again=True)
    ended = crowd.do(BATCHES, 0, 1)
    assert [each["how"] for each in ended.values()] == ["finished"] * 2
    [log] = tmp_path.rglob("metrics.csv")
    assert len(log.read_text().splitlines()) > BATCHES


@pytest.mark.parametrize("manual", [False, True])
def test_a_worker_that_is_started_again_goes_on_where_the_others_are(lighthouse, crowd, tmp_path, manual):
    gather(crowd, [0, 1, 2], manual=manual)
    crowd.do(BATCHES + 1, 0, 1, 2)
    crowd.kill(0)  # the one that writes
    after = crowd.do(3, 1, 2)
    assert same(after)
    assert [each["writes"] for each in after.values()] == [True, False]
    crowd.start(0, manual=manual)
    lighthouse.wait_for_requests()
    crowd.send(4, 1, 2)
    others = crowd.receive(1, 2)
    joined = crowd.receive(0)[0]
    # It may train as soon as it has joined, the others have ended that batch.
    assert same({0: joined, **others})
    assert position(joined) == position(others[1]) == position(others[2])
    assert joined["global_step"] == BATCHES + 8
    assert joined["seen"] == []
    assert not joined["writes"]
    answers = crowd.do(BATCHES - 8, 0, 1, 2)  # to the end of the epoch
    assert same(answers)
    assert position(answers[0]) == position(answers[1])
    assert [epoch for epoch, _ in answers[0]["seen"]] == [1] * (BATCHES - 8)
    ended = crowd.do(2 * BATCHES, 0, 1, 2)
    assert same(ended)
    assert position(ended[0]) == position(ended[1])
    assert [each["how"] for each in ended.values()] == ["finished"] * 3
    assert ended[0]["best"] == ended[1]["best"]
    assert len([*tmp_path.rglob("metrics.csv")]) == 2  # what the one that was lost has written is kept


def test_a_worker_that_joins_in_mid_epoch_goes_on_in_its_share_of_the_data(lighthouse, crowd):
    gather(crowd, [0, 1])
    crowd.do(2, 0, 1)
    crowd.start(2)
    lighthouse.wait_for_requests()
    crowd.send(2, 0, 1)
    joined = crowd.receive(0, 1, 2)
    assert position(joined[2]) == position(joined[0])
    answers = crowd.do(BATCHES - 4, 0, 1, 2)
    seen = [numbers for answer in answers.values() for _, batch in answer["seen"] for numbers in batch]
    assert len(answers[2]["seen"]) == BATCHES - 4
    assert len(seen) == len({*seen}) == SAMPLES - 4 * BATCH_SIZE
    answers = crowd.do(BATCHES, 0, 1, 2)
    assert same(answers)
    second = [n for answer in answers.values() for epoch, batch in answer["seen"] if epoch == 1 for n in batch]
    assert sorted(second) == [*range(SAMPLES)]


def test_a_worker_that_has_joined_steps_a_scheduler_that_watches_a_metric_when_the_others_do(lighthouse, crowd):
    gather(crowd, [0, 1], plateau=True)
    crowd.do(BATCHES + 1, 0, 1)
    crowd.start(2, plateau=True)
    lighthouse.wait_for_requests()
    crowd.send(3, 0, 1)
    crowd.receive(0, 1, 2)
    answers = crowd.do(BATCHES - 3, 0, 1, 2)
    assert {each["epoch"] for each in answers.values()} == {2}
    assert [each["rate"] for each in answers.values()] == pytest.approx([0.005] * 3)


@pytest.mark.parametrize("sleeps_for", [1, BATCHES + 6])
def test_a_straggler_is_given_the_others_state_and_place_in_the_run(lighthouse, crowd, sleeps_for):
    gather(crowd, [0, 1, 2])
    crowd.do(2, 0, 1, 2)
    os.kill(crowd.processes[2].pid, signal.SIGSTOP)
    # The others go on without it from the round at which its heartbeats are missing.
    at = crowd.do(6 + 4 * (sleeps_for // 4), 0, 1)[0]["global_step"]
    os.kill(crowd.processes[2].pid, signal.SIGCONT)
    crowd.send(2, 2)
    lighthouse.wait_for_requests()
    crowd.send(4, 0, 1)
    answers = crowd.receive(0, 1, 2)
    assert same(answers)
    assert {each["steps"] for each in answers.values()} == {at + 4}
    assert {each["rate"] for each in answers.values()} == {answers[0]["rate"]}
    crowd.send(10**6, 0, 1, 2)
    ended = crowd.receive(0, 1, 2)
    assert same(ended)
    assert [each["global_step"] for each in ended.values()] == [4 * BATCHES] * 3
    assert [each["how"] for each in ended.values()] == ["finished"] * 3


def test_a_worker_that_receives_sigterm_says_goodbye_and_its_last_steps_count(lighthouse, crowd):
    gather(crowd, [0, 1, 2])
    crowd.do(6, 0, 1, 2)
    os.kill(crowd.processes[2].pid, signal.SIGTERM)
    crowd.send(1, 2)
    lighthouse.wait_for_requests()
    crowd.send(2, 0, 1)
    left = crowd.receive(0, 1, 2)
    assert left[2]["how"].startswith("SIGTERMException")
    assert [record.step for record in left[0]["records"]] == [4, 8]
    assert left[0]["members"] == 3
    assert same(left)
    began = time.monotonic()
    answers = crowd.do(4, 0, 1)
    assert time.monotonic() - began < 10
    assert same(answers)
    assert answers[0]["members"] == 2


def test_a_worker_that_receives_sigterm_does_not_wait_for_others_for_long(crowd):
    gather(crowd, [0, 1])
    crowd.do(6, 0, 1)
    os.kill(crowd.processes[1].pid, signal.SIGTERM)
    crowd.send(1, 1)
    assert crowd.receive(1, seconds=40)[1]["how"].startswith("SIGTERMException")


def test_early_stopping_ends_all_workers_at_the_same_step_with_the_same_weights(crowd):
    gather(crowd, [0, 1], epochs=50, patience=1)
    crowd.send(10**6, 0, 1)
    ended = crowd.receive(0, 1)
    assert [each["how"] for each in ended.values()] == ["finished"] * 2
    assert same(ended)
    assert position(ended[0]) == position(ended[1])
    assert ended[0]["waited"] == 1
    assert ended[0]["global_step"] < 50 * BATCHES


def test_a_worker_whose_time_is_up_leaves_and_the_others_go_on(crowd):
    crowd.start(0, start_workers=2)
    crowd.start(1, start_workers=2, max_time={"milliseconds": 1})
    crowd.receive(0, 1)
    crowd.send(10**6, 0, 1)
    ended = crowd.receive(0, 1)
    assert [each["how"] for each in ended.values()] == ["finished"] * 2
    assert ended[0]["global_step"] == 4 * BATCHES
    assert 1 <= len(ended[1]["seen"]) < BATCHES
    assert len(ended[1]["records"]) == 1  # its last steps are averaged
    assert ended[0]["records"][0].step == ended[1]["records"][0].step


def test_workers_with_fewer_batches_leave_and_the_others_go_on(crowd):
    crowd.start(0, start_workers=2, epochs=1, batches=6)
    crowd.start(1, start_workers=2, epochs=1)
    crowd.receive(0, 1)
    crowd.send(6, 0)
    crowd.send(BATCHES, 1)
    ended = crowd.receive(0, 1)
    assert [each["how"] for each in ended.values()] == ["finished"] * 2
    assert [(record.step, record.trigger) for record in ended[1]["records"][:2]] == [(4, "period"), (8, "validation")]
    assert len(ended[0]["records"]) == 2
    assert ended[1]["global_step"] == BATCHES


def test_a_run_continues_from_a_checkpoint(crowd, tmp_path):
    gather(crowd, [0, 1], epochs=1)
    first = crowd.do(BATCHES, 0, 1)
    path = Path(first[0]["best"])
    crowd.send("bye", 0, 1)
    for process in crowd.processes.values():
        process.join(20)
    gather(crowd, [0, 1], checkpoint=path)
    answers = crowd.do(4, 0, 1)
    assert same(answers)
    assert position(answers[0]) == position(answers[1])
    assert answers[0]["steps"] == answers[0]["global_step"] == BATCHES + 4
    assert {epoch for epoch, _ in answers[0]["seen"]} == {1}


def test_a_yaml_file_describes_an_elastic_worker(lighthouse, tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"""
        model: {{class_path: lightning.pytorch.demos.boring_classes.BoringModel}}
        trainer:
          accelerator: cpu
          devices: 1
          max_steps: 4
          callbacks: [{{class_path: lightning_adpsgd.CommunicationMonitor}}]
          strategy:
            class_path: lightning_adpsgd.ADPSGDStrategy
            init_args:
              period: 2
              elastic: {{lighthouse: "{lighthouse.address}", worker: 0, max_workers: 1, quorum_timeout: "0:00:20"}}
        """
    )
    command = [sys.executable, "-m", "lightning_adpsgd", "fit", "-c", "config.yaml"]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "max_steps=4" in done.stderr
    assert len([*tmp_path.rglob("*.ckpt")]) == 1
