"""User errors: how a tool ends on one, and checks that raise the first or collect all."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det.command_line import UNREAD, exit_on_user_error
from scratch_det.errors import ConfigError, DataError, Report
from scratch_det.log import ConsoleHandler


def fail(error: BaseException) -> None:
    raise error


class TestExit:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ConfigError("SEED is 'one'"), "error: SEED is 'one'\n"),
            (
                PermissionError(errno.EACCES, "Permission denied", "a.json"),
                "error: a.json: Permission denied; change its permissions, or name another\n",
            ),
        ],
    )
    def test_one_message(self, error: Exception, message: str, capsys: pytest.CaptureFixture) -> None:
        for prints in (True, False):
            with pytest.raises(SystemExit, match="2"), exit_on_user_error(prints):
                fail(error)
            assert capsys.readouterr().err == (message if prints else "")

    @pytest.mark.parametrize("error", [KeyError("bug"), OSError(errno.EACCES, "no file is named"), BrokenPipeError()])
    def test_other_errors_pass(self, error: Exception) -> None:
        """A pipe to a worker that broke too, as long as standard output can be written."""
        with pytest.raises(type(error)), exit_on_user_error(unread="not this"):
            fail(error)

    @pytest.mark.parametrize(
        ("keywords", "code", "message"),
        [
            ({}, "2", "error: standard output was closed before the command had finished; start it again\n"),
            ({"unread": "nobody reads this"}, "2", "error: nobody reads this\n"),
            ({"unread": "nobody reads this", "reading_only": True}, "0", ""),
        ],
    )
    def test_closed_output(
        self,
        keywords: dict,
        code: str,
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """Only what does nothing but read may call it a success."""
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed)
            with pytest.raises(SystemExit, match=code), exit_on_user_error(**keywords):
                print("a line")
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("command", "code"), [("prepare_digits.py --train 1 --val 1 --out", 2), ("study.py status --out", 0)]
)
def test_a_tool_whose_output_is_closed(command: str, code: int, tmp_path: Path) -> None:
    """A tool that makes something does not call that a success, one that only reads does."""
    tool, *flags = command.split()
    if tool == "study.py":
        begun = [sys.executable, ROOT / "tools/study.py", "plan", "digits/smoke", "--json", "--out", tmp_path / "made"]
        subprocess.run(begun, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        ended = subprocess.run(
            [sys.executable, ROOT / "tools" / tool, *flags, tmp_path / "made"],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=closed, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (code, f"error: {UNREAD}\n" if code else "")


def test_a_closed_pipe_is_no_error_of_the_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each line would print a traceback; other errors still do."""
    handler, record = ConsoleHandler(), logging.LogRecord("a", logging.INFO, "a.py", 1, "a line", None, None)
    reading, writing = os.pipe()
    os.close(reading)
    closed = open(writing, "w")  # noqa: SIM115 - closing it raises
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        handler.emit(record)
    with pytest.raises(BrokenPipeError):
        closed.close()
    assert capsys.readouterr().err == ""
    record.args = ("more",)
    handler.emit(record)
    assert "--- Logging error ---" in capsys.readouterr().err


def test_a_report_raises_or_collects() -> None:
    message = "SEED is 'one'\n  expected a number\nSOLVER.STEPS is 3"
    with pytest.raises(DataError, match="SEED"), Report().section("recipe") as section:
        section.attempt(fail, DataError(message))
    said = []
    report = Report(strict=False, say=said.append)
    with report.section("recipe") as section:
        assert section.attempt(fail, DataError(message)) is None
        assert section.attempt(fail, FileNotFoundError(errno.ENOENT, "No such file", "a.json")) is None
        section.attempt(fail, DataError("SOLVER.STEPS is 3"))  # known already
        section.problem("notice", "slow")
        assert section.attempt(max, 1, 2) == 2
        assert said == []
    assert said == report.sections == [section]
    assert report.messages("error") == [
        "SEED is 'one'\n  expected a number",
        "SOLVER.STEPS is 3",
        "a.json: No such file",
    ]
    assert (report.messages("notice"), report.ok) == (["slow"], False)
