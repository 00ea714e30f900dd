"""Records in results folders, and those of run folders: states, damage, searches' choices and final weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from study.player import BRANCH, TRUNK, play, states

from scratch_det import reading
from scratch_det.errors import DataError
from scratch_det.study.commands import iterations_left
from scratch_det.study.experiments import find, jobs_of, of_place
from scratch_det.study.records import (
    BLOCKED,
    FAILED,
    FINISHED,
    WAITING,
    Record,
    collect,
    load,
    newest_metrics,
    read_curves,
    save,
    survey,
)
from scratch_det.study.study import Study

RUN, SEARCH = "scratch_mask_rcnn_R_18_FPN_6x_gn", "search_tenth"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    curves = {"bbox/AP": ((1080, 10.0), (2160, 30.0))}
    formula = "=HYPERLINK(1)"  # of a log's last words; a spreadsheet is to show it
    outcomes = [
        Record(find(RUN), "finished", 0, 2160, {"bbox/AP": 30.0}, curves, weights_sha256="ab12"),
        Record(find(SEARCH), "finished", 0, 4320, found="SOLVER.BASE_LR 0.04, INPUT.MIN_SIZE_TRAIN [64, 96]",
               error=formula),
    ]  # fmt: skip
    save(outcomes, tmp_path)
    assert load(tmp_path) == outcomes
    assert f",'{formula}," in (tmp_path / "runs.csv").read_text()
    return tmp_path


class TestDamage:
    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            ("curves.csv", "2160,30.0000", "2160,3O", "curves.csv:3: Expected `float`, got `str` - at `$.value`"),
            ("curves.csv", "2160,30.0000", "1.5,30", "curves.csv:3: Expected `int`, got `str` - at `$.iterations`"),
            ("curves.csv", "2160,30.0000", "2160", "curves.csv:3: Expected `float`, got `null` - at `$.value`"),
            ("curves.csv", ",value", ",worth", "curves.csv:1: there is no column value"),
            ("runs.csv", RUN, f"{RUN}x", f"runs.csv: there is no experiment {RUN}x; did you mean"),
            ("runs.csv", "finished,0,2160", "finished,,2160", "runs.csv:2: Expected `int`, got `str` - at `$.start`"),
            ("runs.csv", "finished,0,2160", "done,0,2160", "runs.csv:2: Invalid enum value 'done' - at `$.state`"),
            ("runs.csv", "30.0000", "30%", "runs.csv:2: Expected `float`, got `str` - at `$.bbox/AP`"),
            ("runs.csv", SEARCH, RUN, f"runs.csv: run {RUN} is listed twice"),
            ("runs.csv", "ab12,", "ab12,,", "runs.csv:2: expected 8 cells, as in line 1"),
            ("runs.csv", "run,state", '"run,state', "runs.csv:1: .*expected after"),
            ("runs.csv", "weights_sha256", "weights", "runs.csv:1: there is no column weights_sha256"),
        ],
    )
    def test_said_where(self, results: Path, file: str, old: str, new: str, message: str) -> None:
        text = (results / file).read_text()
        assert old in text
        (results / file).write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=message.replace("$", r"\$")):
            load(results)

    def test_missing(self, results: Path) -> None:
        (results / "runs.csv").unlink()
        with pytest.raises(DataError, match=r"runs.csv is missing; scratch-det study report"):
            load(results)


class TestRunFolders:
    def collected(self, out: Path, name: str) -> Record:
        (found,) = collect(survey(jobs_of(of_place(name))[-1:], out, {}), out)
        return found

    def test_what_a_search_found(self, tmp_path: Path) -> None:
        best = {"SOLVER.BASE_LR": "0.04", "INPUT.MIN_SIZE_TRAIN": "[64, 96]"}
        (tmp_path / SEARCH).mkdir()
        (tmp_path / SEARCH / "result.json").write_text(json.dumps({"seconds": 1.5, "best": best}))
        assert self.collected(tmp_path, SEARCH).found == "SOLVER.BASE_LR 0.04, INPUT.MIN_SIZE_TRAIN [64, 96]"

    def test_weights_of_a_finished_run(self, tmp_path: Path) -> None:
        folder = tmp_path / RUN
        folder.mkdir()
        assert self.collected(tmp_path, RUN).weights_sha256 == ""
        (folder / "result.json").write_text(json.dumps({"iteration": 2160, "weights_sha256": "ab12"}))
        assert self.collected(tmp_path, RUN).weights_sha256 == "ab12"

    def test_a_run_that_ended_early_is_finished(self, tmp_path: Path) -> None:
        (tmp_path / RUN).mkdir()
        words = "ended early: no higher bbox/AP in 3 evaluations"
        (tmp_path / RUN / "result.json").write_text(json.dumps({"iteration": 480, "ended_early": words}))
        found = self.collected(tmp_path, RUN)
        assert (found.state, found.iteration, found.error) == ("finished", 480, words)
        assert iterations_left([found]) == 0


class TestDamagedFolders:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("result.json", '{"iter', "result.json is damaged: Input data was truncated"),
            ("status.json", "[1]", "status.json is damaged: Expected `object`, got `array`"),
            ("status.json", '{"iter', "status.json is damaged: Input data was truncated"),
            ("status.json", '{"iteration": "abc"}', "Expected `int | null`, got `str` - at `$.iteration`"),
            ("status.json", '{"eta": "1:00:00"}', "Expected `float | null`, got `str` - at `$.eta`"),
            ("result.json", '{"iteration": [27]}', "Expected `int | null`, got `array` - at `$.iteration`"),
            ("result.json", '{"seconds": NaN}', "result.json is damaged: JSON is malformed"),
        ],
    )
    def test_it_counts_as_failed(self, study: Study, study_tool: Callable, name: str, text: str, message: str) -> None:
        """And keeps no other run from going on."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / name).write_text(text)
        code, said = study_tool("status", "--out", study.out)
        assert code == 0
        assert f"{TRUNK}  failed" in said
        assert message in said
        assert ("remove this file" if name == "status.json" else "move the folder away") in said

    def test_a_damaged_line_of_metrics(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "metrics.json"
        said: list[str] = []
        monkeypatch.setattr(reading.logger, "warning", said.append)
        good = '{"iteration": 8, "bbox/AP": 12.5}\n'
        for bad in ('{"bbox/AP": 13.5}\n', '{"iteration": "abc"}\n', "[8]\n", "[" * 9999 + "\n", "\0\n"):
            path.write_text(bad + good + '{"iter')
            assert read_curves(path, 27) == {"bbox/AP": ((9, 12.5),)}
        assert said == [f"{path}: 1 damaged lines are left out"] * 5

    def test_scores_are_read_again_after_a_change(self, tmp_path: Path) -> None:
        """Also where the clock of the file system is too coarse to tell the change."""
        path = tmp_path / "metrics.json"
        for text, value in (('{"iteration": 1, "bbox/AP": 1.5}\n', 1.5), ('{"iteration": 1, "bbox/AP": 10.5}\n', 10.5)):
            path.write_text(text)
            os.utime(path, ns=(1, 1))
            assert newest_metrics(tmp_path, {}) == {"bbox/AP": value}

    def test_a_damaged_status_of_a_finished_run(self, study: Study) -> None:
        assert play(study) == 0
        (study.out / TRUNK / "status.json").write_text("[1]")
        assert states(study) == {TRUNK: FINISHED, BRANCH: FINISHED}


class TestFailures:
    """What is read from jobs/NAME.exit and jobs/NAME.log."""

    def fail(self, study: Study, code: int, log: str, name: str = TRUNK) -> str:
        (study.out / f"jobs/{name}.exit").write_text(f"{code}\n")
        (study.out / f"jobs/{name}.log").write_text(log)
        return survey(study.jobs, study.out, {})[0].error

    def test_the_last_words_since_the_last_start(self, study: Study) -> None:
        log = "--- started 1: x\nerror: an earlier one\n--- started 2: x\nerror: this one\nsrun: error: task 0\n"
        assert self.fail(study, 2, log) == "exit code 2: this one"
        assert self.fail(study, 3, "--- started 1: error: in the command\n") == "exit code 3: it said nothing"
        assert self.fail(study, 1, "--- started 1: x\n1\nZeroDivisionError: division by zero\n") == (
            "exit code 1: ZeroDivisionError: division by zero"
        )
        assert self.fail(study, 2, "--- started 1: x\nerror: SEED is -2\nTraceback\n\n") == "exit code 2: SEED is -2"

    def test_signals(self, study: Study) -> None:
        """As Python says it, and as a shell does."""
        for code in (-9, 137):
            assert self.fail(study, code, "") == "ended by SIGKILL (out of memory?)"
        assert self.fail(study, -15, "whatever") == "ended by SIGTERM"

    def test_a_part_of_a_run(self, study: Study) -> None:
        assert self.fail(study, 1, "--- started 1: x\nerror: no data\n", f"{TRUNK}@12") == "exit code 1: no data"

    def test_of_a_point_before_its_searchs_choice(self, tmp_path: Path) -> None:
        """The choice fails for lack of the point."""
        (job,) = (job for job in jobs_of(of_place("digits/small_data")) if job.name == "search_third")
        for path in job.inputs(tmp_path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        jobs = tmp_path / "jobs"
        jobs.mkdir()
        for name, words in ((job.name, "wrote search.md"), (f"{job.name}.trial_a", "error: not finite")):
            (jobs / f"{name}.exit").write_text("1\n")
            (jobs / f"{name}.log").write_text(f"--- started 1: x\n{words}\n")
        (record,) = survey([job], tmp_path, {})
        assert (record.state, record.error) == (FAILED, "exit code 1: not finite")

    def test_a_branch_that_failed_waits_for_a_trunk_that_is_gone(self, study: Study) -> None:
        """It would only fail again."""
        trunk, branch = study.jobs
        self.fail(study, 1, "", BRANCH)
        assert states(study)[BRANCH] == WAITING
        for path in branch.inputs(study.out):
            path.parent.mkdir(parents=True)
            path.touch()
        assert states(study)[BRANCH] == FAILED
        (study.out / trunk.name / "result.json").write_text('{"iteration": 27}')
        for path in branch.inputs(study.out):
            path.unlink()
        assert states(study)[BRANCH] == BLOCKED
