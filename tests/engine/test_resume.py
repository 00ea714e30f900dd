"""Runs that go on: resumed, extended, branched, and what is rejected because it would alter their past."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from run_folder import NO_TEST, interrupted_after, is_same, lines, read, weights

from scratch_det.config.load import get_cfg, set_key
from scratch_det.engine import loop
from scratch_det.engine.changes import config_changes, environment_changes, first_other_rate
from scratch_det.engine.checkpointer import Checkpointer, read_checkpoint
from scratch_det.engine.plan import Request, make_plan
from scratch_det.engine.resume import find_origin, find_start
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation import inference

Train = Callable[..., Path]
TRUNK = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(4, 5)", "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)


class TestResume:
    @pytest.mark.parametrize(("sizes", "amp"), [("(64,)", False), ("(48, 64, 80)", False), ("(48, 64, 80)", True)])
    def test_continues_bit_for_bit(self, sizes: str, amp: bool, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "PERIOD", 1)
        keys = (
            "SOLVER.MAX_ITER",
            4,
            "SOLVER.CHECKPOINT_PERIOD",
            2,
            "SOLVER.STEPS",
            "(3,)",
            "INPUT.MIN_SIZE_TRAIN",
            sizes,
            "SOLVER.AMP.ENABLED",
            amp,
        )
        whole = train(*keys, name="whole")
        with interrupted_after(monkeypatch, 2):
            train(*keys, name="halves")
        halves = whole.parent / "halves"
        assert read(halves, "status.json")["state"] == "stopped"
        assert (halves / "checkpoints/last_checkpoint").read_text() == "model_0000001.pth"
        train(*keys, name="halves", resume=True)
        one, other = (read_checkpoint(folder / "checkpoints/model_final.pth") for folder in (whole, halves))
        for state, theirs in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
            assert state["momentum_buffer"].equal(theirs["momentum_buffer"])
        assert is_same(halves, whole)
        assert read(halves, "result.json")["metrics"] == read(whole, "result.json")["metrics"]
        assert "2 of 4 iterations are done, the learning rate continues at 0.01" in (halves / "log.txt").read_text()

    def test_a_run_that_died_in_its_last_evaluation(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(inference, "evaluate_predictions", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train()
        folder = train(resume=True)
        assert read(folder, "result.json")["iteration"] == 2
        assert [line["iteration"] for line in lines(folder)] == [1, 2]

    def test_a_finished_run_is_left_alone(self, train: Train, toy_recipe: Path, capsys: pytest.CaptureFixture) -> None:
        folder = train()
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        capsys.readouterr()
        train("SEED", -1, resume=True)
        assert "holds a finished run of 2 iterations; nothing to do" in capsys.readouterr().out
        plan = make_plan(Request(str(toy_recipe), ["SEED", "-1"], resume=True))  # of several processes rank 0 decides
        assert find_start(plan, Checkpointer(plan.run_dir.checkpoints), {}) == (True, None, 1)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_finished_run_that_another_process_has(self, train: Train) -> None:
        folder = train(*NO_TEST)
        with closing(RunDir(folder)) as other:
            other.lock()
            with pytest.raises(UserError, match=r"^another process is training in OUTPUT_DIR"):
                train(*NO_TEST, resume=True)

    def test_a_finished_run_is_no_other_run(self, train: Train) -> None:
        train(*NO_TEST)
        with pytest.raises(UserError, match=r"after 2 iterations:\n  SOLVER\.BASE_LR was 0\.01, now 0"):
            train(*NO_TEST, "SOLVER.BASE_LR", 0.5, resume=True)
        with pytest.raises(UserError, match=r"finished run of 2 iterations, SOLVER\.MAX_ITER is 3"):
            train(*NO_TEST, "SOLVER.MAX_ITER", 3, resume=True)

    def test_without_a_checkpoint_it_starts(self, train: Train, capsys: pytest.CaptureFixture) -> None:
        assert read(train(*NO_TEST, resume=True), "result.json")["iteration"] == 2
        assert "no run in" in capsys.readouterr().out

    def test_a_drawn_seed_is_kept(self, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = ("SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        with interrupted_after(monkeypatch, 1):
            train(*keys)
        drawn = RunDir(tmp_path / "run").read_config().SEED
        assert drawn >= 0
        folder = train(*keys, resume=True)
        assert drawn == RunDir(folder).read_config().SEED
        told = train("SEED", drawn, *NO_TEST, name="told")
        assert all(value.equal(weights(told)[key]) for key, value in weights(folder).items())

    def test_two_drawn_seeds_differ(self, train: Train) -> None:
        folders = [train("SEED", -1, "SOLVER.MAX_ITER", 1, *NO_TEST, name=name) for name in ("a", "b")]
        seeds = {RunDir(folder).read_config().SEED for folder in folders}
        assert len(seeds) == 2
        assert min(seeds) >= 0

    def test_the_window_of_metrics_goes_on(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        """A line is the median of its whole window, also when the run died within it, and comes once."""
        monkeypatch.setattr(loop, "PERIOD", 4)
        keys = ("SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 3, *NO_TEST)
        whole = train(*keys, name="whole")
        for steps in (5, 4):  # dies after 5 iterations and, having gone on from 3, after 7
            with interrupted_after(monkeypatch, steps):
                train(*keys, name="parts", resume=True)
        parts = train(*keys, name="parts", resume=True)
        assert [line["iteration"] for line in lines(parts)] == [3, 7, 9]
        assert is_same(parts, whole)

    @pytest.mark.parametrize("period", [2, 3])  # with and without a checkpoint that is due before
    def test_an_evaluation_that_failed_is_made_up(
        self, period: int, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", period)
        whole = train(*keys, name="whole")
        with monkeypatch.context() as patch:
            patch.setattr(inference, "evaluate_predictions", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(*keys, name="parts")
        assert (whole.parent / f"parts/checkpoints/model_{period - 1:07}.pth").is_file()
        assert is_same(train(*keys, name="parts", resume=True), whole)

    def test_a_damaged_last_checkpoint(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)
        whole = train(*keys, name="whole")
        with interrupted_after(monkeypatch, 5):
            train(*keys, name="parts")
        folder = whole.parent / "parts"
        last = folder / "checkpoints/model_0000003.pth"
        last.write_bytes(last.read_bytes()[:-1000])
        assert is_same(train(*keys, name="parts", resume=True), whole)
        log = (folder / "log.txt").read_text()
        assert f"checkpoint {last} is damaged" in log
        assert "resuming from" in log
        assert "2 of 6 iterations are done" in log

    @pytest.mark.parametrize(
        ("change", "effect"),
        [
            (("SOLVER.CHECKPOINT_PERIOD", 1), "SOLVER.CHECKPOINT_PERIOD was 2, now 1: checkpoints from now on"),
            (("SOLVER.MAX_ITER", 5), "SOLVER.MAX_ITER was 4, now 5: iterations still to come"),
            (("SOLVER.STEPS", "(3,)"), "SOLVER.STEPS was (), now (3,): iterations still to come"),
            (("DATALOADER.NUM_WORKERS", 1), "DATALOADER.NUM_WORKERS was 0, now 1: speed only"),
        ],
    )
    def test_a_change_of_what_is_to_come_is_reported(
        self, change: tuple, effect: str, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)
        with interrupted_after(monkeypatch, 3):
            train(*keys)
        folder = train(*keys, *change, resume=True)
        assert effect in (folder / "log.txt").read_text()

    @pytest.mark.parametrize(
        "change",
        [("SOLVER.BASE_LR", 0.02), ("SOLVER.STEPS", "(1,)"), ("SOLVER.WARMUP_ITERS", 2), ("SEED", 2),
         ("SOLVER.WEIGHT_DECAY", 0.1), ("INPUT.RANDOM_FLIP", "none"), ("MODEL.WEIGHTS", "other.pth")],
        ids=str,
    )  # fmt: skip
    def test_a_change_of_the_past_is_rejected(
        self, change: tuple, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)
        with interrupted_after(monkeypatch, 3):
            train(*keys)
        with pytest.raises(UserError, match=rf"like this after 2 iterations:\n  {change[0]} was .*now"):
            train(*keys, *change, resume=True)


class TestBranch:
    """A trunk of 6 iterations that drops after 4 and 5; its first 3 belong to schedules that drop from 3 on as well."""

    SHORT = ("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "(3, 4)", "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST)

    @pytest.fixture
    def trunk(self, train: Train) -> Path:
        return train(*TRUNK, name="trunk", keep_at=(3,), keep_last=1)

    def test_kept_and_branched_bit_for_bit(self, trunk: Path, train: Train, capsys: pytest.CaptureFixture) -> None:
        kept = trunk / "checkpoints/model_0000002.pth"
        assert {path.name for path in kept.parent.glob("*.pth")} == {
            "model_0000002.pth", "model_0000003.pth", "model_final.pth",
        }  # fmt: skip
        capsys.readouterr()
        branch = train(*self.SHORT, name="branch", branch_from=str(trunk / kept.name))  # as detectron2 has its folders
        assert "branching off" in capsys.readouterr().out
        assert is_same(branch, train(*self.SHORT, name="direct"))
        parent = read(branch, "parent.json")
        assert (parent["checkpoint"], parent["completed_iterations"]) == (str(kept.resolve()), 3)

    def test_the_parents_metrics_are_taken_over(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "PERIOD", 1)
        trunk = train(*TRUNK, name="trunk", keep_at=(3,))
        branch = train(*self.SHORT, name="branch", branch_from=str(trunk / "model_0000002.pth"))
        assert [line["iteration"] for line in lines(branch)] == [0, 1, 2, 3, 4]
        assert lines(branch)[:3] == lines(trunk)[:3]

    def test_a_drawn_seed_is_the_parents(self, train: Train) -> None:
        trunk = train(*TRUNK, "SEED", -1, name="trunk", keep_at=(3,))
        branch = train(*self.SHORT, "SEED", -1, name="branch", branch_from=str(trunk / "model_0000002.pth"))
        seeds = {RunDir(folder).read_config().SEED for folder in (trunk, branch)}
        assert len(seeds) == 1

    def test_beyond_the_shared_beginning(self, trunk: Path, train: Train) -> None:
        with pytest.raises(UserError, match=r"rate of iteration 3 would change(?s:.)*branch off after 3 iterations"):
            train(*self.SHORT, name="branch", branch_from=str(trunk / "model_0000003.pth"))
        assert not (trunk.parent / "branch").exists()

    def test_another_beginning(self, trunk: Path, train: Train) -> None:
        with pytest.raises(UserError, match=r"SOLVER\.WEIGHT_DECAY was 0.0001, now 0.1: completed iterations were"):
            train(*self.SHORT, "SOLVER.WEIGHT_DECAY", 0.1, name="branch", branch_from=str(trunk / "model_0000002.pth"))

    def test_other_data_under_the_same_name(self, trunk: Path, train: Train, datasets_root: Path) -> None:
        path = datasets_root / "toy_train/annotations.json"
        content = json.loads(path.read_text())
        emptied = content["annotations"][0]["image_id"]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != emptied]
        path.write_text(json.dumps(content))
        repaired = train(*self.SHORT, name="repaired", branch_from=str(trunk / "model_0000002.pth"))
        said, left = (repaired / "log.txt").read_text(), len(content["annotations"])
        assert f"the objects of toy_train was 7, now {left}: other annotations of the same images from now on" in said
        assert re.search(r"the used images of toy_train .* so other images come from now on", said)
        content["images"].reverse()
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"the json of toy_train .* other images from now on"):
            train(*self.SHORT, name="branch", branch_from=str(trunk / "model_0000002.pth"))

    def test_killed_before_its_first_checkpoint(
        self, trunk: Path, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = {"name": "branch", "branch_from": str(trunk / "model_0000002.pth")}
        with interrupted_after(monkeypatch, 0):
            train(*self.SHORT, **keys)
        assert is_same(train(*self.SHORT, name="branch", resume=True), train(*self.SHORT, name="direct"))

    def test_resume_of_a_branch_with_its_own_flags(self, trunk: Path, train: Train) -> None:
        keys = {"name": "branch", "branch_from": str(trunk / "model_0000002.pth"), "resume": True}
        branch = train(*self.SHORT, **keys)
        (branch / "result.json").unlink()
        train(*self.SHORT, **keys)
        (branch / "result.json").unlink()
        with pytest.raises(UserError, match="holds a run that branched from"):
            train(*self.SHORT, **{**keys, "branch_from": str(trunk / "model_0000003.pth")})

    def test_no_run_around_the_checkpoint(self, trunk: Path, train: Train, tmp_path: Path) -> None:
        shutil.copy(trunk / "checkpoints/model_0000002.pth", tmp_path / "lonely.pth")
        with pytest.raises(UserError, match="is no run folder"):
            train(*self.SHORT, name="branch", branch_from=str(tmp_path / "lonely.pth"))
        with pytest.raises(UserError, match="no such file"):
            train(*self.SHORT, name="branch", branch_from=str(tmp_path / "absent.pth"))

    @pytest.mark.parametrize("keep_at", [(0,), (7,), (-1, 3)])
    def test_kept_iterations_have_to_exist(self, keep_at: tuple[int, ...], train: Train) -> None:
        with pytest.raises(ConfigError, match=r"--keep-at is .* from 1 to SOLVER.MAX_ITER 6"):
            train(*TRUNK, keep_at=keep_at)


def paper(**changes: Any) -> Any:
    cfg = get_cfg()
    values = {"BASE_LR": 0.02, "MAX_ITER": 540_000, "STEPS": (480_000, 520_000), "WARMUP_ITERS": 500, **changes}
    for name, value in values.items():
        set_key(cfg, f"SOLVER.{name}", value)
    return cfg


class TestChanges:
    @pytest.mark.parametrize(
        ("change", "completed", "first"),
        [
            ({"MAX_ITER": 180_000, "STEPS": (120_000, 160_000)}, 120_000, None),
            ({"MAX_ITER": 180_000, "STEPS": (120_000, 160_000)}, 120_001, 120_000),
            ({"BASE_LR": 0.01}, 1, 0),
            ({"BASE_LR": 0.01}, 0, None),
            ({"WARMUP_ITERS": 1000}, 600, 1),
            ({"WARMUP_METHOD": "constant"}, 600, 1),
            ({"GAMMA": 0.5}, 480_000, None),
            ({"GAMMA": 0.5}, 480_001, 480_000),
        ],
    )
    def test_first_other_rate(self, change: dict[str, Any], completed: int, first: int | None) -> None:
        assert first_other_rate(paper(), paper(**change), completed) == first

    @pytest.mark.parametrize(
        ("change", "first"),
        [
            ({}, None),
            ({"MAX_ITER": 180_000}, 1),  # its length shapes every rate of a cosine
            ({"BASE_LR_END": 0.001}, 1),
            ({"LR_SCHEDULER_NAME": "WarmupMultiStepLR"}, 1),
            ({"GAMMA": 0.5}, None),
        ],
    )
    def test_a_cosine_has_no_beginning_to_share(self, change: dict[str, Any], first: int | None) -> None:
        cosine = {"LR_SCHEDULER_NAME": "WarmupCosineLR", "STEPS": ()}
        assert first_other_rate(paper(**cosine), paper(**{**cosine, **change}), 2000) == first

    def test_every_key_that_is_not_known_to_be_harmless_is_rejected(self) -> None:
        earlier, now = paper(), paper()
        set_key(now, "MODEL.RPN.NMS_THRESH", 0.5)
        set_key(now, "TEST.DETECTIONS_PER_IMAGE", 5)
        harmless, rejected = sorted(config_changes(earlier, now, 10), key=lambda change: change.rejected)
        assert (harmless.what, harmless.effect) == ("TEST.DETECTIONS_PER_IMAGE", "evaluations from now on")
        assert (rejected.what, rejected.earlier, rejected.now) == ("MODEL.RPN.NMS_THRESH", 0.7, 0.5)

    def test_without_a_project_its_keys_mean_something_too(self) -> None:
        without, now = paper(), paper()
        now.INPUT.AUGMENTATION = "resize"
        assert config_changes(without, now, 10) == config_changes(now, without, 10) == []
        now.INPUT.AUGMENTATION = "other"
        for changes in (config_changes(without, now, 10), config_changes(now, without, 10)):
            assert [(change.what, change.rejected) for change in changes] == [("INPUT.AUGMENTATION", True)]

    def test_only_the_key_that_changes_the_past_is_blamed(self) -> None:
        changes = config_changes(paper(), paper(MAX_ITER=180_000, STEPS=(120_000, 160_000), BASE_LR=0.01), 1000)
        assert {change.what: change.rejected for change in changes} == {
            "SOLVER.MAX_ITER": False, "SOLVER.STEPS": False, "SOLVER.BASE_LR": True,
        }  # fmt: skip

    def test_lists_and_tuples_are_the_same(self) -> None:
        earlier = paper()
        earlier.SOLVER.STEPS = [480_000, 520_000]
        assert config_changes(earlier, paper(), 10) == []
        earlier.INPUT.MIN_SIZE_TRAIN = 800  # a key that was a number
        (change,) = config_changes(earlier, paper(), 10)
        assert (change.earlier, change.now) == (800, paper().INPUT.MIN_SIZE_TRAIN)

    @pytest.mark.parametrize(("switch", "flag"), [(True, "--switch-from"), (False, "--branch-from")])
    def test_the_lost_parent_of_an_interrupted_start(self, switch: bool, flag: str, tmp_path: Path) -> None:
        lost, run_dir = tmp_path / "lost/model.pth", RunDir(tmp_path)
        run_dir.parent.write_text(json.dumps({"checkpoint": str(lost), "switch": switch}))
        with pytest.raises(UserError, match=f"{flag} {lost}: expected a checkpoint(.|\n)*no such file"):
            find_origin(run_dir, Checkpointer(run_dir.checkpoints), Request("recipe.yaml", [], resume=True))

    def test_environments(self) -> None:
        def environment(digest: str, **changes: Any) -> dict[str, Any]:
            data = {"a": {"json_sha256": digest}, "b": {"json_sha256": digest}}
            return {"datasets": data, "trained_on": ["a"], "backend": "torchvision", "processes": 1, "accumulate": 1,
                    "threads": 1, "packages": {"torch": "2.6"}, **changes}  # fmt: skip

        assert not list(environment_changes(environment("x"), environment("x")))
        changes = list(environment_changes(environment("x"), environment("y", processes=2, packages={"torch": "2.7"})))
        assert [(change.what, change.rejected) for change in changes] == [
            ("the json of a (sha256)", True), ("the json of b (sha256)", False),
            ("processes x accumulate", False), ("torch", False),
        ]  # fmt: skip
        folder = environment("x", datasets={"a": {"files_sha256": "x"}})
        (change,) = environment_changes(environment("x", datasets={"a": {"files_sha256": "y"}}), folder)
        assert (change.what, change.rejected) == ("the files of a (sha256)", True)
        repaired = [environment("", datasets={"a": {"json_sha256": json, "images_sha256": images, "objects": count}})
                    for json, images, count in (("x", "i", 7), ("y", "i", 6), ("y", "j", 6))]  # fmt: skip
        found = [[(change.what, change.earlier, change.rejected) for change in environment_changes(repaired[0], other)]
                 for other in repaired[1:]]  # fmt: skip
        assert found[0] == [("the json of a (sha256)", "x", False), ("the objects of a", 7, False)]
        assert [what for what, _, rejected in found[1] if rejected] == ["the json of a (sha256)",
                                                                       "the images of a (sha256)"]  # fmt: skip
        (change,) = environment_changes(environment("x"), environment("x", backend="detectron2"))
        assert change.rejected
