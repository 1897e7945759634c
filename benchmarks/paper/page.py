"""Writes the page from the runs' files: tables, figures and the paper's claims; its words are in `page.md`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from benchmarks.frame.table import Column, table
from benchmarks.frame.trainer import parameter_count
from benchmarks.paper import against_bytes, figures
from benchmarks.paper.against_bytes import COLUMNS, Part
from benchmarks.paper.claims import Claim, claims
from benchmarks.paper.links import PAPER_SPEEDUPS, Link, communication_share, middle_share
from benchmarks.paper.networks import new_network
from benchmarks.paper.plan import (
    ADPSGD,
    ADPSGD_INT4,
    AGAINST_BYTES,
    CPSGD_8,
    FULL,
    MATCHED,
    POWERSGD,
    QSGD,
    RARE,
    Contender,
    Study,
    Task,
    runs_of,
)
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
from benchmarks.paper.text import CONTEXT

ALL_IMAGES = 50_000
MEGABYTE = 1e6

LOSS, ACCURACY, VARIANCE, HABITS, BYTES, BRIEF = (
    f"results-{name}.png" for name in ("loss", "accuracy", "variance", "habits", "bytes", "brief")
)
IN_BRIEF = (FULL, QSGD, ADPSGD, POWERSGD[1], ADPSGD_INT4)  # shown by the figure of the README
OBSERVED = (CPSGD_8, ADPSGD)  # for which figures show what the rule sees

Cells = Sequence[str]
Values = Mapping[str, str]

_TEMPLATE = re.split(r"<!-- (\w+) -->\n", Path(__file__).with_name("page.md").read_text())
SECTIONS = {name: Template(text.strip()) for name, text in zip(_TEMPLATE[1::2], _TEMPLATE[2::2], strict=True)}
"""Of the page, in order."""


@dataclass
class Page:
    """The page."""

    studies: Sequence[Study]
    outcomes: Outcomes
    links: Mapping[str, Link]  # measurements on links, by the paper's network
    runs: str  # the folder of the runs, as the page names it
    command: str  # that makes the runs and the page
    images: Path  # folder for the figures, beside the page

    def __post_init__(self) -> None:
        # Studies of bytes have more seeds than others, whose results must not change with them.
        of_bytes = [study for study in self.studies if study.name in AGAINST_BYTES]
        self._parts = [Part(study, self.outcomes.of_runs(runs_of([study]))) for study in of_bytes]
        self.studies = [study for study in self.studies if study.name not in AGAINST_BYTES]
        beside = self.outcomes.of_runs(runs_of(of_bytes))
        self.outcomes = self.outcomes.of_runs(runs_of(self.studies))
        self._studies: dict[str, Study] = {}
        for study in self.studies:
            tasks = [task for task in study.tasks if self.outcomes.known(task, study.contenders)]
            if tasks:
                self._studies[study.name] = study._replace(tasks=tasks)
        paper = self._studies.get("paper")
        self.claims = claims(self.outcomes, paper.tasks if paper else [], self.links, beside)

    def text(self) -> str:
        """All of it, in Markdown: the sections of `page.md` that are not empty."""
        of = {
            "head": self._head(),
            "claims": self._claims(),
            "comparison": self._comparison(),
            "bytes": self._bytes(),
            "time": self._time(),
            "habits": self._habits(),
            "state": self._state(),
            "rule": self._rule(),
            "sources": self._sources(),
        }
        filled = (SECTIONS[name].substitute(values).rstrip() for name, values in of.items() if values)
        return re.sub(r"\n{3,}", "\n\n", "\n\n".join(filled)) + "\n"

    def draw(self) -> None:
        """The figures that the text shows."""
        paper, habits = self._studies.get("paper"), self._habitual_tasks()
        if paper is not None:
            figures.loss(self.outcomes, paper.tasks, paper.contenders, self.images / LOSS)
            figures.accuracy(self.outcomes, paper.tasks, paper.contenders, self.images / ACCURACY)
            figures.variance(self.outcomes, paper.tasks, OBSERVED, self.images / VARIANCE)
        points = self._bytes_points()
        if points:
            figures.against_bytes(points, self.images / BYTES)
            figures.in_brief(against_bytes.in_brief(self._parts, IN_BRIEF), self.images / BRIEF)
        if habits:
            figures.variance(self.outcomes, habits, OBSERVED, self.images / HABITS)

    def overview(self) -> str:
        """The tables of the comparison and the verdicts, for a terminal."""
        paper = self._studies.get("paper")
        parts = []
        for task in paper.tasks if paper else []:
            columns, rows = self._cells(task, paper.contenders, with_speedups=True)
            cells = [dict(zip(columns, row, strict=True)) for row in rows]
            parts.append(f"{task.title}\n\n{table(cells, [Column(title, title) for title in columns])}")
        goals = against_bytes.goals(self._parts) if self._parts else []
        return "\n\n".join([*parts, "\n".join(f"{claim.text}: {claim.verdict}." for claim in (*self.claims, *goals))])

    # The values of each section; none if it is left out

    def _head(self) -> Values:
        known = [task for study in self._studies.values() for task in study.tasks]
        known += [task for part in self._parts for task in part.tasks()]
        tasks = {task.name: task for task in known}
        columns = ("task", "parameters", "workers × batch", "images", "epochs", "optimizer", "schedule")
        missing = len(self.outcomes.missing)
        note = f"\n\n**{missing} of the runs that belong here are not done yet.**" if missing else ""
        return {"tasks": _table(columns, map(_described, tasks.values())), "missing": note}

    def _claims(self) -> Values:
        return {"table": _verdicts(self.claims, "claim"), "details": _details(self.claims, "Claim")}

    def _comparison(self) -> Values:
        study = self._studies.get("paper")
        if study is None:
            return {}
        tables = [
            f"### {task.title}\n\n{self._contenders(task, study.contenders, with_speedups=True)}"
            for task in study.tasks
        ]
        return {
            "tables": "\n\n".join(tables),
            "loss": self._image(LOSS, "Training loss against epochs and against bytes sent"),
            "accuracy": self._image(ACCURACY, "Test accuracy against bytes sent"),
            "variance": self._image(VARIANCE, "Variance, its ratio to the learning rate, and the period"),
        }

    def _bytes(self) -> Values:
        tables = [
            f"### {task.title}\n\n{_table(COLUMNS, against_bytes.rows(part, task))}"
            for part in self._parts
            for task in part.tasks()
        ]
        if not self._parts:
            return {}
        goals = against_bytes.goals(self._parts)
        return {
            "missing": against_bytes.missing(self._parts),
            "contender": ADPSGD_INT4.title,
            "goals": _verdicts(goals, "goal"),
            "details": _details(goals, "Goal"),
            "figure": self._image(BYTES, "Test accuracy against bytes, on a logarithmic axis")
            if self._bytes_points()
            else "",
            "tables": "\n\n".join(tables),
        }

    def _bytes_points(self) -> dict[Task, list[against_bytes.Point]]:
        """What the figure shows: tasks with a run of full communication."""
        points = {task: against_bytes.points(part, task) for part in self._parts for task in part.tasks()}
        return {task: known for task, known in points.items() if known}

    def _time(self) -> Values:
        if not self.links:
            return {}
        timed = (ADPSGD, CPSGD_8, QSGD)
        rows = [
            (
                f"stands for {name}",
                f"{middle_share(PAPER_SPEEDUPS[name]):.2f}",
                f"{link.lost:.2f}",
                "{} to {}".format(*PAPER_SPEEDUPS[name]),
                *(_two_digits(link.speedup(contender)) for contender in timed),
            )
            for name, link in self.links.items()
        ]
        shares = ("link", "share that full communication is to lose", "share it lost", "ADPSGD in the paper")
        return {
            "shares": " and ".join(
                f"{communication_share(low):.2f} to {communication_share(high):.2f} at {name}"
                for name, (low, high) in PAPER_SPEEDUPS.items()
            ),
            "table": _table((*shares, *(contender.title for contender in timed)), rows),
            "period": f"{next(iter(self.links.values())).mean_period:g}",
            "rare": RARE.title,
            "cpsgd": CPSGD_8.title,
        }

    def _habits(self) -> Values:
        tasks = self._habitual_tasks()
        if not tasks:
            return {}
        with_steps = [*self._studies["paper"].tasks, *tasks] if "paper" in self._studies else tasks
        tables = [f"### {task.title}\n\n{self._contenders(task, (FULL, CPSGD_8, MATCHED, ADPSGD))}" for task in tasks]
        return {
            "tables": "\n\n".join(tables),
            "figure": self._image(HABITS, "Variance, ratio and period under cosine decay and AdamW"),
            "quarters": self._quarters(with_steps),
            "differences": "\n".join(
                f"- {task.title}: {ADPSGD.title} against {MATCHED.title}:"
                f" {self.outcomes.against(task, ADPSGD, MATCHED)}."
                for task in with_steps
                if self.outcomes.differences(task, ADPSGD, MATCHED, final_loss)
            ),
        }

    def _quarters(self, tasks: Iterable[Task]) -> str:
        rows = []
        for task in tasks:
            for contender in self.outcomes.known(task, OBSERVED):
                results = self.outcomes.results(task, contender)
                ratios, periods = (quarters_over_seeds(results, name) for name in ("ratio", "period"))
                relative = [None if None in (value, ratios[1]) else value / ratios[1] for value in ratios]
                rows.append([task.title, contender.title, *map(_two_digits, relative), *map(_one_digit, periods)])
        quarters = ("1st quarter", "2nd", "3rd", "4th")
        return _table(("task", "contender", *quarters, *(f"p, {quarter}" for quarter in quarters)), rows)

    def _state(self) -> Values:
        parts = []
        for study in (self._studies.get("momentum"), self._studies.get("moments")):
            if study is None or len(self.outcomes.known(study.tasks[0], study.contenders)) < 2:
                continue
            (task,) = study.tasks
            local, *others = study.contenders
            differences = [
                f"- {other.title}, against {local.title}: {self.outcomes.against(task, other, local)}."
                for other in others
                if self.outcomes.differences(task, other, local, final_loss)
            ]
            parts += [
                f"### {study.asks}: {task.title}",
                self._contenders(task, study.contenders),
                "\n".join(differences),
            ]
        return {"studies": "\n\n".join(parts)} if parts else {}

    def _rule(self) -> Values:
        study = self._studies.get("rule")
        if study is None or len(self.outcomes.known(study.tasks[0], study.contenders)) < 3:
            return {}
        (task,) = study.tasks
        return {"task": task.title, "table": self._contenders(task, (FULL, CPSGD_8, *study.contenders))}

    def _sources(self) -> Values:
        links = [f"\n- `{link.file}`: {link.text}; `{link.command}`" for link in self.links.values()]
        return {"runs": self.runs, "command": self.command, "links": "".join(links)}

    # Details

    def _habitual_tasks(self) -> list[Task]:
        return [task for name in ("cosine", "adamw") if name in self._studies for task in self._studies[name].tasks]

    def _contenders(self, task: Task, contenders: Iterable[Contender], with_speedups: bool = False) -> str:
        return _table(*self._cells(task, contenders, with_speedups))

    def _cells(self, task: Task, contenders: Iterable[Contender], with_speedups: bool) -> tuple[Cells, list[Cells]]:
        """A table with a row per contender: its columns, and its rows."""
        links = self.links if with_speedups else {}
        columns = ["contender", "seeds", "rounds", "mean period", "sent [MB]", "of full", "final loss", "accuracy [%]"]
        rows = []
        for contender in self.outcomes.known(task, contenders):
            of = {value: self.outcomes.of(task, contender, value) for value in (rounds, sent_bytes, mean_period)}
            full = self.outcomes.known(task, [FULL]) and self.outcomes.of(task, FULL, sent_bytes).mean
            rows.append(
                [
                    contender.title,
                    str(len(self.outcomes.results(task, contender))),
                    of[rounds].text(0),
                    _two_digits(of[mean_period].mean),
                    of[sent_bytes].text(1, 1 / MEGABYTE),
                    f"{of[sent_bytes].mean / full:.3f}" if full else "",
                    self.outcomes.of(task, contender, final_loss).text(4),
                    self.outcomes.of(task, contender, accuracy).text(2, POINTS),
                    *(_two_digits(link.speedup(contender), missing="") for link in links.values()),
                ]
            )
        return [*columns, *(f"speed-up, {name}" for name in links)], rows

    def _image(self, file: str, shows: str) -> str:
        return f"![{shows}]({self.images.name}/{file})"


def _verdicts(claims: Sequence[Claim], kind: str) -> str:
    """A table of claims and verdicts."""
    return _table(
        (kind, "here"),
        [(f"{number}. {claim.text}", f"**{claim.verdict}**") for number, claim in enumerate(claims, start=1)],
    )


def _details(claims: Sequence[Claim], kind: str) -> str:
    """The figures behind the verdicts, a heading for each claim that has some."""
    return "\n\n".join(
        "\n".join([f"### {kind} {number}\n", *(f"- {sentence}" for sentence in claim.sentences)])
        for number, claim in enumerate(claims, start=1)
        if claim.sentences
    )


def _described(task: Task) -> Cells:
    decays = ", ".join(f"{share:g}" for share in task.decay_at)
    decay = f"a tenth from each of {decays} of the run on" if task.schedule == "steps" else "cosine to 0"
    optimizer = {"sgd": "SGD, momentum 0.9", "adamw": "AdamW"}[task.optimizer]
    return (
        task.title,
        f"{parameter_count(new_network(task.network)):,}",
        f"{task.workers} × {task.batch_size}",
        f"{task.images or ALL_IMAGES:,}" + (f" × {CONTEXT} characters" if task.data == "text" else ""),
        str(task.epochs),
        f"{optimizer}, peak rate {task.learning_rate:g}, weight decay {task.weight_decay:g}",
        f"warm-up of {task.warmup_epochs:g} epoch, {decay}",
    )


def _two_digits(value: float | None, missing: str = "–") -> str:
    return missing if value is None else f"{value:.2f}"


def _one_digit(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _table(columns: Cells, rows: Iterable[Cells]) -> str:
    """A table in Markdown; columns of numbers are aligned to the right."""
    lines = [list(row) for row in rows]
    right = [all(line[place][:1] in "0123456789+-–" for line in lines if line[place]) for place in range(len(columns))]
    right[0] = False
    rule = ["---:" if each else "---" for each in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), rule, *lines])
