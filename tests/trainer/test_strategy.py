"""What the strategy promises under a real Trainer on several real processes."""

import itertools
import os
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_adpsgd
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod
from lightning_adpsgd.workers.reduction import ALL_GATHER
from tests.training import Classifier, fit, identical, loader, seeded, trainer, weights

# Names


@pytest.mark.parametrize(
    ("name", "start_method"),
    [
        ("adpsgd", "popen"),
        ("adaptive_local_sgd", "popen"),
        ("adpsgd_spawn", "spawn"),
        ("adpsgd_fork", "fork"),
        ("adpsgd_notebook", "fork"),
        ("adpsgd_int4", "popen"),
        ("adpsgd_int4_spawn", "spawn"),
        ("adpsgd_int4_fork", "fork"),
        ("adpsgd_int4_notebook", "fork"),
    ],
)
def test_every_name_is_registered_with_its_way_to_start_processes(name, start_method):
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is ADPSGDStrategy
    assert strategy._start_method == start_method


def test_the_names_with_int4_stand_for_what_the_method_returns():
    mine, named = ADPSGDStrategy.int4(), StrategyRegistry.get("adpsgd_int4")
    assert mine._options == named._options
    assert repr(mine._period) == repr(named._period) == repr(AdaptivePeriod(initial=2, growth="proportional"))
    assert (mine._options.optimizer_state, mine._options.codec.bits) == ("estimate", 4)
    assert StrategyRegistry.get("adpsgd")._options.codec is None


def test_int4_takes_arguments_of_the_class_in_place_of_its_own():
    strategy = ADPSGDStrategy.int4(period=3, stagger=True)
    assert repr(strategy._period) == repr(ConstantPeriod(3))
    assert (strategy._options.stagger, strategy._options.reduce_dtype) == (True, "int4")
    with pytest.raises(TypeError, match="overlaps"):
        ADPSGDStrategy.int4(overlaps=1)


def fit_with_int4() -> dict:
    model = seeded(lr=0.01, momentum=0.9)
    _, rounds = fit("adpsgd_int4", model, max_steps=12)
    return {"weights": weights(model), "rounds": [round_.local_steps for round_ in rounds]}


@pytest.mark.workers
def test_it_trains_by_its_name(pool):
    outcomes = pool.run_trainer(fit_with_int4)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert outcomes[0]["rounds"][:1] == [2]


def test_registering_twice_changes_nothing():
    ADPSGDStrategy.register_strategies()
    assert type(StrategyRegistry.get("adpsgd")) is ADPSGDStrategy


# Invariant 5, and the start


def start_from_different_seeds() -> dict:
    rank = int(os.environ["RANK"])
    model = seeded(rank)
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.update(weights(pl_module))

    fit(ADPSGDStrategy(4), model, callbacks=[Look()], max_steps=1)
    return seen


def test_all_ranks_start_from_the_same_weights(pool):
    assert identical(pool.run_trainer(start_from_different_seeds, workers=3))


def compare_with_ddp() -> list:
    results = []
    for strategy in (ADPSGDStrategy(1), "ddp"):
        # DDP broadcasts BatchNorm's statistics, which are averaged here; without it the two are the same algorithm.
        model = seeded(batch_norm=False)
        fit(strategy, model, max_epochs=2)
        results.append(weights(model))
    return results


@pytest.mark.workers
def test_period_one_with_plain_sgd_ends_with_the_weights_of_ddp(pool):
    for ours, theirs in pool.run_trainer(compare_with_ddp, workers=3):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


# Invariant 1: no hidden communication


class Collectives(TorchDispatchMode):
    """Records every operation of the c10d library, by the number of steps taken before it."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.seen: list[tuple[int, str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.seen.append((self.step, function._schema.name))
        return function(*args, **(kwargs or {}))


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    ALL_GATHER,
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "monitored_barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
    "recv_object_list",
    "batch_isend_irecv",
)


class CountCalls(L.Callback):
    """Counts calls of torch.distributed's functions, and c10d operations, between batches."""

    def __init__(self) -> None:
        self.mode = Collectives()
        self.calls: list[tuple[int, str]] = []
        self.sequence: list[int] = []
        self._originals: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in COLLECTIVES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(name))
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.mode.step += 1
        # What the process group itself has counted, in C++, however a collective was issued.
        self.sequence.append(dist.group.WORLD._get_sequence_number_for_group())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counted(self, name: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((self.mode.step, name))
            return self._originals[name](*args, **kwargs)

        return counted


def count_collectives(period: Any) -> dict:
    count = CountCalls()
    _, rounds = fit(ADPSGDStrategy(period), seeded(), callbacks=[count])
    return {
        "calls": count.calls,
        "operations": count.mode.seen,
        "sequence": count.sequence,
        "rounds": [round_.step - 1 for round_ in rounds if round_.trigger == "period"],
    }


@pytest.mark.workers
@pytest.mark.parametrize("period", [5, AdaptivePeriod(initial=3, sampling=6)], ids=["constant", "adaptive"])
def test_between_two_rounds_no_collective_is_issued(pool, period):
    for outcome in pool.run_trainer(count_collectives, period):
        batches = len(outcome["sequence"])
        assert batches == 16
        assert len(outcome["rounds"]) >= 2
        expected = set(outcome["rounds"])
        assert {step for step, _ in outcome["calls"] if step < batches} == expected
        assert {step for step, _ in outcome["operations"] if step < batches} == expected
        moved = {i for i in range(1, batches) if outcome["sequence"][i] != outcome["sequence"][i - 1]}
        assert moved == expected - {0}


def count_collectives_of_ddp() -> list:
    count = CountCalls()
    fit("ddp", seeded(), callbacks=[count])
    return count.sequence


@pytest.mark.workers
def test_the_same_count_sees_what_ddp_sends_at_every_step(pool):
    for sequence in pool.run_trainer(count_collectives_of_ddp):
        assert all(later > earlier for earlier, later in itertools.pairwise(sequence))


# Invariant 8: a local step costs what a single-device step costs


def profiled_hooks() -> list[str]:
    fitted, _ = fit(ADPSGDStrategy(3), seeded(), profiler="simple")
    return [name.split(".")[-1] for name in fitted.profiler.recorded_durations if "FirstCallback" in name]


@pytest.mark.workers
def test_lightning_is_given_no_hooks_to_call_at_every_step_that_do_nothing(pool):
    (hooks,) = pool.run_trainer(profiled_hooks, workers=1)
    at_every_step = {"on_train_batch_start", "on_train_batch_end"}
    assert at_every_step < set(hooks)
    assert {name for name in hooks if "backward" in name or "optimizer" in name or "zero_grad" in name} == set()


# Invariant 2: everyone takes the same decision


class RateOfItsOwn(Classifier):
    """Every rank has a different learning rate, as after a plateau that only one rank has seen."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr * (1 + self.global_rank))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)]


def rates_that_differ() -> list:
    torch.manual_seed(0)
    _, rounds = fit(ADPSGDStrategy(AdaptivePeriod(initial=2, sampling=8)), RateOfItsOwn(), max_epochs=4)
    return [(r.step, r.period, r.learning_rate, r.ratio, r.target) for r in rounds]


@pytest.mark.workers
def test_ranks_with_different_learning_rates_keep_the_same_period(pool):
    first, second = pool.run_trainer(rates_that_differ)
    assert first == second
    assert first[0][2] == pytest.approx(0.075)
    assert first[-1][1] > first[0][1]


# Invariant 3: validation, checkpoints and the end of training see the average


class Look(L.Callback):
    """Keeps the weights as other callbacks would see them."""

    def __init__(self) -> None:
        self.seen: dict[str, list] = {}

    def look(self, name: str, module: L.LightningModule) -> None:
        self.seen.setdefault(name, []).append(weights(module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look("batch", pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look("validation", pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        self.look("checkpoint", pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look("train_end", pl_module)


def look_everywhere(folder: str) -> dict:
    look, model = Look(), seeded()
    save = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    fitted, rounds = fit(
        ADPSGDStrategy(100),
        model,
        callbacks=[look, save],
        enable_checkpointing=True,
        val_check_interval=5,
        max_steps=13,
        loaders={"train_dataloaders": loader(512), "val_dataloaders": loader(48)},
    )
    return {
        "seen": look.seen,
        "rounds": [(r.step, r.trigger, r.local_steps) for r in rounds],
        "end": weights(model),
        "metric": fitted.callback_metrics["val_loss"].item(),
        "file": torch.load(f"{folder}/step=7.ckpt", weights_only=False)["state_dict"],
    }


@pytest.mark.workers
def test_validation_checkpoints_and_the_end_see_the_average_on_every_rank(pool, tmp_path):
    outcomes = pool.run_trainer(look_everywhere, str(tmp_path), workers=3)
    assert outcomes[0]["rounds"] == [
        (5, "validation", 5),
        (7, "checkpoint", 2),
        (10, "validation", 3),
        (13, "train_end", 3),
    ]
    for name in ("validation", "checkpoint", "train_end"):
        for moment in zip(*(outcome["seen"][name] for outcome in outcomes), strict=True):
            assert identical(list(moment)), name
    assert identical([outcome["end"] for outcome in outcomes])
    assert identical([outcomes[0]["seen"]["checkpoint"][0], outcomes[0]["file"]])
    # and it was the average of replicas that had drifted apart
    assert not identical([outcome["seen"]["batch"][3] for outcome in outcomes])


def no_step_no_round() -> list:
    _, rounds = fit(
        ADPSGDStrategy(4),
        seeded(),
        max_steps=8,
        val_check_interval=4,
        loaders={"train_dataloaders": loader(), "val_dataloaders": loader(32)},
    )
    return [(r.step, r.trigger) for r in rounds]


@pytest.mark.workers
def test_no_extra_round_is_made_where_no_step_was_taken(pool):
    assert pool.run_trainer(no_step_no_round) == [[(4, "period"), (8, "period")]] * 2


def rounds_read_later(later: bool) -> dict:
    class ReadLater(L.Callback):
        """Makes the CPU behave like a GPU: a round's measurements are read in the next step."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for local_sgd in trainer.strategy.local_sgd:
                local_sgd._engine._reads_later = later

    model = seeded(momentum=0.9)
    fitted, rounds = fit(
        ADPSGDStrategy(AdaptivePeriod(2)),
        model,
        callbacks=[ReadLater()],
        max_steps=24,
        max_epochs=None,
        val_check_interval=4,
        loaders={"train_dataloaders": loader(), "val_dataloaders": loader(32)},
    )
    return {
        "rounds": [round_._replace(seconds=0.0) for round_ in rounds],
        "weights": weights(model),
        "loss": fitted.callback_metrics["val_loss"].item(),
    }


@pytest.mark.workers
def test_measurements_that_are_read_a_step_later_change_neither_rounds_nor_weights(pool):
    for at_once, later in zip(
        pool.run_trainer(rounds_read_later, False), pool.run_trainer(rounds_read_later, True), strict=True
    ):
        assert {round_.trigger for round_ in at_once["rounds"]} == {"period", "validation"}
        assert later["rounds"] == at_once["rounds"]
        assert later["loss"] == at_once["loss"]
        assert identical([at_once["weights"], later["weights"]])


# Listeners


class Listens(L.Callback):
    """Listens to each fit, from a hook."""

    def __init__(self, hook: str) -> None:
        self.heard: list[int] = []
        setattr(self, hook, self.listen)

    def listen(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        trainer.strategy.subscribe(lambda round_: self.heard.append(round_.step))


@pytest.mark.usefixtures("alone")
def test_a_listener_given_before_fit_hears_every_fit_and_one_given_in_a_hook_that_fit_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    strategy, hooks = ADPSGDStrategy(8), [Listens("setup"), Listens("on_fit_start"), Listens("on_train_start")]
    early: list[int] = []
    between: list[int] = []
    strategy.subscribe(lambda round_: early.append(round_.step))
    model, twice = seeded(), trainer(strategy, callbacks=hooks)
    twice.fit(model, loader(128))
    assert [hook.heard for hook in hooks] == [[8, 16]] * 3
    assert early == [8, 16]

    strategy.subscribe(lambda round_: between.append(round_.step))
    twice.fit_loop.max_epochs = 2
    twice.fit(model, loader(128))
    assert early == [8, 16, 24, 32]
    assert between == [24, 32]
    assert [hook.heard for hook in hooks] == [[8, 16, 24, 32]] * 3


# Invariant 7


def storages() -> bool:
    model, pointers = seeded(), {}

    class Compare(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pointers.update({name: tensor.data_ptr() for name, tensor in pl_module.state_dict().items()})

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pointers["same"] = all(
                tensor.data_ptr() == pointers[name] for name, tensor in pl_module.state_dict().items()
            )

    fit(ADPSGDStrategy(2), model, callbacks=[Compare()])
    return pointers["same"]


@pytest.mark.workers
def test_parameters_and_buffers_keep_their_storage(pool):
    assert pool.run_trainer(storages) == [True, True]


# Total steps


def known_total_steps(options: dict) -> int | None:
    class Rule(ConstantPeriod):
        def setup(self, total_steps: int | None) -> None:
            Rule.told = total_steps

    fit(ADPSGDStrategy(Rule(3)), seeded(), **options)
    return Rule.told


@pytest.mark.workers
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 48),
        ({"max_epochs": 3, "max_steps": 20}, 20),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 12),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": -1, "max_time": "00:00:00:01"}, None),
    ],
    ids=str,
)
def test_the_rule_is_told_how_many_optimizer_steps_there_will_be(pool, options, steps):
    assert pool.run_trainer(known_total_steps, options) == [steps, steps]


def total_steps_that_differ() -> int | None:
    original = lightning_adpsgd.trainer.strategy.total_steps_of
    lightning_adpsgd.trainer.strategy.total_steps_of = lambda trainer: original(trainer) + 100 * trainer.global_rank
    try:
        return known_total_steps({"max_epochs": 3})
    finally:
        lightning_adpsgd.trainer.strategy.total_steps_of = original


@pytest.mark.workers
def test_where_ranks_expect_different_numbers_of_steps_rank_zeros_holds(pool):
    assert pool.run_trainer(total_steps_that_differ) == [48, 48]


def unbounded() -> None:
    fit(ADPSGDStrategy(), seeded(), max_epochs=-1, max_time="00:00:00:01")


@pytest.mark.workers
def test_a_share_of_an_unbounded_run_is_an_error_that_says_what_to_pass(pool):
    for outcome in pool.outcomes(unbounded, trainer=True):
        assert outcome.kind == "ValueError"
        assert "AdaptivePeriod(sampling=0.25)" in outcome.error
        assert "sampling=1000" in outcome.error


# Errors


class FailAt(L.Callback):
    """Raises on one rank."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 3:
            raise ValueError("a bad sample")


def save_on_exception(folder: str) -> dict:
    class SaveThenLeave(L.Callback):
        def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            trainer.strategy.save_checkpoint(checkpoint, f"{folder}/exception.ckpt")

    fitted = trainer(ADPSGDStrategy(100), callbacks=[FailAt(), SaveThenLeave()], max_steps=4)
    model = seeded()
    raised = None
    try:
        fitted.fit(model, loader())
    except Exception as error:
        raised = str(error)
    return {"raised": raised, "local_steps": fitted.strategy.local_sgd[0].local_steps}


@pytest.mark.workers
def test_a_save_on_one_ranks_exception_does_not_wait(pool, tmp_path):
    outcomes = pool.outcomes(save_on_exception, str(tmp_path), trainer=True)
    assert outcomes[0].value == {"raised": "a bad sample", "local_steps": 3}
    assert "state_dict" in torch.load(tmp_path / "exception.ckpt", weights_only=False)


def foreign_optimizer() -> None:
    class Swap(Classifier):
        def training_step(self, batch: Any) -> Any:
            if self.trainer.global_step == 2:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]
            return super().training_step(batch)

    torch.manual_seed(0)
    fit(ADPSGDStrategy(4), Swap())


@pytest.mark.workers
def test_an_optimizer_that_appears_in_mid_training_is_refused(pool):
    for outcome in pool.outcomes(foreign_optimizer, trainer=True):
        assert outcome.kind == "MisconfigurationException"
        assert "add_param_group" in outcome.error


def one_device() -> dict:
    model = seeded()
    fitted, rounds = fit(ADPSGDStrategy(3), model)
    return {
        "steps": [r.step for r in rounds],
        "sent": sum(r.sent_bytes for r in rounds),
        "global_step": fitted.global_step,
    }


@pytest.mark.workers
def test_one_device_is_legal_and_sends_nothing(pool):
    (outcome,) = pool.run_trainer(one_device, workers=1)
    assert outcome == {"steps": [*range(3, 33, 3), 32], "sent": 0, "global_step": 32}
