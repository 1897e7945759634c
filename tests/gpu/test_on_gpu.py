"""What only a GPU can show: several ranks on one device, over gloo, with CUDA tensors; ``pytest tests/gpu``."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import LocalSGD, WorkerGroup
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.reduction import CollectiveError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.workers,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use"),
]

DEVICE = torch.device("cuda", 0)
LONG = 2 * 10**9
"""Cycles of the device's clock: about a second."""


def numbers_and_rows() -> dict:
    workers = WorkerGroup(device=DEVICE)
    rank = torch.tensor(float(workers.rank), device=DEVICE)
    tables = [workers.launch_table([rank, step, rank * step]) for step in range(50)]
    torch.cuda._sleep(LONG // 10)
    means = [workers.launch_mean([rank, 1.0 * step]) for step in range(50)]
    return {"tables": [table.wait().tolist() for table in tables], "means": [mean.wait().tolist() for mean in means]}


def test_numbers_are_not_overwritten_while_they_are_copied(pool):
    for outcome in pool.run(numbers_and_rows):
        assert outcome["tables"] == [[[0.0, step, 0.0], [1.0, step, step]] for step in range(50)]
        assert outcome["means"] == [[0.5, step] for step in range(50)]


def test_seconds_are_the_devices_and_counted_once():
    stopwatch = Stopwatch(DEVICE)
    torch.cuda._sleep(LONG)
    stopwatch.stop()
    begun = time.perf_counter()
    with stopwatch.waiting():
        torch.cuda.synchronize()
    assert 0.5 * (time.perf_counter() - begun) < stopwatch.seconds < 1.5 * (time.perf_counter() - begun)


def wait_for_one_that_has_failed() -> str:
    workers, event = WorkerGroup(device=DEVICE), torch.cuda.Event()
    if workers.rank == 1:
        workers.peers.post_status("had failed at step 2: ValueError: boom", failed=True)
        return ""
    torch.cuda._sleep(10 * LONG)
    event.record()
    with pytest.raises(CollectiveError) as caught:
        workers.patience.wait_for(event, time.monotonic())
    return str(caught.value)


def test_a_wait_for_the_device_ends_when_another_worker_fails(pool):
    assert pool.run(wait_for_one_that_has_failed)[0] == "rank 1 has failed meanwhile"


def train(options: dict) -> dict:
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(64, 64).to(DEVICE)
    rate = torch.tensor(0.01, device=DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=True)
    local_sgd = LocalSGD(optimizer, 4, module=model, total_steps=40, workers=WorkerGroup(device=DEVICE), **options)
    local_sgd.broadcast()
    rounds: list[Any] = []
    local_sgd.subscribe(rounds.append)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 64, device=DEVICE)).square().mean().backward()
        optimizer.step()
        local_sgd.step()
    local_sgd.average()
    return {"weights": [p.detach().cpu() for p in model.parameters()], "rates": [r.learning_rate for r in rounds]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stagger": True, "overlap": 2},
        {"reduce_dtype": "bf16"},
        {"reduce_dtype": "int4"},
        {"reduce_dtype": "int4", "optimizer_state": "estimate"},
        {"stagger": True, "overlap": 1, "optimizer_state": "estimate"},
    ],
    ids=str,
)
def test_ranks_on_one_gpu_end_with_the_same_weights_and_rates_that_are_tensors_are_recorded(pool, options):
    first, second = pool.run(train, options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first["weights"], second["weights"], strict=True))
    assert first["rates"]
    assert first["rates"] == pytest.approx([0.01] * len(first["rates"]))


def fail_on_the_device() -> tuple[str, str]:
    workers = WorkerGroup(device=DEVICE)
    torch.zeros(3, device=DEVICE)[torch.tensor([5], device=DEVICE)]
    try:
        workers.launch_table([1.0]).wait()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_an_error_of_this_workers_own_device_is_raised_unchanged():
    # In a process of its own, whose device is unusable afterwards.
    with torch.multiprocessing.get_context("spawn").Pool(1) as processes:
        kind, told = processes.apply(fail_on_the_device)
    assert kind != "CollectiveError"
    assert "device-side assert" in told
