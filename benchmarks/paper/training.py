"""What a rank does for a run: train as one of the contenders, and note down what can be said about it afterwards."""

import copy
import math
from collections.abc import Mapping
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

from benchmarks.accuracy import ddp_bytes, evaluate
from benchmarks.baselines import EvenRounds, QSGDStrategy
from benchmarks.machine import connect
from benchmarks.paper.networks import new_network
from benchmarks.ranks import Parent
from examples.image_classification.data import ImageData, TensorImages
from examples.image_classification.model import learning_rate_factor
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingPeriod, AveragingRound, ConstantPeriod

MOMENTUM = 0.9
EVALUATED_EVERY = 2
"""Epochs."""
DIGITS = 6
"""That are kept of a number."""


class Classifier(L.LightningModule):
    """A network with the task's optimizer and schedule, which takes one step per optimizer step.

    Args:
        task: the settings of a `plan.Task`, as JSON has them.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__()
        self.task = task
        self.network = new_network(task["network"])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch of this worker's share; nothing is logged, so nothing communicates."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum or AdamW; a linear warm-up, then two decays or a cosine."""
        task = self.task
        if task["optimizer"] == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters(), lr=task["learning_rate"], weight_decay=task["weight_decay"]
            )
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), lr=task["learning_rate"], momentum=MOMENTUM, weight_decay=task["weight_decay"]
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


class Observer(Callback):
    """Notes down losses and rounds, and looks at the averaged model now and then without touching what is trained.

    Args:
        test: what the averaged model is looked at with.
        seed: of what augments images, which differs from rank to rank.
    """

    def __init__(self, test: TensorImages, seed: int) -> None:
        self.losses: list[Tensor] = []
        self.rounds: list[AveragingRound] = []
        self.curve: list[dict[str, Any]] = []
        self._test = test
        self._seed = seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Be told of rounds, and have images augmented in another way on each rank."""
        torch.manual_seed(1000 * (self._seed + 1) + trainer.global_rank)
        if isinstance(trainer.strategy, ADPSGDStrategy):
            trainer.strategy.subscribe(self.rounds.append)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep a loss, as a tensor that nobody waits for."""
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up an epoch."""
        last = trainer.current_epoch + 1
        share = slice(trainer.global_rank, None, trainer.world_size)
        right = None
        if last % EVALUATED_EVERY == 0 and last < (trainer.max_epochs or 0):
            _, right = evaluate(averaged(pl_module.network), self._test, share)
        steps = len(self.losses) // last
        self.curve.append(
            {
                "epoch": last,
                "step": len(self.losses),
                "loss": float(torch.stack(self.losses[-steps:]).mean()),
                "sent_bytes": sent_bytes(trainer, pl_module, self.rounds),
                "right": right,
            }
        )


def sent_bytes(trainer: L.Trainer, model: nn.Module, rounds: list[AveragingRound]) -> int:
    """What this rank has sent since the run began."""
    if isinstance(trainer.strategy, ADPSGDStrategy):
        return sum(round_.sent_bytes for round_ in rounds)
    if isinstance(trainer.strategy, QSGDStrategy):
        return trainer.strategy.sent_bytes
    return ddp_bytes(model, trainer.world_size) * trainer.global_step


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
    if contender["method"] == "full":
        return DDPStrategy(process_group_backend=backend)
    if contender["method"] == "qsgd":
        return QSGDStrategy(process_group_backend=backend)
    return ADPSGDStrategy(
        period=new_period(contender, rounds),
        optimizer_state=contender["optimizer_state"],
        process_group_backend=backend,
    )


def new_period(contender: Mapping[str, Any], rounds: int | None) -> AveragingPeriod:
    """The averaging period of a contender that has one."""
    if contender["method"] == "matched":
        return EvenRounds(rounds)
    if contender["method"] == "constant":
        return ConstantPeriod(contender["period"])
    return AdaptivePeriod(initial=contender["period"], sampling=contender["sampling"])


@cache
def read(data: str, verify: bool, images: int | None) -> ImageData:
    """The images, which are read once and stay from run to run."""
    module = ImageData(root=data, verify=verify, download=False, train_images=images)
    module.setup("fit")
    return module


def train(order: Mapping[str, Any]) -> dict[str, Any]:
    """Train on the calling rank.

    Returns:
        What `runs.combine` puts together with what the others return.
    """
    settings, device = order["settings"], order["device"]
    task, seed = settings["task"], settings["seed"]
    data = read(order["data"], order["verify"], task["images"])
    L.seed_everything(seed, verbose=False)
    model = Classifier(task)
    observer = Observer(data.val_set, seed)
    data.train_set.augment = True
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        num_nodes=task["workers"],
        strategy=new_strategy(settings["contender"], settings.get("rounds"), order["backend"]),
        callbacks=[observer],
        max_epochs=task["epochs"],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data.train_set, batch_size=task["batch_size"], shuffle=True, drop_last=True, collate_fn=_as_is)
    trainer.fit(model, loader)
    return _account(trainer, model, observer, data, device)


def _as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _account(trainer: L.Trainer, model: Classifier, observer: Observer, data: ImageData, device: str) -> dict[str, Any]:
    network = averaged(model.network.to(device))
    share = slice(trainer.global_rank, None, trainer.world_size)
    data.train_set.augment = False
    train_loss, _ = evaluate(network, data.train_set, share)
    _, right = evaluate(network, data.val_set, share)
    by_period = isinstance(trainer.strategy, ADPSGDStrategy)
    return {
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rounds": len(observer.rounds) if by_period else trainer.global_step,
        "sent_bytes": sent_bytes(trainer, model, observer.rounds),
        "curve": observer.curve,
        "averaging": _columns(observer.rounds) if trainer.global_rank == 0 else {},
        "train_loss_sum": train_loss,
        "train_images": len(data.train_set),
        "right": right,
        "test_images": len(data.val_set),
    }


def _columns(rounds: list[AveragingRound]) -> dict[str, list[Any]]:
    names = ("step", "trigger", "local_steps", "period", "learning_rate", "variance", "ratio", "target")
    return {name: [_short(getattr(round_, name)) for round_ in rounds] for name in names}


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def carry_out(order: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
    """Carry out an order on the calling rank."""
    torch.set_num_threads(1)
    connect(order["master_port"], order["backend"])
    return train(order)
