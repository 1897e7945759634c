"""Second moments from which the noise is taken that the mean over the workers does not have."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import ConstantPeriod, LocalSGD

STEPS = 200
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


@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "class_"),
    [
        ({}, "AdamW"),
        ({}, "NAdam"),
        ({"reduce_dtype": "int4"}, "AdamW"),
        ({"stagger": True}, "AdamW"),
        ({"stagger": True, "overlap": 1}, "Adam"),
    ],
    ids=str,
)
def test_they_become_those_of_full_communication(
    pool: Any, signal: float, options: dict[str, Any], class_: str
) -> None:
    for full, local, estimated in pool.run(compare, signal, options, class_, workers=4):
        assert full == pytest.approx(signal**2 + 0.25, rel=0.05)
        assert local == pytest.approx(signal**2 + 1.0, rel=0.05)
        print(estimated / full)
        assert estimated == pytest.approx(full, rel=0.15)
