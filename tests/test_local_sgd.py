"""One round on several real processes, against values computed by hand."""

import copy
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_adpsgd import (
    AdaptivePeriod,
    AveragingPeriod,
    AveragingRound,
    ConstantPeriod,
    LocalSGD,
    WorkerGroup,
    WorkersDivergedError,
)
from lightning_adpsgd.rounds.handshake import RankState, SignalFlags

pytestmark = pytest.mark.workers


class Net(nn.Module):
    """Two layers, a BatchNorm with floating and integer buffers, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.second(self.norm(self.first(x))))


class RecordingPeriod(AveragingPeriod):
    """A constant period that keeps what it was given."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.seen: list[tuple[int, float, float]] = []

    @property
    def value(self) -> int:
        return self.period

    def update(self, step: int, *, ratio: float, learning_rate: float) -> None:
        self.seen.append((step, ratio, learning_rate))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(count: int, seed: int | None = None) -> Iterator[torch.Tensor]:
    """A worker's own share of the data, unless another seed is given."""
    generator = torch.Generator().manual_seed(dist.get_rank() if seed is None else seed)
    for _ in range(count):
        yield torch.randn(8, 4, generator=generator)


def train(local_sgd: LocalSGD, model: nn.Module, steps: int, seed: int | None = None) -> list:
    rounds = []
    for batch in batches(steps, seed):
        local_sgd.optimizer.zero_grad()
        model(batch).square().mean().backward()
        local_sgd.optimizer.step()
        rounds.append(local_sgd.step())
    return rounds


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is averaged


def one_round(bucket_size_mb: float, average_buffers: bool) -> dict:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local_sgd = LocalSGD(optimizer, 3, module=model, bucket_size_mb=bucket_size_mb, average_buffers=average_buffers)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert train(local_sgd, model, 2) == [None, None]
    local_sgd._engine.local_steps = 3  # as if the round were due
    model.norm.num_batches_tracked += dist.get_rank()
    before = snapshot(model)
    round_ = local_sgd.average("period")
    return {
        "before": before,
        "after": snapshot(model),
        "round": round_,
        "in_place": pointers == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
    }


@pytest.mark.parametrize("bucket_size_mb", [64.0, 13 / 2**20], ids=["one range", "ranges of three elements"])
def test_parameters_and_floating_buffers_become_their_mean_and_integer_ones_stay(pool, bucket_size_mb):
    outcomes = pool.run(one_round, bucket_size_mb, True, workers=4)
    for name in outcomes[0]["before"]:
        befores = torch.stack([outcome["before"][name].double() for outcome in outcomes])
        for outcome in outcomes:
            if name == "norm.num_batches_tracked":
                assert torch.equal(outcome["after"][name], outcome["before"][name])
            else:
                torch.testing.assert_close(outcome["after"][name].double(), befores.mean(dim=0), rtol=1e-6, atol=1e-6)
                assert torch.equal(outcome["after"][name], outcomes[0]["after"][name])


def test_parameters_keep_their_storage(pool):
    assert all(outcome["in_place"] for outcome in pool.run(one_round, 64.0, True, workers=2))


def test_variance_is_the_mean_squared_distance_from_the_mean_with_tied_weights_once(pool):
    outcomes = pool.run(one_round, 13 / 2**20, True, workers=3)
    names = ["first.weight", "norm.weight", "norm.bias", "second.weight", "second.bias"]
    variance = 0.0
    for name in names:
        befores = torch.stack([outcome["before"][name].double() for outcome in outcomes])
        variance += (befores - befores.mean(dim=0)).square().sum().item() / len(outcomes)
    for outcome in outcomes:
        assert outcome["round"].variance == pytest.approx(variance, rel=1e-5)
        assert outcome["round"].ratio == pytest.approx(variance / 0.1, rel=1e-5)
        assert outcome["round"].learning_rate == pytest.approx(0.1)


def test_payload_is_parameters_buffers_and_the_exchange_around_them(pool):
    round_ = pool.run(one_round, 64.0, True, workers=4)[0]["round"]
    parameters = 16 + 4 + 4 + 16 + 4
    buffers = 4 + 4
    table, means = 4 * len(RankState._fields) * 8, 2 * 8
    assert round_.payload_bytes == 4 * (parameters + buffers) + table + means
    assert round_.sent_bytes == round(2 * 3 / 4 * round_.payload_bytes)


def test_buffers_stay_local_when_they_are_not_to_be_averaged(pool):
    outcomes = pool.run(one_round, 64.0, False, workers=2)
    for outcome in outcomes:
        assert torch.equal(outcome["after"]["norm.running_mean"], outcome["before"]["norm.running_mean"])
    assert not torch.equal(outcomes[0]["after"]["norm.running_mean"], outcomes[1]["after"]["norm.running_mean"])


def bf16_round() -> dict:
    model = net().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local_sgd = LocalSGD(optimizer, 1, module=model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, [1.0, 1.0078125, 1.0078125][dist.get_rank()]))
    local_sgd.step()
    return {"weight": model.second.weight.data, "dtype": model.second.weight.dtype}


def test_16_bit_parameters_are_reduced_in_fp32_and_rounded_once(pool):
    # A sum of three values near 1 in bf16 would have lost the last bit: 3.0156 is not a bf16 number.
    for outcome in pool.run(bf16_round, workers=3):
        assert outcome["dtype"] == torch.bfloat16
        assert (outcome["weight"] == torch.tensor(3.015625 / 3).to(torch.bfloat16)).all()
        assert outcome["weight"][0, 0].item() == 1.0078125


# The optimizer's state


def momentum_round(policy: str, name: str) -> dict:
    model = net()
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    local_sgd = LocalSGD(optimizer, 100, module=model, optimizer_state=policy)
    train(local_sgd, model, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    round_ = local_sgd.average()
    return {"before": before, "after": optimizer.state_dict()["state"], "payload": round_.payload_bytes}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("policy", ["local", "average", "reset"])
def test_moments_follow_the_policy_and_step_counters_begin_anew_with_moments_alone(pool, policy, name):
    outcomes = pool.run(momentum_round, policy, name, workers=3)
    moments = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]}[name]
    for outcome in outcomes:
        for index, after in outcome["after"].items():
            for key in moments:
                befores = torch.stack([other["before"][index][key] for other in outcomes])
                if policy == "local":
                    assert torch.equal(after[key], outcome["before"][index][key])
                elif policy == "reset":
                    assert (after[key] == 0).all()
                else:
                    torch.testing.assert_close(after[key], befores.mean(dim=0))
            if name == "adamw":
                assert after["step"] == (0 if policy == "reset" else 3)


def test_averaging_the_state_is_paid_for_in_bytes(pool):
    local, average = (
        pool.run(momentum_round, policy, "sgd", workers=2)[0]["payload"] for policy in ("local", "average")
    )
    # one momentum buffer per parameter, and the comparison of which workers have which state
    assert average - local == 4 * 44 + 2 * 3 * 8


# When rounds take place, and what the rule sees


def two_groups(rates: list) -> dict:
    model = net()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.first.weight], "lr": rates[0]},
            {"params": [*model.second.parameters()], "lr": rates[1]},
        ],
        lr=1.0,
    )
    period = RecordingPeriod(3)
    local_sgd = LocalSGD(optimizer, period)
    with torch.no_grad():
        model.first.weight.fill_(float(dist.get_rank()))  # S = 16 * 1/4
        model.second.weight.fill_(2.0 * dist.get_rank())  # S = 16 * 1
        model.second.bias.fill_(0.0)
    rounds = [local_sgd.step() for _ in range(3)]
    return {"round": rounds[-1], "rounds": rounds[:-1], "seen": period.seen}


@pytest.mark.parametrize(
    ("rates", "ratio", "rate"),
    [((0.5, 0.25), 4 / 0.5 + 16 / 0.25, 0.5), ((0.0, 0.25), 16 / 0.25, 0.25), ((0.0, 0.0), 0.0, 0.0)],
)
def test_ratio_is_summed_over_the_groups_whose_rate_is_not_zero(pool, rates, ratio, rate):
    for outcome in pool.run(two_groups, list(rates), workers=2):
        assert outcome["rounds"] == [None, None]
        assert outcome["round"].variance == pytest.approx(20.0)
        assert outcome["round"].ratio == pytest.approx(ratio)
        assert outcome["round"].learning_rate == pytest.approx(rate)
        assert outcome["seen"] == [(3, pytest.approx(ratio), pytest.approx(rate))]


def different_rates() -> list:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=[0.01, 0.2, 0.05][dist.get_rank()])
    local_sgd = LocalSGD(optimizer, AdaptivePeriod(initial=2, sampling=8), module=model, total_steps=80)
    rounds = [round_ for round_ in train(local_sgd, model, 80) if round_ is not None]
    return [(r.step, r.period, r.learning_rate, r.variance, r.ratio, r.target) for r in rounds]


def test_rates_that_differ_between_ranks_do_not_make_them_disagree(pool):
    outcomes = pool.run(different_rates, workers=3)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0][2] == pytest.approx(0.26 / 3)
    assert len({period for _, period, *_ in outcomes[0]}) > 1


def forced_rounds() -> dict:
    model = net()
    period = RecordingPeriod(4)
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), period, module=model)
    heard = []
    local_sgd.subscribe(heard.append)
    nothing_yet = local_sgd.average("validation")
    train(local_sgd, model, 2)
    forced = local_sgd.average("validation")
    again = local_sgd.average("checkpoint")
    train(local_sgd, model, 5)
    return {"none": [nothing_yet, again], "forced": forced, "heard": heard, "seen": period.seen}


def test_forced_rounds_average_and_restart_the_count_but_are_not_shown_to_the_rule(pool):
    for outcome in pool.run(forced_rounds, workers=2):
        assert outcome["none"] == [None, None]
        assert [(r.step, r.trigger, r.local_steps) for r in outcome["heard"]] == [
            (2, "validation", 2),
            (6, "period", 4),
        ]
        assert [step for step, *_ in outcome["seen"]] == [6]


def against_ddp(momentum: float) -> dict:
    ours, theirs = net(), net()
    # BatchNorm normalizes with a worker's own batch in both, so that its statistics do not enter the comparison.
    local_sgd = LocalSGD(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=momentum), 1, module=ours)
    train(local_sgd, ours, 20)
    wrapped = DistributedDataParallel(theirs, broadcast_buffers=False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    for batch in batches(20):
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()
    return {"ours": dict(ours.named_parameters()), "theirs": dict(theirs.named_parameters())}


def test_period_one_with_plain_sgd_is_ddp(pool):
    for outcome in pool.run(against_ddp, 0.0, workers=3):
        for name, parameter in outcome["ours"].items():
            torch.testing.assert_close(parameter, outcome["theirs"][name], rtol=1e-4, atol=1e-6)


def start_together() -> dict:
    model = net(seed=dist.get_rank())
    model.norm.running_mean.fill_(dist.get_rank())
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 2, module=model)
    local_sgd.broadcast()
    return snapshot(model)


def test_broadcast_starts_all_workers_from_the_first(pool):
    first, *others = pool.run(start_together, workers=3)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)
    assert (first["norm.running_mean"] == 0).all()


# Changes during training


def read_later_or_at_once(later: bool) -> dict:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    local_sgd = LocalSGD(optimizer, AdaptivePeriod(initial=2, sampling=0.25), module=model, total_steps=40)
    local_sgd._engine._reads_later = later  # as on a GPU
    told, returned = [], train(local_sgd, model, 21)
    local_sgd.subscribe(told.append)
    forced = local_sgd.average("validation")
    returned += train(local_sgd, model, 15)
    last = local_sgd.average("train_end")
    return {
        "records": [round_._replace(seconds=0.0) for round_ in told],
        "returned": [None if round_ is None else round_.step for round_ in returned],
        "forced": None if forced is None else (forced.step, forced.trigger),
        "last": None if last is None else (last.step, last.trigger),
        "weights": snapshot(model),
        "period": local_sgd.period.state_dict(),
    }


def test_measurements_that_are_read_a_step_later_lead_to_the_same_run(pool):
    for at_once, later in zip(
        pool.run(read_later_or_at_once, False), pool.run(read_later_or_at_once, True), strict=True
    ):
        assert later["period"] == at_once["period"]
        assert later["records"] == at_once["records"]
        assert later["forced"] == at_once["forced"] == (21, "validation")
        # The round at the very last step took place, but had not been read.
        assert (at_once["returned"][-1], at_once["last"]) == (36, None)
        assert (later["returned"][-1], later["last"]) == (None, (36, "period"))
        steps = [step for step in at_once["returned"] if step]
        assert [step for step in later["returned"] if step] == steps[:-1]
        assert later["returned"].index(steps[0]) == at_once["returned"].index(steps[0]) + 1
        for name, tensor in at_once["weights"].items():
            assert torch.equal(later["weights"][name], tensor), name


def add_a_group() -> dict:
    model = net()
    optimizer = torch.optim.SGD([*model.first.parameters()], lr=0.1)
    local_sgd = LocalSGD(optimizer, 2)
    train(local_sgd, model, 2)
    optimizer.add_param_group({"params": [*model.second.parameters()], "lr": 0.2})
    rounds = train(local_sgd, model, 2)
    return {"weights": [model.first.weight.data, model.second.weight.data], "payload": rounds[-1].payload_bytes}


def test_a_group_added_in_mid_training_joins_the_next_round(pool):
    first, second = pool.run(add_a_group, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert first["payload"] == 4 * (16 + 20) + 2 * len(RankState._fields) * 8 + 4 * 8


def freeze_after_drift() -> dict:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 4, module=model, average_buffers=False)
    train(local_sgd, model, 2)
    model.second.weight.requires_grad_(False)
    rounds = train(local_sgd, model, 6)
    return {"weight": model.second.weight.data, "payloads": [r.payload_bytes for r in rounds if r is not None]}


def test_a_parameter_frozen_after_it_has_drifted_is_averaged_once_more(pool):
    first, second = pool.run(freeze_after_drift, workers=2)
    assert torch.equal(first["weight"], second["weight"])
    assert first["payloads"][0] - first["payloads"][1] == 16 * 4


def resume(policy: str) -> dict:
    def start() -> tuple[Net, LocalSGD]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        period = AdaptivePeriod(initial=3, sampling=9)
        return model, LocalSGD(optimizer, period, module=model, optimizer_state=policy)

    data = list(batches(60))
    runs = []
    for interrupted in (False, True):
        model, local_sgd = start()
        rounds = []
        for step, batch in enumerate(data):
            if interrupted and step == 31:
                saved = copy.deepcopy([model.state_dict(), local_sgd.optimizer.state_dict(), local_sgd.state_dict()])
                model, local_sgd = start()
                for part, state in zip((model, local_sgd.optimizer, local_sgd), saved, strict=True):
                    part.load_state_dict(state)
            local_sgd.optimizer.zero_grad()
            model(batch).square().mean().backward()
            local_sgd.optimizer.step()
            rounds.append(local_sgd.step())
        runs.append(([r._replace(seconds=0.0) for r in rounds if r is not None], snapshot(model)))
    return {"rounds": [run[0] for run in runs], "weights": [run[1] for run in runs]}


def test_resuming_from_the_state_of_every_worker_equals_not_having_stopped(pool):
    for outcome in pool.run(resume, "local", workers=2):
        assert outcome["rounds"][0] == outcome["rounds"][1]
        assert len(outcome["rounds"][0]) > 5
        for name, tensor in outcome["weights"][0].items():
            assert torch.equal(tensor, outcome["weights"][1][name])


def test_a_rule_of_another_kind_starts_anew_with_a_warning():
    def start(period: AveragingPeriod) -> LocalSGD:
        return LocalSGD(torch.optim.SGD(net().parameters(), lr=0.1), period)

    constant = start(ConstantPeriod(3))
    for _ in range(7):
        constant.step()
    adaptive = start(AdaptivePeriod(initial=5, sampling=10))
    with pytest.warns(UserWarning, match="was ConstantPeriod, this one is AdaptivePeriod: it starts anew at step 7"):
        adaptive.load_state_dict(constant.state_dict())
    assert (adaptive.steps, adaptive.local_steps, adaptive.period.value) == (7, 1, 5)


def test_a_state_with_a_part_missing_is_refused_and_changes_nothing():
    local_sgd = LocalSGD(torch.optim.SGD(net().parameters(), lr=0.1), 3)
    state = {name: value for name, value in local_sgd.state_dict().items() if name != "local_steps"}
    with pytest.raises(ValueError, match="the saved state has no 'local_steps'"):
        local_sgd.load_state_dict({**state, "steps": 7})
    assert local_sgd.steps == 0


# What goes wrong


def different_steps() -> None:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 4, module=model)
    train(local_sgd, model, 3 if dist.get_rank() == 1 else 4)
    local_sgd.average("train_end")


def test_workers_that_took_different_steps_are_told_so_on_every_rank(pool):
    for outcome in pool.outcomes(different_steps, workers=3):
        assert outcome.kind == "WorkersDisagreeError"
        assert "rank 0: the averaging round at step 4 of optimizer 0, asked for by 'period', period 4" in outcome.error
        assert (
            "rank 1: the averaging round at step 3 of optimizer 0, asked for by 'train_end', period 4" in outcome.error
        )
        assert "drop_last=True" in outcome.error


def different_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5 if dist.get_rank() == 2 else 4))
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 1, module=model)
    local_sgd.step()


def test_workers_with_different_models_are_told_the_first_tensor_that_differs(pool):
    for outcome in pool.outcomes(different_models, workers=3):
        assert outcome.kind == "WorkersDisagreeError"
        assert "rank 0 has 1.weight (torch.float32, shape (4, 4), parameter group 0)" in outcome.error
        assert "rank 2 has 1.weight (torch.float32, shape (5, 4), parameter group 0)" in outcome.error


def one_diverges() -> dict:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 3, module=model)
    train(local_sgd, model, 2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.second.weight[1, 1] = float("nan")
    before = snapshot(model)
    local_sgd._engine.local_steps += 1
    error = None
    try:
        local_sgd.average("period")
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    after = snapshot(model)
    same = all(torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before)
    return {"error": error, "untouched": same}


def test_a_diverged_worker_is_named_on_every_rank_before_anything_is_overwritten(pool):
    for outcome in pool.run(one_diverges, workers=3):
        assert outcome["error"].startswith("WorkersDivergedError: Parameters of rank(s) 1 are not finite")
        assert "second.weight" in outcome["error"]
        assert outcome["untouched"]


def drop(policy: str, ranks: tuple[int, ...], trigger: str) -> dict:
    model, rank = net(), dist.get_rank()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rule = RecordingPeriod(4)
    local_sgd = LocalSGD(optimizer, rule, module=model, optimizer_state=policy, on_divergence="drop")
    train(local_sgd, model, 3)
    if rank in ranks:
        with torch.no_grad():
            model.second.weight[1, 1] = float("nan")
            model.norm.running_mean.fill_(float("nan"))
            optimizer.state[model.second.weight]["exp_avg"].fill_(float("inf"))
    model.zero_grad()
    before, means = snapshot(model), moments_of(optimizer)
    local_sgd._engine.local_steps += 1  # the fourth step, without an update
    local_sgd._engine._contact.steps += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        round_ = local_sgd.average(trigger)
    outcome = {
        "before": before,
        "means": means,
        "after": snapshot(model),
        "state": moments_of(optimizer),
        "round": round_,
        "seen": [*rule.seen],
        "told": [str(w.message) for w in caught if "left out" in str(w.message)],
    }
    outcome["later"] = [r for r in train(local_sgd, model, 4) if r is not None]
    return {**outcome, "end": snapshot(model)}


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    entries = optimizer.state_dict()["state"]
    return {f"{place}.{name}": value.clone() for place, entry in entries.items() for name, value in entry.items()}


@pytest.mark.parametrize("policy", ["local", "average", "reset"])
@pytest.mark.parametrize("ranks", [(1,), (0, 2)])
def test_diverged_workers_are_left_out_and_continue_from_the_others_average(pool, policy, ranks):
    outcomes = pool.run(drop, policy, ranks, "period", workers=3)
    healthy = [rank for rank in range(3) if rank not in ranks]
    for rank, outcome in enumerate(outcomes):
        for name, after in outcome["after"].items():
            if name == "norm.num_batches_tracked":
                continue
            befores = torch.stack([outcomes[healthy_rank]["before"][name] for healthy_rank in healthy])
            torch.testing.assert_close(after, befores.mean(dim=0))
            assert torch.equal(after, outcomes[0]["after"][name])
        assert outcome["round"].dropped == len(ranks)
        assert outcome["seen"] == []  # the rule does not see a variance among fewer workers
        assert len(outcome["told"]) == (1 if rank == 0 else 0)
        if policy == "average":
            for name, after in outcome["state"].items():
                befores = torch.stack([outcomes[healthy_rank]["means"][name] for healthy_rank in healthy])
                torch.testing.assert_close(after, befores.mean(dim=0))
        elif rank in ranks:
            assert outcome["state"] == {}  # as before the first step
        assert [(r.step, r.dropped) for r in outcome["later"]] == [(8, 0)]
        assert all(torch.equal(tensor, outcomes[0]["end"][name]) for name, tensor in outcome["end"].items())
        assert all(tensor.isfinite().all() for tensor in outcome["end"].values())
    assert f"rank(s) {', '.join(map(str, ranks))} are not finite at step 4" in outcomes[0]["told"][0]
    assert "second.weight" in outcomes[0]["told"][0]


def test_the_variance_is_that_among_the_workers_left(pool):
    outcomes = pool.run(drop, "local", (1,), "period", workers=3)
    variance = 0.0
    for name in ("first.weight", "norm.weight", "norm.bias", "second.weight", "second.bias"):
        befores = torch.stack([outcomes[rank]["before"][name].double() for rank in (0, 2)])
        variance += (befores - befores.mean(dim=0)).square().sum().item() / 2
    assert [outcome["round"].variance for outcome in outcomes] == [pytest.approx(variance, rel=1e-5)] * 3


def test_a_checkpoint_that_drops_a_worker_gives_it_the_others_state(pool):
    outcomes = pool.run(drop, "local", (1,), "checkpoint", workers=3)
    for outcome in outcomes:
        for name, value in outcome["state"].items():
            assert torch.equal(value, outcomes[0]["state"][name])
            befores = torch.stack([outcomes[rank]["means"][name] for rank in (0, 2)])
            torch.testing.assert_close(value, befores.mean(dim=0))


def test_dropping_costs_no_collective_where_no_worker_has_diverged(pool):
    payloads = [
        [outcome["later"][0].payload_bytes for outcome in pool.run(drop, "local", ranks, "period", workers=3)]
        for ranks in ((), (1,))
    ]
    raised = pool.run(one_round, 64.0, True, workers=3)[0]["round"].payload_bytes
    assert payloads == [[raised] * 3] * 2


def test_if_all_workers_have_diverged_there_is_nothing_to_continue_from(pool):
    for outcome in pool.outcomes(drop, "local", (0, 1), "period", workers=2):
        assert outcome.kind == "WorkersDivergedError"
        assert "rank(s) 0, 1 are not finite" in outcome.error
        assert "no worker left" in outcome.error


def one_is_gone(word: bool) -> None:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 4, module=model)
    if dist.get_rank() == 1:
        if word:
            local_sgd.workers.peers.post_status("had failed at step 2: ValueError: boom")
        return  # which closes its connections
    train(local_sgd, model, 4)


@pytest.mark.parametrize(
    ("word", "told"),
    [(True, "Rank 1 had failed at step 2: ValueError: boom."), (False, "No word from rank(s) 1: killed, hanging")],
)
def test_a_worker_that_is_gone_is_named_with_the_round_that_was_lost(pool, word, told):
    outcomes = pool.outcomes(one_is_gone, word, workers=3)
    for rank in (0, 2):
        assert outcomes[rank].kind == "WorkerLostError"
        place = "the averaging round at step 4 of optimizer 0, asked for by 'period', period 4"
        assert f"Rank {rank} could not finish {place}: " in outcomes[rank].error
        assert told in outcomes[rank].error
        assert "last checkpoint" in outcomes[rank].error


def far_apart() -> None:
    parameter = nn.Parameter(torch.full((3,), (-1.0) ** dist.get_rank() * 1e30))
    LocalSGD(torch.optim.SGD([parameter], lr=0.1), 1).step()


def test_a_variance_that_is_not_finite_is_an_error_on_every_rank(pool):
    for outcome in pool.outcomes(far_apart, workers=2):
        assert outcome.kind == "WorkersDivergedError"
        assert "Lower the learning rate" in outcome.error


def same_data() -> list[str]:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 2, module=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(local_sgd, model, 6, seed=0)
    return [str(warning.message) for warning in caught if "identical" in str(warning.message)]


def rates_differ() -> list[str]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + dist.get_rank()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(LocalSGD(optimizer, 2, module=model), model, 6)
    return [str(warning.message) for warning in caught if "learning rates differ" in str(warning.message)]


def test_learning_rates_that_differ_are_warned_of_once_on_the_first_rank(pool):
    first, second = pool.run(rates_differ, workers=2)
    assert len(first) == 1
    assert "rank 0: 0.1, rank 1: 0.2" in first[0]
    assert second == []


def test_workers_that_see_the_same_data_are_warned_once_on_the_first_rank(pool):
    first, second = pool.run(same_data, workers=2)
    assert len(first) == 1
    assert "DistributedSampler" in first[0]
    assert second == []


def raise_flags() -> list[int]:
    model, rank, flags = net(), dist.get_rank(), SignalFlags()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 2, module=model, flags=flags)
    agreed = []
    for step, _ in enumerate(range(6)):
        if step == 2 and rank == 1:
            flags.raised = 1
        if step == 3 and rank == 2:
            flags.raised = 2
        train(local_sgd, model, 1)
        agreed.append(flags.agreed)
    return agreed


def test_a_flag_of_any_worker_reaches_all_with_the_next_round(pool):
    assert pool.run(raise_flags, workers=3) == [[0, 0, 0, 3, 3, 3]] * 3


# One process


def test_with_one_process_rounds_change_and_send_nothing():
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 2, module=model)
    for _ in range(2):
        before = snapshot(model)
        round_ = local_sgd.step()
    assert (round_.step, round_.payload_bytes, round_.sent_bytes, round_.variance) == (2, 0, 0, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


# Bad input


def test_a_rule_with_a_share_of_a_run_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"sampling=0\.25\) is a share of all optimizer steps"):
        LocalSGD(torch.optim.SGD(net().parameters(), lr=0.1), AdaptivePeriod())


def test_an_optimizer_without_learning_rates_is_refused():
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="Parameter group 0 of SGD has lr=None"):
        LocalSGD(optimizer, ConstantPeriod(2))


def test_an_unknown_trigger_is_refused():
    local_sgd = LocalSGD(torch.optim.SGD(net().parameters(), lr=0.1), 2, workers=WorkerGroup())
    with pytest.raises(ValueError, match="'period', 'validation', 'checkpoint', 'train_end'"):
        local_sgd.average("later")


def diverged_beside_the_optimizer() -> dict:
    model = net()
    local_sgd = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), 4)
    beside = nn.Parameter(torch.full((3,), float("nan") if dist.get_rank() == 1 else 1.0))
    before = beside.detach().clone()
    with pytest.raises(WorkersDivergedError, match=r"rank\(s\) 1 are not finite"):
        local_sgd.average("validation", also=[beside])
    return {"before": before, "after": beside.detach()}


def test_tensors_that_are_averaged_along_are_checked_before_anything_is_overwritten(pool):
    for outcome in pool.run(diverged_beside_the_optimizer):
        torch.testing.assert_close(outcome["after"], outcome["before"], rtol=0, atol=0, equal_nan=True)


def restored_counts() -> dict:
    runs = {}
    for saved_after in (2, 3):
        optimizer = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)
        local_sgd = LocalSGD(optimizer, 4)
        for step in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            local_sgd.step()
            if step + 1 == saved_after:
                local_sgd.average("checkpoint")
        state, optimizer_state = local_sgd.state_dict(), optimizer.state_dict()
        other = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)
        other.load_state_dict(optimizer_state)
        restored = LocalSGD(other, 4)
        restored.load_state_dict(state)
        runs[saved_after] = (restored.is_complete, restored.average("checkpoint") is None)
    return runs


def test_a_restored_count_knows_whether_a_checkpoint_has_yet_to_average(pool):
    for outcome in pool.run(restored_counts):
        assert outcome == {2: (False, False), 3: (True, True)}


class RuleThatLooks(AdaptivePeriod):
    """Keeps the targets of the records that it is shown."""

    def update(self, record: AveragingRound, scalars: Sequence[float] = ()) -> None:
        self.seen = [*getattr(self, "seen", []), record.target]
        super().update(record, scalars)


def test_a_rule_sees_the_record_that_listeners_see():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    rule, heard = RuleThatLooks(2, sampling=4), []
    local_sgd = LocalSGD(optimizer, rule, total_steps=8)
    local_sgd.subscribe(heard.append)
    for _ in range(8):
        local_sgd.step()
    assert rule.seen[0] is None
    assert rule.seen[1] is not None
    assert rule.seen == [record.target for record in heard]
