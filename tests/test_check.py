"""The check before a run: problems of data sets, images, recipe and machine, all told at once."""

import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, load_tool
from PIL import Image

from scratch_det import backends
from scratch_det.config import LoadedConfig, get_cfg, load_config
from scratch_det.config.schedule import learning_rate_line
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, inspect_coco, read_coco
from scratch_det.data.image_check import cache_folder, scan_images
from scratch_det.engine import check as machine
from scratch_det.engine import run_dir
from scratch_det.engine.check import check, check_model
from scratch_det.engine.datasets import coco_conflicts, shared_images
from scratch_det.engine.plan import Request, Section
from scratch_det.errors import DataError

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_6x_gn.yaml"


def read(name: str = "toy_train") -> CocoDataset:
    return read_coco(lookup(name), need_masks=True)


def found(name: str = "toy_train", need_masks: bool = True) -> list[tuple[str, str]]:
    """Severity and text of every problem of a data set."""
    return [(one.severity, str(one)) for one in inspect_coco(lookup(name), need_masks)[1]]


class TestProblems:
    def test_none_in_a_sound_file(self, coco_factory):
        coco_factory()
        assert found() == []

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_none_in_coco(self, tiny_coco, datasets_root, split):
        fields = {"json": f"{tiny_coco}/annotations/instances_{split}2017.json", "images": f"{tiny_coco}/{split}2017"}
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump({"tiny": fields}))
        assert found("tiny") == []

    @pytest.mark.parametrize(
        ("change", "severity", "text"),
        [  # images are 96 x 64 px but for the second, 64 x 96
            (lambda a: a.update(bbox=[96, 1, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[1, 64.0, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[-5, 1, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[1, -9, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (
                lambda a: a.update(bbox=[90, 1, 7.5, 5]),
                "notice",
                "sticks out of its image by more than 1 pixel: id 101",
            ),
            (
                lambda a: a.update(bbox=[-1.5, 1, 9, 5]),
                "notice",
                "sticks out of its image by more than 1 pixel: id 101",
            ),
            (lambda a: a.update(bbox=[1, 2, float("nan"), 4]), "error", "[x, y, width, height] of numbers: id 101"),
            (lambda a: a.update(bbox=[1, 2, None, 4]), "error", "[x, y, width, height] of numbers: id 101"),
            (lambda a: a.update(segmentation=[[1, 1, 5, 5, 9, 9]]), "notice", "a polygon that encloses no area"),
            (lambda a: a.update(segmentation=[[1, 1, 5, 5, 1, 1]]), "notice", "a polygon that encloses no area"),
            (lambda a: a["segmentation"].append([2, 2, 2, 2, 2, 2]), "notice", "a polygon that encloses no area"),
            (lambda a: a.update(segmentation=[[1, 1, 5, "5", 9, 9]]), "error", "neither polygons of 3+ points nor RLE"),
            (lambda a: a.update(segmentation={"size": [64, 96], "counts": ["a"]}), "error", "nor RLE: id 101"),
            (lambda a: a.pop("area"), "notice", "area is missing or negative: id 101"),
            (lambda a: a.update(area=-1), "notice", "area is missing or negative: id 101"),
            (lambda a: a.pop("iscrowd"), "notice", "iscrowd is missing or neither 0 nor 1: id 101"),
            (lambda a: a.update(iscrowd=2), "notice", "iscrowd is missing or neither 0 nor 1: id 101"),
            (lambda a: a.update(id=[1]), "error", "image_id or category_id is no whole number: id [1]"),
            (lambda a: a.update(image_id="1"), "error", "image_id or category_id is no whole number: id 101"),
        ],
    )
    def test_one_annotation(self, coco_factory, change, severity, text):
        def damage(content):
            polygon = [[4, 6, 36, 6, 36, 38, 4, 38]]
            change_me = content["annotations"][0]
            change_me["segmentation"] = polygon
            change(change_me)

        coco_factory(change=damage)
        [(found_severity, message)] = found()
        assert found_severity == severity
        assert message.startswith("1 annotations ")
        assert text in message

    def test_small_polygons_are_no_problem(self, coco_factory):
        coco_factory(change=lambda c: c["annotations"][0].update(segmentation=[[4.5, 6, 5, 6, 5, 6.01]]))
        assert found() == []

    @pytest.mark.parametrize("bbox", [[-1, -1, 40, 40], [90, 1, 7, 5], [0, 0, 96, 64], [95.5, 63.5, 0.5, 0.5]], ids=str)
    def test_rounding_at_the_edge_is_no_problem(self, coco_factory, bbox):
        coco_factory(change=lambda c: c["annotations"][0].update(bbox=bbox))
        assert found() == []

    @pytest.mark.parametrize(
        ("section", "change", "text"),
        [
            ("images", {"id": "3"}, "1 images whose id is not a whole number: id 3"),
            ("images", {"id": 3.5}, "1 images whose id is not a whole number: id 3.5"),
            ("images", {"width": 0}, "1 images whose width or height is not a whole number"),
            ("images", {"file_name": 3}, "whose file_name is no text: id 3"),
            ("categories", {"id": [3]}, "1 categories whose id is not a whole number: id [3]"),
        ],
    )
    def test_entries_that_no_annotation_names(self, coco_factory, section, change, text):
        path = coco_factory(category_ids=(2, 5, 9))
        content = json.loads(path.read_text())
        extra = {"id": 3, "file_name": "1.jpg", "width": 96, "height": 64, "name": "extra"}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 3]
        content["images"] = [one for one in content["images"] if one["id"] != 3]
        content[section].append({**extra, **change})
        path.write_text(json.dumps(content))
        [(severity, message)] = found()
        assert severity == "error"
        assert text in message

    def test_every_kind_is_found_at_once(self, coco_factory):
        def damage(content):
            first, second, _crowd, *others = content["annotations"]
            first.update(image_id=77)
            second.update(category_id=4, bbox=[1, 2, 0, 9])
            others[0].pop("area")
            others[1].pop("segmentation")
            content["images"][3]["file_name"] = "absent.jpg"
            content["annotations"].append(dict(others[2]))

        path = coco_factory(change=damage)
        texts = [text for _, text in found()]
        assert [re.sub(r": id .*", "", text) for text in texts] == [
            "1 duplicate annotation ids",
            "1 annotations with an unknown image_id",
            "1 annotations with an unknown category_id",
            "1 annotations with a box of no width or height",
            "1 annotations whose segmentation is neither polygons of 3+ points nor RLE",
            "1 annotations whose area is missing or negative",
            f"1 images that are not in {path.parent / 'images'}",
        ]
        with pytest.raises(DataError) as caught:
            read()
        message = str(caught.value).splitlines()
        assert len(message) == 6
        assert message[0] == f"{path}: 6 kinds of problems"
        assert message[-1] == "  and 2 more kinds, which tools/check.py lists"

    def test_a_broken_entry_is_reported_once(self, coco_factory):
        coco_factory(change=lambda c: (c["images"][0].pop("width"), c["annotations"].append("nonsense")))
        assert [text for _, text in found()] == [
            "1 images without id, file_name, width or height: id 1",
            "1 annotations without id, image_id, category_id or bbox: id (entry 7)",
        ]

    def test_notices_do_not_refuse(self, coco_factory):
        coco_factory(change=lambda c: [one.pop("area") for one in c["annotations"]])
        data = read()
        [notice] = data.notices
        assert (notice.severity, notice.count, len(notice.first)) == ("notice", 7, 5)
        assert str(notice).endswith("105, ...")

    def test_without_masks_they_are_not_looked_at(self, coco_factory):
        coco_factory(change=lambda c: [one.update(segmentation="none") for one in c["annotations"]])
        assert found(need_masks=False) == []


class TestAgreement:
    def test_categories(self, coco_factory):
        coco_factory("a")
        coco_factory("b", change=lambda c: c["categories"].reverse())
        coco_factory(
            "c",
            change=lambda c: (
                c["categories"][0].update(name="other"),
                c["categories"].append({"id": 7, "name": "new"}),
            ),
        )
        recipe = LoadedConfig(get_cfg(), frozenset(), frozenset(), get_cfg())
        assert list(coco_conflicts(recipe, [read("a")], [read("b")])) == []
        [message] = coco_conflicts(recipe, [read("a")], [read("c")])
        assert "2 differ, id 2: other here, class2 there; id 7: new here, none there" in message

    def test_number_of_classes(self, coco_factory, tmp_path):
        coco_factory("a")
        (tmp_path / "recipe.yaml").write_text("SEED: 1\n")
        key = "MODEL.ROI_HEADS.NUM_CLASSES"
        for same in ([], [key, 3]):
            assert list(coco_conflicts(load_config(tmp_path / "recipe.yaml", same), [read("a")], [])) == []
        [message] = coco_conflicts(load_config(tmp_path / "recipe.yaml", [key, 4]), [read("a")], [])
        assert message.startswith(f"{key} is 4, but ")
        assert message.endswith("has 3 categories; leave the key out: the data decides")

    def test_images_that_are_trained_and_tested_on(self, coco_factory, datasets_root):
        coco_factory("a")
        coco_factory("b")
        fields = {"json": "b/annotations.json", "images": "b/../a/images"}
        catalog = datasets_root / "catalog.yaml"
        catalog.write_text(catalog.read_text() + yaml.safe_dump({"c": fields}))
        assert list(shared_images(read("a"), read("b"))) == []
        [problem] = shared_images(read("a"), read("c"))
        assert (problem.severity, problem.count) == ("notice", 4)


class TestScan:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return cache_folder()

    def counts(self) -> tuple[int, int, int]:
        scan = scan_images(read())
        return scan.read, scan.known, scan.num_faulty

    def test_only_new_and_changed_files_are_read_again(self, coco_factory):
        images = coco_factory().parent / "images"
        assert self.counts() == (4, 0, 0)
        assert self.counts() == (0, 4, 0)
        os.utime(images / "1.jpg", ns=(1, 1))
        assert self.counts() == (1, 3, 0)

    def test_a_corrected_json_is_checked_again(self, coco_factory):
        path = coco_factory()
        assert self.counts() == (4, 0, 0)
        content = json.loads(path.read_text())
        content["images"][3].update(width=50)
        path.write_text(json.dumps(content))
        assert self.counts() == (1, 3, 1)

    def test_faults_are_named_and_not_remembered(self, coco_factory):
        images = coco_factory().parent / "images"
        (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:400])
        (images / "2.jpg").write_text("no image")
        Image.new("RGB", (50, 30)).save(images / "3.jpg")
        for num_read in (4, 3):
            scan = scan_images(read())
            assert (scan.read, scan.num_faulty) == (num_read, 3)
            assert scan.first_faults[0].startswith(f"id 1, {images / '1.jpg'}: cannot be decoded")
            assert scan.first_faults[1].startswith(f"id 2, {images / '2.jpg'}: cannot be decoded")
            assert "3.jpg: image is 50 x 30 px, the json says 96 x 64" in scan.first_faults[2]

    def test_a_missing_file(self, coco_factory):
        path = coco_factory()
        data = read()
        (path.parent / "images" / "1.jpg").unlink()
        assert scan_images(data).first_faults == [f"id 1, {path.parent / 'images' / '1.jpg'}: image file is missing"]

    def test_turned_images_count_upright(self, coco_factory):
        path = coco_factory().parent / "images" / "1.jpg"
        tag = Image.Exif()
        tag[0x0112] = 6
        Image.new("RGB", (64, 96)).save(path, exif=tag)
        assert self.counts() == (4, 0, 0)

    @pytest.mark.parametrize("content", ["", "[1]", "{broken"])
    def test_a_damaged_note_is_written_anew(self, coco_factory, cache, content):
        coco_factory()
        self.counts()
        [note] = cache.iterdir()
        note.write_text(content)
        assert self.counts() == (4, 0, 0)
        assert self.counts() == (0, 4, 0)

    def test_without_a_place_for_notes_all_are_read(self, coco_factory, tmp_path):
        (tmp_path / "cache").write_text("a file in the way")
        coco_factory()
        assert self.counts() == self.counts() == (4, 0, 0)


class TestCurve:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ([], "0.00667 -> 0.02 over 500 it, 0.002 from 480,000, 0.0002 from 520,000, end 540,000 (73.7 epochs)"),
            (["SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", "()"], "0.02, end 540,000 (73.7 epochs)"),
            (
                ["SOLVER.WARMUP_METHOD", "constant", "SOLVER.STEPS", "(9000,)", "SOLVER.GAMMA", 0.5],
                "0.00667 for 500 it, then 0.02, 0.01 from 9,000, end 540,000 (73.7 epochs)",
            ),
        ],
    )
    def test_line(self, overrides, expected):
        assert learning_rate_line(load_config(R50, overrides).cfg, 117_266) == f"learning rate {expected}"


class TestMachine:
    def write(self, monkeypatch, tmp_path, limits: dict[str, str], available: int = 8) -> None:
        """A machine of ``available`` kB, this process in cgroup job/step; limits: cgroup -> bytes, 100 taken."""
        (tmp_path / "meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:  {available} kB\n")
        (tmp_path / "own").write_text("0::/job/step\n")
        for name, limit in limits.items():
            folder = tmp_path / "groups" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text("100\n")
            (folder / "memory.stat").write_text("anon 60\ninactive_file 40\n")
        for name, file in (("MEMINFO", "meminfo"), ("CGROUP", "own"), ("CGROUPS", "groups")):
            monkeypatch.setattr(machine, name, tmp_path / file)

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({}, 8192),
            ({"job/step": "max"}, 8192),
            ({"job": "1000", "job/step": "max"}, 940),
            ({"job": "1000", "job/step": "500"}, 440),
            ({"job": "100000"}, 8192),
        ],
        ids=str,
    )
    def test_the_tightest_limit_counts(self, monkeypatch, tmp_path, limits, expected):
        self.write(monkeypatch, tmp_path, limits)
        assert machine.available_memory() == expected

    def test_systems_that_do_not_tell(self, monkeypatch, tmp_path):
        for name in ("MEMINFO", "CGROUP", "CGROUPS", "SHARED"):
            monkeypatch.setattr(machine, name, tmp_path / "absent")
        assert machine.available_memory() is None
        assert machine.free_shared_memory() is None


class TestReport:
    @pytest.fixture
    def tool(self) -> Any:
        """tools/check.py as a module."""
        return load_tool("check")

    @pytest.fixture
    def run(self, tool, toy_recipe, tmp_path, monkeypatch, capsys):
        """``run(*arguments)``: exit code and standard output of tools/check.py on the toy recipe; writes nothing."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

        def run(*arguments: Any) -> SimpleNamespace:
            before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
            monkeypatch.setattr(sys, "argv", ["check.py", "--config-file", str(toy_recipe), *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                tool.main()
            assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
            streams = capsys.readouterr()
            return SimpleNamespace(code=caught.value.code, out=streams.out, err=streams.err)

        return run

    def errors(self, run, *arguments: Any) -> list[str]:
        done = run("--json", *arguments)
        content = json.loads(done.out)
        errors = [one["message"] for one in content["problems"] if one["severity"] == "error"]
        assert (done.code, content["ok"]) == ((2, False) if errors else (0, True))
        return errors

    def test_weights_are_compared_with_the_model(self, run, tmp_path):
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "bn.pth")
        keys = ("MODEL.WEIGHTS", tmp_path / "bn.pth")
        (error,) = self.errors(run, *keys)
        assert "40 without a place" in error
        assert "these are BN's" in error
        assert self.errors(run, *keys, "MODEL.RESNETS.NORM", "FrozenBN") == []
        done = run("MODEL.WEIGHTS", "https://example.org/x.pth")
        assert (done.code, "not fetched yet, so not compared" in done.out) == (0, True)

    def test_the_run_behind_a_branch_is_not_compared(self, run, tmp_path, toy_recipe):
        assert self.errors(run, "--branch-from", "nowhere.pth") == ["--branch-from nowhere.pth: no such file"]
        (tmp_path / "model.pth").touch()
        assert "compared at the start only" in run("--branch-from", tmp_path / "model.pth").out

    def test_ready(self, run, tmp_path):
        done = run("--images")
        assert done.code == 0
        names = re.findall(r"^(\w+) {2,}", done.out, re.MULTILINE)
        assert names == ["recipe", "batch", "output", "data", "schedule", "memory", "model", "disk", "images"]
        assert "toy_train: 4 images, 7 objects, 3 classes" in done.out
        assert "learning rate 0.01, end 2 (1.3 epochs)" in done.out
        assert "toy_val: 4 read now, 0 unchanged" in done.out
        assert f"{tmp_path / 'run'}/: config.yaml" in done.out
        assert done.out.splitlines()[-1] == "ready to train: nothing to fix"

    def test_json_alone_on_standard_output(self, run):
        content = json.loads(run("--json", "--images").out)
        values = {one["name"]: one["values"] for one in content["sections"]}
        assert content["ok"]
        assert content["problems"] == []
        assert values["data"]["toy_val"]["images"] == 4
        assert values["disk"]["checkpoint_bytes"] == 4 * (values["model"]["weights"] + values["model"]["trainable"])

    def test_everything_is_told_at_once(self, run, datasets_root, tmp_path):
        (datasets_root / "toy_val" / "annotations.json").unlink()
        (datasets_root / "toy_train" / "images" / "3.jpg").unlink()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}\n')
        overrides = ["SOLVER.BASE_LR", "-1.0", "MODEL.BACKBONE.FREEZE_AT", 2, "SEED", "one", "SOLVER.BASE_LRR", 1]
        errors = self.errors(run, "--num-gpus", 3, "--keep-last", -1, *overrides)
        expected = [
            "SEED is 'one'", "unknown key SOLVER.BASE_LRR", "SOLVER.BASE_LR is -1.0", "FREEZE_AT is 2",
            "3 processes cannot share evenly", "already holds a run; continue it with --resume", "--keep-last is -1",
            "1 images that are not in", "'toy_val' is not complete",
        ]  # fmt: skip
        assert len(errors) == len(expected)
        for part in expected:
            assert sum(part in message for message in errors) == 1

    def test_resume_allows_a_run_in_the_folder(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}\n')
        assert self.errors(run, "--resume") == []

    def test_a_recipe_that_is_not_there(self, run, tmp_path, toy_recipe):
        toy_recipe.unlink()
        assert self.errors(run, "SEED", 1) == [f"command line: {toy_recipe} does not exist"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["MODEL.WEIGHTS", "/nowhere/a.pth"], "file /nowhere/a.pth is missing"),
            (["INPUT.CROP.ENABLED", True], "INPUT.CROP.ENABLED is True"),
            (["MODEL.ROI_HEADS.NUM_CLASSES", 80], "NUM_CLASSES is 80, but"),
            (["--accumulate", 0], "--accumulate is 0"),
            (["--scale-to-batch", 4, "SOLVER.BASE_LR", "-1.0"], "SOLVER.BASE_LR is -1.0"),
            (["SOLVER.IMS_PER_BATCH", 4], "give --scale-to-batch 4"),
        ],
        ids=str,
    )
    def test_what_a_start_refuses(self, run, arguments, text):
        [message] = self.errors(run, *arguments)
        assert text in message

    def test_processes_that_make_no_sense(self, run):
        done = run("--num-gpus", -1)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: --num-gpus -1 ")

    def test_categories_and_damaged_images(self, run, datasets_root):
        val = datasets_root / "toy_val" / "annotations.json"
        content = json.loads(val.read_text())
        content["categories"][0]["name"] = "other"
        val.write_text(json.dumps(content))
        victim = datasets_root / "toy_train" / "images" / "2.jpg"
        victim.write_bytes(victim.read_bytes()[:400])
        mismatch, damaged = self.errors(run, "--images")
        assert "the same category ids and names" in mismatch
        assert damaged.startswith(f"toy_train: 1 images cannot be trained on:\n  id 2, {victim}: ")

    def test_no_objects_to_train_on(self, run, datasets_root):
        path = datasets_root / "toy_train" / "annotations.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
        [message] = self.errors(run)
        assert "no training image has an object" in message
        assert self.errors(run, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False) == []

    def test_a_full_disk(self, run, monkeypatch):
        monkeypatch.setattr(run_dir, "free_bytes", lambda folder: 1000)
        [message] = self.errors(run)
        assert "available are 0.0 MB" in message

    def test_small_memory_is_a_notice(self, toy_recipe, monkeypatch):
        monkeypatch.setattr(machine, "available_memory", lambda: 1000)
        monkeypatch.setattr(machine, "free_shared_memory", lambda: 1000)
        report = check(Request(str(toy_recipe), ["DATALOADER.NUM_WORKERS", 3]), num_gpus=2, say=lambda text: None)
        [section] = [one for one in report.sections if one.name == "memory"]
        assert [severity for severity, _ in section.problems] == ["notice", "notice"]
        assert report.ok
        batches, images, pixels, objects = 2 * 3 * machine.PREFETCHED, 1, 64 * 96, 6 / 3
        assert section.values["shared_bytes"] == batches * images * pixels * (3 + objects)

    def test_answers_without_torch_until_the_model_is_built(self, toy_recipe):
        code = (
            "import sys\nfrom scratch_det.engine.check import check\nfrom scratch_det.engine.plan import Request\n"
            "report = check(Request(sys.argv[1], ['MODEL.BACKBONE.FREEZE_AT', '2']), say=lambda text: None)\n"
            "print(report.ok, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, toy_recipe], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "False False\n", done.stderr


def test_the_size_is_that_of_the_model(toy_recipe):
    """Found without memory for the weights, and later models get theirs."""
    cfg = load_config(toy_recipe).cfg
    section = Section("model")
    check_model(section, "torchvision", cfg, num_gpus=1)
    size = SimpleNamespace(**section.values)
    model = backends.load("torchvision").build(cfg)
    assert size.parameters == size.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert size.weights == sum(tensor.numel() for tensor in model.state_dict().values())
    assert next(model.parameters()).device == torch.device("cpu")


NUM_IMAGES, NUM_OBJECTS, NUM_CLASSES = 118_287, 860_001, 80  # train2017's


def write_coco_sized(folder: Path) -> None:
    """A data set as large as COCO's train2017 on disk and in memory, with empty image files."""
    rng = np.random.default_rng(0)
    shapes = [json.dumps(one)[1:-1] for one in (polygon_annotation(rng) for _ in range(20_000))]
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    url = "http://images.cocodataset.org/train2017"
    common = {"width": 640, "height": 480, "license": 1, "date_captured": "2013-11-14 16:28:13"}
    names = {i: f"{i:012d}.jpg" for i in range(1, NUM_IMAGES + 1)}
    images = [{"id": i, "file_name": name, "coco_url": f"{url}/{name}", **common} for i, name in names.items()]
    for image in images:
        (folder / "images" / image["file_name"]).touch()
    categories = [{"id": i, "name": f"class{i}"} for i in range(1, NUM_CLASSES + 1)]
    with open(folder / "annotations.json", "w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for i in range(NUM_OBJECTS):
            ids = f'"id": {i}, "image_id": {draw.randint(1, NUM_IMAGES)}, "category_id": {draw.randint(1, NUM_CLASSES)}'
            file.write(f"{', ' if i else ''}{{{draw.choice(shapes)}, {ids}}}")
        file.write("]}")


def polygon_annotation(rng: np.random.Generator) -> dict[str, Any]:
    """An object in one polygon, of about 24 corners in the mean, inside 640 x 480 px."""
    corners = int(np.clip(rng.lognormal(2.9, 0.75), 4, 300))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(20, 90) * rng.uniform(0.7, 1, (corners, 1))
    points = (points + rng.uniform(100, 380, 2)).round(2)
    low, high = points.min(0), points.max(0)
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    return {"segmentation": [points.ravel().tolist()], "area": box[2] * box[3], "iscrowd": 0, "bbox": box}


@pytest.mark.slow
def test_a_data_set_of_cocos_size_fits_in_4_gb(datasets_root, tmp_path):
    """The whole check but for reading images; 20 s on one core when this was written."""
    write_coco_sized(datasets_root / "big")
    fields = {"json": "big/annotations.json", "images": "big/images"}
    (datasets_root / "catalog.yaml").write_text(yaml.safe_dump({"coco_2017_train": fields}))
    command = [sys.executable, ROOT / "tools/check.py", "--json", "--config-file", R50]
    overrides = ["DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "run"]
    done = subprocess.run([*map(str, command), *map(str, overrides)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    values = {one["name"]: one["values"] for one in json.loads(done.stdout)["sections"]}
    assert values["data"]["coco_2017_train"]["objects"] == NUM_OBJECTS
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4e9
