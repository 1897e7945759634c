"""Writes the page: tables, figures, and what the paper's claims come to, all of it from the runs' files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.frame.table import Column, table
from benchmarks.frame.trainer import parameter_count
from benchmarks.paper import figures
from benchmarks.paper.claims import claims
from benchmarks.paper.links import PAPER_SPEEDUPS, Link, communication_share, middle_share
from benchmarks.paper.networks import new_network
from benchmarks.paper.plan import ADPSGD, CPSGD_8, FULL, MATCHED, QSGD, RARE, Contender, Study, Task
from benchmarks.paper.results import (
    POINTS,
    Outcomes,
    accuracy,
    final_loss,
    mean_period,
    quarters_over_seeds,
    rounds,
    sent_bytes,
)

ALL_IMAGES = 50_000
MEGABYTE = 1e6

LOSS, ACCURACY, VARIANCE, HABITS = (f"results-{name}.png" for name in ("loss", "accuracy", "variance", "habits"))
OBSERVED = (CPSGD_8, ADPSGD)
"""Of which figures show what the rule sees."""

Cells = Sequence[str]


class Page:
    """What there is to read.

    Args:
        studies: what was asked.
        outcomes: what came of it.
        links: measurements on links, by the paper's network.
        runs: the folder of the runs, as readers are to be told.
        command: what makes them, and the page.
        images: folder for the figures, beside the page.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        outcomes: Outcomes,
        links: Mapping[str, Link],
        runs: str,
        command: str,
        images: Path,
    ) -> None:
        self._outcomes = outcomes
        self._links = links
        self._runs = runs
        self._command = command
        self._images = images
        self._studies: dict[str, Study] = {}
        for study in studies:
            tasks = [task for task in study.tasks if outcomes.known(task, study.contenders)]
            if tasks:
                self._studies[study.name] = study._replace(tasks=tasks)
        paper = self._studies.get("paper")
        self.claims = claims(outcomes, paper.tasks if paper else [], links)

    def text(self) -> str:
        """All of it, in Markdown."""
        parts = [self._head(), self._claims(), self._comparison(), self._time(), self._habits(), self._state()]
        return "\n\n".join(part for part in [*parts, self._rule(), self._sources()] if part) + "\n"

    def draw(self) -> None:
        """The figures that the text shows."""
        paper, habits = self._studies.get("paper"), self._habitual_tasks()
        if paper is not None:
            figures.loss(self._outcomes, paper.tasks, paper.contenders, self._images / LOSS)
            figures.accuracy(self._outcomes, paper.tasks, paper.contenders, self._images / ACCURACY)
            figures.variance(self._outcomes, paper.tasks, OBSERVED, self._images / VARIANCE)
        if habits:
            figures.variance(self._outcomes, habits, OBSERVED, self._images / HABITS)

    def overview(self) -> str:
        """The tables of the comparison and the verdicts, for a terminal."""
        paper = self._studies.get("paper")
        parts = []
        for task in paper.tasks if paper else []:
            columns, rows = self._cells(task, paper.contenders, with_speedups=True)
            cells = [dict(zip(columns, row, strict=True)) for row in rows]
            parts.append(f"{task.title}\n\n{table(cells, [Column(title, title) for title in columns])}")
        return "\n\n".join([*parts, "\n".join(f"{claim.text}: {claim.verdict}." for claim in self.claims)])

    # Sections

    def _head(self) -> str:
        tasks = {task.name: task for study in self._studies.values() for task in study.tasks}
        columns = ("task", "parameters", "workers × batch", "images", "epochs", "optimizer", "schedule")
        missing = len(self._outcomes.missing)
        return (
            "# Results\n\n"
            "The paper's comparison (P. Jiang and G. Agrawal, [arXiv:2007.06134](https://arxiv.org/abs/2007.06134)) on"
            " CIFAR-10, and the rule under today's habits. A command writes this page from the files of the runs: every"
            " number on it is in one of them, or computed from some (see [below](#where-the-numbers-come-from)).\n\n"
            f"{_table(columns, map(_described, tasks.values()))}\n\n"
            "Runs of one seed start from the same weights and see the same batches, whoever trains. *Final loss* is"
            " the cross-entropy of the averaged model on all its training images, *accuracy* that of the averaged model"
            " on the 10,000 test images, *sent* is by each worker. Spreads are standard deviations over the seeds,"
            " differences are taken within a seed. Nothing is validated in between, so every round but the last is one"
            " that the period asked for."
            + (f"\n\n**{missing} of the runs that belong here are not done yet.**" if missing else "")
        )

    def _claims(self) -> str:
        numbered = list(enumerate(self.claims, start=1))
        rows = [(f"{number}. {claim.text}", f"**{claim.verdict}**") for number, claim in numbered]
        details = [
            "\n".join([f"### Claim {number}\n", *(f"- {sentence}" for sentence in claim.sentences)])
            for number, claim in numbered
            if claim.sentences
        ]
        return "\n\n".join(
            [
                "## The paper's claims",
                _table(("claim", "here"), rows),
                "*Reproduced* means: in every comparison, with every seed. *Not reproduced*: in no comparison is the"
                " mean over the seeds as claimed. *In part*: between the two.",
                *details,
            ]
        )

    def _comparison(self) -> str:
        study = self._studies.get("paper")
        if study is None:
            return ""
        tables = [
            f"### {task.title}\n\n{self._contenders(task, study.contenders, with_speedups=True)}"
            for task in study.tasks
        ]
        return "\n\n".join(
            [
                "## The comparison",
                "Full communication is Lightning's DDP; CPSGD averages parameters at a constant period, or at as many"
                " evenly spread rounds as ADPSGD had with the same seed; QSGD"
                " ([arXiv:1610.02132](https://arxiv.org/abs/1610.02132)) averages gradients at every step, in 8 bits"
                " with a norm per 512 elements. All are strategies with a YAML file in `benchmarks/baselines`. Bytes"
                " are those that each counts itself; `python -m benchmarks.interface_bytes` compares the counts with"
                " those of network interfaces.",
                *tables,
                self._image(LOSS, "Training loss against epochs and against bytes sent"),
                "Training loss is that of the workers' own replicas on augmented batches, the mean of an epoch. Bands"
                " go from the least to the greatest seed.",
                self._image(ACCURACY, "Test accuracy against bytes sent"),
                self._image(VARIANCE, "Variance, its ratio to the learning rate, and the period"),
                "S_k, S_k / γ_k and the period of one seed: with a constant period the ratio falls with the learning"
                " rate, and the adaptive one answers with longer periods. Spikes are rounds that straddle a decay: the"
                " drift is that of the old rate, and γ_k the new one.",
            ]
        )

    def _time(self) -> str:
        if not self._links:
            return ""
        rows = [
            (
                f"stands for {name}",
                f"{middle_share(PAPER_SPEEDUPS[name]):.2f}",
                f"{link.lost:.2f}",
                "{} to {}".format(*PAPER_SPEEDUPS[name]),
                *(_two_digits(link.speedup(contender)) for contender in (ADPSGD, CPSGD_8, QSGD)),
            )
            for name, link in self._links.items()
        ]
        columns = (
            "link",
            "share that full communication is to lose",
            "share it lost",
            "ADPSGD in the paper",
            ADPSGD.title,
            CPSGD_8.title,
            QSGD.title,
        )
        shares = " and ".join(
            f"{communication_share(low):.2f} to {communication_share(high):.2f} at {name}"
            for name, (low, high) in PAPER_SPEEDUPS.items()
        )
        period = next(iter(self._links.values())).mean_period
        return "\n\n".join(
            [
                "## Time",
                "The paper gives speed-ups over full communication, not what communication took; but one follows from"
                " the other. If a step computes for t and full communication adds c, a step with a round every p steps"
                " takes t + c/p. So a speed-up of s means that full communication spends the share"
                f" **c / (t + c) = (1 − 1/s) / (1 − 1/p)** of its time on communication: with p = 8, {shares}. Here the"
                " rates of two links are set so that full communication loses the share that belongs to the geometric"
                " mean of each pair of speed-ups.",
                _table(columns, rows),
                f"Speed-ups over full communication, medians of turns. Instead of ADPSGD's own rounds, evenly spread"
                f" ones are timed, a mean of {period:g} steps apart, which is ADPSGD's mean period in the runs above: a"
                " blocking round takes the same time wherever it is. As the share was set, what is measured is that"
                " the speed-up follows from it, and that nothing else eats it up. QSGD's includes what encoding takes"
                f" on the ranks' own cores. {RARE.title} was not timed; with fewer rounds than {CPSGD_8.title} it takes"
                " less time. The model sleeps where an accelerator would compute (`--pause-ms`).",
            ]
        )

    def _habits(self) -> str:
        tasks = self._habitual_tasks()
        if not tasks:
            return ""
        contenders = (FULL, CPSGD_8, MATCHED, ADPSGD)
        with_steps = [*self._studies["paper"].tasks, *tasks] if "paper" in self._studies else tasks
        return "\n\n".join(
            [
                "## The rule under today's habits",
                *(f"### {task.title}\n\n{self._contenders(task, contenders)}" for task in tasks),
                self._image(HABITS, "Variance, ratio and period under cosine decay and AdamW"),
                "### Does S_k / γ_k still carry the information?",
                "Its median in each quarter of the run, relative to the one in the second quarter, where the rate is at"
                " or near its peak (means over the seeds). Where it falls with a constant period, that period is too"
                " short in the end, or too long at first; a rule that does its work keeps it level.",
                self._quarters(with_steps),
                "At equally many rounds:",
                "\n".join(
                    f"- {task.title}: {ADPSGD.title} against {MATCHED.title}:"
                    f" {self._outcomes.against(task, ADPSGD, MATCHED)}."
                    for task in with_steps
                    if self._outcomes.differences(task, ADPSGD, MATCHED, final_loss)
                ),
            ]
        )

    def _quarters(self, tasks: Iterable[Task]) -> str:
        rows = []
        for task in tasks:
            for contender in self._outcomes.known(task, OBSERVED):
                results = self._outcomes.results(task, contender)
                ratios, periods = (quarters_over_seeds(results, name) for name in ("ratio", "period"))
                relative = [None if None in (value, ratios[1]) else value / ratios[1] for value in ratios]
                rows.append([task.title, contender.title, *map(_two_digits, relative), *map(_one_digit, periods)])
        quarters = ("1st quarter", "2nd", "3rd", "4th")
        return _table(("task", "contender", *quarters, *(f"p, {quarter}" for quarter in quarters)), rows)

    def _state(self) -> str:
        parts = []
        for study in (self._studies.get("momentum"), self._studies.get("moments")):
            if study is None or len(self._outcomes.known(study.tasks[0], study.contenders)) < 2:
                continue
            (task,) = study.tasks
            local, *others = study.contenders
            parts.append(f"### {study.asks}: {task.title}\n\n{self._contenders(task, study.contenders)}")
            parts.append(
                "\n".join(
                    f"- {other.title}, against {local.title}: {self._outcomes.against(task, other, local)}."
                    for other in others
                    if self._outcomes.differences(task, other, local, final_loss)
                )
            )
        head = (
            "## What averaging the optimizer's state does\n\n"
            "A round that averages SGD's momentum sends twice as much, one that averages Adam's moments three times:"
            " at equal bytes, rounds are half or a third as many."
        )
        return "\n\n".join([head, *parts]) if parts else ""

    def _rule(self) -> str:
        study = self._studies.get("rule")
        if study is None or len(self._outcomes.known(study.tasks[0], study.contenders)) < 3:
            return ""
        (task,) = study.tasks
        return (
            f"## p_init and sampling\n\n{task.title}. While the target is sampled, for the share K_s / K of the run,"
            f" the period stays p_init.\n\n{self._contenders(task, (FULL, CPSGD_8, *study.contenders))}"
        )

    def _sources(self) -> str:
        links = [f"- `{link.file}`: {link.text}; `{link.command}`" for link in self._links.values()]
        return "\n".join(
            [
                "## Where the numbers come from\n",
                f"- `{self._runs}/<task>/<contender>-seed<n>.json`: a file per run, with its settings, versions,"
                " results, the losses of all epochs and all averaging rounds. Each names the command that does it.",
                f"- All runs, and this page: `{self._command}`",
                *links,
                "\nThe command goes on where it was interrupted, does what is missing, and writes the page anew."
                " `make paper` is a short version: one network, one seed, fewer images. At full size, with 16 workers"
                " that share one GPU: `python -m benchmarks.paper --scale gpu`; it writes a page of its own.",
            ]
        )

    # Details

    def _habitual_tasks(self) -> list[Task]:
        return [task for name in ("cosine", "adamw") if name in self._studies for task in self._studies[name].tasks]

    def _contenders(self, task: Task, contenders: Iterable[Contender], with_speedups: bool = False) -> str:
        return _table(*self._cells(task, contenders, with_speedups))

    def _cells(self, task: Task, contenders: Iterable[Contender], with_speedups: bool) -> tuple[Cells, list[Cells]]:
        """A table with a row per contender: its columns, and its rows."""
        links = self._links if with_speedups else {}
        columns = ["contender", "seeds", "rounds", "mean period", "sent [MB]", "of full", "final loss", "accuracy [%]"]
        rows = []
        for contender in self._outcomes.known(task, contenders):
            of = {value: self._outcomes.of(task, contender, value) for value in (rounds, sent_bytes, mean_period)}
            full = self._outcomes.known(task, [FULL]) and self._outcomes.of(task, FULL, sent_bytes).mean
            rows.append(
                [
                    contender.title,
                    str(len(self._outcomes.results(task, contender))),
                    of[rounds].text(0),
                    _two_digits(of[mean_period].mean),
                    of[sent_bytes].text(1, 1 / MEGABYTE),
                    f"{of[sent_bytes].mean / full:.3f}" if full else "",
                    self._outcomes.of(task, contender, final_loss).text(4),
                    self._outcomes.of(task, contender, accuracy).text(2, POINTS),
                    *(_two_digits(link.speedup(contender), missing="") for link in links.values()),
                ]
            )
        return [*columns, *(f"speed-up, {name}" for name in links)], rows

    def _image(self, file: str, shows: str) -> str:
        return f"![{shows}]({self._images.name}/{file})"


def _described(task: Task) -> Cells:
    decays = ", ".join(f"{share:g}" for share in task.decay_at)
    decay = f"a tenth from each of {decays} of the run on" if task.schedule == "steps" else "cosine to 0"
    optimizer = {"sgd": "SGD, momentum 0.9", "adamw": "AdamW"}[task.optimizer]
    return (
        task.title,
        f"{parameter_count(new_network(task.network)):,}",
        f"{task.workers} × {task.batch_size}",
        f"{task.images or ALL_IMAGES:,}",
        str(task.epochs),
        f"{optimizer}, peak rate {task.learning_rate:g}, weight decay {task.weight_decay:g}",
        f"warm-up of {task.warmup_epochs:g} epoch, {decay}",
    )


def _two_digits(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.2f}"


def _one_digit(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _table(columns: Cells, rows: Iterable[Cells]) -> str:
    """A table in Markdown; columns of numbers stand to the right."""
    lines = [list(row) for row in rows]
    right = [all(line[place][:1] in "0123456789+-–" for line in lines if line[place]) for place in range(len(columns))]
    right[0] = False
    rule = ["---:" if each else "---" for each in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), rule, *lines])
