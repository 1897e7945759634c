"""``lightning.pytorch`` and ``pytorch_lightning``: the same under both, whichever is imported or installed."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

import lightning_adpsgd
from lightning_adpsgd.families import ROOMS
from tests.hidden import HIDE, run
from tests.training import data, identical, weights
from tests.workers.test_nodes import announce_nodes

FAMILIES = tuple(ROOMS)
OTHER = "pytorch_lightning"
NAMES = [f"{name}{launch}" for launch in ("", "_spawn", "_fork", "_notebook") for name in ("adpsgd", "adpsgd_int4")]


# Names


@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_know_every_name_once_they_are_imported(family):
    registry = importlib.import_module(f"{family}.strategies").StrategyRegistry
    strategy = importlib.import_module(f"{ROOMS[family]}.strategy").ADPSGDStrategy
    assert {type(registry.get(name)) for name in [*NAMES, "adaptive_local_sgd"]} == {strategy}
    assert issubclass(strategy, importlib.import_module(f"{family}.strategies").DDPStrategy)


REGISTERED = """
from {family}.strategies import StrategyRegistry
print("adpsgd_int4" in StrategyRegistry, lightning_adpsgd.ADPSGDStrategy.__module__, "{other}" in sys.modules)
"""


@pytest.mark.parametrize(
    ("family", "order", "hidden"),
    [
        ("lightning.pytorch", "import lightning_adpsgd; {0}", ()),
        (OTHER, "{0}; import lightning_adpsgd", ()),
        (OTHER, "import lightning_adpsgd; {0}", ("lightning",)),
    ],
    ids=["lightning", "both installed", "pytorch-lightning alone"],
)
def test_the_family_that_a_script_imports_is_served_and_the_other_not_imported(family, order, hidden):
    # Many libraries ask in this way whether another one is installed.
    look = f"import importlib.util; importlib.util.find_spec({family!r})"
    other = next(each for each in FAMILIES if each != family)
    script = order.format(f"{look}; import {family}") + REGISTERED.format(family=family, other=other)
    assert run(script, *hidden) == f"True {ROOMS[family]}.strategy False"


def test_with_neither_the_error_says_what_to_install():
    script = """
try:
    from lightning_adpsgd import ADPSGDStrategy
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'lightning-adpsgd[lightning]'" in run(script, "lightning", OTHER)


def test_a_strategy_of_one_family_is_refused_by_the_other_with_its_name(alone):
    strategy = importlib.import_module("lightning_adpsgd.trainer.strategy").ADPSGDStrategy()
    with pytest.raises(ValueError, match=r"pytorch_lightning\.strategies\.Strategy"):
        importlib.import_module(OTHER).Trainer(strategy=strategy, accelerator="cpu", logger=False)


def test_the_two_lists_of_imports_differ_in_the_family_only():
    package = Path(lightning_adpsgd.__file__).parent
    first, second = (ast.parse((package / room / "family.py").read_text()) for room in ("trainer", OTHER))

    def names(tree: ast.Module) -> set[str]:
        return {alias.asname or alias.name for node in tree.body for alias in getattr(node, "names", [])}

    assert names(first) == names(second)
    used = {node.module.split(".")[0] for node in second.body if isinstance(node, ast.ImportFrom)}
    assert used == {"pytorch_lightning", "lightning_fabric"}


# Training


class Module:
    """A LightningModule of either family; its base class is given when it is made."""

    def __init__(self, optimizers: int = 1, terminated_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = optimizers == 1
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.terminated_at = terminated_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.terminated_at and self.global_rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        halves = self.net[:2].parameters(), self.net[2:].parameters()
        return [torch.optim.SGD(half, lr=0.05, momentum=0.9) for half in halves]


def fit(family: str, case: str, folder: str, resume: str | None = None, max_epochs: int = 1) -> dict[str, Any]:
    """Train under a family, and tell everything that came of it."""
    if case == "node":
        announce_nodes([0, 0, 1, 1])
    pl = importlib.import_module(family)
    strategy = importlib.import_module(f"{ROOMS[family]}.strategy").ADPSGDStrategy
    monitor = importlib.import_module(f"{ROOMS[family]}.monitor").CommunicationMonitor(plot=case == "adaptive")
    strategies = {
        "adaptive": "adpsgd",
        "int4": "adpsgd_int4",
        "two optimizers": strategy(3, stagger=True, overlap=1),
        "node": strategy(2, worker="node", reduce_dtype="bf16"),
        "sigterm": strategy(3),
        "pruning": strategy(3, optimizer_state="average"),
    }
    torch.manual_seed(0)
    kinds = (Module, pl.LightningModule)
    model = type("Module", kinds, {})(2 if case == "two optimizers" else 1, 8 if case == "sigterm" else None)
    checkpoints = pl.callbacks.ModelCheckpoint(save_top_k=-1)
    callbacks = [
        monitor,
        checkpoints,
        *([pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)] if case == "pruning" else []),
    ]
    loggers = importlib.import_module(f"{family}.loggers")
    trainer = pl.Trainer(
        strategy=strategies[case],
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]) // (2 if case == "node" else 1),
        num_nodes=2 if case == "node" else 1,
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=loggers.CSVLogger(folder, version=family),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data(), batch_size=8, shuffle=True, drop_last=True)
    ended = "well"
    try:
        trainer.fit(model, loader, DataLoader(data(), batch_size=32), ckpt_path=resume)
    except BaseException as error:  # SIGTERMException, SystemExit
        ended = type(error).__name__
    averaged = [(r.optimizer, r.step, r.trigger, r.period, r.variance) for r in monitor.rounds]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged = Path(trainer.logger.log_dir, "metrics.csv")
    columns = logged.read_text().splitlines()[0].split(",") if logged.exists() else []
    return {
        "weights": weights(model),
        "averaged": averaged,
        "metrics": metrics,
        "columns": sorted(column for column in columns if column.startswith("adpsgd/")),
        "files": sorted(path.name for path in Path(trainer.logger.log_dir).rglob("*") if path.suffix != ".ckpt"),
        "checkpoints": sorted(map(str, Path(trainer.logger.log_dir).rglob("*.ckpt"))),
        "ended": ended,
        "step": trainer.global_step,
    }


@pytest.mark.workers
@pytest.mark.parametrize("case", ["adaptive", "int4", "two optimizers", "node", "sigterm", "pruning"])
def test_both_train_the_same(pool, tmp_path, case):
    workers = 4 if case == "node" else 2
    first, second = (pool.run_trainer(fit, family, case, str(tmp_path), workers=workers) for family in FAMILIES)
    for ours, theirs in zip(first, second, strict=True):
        assert ours["averaged"]
        assert {"adpsgd/period", "adpsgd/variance"} <= {name.removesuffix("_0") for name in ours["columns"]}
        for outcome in ("averaged", "metrics", "columns", "files", "ended", "step"):
            assert ours[outcome] == theirs[outcome], outcome
        assert identical([ours["weights"], theirs["weights"]])
        assert ours["ended"] == ("well" if case != "sigterm" else "SIGTERMException")
    assert identical([outcome["weights"] for outcome in first])


@pytest.mark.workers
def test_a_checkpoint_of_one_goes_on_in_the_other(pool, tmp_path):
    straight = pool.run_trainer(fit, "lightning.pytorch", "adaptive", str(tmp_path / "straight"), None, 2)
    after_one_epoch = straight[0]["checkpoints"][0]
    went_on = pool.run_trainer(fit, OTHER, "adaptive", str(tmp_path / "on"), after_one_epoch, 2)
    for ours, theirs in zip(straight, went_on, strict=True):
        assert theirs["step"] == ours["step"] == 32
        assert theirs["averaged"] == ours["averaged"]
        assert identical([theirs["weights"], ours["weights"]])


# The command line

EXPERIMENT = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(20, 4), batch_size=2)
"""
CONFIGURATION = {
    "trainer": {
        "strategy": {"class_path": "lightning_adpsgd.ADPSGDStrategy", "init_args": {"period": 5}},
        "callbacks": [{"class_path": "lightning_adpsgd.CommunicationMonitor"}],
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
    },
    "model": {"class_path": "experiment_of_theirs.Model"},
}


@pytest.mark.parametrize("installed", ["both", "pytorch-lightning alone"])
def test_the_command_line_trains_a_module_of_pytorch_lightning(tmp_path, installed):
    (tmp_path / "experiment_of_theirs.py").write_text(EXPERIMENT)
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    if installed == "both":
        command = ["-m", "lightning_adpsgd.pytorch_lightning"]
    else:
        hide = HIDE.format(hidden=("lightning",))
        command = ["-c", f"{hide}\nfrom lightning_adpsgd.cli import main\nmain()"]
    command = [sys.executable, *command, "fit", "--config", "experiment.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 in 10 steps (20.0%): period 2" in done.stdout


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_progress_bar_of_each_family_shows_the_period_and_the_figure_is_drawn(tmp_path, capsys, family):
    pl = importlib.import_module(family)
    monitor = importlib.import_module(f"{ROOMS[family]}.monitor").CommunicationMonitor(progress_bar=True)
    trainer = pl.Trainer(
        strategy=importlib.import_module(f"{ROOMS[family]}.strategy").ADPSGDStrategy(3),
        accelerator="cpu",
        devices=1,
        max_steps=7,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(type("Module", (Module, pl.LightningModule), {})(1), DataLoader(data(), batch_size=8))
    shown = [line for line in re.split(r"[\r\n]", capsys.readouterr().out) if "Epoch 0" in line]
    assert any("2/" in line and "adpsgd" not in line for line in shown)
    assert "adpsgd=period 3, 0 B saved" in shown[-1]
    assert monitor.plot().axes[0].get_title() == "3 averaging rounds in 7 steps"
