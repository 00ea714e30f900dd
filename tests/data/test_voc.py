"""PASCAL VOC: its tree becomes COCO jsons or is rejected as a whole, its AP is the devkit's, its recipes train."""

import errno
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from coco_truth import predictions_of
from conftest import ROOT, load_command
from PIL import Image
from run_folder import read
from toy_data import all_objects

from scratch_det.config.load import load_config
from scratch_det.data.catalog import BUILT_IN, VOC_AP, lookup
from scratch_det.data.coco import CocoDataset, inspect_coco, read_coco
from scratch_det.data.subsets import make_subsets
from scratch_det.data.voc import CLASSES, NAMES, PAPER_NAMES, make_voc
from scratch_det.errors import DataError
from scratch_det.evaluation.predictions import read_predictions
from scratch_det.evaluation.truth import load_truth
from scratch_det.evaluation.voc import evaluate_voc
from scratch_det.study.experiments import of_place

WIDTH, HEIGHT = 96, 64
RECIPES = ROOT / "configs/PascalVOC-Detection"
Objects = list[tuple[str, tuple[int, int, int, int], bool]]  # class, VOC's corners, difficult
TREES = {  # by folder: the images of a split, whose objects are below
    "VOC2007": {"trainval": ["000005", "000007"], "test": ["000001"]},
    "VOC2012": {"train": ["2008_000002", "2008_000003"], "val": ["2008_000007", "2008_000008"]},
}
OBJECTS: Objects = [("dog", (1, 1, 40, 30), False), ("person", (48, 21, WIDTH, HEIGHT), False)]


def write_image(folder: Path, name: str, objects: Objects) -> None:
    """One image of noise and its XML; a part with a class and a box of its own belongs to the last object."""
    pixels = np.random.default_rng(len(name)).integers(90, 150, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for place, (_, (left, top, right, bottom), _) in enumerate(objects):
        pixels[top - 1 : bottom, left - 1 : right] = (220, 40 * place, 40)
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
    found = "".join(
        f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>{int(difficult)}</difficult>"
        f"<bndbox><xmax>{box[2]}</xmax><xmin>{box[0]}</xmin><ymax>{box[3]}</ymax><ymin>{box[1]}</ymin></bndbox></object>"
        for label, box, difficult in objects
    )
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    text = f"<annotation>{size}{found}</annotation>".replace("</object></annotation>", f"{part}</annotation>")
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def write_split(folder: Path, split: str, images: dict[str, Objects]) -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    for name, objects in images.items():
        write_image(folder, name, objects)


@pytest.fixture
def voc(datasets_root: Path) -> Path:
    """The root of two small trees; each image has a dog and a person, the first of a split a difficult cat too."""
    for folder, splits in TREES.items():
        for split, names in splits.items():
            images = {name: [*OBJECTS] for name in names}
            images[names[0]].insert(1, ("cat", (10, 40, 30, 60), True))
            write_split(datasets_root / folder, split, images)
    return datasets_root


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``prepare(NAME, ..., "--force")`` runs scratch-det data voc."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["prepare_voc.py", *arguments])
        load_command("data_voc").main()

    return run


def written(root: Path) -> list[str]:
    """What stands in the trees beside the devkit's own."""
    return sorted(str(path.relative_to(root)) for path in root.glob("VOC*/*") if path.is_file())


def opened(name: str) -> CocoDataset:
    return read_coco(lookup(name), need_masks=False)


def edit(path: Path, tag: str, value: str) -> None:
    """Change the first ``tag`` of an XML file."""
    tree = ElementTree.parse(path)
    next(tree.iter(tag)).text = value
    tree.write(path)


class TestConversion:
    def test_what_is_written(self, voc: Path, prepare: Callable, capsys: pytest.CaptureFixture) -> None:
        prepare()
        assert "voc_2007_trainval: 2 images, 5 objects, 1 of them difficult; " in capsys.readouterr().out
        assert written(voc) == [f"{NAMES[name][0]}/instances_{NAMES[name][1]}.json" for name in PAPER_NAMES]
        data = opened("voc_2007_trainval")
        assert (data.classes, data.category_ids) == (list(CLASSES), list(range(1, 21)))
        assert [image["file_name"] for image in data.images] == ["000005.jpg", "000007.jpg"]
        dog, cat, person = data.objects(0)
        assert (dog["bbox"], person["bbox"]) == ([0, 0, 40, 30], [47, 20, 49, 44])
        assert (person["area"], CLASSES[cat["category_id"] - 1]) == (49 * 44, "cat")
        assert [(one["ignore"], one["iscrowd"]) for one in (dog, cat, person)] == [(0, 0), (1, 0), (0, 0)]
        assert [one.kind for one in inspect_coco(data.entry, False)[1]] == ["categories without an annotation"]

    def test_difficult_objects_are_not_trained_on(self, voc: Path, prepare: Callable) -> None:
        prepare("voc_2012_val")
        data = opened("voc_2012_val")
        assert [CLASSES[one["label"]] for one in data.training_objects(0)] == ["dog", "person"]

    def test_every_name_is_in_the_catalog(self, voc: Path, prepare: Callable) -> None:
        for folder, split in NAMES.values():
            write_split(voc / folder, split, {"1": [*OBJECTS]})
        prepare(*NAMES)
        for name, (folder, split) in NAMES.items():
            entry = lookup(name)
            assert entry.json_file == voc / folder / f"instances_{split}.json"
            assert entry.ap == ("voc_11point" if folder == "VOC2007" else "voc_area")
        assert {name for name in yaml.safe_load(BUILT_IN.read_text()) if name.startswith("voc_")} == set(NAMES)

    def test_a_whole_number_is_not_needed_nor_a_difficult(self, voc: Path, prepare: Callable) -> None:
        path = voc / "VOC2012/Annotations/2008_000007.xml"
        edit(path, "ymin", "5.5")
        path.write_text(path.read_text().replace("<difficult>0</difficult>", ""))
        prepare("voc_2012_val")
        dog = opened("voc_2012_val").objects(0)[0]
        assert (dog["bbox"], dog["ignore"]) == ([0, 4.5, 40, 25.5], 0)

    def test_other_content_is_replaced_by_force_alone(
        self, voc: Path, prepare: Callable, capsys: pytest.CaptureFixture
    ) -> None:
        prepare()
        before = {name: (voc / name).read_bytes() for name in written(voc)}
        prepare()
        edit(voc / "VOC2012/Annotations/2008_000007.xml", "xmax", "39")
        with pytest.raises(SystemExit, match="2"):
            prepare()
        assert "instances_val.json; remove it, or replace it with --force" in capsys.readouterr().err
        assert {name: (voc / name).read_bytes() for name in written(voc)} == before
        prepare("--force")
        assert opened("voc_2012_val").objects(0)[0]["bbox"] == [0, 0, 39, 30]

    def test_a_subset_keeps_its_ap(self, voc: Path, prepare: Callable) -> None:
        prepare("voc_2012_val")
        make_subsets("voc_2012_val", [1], keep_lost=True)
        assert lookup("voc_2012_val_1").ap == "voc_area"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


XML, JPEG, MAIN = "VOC2012/Annotations/2008_000008.xml", "VOC2012/JPEGImages/2008_000008.jpg", "VOC2012/ImageSets/Main/"
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no tree": (lambda root: remove(root / "VOC2012"), ["VOC2012 is not complete under", "DETECTRON2_DATASETS"]),
    "no folder": (lambda root: remove(root / "VOC2007/JPEGImages"), ["  missing ", "VOC2007/JPEGImages"]),
    "no split": (lambda root: remove(root / f"{MAIN}val.txt"), ["  missing ", "Main/val.txt"]),
    "no XML": (lambda root: remove(root / XML), ["1 images without a file in Annotations: id 2008_000008"]),
    "no image": (lambda root: remove(root / JPEG), ["1 images without a file in JPEGImages: id 2008_000008"]),
    "two faults": (
        lambda root: [remove(root / JPEG), edit(root / XML.replace("008.", "007."), "name", "dgo")],
        ["2 kinds of problems", "without a file in JPEGImages", "2008_000007 ('dgo'; did you mean 'dog'?)"],
    ),
    "broken XML": (lambda root: (root / XML).write_text("<annotation>"), ["broken XML files: id", "008.xml:1: no el"]),
    "binary XML": (lambda root: (root / XML).write_bytes(b"\xff\xd8"), ["broken XML files: id 2008_000008"]),
    "class": (lambda root: edit(root / XML, "name", "sheeps"), ["('sheeps'; did you mean 'sheep'?)"]),
    "size": (lambda root: edit(root / XML, "width", "97"), ["another size", "2008_000008 (96 x 64, not 97 x 64)"]),
    "no size": (lambda root: edit(root / XML, "width", "wide"), ["size/width: wide"]),
    "nan": (lambda root: edit(root / XML, "xmin", "nan"), ["object/bndbox/xmin: nan"]),
    "no area": (lambda root: edit(root / XML, "xmin", "41"), ["area: id 2008_000008 (dog from 41, 1 to 40, 30)"]),
    "no picture": (lambda root: (root / JPEG).write_text("<html>"), ["cannot be read: id 2008_000008 (cannot"]),
    "twice": (lambda root: (root / f"{MAIN}val.txt").write_text("2008_000007\n" * 2), ["2 ids, 1 different"]),
    "empty": (lambda root: (root / f"{MAIN}train.txt").write_text("\n"), ["train.txt: 0 ids"]),
}  # fmt: skip


class TestRejections:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_tree_that_is_not_complete(
        self, damage: str, voc: Path, prepare: Callable, capsys: pytest.CaptureFixture
    ) -> None:
        spoil, messages = DAMAGES[damage]
        spoil(voc)
        with pytest.raises(SystemExit, match="2"):
            prepare()
        said = capsys.readouterr().err
        assert all(message in said for message in [*messages, "complete the tree from VOC's archives"]), said
        assert written(voc) == []

    def test_unknown_name(self, voc: Path, prepare: Callable, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit, match="2"):
            prepare("voc_2012_val", "voc_2012_test")
        said = capsys.readouterr().err
        assert "no folder 'voc_2012_test', neither here nor in " in said
        assert "no set of VOC's of that name; did you mean 'voc_20" in said
        assert written(voc) == []

    def test_a_write_that_fails_leaves_nothing(self, voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match=r"No space left on device: '.*instances_val\.json'"):
            make_voc(["voc_2012_val"])
        assert written(voc) == []

    def test_a_missing_json_names_the_command(self, voc: Path) -> None:
        with pytest.raises(DataError, match=r"make it with: scratch-det data voc voc_2007_test"):
            lookup("voc_2007_test")

    @pytest.mark.parametrize(
        ("ap", "message"),
        [("voc_aera", "expected voc_area or voc_11point.*; did you mean 'voc_area'"), ([1], r"has ap \[1\]; expected")],
    )
    def test_unknown_ap(self, ap: Any, message: str, coco_factory: Callable) -> None:
        coco_factory(ap=ap)
        with pytest.raises(DataError, match=message):
            lookup("toy_train")

    def test_masks(self, voc: Path, prepare: Callable, train: Callable) -> None:
        prepare("voc_2012_val")
        with pytest.raises(
            DataError, match=r"annotations without a mask(?s:.)*train without masks \(MODEL.MASK_ON False\)"
        ):
            train("DATASETS.TRAIN", "('voc_2012_val',)", "DATASETS.TEST", "()")


class TestAp:
    def test_classes(self, voc: Path, prepare: Callable) -> None:
        prepare("voc_2012_val")
        data = opened("voc_2012_val")
        fields = "image_id", "category_id", "bbox"
        found = [{"score": 0.5} | {name: one[name] for name in fields} for one in all_objects(data)]
        truth = load_truth(data.entry.json_file)
        metrics = evaluate_voc(truth, predictions_of(found[:-1]), "voc_area")["bbox"]  # a person is missed
        assert (metrics["AP-dog"], metrics["AP50-person"], metrics["AP50"]) == pytest.approx((100, 50, 75))
        assert np.isnan([metrics["AP-sheep"], metrics["AP50-cat"]]).all()  # none there, and a difficult one
        with pytest.raises(DataError, match="image ids are not in the json"):
            evaluate_voc(truth, predictions_of([{**found[0], "image_id": 99}]), "voc_area")


@pytest.mark.detectron2
@pytest.mark.parametrize("ap", VOC_AP)
def test_equals_detectron2s_evaluator(ap: str, datasets_root: Path, tmp_path: Path) -> None:
    """Random objects and detections in the precision that detectron2 writes them in."""
    from detectron2.evaluation.pascal_voc_evaluation import voc_eval

    rng = np.random.default_rng(8)
    corners = lambda: (*(lt := rng.integers(1, 40, 2)), *(lt + rng.integers(8, 24, 2)))  # noqa: E731
    images: dict[str, Objects] = {
        f"{i:06d}": [(CLASSES[rng.integers(3)], tuple(map(int, corners())), rng.random() < 0.2) for _ in range(6)]
        for i in range(40)
    }
    write_split(datasets_root / "VOC2007", "test", images)
    make_voc(["voc_2007_test"])
    data = opened("voc_2007_test")
    results, lines = [], {name: [] for name in CLASSES[:3]}
    objects = [(number, one) for number, found in enumerate(images.values(), start=1) for one in found * 3]
    for score, place in enumerate(rng.permutation(len(objects)), start=1):
        number, (name, box, _) = objects[place]
        left, top, right, bottom = (np.add(box, rng.normal(0, 2, 4)).round(1)).tolist()
        bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        results.append(
            {"image_id": number, "category_id": CLASSES.index(name) + 1, "bbox": bbox, "score": score / 1000}
        )
        lines[name].append(f"{number - 1:06d} {score / 1000:.3f} {left} {top} {right} {bottom}")
    ours = evaluate_voc(load_truth(data.entry.json_file), predictions_of(results), ap)["bbox"]
    for name, found in lines.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(found))
        counted = sum(label == name and not difficult for image in images.values() for label, _, difficult in image)
        assert counted % 5  # else detectron2's 0.3, 0.6 and 0.7 are not 3, 6 and 7 of 10
        tree = datasets_root / "VOC2007"
        paths = str(tmp_path / "{}.txt"), str(tree / "Annotations/{}.xml"), str(tree / "ImageSets/Main/test.txt")
        theirs = [voc_eval(*paths, name, t / 100, ap == "voc_11point")[2] * 100 for t in range(50, 100, 5)]
        assert 20 < theirs[0] < 80
        assert (ours[f"AP50-{name}"], ours[f"AP-{name}"]) == pytest.approx((theirs[0], np.mean(theirs)))


class TestRecipes:
    @pytest.mark.parametrize("run", [run for run in of_place("voc") if not run.changes], ids=lambda run: run.name)
    def test_differ_in_initialisation_and_length_alone(self, run: Any) -> None:
        cfg = load_config(ROOT / run.config).cfg
        assert (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (run.length * 2 // 3, run.length * 8 // 9, run.length)
        for iteration in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER):
            assert iteration % cfg.TEST.EVAL_PERIOD == iteration % cfg.SOLVER.CHECKPOINT_PERIOD == 0
        init = "scratch" if run.init == "scratch" else "imagenet_R_101_gn"
        parts = "model/faster_rcnn_R_101_FPN_gn", "data/voc_train_aug", f"init/{init}", "solver/coco"
        text = (ROOT / run.config).read_text()
        assert yaml.safe_load(text)["_BASE_"] == [f"../_base_/{part}.yaml" for part in parts]
        assert f"{run.iterations:,} iterations" in text
        assert f"{run.expected['bbox/AP50']} mAP" in text

    def test_trains_and_evaluates(
        self, voc: Path, prepare: Callable, train_net: Callable, small_model: list[str], tmp_path: Path
    ) -> None:
        prepare()
        recipe = RECIPES / "scratch_faster_rcnn_R_101_FPN_144k_gn.yaml"
        small = ["INPUT.MIN_SIZE_TRAIN", "(48, 64)", "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", tmp_path / "run"]
        train_net("--config-file", recipe, *small_model, *small)
        found = read(tmp_path / "run", "result.json")["metrics"]["bbox"]
        predictions = read_predictions(tmp_path / "run/inference/coco_instances_results.json")
        expected = evaluate_voc(load_truth(lookup("voc_2012_val").json_file), predictions, "voc_area")["bbox"]
        assert "APs" not in found
        assert (found["AP"], found["AP50"], found["AP50-dog"]) == tuple(
            expected[key] for key in ("AP", "AP50", "AP50-dog")
        )
        assert found["AP50-sheep"] is None

    def test_masks_have_cocos_ap_beside_it(self, train: Callable, coco_factory: Callable, datasets_root: Path) -> None:
        coco_factory("both", ap="voc_area")
        found = read(train("DATASETS.TEST", "('both',)"), "result.json")["metrics"]
        assert "APs" not in found["bbox"]
        assert "APs" in found["segm"]
