"""Subsets of a data set: nested, drawn by seed alone, with every class, and named in the catalog."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_tool

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
        f"toy_10: 10 images, {len(content['annotations'])} objects, 3 classes; {subset.json_file} "
        f"(ids sha256 {digest[:12]})"
    )
    data = read_coco(lookup("toy_10"), need_masks=True)
    assert (len(data.images), data.entry.image_root) == (10, datasets_root / "toy/images")
    before = (datasets_root / "catalog.yaml").read_text()
    make_subsets("toy", [10])
    assert (datasets_root / "catalog.yaml").read_text() == before


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
    images, rare = dict.fromkeys(range(1, 31)), content["annotations"][0]["image_id"]
    seed = next(s for s in range(99) if rare not in draw_order(images, s)[:3])
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
    subsets = make_subsets("toy", [35_000, 3_500, 1_000, 999, 1_234, 250], keep_lost=True)
    assert [one.name for one in subsets] == ["toy_35k", "toy_3.5k", "toy_1234", "toy_1k", "toy_999", "toy_250"]
    assert subsets[1].json_file == source.with_name("annotations_3.5k.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "toy", "--sizes", "31"], "toy has 30 images: no subset of 31"),
        (["--dataset", "toy", "--sizes", "0"], "no subset of 0"),
        (["--dataset", "toyy"], "'toyy' is not in the catalog; did you mean 'toy'?"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["prepare_coco_subsets.py", *arguments])
    with pytest.raises(SystemExit) as end:
        load_tool("prepare_coco_subsets").main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(source.parent.glob("annotations_*"))


def test_another_subset_of_that_name(source: Path) -> None:
    make_subsets("toy", [10])
    with pytest.raises(DataError, match=r"annotations_10\.json exists and holds other images"):
        make_subsets("toy", [10], seed=1)
