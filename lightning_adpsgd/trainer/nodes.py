"""Nodes as workers: their ranks average gradients after every backward pass, as in DDP."""

from typing import Any

from typing_extensions import override

from lightning_adpsgd.rounds.handshake import naming_lost_workers
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.nodes import NodeWorkerGroup

from .compat import sync_module_states, wrap_for_gradients_of
from .family import MisconfigurationException, rank_zero_warn
from .steps import CountedSteps


class NodeGradients(CountedSteps):
    """Leaves out DDP's wrapper, and so its gradient all-reduce, except within a node that is one worker."""

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._workers: WorkerGroup | None = None
        self._nodes: NodeWorkerGroup | None = None
        self._wrapped_for: set[int] = set()

    @override
    def configure_ddp(self) -> None:
        """Start all ranks from rank 0's weights; wrap the model only if gradients are averaged within a node."""
        assert self.model is not None
        sync_module_states(self.model)
        if self._shares_gradients:
            self._wrap()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Wrap the model again if layers were frozen or unfrozen: the wrapper has hooks on trained parameters only."""
        super().on_train_batch_start(batch, batch_idx)
        if self._shares_gradients and self._trained() != self._wrapped_for:
            self.handshake("a change of what is trained")
            self._wrap()

    def _new_workers(self, kind: str) -> WorkerGroup:
        everybody = WorkerGroup(device=self.root_device)
        if kind == "device":
            return everybody
        with naming_lost_workers(everybody, "finding out about nodes"):
            if self._nodes is None:
                ranks_per_node = find_nodes(everybody, self.node_rank, self.local_rank, type(self).__name__)
                self._nodes = NodeWorkerGroup(ranks_per_node, self.root_device)
            self._nodes.open()
        return self._nodes

    @property
    def _shares_gradients(self) -> bool:
        """Whether ranks of a node average their gradients."""
        return isinstance(self._workers, NodeWorkerGroup) and self._workers.size > 1

    def _wrap(self) -> None:
        assert isinstance(self._workers, NodeWorkerGroup)
        self._wrapped_for = self._trained()
        wrap_for_gradients_of(self, self._workers.node)

    def _trained(self) -> set[int]:
        """The parameters that require a gradient."""
        assert self.lightning_module is not None
        return {id(parameter) for parameter in self.lightning_module.parameters() if parameter.requires_grad}


def find_nodes(everybody: WorkerGroup, node_rank: int, local_rank: int, strategy: str) -> int:
    """The number of ranks of a node. All ranks have to call this.

    Args:
        everybody: all ranks.
        node_rank: this rank's node.
        local_rank: this rank's place in its node.
        strategy: the name of the strategy's class, for messages.

    Raises:
        MisconfigurationException: on every rank, if nodes differ in size or ranks are not numbered node by node.
    """
    places = everybody.table([node_rank, local_rank]).long().tolist()
    nodes = [node for node, _ in places]
    sizes = {node: nodes.count(node) for node in sorted(set(nodes))}
    ranks_per_node = max(sizes.values())
    if places != [[node, place] for node in range(len(sizes)) for place in range(ranks_per_node)]:
        each = ", ".join(f"node {node}: {size}" for node, size in sizes.items())
        raise MisconfigurationException(
            f'{strategy}(worker="node") found nodes with different numbers of ranks, or ranks that are not numbered'
            f" node by node (ranks of {each}). Every node has to run the same number of ranks (Trainer(devices=...)),"
            " numbered from the first node to the last."
        )
    if len(sizes) == 1 and everybody.size > 1:
        rank_zero_warn(
            f'{strategy}(worker="node") on one node: there is no other worker to average with, so this trains like'
            " DDP, with a gradient all-reduce at every step. To average between the devices of a node, leave out"
            ' worker="node"; for several nodes, pass Trainer(num_nodes=...).'
        )
    return ranks_per_node
