"""Models that are compiled, built late, tied, partly frozen or extended, and what their rounds average."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adpsgd import ADPSGDStrategy
from tests.features.outcomes import (
    by_hand,
    check,
    check_by_hand,
    in_order_loaders,
    outcome_of,
    periods,
    share,
    warnings_kept,
)
from tests.training import Classifier, RoundsKept, fit, identical, seeded, weights

pytestmark = pytest.mark.workers

ONE_BY_ONE = [[index] for index in range(16)]
ROUNDS = [4, 8, 12, 16]


def trained(kind: type[Classifier], **options: Any) -> dict:
    torch.manual_seed(0)
    return outcome_of(kind(), loaders=in_order_loaders(), **options)


def expected_of(kind: type[Classifier], **options: Any) -> Any:
    torch.manual_seed(0)
    return by_hand(kind(), ONE_BY_ONE, ROUNDS, **options)


# torch.compile


def compiled(how: str) -> dict:
    model = seeded()
    before = weights(model)
    if how == "function":
        fitted = torch.compile(model, backend="aot_eager")
    else:
        fitted = model
        model.net.compile(backend="aot_eager")
    _, rounds = fit(ADPSGDStrategy(4), fitted, loaders=in_order_loaders())
    return {
        "before": before,
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
    }


@pytest.mark.parametrize("how", ["function", "method"])
def test_a_compiled_module_ends_with_the_weights_of_an_uncompiled_one(pool, how):
    outcomes = pool.run_trainer(compiled, how)
    check(outcomes, periods(16))
    check_by_hand(outcomes, by_hand(seeded(), ONE_BY_ONE, ROUNDS))


# Modules that are built late


class Lazy(Classifier):
    """Infers the number of features from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


def dummy_forward(net: nn.Module) -> None:
    torch.manual_seed(1)
    net.eval()(torch.zeros(2, 8))
    net.train()


class LazyWithForward(Lazy):
    """The same, after a dummy forward pass in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        dummy_forward(self.net)


class LazyWithLateForward(Lazy):
    """The same, after a dummy forward pass in ``configure_model``."""

    def configure_model(self) -> None:
        if isinstance(self.net[0], nn.LazyLinear):
            dummy_forward(self.net)


def lazy(kind: type[Lazy]) -> dict:
    torch.manual_seed(0)
    model = kind()
    _, rounds = fit(ADPSGDStrategy(4), model, loaders=in_order_loaders())
    return {
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
    }


def test_a_lazy_module_that_is_still_uninitialized_is_an_error_that_says_what_to_do(pool):
    for outcome in pool.outcomes(lazy, Lazy, trainer=True):
        assert outcome.kind == "MisconfigurationException"
        assert "uninitialized" in outcome.error
        assert "dummy forward" in outcome.error
        assert "net.0.weight" in outcome.error


@pytest.mark.parametrize("kind", [LazyWithForward, LazyWithLateForward])
def test_a_lazy_module_is_averaged_after_a_dummy_forward_pass(pool, kind):
    outcomes = pool.run_trainer(lazy, kind)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert outcomes[0]["rounds"] == periods(16)
    check_by_hand(outcomes, expected_of(LazyWithForward))


class BuiltLate(Classifier):
    """Has no layers before ``configure_model``, which every rank calls with a seed of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(int(os.environ["RANK"]))
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def built_late() -> dict:
    model = BuiltLate()
    _, rounds = fit(ADPSGDStrategy(4), model, loaders=in_order_loaders())
    return {
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
    }


def test_a_model_built_in_configure_model_starts_from_the_first_ranks_weights(pool):
    outcomes = pool.run_trainer(built_late)
    assert identical([outcome["weights"] for outcome in outcomes])
    assert outcomes[0]["rounds"] == periods(16)
    check_by_hand(outcomes, by_hand(seeded(0), ONE_BY_ONE, ROUNDS))


# SyncBatchNorm


class FrozenStatistics(Classifier):
    """Its BatchNorm normalizes with its running statistics, and so needs no synchronization."""

    def on_train_start(self) -> None:
        self.kind = type(self.net[1]).__name__  # Lightning takes it out again when fit ends

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[1].eval()


def synced_batch_norm(kind: type[Classifier], sync: bool) -> dict:
    texts: list[str] = []
    torch.manual_seed(0)
    model = kind()
    with warnings_kept(texts):
        try:
            result = outcome_of(model, sync_batchnorm=sync, loaders=in_order_loaders())
        except ValueError as error:
            result = {"error": str(error)}
    return {
        **result,
        "kind": getattr(model, "kind", None),
        "warnings": [text for text in texts if "SyncBatchNorm" in text and "every forward" in text],
    }


def test_sync_batchnorm_is_warned_of_once_and_trains_on(pool):
    outcomes = pool.run_trainer(synced_batch_norm, FrozenStatistics, True)
    assert [outcome["kind"] for outcome in outcomes] == ["SyncBatchNorm"] * 2
    assert [len(outcome["warnings"]) for outcome in outcomes] == [1, 0]
    check(outcomes, periods(16))


def test_sync_batchnorm_on_cpus_is_warned_of_before_torch_refuses_it(pool):
    outcomes = pool.run_trainer(synced_batch_norm, Classifier, True)
    assert [len(outcome["warnings"]) for outcome in outcomes] == [1, 0]
    assert all("GPU" in outcome["error"] for outcome in outcomes)


def test_plain_batchnorm_is_not_warned_of(pool):
    outcomes = pool.run_trainer(synced_batch_norm, Classifier, False)
    assert [outcome["warnings"] for outcome in outcomes] == [[], []]
    check(outcomes, periods(16))


# Parameters that are shared, frozen, or come later


class Tied(Classifier):
    """An autoencoder whose decoder is its encoder's transpose, and whose two outer layers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.net[4].weight = self.net[0].weight

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0])


class Untied(Tied):
    """The same without the tie."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4].weight = nn.Parameter(self.net[0].weight.detach().clone())


def payload(kind: type[Classifier]) -> dict:
    kept = RoundsKept()
    return {**trained(kind, callbacks=[kept]), "payload": [r.payload_bytes for r in kept.rounds]}


def test_tied_weights_stay_tied_and_are_sent_and_measured_once(pool):
    outcomes = pool.run_trainer(payload, Tied)
    check(outcomes, periods(16))
    state = outcomes[0]["weights"]
    assert torch.equal(state["net.0.weight"], state["net.4.weight"])
    check_by_hand(outcomes, expected_of(Tied))
    untied = pool.run_trainer(payload, Untied)
    saved = [more - less for more, less in zip(untied[0]["payload"], outcomes[0]["payload"], strict=True)]
    assert saved == [8 * 8 * 4] * 4


class PartlyFrozen(Classifier):
    """Its first layer is not trained, though the optimizer holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


def partly_frozen() -> dict:
    torch.manual_seed(int(os.environ["RANK"]))  # so all have the same only if rank 0's weights were sent to all
    model, kept = PartlyFrozen(), RoundsKept()
    result = outcome_of(model, callbacks=[kept], loaders=in_order_loaders())
    return {**result, "payload": [r.payload_bytes for r in kept.rounds]}


def test_frozen_parameters_are_the_first_ranks_and_are_not_sent(pool):
    outcomes = pool.run_trainer(partly_frozen)
    check(outcomes, periods(16))
    for name in ("net.0.weight", "net.0.bias"):
        assert torch.equal(outcomes[1]["weights"][name], outcomes[0]["before"][name])
    check_by_hand(outcomes, expected_of(PartlyFrozen))
    whole = pool.run_trainer(payload, Classifier)
    saved = [more - less for more, less in zip(whole[0]["payload"], outcomes[0]["payload"], strict=True)]
    assert saved == [(8 * 16 + 16) * 4] * 4


class Unfreezes(Classifier):
    """Trains its head first, and hands the rest to the optimizer later."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[3].parameters(), lr=self.lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            self.optimizers().optimizer.add_param_group({"params": [*self.net[:3].parameters()], "lr": 0.01})


def add_group(replica: Any, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    """What ``Unfreezes`` does before a step; what the optimizer does not hold is not trained."""
    if step == 7:
        optimizer.add_param_group({"params": [*replica.net[:3].parameters()], "lr": 0.01})


def test_a_parameter_group_added_in_mid_training_is_averaged_from_then_on(pool):
    outcomes = pool.run_trainer(trained, Unfreezes)
    check(outcomes, periods(16))
    assert not torch.equal(outcomes[0]["before"]["net.0.weight"], outcomes[0]["weights"]["net.0.weight"])
    check_by_hand(outcomes, expected_of(Unfreezes, before_step=add_group))


class Freezes(Classifier):
    """Stops training its first layer between two rounds."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            self.net[0].requires_grad_(False)


def frozen_later() -> dict:
    kept: list[dict] = []

    class Keeps(Freezes):
        def on_train_batch_end(self, *_: Any) -> None:
            kept.append({"weight": self.net[0].weight.detach().clone()})

    torch.manual_seed(0)
    return {**outcome_of(Keeps(), loaders=in_order_loaders()), "kept": kept}


def test_a_layer_frozen_between_two_rounds_is_averaged_once_more(pool):
    outcomes = pool.run_trainer(frozen_later)
    check(outcomes, periods(16))
    # it is frozen two steps after the round of step 4; from the round of step 8 on it is the same everywhere
    same = [identical([*kept]) for kept in zip(*(outcome["kept"] for outcome in outcomes), strict=True)]
    assert same == [False, False, False, True, False, False, False, *[True] * 9]
    after = [kept["weight"] for kept in outcomes[0]["kept"][7:]]
    assert all(torch.equal(after[0], later) for later in after)
    means = torch.stack([outcome["kept"][6]["weight"] for outcome in outcomes]).mean(dim=0)
    torch.testing.assert_close(after[0], means)


class WithConstants(Classifier):
    """Has buffers that are no statistics: a mask with infinities, indices, and one that is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("places", torch.arange(3))
        self.register_buffer("nothing", torch.empty(0))

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        scores = self.net(inputs)
        attention = (scores.unsqueeze(2) * scores.unsqueeze(1) + self.mask).softmax(dim=2)
        return F.cross_entropy((attention @ scores.unsqueeze(2)).squeeze(2)[:, self.places], labels)


def test_buffers_that_are_constants_stay_what_they_are(pool):
    outcomes = pool.run_trainer(trained, WithConstants)
    check(outcomes, periods(16))
    for name in ("mask", "places", "nothing"):
        assert torch.equal(outcomes[0]["weights"][name], outcomes[0]["before"][name])
    check_by_hand(outcomes, expected_of(WithConstants))


class Conditional(Classifier):
    """On one rank, some parameters have no gradient for a while."""

    def training_step(self, batch: Any) -> Tensor:
        if self.global_rank == 1 and self.trainer.global_step < 6:
            return F.cross_entropy(self.net[3](batch[0].repeat(1, 2)), batch[1])
        return self.loss(batch)


class ConditionalWithMomentum(Conditional):
    """The same, with state that those parameters do not have at first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "policy",
    ["local", "average", "reset"],
)
def test_parameters_without_a_gradient_on_one_rank_are_averaged_all_the_same(pool, policy):
    outcomes = pool.run_trainer(conditional, policy)
    check(outcomes, periods(16))


def conditional(policy: str) -> dict:
    torch.manual_seed(0)
    return outcome_of(ConditionalWithMomentum(), ADPSGDStrategy(4, optimizer_state=policy), loaders=in_order_loaders())


def conditional_sgd() -> dict:
    torch.manual_seed(0)
    return outcome_of(Conditional(), loaders=in_order_loaders())


def test_a_parameter_without_a_gradient_on_one_rank_counts_in_the_mean_with_its_old_value(pool):
    outcomes = pool.run_trainer(conditional_sgd)
    check(outcomes, periods(16))
    assert outcomes[0]["variances"][0] > 0
    batches = [share(0), share(1)]
    model = ConditionalByHand()
    torch.manual_seed(0)
    model.load_state_dict(Classifier().state_dict())
    expected = by_hand(model, ONE_BY_ONE, ROUNDS, batches=batches, before_step=tell_rank_and_step)
    check_by_hand(outcomes, expected)


class ConditionalByHand(Classifier):
    """The same, given its rank and the next step from outside."""

    place = (0, 0)

    def loss(self, batch: Any) -> Tensor:
        rank, step = self.place
        if rank == 1 and step <= 6:
            return F.cross_entropy(self.net[3](batch[0].repeat(1, 2)), batch[1])
        return super().loss(batch)


def tell_rank_and_step(replica: Any, optimizer: Any, rank: int, step: int) -> None:
    replica.place = (rank, step)
