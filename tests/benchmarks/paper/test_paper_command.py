import json
import math
import re
from dataclasses import replace

import pytest

from benchmarks.frame.command import FAILED
from benchmarks.frame.trainer import parameter_count
from benchmarks.paper import __main__ as command
from benchmarks.paper.networks import new_network
from benchmarks.paper.plan import BF16, FULL, INT8, PAPER, POWERSGD, Study
from tests.benchmarks.paper.samples import TASK
from tests.examples.test_image_classification import write_cifar10

INT8_LIKE = replace(INT8, name="adpsgd-bf16", title="ADPSGD, bf16", reduce_dtype="bf16")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A scale that takes seconds, with made-up images; its arguments."""
    write_cifar10(tmp_path)
    study = Study("paper", "The comparison", [TASK], PAPER, 1)
    monkeypatch.setitem(command.SCALES, "short", (study,))
    return ["--scale", "short", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]


@pytest.mark.workers
def test_command_trains_all_contenders_writes_the_page_and_continues_where_it_was(tiny, tmp_path, capsys):
    assert command.main(tiny) == 0
    told = capsys.readouterr()
    assert "are not the published ones" in told.err
    folder = tmp_path / "runs" / "short"
    page = (folder / "results.md").read_text()
    kept = {file.stem: json.loads(file.read_text()) for file in (folder / "net").iterdir()}
    assert {content["settings"]["contender"]["name"] for content in kept.values()} == {each.name for each in PAPER}
    results = {name.removesuffix("-seed0"): content["result"] for name, content in kept.items()}
    assert {result["steps"] for result in results.values()} == {6}
    parameters = parameter_count(new_network("resnet_tiny"))
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


def selection(*options):
    return {run.file for run in command.selected(command.parse(options))}


def test_runs_can_be_selected_by_study_task_contender_and_seed():
    assert selection(
        "--studies", "bytes", "--tasks", "resnet,vgg", "--contenders", "full,adpsgd-int4", "--seeds", "2"
    ) == {
        f"{task}/{contender}-seed{seed}.json"
        for task in ("resnet", "vgg")
        for contender in ("full", "adpsgd-int4")
        for seed in (0, 1)
    }
    assert len(selection("--studies", "bytes", "--contenders", "full", "--tasks", "resnet")) == 5
    assert len(selection("--studies", "paper", "--contenders", "full", "--tasks", "resnet")) == 3


def test_what_a_selected_run_depends_on_is_selected_too():
    chosen = selection("--studies", "paper", "--tasks", "vgg", "--contenders", "cpsgd-matched", "--seeds", "1")
    assert chosen == {"vgg/adpsgd-seed0.json", "vgg/cpsgd-matched-seed0.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "full,fastest"], "expected some of .*adpsgd-int4.*, got 'fastest'"),
        (["--tasks", "mnist"], "expected some of .*vit-adamw.*, got 'mnist'"),
        (["--studies", "momentum", "--contenders", "qsgd"], "--scale cpu has no run with all of --studies"),
    ],
)
def test_selection_of_nothing_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(options)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.workers
def test_contenders_that_send_less_are_trained_and_counted(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    contenders = (FULL, BF16, POWERSGD[0].at_rate(2), INT8_LIKE)
    monkeypatch.setitem(command.SCALES, "short", (Study("bytes", "Bytes", [TASK], contenders, 1),))
    assert command.main(["--scale", "short", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "short" / "net"
    sent = {file.stem: json.loads(file.read_text())["result"]["sent_bytes"] for file in folder.iterdir()}
    assert sent["ddp-bf16-seed0"] == sent["full-seed0"] / 2
    # Two steps of six are not compressed.
    assert sent["full-seed0"] / 3 < sent["powersgd-1-x2-seed0"] < sent["full-seed0"] / 2
    assert sent["adpsgd-bf16-seed0"] < sent["full-seed0"] / 2
    assert (tmp_path / "runs" / "short" / "images" / "results-bytes.png").is_file()


def test_nothing_to_write_about_is_an_error(tiny, capsys):
    assert command.main([*tiny, "--page-only"]) == FAILED
    assert "no such run is finished" in capsys.readouterr().err


def test_images_that_are_missing_and_cannot_be_downloaded_are_an_error_that_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    def no_network(root, train, download):
        raise OSError("no route") if download else RuntimeError("not found")

    facts = command.DATASETS["cifar10"]._replace(original=no_network)
    monkeypatch.setitem(command.DATASETS, "cifar10", facts)
    code = command.main(["--scale", "short", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert code == FAILED
    told = capsys.readouterr().err
    assert "could not be downloaded (no route)" in told
    assert "make paper DATA=" in told
