"""The examples of docs/extend.md run unchanged, and do what the page says."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adpsgd import AveragingOptions, ConstantPeriod, LocalSGD, Update, WorkerGroup
from lightning_adpsgd.session import TrainingSession

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
EXAMPLES = ["PlateauPeriod", "SignCodec", "SlowMomentum"]


def code_of(name: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(block for block in blocks if f"class {name}(" in block)


def example(name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(code_of(name), namespace)
    return namespace[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    assert len([line for line in code_of(name).splitlines() if line.strip()]) < 40


def started(length: int = 1000, **options: Any) -> tuple[LocalSGD, nn.Parameter]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(length))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=0.1), **options)
    local_sgd.broadcast()
    return local_sgd, parameter


def step(local_sgd: LocalSGD, parameter: nn.Parameter, count: int) -> None:
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + count)
    parameter.grad = torch.randn(parameter.shape, generator=generator)
    local_sgd.optimizer.step()
    local_sgd.step()


def with_a_rule() -> list[tuple[int, float]]:
    rule = example("PlateauPeriod")(initial=2, maximum=8)
    local_sgd, parameter = started(period=rule)
    seen = []
    for count, loss in enumerate([5.0, 4.0, 4.0, 3.0, 2.0, 2.5, 2.0, 2.0, 2.0, 2.0]):
        rule.loss = torch.tensor(loss + dist.get_rank())  # 0.5 more on average
        step(local_sgd, parameter, count)
        seen.append((rule.value, rule.lowest))
    return seen


@pytest.mark.workers
def test_a_rule_decides_by_the_mean_of_its_scalars(pool):
    first, second = pool.run(with_a_rule)
    assert first == second
    inf = float("inf")
    assert first == [
        *[(2, inf), (2, 4.5), (2, 4.5), (2, 3.5), (2, 3.5), (2, 3.0), (2, 3.0)],
        *[(2, 2.5), (2, 2.5), (4, 2.5)],  # at the tenth step the loss is what it was two steps before
    ]


def with_a_codec(spread: dict[str, Any], codec: bool) -> tuple[torch.Tensor, int]:
    options = {"reduce_dtype": example("SignCodec")()} if codec else {}
    local_sgd, parameter = started(10_000, period=2, **options, **spread)
    records: list[Any] = []
    local_sgd.subscribe(records.append)
    for count in range(12):
        step(local_sgd, parameter, count)
    sent = sum(record.payload_bytes for record in records)
    local_sgd.average()
    return parameter.detach(), sent


@pytest.mark.workers
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("spread", [{}, {"stagger": True, "overlap": 1}])
def test_a_codec_sends_few_bytes_and_loses_nothing(pool, spread, workers):
    plain = pool.run(with_a_codec, spread, False, workers=workers)
    outcomes = pool.run(with_a_codec, spread, True, workers=workers)
    for parameter, sent in outcomes:
        assert torch.equal(parameter, outcomes[0][0])
        torch.testing.assert_close(parameter, plain[0][0], rtol=0, atol=0.02)
        assert not torch.equal(parameter, plain[0][0])
        assert 0.03 < sent / plain[0][1] < 0.07


def with_an_update(beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters after three rounds, and those computed by hand."""
    local_sgd, parameter = started(period=3, update=example("SlowMomentum")(beta))
    anchor, velocity = parameter.detach().clone(), torch.zeros(1000)
    for count in range(9):
        step(local_sgd, parameter, count)
        if count % 3 == 2:
            steps = [
                torch.randn(1000, generator=torch.Generator().manual_seed(100 * rank + taken))
                for rank in range(dist.get_world_size())
                for taken in range(count - 2, count + 1)
            ]
            change = 0.1 * torch.stack(steps).sum(dim=0) / dist.get_world_size()
            velocity = beta * velocity + (change if count > 2 else 0.0)
            anchor = anchor - (velocity if count > 2 else change)
    return parameter.detach(), anchor


@pytest.mark.workers
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_update_takes_the_place_of_the_mean(pool, beta, workers):
    for parameter, by_hand in pool.run(with_an_update, beta, workers=workers):
        torch.testing.assert_close(parameter, by_hand, rtol=0, atol=1e-5)


def spread_update(momentum: float) -> list[float]:
    parameter = nn.Parameter(torch.zeros(4))
    update = example("SlowMomentum")(momentum)
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 2, update=update, stagger=True, overlap=1)
    for _ in range(8):
        parameter.grad = torch.full((4,), -1.0 - dist.get_rank())
        local_sgd.optimizer.step()
        local_sgd.step()
    return parameter.tolist()


@pytest.mark.workers
def test_fragments_in_flight_are_updated_too(pool):
    plain, moved = pool.run(spread_update, 0.0), pool.run(spread_update, 0.5)
    assert all(a > b for rank in range(2) for a, b in zip(moved[rank], plain[rank], strict=True))


@pytest.mark.parametrize("value", ["int3", torch.bfloat16, example("SignCodec")])
def test_a_value_that_is_no_codec_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="reduce_dtype="):
        AveragingOptions(reduce_dtype=value)


@pytest.mark.parametrize("value", ["adopt", example("SlowMomentum")])
def test_a_value_that_is_no_update_is_refused(value):
    with pytest.raises(TypeError, match="update="):
        AveragingOptions(update=value)


class Returns(Update):
    """Returns something made from the mean."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def apply(self, bucket: Any, mean: Tensor) -> Any:
        return self.make(mean)


def what_is_said_of(name: str) -> str:
    make = {
        "nothing": lambda mean: None,
        "too few": lambda mean: mean[:-1],
        "other numbers": lambda mean: mean.double(),
    }[name]
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local_sgd = LocalSGD(optimizer, 1, module=model, update=Returns(make), total_steps=3)
    model(torch.ones(1, 3) * (1 + dist.get_rank())).sum().backward()
    optimizer.step()
    with pytest.raises((TypeError, ValueError)) as error:
        local_sgd.step()
    return str(error.value)


@pytest.mark.workers
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("nothing", "Returns.apply returned NoneType"),
        ("too few", r"a tensor of shape \(7,\), torch.float32"),
        ("other numbers", r"a tensor of shape \(8,\), torch.float64"),
    ],
)
def test_a_result_that_cannot_replace_the_mean_is_refused_with_what_was_expected(pool, name, given):
    for said in pool.run(what_is_said_of, name):
        assert re.search(given, said)
        assert re.search(r"expected a tensor of shape \(8,\), torch.float32, on cpu", said)


def test_an_update_that_cannot_be_copied_is_refused_by_its_name():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"update: Returns cannot be copied .*each optimizer gets its own copy"):
        TrainingSession(
            [torch.optim.SGD(model.parameters(), lr=0.1)],
            ConstantPeriod(2),
            AveragingOptions(update=Returns(threading.Lock())),
            module=model,
            workers=WorkerGroup(),
        )
