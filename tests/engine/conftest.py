"""Fixtures of the engine's tests."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scratch_det.log import logger


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """``warnings()`` is what the project's log said in this test."""
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger.name)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)
