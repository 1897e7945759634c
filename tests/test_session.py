"""A session without Lightning: several optimizers, their rounds, and what a checkpoint needs of them."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import AdaptivePeriod, AveragingOptions, ConstantPeriod, WorkerGroup, WorkersDisagreeError
from lightning_adpsgd.session import TrainingSession

pytestmark = pytest.mark.workers


def new_session(options: dict[str, Any], period: Any = None) -> TrainingSession:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizers = [torch.optim.SGD(model[:2].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.01)]
    return TrainingSession(
        optimizers, period or ConstantPeriod(3), AveragingOptions(**options), module=model, workers=WorkerGroup()
    )


def train(session: TrainingSession, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + step)
        session.note_forward()
        session.module(torch.randn(8, 4, generator=generator)).square().sum().backward()
        for local_sgd in session.local_sgd:
            local_sgd.optimizer.step()
            local_sgd.optimizer.zero_grad()
            assert session.of(local_sgd.optimizer) is local_sgd
            session.step(local_sgd)


def run(options: dict[str, Any]) -> dict[str, Any]:
    session = new_session(options)
    session.setup(20)
    heard: list[tuple[int, str]] = []
    session.subscribe(lambda round_: heard.append((round_.optimizer, round_.trigger)))
    train(session, range(8))
    averaged = session.average("validation")
    again = session.average("validation")
    session.close()
    return {"heard": heard, "averaged": averaged, "again": again, "state": session.module.state_dict()}


def run_on_one_set_of_connections() -> dict[str, Any]:
    groups = dist.distributed_c10d._world.pg_map
    options = {"stagger": True, "overlap": 1}
    counts = [len(groups)]
    own = new_session(options)
    counts.append(len(groups))
    own.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_adpsgd.workers.group.backend_of", lambda *_: "nccl")
        shared = new_session(options)
        counts.append(len(groups))
        shared.setup(20)
        train(shared, range(8))
        shared.average("validation")
        shared.close()
    counts.append(len(groups))
    return {"groups": [count - counts[0] for count in counts], "state": shared.module.state_dict()}


def test_optimizers_share_connections_where_a_mix_up_would_not_end_the_process(pool):
    apart = pool.run(run, {"stagger": True, "overlap": 1})
    for outcome, expected in zip(pool.run(run_on_one_set_of_connections), apart, strict=True):
        assert outcome["groups"] == [0, 2, 1, 0]
        assert all(torch.equal(value, expected["state"][name]) for name, value in outcome["state"].items())


@pytest.mark.parametrize("options", [{}, {"stagger": True, "overlap": 1}])
def test_each_optimizer_has_its_own_rounds_and_a_validation_sees_the_average(pool, options):
    outcomes = pool.run(run, options)
    for outcome in outcomes:
        own = [index for index, trigger in outcome["heard"] if trigger == "period"]
        assert sorted(own) == [0] * (len(own) // 2) + [1] * (len(own) // 2)
        assert len(own) >= 2
        assert [heard for heard in outcome["heard"] if heard[1] == "validation"] == [
            (0, "validation"),
            (1, "validation"),
        ]
        assert (outcome["averaged"], outcome["again"]) == (True, False)
        for name, tensor in outcome["state"].items():
            assert torch.equal(tensor, outcomes[0]["state"][name]), name


def stop_and_go() -> list[bool]:
    whole = new_session({}, AdaptivePeriod(initial=2, sampling=4))
    whole.setup(20)
    train(whole, range(7))
    whole.average("checkpoint")
    state = whole.state_dict()
    weights = {name: tensor.clone() for name, tensor in whole.module.state_dict().items()}
    optimizers = [copy.deepcopy(local_sgd.optimizer.state_dict()) for local_sgd in whole.local_sgd]
    resumed = new_session({}, AdaptivePeriod(initial=2, sampling=4))
    resumed.module.load_state_dict(weights)
    for local_sgd, saved in zip(resumed.local_sgd, optimizers, strict=True):
        local_sgd.optimizer.load_state_dict(saved)
    resumed.load_state_dict(state)
    resumed.setup(20)
    for session in (whole, resumed):
        train(session, range(7, 15))
    after = resumed.module.state_dict()
    same = [torch.equal(tensor, after[name]) for name, tensor in whole.module.state_dict().items()]
    return [*same, state["averaged"], resumed.state_dict() == whole.state_dict()]


def test_resuming_from_its_state_equals_not_having_stopped(pool):
    for same in pool.run(stop_and_go):
        assert all(same)


def differ() -> list[bool]:
    session = new_session({})
    mine, theirs = torch.full((3,), float(dist.get_rank())), torch.ones(2)
    session.adopt_first([mine, theirs])
    return [bool((mine == 0).all()), bool((theirs == 1).all())]


def test_the_first_workers_tensors_go_to_all_where_they_differ(pool):
    assert pool.run(differ) == [[True, True]] * 2


def stray() -> None:
    session = new_session({})
    session.handshake("a validation" if dist.get_rank() == 0 else "the end of training", "`a hook`")


def test_workers_that_are_about_to_do_different_things_are_told_so(pool):
    for outcome in pool.outcomes(stray):
        assert outcome.kind == WorkersDisagreeError.__name__
        assert "rank 0: a validation at step 0 in `a hook`; rank 1: the end of training" in outcome.error
