"""A round of everything, while nobody trains: nothing is overwritten before all workers are known to agree."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_adpsgd.averaging.averager import ParameterAverager, Terms
from lightning_adpsgd.averaging.layout import Described, FlatLayout
from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker
from lightning_adpsgd.rounds.contact import Contact
from lightning_adpsgd.rounds.guards import Guards, all_finite
from lightning_adpsgd.rounds.handshake import Handshake, lost
from lightning_adpsgd.rounds.measures import Measures
from lightning_adpsgd.rounds.record import Trigger
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import CollectiveError, Reduction


class FullRound:
    """Holds the handshake, averages bucket by bucket, begins to measure, and deals with the optimizer's state.

    Args:
        contact: where this rank stands.
        tracker: knows tensors' names.
        workers: with whom.
        policy: what is done with the optimizer's state.
        guards: say who has diverged.
        measures: of which one is begun.
        drop: whether workers that have diverged are left out, instead of an error.
        bucket_bytes: the longest range averaged at once.
    """

    def __init__(
        self,
        contact: Contact,
        tracker: TensorTracker,
        workers: WorkerGroup,
        policy: StatePolicy,
        guards: Guards,
        measures: Measures,
        drop: bool,
        bucket_bytes: int,
    ) -> None:
        self._contact = contact
        self._tracker = tracker
        self._workers = workers
        self._policy = policy
        self._guards = guards
        self._measures = measures
        self._drop = drop
        self.handshakes = 0
        """How many there were."""
        self._bucket_bytes = bucket_bytes

    def run(
        self,
        trigger: Trigger,
        period: int,
        tensors: AveragedTensors,
        also: Sequence[Tensor],
        trained: Callable[[], bool],
        drifted: int,
    ) -> tuple[Reduction, int]:
        """Average everything.

        Args:
            trigger: who asks.
            period: p, in force.
            tensors: what is averaged.
            also: further tensors to average along.
            trained: says whether there is something to average; asked again when that has been done.
            drifted: for how many steps any of it has drifted at most. (For less, an estimate errs on the safe side.)

        Returns:
            What was measured, which is on its way, and how many workers were left out.
        """
        more = FlatLayout(also, [None] * len(also)) if also else None
        further = [tensor for tensor in also if isinstance(tensor, nn.Parameter)]
        stated = tensors.stated
        state = self._contact.state(
            "an averaging round",
            trigger,
            period,
            fingerprint=stated["fingerprint"] ^ (0 if more is None else more.fingerprint),
            known=stated["known"],
            finite=self._workers.size == 1 or tensors.layout.are_finite(self._workers.device) & all_finite(further),
        )

        def describe() -> list[Described]:
            described = self._tracker.describe(tensors.layout, tensors.tensors)
            return described if more is None else [*described, *self._tracker.describe(more, also)]

        handshake = Handshake(self._workers, state).complete()
        self.handshakes += 1
        index, step = self._contact.index, self._contact.steps
        try:
            what = f"The workers of optimizer {index} do not average the same tensors at step {step}."
            handshake.check_tensors(what, describe)
            tensors.agree(handshake.know_the_same)
            if handshake.diverged:
                self._guards.report_divergence(handshake, step, [*tensors.parameters, *further], self._drop)
            self._contact.heed(handshake, full=True)
            contribution = handshake.contribution
            deviations: Sequence[float | Tensor] = [0.0] * tensors.averager.groups
            if self._workers.count > 1 and trained():
                as_it_is = trigger != "period" or contribution != self._workers.all_contribute
                contributes = contribution.contributes  # of one that does not, the optimizer begins anew
                told = self._policy.estimate(tensors.tensors, drifted) if contributes else None
                terms = Terms(contribution, as_it_is, told)
                deviations = [*tensors.averager.average(terms)]
            numbers = self._measures.launch(deviations, contribution)
            if more is not None:
                ParameterAverager(more, 0, self._workers, self._bucket_bytes).average(Terms(contribution))
            self._policy.apply(contribution, trained(), checkpoint=trigger == "checkpoint")
        except CollectiveError as error:
            raise lost(self._workers, state, error) from error
        return numbers, len(handshake.diverged_workers)
