import pytest

from benchmarks import interface_bytes
from benchmarks.interface_bytes import Account, complaints
from tests.benchmarks.helpers import measured

# The measurement


@pytest.fixture(scope="module")
def numbers(namespaces, tmp_path_factory):
    """Those of a short measurement."""
    file = tmp_path_factory.mktemp("interface_bytes") / "measured.json"
    printed, numbers = measured(interface_bytes.main, file, "--steps", "30")
    assert "All as claimed." in printed
    return numbers


@pytest.mark.network
def test_nothing_is_sent_between_two_averaging_rounds(numbers):
    assert numbers["complaints"] == []
    for account in numbers["runs"]["adpsgd"]:
        assert len(account["between_bytes"]) == account["steps"] == 30
        assert max(account["between_bytes"]) <= numbers["bound_bytes"]


@pytest.mark.network
def test_interface_counts_the_bytes_that_are_reported(numbers):
    accounts = numbers["runs"]["adpsgd"]
    assert [account["rank"] for account in accounts] == [0, 1]
    for account in accounts:
        assert account["rounds"] >= 5
        assert account["counted_bytes"] == sum(account["round_bytes"]) > 20e6
        assert account["ratio"] == pytest.approx(1.0, abs=0.05)
        assert account["ratio_without_headers"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.network
def test_gradients_of_ddp_take_the_bytes_that_the_monitor_claims(numbers):
    for adpsgd, ddp in zip(numbers["runs"]["adpsgd"], numbers["runs"]["ddp"], strict=True):
        assert ddp["steps"] == ddp["rounds"] == adpsgd["steps"]
        assert ddp["counted_bytes"] / adpsgd["ddp_bytes"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.network
def test_measurement_sees_a_single_barrier_between_rounds(numbers):
    for account in numbers["runs"]["control"]:
        assert min(account["between_bytes"]) > numbers["bound_bytes"]


@pytest.mark.network
def test_quantized_gradients_take_the_bytes_that_they_report(numbers):
    for account in numbers["runs"]["qsgd"]:
        assert account["rounds"] == account["steps"] == 30
        assert account["ratio_without_headers"] == pytest.approx(1.0, abs=0.05)


# What it says when something is wrong


def an_account(**changes):
    account = Account(
        rank=0,
        steps=4,
        rounds=2,
        between_bytes=[0, 66, 0, 0],
        round_bytes=[1010, 1020],
        packets=3,
        retransmitted=0,
        reported_bytes=2000,
        ddp_bytes=4000,
    )
    return account._replace(**changes)


def test_nothing_is_reported_if_all_is_as_claimed():
    loud = an_account(between_bytes=[114] * 4)
    runs = {
        "adpsgd": [an_account()],
        "control": [loud],
        "ddp": [loud._replace(round_bytes=[4100], reported_bytes=4000)],
    }
    assert complaints(runs) == []


@pytest.mark.parametrize("between", [[0, 0, 114, 0], [0, 0, 180, 342]])
def test_bytes_between_rounds_are_reported_with_the_first_step(between):
    (complaint,) = complaints({"adpsgd": [an_account(between_bytes=between)]})
    assert "the first is step 3" in complaint


@pytest.mark.parametrize("reported", [1900, 2140])
@pytest.mark.parametrize("run", ["adpsgd", "ddp"])
def test_bytes_that_differ_by_more_than_five_per_cent_are_reported(run, reported):
    (complaint,) = complaints({run: [an_account(rank=1, reported_bytes=reported)]})
    assert f"rank 1 has sent 2,030 bytes where {reported:,} are reported" in complaint


def test_barrier_that_goes_undetected_is_reported():
    (complaint,) = complaints({"control": [an_account(between_bytes=[342, 66, 342, 342])]})
    assert "in each of 4 steps, but only in 3 of them" in complaint


def test_wrong_claim_about_ddp_is_reported():
    ddp = an_account(round_bytes=[8000], reported_bytes=8000)
    (complaint,) = complaints({"adpsgd": [an_account()], "ddp": [ddp]})
    assert "2,000 bytes of gradients per step under DDP, but CommunicationMonitor claims 1,000" in complaint


QUANTIZED = an_account(round_bytes=[1000, 1120], packets=2)


def test_bytes_of_quantized_gradients_are_judged_without_headers():
    assert complaints({"qsgd": [QUANTIZED]}) == []
    for wrong in (1880, 2100):
        (complaint,) = complaints({"qsgd": [QUANTIZED._replace(reported_bytes=wrong)]})
        assert f"qsgd: rank 0 has sent 2,120 bytes where {wrong:,} are reported" in complaint
