"""Files that are given in the place of a COCO json, as their tools write them, are named."""

import json
from typing import Any

import pytest
from toy_data import read_toy, rejection

RECT = {"shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5}, "region_attributes": {}}
IMAGES = [{"id": 1, "file_name": "1.jpg", "width": 96, "height": 64}]
SEGMENTS = {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 7, "category_id": 2, "bbox": [1, 1, 5, 5]}]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a pointer of Git LFS"),
        ('{"id": 1, "file_name": "1.jpg"}\n{"id": 2, "file_name": "2.jpg"}\n', "JSON lines"),
        ("0 0.5 0.5 0.25 0.125\n2 0.1 0.1 0.1 1e-2\n", "a label file of YOLO"),
        ("0 0.5 0.5 0.25 0.125", "a label file of YOLO"),
        ("<annotation>\n  <folder>VOC2007</folder>\n</annotation>", "XML, as of PASCAL VOC"),
        ('<?xml version="1.0"?>\n<annotations/>', "XML, as of PASCAL VOC"),
        ("\n<!DOCTYPE html>\n<html></html>", "a web page"),
        ("PK\x03\x04zip", "a compressed file"),
        ({"images": IMAGES, "annotations": [{"id": 1, "image_id": 1, "caption": "A dog."}]}, "COCO's captions"),
        ({"images": IMAGES, "annotations": [SEGMENTS], "categories": [{"id": 2, "name": "a"}]}, "COCO's panoptic"),
        ([{"image_id": 1, "category_id": 2, "bbox": [1, 1, 5, 5], "score": 0.9}], "a list of results"),
        ([{"image": "1.jpg", "annotations": [{"label": "a", "coordinates": {"x": 1}}]}], "in CreateML's format"),
        ([{"id": 1, "data": {"image": "1.jpg"}, "annotations": [{"result": []}]}], "in Label Studio's own format"),
        ({"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}}, "a project of VIA"),
        ({"1.jpg9": {"filename": "1.jpg", "size": 9, "regions": [RECT], "file_attributes": {}}}, "in VIA's own format"),
        ({"version": "5", "shapes": [], "imagePath": "1.jpg", "imageData": None}, "a file of labelme"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_it_is_named(coco_factory, content: Any, what: str) -> None:
    path = coco_factory()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert rejection(read_toy).startswith(f"{path} is {what}")


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", "{}", '{"annotations": 3}', '[[{"a": 1}]]', '{"a": {"b": 1}}']
)
def test_anything_else_is_no_coco_json(coco_factory, content: str) -> None:
    path = coco_factory()
    path.write_text(content)
    message = rejection(read_toy)
    assert message.startswith((f"{path}: no list 'images'; COCO format has", f"{path}:1:1: broken json"))


def test_a_detection_json_may_have_captions(coco_factory) -> None:
    coco_factory(change=lambda content: [one.update(caption="A square.") for one in content["annotations"]])
    assert len(read_toy().images) == 4
