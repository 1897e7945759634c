"""Local SGD for one optimizer in a plain training loop, among workers that come and go."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.elastic.engine import SECONDS_BETWEEN_ATTEMPTS, ElasticEngine, Meeting, Rule
from lightning_adpsgd.elastic.lighthouse import Lighthouse
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.elastic.worker_state import JoinableState, Stateful, WorkerState
from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.options import AveragingOptions, OptimizerState, ReduceDtype, options_of
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.engine import RoundEngine
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.workers.quorum_group import QuorumGroup

_SECONDS_FOR_A_LIGHTHOUSE_TO_START = 10.0
_CONNECT_TIMEOUT = timedelta(seconds=3)  # all members have asked for the quorum just now

_REFUSED = {
    "stagger": "its fragments are written back one by one, so a round that loses a worker would be half written",
    "overlap": "a round in flight would need a second vote when it is adopted",
    "reduce_dtype": "a worker that joins does not know the average relative to which changes are encoded",
    "update": "the state of an outer step is not sent to a worker that joins",
    "optimizer_state": "moments are changed in place, before it is known whether all workers have them",
    "on_divergence": "a worker whose values are not finite is always left out, and gets an error of its own",
}


class ElasticLocalSGD(LocalSGD):
    """A :class:`LocalSGD` whose workers come and go: they meet at a torchft lighthouse, once per averaging round.

    Each worker is one process, started by itself, and no process group is initialized. If a worker is lost, the others
    go on: the round that loses it overwrites nothing, and they average again after the next step. A worker that starts
    late receives weights, buffers, optimizer state, rule and counters from one of the others in their next round, and
    is averaged from the round after that::

        # adpsgd elastic --workers 4 train.py; or, once, adpsgd lighthouse, and for each worker
        # TORCHFT_LIGHTHOUSE=http://host:29510 python train.py
        local_sgd = ElasticLocalSGD(optimizer, AdaptivePeriod(), module=model, total_steps=1000)
        local_sgd.broadcast()  # start with the others, or join them
        while local_sgd.steps < 1000:
            optimizer.zero_grad()
            loss(model, next(batches)).backward()
            optimizer.step()
            local_sgd.step()
        local_sgd.average()
        local_sgd.close()

    Between two rounds this package sends nothing. torchft's own thread sends the lighthouse a heartbeat every 0.1 s.
    A round in which not all contributors have taken a whole period, or of one worker alone, is not shown to the rule.
    If the number of contributors changes, the rule sees what S_k / γ_k would be among as many as in the first round
    that it has seen, (1 − 1/n₁) / (1 − 1/n) times the record's ratio, so its target goes on.

    The lighthouse's options decide how fast the others go on. A worker that is killed holds up their next round until
    ``--heartbeat-timeout`` has passed. One that is slow holds it up for ``--join-timeout`` at most, counted from the
    first worker that asks: if the time is up when most have asked, they meet without the rest. So it has to exceed the
    difference between the fastest and the slowest worker's time for a period, and what a worker that has joined takes
    to begin.

    Args:
        optimizer: its parameters are averaged. They have to be on the CPU.
        period: as for :class:`LocalSGD`. The state of a rule of your own has to consist of what JSON can hold.
        module: its floating-point buffers are averaged; a worker that joins receives all of its state.
        total_steps: K, the optimizer steps of the whole run; None if not known.
        lighthouse: its address, such as ``http://host:29510``; None: the environment variable TORCHFT_LIGHTHOUSE.
        min_workers: with fewer there is no round; each trains on by itself.
        start_workers: with fewer the run does not start: :meth:`broadcast` waits for more. Later there may be fewer.
        worker_id: this worker's name. Ranks follow the names' alphabetical order. None: a random one.
        quorum_timeout: how long a round waits for a quorum. Without one, the worker trains for another period. (For how
            long a quorum waits for stragglers is an option of the lighthouse, ``--join-timeout``.)
        round_timeout: how long a worker waits for another within a round.
        join_timeout: how long :meth:`broadcast` waits for the others' next round.
        hostname: under which the others reach this worker; None: what the system calls itself.
        stateful: objects with ``state_dict`` and ``load_state_dict``, by name, that a worker that joins receives too:
            learning-rate schedulers, for example.
        average_buffers: this and the following arguments are as for :class:`LocalSGD`.
        exclude_buffers: patterns of the names of buffers that are not averaged.
        optimizer_state: only "local".
        bucket_size_mb: size of the largest bucket, in MiB. The means of all buckets have memory of their own, kept
            from round to round.
        stagger: only False.
        overlap: only 0.
        reduce_dtype: only None.
        options: all of these, in place of single ones.
        elastic: ``lighthouse`` to ``hostname``, in place of single ones.
        worker_state: what a worker that joins receives, in place of ``stateful``, weights and optimizer state.
        index: the optimizer's index, for the records.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, an option is not supported here, there is no lighthouse, or
            torch's default process group is initialized.
        ModuleNotFoundError: if torchft is not installed.
    """

    _engine_type: ClassVar[type[RoundEngine]] = ElasticEngine
    _engine: ElasticEngine

    def __init__(
        self,
        optimizer: Optimizer,
        period: AveragingPeriod | int | None = None,
        *,
        module: nn.Module | None = None,
        total_steps: int | Literal["later"] | None = None,
        lighthouse: str | None = None,
        min_workers: int = 1,
        start_workers: int = 1,
        worker_id: str | None = None,
        quorum_timeout: timedelta = timedelta(seconds=60),
        round_timeout: timedelta = timedelta(seconds=60),
        join_timeout: timedelta = timedelta(minutes=30),
        hostname: str | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        average_buffers: bool = True,
        exclude_buffers: Sequence[str] = (),
        optimizer_state: OptimizerState = "local",
        bucket_size_mb: float = 64.0,
        stagger: bool = False,
        overlap: int = 0,
        reduce_dtype: ReduceDtype | Codec | None = None,
        options: AveragingOptions | None = None,
        elastic: ElasticOptions | None = None,
        worker_state: JoinableState | None = None,
        index: int = 0,
    ) -> None:
        options = options_of(
            options,
            average_buffers=average_buffers,
            exclude_buffers=exclude_buffers,
            optimizer_state=optimizer_state,
            bucket_size_mb=bucket_size_mb,
            stagger=stagger,
            overlap=overlap,
            reduce_dtype=reduce_dtype,
        )
        check_supported(options)
        elastic = elastic or ElasticOptions(
            lighthouse=lighthouse,
            min_workers=min_workers,
            start_workers=start_workers,
            worker_id=worker_id,
            quorum_timeout=quorum_timeout,
            round_timeout=round_timeout,
            join_timeout=join_timeout,
            hostname=hostname,
        )
        if elastic.is_of_a_restart:
            elastic = dataclasses.replace(elastic, start_workers=max(2, elastic.start_workers))
        at = Lighthouse(elastic.lighthouse, elastic.name, elastic.hostname, elastic.round_timeout)
        group, transport = _torchft(elastic.round_timeout)
        super().__init__(
            optimizer,
            period,
            module=module,
            total_steps=total_steps,
            options=options,
            workers=QuorumGroup(group, elastic.round_timeout),
            index=index,
        )
        _check_on_cpu(self.averaged)
        state = worker_state or WorkerState(optimizer, module, stateful or {})
        rule = Rule(lambda: self.period.value, self._rule.state_dict, self._load_rule)
        self._elastic = elastic
        self._engine.attach(Meeting(at, transport, state, rule, elastic))

    @property
    def has_joined(self) -> bool:
        """Whether this worker has started with the others, or has received their state."""
        return self._engine.committed > 0

    @property
    def rounds(self) -> int:
        """The rounds of the run that this worker knows to be committed, those before it has joined included."""
        return self._engine.committed

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes logs and checkpoints: one of those of the latest round, until it is lost."""
        return self._engine.is_writer

    @override
    def broadcast(self) -> None:
        """Start with the other workers from the first one's state, or join them in their next round.

        Without this call a worker joins in its first round, and the steps it has taken before are lost.

        Raises:
            WorkerLostError: if there was no round within ``join_timeout``; or if this process replaces one that has
                ended, and no other worker was there for ``quorum_timeout``.
            WorkersDisagreeError: if this worker has built another model or optimizer than the others.
        """
        if self.has_joined:
            return
        latest_company = time.monotonic()
        deadline = latest_company + self._elastic.join_timeout.total_seconds()
        while self._engine.attempt("period") != "committed":
            latest_company = latest_company if self._engine.is_alone else time.monotonic()
            patience = self._elastic.quorum_timeout
            if self._elastic.is_of_a_restart and time.monotonic() > latest_company + patience.total_seconds():
                raise WorkerLostError(
                    f"This worker was started again, and no other one was there for quorum_timeout={patience}: they"
                    " have ended, or they use another lighthouse. It does not start the run anew, alone."
                )
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"This worker has met no others within join_timeout={self._elastic.join_timeout}: expected a round"
                    " of at least min_workers workers in that time. Check that the lighthouse runs and that the other"
                    " workers have its address, or raise join_timeout above the time that an averaging period takes."
                )
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        self._emit(self._engine.land(self.period.value))

    @override
    def average(self, trigger: Trigger = "train_end", also: Sequence[Tensor] = ()) -> AveragingRound | None:
        """Average now with the workers that are there, unless no step was taken since the latest round.

        It waits for the others' next round. Without a quorum, this worker's weights stay as they are.

        Args:
            trigger: what the round is for. If any worker's round is not for its period, the rule does not see it.
            also: has to be empty.

        Returns:
            The round's record, or None if there was no round.
        """
        arrived = super().average(trigger, also) if self.has_trained or also else None
        deadline = time.monotonic() + _SECONDS_FOR_A_LIGHTHOUSE_TO_START
        while self.local_steps > 0 and self._engine.may_try_again(deadline):
            arrived = super().average(trigger, also) or arrived
        return arrived

    def leave_soon(self) -> None:
        """Wait no longer than ``leave_timeout`` for others from now on. May be called by a signal handler."""
        self._engine.hurry()

    @override
    def close(self) -> None:
        """Leave the other workers: close the connections, and stop the heartbeats."""
        self._engine.leave()
        super().close()

    def _load_rule(self, state: dict[str, Any], steps: int) -> None:
        self._rule.load_state_dict(state, steps, warns=True)


def check_supported(options: AveragingOptions) -> None:
    """Raise ``ValueError`` if elastic rounds do not support an option."""
    default = AveragingOptions()
    for name, reason in _REFUSED.items():
        value, expected = getattr(options, name), getattr(default, name)
        if value != expected:
            raise ValueError(
                f"{name}={value!r} for elastic workers: expected {expected!r}, because {reason}. Leave it out, or use"
                " LocalSGD."
            )


def _check_on_cpu(tensors: Sequence[Tensor]) -> None:
    found = {tensor.device.type for tensor in tensors} - {"cpu"}
    if found:
        raise ValueError(
            f"ElasticLocalSGD with parameters on {', '.join(sorted(found))}: expected all of them on the CPU, because"
            " elastic rounds travel over gloo and were not tested elsewhere. Use LocalSGD."
        )


def _torchft(timeout: timedelta) -> tuple[Any, Any]:
    """Torchft's process group, and what sends state over it."""
    try:
        from torchft.checkpointing.pg_transport import PGTransport
        from torchft.process_group import ProcessGroupGloo
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ElasticLocalSGD needs torchft ({error}): pip install 'lightning-adpsgd[elastic]'. It has wheels for Linux"
            " on x86-64."
        ) from error
    group = ProcessGroupGloo(timeout=_CONNECT_TIMEOUT)
    return group, PGTransport(group, timeout, torch.device("cpu"))
