"""Subsets of a data set: nested, drawn by seed alone, with every class, and named in the catalog."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import load_command

from scratch_det.data import subsets
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.subsets import draw_order, make_subsets
from scratch_det.errors import DataError


@pytest.fixture
def source(coco_factory: Callable[..., Path]) -> Path:
    """``toy``: 30 images of three classes."""
    return coco_factory("toy", num_images=30)


def ids(path: Path) -> list[int]:
    return [image["id"] for image in json.loads(path.read_text())["images"]]


def test_each_lies_in_the_larger_ones(source: Path) -> None:
    large, middle, small = make_subsets("toy", [5, 20, 10])
    assert [subset.images for subset in (large, middle, small)] == [20, 10, 5]
    assert set(ids(small.json_file)) < set(ids(middle.json_file)) < set(ids(large.json_file))
    assert ids(large.json_file) == sorted(ids(large.json_file))  # the source's order
    (between,) = make_subsets("toy", [7])
    assert set(ids(small.json_file)) < set(ids(between.json_file)) < set(ids(middle.json_file))


def test_the_seed_alone_decides(source: Path, tmp_path: Path) -> None:
    (first,) = make_subsets("toy", [10])
    found = ids(first.json_file)
    content = json.loads(source.read_text())
    content["images"].reverse()
    source.write_text(json.dumps(content))
    (again,) = make_subsets("toy", [10])
    assert sorted(ids(again.json_file)) == found
    again.json_file.unlink()
    (other,) = make_subsets("toy", [10], seed=1)
    assert sorted(ids(other.json_file)) != found


def test_what_is_written(source: Path, datasets_root: Path) -> None:
    (subset,) = make_subsets("toy", [10])
    content = json.loads(subset.json_file.read_text())
    listed = "".join(f"{number}\n" for number in sorted(ids(subset.json_file)))
    digest = hashlib.sha256(listed.encode()).hexdigest()
    assert content["subset"] == {"source": "toy", "seed": 0, "images": 10, "ids_sha256": digest}
    assert content["categories"] == json.loads(source.read_text())["categories"]
    assert {a["image_id"] for a in content["annotations"]} <= set(ids(subset.json_file))
    assert str(subset) == (
        f"toy_10: 10 images, {len(content['annotations'])} objects, 3 classes, of seed 0; {subset.json_file} "
        f"(ids sha256 {digest[:12]})"
    )
    data = read_coco(lookup("toy_10"), need_masks=True)
    assert (len(data.images), data.entry.image_root) == (10, datasets_root / "toy/images")
    before = (datasets_root / "catalog.yaml").read_text()
    make_subsets("toy", [10])
    assert (datasets_root / "catalog.yaml").read_text() == before


def test_given_ids(source: Path, tmp_path: Path) -> None:
    """Of another annotation file the images that both have, of a list every image; ids are taken as they are."""
    (tmp_path / "other.json").write_text(json.dumps({"images": [{"id": number} for number in (99, 7, 3, 100)]}))
    (tmp_path / "list.txt").write_text("5\n4 5\n")
    files = {"other": tmp_path / "other.json", "mine": tmp_path / "list.txt"}
    made = make_subsets("toy", [10], keep_lost=True, ids_of=files)
    assert [(one.name, one.images) for one in made] == [("toy_10", 10), ("toy_other", 2), ("toy_mine", 2)]
    assert [ids(one.json_file) for one in made[1:]] == [[3, 7], [4, 5]]
    assert json.loads(made[1].json_file.read_text())["subset"]["ids"] == "other.json"
    for text, said in (
        ("5 99", "image 99, which toy does not have"),
        ("", "no image"),
        ("five", "image five, which toy does not have; expected a COCO json"),
        ("[5", "expected a COCO json or a list of image ids"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=said):
            make_subsets("toy", [], ids_of=files)


def test_35k_are_those_of_val2014(coco_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of train2017 that come from val2014, where its annotations are; else a random draw of that size."""
    source = coco_factory("coco_2017_train", num_images=30)
    monkeypatch.setattr(subsets, "VAL35K", "8")  # the label of this small draw
    (drawn,) = make_subsets("coco_2017_train", [8], keep_lost=True)
    assert drawn.images == 8
    assert "in the place of val35k: put COCO's instances_val2014.json beside its json" in str(drawn)
    drawn.json_file.unlink()
    source.with_name("instances_val2014.json").write_text(json.dumps({"images": [{"id": n} for n in range(21, 99)]}))
    (kept,) = make_subsets("coco_2017_train", [8], keep_lost=True)
    assert ids(kept.json_file) == list(range(21, 31))
    assert "of ids instances_val2014.json" in str(kept)


def test_a_run_trains_on_it(source: Path, train: Callable) -> None:
    make_subsets("toy", [10])
    folder = train("DATASETS.TRAIN", "('toy_10',)", "DATASETS.TEST", "()")
    assert json.loads((folder / "environment.json").read_text())["datasets"]["toy_10"]["images"] == 10
    assert json.loads((folder / "result.json").read_text())["iteration"] == 2


def test_a_lost_class_is_rejected_with_a_seed_that_keeps_it(source: Path) -> None:
    content = json.loads(source.read_text())
    content["categories"].append({"id": 99, "name": "rare"})
    content["annotations"][0]["category_id"] = 99
    source.write_text(json.dumps(content))
    rare = content["annotations"][0]["image_id"]
    seed = next(s for s in range(99) if rare - 1 not in draw_order(range(30), s)[:3])
    with pytest.raises(DataError, match=r"would lose \d classes: .*--seed (\d+) keeps all") as rejection:
        make_subsets("toy", [20, 3], seed=seed)
    assert not list(source.parent.glob("annotations_*"))
    better = int(str(rejection.value).split("--seed ")[1].split()[0])
    (kept,) = make_subsets("toy", [3], seed=better)
    assert (kept.classes, kept.lost) == (4, [])
    kept.json_file.unlink()
    assert make_subsets("toy", [20, 4], seed=seed, keep_lost=True)[1].images == 4


def test_thousands_are_k_in_a_name(source: Path) -> None:
    """Sizes 35k, 3.5k and 1k; all other sizes are written out."""
    content = json.loads(source.read_text())
    content["images"] = [{**content["images"][0], "id": number} for number in range(1, 35_001)]
    source.write_text(json.dumps(content))
    made = make_subsets("toy", [35_000, 3_500, 1_000, 999, 1_234, 250], keep_lost=True)
    assert [one.name for one in made] == ["toy_35k", "toy_3.5k", "toy_1234", "toy_1k", "toy_999", "toy_250"]
    assert made[1].json_file == source.with_name("annotations_3.5k.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "toy", "--sizes", "31"], "toy has 30 images: no subset of 31"),
        (["--dataset", "toy", "--sizes", "0"], "no subset of 0"),
        (["--dataset", "toy", "--ids", "a/b=x"], "expected LABEL=FILE, LABEL a part of a file's name"),
        (["--dataset", "toy", "--seed", "-1"], "argument --seed: -1, expected 0 or more"),
        (["--dataset", "toyy"], "'toyy' is not in the catalog; did you mean 'toy'?"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["prepare_coco_subsets.py", *arguments])
    with pytest.raises(SystemExit) as end:
        load_command("data_subsets").main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(source.parent.glob("annotations_*"))


@pytest.mark.parametrize("there", [None, "[]", "{", '{"subset": []}'])
def test_another_file_of_that_name(there: str | None, source: Path) -> None:
    (made,) = make_subsets("toy", [10])
    if there is not None:
        made.json_file.write_text(there)
    with pytest.raises(DataError, match=r"annotations_10\.json"):
        make_subsets("toy", [10], seed=1)


BROKEN: dict[str, tuple[Callable[[dict], Any], str]] = {  # what a source holds, and the reader's words
    "empty": (lambda _: "", ":1:1: broken json"),
    "truncated": (lambda content: json.dumps(content)[:-50], "broken json"),
    "a list": (lambda content: json.dumps([content]), "no list 'images'"),
    "null": (lambda _: "null", "no list 'images'"),
    "no categories": (lambda content: content.pop("categories"), "no list 'categories'"),
    "no images": (lambda content: content["images"].clear(), "is empty: 0 images, 3 categories"),
    "ids twice": (lambda content: content["images"].append(content["images"][0]), "images with a duplicate id: id 1"),
    "image_id as text": (lambda content: content["annotations"][0].update(image_id="1"), "annotations whose image_id"),
    "no box": (lambda content: content["annotations"][0].pop("bbox"), "annotations without"),
    "no file": (lambda content: content["images"][4].update(file_name="gone.jpg"), "images that are not in"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_the_readers_errors(damage: str, source: Path) -> None:
    spoil, message = BROKEN[damage]
    content = json.loads(source.read_text())
    text = spoil(content)
    source.write_text(text if isinstance(text, str) else json.dumps(content))
    with pytest.raises(DataError, match=message):
        make_subsets("toy", [10])
    assert not list(source.parent.glob("annotations_*"))


def test_entries_are_copied_as_they_are(source: Path) -> None:
    """Fields that nobody reads, types, and the order of the objects of an image."""
    content = json.loads(source.read_text())
    content |= {"licenses": [{"id": 1}], "info": None}
    content["images"][0] |= {"coco_url": "http://x", "tags": {"a": [1.0, None]}}
    content["annotations"][0] |= {"id": "first", "attributes": {"occluded": True}, "area": 3}
    content["categories"].append({"id": 1000, "name": "never seen", "supercategory": "x"})
    source.write_text(json.dumps(content))
    (made,) = make_subsets("toy", [30])
    written = json.loads(made.json_file.read_text())
    assert written.pop("subset")["images"] == 30
    content["annotations"].sort(key=lambda one: one["image_id"])  # stable
    assert json.dumps(written, sort_keys=True) == json.dumps(content, sort_keys=True)


def test_the_readers_notices(source: Path, capsys: pytest.CaptureFixture) -> None:
    """An export that was split by images alone still has all annotations, and ids may be text."""
    content = json.loads(source.read_text())
    content["annotations"].append({**content["annotations"][0], "id": 9999, "image_id": 31})
    for entry in content["images"]:
        entry["id"] = f"{entry['id']:03d}"
    for entry in content["annotations"]:
        entry["image_id"] = f"{entry['image_id']:03d}"
    source.write_text(json.dumps(content))
    (made,) = make_subsets("toy", [30])
    assert "toy: 1 annotations of images that are not listed: id 9999" in capsys.readouterr().out
    assert made.objects == len(content["annotations"]) - 1
    assert sorted(ids(made.json_file)) == [f"{number:03d}" for number in range(1, 31)]
    (source.parent / "some.txt").write_text("007\n003")
    (some,) = make_subsets("toy", [], keep_lost=True, ids_of={"some": source.parent / "some.txt"})
    assert ids(some.json_file) == ["003", "007"]


def test_a_source_without_annotations(source: Path) -> None:
    """As COCO's test-dev: a subset is one to be predicted on, too."""
    content = json.loads(source.read_text())
    del content["annotations"]
    source.write_text(json.dumps(content))
    (made,) = make_subsets("toy", [10])
    assert (made.images, made.objects, len(ids(made.json_file))) == (10, 0, 10)
    assert "annotations" not in json.loads(made.json_file.read_text())
    make_subsets("toy", [10])
