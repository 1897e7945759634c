import subprocess
import sys

import pytest

from benchmarks.frame.errors import RankFailedError
from benchmarks.frame.ranks import Ranks
from tests.benchmarks.helpers import REPOSITORY


def started(*programs, folder):
    logs = [folder / f"{rank}.log" for rank in range(len(programs))]
    processes = []
    for program, log in zip(programs, logs, strict=True):
        with open(log, "wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"import sys\nfrom benchmarks.frame.rank import serve\n{program}"],
                    cwd=REPOSITORY,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            )
    return processes, Ranks(processes, logs)


def end(processes):
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()


MEET_AND_COUNT = """
def carry_out(order, parent):
    print("not an answer")
    parent.meet()
    parent.meet()
    return order["by"] + RANK
serve(carry_out)
"""


def test_ranks_carry_out_orders_one_after_the_other(tmp_path):
    programs = [MEET_AND_COUNT.replace("RANK", str(rank)) for rank in range(2)]
    processes, ranks = started(*programs, folder=tmp_path)
    try:
        assert ranks.run({"by": 10}) == [10, 11]
        assert ranks.run({"by": 20}) == [20, 21]
    finally:
        end(processes)


@pytest.mark.parametrize(
    ("failing", "named"),
    [
        (
            "def carry_out(order, parent): raise ValueError('on purpose')\nserve(carry_out)",
            "(?s)Rank 1 could.*on purpose",
        ),
        ("sys.stdin.readline(); sys.exit('its last words')", "(?s)Rank 1 ended with exit code 1.*its last words"),
    ],
)
def test_rank_that_fails_is_named_and_the_others_are_not_waited_for(tmp_path, failing, named):
    processes, ranks = started(MEET_AND_COUNT.replace("RANK", "0"), failing, folder=tmp_path)
    try:
        with pytest.raises(RankFailedError, match=named):
            ranks.run({"by": 10})
    finally:
        end(processes)
