"""Callbacks that keep a second set of weights: what they show and save is the average over the workers too."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy
from tests.training import Classifier, fit, floats, identical, loader, weights

WeightAveraging = getattr(L.pytorch.callbacks, "WeightAveraging", None)  # from Lightning 2.6 on
EMAWeightAveraging = getattr(L.pytorch.callbacks, "EMAWeightAveraging", None)

pytestmark = pytest.mark.workers
needs_weight_averaging = pytest.mark.skipif(WeightAveraging is None, reason="this Lightning has no WeightAveraging")

DECAY = 0.8


class Watched(Classifier):
    """Keeps the weights that validation sees."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__(batch_norm=batch_norm, momentum=0.9)
        self.validated: list[dict[str, Tensor]] = []

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(weights(self))


class Moving(L.Callback):
    """This rank's own moving average; its first update is a copy, as the real one's."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.at_10: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = floats(weights(pl_module))
        old = self.weights or now
        self.weights = {name: DECAY * old[name] + (1 - DECAY) * now[name] for name in now}
        if trainer.global_step == 10:
            self.at_10 = self.weights


def moving_average(folder: str, period: int) -> dict:
    torch.manual_seed(0)
    model = Watched()
    average, moving = EMAWeightAveraging(decay=DECAY), Moving()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    _, rounds = fit(
        ADPSGDStrategy(period),
        model,
        callbacks=[average, moving, save],
        enable_checkpointing=True,
        loaders={"train_dataloaders": loader(), "val_dataloaders": loader(64)},
        num_sanity_val_steps=0,
        val_check_interval=8,
    )
    return {
        "validated": model.validated,
        "end": weights(model),
        "moving_at_10": moving.at_10,
        "moving": moving.weights,
        "rounds": [(r.step, r.trigger, r.local_steps) for r in rounds],
    }


@needs_weight_averaging
@pytest.mark.parametrize("period", [3, 4, 100], ids=["rounds in between", "a round at each validation", "no rounds"])
def test_a_moving_average_that_is_validated_or_saved_is_that_of_the_workers_average(pool, tmp_path, period):
    outcomes = pool.run_trainer(moving_average, str(tmp_path), period)
    file = torch.load(tmp_path / "step=10.ckpt", weights_only=False)
    for seen in zip(*(outcome["validated"] for outcome in outcomes), strict=True):
        assert identical(list(seen))
    assert identical([outcome["end"] for outcome in outcomes])
    # The mean of the workers' moving averages is the moving average of the workers' mean.
    parameters = [name for name in outcomes[0]["end"] if name.endswith(("weight", "bias"))]
    for name in parameters:
        mean = (outcomes[0]["moving_at_10"][name] + outcomes[1]["moving_at_10"][name]) / 2
        torch.testing.assert_close(file["state_dict"][name], mean)
        mean = (outcomes[0]["moving"][name] + outcomes[1]["moving"][name]) / 2
        torch.testing.assert_close(outcomes[0]["end"][name], mean)
        assert not torch.equal(file["state_dict"][name], file["current_model_state"][name])
    assert len(outcomes[0]["validated"]) == 2


class EveryEpoch(WeightAveraging or object):
    """The plain mean of the weights at the end of each epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def mean_of_epochs() -> dict:
    torch.manual_seed(0)
    model = Watched(batch_norm=False)
    ends = []

    class End(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            ends.append(weights(model))

    fit(ADPSGDStrategy(5), model, callbacks=[EveryEpoch(), End()], max_epochs=3)
    return {"ends": ends, "weights": weights(model)}


@needs_weight_averaging
def test_a_mean_of_epochs_is_that_of_the_workers_average(pool):
    outcomes = pool.run_trainer(mean_of_epochs)
    assert identical([outcome["weights"] for outcome in outcomes])
    for name, tensor in outcomes[0]["weights"].items():
        ends = [end[name] for outcome in outcomes for end in outcome["ends"]]
        torch.testing.assert_close(tensor, torch.stack(ends).mean(dim=0))


def stochastic(batch_norm: bool) -> dict:
    torch.manual_seed(0)
    model = Watched(batch_norm=batch_norm)
    starts = []

    class Start(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            starts.append(weights(model))

    callbacks = [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1), Start()]
    _, rounds = fit(ADPSGDStrategy(100), model, callbacks=callbacks, max_epochs=4)
    # In the epoch that gathers BatchNorm statistics, Lightning also takes a step with the gradient of the epoch before.
    result = starts[4] if batch_norm else weights(model)
    return {
        "starts": starts,
        "result": result,
        "weights": weights(model),
        "rounds": [(r.step, r.trigger, r.local_steps) for r in rounds],
    }


@pytest.mark.parametrize("batch_norm", [False, True])
def test_stochastic_weight_averaging_copies_the_workers_average(pool, batch_norm):
    outcomes = pool.run_trainer(stochastic, batch_norm)
    assert identical([outcome["weights"] for outcome in outcomes])  # BatchNorm's new statistics too
    # The callback copies at the start of the second, third and fourth epoch, of 16 steps each.
    assert [(step, trigger) for step, trigger, _ in outcomes[0]["rounds"]] == [
        (16, "checkpoint"),
        (32, "checkpoint"),
        (48, "checkpoint"),
        # With BatchNorm there is one more epoch, in which statistics are gathered, and one step is taken at its end.
        *([(64, "checkpoint"), (65, "train_end")] if batch_norm else [(64, "train_end")]),
    ]
    for name in (name for name in outcomes[0]["weights"] if name.endswith(("weight", "bias"))):
        for outcome in outcomes:
            copied = torch.stack([start[name] for start in outcome["starts"][1:4]])
            torch.testing.assert_close(outcome["result"][name], copied.mean(dim=0))
