"""What every contender of `link.py` trains (one model, one optimizer, the same batches), and the record of a run."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.frame.hosts import Counters
from benchmarks.frame.trainer import Sent, parameter_count, whole_batch

MODELS = ("mlp", "resnet8", "resnet20", "resnet18")
HIDDEN_LAYERS = 4
POOLED = 192  # inputs of the perceptron: images of 32 by 32 pixels and 3 colours, pooled to 8 by 8
CLASSES = 10
EXAMPLES = 2048  # random ones per rank
FEWEST_PARAMETERS = 10_000
MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """What is trained, whichever contender does it."""

    model: str  # one of ``MODELS``
    parameters: int  # of the multilayer perceptron, approximately; the other models have fixed sizes
    batch_size: int  # per rank
    learning_rate: float
    seed: int
    steps: int
    pause_ms: float = 0.0
    """Time per step for which forward and backward pass sleep, in place of computation on an accelerator."""
    data: str | None = None  # the folder with CIFAR-10; None is random images
    verify: bool = True  # whether the files have to be the published ones, not the same images repacked
    images: int | None = None  # the number of training images, the first ones; None is all


class Pause(nn.Module):
    """Sleeps ``seconds``, a third of it in the forward pass and the rest in the backward pass.

    It stands for computation on an accelerator: the process waits, and its cores are free.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, inputs: Tensor) -> Tensor:
        """Sleep now, and again in the backward pass."""
        return _Sleep.apply(inputs, self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, seconds: float) -> Tensor:
        context.seconds = seconds
        time.sleep(seconds / 3)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(context.seconds * 2 / 3)
        return gradients[0], None


def new_network(recipe: Recipe) -> nn.Module:
    """The model, the same on every rank."""
    torch.manual_seed(recipe.seed)
    if recipe.model == "mlp":
        return _perceptron(recipe)
    from examples.image_classification.model import build_network  # needs torchvision

    return build_network(recipe.model, num_classes=CLASSES, in_channels=3)


def model_size(recipe: Recipe) -> int:
    """How many parameters the model has."""
    with torch.device("meta"):
        return parameter_count(new_network(recipe))


def _perceptron(recipe: Recipe) -> nn.Module:
    width = _width(recipe.parameters)
    layers: list[nn.Module] = [nn.AvgPool2d(4), nn.Flatten()]
    for inputs, outputs in itertools.pairwise([POOLED, *[width] * HIDDEN_LAYERS]):
        layer = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # otherwise the first hundred steps learn nothing
        layers += [layer, nn.ReLU()]
        if recipe.pause_ms > 0:  # after each layer, so that DDP can send its gradient while others are computed
            layers.append(Pause(recipe.pause_ms / 1000 / HIDDEN_LAYERS))
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def _width(parameters: int) -> int:
    """Of hidden layers, for a model of about this size."""
    square, linear = HIDDEN_LAYERS - 1, POOLED + HIDDEN_LAYERS + CLASSES
    return round((math.sqrt(linear**2 + 4 * square * (parameters - CLASSES)) - linear) / (2 * square))


def new_optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum at a constant rate."""
    return torch.optim.SGD(network.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM)


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch."""
    images, labels = batch
    return F.cross_entropy(network(images), labels)


class Task(L.LightningModule):
    """A recipe for Lightning."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.network = new_network(recipe)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch of this rank's share."""
        return loss_of(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return new_optimizer(self.recipe, self.network)


@dataclass(eq=False)
class Images(Dataset):
    """Images and labels in memory, returned in whole batches."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch."""
        return self.images[indices], self.labels[indices]


@dataclass(eq=False)
class Shuffled(Sampler[int]):
    """All examples in random order, then all in another order, and so on: the run is one epoch for the Trainer.

    What a trainer does between epochs is not to be measured. ``draws`` are those of the whole run.
    """

    examples: int
    draws: int
    seed: int

    def __len__(self) -> int:
        return self.draws

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        orders = (torch.randperm(self.examples, generator=generator).tolist() for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(orders), self.draws)


def new_loader(recipe: Recipe, rank: int, world_size: int) -> DataLoader:
    """One rank's batches, the same for every contender."""
    images = _random_images(recipe.seed, rank) if recipe.data is None else _cifar10(recipe, rank, world_size)
    torch.manual_seed(recipe.seed + 1 + rank)  # of the augmentation
    return DataLoader(
        images,
        batch_size=recipe.batch_size,
        sampler=Shuffled(len(images), recipe.steps * recipe.batch_size, recipe.seed + 1 + rank),
        collate_fn=whole_batch,
    )


@cache
def _random_images(seed: int, rank: int) -> Images:
    """Noise around one image per class, which takes a few hundred steps to learn."""
    centres = 0.05 * torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    centres = centres.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    generator = torch.Generator().manual_seed(seed + 1 + rank)
    labels = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return Images(centres[labels] + torch.randn(EXAMPLES, 3, 32, 32, generator=generator), labels)


@cache
def _cifar10(recipe: Recipe, rank: int, world_size: int) -> Dataset:
    """Every world_size-th image, cropped and mirrored at random."""
    from examples.image_classification.data import DATASETS, ImageData, TensorImages  # needs torchvision

    data = ImageData(root=recipe.data, verify=recipe.verify, download=False, train_images=recipe.images)
    data.setup("fit")
    share = slice(rank, None, world_size)
    facts = DATASETS["cifar10"]
    images, labels = data.train_set.images[share].clone(), data.train_set.labels[share].clone()
    return TensorImages(images, labels, facts.mean, facts.std, augment=True)


class Record:
    """What one rank records at each step of a run; ``meet`` waits for all ranks, without the network."""

    def __init__(self, meet: Callable[[], None], counters: Callable[[], Counters]) -> None:
        self.sent: Callable[[], Sent] = Sent  # what was communicated so far; the contender sets it
        self.meet = meet
        self._counters = counters
        self._losses: list[float] = []
        self._notes: list[tuple[float, Counters, Sent]] = []

    @property
    def steps(self) -> int:
        """Steps so far."""
        return len(self._losses)

    def begin(self) -> None:
        """Wait for all ranks, immediately before the first step."""
        self.meet()
        self._note()

    def step(self, loss: Tensor) -> None:
        """Record a step."""
        self._losses.append(float(loss))
        self._note()

    def as_json(self) -> dict[str, list]:
        """The loss of each step, and everything else before the first step and after each."""
        times, counters, sent = zip(*self._notes, strict=True)
        return {
            "losses": self._losses,
            "times": list(times),
            "tx_bytes": [each.tx_bytes for each in counters],
            "tx_packets": [each.tx_packets for each in counters],
            "rounds": [each.rounds for each in sent],
            "sent_bytes": [each.bytes for each in sent],
        }

    def _note(self) -> None:
        self._notes.append((time.perf_counter(), self._counters(), self.sent()))


class Recorder(Callback):
    """Fills a record during a fit."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        """Wait for all ranks."""
        if index == 0:
            self._record.begin()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Record a step, with its averaging round."""
        self._record.step(outputs["loss"])
