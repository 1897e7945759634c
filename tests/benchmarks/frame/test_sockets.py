import os
import socket
import sys
from pathlib import Path

import pytest

from benchmarks.frame.hosts import hosts
from benchmarks.frame.ranks import this_machine
from benchmarks.frame.sockets import listening_sockets, ports_held

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux shows sockets in /proc; this is not.")


def test_socket_is_found_while_something_listens_on_it_even_if_its_process_is_another_one():
    before = listening_sockets(os.getpid())
    with this_machine() as (machine,):
        with socket.create_server(("127.0.0.1", 0)) as server:
            mine = listening_sockets(os.getpid()) - before
            assert len(mine) == 1
            assert ports_held(machine, mine) == [server.getsockname()[1]]
            assert ports_held(machine, set()) == []
            inherited = os.dup(server.fileno())
        assert len(ports_held(machine, mine)) == 1  # somebody else still has it open
        os.close(inherited)
        assert ports_held(machine, mine) == []


def test_connections_and_processes_that_have_ended_hold_no_port():
    before = listening_sockets(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert len(listening_sockets(os.getpid()) - before) == 1
    assert listening_sockets(2**22 + 1) == set()  # above the largest number that Linux gives


@pytest.mark.network
def test_sockets_of_a_host_are_seen_on_that_host_only(namespaces):
    serve = "import socket; s = socket.create_server(('', 5000)); print(flush=True); input()"
    with hosts(2) as (first, second):
        process = first.start([sys.executable, "-c", serve], stdin=-1, stdout=-1)
        process.stdout.readline()
        sockets = listening_sockets(process.pid)
        assert ports_held(first, sockets) == [5000]
        assert ports_held(second, sockets) == []
