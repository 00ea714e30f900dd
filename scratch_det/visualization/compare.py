"""Curves of several runs in one picture, from what a command line says."""

from collections.abc import Sequence
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.visualization.curves import compare_curves


def compare_runs(runs: Sequence[str], keys: Sequence[str], out: Path) -> Path:
    """Draw ``keys`` of the runs, each "LABEL=FOLDER", into ``out``. Raises UserError for what is no run, or no PNG."""
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; name it .png")
    files: dict[str, Path] = {}
    for word in runs:
        label, equals, folder = word.partition("=")
        file = Path(folder) / "metrics.json"
        if not (label and equals and folder) or label in files:
            raise UserError(f"{word}: expected LABEL=FOLDER, each label once, such as 2x=output/scratch_2x")
        if not file.is_file():
            raise UserError(f"{word}: there is no {file}; name the folder of a run that has written metrics")
        files[label] = file
    return compare_curves(files, keys, out)
