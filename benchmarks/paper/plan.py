"""What is trained, by which contenders and with how many seeds: the studies, at each of three scales."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

Method = Literal["full", "bf16", "qsgd", "powersgd", "constant", "matched", "adaptive"]
LATER = {"later": True}
"""Marks fields that older runs do not have: at their defaults they are left out of the settings."""


@dataclass(frozen=True)
class Contender:
    """A way to combine the workers' models."""

    name: str
    title: str
    method: Method
    """``matched`` is CPSGD that spreads as many rounds as ``adpsgd`` had with the same task and seed over the run."""
    period: int | None = None  # of ``constant``; the first one of ``adaptive``
    sampling: float | None = None  # of ``adaptive``: K_s, as a share of the run
    optimizer_state: str = "local"  # what a round does to momentum and moments
    reduce_dtype: str | None = field(default=None, metadata=LATER)  # of what rounds send
    matrix_rank: int | None = field(default=None, metadata=LATER)  # of ``powersgd``
    rate: float = field(default=1.0, metadata=LATER)  # times the task's learning rate
    growth: str = field(default="additive", metadata=LATER)  # of the period of ``adaptive``
    stagger: bool = field(default=False, metadata=LATER)
    overlap: int = field(default=0, metadata=LATER)  # steps

    def at_rate(self, factor: float) -> "Contender":
        """The same at another learning rate, ``factor`` times the task's."""
        return replace(self, name=f"{self.name}-x{factor:g}", title=f"{self.title}, rate × {factor:g}", rate=factor)


@dataclass(frozen=True)
class Task:
    """What is trained, whichever contender does it."""

    name: str
    title: str
    network: str
    workers: int
    batch_size: int  # images, or sequences of characters, per worker and step
    images: int | None  # the number of training images, the first ones; None is all. Of text: sequences of an epoch
    epochs: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["steps", "cosine"] = "steps"
    """Both after a linear warm-up: two decays to a tenth each, or a cosine to 0."""
    learning_rate: float = 0.1  # the peak
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    decay_at: tuple[float, ...] = (0.5, 0.75)  # shares of the run
    data: Literal["images", "text"] = field(default="images", metadata=LATER)


class Run(NamedTuple):
    """One training."""

    task: Task
    contender: Contender
    seed: int

    @property
    def file(self) -> str:
        """Its file in a folder of runs."""
        return f"{self.task.name}/{self.contender.name}-seed{self.seed}.json"

    def settings(self, rounds: int | None) -> dict[str, Any]:
        """Everything that it depends on; ``rounds`` are those of ``adpsgd``, for a contender that is ``matched``."""
        task = {**_untitled(self.task), "decay_at": list(self.task.decay_at)}
        known = {"task": task, "contender": _untitled(self.contender), "seed": self.seed}
        return known if rounds is None else {**known, "rounds": rounds}


def _untitled(described: Contender | Task) -> dict[str, Any]:
    """All fields but the title and those that were added later and are at their default."""
    unset = {each.name for each in fields(described) if each.metadata == LATER and _is_default(described, each.name)}
    return {name: value for name, value in asdict(described).items() if name not in {"title", *unset}}


def _is_default(described: Contender | Task, name: str) -> bool:
    return getattr(described, name) == getattr(type(described), name)


class Study(NamedTuple):
    """A question, and the runs that answer it."""

    name: str
    asks: str
    tasks: Sequence[Task]
    contenders: Sequence[Contender]
    seeds: int
    more: Mapping[str, Sequence[Contender]] = {}
    """Contenders that only some tasks have, by the task's name."""
    first: Sequence[Contender] = ()
    """Contenders that are run on all tasks before the others, so that they can be compared if the rest is missing."""

    def of(self, task: Task) -> tuple[Contender, ...]:
        """The contenders of a task."""
        return (*self.contenders, *self.more.get(task.name, ()))

    def runs(self, seed: int) -> Iterator[Run]:
        """Those of one seed; ``adpsgd`` comes before what is matched to it."""
        every = [Run(task, contender, seed) for task in self.tasks for contender in self.of(task)]
        yield from sorted(every, key=lambda run: run.contender not in self.first)  # a stable sort


# The contenders

ADPSGD = Contender("adpsgd", "ADPSGD, p_init = 4", "adaptive", period=4, sampling=0.25)


def _adaptive(initial: int, sampling: float) -> Contender:
    if (initial, sampling) == (ADPSGD.period, ADPSGD.sampling):
        return ADPSGD
    share = "" if sampling == ADPSGD.sampling else f", K_s = {sampling:g} K"
    name, title = f"adpsgd-p{initial}-s{sampling:g}", f"ADPSGD, p_init = {initial}{share}"
    return Contender(name, title, "adaptive", period=initial, sampling=sampling)


RARE = _adaptive(8, 0.25)  # with a first period as long as CPSGD's, it has fewer rounds
FULL = Contender("full", "full communication", "full")
CPSGD_8 = Contender("cpsgd-8", "CPSGD, p = 8", "constant", period=8)
MATCHED = Contender("cpsgd-matched", "CPSGD, as many rounds", "matched")
QSGD = Contender("qsgd", "QSGD, 8 bits", "qsgd")
PAPER = (ADPSGD, FULL, CPSGD_8, MATCHED, QSGD, RARE)
TODAY = (ADPSGD, FULL, CPSGD_8, MATCHED)


def _constant(period: int, optimizer_state: str) -> Contender:
    name, title = f"cpsgd-{period}-{optimizer_state}", f"CPSGD, p = {period}, state: {optimizer_state}"
    return Contender(name, title, "constant", period=period, optimizer_state=optimizer_state)


# Accuracy against bytes

HALF = _adaptive(2, 0.25)
INT8, INT4 = (
    replace(HALF, name=f"adpsgd-p2-int{bits}", title=f"ADPSGD, {bits} bits", reduce_dtype=f"int{bits}")
    for bits in (8, 4)
)
ADPSGD_INT4 = replace(INT4, name="adpsgd-int4", title="adpsgd_int4", optimizer_state="estimate", growth="proportional")
"""What the strategy's name ``adpsgd_int4`` stands for."""
INT4_OFTEN = replace(ADPSGD_INT4, name="adpsgd-int4-p1", title="adpsgd_int4, p_init = 1", period=1)
"""It averages at every step while the learning rate is at its highest: nearly twice the bytes, and hardly any drift."""
BF16 = Contender("ddp-bf16", "DDP, bf16", "bf16")
POWERSGD = tuple(
    Contender(f"powersgd-{rank}", f"PowerSGD, rank {rank}", "powersgd", matrix_rank=rank) for rank in (1, 2, 4)
)
BYTES = (FULL, BF16, QSGD, *POWERSGD, ADPSGD, ADPSGD_INT4)
BETWEEN = (HALF, INT8, INT4, INT4_OFTEN)
"""Between ``adpsgd`` and ``adpsgd_int4``: what each part of it contributes, on one task."""
FASTER = {
    contender: tuple(contender.at_rate(factor) for factor in factors)
    for contender, factors in ((FULL, (2, 2.8)), *((each, (2,)) for each in POWERSGD), (ADPSGD_INT4, (2, 2.8)))
}
"""With AdamW each of these is tuned, as their best learning rates differ."""

SHORTLIST = (FULL, POWERSGD[-1], ADPSGD, ADPSGD_INT4)

GRID = tuple(_adaptive(initial, sampling) for initial in (2, 4, 8) for sampling in (0.1, 0.25, 0.5))
MOMENTUM = (CPSGD_8, _constant(16, "average"), _constant(8, "average"), _constant(8, "reset"))
MOMENTS = (CPSGD_8, _constant(24, "average"), _constant(8, "average"))
"""Adam has two of them, so that a round which averages them sends three times as much."""


AGAINST_BYTES = ("bytes", "language", "long")
"""The studies of accuracy against bytes."""
SEEDS = 5  # of contenders that are compared with full communication relative to its spread


def _tasks(networks: Sequence[tuple[str, str, str]], **common: Any) -> tuple[Task, ...]:
    return tuple(Task(name, title, network, **common) for name, title, network in networks)


def _studies(tasks: Sequence[Task], transformer: Task, seeds: int) -> tuple[Study, ...]:
    """All studies; the paper's on all tasks, those about the rule on the last of them."""
    last = tasks[-1]
    tuned = [contender for others in FASTER.values() for contender in others]
    cosine = replace(last, name=f"{last.name}-cosine", title=f"{last.title}, cosine decay", schedule="cosine")
    return (
        Study("paper", "The paper's comparison", tasks, PAPER, seeds),
        Study("cosine", "The rule under a cosine decay", [cosine], TODAY, seeds),
        Study("adamw", "The rule under AdamW", [transformer], TODAY, seeds),
        Study("momentum", "Averaging the momentum", [last], MOMENTUM, seeds),
        Study("moments", "Averaging Adam's moments", [transformer], MOMENTS, seeds),
        Study("rule", "p_init and sampling", [last], GRID, seeds),
        Study(
            "bytes",
            "Accuracy against bytes",
            [*tasks, cosine, transformer],
            BYTES,
            SEEDS,
            more={last.name: BETWEEN, transformer.name: tuned},
            first=(FULL, ADPSGD_INT4, *FASTER[FULL], *FASTER[ADPSGD_INT4]),
        ),
    )


def _transformer(network: str, **common: Any) -> Task:
    adamw = {"optimizer": "adamw", "schedule": "cosine", "learning_rate": 2e-3, "weight_decay": 0.05}
    return Task("vit-adamw", "vision transformer, AdamW, cosine decay", network, **common, **adamw)


def _further(resnet: Task, **common: Any) -> tuple[Study, ...]:
    """Language, and a longer run."""
    language = Task(
        "gpt-adamw",
        "language model, AdamW, cosine decay",
        "gpt_tiny",
        **common,
        optimizer="adamw",
        schedule="cosine",
        learning_rate=3e-3,
        weight_decay=0.1,
        data="text",
    )
    long = replace(resnet, name=f"{resnet.name}-long", title=f"{resnet.title}, 60 epochs", epochs=60)
    tuned = [contender for base in (FULL, POWERSGD[-1], ADPSGD_INT4) for contender in FASTER[base]]
    pair = (FULL, ADPSGD_INT4, *FASTER[FULL], *FASTER[ADPSGD_INT4])
    return (
        Study("language", "Accuracy against bytes: language", [language], (*SHORTLIST, *tuned), 3, first=pair),
        Study("long", "Accuracy against bytes: a longer run", [long], SHORTLIST, 1, first=pair),
    )


_SHORT = {"workers": 8, "batch_size": 16, "images": 6400, "epochs": 10}
_CPU = {"workers": 8, "batch_size": 16, "images": 12800, "epochs": 12}
_GPU = {"workers": 16, "batch_size": 32, "images": None, "epochs": 60}

SCALES: dict[str, tuple[Study, ...]] = {
    "short": (
        Study("paper", "The paper's comparison", _tasks([("resnet", "ResNet", "resnet_tiny")], **_SHORT), PAPER, 1),
    ),
    "cpu": _studies(
        _tasks(
            [
                ("vgg", "VGG", "vgg_tiny"),
                ("googlenet", "GoogLeNet", "googlenet_tiny"),
                ("resnet", "ResNet", "resnet_tiny"),
            ],
            **_CPU,
        ),
        _transformer("vit_tiny", **_CPU),
        seeds=3,
    )
    + _further(Task("resnet", "ResNet", "resnet_tiny", **_CPU), **_CPU),
    "gpu": _studies(
        _tasks(
            [
                ("vgg16", "VGG-16", "vgg16"),
                ("googlenet", "GoogLeNet", "googlenet"),
                ("resnet18", "ResNet-18", "resnet18"),
            ],
            **_GPU,
        ),
        _transformer("vit_small", **_GPU),
        seeds=3,
    ),
}
"""The studies by scale: ``short`` for a look, ``cpu`` for two cores, ``gpu`` at full size with all ranks on one GPU."""


def runs_of(studies: Sequence[Study], seeds: int | None = None) -> list[Run]:
    """Every run once, study by study and seed by seed, with at most ``seeds`` seeds, by default those of the study."""
    found = {
        run.file: run
        for study in studies
        for seed in range(study.seeds if seeds is None else min(seeds, study.seeds))
        for run in study.runs(seed)
    }
    return list(found.values())
