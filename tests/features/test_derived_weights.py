"""Weights that a project derives from others: teachers, target networks, and those of schedule-free optimizers."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_adpsgd import ADPSGDStrategy, WorkersDisagreeError
from tests.training import Classifier, fit, floats, identical, loader, weights

pytestmark = pytest.mark.workers

STEPS, VALIDATE_AT, SAVE_AT = 23, 7, 10


class Kept(L.Callback):
    """Keeps each worker's own weights after every step, and those that validations see."""

    def __init__(self) -> None:
        self.own: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.own.append(weights(pl_module))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(weights(pl_module))


class Drilled(Classifier):
    """Makes each batch from its rank and the step, so that a resumed run sees what the first would have seen."""

    def training_step(self, batch: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.global_rank + self.trainer.global_step)
        inputs = torch.randn(8, 8, generator=generator)
        return self.loss((inputs, inputs[:, :3].argmax(dim=1)))


def run(model: L.LightningModule, folder: str, period: int = 4, resume: str | None = None) -> dict:
    kept = Kept()
    _, rounds = fit(
        ADPSGDStrategy(period),
        model,
        callbacks=[kept, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVE_AT, save_top_k=-1)],
        enable_checkpointing=True,
        loaders={"train_dataloaders": loader(), "val_dataloaders": loader(64), "ckpt_path": resume},
        max_steps=STEPS,
        max_epochs=-1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=VALIDATE_AT,
    )
    return {
        "own": kept.own,
        "validated": kept.validated,
        "end": weights(model),
        "payload": [(each.step, each.trigger, each.payload_bytes) for each in rounds],
    }


class Taught(Drilled):
    """Has a teacher, a moving average of itself, and a target network, a copy of itself that is renewed at times."""

    def __init__(self, in_optimizer: bool = False, renewed: bool = True) -> None:
        super().__init__(batch_norm=False)
        self.in_optimizer, self.renewed = in_optimizer, renewed
        self.teacher, self.target = copy.deepcopy(self.net).requires_grad_(False), copy.deepcopy(self.net)

    def training_step(self, batch: Any) -> Tensor:
        if self.renewed:
            for mine, others in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                others.data.mul_(0.9).add_(mine.data, alpha=0.1)  # past autograd, as published projects do
            if self.trainer.global_step % 4 == 1:
                self.target.load_state_dict(self.net.state_dict())
        return super().training_step(batch)

    def configure_optimizers(self) -> Any:
        trained = [*self.net.parameters(), *(self.teacher.parameters() if self.in_optimizer else [])]
        return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)


def taught(folder: str, in_optimizer: bool = False, renewed: bool = True, resume: str | None = None) -> dict:
    torch.manual_seed(0)
    return run(Taught(in_optimizer, renewed), folder, resume=resume)


@pytest.mark.parametrize("in_optimizer", [False, True], ids=["in no optimizer", "frozen in the optimizer"])
def test_a_teacher_and_a_target_network_that_are_read_are_the_workers_mean(pool, tmp_path, in_optimizer):
    outcomes = pool.run_trainer(taught, str(tmp_path), in_optimizer)
    assert identical([outcome["end"] for outcome in outcomes])
    file = torch.load(tmp_path / f"step={SAVE_AT}.ckpt", weights_only=True)["state_dict"]
    read = [(STEPS, outcomes[0]["end"]), (SAVE_AT, file)]
    for index, validated in enumerate(zip(*(outcome["validated"] for outcome in outcomes), strict=True), 1):
        assert identical(list(validated))
        read.append((VALIDATE_AT * index, validated[0]))
    assert len(read) == 5
    drifted = 0
    for step, state in read:
        for name, tensor in floats(state).items():
            own = [outcome["own"][step - 1][name] for outcome in outcomes]
            torch.testing.assert_close(tensor, (own[0] + own[1]) / 2)
            drifted += name.startswith(("teacher", "target")) and not torch.equal(*own)
    assert drifted > 8


class TaughtSince(Taught):
    """Builds its teacher on the way, in inference mode, as code does that is called from a validation."""

    def training_step(self, batch: Any) -> Tensor:
        if self.trainer.global_step == 0:
            with torch.inference_mode():
                self.teacher = copy.deepcopy(self.net).requires_grad_(False)
                for parameter in self.teacher.parameters():
                    parameter.fill_(self.global_rank)
        return Drilled.training_step(self, batch)


def taught_since(folder: str) -> dict:
    return run(TaughtSince(), folder)


def test_a_teacher_that_was_built_in_inference_mode_is_averaged_too(pool, tmp_path):
    for outcome in pool.run_trainer(taught_since, str(tmp_path)):
        teacher = [tensor for name, tensor in outcome["end"].items() if name.startswith("teacher")]
        assert len(teacher) == 4
        assert all((tensor == 0.5).all() for tensor in teacher)


def taught_on_one_rank(validated: bool) -> str:
    options = {"max_steps": 5, "max_epochs": -1, "num_sanity_val_steps": 0}
    if validated:
        options |= {"check_val_every_n_epoch": None, "val_check_interval": 4}
    loaders = {"train_dataloaders": loader(), **({"val_dataloaders": loader(64)} if validated else {})}
    with pytest.raises(WorkersDisagreeError) as error:
        # Lightning compares the models at the start, so one rank drops its teacher later.
        fit(ADPSGDStrategy(4), Taught(), callbacks=[Forgets()], loaders=loaders, **options)
    return str(error.value)


class Forgets(L.Callback):
    """On rank 1, takes away what no optimizer trains."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.renewed = False
        if trainer.global_rank == 1:
            del pl_module.teacher, pl_module.target


@pytest.mark.parametrize("validated", [False, True], ids=["at the end", "at a validation right after a round"])
def test_workers_of_which_only_some_have_a_teacher_are_told_so(pool, validated):
    for told in pool.run_trainer(taught_on_one_rank, validated):
        assert told.startswith("Only some workers have parameters that no optimizer trains")
        assert "rank 0: a comparison of untrained parameters" in told
        assert "Build the same model" in told


def test_a_run_with_a_teacher_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(pool, tmp_path):
    whole = pool.run_trainer(taught, str(tmp_path / "a"))
    path = str(tmp_path / "a" / f"step={SAVE_AT}.ckpt")
    resumed = pool.run_trainer(taught, str(tmp_path / "b"), False, True, path)
    for first, second in zip(whole, resumed, strict=True):
        assert identical([first["end"], second["end"]])


def test_what_is_frozen_and_not_changed_is_compared_but_never_sent(pool, tmp_path):
    still = pool.run_trainer(taught, str(tmp_path / "a"), False, False)
    size = sum(tensor.nbytes for name, tensor in still[0]["end"].items() if name.startswith("net"))
    moving = pool.run_trainer(taught, str(tmp_path / "b"))
    payload, more = (
        {step: payload for step, trigger, payload in outcome[0]["payload"] if trigger == "validation"}
        for outcome in (still, moving)
    )
    assert [*payload] == [7, 21]  # at 14 there was a round already
    assert [*more] == [7, 14, 21]
    for sent in payload.values():
        assert size <= sent < 1.5 * size
    # At 7 the teacher and the target network. At 20 they were saved, so averaged, and the step after it changes them by
    # weights that all workers hold alike: at 21 they are the same without a round.
    assert {step: more[step] - sent for step, sent in payload.items()} == {7: 2 * size, 21: 0}


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Takes gradients at y, and is evaluated at x, which follows from y and z (arXiv:2405.15682, eq. 3 to 5)."""

    def __init__(self, parameters: Any, lr: float = 0.2, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "steps": 0, "train_mode": False})

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def _move(self, to_y: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to_y:
                group["train_mode"] = to_y
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        share = 1 - group["beta"] if to_y else 1 - 1 / group["beta"]
                        parameter.lerp_(self.state[parameter]["z"], share)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            assert group["train_mode"]
            group["steps"] += 1
            beta, share = group["beta"], 1 / group["steps"]
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                x = parameter.lerp(z, 1 - 1 / beta)
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.copy_(x.lerp(z, share).lerp(z, 1 - beta))
        return loss


class ScheduleFree(Drilled):
    """Sets its optimizer's mode where Lightning sets the module's, or in the hooks around a validation."""

    def __init__(self, with_the_module: bool) -> None:
        super().__init__(batch_norm=False)
        self.with_the_module = with_the_module

    def configure_optimizers(self) -> Any:
        return ScheduleFreeSGD(self.parameters())

    def on_train_start(self) -> None:
        self.optimizers().train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        if self.with_the_module:
            self.optimizers().eval()

    def on_validation_start(self) -> None:
        self.optimizers().eval()

    def on_validation_end(self) -> None:
        if not self.with_the_module:
            self.optimizers().train()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().train()

    def on_train_end(self) -> None:
        self.optimizers().eval()


def schedule_free(folder: str, with_the_module: bool, period: int, resume: str | None = None) -> dict:
    torch.manual_seed(0)
    return run(ScheduleFree(with_the_module), folder, period, resume)


@pytest.mark.parametrize("period", [4, 7], ids=["rounds in between", "a round at each validation"])
@pytest.mark.parametrize("with_the_module", [True, False])
def test_weights_that_an_optimizer_evaluates_are_the_same_on_all_workers(pool, tmp_path, with_the_module, period):
    outcomes = pool.run_trainer(schedule_free, str(tmp_path), with_the_module, period)
    assert identical([outcome["end"] for outcome in outcomes])
    for validated in zip(*(outcome["validated"] for outcome in outcomes), strict=True):
        assert identical(list(validated))
    assert len(outcomes[0]["validated"]) == 3


def test_a_schedule_free_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(pool, tmp_path):
    whole = pool.run_trainer(schedule_free, str(tmp_path / "a"), True, 4)
    path = str(tmp_path / "a" / f"step={SAVE_AT}.ckpt")
    assert Path(path).exists()
    resumed = pool.run_trainer(schedule_free, str(tmp_path / "b"), True, 4, path)
    for first, second in zip(whole, resumed, strict=True):
        assert identical([first["end"], second["end"]])
