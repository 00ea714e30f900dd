"""User errors: how a tool ends on one, and checks that raise the first or collect all."""

import errno
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from scratch_det import command_line
from scratch_det.command_line import UNREAD, exit_on_user_error
from scratch_det.errors import ConfigError, DataError, Report, quoted
from scratch_det.files import sha256_of

IN_A_WORKER = RuntimeError("a worker.\nOriginal Traceback (most recent call last):\n  File a\nKeyError: 3")
Capture = pytest.CaptureFixture


def fail(error: BaseException) -> None:
    raise error


class TestExit:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ConfigError("SEED is 'one'"), "error: SEED is 'one'\n"),
            (
                torch.OutOfMemoryError("CUDA out of memory.\nTried"),
                "error: no more memory (CUDA out of memory.); make batches or images smaller, see --scale-to-batch, or "
                "end other programs\n",
            ),
            (
                RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 TB"),
                "error: no more memory (DefaultCPUAllocator: can't allocate memory: 4 TB); make batches or images "
                "smaller, see --scale-to-batch, or end other programs\n",
            ),
            (
                PermissionError(errno.EACCES, "Permission denied", "a.json"),
                "error: a.json: Permission denied; change its permissions, or name another\n",
            ),
        ],
    )
    def test_one_message(self, error: Exception, message: str, capsys: Capture) -> None:
        for prints in (True, False):
            with pytest.raises(SystemExit, match="2"), exit_on_user_error(prints):
                fail(error)
            assert capsys.readouterr().err == (message if prints else "")

    @pytest.mark.parametrize("error", [KeyError("bug"), OSError(errno.EACCES, "no file is named"), BrokenPipeError(),
                                       RecursionError("too deep"), IN_A_WORKER])  # fmt: skip
    @pytest.mark.parametrize("prints", [True, False])
    def test_an_unexpected_error(
        self, error: Exception, prints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        """One message from any rank; a pipe to a worker that broke counts too, where standard output can be written."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(command_line, "TRACEBACK_FOLDERS", [tmp_path / "study", tmp_path / "no folder"])
        (tmp_path / "study").mkdir()
        with pytest.raises(SystemExit, match="70"), exit_on_user_error(prints):
            fail(error)
        said, written = capsys.readouterr().err, tmp_path / "study/traceback.txt"
        assert said.startswith(f"error: unexpected error: {type(error).__name__}:")
        assert f"this is a bug, or a file is damaged; the traceback is in {written}" in said
        assert "Traceback" not in said
        assert ("RuntimeError: KeyError: 3" in said) == ("worker" in str(error))
        assert len(said.splitlines()) == 2
        assert f"in fail\n    raise error\n{type(error).__name__}" in written.read_text()

    def test_where_and_at_which_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        """And on the screen for developers; without a run's folder the traceback goes into the current one."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(command_line, "TRACEBACK_FOLDERS", [])
        monkeypatch.setenv("SCRATCH_DET_TRACEBACK", "1")
        monkeypatch.setattr(hashlib, "file_digest", lambda *_: 1 / 0)
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(SystemExit, match="70"), exit_on_user_error():
            sha256_of(tmp_path / "a.json")
        said = capsys.readouterr().err
        assert re.search(rf"in sha256_of \(scratch_det/files.py:\d+\) at {tmp_path}/a.json: ZeroDivisionError: ", said)
        assert "Traceback" in said
        assert "ZeroDivisionError" in (tmp_path / "traceback.txt").read_text()

    def test_ctrl_c(self, capsys: Capture) -> None:
        with pytest.raises(SystemExit, match="130"), exit_on_user_error(interrupted="nothing is left"):
            fail(KeyboardInterrupt())
        assert capsys.readouterr().err == "nothing is left\n"

    def test_without_any_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a shell starts it with >&- 2>&-."""
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "stderr", None)
        with pytest.raises(SystemExit, match="2"), exit_on_user_error():
            fail(DataError(print("a line", flush=True)))

    @pytest.mark.parametrize(
        ("keywords", "code", "message"), [({}, 2, f"error: {UNREAD}\n"), ({"reading_only": True}, 141, "")]
    )
    def test_closed_output(
        self, keywords: dict, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        """What does nothing but read ends as a shell has it, without a word."""
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed)
            with pytest.raises(SystemExit, match=str(code)), exit_on_user_error(**keywords):
                print("a line")
        assert capsys.readouterr().err == message

    @pytest.mark.parametrize(
        ("redirection", "code"), [("| true", 3), (">/dev/full", 3), (">&-", 3), (">/dev/full 2>&1", 3)]
    )
    def test_a_run_goes_on_without_its_output(self, redirection: str, code: int, tmp_path: Path) -> None:
        """To its own exit code, and what it had to say of an error goes where that still can be read."""
        (tmp_path / "run.py").write_text(
            "import sys\nfrom scratch_det.command_line import exit_on_user_error\n"
            "with exit_on_user_error(is_run=True):\n"
            "    for _ in range(3):\n        print('x' * 9000, flush=True)\n        print('said', file=sys.stderr)\n"
            "    open('done', 'w').close()\nprint('more')\nsys.exit(3)\n"
        )
        piped = f"set -o pipefail; {sys.executable} run.py {redirection}"
        done = subprocess.run(["bash", "-c", piped], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
        assert done.returncode == code
        assert (tmp_path / "done").exists()
        assert done.stderr in (b"said\n" * 3, b"")


@pytest.mark.parametrize(
    ("command", "code"), [("prepare_digits.py --train 1 --val 1 --out", 2), ("study.py status --out", 141)]
)
def test_a_tool_whose_output_is_closed(command: str, code: int, tmp_path: Path) -> None:
    """A tool that makes something says so, one that only reads ends as a shell has it."""
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
    assert (ended.returncode, ended.stderr) == (code, f"error: {UNREAD}\n" if code == 2 else "")


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


def test_a_message_has_a_length_that_is_read() -> None:
    """The first ten lines and a count; a report that collects has all of them."""
    twelve, sixty = ("\n".join(f"KEY_{k} is 0" for k in range(count)) for count in (12, 60))
    assert str(ConfigError(twelve)) == twelve
    assert str(ConfigError(sixty)).split("\n") == [*sixty.split("\n")[:10], "and 50 more"]
    assert len(str(ConfigError("x" * 10**6))) < 1100
    with Report(strict=False).section("recipe") as section:
        section.attempt(fail, ConfigError(sixty))
    assert len(section.problems) == 60


@pytest.mark.parametrize("text", ["a", "a b", "('a', 1)", "it's", 'the "b"', "$HOME/a b", "a\\b", "`id`", "", "a;b"])
def test_a_quoted_word_is_one_word_of_a_shell(text: str) -> None:
    done = subprocess.run(["sh", "-c", f"printf %s {quoted(text)}"], capture_output=True, text=True, check=True)
    assert done.stdout == text
    assert quoted("('a',)") == """"('a',)\""""
