"""Whether a worker can take part in a round: it has to average the same tensors as the others, and finite ones."""

import logging
from collections import Counter

from lightning_adpsgd.averaging.tensors import TensorTracker
from lightning_adpsgd.elastic.plan import MemberState, Plan
from lightning_adpsgd.errors import WorkersDisagreeError, WorkersDivergedError
from lightning_adpsgd.rounds.guards import all_finite

_log = logging.getLogger(__name__)


def warn_of_twins(plan: Plan, warned_of: set[str]) -> None:
    """Warn once of each worker that is there twice: two processes that train on the same share of the data.

    Args:
        plan: of the round.
        warned_of: the workers that were warned of; it is updated.
    """
    processes = Counter(member.name.partition(":")[0] for member in plan.members)
    for worker, count in processes.items():
        if count > 1 and worker not in warned_of:
            warned_of.add(worker)
            _log.warning(
                "%d processes are worker %r, and train on the same share of the data: expected another REPLICA_GROUP_ID"
                " (or worker_id) for each.",
                count,
                worker,
            )


def check_admitted(plan: Plan, stated: MemberState, name: str, tracker: TensorTracker) -> None:
    """Raise if this worker is left out of ``plan``. The others go on.

    Args:
        plan: of the round.
        stated: what this worker has stated.
        name: this worker's name.
        tracker: of its tensors.

    Raises:
        WorkersDivergedError: if its parameters are not finite.
        WorkersDisagreeError: if it averages other tensors than the others.
    """
    if plan.rank is not None:
        return
    if not stated.finite:
        parameters = tracker.current().parameters
        names = [tracker.name_of(each) for each in parameters if not all_finite([each])]
        raise WorkersDivergedError(
            f"Parameters of worker {name!r} are not finite at step {stated.steps}. The first of {len(names)}:"
            f" {', '.join(names[:3])}. The others go on without it. Lower the learning rate, clip gradients, or look"
            " for bad samples in this worker's data, and start the worker again."
        )
    theirs = plan.of_leader
    raise WorkersDisagreeError(
        f"Worker {name!r} averages {stated.tensors} tensors (hash {stated.fingerprint}), the other workers"
        f" {theirs.tensors} (hash {theirs.fingerprint}): expected the same dtypes, shapes, parameter groups and memory"
        " formats. Build the same model and optimizer in this worker. The others go on without it."
    )
