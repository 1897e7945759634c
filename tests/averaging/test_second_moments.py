"""Second moments from which the noise is taken that the mean over the workers does not have."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import ConstantPeriod, LocalSGD

STEPS = 80
BETAS = (0.9, 0.99)


def moments(signal: float, policy: str, options: dict[str, Any], class_: str = "AdamW") -> dict[str, Any]:
    """Train on gradients of which ``signal`` is the mean and 1 the variance; with and without full communication."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 4))
    settings = {"lr": 1e-3, "betas": BETAS} | ({"weight_decay": 0.0} if class_ == "AdamW" else {})
    full = policy == "full"
    optimizer = getattr(torch.optim, class_)(model.parameters(), **settings)
    state = "local" if full else policy
    local_sgd = LocalSGD(optimizer, ConstantPeriod(2), module=model, optimizer_state=state, **options)
    torch.manual_seed(dist.get_rank() + 1)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = signal + torch.randn_like(parameter)
            if full:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        if not full:
            local_sgd.step()
    found = torch.cat([optimizer.state[each]["exp_avg_sq"].flatten() for each in model.parameters()])
    return {"mean": float(found.mean()), "state": local_sgd.state_dict()}


def compare(signal: float, options: dict[str, Any], class_: str) -> list[float]:
    return [moments(signal, policy, options, class_)["mean"] for policy in ("full", "local", "estimate")]


@pytest.mark.parametrize(
    ("options", "class_", "signal"),
    [
        ({}, "AdamW", 1.0),
        ({}, "NAdam", 0.0),
        ({"reduce_dtype": "int4"}, "AdamW", 0.2),
        ({"stagger": True, "overlap": 1}, "Adam", 0.0),
    ],
    ids=str,
)
def test_they_become_those_of_full_communication(
    pool: Any, options: dict[str, Any], class_: str, signal: float
) -> None:
    for full, local, estimated in pool.run(compare, signal, options, class_, workers=4):
        expected = (signal**2 + 1.0) / (signal**2 + 0.25)
        assert local / full == pytest.approx(expected, rel=0.05)
        assert estimated / full == pytest.approx(1.0, abs=0.2)


def shares(policy: str) -> tuple[list[float], list[float]]:
    """What is kept of second moments in a checkpoint, and what a run makes of it that goes on."""
    state = moments(0.0, policy, {})["state"]
    other = LocalSGD(torch.optim.AdamW([nn.Parameter(torch.zeros(3))], lr=0.1), 2, optimizer_state=policy)
    other.load_state_dict(state)
    return state["second_moments"]["shares"], other.state_dict()["second_moments"]["shares"]


def test_how_much_was_taken_is_in_the_checkpoint(pool: Any) -> None:
    outcomes = pool.run(shares, "estimate", workers=2)
    assert outcomes[0] == outcomes[1]  # all workers take the same
    for kept, loaded in outcomes:
        assert loaded == kept
        assert 0.5 <= kept[0] < 0.7
    assert [kept for kept, _ in pool.run(shares, "local", workers=2)] == [[], []]
