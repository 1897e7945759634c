import os
import pickle
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.frame.errors import HostsUnavailableError
from benchmarks.frame.hosts import Interface, hosts
from benchmarks.frame.ranks import this_machine
from tests.benchmarks.helpers import PATIENCE_SECONDS, REPOSITORY, left_behind_by

# Lays out hosts, starts a process on one of them, says so, and waits to be told to end.
LAY_OUT = """
import sys, time
from benchmarks.frame.hosts import hosts
with hosts(2) as cluster:
    print(cluster[0].start(["sleep", "600"]).pid, flush=True)
    while True:
        time.sleep(0.1)  # a signal that arrives just before a sleep is handled after it
"""

ANSWER = """
import socket
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    while True:
        server.accept()[0].close()
"""
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=2)"


def is_running(pid):
    # A process that has ended but was not waited for is still listed, as a zombie.
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.network
def test_hosts_reach_each_other_and_count_what_they_send(namespaces):
    receive = (
        "import socket; from benchmarks.frame.hosts import Interface\n"
        "with socket.create_server(('', 5000)) as server:\n"
        "    print('ready', flush=True); connection, _ = server.accept()\n"
        "    while connection.recv(1 << 16): pass\n"
        "print(Interface().counters().rx_bytes)"
    )
    send = "import socket, sys\nwith socket.create_connection((sys.argv[1], 5000)) as s: s.sendall(bytes(10**6))"
    with hosts(2) as (sender, receiver):
        assert sender.counters() == receiver.counters() == (0, 0, 0, 0)
        receiving = receiver.start([sys.executable, "-c", receive], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert receiving.stdout.readline() == "ready\n"
        sender.start([sys.executable, "-c", send, receiver.address]).wait(timeout=30)
        inside, _ = receiving.communicate(timeout=30)
        assert 1e6 < int(inside) < 1.05e6
        assert 1e6 < receiver.counters().rx_bytes < 1.05e6
        assert 1e6 < sender.counters().tx_bytes < 1.05e6


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
def test_host_that_is_cut_off_reaches_the_others_again_when_its_cable_is_back(namespaces):
    with hosts(3) as (first, second, third):

        def reaches(a, b):
            command = [sys.executable, "-c", KNOCK, b.address]
            return a.start(command).wait(timeout=30) == 0

        for host in (second, third):
            host.start([sys.executable, "-c", ANSWER], stdout=subprocess.PIPE).stdout.readline()
        assert reaches(first, second)
        second.unplug()
        assert not reaches(first, second)
        assert reaches(first, third)
        second.plug_in()
        assert reaches(first, second)


@pytest.mark.network
def test_process_that_enters_a_host_has_the_address_of_that_host(namespaces):
    enter = (
        "import pickle, socket, sys; pickle.loads(bytes.fromhex(sys.argv[1])).enter();"
        "socket.create_server((sys.argv[2], 5000))"
    )
    with hosts(2) as (first, second):
        for address, code in ((first.address, 0), (second.address, 1)):
            command = [sys.executable, "-c", enter, pickle.dumps(first).hex(), address]
            ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
            assert ended.returncode == code, ended.stderr


def test_this_machine_cannot_be_cut_off():
    with this_machine() as (machine,):
        machine.enter()
        with pytest.raises(HostsUnavailableError, match="cannot be cut off"):
            machine.unplug()


@contextmanager
def started(command):
    """A process that handles signals even if the tests run in the background, and that does not outlive the test."""

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
        assert len(left_behind_by(process.pid)) == 3  # the switch too
        process.send_signal(number)
        process.wait(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert left_behind_by(process.pid) == []
    assert not is_running(on_host)


@pytest.mark.network
def test_no_host_is_left_after_an_error(namespaces):
    with pytest.raises(RuntimeError, match="on purpose"), hosts(1):
        raise RuntimeError("on purpose")
    assert left_behind_by(os.getpid()) == []


@pytest.mark.network
def test_two_clusters_stand_side_by_side(namespaces):
    with hosts(1) as (one,), hosts(1) as (other,):
        assert one.name != other.name
        assert one.address == other.address


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
        Interface("nosuch0")
