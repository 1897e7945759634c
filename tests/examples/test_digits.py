"""The demo and the plain loop, as a user starts them."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.workers


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    # Variables of a launcher around the tests would tell the script that its processes exist already.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_smallest_example_learns_the_digits_prints_a_summary_and_draws(tmp_path):
    done = run(EXAMPLES / "digits.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test_accuracy\D*([\d.]+)", done.stdout)[1]) > 0.95
    rounds, steps = map(int, re.search(r"rounds +(\d+) in (\d+) steps", done.stdout).groups())
    assert steps == 440
    assert 20 < rounds < 110
    first, last = map(int, re.search(r"period +(\d+) at first, (\d+) at last", done.stdout).groups())
    assert first == 4
    assert last > 4
    assert float(re.search(r"factor saved +([\d.]+)x", done.stdout)[1]) > 4
    plot = tmp_path / re.search(r"plot +(\S+)", done.stdout)[1]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "adpsgd/variance" in (plot.parent / "metrics.csv").read_text()


def test_the_smallest_example_takes_other_strategies(tmp_path):
    constant = run(EXAMPLES / "digits.py", "--strategy", "11", "--epochs", "1", cwd=tmp_path)
    assert constant.returncode == 0, constant.stderr
    assert "11 at first, 11 at last" in constant.stdout
    ddp = run(EXAMPLES / "digits.py", "--strategy", "ddp", "--epochs", "1", cwd=tmp_path)
    assert ddp.returncode == 0, ddp.stderr
    assert "Averaging rounds" not in ddp.stdout
    assert "test_accuracy" in ddp.stdout


def test_the_demo_compares_three_strategies_in_a_table_and_a_picture(tmp_path):
    done = run(EXAMPLES / "demo.py", "--epochs", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    number = r" +([\d.]+)"
    rows = re.findall(rf"^(\w+){number} %{number} MB{number}{number}{number} s$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["ddp", "adpsgd", "adpsgd_int4"]
    (_, accuracy, sent, share, rounds, _), *averaged = rows
    assert (float(share), int(rounds)) == (1.0, 110)
    assert 12 < float(sent) < 13.5  # 110 gradients of 29,194 fp32 numbers
    for _, *row in averaged:
        assert float(row[0]) > min(90, float(accuracy))
        assert float(row[2]) < 0.4
    assert float(averaged[1][2]) < float(averaged[0][2])
    assert (tmp_path / "logs" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^  epoch", done.stdout, re.MULTILINE)) == 3 * 5  # no terminal: a line each
    assert len(done.stderr.splitlines()) < 5, done.stderr  # no flood of warnings
    assert "\r" not in done.stdout


def test_a_project_with_the_other_familys_classes_trains(tmp_path):
    done = run(EXAMPLES / "with_pytorch_lightning.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.distributed" not in done.stderr  # of a name that torch has renamed, for example
    assert float(re.search(r"accuracy ([\d.]+) %", done.stdout)[1]) > 90
    rounds, steps = map(int, re.search(r"rounds +(\d+) in (\d+) steps", done.stdout).groups())
    assert steps == 220
    assert 2 < rounds < 115


def test_a_loop_in_fabrics_style_learns_saves_and_goes_on(tmp_path):
    example = EXAMPLES / "fabric_gpt.py"
    first = run(example, "--steps", "16", "--epochs", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.search(r"rounds +\d+ in 16 steps", first.stdout)
    second = run(example, "--steps", "16", "--epochs", "2", "--resume", "logs/fabric_gpt/last.ckpt", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "epoch 1:" not in second.stdout
    before, after = (float(re.search(r"validation loss ([\d.]+)", each.stdout)[1]) for each in (first, second))
    assert after < before < 4.6  # which is that of guessing, among a hundred characters


def test_the_smallest_example_names_wrong_arguments(monkeypatch, capsys):
    for arguments, message in (
        (["--strategy", "0"], "'0': expected adpsgd, ddp, proportional, or an averaging period such as 8"),
        (["--workers", "none"], "'none': expected an int of at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_local_sgd_works_in_a_plain_loop_started_by_torchrun(tmp_path):
    arguments = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*arguments, EXAMPLES / "plain_loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"test accuracy ([\d.]+)", done.stdout)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) > 0.85
    periods = [int(period) for period in re.findall(r"period +(\d+)", done.stdout)]
    assert periods[0] == 4
    assert max(periods) > 4
