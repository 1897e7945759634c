"""What a rank does for a run: train as one of the contenders, and return the numbers of the run."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.accuracy import ddp_sent, evaluate, judge
from benchmarks.baselines import BF16Strategy, CountedDDP, EvenRounds, PowerSGDStrategy, QSGDStrategy
from benchmarks.frame.connection import connect
from benchmarks.frame.rank import Parent
from benchmarks.frame.trainer import Losses, Rounds, Sent, new_trainer, parameter_count, whole_batch
from benchmarks.paper.networks import new_network
from benchmarks.paper.text import CONTEXT, TextData, Windows
from examples.image_classification.data import ImageData, TensorImages
from examples.image_classification.model import learning_rate_factor
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingPeriod, AveragingRound, ConstantPeriod

MOMENTUM = 0.9
EVALUATED_EVERY = 2  # epochs
DIGITS = 6  # of a number that are kept


class Classifier(L.LightningModule):
    """A network with the optimizer and the schedule of a task, which is a `plan.Task` as JSON.

    Args:
        task: the task.
        rate: times the task's learning rate.
    """

    def __init__(self, task: Mapping[str, Any], rate: float = 1.0) -> None:
        super().__init__()
        self.task = task
        self.learning_rate = rate * task["learning_rate"]
        self.network = new_network(task["network"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch of this worker's share; nothing is logged, so nothing communicates."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum or AdamW; a linear warm-up, then two decays or a cosine."""
        task = self.task
        if task["optimizer"] == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters(), lr=self.learning_rate, weight_decay=task["weight_decay"]
            )
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), lr=self.learning_rate, momentum=MOMENTUM, weight_decay=task["weight_decay"]
            )
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, total, task))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rate_factor(step: int, total: int, task: Mapping[str, Any]) -> float:
    """What the peak learning rate is multiplied by in optimizer step ``step`` of ``total``, counted from 0."""
    warmup = round(total * task["warmup_epochs"] / task["epochs"])
    if task["schedule"] == "steps":
        return learning_rate_factor(step, warmup, [round(share * total) for share in task["decay_at"]], 0.1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@dataclass(eq=False)
class Observer(Callback):
    """Sums up each epoch, and evaluates the averaged model every few epochs without changing what is trained."""

    test: TensorImages | Windows  # to evaluate the averaged model with
    seed: int  # of the augmentation, which differs from rank to rank
    losses: Losses
    rounds: Rounds
    curve: list[dict[str, Any]] = field(default_factory=list)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the augmentation of this rank."""
        torch.manual_seed(1000 * (self.seed + 1) + trainer.global_rank)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up an epoch."""
        last = trainer.current_epoch + 1
        share = slice(trainer.global_rank, None, trainer.world_size)
        right = None
        if last % EVALUATED_EVERY == 0 and last < (trainer.max_epochs or 0):
            _, right = evaluate(averaged(pl_module.network), self.test, share)
        losses = self.losses.of_steps
        self.curve.append(
            {
                "epoch": last,
                "step": len(losses),
                "loss": float(torch.stack(losses[-(len(losses) // last) :]).mean()),
                "sent_bytes": sent(trainer, pl_module, self.rounds).bytes,
                "right": right,
            }
        )


def sent(trainer: L.Trainer, model: nn.Module, rounds: Rounds) -> Sent:
    """What this rank has sent since the run began."""
    if isinstance(trainer.strategy, ADPSGDStrategy):
        return rounds.sent()
    if isinstance(trainer.strategy, CountedDDP):
        return Sent(trainer.global_step, trainer.strategy.sent_bytes)
    return ddp_sent(model, trainer)


def averaged(network: nn.Module) -> nn.Module:
    """A copy whose parameters and floating-point buffers are the mean over all ranks."""
    copied = copy.deepcopy(network)
    tensors = [tensor for tensor in copied.state_dict().values() if tensor.is_floating_point()]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) / dist.get_world_size()
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))
    return copied


def new_strategy(contender: Mapping[str, Any], rounds: int | None, backend: str) -> Strategy:
    """A contender's strategy."""
    options: dict[str, Any] = {"process_group_backend": backend}
    if contender["method"] == "full":
        return DDPStrategy(**options)
    if contender["method"] == "bf16":
        return BF16Strategy(**options)
    if contender["method"] == "qsgd":
        return QSGDStrategy(**options)
    if contender["method"] == "powersgd":
        return PowerSGDStrategy(contender["matrix_rank"], **options)
    return ADPSGDStrategy(
        period=new_period(contender, rounds),
        optimizer_state=contender["optimizer_state"],
        reduce_dtype=contender.get("reduce_dtype"),
        stagger=contender.get("stagger", False),
        overlap=contender.get("overlap", 0),
        **options,
    )


def new_period(contender: Mapping[str, Any], rounds: int | None) -> AveragingPeriod:
    """The averaging period of a contender that has one."""
    if contender["method"] == "matched":
        return EvenRounds(rounds)
    if contender["method"] == "constant":
        return ConstantPeriod(contender["period"])
    return AdaptivePeriod(
        initial=contender["period"], sampling=contender["sampling"], growth=contender.get("growth", "additive")
    )


@cache
def read(data: str, verify: bool, images: int | None) -> ImageData:
    """The images, which stay in memory from run to run."""
    module = ImageData(root=data, verify=verify, download=False, train_images=images)
    module.setup("fit")
    return module


@cache
def read_text(data: str, windows: int | None) -> TextData:
    """The text, which stays in memory from run to run."""
    return TextData(data, windows)


def judge_text(network: nn.Module, data: TextData, trainer: L.Trainer) -> dict[str, Any]:
    """As :func:`benchmarks.accuracy.judge`, but both numbers are those of the text that was not trained on."""
    loss, right = evaluate(network, data.val_set, slice(trainer.global_rank, None, trainer.world_size))
    predicted = CONTEXT * len(data.val_set)
    return {"train_loss_sum": loss, "train_images": predicted, "right": right, "test_images": predicted}


def train(order: Mapping[str, Any]) -> dict[str, Any]:
    """Train on the calling rank; `runs.combine` combines the results of all ranks."""
    settings, device = order["settings"], order["device"]
    task, seed = settings["task"], settings["seed"]
    of_text = task.get("data") == "text"
    data: Any = (
        read_text(order["data"], task["images"]) if of_text else read(order["data"], order["verify"], task["images"])
    )
    L.seed_everything(seed, verbose=False)
    model = Classifier(task, settings["contender"].get("rate", 1.0))
    losses, rounds = Losses(), Rounds()
    observer = Observer(data.val_set, seed, losses, rounds)
    data.train_set.augment = True
    trainer = new_trainer(
        new_strategy(settings["contender"], settings.get("rounds"), order["backend"]),
        losses,
        rounds,
        observer,
        accelerator="gpu" if device == "cuda" else "cpu",
        num_nodes=task["workers"],
        max_epochs=task["epochs"],
        limit_val_batches=0,
    )
    options = {"batch_size": task["batch_size"], "collate_fn": whole_batch}
    trainer.fit(model, DataLoader(data.train_set, shuffle=True, drop_last=True, **options))
    in_all = sent(trainer, model, rounds)
    return {
        "steps": trainer.global_step,
        "parameters": parameter_count(model),
        "rounds": in_all.rounds,
        "sent_bytes": in_all.bytes,
        "curve": observer.curve,
        "averaging": _columns(rounds.kept) if trainer.global_rank == 0 else {},
        **(judge_text if of_text else judge)(averaged(model.network.to(device)), data, trainer),
    }


def _columns(rounds: list[AveragingRound]) -> dict[str, list[Any]]:
    names = ("step", "trigger", "local_steps", "period", "learning_rate", "variance", "ratio", "target")
    return {name: [_short(getattr(round_, name)) for round_ in rounds] for name in names}


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def carry_out(order: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
    """Carry out an order on the calling rank."""
    connect(order["backend"])
    return train(order)
