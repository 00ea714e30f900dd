"""The run folder's lock; what else is in the folder is tested with the runs that write it."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError
from scratch_det.log import logger


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.create()
    with pytest.raises(UserError, match=f"^another process is training in OUTPUT_DIR {tmp_path}"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_a_file_system_without_locks_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logger, "warning", said.append)
    run_dir = RunDir(tmp_path)
    run_dir.lock()
    run_dir.create()
    assert said == [f"{tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}): start no second run in it"]
