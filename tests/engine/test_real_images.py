"""Training on COCO's images."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from run_folder import lines, read

from scratch_det.engine.command import start
from scratch_det.engine.plan import Request

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


def few_images(tiny_coco: Path, root: Path, number: int) -> None:
    """Register ``few``: the first images without crowds whose objects each cover a hundredth of the image or more."""
    content = json.loads((tiny_coco / "annotations/instances_train2017.json").read_text())
    objects = defaultdict(list)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)

    def is_easy(image: dict[str, Any]) -> bool:
        least = 0.01 * image["width"] * image["height"]
        found = objects[image["id"]]
        return bool(found) and all(a["area"] > least and not a["iscrowd"] for a in found)

    content["images"] = [image for image in content["images"] if is_easy(image)][:number]
    content["annotations"] = [a for image in content["images"] for a in objects[image["id"]]]
    assert len(content["images"]) == number
    (root / "few.json").write_text(json.dumps(content))
    register(root, few={"json": "few.json", "images": str(tiny_coco / "train2017")})


def register(root: Path, **entries: dict[str, Any]) -> None:
    with open(root / "catalog.yaml", "a") as catalog:
        yaml.safe_dump(entries, catalog)


def words(keys: dict[str, Any]) -> list[str]:
    return [str(word) for pair in keys.items() for word in pair]


class TestRealImages:
    @pytest.mark.slow
    def test_overfits_eight_images(self, tiny_coco: Path, datasets_root: Path, tmp_path: Path) -> None:
        """A small detector from scratch learns eight images by heart, for which all of the code has to be right."""
        few_images(tiny_coco, datasets_root, 8)
        recipe = tmp_path / "overfit.yaml"
        bases = ["model/mask_rcnn_R_18_FPN_gn_small.yaml", "init/scratch.yaml"]
        recipe.write_text(yaml.safe_dump({"_BASE_": [str(ROOT / "configs/_base_" / base) for base in bases]}))
        keys = {
            "MODEL.DEVICE": "cpu", "MODEL.PIXEL_STD": "[57.375, 57.12, 58.395]", "DATALOADER.NUM_WORKERS": 0, "SEED": 1,
            "MODEL.ANCHOR_GENERATOR.SIZES": "[[16], [32], [64], [128], [256]]",
            "DATASETS.TRAIN": "('few',)", "DATASETS.TEST": "('few',)", "INPUT.RANDOM_FLIP": "none",
            "INPUT.MIN_SIZE_TRAIN": "(160,)", "INPUT.MAX_SIZE_TRAIN": 224, "INPUT.MIN_SIZE_TEST": 160,
            "INPUT.MAX_SIZE_TEST": 224, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.BASE_LR": 0.02, "SOLVER.WEIGHT_DECAY": 0.0,
            "SOLVER.MAX_ITER": 200, "SOLVER.STEPS": "(160,)", "SOLVER.WARMUP_ITERS": 20, "SOLVER.WARMUP_FACTOR": 0.1,
            "OUTPUT_DIR": tmp_path / "run",
        }  # fmt: skip
        start(Request(str(recipe), words(keys)))
        assert read(tmp_path / "run", "result.json")["metrics"]["bbox"]["AP50"] > 80

    def test_the_papers_recipe_starts_and_evaluates(self, tiny_coco: Path, datasets_root: Path, tmp_path: Path) -> None:
        entry = {
            "json": str(tiny_coco / "annotations/instances_train2017.json"),
            "images": str(tiny_coco / "train2017"),
        }
        register(datasets_root, coco_2017_train={**entry, "drop_empty_boxes": True})
        few_images(tiny_coco, datasets_root, 4)
        keys = {
            "DATASETS.TEST": "('few',)",
            "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, "SEED": 1, "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.BASE_LR": 0.0025,
            "INPUT.MIN_SIZE_TRAIN": "(160,)", "INPUT.MAX_SIZE_TRAIN": 256, "INPUT.MIN_SIZE_TEST": 160,
            "INPUT.MAX_SIZE_TEST": 256, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64, "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
            "SOLVER.MAX_ITER": 3, "SOLVER.STEPS": "(1, 2)", "SOLVER.WARMUP_ITERS": 1, "OUTPUT_DIR": tmp_path / "run",
        }  # fmt: skip
        start(Request(str(R50), words(keys)))
        result = read(tmp_path / "run", "result.json")
        assert result["iteration"] == 3
        assert 0 <= result["metrics"]["bbox"]["AP"] < 50
        assert 0 <= result["metrics"]["segm"]["AP"] < 50
        assert all(math.isfinite(lines(tmp_path / "run")[0][key]) for key in LOSSES)
