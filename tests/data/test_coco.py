"""COCO jsons: what is read of a sound file, and which errors a broken one gives."""

import pytest
import yaml
from toy_data import all_objects, read_toy, rejection


class TestCoco:
    def test_classes_follow_category_ids_with_gaps(self, coco_factory):
        coco_factory(category_ids=(9, 2, 5))
        data = read_toy()
        assert (data.classes, data.category_ids) == (["class2", "class5", "class9"], [2, 5, 9])
        coco_factory("alike", change=lambda c: c["categories"][2].update(name="class2"))
        assert read_toy("alike").classes == ["class2 (id 2)", "class5", "class2 (id 9)"]
        for entry in all_objects(data):
            assert data.category_ids[entry["label"]] == entry["category_id"]

    def test_crowd_is_kept_but_not_learned_from(self, coco_factory):
        coco_factory()
        data = read_toy()
        assert [entry["iscrowd"] for entry in data.objects(0)] == [0, 0, 1]
        assert [entry["iscrowd"] for entry in data.training_objects(0)] == [0, 0]

    def test_image_without_objects(self, coco_factory):
        coco_factory(num_images=4)
        data = read_toy()
        assert [image["id"] for image in data.images] == [1, 2, 3, 4]
        assert data.training_objects(3) == []

    def test_empty_boxes_are_dropped_where_the_entry_says_so(self, coco_factory):
        coco_factory(change=lambda c: c["annotations"][1]["bbox"].__setitem__(2, 0), drop_empty_boxes=True)
        assert [entry["label"] for entry in read_toy().training_objects(0)] == [read_toy().objects(0)[0]["label"]]

    def test_crowd_may_be_empty_box(self, coco_factory):
        coco_factory(change=lambda c: c["annotations"][2]["bbox"].__setitem__(2, 0))
        assert len(read_toy().objects(0)) == 3

    def test_files_in_subfolders(self, coco_factory):
        path = coco_factory(change=lambda c: c["images"][0].update(file_name="sub/1.jpg"))
        message = rejection(read_toy)
        assert f"1 images whose file_name is spelled in another way in {path.parent / 'images'}" in message
        assert "id 1 (sub/1.jpg is 1.jpg)\n  scratch-det data fix " in message
        (path.parent / "images" / "sub").mkdir()
        (path.parent / "images" / "1.jpg").rename(path.parent / "images" / "sub" / "1.jpg")
        assert len(read_toy().images) == 4

    @pytest.mark.parametrize("name", ["../other.jpg", "/etc/other.jpg"])
    def test_files_outside(self, coco_factory, datasets_root, name):
        path = coco_factory(change=lambda c: c["images"][0].update(file_name=name))
        (path.parent / "images" / "1.jpg").rename(path.parent / "other.jpg")
        assert f"leads out of {path.parent / 'images'}: id 1 ({name})" in rejection(read_toy)
        catalog = datasets_root / "catalog.yaml"
        catalog.write_text(catalog.read_text() + "  paths_outside: true\n")
        if name.startswith("/"):
            assert f"that are not in {path.parent / 'images'}: id 1 ({name})" in rejection(read_toy)
        else:
            assert len(read_toy().images) == 4

    def test_digest_is_of_the_bytes(self, coco_factory):
        path = coco_factory()
        before = read_toy().digest
        assert read_toy().digest == before
        path.write_text(path.read_text() + "\n")
        assert read_toy().digest != before

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda c: c["annotations"][3].update(category_id=4), "unknown category_id: id 104 (category_id 4)"),
            (lambda c: c["annotations"][3].update(category_id=4), "known category ids: [2, 5, 9]"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(2, 0), "no width or height: id 101"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(3, -3.0), "no width or height: id 101"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(2, 0), "'drop_empty_boxes: true'"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "[x, y, width, height] of numbers: id 101"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]), "[x, y, width, height] of numbers: id 101"),
            (lambda c: c["annotations"][0].pop("bbox"), "without one of id, image_id, category_id, bbox: id 101"),
            (lambda c: c["annotations"][0].pop("id"), "id (entry 0)"),
            (lambda c: c["annotations"][1].update(id=101), "1 annotations with a duplicate id: id 101"),
            (
                lambda c: c["annotations"][1].update(segmentation=[]),
                "no segmentation, or no polygon of 3+ points: id 102 (image_id 1)",
            ),
            (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "no polygon of 3+ points: id 102"),
            (lambda c: c["annotations"][1].update(segmentation={"counts": "x"}), "nor RLE: id 102"),
            (lambda c: c["annotations"][1].pop("segmentation"), "MODEL.MASK_ON False"),
            (
                lambda c: c["annotations"][1].update(segmentation={"size": [96, 64], "counts": [96 * 64]}),
                "RLE does not fit their image: size [height, width], counts that are not negative",
            ),
            (
                lambda c: c["annotations"][1].update(segmentation={"size": [64, 96], "counts": [5, 6000]}),
                "are not negative and add up to height x width: id 102",
            ),
            (lambda c: c["images"].append(dict(c["images"][2])), "1 images with a duplicate id: id 3"),
            (lambda c: c["images"][1].pop("height"), "without one of id, file_name, width, height: id 2"),
            (lambda c: c["images"][1].update(file_name="9.jpg"), "images: id 2 (9.jpg)\n  complete the folder"),
            (lambda c: c["categories"].append({"id": 5, "name": "again"}), "1 categories with a duplicate id: id 5"),
            (lambda c: c["categories"][1].pop("name"), "categories without one of id, name: id 5"),
            (lambda c: c.update(images=[], annotations=[]), "data set 'toy_train' is empty: 0 images, 3 categories"),
            (lambda c: c.update(categories=[], annotations=[]), "is empty: 4 images, 0 categories"),
            (lambda c: c.pop("categories"), "no list 'categories'; COCO format has images, annotations, categories"),
            (lambda c: c.update(images={}), "no list 'images'"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_id(self, coco_factory, change, expected):
        path = coco_factory(change=change)
        message = rejection(read_toy)
        assert message.startswith(str(path))
        assert expected in message
        assert len(message.splitlines()) <= 3

    def test_many_offenders_are_counted(self, coco_factory):
        coco_factory(num_images=8, change=lambda c: [entry.update(category_id=77) for entry in c["annotations"]])
        message = rejection(read_toy)
        assert "15 annotations with an unknown category_id: id 101 (category_id 77), 102" in message
        assert "105 (category_id 77), ..." in message
        assert "106" not in message

    def test_masks_are_not_asked_for_without_need(self, coco_factory):
        coco_factory(change=lambda c: [entry.pop("segmentation") for entry in c["annotations"]])
        assert len(read_toy(need_masks=False).training_objects(0)) == 2

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b'{"images": [\n  1\n  2]}', ":3:3: broken json"),
            (b"", ":1:1: broken json"),
            (b'{"a": "\xff\xfe"}', "not a json text file"),
            (b"[1, 2]", "no list 'images'"),
        ],
    )
    def test_broken_json(self, coco_factory, content, expected):
        path = coco_factory()
        path.write_bytes(content)
        message = rejection(read_toy)
        assert message.startswith(str(path))
        assert expected in message

    def test_tiny_coco(self, tiny_coco, datasets_root):
        fields = {
            "json": str(tiny_coco / "annotations/instances_val2017.json"),
            "images": str(tiny_coco / "val2017"),
        }
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump({"tiny": fields}))
        data = read_toy("tiny")
        assert (len(data.classes), data.category_ids[-1], len(data.images)) == (80, 90, 50)
        every = all_objects(data)
        learned = data.object_counts().sum()
        assert learned == sum(not entry["iscrowd"] for entry in every) < len(every)
