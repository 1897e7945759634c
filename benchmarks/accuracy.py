"""Do the options for how rounds are sent cost accuracy? The same training with several options and seeds, on CIFAR-10.

    .venv/bin/python -m benchmarks.accuracy --data DIR [--contenders plain,stagger-overlap] [--seeds 3] [--json FILE]

Every run trains the same small ResNet with the image example's schedule (SGD with momentum, a linear warm-up, two step
decays) on `--workers` CPU processes of one thread, with `AdaptivePeriod(initial=--initial)`, or with a constant period
if `--period` is given. Runs of one seed start from the same weights and see the same batches. There is no validation in
between, so the period triggers every round but the last one. Needs torchvision.

The table shows, as mean ± standard deviation over the seeds:

- rounds, sent: averages of the parameters, and bytes that each rank sent for them.
- last epoch's loss: training loss, each worker's on its own replica and its own augmented batches; the mean over the
  workers and the steps of the last epoch.
- final loss: cross-entropy of the averaged model on all training images, not augmented.
- accuracy: of the averaged model on the 10,000 test images.
- vs plain: accuracy minus that of `plain` with the same seed; the mean over the seeds.

With `--runs DIR` each run is written there when it ends, and a run found there with the same settings is not
repeated.

The exit code is 0, or 2 if a run could not be finished.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn import functional as F

from benchmarks.frame.command import Arguments, new_main, new_parser, number, one_of, say, settings, several
from benchmarks.frame.connection import connect
from benchmarks.frame.rank import Parent
from benchmarks.frame.ranks import Ranks, local_ranks
from benchmarks.frame.results import write_json
from benchmarks.frame.table import Column, Row, table
from benchmarks.frame.trainer import Losses, Rounds, Sent, new_trainer, parameter_count
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy
from lightning_adpsgd.rounds.record import ring_bytes

REFERENCE = "plain"
OPTIONS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "stagger": {"stagger": True},
    "overlap-1": {"overlap": 1},
    "overlap-3": {"overlap": 3},
    "stagger-overlap": {"stagger": True, "overlap": 1},
    "bf16": {"reduce_dtype": "bf16"},
    "fp16": {"reduce_dtype": "fp16"},
    "stagger-overlap-bf16": {"stagger": True, "overlap": 2, "reduce_dtype": "bf16"},
}
"""What is passed to `ADPSGDStrategy`, by name."""
CONTENDERS = ("ddp", *OPTIONS)
ARCHITECTURES = ("resnet8", "resnet20", "vgg_small", "googlenet_small")
EVALUATED_AT_ONCE = 500  # images

NUMBERS = ("steps", "rounds", "sent_bytes", "last_epoch_loss", "final_loss", "accuracy")


def _with_spread(title: str, name: str, form: str, scale: float = 1.0) -> Column:
    def text(row: Row) -> str:
        spread = row[f"{name}_sd"]
        return f"{scale * row[name]:{form}}" + ("" if spread is None else f" ± {scale * spread:{form}}")

    return Column(title, text)


COLUMNS = (
    Column("contender", "contender"),
    Column("seeds", lambda row: len(row["seeds"])),
    Column("steps", "steps", ".0f"),
    Column("rounds", "rounds", ".0f"),
    Column("sent [MB]", "sent_bytes", ".1f", 1e-6),
    _with_spread("last epoch's loss", "last_epoch_loss", ".3f"),
    _with_spread("final loss", "final_loss", ".3f"),
    _with_spread("accuracy [%]", "accuracy", ".2f", 100),
    Column("vs plain", "accuracy_vs_plain", "+.2f", 100),
)


def new_strategy(contender: str, settings: Mapping[str, Any]) -> Strategy:
    """A contender's strategy."""
    if contender == "ddp":
        return DDPStrategy()
    period = settings["period"] or AdaptivePeriod(initial=settings["initial"])
    return ADPSGDStrategy(period=period, **OPTIONS[contender])


def train(contender: str, seed: int, settings: Mapping[str, Any], data_folder: str) -> dict[str, Any]:
    """Train on the calling rank; returns steps, rounds, bytes, the losses of the last epoch, and :func:`judge`."""
    from examples.image_classification.data import ImageData  # these need torchvision
    from examples.image_classification.model import ImageClassifier

    L.seed_everything(seed, verbose=False)
    data = ImageData(
        root=data_folder,
        verify=not settings["repacked"],
        download=False,
        train_images=settings["images"],
        batch_size=settings["batch_size"],
        num_workers=0,
    )
    model = ImageClassifier(settings["architecture"], learning_rate=settings["learning_rate"])
    losses, rounds = Losses(), Rounds()
    trainer = new_trainer(
        new_strategy(contender, settings),
        losses,
        rounds,
        devices=settings["workers"],
        max_epochs=settings["epochs"],
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    steps_of_an_epoch = len(losses.of_steps) // settings["epochs"]
    sent = ddp_sent(model, trainer) if contender == "ddp" else rounds.sent()
    return {
        "steps": trainer.global_step,
        "rounds": sent.rounds,
        "sent_bytes": sent.bytes,
        "last_losses": [float(loss) for loss in losses.of_steps[-steps_of_an_epoch:]],
        **judge(model.network, data, trainer),
    }


def ddp_sent(model: nn.Module, trainer: L.Trainer) -> Sent:
    """What a ring all-reduce of all gradients has sent since the run began."""
    steps = trainer.global_step
    return Sent(steps, steps * ring_bytes(4 * parameter_count(model), trainer.world_size))


def judge(network: nn.Module, data: Any, trainer: L.Trainer) -> dict[str, Any]:
    """The loss on this rank's share of all training images, and the correct answers on its share of the test images."""
    share = slice(trainer.global_rank, None, trainer.world_size)
    data.train_set.augment = False
    return {
        "train_loss_sum": evaluate(network, data.train_set, share)[0],
        "train_images": len(data.train_set),
        "right": evaluate(network, data.val_set, share)[1],
        "test_images": len(data.val_set),
    }


def judgement(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The answers of all ranks by :func:`judge`, combined."""
    return {
        "final_loss": sum(answer["train_loss_sum"] for answer in answers) / answers[0]["train_images"],
        "accuracy": sum(answer["right"] for answer in answers) / answers[0]["test_images"],
    }


@torch.no_grad()
def evaluate(network: nn.Module, images: Any, share: slice) -> tuple[float, int]:
    """The sum of the losses and the number of correct answers on a share of the images."""
    network.eval()
    device = next(network.parameters()).device
    loss, right = 0.0, 0
    for indices in torch.arange(len(images))[share].split(EVALUATED_AT_ONCE):
        inputs, labels = images.__getitems__(indices.tolist())
        logits, labels = network(inputs.to(device)), labels.to(device)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return loss, right


def carry_out(order: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
    """Carry out an order on the calling rank."""
    connect()
    return train(order["contender"], order["seed"], order["settings"], order["data"])


def combine(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Combine the answers of all ranks about one run."""
    first = answers[0]
    last = [loss for answer in answers for loss in answer["last_losses"]]
    return {
        "steps": first["steps"],
        "rounds": first["rounds"],
        "sent_bytes": first["sent_bytes"],
        "last_epoch_loss": sum(last) / len(last),
        **judgement(answers),
    }


def as_rows(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One row of numbers per contender, from its runs by seed."""
    rows = []
    for contender, by_seed in runs.items():
        row: dict[str, Any] = {"contender": contender, "seeds": [*by_seed], "runs": [*by_seed.values()]}
        for name in NUMBERS:
            values = [run[name] for run in by_seed.values()]
            row[name] = statistics.fmean(values)
            row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        plain = runs.get(REFERENCE, {})
        paired = [run["accuracy"] - plain[seed]["accuracy"] for seed, run in by_seed.items() if seed in plain]
        row["accuracy_vs_plain"] = statistics.fmean(paired) if paired and contender != REFERENCE else None
        rows.append(row)
    return rows


def measure(
    started: Ranks,
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    data: Path,
    folder: Path | None,
) -> dict[str, dict[int, dict[str, float]]]:
    """Run every contender with every seed, unless the run is in the folder."""
    runs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    missing = []
    for seed in seeds:
        for name in names:
            kept = None if folder is None else _kept(_file(folder, name, seed), settings)
            if kept is None:
                missing.append((name, seed))
            else:
                runs[name][seed] = kept
    began = time.monotonic()
    for place, (name, seed) in enumerate(missing):
        order = {"contender": name, "seed": seed, "settings": dict(settings), "data": str(data)}
        run = runs[name][seed] = combine(started.run(order))
        if folder is not None:
            _file(folder, name, seed).write_text(json.dumps({"settings": dict(settings), "run": run}, indent=1) + "\n")
        left = (time.monotonic() - began) / (place + 1) * (len(missing) - place - 1)
        say(
            f"{place + 1} of {len(missing)}: {name}, seed {seed}: {run['rounds']:.0f} rounds, loss"
            f" {run['last_epoch_loss']:.4f}, accuracy {100 * run['accuracy']:.2f} %;"
            f" about {math.ceil(left / 60)} min left"
        )
    return {name: dict(sorted(by_seed.items())) for name, by_seed in runs.items()}


def _file(folder: Path, contender: str, seed: int) -> Path:
    return folder / f"{contender}-seed{seed}.json"


def _kept(file: Path, settings: Mapping[str, Any]) -> dict[str, float] | None:
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return content["run"] if content["settings"] == dict(settings) else None


def _measure_and_print(options: argparse.Namespace) -> int:
    given = settings(options, "data", "contenders", "seeds", "runs")  # what a run depends on, with contender and seed
    with local_ranks(options.workers, "benchmarks.accuracy") as started:
        runs = measure(started, options.contenders, range(options.seeds), given, options.data, options.runs)
    rows = as_rows(runs)
    period = f"constant period {options.period}" if options.period else f"adaptive period, {options.initial} at first"
    print(
        f"{options.architecture}, {options.workers} workers with batches of {options.batch_size}, {options.epochs}"
        f" epochs of {options.images or 'all'} images, {period}\n"
    )
    print(table(rows, COLUMNS))
    if options.json is not None:
        write_json(options.json, "accuracy", {**given, "seeds": options.seeds}, rows)
    return 0


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = new_parser(
        "benchmarks.accuracy", "Compare the accuracy at the end of training with options for how rounds are sent."
    )
    add, names = parser.add_argument, several(one_of(CONTENDERS))
    of = f"of {', '.join(CONTENDERS)} (all but ddp)"
    add("--data", type=Path, metavar="DIR", help="folder with CIFAR-10 (required)")
    add("--repacked", action="store_true", help="its files hold the same images, repacked")
    add("--images", type=number(1), metavar="N", help="take only the first N of the training images")
    add("--contenders", type=names, default=[*OPTIONS], metavar="A,B", help=of)
    add("--seeds", type=number(1), default=3, metavar="N", help="runs of each contender (3)")
    add("--workers", type=number(2), default=4, metavar="N", help="processes (4)")
    add("--architecture", choices=ARCHITECTURES, default="resnet8", help="what is trained (resnet8)")
    add("--batch-size", type=number(1), default=32, metavar="N", help="images per worker and step (32)")
    add("--epochs", type=number(1), default=12, metavar="N", help="of a run (12)")
    add("--learning-rate", type=number(0, kind=float), default=0.1, metavar="L", help="peak of the schedule (0.1)")
    add("--initial", type=number(1), default=4, metavar="P", help="the adaptive period's first value (4)")
    add("--period", type=number(1), metavar="P", help="a constant period, instead of an adaptive one")
    add("--runs", type=Path, metavar="DIR", help="keep finished runs there, and do not repeat them")
    options = parser.parse_args(arguments)
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data {options.data}: expected the folder that holds cifar-10-batches-py.")
    longest = max((OPTIONS[name].get("overlap", 0) for name in options.contenders if name in OPTIONS), default=0)
    if options.period is not None and options.period <= longest:
        parser.error(f"--period {options.period}: expected more steps than overlap={longest}, which is compared too.")
    if options.runs is not None:
        options.runs.mkdir(parents=True, exist_ok=True)
    return options


main = new_main(parse, _measure_and_print, "A run could not be finished.")

if __name__ == "__main__":
    sys.exit(main())
