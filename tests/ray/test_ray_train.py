"""Ray Train with two real workers: the same training as without Ray, and a run that goes on after failures."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.hidden import run
from tests.training import identical

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

import ray
import ray.train
from ray.train.torch import TorchTrainer

from lightning_adpsgd import ADPSGDStrategy
from lightning_adpsgd.ray import RayADPSGDStrategy
from tests.ray.ray_jobs import EPOCHS, SETTINGS, all_settings, with_faults

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 16
FAULTS = (("killed", STEPS_PER_EPOCH + 4), ("raised", 2 * STEPS_PER_EPOCH + 4), (None, -1))
"""What goes wrong in each attempt, and at which step: in the middle of an epoch and of an averaging period."""


class Outcome(NamedTuple):
    """How a run under Ray has ended."""

    folder: Path
    error: Exception | None
    reported: dict[str, Any]

    def of(self, rank: int, kind: str = "outcome") -> dict[str, Any]:
        file = self.folder / f"{kind}.{rank}"
        assert file.exists(), self.error
        return torch.load(file, weights_only=False)

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What the workers of all attempts have written down, in the order of time."""
        files = sorted(self.folder.glob(f"{kind} of *.json"), key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text()) for path in files]


def without_buffers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if "running" not in name}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray that leaves nothing behind."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short, since it is part of the paths of sockets
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon Ray acts: 2 seconds by default
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()
    patch.undo()
    shutil.rmtree(folder, ignore_errors=True)


def train(function: Callable[[dict[str, Any]], None], folder: Path, max_failures: int = 0, **config: Any) -> Outcome:
    trainer = TorchTrainer(
        function,
        train_loop_config={"folder": str(folder), **config},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(folder / "storage"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        return Outcome(folder, error, {})
    return Outcome(folder, None, result.metrics)


@pytest.fixture(scope="module")
def straight(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run without a fault, then runs with many settings; at last one that fails."""
    return train(all_settings, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def failed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run without a fault again, but a worker is killed in the first attempt and raises in the second."""
    return train(with_faults, tmp_path_factory.mktemp("failed"), max_failures=2, faults=FAULTS)


# Training


@pytest.mark.workers
@pytest.mark.parametrize("settings", SETTINGS)
def test_workers_of_ray_train_what_workers_without_it_train(straight, settings):
    for rank in range(2):
        ours, plain = straight.of(rank, "settings")[settings]
        assert ours["steps"] == STEPS_PER_EPOCH
        assert len(ours["rounds"]) > (0 if settings == "one node" else 2)
        assert ours["rounds"] == plain["rounds"]
        assert identical([ours["weights"], plain["weights"]])
    first, second = (straight.of(rank, "settings")[settings][0]["weights"] for rank in range(2))
    if settings in ("dropped", "one node"):  # without a round that averages BatchNorm's statistics
        first, second = (without_buffers(each) for each in (first, second))
    assert identical([first, second])


@pytest.mark.workers
def test_an_epoch_that_is_reported_ends_with_a_round_and_the_same_weights_on_all_workers(straight):
    first, second = straight.of(0), straight.of(1)
    assert first["steps"] == EPOCHS * STEPS_PER_EPOCH
    assert len(first["epochs"]) == EPOCHS
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert identical([ours, theirs])
    saved = [step for step, trigger, *_ in first["rounds"] if trigger == "checkpoint"]
    assert saved == [STEPS_PER_EPOCH * (epoch + 1) for epoch in range(EPOCHS)]


@pytest.mark.workers
def test_an_error_of_a_worker_reaches_ray_as_its_own(straight):
    assert isinstance(straight.error, ray.train.TrainingFailedError)
    assert "ValueError: a bad sample" in str(straight.error)
    assert {"rank": 1, "kind": "ValueError", "message": "a bad sample"} in straight.told("error")


# Failures


@pytest.mark.workers
def test_a_run_goes_on_after_a_worker_was_killed_and_after_one_has_raised(failed):
    assert failed.error is None
    starts = [(start["epoch"], start["fault"]) for start in failed.told("start")]
    assert starts == [(0, "killed")] * 2 + [(1, "raised")] * 2 + [(2, None)] * 2
    assert failed.reported["step"] == EPOCHS * STEPS_PER_EPOCH
    assert [len(failed.of(rank)["epochs"]) for rank in range(2)] == [1, 1]  # the last attempt trained the last epoch


@pytest.mark.workers
def test_it_ends_bit_for_bit_as_if_nothing_had_failed_with_the_average_on_all_workers(failed, straight):
    for rank in range(2):
        ours, theirs = failed.of(rank), straight.of(rank)
        assert ours["rounds"] == theirs["rounds"]
        assert identical([ours["weights"], theirs["weights"]])
        assert identical([failed.of(0)["weights"], ours["weights"]])
        for parameter, state in theirs["optimizer"].items():
            assert torch.equal(ours["optimizer"][parameter]["momentum_buffer"], state["momentum_buffer"])


# The example


@pytest.mark.workers
def test_the_example_learns_the_digits(tmp_path):
    environment = {
        **os.environ,
        "RAY_ADDRESS": "local",  # whatever other Ray runs on this machine, or has left its address
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    example = [sys.executable, str(ROOT / "examples" / "with_ray_train.py")]
    done = subprocess.run(example, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reported, of_the_file = map(float, re.findall(r"^accuracy ([\d.]+) %", done.stdout, re.MULTILINE))
    assert reported > 90
    assert abs(reported - of_the_file) < 0.1
    assert re.search(r"rounds +\d+ in 220 steps", done.stdout + done.stderr)


# The class


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"timeout": timedelta(minutes=5)}, r"TorchConfig\(timeout_s="),
        ({"process_group_backend": "gloo"}, r"TorchConfig\(backend="),
        ({"start_method": "spawn"}, r"ScalingConfig\(num_workers="),
    ],
)
def test_what_ray_decides_is_refused_with_where_to_set_it(settings, instead):
    with pytest.raises(ValueError, match=instead):
        RayADPSGDStrategy(**settings)


def test_it_takes_the_arguments_and_errors_of_the_plain_class():
    assert RayADPSGDStrategy.int4(overlap=1).transport == ADPSGDStrategy.int4(overlap=1).transport
    assert RayADPSGDStrategy(4, True, "average").transport == "at once"
    with pytest.raises(ValueError, match="bucket_size_mb"):
        RayADPSGDStrategy(bucket_size_mb=0)
    with pytest.raises(TypeError, match="perid"):
        RayADPSGDStrategy(perid=4)


FAMILY = """
{imports}
try:
    from lightning_adpsgd.ray import RayADPSGDStrategy
    print(RayADPSGDStrategy.__mro__[1].__module__)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("imports", "hidden", "told"),
    [
        ("import pytorch_lightning", ("lightning",), "lightning_adpsgd.pytorch_lightning.strategy"),
        ("import pytorch_lightning", (), "uses `lightning.pytorch`, since it is installed"),
    ],
    ids=["pytorch-lightning alone", "another than Ray's"],
)
def test_the_class_is_of_the_family_of_rays_own_or_the_error_says_why_not(imports, hidden, told):
    assert told in run(FAMILY.format(imports=imports), *hidden)
