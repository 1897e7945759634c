import inspect
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, link
from benchmarks.contenders import CONTENDERS, Plan
from benchmarks.hosts import HostsUnavailableError, hosts
from benchmarks.link import Run, as_rows, combine, loss_to_reach, reached, readable, smoothed
from benchmarks.ranks import RankFailedError, Ranks
from benchmarks.training import Pause, Recipe, Record, Sent, Shuffled, Traffic, new_loader, new_network, parameter_count

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURE = [sys.executable, "-m", "benchmarks.link"]
PATIENCE_SECONDS = 240

RECIPE = Recipe(model="mlp", parameters=100_000, batch_size=4, learning_rate=0.05, seed=0, steps=6)
PLAN = Plan(RECIPE, hosts=2, ranks_per_host=2, period=2, adapt=False)


# The arithmetic


def a_record(*, pace=1.0, tx_bytes=(0, 0, 0, 0), sent_bytes=(0, 0, 0, 0), losses=(3.0, 2.0, 1.0)):
    """Of three steps."""
    return {
        "losses": list(losses),
        "times": [100.0 + pace * step for step in range(4)],
        "tx_bytes": list(tx_bytes),
        "tx_packets": [0, 1, 2, 4],
        "rounds": [0, 1, 1, 2],
        "sent_bytes": list(sent_bytes),
    }


def a_run(**changes):
    run = Run(
        step_seconds=0.02,
        rounds=4,
        reported_bytes=100.0,
        counted_bytes=170.0,
        counted_packets=1.0,
        losses=[4.0, 3.0, 2.0, 1.0],
        seconds=[1.0, 2.0, 3.0, 4.0],
        sent_bytes=[0.0, 10.0, 10.0, 20.0],
    )
    return run._replace(**changes)


def test_slowest_rank_counts_and_steps_before_the_timed_ones_do_not():
    run = combine([a_record(), a_record(pace=1.5), a_record(), a_record()], PLAN, warmup=1)
    assert run.step_seconds == pytest.approx(1.5)
    assert run.rounds == 1
    assert run.seconds == [1.5, 3.0, 4.5]


def test_bytes_are_those_of_a_host():
    first = a_record(tx_bytes=[50, 60, 70, 160], sent_bytes=[0, 10, 10, 110])
    second = a_record(tx_bytes=[0, 10, 20, 210], sent_bytes=[0, 10, 10, 110])
    ring = combine([first, first, second, second], PLAN, warmup=1)
    assert ring.counted_bytes == (100 + 200) / 2
    assert ring.reported_bytes == 100
    assert ring.counted_packets == 3
    assert ring.sent_bytes == [10, 20, 160]
    slices = combine([first, first, second, second], PLAN, warmup=1, sends_in_slices=True)
    assert slices.reported_bytes == 200


def test_loss_is_the_mean_over_the_ranks():
    records = [a_record(losses=[1, 2, 3]), a_record(losses=[3, 4, 5])]
    plan = replace(PLAN, hosts=2, ranks_per_host=1)
    assert combine(records, plan, warmup=1).losses == [2, 3, 4]


def test_loss_is_smoothed_over_the_steps_before():
    assert smoothed([4.0, 2.0, 0.0], 2) == [math.inf, 3.0, 1.0]


def test_loss_is_reached_when_its_mean_over_the_window_is():
    assert reached(a_run(), 2.5, window=2) == (3, 3.0, 10.0)
    assert reached(a_run(), 2.5, window=1) == (3, 3.0, 10.0)
    assert reached(a_run(), 3.0, window=1) == (2, 2.0, 10.0)
    assert reached(a_run(), 0.5, window=1) is None


def test_loss_to_reach_is_what_ddp_has_after_two_thirds_of_its_steps():
    runs = {"ddp": [a_run(losses=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0])]}
    assert loss_to_reach("ddp", runs, window=1) == 3.0
    assert loss_to_reach(0.25, runs, window=1) == 0.25


def test_quotients_are_taken_within_a_turn():
    runs = {
        "none": [a_run(step_seconds=1.0), a_run(step_seconds=10.0), a_run(step_seconds=100.0)],
        "ddp": [a_run(step_seconds=2.0), a_run(step_seconds=40.0), a_run(step_seconds=300.0)],
    }
    none, ddp = as_rows(runs, window=1)
    assert (none["speed_vs_none"], none["speed_vs_ddp"]) == (1.0, 3.0)
    assert (ddp["speed_vs_none"], ddp["speed_vs_ddp"]) == (1 / 3, 1.0)
    assert ddp["step_seconds"] == 40.0


def test_quotient_is_left_out_where_there_is_nothing_to_divide_by():
    (row,) = as_rows({"constant": [a_run(reported_bytes=0.0)]}, window=1)
    assert row["speed_vs_none"] is row["speed_vs_ddp"] is row["counted_over_reported"] is None
    assert readable(row)["vs none"] == readable(row)["ratio"] == ""


def test_headers_are_taken_off_in_the_second_ratio():
    (row,) = as_rows({"constant": [a_run(), a_run()]}, window=1)
    assert row["counted_over_reported"] == pytest.approx(1.7)
    assert row["counted_over_reported_without_headers"] == pytest.approx(1.04)  # 66 bytes per packet


def test_loss_counts_as_reached_only_if_it_is_in_every_turn():
    fast, slow = a_run(), a_run(losses=[4.0] * 4)
    both, one = as_rows({"both": [fast, fast], "one": [fast, slow]}, window=1, until_loss=2.0)
    assert (both["until_step"], both["until_seconds"], both["until_bytes"]) == (3, 3.0, 10.0)
    assert one["until_seconds"] is None
    assert readable(one)["until [s]"] == "not reached"


def test_curves_are_written_only_if_a_loss_is_asked_for():
    (without,) = as_rows({"ddp": [a_run()]}, window=1)
    (with_loss,) = as_rows({"ddp": [a_run()]}, window=1, until_loss=2.0)
    assert "losses" not in without["turns"][0]
    assert with_loss["turns"][0]["losses"] == a_run().losses


# What is trained


@pytest.mark.parametrize("parameters", [10_000, 100_000, 3_000_000])
def test_model_has_about_the_parameters_asked_for(parameters):
    count = parameter_count(replace(RECIPE, parameters=parameters))
    assert count == pytest.approx(parameters, rel=0.02)


def test_ranks_start_from_the_same_weights_and_see_different_batches():
    first, second = new_network(RECIPE), new_network(RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    batches = [next(iter(new_loader(RECIPE, rank, 2)))[0] for rank in (0, 1)]
    assert batches[0].shape == (4, 3, 32, 32)
    assert not torch.equal(*batches)


def test_batches_are_the_same_for_every_contender():
    labels = [torch.cat([labels for _, labels in new_loader(RECIPE, 0, 2)]) for _ in range(2)]
    assert len(labels[0]) == RECIPE.steps * RECIPE.batch_size
    assert torch.equal(*labels)


def test_every_example_is_drawn_once_before_any_is_drawn_again():
    draws = list(Shuffled(5, 12, seed=0))
    assert len(draws) == 12
    assert sorted(draws[:5]) == sorted(draws[5:10]) == [0, 1, 2, 3, 4]
    assert draws[:5] != draws[5:10]


def test_pause_changes_nothing_but_the_time():
    plain, paused = new_network(RECIPE), new_network(replace(RECIPE, pause_ms=0.1))
    assert sum(isinstance(module, Pause) for module in paused) == 4
    images = torch.randn(2, 3, 32, 32)
    for network in (plain, paused):
        network(images).square().sum().backward()
    for a, b in zip(plain.parameters(), paused.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_record_has_a_note_before_the_first_step_and_after_each():
    met = []
    record = Record(lambda: met.append(True), lambda: Traffic(bytes=7, packets=1))
    record.begin()
    record.sent = lambda: Sent(record.steps, 10 * record.steps)
    record.step(torch.tensor(0.5))
    noted = record.as_json()
    assert met == [True]
    assert noted["losses"] == [0.5]
    assert (noted["tx_bytes"], noted["tx_packets"]) == ([7, 7], [1, 1])
    assert (noted["rounds"], noted["sent_bytes"]) == ([0, 1], [0, 10])
    assert noted["times"][0] <= noted["times"][1]


# Who takes part


def test_option_that_the_package_does_not_have_is_named(monkeypatch):
    signature = inspect.Signature([inspect.Parameter("period", inspect.Parameter.KEYWORD_ONLY)])
    monkeypatch.setattr(contenders.inspect, "signature", lambda _: signature)
    reason = CONTENDERS["adpsgd-stagger-overlap"].why_not(PLAN)
    assert reason == "this version of lightning_adpsgd does not have stagger=True, overlap=1"
    assert CONTENDERS["adpsgd"].why_not(PLAN) is None


def test_peer_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda module: None)
    assert CONTENDERS["accelerate"].why_not(PLAN) == "accelerate is not installed (pip install accelerate)"
    assert "pip install torchft" in CONTENDERS["torchft"].why_not(PLAN)


def test_node_as_worker_needs_several_ranks_on_it(monkeypatch):
    parameters = [inspect.Parameter("worker", inspect.Parameter.KEYWORD_ONLY)]
    monkeypatch.setattr(contenders.inspect, "signature", lambda _: inspect.Signature(parameters))
    assert CONTENDERS["adpsgd-node"].why_not(PLAN) is None
    assert "--ranks-per-host" in CONTENDERS["adpsgd-node"].why_not(replace(PLAN, ranks_per_host=1))


# The command


def test_contender_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "find_spec", lambda module: None)
    with pytest.raises(SystemExit) as left:
        link.main(["--contenders", "none,torchft"])
    assert left.value.code == 2
    assert "torchft is not installed (pip install torchft)" in capsys.readouterr().err


def test_steps_are_whole_periods():
    plan, warmup = link._plan(link._parse(["--period", "5", "--steps", "11"]))
    assert (warmup, plan.recipe.steps) == (10, 25)
    plan, warmup = link._plan(link._parse(["--period", "1", "--steps", "11"]))
    assert (warmup, plan.recipe.steps) == (4, 15)


def test_error_says_what_is_missing_for_hosts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert link.main(["--contenders", "none"]) == 2
    assert "Nothing was measured. Network namespaces exist on Linux only" in capsys.readouterr().err


# The ranks


def started(*programs, folder):
    logs = [folder / f"{rank}.log" for rank in range(len(programs))]
    processes = []
    for program, log in zip(programs, logs, strict=True):
        with open(log, "wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"import sys\nfrom benchmarks.ranks import serve\n{program}"],
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
def test_rank_that_fails_is_named_and_nobody_waits_for_the_others(tmp_path, failing, named):
    processes, ranks = started(MEET_AND_COUNT.replace("RANK", "0"), failing, folder=tmp_path)
    try:
        with pytest.raises(RankFailedError, match=named):
            ranks.run({"by": 10})
    finally:
        end(processes)


# The measurement


@pytest.fixture(scope="module")
def namespaces():
    """Skips, and says why, where there can be none."""
    try:
        with hosts(2, rate_mbit=1000):
            pass
    except HostsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def measured(namespaces, tmp_path_factory):
    """A short measurement: the process that made it, what it printed, and the numbers it wrote."""
    file = tmp_path_factory.mktemp("link") / "measured.json"
    options = "--contenders none,ddp,constant --parameters 200000 --batch-size 8 --period 4 --steps 8 --turns 2"
    command = [*MEASURE, *options.split(), "--until-loss", "0", "--json", str(file)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        printed, said = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 0, said
    return run, printed, json.loads(file.read_text())


def rows_of(numbers):
    return {row["contender"]: row for row in numbers["rows"]}


@pytest.mark.network
def test_nothing_is_sent_without_communication(measured):
    _, _, numbers = measured
    none = rows_of(numbers)["none"]
    assert none["rounds"] == none["reported_bytes"] == 0
    assert none["counted_bytes"] < 200


@pytest.mark.network
@pytest.mark.parametrize(("contender", "rounds"), [("ddp", 8), ("constant", 2)])
def test_interfaces_count_what_contenders_report(measured, contender, rounds):
    _, _, numbers = measured
    row = rows_of(numbers)[contender]
    assert row["rounds"] == rounds
    assert row["reported_bytes"] == pytest.approx(rounds * 4 * numbers["arguments"]["model_parameters"], rel=0.01)
    assert row["counted_over_reported"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.network
def test_every_turn_is_written_and_the_table_names_every_contender(measured):
    _, printed, numbers = measured
    assert numbers["benchmark"] == "link"
    for name, row in rows_of(numbers).items():
        assert name in printed
        assert row["step_seconds"] > 0
        assert row["loss"] > 0
        assert [len(turn["losses"]) for turn in row["turns"]] == [16, 16]  # 8 are not timed
        assert row["until_seconds"] is None
    assert "not reached" in printed


@pytest.mark.network
def test_same_seed_gives_every_turn_the_same_losses(measured):
    _, _, numbers = measured
    for row in rows_of(numbers).values():
        first, second = row["turns"]
        assert first["losses"] == pytest.approx(second["losses"], rel=1e-4)


@pytest.mark.network
def test_no_host_is_left_after_a_measurement(measured):
    run, _, _ = measured
    assert left_behind_by(run) == []


@pytest.mark.network
def test_no_host_and_no_rank_is_left_after_ctrl_c(namespaces):
    def hear_ctrl_c():  # even where the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = ["--contenders", "ddp", "--steps", "1000000"]
    with subprocess.Popen(
        [*MEASURE, *options],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    ) as run:
        wait_until(lambda: len(pids_of_ranks(run)) == 2)
        pids = pids_of_ranks(run)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 130, said
    assert left_behind_by(run) == []
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def left_behind_by(process):
    return [path.name for path in Path("/run/netns").glob(f"adpsgd-{process.pid}-*")]


def pids_of_ranks(process):
    on_hosts = [name for name in left_behind_by(process) if not name.endswith("switch")]
    listed = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True) for name in on_hosts]
    return [pid for each in listed for pid in each.stdout.split()]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
