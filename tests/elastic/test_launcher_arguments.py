"""The arguments of ``adpsgd elastic`` and ``adpsgd lighthouse``, and what they need."""

import sys
from pathlib import Path

import pytest

from lightning_adpsgd.cli import main
from tests.elastic.launching import NO_LIGHTHOUSE
from tests.hidden import run as run_hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft has wheels for Linux")


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
