"""Names of data sets: to files on disk, or to a message that says what is expected and what was found."""

from pathlib import Path

import pytest
import yaml
from toy_data import rejection

from scratch_det.data.catalog import lookup
from scratch_det.errors import ConfigError


class TestCatalog:
    def write(self, root: Path, text: str) -> None:
        (root / "catalog.yaml").write_text(text)

    def test_built_in_entry(self, datasets_root):
        (datasets_root / "coco" / "annotations").mkdir(parents=True)
        (datasets_root / "coco" / "val2017").mkdir()
        (datasets_root / "coco" / "annotations" / "instances_val2017.json").write_text("{}")
        entry = lookup("coco_2017_val")
        assert entry.json_file == datasets_root / "coco/annotations/instances_val2017.json"
        assert entry.image_root == datasets_root / "coco/val2017"
        assert entry.drop_empty_boxes  # COCO has a few boxes without area

    def test_default_root_is_the_datasets_folder_here(self, tmp_path, monkeypatch):
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "datasets" / "images").mkdir(parents=True)
        (tmp_path / "datasets" / "own.json").write_text("{}")
        self.write(tmp_path / "datasets", "own: {json: own.json, images: images, drop_empty_boxes: true}")
        entry = lookup("own")
        assert entry.json_file.resolve() == tmp_path / "datasets" / "own.json"
        assert entry.drop_empty_boxes

    def test_own_entry_wins_over_built_in(self, coco_factory):
        own = coco_factory("coco_2017_val")
        assert lookup("coco_2017_val").json_file == own

    def test_absolute_paths(self, datasets_root, coco_factory):
        path = coco_factory("elsewhere")
        self.write(datasets_root, yaml.safe_dump({"own": {"json": str(path), "images": str(path.parent / "images")}}))
        assert lookup("own").json_file == path

    def test_unknown_name(self, coco_factory, datasets_root):
        coco_factory("toy_train")
        message = rejection(lookup, "toy_trian")
        assert "data set 'toy_trian' is not in the catalog; did you mean 'toy_train'?" in message
        assert "coco_2017_val" in message
        assert f"write into {datasets_root / 'catalog.yaml'}:  toy_trian:" in message

    @pytest.mark.parametrize("missing", [{"json"}, {"images"}, {"json", "images"}])
    def test_missing_files_show_expected_and_found(self, datasets_root, missing):
        if "json" not in missing:
            (datasets_root / "a.json").write_text("{}")
        if "images" not in missing:
            (datasets_root / "photos").mkdir()
        (datasets_root / "other").mkdir()
        self.write(datasets_root, "own: {json: a.json, images: photos}")
        message = rejection(lookup, "own")
        for field, path in (("json", datasets_root / "a.json"), ("images", datasets_root / "photos")):
            assert f"{'missing ' if field in missing else 'found   '} {path}" in message
        assert f"{datasets_root} holds: " in message
        assert "other" in message
        assert "DETECTRON2_DATASETS" in message

    def test_a_catalog_that_is_no_yaml(self, datasets_root):
        self.write(datasets_root, "own:\n  json: [\n")
        with pytest.raises(ConfigError, match=r"catalog.yaml:3: not valid YAML"):
            lookup("own")

    def test_missing_root(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
        assert f"{tmp_path / 'nowhere'} does not exist" in rejection(lookup, "coco_2017_val")

    @pytest.mark.parametrize(
        ("name", "fix"),
        [
            ("digits_train", "make it with: scratch-det data digits"),
            ("coco_2017_train_1k", "make it with: scratch-det data subsets"),
            ("coco_2017_val", "download it as datasets/README.md shows"),
        ],
    )
    def test_missing_data_name_what_to_do(self, datasets_root, name, fix):
        assert f"(set DETECTRON2_DATASETS to use another root); {fix}\n  missing " in rejection(lookup, name)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "own: {json: a.json}",
                "entry 'own' is {'json': 'a.json'}; expected images with objects, {json: PATH, images: FOLDER}",
            ),
            ("own: a.json", "entry 'own' is 'a.json'"),
            ("own:", "entry 'own' is None; expected images with objects"),
            ("own: 3", "entry 'own' is 3; expected images with objects"),
            ("own: {folder: a}", "; one with folder is for scratch-det pretrain"),
            (
                "own: {json: a.json, images: b, mask: c}",
                "known fields: ap, drop_empty_boxes, drop_objects_without_mask, images, json",
            ),
            ("- own\n", "expected 'name: {json: PATH, images: FOLDER}' entries"),
        ],
        ids=["no images", "a string", "nothing", "a number", "classified images", "unknown field", "a list"],
    )
    def test_malformed_entry(self, datasets_root, text, expected):
        self.write(datasets_root, text)
        message = rejection(lookup, "own")
        assert message.startswith(str(datasets_root / "catalog.yaml"))
        assert expected in message
