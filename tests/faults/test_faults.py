"""No process hangs: whatever goes wrong on one rank, all end, and name the rank and the averaging round.

Processes are real, and killed for real. Most jobs have ranks without a launcher, so that each has to notice by itself;
those under Lightning's launcher and torchrun take long to start, and run beside the other tests.
"""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.faults.jobs import Ended, Launcher, run

pytestmark = [
    pytest.mark.workers,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in Linux's /proc"),
]

BOUND = 60.0
"""Seconds from the fault by which all must have ended; in fact they take one, or five under Lightning."""
NEXT_ROUND = 15
"""The step of the round that comes after the fault in step 13."""


class Case(NamedTuple):
    """A job under a real launcher."""

    launcher: Launcher
    fault: str
    at: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        later = "-read later" if ("read_later", True) in self.options else ""
        return f"{self.launcher}-{self.fault}-{','.join(map(str, self.at))}{later}"


READ_LATER = (("read_later", True),)


def cases(*cases: Case) -> Any:
    """Run a test with the outcome of each of these jobs as ``launched``."""
    return pytest.mark.parametrize("launched", cases, indirect=True, ids=str)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test twice: on a GPU, a round's measurements are read in the next step. Launched jobs, which take long
    to start, say themselves which of the two they do, and fragments of a round are read in later steps anyway."""
    alone = "launched" in metafunc.fixturenames or "under_way" in metafunc.function.__name__
    ids = ["read at once"] if alone else ["read at once", "read later"]
    metafunc.parametrize("read_later", [False, True][: len(ids)], ids=ids, indirect=True)


@pytest.fixture(autouse=True)
def read_later(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Whether measurements are read in the next step. Such a job runs beside that of the test where they are not."""

    plainly = run

    def run_with_the_other(folder: Path, *args: Any, **options: Any) -> Ended:
        key = repr((args, sorted(options.items())))
        if not request.param:
            other = tmp_path_factory.mktemp("later")
            _READ_LATER[key] = threads.submit(plainly, other, *args, read_later=True, **options)
            return plainly(folder, *args, **options)
        if key in _READ_LATER:
            return _READ_LATER.pop(key).result()
        return plainly(folder, *args, read_later=True, **options)

    with ThreadPoolExecutor(1) as threads:
        if "read later" in {item.callspec.id.split("-")[0] for item in _siblings(request)}:
            monkeypatch.setattr(f"{__name__}.run", run_with_the_other)
        yield


_READ_LATER: dict[str, Future] = {}


def _siblings(request: pytest.FixtureRequest) -> list[Any]:
    """The same test with other parameters."""
    return [item for item in request.session.items if item.originalname == request.node.originalname]


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Future]]:
    """Futures of the outcomes of all selected cases; they run two at a time beside other tests."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = [item.callspec.params.get("launched") for item in here]
    with ThreadPoolExecutor(2) as threads:
        yield {
            case: threads.submit(
                run, tmp_path_factory.mktemp("job"), case.launcher, case.fault, at=case.at, **dict(case.options)
            )
            for case in sorted(filter(None, wanted), key=lambda case: case.fault != "hang")  # the longest waits first
        }
        threads.shutdown(cancel_futures=True)


@pytest.fixture
def launched(request: pytest.FixtureRequest, beside: dict[Case, Future]) -> Ended:
    """How the case's job ended."""
    return beside[request.param].result(timeout=300)


def check_that_all_ended(ended: Ended, saved_at: int | None = 10, bound: float = BOUND) -> None:
    """No process is left, and the last checkpoint can be used."""
    assert ended.hung == [], ended.output
    assert ended.left_over == [], ended.output
    assert ended.seconds < bound, ended.output
    if saved_at is not None:
        checkpoint = ended.last_checkpoint()
        assert checkpoint["global_step"] == saved_at
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def check_that_survivors_tell(ended: Ended, survivors: list[int], what: str) -> None:
    """Each names the round, the rank, and what is known of it."""
    for survivor in survivors:
        told = rf"WorkerLostError: Rank {survivor} could not finish the averaging round at step {NEXT_ROUND} .*{what}"
        assert re.search(told, ended.output), ended.output


def failed(rank: int, error: str = "ValueError: a bad sample") -> str:
    """What is reported of a rank that has raised."""
    return rf"Rank {rank} had failed at step .*: {error}"


def no_word(rank: int) -> str:
    """What is reported of a rank that posted no status."""
    return rf"No word from rank\(s\) {rank}: killed, hanging, or gone early"


# A rank that fails


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 4)])
def test_an_exception_on_one_rank_ends_the_others_which_quote_it(tmp_path, rank, ranks):
    ended = run(tmp_path, "none", "raise", at=(rank,), ranks=ranks)
    check_that_all_ended(ended)
    assert set(ended.codes.values()) == {1}
    check_that_survivors_tell(ended, [other for other in range(ranks) if other != rank], failed(rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_the_middle_of_a_round_ends_all(tmp_path, rank):
    ended = run(tmp_path, "none", "raise_in_round", at=(rank,))
    check_that_all_ended(ended)
    assert "MemoryError: no memory for a bucket" in ended.output
    check_that_survivors_tell(ended, [1 - rank], failed(rank, "MemoryError"))


@pytest.mark.parametrize(("fault", "error"), [("raise_in_save", "no space left"), ("raise_in_validation", "a bad sam")])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_where_others_wait_for_lightning_ends_all(tmp_path, fault, error, rank):
    ended = run(tmp_path, "none", fault, at=(rank,), validate=fault == "raise_in_validation")
    check_that_all_ended(ended, saved_at=10 if fault == "raise_in_save" else 30)
    assert set(ended.codes.values()) == {1}
    assert re.search(rf"WorkerLostError: Rank {1 - rank} could not finish .*Rank {rank} had .*{error}", ended.output)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_before_the_first_step_ends_all(tmp_path, rank):
    ended = run(tmp_path, "none", "raise_in_setup", at=(rank,))
    check_that_all_ended(ended, saved_at=None)
    assert set(ended.codes.values()) == {1}
    assert "ValueError: a bad optimizer" in ended.output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_exits_or_is_interrupted_ends_all(tmp_path, rank):
    for fault in ("exit", "interrupt"):
        folder = tmp_path / fault
        folder.mkdir()
        ended = run(folder, "none", fault, at=(rank,))
        check_that_all_ended(ended)
        check_that_survivors_tell(ended, [1 - rank], rf"[Rr]ank(\(s\))? {rank}\b")


@cases(Case("lightning", "raise", (0,)), Case("lightning", "raise", (1,), READ_LATER))
def test_an_exception_ends_all_under_a_launcher(launched, request):
    case = request.node.callspec.params["launched"]
    check_that_all_ended(launched)
    assert launched.codes["launcher"] == 1
    assert "ValueError: a bad sample" in launched.output
    check_that_survivors_tell(launched, [1 - case.at[0]], failed(case.at[0]))


@cases(Case("lightning", "raise_and_catch", (0, 1)))
def test_ranks_that_all_catch_their_exception_can_fit_again(launched):
    check_that_all_ended(launched)
    assert launched.codes["launcher"] == 0, launched.output
    assert launched.progress(0)[-1] == launched.progress(1)[-1] == (0, 30)


# A rank that is killed


@pytest.mark.parametrize("fault", ["kill", "kill_in_round"])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 4)])
def test_a_killed_rank_ends_the_others_which_name_it(tmp_path, fault, rank, ranks):
    ended = run(tmp_path, "none", fault, at=(rank,), ranks=ranks)
    check_that_all_ended(ended)
    assert ended.codes == {f"rank {other}": -9 if other == rank else 1 for other in range(ranks)}
    check_that_survivors_tell(ended, [other for other in range(ranks) if other != rank], no_word(rank))


@cases(Case("lightning", "kill_in_round", (1,)), Case("torchrun", "kill", (1,), READ_LATER))
def test_a_killed_rank_ends_all_under_a_launcher(launched, request):
    case = request.node.callspec.params["launched"]
    check_that_all_ended(launched)
    assert launched.codes["launcher"] != 0
    # The launcher may end the survivor before it hears of the others, but not before it has logged where it was.
    told = f"Rank {1 - case.at[0]} could not finish the averaging round at step {NEXT_ROUND} "
    assert told in launched.output, launched.output


@cases(Case("torchrun", "kill_at_first_attempt", (1,), (("resume", True), *READ_LATER)))
def test_torchrun_resumes_from_the_last_checkpoint_after_a_kill(launched):
    check_that_all_ended(launched, saved_at=30)
    assert launched.codes["launcher"] == 0
    for rank in (0, 1):
        assert [step for attempt, step in launched.progress(rank) if attempt == 1] == list(range(11, 31))
    first, second = launched.weights(0), launched.weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


# A rank that is asked to end


def check_that_the_average_is_left(ended: Ended) -> None:
    assert ended.progress(0)[-1] == ended.progress(1)[-1] == (0, NEXT_ROUND)
    first, second = ended.weights(0), ended.weights(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_ends_all_at_the_next_round_with_the_average(tmp_path, rank):
    ended = run(tmp_path, "none", "terminate", at=(rank,))
    check_that_all_ended(ended)
    assert set(ended.codes.values()) == {0}
    check_that_the_average_is_left(ended)


@cases(Case("lightning", "terminate", (0,), READ_LATER), Case("torchrun", "terminate_launcher", (1,)))
def test_sigterm_to_a_launcher_ends_all_at_the_next_round_with_the_average(launched, request):
    check_that_all_ended(launched)
    if request.node.callspec.params["launched"].launcher == "lightning":
        assert launched.codes["launcher"] == 0
    check_that_the_average_is_left(launched)


# A rank that hangs


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 3)])
def test_ranks_that_wait_for_a_hanging_one_end_after_the_timeout_and_name_it(tmp_path, rank, ranks):
    timeout = 4.0
    ended = run(tmp_path, "none", "hang", at=(rank,), ranks=ranks, timeout=timeout, stuck=(rank,))
    assert ended.hung == [f"rank {rank}"]
    assert timeout <= ended.seconds < timeout + BOUND
    check_that_survivors_tell(ended, [other for other in range(ranks) if other != rank], no_word(rank))
    assert ended.last_checkpoint()["global_step"] == 10


# Lightning's main process starts its own rank first: the time limit must also cover the others' imports.
@cases(Case("lightning", "hang", (1,), (("timeout", 45.0), ("bound", 45.0 + BOUND))))
def test_lightnings_launcher_ends_a_child_that_hangs(launched):
    check_that_all_ended(launched, bound=45.0 + BOUND)
    assert launched.codes["launcher"] == 1
    check_that_survivors_tell(launched, [0], no_word(1))


# Ranks that do not belong together


@pytest.mark.parametrize("step", [13, NEXT_ROUND])  # in mid-period; at a round, with nothing left to average
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("short", {}),
        ("short", {"validate": True}),
        ("short", {"log_epoch": True}),
        ("short", {"metric": True}),
        ("short_stream", {}),
        ("short_stream", {"validate": True, "log_epoch": True}),
    ],
)
def test_a_loader_that_ends_early_is_an_error_that_names_the_steps(tmp_path, step, fault, options):
    ended = run(tmp_path, "none", fault, step=step, bound=20, **options)
    check_that_all_ended(ended)
    assert ended.codes["rank 0"] == 1
    assert re.search(rf"rank 1.* at step {step}\b", ended.output, re.I), ended.output
    assert "averaging round at step" in ended.output
    if fault == "short":  # the length of a stream is not known beforehand
        assert f"different numbers of batches (rank 0: 30, rank 1: {step})" in ended.said(0)


@pytest.mark.parametrize(("fault", "name"), [("wider", "net.0.weight"), ("deeper", "net.3.weight")])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_different_models_do_not_start(tmp_path, fault, name, rank):
    ended = run(tmp_path, "none", fault, at=(rank,))
    check_that_all_ended(ended, saved_at=None)
    assert set(ended.codes.values()) == {1}
    for each in (0, 1):
        assert re.search(rf"WorkersDisagreeError: .*rank 1 .*{re.escape(name)}", ended.said(each)), ended.output
    assert not (ended.folder / "progress.0").exists()


def test_ranks_may_give_the_same_tensors_other_names(tmp_path):
    ended = run(tmp_path, "none", "renamed")
    check_that_all_ended(ended, saved_at=30)
    assert set(ended.codes.values()) == {0}
    first, second = ended.weights(0).values(), ended.weights(1).values()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_parameters_that_are_not_finite_end_all_before_they_spread(tmp_path, ranks):
    ended = run(tmp_path, "none", "nan", at=tuple(ranks))
    check_that_all_ended(ended)
    assert set(ended.codes.values()) == {1}
    told = (
        f"WorkersDivergedError: Parameters of rank(s) {', '.join(map(str, ranks))} are not finite at step {NEXT_ROUND}"
    )
    assert all(told in ended.said(rank) for rank in (0, 1)), ended.output
    for rank in {0, 1} - set(ranks):
        assert all(tensor.isfinite().all() for tensor in ended.weights(rank).values())


# While fragments of a round are in flight


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise", "WorkerLostError: .*Rank 1 had failed at step .*: ValueError: a bad sample"),
        ("kill", "WorkerLostError: .*" + no_word(1)),
        ("short", "(WorkersDisagreeError|WorkerLostError): .*step"),
        ("nan", r"WorkersDivergedError: Parameters of rank\(s\) 1 are not finite"),
    ],
)
@pytest.mark.parametrize("options", [{"stagger": True}, {"stagger": True, "overlap": 2}, {"overlap": 2}], ids=str)
def test_the_same_holds_while_fragments_of_a_round_are_in_flight(tmp_path, fault, told, options):
    ended = run(tmp_path, "none", fault, **options)
    check_that_all_ended(ended)
    assert ended.codes["rank 0"] == 1
    assert re.search(told, ended.output), ended.output
