"""The paper's claims (arXiv:2007.06134), and whether they are reproduced here."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.paper.links import PAPER_SPEEDUPS, Link
from benchmarks.paper.plan import ADPSGD, ADPSGD_INT4, CPSGD_8, MATCHED, QSGD, RARE, Contender, Task
from benchmarks.paper.results import Outcomes, accuracy, final_loss, rounds, sent_bytes, until

EQUALLY_MANY = 1.01  # times as many rounds


class Claim(NamedTuple):
    """A claim of the paper, and the result here."""

    text: str
    verdict: str
    sentences: Sequence[str]  # the figures behind the verdict


def verdict(better: Sequence[Sequence[float]]) -> str:
    """The verdict on several comparisons, given how much better each was with each seed; negative is worse.

    It is ``reproduced`` if it was better with every seed of every comparison, ``not reproduced`` if in no comparison
    the mean was better, ``reproduced in part`` between the two, and ``not measured`` without any runs.
    """
    known = [differences for differences in better if differences]
    if not known:
        return "not measured"
    each = [difference for differences in known for difference in differences]
    above = sum(difference > 0 for difference in each)
    if above == len(each):
        return "reproduced"
    if all(statistics.fmean(differences) <= 0 for differences in known):
        return "not reproduced"
    return f"reproduced in part: {above} of {len(each)} comparisons within a seed are as claimed"


def claims(
    outcomes: Outcomes, tasks: Sequence[Task], links: Mapping[str, Link], beside: Outcomes | None = None
) -> list[Claim]:
    """The paper's claims, judged by the outcomes of its comparison and by measurements on links.

    Args:
        outcomes: of the paper's comparison.
        tasks: its tasks.
        links: the measurements, by the paper's network.
        beside: outcomes of the same tasks with contenders that the paper does not have.
    """
    against_qsgd = _against_qsgd(outcomes, tasks, links)
    if beside is not None:
        against_qsgd.sentences.extend(_also_against_qsgd(beside, tasks))
    return [_against_cpsgd(outcomes, tasks), against_qsgd, _speedups(links)]


def _against_cpsgd(outcomes: Outcomes, tasks: Sequence[Task]) -> Claim:
    better: list[Sequence[float]] = []
    sentences = []
    for contender, other in ((ADPSGD, MATCHED), (RARE, CPSGD_8), (ADPSGD, CPSGD_8)):
        for task in tasks:
            losses = outcomes.differences(task, contender, other, final_loss)
            if not losses:
                continue
            mine, others = (outcomes.of(task, each, rounds).mean for each in (contender, other))
            counts = mine <= EQUALLY_MANY * others
            if counts:
                better += [[-loss for loss in losses], outcomes.differences(task, contender, other, accuracy)]
            sentences.append(
                f"{task.title}, {contender.title} ({mine:.0f} rounds) against {other.title} ({others:.0f}):"
                f" {outcomes.against(task, contender, other)}."
                f"{'' if counts else ' Not part of the verdict, as it takes more rounds.'}"
            )
    text = "At the same or smaller communication, ADPSGD ends with smaller training loss and higher accuracy than CPSGD"
    return Claim(text, verdict(better), sentences)


def _against_qsgd(outcomes: Outcomes, tasks: Sequence[Task], links: Mapping[str, Link]) -> Claim:
    better: list[Sequence[float]] = []
    sentences = []
    for contender in (RARE, ADPSGD):
        for task in tasks:
            losses = outcomes.differences(task, contender, QSGD, final_loss)
            if not losses:
                continue
            if contender is RARE:
                better.append([-loss for loss in losses])
            sentences.append(f"{_beside_qsgd(outcomes, task, contender)}; {_until(outcomes, task, contender, links)}.")
    if better:
        sentences.append(
            f"The verdict is about the final loss of {RARE.title}, which sends half of QSGD's bytes or less, after as"
            " many epochs."
        )
    text = "Faster convergence than gradient quantization (QSGD), with half of its communication"
    return Claim(text, verdict(better), sentences)


def _also_against_qsgd(outcomes: Outcomes, tasks: Sequence[Task]) -> list[str]:
    """The same about a contender that the paper does not have, which does not change the verdict."""
    better, sentences = [], []
    for task in tasks:
        losses = outcomes.differences(task, ADPSGD_INT4, QSGD, final_loss)
        if losses:
            better.append([-loss for loss in losses])
            sentences.append(f"Not in the paper: {_beside_qsgd(outcomes, task, ADPSGD_INT4)}.")
    return [*sentences, f"Of {ADPSGD_INT4.title} the verdict would be: {verdict(better)}."] if better else []


def _beside_qsgd(outcomes: Outcomes, task: Task, contender: Contender) -> str:
    """A contender's bytes, loss and accuracy compared with QSGD's; they need a seed in common."""
    mine, others = (outcomes.of(task, each, sent_bytes).mean for each in (contender, QSGD))
    against = outcomes.against(task, contender, QSGD)
    return f"{task.title}, {contender.title}, with {mine / others:.2f} of QSGD's bytes: {against}"


def _until(outcomes: Outcomes, task: Task, contender: Contender, links: Mapping[str, Link]) -> str:
    """How soon a contender has the training loss that QSGD has after two thirds of its epochs."""
    mine, others = outcomes.results(task, contender), outcomes.results(task, QSGD)
    shares = []
    for seed in sorted(mine.keys() & others.keys()):
        curve = others[seed]["curve"]
        point = curve[2 * len(curve) // 3 - 1]
        reached = until(mine[seed], point["loss"])
        if reached is None:
            return "the training loss that QSGD has after two thirds of its epochs is not reached with every seed"
        shares.append((reached.epochs / point["epoch"], reached.sent_bytes / point["sent_bytes"]))
    epochs, sent = (statistics.fmean(each) for each in zip(*shares, strict=True))
    text = (
        f"the training loss that QSGD has after two thirds of its epochs is reached after {epochs:.2f} times its epochs"
        f" and {sent:.2f} times its bytes"
    )
    if not links or contender is not ADPSGD:
        return text
    times = [
        f"{epochs * link.seconds(contender) / link.seconds(QSGD):.2f} times its time on the link that stands for {name}"
        for name, link in links.items()
    ]
    return f"{text}, {', '.join(times)}"


def _speedups(links: Mapping[str, Link]) -> Claim:
    above, sentences = [], []
    for name, link in links.items():
        low, high = PAPER_SPEEDUPS[name]
        measured = link.speedups["even"]
        above.append([measured - low])
        sentences.append(
            f"Where full communication loses {link.lost:.2f} of its time (stands for {name}): {measured:.2f}, in the"
            f" paper {low} to {high}."
        )
    if sentences:
        sentences.append(
            "Not testable here is that 100 Gbps and 10 Gbps cost full communication these shares of its time: they"
            " were derived from the paper's own speed-ups, and set (see [Time](#time))."
        )
    found = verdict(above)
    if found == "reproduced":
        found = "reproduced for the shares that were set; the shares themselves are not testable here"
    text = "1.14 to 1.27 times as fast as full communication at 100 Gbps, 1.46 to 1.95 times at 10 Gbps"
    return Claim(text, found, sentences)
