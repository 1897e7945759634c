import math
import pickle

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.baselines import QSGDStrategy
from benchmarks.baselines.qsgd import LEVELS, QSGDCodec, QSGDReducer
from tests.training import identical, loader, seeded, trainer, weights

CODEC = QSGDCodec()
DDP_BUCKETS = pytest.mark.parametrize("bucket_cap_mb", [0.001, 25.0], ids=["many_buckets", "one_bucket"])


def a_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_values(numel, seed=1):
    return torch.randn(numel, generator=a_generator(seed))


def quantized(values, codec=CODEC, generator=None):
    return codec.decode(codec.encode(values, generator or a_generator()))[: len(values)]


# What QSGD sends for a bucket


@pytest.mark.parametrize("bucket_size", [1, 3, 64, 512])
def test_mean_of_many_draws_is_the_value(bucket_size):
    codec, generator, draws = QSGDCodec(bucket_size), a_generator(), 400
    values = some_values(bucket_size)
    mean = sum(quantized(values, codec, generator).double() for _ in range(draws)) / draws
    # The error of the mean has this variance; its square exceeds ten times that with a chance of one in ten at most,
    # and much less where many elements add up. The draws are always the same.
    variance = min(bucket_size / LEVELS**2, bucket_size**0.5 / LEVELS) * values.norm() ** 2 / draws
    assert (mean - values).square().sum() <= 10 * variance
    assert (mean - values).abs().max() <= 6 * values.norm() / (2 * LEVELS * draws**0.5)


def test_mean_squared_error_keeps_the_bound_of_the_paper():
    generator, values = a_generator(), some_values(512)
    errors = [(quantized(values, generator=generator) - values).square().sum().item() for _ in range(100)]
    bound = min(512 / LEVELS**2, 512**0.5 / LEVELS) * values.norm().item() ** 2
    assert 0.1 * bound < sum(errors) / len(errors) < bound


def test_no_draw_is_off_by_a_level_or_more():
    values = some_values(4 * 512)
    errors = (quantized(values) - values).view(4, 512).abs().amax(dim=1)
    assert (errors < values.view(4, 512).norm(dim=1) / LEVELS * 1.00001).all()


def test_draws_differ_and_a_seed_repeats_them():
    generator, values = a_generator(), some_values(512)
    first, second = quantized(values, generator=generator), quantized(values, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, quantized(values))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_only_value_of_a_bucket_stays_what_it_is(scale, sign):
    # The norm is that value, to fp32's precision: one level too much would be an int8 of the other sign.
    for mantissa in torch.linspace(1, 2, 50):
        values = torch.zeros(512)
        values[17] = sign * scale * mantissa
        assert torch.allclose(quantized(values), values, rtol=1e-6, atol=0)


def test_codes_reach_to_127_and_no_further():
    one_hot = torch.eye(512)[:4].flatten()
    wire = CODEC.encode(torch.cat([one_hot, -one_hot]), a_generator())
    codes = wire[:, :512].view(torch.int8)
    assert (codes.min(), codes.max()) == (-127, 127)


def test_zeros_stay_zeros():
    values = torch.cat([torch.zeros(512), some_values(512)])
    decoded = quantized(values)
    assert torch.equal(decoded[:512], torch.zeros(512))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_comes_out_not_finite_and_stays_in_its_bucket(hole):
    values = some_values(3 * 512)
    values[600] = hole
    finite = quantized(values).isfinite().view(3, 512)
    assert not finite[1, 88]
    assert finite[[0, 2]].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_fp32(dtype):
    values = (1e3 * some_values(512)).to(dtype)  # the norm's square is beyond fp16
    assert torch.equal(quantized(values), quantized(values.float()))


@pytest.mark.parametrize(("numel", "rows"), [(0, 0), (1, 1), (511, 1), (512, 1), (513, 2), (5 * 512 + 7, 6)])
def test_last_bucket_need_not_be_full(numel, rows):
    wire = CODEC.encode(some_values(numel), a_generator())
    assert wire.shape == (rows, 516)
    decoded = CODEC.decode(wire)
    assert decoded.shape == (rows * 512,)
    assert (decoded[numel:] == 0).all()


def test_bytes_are_516_for_2048():
    values = some_values(2**16)
    wire = CODEC.encode(values, a_generator())
    assert wire.dtype == torch.uint8
    assert wire.numel() / (values.numel() * values.element_size()) == 516 / 2048


def test_values_and_the_global_random_state_are_left_alone():
    values = some_values(1024)
    before, state = values.clone(), torch.get_rng_state()
    quantized(values)
    assert torch.equal(values, before)
    assert torch.equal(torch.get_rng_state(), state)


# On several workers


def a_network(width):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))


def reduced_on_a_rank(width, bucket_cap_mb, steps, dtype=torch.float32, seed=0):
    """Gradients as DDP leaves them with QSGD, and the rank's own ones."""
    network, rank = a_network(width).to(dtype), dist.get_rank()
    inputs = torch.randn(8, width, generator=a_generator(rank)).to(dtype)
    network(inputs).square().sum().backward()
    own = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    reducer = QSGDReducer(QSGDCodec(), seed)
    ddp = DistributedDataParallel(network, bucket_cap_mb=bucket_cap_mb)
    sizes, rows = [], 0

    def reduce(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel())
        return state.reduce(bucket)

    ddp.register_comm_hook(reducer, reduce)
    for _ in range(steps):
        ddp.zero_grad()
        sizes.clear()
        random_state = torch.get_rng_state()
        ddp(inputs).square().sum().backward()
        assert torch.equal(torch.get_rng_state(), random_state)
        rows += sum(map(reducer._codec.rows, sizes))
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    return own, gradient, sizes, (reducer.steps, reducer.sent_bytes, rows)


@pytest.mark.workers
@DDP_BUCKETS
def test_every_rank_has_the_same_gradients_close_to_the_mean(pool, bucket_cap_mb):
    results = pool.run(reduced_on_a_rank, 40, bucket_cap_mb, 3, workers=3)
    mean = torch.stack([own for own, *_ in results]).mean(dim=0)
    for _, gradient, sizes, _ in results:
        assert len(sizes) == (1 if bucket_cap_mb > 1 else 6)
        assert torch.equal(gradient, results[0][1])
        # Two quantizations of ‖·‖²·d/s² at most; the first is averaged over three ranks.
        assert (gradient - mean).norm() < 2 * 512**0.5 / LEVELS * mean.norm()
        assert not torch.equal(gradient, mean)


@pytest.mark.workers
@pytest.mark.parametrize("workers", [2, 3])
@DDP_BUCKETS
def test_each_rank_sends_a_quarter_of_what_a_ring_sends(pool, workers, bucket_cap_mb):
    results = pool.run(reduced_on_a_rank, 150, bucket_cap_mb, 4, workers=workers)
    ring_bytes = 4 * 2 * (workers - 1) / workers * 4 * len(results[0][0])
    for *_, (steps, sent_bytes, rows) in results:
        assert steps == 4
        assert sent_bytes == pytest.approx(2 * (workers - 1) / workers * rows * 516, rel=0.02)
        assert sent_bytes == pytest.approx(0.252 * ring_bytes, rel=0.05)
    assert sum(counts[1] for *_, counts in results) == 2 * (workers - 1) * results[0][-1][2] * 516


@pytest.mark.workers
def test_gradient_of_fewer_buckets_than_ranks_arrives(pool):
    for own, gradient, _, _ in pool.run(reduced_on_a_rank, 3, 25.0, 1, workers=3):
        assert gradient.shape == own.shape
        assert gradient.any()


@pytest.mark.workers
def test_gradients_in_half_precision_come_back_in_it(pool):
    results = pool.run(reduced_on_a_rank, 40, 25.0, 1, torch.bfloat16, workers=2)
    mean = torch.stack([own.float() for own, *_ in results]).mean(dim=0)
    for _, gradient, _, _ in results:
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, results[0][1])
        assert (gradient - mean).norm() < 0.3 * mean.norm()


@pytest.mark.workers
def test_one_worker_keeps_its_gradients_and_sends_nothing(pool):
    ((own, gradient, _, counts),) = pool.run(reduced_on_a_rank, 40, 0.001, 2, workers=1)
    assert torch.equal(gradient, own)
    assert counts[:2] == (2, 0)


def mean_error(steps):
    """Of many reductions of the same gradients, in which the ranks' errors should be independent."""
    own = torch.ones(4096) if dist.get_rank() == 0 else -torch.ones(4096)
    generator = QSGDReducer(CODEC, 0)
    return torch.stack([CODEC.decode(generator._encode(own)) - own for _ in range(steps)])


@pytest.mark.workers
def test_errors_of_two_ranks_are_independent(pool):
    first, second = (errors.flatten() for errors in pool.run(mean_error, 4, workers=2))
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(correlation) < 5 / len(first) ** 0.5


def fail_in_the_hook(bucket_cap_mb):
    def fail(*_):
        raise ArithmeticError("on purpose")

    network = a_network(40)
    ddp = DistributedDataParallel(network, bucket_cap_mb=bucket_cap_mb)
    reducer = QSGDReducer(CODEC, 0)
    reducer._average = fail
    ddp.register_comm_hook(reducer, QSGDReducer.reduce)
    ddp(torch.ones(1, 40)).sum().backward()


@pytest.mark.workers
@DDP_BUCKETS
def test_error_in_the_hook_ends_the_backward_pass(pool, bucket_cap_mb):
    for outcome in pool.outcomes(fail_in_the_hook, bucket_cap_mb, workers=2):
        assert "on purpose" in outcome.error


# As a strategy


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())


def fit_quantized(strategy_of):
    strategy, losses, model = strategy_of(), Losses(), seeded(lr=0.3)
    fitted = trainer(strategy, callbacks=[losses], max_epochs=3)
    fitted.fit(model, loader())
    numel = sum(parameter.numel() for parameter in model.parameters())
    counts = (strategy.steps, strategy.sent_bytes) if isinstance(strategy, QSGDStrategy) else None
    return losses.losses, weights(model), fitted.global_step, numel, counts


@pytest.mark.workers
def test_training_with_quantized_gradients_is_close_to_ddp_and_lowers_the_loss(pool):
    ranks = pool.run_trainer(fit_quantized, QSGDStrategy)
    losses, state, steps, numel, _ = ranks[0]
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    assert identical([{name: values for name, values in rank[1].items() if "running" not in name} for rank in ranks])
    rows = CODEC.rows(numel)
    assert [rank[-1][0] for rank in ranks] == [steps, steps]
    assert sum(rank[-1][1] for rank in ranks) == steps * 2 * rows * 516
    reference = pool.run_trainer(fit_quantized, DDPStrategy)[0]
    assert losses[0] == pytest.approx(reference[0][0])  # the same weights and the same batch
    assert sum(losses[-8:]) == pytest.approx(sum(reference[0][-8:]), rel=0.1)
    assert not torch.equal(state["net.0.weight"], reference[1]["net.0.weight"])


def test_strategy_can_be_pickled_as_spawn_does():
    strategy = pickle.loads(pickle.dumps(QSGDStrategy(bucket_size=64, seed=3)))
    assert strategy._get_reducer() is strategy._reducer
    assert (strategy.steps, strategy.sent_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bucket_size": 0}, r"QSGDStrategy\(bucket_size=0\): expected an int from 1 to .*Pass for example 512"),
        ({"bucket_size": 2.5}, r"bucket_size=2.5\): expected an int .*got float"),
        ({"bucket_size": True}, r"bucket_size=True\): expected an int .*got bool"),
        ({"seed": -1}, r"QSGDStrategy\(seed=-1\): expected an int from 0 to"),
        ({"seed": 2**70}, "seed=.*expected an int from 0 to"),
        ({"ddp_comm_hook": print}, r"ddp_comm_hook=<built-in.*expected None.*registers its own hook"),
    ],
)
def test_wrong_argument_is_named_with_what_is_expected(arguments, named):
    with pytest.raises(ValueError, match=named):
        QSGDStrategy(**arguments)
