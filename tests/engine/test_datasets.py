"""What the data sets of a run, and its recipe, have to agree on."""

import yaml
from toy_data import read_toy as read

from scratch_det.config.load import LoadedConfig, get_cfg, load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.engine.datasets import add_problems, coco_conflicts, shared_images
from scratch_det.errors import Section


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


def test_an_error_names_the_command_that_mends_it(coco_factory):
    coco_factory(
        "toy", change=lambda c: (c["annotations"][0].update(image_id="1"), c["images"][0].update(file_name="x"))
    )
    section = Section()
    add_problems(section, "toy", inspect_coco(lookup("toy"), need_masks=True)[1])
    hint = "\n  scratch-det data fix toy writes a repaired copy"
    texts = [text for _, text in section.problems]
    assert [text.endswith(hint) for text in texts if "image_id is text" in text] == [True]
    assert [hint in text for text in texts if "images that are not in" in text] == [False]
