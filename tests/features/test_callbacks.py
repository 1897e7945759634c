"""Callbacks that stop training, change learning rates, unfreeze or prune layers, and those that only observe."""

import os
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LearningRateMonitor, ModelPruning
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy
from tests.features.outcomes import (
    by_hand,
    check,
    check_by_hand,
    in_order_loaders,
    outcome_of,
    periods,
    warnings_kept,
)
from tests.training import Classifier, RoundsKept, fit, floats, identical, loader, weights

pytestmark = pytest.mark.workers


class Scripted(Classifier):
    """Its validation metric in every epoch is set beforehand, and differs between ranks."""

    def __init__(self, by_rank: list[list[float]], sync: bool) -> None:
        super().__init__()
        self.by_rank, self.sync = by_rank, sync

    def on_validation_start(self) -> None:
        self.validations = getattr(self, "validations", -1) + 1

    def validation_step(self, batch: Any) -> None:
        value = self.by_rank[self.global_rank][self.validations]
        self.log("metric", value, on_epoch=True, sync_dist=self.sync)


BOTH_LOADERS = {"train_dataloaders": loader(), "val_dataloaders": loader(32)}

# Stopping

FALLS = [9.0, 6.0, 3.0, 0.0, -3.0, -6.0]  # faster than the other one rises: their mean falls too
RISES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
STAYS = [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]


def stop_early(by_rank: list[list[float]], sync: bool, val_check_interval: float) -> dict:
    torch.manual_seed(0)
    stop = EarlyStopping("metric", patience=2, check_finite=False)
    texts: list[str] = []
    with warnings_kept(texts):
        result = outcome_of(
            Scripted(by_rank, sync),
            ADPSGDStrategy(5),
            callbacks=[stop],
            max_epochs=6,
            limit_train_batches=8,
            num_sanity_val_steps=0,
            val_check_interval=val_check_interval,
            loaders=BOTH_LOADERS,
        )
    warned = any("at every step" in text for text in texts)
    return {**result, "stopped_epoch": stop.stopped_epoch, "warned": warned}


@pytest.mark.parametrize(
    ("by_rank", "sync", "stopped_epoch"),
    [
        ([STAYS, STAYS], True, 2),
        ([FALLS, RISES], True, None),
        ([FALLS, RISES], False, 2),
        ([RISES, FALLS], False, 2),
    ],
    ids=["synced-stays", "synced-falls", "only-rank-1-has-enough", "only-rank-0-has-enough"],
)
def test_early_stopping_stops_all_ranks_in_the_same_epoch(pool, by_rank, sync, stopped_epoch):
    outcomes = pool.run_trainer(stop_early, by_rank, sync, 1.0)
    epochs = 6 if stopped_epoch is None else stopped_epoch + 1
    rounds = []
    for start in range(0, 8 * epochs, 8):  # five local steps, then three until validation, in every epoch
        rounds += [(0, start + 5, "period"), (0, start + 8, "validation")]
    check(outcomes, rounds)
    for outcome in outcomes:
        assert outcome["stopped_epoch"] == (stopped_epoch or 0)
        assert outcome["global_step"] == 8 * epochs
        assert outcome["epoch"] == epochs
        assert not outcome["warned"]


@pytest.mark.parametrize("by_rank", [[FALLS, RISES], [RISES, FALLS]], ids=["rank-1", "rank-0"])
def test_early_stopping_in_mid_epoch_stops_all_ranks_after_the_same_validation(pool, by_rank):
    outcomes = pool.run_trainer(stop_early, by_rank, False, 0.5)
    # a validation every four steps; after the third, one rank's metric says stop
    check(outcomes, [(0, 4, "validation"), (0, 8, "validation"), (0, 12, "validation")])
    for outcome in outcomes:
        assert outcome["stopped_epoch"] == 1
        assert outcome["global_step"] == 12


# Learning rates


class Plateau(Scripted):
    """Every rank's scheduler uses its own metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "metric"}}


def plateau(sync: bool) -> dict:
    torch.manual_seed(0)
    kept, texts = RoundsKept(), []
    with warnings_kept(texts):
        result = outcome_of(
            Plateau([FALLS, RISES], sync),
            ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=10)),
            callbacks=[kept],
            max_epochs=4,
            limit_train_batches=8,
            num_sanity_val_steps=0,
            loaders=BOTH_LOADERS,
        )
    return {
        **result,
        "seen": [(r.step, r.trigger, r.period, r.learning_rate, r.ratio, r.target) for r in kept.rounds],
        "warnings": [text for text in texts if "learning rates differ" in text],
    }


def test_ranks_whose_plateaus_differ_keep_the_same_period_and_rank_0_warns_once(pool):
    outcomes = pool.run_trainer(plateau, False)
    check(outcomes)
    first, second = (outcome["seen"] for outcome in outcomes)
    assert first == second
    # after two epochs the second rank has seen its metric rise, and so after each further one
    rates = {(step - 1) // 8: rate for step, _, _, rate, _, _ in first}
    assert rates == pytest.approx({0: 0.05, 1: 0.05, 2: (0.05 + 0.005) / 2, 3: (0.05 + 0.0005) / 2})
    assert len({period for _, _, period, *_ in first}) > 1
    assert [len(outcome["warnings"]) for outcome in outcomes] == [1, 0]
    step = next(step for step, _, _, rate, _, _ in first if rate < 0.05)
    assert f"at step {step} " in outcomes[0]["warnings"][0]
    assert "rank 0: 0.05, rank 1: 0.005" in outcomes[0]["warnings"][0]


def test_ranks_whose_plateau_is_synced_have_the_same_rate_and_no_warning(pool):
    outcomes = pool.run_trainer(plateau, True)
    check(outcomes)
    assert outcomes[0]["seen"] == outcomes[1]["seen"]
    assert {rate for *_, rate, _, _ in outcomes[0]["seen"]} == {0.05}
    assert [outcome["warnings"] for outcome in outcomes] == [[], []]


class MetricsKept(Logger):
    """Keeps what is logged, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict]] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))


class Decays(Classifier):
    """A learning rate that falls at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def monitor_rates(accumulate: int) -> dict:
    torch.manual_seed(0)
    logger, kept = MetricsKept(), RoundsKept()
    monitor = LearningRateMonitor(log_momentum=True)
    options = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    result = outcome_of(Decays(), callbacks=[monitor, kept], **options)
    return {
        **result,
        "rates": [(step, logged["lr-SGD"]) for step, logged in logger.logged if "lr-SGD" in logged],
        "momenta": {logged["lr-SGD-momentum"] for _, logged in logger.logged if "lr-SGD-momentum" in logged},
        "rates_of_rounds": [(r.step, r.learning_rate) for r in kept.rounds],
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rates_that_are_monitored_are_those_of_the_schedule_and_of_the_rounds(pool, accumulate):
    outcomes = pool.run_trainer(monitor_rates, accumulate)
    steps = 16 // accumulate
    check(outcomes, periods(steps))
    for outcome in outcomes:
        # Lightning logs a rate before the batches it is used for
        logged = dict(outcome["rates"])
        assert logged == pytest.approx({step: 0.05 * 0.9**step for step in range(steps)})
        assert outcome["momenta"] == {0.5}
        for step, rate in outcome["rates_of_rounds"]:
            assert rate == pytest.approx(logged[step - 1])


# Fine-tuning


class Transfer(L.LightningModule):
    """A backbone that is frozen at first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.head(self.backbone(inputs)), labels)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class BackboneKept(L.Callback):
    """Keeps the frozen part of the backbone after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Transfer, *_: Any) -> None:
        self.seen.append({k: v for k, v in weights(pl_module.backbone).items() if k[0] in "03"})


def fine_tune() -> dict:
    torch.manual_seed(0)
    kept = BackboneKept()
    # 6 steps per epoch: frozen for 12 of them, then with a rate of 0.02, and in the last epoch of 0.04
    tune = BackboneFinetuning(2, lambda_func=lambda epoch: 2.0, backbone_initial_ratio_lr=0.2)
    options = {"max_epochs": 4, "limit_train_batches": 6, "loaders": in_order_loaders()}
    result = outcome_of(Transfer(), ADPSGDStrategy(5), callbacks=[tune, kept], **options)
    return {**result, "seen": kept.seen}


def thaw(replica: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    """What the callback does before a step."""
    if step == 1:
        BackboneFinetuning.freeze(replica.backbone)
        optimizer.param_groups[0]["params"] = [p for p in replica.parameters() if p.requires_grad]
    if step == 13:
        BackboneFinetuning.unfreeze_and_add_param_group(replica.backbone, optimizer, lr=0.02)
    if step == 19:
        optimizer.param_groups[1]["lr"] = 0.04


def test_a_backbone_is_averaged_from_the_step_at_which_it_is_unfrozen(pool):
    outcomes = pool.run_trainer(fine_tune)
    check(outcomes, periods(24, period=5))
    before = {k[9:]: v for k, v in outcomes[0]["before"].items() if k[:10] in ("backbone.0", "backbone.3")}
    for step, seen in enumerate(zip(*(outcome["seen"] for outcome in outcomes), strict=True), start=1):
        assert identical([before, seen[0]]) == (step <= 12)  # frozen for two epochs
        assert identical([*seen]) == (step <= 12 or step in (15, 20))  # and then the same after each round
    torch.manual_seed(0)
    steps = [[index] for index in range(6)] * 4
    check_by_hand(outcomes, by_hand(Transfer(), steps, [5, 10, 15, 20, 24], before_step=thaw))


# Pruning


class MasksKept(L.Callback):
    """Keeps the masks, as they are after every pruning and at the end of every batch."""

    def __init__(self) -> None:
        self.pruned: list[dict[str, Tensor]] = []
        self.values: set[float] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.values.update(value for mask in masks(pl_module).values() for value in mask.unique().tolist())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pruned.append(weights(pl_module))


class Judged(ModelPruning):
    """Keeps what each pruning is based on: weights, masked by what was pruned before."""

    def setup(self, trainer: L.Trainer, pl_module: Classifier, stage: str) -> None:
        self.net, self.judged = pl_module.net, []
        super().setup(trainer, pl_module, stage)

    def apply_pruning(self, amount: Any) -> None:
        self.judged.append({str(layer): self.net[layer].weight.detach().clone() for layer in (0, 3)})
        super().apply_pruning(amount)


def masks(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(module).items() if name.endswith("_mask")}


def prune(strategy: Any, options: dict, seeds: tuple[int, int], **trainer: Any) -> dict:
    seed, kept = seeds[int(os.environ["RANK"])], MasksKept()
    torch.manual_seed(seed)
    defaults = {"pruning_fn": "l1_unstructured", "amount": 0.25, "make_pruning_permanent": False}
    pruning = Judged(**{**defaults, **options})
    options = {"max_epochs": 3, "callbacks": [pruning, kept], "limit_train_batches": 8, "num_sanity_val_steps": 0}
    model = Classifier()
    fitted, rounds = fit(strategy, model, seed=seed, **{**options, **trainer})
    return {
        "judged": pruning.judged,
        "pruned": kept.pruned,
        "values": kept.values,
        "weights": weights(model),
        "rounds": [(round_.step, round_.trigger) for round_ in rounds],
        "is_trained": any(p is model.net[0].weight_orig for p in fitted.optimizers[0].param_groups[0]["params"]),
    }


def pruned_under_ddp(lottery: bool) -> tuple[dict, dict]:
    options = {"use_lottery_ticket_hypothesis": lottery}
    ours, theirs = (prune(strategy, options, (0, 0)) for strategy in (ADPSGDStrategy(1), "ddp"))
    return ours, theirs


@pytest.mark.parametrize("lottery", [True, False])
def test_a_period_of_one_prunes_what_ddp_prunes(pool, lottery):
    for ours, theirs in pool.run_trainer(pruned_under_ddp, lottery):
        assert len(ours["pruned"]) == 3
        for epoch in range(3):
            for name, tensor in floats(theirs["pruned"][epoch]).items():
                if name.endswith("_mask"):
                    assert torch.equal(ours["pruned"][epoch][name], tensor), (epoch, name)
                elif "running" not in name:
                    torch.testing.assert_close(ours["pruned"][epoch][name], tensor)


PRUNINGS: dict[str, tuple[dict, dict, tuple[int, int]]] = {
    "by size": ({}, {"use_lottery_ticket_hypothesis": False}, (0, 0)),
    "by size, staggered": ({"stagger": True, "overlap": 1}, {"use_lottery_ticket_hypothesis": False}, (0, 0)),
    "back to where each rank began": ({}, {}, (0, 1)),
    "by chance": ({}, {"pruning_fn": "random_unstructured", "use_lottery_ticket_hypothesis": False}, (0, 1)),
}


def prune_drifted(kind: str) -> dict:
    strategy, options, seeds = PRUNINGS[kind]
    return prune(ADPSGDStrategy(5, **strategy), options, seeds)


@pytest.mark.parametrize("kind", PRUNINGS)
def test_all_ranks_prune_the_same_and_masks_stay_what_they_are(pool, kind):
    outcomes = pool.run_trainer(prune_drifted, kind)
    for name in ("judged", "pruned"):
        for first, second in zip(*(outcome[name] for outcome in outcomes), strict=True):
            assert identical([first, second])
    for outcome in outcomes:
        assert outcome["values"] == {0.0, 1.0}
        assert outcome["is_trained"]
        assert identical([outcome["weights"], outcomes[0]["weights"]])
        assert [round_ for round_ in outcome["rounds"] if round_[1] == "pruning"] == [
            (8, "pruning"),
            (16, "pruning"),
            (24, "pruning"),
        ]


def prune_after_validation() -> dict:
    options = {"use_lottery_ticket_hypothesis": False, "prune_on_train_epoch_end": False}
    return prune(ADPSGDStrategy(5), options, (0, 0), loaders=BOTH_LOADERS, inference_mode=False)


def test_ranks_that_prune_after_a_validation_prune_the_same_without_a_further_round(pool):
    outcomes = pool.run_trainer(prune_after_validation)
    for name in ("judged", "pruned"):
        for first, second in zip(*(outcome[name] for outcome in outcomes), strict=True):
            assert identical([first, second])
    for outcome in outcomes:
        assert outcome["values"] == {0.0, 1.0}
        assert {trigger for _, trigger in outcome["rounds"]} == {"period", "validation"}
