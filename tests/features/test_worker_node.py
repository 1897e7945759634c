"""Lightning's features where each node is a worker: four real processes, as two nodes of two ranks."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingRound, CommunicationMonitor
from tests.features.outcomes import (
    ByHand,
    by_hand,
    check,
    check_by_hand,
    in_order,
    in_order_loaders,
    outcome_of,
    periods,
    replace_by_mean,
    share,
    warnings_kept,
)
from tests.features.test_callbacks import BOTH_LOADERS, FALLS, RISES, Scripted, Transfer
from tests.features.test_optimization import Adversaries, Clipped, GroupsByHand, ScheduledGroups, set_rates
from tests.trainer.test_resume import Drilled
from tests.trainer.test_signals import SignalAt
from tests.training import Classifier, RoundsKept, fit, floats, identical, loader, seeded, trainer, weights
from tests.workers.test_nodes import announce_nodes

pytestmark = pytest.mark.workers

NODES, RANKS_PER_NODE = 2, 2
RANKS = NODES * RANKS_PER_NODE
SIZE = 512  # 16 batches of 8 for each rank
BATCHES = 16
TRAINER = {"devices": RANKS_PER_NODE, "num_nodes": NODES}


def node_strategy(period: Any = 4, **options: Any) -> ADPSGDStrategy:
    """Once this rank knows its node."""
    announce_nodes([0, 0, 1, 1])
    return ADPSGDStrategy(period, worker="node", **options)


def outcome_on_nodes(model: L.LightningModule, strategy: ADPSGDStrategy | None = None, **options: Any) -> dict:
    strategy = strategy or node_strategy()
    return outcome_of(model, strategy, **{"loaders": in_order_loaders(size=SIZE), **TRAINER, **options})


# By hand, a node is one replica, which steps on the batches of all of its ranks


def shares_of_nodes() -> list[list[Any]]:
    """The batches of each node: the first of each of its ranks, then the second, and so on."""
    of_ranks = [share(rank, RANKS, SIZE) for rank in range(RANKS)]
    return [
        [batch for same_place in zip(*of_ranks[first : first + RANKS_PER_NODE], strict=True) for batch in same_place]
        for first in range(0, RANKS, RANKS_PER_NODE)
    ]


def of_all_ranks(step: Sequence[int]) -> list[int]:
    """Where a node's share has the batches that its ranks have at these places."""
    return [RANKS_PER_NODE * batch + rank for batch in step for rank in range(RANKS_PER_NODE)]


def nodes_by_hand(
    model: L.LightningModule, steps: Sequence[Sequence[int]], averaged_after: Sequence[int], **options: Any
) -> ByHand:
    return by_hand(model, [of_all_ranks(step) for step in steps], averaged_after, batches=shares_of_nodes(), **options)


def one_by_one(batches: int = BATCHES) -> list[list[int]]:
    """A step for every batch."""
    return [[index] for index in range(batches)]


# Accumulation


class GradientsSeen(Classifier):
    """Notes the gradients after every batch."""

    def on_after_backward(self) -> None:
        self.seen = [*getattr(self, "seen", []), flat([parameter.grad for parameter in self.parameters()])]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def accumulate() -> dict:
    torch.manual_seed(0)
    model = GradientsSeen(batch_norm=False)
    return {**outcome_on_nodes(model, accumulate_grad_batches=3), "seen": model.seen}


def test_under_accumulation_a_node_averages_gradients_once_per_optimizer_step_and_the_period_counts_those(pool):
    outcomes = pool.run_trainer(accumulate, workers=RANKS)
    check(outcomes, periods(6))
    assert outcomes[0]["global_step"] == 6
    steps = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15]]
    check_by_hand(outcomes, nodes_by_hand(seeded(batch_norm=False), steps, [4, 6], divisor=3 * RANKS_PER_NODE))
    last_of_a_step = {step[-1] for step in steps}
    for batch, (first, second, third, _) in enumerate(zip(*(outcome["seen"] for outcome in outcomes), strict=True)):
        assert torch.equal(first, second) == (batch in last_of_a_step)
        assert not torch.equal(first, third)  # on the other node


# Clipping


def clip() -> dict:
    torch.manual_seed(0)
    model = Clipped(batch_norm=False)
    return {**outcome_on_nodes(model, gradient_clip_val=0.05), "norms": model.norms}


def test_gradients_are_clipped_by_the_norm_of_the_nodes_mean_gradient(pool):
    outcomes = pool.run_trainer(clip, workers=RANKS)
    check(outcomes, periods(BATCHES))
    for outcome in outcomes:
        assert max(outcome["norms"]) == pytest.approx(0.05, rel=1e-3)
    expected = nodes_by_hand(
        seeded(batch_norm=False),
        one_by_one(),
        [4, 8, 12, 16],
        clip=lambda replica: nn.utils.clip_grad_norm_(replica.parameters(), 0.05),
    )
    check_by_hand(outcomes, expected)


# Several parameter groups, several optimizers


def scheduled_groups() -> dict:
    torch.manual_seed(0)
    kept = RoundsKept()
    result = outcome_on_nodes(ScheduledGroups(batch_norm=False), callbacks=[kept])
    return {**result, "rates": [round_.learning_rate for round_ in kept.rounds]}


def test_groups_with_their_own_schedules_on_nodes_match_the_run_by_hand(pool):
    outcomes = pool.run_trainer(scheduled_groups, workers=RANKS)
    check(outcomes, periods(BATCHES))
    torch.manual_seed(0)
    model = GroupsByHand(batch_norm=False)
    check_by_hand(outcomes, nodes_by_hand(model, one_by_one(), [4, 8, 12, 16], before_step=set_rates))
    assert outcomes[0]["rates"] == pytest.approx([0.05 * 0.9 ** (step - 1) for step in (4, 8, 12, 16)])


class TwoOptimizers(Classifier):
    """Each layer has an optimizer of its own, stepped by hand, the second at every other batch."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            if index == 0 or self.trainer.fit_loop.epoch_loop.total_batch_idx % 2 == 1:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[0].parameters(), lr=0.05),
            torch.optim.Adam(self.net[3].parameters(), lr=0.01),
        ]


def two_optimizers() -> dict:
    torch.manual_seed(0)
    return outcome_on_nodes(TwoOptimizers(), node_strategy(5))


def two_optimizers_by_hand() -> ByHand:
    torch.manual_seed(0)
    first = TwoOptimizers()
    replicas = [first, copy.deepcopy(first)]
    optimizers = [replica.configure_optimizers() for replica in replicas]
    counts, variances = [0, 0], []

    def average(index: int) -> None:
        same = zip(*(of_node[index].param_groups[0]["params"] for of_node in optimizers), strict=True)
        variances.append(sum(replace_by_mean(tensors) for tensors in same))

    for batch in range(BATCHES):
        for index in (0, 1)[: 1 + batch % 2]:
            for replica, of_node, batches in zip(replicas, optimizers, shares_of_nodes(), strict=True):
                of_node[index].zero_grad()
                for place in of_all_ranks([batch]):
                    (replica.loss(batches[place]) / RANKS_PER_NODE).backward()
                of_node[index].step()
            counts[index] += 1
            if counts[index] % 5 == 0:
                average(index)
    average(0)
    average(1)
    return ByHand(weights(first), variances)


def test_several_optimizers_on_nodes_match_the_run_by_hand(pool):
    outcomes = pool.run_trainer(two_optimizers, workers=RANKS)
    check(outcomes)
    for index, steps in ((0, BATCHES), (1, BATCHES // 2)):
        assert [r for r in outcomes[0]["rounds"] if r[0] == index] == periods(steps, 5, index)
    check_by_hand(outcomes, two_optimizers_by_hand())


class HalfUsed(Classifier):
    """Trains its first layers alone."""

    def training_step(self, batch: Any) -> Tensor:
        return self.net[:3](batch[0]).square().mean()


def train_a_part(kind: str) -> None:
    torch.manual_seed(0)
    outcome_on_nodes(Adversaries() if kind == "several optimizers in turn" else HalfUsed())


@pytest.mark.parametrize("kind", ["several optimizers in turn", "an unused layer"])
def test_a_backward_pass_that_leaves_parameters_without_a_gradient_is_an_error_on_all_ranks(pool, kind):
    for outcome in pool.outcomes(train_a_part, kind, workers=RANKS, trainer=True):
        assert outcome.kind == "RuntimeError"
        assert "parameters that were not used in producing the loss" in outcome.error


# Layers that are unfrozen or frozen later


class FrozenInTurn(BackboneFinetuning):
    """Unfreezes the backbone in mid-accumulation, and freezes it again later."""

    def __init__(self, unfreeze_at: int, freeze_at: int) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1000)  # never by the callback itself
        self.unfreeze_at, self.freeze_at = unfreeze_at, freeze_at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Transfer, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.unfreeze_at:
            self.unfreeze_and_add_param_group(pl_module.backbone, trainer.optimizers[0], lr=0.02)
        if batch_idx == self.freeze_at:
            self.freeze(pl_module.backbone)


class WeightsKept(L.Callback):
    """Keeps the parameters after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append({name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()})


def unfreeze(kind: str) -> dict:
    torch.manual_seed(0)
    kept = WeightsKept()
    if kind == "epoch":
        tune: L.Callback = BackboneFinetuning(1, lambda_func=lambda epoch: 1.0, backbone_initial_ratio_lr=0.2)
        options: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 6}
    else:
        tune, options = FrozenInTurn(3, 10), {"accumulate_grad_batches": 2}
    result = outcome_on_nodes(Transfer(), node_strategy(5), callbacks=[tune, kept], **options)
    return {**result, "seen": kept.seen}


@pytest.mark.parametrize("kind", ["epoch", "in mid-accumulation"])
def test_ranks_of_a_node_stay_the_same_when_layers_are_unfrozen_later(pool, kind):
    outcomes = pool.run_trainer(unfreeze, kind, workers=RANKS)
    assert identical([outcome["weights"] for outcome in outcomes])
    moved, backbone = [], outcomes[0]["before"]["backbone.0.weight"]
    for batch, (first, second, third, fourth) in enumerate(
        zip(*(outcome["seen"] for outcome in outcomes), strict=True)
    ):
        assert identical([first, second])
        assert identical([third, fourth])
        if not torch.equal(first["backbone.0.weight"], backbone):
            moved.append(batch)
            backbone = first["backbone.0.weight"]
            # Nodes drift apart until the next round, after every five steps.
            step = batch + 1 if kind == "epoch" else (batch + 1) // 2
            assert identical([first, third]) == (step % 5 == 0)
    assert moved == ([*range(6, 18)] if kind == "epoch" else [3, 5, 7, 9])


# Validations and checkpoints

STEPS = 33
SAVED_AT, VALIDATED_AT = (10, 20), (7, 14, 21)


class Looks(L.Callback):
    """Keeps the weights after every step, before any forced round, and at every validation."""

    def __init__(self) -> None:
        self.after_step: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after_step[trainer.global_step] = weights(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated[trainer.global_step] = weights(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["val_loss"].item()


def drill(options: dict, folder: str, resume: str | None, seed: int) -> dict:
    torch.manual_seed(seed)
    model, monitor, looks = Drilled("sgd"), CommunicationMonitor(), Looks()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    strategy = node_strategy(AdaptivePeriod(initial=5, sampling=10), **options)
    fitted, _ = fit(
        strategy,
        model,
        callbacks=[looks, monitor, save],
        enable_checkpointing=True,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=7,
        num_sanity_val_steps=0,
        loaders={"train_dataloaders": loader(1200), "val_dataloaders": in_order(64), "ckpt_path": resume},
        **TRAINER,
    )
    return {
        "looks": {"after_step": looks.after_step, "validated": looks.validated, "losses": looks.losses},
        "ends_with": {
            "weights": weights(model),
            "momenta": [state["momentum_buffer"].clone() for state in fitted.optimizers[0].state.values()],
            "rates": [group["lr"] for group in fitted.optimizers[0].param_groups],
            "rounds": [round_._replace(seconds=0.0, payload_bytes=0, sent_bytes=0) for round_ in monitor.rounds],
            "bytes": [round_.sent_bytes for round_ in monitor.rounds] if fitted.is_global_zero else [],  # the file's
            "steps": strategy.local_sgd[0].steps,
        },
    }


def stop_and_go(options: dict, folder: str) -> dict:
    whole = drill(options, folder, None, seed=0)
    resumed = drill(options, f"{folder}/again", f"{folder}/step=20.ckpt", seed=1)
    return {"whole": whole, "resumed": resumed}


def the_same(ours: Any, theirs: Any) -> bool:
    """Whether two runs have ended with the same, bit for bit."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(the_same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(the_same, ours, theirs))
    return ours == theirs


def mean_of_nodes(outcomes: list[dict], step: int) -> dict[str, Tensor]:
    """Of the parameters after a step, before any forced round."""
    nodes = [outcome["whole"]["looks"]["after_step"][step] for outcome in outcomes[::RANKS_PER_NODE]]
    return {name: (tensor + nodes[1][name]) / 2 for name, tensor in floats(nodes[0]).items() if "running" not in name}


def loss_of(model: Classifier, state: dict[str, Tensor]) -> float:
    """On the validation data of all ranks."""
    model.load_state_dict(state)
    model.eval()
    batches = [batch for rank in range(RANKS) for batch in share(rank, RANKS, size=64)]
    with torch.no_grad():
        return sum(model.loss(batch).item() for batch in batches) / len(batches)


@pytest.mark.parametrize(
    "options",
    [{}, {"stagger": True, "overlap": 1}, {"reduce_dtype": "bf16"}, {"optimizer_state": "average"}],
    ids=str,
)
def test_validations_and_checkpoints_hold_the_average_of_nodes_and_resuming_equals_not_having_stopped(
    pool, tmp_path, options
):
    outcomes = pool.run_trainer(stop_and_go, options, str(tmp_path), workers=RANKS)
    tolerance = {"atol": 1e-3, "rtol": 0} if "reduce_dtype" in options else {"atol": 1e-6, "rtol": 1e-5}
    looks = [outcome["whole"]["looks"] for outcome in outcomes]
    for step in VALIDATED_AT:
        assert identical([look["validated"][step] for look in looks])
        for name, tensor in mean_of_nodes(outcomes, step).items():
            torch.testing.assert_close(looks[0]["validated"][step][name], tensor, **tolerance)
        expected = loss_of(Drilled("sgd"), looks[0]["validated"][step])
        assert [look["losses"][step] for look in looks] == pytest.approx([expected] * RANKS, rel=1e-5)
    for step in SAVED_AT:
        file = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)
        assert (file["adpsgd"]["workers"], file["adpsgd"]["ranks"]) == (NODES, RANKS)
        state = file["state_dict"]
        for name, tensor in mean_of_nodes(outcomes, step).items():
            torch.testing.assert_close(state[name], tensor, **tolerance)
    for step in (*SAVED_AT, *VALIDATED_AT):
        assert not identical([look["after_step"][step] for look in looks])  # nodes had drifted apart

    for outcome in outcomes:
        assert outcome["whole"]["ends_with"]["steps"] == STEPS
        for name, ours in outcome["whole"]["ends_with"].items():
            assert the_same(ours, outcome["resumed"]["ends_with"][name]), name
    momenta = [outcome["whole"]["ends_with"]["momenta"] for outcome in outcomes]
    assert the_same(momenta[0], momenta[1])
    if "optimizer_state" not in options:
        assert not the_same(momenta[0], momenta[2])  # the nodes' state differed
    if "stagger" not in options:  # with so many validations, the rule sees none of the staggered rounds
        assert len({round_.period for round_ in outcomes[0]["whole"]["ends_with"]["rounds"]}) > 1


# Buffers


class StatisticsSeen(Classifier):
    """Notes its BatchNorm's statistics after every batch."""

    def statistics(self) -> Tensor:
        return torch.cat([self.net[1].running_mean, self.net[1].running_var])

    def on_after_backward(self) -> None:
        self.seen = [*getattr(self, "seen", []), self.statistics()]


class StatisticsAveraged(L.Callback):
    """Notes them after every round."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def note(round_: AveragingRound) -> None:
            self.seen[round_.step] = pl_module.statistics()

        trainer.strategy.subscribe(note)


def statistics() -> dict:
    torch.manual_seed(0)
    model, averaged = StatisticsSeen(), StatisticsAveraged()
    return {**outcome_on_nodes(model, callbacks=[averaged]), "before": model.seen, "averaged": averaged.seen}


def test_statistics_of_batchnorm_are_the_same_on_all_ranks_after_a_round_and_means_over_nodes(pool):
    outcomes = pool.run_trainer(statistics, workers=RANKS)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert [*outcomes[0]["averaged"]] == [4, 8, 12, 16]
    for step, averaged in outcomes[0]["averaged"].items():
        assert all(torch.equal(outcome["averaged"][step], averaged) for outcome in outcomes)
        before = [outcome["before"][step - 1] for outcome in outcomes]
        assert not any(torch.equal(before[0], other) for other in before[1:])
        # Every element is the mean of one rank's value in each node, the same rank in both.
        means = [(before[place] + before[RANKS_PER_NODE + place]) / 2 for place in range(RANKS_PER_NODE)]
        is_one = [torch.isclose(averaged, mean, rtol=1e-5, atol=1e-7) for mean in means]
        assert bool((is_one[0] | is_one[1]).all())


# Divergence


class Poisoned(Classifier):
    """Gets a bad sample, or a memory error, on one rank."""

    def __init__(self, what: str, rank: int, step: int) -> None:
        super().__init__(momentum=0.9, batch_norm=False)
        self.what, self.rank, self.step = what, rank, step

    @property
    def is_now(self) -> bool:
        return self.global_rank == self.rank and self.trainer.global_step == self.step - 1

    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        bad = self.what == "a bad sample" and self.is_now
        return self.loss((inputs * float("nan") if bad else inputs, labels))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.what == "a broken memory" and self.is_now:
            self.net[0].weight.data[3, 3] = float("inf")


def diverge(what: str, rank: int, step: int) -> None:
    torch.manual_seed(0)
    outcome_on_nodes(Poisoned(what, rank, step))


# A bad sample reaches both ranks of its node through the mean gradient; a memory error stays on its rank.
@pytest.mark.parametrize(
    ("what", "rank", "step", "named"),
    [("a bad sample", 2, 6, "2, 3"), ("a bad sample", 1, 8, "0, 1"), ("a broken memory", 3, 8, "3")],
)
def test_parameters_not_finite_on_one_rank_are_an_error_on_all_that_names_the_ranks(pool, what, rank, step, named):
    for outcome in pool.outcomes(diverge, what, rank, step, workers=RANKS, trainer=True):
        assert outcome.kind == "WorkersDivergedError"
        assert f"Parameters of rank(s) {named} are not finite at step 8" in outcome.error


def dropping(what: str, rank: int, step: int) -> dict:
    torch.manual_seed(0)
    kept, texts = RoundsKept(), []
    with warnings_kept(texts):
        result = outcome_on_nodes(Poisoned(what, rank, step), node_strategy(4, on_divergence="drop"), callbacks=[kept])
    return {
        **result,
        "dropped": [round_.dropped for round_ in kept.rounds],
        "warned": [text for text in texts if "left out of this average" in text],
    }


@pytest.mark.parametrize(("what", "step"), [("a bad sample", 6), ("a broken memory", 8)])
def test_a_node_with_a_rank_that_diverges_is_dropped_and_continues_from_the_others(pool, what, step):
    outcomes = pool.run_trainer(dropping, what, 3, step, workers=RANKS)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert [len(outcome["warned"]) for outcome in outcomes] == [1, 0, 0, 0]
    for outcome in outcomes:
        assert outcome["rounds"] == periods(BATCHES)
        assert outcome["dropped"] == [0, 1, 0, 0]
    left: dict[str, Tensor] = {}

    def take_over(replica: nn.Module, optimizer: torch.optim.Optimizer, node: int, step: int) -> None:
        if step == 9 and node == 0:
            left.update(weights(replica))
        elif step == 9:
            replica.load_state_dict(left)
            optimizer.state.clear()

    model = seeded(batch_norm=False, momentum=0.9)
    expected = nodes_by_hand(model, one_by_one(), [4, 12, 16], before_step=take_over)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(outcomes[0]["weights"][name], tensor)


# Ends


def stop_early() -> dict:
    torch.manual_seed(0)
    stop = EarlyStopping("metric", patience=2, check_finite=False)
    model = Scripted([FALLS, FALLS, FALLS, RISES], sync=False)
    options = {"max_epochs": 6, "limit_train_batches": 8, "num_sanity_val_steps": 0, "loaders": BOTH_LOADERS}
    result = outcome_on_nodes(model, node_strategy(5), callbacks=[stop], **options)
    return {**result, "stopped_epoch": stop.stopped_epoch}


def test_early_stopping_stops_all_nodes_in_the_same_epoch_if_one_ranks_metric_says_stop(pool):
    outcomes = pool.run_trainer(stop_early, workers=RANKS)
    rounds = [
        (0, start + step, trigger) for start in (0, 8, 16) for step, trigger in ((5, "period"), (8, "validation"))
    ]
    check(outcomes, rounds)
    assert [outcome["stopped_epoch"] for outcome in outcomes] == [2] * RANKS
    assert [outcome["global_step"] for outcome in outcomes] == [24] * RANKS


def preempted() -> dict:
    model, kept, raised = seeded(), RoundsKept(), None
    strategy = node_strategy(5)
    try:
        fit(strategy, model, callbacks=[SignalAt(3, 7), kept], loaders=in_order_loaders(size=SIZE), **TRAINER)
    except BaseException as error:
        raised = type(error).__name__
    return {"raised": raised, "weights": weights(model), "steps": [round_.step for round_ in kept.rounds]}


def test_sigterm_to_one_rank_ends_both_nodes_at_the_next_round_with_the_average(pool):
    outcomes = pool.run_trainer(preempted, workers=RANKS)
    assert identical([outcome["weights"] for outcome in outcomes])
    for outcome in outcomes:
        assert outcome["raised"] == "SIGTERMException"
        assert outcome["steps"][:2] == [5, 10]
        assert outcome["steps"][-1] == 10


def fit_validate_and_fit() -> dict:
    strategy, kept = node_strategy(5), RoundsKept()
    twice = trainer(strategy, callbacks=[kept], **TRAINER)
    model = seeded(batch_norm=False)
    twice.fit(model, in_order(SIZE))
    between = weights(model)
    loss = twice.validate(model, in_order(64), verbose=False)[0]["val_loss"]
    twice.fit_loop.max_epochs = 2
    twice.fit(model, in_order(SIZE))
    return {
        "between": between,
        "loss": loss,
        "weights": weights(model),
        "rounds": [(round_.step, round_.trigger) for round_ in kept.rounds],
        "variances": [round_.variance for round_ in kept.rounds],
    }


def test_after_fit_nodes_validate_with_the_average_and_a_second_fit_continues_counting(pool):
    outcomes = pool.run_trainer(fit_validate_and_fit, workers=RANKS)
    assert identical([outcome["between"] for outcome in outcomes])
    expected = loss_of(seeded(batch_norm=False), outcomes[0]["between"])
    assert [outcome["loss"] for outcome in outcomes] == pytest.approx([expected] * RANKS, rel=1e-5)
    steps = [5, 10, 15, 16, 21, 26, 31, 32]
    assert [step for step, _ in outcomes[0]["rounds"]] == steps
    check_by_hand(outcomes, nodes_by_hand(seeded(batch_norm=False), one_by_one() * 2, steps))
