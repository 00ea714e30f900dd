"""Curves of several runs in one picture, from what a command line says."""

from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from scratch_det.errors import DataError, UserError
from scratch_det.visualization.curves import Series, compare_curves, read_series


def compare_runs(runs: Sequence[str], keys: Sequence[str], out: Path) -> Path:
    """Draw ``keys`` of the runs, each "LABEL=FOLDER", into ``out``. Raises UserError for what is no run, or no PNG."""
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; name it .png")
    found: dict[str, Series] = {}
    for word in runs:
        label, equals, folder = word.partition("=")
        if not (label and equals and folder) or label in found:
            raise UserError(f"{word}: expected LABEL=FOLDER, each label once, such as 2x=output/scratch_2x")
        metrics, config = (Path(folder) / name for name in ("metrics.json", "config.yaml"))
        for file in (metrics, config):
            if not file.is_file():
                raise UserError(f"{word}: there is no {file}; name the folder of a run that has written metrics")
        found[label] = read_series(metrics, _iterations(config))
    return compare_curves(found, keys, out)


def _iterations(config: Path) -> int:
    """SOLVER.MAX_ITER in the config.yaml of a run."""
    try:
        return int(CfgNode.load_cfg(config.read_text()).SOLVER.MAX_ITER)
    except Exception as error:  # whatever yaml and yacs make of a file that was edited
        raise DataError(f"{config} is not as the run wrote it ({str(error).splitlines()[0]}); restore it") from None
