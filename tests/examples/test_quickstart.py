"""The notebook, run as Jupyter runs it."""

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def outputs_of(notebook: Any) -> tuple[str, list[str]]:
    """All that was printed, and the kinds of what was shown."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, [kind for output in outputs if "data" in output for kind in output.data]


@pytest.mark.workers
def test_the_notebook_trains_with_two_workers_and_shows_the_plot(tmp_path, monkeypatch):
    # Other tests leave it behind. With more than one thread, what is forked hangs in the threads of its parent.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    printed, shown = outputs_of(notebook)
    assert "Averaging rounds" in printed
    assert float(printed.partition("accuracy ")[2].partition("%")[0]) > 90
    assert set(shown) == {"image/png", "text/plain"}
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_is_kept_with_what_it_shows_and_a_small_picture():
    printed, shown = outputs_of(nbformat.read(NOTEBOOK, as_version=4))
    assert "Averaging rounds" in printed
    assert "image/png" in shown
    assert NOTEBOOK.stat().st_size < 150_000
