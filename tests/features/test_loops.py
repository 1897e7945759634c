"""Lightning's loops: how much of the data they run over, when they validate, and which weights they use."""

import functools
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import lightning.pytorch.loops.utilities
import lightning.pytorch.trainer.setup
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod, LocalSGD
from tests.features.outcomes import (
    by_hand,
    check,
    check_by_hand,
    in_order,
    in_order_loaders,
    outcome_of,
    periods,
    share,
    warnings_kept,
)
from tests.training import Classifier, RoundsKept, data, fit, identical, seeded, trainer, weights

pytestmark = pytest.mark.workers


def both_in_order() -> dict:
    """Loaders for training and validation, 16 batches and 4 per rank."""
    return {"train_dataloaders": in_order(), "val_dataloaders": in_order(64)}


def model_with(state: dict[str, Tensor]) -> Classifier:
    model = Classifier()
    model.load_state_dict(state)
    return model.eval()


def loss_by_hand(state: dict[str, Tensor], batches: int = 4) -> float:
    """The mean over all ranks' validation batches."""
    model = model_with(state)
    with torch.no_grad():
        losses = [model.loss(batch) for rank in range(2) for batch in share(rank, size=64)[:batches]]
    return torch.stack(losses).mean().item()


def steps_of(epochs: int, batches: int = 16) -> list[list[int]]:
    return [[index] for index in range(batches)] * epochs


# How much of the data


def overfit() -> dict:
    return outcome_of(seeded(), ADPSGDStrategy(5), overfit_batches=4, max_epochs=3)


def test_overfit_batches_trains_on_the_same_few_batches_of_every_rank(pool):
    outcomes = pool.run_trainer(overfit)
    check(outcomes, periods(12, period=5))
    check_by_hand(outcomes, by_hand(seeded(), steps_of(3, batches=4), [5, 10, 12]))


def fast_dev_run(batches: int | bool) -> dict:
    return outcome_of(seeded(), ADPSGDStrategy(AdaptivePeriod()), fast_dev_run=batches, loaders=both_in_order())


@pytest.mark.parametrize("batches", [True, 3, 4, 6], ids=str)
def test_fast_dev_run_averages_like_a_run_of_that_many_steps(pool, batches):
    outcomes = pool.run_trainer(fast_dev_run, batches)
    steps = int(batches)
    rounds = {
        1: [(1, "validation")],
        3: [(3, "validation")],
        4: [(4, "period")],
        6: [(4, "period"), (6, "validation")],
    }[steps]
    check(outcomes, [(0, step, trigger) for step, trigger in rounds])
    check_by_hand(outcomes, by_hand(seeded(), steps_of(1)[:steps], [step for step, _ in rounds]))


class CountsBatches(Classifier):
    """Counts the samples that it sees."""

    seen = 0

    def validation_step(self, batch: Any) -> None:
        super().validation_step(batch)
        self.seen += 1


class Told(ConstantPeriod):
    """Keeps the run's length that it is given."""

    totals: tuple = ()

    def setup(self, total_steps: int | None) -> None:
        Told.totals = (*Told.totals, total_steps)


def limited(options: dict) -> dict:
    Told.totals = ()
    torch.manual_seed(0)
    model = CountsBatches()
    loaders = both_in_order()
    result = outcome_of(
        model, ADPSGDStrategy(Told(5)), max_epochs=2, num_sanity_val_steps=0, loaders=loaders, **options
    )
    return {**result, "told": Told.totals, "validated": model.seen}


@pytest.mark.parametrize(
    ("options", "batches", "validated", "rounds"),
    [
        ({"limit_train_batches": 6}, 6, 8, [(5, "period"), (6, "validation"), (11, "period"), (12, "validation")]),
        (
            {"limit_train_batches": 0.5, "limit_val_batches": 1},
            8,
            2,
            [(5, "period"), (8, "validation"), (13, "period"), (16, "validation")],
        ),
        (
            {"limit_train_batches": 6, "limit_val_batches": 0},
            6,
            0,
            [(5, "period"), (10, "period"), (12, "train_end")],
        ),
    ],
    ids=["train", "share-of-train-and-val", "no-val"],
)
def test_limits_on_batches_limit_the_steps_and_the_validations(pool, options, batches, validated, rounds):
    outcomes = pool.run_trainer(limited, options)
    check(outcomes, [(0, step, trigger) for step, trigger in rounds])
    assert [outcome["told"] for outcome in outcomes] == [(2 * batches,)] * 2
    assert [outcome["validated"] for outcome in outcomes] == [validated] * 2
    steps = [[index] for index in range(batches)] * 2
    check_by_hand(outcomes, by_hand(seeded(), steps, [step for step, _ in rounds]))


def no_steps(options: dict) -> dict:
    model = seeded()
    before = weights(model)
    _, rounds = fit(ADPSGDStrategy(), model, **options)
    return {"rounds": len(rounds), "unchanged": identical([before, weights(model)])}


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"limit_train_batches": 0}], ids=str)
def test_a_run_of_no_steps_ends_without_a_round(pool, options):
    assert pool.run_trainer(no_steps, options) == [{"rounds": 0, "unchanged": True}] * 2


class Stream(IterableDataset):
    """A rank's samples, forever."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = data().tensors
        while True:
            yield from zip(inputs[self._rank :: 2], labels[self._rank :: 2], strict=True)


def stream(same_on_all_ranks: bool) -> dict:
    Told.totals = ()
    rank = 0 if same_on_all_ranks else int(os.environ["RANK"])
    texts: list[str] = []
    with warnings_kept(texts):
        result = outcome_of(
            seeded(),
            ADPSGDStrategy(Told(4)),
            max_steps=18,
            max_epochs=-1,
            val_check_interval=7,
            limit_val_batches=1,
            loaders={"train_dataloaders": DataLoader(Stream(rank), batch_size=8), "val_dataloaders": in_order(64)},
        )
    return {**result, "told": Told.totals, "warnings": [text for text in texts if "identical" in text]}


def test_an_endless_dataset_is_trained_on_for_max_steps(pool):
    outcomes = pool.run_trainer(stream, False)
    rounds = [(4, "period"), (7, "validation"), (11, "period"), (14, "validation"), (18, "period")]
    check(outcomes, [(0, step, trigger) for step, trigger in rounds])
    assert [outcome["told"] for outcome in outcomes] == [(18,), (18,)]
    steps = [[index % 16] for index in range(18)]
    check_by_hand(outcomes, by_hand(seeded(), steps, [step for step, _ in rounds]))
    assert [outcome["warnings"] for outcome in outcomes] == [[], []]


@pytest.mark.parametrize("workers", [2, 3])
def test_an_iterable_dataset_that_is_the_same_on_all_ranks_is_warned_of_once(pool, workers):
    outcomes = pool.run_trainer(stream, True, workers=workers)
    assert [len(outcome["warnings"]) for outcome in outcomes] == [1, *[0] * (workers - 1)]


class Remembers:
    """A rank's batches in order, from a loader with a state, like torchdata's."""

    def __init__(self, rank: int) -> None:
        self._batches = share(rank)
        self._place = 0
        self.given: list[int] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._place = self._place, 0
        for index in range(first, len(self._batches)):
            self.given.append(index)
            self._place = index + 1
            yield self._batches[index]
        self._place = 0

    def state_dict(self) -> dict:
        return {"place": self._place}

    def load_state_dict(self, state: dict) -> None:
        self._place = state["place"]


def resume_in_mid_epoch(strategy: str, folder: str) -> dict:
    rank = int(os.environ["RANK"])
    save = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    made = [ADPSGDStrategy(5) if strategy == "adpsgd" else strategy for _ in range(2)]
    through = seeded()
    fit(made[0], through, callbacks=[save], enable_checkpointing=True, loaders={"train_dataloaders": Remembers(rank)})
    resumed, again = seeded(1), Remembers(rank)
    fit(made[1], resumed, loaders={"train_dataloaders": again, "ckpt_path": f"{folder}/step=10.ckpt"})
    return {"given": again.given, "through": weights(through), "resumed": weights(resumed)}


@pytest.mark.parametrize("strategy", ["adpsgd", "ddp"])
def test_a_loader_with_a_state_continues_where_it_was_when_a_run_is_resumed(pool, tmp_path, strategy):
    for outcome in pool.run_trainer(resume_in_mid_epoch, strategy, str(tmp_path)):
        assert outcome["given"] == [10, 11, 12, 13, 14, 15]
        assert identical([outcome["through"], outcome["resumed"]])


HOOKS = (
    *("setup", "configure_model", "configure_optimizers", "on_fit_start", "on_sanity_check_start", "on_train_start"),
    *("on_train_epoch_start", "on_validation_start", "on_validation_end", "on_train_epoch_end", "on_train_end"),
    *("on_fit_end", "teardown", "train_dataloader", "val_dataloader"),
)


class NotesHooks(Classifier):
    """Records which of its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def train_dataloader(self) -> DataLoader:
        return in_order()

    def val_dataloader(self) -> DataLoader:
        return in_order(64)

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name not in HOOKS:
            return attribute

        @functools.wraps(attribute)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return attribute(*args, **kwargs)

        return noted


def hooks() -> list[list[str]]:
    calls = []
    for strategy in (ADPSGDStrategy(4), "ddp"):
        torch.manual_seed(0)
        model = NotesHooks()
        trainer(strategy).fit(model)
        calls.append(model.calls)
    return calls


def test_hooks_are_called_in_the_same_order_as_under_ddp(pool):
    for ours, theirs in pool.run_trainer(hooks):
        assert "train_dataloader" in theirs
        assert ours == theirs


# When to validate


def validate_within(options: dict) -> dict:
    class Sees(Classifier):
        seen: tuple = ()

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.seen = (*self.seen, weights(self))

    torch.manual_seed(0)
    model = Sees()
    kept: list[float] = []

    class Metrics(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                kept.append(trainer.callback_metrics["val_loss"].item())

    result = outcome_of(model, ADPSGDStrategy(6), callbacks=[Metrics()], loaders=both_in_order(), **options)
    return {**result, "metrics": kept, "seen": model.seen}


@pytest.mark.parametrize(
    ("options", "validations", "rounds"),
    [
        ({"val_check_interval": 0.25}, [4, 8, 12, 16], [(step, "validation") for step in (4, 8, 12, 16)]),
        (
            {"val_check_interval": 7},
            [7, 14],
            [(6, "period"), (7, "validation"), (13, "period"), (14, "validation"), (16, "train_end")],
        ),
        (
            {"val_check_interval": 10, "check_val_every_n_epoch": None, "max_epochs": 2},
            [10, 20, 30],
            [
                *[(6, "period"), (10, "validation"), (16, "period"), (20, "validation")],
                *[(26, "period"), (30, "validation"), (32, "train_end")],
            ],
        ),
        (
            {"check_val_every_n_epoch": 2, "max_epochs": 5, "limit_train_batches": 7},
            [14, 28],
            [
                *[(6, "period"), (12, "period"), (14, "validation"), (20, "period"), (26, "period")],
                *[(28, "validation"), (34, "period"), (35, "train_end")],
            ],
        ),
    ],
    ids=["share-of-an-epoch", "batches", "batches-across-epochs", "every-second-epoch"],
)
def test_every_validation_sees_the_average_and_measures_it(pool, options, validations, rounds):
    outcomes = pool.run_trainer(validate_within, options)
    check(outcomes, [(0, step, trigger) for step, trigger in rounds])
    steps = steps_of(options.get("max_epochs", 1), options.get("limit_train_batches", 16))
    for outcome in outcomes:
        assert len(outcome["seen"]) == len(outcome["metrics"]) == len(validations)
        for step, seen, metric in zip(validations, outcome["seen"], outcome["metrics"], strict=True):
            expected = by_hand(seeded(), steps[:step], [met for met, _ in rounds if met <= step]).weights
            for name, tensor in expected.items():
                torch.testing.assert_close(seen[name], tensor)
            assert metric == pytest.approx(loss_by_hand(expected), rel=1e-4)
    for seen in zip(*(outcome["seen"] for outcome in outcomes), strict=True):
        assert identical([*seen])


def adapt_and_validate() -> dict:
    kept = RoundsKept()
    rule = AdaptivePeriod(initial=3, sampling=20, low=1.0, high=1.0)
    options = {"callbacks": [kept], "val_check_interval": 5, "max_epochs": 3, "loaders": both_in_order()}
    result = outcome_of(seeded(), ADPSGDStrategy(rule), **options)
    return {**result, "rule": [(r.step, r.trigger, r.period, r.ratio, r.target) for r in kept.rounds]}


def test_the_rule_does_not_see_the_rounds_before_validations(pool):
    outcomes = pool.run_trainer(adapt_and_validate)
    check(outcomes)
    for outcome in outcomes:
        sampled = [ratio for step, trigger, _, ratio, _ in outcome["rule"] if trigger == "period" and step <= 20]
        assert outcome["rule"][-1][4] == pytest.approx(sum(sampled) / len(sampled))
        assert len(sampled) < len([step for step, *_ in outcome["rule"] if step <= 20])
        for (_, trigger, period, _, _), (*_, following, _, _) in itertools.pairwise(outcome["rule"]):
            assert trigger == "period" or following == period


def test_a_validation_in_mid_accumulation_sees_the_same_on_all_ranks(pool):
    outcomes = pool.run_trainer(validate_within, {"val_check_interval": 2, "accumulate_grad_batches": 4})
    # No step was taken since the round in every second case, but BatchNorm has seen two more batches.
    assert [round_ for round_ in outcomes[0]["rounds"] if round_[2] != "validation"] == []
    assert {step for _, step, _ in outcomes[0]["rounds"]} - {0} == {1, 2, 3, 4}
    assert len(outcomes[0]["seen"]) == 8
    for seen in zip(*(outcome["seen"] for outcome in outcomes), strict=True):
        assert identical([*seen])


def validate_by_the_clock() -> dict:
    torch.manual_seed(0)
    options = {"val_check_interval": timedelta(seconds=0.25), "check_val_every_n_epoch": None, "max_epochs": 2}
    return outcome_of(seeded(), ADPSGDStrategy(10), loaders=both_in_order(), **options)


@pytest.mark.skipif(not hasattr(lightning.pytorch.trainer.setup, "_parse_time_interval_seconds"), reason="new in 2.6")
def test_a_validation_by_the_clock_is_refused_with_what_to_do_instead(pool):
    for outcome in pool.outcomes(validate_by_the_clock, trainer=True):
        assert outcome.kind == "MisconfigurationException"
        assert "every worker looks at its own clock" in outcome.error
        assert "Give a number of batches" in outcome.error


# Inference mode, in which tensors are made that cannot be written to outside of it


def first_round_before_validation(inference_mode: bool) -> dict:
    options = {"val_check_interval": 3, "inference_mode": inference_mode, "loaders": both_in_order()}
    return outcome_of(seeded(), ADPSGDStrategy(5), max_epochs=2, **options)


FIRST_BEFORE_VALIDATION = [3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 32]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_first_round_may_be_the_one_before_a_validation(pool, inference_mode):
    outcomes = pool.run_trainer(first_round_before_validation, inference_mode)
    # after the end of the epoch, at step 16, the count continues
    check(outcomes, [(0, s, "train_end" if s == 32 else "validation") for s in FIRST_BEFORE_VALIDATION])
    check_by_hand(outcomes, by_hand(seeded(), steps_of(2), FIRST_BEFORE_VALIDATION))


class ValidatesInInferenceMode(Classifier):
    """Makes validation within fit run in inference mode, which Lightning (up to 2.6) uses outside of fit only."""

    def on_train_start(self) -> None:
        self.modes = []
        self.trainer.fit_loop.epoch_loop.val_loop.inference_mode = True

    def validation_step(self, batch: Any) -> None:
        super().validation_step(batch)
        if not self.trainer.sanity_checking:
            self.modes.append(torch.is_inference_mode_enabled())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def in_inference_mode(folder: str, policy: str) -> dict:
    utilities = lightning.pytorch.loops.utilities
    original = utilities._distributed_is_initialized
    utilities._distributed_is_initialized = lambda: False  # with gloo, Lightning avoids inference mode altogether
    try:
        torch.manual_seed(0)
        model = ValidatesInInferenceMode()
        result = outcome_of(
            model,
            ADPSGDStrategy(12, optimizer_state=policy),
            callbacks=[ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1)] if folder else [],
            enable_checkpointing=bool(folder),
            max_epochs=2,
            val_check_interval=10,
            loaders=both_in_order(),
        )
    finally:
        utilities._distributed_is_initialized = original
    return {**result, "modes": set(model.modes)}


@pytest.mark.parametrize("saves", [False, True], ids=["validates", "validates-and-saves"])
@pytest.mark.parametrize("policy", ["local", "average", "reset"])
def test_rounds_in_inference_mode_leave_tensors_that_training_can_write_to(pool, tmp_path, policy, saves):
    outcomes = pool.run_trainer(in_inference_mode, str(tmp_path) if saves else "", policy)
    rounds = [(10, "validation"), (22, "period"), (26, "validation"), (32, "train_end")]
    if saves:  # the same steps once more, for the optimizer's state
        rounds[3:3], rounds[1:1] = [(26, "checkpoint")], [(10, "checkpoint")]
    assert [outcome["modes"] for outcome in outcomes] == [{True}, {True}]
    assert identical([outcome["weights"] for outcome in outcomes])
    assert outcomes[0]["rounds"] == outcomes[1]["rounds"] == [(0, *round_) for round_ in rounds]


def plain_loop(trigger: str) -> dict:
    rank = dist.get_rank()
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    local_sgd = LocalSGD(optimizer, 3, module=model)
    rounds = []
    local_sgd.subscribe(lambda round_: rounds.append((round_.step, round_.trigger)))
    for step, batch in enumerate(share(rank)[:8], start=1):
        optimizer.zero_grad()
        if step > 2 or rank == 0:
            model.loss(batch).backward()
        else:  # the second rank has no gradients, hence no momentum, for the first layer
            F.cross_entropy(model.net[3](batch[0].repeat(1, 2)), batch[1]).backward()
        optimizer.step()
        local_sgd.step()
        if step == 2:
            with torch.inference_mode():
                local_sgd.average(trigger)
    local_sgd.average()
    return {"weights": weights(model), "rounds": rounds}


@pytest.mark.parametrize(
    "trigger",
    ["validation", "checkpoint"],
)
def test_a_first_round_in_inference_mode_leaves_tensors_that_training_can_write_to(pool, trigger):
    outcomes = pool.run(plain_loop, trigger)
    assert identical([outcome["weights"] for outcome in outcomes])
    expected = [(2, trigger), (5, "period"), (8, "period")]
    assert [outcome["rounds"] for outcome in outcomes] == [expected, expected]


# Validate, test, predict


class Evaluated(Classifier):
    """Logs its score under three names."""

    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0])


def evaluate(trainer: L.Trainer, model: L.LightningModule) -> dict:
    return {
        "validate": trainer.validate(model, in_order(64), verbose=False)[0]["val_loss"],
        "test": trainer.test(model, in_order(64), verbose=False)[0]["test_loss"],
        "predict": torch.cat(trainer.predict(model, in_order(64))),
    }


def check_evaluated(outcomes: list[dict], state: dict[str, Tensor]) -> None:
    model = model_with(state)
    for rank, outcome in enumerate(outcomes):
        assert outcome["validate"] == pytest.approx(loss_by_hand(state), rel=1e-4)
        assert outcome["test"] == pytest.approx(loss_by_hand(state), rel=1e-4)
        with torch.no_grad():
            expected = torch.cat([model.net(inputs) for inputs, _ in share(rank, size=64)])
        torch.testing.assert_close(outcome["predict"], expected)


def evaluate_after_fit(inference_mode: bool) -> dict:
    torch.manual_seed(0)
    model = Evaluated()
    fitted, rounds = fit(ADPSGDStrategy(5), model, loaders=in_order_loaders(), inference_mode=inference_mode)
    count = len(rounds)
    result = evaluate(fitted, model)
    return {**result, "weights": weights(model), "rounds_since": len(rounds) - count}


@pytest.mark.parametrize("inference_mode", [True, False])
def test_after_fit_all_ranks_validate_test_and_predict_with_the_average(pool, inference_mode):
    outcomes = pool.run_trainer(evaluate_after_fit, inference_mode)
    expected = by_hand(seeded(), steps_of(1), [5, 10, 15, 16]).weights
    check_evaluated(outcomes, expected)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert [outcome["rounds_since"] for outcome in outcomes] == [0, 0]


def evaluate_alone(first: str) -> dict:
    torch.manual_seed(int(os.environ["RANK"]))
    model = Evaluated()
    own = weights(model)
    alone = trainer(ADPSGDStrategy(5))
    getattr(alone, first)(model, in_order(64))
    return {**evaluate(alone, model), "own": own, "weights": weights(model)}


@pytest.mark.parametrize("first", ["validate", "test", "predict"])
def test_without_fit_all_ranks_evaluate_the_first_ranks_weights(pool, first):
    outcomes = pool.run_trainer(evaluate_alone, first)
    assert not identical([outcome["own"] for outcome in outcomes])
    assert identical([outcomes[0]["own"], *(outcome["weights"] for outcome in outcomes)])
    check_evaluated(outcomes, outcomes[0]["own"])


# Several fits with one Trainer


class StateAtStart(L.Callback):
    """Keeps its count and its rule's state at the start of every fit."""

    def __init__(self) -> None:
        self.states: list[dict] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states.append(trainer.strategy.local_sgd[0].state_dict())


def fit_twice(rule: Any, other_model: bool, validate_between: bool) -> dict:
    kept, start = RoundsKept(), StateAtStart()
    twice = trainer(ADPSGDStrategy(rule), callbacks=[kept, start])
    model = seeded()
    before = weights(model)
    twice.fit(model, in_order())
    end = twice.strategy.local_sgd[0].state_dict()
    if validate_between:
        twice.validate(model, in_order(64), verbose=False)
    if other_model:
        model = seeded(1)
    twice.fit_loop.max_epochs = 2
    twice.fit(model, in_order())
    return {
        "before": before,
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in kept.rounds],
        "variances": [r.variance for r in kept.rounds],
        "rounds_of_rule": [(r.step, r.period, r.target) for r in kept.rounds],
        "first_end": end,
        "starts": start.states,
        "steps": twice.strategy.local_sgd[0].steps,
        "global_step": twice.global_step,
    }


@pytest.mark.parametrize("validate_between", [False, True], ids=["at-once", "validated-between"])
def test_a_second_fit_of_the_same_model_continues_counting(pool, validate_between):
    outcomes = pool.run_trainer(fit_twice, 5, False, validate_between)
    ends = [(16, "train_end"), (21, "period"), (26, "period"), (31, "period"), (32, "train_end")]
    check(outcomes, [*periods(15, period=5), *((0, step, trigger) for step, trigger in ends)])
    assert outcomes[0]["steps"] == outcomes[0]["global_step"] == 32
    check_by_hand(outcomes, by_hand(seeded(), steps_of(2), [5, 10, 15, 16, 21, 26, 31, 32]))


def test_a_second_fit_of_the_same_model_continues_with_what_the_rule_has_learned(pool):
    rule = AdaptivePeriod(initial=2, sampling=6, low=1.0, high=1.0)
    outcomes = pool.run_trainer(fit_twice, rule, False, False)
    check(outcomes)
    for outcome in outcomes:
        first, second = outcome["starts"]
        end = outcome["first_end"]
        assert first["steps"] == 0
        assert second["steps"] == end["steps"] == 16
        assert second["local_steps"] == 0
        assert second["period"] == end["period"]
        assert second["period"]["samples"] == 3
        # the rule does not begin to sample again: the target stays
        later = {target for step, _, target in outcome["rounds_of_rule"] if step > 6}
        assert later == {end["period"]["target"]}


def test_a_fit_of_another_model_starts_anew(pool):
    outcomes = pool.run_trainer(fit_twice, AdaptivePeriod(initial=5, sampling=6), True, False)
    for outcome in outcomes:
        first, second = outcome["starts"]
        assert first == second
        assert second["steps"] == 0
        assert second["period"]["samples"] == 0
        assert outcome["first_end"]["period"]["samples"] > 0
        assert outcome["steps"] == 16
        assert outcome["global_step"] == 32
    again = [step for _, step, _ in outcomes[0]["rounds"]]
    assert again[again.index(16) + 1] == 5  # counted from the new start
    assert identical([outcome["weights"] for outcome in outcomes])


def fit_anew() -> dict:
    """Two Trainers share nothing, even if they train the same model."""
    model = seeded()
    fit(ADPSGDStrategy(5), model, loaders=in_order_loaders())
    return outcome_of(model, ADPSGDStrategy(5), loaders=in_order_loaders())


def test_another_trainer_continues_from_the_average_and_counts_anew(pool):
    outcomes = pool.run_trainer(fit_anew)
    check(outcomes, periods(16, period=5))
    expected = by_hand(seeded(), steps_of(2), [5, 10, 15, 16, 21, 26, 31, 32])
    check_by_hand(outcomes, expected._replace(variances=expected.variances[4:]))
