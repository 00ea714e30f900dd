"""The paper's figures from a study's outcomes, as SVG and PNG: the same bytes from the same outcomes."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scratch_det.files import write_atomically
from scratch_det.study import own
from scratch_det.study.experiments import experiments, of_place
from scratch_det.study.records import Record
from scratch_det.study.report import drawings
from scratch_det.study.report.tables import DIGITS

DOTS = 200  # an inch, of the PNG
DRAWINGS: Mapping[str, Callable[[Sequence[Record]], Figure | None]] = {  # by the place whose runs they show
    "figure1": partial(drawings.schedules, norm="GN", metric="bbox/AP"),
    "figure2": drawings.seen,
    "figure3": partial(drawings.schedules, norm="GN", metric="bbox/AP"),
    "figure4": partial(drawings.schedules, norm="SyncBN", metric="bbox/AP"),
    "figure5": drawings.enhanced,
    "figure6": partial(drawings.schedules, norm="GN", metric="keypoints/AP"),
    "figure7": drawings.small_data,
    "figure8": drawings.training_loss,
    "norms": drawings.norms,
    own.PLACE: drawings.own_runs,
    "smoke": partial(drawings.schedules, norm="GN", metric="bbox/AP"),
}


def figures_of(experiment: str, outcomes: Sequence[Record]) -> dict[str, Figure]:
    """The figures all of whose runs are part of ``experiment``, by name; without those that have nothing to show.

    Raises UserError for an unknown experiment.
    """
    runs = of_place(experiment)
    prefix = DIGITS if runs[0].places[0].startswith(DIGITS) else ""
    ours = {run.name for run in runs}
    drawn: dict[str, Figure] = {}
    for name, draw_one in DRAWINGS.items():
        place = f"{prefix}{'figure1' if name == 'figure2' else name}"  # whose runs they count
        listed = {run.name for run in experiments() if place in run.places}
        if any(place in run.places for run in runs) and ours >= listed:
            members = [one for one in outcomes if place in one.run.places]
            if members and (found := draw_one(members)):
                drawn[name] = found
                found.suptitle(f"{_in_words(name, bool(prefix))}: {found.get_suptitle()}", **drawings.TITLE)
    return drawn


def draw(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png of each figure into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths += [folder / f"{name}.svg", folder / f"{name}.png"]
        write_atomically(paths[-2], as_svg(figure))
        partial = paths[-1].with_name(f"{name}.png.partial")
        FigureCanvasAgg(figure)
        figure.savefig(partial, format="png", dpi=DOTS, metadata={"Software": None})
        partial.replace(paths[-1])
    return paths


def as_svg(figure: Figure) -> str:
    """A document whose ids are not drawn at random and that does not tell when it was made."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "scratch_det"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _in_words(name: str, is_small: bool) -> str:
    """figure1 -> Figure 1, or Figure 1 in miniature."""
    if name == own.PLACE:
        return "All runs"
    number = name.removeprefix("figure")
    return f"Figure {number}{' in miniature' * is_small}" if number.isdecimal() else "In miniature"
