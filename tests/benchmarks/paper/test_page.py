import dataclasses
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper.against_bytes import in_brief
from benchmarks.paper.links import read_links
from benchmarks.paper.page import BRIEF, HABITS, Page
from benchmarks.paper.page import BYTES as BYTES_FIGURE
from benchmarks.paper.plan import ADPSGD, ADPSGD_INT4, BYTES, CPSGD_8, FULL, GRID, MOMENTUM, PAPER, QSGD, Run, Study
from benchmarks.paper.results import Outcomes
from benchmarks.paper.runs import Store
from tests.benchmarks.helpers import REPOSITORY
from tests.benchmarks.paper.samples import TASK, a_result, some_runs, write_link


def page_of(folder, results, studies, links=None):
    tasks = {task.name: task for study in studies for task in study.tasks}
    store, runs = Store(folder), []
    for name, by_contender in results.items():
        for contender, by_seed in by_contender.items():
            for seed, result in enumerate(by_seed):
                runs.append(Run(tasks[name], contender, seed))
                store.keep(runs[-1], result, "command", {})
    return Page(studies, Outcomes(store, runs), links or {}, "runs", "the command", folder / "images")


COSINE = dataclasses.replace(TASK, name="net-cosine", title="Net, cosine", schedule="cosine")
STUDIES = (
    Study("paper", "The comparison", [TASK], PAPER, 2),
    Study("cosine", "Cosine", [COSINE], PAPER[:4], 1),
    Study("momentum", "Momentum", [TASK], MOMENTUM, 1),
    Study("rule", "Rule", [TASK], GRID, 1),
)


def test_page_has_a_row_per_contender_with_mean_spread_and_speedups(tmp_path):
    write_link(tmp_path, "10 Gbps")
    results = {
        "net": {
            ADPSGD: [a_result(1.0, 0.6, sent=2e6), a_result(1.2, 0.7, sent=2e6)],
            FULL: [a_result(0.8, 0.7, sent=10e6, had=40)],
        }
    }
    page = page_of(tmp_path, results, STUDIES, read_links(tmp_path))
    text = page.text()
    row = "| ADPSGD, p_init = 4 | 2 | 10 ± 0 | 4.00 | 2.0 ± 0.0 | 0.200 | 1.1000 ± 0.1414 | 65.00 ± 7.07 | 1.82 |"
    assert row in text
    assert "| full communication | 1 | 40 | 1.00 | 10.0 | 1.000 | 0.8000 | 70.00 | 1.00 |" in text
    assert "`the command`" in text
    assert "65.00 ± 7.07" in page.overview()
    assert "## The rule under cosine decay and AdamW" not in text


def test_page_answers_every_study_that_has_runs(tmp_path):
    both = {ADPSGD: [a_result(1.0, ratios=[4.0] * 10)], CPSGD_8: [a_result(1.3, ratios=[8.0] * 3 + [2.0] * 7)]}
    others = {contender: [a_result(0.9)] for contender in (*MOMENTUM[1:], *GRID[:3])}
    page = page_of(tmp_path, {"net": both | others, "net-cosine": both}, STUDIES)
    text = page.text()
    for title in (
        "The comparison",
        "The rule under cosine decay and AdamW",
        "What averaging the optimizer's state does",
    ):
        assert f"## {title}" in text
    assert "## p_init and sampling" in text
    assert "| Net, cosine | CPSGD, p = 8 | 1.60 | 1.00 |" not in text  # the second quarter is what it is relative to
    assert "| Net, cosine | CPSGD, p = 8 | 4.00 | 1.00 | 1.00 | 1.00 | 4.0 | 4.0 | 4.0 | 4.0 |" in text
    assert "| Net, cosine | ADPSGD, p_init = 4 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "- CPSGD, p = 16, state: average, against CPSGD, p = 8: final loss -0.4000" in text
    page.draw()
    drawn = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert drawn == sorted(["results-accuracy.png", HABITS, "results-loss.png", "results-variance.png"])
    for file in drawn:
        assert f"](images/{file})" in text


def test_page_says_how_many_runs_are_missing(tmp_path):
    store = Store(tmp_path)
    runs = some_runs(ADPSGD, FULL, QSGD)
    store.keep(runs[0], a_result(), "command", {})
    page = Page(STUDIES, Outcomes(store, runs), {}, "runs", "command", tmp_path / "images")
    assert "**2 of the runs that belong here are not done yet.**" in page.text()


def page_with_bytes(folder, results, seeds=3):
    paper = Study("paper", "The comparison", [TASK], PAPER, 1)
    study = Study("bytes", "Bytes", [TASK], BYTES, seeds)
    return page_of(folder, {"net": results}, (paper, study))


def test_page_compares_accuracy_against_bytes_and_draws_it(tmp_path):
    results = {FULL: [a_result(1.0, 0.6, 1000)] * 3, ADPSGD_INT4: [a_result(1.0, 0.6, 50)] * 3}
    results[QSGD] = [a_result(1.0, 0.59, 260)]
    page = page_with_bytes(tmp_path, results)
    text = page.text()
    section = text[text.index("## Accuracy against bytes") :]
    assert "| adpsgd_int4 | 3 | 0.050 | 1.0000 ± 0.0000 | 60.00 ± 0.00 |" in section
    assert "| 3. At most 0.055 of full communication's bytes | **reached** |" in section
    assert "At most 0.055 of full communication's bytes: reached." in page.overview()
    page.draw()
    assert (tmp_path / "images" / BYTES_FIGURE).stat().st_size > 1000
    assert (tmp_path / "images" / BRIEF).stat().st_size > 1000
    assert f"](images/{BYTES_FIGURE})" in section


def test_seeds_of_one_study_do_not_change_the_results_of_another(tmp_path):
    results = {FULL: [a_result(1.0, 0.6), a_result(2.0, 0.5), a_result(3.0, 0.4)], ADPSGD: [a_result(1.0, 0.6)]}
    text = page_with_bytes(tmp_path, results).text()
    comparison, bytes_section = text[text.index("## The comparison") :].split("## Accuracy against bytes")
    assert "| full communication | 1 | 10 | 4.00 | 0.0 | 1.000 | 1.0000 | 60.00 |" in comparison
    assert "| full communication | 3 | 1.000 | 2.0000 ± 1.0000 | 50.00 ± 10.00 |" in bytes_section


def test_page_has_bytes_without_full_communication_but_no_figure(tmp_path):
    page = page_with_bytes(tmp_path, {ADPSGD_INT4: [a_result(1.0, 0.6, 50)]})
    assert "| adpsgd_int4 | 1 |  | 1.0000 | 60.00 |" in page.text()
    assert BYTES_FIGURE not in page.text()
    page.draw()
    assert not (tmp_path / "images" / BYTES_FIGURE).exists()


def test_page_says_which_runs_of_bytes_are_missing(tmp_path):
    study = Study("bytes", "Bytes", [TASK], BYTES, 1)
    store, runs = Store(tmp_path), some_runs(*BYTES)
    store.keep(runs[0], a_result(), "command", {})
    text = Page([study], Outcomes(store, runs), {}, "runs", "command", tmp_path / "images").text()
    assert f"**{len(BYTES) - 1} of the {len(BYTES)} runs of this section are not done yet** (DDP, bf16: 1; " in text
    assert "| Net |" in text
    assert "of the runs that belong here are not done yet" not in text


def test_language_is_described_and_compared_beside_images(tmp_path):
    language = dataclasses.replace(
        TASK, name="gpt", title="Language", network="gpt_tiny", data="text", optimizer="adamw"
    )
    studies = (
        Study("bytes", "Bytes", [TASK], BYTES, 1),
        Study("language", "Language", [language], (FULL, ADPSGD_INT4), 1),
    )
    both = {FULL: [a_result(1.0, 0.6, 1000)], ADPSGD_INT4: [a_result(1.0, 0.6, 50)]}
    text = page_of(tmp_path, {"net": both, "gpt": both}, studies).text()
    assert "18 × 64 characters" in text
    assert text.count("| adpsgd_int4 | 1 | 0.050 |") == 2
    assert "- Language: 0.050." in text


RESULTS = ["--runs", "benchmarks/results/paper", "--page", "docs/results.md", "--page-only"]


def test_results_page_is_what_the_files_of_the_runs_say(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options = command.parse(RESULTS)
    page = command.new_page(options)
    assert options.page.read_text() == page.text()
    for shown in re.findall(r"\]\((images/.*?)\)", page.text()):
        assert (REPOSITORY / "docs" / shown).is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_table_says_what_the_files_of_the_runs_say(monkeypatch, page):
    monkeypatch.chdir(REPOSITORY)
    parts = command.new_page(command.parse(RESULTS))._parts
    rows = [line for line in Path(page).read_text().splitlines() if line.startswith("| ")]
    told = {cells[1].strip(): cells[3:5] for cells in (line.split("|") for line in rows)}
    long = "the same, one of them for 60 epochs"
    for place, contender, digits in ((0, ADPSGD_INT4, 2), (1, ADPSGD, 1)):
        (brief,) = in_brief(parts, [contender])
        *sgd, images, language = brief.gains[:6]
        for row, places, values in (
            ("bytes sent ÷ DDP's", digits + 1, (min(brief.shares), max(brief.shares))),
            ("test accuracy, four tasks with SGD", digits, (statistics.fmean(sgd), max(sgd), min(sgd))),
            (long, 2, brief.gains[6:]),  # nothing, where it was not measured
            ("test accuracy, a vision transformer with AdamW", 1, (images,)),
            ("test accuracy, a language model with AdamW", 1, (language,)),
        ):
            numbers = [float(number.replace("−", "-")) for number in re.findall(r"−?\d+\.\d+", told[row][place])]
            assert numbers == [round(value, places) for value in values], (row, contender.title)


def test_brief_has_the_mean_of_each_task_and_leaves_out_what_was_not_run(tmp_path):
    results = {FULL: [a_result(1.0, 0.6, 1000), a_result(1.0, 0.7, 1000)], ADPSGD_INT4: [a_result(1.0, 0.58, 50)] * 2}
    parts = page_with_bytes(tmp_path, results)._parts
    full, int4 = in_brief(parts, (FULL, QSGD, ADPSGD_INT4))
    assert (full.contender, full.shares, full.gains) == (FULL, [1.0], [0.0])
    assert (int4.contender, int4.shares) == (ADPSGD_INT4, [0.05])
    assert int4.gains == [pytest.approx(-7.0)]
