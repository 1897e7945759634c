"""What `link.py` compares: ways to train one model on many workers, each as its own project recommends.

Those that average parameters do so every `period` steps, so that all of them have the same number of rounds. The bytes
that a contender reports are its own count where it has one (``adpsgd``, bf16, PowerSGD, QSGD); for the others they are
what a ring all-reduce sends for the tensors that were reduced.

Where the comparison is unfair in ways that are not to this package's credit:

- Lightning broadcasts a tensor at every batch in every strategy of several processes (whether SIGTERM has come), so
  ``ddp``, its hooks and ``post-local-sgd`` pay a round trip per step. Their users pay for it too, so it is kept.
- Lightning registers no communication hook on a CPU. Here it is done for the contenders that have one; otherwise
  ``post-local-sgd`` would send both gradients and parameters.
- Under DDP the buffers of a model (statistics of BatchNorm) are broadcast at every forward pass, in post-local SGD
  too. They are not in the bytes reported. With ``accelerate`` and ``torchft`` nothing averages them.
- ``accelerate`` and ``torchft`` are plain loops without the cost of a Trainer, but everything is compared with
  ``none``, which has one: with short steps they look better than their communication is. Compare them with
  ``none-loop``, and with ``adpsgd-loop``, which is this package's `LocalSGD` in the same loop.
- ``accelerate`` makes one all-reduce per parameter, each waited for, after a barrier.
- ``torchft`` tolerates failures, which the others do not: a round begins with a quorum. Its lighthouse checks for one
  every 100 ms by default; here every 10 ms, because otherwise only that wait would be measured.
- ``adpsgd-bf16``, ``adpsgd-int4`` and ``qsgd`` send directly from each rank to each other rank, not in a ring: with
  several ranks per host, more than what is reported for a rank leaves the host.
- PowerSGD gets all gradients in one bucket, after the backward pass. Its hook waits for collectives in its
  callbacks, which gloo runs on two threads, so that it hangs with more buckets. It compresses matrices, so the saving
  depends on the shapes of the model, and the accuracy it loses does not show in the time per step: look at the loss.
- ``qsgd`` quantizes on the cores that train, with PyTorch's operations and without a special kernel, and only the first
  of its two phases can hide behind the backward pass, while all of ``ddp`` can. With a fast link or few cores this
  takes longer than it saves. The effect of its noise is in the loss, as with PowerSGD.
- ``even`` has as many rounds as `Plan.mean_period` says, spread over the whole run: with the mean period of an adaptive
  run, both send the same. The number of its rounds in the timed steps can differ by one.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

from benchmarks.baselines import BF16Strategy, CountedDDP, EvenRounds, HookedDDP, PowerSGDStrategy, QSGDStrategy
from benchmarks.frame.rank import ADDRESS
from benchmarks.frame.trainer import VARIANTS, Rounds, Sent, new_trainer, unknown_options
from benchmarks.training import (
    Recipe,
    Record,
    Recorder,
    Task,
    loss_of,
    model_size,
    new_loader,
    new_network,
    new_optimizer,
)
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, AveragingPeriod, LocalSGD
from lightning_adpsgd.rounds.record import ring_bytes

POWERSGD_RANK = 2  # what its paper uses for images
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Plan:
    """A run, the same for every contender."""

    recipe: Recipe
    hosts: int
    ranks_per_host: int
    period: int
    adapt: bool  # whether ``AdaptivePeriod`` changes the period, after it has sampled for a quarter of the run
    mean_period: float | None = None  # steps per averaging round of ``even``; need not be whole

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.hosts * self.ranks_per_host

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """A plan as an order has it."""
        return cls(**{**content, "recipe": Recipe(**content["recipe"])})


@dataclass(frozen=True)
class Contender:
    """A way to train."""

    name: str
    train: Callable[[Plan, Record], None]  # trains on the calling rank, whose environment is as torchrun sets it
    why_not: Callable[[Plan], str | None] = lambda plan: None  # why it cannot take part; None if it can
    sends_in_slices: bool = False
    """Whether every rank of a host sends a slice to other hosts; in a ring only one of them does."""


# Lightning


def _fit(plan: Plan, record: Record, strategy: Strategy, *callbacks: Callback, **options: Any) -> None:
    task = Task(plan.recipe)
    settings = {"devices": plan.ranks_per_host, "num_nodes": plan.hosts, "max_epochs": 1, **options}
    trainer = new_trainer(strategy, *callbacks, Recorder(record), use_distributed_sampler=False, **settings)
    trainer.fit(task, new_loader(plan.recipe, _rank(), plan.world_size))
    _disconnect()


def _alone(plan: Plan, record: Record) -> None:
    """Each rank is a Trainer on a single device, and knows of no other rank."""
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    _fit(plan, record, strategy, devices=1, num_nodes=1, plugins=[LightningEnvironment()])


def _ddp(plan: Plan, record: Record) -> None:
    record.sent = _every_step(plan, record)
    _fit(plan, record, DDPStrategy())


def _compressed(new_strategy: Callable[[Plan], CountedDDP]) -> Callable[[Plan, Record], None]:
    """DDP with compressed gradients, whose strategy counts what it sends."""

    def train(plan: Plan, record: Record) -> None:
        strategy = new_strategy(plan)
        record.sent = lambda: Sent(strategy.steps, strategy.sent_bytes)
        _fit(plan, record, strategy)

    return train


def _post_local_sgd(plan: Plan, record: Record) -> None:
    # Gradients are reduced among the ranks of a host, if there are several.
    state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=plan.ranks_per_host > 1)

    def with_subgroup() -> PostLocalSGDState:
        if plan.ranks_per_host > 1:
            state.subgroup, _ = dist.new_subgroups(group_size=plan.ranks_per_host)
        return state

    # Lightning's averager, which reads the state, averages after the first step and then once per period.
    record.sent = _every_period(plan, lambda: -(-record.steps // plan.period))
    _fit(
        plan,
        record,
        HookedDDP(post_localSGD_hook, with_subgroup, ddp_comm_state=state, model_averaging_period=plan.period),
    )


def _even_rounds(plan: Plan) -> EvenRounds:
    assert plan.mean_period is not None
    return EvenRounds(max(1, round(plan.recipe.steps / plan.mean_period)))


def _needs_mean_period(plan: Plan) -> str | None:
    return "it needs the mean period of another run; see --mean-period" if plan.mean_period is None else None


def _average(plan: Plan, record: Record, period: AveragingPeriod | int, **options: Any) -> None:
    rounds = Rounds()
    record.sent = rounds.sent
    _fit(plan, record, ADPSGDStrategy(period=period, **options), rounds)


def _adaptive(plan: Plan) -> AdaptivePeriod:
    # While it samples, the period keeps its first value.
    return AdaptivePeriod(initial=plan.period, sampling=0.25 if plan.adapt else 1.0)


def _adpsgd(name: str, sends_in_slices: bool = False, **options: Any) -> Contender:
    """This package with some of its options."""

    def train(plan: Plan, record: Record) -> None:
        _average(plan, record, _adaptive(plan), **options)

    def why_not(plan: Plan) -> str | None:
        if options.get("worker") == "node" and plan.ranks_per_host == 1:
            return "with one rank per host it is the same as adpsgd; see --ranks-per-host"
        if options.get("overlap", 0) >= plan.period:
            return f"overlap={options['overlap']} needs a longer period than {plan.period}"
        return unknown_options(options)

    return Contender(name, train, why_not, sends_in_slices)


# Others, in a plain loop


def _loop(
    plan: Plan,
    record: Record,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None] = Tensor.backward,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    for batch in new_loader(plan.recipe, _rank(), plan.world_size):
        if record.steps == 0:
            record.begin()
        loss = loss_of(network, batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        after_step()
        record.step(loss.detach())


def _loop_alone(plan: Plan, record: Record) -> None:
    network = new_network(plan.recipe)
    _loop(plan, record, network, new_optimizer(plan.recipe, network))


def _loop_adpsgd(plan: Plan, record: Record) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    network = new_network(plan.recipe)
    optimizer = new_optimizer(plan.recipe, network)
    rounds = Rounds()
    record.sent = rounds.sent
    local_sgd = LocalSGD(optimizer, _adaptive(plan), module=network, total_steps=plan.recipe.steps)
    local_sgd.subscribe(rounds.kept.append)
    _loop(plan, record, network, optimizer, after_step=local_sgd.step)
    _disconnect()


def _accelerate(plan: Plan, record: Record) -> None:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True)  # connects the processes
    network = new_network(plan.recipe)
    network, optimizer = accelerator.prepare(network, new_optimizer(plan.recipe, network))
    with LocalSGD(accelerator=accelerator, model=network, local_sgd_steps=plan.period) as local_sgd:
        record.sent = _every_period(plan, lambda: local_sgd.num_steps // plan.period)
        _loop(plan, record, network, optimizer, accelerator.backward, local_sgd.step)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next run has another process group
    _disconnect()


def _torchft(plan: Plan, record: Record) -> None:
    """Every rank is a replica group with its own store and manager; rank 0 has the lighthouse."""
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import LocalSGD
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    port = int(os.environ["MASTER_PORT"]) + 1
    lighthouse = None
    if _rank() == 0:
        lighthouse = LighthouseServer(bind=f"0.0.0.0:{port}", min_replicas=plan.world_size, quorum_tick_ms=10)
    network = new_network(plan.recipe)
    optimizer = new_optimizer(plan.recipe, network)
    store = dist.TCPStore(os.environ[ADDRESS], 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=network.load_state_dict,
        state_dict=network.state_dict,
        min_replica_size=plan.world_size,
        use_async_quorum=False,
        init_sync=False,  # all start from the same weights
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=os.environ[ADDRESS],
        store_port=store.port,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port}",
        replica_id=f"replica_{_rank()}",
        hostname=os.environ[ADDRESS],
    )
    record.sent = _every_period(plan, manager.current_step)
    with LocalSGD(manager, network, optimizer, sync_every=plan.period):
        _loop(plan, record, network, optimizer)
    record.meet()  # no rank may leave while others are in the last round
    manager.shutdown(wait=False)
    if lighthouse is not None:
        lighthouse.shutdown()


def _needs(module: str) -> Callable[[Plan], str | None]:
    return lambda plan: None if find_spec(module) else f"{module} is not installed (pip install {module})"


INT4: dict[str, Any] = {"reduce_dtype": "int4", "optimizer_state": "estimate"}

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("none", _alone),
        Contender("none-loop", _loop_alone),
        Contender("ddp", _ddp),
        Contender("ddp-bf16", _compressed(lambda plan: BF16Strategy())),
        Contender("ddp-powersgd", _compressed(lambda plan: PowerSGDStrategy(POWERSGD_RANK))),
        Contender("qsgd", _compressed(lambda plan: QSGDStrategy(seed=plan.recipe.seed))),
        Contender("post-local-sgd", _post_local_sgd),
        Contender("accelerate", _accelerate, _needs("accelerate")),
        Contender("torchft", _torchft, _needs("torchft")),
        Contender("constant", lambda plan, record: _average(plan, record, plan.period)),
        Contender("even", lambda plan, record: _average(plan, record, _even_rounds(plan)), _needs_mean_period),
        Contender("adpsgd-loop", _loop_adpsgd),
        *(_adpsgd(name, **options) for name, options in VARIANTS.items()),
        _adpsgd("adpsgd-node", sends_in_slices=True, worker="node"),
        _adpsgd("adpsgd-int4", **INT4),
        _adpsgd("adpsgd-int4-stagger-overlap", **INT4, stagger=True, overlap=1),
    )
}
"""All of them, by name."""


# What they share


def _rank() -> int:
    return int(os.environ["RANK"])


def _every_step(plan: Plan, record: Record) -> Callable[[], Sent]:
    payload = 4 * model_size(plan.recipe)
    return lambda: Sent(record.steps, ring_bytes(record.steps * payload, plan.world_size))


def _every_period(plan: Plan, rounds: Callable[[], int]) -> Callable[[], Sent]:
    payload = 4 * model_size(plan.recipe)
    return lambda: Sent(rounds(), ring_bytes(rounds() * payload, plan.world_size))


def _disconnect() -> None:
    gc.collect()  # garbage of a run may hold connections
    if dist.is_initialized():
        # A gloo group that is destroyed right after its last collective can hang (seen with torch 2.4).
        time.sleep(0.05)
        dist.destroy_process_group()
