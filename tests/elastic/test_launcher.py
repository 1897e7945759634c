"""``adpsgd elastic`` and ``adpsgd lighthouse``, as a user calls them; most scripts here import nothing large."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lightning_adpsgd.cli import main
from lightning_adpsgd.commands.output import Output, Pieces
from tests.hidden import run as run_hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux")
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lightning_adpsgd"]
NO_LIGHTHOUSE = ["--lighthouse", "http://127.0.0.1:1", "--restart-delay", "0"]
STARTED: list[subprocess.Popen] = []
COUNTED = """
import os, sys
from pathlib import Path

worker = os.environ["REPLICA_GROUP_ID"]
with open(f"starts.{worker}", "a") as file:
    file.write(f"{os.getpid()}\\n")
starts = len(Path(f"starts.{worker}").read_text().split())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's working directory. What a test has started there ends with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate(timeout=60)
    for pid in [pid for file in tmp_path.glob("starts.*") for pid in file.read_text().split()]:
        if is_alive(pid):  # after a failure
            os.kill(int(pid), signal.SIGKILL)


def start(script, *options, workers=2, arguments=(), command="elastic"):
    """The command, running. Its output goes to files, which a test may read meanwhile."""
    if command == "elastic":
        Path("script.py").write_text(textwrap.dedent(script))
        options = ["--workers", str(workers), *options, "script.py", *arguments]
    with open("out", "w") as out, open("err", "w") as err:
        process = subprocess.Popen([*COMMAND, command, *options], stdout=out, stderr=err)
    STARTED.append(process)
    return process


def finish(process, seconds=180):
    """The command's exit code, stdout and stderr."""
    code = process.wait(timeout=seconds)
    return code, Path("out").read_text(), Path("err").read_text()


def run(script, *options, **more):
    return finish(start(script, *options, **more))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, Path("err").read_text()
        time.sleep(0.02)
    return found


def read(name):
    return Path(name).read_text() if Path(name).exists() else ""


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listens(address):
    host, _, port = address.rpartition("//")[2].rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


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


# What workers print


def test_every_line_is_passed_on_with_its_worker_also_the_last_words(folder):
    script = """
        import os, sys
        for line in range(5000):
            print(f"line {line} é")
        print("unfinished", end="")
        print("on stderr", file=sys.stderr)
        sys.stdout.flush()
        os._exit(0)
    """
    code, out, err = run(script, *NO_LIGHTHOUSE)
    assert code == 0
    for worker in ("[worker 0] ", "[worker 1] "):
        lines = [line.removeprefix(worker) for line in out.splitlines() if line.startswith(worker)]
        assert lines == [*(f"line {line} é" for line in range(5000)), "unfinished"]
        assert f"{worker}on stderr\n" in err
    assert len(out.splitlines()) == 2 * 5001


def printed(*writes):
    """What is printed after several writes, each a worker's name and bytes."""
    stream = io.TextIOWrapper(io.BytesIO())
    output = Output(stream)
    pieces = {name: Pieces(name, output) for name, _ in writes}
    for name, data in writes:
        pieces[name].feed(data)
    for each in pieces.values():
        each.close()
    return stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ([("a", b"one\ntw"), ("b", b"x\n"), ("a", b"o\n")], b"[a] one\n[b] x\n[a] two\n"),
        ([("a", b"dos\r"), ("a", b"\nnext\r\n")], b"[a] dos\n[a] next\n"),
        ([("a", b"\r 1%"), ("a", b"\r 2%"), ("a", b"\r 3%\n")], b"[a]  1%\r[a]  2%\r[a]  3%\n"),
        ([("a", b"\r1%\r2%"), ("b", b"\r1%\r2%"), ("b", b"\nx\n")], b"[a] 1%\r[b] 1%\r[b] 2%\n[b] x\n[a] 2%\n"),
        ([("a", b"1%\r2%\r"), ("b", b"line\n")], b"[a] 1%\r\n[b] line\n[a] 2%\n"),
        ([("a", b"\n\nend")], b"[a] \n[a] \n[a] end\n"),
    ],
    ids=["lines", "carriage return and line feed", "bar", "two bars", "a line after a bar", "blank"],
)
def test_lines_stay_whole_and_bars_are_drawn_in_place(writes, expected):
    assert printed(*writes) == expected


def test_what_nobody_reads_ends_the_run(folder):
    Path("script.py").write_text(COUNTED + "\nwhile True: print('line')")
    command = [*COMMAND, "elastic", "--workers", "2", *NO_LIGHTHOUSE, "script.py"]
    with open("err", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err)
    STARTED.append(process)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert [pid for pid in (read("starts.0") + read("starts.1")).split() if is_alive(pid)] == []
    assert "Traceback" not in read("err")


# Workers that die


@pytest.mark.parametrize(
    ("death", "told"),
    [("sys.exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL")],
)
def test_a_worker_that_dies_is_started_again(folder, death, told):
    code, _, err = run(COUNTED + f"if worker == '1' and starts < 3: {death}", *NO_LIGHTHOUSE)
    assert code == 0
    assert f"worker 1 has ended: {told}. It is started again in 0 s (restart 2 of 3)." in err
    assert "  worker 0: 0 restarts, exit code 0\n  worker 1: 2 restarts, exit code 0\n" in err


def test_a_worker_that_dies_again_and_again_is_given_up_on_and_the_others_go_on(folder):
    script = """
if worker == "0":
    while not os.path.exists("starts.1") or len(open("starts.1").readlines()) < 3: pass
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


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["elastic", "script.py"], "arguments are required: --workers"),
        (["elastic", "--workers", "0", "script.py"], "--workers: '0' was given: expected a whole number from 1"),
        (["elastic", "--workers", "2"], "arguments are required: script"),
        (["elastic", "--workers", "2", "missing.py"], "script 'missing.py': there is no such file; expected"),
        (["elastic", "--workers", "2", "--max-restarts", "-1", "script.py"], "--max-restarts: '-1' was given"),
        (["elastic", "--workers", "2", "--restart-delay", "nan", "script.py"], "'nan' was given: expected seconds"),
        (["elastic", "--workers", "2", "--min-workers", "3", "script.py"], "--min-workers 3 with --workers 2: exp"),
        (["elastic", "--workers", "2", "--lighthouse", "host", "script.py"], "'host': expected an address such as"),
        (["elastic", "--workers", "2", "--lighthouse", "h:0x", "script.py"], "'h:0x': expected an address such as"),
        (
            ["elastic", "--workers", "2", "--lighthouse", "h:1", "--join-timeout", "9", "script.py"],
            "--join-timeout with --lighthouse: expected one of them",
        ),
        (["lighthouse", "--port", "65536"], "--port: '65536' was given: expected a whole number from 0 to 65535"),
        (["lighthouse", "--min-workers", "0"], "--min-workers: '0' was given"),
        (["lighthouse", "--heartbeat-timeout", "0.1"], "expected seconds, from 0.2 to a year"),
        (["lighthouse", "--tick", "0"], "--tick: '0' was given"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_with_what_is_expected(folder, capsys, arguments, message):
    Path("script.py").touch()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_launcher_needs_neither_torch_nor_lightning(folder):
    Path("script.py").write_text("print('fine')")
    script = f"""
from lightning_adpsgd.cli import main
try:
    main(["elastic", "--workers", "1", *{NO_LIGHTHOUSE}, "script.py"])
except SystemExit as exit_:
    print(exit_.code)
"""
    assert run_hidden(script, "torch", "lightning", "pytorch_lightning") == "[worker 0] fine\n0"


@pytest.mark.parametrize("arguments", [["lighthouse"], ["elastic", "--workers", "1", "script.py"]])
def test_a_missing_torchft_is_named_with_what_to_install(folder, arguments):
    Path("script.py").touch()
    script = f"""
import sys
from lightning_adpsgd.cli import main
sys.stderr = sys.stdout
try:
    main({arguments})
except SystemExit as exit_:
    print(exit_.code)
"""
    told = run_hidden(script, "torchft")
    assert "error: torchft is needed" in told
    assert "pip install 'lightning-adpsgd[elastic]'" in told
    assert told.endswith("\n2")


# With torchft


@pytest.fixture
def torchft():
    pytest.importorskip("torchft", reason="torchft is not installed: pip install 'lightning-adpsgd[elastic]'")


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


def children_of(process):
    return read(f"/proc/{process.pid}/task/{process.pid}/children").split()


def blocks(pid, number):
    return int(read(f"/proc/{pid}/status").partition("SigBlk:")[2].split()[0], 16) >> (number - 1) & 1


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
