"""What workers print, as ``adpsgd elastic`` passes it on."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_adpsgd.commands.output import Output, Pieces
from tests.elastic.launching import COMMAND, COUNTED, NO_LIGHTHOUSE, STARTED, is_alive, read, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux")


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
