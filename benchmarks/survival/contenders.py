"""The two that are compared: this package's `ElasticLocalSGD`, and torchft's `LocalSGD` on its `Manager`.

Both average every `period` steps at the same lighthouse, over torchft's gloo process group. torchft's takes part as its
own tests have it (synchronous quorums; weights and momentum are in the state that is sent), with two things added in
its favour: a process that starts calls `sync` at once and so joins in the others' next round, and a quorum is asked for
again after the lighthouse has failed. The rest is its own. It has no adaptive period, and no average of the workers
that are left at the end, so its workers all stop after the same round. A quorum that fails raises an error that ends
the process, which is then started again like one that was killed.
"""

from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.survival.task import Place, Setup, Tally

_PERIODS_TO_THE_END = 3  # by then, all workers know where it is
_QUORUM_RETRIES = 60  # one a second: torchft spreads them over the timeout below
_QUORUM_TIMEOUT = timedelta(seconds=60)  # torchft's own default: it is far above a period, as torchft asks for
_CONNECT_TIMEOUT = timedelta(seconds=3)  # as this package has it; a worker that was just killed may be in a quorum


class Contender(Protocol):
    """A way to average, in one worker."""

    def join(self) -> None:
        """Start with the others, or join them."""

    def after_step(self) -> None:
        """Note what an optimizer step did, or do it."""

    def may_end(self, latest: int) -> bool:
        """Whether this worker may stop now; ``latest`` is the latest round's number that the parent has heard of."""

    def average(self) -> None:
        """Average at the end."""

    def close(self) -> None:
        """Leave the others."""


class Elastic:
    """This package."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        setup: Setup,
        place: Place,
        tally: Tally,
        tell: Callable[[int], None],
    ) -> None:
        from lightning_adpsgd.elastic import ElasticLocalSGD

        timeout = timedelta(seconds=setup.timeout_seconds)
        self._period = setup.period
        self._local_sgd = ElasticLocalSGD(
            optimizer,
            setup.period,
            module=network,
            lighthouse=place.lighthouse,
            worker_id=f"w{place.worker}",
            hostname=place.host.address,
            start_workers=setup.workers if place.incarnation == 0 else 1,
            quorum_timeout=timeout,
            round_timeout=timeout,
            stateful={"tally": _Received(tally)},
        )

        def after_round(record: Any) -> None:
            tally.average()
            tell(record.step)

        self._local_sgd.subscribe(after_round)

    def join(self) -> None:
        """Start with the others, or join them."""
        self._local_sgd.broadcast()

    def after_step(self) -> None:
        """Average if a period has passed."""
        self._local_sgd.step()

    def may_end(self, latest: int) -> bool:
        """After the same number of steps as the others, three periods from now."""
        return self._local_sgd.steps >= latest + _PERIODS_TO_THE_END * self._period

    def average(self) -> None:
        """Average with those that are there."""
        self._local_sgd.average()

    def close(self) -> None:
        """Leave."""
        self._local_sgd.close()


class _Received:
    """Takes part in the state that a worker receives, to learn that it does."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Any) -> None:
        self._tally.receive()


class Torchft:
    """torchft's own."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        setup: Setup,
        place: Place,
        tally: Tally,
        tell: Callable[[int], None],
    ) -> None:
        from torch.distributed import TCPStore
        from torchft import Manager, ProcessGroupGloo
        from torchft.checkpointing.pg_transport import PGTransport
        from torchft.local_sgd import LocalSGD

        timeout = timedelta(seconds=setup.timeout_seconds)
        self._store = TCPStore(place.host.address, 0, is_master=True, wait_for_workers=False)

        group = ProcessGroupGloo(timeout=_CONNECT_TIMEOUT)

        def receive(state: Any) -> None:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            tally.receive()

        self._manager = Manager(
            pg=group,
            load_state_dict=receive,
            state_dict=lambda: {"network": network.state_dict(), "optimizer": optimizer.state_dict()},
            min_replica_size=2,
            use_async_quorum=False,
            timeout=timeout,
            quorum_timeout=_QUORUM_TIMEOUT,
            connect_timeout=_CONNECT_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=place.host.address,
            store_port=self._store.port,
            lighthouse_addr=place.lighthouse,
            replica_id=f"w{place.worker}",
            hostname=place.host.address,
            checkpoint_transport=PGTransport(group, timeout, torch.device("cpu")),
            quorum_retries=_QUORUM_RETRIES,
        )
        self._local_sgd = LocalSGD(self._manager, network, optimizer, sync_every=setup.period)
        self._local_sgd.__enter__()
        self._tally, self._tell, self._round = tally, tell, 0

    def join(self) -> None:
        """Average at once, until that has worked."""
        while self._manager.current_step() == self._round:
            self._local_sgd.sync()
        self.after_step()

    def after_step(self) -> None:
        """Note whether the optimizer's step has averaged; torchft does that in a hook of the optimizer."""
        if self._manager.current_step() != self._round:
            self._round = self._manager.current_step()
            self._tally.average()
            self._tell(self._round)
            self._has_averaged = True
        else:
            self._has_averaged = False

    def may_end(self, latest: int) -> bool:
        """After the same round as the others."""
        return self._has_averaged and self._round >= latest + _PERIODS_TO_THE_END

    def average(self) -> None:
        """Do nothing: the latest step has averaged."""

    def close(self) -> None:
        """Leave."""
        self._local_sgd.__exit__(None, None, None)
        self._manager.shutdown(wait=False)


CONTENDERS: dict[str, type[Elastic] | type[Torchft]] = {"adpsgd": Elastic, "torchft": Torchft}


def why_not() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if find_spec("torchft") is None:
        return "torchft is not installed: pip install 'lightning-adpsgd[elastic]'. It has wheels for Linux on x86-64."
    return None
