"""What a checkpoint holds, and that resuming from it is the same as not having stopped; on real processes."""

import copy
import inspect
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor
from tests.training import Classifier, fit, floats, identical, loader, seeded, trainer, weights

pytestmark = pytest.mark.workers

INITIAL, STEPS = 5, 43


class Drilled(Classifier):
    """Makes each batch from its rank and the step, so that a resumed run sees what the first would have seen."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def training_step(self, batch: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.global_rank + self.trainer.global_step)
        inputs = torch.randn(8, 8, generator=generator)
        return self.loss((inputs, inputs[:, :3].argmax(dim=1)))

    def configure_optimizers(self) -> Any:
        # Two groups, and falling rates, so that the period changes during the run.
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[1:].parameters(), "lr": 0.02}]
        optimizer = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.01),
        }[self.optimizer]()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class SaveAt(L.Callback):
    """Saves after one step."""

    def __init__(self, step: int, path: str, weights_only: bool = False) -> None:
        self.step, self.path, self.weights_only = step, path, weights_only

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, self.weights_only)


def drill(optimizer: str, callbacks: list, ckpt_path: str | None = None, seed: int = 0, **options: Any) -> dict:
    torch.manual_seed(seed)
    model, monitor = Drilled(optimizer), CommunicationMonitor()
    strategy = ADPSGDStrategy(AdaptivePeriod(initial=INITIAL, sampling=10), **options)
    loaders = {"train_dataloaders": loader(800), "ckpt_path": ckpt_path}
    fitted, _ = fit(strategy, model, callbacks=[monitor, *callbacks], max_steps=STEPS, loaders=loaders)
    state = fitted.optimizers[0].state_dict()
    assert monitor.summary()["steps"] == strategy.local_sgd[0].steps
    return {
        "weights": weights(model),
        "period": strategy.local_sgd[0].period.value,
        "rounds": [round_._replace(seconds=0.0) for round_ in monitor.rounds],
        "sent": monitor.summary()["sent_bytes"],
        "state": {f"{p}.{name}": value for p, entry in state["state"].items() for name, value in entry.items()},
        "rates": [group["lr"] for group in state["param_groups"]],
        "steps": strategy.local_sgd[0].steps,
    }


def stop_and_go(optimizer: str, folder: str, offset: int, options: dict) -> dict:
    step, path = 20 + offset, f"{folder}/{optimizer}-{offset}.ckpt"
    whole = drill(optimizer, [SaveAt(step, path)], **options)
    resumed = drill(optimizer, [], path, seed=1, **options)
    differs = [name for name in ("period", "rounds", "sent", "rates", "steps") if whole[name] != resumed[name]]
    for part in ("weights", "state"):
        differs += [name for name, tensor in whole[part].items() if not torch.equal(tensor, resumed[part][name])]
    return {"differs": differs, "periods": {r.period for r in whole["rounds"]}, "whole": whole, "step": step}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("offset", range(INITIAL + 1))
def test_resuming_from_a_checkpoint_equals_not_having_stopped(pool, tmp_path, optimizer, offset):
    outcomes = pool.run_trainer(stop_and_go, optimizer, str(tmp_path), offset, {})
    for outcome in outcomes:
        assert outcome["differs"] == []
        assert len(outcome["periods"]) > 1  # the rule had state that mattered
        assert outcome["whole"]["steps"] == STEPS
    assert (outcomes[0]["step"], "checkpoint") in [(r.step, r.trigger) for r in outcomes[0]["whole"]["rounds"]]
    # Momentum is local again after the checkpoint: without this, equality would show nothing about it.
    first, second = (outcome["whole"]["state"] for outcome in outcomes)
    assert not all(torch.equal(first[name], second[name]) for name in first if "step" not in name)


@pytest.mark.parametrize("policy", ["average", "reset", "estimate"])
def test_the_same_holds_for_the_other_policies_on_optimizer_state(pool, tmp_path, policy):
    for outcome in pool.run_trainer(stop_and_go, "sgd", str(tmp_path), 2, {"optimizer_state": policy}):
        assert outcome["differs"] == []


@pytest.mark.parametrize("offset", range(INITIAL))
@pytest.mark.parametrize(
    "options",
    [
        {"stagger": True},
        {"overlap": 2},
        {"stagger": True, "overlap": 1},
        {"stagger": True, "overlap": 1, "optimizer_state": "reset"},
        {"stagger": True, "overlap": 1, "optimizer_state": "estimate"},
        {"reduce_dtype": "bf16"},
        {"stagger": True, "overlap": 1, "reduce_dtype": "fp16"},
        {"stagger": True, "overlap": 1, "reduce_dtype": "int4"},
    ],
    ids=str,
)
def test_the_same_holds_while_rounds_are_in_flight(pool, tmp_path, options, offset):
    outcomes = pool.run_trainer(stop_and_go, "adamw", str(tmp_path), offset, options)
    for outcome in outcomes:
        assert outcome["differs"] == []
        assert len(outcome["periods"]) > 1
    assert identical([outcome["whole"]["weights"] for outcome in outcomes])


# What the file holds


class Look(SaveAt):
    """Notes the optimizer's state on this rank before and after the save."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.before = momenta(trainer)
            super().on_train_batch_end(trainer)
            self.after = momenta(trainer)


def momenta(trainer: L.Trainer) -> list[Tensor]:
    return [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state.values()]


def save_and_look(step: int, path: str) -> dict:
    look = Look(step, path)
    outcome = drill("sgd", [look])
    return {"before": look.before, "after": look.after, "rounds": outcome["rounds"]}


@pytest.mark.parametrize("step", [12, 10], ids=["between two rounds", "right after a round"])
def test_the_optimizer_state_in_the_file_is_the_mean_over_the_workers_and_they_adopt_it(pool, tmp_path, step):
    first, second = pool.run_trainer(save_and_look, step, str(tmp_path / "file.ckpt"))
    file = torch.load(tmp_path / "file.ckpt", weights_only=False)
    saved = [state["momentum_buffer"] for state in file["optimizer_states"][0]["state"].values()]
    assert len(saved) == len(first["before"])
    for mine, theirs, after, others, in_file in zip(
        first["before"], second["before"], first["after"], second["after"], saved, strict=True
    ):
        assert not torch.equal(mine, theirs)
        torch.testing.assert_close(after, (mine + theirs) / 2)
        assert torch.equal(after, others)
        assert torch.equal(after, in_file)
    assert file["adpsgd"]["averaged"] is True
    assert file["adpsgd"]["workers"] == 2
    last = next(r for r in reversed(first["rounds"]) if r.step <= step)
    assert (last.step, last.trigger, last.local_steps) == (step, "checkpoint", 2 if step == 12 else 0)
    state = file["adpsgd"]["optimizers"][0]
    assert (state["steps"], state["local_steps"], state["period"]["target"]) == (step, 0, last.target)


def save_without_training_state(path: str) -> dict:
    model = seeded(momentum=0.9)
    seen = {}

    class See(SaveAt):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == self.step:
                super().on_train_batch_end(trainer)
                seen["weights"] = weights(model)

    fit(ADPSGDStrategy(4), model, callbacks=[See(6, path, weights_only=True)])
    return seen["weights"]


def test_a_file_of_weights_only_holds_the_average_and_nothing_else(pool, tmp_path):
    first, second = pool.run_trainer(save_without_training_state, str(tmp_path / "weights.ckpt"))
    file = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert identical([first, second, file["state_dict"]])
    assert "optimizer_states" not in file
    assert file["adpsgd"] == {"workers": 2, "ranks": 2, "averaged": True, "rank": 0}


class SlowIO(TorchCheckpointIO):
    """Writes after training has continued for a while."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.5)
        super().save_checkpoint(*args, **kwargs)


def save_in_the_background(path: str) -> list[dict]:
    model = seeded(momentum=0.9)
    seen = []

    class See(SaveAt):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == self.step:
                super().on_train_batch_end(trainer)
                seen.append(weights(model))

    fit(ADPSGDStrategy(4), model, callbacks=[See(6, path)], plugins=[AsyncCheckpointIO(SlowIO())])
    return [*seen, weights(model)]


def test_a_file_written_in_the_background_holds_the_average_of_its_step(pool, tmp_path):
    first, second = pool.run_trainer(save_in_the_background, str(tmp_path / "later.ckpt"))
    file = torch.load(tmp_path / "later.ckpt", weights_only=False)["state_dict"]
    assert identical([first[0], second[0], file])
    assert not identical([first[1], file])


# ModelCheckpoint


def checkpoints(folder: str, resume: bool, **options: Any) -> dict:
    model = seeded(1 if resume else 0, momentum=0.9)
    save = ModelCheckpoint(folder, filename="{step}", **options)
    loaders = {"train_dataloaders": loader(), "val_dataloaders": loader(64), "ckpt_path": "last" if resume else None}
    fitted, rounds = fit(
        ADPSGDStrategy(4),
        model,
        callbacks=[save],
        enable_checkpointing=True,
        max_epochs=3 if resume else 2,
        val_check_interval=5,
        loaders=loaders,
    )
    return {
        "best": {Path(path).name: score.item() for path, score in save.best_k_models.items()},
        "last": save.last_model_path,
        "first_round": rounds[0].step,
        "global_step": fitted.global_step,
        "weights": weights(model),
    }


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss"], ids=["reduced metric", "metric of each worker"])
def test_model_checkpoint_keeps_the_best_files_and_all_hold_averages(pool, tmp_path, monitor):
    options = {"monitor": monitor, "save_top_k": 2, "every_n_train_steps": 6 if monitor == "train_loss" else None}
    first, second = pool.run_trainer(_checkpoints, str(tmp_path), options)
    assert len(list(tmp_path.iterdir())) == len(first["best"]) == len(second["best"]) == 2
    if monitor == "val_loss":  # otherwise ranks disagree on what is best, as under DDP, but none waits
        assert set(first["best"]) == set(second["best"]) == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert torch.load(path, weights_only=False)["adpsgd"]["averaged"]


def _checkpoints(folder: str, options: dict) -> dict:
    return checkpoints(folder, False, **options)


def stop_and_take_the_last(folder: str) -> list[dict]:
    options = {"every_n_train_steps": 7, "save_top_k": 1, "save_last": True}
    return [checkpoints(folder, resume, **options) for resume in (False, True)]


def test_the_last_checkpoint_is_found_and_resumed_from(pool, tmp_path):
    outcomes = pool.run_trainer(stop_and_take_the_last, str(tmp_path))
    for before, after in outcomes:
        assert before["global_step"] == 32
        assert after["global_step"] == 48
        assert Path(before["last"]).name == "last.ckpt"
        assert 28 < after["first_round"] <= 36  # the last save was at step 28
    assert identical([after["weights"] for _, after in outcomes])


# Saves on an exception


class FailAt(L.Callback):
    """Raises on one rank."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            raise ValueError("a bad sample")


def fail(folder: str, rank: int, how: str) -> dict:
    save = {
        "OnExceptionCheckpoint": lambda: OnExceptionCheckpoint(folder, "exception"),
        "ModelCheckpoint": lambda: ModelCheckpoint(
            folder, "exception", save_on_exception=True, monitor="train_loss", every_n_epochs=100
        ),
    }[how]()
    if how == "OnExceptionCheckpoint":
        save.teardown = lambda *_: None  # it would remove its file in this process
    model = seeded(momentum=0.9)
    fitted = trainer(
        ADPSGDStrategy(100), callbacks=[FailAt(rank, 3), save], max_steps=4, enable_checkpointing=True, max_epochs=1
    )
    error, started = None, time.monotonic()
    try:
        fitted.fit(model, loader())
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "weights": weights(model), "seconds": time.monotonic() - started}


SAVES_ON_EXCEPTION = "save_on_exception" in inspect.signature(ModelCheckpoint).parameters
needs_save_on_exception = pytest.mark.skipif(not SAVES_ON_EXCEPTION, reason="this Lightning's has no save_on_exception")


@pytest.mark.parametrize(
    "how", ["OnExceptionCheckpoint", pytest.param("ModelCheckpoint", marks=needs_save_on_exception)]
)
def test_a_save_on_rank_zeros_exception_does_not_wait_and_is_marked_as_its_own(pool, tmp_path, how):
    first, second = pool.outcomes(fail, str(tmp_path), 0, how, trainer=True)
    assert first.value["error"] == "ValueError: a bad sample"
    (path,) = (path for path in tmp_path.iterdir() if "exception" in path.name)
    file = torch.load(path, weights_only=False)
    assert file["adpsgd"]["averaged"] is False
    assert file["adpsgd"]["rank"] == 0
    assert identical([first.value["weights"], file["state_dict"]])
    assert not identical([second.value["weights"], file["state_dict"]])
    assert "WorkerLostError" in second.value["error"]
    assert "Rank 0 had failed at step 3" in second.value["error"]
    assert "ValueError: a bad sample" in second.value["error"]
    assert first.value["seconds"] < 30  # the collectives' timeout is twice that


def test_a_failure_of_another_rank_lets_rank_zero_save_what_it_has(pool, tmp_path):
    first, second = pool.outcomes(fail, str(tmp_path), 1, "OnExceptionCheckpoint", trainer=True)
    assert second.value["error"] == "ValueError: a bad sample"
    assert "Rank 1 had failed at step 3" in first.value["error"]
    assert torch.load(tmp_path / "exception.ckpt", weights_only=False)["adpsgd"]["averaged"] is False


def resume_from_one_workers_file(folder: str) -> dict:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = seeded(2, momentum=0.9)
        loaders = {"train_dataloaders": loader(), "ckpt_path": f"{folder}/exception.ckpt"}
        _, rounds = fit(ADPSGDStrategy(4), model, max_steps=16, loaders=loaders)
    return {
        "told": [str(w.message) for w in caught if "that worker alone" in str(w.message)],
        "rounds": [(r.step, r.local_steps) for r in rounds],
        "weights": weights(model),
    }


def test_all_workers_resume_from_one_workers_file_with_a_warning(pool, tmp_path):
    pool.outcomes(fail, str(tmp_path), 0, "OnExceptionCheckpoint", trainer=True)
    first, second = pool.run_trainer(resume_from_one_workers_file, str(tmp_path))
    assert len(first["told"]) == 1
    assert "rank 0 of 2" in first["told"][0]
    assert second["told"] == []
    assert first["rounds"][0] == (7, 4)  # no worker has drifted yet: the count starts with the file
    assert identical([first["weights"], second["weights"]])


# Other strategies, other numbers of workers


def save(path: str) -> None:
    drill("adamw", [SaveAt(22, path)])


def resume(path: str) -> dict:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = drill("adamw", [], path)
    told = [str(w.message) for w in caught if "worker(s)" in str(w.message)]
    return {"told": told, "weights": outcome["weights"], "rounds": outcome["rounds"]}


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_resumes_with_a_warning(pool, tmp_path, workers):
    path = str(tmp_path / "two.ckpt")
    pool.run_trainer(save, path)
    state = torch.load(path, weights_only=False)["adpsgd"]["optimizers"][0]
    outcomes = pool.run_trainer(resume, path, workers=workers)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert len(outcomes[0]["told"]) == 1
    assert f"written by 2 worker(s), and now there are {workers}" in outcomes[0]["told"][0]
    assert all(outcome["told"] == [] for outcome in outcomes[1:])
    first = next(round_ for round_ in outcomes[0]["rounds"] if round_.step > 22)
    # C₂ was measured among 2: among n it is (1 − 1/n) / (1 − 1/2) times as large.
    expected = state["period"]["target"] * (1.0 if workers == 1 else 2 * (1 - 1 / workers))
    assert first.target == pytest.approx(expected)
    assert first.step == 22 + state["period"]["period"]


def there_and_back(folder: str) -> dict:
    def state_of(fitted: L.Trainer) -> dict:
        return copy.deepcopy(fitted.optimizers[0].state_dict()["state"])

    class First(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.weights, self.state = weights(pl_module), state_of(trainer)

    paths = [f"{folder}/{name}.ckpt" for name in ("ours", "theirs")]
    drill("adamw", [SaveAt(22, paths[0])])
    outcome: dict[str, Any] = {}
    for strategy, path, other in (("ddp", paths[0], paths[1]), (ADPSGDStrategy(3), paths[1], None)):
        start = First()
        loaders = {"train_dataloaders": loader(800), "ckpt_path": path}
        model = Drilled("adamw")
        callbacks = [start, *([SaveAt(30, other)] if other else [])]
        fitted, rounds = fit(strategy, model, callbacks=callbacks, max_steps=32 if other else 40, loaders=loaders)
        file = torch.load(path, weights_only=False)
        same = identical([start.weights, file["state_dict"]]) and all(
            torch.equal(value, start.state[p][name])
            for p, state in file["optimizer_states"][0]["state"].items()
            for name, value in state.items()
        )
        outcome["ours" if other else "theirs"] = {
            "same": same,
            "steps": fitted.global_step,
            "rounds": [round_.local_steps for round_ in rounds],
            "weights": floats(weights(model)),
        }
    return outcome


def test_our_checkpoint_resumes_under_ddp_and_ddps_under_ours(pool, tmp_path):
    outcomes = pool.run_trainer(there_and_back, str(tmp_path))
    for outcome in outcomes:
        assert outcome["ours"]["same"]
        assert outcome["ours"]["steps"] == 32
        assert outcome["theirs"]["same"]
        assert outcome["theirs"]["steps"] == 40
        assert outcome["theirs"]["rounds"] == [3, 3, 3, 1]
    assert identical([outcome["theirs"]["weights"] for outcome in outcomes])


def resume_from_a_former_version(path: str) -> dict:
    outcome = drill("adamw", [], path, seed=1)
    outcome["expected"] = torch.load(path, weights_only=True)["expected"]
    return outcome


def test_a_checkpoint_of_an_earlier_version_resumes_as_it_would_have_there(pool):
    """The file was written at step 22 by version 0.1.0, and holds the outcome of that run (Linux, x86-64)."""
    path = Path(__file__).parents[1] / "data" / "version_0.1.0.ckpt"
    for outcome in pool.run_trainer(resume_from_a_former_version, str(path)):
        expected = outcome["expected"]
        assert (outcome["period"], outcome["steps"], outcome["sent"]) == tuple(
            expected[name] for name in ("period", "steps", "sent")
        )
        for mine, theirs in zip(outcome["rounds"], expected["rounds"], strict=True):
            assert mine[:5] == theirs[:5]
            # Other processors round differently, which Adam amplifies to up to 0.003; without the moments it is 0.03.
            torch.testing.assert_close(mine[5:8], theirs[5:8], rtol=2e-2, atol=1e-9)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(outcome["weights"][name], weight, rtol=0.0, atol=1e-2)
