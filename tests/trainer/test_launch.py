"""The registered names start their processes in the way that each name says."""

import re

import pytest

from tests.examples.test_digits import run

SCRIPT = """
import sys
from pathlib import Path

import lightning_adpsgd  # registers the names

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_adpsgd import CommunicationMonitor


class Model(BoringModel):
    def on_train_end(self):
        Path(f"rank{self.global_rank}").write_text(f"{self.layer.weight.sum().item():.7f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    monitor = CommunicationMonitor()
    trainer = L.Trainer(
        strategy=sys.argv[1], accelerator="cpu", devices=2, max_steps=9, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[monitor],
    )
    model = Model()
    trainer.fit(model)
    if trainer.is_global_zero:
        Path("after").write_text(f"{model.layer.weight.sum().item():.7f}")
        print(type(trainer.strategy))
        print([round_.step for round_ in monitor.rounds], monitor.summary()["transport"])
"""


@pytest.mark.workers
@pytest.mark.parametrize("name", ["adpsgd", "adpsgd_spawn", "adpsgd_int4_fork"])
def test_a_name_starts_its_processes_and_returns_the_average_and_the_rounds(tmp_path, name):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run("script.py", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, after = ((tmp_path / name).read_text() for name in ("rank0", "rank1", "after"))
    assert first == second == after
    assert "lightning_adpsgd.trainer.strategy.ADPSGDStrategy" in done.stdout
    assert re.search(r"\[2, 4, .*9\] in int4" if "int4" in name else r"\[4, 8, 9\] at once", done.stdout)


LONG = """
import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning_adpsgd import ADPSGDStrategy, CommunicationMonitor, ConstantPeriod

if __name__ == "__main__":
    monitor = CommunicationMonitor()
    trainer = L.Trainer(
        strategy=ADPSGDStrategy(ConstantPeriod(1), start_method="fork"), accelerator="cpu", devices=2, max_steps=900,
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[monitor], limit_val_batches=0,
    )
    trainer.fit(BoringModel(), torch.utils.data.DataLoader(RandomDataset(32, 2000)))
    print(len(monitor.rounds), "rounds came back")
"""


@pytest.mark.workers
def test_a_history_that_is_larger_than_what_a_pipe_holds_comes_back(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(LONG)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "900 rounds came back" in done.stdout
    assert list((tmp_path / "temporary").glob("*.pt")) == []
