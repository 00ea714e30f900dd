"""scratch-det data fix: a copy beside the json that reads without errors, its catalog entry, the next command."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import load_command
from PIL import Image

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.data.image import scan_images
from scratch_det.errors import EXIT_CODE


@pytest.fixture
def fix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``fix(*arguments)``: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fix_annotations.py", *arguments])
        try:
            load_command("data_fix").main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def via(c: dict) -> None:
    for one in c["annotations"]:
        x, y, w, h = one["bbox"]
        one.update(image_id=str(one["image_id"]), segmentation=[x, y, x + w, y, x + w, y + h, x, y + h])
    c["categories"] *= 2


def change_all(section: str, **values: Callable[[dict], Any]) -> Callable[[dict], None]:
    def change(c: dict) -> None:
        for one in c[section]:
            one.update({key: value(one) for key, value in values.items()})

    return change


CASES = {
    "backslash": change_all("images", file_name=lambda one: f"images\\{one['file_name']}"),
    "VIA": via,
    "bytes as text": lambda c: next(
        one["segmentation"].update(counts=str(one["segmentation"]["counts"].encode()))
        for one in c["annotations"]
        if isinstance(one["segmentation"], dict) and isinstance(one["segmentation"]["counts"], str)
    ),
    "iscrowd null": change_all("annotations", iscrowd=lambda one: None),
    "orphan": lambda c: c["annotations"][0].update(image_id=99),
    "two points": lambda c: c["annotations"][0].update(segmentation=[[4, 6, 36, 6, 36, 38], [1, 1, 5, 5]]),
    "empty object": lambda c: c["annotations"][0].update(bbox=[0, 0, 0, 0], area=0, segmentation=[], iscrowd=False),
    "class names twice": lambda c: c["categories"][1].update(name="class2"),
    "ids as text": lambda c: (change_all("images", id=lambda one: f"im{one['id']}")(c),
                              change_all("annotations", image_id=lambda one: f"im{one['image_id']}")(c)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_copy_can_be_trained_on(
    fix: Callable, coco_factory: Callable[..., Path], datasets_root: Path, case: str
) -> None:
    path = coco_factory("toy", change=CASES[case], drop_empty_boxes=True)
    before = path.read_bytes()
    code, said, error = fix("toy")
    assert (code, error) == (0, "")
    first, *_, last = said.splitlines()
    assert first.split()[0].isdecimal()
    assert "reads without errors\nnext, with your test set as DATASETS.TEST: scratch-det check --images" in said
    assert path.read_bytes() == before
    catalog = yaml.safe_load((datasets_root / "catalog.yaml").read_text())
    assert catalog["toy_fixed"] == {**catalog["toy"], "json": "toy/annotations_fixed.json"}
    words = ["DATASETS.TRAIN", "('toy_fixed',)", "DATASETS.TEST", "('toy_fixed',)", "OUTPUT_DIR"]
    assert shlex.split(last)[:5] == words
    data, problems = inspect_coco(lookup("toy_fixed"), need_masks=True)
    assert problems == []
    assert data
    assert scan_images(data).faults == []
    again = fix("toy_fixed")
    assert (again[0], "nothing is to be mended" in again[1]) == (0, True)
    assert not list(path.parent.glob("*_fixed_fixed*"))


def test_a_file_below_the_datasets_root(fix: Callable, coco_factory: Callable[..., Path], datasets_root: Path) -> None:
    path = coco_factory("toy", change=CASES["orphan"])
    code, said, _ = fix("toy/annotations.json", "--dry-run")
    assert (code, said.split()[1]) == (0, "annotations")
    code, _, error = fix("toy/annotation.json")
    assert (code, error) == (
        2,
        f"error: no file toy/annotation.json: tried {Path('toy/annotation.json').absolute()} and "
        f"{path.with_name('annotation.json')}\n",
    )


def test_the_flag_that_would_mend_is_named(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    coco_factory("toy", change=lambda c: c["annotations"][0].update(segmentation={"size": [4, 4], "counts": [16]}))
    code, said, error = fix("toy")
    assert (code, said.splitlines()[1]) == (
        2, "  with --boxes-as-masks: 1 annotations without a mask that can be read: their box made the mask",
    )  # fmt: skip
    assert "1 annotations whose RLE does not fit" in error
    code, said, _ = fix("toy", "--boxes-as-masks")
    assert (code, said[:2]) == (0, "1 ")


def test_a_json_without_annotations(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    """As of COCO's test-dev: the copy has none either."""
    path = coco_factory("toy", change=lambda c: (CASES["backslash"](c), c.pop("annotations")))
    code, said, error = fix("toy")
    assert (code, error, said.split()[1]) == (0, "", "images")
    assert "annotations" not in json.loads(path.with_name("annotations_fixed.json").read_bytes())


def test_exif(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    """A size as stored is settled on request only."""
    path = coco_factory("toy", size=(96, 96))
    file = path.parent / "images/1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(file, exif=exif)
    content = json.loads(path.read_bytes())
    content["images"][0]["height"] = 64
    content["annotations"] = [{**content["annotations"][-1], "id": 1, "image_id": 1, "bbox": [10, 20, 30, 40],
                               "segmentation": [[10, 20, 40, 20, 40, 60, 10, 60]]}]  # fmt: skip
    path.write_text(json.dumps(content))
    assert "nothing is to be mended" in fix("toy")[1]
    for drawn, box in (("turned", [10, 20, 30, 40]), ("stored", [4, 10, 40, 30])):
        code, said, _ = fix("toy", "--exif", drawn, "--force")
        assert (code, said.splitlines()[0].split()[0]) == (0, "1")
        fixed = json.loads(path.with_name("annotations_fixed.json").read_bytes())
        assert (fixed["images"][0]["width"], fixed["images"][0]["height"]) == (64, 96)
        assert fixed["annotations"][0]["bbox"] == box


def test_a_dry_run_writes_nothing(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    path = coco_factory("toy", change=via)
    files = sorted(path.parent.rglob("*"))
    code, said, _ = fix("toy", "--dry-run")
    assert (code, len(said.splitlines())) == (0, 3)
    assert sorted(path.parent.rglob("*")) == files


def test_a_copy_that_is_there_stays(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    path = coco_factory("toy", change=via)
    copy = path.with_name("annotations_fixed.json")
    copy.write_text("mine")
    code, _, error = fix("toy")
    assert (code, error) == (EXIT_CODE, f"error: {copy} exists; --force replaces it\n")
    assert copy.read_text() == "mine"
    assert fix("toy", "--force")[0] == 0
    assert json.loads(copy.read_bytes())["images"]


def test_another_json_of_that_name(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    path = coco_factory("toy", change=via)
    coco_factory("toy_fixed")
    code, _, error = fix("toy")
    assert code == EXIT_CODE
    assert "'toy_fixed' is {" in error
    assert not path.with_name("annotations_fixed.json").exists()


def test_what_is_left_is_listed(fix: Callable, coco_factory: Callable[..., Path]) -> None:
    coco_factory("toy", change=lambda c: (via(c), c["annotations"][0].update(category_id=77)))
    code, said, error = fix("toy")
    assert code == EXIT_CODE
    assert "written: " in said
    assert "1 annotations with an unknown category_id: id 101 (category_id 77)" in error
    assert "fix_annotations" not in error
    assert inspect_coco(lookup("toy_fixed"), need_masks=True)[0] is None


def test_a_file_that_no_catalog_has(fix: Callable, coco_factory: Callable[..., Path], datasets_root: Path) -> None:
    path = coco_factory("toy", change=lambda c: c["images"][0].update(file_name="x%2F1.JPG", url="\ud800", phash=2**70))
    assert fix(str(path), "--dry-run") == fix("toy", "--dry-run")
    catalog = datasets_root / "catalog.yaml"
    catalog.write_text("")
    code, said, _ = fix(str(path), "--images", str(path.parent / "images"))
    assert code == 0
    fixed = path.with_name("annotations_fixed.json")
    image = json.loads(fixed.read_bytes())["images"][0]
    assert (image["file_name"], image["url"], image["phash"]) == ("1.jpg", "\ud800", 2**70)
    _, echo, line, *_ = shlex.split(said.splitlines()[-1])
    assert echo == "echo"
    assert yaml.safe_load(line) == {"annotations_fixed": {"json": str(fixed), "images": str(path.parent / "images")}}
    again = fix(str(fixed), "--images", str(path.parent / "images"))[1]
    assert again.splitlines()[0] == f"{fixed}: nothing is to be mended without a flag; --help lists them"
    assert str({"json": str(fixed)})[1:-1].replace("'", '"') in again
    assert fix("toys")[0] == EXIT_CODE
    assert fix("digits_val", "--images", "x")[0] == EXIT_CODE
