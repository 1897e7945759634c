import pickle
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adpsgd import AveragingRound
from lightning_adpsgd.rounds.record import TRIGGERS, Trigger, ring_bytes

quick = settings(deadline=None, max_examples=100)


def test_fields_of_a_round_are_those_of_the_contract_in_its_order():
    assert AveragingRound._fields == (
        "step",
        "optimizer",
        "trigger",
        "local_steps",
        "period",
        "learning_rate",
        "variance",
        "ratio",
        "target",
        "payload_bytes",
        "sent_bytes",
        "seconds",
        "dropped",  # added to the contract; it has a default
    )
    assert AveragingRound._field_defaults == {"dropped": 0}


def test_triggers_are_those_of_the_contract_in_the_order_in_which_they_travel():
    assert TRIGGERS == get_args(Trigger) == ("period", "validation", "checkpoint", "train_end", "pruning")


def test_round_cannot_be_changed_and_survives_pickling():
    round_ = AveragingRound(4, 0, "period", 4, 4, 0.1, 0.5, 5.0, None, 800, 1200, 0.01)
    with pytest.raises(AttributeError, match="can't set attribute"):
        round_.step = 5
    assert pickle.loads(pickle.dumps(round_)) == round_


@pytest.mark.parametrize(
    ("payload", "workers", "sent"),
    [
        (1000, 1, 0),
        (0, 4, 0),
        (1000, 2, 1000),
        (1000, 4, 1500),
        (1000, 5, 1600),
        (1000, 1000, 1998),
        (100, 3, 133),
        (101, 3, 135),
    ],
)
def test_ring_bytes_are_those_computed_by_hand(payload, workers, sent):
    assert ring_bytes(payload, workers) == sent


@quick
@given(st.integers(0, 2**40))
def test_one_worker_sends_nothing_and_each_of_two_sends_the_payload(payload):
    assert ring_bytes(payload, 1) == 0
    assert ring_bytes(payload, 2) == payload


@quick
@given(st.integers(0, 200), st.integers(1, 9))
def test_ring_bytes_are_what_every_rank_sends_around_a_ring(elements_per_part, workers):
    # Reduce-scatter, then all-gather, on parts that are passed on to the right: at the end, all hold every sum.
    parts = [[{rank} for _ in range(workers)] for rank in range(workers)]
    sent = [0] * workers
    for rotation, phase in ((0, "reduce"), (1, "gather")):
        for step in range(workers - 1):
            passed = [(rank, (rank - step + rotation) % workers) for rank in range(workers)]
            values = [parts[rank][part] for rank, part in passed]
            for (rank, part), value in zip(passed, values, strict=True):
                sent[rank] += 4 * elements_per_part
                right = (rank + 1) % workers
                parts[right][part] = value | parts[right][part] if phase == "reduce" else value
    assert all(part == set(range(workers)) for own in parts for part in own)
    assert sent == [ring_bytes(4 * elements_per_part * workers, workers)] * workers


@quick
@given(st.integers(1, 2**40), st.integers(1, 10**6))
def test_ring_bytes_are_a_whole_number_below_twice_the_payload(payload, workers):
    sent = ring_bytes(payload, workers)
    assert isinstance(sent, int)
    assert 0 <= sent <= 2 * payload
    assert abs(sent - 2 * payload * (workers - 1) / workers) <= 0.5
