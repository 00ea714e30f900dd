"""The page of a data set, or of a training's images: which images are on it, and what their captions say."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scratch_det.diagnosis.data import Filter, view_data, view_training
from scratch_det.errors import ConfigError, UserError


@pytest.fixture
def captions(coco_factory: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Of the images on the page of ``toy_train``, which has eight."""
    coco_factory(num_images=8)

    def shown(**chosen: object) -> list[str]:
        page = Path(view_data("toy_train", Filter(**chosen), tmp_path / "out"))  # type: ignore[arg-type]
        return re.findall('<figcaption>(.*?) <a class="close"', page.read_text())

    return shown


def test_all_images(captions: Callable[..., list[str]]) -> None:
    found = captions()
    assert found[:2] == ["1.jpg, id 1, 96 x 64: 3 objects", "2.jpg, id 2, 64 x 96: 2 objects"]
    assert found[-1] == "8.jpg, id 8, 64 x 96: 0 objects"
    assert len(found) == 8


def test_filters(captions: Callable[..., list[str]]) -> None:
    numbers = {name: [caption.split(".")[0] for caption in captions(**chosen)] for name, chosen in {
        "class": {"classes": ["class2"]}, "crowd": {"crowds": True}, "ids": {"ids": ["4", "7"]},
        "small": {"size": "small", "classes": ["class2"]}, "few": {"count": 2},
    }.items()}  # fmt: skip
    assert numbers["class"] == ["1", "2", "3", "5", "6"]  # in 1 it is the crowd
    assert numbers["crowd"] == ["1"]
    assert numbers["ids"] == ["4", "7"]
    assert numbers["small"] == ["2", "5"]  # upright images: 21 x 48 px
    assert numbers["few"] == ["1", "8"]


def test_what_is_not_there(captions: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"toy_train has no class clas2; did you mean 'class2'\?; it has class2, class5"
    ):
        captions(classes=["clas2"])
    with pytest.raises(
        UserError, match=r"no image of toy_train has all of this: size large; with a crowd; ask for less"
    ):
        captions(size="large", crowds=True)
    with pytest.raises(UserError, match=r"toy_train has no image 77, x; its ids are 1, 2, 3, 4, 5, \.\.\."):
        captions(ids=["4", "77", "x"])
    assert not (tmp_path / "out").exists()


def test_a_training(points_recipe: Path, tmp_path: Path) -> None:
    page = Path(view_training(points_recipe, ["MODEL.KEYPOINT_ON", "True"], 2, tmp_path / "out")).read_text()
    found = re.findall('<figcaption>(.*?) <a class="close"', page)
    assert all(re.fullmatch(rf"position {n}, image \d, \d\d x \d\d: 2 objects", one) for n, one in enumerate(found))
    assert len(found) == 2
    assert "3 training images of toy_train, as the model gets them." in page
    with pytest.raises(ConfigError, match=r"trains on nothing"):
        view_training(points_recipe, ["DATASETS.TRAIN", "()"], 2, tmp_path / "out")


def test_a_training_on_sets_of_different_classes(toy_recipe: Path, coco_factory: Callable[..., Path]) -> None:
    coco_factory("other", category_ids=(2, 5))
    with pytest.raises(ConfigError, match=r"other/annotations.json has 2 categories: 2 class2, 5 class5"):
        view_training(toy_recipe, ["DATASETS.TRAIN", "('toy_train', 'other')"], 2, toy_recipe.parent / "out")
