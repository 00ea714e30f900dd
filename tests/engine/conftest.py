"""Fixtures of the engine's tests.

``folder``   a run's checkpoints              ``warnings``  what the log said
``stopped``  a command ends with code 2     ``rejected``  so, before anything is written  ``failed``  so, while training
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_folder import contents

from scratch_det.log import logger

MOST_LINES = 6  # of a message


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


@pytest.fixture
def stopped(train_net, capsys):
    """``stopped(*arguments)``: the message with which the command line exits with code 2."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as caught:
            train_net(*arguments)
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert 1 <= len(message.splitlines()) <= MOST_LINES
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def rejected(stopped, toy_recipe, tmp_path, monkeypatch):
    """``rejected(*arguments)``: the message for ``--config-file toy_recipe *arguments``, which must leave no trace.

    Runs in ``tmp_path``, so that nothing may be left in the current folder either.
    """

    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> str:
        before = contents(tmp_path)
        message = stopped("--config-file", toy_recipe, "--backend", "torchvision", *arguments)
        assert contents(tmp_path) == before
        return message

    return run


@pytest.fixture
def failed(stopped, toy_recipe, tmp_path):
    """As ``rejected``, for what only the running training can see: the run folder says that it failed and why."""

    def run(*arguments) -> str:
        message = stopped("--config-file", toy_recipe, *arguments)
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == "failed"
        assert message.removeprefix("error: ").strip() in status["error"]
        assert not (tmp_path / "run" / "result.json").exists()
        assert not list((tmp_path / "run").rglob("*.partial"))
        return message

    return run
