"""Other people's projects train under ``adpsgd`` as they do under ``ddp``, and send what was promised."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.page import CLIENTS, Compared

ROOT = Path(__file__).parents[2]
AROUND_A_ROUND = 2048
"""Bytes of what workers tell each other at a round, at most."""


def train(name: str, strategy: str, seed: int, folder: Path) -> dict[str, Any]:
    """Start a client's script as a user would, and return what it has written."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    # Nothing is to be downloaded, and nothing is.
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    results = folder / "results.json"
    command = [sys.executable, "-m", f"tests.clients.{name}", "--strategy", strategy, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--results", str(results)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


def promised(outcome: dict[str, Any], optimizer: int) -> int:
    """Bytes that a round of an optimizer sends: its trained parameters, and the module's buffers."""
    return outcome["optimizer_bytes"][optimizer] + outcome["buffer_bytes"]


def check_bytes(outcome: dict[str, Any], compared: Compared) -> None:
    """Rounds send what was promised, and fewer bytes than DDP's all-reduce of the gradients."""
    rounds = outcome["rounds"]
    assert {each["optimizer"] for each in rounds} == set(range(len(outcome["optimizer_bytes"])))
    for each in rounds:
        if each["trigger"] == "period" or each["trigger"] in compared.also_plain:
            more = each["payload_bytes"] - promised(outcome, each["optimizer"])
            assert 0 <= more < AROUND_A_ROUND, each
    gradients = sum(
        each["local_steps"] * outcome["optimizer_bytes"][each["optimizer"]] for each in rounds
    )  # among two workers, each sends as many bytes as it has
    assert outcome["summary"]["sent_bytes_ddp"] == gradients
    assert outcome["summary"]["sent_bytes"] == sum(each["payload_bytes"] for each in rounds)
    assert outcome["summary"]["sent_bytes"] < compared.most_bytes * gradients


@pytest.mark.parametrize("compared", CLIENTS, ids=lambda each: each.name)
def test_a_client_ends_where_it_does_under_ddp_and_sends_what_was_promised(compared, seeds, results, tmp_path):
    runs = {}
    for seed in seeds:
        runs[seed] = {}
        for strategy in (compared.baseline, "adpsgd"):
            folder = tmp_path / f"{strategy}-{seed}"
            folder.mkdir()
            runs[seed][strategy] = train(compared.name, strategy, seed, folder)
    results[compared.name] = [
        compared.row(seed, each[compared.baseline], each["adpsgd"]) for seed, each in runs.items()
    ]
    for each in runs.values():
        ours, theirs = each["adpsgd"], each[compared.baseline]
        assert ours["steps"] == theirs["steps"]
        assert ours["differing"] == []
        assert abs(ours["loss"] - theirs["loss"]) <= compared.margin
        check_bytes(ours, compared)
        if compared.frozen:
            assert ours["frozen_bytes"] > 3 * ours["trained_bytes"]
