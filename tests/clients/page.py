"""The clients, and the page on them: ``python -m tests.clients.page`` writes its table from the file of results."""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "clients.md"
RESULTS = Path(__file__).with_name("results.json")
TITLES = (
    "client",
    "versions",
    "steps",
    "loss",
    "under `ddp`",
    "under `adpsgd`",
    "difference, by seed",
    "margin",
    "bytes ÷ `ddp`",
)
MARKS = "<!-- the table that `make test-clients` writes -->\n", "<!-- its end -->\n"


class Compared(NamedTuple):
    """A client, and what is expected of it."""

    name: str
    title: str
    loss: str
    margin: float
    """By how much the final loss may differ from that under DDP."""
    baseline: str = "ddp"
    most_bytes: float = 0.4
    """Of DDP's."""
    frozen: bool = False
    also_plain: tuple[str, ...] = ()
    """Triggers of further rounds that send no more than those that the period asks for."""

    def row(self, seed: int, ddp: dict[str, Any], adpsgd: dict[str, Any]) -> dict[str, Any]:
        """What the page needs of two runs."""
        return {
            "seed": seed,
            "versions": adpsgd["versions"],
            "steps": adpsgd["steps"],
            "ddp": ddp["loss"],
            "adpsgd": adpsgd["loss"],
            "sent_bytes": adpsgd["summary"]["sent_bytes"],
            "sent_bytes_ddp": adpsgd["summary"]["sent_bytes_ddp"],
        }


CLIENTS = (
    Compared("forecasting", "pytorch-forecasting, temporal fusion transformer", "quantile loss", 0.35),
    Compared("schedule_free", "schedule-free AdamW", "cross-entropy", 0.05),
    Compared("gan", "GAN, two optimizers in turn", "energy distance", 0.1, "ddp_find_unused_parameters_true"),
    Compared("dqn", "DQN on CartPole", "share of steps missed", 0.1, "ddp_find_unused_parameters_true"),
    Compared("segmentation", "LR-ASPP on MobileNetV3, with BatchNorm", "cross-entropy", 0.01),
    Compared("hugging_face", "GPT-2 from its configuration", "cross-entropy", 0.03),
    Compared("lora", "LoRA in a frozen Llama", "cross-entropy", 0.12, frozen=True, also_plain=("train_end",)),
)


def read_results() -> dict[str, list[dict[str, Any]]]:
    """The rows of each client, one per seed."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows, in the order of the page."""
    in_order = {client.name: results[client.name] for client in CLIENTS if client.name in results}
    RESULTS.write_text(json.dumps(in_order, indent=1) + "\n")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One row per client; losses are means over the seeds."""
    lines = [
        f"| {' | '.join(TITLES)} |",
        f"|{' --- |' * len(TITLES)}",
    ]
    for client in CLIENTS:
        rows = results.get(client.name, [])
        if not rows:
            continue
        versions = ", ".join(f"{package} {version}" for package, version in rows[0]["versions"].items())
        losses = [f"{mean(row[strategy] for row in rows):.3f}" for strategy in ("ddp", "adpsgd")]
        differences = ", ".join(f"{row['adpsgd'] - row['ddp']:+.3f}".replace("-", "−") for row in rows)
        share = sum(row["sent_bytes"] for row in rows) / sum(row["sent_bytes_ddp"] for row in rows)
        cells = [client.title, versions, f"{rows[0]['steps']:,}", client.loss, *losses, differences]
        lines.append(f"| {' | '.join([*cells, f'{client.margin:g}', f'{share:.2f}'])} |")
    return "\n".join(lines) + "\n"


def page(text: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """The page's text with a new table."""
    between = re.compile(f"({re.escape(MARKS[0])}).*({re.escape(MARKS[1])})", re.DOTALL)
    assert between.search(text), f"{PAGE} lacks the marks around its table"
    return between.sub(lambda marks: f"{marks[1]}\n{table(results)}\n{marks[2]}", text)


def write_page() -> None:
    """Write the table of the page anew."""
    PAGE.write_text(page(PAGE.read_text(), read_results()))


if __name__ == "__main__":
    write_page()
