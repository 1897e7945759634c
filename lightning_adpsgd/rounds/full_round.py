"""A full round, while training waits. Nothing is overwritten before all workers are known to agree."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_adpsgd.averaging.averager import ParameterAverager, Terms
from lightning_adpsgd.averaging.layout import Described, FlatLayout
from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.averaging.tensors import AveragedTensors, TensorTracker
from lightning_adpsgd.rounds.contact import Contact
from lightning_adpsgd.rounds.guards import Guards, all_finite
from lightning_adpsgd.rounds.handshake import Handshake, naming_lost_workers
from lightning_adpsgd.rounds.measures import Measures
from lightning_adpsgd.rounds.record import Trigger
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction


class FullRound:
    """Completes the handshake, averages bucket by bucket, starts to reduce the measures, and handles optimizer state.

    With ``drop``, diverged workers are left out of the mean; otherwise they are an error.
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
        """How many were completed."""
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
        """Run the round.

        Args:
            trigger: what the round is for.
            period: p, the period in force.
            tensors: the tensors to average.
            also: further tensors to average.
            trained: returns whether there is something to average; called again after averaging.
            drifted: the largest number of steps over which any of them has drifted. If others have drifted less, their
                moments are corrected too little.

        Returns:
            The reduction of the measures, and how many workers were left out.
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
        with naming_lost_workers(self._workers, state):
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
                contributes = contribution.contributes  # otherwise the optimizer starts over
                on_deviations = self._policy.estimate(tensors.tensors, drifted) if contributes else None
                terms = Terms(contribution, as_it_is, on_deviations)
                deviations = [*tensors.averager.average(terms)]
            numbers = self._measures.launch(deviations, contribution)
            if more is not None:
                ParameterAverager(more, 0, self._workers, self._bucket_bytes).average(Terms(contribution))
            self._policy.apply(contribution, trained(), share=self._policy.shares_for(trigger))
        return numbers, len(handshake.diverged_workers)
