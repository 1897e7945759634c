"""Does it cost accuracy how rounds travel? The same training under several options and seeds, on CIFAR-10.

    .venv/bin/python -m benchmarks.accuracy --data DIR [--contenders plain,stagger-overlap] [--seeds 3] [--json FILE]

Every run trains the same small ResNet with the image example's schedule (SGD with momentum, a linear warm-up, two step
decays) on `--workers` CPU processes of one thread, with `AdaptivePeriod(initial=--initial)`, or with a constant period
if `--period` is given. Runs of one seed start from the same weights and see the same batches. Nothing is validated in
between, so every round is one that the period asked for, but for the last one. Needs torchvision.

What the table shows, as mean ± standard deviation over the seeds:

- rounds, sent: averages of the parameters, and bytes that each rank sent for them.
- last epoch's loss: training loss, each worker's on its own replica and its own augmented batches; the mean over the
  workers and the steps of the last epoch.
- final loss: cross-entropy of the averaged model on all training images, as they are.
- accuracy: of the averaged model on the 10,000 test images.
- vs plain: accuracy less that of `plain` with the same seed; the mean over the seeds.

With `--runs DIR` each run is written there when it ends, and one that is there with the same settings is not run again.

The exit code is 0, or 2 if a run could not be finished.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.contenders import RoundCounter
from benchmarks.machine import connect, free_port, this_machine
from benchmarks.ranks import Parent, RankFailedError, Ranks, ranks, serve
from benchmarks.report import number, one_of, several
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
EVALUATED_AT_ONCE = 500
"""Images."""

COLUMNS = (
    "contender",
    "seeds",
    "steps",
    "rounds",
    "sent [MB]",
    "last epoch's loss",
    "final loss",
    "accuracy [%]",
    "vs plain",
)


# On each rank


class Losses(Callback):
    """Keeps the training losses, as tensors that nobody waits for."""

    def __init__(self) -> None:
        self.of_steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep one."""
        self.of_steps.append(outputs["loss"].detach())


def new_strategy(contender: str, settings: Mapping[str, Any]) -> Strategy:
    """A contender's strategy."""
    if contender == "ddp":
        return DDPStrategy()
    period = settings["period"] or AdaptivePeriod(initial=settings["initial"])
    return ADPSGDStrategy(period=period, **OPTIONS[contender])


def train(contender: str, seed: int, settings: Mapping[str, Any], data_folder: str) -> dict[str, Any]:
    """Train on the calling rank.

    Returns:
        Steps, rounds and bytes; this rank's losses of the last epoch; and the averaged model's sum of losses on this
        rank's share of the training images, and number of right answers on its share of the test images.
    """
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
    losses, counter = Losses(), RoundCounter()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=settings["workers"],
        strategy=new_strategy(contender, settings),
        callbacks=[losses] if contender == "ddp" else [losses, counter],
        max_epochs=settings["epochs"],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    steps_of_an_epoch = len(losses.of_steps) // settings["epochs"]
    data.train_set.augment = False
    share = slice(trainer.global_rank, None, settings["workers"])
    train_losses, _ = evaluate(model.network, data.train_set, share)
    _, right = evaluate(model.network, data.val_set, share)
    return {
        "steps": trainer.global_step,
        "rounds": trainer.global_step if contender == "ddp" else counter.sent.rounds,
        "sent_bytes": ddp_bytes(model, settings["workers"]) * trainer.global_step
        if contender == "ddp"
        else counter.sent.bytes,
        "last_losses": [float(loss) for loss in losses.of_steps[-steps_of_an_epoch:]],
        "train_loss_sum": train_losses,
        "train_images": len(data.train_set),
        "right": right,
        "test_images": len(data.val_set),
    }


def ddp_bytes(model: nn.Module, workers: int) -> int:
    """What a ring all-reduce of all gradients sends."""
    return ring_bytes(sum(parameter.numel() * 4 for parameter in model.parameters()), workers)


@torch.no_grad()
def evaluate(network: nn.Module, images: Any, share: slice) -> tuple[float, int]:
    """The sum of the losses, and the number of right answers, on every so many-th image."""
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
    torch.set_num_threads(1)
    connect(order["master_port"])
    return train(order["contender"], order["seed"], order["settings"], order["data"])


# Arithmetic


def combine(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What all ranks say about one run, put together."""
    first = answers[0]
    last = [loss for answer in answers for loss in answer["last_losses"]]
    return {
        "steps": first["steps"],
        "rounds": first["rounds"],
        "sent_bytes": first["sent_bytes"],
        "last_epoch_loss": sum(last) / len(last),
        "final_loss": sum(answer["train_loss_sum"] for answer in answers) / first["train_images"],
        "accuracy": sum(answer["right"] for answer in answers) / first["test_images"],
    }


def as_rows(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One row of numbers per contender.

    Args:
        runs: of each contender, by seed.
    """
    rows = []
    for contender, by_seed in runs.items():
        row: dict[str, Any] = {"contender": contender, "seeds": [*by_seed], "runs": [*by_seed.values()]}
        for name in ("steps", "rounds", "sent_bytes", "last_epoch_loss", "final_loss", "accuracy"):
            values = [run[name] for run in by_seed.values()]
            row[name] = statistics.fmean(values)
            row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        plain = runs.get(REFERENCE, {})
        paired = [run["accuracy"] - plain[seed]["accuracy"] for seed, run in by_seed.items() if seed in plain]
        row["accuracy_vs_plain"] = statistics.fmean(paired) if paired and contender != REFERENCE else None
        rows.append(row)
    return rows


def readable(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of numbers as a row of the table."""
    difference = row["accuracy_vs_plain"]
    return {
        "contender": row["contender"],
        "seeds": str(len(row["seeds"])),
        "steps": f"{row['steps']:.0f}",
        "rounds": f"{row['rounds']:.0f}",
        "sent [MB]": f"{row['sent_bytes'] / 1e6:.1f}",
        "last epoch's loss": _with_spread(row, "last_epoch_loss", 1, 3),
        "final loss": _with_spread(row, "final_loss", 1, 3),
        "accuracy [%]": _with_spread(row, "accuracy", 100, 2),
        "vs plain": "" if difference is None else f"{100 * difference:+.2f}",
    }


def _with_spread(row: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    spread = row[f"{name}_sd"]
    text = f"{factor * row[name]:.{digits}f}"
    return text if spread is None else f"{text} ± {factor * spread:.{digits}f}"


# The measurement


def measure(
    started: Ranks,
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    data: Path,
    folder: Path | None,
) -> dict[str, dict[int, dict[str, float]]]:
    """Run every contender with every seed; what is in the folder is not run again."""
    runs: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    master_port = free_port()
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
        order = {
            "contender": name,
            "seed": seed,
            "settings": dict(settings),
            "data": str(data),
            "master_port": master_port,
        }
        run = runs[name][seed] = combine(started.run(order))
        if folder is not None:
            _file(folder, name, seed).write_text(json.dumps({"settings": dict(settings), "run": run}, indent=1) + "\n")
        left = (time.monotonic() - began) / (place + 1) * (len(missing) - place - 1)
        print(
            f"{place + 1} of {len(missing)}: {name}, seed {seed}: {run['rounds']:.0f} rounds, loss"
            f" {run['last_epoch_loss']:.4f}, accuracy {100 * run['accuracy']:.2f} %;"
            f" about {math.ceil(left / 60)} min left",
            file=sys.stderr,
            flush=True,
        )
    return {name: dict(sorted(by_seed.items())) for name, by_seed in runs.items()}


def _file(folder: Path, contender: str, seed: int) -> Path:
    return folder / f"{contender}-seed{seed}.json"


def _kept(file: Path, settings: Mapping[str, Any]) -> dict[str, float] | None:
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return content["run"] if content["settings"] == dict(settings) else None


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _parse(list(sys.argv[1:] if arguments is None else arguments))
    if options.rank_process:
        serve(carry_out)
        return 0
    settings = dict(_settings(options))
    try:
        with (
            this_machine() as cluster,
            ranks(cluster, options.workers, ["-m", "benchmarks.accuracy", "--rank-process"]) as started,
        ):
            runs = measure(started, options.contenders, range(options.seeds), settings, options.data, options.runs)
    except RankFailedError as error:
        print(f"A run could not be finished. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the ranks are ended.", file=sys.stderr)
        return 130
    rows = as_rows(runs)
    period = f"constant period {options.period}" if options.period else f"adaptive period, {options.initial} at first"
    print(
        f"{options.architecture}, {options.workers} workers with batches of {options.batch_size}, {options.epochs}"
        f" epochs of {options.images or 'all'} images, {period}\n"
    )
    print(report.table([readable(row) for row in rows], COLUMNS))
    if options.json is not None:
        report.write_json(options.json, "accuracy", {**settings, "seeds": options.seeds}, rows)
    return 0


def _settings(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What a run depends on, but for the contender and the seed."""
    for name, value in vars(options).items():
        if name not in ("data", "contenders", "seeds", "runs", "json", "rank_process"):
            yield name, str(value) if isinstance(value, Path) else value


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Compare the accuracy that training ends with, under options that change how rounds travel.",
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with CIFAR-10 (required)")
    add("--repacked", action="store_true", help="its files hold the same images but were packed anew")
    add("--images", type=number(1), metavar="N", help="take only the first so many of the training images")
    add(
        "--contenders",
        type=several(one_of(CONTENDERS)),
        default=[name for name in CONTENDERS if name != "ddp"],
        metavar="A,B",
        help=f"of {', '.join(CONTENDERS)} (all but ddp)",
    )
    add("--seeds", type=number(1), default=3, metavar="N", help="runs of each contender (3)")
    add("--workers", type=number(2), default=4, metavar="N", help="processes (4)")
    add("--architecture", choices=ARCHITECTURES, default="resnet8", help="what is trained (resnet8)")
    add("--batch-size", type=number(1), default=32, metavar="N", help="images per worker and step (32)")
    add("--epochs", type=number(1), default=12, metavar="N", help="of a run (12)")
    add("--learning-rate", type=number(0, kind=float), default=0.1, metavar="L", help="the schedule's peak (0.1)")
    add("--initial", type=number(1), default=4, metavar="P", help="the adaptive period's first value (4)")
    add("--period", type=number(1), metavar="P", help="a constant period, instead of an adaptive one")
    add("--runs", type=_folder, metavar="DIR", help="keep finished runs there, and take them up again")
    add("--json", type=report.output_file, metavar="FILE", help="write all numbers to this file")
    add("--rank-process", action="store_true", help=argparse.SUPPRESS)  # how ranks are started
    options = parser.parse_args(arguments)
    if options.rank_process:
        return options
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data {options.data}: expected the folder that holds cifar-10-batches-py.")
    longest = max((OPTIONS[name].get("overlap", 0) for name in options.contenders if name in OPTIONS), default=0)
    if options.period is not None and options.period <= longest:
        parser.error(f"--period {options.period}: expected more steps than overlap={longest}, which is compared too.")
    return options


def _folder(given: str) -> Path:
    path = Path(given)
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
