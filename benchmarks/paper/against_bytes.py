"""Accuracy against bytes: which contenders match full communication, with how many bytes, and which goals are met."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.paper.claims import Claim
from benchmarks.paper.plan import ADPSGD_INT4, FASTER, FULL, POWERSGD, Contender, Study, Task
from benchmarks.paper.results import POINTS, Outcomes, Value, accuracy, final_loss, in_words, sent_bytes, spread

COLUMNS = (
    "contender",
    "seeds",
    "bytes ÷ full",
    "final loss",
    "accuracy [%]",
    "loss − full",
    "accuracy − full [points]",
)
MOST_BYTES = 0.055  # of full communication's: a fifth of QSGD's
MOST_POINTS = 0.3  # of accuracy below full communication, on average


class Part(NamedTuple):
    """A study of accuracy against bytes, and what is known of its runs."""

    study: Study
    outcomes: Outcomes

    def tasks(self) -> list[Task]:
        """Those that have results."""
        return [task for task in self.study.tasks if self.outcomes.known(task, self.study.of(task))]


class Point(NamedTuple):
    """A contender in the figure."""

    contender: Contender
    share: float  # of full communication's bytes
    accuracy: float  # per cent, the mean over the seeds
    deviation: float  # its spread; 0 if there is one seed


def rows(part: Part, task: Task) -> list[list[str]]:
    """A row per contender that has results, see `COLUMNS`; differences are from full communication, within a seed."""
    study, outcomes = part
    return [
        [
            contender.title,
            str(len(outcomes.results(task, contender))),
            _of_full(outcomes, task, contender),
            outcomes.of(task, contender, final_loss).text(4),
            outcomes.of(task, contender, accuracy).text(2, POINTS),
            _difference(outcomes, task, contender, final_loss, 4),
            _difference(outcomes, task, contender, accuracy, 2, POINTS),
        ]
        for contender in outcomes.known(task, study.of(task))
    ]


def _of_full(outcomes: Outcomes, task: Task, contender: Contender) -> str:
    share = byte_share(outcomes, task, contender)
    return "" if share is None else f"{share:.3f}"


def _difference(
    outcomes: Outcomes, task: Task, contender: Contender, value: Value, digits: int, factor: float = 1
) -> str:
    differences = [] if contender == FULL else outcomes.differences(task, contender, FULL, value)
    return in_words(differences, digits, factor) if differences else ""


def byte_share(outcomes: Outcomes, task: Task, contender: Contender, other: Contender = FULL) -> float | None:
    """Bytes sent ÷ those that another contender sends, means over the seeds; None if one was not measured."""
    if not all(outcomes.known(task, [each]) for each in (contender, other)):
        return None
    mine, others = (outcomes.of(task, each, sent_bytes).mean for each in (contender, other))
    return mine / others


def points(part: Part, task: Task) -> list[Point]:
    """What the figure shows of a task; nothing without a run of full communication."""
    study, outcomes = part
    known = []
    for contender in outcomes.known(task, study.of(task)):
        share = byte_share(outcomes, task, contender)
        if share is not None:
            right = outcomes.of(task, contender, accuracy)
            known.append(Point(contender, share, POINTS * right.mean, POINTS * (right.deviation or 0.0)))
    return known


class Brief(NamedTuple):
    """A contender over all tasks that it was trained on, at the tasks' own learning rates."""

    contender: Contender
    shares: list[float]  # of full communication's bytes, for each task
    gains: list[float]  # accuracy less full communication's, in points, the mean over the seeds of both


def in_brief(parts: Sequence[Part], contenders: Sequence[Contender]) -> list[Brief]:
    """What the figure of the README shows; contenders without a run in common with full communication are left out."""
    found = []
    for contender in contenders:
        pairs = []
        for outcomes, task in ((part.outcomes, task) for part in parts for task in part.tasks()):
            share = byte_share(outcomes, task, contender)
            gains = [0.0] if contender == FULL else outcomes.differences(task, contender, FULL, accuracy)
            if share is not None and gains:
                pairs.append((share, POINTS * spread(gains).mean))
        if pairs:
            found.append(Brief(contender, *map(list, zip(*pairs, strict=True))))
    return found


def frontier(of: Sequence[Point]) -> list[Point]:
    """Points that no other one with as few bytes exceeds in accuracy, in order of bytes."""
    found: list[Point] = []
    for point in sorted(of, key=lambda each: (each.share, -each.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def missing(parts: Sequence[Part]) -> str:
    """Which runs are not done, as a sentence; empty if all are."""
    by_contender = Counter(run.contender.title for part in parts for run in part.outcomes.missing)
    if not by_contender:
        return ""
    done = sum(
        len(outcomes.results(task, each))
        for study, outcomes in parts
        for task in study.tasks
        for each in study.of(task)
    )
    listed = "; ".join(f"{title}: {count}" for title, count in by_contender.items())
    undone = by_contender.total()
    return f"**{undone} of the {done + undone} runs of this section are not done yet** ({listed})."


# Goals


def goals(parts: Sequence[Part]) -> list[Claim]:
    """The goals for ADPSGD in 4 bits with an estimate, and whether it reaches them."""
    every = [(part, task) for part in parts for task in part.study.tasks]
    pairs = [pair for part, task in every if (pair := _Pair.of(part, task)) is not None]
    return [_within_spread(pairs), _on_average(pairs), _bytes(every), _against_powersgd(every)]


class _Pair(NamedTuple):
    """Full communication and ADPSGD in 4 bits with an estimate, each at its best rate, with the seeds of both."""

    task: Task
    title: str
    losses: list[float]  # ADPSGD's minus full communication's
    gains: list[float]  # the same for accuracy, in points
    loss_spread: float | None  # of full communication
    accuracy_spread: float | None  # in points

    @classmethod
    def of(cls, part: Part, task: Task) -> "_Pair | None":
        """None if they have no seed in common."""
        mine, full = (best(part, task, each) for each in (ADPSGD_INT4, FULL))
        outcomes = part.outcomes
        if mine is None or full is None:
            return None
        losses = outcomes.differences(task, mine, full, final_loss)
        if not losses:
            return None
        rates = f" (rates × {mine.rate:g} and × {full.rate:g})" if (mine.rate, full.rate) != (1.0, 1.0) else ""
        right = outcomes.of(task, full, accuracy).deviation
        return cls(
            task,
            f"{task.title}{rates}",
            losses,
            [POINTS * gain for gain in outcomes.differences(task, mine, full, accuracy)],
            outcomes.of(task, full, final_loss).deviation,
            None if right is None else POINTS * right,
        )


def best(part: Part, task: Task, contender: Contender) -> Contender | None:
    """A contender at the learning rate that gives it the smallest final loss, of those that were tried on a task."""
    study, outcomes = part
    tried = [each for each in study.of(task) if each == contender or each in FASTER.get(contender, ())]
    known = outcomes.known(task, tried)
    return min(known, key=lambda each: outcomes.of(task, each, final_loss).mean) if known else None


def _within_spread(pairs: Sequence[_Pair]) -> Claim:
    reached, sentences = [], []
    for pair in pairs:
        if pair.loss_spread is None or pair.accuracy_spread is None:
            continue
        loss, gain = spread(pair.losses).mean, spread(pair.gains).mean
        good = loss <= pair.loss_spread and gain >= -pair.accuracy_spread
        reached.append(good)
        sentences.append(
            f"{pair.title}: final loss {in_words(pair.losses, 4)}, full communication's spread {pair.loss_spread:.4f};"
            f" accuracy {in_words(pair.gains, 2, unit=' points')}, its spread {pair.accuracy_spread:.2f} points:"
            f" {'reached' if good else 'missed'}."
        )
    text = "Final loss and accuracy no worse than full communication's by more than its own spread over seeds"
    return Claim(text, _verdict(reached, "tasks"), sentences)


def _on_average(pairs: Sequence[_Pair]) -> Claim:
    text = f"At most {MOST_POINTS} points of accuracy below full communication, on average over tasks"
    if not pairs:
        return Claim(text, "not measured", [])
    mean = spread([spread(pair.gains).mean for pair in pairs]).mean
    listed = ", ".join(f"{pair.title} {spread(pair.gains).mean:+.2f}" for pair in pairs)
    return Claim(text, _verdict([mean >= -MOST_POINTS], "tasks"), [f"{mean:+.2f} points: {listed}."])


def _bytes(every: Sequence[tuple[Part, Task]]) -> Claim:
    reached, sentences = [], []
    for part, task in every:
        share = byte_share(part.outcomes, task, ADPSGD_INT4)
        if share is not None:
            reached.append(share <= MOST_BYTES)
            sentences.append(f"{task.title}: {share:.3f}.")
    return Claim(f"At most {MOST_BYTES} of full communication's bytes", _verdict(reached, "tasks"), sentences)


def _against_powersgd(every: Sequence[tuple[Part, Task]]) -> Claim:
    reached, sentences = [], []
    for part, task in every:
        outcomes = part.outcomes
        for peer in POWERSGD:
            mine, other = (best(part, task, each) for each in (ADPSGD_INT4, peer))
            gains = outcomes.differences(task, mine, other, accuracy) if mine and other else []
            share = byte_share(outcomes, task, mine, other) if mine and other else None
            if mine is None or other is None or share is None or not gains:
                continue
            counts, good = share <= 1, spread(gains).mean >= 0
            reached += [good] if counts else []
            sentences.append(
                f"{task.title}, against {other.title}, with {share:.2f} of its bytes: accuracy"
                f" {in_words(gains, 2, POINTS, ' points')}"
                f"{(': reached.' if good else ': missed.') if counts else '. It sends less, so this does not count.'}"
            )
    text = "At least as accurate as PowerSGD at as many bytes or more"
    return Claim(text, _verdict(reached, "comparisons"), sentences)


def _verdict(reached: Sequence[bool], what: str) -> str:
    if not reached:
        return "not measured"
    if all(reached):
        return "reached"
    return f"reached in {sum(reached)} of {len(reached)} {what}" if any(reached) else "missed"
