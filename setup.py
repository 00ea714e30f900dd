"""Puts the recipes and what else commands name into wheels; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "configs",
    "projects",
    "studies",
    "docs/grid_35k.yaml",
    "docs/grid_bccd.yaml",
    "docs/grid_digits.yaml",
    "docs/slurm.sh",
    "results/models.csv",
)


class BuildWithRecipes(build_py):
    """A wheel has SHIPPED inside the package, a clone beside it: ``scratch_det.files.ROOT``."""

    def run(self) -> None:
        super().run()
        for path in () if self.editable_mode else SHIPPED:
            to = Path(self.build_lib, "scratch_det", path)
            to.parent.mkdir(parents=True, exist_ok=True)
            if Path(path).is_dir():
                shutil.copytree(path, to, ignore=shutil.ignore_patterns("tests", "__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(path, to)


setup(cmdclass={"build_py": BuildWithRecipes})
