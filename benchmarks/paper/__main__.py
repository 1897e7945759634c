"""The paper's comparison (arXiv:2007.06134) on CIFAR-10, from training to a page with tables and figures.

    .venv/bin/python -m benchmarks.paper [--scale short|cpu|gpu] [--data DIR] [--runs DIR] [--page FILE]
        [--studies A,B] [--tasks A,B] [--contenders A,B] [--seeds N] [--minutes N]

`plan.py` lists what is trained at each scale. The options of the second line select some of it, for example
`--studies bytes --contenders full,adpsgd-int4 --seeds 5`. Every run is a `Trainer.fit` on as many processes as there
are workers, all on this machine. A finished run is kept in a file below `--runs` and is not repeated: after an
interruption the same command continues, and with `--minutes` several short visits to a machine add up. When all of them
are finished, or the time is up, the page is written, from all runs of the studies that exist; `--page-only` writes it
without training.

Runs of one seed start from the same weights and see the same batches. The averaged model is evaluated every other epoch
on a copy, so that no round is added; the communication for this is not counted.

CIFAR-10, and tiny shakespeare for the study of language, are downloaded to `--data` unless they are there. Repacked
files with the same images are accepted, with a message, and each run's file says so.

At the scale ``gpu`` all ranks share one GPU. For ``--backend nccl`` each rank is told that it is on its own host, as
NCCL refuses two ranks of one host on one GPU.

The exit code is 0, 2 if something failed, and 130 after Ctrl-C.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from benchmarks.frame.command import FAILED, Arguments, new_main, number, one_of, output_file, say, several
from benchmarks.frame.errors import NotMeasuredError
from benchmarks.frame.ranks import ranks, this_machine
from benchmarks.paper.links import read_links
from benchmarks.paper.page import Page
from benchmarks.paper.plan import ADPSGD, MATCHED, SCALES, Run, Study, runs_of
from benchmarks.paper.results import Outcomes
from benchmarks.paper.runs import Store, do
from benchmarks.paper.text import find_text
from examples.image_classification.data import DATASETS

LINK_RESULTS = Path("benchmarks/results")


def _train_and_write(options: argparse.Namespace) -> int:
    if not options.page_only:
        train(options)
    page = new_page(options)
    if page is None:
        say(f"There is nothing to write: no such run is finished in {_folder(options)}.")
        return FAILED
    options.page.write_text(page.text())
    page.draw()
    print(f"{page.overview()}\n\nWritten: {options.page}, with figures in {_images(options)}")
    return 0


class DataMissingError(NotMeasuredError):
    """There are no images to train on."""


def train(options: argparse.Namespace) -> None:
    """Do the missing runs.

    Raises:
        DataMissingError: if there are no images.
        TextMissingError: if there is no text.
        RankFailedError: if a run fails.
    """
    runs, store = selected(options), Store(_folder(options))
    missing = [run for run in runs if store.result(run) is None]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are done, below {store.folder}.")
    if not missing:
        return
    order = {"data": str(options.data), "device": options.device, "backend": options.backend}
    of_text = {run.task.data == "text" for run in missing}
    if True in of_text:
        find_text(options.data)
    order["verify"] = find_images(options.data) if False in of_text else True
    workers = missing[0].task.workers
    say(f"{len(missing)} to do with {workers} processes each; the first one shows how long a run takes.")
    # One host per rank: NCCL refuses two ranks of one host on one GPU.
    with this_machine() as (machine,), ranks([machine] * workers, 1, "benchmarks.paper.training") as started:
        for _ in do(missing, started, store, order, lambda run: _command(run, options), say, 60 * options.minutes):
            pass


def selected(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, and those that they depend on."""
    runs = runs_of(_studies(options), options.seeds)
    tasks, contenders = options.tasks or [], options.contenders or []
    if MATCHED.name in contenders:
        contenders = [*contenders, ADPSGD.name]
    return [
        run
        for run in runs
        if (not tasks or run.task.name in tasks) and (not contenders or run.contender.name in contenders)
    ]


def find_images(folder: Path) -> bool:
    """Download CIFAR-10 unless it is there.

    Returns:
        Whether the files are those that were published.

    Raises:
        DataMissingError: if it cannot be downloaded.
    """
    facts = DATASETS["cifar10"]
    for published, kind in ((True, facts.original), (False, facts.repacked)):
        try:
            kind(str(folder), train=True, download=False)
        except RuntimeError:
            continue
        if not published:
            say(f"The files in {folder} are not the published ones; they are used with this note in each run's file.")
        return published
    say(f"CIFAR-10 is not in {folder}: downloading it.")
    try:
        facts.original(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DataMissingError(
            f"CIFAR-10 is not in {folder} and could not be downloaded ({error}). Put the folder cifar-10-batches-py"
            " there, or name the folder that holds it with --data (make paper DATA=...)."
        ) from error
    return True


def _command(run: Run, options: argparse.Namespace) -> str:
    study = next(study for study in _studies(options) if run in study.runs(run.seed))
    return f"{_base_command(options)} --studies {study.name} --seeds {run.seed + 1}"


def _base_command(options: argparse.Namespace) -> str:
    return f"python -m benchmarks.paper --scale {options.scale} --data {options.data} --runs {options.runs}"


def new_page(options: argparse.Namespace) -> Page | None:
    """The page about the runs that are done; None if there are none."""
    studies = _studies(options)
    runs = runs_of(studies, options.seeds)
    outcomes = Outcomes(Store(_folder(options)), runs)
    if len(outcomes.missing) == len(runs):
        return None
    links = {} if options.scale == "short" else read_links(LINK_RESULTS)
    command = f"{_base_command(options)} --page {options.page}"
    return Page(studies, outcomes, links, str(_folder(options)), command, _images(options))


def _studies(options: argparse.Namespace) -> list[Study]:
    return [study for study in SCALES[options.scale] if study.name in (options.studies or [study.name])]


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.runs / options.scale
    return folder


def _images(options: argparse.Namespace) -> Path:
    images: Path = options.page.parent / "images"
    return images


def parse(arguments: Arguments) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description="Reproduce the paper's comparison on CIFAR-10."
    )
    add = parser.add_argument
    add("--scale", choices=SCALES, default="cpu", help="how large: short, cpu (the default) or gpu")
    every = [study for studies in SCALES.values() for study in studies]
    studies = {study.name: None for study in every}
    tasks = {task.name: None for study in every for task in study.tasks}
    contenders = {each.name: None for study in every for task in study.tasks for each in study.of(task)}
    add("--studies", type=several(one_of(studies)), metavar="A,B", help=f"of {', '.join(studies)} (all)")
    add("--tasks", type=several(one_of(tasks)), metavar="A,B", help="train only these (all of the studies)")
    add("--contenders", type=several(one_of(contenders)), metavar="A,B", help="train only these (all of the studies)")
    add("--seeds", type=number(1), metavar="N", help="at most N runs of each kind (what each study asks for)")
    add("--minutes", type=number(1), default=math.inf, metavar="N", help="begin no run that ends later (no limit)")
    add("--data", type=Path, default=Path("data"), metavar="DIR", help="folder with CIFAR-10 and the text (data)")
    add("--runs", type=Path, default=Path("logs/paper"), metavar="DIR", help="where runs are kept (logs/paper)")
    add("--page", type=output_file, metavar="FILE", help="what to write (results.md beside the runs)")
    add("--page-only", action="store_true", help="train nothing, write the page from the runs that exist")
    add("--device", choices=("cpu", "cuda"), help="cuda: all ranks share one GPU (cuda for --scale gpu, or else cpu)")
    add("--backend", choices=("gloo", "nccl"), default="gloo", help="how ranks communicate (gloo)")
    options = parser.parse_args(arguments)
    if not options.page_only and not selected(options):
        parser.error(
            f"--scale {options.scale} has no run with all of --studies, --tasks and --contenders as given; leave one of"
            " them out, or see benchmarks/paper/plan.py."
        )
    options.page = options.page or _folder(options) / "results.md"
    options.device = options.device or ("cuda" if options.scale == "gpu" else "cpu")
    if options.device == "cuda" and not options.page_only and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; expected one, or --scale cpu.")
    if options.backend == "nccl" and options.device == "cpu":
        parser.error("--backend nccl: expected --device cuda with it; on a CPU ranks use gloo.")
    return options


main = new_main(
    parse,
    _train_and_write,
    failed="A run could not be finished; those before it are kept.",
    interrupted="Runs that are done are kept; the same command continues.",
)

if __name__ == "__main__":
    sys.exit(main())
