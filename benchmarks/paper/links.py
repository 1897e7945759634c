"""What communication takes: measurements on links, and the share of the time that the paper's speed-ups imply."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.paper.plan import ADPSGD, CPSGD_8, FULL, MATCHED, QSGD, Contender

PAPER_SPEEDUPS = {"100 Gbps": (1.14, 1.27), "10 Gbps": (1.46, 1.95)}
"""Of ADPSGD over full communication (arXiv:2007.06134, abstract)."""
PAPER_PERIOD = 8  # averaging period of the paper's CPSGD; ADPSGD's communication must not exceed it
FILES = {"100 Gbps": "link_100gbps.json", "10 Gbps": "link_10gbps.json"}
"""The measurements on links that stand for the paper's two networks."""
_ON_LINKS = {FULL.name: "ddp", CPSGD_8.name: "constant", MATCHED.name: "even", ADPSGD.name: "even", QSGD.name: "qsgd"}
"""What stands for a contender there: the number of rounds takes time, not where they are."""


class Link(NamedTuple):
    """A measurement on links."""

    file: str  # as the page names it
    command: str
    text: str  # what was measured
    step_seconds: Mapping[str, float]  # by contender's name in `benchmarks.contenders`
    speedups: Mapping[str, float]  # over full communication; the same names
    lost: float  # the share of full communication's time that communication took
    mean_period: float  # of ``even``, which stands for ADPSGD

    def speedup(self, contender: Contender) -> float | None:
        """How many times as fast as full communication; None if it was not measured."""
        return self.speedups.get(_ON_LINKS.get(contender.name, ""))

    def seconds(self, contender: Contender) -> float:
        """Of a step, rounds included."""
        return self.step_seconds[_ON_LINKS[contender.name]]


def read_links(folder: Path) -> dict[str, Link]:
    """The measurements that were made, by the paper's network."""
    return {name: _read(folder / file) for name, file in FILES.items() if (folder / file).is_file()}


def _read(file: Path) -> Link:
    content = json.loads(file.read_text())
    rows, given = {row["contender"]: row for row in content["rows"]}, content["arguments"]
    return Link(
        file=str(file),
        command=" ".join(content["command"]),
        text=f"{given['hosts']} hosts, {given['rate_mbit']:g} Mbit/s, {given['model_parameters']:,} parameters,"
        f" {given['turns']} turns of {given['timed_steps']} steps",
        step_seconds={name: row["step_seconds"] for name, row in rows.items()},
        speedups={name: row["speed_vs_ddp"] for name, row in rows.items()},
        lost=1 - rows["ddp"]["speed_vs_none"],
        mean_period=given["mean_period"],
    )


def communication_share(speedup: float, period: float = PAPER_PERIOD) -> float:
    """The share of full communication's time that communication takes, from how much faster periodic averaging is.

    A step of full communication takes t + c, one with a round every p steps t + c/p. From s = (t + c)/(t + c/p) follows
    c/(t + c) = (1 - 1/s)/(1 - 1/p).
    """
    return (1 - 1 / speedup) / (1 - 1 / period)


def middle_share(speedups: tuple[float, float]) -> float:
    """The share that belongs to the geometric mean of two speed-ups."""
    return communication_share(math.sqrt(speedups[0] * speedups[1]))
