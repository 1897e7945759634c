import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import interface_bytes
from benchmarks.hosts import HostsUnavailableError, hosts, read_counters
from benchmarks.interface_bytes import Account, complaints

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACES = Path("/run/netns")
MEASURE = [sys.executable, "-m", "benchmarks.interface_bytes"]
PATIENCE_SECONDS = 120

# Lays out hosts, starts a process on one of them, says so, and waits to be told to end.
LAY_OUT = """
import sys, time
from benchmarks.hosts import hosts
with hosts(2) as cluster:
    print(cluster[0].start(["sleep", "600"]).pid, flush=True)
    while True:
        time.sleep(0.1)  # a signal that comes just before a long sleep is heard after it
"""


@pytest.fixture(scope="module")
def namespaces():
    """Skips, and says why, where there can be none."""
    try:
        with hosts(2):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def measured(namespaces, tmp_path_factory):
    """A short measurement: the process that made it, and the numbers it wrote."""
    file = tmp_path_factory.mktemp("interface_bytes") / "measured.json"
    command = [*MEASURE, "--steps", "30", "--json", str(file)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        printed, _ = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 0, printed
    return run, json.loads(file.read_text())


# The measurement


@pytest.mark.network
def test_nothing_is_sent_between_two_averaging_rounds(measured):
    _, numbers = measured
    assert numbers["complaints"] == []
    for account in numbers["runs"]["adpsgd"]:
        assert len(account["between_bytes"]) == account["steps"] == 30
        assert max(account["between_bytes"]) <= numbers["bound_bytes"]


@pytest.mark.network
def test_interface_counts_the_bytes_that_are_reported(measured):
    _, numbers = measured
    accounts = numbers["runs"]["adpsgd"]
    assert [account["rank"] for account in accounts] == [0, 1]
    for account in accounts:
        assert account["rounds"] >= 5
        assert account["counted_bytes"] == sum(account["round_bytes"]) > 20e6
        assert account["ratio"] == pytest.approx(1.0, abs=0.05)
        assert account["ratio_without_headers"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.network
def test_gradients_of_ddp_take_the_bytes_that_the_monitor_claims(measured):
    _, numbers = measured
    for adpsgd, ddp in zip(numbers["runs"]["adpsgd"], numbers["runs"]["ddp"], strict=True):
        assert ddp["steps"] == ddp["rounds"] == adpsgd["steps"]
        assert ddp["counted_bytes"] / adpsgd["ddp_bytes"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.network
def test_measurement_sees_a_single_barrier_between_rounds(measured):
    _, numbers = measured
    for account in numbers["runs"]["control"]:
        assert min(account["between_bytes"]) > numbers["bound_bytes"]


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


def test_no_complaint_if_all_is_as_claimed():
    loud = an_account(between_bytes=[114] * 4)
    runs = {
        "adpsgd": [an_account()],
        "control": [loud],
        "ddp": [loud._replace(round_bytes=[4100], reported_bytes=4000)],
    }
    assert complaints(runs) == []


@pytest.mark.parametrize("between", [[0, 0, 114, 0], [0, 0, 180, 342]])
def test_bytes_between_rounds_are_complained_about_with_the_first_step(between):
    (complaint,) = complaints({"adpsgd": [an_account(between_bytes=between)]})
    assert "the first is step 3" in complaint


@pytest.mark.parametrize("reported", [1900, 2140])
@pytest.mark.parametrize("run", ["adpsgd", "ddp"])
def test_bytes_that_differ_by_more_than_five_per_cent_are_complained_about(run, reported):
    (complaint,) = complaints({run: [an_account(rank=1, reported_bytes=reported)]})
    assert f"rank 1 has sent 2,030 bytes where {reported:,} are reported" in complaint


def test_barrier_that_goes_unseen_is_complained_about():
    (complaint,) = complaints({"control": [an_account(between_bytes=[342, 66, 342, 342])]})
    assert "in each of 4 steps, but only in 3 of them" in complaint


def test_wrong_claim_about_ddp_is_complained_about():
    ddp = an_account(round_bytes=[8000], reported_bytes=8000)
    (complaint,) = complaints({"adpsgd": [an_account()], "ddp": [ddp]})
    assert "2,000 bytes of gradients per step under DDP, but CommunicationMonitor claims 1,000" in complaint


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_that_fails_is_named_and_nobody_waits_for_the_others(tmp_path, failing):
    (tmp_path / f"{failing}.log").write_text("its last words")
    with running("raise SystemExit(3)") as failed, running("import time; time.sleep(600)") as waiting:
        processes = [failed, waiting] if failing == 0 else [waiting, failed]
        with pytest.raises(interface_bytes.RankFailedError, match=rf"(?s)Rank {failing} .*exit code 3.*last words"):
            interface_bytes._wait(processes, tmp_path)
        assert waiting.poll() is None
        waiting.kill()


def running(program):
    return subprocess.Popen([sys.executable, "-c", program])


# The hosts


def left_behind_by(process):
    return [path.name for path in NAMESPACES.glob(f"adpsgd-{process.pid}-*")]


def wait_until(condition, *, seconds=PATIENCE_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_running(pid):
    # A process that has ended but that nobody has waited for is still listed, as a zombie.
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.network
def test_hosts_reach_each_other_and_count_what_they_send(namespaces):
    receive = (
        "import socket; from benchmarks.hosts import read_counters\n"
        "with socket.create_server(('', 5000)) as server:\n"
        "    print('ready', flush=True); connection, _ = server.accept()\n"
        "    while connection.recv(1 << 16): pass\n"
        "print(read_counters().rx_bytes)"
    )
    send = "import socket, sys\nwith socket.create_connection((sys.argv[1], 5000)) as s: s.sendall(bytes(10**6))"
    with hosts(2) as (sender, receiver):
        assert sender.counters() == receiver.counters() == (0, 0, 0, 0)
        receiving = receiver.start([sys.executable, "-c", receive], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert receiving.stdout.readline() == "ready\n"
        sender.start([sys.executable, "-c", send, receiver.address]).wait(timeout=30)
        inside, _ = receiving.communicate(timeout=30)
        assert 1e6 < int(inside) < 1.05e6
        assert 1e6 < receiver.rx_bytes < 1.05e6
        assert 1e6 < sender.tx_bytes < 1.05e6


@pytest.mark.network
def test_rate_is_kept(namespaces):
    receive = (
        "import socket, time\n"
        "with socket.create_server(('', 5000)) as server:\n"
        "    print('ready', flush=True); connection, _ = server.accept()\n"
        "    start, size = time.perf_counter(), 0\n"
        "    while data := connection.recv(1 << 16): size += len(data)\n"
        "print(size * 8e-6 / (time.perf_counter() - start))"
    )
    send = "import socket, sys\nwith socket.create_connection((sys.argv[1], 5000)) as s: s.sendall(bytes(5 * 10**6))"
    with hosts(2, rate_mbit=50) as (sender, receiver):
        receiving = receiver.start([sys.executable, "-c", receive], stdout=subprocess.PIPE, text=True)
        assert receiving.stdout.readline() == "ready\n"
        sender.start([sys.executable, "-c", send, receiver.address])
        mbit_per_second, _ = receiving.communicate(timeout=30)
    assert 10 < float(mbit_per_second) < 55


@pytest.mark.network
def test_no_host_is_left_after_a_measurement(measured):
    run, _ = measured
    assert left_behind_by(run) == []


@contextmanager
def started(command):
    """A process that hears signals even where the tests run in the background, and that does not outlive the test."""

    def hear_signals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.network
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_host_and_no_process_is_left_after_a_signal(namespaces, number):
    with started([sys.executable, "-c", LAY_OUT]) as process:
        on_host = int(process.stdout.readline())
        assert len(left_behind_by(process)) == 3  # the switch too
        process.send_signal(number)
        process.wait(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert left_behind_by(process) == []
    assert not is_running(on_host)


@pytest.mark.network
def test_no_host_is_left_after_ctrl_c_in_the_middle_of_a_measurement(namespaces):
    with started(MEASURE) as process:
        wait_until(lambda: len(left_behind_by(process)) == 3)
        ranks = [name for name in left_behind_by(process) if not name.endswith("switch")]
        wait_until(lambda: all(pids_on(name) for name in ranks))
        pids = [pid for name in ranks for pid in pids_on(name)]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, said
    assert left_behind_by(process) == []
    assert not any(is_running(pid) for pid in pids)


def pids_on(name):
    return list(map(int, subprocess.check_output(["ip", "netns", "pids", name], text=True).split()))


@pytest.mark.network
def test_no_host_is_left_after_an_error(namespaces):
    with pytest.raises(RuntimeError, match="on purpose"), hosts(1):
        raise RuntimeError("on purpose")
    assert not list(NAMESPACES.glob(f"adpsgd-{os.getpid()}-*"))


@pytest.mark.network
def test_two_clusters_stand_side_by_side(namespaces):
    with hosts(1) as (one,), hosts(1) as (other,):
        assert one.name != other.name
        assert one.address == other.address


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"count": 0}, ValueError, "count=0.*expected 1 to 250"),
        ({"count": 251}, ValueError, "count=251.*expected 1 to 250"),
        ({"count": 2.0}, TypeError, "count=2.0.*expected an int, got float"),
        ({"count": True}, TypeError, "count=True.*expected an int, got bool"),
        ({"count": 2, "rate_mbit": 0}, ValueError, "rate_mbit=0.*at least 1 Mbit/s"),
        ({"count": 2, "rate_mbit": float("inf")}, ValueError, "rate_mbit=inf.*at least 1 Mbit/s"),
        ({"count": 2, "rate_mbit": "fast"}, TypeError, "rate_mbit='fast'.*expected a number, got str"),
    ],
)
def test_wrong_argument_is_named_with_what_is_expected(arguments, error, named):
    with pytest.raises(error, match=named), hosts(**arguments):
        pass


def test_error_says_what_is_missing(monkeypatch):
    def attempt(**options):
        with pytest.raises(HostsUnavailableError) as caught, hosts(2, **options):
            pass
        return str(caught.value)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("shutil.which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr("os.geteuid", lambda: 1000, raising=False)
    assert "root" in attempt()
    monkeypatch.setattr("shutil.which", lambda tool: None)
    assert attempt() == "Not found: ip. Install iproute2."
    assert attempt(rate_mbit=100) == "Not found: ip and tc. Install iproute2."
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux only; this is darwin" in attempt()


def test_interface_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nosuch0"):
        read_counters("nosuch0")
