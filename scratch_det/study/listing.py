"""The experiment list as text."""

from collections.abc import Sequence

from scratch_det.study.experiments import Run
from scratch_det.tables import markdown

CURVES = {"figure1", "figure3", "figure4", "figure6", "figure7", "figure8"}
HEADER = ("experiment", "paper", "iterations", "with a shared prefix", "reported")


def as_table(runs: Sequence[Run]) -> str:
    """A Markdown table: a line a run, and the iterations of all of them, trained apart and off shared trunks.

    A run whose trunk is not among ``runs`` counts in full.
    """
    by_name = {run.name: run for run in runs}
    spent = [run.iterations - run.branch_at(by_name.get(run.trunk or "")) for run in runs]
    rows = [
        (
            run.name,
            f"{', '.join(run.places)}: {run.shown}",
            f"{run.iterations:,}",
            f"{own:,}",
            " ".join(f"{metric} {value}" for metric, value in run.expected.items())
            or ("a curve" if CURVES.intersection(run.places) else "-"),
        )
        for run, own in zip(runs, spent, strict=True)
    ]
    total = ("all", f"{len(runs)} runs", f"{sum(run.iterations for run in runs):,}", f"{sum(spent):,}", "")
    return markdown(HEADER, [*rows, total])
