"""What a quorum does in its round, decided by each worker alone from what all members have stated. No tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_adpsgd.rounds.record import Trigger

LARGEST_LAG = 1
"""A worker that has missed more rounds than this one receives the others' weights, in place of contributing its own."""


class MemberState(NamedTuple):
    """What a worker states when it asks for a quorum, as values that JSON holds exactly."""

    committed: int
    """Rounds that this worker has committed, or received; 0: it has not joined yet."""
    staged: int
    """The number of the round whose means it holds without knowing whether others have committed it; 0: none."""
    steps: int
    """Optimizer steps attempted."""
    local_steps: int
    """Optimizer steps since its latest round."""
    trigger: Trigger
    fingerprint: int
    """A hash of the tensors that it averages."""
    tensors: int
    """How many these are."""
    finite: bool
    """Whether its parameters are finite."""
    connection: str
    """The name of the connection that it holds; empty if it holds none."""
    writer: str
    """The name of the worker that writes for all, as far as it knows; empty if it does not."""
    period: int
    rule: dict[str, Any]
    """The state of its averaging rule."""


class Member(NamedTuple):
    """A member of a quorum."""

    name: str
    store_address: str
    state: MemberState


class Plan(NamedTuple):
    """What the members of a quorum do together, and this worker's part in it."""

    members: tuple[Member, ...]
    """Those that take part, by rank. The others hold different tensors, or values that are not finite."""
    rank: int | None
    """This worker's rank; None if it does not take part."""
    leader: int
    """The rank of the worker whose rule and counters all continue from."""
    contributors: tuple[int, ...]
    """The ranks whose values are averaged; none of them if all members start from the leader's values."""
    receivers: tuple[int, ...]
    """The ranks to which the leader sends its weights, optimizer state and counters."""
    round: int
    """The number of this round."""
    commits_staged: bool
    """Whether this worker first commits the round that it has staged, because others have committed it."""
    steps: int
    trigger: Trigger
    is_comparable: bool
    """Whether the rule may see this round: all contributors have taken as many local steps as the period asks for."""
    keeps_connection: bool
    """Whether all members hold the same connection already."""

    @property
    def of_leader(self) -> MemberState:
        """What the leader has stated."""
        return self.members[self.leader].state

    @property
    def writer(self) -> str:
        """The name of the member that writes for all: the one that did so before, or else the leader."""
        before = self.of_leader.writer
        return before if before in [each.name for each in self.members] else self.members[self.leader].name


def plan_of(quorum: Sequence[Member], me: str) -> Plan:
    """Decide what ``quorum`` does. All its members come to the same plan, except for ``rank`` and ``commits_staged``.

    Args:
        quorum: its members, in the same order on all of them.
        me: the name of this worker, which is one of them.
    """
    reference = max(quorum, key=lambda member: (member.state.finite, member.state.committed)).state
    members = tuple(each for each in quorum if each.state.finite and each.state.fingerprint == reference.fingerprint)
    states = [each.state for each in members]
    names = [each.name for each in members]
    if me not in names:
        return Plan(members, None, 0, (), (), 0, False, 0, "period", False, False)
    rank = names.index(me)
    leader = max(range(len(states)), key=lambda place: states[place].committed)
    committed = states[leader].committed
    resolved = [_resolved(state, committed) for state in states]
    contributors = tuple(
        place for place, done in enumerate(resolved) if done > 0 and committed - done <= LARGEST_LAG and committed > 0
    )
    receivers = tuple(place for place in range(len(states)) if place not in contributors and place != leader)
    sources = [states[place] for place in contributors or (leader,)]
    triggers = [state.trigger for state in sources if state.trigger != "period"]
    drifted = {state.local_steps for state in sources}
    connections = {state.connection for state in states}
    return Plan(
        members,
        rank,
        leader,
        contributors,
        receivers,
        round=committed + 1,
        commits_staged=resolved[rank] > states[rank].committed,
        steps=max(state.steps for state in sources),
        trigger=triggers[0] if triggers else "period",
        is_comparable=len(contributors) > 1 and not triggers and drifted == {states[leader].period},
        keeps_connection=len(connections) == 1 and connections == {connection_of(names, connections)},
    )


def _resolved(state: MemberState, committed: int) -> int:
    """The rounds that a worker has committed once it has settled what it has staged."""
    in_doubt = 0 < state.committed == state.staged - 1
    return state.staged if in_doubt and state.staged == committed else state.committed


def connection_of(names: Sequence[str], connections: set[str]) -> str | None:
    """The connection among ``connections`` that joins exactly the workers ``names``; None if there is none."""
    joined = " ".join(names)
    return next((each for each in connections if each.partition(" ")[2] == joined), None)
