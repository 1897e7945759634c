"""The metrics of averaging rounds, as real loggers write them."""

import csv
import math
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_adpsgd import CommunicationMonitor
from tests.training import fit, seeded

Entries = dict[int, float]
"""Values by step."""

NAMES = ("variance", "variance_over_lr", "target", "period", "syncs", "sent_bytes", "sent_bytes_ddp", "round_seconds")
LOGGERS = ("csv", "tensorboard", "mlflow", "wandb")
NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


def new_logger(kind: str, folder: Path) -> Any:
    if kind == "csv":
        return CSVLogger(folder, name="runs")
    if kind == "tensorboard":
        return TensorBoardLogger(folder, name="runs")
    if kind == "mlflow":
        return MLFlowLogger("runs", tracking_uri=f"file:{folder}/mlflow")
    return WandbLogger(save_dir=folder, offline=True, project="runs")


def read_csv(logger: Any, name: str) -> Entries:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def read_tensorboard(logger: Any, name: str) -> Entries:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def read_mlflow(logger: Any, name: str) -> Entries:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(logger._tracking_uri).get_metric_history(logger.run_id, name)
    return {metric.step: metric.value for metric in history}


def read_wandb(logger: Any, name: str) -> Entries:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = Path(logger.save_dir).glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for content in records_of(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if name in row:
            found[int(row["trainer/global_step"])] = float(row[name])
    return found


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's own header of 7 bytes.

    Blocks have 32,768 bytes. A record has one part or several, each with a header of 7 bytes: a checksum, its length,
    and its kind, which is 1 for a whole record and 4 for the last part of one.
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32_768 - place % 32_768
        if left < 7:  # too short for a header, and so not used
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def expected(monitor: CommunicationMonitor, optimizer: int = 0) -> dict[str, list[float]]:
    """What the monitor's own history says was logged, in order."""
    rounds = monitor.rounds
    return {
        "variance": [r.variance for r in rounds],
        "variance_over_lr": [r.ratio for r in rounds],
        "target": [r.target for r in rounds if r.target is not None],
        "period": [r.period for r in rounds],
        "syncs": list(range(1, len(rounds) + 1)),
        "sent_bytes": [sum(r.sent_bytes for r in rounds[: i + 1]) for i in range(len(rounds))],
        "sent_bytes_ddp": [sum(monitor._ddp_bytes[: i + 1]) for i in range(len(rounds))],
        "round_seconds": [r.seconds for r in rounds],
    }


def trained(kind: str, folder: str) -> dict[str, Any] | None:
    """Train with a logger, and tell on the first rank what it wrote and what it should have written."""
    os.environ.update(WANDB_SILENT="true", MLFLOW_ALLOW_FILE_STORE="true")
    logger, monitor = new_logger(kind, Path(folder)), CommunicationMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = fit("adpsgd", seeded(), logger=logger, callbacks=[monitor], log_every_n_steps=1)
    if not trainer.is_global_zero:
        return None
    if kind == "wandb":
        import wandb

        wandb.finish()
        wandb.teardown()  # ends its process
    read = globals()[f"read_{kind}"]
    return {
        "written": {name: read(logger, f"adpsgd/{name}") for name in NAMES},
        "loss": read(logger, "train_loss"),
        "expected": expected(monitor),
        "steps": [r.step for r in monitor.rounds],
    }


@pytest.mark.workers
@pytest.mark.parametrize("kind", LOGGERS)
def test_a_logger_writes_every_number_of_every_round_at_the_step_of_its_loss(pool, tmp_path, kind):
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    told, other = pool.run_trainer(trained, kind, str(tmp_path))
    assert other is None
    assert len(told["steps"]) >= 4
    for name, values in told["expected"].items():
        written = told["written"][name]
        assert [*written.values()] == [pytest.approx(value, rel=1e-5) for value in values], name
        assert all(math.isfinite(value) for value in written.values())
        assert set([*written][:-1]) <= set(told["loss"])  # one row for a batch; the last round is after all of them
