"""Lightning's features under the strategy, on two real processes, against what they are expected to do."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor
from tests.training import Classifier, fit, identical, loader, seeded, weights

pytestmark = pytest.mark.workers


def outcome_of(model: L.LightningModule, strategy: Any = None, **options: Any) -> dict:
    before = weights(model)
    fitted, rounds = fit(strategy or ADPSGDStrategy(4), model, **options)
    return {
        "before": before,
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
        "global_step": fitted.global_step,
    }


def check(outcomes: list[dict]) -> None:
    """The ranks agree on everything, had drifted apart in between, and have learned something."""
    assert identical([outcome["weights"] for outcome in outcomes])
    assert len({tuple(outcome["rounds"]) for outcome in outcomes}) == 1
    assert all(variance > 0 for variance in outcomes[0]["variances"])
    assert not identical([outcomes[0]["before"], outcomes[0]["weights"]])


def periods(steps: int, period: int = 4, optimizer: int = 0) -> list[tuple[int, int, str]]:
    rounds = [(optimizer, step, "period") for step in range(period, steps + 1, period)]
    return rounds if steps % period == 0 else [*rounds, (optimizer, steps, "train_end")]


# Accumulation and clipping


def accumulate() -> dict:
    return outcome_of(seeded(), accumulate_grad_batches=3)


def test_the_period_counts_optimizer_steps_under_gradient_accumulation(pool):
    outcomes = pool.run_trainer(accumulate)
    check(outcomes)
    # 16 batches are five steps of three and one of the last batch alone
    assert outcomes[0]["global_step"] == 6
    assert outcomes[0]["rounds"] == periods(6)


class Clipped(Classifier):
    """Notes the norm of the gradients as the optimizer meets them."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = getattr(self, "norms", [])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())


def clip() -> dict:
    torch.manual_seed(0)
    model = Clipped()
    return {**outcome_of(model, gradient_clip_val=0.05), "norms": model.norms}


def test_gradients_are_clipped_on_every_worker_by_its_own_norm(pool):
    outcomes = pool.run_trainer(clip)
    check(outcomes)
    for outcome in outcomes:
        assert len(outcome["norms"]) == 16
        assert max(outcome["norms"]) == pytest.approx(0.05, rel=1e-3)
    assert outcomes[0]["norms"] != outcomes[1]["norms"]


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
    check(pool.run_trainer(loss_then_round))


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
    return {**outcome_of(model), "calls": model.calls}


def test_a_closure_called_several_times_is_one_step(pool):
    outcomes = pool.run_trainer(second_order)
    check(outcomes)
    assert outcomes[0]["rounds"] == periods(16)
    assert outcomes[0]["calls"] > 16


# Precision


def mixed_bf16() -> dict:
    return outcome_of(seeded(), precision="bf16-mixed")


def true_bf16() -> dict:
    model = seeded()
    result = outcome_of(model, precision="bf16-true", loaders={"train_dataloaders": loader(dtype=torch.bfloat16)})
    return {**result, "dtype": str(result["weights"]["net.0.weight"].dtype)}


def true_fp16() -> dict:
    model = seeded()
    result = outcome_of(model, precision="16-true", loaders={"train_dataloaders": loader(dtype=torch.float16)})
    return {**result, "dtype": str(result["weights"]["net.0.weight"].dtype)}


@pytest.mark.parametrize(
    ("function", "dtype"), [(mixed_bf16, None), (true_bf16, "torch.bfloat16"), (true_fp16, "torch.float16")]
)
def test_16_bit_training_averages_what_it_trains(pool, function, dtype):
    outcomes = pool.run_trainer(function)
    check(outcomes)
    assert outcomes[0]["rounds"] == periods(16)
    if dtype is not None:
        assert outcomes[0]["dtype"] == dtype


class Overflows(Classifier):
    """The gradients of one rank are infinite at some steps, and its scaler skips those."""

    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return loss * float("inf") if self.global_rank == 1 and step in (1, 3, 6) else loss


def scaler_skips() -> dict:
    torch.manual_seed(0)
    model = Overflows()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    result = outcome_of(model, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return {**result, "scale": scaler.get_scale()}


def test_a_step_skipped_by_the_scaler_of_one_rank_counts_like_any_other(pool):
    outcomes = pool.run_trainer(scaler_skips)
    check(outcomes)
    assert outcomes[0]["rounds"] == periods(16)
    assert [outcome["scale"] for outcome in outcomes] == [4.0, 0.5]  # the second rank has skipped three steps


# Modules and parameters of other kinds


class SparseGradients(L.LightningModule):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 3, sparse=True)

    def training_step(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.embedding(inputs.abs().mul(5).long().clamp(max=19)).mean(dim=1), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.parameters(), lr=0.05)


def sparse(policy: str) -> dict:
    torch.manual_seed(0)
    return outcome_of(SparseGradients(), ADPSGDStrategy(4, optimizer_state=policy))


@pytest.mark.parametrize("policy", ["local", "average"])
def test_parameters_with_sparse_gradients_are_averaged_whole(pool, policy):
    outcomes = pool.run_trainer(sparse, policy)
    check(outcomes)
    assert outcomes[0]["rounds"] == periods(16)


class Unfreezes(Classifier):
    """Trains its head first, and hands the rest to the optimizer later."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[3].parameters(), lr=self.lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            self.optimizers().optimizer.add_param_group({"params": [*self.net[:3].parameters()], "lr": 0.01})


def unfreeze() -> dict:
    torch.manual_seed(0)
    return outcome_of(Unfreezes())


def test_a_parameter_group_added_in_mid_training_is_averaged_from_then_on(pool):
    outcomes = pool.run_trainer(unfreeze)
    check(outcomes)
    assert not torch.equal(outcomes[0]["before"]["net.0.weight"], outcomes[0]["weights"]["net.0.weight"])


def compiled() -> dict:
    model = seeded()
    before = weights(model)
    _, rounds = fit(ADPSGDStrategy(4), torch.compile(model, backend="aot_eager"))
    return {
        "before": before,
        "weights": weights(model),
        "rounds": [(r.optimizer, r.step, r.trigger) for r in rounds],
        "variances": [r.variance for r in rounds],
    }


def test_a_compiled_module_trains_what_it_trains_uncompiled(pool):
    outcomes = pool.run_trainer(compiled)
    check(outcomes)
    assert outcomes[0]["rounds"] == periods(16)
    plain = pool.run_trainer(uncompiled)
    for name, tensor in plain[0]["weights"].items():
        torch.testing.assert_close(outcomes[0]["weights"][name], tensor, rtol=1e-3, atol=1e-5)


def uncompiled() -> dict:
    return outcome_of(seeded())


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


# Checkpoints


def save_then_resume(folder: str) -> dict:
    save = L.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    strategy = ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6))
    monitor = CommunicationMonitor()
    fit(strategy, seeded(momentum=0.9), callbacks=[save, monitor], enable_checkpointing=True, max_epochs=2)
    file = torch.load(f"{folder}/step=20.ckpt", weights_only=False)

    resumed = ADPSGDStrategy(AdaptivePeriod(initial=3, sampling=6))
    counts = CommunicationMonitor()
    fit(
        resumed,
        seeded(1, momentum=0.9),
        callbacks=[counts],
        max_epochs=2,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/step=20.ckpt"},
    )
    return {
        "file": file["adpsgd"],
        "at_20": [round_ for round_ in monitor.rounds if round_.step <= 20],
        "resumed": counts.rounds,
        "steps": resumed.local_sgd[0].steps,
        "summary": counts.summary()["steps"],
    }


def test_a_checkpoint_holds_the_rule_and_the_counters_and_the_monitor_goes_on(pool, tmp_path):
    first, second = pool.run_trainer(save_then_resume, str(tmp_path))
    state = first["file"]["optimizers"][0]
    assert state["steps"] == 20
    assert state["local_steps"] == 0
    assert state["period"]["target"] == first["at_20"][-1].target
    assert first["resumed"][: len(first["at_20"])] == first["at_20"]
    assert first["resumed"][len(first["at_20"])].local_steps == state["period"]["period"]
    assert first["steps"] == first["summary"] == 32
    assert [r.step for r in first["resumed"]] == [r.step for r in second["resumed"]]
    assert [r.period for r in first["resumed"]] == [r.period for r in second["resumed"]]


def load_under_ddp(folder: str) -> dict:
    model = seeded()
    fitted, _ = fit(ADPSGDStrategy(3), model, max_steps=10)
    fitted.save_checkpoint(f"{folder}/ours.ckpt")
    other = seeded(1)
    theirs, _ = fit(
        "ddp",
        other,
        max_steps=12,
        max_epochs=9,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/ours.ckpt"},
    )
    theirs.save_checkpoint(f"{folder}/theirs.ckpt")
    again = seeded(2)
    back, rounds = fit(
        ADPSGDStrategy(3),
        again,
        max_steps=16,
        max_epochs=9,
        loaders={"train_dataloaders": loader(), "ckpt_path": f"{folder}/theirs.ckpt"},
    )
    return {"steps": [fitted.global_step, theirs.global_step, back.global_step], "rounds": len(rounds)}


def test_our_checkpoint_loads_under_ddp_and_ddps_under_ours(pool, tmp_path):
    for outcome in pool.run_trainer(load_under_ddp, str(tmp_path)):
        assert outcome == {"steps": [10, 12, 16], "rounds": 2}


# Logging


class Logs(Classifier):
    """Logs its loss in a way of its own."""

    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, **self.how)
        return loss


def log(on_step: bool) -> list[str]:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ADPSGDStrategy(4), Logs(on_step=on_step, on_epoch=not on_step))
    return [str(warning.message) for warning in caught if "at every step" in str(warning.message)]


def test_a_metric_reduced_at_every_step_is_warned_of_once_on_the_first_rank(pool):
    first, second = pool.run_trainer(log, True)
    assert len(first) == 1
    assert "`training_step`" in first[0]
    assert "on_epoch=True" in first[0]
    assert second == []


def test_a_metric_reduced_at_the_end_of_an_epoch_is_not_warned_of(pool):
    assert pool.run_trainer(log, False) == [[], []]
