"""What all workers hold alike stays as it is, bit for bit, for any number of workers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import LocalSGD, NodeWorkers
from lightning_adpsgd.averaging.alike import Blocks
from lightning_adpsgd.averaging.workers import Workers

pytestmark = pytest.mark.workers

TRANSPORTS = ({}, {"stagger": True, "overlap": 1}, {"overlap": 2}, {"reduce_dtype": "bf16"}, {"bucket_size_mb": 0.01})


class Masked(nn.Module):
    """Parameters and buffers that nothing changes, beside one that is trained on every worker."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        limits = torch.finfo(torch.float32)
        self.trained = nn.Parameter(torch.randn(70, 100, generator=generator))
        self.unused = nn.Parameter(torch.randn(33, 100, generator=generator))
        self.wide = nn.Parameter(torch.randn(9, generator=generator, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(9, generator=generator).bfloat16())
        self.limits = nn.Parameter(torch.tensor([limits.min, limits.max, 0.1]))
        self.register_buffer("mask", torch.full((5, 5), limits.min).triu(1))
        self.register_buffer("infinite", torch.full((5, 5), -torch.inf).triu(1))
        self.register_buffer("constants", torch.randn(5000, generator=generator))
        self.register_buffer("moving", torch.zeros(3))


def hold(ranks_per_node: int = 1) -> list[list[str]]:
    """The names of what has changed, for each transport."""
    changed = []
    workers = NodeWorkers(ranks_per_node) if ranks_per_node > 1 else Workers()
    for options in TRANSPORTS:
        model = Masked()
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 3, module=model, workers=workers, **options)
        local_sgd.broadcast()
        generator = torch.Generator().manual_seed(workers.worker_of(dist.get_rank()))
        for step in range(14):
            model.trained.grad = torch.randn(70, 100, generator=generator)
            model.moving += dist.get_rank()
            if step == 8:
                model.mask *= 0.5  # on all workers
            local_sgd.optimizer.step()
            local_sgd.step()
            if step == 9:
                local_sgd.average("validation")
        start["mask"] *= 0.5
        state = model.state_dict()
        changed.append([name for name in start if not torch.equal(state[name], start[name])])
    return changed


@pytest.mark.parametrize("workers", [3, 5, 6, 7, 10])
def test_what_all_workers_hold_alike_stays_bit_for_bit(pool, workers):
    for changed in pool.run(hold, workers=workers):
        assert changed == [["trained", "moving"]] * len(TRANSPORTS)


def test_what_all_nodes_hold_alike_stays_bit_for_bit(pool):
    for changed in pool.run(hold, 2, workers=6):
        assert changed == [["trained", "moving"]] * len(TRANSPORTS)


def near_the_limit() -> float:
    parameter = nn.Parameter(torch.full((2,), torch.finfo(torch.float32).min))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1)
    parameter.data[1] = dist.get_rank()  # so that the block is not alike
    parameter.grad = torch.zeros(2)
    local_sgd.optimizer.step()
    local_sgd.step()
    return parameter[0].item()


def test_a_mean_of_finite_numbers_is_finite(pool):
    assert pool.run(near_the_limit, workers=10) == [torch.finfo(torch.float32).min] * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_end_where_tensors_do_and_are_told_apart_by_a_single_bit(dtype):
    values = torch.randn(200_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(len(values), [0, 5, 4096, 100_000])
    plain = Workers()
    assert blocks.compare(values, None, plain).wait().all()
    before = blocks._fingerprints(values)
    for place in (0, 4, 5, 4095, 4096, 99_999, 100_000, 199_999):
        changed = values.clone()
        changed.view(torch.int32)[place * values.itemsize // 4] ^= 1
        differs = (blocks._fingerprints(changed) != before).nonzero().flatten().tolist()
        assert len(differs) == 1
        ends = blocks._ends.tolist()
        assert place in range([0, *ends][differs[0]], ends[differs[0]])
    owed = torch.zeros_like(values)
    owed[7] = 1e-30
    alike = blocks.compare(values, owed, plain).wait()
    assert not alike[5:4096].any()
    assert alike[:5].all()
    assert alike[4096:].all()
