"""The experiment list: complete for what there is, true to the recipes and to the paper's arithmetic."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_command

from scratch_det.command_line import EXIT_UNREAD
from scratch_det.config.load import flatten, load_config
from scratch_det.config.rules import check_config
from scratch_det.config.schedule import Schedule, kx_schedule
from scratch_det.errors import ConfigError
from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH
from scratch_det.study import digits, paper
from scratch_det.study.experiments import (
    Seen,
    experiments,
    find,
    jobs_of,
    of_place,
    samples_table,
    seen_before,
    seen_in_pretraining,
    seen_in_training,
)
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, TRAIN, Run

PAPER = paper.runs()
DETECTORS = [run for run in PAPER if run.kind not in (PRETRAIN, SEARCH)]
OWN_RECIPES = [run for run in DETECTORS if not run.changes and not run.found_by]
NO_DETECTORS = ("_base_", "Digits", "Pretraining", "Torchvision")
PAPER_RECIPES = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in NO_DETECTORS]
NAME = re.compile(
    r"(?P<init>scratch|pretrained)_(?P<cascade>cascade_)?(?P<model>(?P<kind>mask|faster|keypoint)_rcnn_(?P<body>R_\d+|"
    r"X_152_8x32d|VGG16)(_FPN)?)_(?P<length>\d+[xk])(_(?P<norm>gn|syncbn))?_?(?P<data>.*?)(?P<aug>_test_aug)?"
)
TRAIN_AUG = ((640, 672, 704, 736, 768, 800), "choice")
SMALL_DATA = ((512, 544, 576, 608, *TRAIN_AUG[0]), "choice")
SIZES = {"": ((800,), "choice"), "35k_old": ((800,), "choice"), "train_aug": TRAIN_AUG}  # by the name's end
SUBSETS = ("35k", "10k", "3.5k", "1k")


def keys(run: Run) -> dict[str, Any]:
    """What the recipe says, with the changes of the run."""
    return resolved(run.config, run.changes)


@cache
def resolved(recipe: Path, changes: tuple[str, ...]) -> dict[str, Any]:
    return flatten(load_config(ROOT / recipe, changes).cfg)


def kind_of(key: str) -> str:
    """Of a recipe's key: which choice of the paper's it belongs to."""
    if key in ("MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.STRIDE_IN_1X1"):
        return "init"
    if key in ("MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "MODEL.RPN.POST_NMS_TOPK_TRAIN"):
        return "head"
    section = key.split(".")[0]
    return (
        "test"
        if key.startswith("TEST.AUG")
        else {"MODEL": "model", "SOLVER": "solver", "TEST": "solver"}.get(section, "data")
    )


def differing(one: Run, other: Run) -> set[str]:
    """The kinds of keys in which two runs differ."""
    ours, theirs = keys(one), keys(other)
    return {kind_of(key) for key in ours if ours[key] != theirs[key]}


def test_every_recipe_of_the_paper_is_listed_once() -> None:
    trained = [run.config for run in OWN_RECIPES]
    assert set(trained) == {run.config for run in DETECTORS}
    assert sorted(trained) == sorted(path.relative_to(ROOT) for path in PAPER_RECIPES)
    assert len({run.name for run in experiments()}) == len(experiments())


@pytest.mark.parametrize("run", DETECTORS, ids=lambda run: run.name)
class TestRun:
    def test_can_train(self, run: Run) -> None:
        cfg = load_config(ROOT / run.config, run.changes).cfg
        assert check_config(cfg, 8) == []
        assert bool(cfg.MODEL.WEIGHTS) == (run.init == PRETRAINED)
        solver = Schedule(cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS))
        assert run.evaluates or run.iterations == solver.max_iter
        assert solver == run.schedule
        assert not run.k or solver == kx_schedule(run.k)

    def test_agrees_with_its_name(self, run: Run) -> None:
        match, found = NAME.fullmatch(run.name), keys(run)
        assert match, run.name
        body, norm, on_voc = match["body"], match["norm"], run.folder == "PascalVOC-Detection"
        end = match["data"].removesuffix("_searched")
        heads = {"mask": ("ROI_BOX_HEAD", "ROI_MASK_HEAD"), "faster": ("ROI_BOX_HEAD",), "keypoint": ()}
        parts = ("RESNETS", "FPN", *heads[match["kind"]])
        if norm:
            assert body.startswith(
                f"{'X' if found['MODEL.RESNETS.NUM_GROUPS'] > 1 else 'R'}_{found['MODEL.RESNETS.DEPTH']}"
            )
            assert {found[f"MODEL.{part}.NORM"].lower() for part in parts} == {norm}
        else:
            assert found["MODEL.BACKBONE.NAME"] == "build_vgg16_backbone"
        assert (found["MODEL.MASK_ON"], found["MODEL.KEYPOINT_ON"]) == (
            match["kind"] == "mask", match["kind"] == "keypoint"
        )  # fmt: skip
        assert (found["MODEL.ROI_HEADS.NAME"] == "CascadeROIHeads") == bool(match["cascade"])
        assert found["TEST.AUG.ENABLED"] == bool(match["aug"])
        if run.init == PRETRAINED:
            weights = {
                "R_50": "resnet50" if norm == "syncbn" else "R-50",
                "R_101": "R-101",
                "VGG16": "vgg16",
                "X_152_8x32d": "imagenet_X_152_8x32d_gn",
            }
            assert weights[body] in found["MODEL.WEIGHTS"]
        assert found["MODEL.RESNETS.STRIDE_IN_1X1"] == (not norm)  # VGG-16 has no such key of its own
        if match["kind"] == "keypoint" or on_voc:
            data = ("voc_2007_trainval", "voc_2012_train") if on_voc else ("keypoints_coco_2017_train",)
            sizes = TRAIN_AUG
        else:
            subset = end.removesuffix("_old")
            data = (f"coco_2017_train_{subset}" if subset in SUBSETS else "coco_2017_train",)
            sizes = SIZES.get(end, SMALL_DATA)
        assert found["DATASETS.TRAIN"] == data
        assert (found["INPUT.MIN_SIZE_TRAIN"], found["INPUT.MIN_SIZE_TRAIN_SAMPLING"]) == sizes
        rates = (0.04, 0.02) if end in SUBSETS else (0.02, 0.1)
        assert (found["SOLVER.BASE_LR"], found["SOLVER.GAMMA"]) == rates

    def test_trunk(self, run: Run) -> None:
        if run.trunk and run.is_switch:
            trunk = find(run.trunk)
            assert differing(run, trunk) == {"head"}
            assert run.branch_at(trunk) == run.iterations - 270_000 == trunk.iterations - 270_000
        elif run.trunk:
            trunk = find(run.trunk)
            assert differing(run, trunk) == {"solver"}
            assert run.branch_at(trunk) == run.schedule.steps[0] < trunk.iterations

    def test_is_evaluated_with_its_own_model(self, run: Run) -> None:
        if run.evaluates:
            assert differing(run, find(run.evaluates)) == {"test"}
            assert keys(run)["TEST.AUG.ENABLED"]

    def test_header(self, run: Run) -> None:
        """Place, command, iterations and what the paper reports, as far as it does."""
        if run not in OWN_RECIPES and not run.evaluates:
            return
        text = (ROOT / run.config).read_text()
        header = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        assert f"--config-file {run.config}" in header
        assert f"OUTPUT_DIR output/{run.config.stem}" in header
        assert "/model_" not in header.replace("/checkpoints/model_", "")  # where a run leaves them
        assert run.evaluates or f"{run.iterations:,} iterations" in header
        assert all(str(value) in header for metric, value in run.expected.items() if metric.endswith("/AP"))


@pytest.mark.parametrize("place", sorted({place for run in PAPER for place in run.places}))
def test_two_recipes_of_a_place_differ_in_what_their_names_say(place: str) -> None:
    runs = [run for run in of_place(place) if run.kind not in (PRETRAIN, SEARCH) and not run.found_by]
    for one in runs:
        for other in runs:
            words, others = (NAME.fullmatch(run.name) for run in (one, other))
            same = {part: words[part] == others[part] for part in ("init", "model", "cascade", "aug", "length", "data")}
            own_init = same["init"] and (same["model"] or one.init == SCRATCH)
            own_rates = {words["data"], others["data"]} & {"35k", "10k", "3.5k", "1k"}
            unchanged = {"init": own_init, "model": same["model"], "head": same["cascade"], "test": same["aug"],
                         "data": same["data"],
                         "solver": same["length"] and (same["data"] or not own_rates)}  # fmt: skip
            assert differing(one, other) == {kind for kind, kept in unchanged.items() if not kept}, (
                one.name,
                other.name,
            )
            assert differing(one, other) or one is other


@pytest.mark.parametrize("run", [*digits.runs(), *digits.smoke()], ids=lambda run: run.name)
def test_recipe_of_the_miniature(run: Run) -> None:
    """What the entry says is what the recipe does, and its header says how to run it."""
    text = (ROOT / run.config).read_text()
    loaded = load_config(ROOT / run.config, list(run.changes))
    cfg, waived = loaded.cfg, [word for flag, word in pairwise(run.flags) if flag == "--waive"]
    notices = check_config(cfg, run.processes or 1, waived=waived)
    assert len(waived) == len({notice.split(":")[0] for notice in notices if "--waive" in notice})
    assert run.points * cfg.SOLVER.MAX_ITER == run.iterations or run.kind == EVALUATE
    if run.k:
        assert Schedule(cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)) == kx_schedule(run.k, run.per_x)
    if run.kind == TRAIN:
        assert bool(cfg.MODEL.WEIGHTS) == bool(run.pretraining) == (run.init == PRETRAINED)
        assert not run.pretraining or run.pretraining in cfg.MODEL.WEIGHTS
    assert f"--config-file {run.config}" in text
    assert f"OUTPUT_DIR: output/{run.config.stem}" in text or run.kind == PRETRAIN


def test_a_search_serves_those_who_use_what_it_finds() -> None:
    for run in experiments():
        if run.found_by:
            assert str(run.config) in find(run.found_by).apply_to


def test_the_miniature_mirrors_the_paper() -> None:
    """Each table and figure of trainings that it has differs from the paper's in folder, model and 1x alone."""
    for place, norm in (("table1", "gn"), ("figure4", "syncbn")):
        own = [run for run in of_place(f"digits/{place}") if run.seed is None]
        theirs = [run for run in of_place(place) if "R_101" not in run.name]
        assert [(run.init, run.k, run.iterations // run.per_x) for run in own] == [
            (run.init, run.k, run.iterations // run.per_x) for run in theirs
        ]
        assert all(run.name.endswith(norm) for run in own)
    assert {run.seed for run in of_place("digits/table1")} == {None, *digits.SEEDS}
    assert len(digits.runs()) >= 36


def test_table1_costs_43_percent() -> None:
    """Five schedules of four models: 780k iterations off one trunk instead of 1.8M, each."""
    runs = of_place("table1")
    assert len(runs) == 20
    assert sum(run.iterations for run in runs) == 7_200_000
    assert sum(job.iterations for job in jobs_of(runs)) == 3_120_000
    assert [run.expected["bbox/AP"] for run in runs] == [
        *(41.3, 40.7, 40.6, 39.5, 36.8, 41.1, 40.9, 40.9, 40.8, 40.3),  # R50 from scratch and pre-trained, 6x to 2x
        *(42.7, 42.2, 41.8, 41.0, 38.2, 42.2, 41.9, 42.3, 42.3, 41.8),  # R101
    ]
    assert {job.name: job.start for job in jobs_of(runs)}["scratch_mask_rcnn_R_50_FPN_3x_gn"] == 210_000


def test_table2_has_all_metrics() -> None:
    runs = of_place("table2")
    assert len(runs) == 4
    assert all(tuple(run.expected) == paper.METRICS for run in runs)


def test_everything_of_the_paper_is_covered() -> None:
    """Figure 2 is counted by ``samples``."""
    figures = {f"figure{number}" for number in range(1, 9)} - {"figure2"}
    places = {place for run in PAPER for place in run.places}
    assert places == {"table1", "table2", "table3", *figures, "3.5k", "1k", "vgg", "voc"}
    reported = [run.expected for run in of_place("table3")]
    assert [one["bbox/AP"] for one in reported if "bbox/AP" in one] == [45.0, 46.4, 48.6]
    assert [one["bbox_TTA/AP"] for one in reported if "bbox_TTA/AP" in one] == [50.9, 50.3]


class TestSamples:
    def test_figure_2(self, datasets_root: Path) -> None:
        """Fewer images and instances from scratch, and as many pixels; COCO itself is not needed."""
        (pretrained, _), (scratch, source) = (
            seen_in_training(load_config(ROOT / find(f"{name}_gn").config).cfg)
            for name in ("pretrained_mask_rcnn_R_50_FPN_2x", "scratch_mask_rcnn_R_50_FPN_6x")
        )
        pretrained = Seen(*map(sum, zip(pretrained, seen_in_pretraining(), strict=True)))
        assert source.startswith("train2017's")
        assert (pretrained.images, scratch.images) == (128_116_700 + 2_880_000, 8_640_000)
        assert pretrained.instances == pytest.approx(149e6, rel=0.01)
        assert scratch.instances == pytest.approx(62.8e6, rel=0.01)
        assert pretrained.pixels == pytest.approx(9.5e12, rel=0.01)
        assert scratch.pixels == pytest.approx(9.2e12, rel=0.01)

    def test_a_data_set_at_hand_is_counted(self, toy_recipe: Path) -> None:
        cfg = load_config(toy_recipe).cfg
        seen, source = seen_in_training(cfg)
        assert (seen.images, seen.instances) == (4, 4 * 6 / 4)  # four images, the last one without its two objects
        assert seen.pixels == 4 * 64 * 96
        assert source == "toy_train's"

    @pytest.mark.parametrize(
        ("weights", "row"),
        [
            ("", ["tuned", "4", "6", "24.6 k"]),
            ("output/pretrain_digits_R_18_gn/backbone.pth",
             ["tuned + pretrain_digits_R_18_gn", "64 k", "64 k", "262 M"]),
            ("catalog://ImageNetPretrained/FAIR/R-50-GN",
             ["tuned + 100 epochs of ImageNet", "128 M", "128 M", "6.43 T"]),
            ("output/mine/backbone.pth", ["tuned + weights, not counted", "4", "6", "24.6 k"]),
        ],
    )  # fmt: skip
    def test_what_is_behind_weights(self, toy_recipe: Path, weights: str, row: list[str]) -> None:
        recipe = toy_recipe.with_name("tuned.yaml")
        recipe.write_text(f"_BASE_: {toy_recipe.name}\nMODEL: {{WEIGHTS: '{weights}'}}\n")
        assert re.split(r"\s{2,}", samples_table([str(recipe)]).splitlines()[-1])[:4] == row

    def test_weights_of_listed_recipes_are_known(self) -> None:
        tuned = [run for run in experiments() if run.init == PRETRAINED and run.kind == TRAIN]
        shown = {run.config: seen_before(load_config(ROOT / run.config).cfg.MODEL.WEIGHTS)[1] for run in tuned}
        assert shown == {run.config: run.pretraining or "100 epochs of ImageNet" for run in tuned}

    def test_pretraining_is_no_detector(self) -> None:
        recipe = ROOT / "configs/Pretraining/imagenet_R_50_gn.yaml"
        with pytest.raises(
            ConfigError, match=r"is a classifier's recipe, of scratch-det pretrain; expected a detector's"
        ):
            samples_table([str(recipe)])


class TestTool:
    def test_samples(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, toy_recipe: Path) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "samples", "--config-file", str(toy_recipe)])
        load_command("study").main()
        assert "1.50, toy_train's" in capsys.readouterr().out

    def test_list(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "list", "--experiment", "table1"])
        load_command("study").main()
        said = capsys.readouterr().out
        assert said.count("\n") == 22
        assert said.splitlines()[-1].split() == ["all", "20", "runs", "7,200,000", "3,120,000"]
        assert max(map(len, said.splitlines())) < 150

    def test_unknown(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "list", "--experiment", "tabel1"])
        with pytest.raises(SystemExit) as end:
            load_command("study").main()
        assert end.value.code == 2
        assert "no experiment tabel1; did you mean 'table1'?" in capsys.readouterr().err

    def test_figure2_is_counted(self, study_tool: Callable) -> None:
        code, said = study_tool("plan", "figure2")
        assert code == 2
        assert "no experiment figure2; scratch-det study samples counts it" in said

    def test_into_head(self) -> None:
        piped = f"set -o pipefail; {sys.executable} tools/study.py list | true"
        done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (EXIT_UNREAD, "")

    def test_a_run_that_nobody_reads(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
        """It goes on, and its exit code is that of its runs."""
        tool = load_command("study")
        reading, writing = os.pipe()
        os.close(reading)

        def run(**_: Any) -> int:
            print("started", flush=True)
            return 1

        monkeypatch.setattr("scratch_det.study.commands.run", run)
        monkeypatch.setattr("sys.argv", ["study.py", "run", "digits/smoke"])
        with suppress(BrokenPipeError), open(writing, "w") as closed, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", closed)
            with pytest.raises(SystemExit, match="1"):
                tool.main()
        assert capfd.readouterr().err == ""

    def test_does_not_import_torch(self) -> None:
        code = (
            "import sys, runpy; sys.argv = ['study.py', 'list']; runpy.run_path('tools/study.py', run_name='__main__');"
        )
        code += "assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
