import sys

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.baselines import BF16Strategy, PowerSGDStrategy, QSGDStrategy
from benchmarks.baselines.qsgd import QSGDCodec
from lightning_adpsgd import ADPSGDStrategy
from tests.benchmarks.helpers import REPOSITORY


def command_line(monkeypatch, tmp_path, name, *arguments):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    example = REPOSITORY / "examples" / "image_classification" / "ddp.yaml"
    configurations = ["--config", str(example), "--config", str(REPOSITORY / "benchmarks" / "baselines" / name)]
    return LightningCLI(run=False, args=[*configurations, "--trainer.accelerator", "cpu", *arguments])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("full.yaml", DDPStrategy),
        ("cpsgd.yaml", ADPSGDStrategy),
        ("qsgd.yaml", QSGDStrategy),
        ("powersgd.yaml", PowerSGDStrategy),
        ("bf16.yaml", BF16Strategy),
    ],
)
def test_configuration_on_top_of_the_example_makes_the_strategy_it_names(monkeypatch, tmp_path, name, kind):
    cli = command_line(monkeypatch, tmp_path, name)
    assert type(cli.trainer.strategy) is kind
    assert cli.trainer.world_size == 2


def test_options_of_ddp_can_be_given_to_qsgd(monkeypatch, tmp_path):
    given = {"bucket_size": 256, "seed": 5, "bucket_cap_mb": 3, "broadcast_buffers": False}
    arguments = [f"--trainer.strategy.{option}={value}" for option, value in given.items()]
    arguments.append("--trainer.strategy.process_group_backend=gloo")
    strategy = command_line(monkeypatch, tmp_path, "qsgd.yaml", *arguments).trainer.strategy
    assert (strategy._reducer._codec, strategy._reducer._seed) == (QSGDCodec(256), 5)
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 3
    assert not strategy._ddp_kwargs["broadcast_buffers"]
    assert strategy.process_group_backend == "gloo"


def test_option_that_ddp_does_not_have_is_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line(monkeypatch, tmp_path, "qsgd.yaml", "--trainer.strategy.bucket_cap=3")
    assert "bucket_cap" in capsys.readouterr().err
