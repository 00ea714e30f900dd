"""The fixtures of tests/conftest.py, and this project's package, for its own tests."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
sys.path[:0] = [str(PROJECT), str(ROOT / "tests")]


def load(path: Path, name: str) -> Any:
    """A Python file as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = load(ROOT / "tests/conftest.py", "shared_fixtures")
coco_factory, datasets_root, toy_recipe = shared.coco_factory, shared.datasets_root, shared.toy_recipe
pytest_collection_modifyitems = shared.pytest_collection_modifyitems


@pytest.fixture
def lsj_net(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``lsj_net(KEY, VALUE, ..., name="run", flags=())`` runs train_net.py on 64 px squares; returns the run folder."""
    main = load(PROJECT / "train_net.py", "lsj_train_net").main
    replaced = ("INPUT.MIN_SIZE_TRAIN", "(800,)", "INPUT.MAX_SIZE_TRAIN", 1333, "INPUT.LSJ.SIZE", 64)  # the defaults

    def run(*overrides: Any, name: str = "run", flags: tuple[str, ...] = ()) -> Path:
        words = [*flags, *replaced, *overrides, "OUTPUT_DIR", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(toy_recipe), *map(str, words)])
        main()
        return tmp_path / name

    return run
