"""Accumulation, clipping, several optimizers and unusual ones, compared with a run by hand."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, ConstantPeriod
from tests.features.outcomes import (
    ByHand,
    by_hand,
    check,
    check_by_hand,
    in_order_loaders,
    outcome_of,
    periods,
    replace_by_mean,
    share,
    warnings_kept,
)
from tests.training import Classifier, RoundsKept, fit, identical, loader, seeded, weights

pytestmark = pytest.mark.workers


def one_by_one(batches: int) -> list[list[int]]:
    """A step for every batch."""
    return [[index] for index in range(batches)]


# A plain run, without which the run by hand would prove nothing about the others


def plain() -> dict:
    return outcome_of(seeded(), loaders=in_order_loaders(), max_steps=14)


def test_a_plain_run_is_local_sgd_as_computed_by_hand(pool):
    outcomes = pool.run_trainer(plain)
    check(outcomes, periods(14))
    check_by_hand(outcomes, by_hand(seeded(), one_by_one(14), [4, 8, 12, 14]))


# Accumulation


def accumulate() -> dict:
    return outcome_of(seeded(), accumulate_grad_batches=3, loaders=in_order_loaders())


def test_the_period_counts_optimizer_steps_under_gradient_accumulation(pool):
    outcomes = pool.run_trainer(accumulate)
    # 16 batches are five steps of three and one of the last batch alone
    check(outcomes, periods(6))
    assert outcomes[0]["global_step"] == 6
    steps = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15]]
    check_by_hand(outcomes, by_hand(seeded(), steps, [4, 6], divisor=3))


def accumulate_on_schedule() -> dict:
    schedule = GradientAccumulationScheduler({0: 2, 1: 4})
    return outcome_of(seeded(), ADPSGDStrategy(5), callbacks=[schedule], max_epochs=2, loaders=in_order_loaders())


def test_the_period_counts_optimizer_steps_while_a_scheduler_changes_the_accumulation(pool):
    outcomes = pool.run_trainer(accumulate_on_schedule)
    # eight steps of two batches, and in the second epoch four of four
    check(outcomes, periods(12, period=5))
    assert outcomes[0]["global_step"] == 12
    steps = [[i, i + 1] for i in range(0, 16, 2)] + [[i, i + 1, i + 2, i + 3] for i in range(0, 16, 4)]
    check_by_hand(outcomes, by_hand(seeded(), steps, [5, 10, 12]))


def length_under_a_schedule() -> list[int | None]:
    told: list[int | None] = []

    class Rule(ConstantPeriod):
        def setup(self, total_steps: int | None) -> None:
            told.append(total_steps)

    schedule = GradientAccumulationScheduler({0: 2, 1: 4})
    fit(ADPSGDStrategy(Rule(5)), seeded(), callbacks=[schedule], max_epochs=2)
    return told


def test_the_rule_is_told_the_steps_that_a_scheduled_accumulation_results_in(pool):
    assert pool.run_trainer(length_under_a_schedule) == [[12], [12]]


# Clipping


class Clipped(Classifier):
    """Notes the norm of the gradients as the optimizer meets them."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = getattr(self, "norms", [])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())


def clip(algorithm: str) -> dict:
    torch.manual_seed(0)
    model = Clipped()
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm, "loaders": in_order_loaders()}
    return {**outcome_of(model, **options), "norms": model.norms}


def test_gradients_are_clipped_on_every_worker_by_its_own_norm(pool):
    outcomes = pool.run_trainer(clip, "norm")
    check(outcomes, periods(16))
    for outcome in outcomes:
        assert len(outcome["norms"]) == 16
        assert max(outcome["norms"]) == pytest.approx(0.05, rel=1e-3)
    assert outcomes[0]["norms"] != outcomes[1]["norms"]
    expected = by_hand(
        seeded(), one_by_one(16), [4, 8, 12, 16], clip=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)
    )
    check_by_hand(outcomes, expected)


def test_gradients_are_clipped_on_every_worker_by_value(pool):
    outcomes = pool.run_trainer(clip, "value")
    check(outcomes, periods(16))
    expected = by_hand(
        seeded(), one_by_one(16), [4, 8, 12, 16], clip=lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.05)
    )
    check_by_hand(outcomes, expected)


# Optimization by hand


class Adversaries(L.LightningModule):
    """A generator and a discriminator, stepped by hand, the second twice as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any) -> None:
        real, _ = batch
        generator, discriminator = self.optimizers()
        for _ in range(2):
            self.toggle_optimizer(discriminator)
            loss = self.discriminator(self.generator(real).detach()).mean() - self.discriminator(real).mean()
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
            self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        loss = -self.discriminator(self.generator(real)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.01),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.01),
        ]


def adversaries() -> dict:
    torch.manual_seed(0)
    return outcome_of(Adversaries(), ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6, maximum=5)))


def test_each_of_several_optimizers_has_its_own_count_and_period(pool):
    outcomes = pool.run_trainer(adversaries)
    check(outcomes)
    by_optimizer = {
        index: [(step, trigger) for optimizer, step, trigger in outcomes[0]["rounds"] if optimizer == index]
        for index in (0, 1)
    }
    assert by_optimizer[0][:2] == [(3, "period"), (6, "period")]
    assert by_optimizer[1][:2] == [(3, "period"), (6, "period")]
    assert by_optimizer[0][-1][0] == 16
    assert by_optimizer[1][-1][0] == 32


class AdversariesWithoutStatistics(Adversaries):
    """The same without BatchNorm, whose statistics would join the rounds of both."""

    def __init__(self) -> None:
        super().__init__()
        self.generator[1] = nn.Identity()
        self.discriminator[1] = nn.Identity()

    def loss_of(self, index: int, real: Tensor) -> Tensor:
        """What the optimizer of this index minimizes."""
        if index == 0:
            return -self.discriminator(self.generator(real)).mean()
        return self.discriminator(self.generator(real).detach()).mean() - self.discriminator(real).mean()


def adversaries_in_order() -> dict:
    torch.manual_seed(0)
    return outcome_of(AdversariesWithoutStatistics(), ADPSGDStrategy(5), loaders=in_order_loaders())


def adversaries_by_hand() -> ByHand:
    torch.manual_seed(0)
    first = AdversariesWithoutStatistics()
    replicas = [first, copy.deepcopy(first)]
    optimizers = [replica.configure_optimizers() for replica in replicas]
    counts = [0, 0]
    variances = []

    def average(index: int) -> None:
        same = zip(*(of_rank[index].param_groups[0]["params"] for of_rank in optimizers), strict=True)
        variances.append(sum(replace_by_mean(tensors) for tensors in same))

    for batch in range(16):
        for index in (1, 1, 0):
            for rank, replica in enumerate(replicas):
                optimizers[rank][index].zero_grad()
                replica.loss_of(index, share(rank)[batch][0]).backward()
                optimizers[rank][index].step()
            counts[index] += 1
            if counts[index] % 5 == 0:
                average(index)
    average(0)
    average(1)
    return ByHand(weights(first), variances)


def test_several_optimizers_in_turn_match_the_run_by_hand(pool):
    outcomes = pool.run_trainer(adversaries_in_order)
    check(outcomes)
    for index, steps in ((0, 16), (1, 32)):
        assert [r for r in outcomes[0]["rounds"] if r[0] == index] == periods(steps, 5, index)
    check_by_hand(outcomes, adversaries_by_hand())


class LossThenRound(Adversaries):
    """Runs a backward pass through a BatchNorm after another optimizer's round has averaged its statistics."""

    def training_step(self, batch: Any) -> None:
        real, _ = batch
        generator, discriminator = self.optimizers()
        loss = self.generator(real).square().mean()
        self.manual_backward(self.discriminator(real).mean())
        discriminator.step()  # a round at every step
        self.manual_backward(loss)
        generator.step()
        generator.zero_grad()
        discriminator.zero_grad()


def loss_then_round() -> dict:
    torch.manual_seed(0)
    return outcome_of(LossThenRound(), ADPSGDStrategy(1))


def test_a_round_between_forward_and_backward_of_another_optimizer_is_harmless(pool):
    outcomes = pool.run_trainer(loss_then_round)
    check(outcomes, [(optimizer, step, "period") for step in range(1, 17) for optimizer in (1, 0)])


class FreezesInTurn(AdversariesWithoutStatistics):
    """Freezes the discriminator while the generator is trained, as many GANs do by hand, and leaves it so."""

    def training_step(self, batch: Any) -> None:
        real, _ = batch
        for index, optimizer in reversed([*enumerate(self.optimizers())]):
            self.discriminator.requires_grad_(index == 1)
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(index, real))
            optimizer.step()

    def validation_step(self, batch: Any) -> None:
        pass


def freeze_in_turn(period: int) -> dict:
    seen: list[dict] = []

    class Look(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(weights(pl_module))

    torch.manual_seed(0)
    loaders = {"train_dataloaders": loader(), "val_dataloaders": loader(32)}
    options = {"val_check_interval": 3, "num_sanity_val_steps": 0, "loaders": loaders}
    result = outcome_of(FreezesInTurn(), ADPSGDStrategy(period), callbacks=[Look()], **options)
    return {**result, "seen": seen}


@pytest.mark.parametrize(
    "period",
    [1, *(p for p in (2, 8))],
)
def test_parameters_that_are_frozen_in_turn_are_averaged_before_validations_checkpoints_and_the_end(pool, period):
    outcomes = pool.run_trainer(freeze_in_turn, period)
    assert len(outcomes[0]["seen"]) == 5
    for seen in zip(*(outcome["seen"] for outcome in outcomes), strict=True):
        assert identical([*seen])
    check(outcomes)


class StepsBehindItsBack(Classifier):
    """Steps a plain optimizer by hand, so that neither Lightning nor the strategy is called."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.which = which
        self.own = torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch: Any) -> None:
        optimizer = self.own if self.which == "its own" else self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return None if self.which == "its own" else self.own


def step_behind_its_back(which: str) -> dict:
    torch.manual_seed(0)
    texts: list[str] = []
    model = StepsBehindItsBack(which)
    with warnings_kept(texts):
        fit(ADPSGDStrategy(4), model)
    warned = any("never stepped" in text or "not averaged" in text for text in texts)
    return {"weights": weights(model), "warned": warned}


@pytest.mark.parametrize("which", ["without Lightning's wrapper", "its own"])
def test_steps_that_lightning_does_not_see_are_averaged_or_warned_of(pool, which):
    outcomes = pool.outcomes(step_behind_its_back, which, trainer=True)
    refused = all(outcome.kind == "MisconfigurationException" for outcome in outcomes)
    averaged = not refused and identical([outcome.value["weights"] for outcome in outcomes])
    warned = not refused and outcomes[0].value["warned"]
    assert refused or averaged or warned


# Optimizers of other kinds


class SecondOrder(Classifier):
    """L-BFGS calls its closure several times per step."""

    calls = 0

    def training_step(self, batch: Any) -> Tensor:
        self.calls += 1
        return super().training_step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def second_order() -> dict:
    torch.manual_seed(0)
    model = SecondOrder(batch_norm=False)
    return {**outcome_of(model, loaders=in_order_loaders()), "calls": model.calls}


def test_a_closure_called_several_times_is_one_step(pool):
    outcomes = pool.run_trainer(second_order)
    check(outcomes, periods(16))
    assert outcomes[0]["calls"] > 16
    torch.manual_seed(0)
    check_by_hand(outcomes, by_hand(SecondOrder(batch_norm=False), one_by_one(16), [4, 8, 12, 16]))


class SparseGradients(L.LightningModule):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 3, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.embedding(inputs.abs().mul(5).long().clamp(max=19)).mean(dim=1), labels)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.parameters(), lr=0.05)


def sparse(policy: str) -> dict:
    torch.manual_seed(0)
    return outcome_of(SparseGradients(), ADPSGDStrategy(4, optimizer_state=policy), loaders=in_order_loaders())


@pytest.mark.parametrize("policy", ["local", "average"])
def test_parameters_with_sparse_gradients_are_averaged_whole(pool, policy):
    outcomes = pool.run_trainer(sparse, policy)
    check(outcomes, periods(16))
    if policy == "local":
        torch.manual_seed(0)
        check_by_hand(outcomes, by_hand(SparseGradients(), one_by_one(16), [4, 8, 12, 16]))


class ScheduledGroups(Classifier):
    """Two parameter groups, whose rates change differently at every step."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[:3].parameters()}, {"params": self.net[3].parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        scales = [lambda step: 0.9**step, lambda step: 1.0 + step]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scales)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def scheduled_groups() -> dict:
    torch.manual_seed(0)
    model = ScheduledGroups()
    kept = RoundsKept()
    result = outcome_of(model, callbacks=[kept], loaders=in_order_loaders())
    return {**result, "rates": [r.learning_rate for r in kept.rounds], "ratios": [r.ratio for r in kept.rounds]}


class GroupsByHand(Classifier):
    """The same groups; their rates are set from outside."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": self.net[:3].parameters()}, {"params": self.net[3].parameters()}], lr=1.0)


def set_rates(_: Any, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.05 * 0.9 ** (step - 1)
    optimizer.param_groups[1]["lr"] = 0.01 * step


def test_groups_with_their_own_schedules_match_the_run_by_hand(pool):
    outcomes = pool.run_trainer(scheduled_groups)
    check(outcomes, periods(16))
    torch.manual_seed(0)
    check_by_hand(outcomes, by_hand(GroupsByHand(), one_by_one(16), [4, 8, 12, 16], before_step=set_rates))
    # The scheduler has not been stepped yet when the round runs: the rates are those that the step has used.
    assert outcomes[0]["rates"] == pytest.approx([0.05 * 0.9**3, 0.05 * 0.9**7, 0.05 * 0.9**11, 0.05 * 0.9**15])


def warm_up_from_zero() -> list:
    class WarmUp(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step // 4 / 2))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    torch.manual_seed(0)
    _, rounds = fit(ADPSGDStrategy(AdaptivePeriod(initial=4, sampling=12)), WarmUp())
    return [(r.step, r.learning_rate, r.ratio, r.target) for r in rounds]


def test_rounds_while_every_rate_is_zero_are_not_sampled(pool):
    first, second = pool.run_trainer(warm_up_from_zero)
    assert first == second
    assert first[0] == (4, 0.0, 0.0, None)
    assert first[1][3] is None
    assert first[2][3] == pytest.approx(first[1][2])


# No optimizer


class Untrained(Classifier):
    """Only its BatchNorm's statistics change."""

    def configure_optimizers(self) -> None:
        return None


def untrained(strategy: str) -> dict:
    torch.manual_seed(0)
    model = Untrained()
    before = weights(model)
    fitted, rounds = fit(ADPSGDStrategy(4) if strategy == "adpsgd" else strategy, model, loaders=in_order_loaders())
    after = weights(model)
    return {
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "rounds": len(rounds),
        "batches": fitted.fit_loop.epoch_loop.total_batch_idx + 1,
    }


@pytest.mark.parametrize("strategy", ["adpsgd", "ddp"])
def test_without_an_optimizer_fit_runs_and_averages_nothing(pool, strategy):
    statistics = ["net.1.num_batches_tracked", "net.1.running_mean", "net.1.running_var"]
    for outcome in pool.run_trainer(untrained, strategy):
        assert outcome == {"changed": statistics, "rounds": 0, "batches": 16}


class WithAdam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class WithAMSGrad(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, amsgrad=True)


def short_steps(kind: type[Classifier], policy: str) -> list[str]:
    texts: list[str] = []
    with warnings_kept(texts):
        outcome_of(kind(), ADPSGDStrategy(4, optimizer_state=policy), loaders=in_order_loaders())
    return [text for text in texts if "second moment" in text]


@pytest.mark.parametrize(
    ("kind", "policy", "advice"),
    [
        (WithAdam, "local", 'Use ADPSGDStrategy(optimizer_state="estimate")'),
        (WithAdam, "estimate", None),
        (WithAMSGrad, "estimate", "Turn off amsgrad"),
        (Classifier, "local", None),
    ],
)
def test_steps_of_adam_that_are_shorter_than_under_ddp_are_warned_of_once(pool, kind, policy, advice):
    outcomes = pool.run_trainer(short_steps, kind, policy)
    assert [len(texts) for texts in outcomes] == [0 if advice is None else 1, 0]
    for text in outcomes[0]:
        assert all(part in text for part in ("AdamW", "1.4 times shorter", advice))
