"""Workers that ``adpsgd elastic`` starts, and how they and it end; the scripts import nothing large."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.elastic.launching import COMMAND, COUNTED, NO_LIGHTHOUSE, finish, is_alive, read, run, start, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux")


# What workers get


def test_each_worker_gets_its_number_and_nothing_of_another_launcher(folder, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "another's")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another's")
    monkeypatch.setenv("REPLICA_GROUP_ID", "another's")
    monkeypatch.setenv("MY_OWN", "mine")
    script = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    code, out, _ = run(script, *NO_LIGHTHOUSE, workers=3, arguments=["--lr", "1", "--workers", "9", "-h"])
    assert code == 0
    told = {line.partition("] ")[0]: json.loads(line.partition("] ")[2]) for line in out.splitlines()}
    assert sorted(told) == ["[worker 0", "[worker 1", "[worker 2"]
    for worker in range(3):
        arguments, environment = told[f"[worker {worker}"]
        assert arguments == ["--lr", "1", "--workers", "9", "-h"]
        assert environment["REPLICA_GROUP_ID"] == str(worker)
        assert environment["NUM_REPLICA_GROUPS"] == "3"
        assert environment["TORCHFT_LIGHTHOUSE"] == "http://127.0.0.1:1"
        assert environment["MY_OWN"] == "mine"
        assert [name for name, value in environment.items() if value == "another's"] == []


def test_a_module_is_run_by_its_name(folder):
    (folder / "package").mkdir()
    (folder / "package" / "train.py").write_text("import sys; print(__package__, sys.argv[1:])")
    command = [*COMMAND, "elastic", "--workers", "1", *NO_LIGHTHOUSE, "-m", "package.train", "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[worker 0] package ['--lr', '1']\n"


# Workers that die


@pytest.mark.parametrize(
    ("death", "told"),
    [("sys.exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL")],
)
def test_a_worker_that_dies_is_started_again(folder, death, told):
    script = f"""
if worker == "0":
    while not os.path.exists("starts.1") or len(open("starts.1").readlines()) < 3: pass
elif starts < 3:
    {death}
"""
    code, _, err = run(COUNTED + script, *NO_LIGHTHOUSE)
    assert code == 0
    assert f"worker 1 has ended: {told}. It is started again in 0 s (restart 2 of 3)." in err
    assert "  worker 0: 0 restarts, exit code 0\n  worker 1: 2 restarts, exit code 0\n" in err


def test_a_worker_that_dies_again_and_again_is_given_up_on_and_the_others_go_on(folder):
    script = """
if worker == "0":
    while not os.path.exists("starts.1") or len(open("starts.1").readlines()) < 3: pass
    while os.path.exists(f"/proc/{open('starts.1').readlines()[2].strip()}"): pass  # until the launcher knows its end
    print("done")
else:
    sys.exit("no data")
"""
    code, out, err = run(COUNTED + script, *NO_LIGHTHOUSE, "--max-restarts", "2")
    assert code == 1
    assert out == "[worker 0] done\n"
    assert len(read("starts.1").split()) == 3
    assert "worker 1 has ended: exit code 1. It is not started again: --max-restarts is 2." in err
    assert "1 of 2 workers have failed.\n" in err
    assert "  worker 1: 2 restarts, exit code 1 (no data)\n" in err


def test_a_worker_that_dies_after_all_others_have_ended_well_is_not_started_again(folder):
    script = """
if worker == "1":
    while not os.path.exists("starts.0") or os.path.exists(f"/proc/{open('starts.0').read().strip()}"): pass
    sys.exit(3)
"""
    code, _, err = run(COUNTED + script, *NO_LIGHTHOUSE)
    assert code == 1
    assert "It is not started again: all others have ended with exit code 0, so it would be alone." in err
    assert len(read("starts.1").split()) == 1


def test_a_script_that_cannot_run_ends_with_its_own_error(folder):
    code, _, err = run("def broken(:", *NO_LIGHTHOUSE)
    assert code == 1
    assert err.count("[worker 0] SyntaxError") == 4
    assert "2 of 2 workers have failed.\n" in err
    assert err.rpartition("workers have failed.")[2].count("3 restarts, exit code 1 (SyntaxError: ") == 2


def test_what_a_worker_has_started_ends_with_it(folder):
    script = "import subprocess; open('pid', 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    code, _, _ = run(script, *NO_LIGHTHOUSE, workers=1)
    assert code == 0
    wait_for(lambda: not is_alive(read("pid")))


# The end of the launcher

WAITS = """
import signal, subprocess, time

def note(number, frame):
    with open(f"signals.{worker}", "a") as file:
        file.write(f"{number}\\n")
    if "--stubborn" not in sys.argv:
        time.sleep(0.5)
        print("cleaned up")
        sys.exit(5)

signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
if "--stubborn" in sys.argv:
    sleeper = subprocess.Popen(["sleep", "600"])
    open(f"starts.{worker}", "a").write(f"{sleeper.pid}\\n")
open(f"ready.{worker}", "w").close()
while True:
    time.sleep(0.05)
"""


def start_waiting(*options, arguments=()):
    process = start(COUNTED + WAITS, *NO_LIGHTHOUSE, *options, arguments=arguments)
    wait_for(lambda: Path("ready.0").exists() and Path("ready.1").exists())
    return process, [*read("starts.0").split(), *read("starts.1").split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_ends_the_run(folder, number):
    process, pids = start_waiting("--grace", "60")
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert [read("signals.0"), read("signals.1")] == [f"{int(number)}\n"] * 2
    assert sorted(out.splitlines()) == ["[worker 0] cleaned up", "[worker 1] cleaned up"]
    assert "  worker 1: 0 restarts, exit code 5" in err
    assert [pid for pid in pids if is_alive(pid)] == []


def test_workers_that_do_not_end_are_killed_with_what_they_have_started(folder):
    process, pids = start_waiting("--grace", "0.5", arguments=["--stubborn"])
    assert len(pids) == 4
    process.terminate()
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM
    assert [read("signals.0"), read("signals.1")] == ["15\n"] * 2
    assert "  worker 1: 0 restarts, killed by SIGKILL" in err
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_a_second_signal_kills_at_once(folder):
    process, pids = start_waiting("--grace", "86400", arguments=["--stubborn"])
    process.send_signal(signal.SIGINT)
    wait_for(lambda: read("signals.0") and read("signals.1"))
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 128 + signal.SIGINT
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_a_worker_that_waits_for_its_restart_is_not_started_after_a_signal(folder):
    process = start(COUNTED + "sys.exit(1)", *NO_LIGHTHOUSE, "--restart-delay", "86400", workers=1)
    wait_for(lambda: "It is started again in 86400 s" in read("err"))
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert len(read("starts.0").split()) == 1


def test_no_worker_outlives_a_launcher_that_is_killed(folder):
    process, pids = start_waiting()
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids))
