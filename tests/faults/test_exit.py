"""How a script ends: with the right exit code, and after all exit handlers have run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CASES = ["late", "afterwards", "destroyed", "theirs", "caught", "alone", "uncaught", "preempted"]

pytestmark = [
    pytest.mark.workers,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its ranks"),
]


class Ends(NamedTuple):
    """How the two ranks of a case ended."""

    codes: list[int]
    notes: list[list[str]]
    output: str
    folder: Path


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ends]:
    """All cases, run at once: a process that imports Lightning takes longer than most of them."""
    folder = tmp_path_factory.mktemp("exits")
    subprocess.run([sys.executable, "-m", "tests.faults.exits", folder, *CASES], cwd=ROOT, check=True, timeout=160)
    codes = json.loads((folder / "codes.json").read_text())
    return {case: _ends(codes[case], folder / case) for case in CASES}


def _ends(codes: list[int], folder: Path) -> Ends:
    notes = [folder / f"notes.{rank}" for rank in (0, 1)]
    output = "".join((folder / f"output.{rank}").read_text(errors="replace") for rank in (0, 1))
    return Ends(codes, [file.read_text().splitlines() if file.exists() else [] for file in notes], output, folder)


def test_no_native_thread_aborts_the_exit_of_a_successful_script(ends):
    assert ends["late"].codes == [0, 0], ends["late"].output
    assert ends["late"].notes == [["group False"]] * 2


def test_the_script_can_communicate_after_a_fit_and_at_its_exit(ends):
    assert ends["afterwards"].codes == [0, 0], ends["afterwards"].output
    assert ends["afterwards"].notes == [["sum 2", "sum 2", "group False"]] * 2


def test_a_process_group_that_the_script_has_destroyed_is_not_closed_again(ends):
    assert ends["destroyed"].codes == [0, 0], ends["destroyed"].output
    assert ends["destroyed"].notes == [["group False"]] * 2
    assert "Traceback" not in ends["destroyed"].output, ends["destroyed"].output


def test_a_process_group_that_the_script_has_made_is_left_to_it(ends):
    assert ends["theirs"].codes == [0, 0], ends["theirs"].output
    assert ends["theirs"].notes == [["sum 2", "group True"]] * 2


def test_a_caught_error_cuts_off_no_exit_handler(ends):
    assert ends["caught"].codes == [0, 0], ends["caught"].output
    assert all({"caught", "uploaded"} <= {*notes} for notes in ends["caught"].notes)
    assert (ends["caught"].folder / "notes.child").read_text() == "uploaded\n"


def test_an_error_on_one_device_cuts_off_no_exit_handler(ends):
    assert ends["alone"].codes == [1, 0], ends["alone"].output
    assert "uploaded" in ends["alone"].notes[0]


def test_an_uncaught_error_lets_exit_handlers_finish_and_then_ends_a_process_that_is_stuck(ends):
    assert ends["uncaught"].codes == [-signal.SIGALRM, 1], ends["uncaught"].output
    assert "uploaded" in ends["uncaught"].notes[0]
    assert "Rank 0 had failed at step 3" in ends["uncaught"].output


def test_sigterm_ends_all_ranks_with_the_exit_code_of_lightnings_own_exception(ends):
    assert ends["preempted"].codes == [143, 143], ends["preempted"].output
