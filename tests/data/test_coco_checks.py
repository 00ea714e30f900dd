"""The checks of a COCO json: each finds its offenders, all at once, and nothing in a sound file."""

import json
import re

import pytest
import yaml
from toy_data import read_toy

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.errors import DataError


def found(name: str = "toy_train", need_masks: bool = True) -> list[tuple[str, str]]:
    """Severity and text of every problem of a data set."""
    return [(one.severity, str(one)) for one in inspect_coco(lookup(name), need_masks)[1]]


def whole(box: list[float]) -> dict:
    """What an annotation says of an object that fills its box."""
    x, y, width, height = box
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"bbox": box, "area": width * height, "segmentation": [polygon]}


class TestProblems:
    def test_none_in_a_sound_file(self, coco_factory):
        coco_factory()
        assert found() == []

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_none_in_coco(self, tiny_coco, datasets_root, split):
        fields = {"json": f"{tiny_coco}/annotations/instances_{split}2017.json", "images": f"{tiny_coco}/{split}2017"}
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump({"tiny": fields}))
        assert [text for _, text in found("tiny") if "categories without an annotation" not in text] == []

    @pytest.mark.parametrize(
        ("change", "severity", "text"),
        [  # images are 96 x 64 px but for the second, 64 x 96
            (lambda a: a.update(bbox=[96, 1, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[1, 64.0, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[-5, 1, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(bbox=[1, -9, 5, 5]), "error", "a box that lies outside its image: id 101"),
            (lambda a: a.update(whole([90, 1, 7.5, 5])), "notice", "sticks out of its image by more than 1 pixel: id"),
            (lambda a: a.update(whole([-1.5, 1, 9, 5])), "notice", "sticks out of its image by more than 1 pixel: id"),
            (lambda a: a.update(bbox=[1, 2, float("nan"), 4]), "error", "[x, y, width, height] of numbers: id 101"),
            (lambda a: a.update(bbox=[1, 2, None, 4]), "error", "[x, y, width, height] of numbers: id 101"),
            (lambda a: a.update(segmentation=[[4, 6, 20, 22, 36, 38]]), "notice", "a polygon that encloses no area"),
            (lambda a: a.update(segmentation=[[4, 6, 36, 38, 4, 6]]), "notice", "a polygon that encloses no area"),
            (lambda a: a["segmentation"].append([2, 2, 2, 2, 2, 2]), "notice", "a polygon that encloses no area"),
            (lambda a: a.update(segmentation=[[1, 1, 5, "5", 9, 9]]), "error", "each, nor RLE: id 101 (image_id 1)"),
            (lambda a: a.update(segmentation={"size": [64, 96], "counts": ["a"]}), "error", "nor RLE: id 101"),
            (lambda a: a.pop("area"), "notice", "area is missing or negative: id 101"),
            (lambda a: a.update(area=-1), "notice", "area is missing or negative: id 101"),
            (lambda a: a.pop("iscrowd"), "notice", "iscrowd is missing or neither 0 nor 1: id 101"),
            (lambda a: a.update(iscrowd=2), "notice", "iscrowd is missing or neither 0 nor 1: id 101"),
            (lambda a: a.update(id=[1]), "error", "whose id is not a number or a string: id [1]"),
            (lambda a: a.update(image_id="1"), "error", "image_id is text where the image's id is a number"),
            (lambda a: a.update(image_id=None), "error", "whose image_id is not a number or a string: id 101"),
            (lambda a: a.update(image_id=77), "notice", "images that are not listed: id 101 (image_id 77)"),
            (lambda a: a["segmentation"].append([2, 2, 5, 5]), "notice", "less than 3 points"),
            (lambda a: a["segmentation"].append([2, 2, 5, 5, 9, 2, 1]), "notice", "an odd number of values"),
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
        coco_factory(change=lambda c: c["annotations"][0].update(whole([4.5, 6, 0.5, 0.01])))
        assert found() == []

    @pytest.mark.parametrize("bbox", [[-1, -1, 40, 40], [90, 1, 7, 5], [0, 0, 96, 64], [95.5, 63.5, 0.5, 0.5]], ids=str)
    def test_rounding_at_the_edge_is_no_problem(self, coco_factory, bbox):
        coco_factory(change=lambda c: c["annotations"][0].update(whole(bbox)))
        assert found() == []

    @pytest.mark.parametrize(
        ("section", "change", "text"),
        [
            (
                "images",
                {"id": None},
                "1 images whose id is not a number or a string: id null",
            ),
            ("images", {"width": 0}, "1 images whose width is not a whole number of pixels above 0: id 3 (width 0)"),
            ("images", {"file_name": None}, "whose file_name is not a string: id 3 (file_name null)"),
            (
                "images",
                {"file_name": [list(range(99))]},
                "id 3 (file_name [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... , 97, 98]])",
            ),
            ("categories", {"id": [3]}, "1 categories whose id is not a number or a string: id [3]"),
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

    def test_a_wrong_number_has_a_fix(self, coco_factory):
        coco_factory(change=lambda c: (c["images"][0].update(id=[1]), c["annotations"][2].update(image_id=[1])))
        fixes = {one.kind: one.fix for one in inspect_coco(lookup("toy_train"), need_masks=True)[1]}
        assert fixes["images whose id is not a number or a string"] == "number them"
        assert fixes["annotations whose image_id is not a number or a string"] == "number the images"

    def test_every_kind_is_found_at_once(self, coco_factory):
        def damage(content):
            first, second, _crowd, *others = content["annotations"]
            first.update(image_id="1")
            second.update(category_id=4, bbox=[1, 2, 0, 9])
            others[0].pop("area")
            others[1].pop("segmentation")
            content["images"][3]["file_name"] = "absent.jpg"
            content["annotations"].append(dict(others[2]))

        path = coco_factory(change=damage)
        texts = [text for _, text in found()]
        assert [re.sub(r": id .*", "", text) for text in texts] == [
            "1 annotations with a duplicate id",
            "1 annotations whose image_id is text where the image's id is a number, or a number where it is text",
            "1 annotations with an unknown category_id",
            "1 annotations with a box of no width or height",
            "1 annotations without a mask: no segmentation, or no polygon of 3+ points",
            "1 annotations whose area is missing or negative",
            f"1 images that are not in {path.parent / 'images'}",
        ]
        with pytest.raises(DataError) as caught:
            read_toy()
        message = str(caught.value).splitlines()
        assert len(message) == 7
        assert message[0] == f"{path}: 6 kinds of problems"
        assert message[-2] == "  and 2 more kinds, which scratch-det check lists"
        assert message[-1] == f"  scratch-det data fix {path} --boxes-as-masks writes a repaired copy"

    def test_a_broken_entry_is_reported_once(self, coco_factory):
        coco_factory(change=lambda c: (c["images"][0].pop("width"), c["annotations"].append("nonsense")))
        assert [text for _, text in found()] == [
            "1 images without one of id, file_name, width, height: id 1 (no width)",
            "1 annotations without one of id, image_id, category_id, bbox: id (entry 7) (no id, image_id, category_id, "
            "bbox)",
        ]

    def test_notices_do_not_stop_a_run(self, coco_factory):
        coco_factory(change=lambda c: [one.pop("area") for one in c["annotations"]])
        assert read_toy()
        _, [notice] = inspect_coco(lookup("toy_train"), need_masks=True)
        assert (notice.severity, notice.count) == ("notice", 7)
        assert str(notice).endswith(": id 101, 102, 103, 104, 105, ...")

    def test_without_masks_they_are_not_looked_at(self, coco_factory):
        coco_factory(change=lambda c: [one.update(segmentation="none") for one in c["annotations"]])
        assert found(need_masks=False) == []
