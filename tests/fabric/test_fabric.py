"""Fabric: a loop of one's own, in which the optimizer's step averages."""

import importlib
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_adpsgd import AdaptivePeriod, AveragingRound, LocalSGD, WorkerGroup
from lightning_adpsgd.fabric import ADPSGDStrategy
from lightning_adpsgd.families import FABRIC_ROOMS
from tests.training import data, identical

pytestmark = pytest.mark.workers
FAMILIES = tuple(FABRIC_ROOMS)


def new_fabric(strategy: Any, family: str = "lightning.fabric", **options: Any) -> Any:
    """A Fabric over the ranks that a test's processes were announced as."""
    fabric = importlib.import_module(family).Fabric
    launched = fabric(strategy=strategy, accelerator="cpu", devices=2, **options)
    launched.launch()
    return launched


def new_model(seed: int = 0, batch_norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if batch_norm else nn.Identity(), nn.Linear(16, 3))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def new_loader(fabric: Any, batches: int = 20) -> DataLoader:
    return fabric.setup_dataloaders(DataLoader(data(2 * 8 * batches), batch_size=8, shuffle=True, drop_last=True))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def warned_of(fabric: Any, what: str) -> Any:
    """A warning, on the first rank."""
    return pytest.warns(UserWarning, match=what) if fabric.is_global_zero else nullcontext()


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


# Names


@pytest.mark.parametrize("family", FAMILIES)
def test_fabric_knows_every_name(family):
    registry = importlib.import_module(f"{family}.strategies").STRATEGY_REGISTRY
    strategy = importlib.import_module(FABRIC_ROOMS[family]).ADPSGDStrategy
    names = [f"{name}{launch}" for name in ("adpsgd", "adpsgd_int4") for launch in ("", "_spawn", "_fork", "_notebook")]
    assert {type(registry.get(name)) for name in [*names, "adaptive_local_sgd"]} == {strategy}
    assert strategy.int4()._options == registry.get("adpsgd_int4")._options
    assert issubclass(strategy, importlib.import_module(f"{family}.strategies").DDPStrategy)


# Rounds

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduce_dtype": "int4", "optimizer_state": "estimate"},
    {"stagger": True, "overlap": 1},
    {"optimizer_state": "average", "on_divergence": "drop"},
]


def train(options: dict[str, Any], family: str = "lightning.fabric") -> dict[str, Any]:
    strategy = importlib.import_module(FABRIC_ROOMS[family]).ADPSGDStrategy(4, **options)
    fabric = new_fabric(strategy, family)
    rounds: list[AveragingRound] = []
    fabric.strategy.subscribe(rounds.append)
    model = new_model(seed=fabric.global_rank)
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    messages = []
    for batch in new_loader(fabric):
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        optimizer.step()
        messages.append(dist.group.WORLD._get_sequence_number_for_group())
    fabric.strategy.average("train_end")
    told = [(round_.step, round_.trigger, round_.variance) for round_ in rounds]
    return {"weights": state_of(model), "rounds": told, "messages": messages}


def train_by_hand(options: dict[str, Any]) -> dict[str, Any]:
    """The same with the bare `LocalSGD`; Fabric only gives each rank its share of the data."""
    fabric = new_fabric("ddp")
    model = new_model()
    optimizer = momentum_sgd(model)
    local_sgd = LocalSGD(optimizer, 4, module=model, total_steps=None, workers=WorkerGroup(), **options)
    local_sgd.broadcast()
    for batch in new_loader(fabric):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        local_sgd.step()
    local_sgd.average()
    local_sgd.close()
    return state_of(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loop_trains_what_local_sgd_trains_by_hand(pool, options):
    outcomes = pool.run_trainer(train, options)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert identical([outcomes[0]["weights"], *pool.run_trainer(train_by_hand, options)])


def test_nothing_is_sent_between_rounds(pool):
    for outcome in pool.run_trainer(train, {}):
        assert [step for step, trigger, _ in outcome["rounds"]] == [4, 8, 12, 16, 20]
        sent_after = [step + 1 for step in range(1, 20) if outcome["messages"][step] > outcome["messages"][step - 1]]
        assert sent_after == [4, 8, 12, 16, 20]


def test_both_families_of_fabric_train_the_same(pool):
    first, second = (pool.run_trainer(train, OPTIONS[1], family) for family in FAMILIES)
    assert first[0]["rounds"] == second[0]["rounds"]
    assert identical([outcome["weights"] for outcome in (*first, *second)])


def compare_with_ddp() -> list[dict[str, Tensor]]:
    trained = []
    for strategy in (ADPSGDStrategy(1), "ddp"):
        fabric = new_fabric(strategy)
        model = new_model(batch_norm=False)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for batch in new_loader(fabric):
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            optimizer.step()
        trained.append(state_of(model))
    return trained


def test_period_one_trains_what_ddp_trains(pool):
    for ours, theirs in pool.run_trainer(compare_with_ddp):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def accumulate_clip_and_cast() -> dict[str, Any]:
    fabric = new_fabric(ADPSGDStrategy(2), precision="bf16-mixed")
    model = new_model()
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    norms = []
    for index, batch in enumerate(new_loader(fabric)):
        with fabric.no_backward_sync(model, enabled=index % 2 == 0):
            fabric.backward(loss_of(model, batch))
        if index % 2 == 1:
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
            optimizer.step()
            optimizer.zero_grad()
    return {"weights": state_of(model), "norms": norms, "steps": fabric.strategy.local_sgd[0].steps}


def test_accumulation_clipping_and_mixed_precision_work_as_in_any_loop(pool):
    outcomes = pool.run_trainer(accumulate_clip_and_cast)
    assert identical([outcome["weights"] for outcome in outcomes])
    for outcome in outcomes:
        assert outcome["steps"] == 10
        assert max(outcome["norms"]) <= 0.1001
    assert outcomes[0]["norms"] != outcomes[1]["norms"]


def adversaries(apart: bool) -> dict[str, Any]:
    """Two models with an optimizer each, of which the second steps half as often."""
    fabric = new_fabric(ADPSGDStrategy(3))
    rounds: list[AveragingRound] = []
    fabric.strategy.subscribe(rounds.append)
    pairs = []
    for seed in (1, 2):
        model = new_model(seed)
        optimizer = momentum_sgd(model)
        if apart:
            pairs.append((fabric.setup_module(model), fabric.setup_optimizers(optimizer)))
        else:
            pairs.append(fabric.setup(model, optimizer))
    for index, batch in enumerate(new_loader(fabric)):
        for model, optimizer in pairs[: 1 + index % 2]:
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            optimizer.step()
    fabric.strategy.average("train_end")
    told = [(round_.optimizer, round_.step, round_.trigger) for round_ in rounds]
    return {"weights": [state_of(model) for model, _ in pairs], "rounds": told}


@pytest.mark.parametrize("apart", [False, True], ids=["set up together", "set up apart"])
def test_several_models_and_optimizers_have_rounds_of_their_own(pool, apart):
    first, second = pool.run_trainer(adversaries, apart)
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert identical([ours, theirs])
    assert [told for told in first["rounds"] if told[0] == 1] == [
        *((1, step, "period") for step in (3, 6, 9)),
        (1, 10, "train_end"),
    ]
    assert (0, 18, "period") in first["rounds"]


# Whoever looks sees the average


def look() -> dict[str, Any]:
    fabric = new_fabric(ADPSGDStrategy(100))
    model = new_model()
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    batches = iter(new_loader(fabric))
    before = fabric.strategy.average()
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(loss_of(model, next(batches)))
        optimizer.step()
    drifted = state_of(model)
    first, again = fabric.strategy.average(), fabric.strategy.average()
    seen = state_of(model)
    model(next(batches)[0])  # moves BatchNorm's statistics, without a step
    moved = fabric.strategy.average()
    model.eval()
    model(next(batches)[0])
    return {
        "asked": [before, first, again, moved, fabric.strategy.average()],
        "drifted": drifted,
        "seen": seen,
        "statistics": state_of(model)["1.running_mean"],
    }


def test_who_looks_sees_the_average_and_nothing_is_sent_twice(pool):
    first, second = pool.run_trainer(look)
    assert first["asked"] == [False, True, False, True, False]
    assert not identical([first["drifted"], second["drifted"]])
    assert identical([first["seen"], second["seen"]])
    mean = (first["drifted"]["0.weight"] + second["drifted"]["0.weight"]) / 2
    torch.testing.assert_close(first["seen"]["0.weight"], mean)
    assert torch.equal(first["statistics"], second["statistics"])
    assert not torch.equal(first["statistics"], first["seen"]["1.running_mean"])


# Checkpoints


def go_on(options: dict[str, Any], folder: str, interrupted: bool) -> dict[str, Any]:
    """Train for 20 steps, of which all workers save the 10th; or come anew and do the last ten."""
    fabric = new_fabric(ADPSGDStrategy(AdaptivePeriod(3, sampling=5), **options))
    model = new_model(seed=7 if interrupted else 0)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    state = {"model": model, "optimizer": optimizer, "steps": 0}
    path = Path(folder, "after_10.ckpt")
    if interrupted:
        remainder = fabric.load(path, state)
        assert remainder == {}
    for index, batch in enumerate(new_loader(fabric)):
        if index < state["steps"]:
            continue
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        optimizer.step()
        if index == 9 and not interrupted:
            fabric.save(path, {**state, "steps": 10})
    fabric.strategy.average("train_end")
    local_sgd = fabric.strategy.local_sgd[0]
    moments = {
        f"{name} {index}": tensor
        for index, each in enumerate(optimizer.state.values())
        for name, tensor in each.items()
    }
    return {"weights": {**state_of(model), **moments}, "rule": local_sgd.period.state_dict(), "steps": local_sgd.steps}


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[2]], ids=str)
def test_going_on_from_a_checkpoint_equals_not_having_stopped(pool, tmp_path, options):
    straight = pool.run_trainer(go_on, options, str(tmp_path), False)
    went_on = pool.run_trainer(go_on, options, str(tmp_path), True)
    for ours, theirs in zip(straight, went_on, strict=True):
        assert ours["steps"] == theirs["steps"] == 20
        assert ours["rule"] == theirs["rule"]
        assert identical([ours["weights"], theirs["weights"]])


def load_what_others_have_saved(folder: str) -> dict[str, Any]:
    fabric = new_fabric("ddp")
    model = new_model(3)
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    fabric.save(Path(folder, "ddp.ckpt"), {"model": model, "optimizer": optimizer})
    expected = state_of(model)
    fabric = new_fabric(ADPSGDStrategy(2))
    model = new_model(4)
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    fabric.load(Path(folder, "ddp.ckpt"), {"model": model, "optimizer": optimizer})
    loaded = state_of(model)
    optimizer.zero_grad()
    fabric.backward(loss_of(model, next(iter(new_loader(fabric)))))
    optimizer.step()
    fabric.save(Path(folder, "weights.ckpt"), {"model": model}, filter={"model": lambda name, _: "running" not in name})
    whole = fabric.load(Path(folder, "weights.ckpt"))
    return {"expected": expected, "loaded": loaded, "whole": whole, "weights": state_of(model)}


def test_checkpoints_of_other_strategies_load_and_those_of_weights_hold_the_average(pool, tmp_path):
    outcomes = pool.run_trainer(load_what_others_have_saved, str(tmp_path))
    for outcome in outcomes:
        assert identical([outcome["expected"], outcome["loaded"]])
        assert set(outcome["whole"]) == {"model", "adpsgd"}
        assert "optimizers" not in outcome["whole"]["adpsgd"]
        assert outcome["whole"]["adpsgd"]["averaged"]
        assert torch.equal(outcome["whole"]["model"]["0.weight"], outcome["weights"]["0.weight"])
        assert "1.running_mean" not in outcome["whole"]["model"]
    assert identical([outcome["weights"] for outcome in outcomes])


# The monitor


class Heard:
    """A callback of a user's."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_averaging_round(self, averaging_round: AveragingRound) -> None:
        self.steps.append(averaging_round.step)


def monitored(folder: str, family: str) -> dict[str, Any]:
    monitor = importlib.import_module(FABRIC_ROOMS[family]).CommunicationMonitor(plot=True)
    loggers = importlib.import_module(f"{family}.loggers")
    logger, heard = loggers.CSVLogger(folder, name=family.replace(".", "_")), Heard()
    fabric = new_fabric("adpsgd_int4", family, callbacks=[monitor, heard], loggers=logger)
    fabric.strategy.set_total_steps(20)
    model = new_model()
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    for batch in new_loader(fabric):
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        optimizer.step()
    fabric.strategy.average("train_end")
    fabric.call("on_train_end")
    logger.finalize("success")
    restored = type(monitor)()
    restored.load_state_dict(monitor.state_dict())
    title = monitor.plot().axes[0].get_title()
    return {"summary": monitor.summary(), "restored": restored.summary(), "heard": heard.steps, "title": title}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_monitor_logs_sums_up_and_tells_other_callbacks(pool, tmp_path, family):
    outcomes = pool.run_trainer(monitored, str(tmp_path), family)
    folder = tmp_path / family.replace(".", "_") / "version_0"
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert {"adpsgd/period", "adpsgd/variance", "adpsgd/sent_bytes", "step"} <= set(lines[0].split(","))
    assert len(lines) - 1 == outcomes[0]["summary"]["rounds"] == len(outcomes[0]["heard"])
    assert (folder / "adpsgd.png").read_bytes().startswith(b"\x89PNG")
    for outcome in outcomes:
        assert outcome["heard"][0] == 2
        assert outcome["summary"]["steps"] == 20
        assert outcome["summary"]["factor_saved"] > 2
        assert outcome["title"] == f"{outcome['summary']['rounds']} averaging rounds in 20 steps, in int4"
        # The time a restored monitor tells of is the saved one; it does not know yet how rounds travel.
        assert {**outcome["restored"], "transport": "in int4"} == outcome["summary"]


def monitor_another_strategy() -> None:
    monitor = importlib.import_module("lightning_adpsgd.fabric").CommunicationMonitor()
    fabric = new_fabric("ddp", callbacks=[monitor])
    with warned_of(fabric, "nothing to record: DDPStrategy has no averaging rounds"):
        fabric.setup(new_model())
    monitor.on_train_end()


def test_the_monitor_says_so_if_there_is_nothing_to_record(pool):
    pool.run_trainer(monitor_another_strategy)


# What goes wrong


def without_a_length() -> list[str]:
    fabric = new_fabric("adpsgd")
    model = new_model()
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    with warned_of(fabric, r"shares of 4000 steps.*set_total_steps"):
        optimizer.step()
    errors = []
    for wrong in (
        lambda: fabric.strategy.set_total_steps(3),
        lambda: fabric.setup(new_model(), momentum_sgd(new_model())),
        lambda: fabric.save("never.ckpt", {"adpsgd": 3}),
        lambda: fabric.strategy.optimizer_step(momentum_sgd(new_model())),
        lambda: fabric.strategy.subscribe(3),
        lambda: ADPSGDStrategy(total_steps=-1),
        lambda: ADPSGDStrategy(period="4"),
        lambda: ADPSGDStrategy(stagger=3),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError, Exception)) as caught:
            wrong()
        errors.append(f"{type(caught.value).__name__}: {caught.value}")
    assert fabric.setup_module(new_model(seed=fabric.global_rank))  # to test with, for example
    fabric.strategy.teardown()
    steps = fabric.strategy.local_sgd[0].steps
    optimizer.optimizer.step()
    assert fabric.strategy.local_sgd[0].steps == steps
    return errors


def test_errors_say_what_to_change(pool):
    late, set_up, key, unknown, listener, negative, period, stagger = pool.run_trainer(without_a_length)[0]
    assert "set_total_steps(3) came after the first step" in late
    assert "between fabric.launch() and the loop" in late
    assert "An optimizer (SGD) was set up after the first step" in set_up
    assert "given an entry 'adpsgd'" in key
    assert "A SGD was stepped that was not set up" in unknown
    assert listener.startswith("TypeError")
    assert "total_steps" in negative
    assert period.startswith("TypeError")
    assert stagger.startswith("TypeError")


def different_models() -> None:
    fabric = new_fabric(ADPSGDStrategy(2))
    fabric.setup_module(nn.Linear(2, 2 + fabric.global_rank))


def test_different_models_are_found_at_setup(pool):
    for outcome in pool.outcomes(different_models, trainer=True):
        assert outcome.kind == "WorkersDisagreeError"
        assert "have built different models" in outcome.error


def leave_early() -> None:
    fabric = new_fabric(ADPSGDStrategy(2))
    model = new_model()
    model, optimizer = fabric.setup(model, momentum_sgd(model))
    for step in range(4):
        if fabric.global_rank == 1 and step == 3:
            fabric.barrier()  # while the other one averages
            return
        optimizer.step()


def test_a_worker_that_does_something_else_is_named(pool):
    for outcome in pool.outcomes(leave_early, trainer=True):
        assert outcome.kind == "WorkersDisagreeError"
        assert "Lightning's barrier" in outcome.error


# Launching


def test_a_strategy_can_be_sent_to_processes_that_are_spawned():
    strategy = pickle.loads(pickle.dumps(ADPSGDStrategy.int4(total_steps=8, start_method="spawn")))
    assert strategy.transport == "in int4"


FORKED = """
import torch
from lightning import Fabric
import lightning_adpsgd


def train(fabric):
    model = torch.nn.Linear(4, 2)
    fabric.strategy.set_total_steps(8)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(8):
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(3, 4)).square().mean())
        optimizer.step()
    return [round(float(weight), 6) for weight in fabric.all_gather(model.weight.detach().sum())]


if __name__ == "__main__":
    first, second = Fabric(strategy="adpsgd_fork", accelerator="cpu", devices=2).launch(train)
    print("same" if first == second else "different")
"""


def test_processes_that_fabric_forks_train(tmp_path):
    from tests.examples.test_digits import run

    (tmp_path / "forked.py").write_text(FORKED)
    done = run("forked.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == ["same"]
