"""PowerSGD and bf16: what arrives, and what is counted."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.baselines import BF16Strategy, PowerSGDStrategy
from benchmarks.baselines.bf16 import BF16Reducer
from benchmarks.baselines.powersgd import FIRST_STEP, PowerSGDReducer
from tests.training import identical, loader, seeded, trainer, weights

WIDTH, LAYERS = 40, 6


def reduced_on_a_rank(new_reducer, steps):
    """The rank's own gradient, and a reducer's result in each of several steps."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    network(inputs).square().sum().backward()
    own = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    reducer = new_reducer()
    ddp = DistributedDataParallel(network, bucket_cap_mb=25)
    ddp.register_comm_hook(reducer, type(reducer).reduce)
    gradients = []
    for _ in range(steps):
        ddp.zero_grad()
        ddp(inputs).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    return own, gradients, (reducer.steps, reducer.sent_bytes)


def new_power_1():
    return PowerSGDReducer(1)


def new_power_3():
    return PowerSGDReducer(3)


def new_power_of_all():
    return PowerSGDReducer(WIDTH)


@pytest.mark.workers
@pytest.mark.parametrize(("new_reducer", "matrix_rank"), [(new_power_1, 1), (new_power_3, 3)])
def test_powersgd_counts_thin_matrices_vectors_and_the_steps_before_it_begins(pool, new_reducer, matrix_rank):
    results = pool.run(reduced_on_a_rank, new_reducer, 5, workers=3)
    compressed = LAYERS * (2 * WIDTH * matrix_rank + WIDTH)
    whole = LAYERS * (WIDTH * WIDTH + WIDTH)
    for *_, (steps, sent_bytes) in results:
        assert steps == 5
        assert sent_bytes == pytest.approx(2 * 2 / 3 * 4 * (FIRST_STEP * whole + 3 * compressed), abs=1)


@pytest.mark.workers
def test_powersgd_is_exact_at_first_and_what_it_cuts_off_is_sent_later(pool):
    results = pool.run(reduced_on_a_rank, new_power_1, 40, workers=2)
    mean = torch.stack([own for own, *_ in results]).mean(dim=0)
    for _, gradients, _ in results:
        assert all(torch.equal(*pair) for pair in zip(gradients, results[0][1], strict=True))
        assert torch.allclose(gradients[0], mean, rtol=1e-4, atol=1e-4 * mean.abs().max())
        once, often = gradients[FIRST_STEP], torch.stack(gradients[FIRST_STEP:]).mean(dim=0)
        assert (once - mean).norm() > 0.1 * mean.norm()
        assert (often - mean).norm() < 0.5 * (once - mean).norm()


@pytest.mark.workers
def test_powersgd_does_not_compress_matrices_that_are_too_small(pool):
    results = pool.run(reduced_on_a_rank, new_power_of_all, 4, workers=2)
    mean = torch.stack([own for own, *_ in results]).mean(dim=0)
    assert torch.allclose(results[0][1][-1], mean, rtol=1e-4, atol=1e-4 * mean.abs().max())
    assert results[0][2][1] == 4 * 4 * len(mean)


@pytest.mark.workers
def test_bf16_sends_half_and_rounds(pool):
    results = pool.run(reduced_on_a_rank, BF16Reducer, 3, workers=3)
    mean = torch.stack([own for own, *_ in results]).mean(dim=0)
    for _, gradients, counts in results:
        assert counts == (3, 3 * round(2 * 2 / 3 * 2 * len(mean)))
        assert torch.equal(gradients[-1], results[0][1][-1])
        assert 0 < (gradients[-1] - mean).norm() < 2**-6 * mean.norm()


def fit_compressed(new_strategy):
    strategy, model = new_strategy(), seeded(lr=0.3)
    fitted = trainer(strategy, max_epochs=1)
    fitted.fit(model, loader())
    buckets = strategy._ddp_kwargs.get("bucket_cap_mb")
    return weights(model), fitted.global_step, (strategy.steps, strategy.sent_bytes), buckets


@pytest.mark.workers
@pytest.mark.parametrize("new_strategy", [PowerSGDStrategy, BF16Strategy])
def test_training_with_compressed_gradients_keeps_ranks_alike(pool, new_strategy):
    ranks = pool.run_trainer(fit_compressed, new_strategy)
    kept = [{name: values for name, values in rank[0].items() if "running" not in name} for rank in ranks]
    assert identical(kept)
    for _, steps, (counted, sent_bytes), buckets in ranks:
        assert counted == steps
        assert sent_bytes > 0
        assert buckets == (1 if new_strategy is PowerSGDStrategy else None)


@pytest.mark.parametrize("new_strategy", [PowerSGDStrategy, BF16Strategy])
def test_strategy_can_be_pickled_as_spawn_does(new_strategy):
    strategy = pickle.loads(pickle.dumps(new_strategy()))
    assert strategy._get_reducer() is strategy._reducer
    assert (strategy.steps, strategy.sent_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (0, r"PowerSGDStrategy\(matrix_rank=0\): expected an int of at least 1"),
        (2.0, "matrix_rank=2.0.*expected an int .*got float. Pass for example 2"),
        (True, "got bool"),
    ],
)
def test_wrong_rank_is_named_with_what_is_expected(value, named):
    with pytest.raises(ValueError, match=named):
        PowerSGDStrategy(value)
