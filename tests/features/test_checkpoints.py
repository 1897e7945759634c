"""Checkpoints under real fits: what they hold, and who can load them."""

import lightning as L
import pytest
import torch

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor
from tests.training import fit, loader, seeded

pytestmark = pytest.mark.workers


def save_then_resume(folder: str) -> dict:
    save = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    strategy = ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6))
    monitor = CommunicationMonitor()
    fit(strategy, seeded(momentum=0.9), callbacks=[save, monitor], enable_checkpointing=True, max_epochs=2)
    file = torch.load(f"{folder}/step=20.ckpt", weights_only=False)

    resumed = ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6))
    counts = CommunicationMonitor()
    fit(
        resumed,
        seeded(1, momentum=0.9),
        callbacks=[counts],
        max_epochs=2,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/step=20.ckpt"},
    )
    return {
        "file": file["adpsgd"],
        "at_20": [round_ for round_ in monitor.rounds if round_.step <= 20],
        "resumed": counts.rounds,
        "steps": resumed.local_sgd[0].steps,
        "summary": counts.summary()["steps"],
    }


def test_a_checkpoint_holds_the_rule_and_the_counters_and_the_monitor_goes_on(pool, tmp_path):
    first, second = pool.run_trainer(save_then_resume, str(tmp_path))
    state = first["file"]["optimizers"][0]
    assert state["steps"] == 20
    assert state["local_steps"] == 0
    assert state["period"]["target"] == first["at_20"][-1].target
    assert first["resumed"][: len(first["at_20"])] == first["at_20"]
    assert first["resumed"][len(first["at_20"])].local_steps == state["period"]["period"]
    assert first["steps"] == first["summary"] == 32
    assert [r.step for r in first["resumed"]] == [r.step for r in second["resumed"]]
    assert [r.period for r in first["resumed"]] == [r.period for r in second["resumed"]]


def load_under_ddp(folder: str) -> dict:
    model = seeded()
    fitted, _ = fit(ADPSGDStrategy(3), model, max_steps=10)
    fitted.save_checkpoint(f"{folder}/ours.ckpt")
    other = seeded(1)
    theirs, _ = fit(
        "ddp",
        other,
        max_steps=12,
        max_epochs=9,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/ours.ckpt"},
    )
    theirs.save_checkpoint(f"{folder}/theirs.ckpt")
    again = seeded(2)
    back, rounds = fit(
        ADPSGDStrategy(3),
        again,
        max_steps=16,
        max_epochs=9,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/theirs.ckpt"},
    )
    return {"steps": [fitted.global_step, theirs.global_step, back.global_step], "rounds": len(rounds)}


def test_our_checkpoint_loads_under_ddp_and_ddps_under_ours(pool, tmp_path):
    for outcome in pool.run_trainer(load_under_ddp, str(tmp_path)):
        assert outcome == {"steps": [10, 12, 16], "rounds": 2}
