"""The plot of a run, as a figure or as a file; needs matplotlib, which is imported when a run is drawn."""

import io
import os
from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING

from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.validation import check_instance, wrong_type, wrong_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_of(rounds: Sequence[AveragingRound], transport: str = "at once") -> "Figure":
    """The history of a run: period and rounds over steps above; variance, γ·C₂ and learning rate below.

    Args:
        rounds: the records, in order; several optimizers are drawn side by side.
        transport: how rounds were sent, for the title (:attr:`ADPSGDStrategy.transport`).

    Raises:
        TypeError: if ``rounds`` is not a sequence of records, or ``transport`` not a string.
        ValueError: if ``rounds`` is empty.
    """
    _check_rounds(rounds)
    check_instance("draw", "transport", transport, str, "a str")
    from lightning_adpsgd.figure import new_figure

    return new_figure(rounds, transport)


def draw(rounds: Sequence[AveragingRound], path: str | PathLike[str], transport: str = "at once") -> None:
    """Write the picture of a run, see :func:`figure_of`.

    Args:
        rounds: the records, in order.
        path: the file to write, a path or a URL (``s3://…``, if fsspec supports it); its folder is created if needed.
            Its suffix names the format, by default PNG.
        transport: how rounds were sent, for the title.

    Raises:
        TypeError, ValueError: as :func:`figure_of`; also if ``path`` is not a path, or names no picture's format.
        OSError: if the file cannot be written. What was there is kept then, unless writing has begun.
    """
    if not isinstance(path, str | PathLike):
        raise wrong_type("draw", "path", path, "a str or a Path")
    figure = figure_of(rounds, transport)
    folder, name = os.path.split(path)
    suffix = os.path.splitext(name)[1][1:].lower() or "png"
    formats = figure.canvas.get_supported_filetypes()
    if not name or suffix not in formats:
        raise wrong_value("draw", "path", str(path), f"a file whose suffix is one of {', '.join(sorted(formats))}")
    picture = io.BytesIO()  # first drawn, then written: a file that is there is not lost to an error
    figure.savefig(picture, dpi=130, format=suffix)
    from fsspec.core import url_to_fs

    files, _ = url_to_fs(str(path))
    if folder and not files.exists(folder):
        files.makedirs(folder, exist_ok=True)
    with files.open(os.fspath(path), "wb") as file:
        file.write(picture.getvalue())


def check_matplotlib(what: str, otherwise: str = "") -> None:
    """Check that matplotlib is installed.

    Args:
        what: what needs it.
        otherwise: what else the reader can do.

    Raises:
        ModuleNotFoundError: if it is not.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"{what} draws with matplotlib, which is not installed. Install it (pip install matplotlib){otherwise}."
        )


def _check_rounds(rounds: object) -> None:
    if not isinstance(rounds, Sequence) or not all(isinstance(round_, AveragingRound) for round_ in rounds):
        raise wrong_type("draw", "rounds", rounds, "a sequence of AveragingRound")
    if not rounds:
        expected = "at least one AveragingRound; a CommunicationMonitor has some after the first round"
        raise wrong_value("draw", "rounds", rounds, expected)
