import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor, ConstantPeriod, __version__
from lightning_adpsgd.cli import main
from tests.test_plot import RUN, SIZE, png_size

EXPERIMENT = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, batches: int = 10):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(2 * self.batches, 4)), batch_size=2)
"""

ADAPTIVE = {
    "class_path": "lightning_adpsgd.ADPSGDStrategy",
    "init_args": {
        "period": {
            "class_path": "lightning_adpsgd.AdaptivePeriod",
            "init_args": {"initial": 2, "sampling": 6, "low": 0.5, "maximum": 16},
        },
        "optimizer_state": "average",
        "bucket_size_mb": 1.5,
        "timeout": "0:07:00",
    },
}
CONSTANT = {
    "class_path": "lightning_adpsgd.ADPSGDStrategy",
    "init_args": {"period": 5, "average_buffers": False, "start_method": "spawn"},
}
STRATEGIES = pytest.mark.parametrize("strategy", ["adpsgd", ADAPTIVE, CONSTANT], ids=["name", "adaptive", "int"])


@pytest.fixture
def folder(alone, tmp_path, monkeypatch):
    """A user's working directory with a model and data; nothing of it, or of a run, is left behind."""
    (tmp_path / "tiny_experiment.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["adpsgd"])
    yield tmp_path
    sys.modules.pop("tiny_experiment", None)


def configuration(strategy):
    return {
        "seed_everything": 1,
        "trainer": {
            "strategy": strategy,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning_adpsgd.CommunicationMonitor"}],
        },
        "model": {"class_path": "tiny_experiment.Model"},
        "data": {"class_path": "tiny_experiment.Data"},
    }


def written(content, name="experiment.yaml"):
    Path(name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return name


def printed_config(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


# As a command


def test_module_trains_and_console_script_helps_and_tells_its_version(folder):
    script = shutil.which("adpsgd", path=str(Path(sys.executable).parent))
    assert script is not None
    by_name = written(configuration("adpsgd"))
    trains = [sys.executable, "-m", "lightning_adpsgd", "fit", "--config", by_name]
    commands = [trains, [script, "--help"], [script, "--version"]]
    with ThreadPoolExecutor() as side_by_side:  # most of their time is start-up
        run = partial(subprocess.run, cwd=folder, capture_output=True, text=True)
        trained, helped, told = side_by_side.map(run, commands)
    assert trained.returncode == 0, trained.stderr
    assert "3 in 10 steps (30.0%): period 2, train_end 1" in trained.stdout
    assert helped.returncode == 0, helped.stderr
    assert "usage: adpsgd" in helped.stdout
    assert "fit" in helped.stdout
    for command in ("plot", "elastic", "lighthouse"):
        assert f"adpsgd {command} " in " ".join(helped.stdout.split())
    assert told.stdout == f"adpsgd {__version__}\n"


# As a function


def test_configuration_with_nested_class_paths_trains(folder, capsys):
    main(["fit", "--config", written(configuration(ADAPTIVE))])
    assert "5 in 10 steps (50.0%): period 5" in capsys.readouterr().out


def test_command_line_trains_with_a_constant_period(folder, capsys):
    strategy = ["--trainer.strategy=lightning_adpsgd.ADPSGDStrategy", "--trainer.strategy.period=5"]
    main(["fit", "--config", written(configuration("auto")), *strategy])
    assert "2 in 10 steps (20.0%): period 2" in capsys.readouterr().out


def test_modules_of_the_working_directory_are_found_by_the_console_script(folder, monkeypatch, capsys):
    elsewhere = [entry for entry in sys.path if entry not in ("", str(folder), os.getcwd())]
    monkeypatch.setattr(sys, "path", elsewhere)
    assert "class_path: tiny_experiment.Model" in printed_config(capsys, "--model=tiny_experiment.Model")


@STRATEGIES
def test_printed_configuration_fed_back_prints_itself(folder, capsys, strategy):
    first = printed_config(capsys, "--config", written(configuration(strategy)))
    again = printed_config(capsys, "--config", written(first, "printed.yaml"))
    assert again == first
    told = yaml.safe_load(first)["trainer"]["strategy"]
    if strategy == "adpsgd":
        assert told == "adpsgd"
    else:
        assert told["class_path"] == strategy["class_path"]
        ours, theirs = strategy["init_args"], told["init_args"]
        assert {name: theirs[name] for name in ours if name != "period"} == {
            name: value for name, value in ours.items() if name != "period"
        }
        if strategy is ADAPTIVE:
            assert theirs["period"]["init_args"].items() >= ours["period"]["init_args"].items()
            assert theirs["period"]["init_args"]["high"] == 1.3
        else:
            assert theirs["period"] == 5


def made(strategy):
    return LightningCLI(run=False, args=["--config", written(configuration(strategy))])


@STRATEGIES
def test_configuration_makes_the_trainer_it_describes(folder, strategy):
    trainer = made(strategy).trainer
    assert type(trainer.strategy) is ADPSGDStrategy
    assert trainer.world_size == 1
    assert sum(isinstance(callback, CommunicationMonitor) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("int4", "IntCodec(bits=4, block_size=128)"),
        ("int8", "IntCodec(bits=8, block_size=128)"),
        (
            {"class_path": "lightning_adpsgd.IntCodec", "init_args": {"block_size": 64}},
            "IntCodec(bits=4, block_size=64)",
        ),
    ],
    ids=["int4", "int8", "class"],
)
def test_configuration_sets_in_how_many_bits_rounds_are_sent(folder, given, expected):
    init_args = {"reduce_dtype": given}
    strategy = made({"class_path": "lightning_adpsgd.ADPSGDStrategy", "init_args": init_args}).trainer.strategy
    assert repr(strategy._options.codec) == expected


def test_strategy_has_every_setting_of_the_configuration(folder):
    adaptive, constant, by_name = (made(strategy).trainer.strategy for strategy in (ADAPTIVE, CONSTANT, "adpsgd"))
    assert repr(adaptive._period) == repr(AdaptivePeriod(initial=2, sampling=6, low=0.5, maximum=16))
    assert (adaptive._options.optimizer_state, adaptive._options.bucket_size_mb) == ("average", 1.5)
    assert adaptive._timeout == timedelta(minutes=7)
    assert repr(constant._period) == repr(ConstantPeriod(5))
    assert (constant._options.average_buffers, constant._start_method) == (False, "spawn")
    assert repr(by_name._period) == repr(AdaptivePeriod())


# The plot of a checkpoint


def checkpoint_of(monitor_or_none, path="last.ckpt"):
    callbacks = {} if monitor_or_none is None else {"CommunicationMonitor": monitor_or_none.state_dict()}
    torch.save({"state_dict": {}, "callbacks": {"Other": {"best": None}, **callbacks}}, path)
    return path


def monitor_of(rounds):
    monitor = CommunicationMonitor()
    for round_ in rounds:
        monitor._add(round_, ddp_bytes=2400)
    return monitor


def damaged(**columns):
    torch.save({"callbacks": {"CommunicationMonitor": monitor_of(RUN).state_dict() | columns}}, "last.ckpt")
    return "last.ckpt"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("last.ckpt", "a file whose suffix is one of .*pdf.*png"),
        ("run.foo", "a file whose suffix is one of"),
        ("", "a file whose suffix is one of"),
        ("folder/", "a file whose suffix is one of"),
        ("folder", "folder"),
        ("last.ckpt/run.png", "the picture could not be written"),
        ("foo://run.png", "Protocol not known: foo"),
    ],
)
def test_plot_says_what_is_wrong_with_an_output_and_overwrites_nothing(tmp_path, monkeypatch, capsys, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    path = checkpoint_of(monitor_of(RUN))
    before = Path(path).read_bytes()
    with pytest.raises(SystemExit):
        main(["plot", path, "--output", output])
    assert re.search(f"--output '{output}': .*{message}", capsys.readouterr().err)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "folder"}
    assert Path(path).read_bytes() == before


def test_plot_draws_the_run_that_a_checkpoint_tells_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["plot", checkpoint_of(monitor_of(RUN)), "--output", "run.png"])
    assert png_size(tmp_path / "run.png") == SIZE
    printed = capsys.readouterr().out
    assert "rounds          4 in 15 steps (26.7%): period 3, train_end 1" in printed
    assert "plot            run.png" in printed


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: "missing.ckpt", "there is no file 'missing.ckpt'"),
        (lambda: ".", "'.' is a folder; expected a checkpoint's file in it"),
        (lambda: "foo://last.ckpt", "foo://last.ckpt cannot be read .ValueError: Protocol not known: foo.*; expected"),
        (lambda: written("", "empty.ckpt"), "empty.ckpt cannot be read .EOFError.*; expected a checkpoint"),
        (lambda: damaged(trigger=torch.full((4,), 99)), "last.ckpt holds a monitor's state that is damaged"),
        (lambda: damaged(step=torch.tensor([4])), "last.ckpt holds a monitor's state that is damaged"),
        (lambda: checkpoint_of(None), "last.ckpt tells of no averaging round.*no CommunicationMonitor"),
        (lambda: checkpoint_of(monitor_of([])), "last.ckpt tells of no averaging round"),
        (lambda: written("words", "notes.txt"), "notes.txt is no checkpoint, or holds more than plain data"),
    ],
    ids=[
        "no file",
        "folder",
        "protocol",
        "empty",
        "unknown trigger",
        "a short column",
        "no monitor",
        "no round",
        "no checkpoint",
    ],
)
def test_plot_says_what_is_wrong_with_a_checkpoint(tmp_path, monkeypatch, capsys, write, message):
    monkeypatch.chdir(tmp_path)
    path = write()
    with pytest.raises(SystemExit):
        main(["plot", path])
    assert re.search(message, capsys.readouterr().err)
    assert not Path("adpsgd.png").exists()


def test_plot_loads_more_than_plain_data_only_if_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    states = {"CommunicationMonitor": monitor_of(RUN).state_dict()}
    torch.save({"callbacks": states, "hyper_parameters": partial(print)}, "last.ckpt")
    with pytest.raises(SystemExit):
        main(["plot", "last.ckpt"])
    assert "pass --trust" in capsys.readouterr().err
    main(["plot", "last.ckpt", "--trust"])
    assert Path("adpsgd.png").exists()
