"""Image classifiers for small pictures, in one LightningModule whose learning-rate schedule spans the whole run."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception
from torchvision.models.resnet import BasicBlock, resnet18
from torchvision.models.vgg import cfgs as VGG_LAYERS
from torchvision.models.vgg import make_layers

Architecture = Literal["resnet18", "vgg16", "googlenet", "resnet8", "resnet20", "vgg_small", "googlenet_small"]


class ImageClassifier(pl.LightningModule):
    """A classifier of small images, trained by SGD with momentum: a linear warm-up, then step decays.

    Nothing here knows about workers or averaging: it trains unchanged on one device, under DDP and under ADPSGD.

    Args:
        architecture: the network, see `ARCHITECTURES`. ``resnet8``, ``resnet20``, ``vgg_small`` and ``googlenet_small``
            train on a CPU in reasonable time; ``resnet18``, ``vgg16`` and ``googlenet`` need a GPU.
        num_classes: number of classes.
        in_channels: colour channels of the images, 3 for RGB and 1 for grey.
        learning_rate: the peak of the schedule.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay, on all parameters.
        warmup_epochs: epochs, or a part of one, in which the rate grows linearly to its peak.
        decay_at: when the rate decays, as increasing fractions of the whole run.
        decay_factor: what the rate is multiplied by at each of them.

    Raises:
        ValueError: if an argument is out of its range, or does not fit the data it is trained on.
    """

    def __init__(
        self,
        architecture: Architecture = "resnet20",
        num_classes: int = 10,
        in_channels: int = 3,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 1.0,
        decay_at: tuple[float, ...] = (0.5, 0.75),
        decay_factor: float = 0.1,
    ) -> None:
        super().__init__()
        _check_choice("architecture", architecture, get_args(Architecture))
        _check("num_classes", num_classes, num_classes >= 2, "at least 2")
        _check("in_channels", in_channels, in_channels >= 1, "at least 1")
        _check("learning_rate", learning_rate, learning_rate > 0, "a number above 0")
        _check("momentum", momentum, 0 <= momentum < 1, "a number from 0 to below 1")
        _check("weight_decay", weight_decay, weight_decay >= 0, "0 or more")
        _check("warmup_epochs", warmup_epochs, warmup_epochs >= 0, "0 (no warm-up) or a number of epochs")
        increasing = list(decay_at) == sorted(set(decay_at)) and all(0 < fraction < 1 for fraction in decay_at)
        _check("decay_at", decay_at, increasing, "increasing fractions of the run between 0 and 1, such as (0.5, 0.75)")
        _check("decay_factor", decay_factor, 0 < decay_factor <= 1, "a number above 0, at most 1")

        self.save_hyperparameters()
        self.network = build_network(architecture, num_classes, in_channels)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Compare what the network expects with what the data module offers, for a clearer error than a tensor's."""
        data = getattr(self.trainer, "datamodule", None)
        for name in ("num_classes", "in_channels"):
            offered = getattr(data, name, self.hparams[name])
            if offered != self.hparams[name]:
                raise ValueError(
                    f"{name}={self.hparams[name]}, but the data of {type(data).__name__} has {offered}: "
                    f"set {name}={offered} (command line: --model.{name} {offered})"
                )

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), normalised, to logits (N, num_classes)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch (N, C, H, W) with labels (N)."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        # The step's loss stays this worker's own: sync_dist here would communicate at every step, which
        # periodic averaging avoids. The epoch's mean is summed up locally and reduced once, when the epoch ends.
        # Neither is on the progress bar, which would fetch a number from the device at every step.
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, batch_size=len(labels))
        self.log("train_loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss of one batch of validation images."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss of one batch of test images."""
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], prefix: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{prefix}_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        self.log(f"{prefix}_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD with momentum, and the schedule, which takes one step per optimizer step."""
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.hparams.learning_rate,
            momentum=self.hparams.momentum,
            weight_decay=self.hparams.weight_decay,
        )
        total_steps, warmup_steps = self._schedule_steps()
        decay_steps = [round(fraction * total_steps) for fraction in self.hparams.decay_at]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, warmup_steps, decay_steps, self.hparams.decay_factor),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule_steps(self) -> tuple[int, int]:
        """Optimizer steps of the whole run, and of its warm-up."""
        total_steps = self.trainer.estimated_stepping_batches
        if not 0 < total_steps < math.inf:
            raise ValueError(
                f"The run has no known end (max_epochs={self.trainer.max_epochs}, max_steps={self.trainer.max_steps}), "
                f"but decay_at={tuple(self.hparams.decay_at)} are fractions of it: set Trainer(max_epochs=...) or "
                "Trainer(max_steps=...)"
            )
        if self.hparams.warmup_epochs == 0:
            return int(total_steps), 0
        if self.trainer.train_dataloader is None:
            # With max_steps alone Lightning has not looked at the data yet; after this an epoch's length is known.
            self.trainer.fit_loop.setup_data()
        epoch_batches = self.trainer.num_training_batches
        if epoch_batches == math.inf:
            raise ValueError(
                f"warmup_epochs={self.hparams.warmup_epochs}, but an epoch of this data has no known length: "
                "set warmup_epochs=0 or Trainer(limit_train_batches=...)"
            )
        epoch_steps = math.ceil(epoch_batches / self.trainer.accumulate_grad_batches)
        return int(total_steps), round(self.hparams.warmup_epochs * epoch_steps)


def learning_rate_factor(step: int, warmup_steps: int, decay_steps: Sequence[int], decay_factor: float) -> float:
    """What the peak learning rate is multiplied by in the optimizer step number ``step``, counted from 0.

    The warm-up starts at 1/warmup_steps rather than at 0, so that no step is without effect.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * decay_factor ** sum(step >= decay for decay in decay_steps)


def build_network(architecture: Architecture, num_classes: int, in_channels: int) -> nn.Module:
    """The network of that name, for images of 28 to 64 pixels, freshly initialised."""
    network = ARCHITECTURES[architecture](num_classes, in_channels)
    for module in network.modules():
        # He et al. 2015, arXiv:1502.01852, as in torchvision's ResNet; linear layers keep PyTorch's own.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # Activations take the weights' memory format, and on a CPU convolutions are markedly faster in this one.
    return network.to(memory_format=torch.channels_last)


def _resnet18(num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-18 of torchvision with a stem that keeps the resolution of a small image."""
    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _cifar_resnet(blocks: int, num_classes: int, in_channels: int) -> nn.Module:
    """ResNet-(6·blocks + 2) of He et al., arXiv:1512.03385, section 4.2, with projections as shortcuts (option B)."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
    ]
    channels = 16
    for width, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in [first_stride] + [1] * (blocks - 1):
            shortcut = None
            if stride != 1 or channels != width:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width)
                )
            layers.append(BasicBlock(channels, width, stride, shortcut))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _vgg(layers: list[int | str], hidden: int, num_classes: int, in_channels: int) -> nn.Module:
    """VGG features of torchvision, with batch norm, and a small head: the one for ImageNet has 124 M parameters."""
    features = make_layers(layers, batch_norm=True)
    first, last = layers[0], [width for width in layers if width != "M"][-1]
    features[0] = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = True  # the same at 32 pixels; at 28 the fifth pooling would leave nothing otherwise
    return nn.Sequential(
        features,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )


def _googlenet(num_classes: int, in_channels: int) -> nn.Module:
    """GoogLeNet of torchvision without auxiliary heads; the stem divides the resolution by 2 instead of 8."""
    network = GoogLeNet(num_classes=num_classes, aux_logits=False, init_weights=False)
    network.conv1 = BasicConv2d(in_channels, 64, kernel_size=3, padding=1)
    network.maxpool1 = nn.Identity()
    return network


def _googlenet_small(num_classes: int, in_channels: int) -> nn.Module:
    """Four Inception blocks of torchvision at a quarter of GoogLeNet's width or less."""
    return nn.Sequential(
        BasicConv2d(in_channels, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(32, 16, 16, 32, 4, 8, 8),  # 16 + 32 + 8 + 8 = 64 channels
        Inception(64, 24, 24, 48, 6, 12, 12),  # 96
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(96, 32, 32, 64, 8, 16, 16),  # 128
        Inception(128, 48, 48, 96, 12, 24, 24),  # 192
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(192, num_classes),
    )


VGG_SMALL_LAYERS: list[int | str] = [32, "M", 64, "M", 128, 128, "M"]

ARCHITECTURES: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": _resnet18,
    "vgg16": lambda num_classes, in_channels: _vgg(VGG_LAYERS["D"], 512, num_classes, in_channels),
    "googlenet": _googlenet,
    "resnet8": lambda num_classes, in_channels: _cifar_resnet(1, num_classes, in_channels),
    "resnet20": lambda num_classes, in_channels: _cifar_resnet(3, num_classes, in_channels),
    "vgg_small": lambda num_classes, in_channels: _vgg(VGG_SMALL_LAYERS, 128, num_classes, in_channels),
    "googlenet_small": _googlenet_small,
}


def _check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    _check(name, given, given in choices, f"one of {', '.join(choices)}")


def _check(name: str, given: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}={given!r}: expected {expected}; change {name} (command line: --model.{name})")
