"""Models whose code re-assigns buffers and re-points ``p.data``: rounds average the current values."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import LocalSGD
from lightning_adpsgd.averaging.averager import Terms
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout
from lightning_adpsgd.averaging.tensors import TensorTracker
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.workers.group import WorkerGroup

pytestmark = pytest.mark.workers

TRANSPORTS = {
    "plain": {},
    "stagger": {"stagger": True},
    "overlap": {"overlap": 2},
    "both": {"stagger": True, "overlap": 1},
    "bf16": {"reduce_dtype": "bf16"},
    "bf16 both": {"reduce_dtype": "bf16", "stagger": True, "overlap": 1},
}
STEPS = 17


class Moving(nn.Module):
    """A parameter that is kept within bounds, and a moving average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 35).reshape(5, 7))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("ema", torch.zeros(5, 7))

    def follow(self, *, reassigned: bool) -> None:
        ema = 0.9 * self.ema + 0.1 * self.weight.detach()
        bounded = self.weight.data.clamp(-1.5, 1.5)
        if reassigned:
            self.ema = ema
            self.weight.data = bounded
        else:
            self.ema.copy_(ema)
            self.weight.data.copy_(bounded)


def train(options: dict, ranks: tuple[int, ...]) -> dict:
    model = Moving()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 4, module=model, **options)
    rounds = []
    local_sgd.subscribe(rounds.append)
    local_sgd.broadcast()
    history = []
    for step in range(STEPS):
        model.follow(reassigned=dist.get_rank() in ranks)
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        local_sgd.optimizer.step()
        local_sgd.step()
        history.append(torch.cat([tensor.detach().flatten().clone() for tensor in model.state_dict().values()]))
    bytes_before = local_sgd.workers.payload_bytes
    local_sgd.average("validation")
    history.append(torch.cat([tensor.detach().flatten().clone() for tensor in model.state_dict().values()]))
    told = [(r.step, r.trigger, r.variance, r.ratio, r.payload_bytes) for r in rounds]
    return {"history": torch.stack(history), "rounds": told, "bytes": bytes_before}


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["on all ranks", "on one rank"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_reassigned_is_averaged_like_what_is_changed_in_place(pool, transport, ranks):
    in_place = pool.run(train, TRANSPORTS[transport], ())
    reassigned = pool.run(train, TRANSPORTS[transport], ranks)
    for expected, outcome in zip(in_place, reassigned, strict=True):
        assert torch.equal(outcome["history"], expected["history"])
        assert outcome["rounds"] == expected["rounds"]
        assert outcome["bytes"] == expected["bytes"]
        assert len(outcome["rounds"]) >= STEPS // 4
    assert torch.equal(reassigned[0]["history"][-1], reassigned[1]["history"][-1])


def turn() -> dict:
    """From the second round on, one rank keeps a weight in another memory order."""
    parameter = nn.Parameter(torch.zeros(3, 4))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 1)
    for step in range(4):
        if step >= 1 and dist.get_rank() == 1:
            parameter.data = parameter.data.t().contiguous().t()
        parameter.grad = -torch.arange(12.0).reshape(3, 4) * (1 + dist.get_rank())
        local_sgd.optimizer.step()
        local_sgd.step()
    return {"value": parameter.detach().contiguous(), "stride": parameter.stride()}


def test_a_weight_in_another_memory_order_on_one_rank_is_averaged_element_by_element(pool):
    first, second = pool.run(turn)
    assert first["stride"] != second["stride"]
    for outcome in (first, second):
        torch.testing.assert_close(outcome["value"], 6.0 * torch.arange(12.0).reshape(3, 4))


def expand(options: dict) -> list[list[float]]:
    """From the fourth step on, a buffer is one row, expanded."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3))
    model.register_buffer("rows", torch.zeros(4, 3))
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=1.0), 2, module=model, **options)
    for step in range(8):
        row = torch.full((3,), float(dist.get_rank() + step))
        model.rows = row.expand(4, 3) if step >= 3 else row.repeat(4, 1)
        if step == 5:
            local_sgd.average()
            local_sgd.broadcast()
        model.weight.grad = torch.ones(3)
        local_sgd.optimizer.step()
        local_sgd.step()
    local_sgd.average()
    return model.rows.tolist()


@pytest.mark.parametrize("options", [{}, {"stagger": True, "overlap": 1}], ids=str)
def test_a_buffer_may_become_an_expanded_one(pool, options):
    assert pool.run(expand, options) == [[[7.5] * 3] * 4] * 2


def freeze(options: dict) -> dict:
    """In mid-training a layer is unfrozen, then a parameter group is added."""
    layers = [nn.Parameter(torch.full((2000,), 100.0)) for _ in range(3)]
    layers[1].requires_grad_(False)
    local_sgd = LocalSGD(torch.optim.SGD(layers[:2], lr=1.0), 2, **options)
    rounds = []
    local_sgd.subscribe(rounds.append)
    local_sgd.broadcast()
    change = 1.0 + 2.0**-11 + 2.0**-13
    for step in range(90):
        if step == 30:
            layers[1].requires_grad_(True)
        if step == 60:
            local_sgd.optimizer.add_param_group({"params": [layers[2]]})
        for layer in layers:
            layer.grad = torch.full_like(layer, -change * (1 + dist.get_rank())) if layer.requires_grad else None
        local_sgd.optimizer.step()
        local_sgd.step()
    return {"layers": torch.stack([layer.detach() for layer in layers]), "bytes": [r.payload_bytes for r in rounds]}


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"overlap": 1}, {"stagger": True, "overlap": 1}], ids=str)
def test_rounding_residuals_are_not_lost_when_layers_are_unfrozen_or_added(pool, options):
    exact = pool.run(freeze, options)
    halved = pool.run(freeze, {"reduce_dtype": "bf16", **options})
    for ours, theirs in zip(halved, exact, strict=True):
        assert (ours["layers"] - theirs["layers"]).abs().max() < 2.0**-6  # the residual that one round may leave
        assert len(ours["bytes"]) == len(theirs["bytes"])
        # New layers are sent unencoded once; from then on changes are sent.
        assert ours["bytes"][-1] < 0.6 * theirs["bytes"][-1]
        assert ours["bytes"][19] < 0.65 * theirs["bytes"][19]


def know_apart(options: dict) -> list[float]:
    """One rank takes its own values for the last average; the other rank does not know them."""
    parameter = nn.Parameter(torch.full((300,), float(dist.get_rank())))
    local_sgd = LocalSGD(torch.optim.SGD([parameter], lr=1.0), 2, reduce_dtype="bf16", **options)
    if dist.get_rank() == 0:
        local_sgd.mark_synchronized()
    for _ in range(8):
        parameter.grad = torch.full_like(parameter, -1.0 - dist.get_rank())
        local_sgd.optimizer.step()
        local_sgd.step()
    local_sgd.average()
    return parameter.tolist()


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"overlap": 1}, {"stagger": True, "overlap": 1}], ids=str)
def test_changes_are_sent_only_relative_to_an_average_that_all_workers_know(pool, options):
    assert pool.run(know_apart, options) == [pytest.approx([0.5 + 1.5 * 8] * 300)] * 2


def lay_out_differently() -> None:
    """A frozen weight, in another memory order on one rank, is unfrozen."""
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    if dist.get_rank() == 1:
        model.weight.data = model.weight.data.t().contiguous().t()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=1.0), 1, module=model)
    local_sgd.broadcast()
    model.weight.requires_grad_(True)
    local_sgd.step()


def test_a_difference_in_memory_order_alone_is_reported(pool):
    for outcome in pool.outcomes(lay_out_differently):
        assert outcome.kind == "WorkersDisagreeError"
        assert "parameter group 0, order in memory (0, 1)), rank 1 has weight" in outcome.error
        assert "parameter group 0, order in memory (1, 0))" in outcome.error


class Doubled(Update):
    """Continues from twice the mean; records how many elements are averaged."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start(self, layout: FlatLayout) -> None:
        self.sizes.append(sum(map(len, layout.cut_into_spaces())))

    def apply(self, bucket: Bucket, mean: torch.Tensor) -> torch.Tensor:
        return mean.mul_(2.0)


def update_with_doubled() -> tuple[list[int], list[float], list[float]]:
    first, second = (nn.Parameter(torch.full((3,), float(dist.get_rank()))) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=1.0)
    update = Doubled()
    tracker = TensorTracker(
        optimizer, buffers_of=None, names_of=None, workers=WorkerGroup(), bucket_bytes=8, update=update
    )
    asked_for = Terms(WorkerGroup().all_contribute, as_it_is=False)
    tracker.current().averager.average(asked_for)
    optimizer.add_param_group({"params": [second]})
    tracker.current().averager.average(asked_for)
    return update.sizes, first.tolist(), second.tolist()


def test_an_update_is_told_what_is_averaged_and_replaces_every_mean(pool):
    assert pool.run(update_with_doubled) == [([3, 6], [2.0] * 3, [1.0] * 3)] * 2
