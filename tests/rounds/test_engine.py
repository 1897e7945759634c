"""What is easily lost between the engine and its users: when measures are read, who sees records, and in which mode."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_adpsgd import AveragingOptions, ConstantPeriod, LocalSGD, Update, WorkerGroup
from lightning_adpsgd.rounds.handshake import SignalFlags
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.workers.reduction import CollectiveError

SPREAD = [{}, {"stagger": True, "overlap": 1}]


def trained(steps: int = 0, momentum: float = 0.0, **options: Any) -> tuple[LocalSGD, nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(30))
    local_sgd = LocalSGD(torch.optim.SGD([first, second], lr=0.1, momentum=momentum), **options)
    local_sgd.broadcast()
    for step in range(steps):
        one_step(local_sgd, step)
    return local_sgd, first, second


def one_step(local_sgd: LocalSGD, step: int = 0) -> Any:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for parameter in local_sgd.optimizer.param_groups[0]["params"]:
        generator = torch.Generator().manual_seed(100 * rank + step)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    local_sgd.optimizer.step()
    return local_sgd.step()


class Counted(Update):
    """Adopts the mean, and counts the calls of ``start``."""

    starts = 0

    def start(self, layout: Any) -> None:
        self.starts += 1

    def apply(self, bucket: Any, mean: torch.Tensor) -> torch.Tensor:
        return mean


def freeze_between_rounds() -> int:
    update = Counted()
    local_sgd, first, _ = trained(2, period=4, update=update)
    first.requires_grad_(False)
    one_step(local_sgd)
    one_step(local_sgd)  # a round, of everything trained since the round before
    first.requires_grad_(True)
    for step in range(4):
        one_step(local_sgd, step)
    return update.starts


@pytest.mark.workers
def test_the_averaged_tensors_change_at_a_round_not_when_its_record_is_read(pool):
    assert pool.run(freeze_between_rounds) == [1, 1]


def bytes_of_a_forced_round(optimizer_state: str) -> int:
    local_sgd, *_ = trained(4, momentum=0.9, period=2, reduce_dtype="bf16", optimizer_state=optimizer_state)
    return local_sgd.average("validation").payload_bytes


@pytest.mark.workers
def test_moments_are_not_averaged_again_if_only_a_residual_is_left(pool):
    assert pool.run(bytes_of_a_forced_round, "average") == pool.run(bytes_of_a_forced_round, "local")


def lose_the_measures(spread: dict[str, Any]) -> None:
    local_sgd, *_ = trained(1, period=2, **spread)

    def launch_mean(*_: Any) -> None:
        raise CollectiveError("connection closed by peer")

    local_sgd.workers.launch_mean = launch_mean
    for step in range(6):
        one_step(local_sgd, step)


@pytest.mark.workers
@pytest.mark.parametrize("spread", SPREAD)
def test_a_measure_that_fails_is_reported_as_a_lost_worker(pool, spread):
    for outcome in pool.outcomes(lose_the_measures, spread):
        assert outcome.kind == "WorkerLostError"
        assert ("a fragment of" if spread else "the averaging round") in outcome.error


def listen(spread: dict[str, Any], later: bool) -> tuple[bool, bool, list[tuple[int, int]]]:
    local_sgd, first, _ = trained(period=2, **spread)
    local_sgd._engine._reads_later = later
    ema, made = first.detach().clone(), []
    seen = []

    def listener(record: Any) -> None:
        first.mul_(1.0)
        ema.lerp_(first, 0.5)
        made.append(torch.zeros(1))
        seen.append((record.step, local_sgd.steps))

    local_sgd.subscribe(listener)
    for step in range(7):
        one_step(local_sgd, step)
    with torch.inference_mode():
        local_sgd.average("validation")
    return ema.requires_grad, any(tensor.is_inference() for tensor in made), seen


@pytest.mark.workers
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("spread", SPREAD)
def test_a_listener_may_write_to_parameters_and_keep_tensors(pool, spread, later):
    for requires_grad, inference, seen in pool.run(listen, spread, later):
        assert (requires_grad, inference) == (False, False)
        assert len(seen) >= 3
        if not spread:
            assert all(step == steps for step, steps in seen)  # even if the record is read in the next step


class RuleOfVersion01(ConstantPeriod):
    """Has names of its own for positional arguments."""

    def update(self, k, *, ratio, learning_rate):
        self.seen = (k, learning_rate)


class RuleThatTakesAnyNumbers(ConstantPeriod):
    def update(self, step, **more):
        self.seen = (step, more["learning_rate"])


@pytest.mark.parametrize("kind", [RuleOfVersion01, RuleThatTakesAnyNumbers])
def test_rules_of_version_0_1_are_given_numbers(kind):
    rule = kind(2)
    trained(2, period=rule)
    assert rule.seen == (2, 0.1)


def raise_and_lower() -> list[int]:
    flags = SignalFlags()
    local_sgd, *_ = trained(period=1, flags=flags)
    agreed = []
    for step, raised in enumerate([0, 1, 1, 0, 0]):
        flags.raised = raised
        one_step(local_sgd, step)
        agreed.append(flags.agreed)
    return agreed


@pytest.mark.workers
def test_a_flag_that_was_lowered_is_forgotten_at_the_next_round(pool):
    assert pool.run(raise_and_lower) == [[0, 1, 1, 0, 0]] * 2


def go_on_after_divergence() -> list[int]:
    local_sgd, first, _ = trained(1, period=2)
    intact = first.detach().clone()
    first.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        one_step(local_sgd, 1)
    before = local_sgd.handshakes
    first.data.copy_(intact)
    record = local_sgd.average()
    return [before, local_sgd.handshakes, record.payload_bytes]


@pytest.mark.workers
def test_a_failed_round_counts_as_a_handshake_and_its_bytes_are_not_booked(pool):
    (before, after, sent), _ = pool.run(go_on_after_divergence)
    assert (before, after) == (1, 2)
    plain, _ = pool.run(bytes_of_one_round)
    assert sent == plain


def bytes_of_one_round() -> int:
    return trained(2, period=9)[0].average().payload_bytes


def test_with_one_worker_it_can_be_copied_and_pickled():
    local_sgd, *_ = trained(2, period=2)
    assert copy.deepcopy(local_sgd).steps == 2
    assert pickle.loads(pickle.dumps(local_sgd)).steps == 2
    assert pickle.loads(pickle.dumps(WorkerGroup())).size == 1


def fail_to_start() -> tuple[str, list[int]]:
    opened: list[Any] = []
    new_async_group = WorkerGroup.new_async_group

    def noted(self: WorkerGroup) -> WorkerGroup:
        opened.append(new_async_group(self))
        return opened[-1]

    WorkerGroup.new_async_group = noted
    try:
        good = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
        bad = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
        bad.param_groups[0]["lr"] = None
        TrainingSession(
            [good, bad],
            ConstantPeriod(4),
            AveragingOptions(stagger=True),
            module=nn.Module(),
            workers=WorkerGroup(),
        )
    except ValueError as error:
        return str(error), [len(group._opened) for group in opened]
    finally:
        WorkerGroup.new_async_group = new_async_group
    return "no error", []


@pytest.mark.workers
def test_a_session_that_cannot_start_closes_its_process_groups(pool):
    for error, opened in pool.run(fail_to_start):
        assert "lr=None" in error
        assert opened == [0]
