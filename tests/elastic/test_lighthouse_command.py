"""``adpsgd lighthouse``, alone and as ``adpsgd elastic`` starts it, and one training with ``ElasticLocalSGD``."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from lightning_adpsgd.cli import main
from tests.elastic.launching import COUNTED, blocks, children_of, finish, is_alive, listens, read, run, start, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_lighthouse_tells_its_address_serves_and_ends(torchft, folder, number):
    process = start("", "--port", "0", "--host", "127.0.0.1", command="lighthouse")
    wait_for(lambda: "\n" in read("out") or process.poll() is not None)
    name, _, address = read("out").strip().partition("=")
    assert name == "TORCHFT_LIGHTHOUSE"
    assert listens(address)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 0
    assert "Traceback" not in err
    assert not listens(address)


def test_a_port_in_use_is_an_error_that_names_it(torchft, folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as exit_:
            main(["lighthouse", "--host", "127.0.0.1", "--port", str(port)])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port}: the lighthouse cannot listen there (Address already in use" in told
    assert "choose another --port" in told


def test_a_signal_while_the_lighthouse_starts_ends_the_run_without_workers(torchft, folder):
    process = start(COUNTED, "--grace", "86400")
    lighthouse, *_ = wait_for(lambda: children_of(process))
    wait_for(lambda: blocks(lighthouse, signal.SIGTERM))  # it imports torch, and then tells its address
    process.terminate()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM
    assert "no worker was started" in err or Path("starts.0").exists()  # where this process was slow
    assert not is_alive(lighthouse)


@pytest.mark.workers
def test_a_lighthouse_that_dies_is_started_again_at_its_address(torchft, folder):
    script = COUNTED + "import time\nwhile not os.path.exists('go'): time.sleep(0.05)"
    process = start(script, "--restart-delay", "0")
    wait_for(lambda: read("starts.0") and read("starts.1"))
    (lighthouse,) = set(children_of(process)) - {read("starts.0").strip(), read("starts.1").strip()}
    os.kill(int(lighthouse), signal.SIGKILL)
    wait_for(lambda: read("out").count("TORCHFT_LIGHTHOUSE=") == 2)
    Path("go").touch()
    code, out, err = finish(process)
    assert code == 0
    first, second = out.splitlines()
    assert first == second
    assert "lighthouse has ended: killed by SIGKILL. It is started again" in err
    assert not listens(first.partition("=")[2])


TRAINS = """
import time, torch
from tests.elastic import member

model, optimizer, local_sgd = member.make(int(worker), 4, start_workers=2)
local_sgd.broadcast()
taken, last = 0, None
if worker == "1" and starts == 2:
    last = local_sgd.steps + 8
    Path("last.tmp").write_text(str(last))
    os.rename("last.tmp", "last")  # before its first round, in which worker 0 waits for it
while last is None or local_sgd.steps < last:
    if os.path.exists("last"):
        last = int(Path("last").read_text())
    if worker == "1" and starts == 1 and taken == 6:
        os.kill(os.getpid(), 9)
    member.train_step(model, optimizer, int(worker), taken)
    local_sgd.step()
    taken += 1
    time.sleep(0.02)
local_sgd.average()
print("steps", local_sgd.steps, "weights", float(sum(p.double().sum() for p in model.parameters())))
local_sgd.close()
"""


@pytest.mark.workers
def test_a_worker_of_elastic_local_sgd_that_is_killed_joins_again(torchft, folder):
    code, out, err = run(COUNTED + TRAINS)
    assert code == 0, err
    assert "  worker 0: 0 restarts, exit code 0\n  worker 1: 1 restarts, exit code 0\n" in err
    told = dict(line.split("] ") for line in out.splitlines() if "weights" in line)
    assert sorted(told) == ["[worker 0", "[worker 1"]
    assert told["[worker 0"] == told["[worker 1"]
    address = out.partition("TORCHFT_LIGHTHOUSE=")[2].splitlines()[0]
    assert not listens(address)
