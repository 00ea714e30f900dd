"""Errors in overrides, recipes, data and weights: exit code 2, a few lines with the fix, no traces."""

import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError


def edit(path: Path, change) -> None:
    """Change a json file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


OVERRIDES = [
    # unknown keys
    (["SOLVER.BASE_LRR", 1], ["command line", "unknown key SOLVER.BASE_LRR; did you mean 'SOLVER.BASE_LR'?"]),
    (["MODEL.IMS_PER_BATCH", 1], ["unknown key MODEL.IMS_PER_BATCH; did you mean 'SOLVER.IMS_PER_BATCH'?"]),
    (["SOLVER", 1], ["SOLVER is a section, not a value"]),
    (["SOLVER.OPTIMIZER", "AdamW"], ["SOLVER.OPTIMIZER is one of a project: give --project projects/timm_backbones"]),
    (["MODEL.RETINANET.NUM_CLASSES", 1], ["of detectron2 that is not trained here, such as RetinaNet: remove it"]),
    # pairs
    (["SOLVER.BASE_LR"], ["'SOLVER.BASE_LR' has no value: overrides come in pairs"]),
    (["SEED", 1, "SOLVER.BASE_LR"], ["'SOLVER.BASE_LR' has no value: overrides come in pairs"]),
    (["SOLVER.BASE_LR=0.1"], ["write SOLVER.BASE_LR 0.1"]),
    # what is no key
    (["--resume", "auto"], ["'auto' is no key; --resume takes no value: it continues the run in OUTPUT_DIR"]),
    (["--resume", "output/a/model_final.pth"], ["model_final.pth' is no key; weights are given as MODEL.WEIGHTS FILE"]),
    (
        ["output/a#model_ema"],
        ["""model_ema' is no key; weights are given as MODEL.WEIGHTS FILE, or MODEL.WEIGHTS "FILE"""],
    ),
    (["other.yaml", "SEED", 1], ["'other.yaml' is no key; a recipe is given as --config-file FILE"]),
    (["SOLVER.STEPS=(1, 2)"], ['write SOLVER.STEPS "(1, 2)"']),
    # types
    (["SOLVER.MAX_ITER", "many"], ["command line: SOLVER.MAX_ITER is 'many' (str), expected int such as 40000"]),
    (["SOLVER.MAX_ITER", "2.0"], ["SOLVER.MAX_ITER is 2.0 (float), expected int", "write 2"]),
    (
        ["DATASETS.TRAIN", "toy_train"],
        ["DATASETS.TRAIN is 'toy_train' (str), expected tuple", """write "('toy_train',)\""""],
    ),
    # values
    (["MODEL.ROI_HEADS.NUM_CLASSES", 80], ["NUM_CLASSES is 80, but", "toy_train/annotations.json has 3 categories"]),
    (["MODEL.ROI_HEADS.NUM_CLASSES", 80], ["leave the key out: the data decides"]),
    (["MODEL.RESNETS.NORM", "FrozenBN"], ["MODEL.RESNETS.NORM is FrozenBN while MODEL.WEIGHTS is", "NORM GN"]),
    (["MODEL.FPN.NORM", "FrozenBN"], ["MODEL.FPN.NORM is FrozenBN", "set MODEL.FPN.NORM GN"]),
    (["MODEL.BACKBONE.FREEZE_AT", 2], ["FREEZE_AT is 2 while MODEL.WEIGHTS is", "set MODEL.BACKBONE.FREEZE_AT 0"]),
    (["MODEL.FPN.NORM", "BN"], ["MODEL.FPN.NORM is BN with 2 images per process", "set MODEL.FPN.NORM GN, or SyncBN"]),
    (["SOLVER.STEPS", "(1, 2)"], ["SOLVER.STEPS has 2, but training ends at SOLVER.MAX_ITER 2", 'SOLVER.STEPS "(1,)"']),
    (["SOLVER.WARMUP_ITERS", 2], ["SOLVER.WARMUP_ITERS is 2, but the run has SOLVER.MAX_ITER 2"]),
    (["SOLVER.BASE_LR", -0.1], ["SOLVER.BASE_LR is -0.1, expected above 0"]),
    (["DATALOADER.NUM_WORKERS", -1], ["DATALOADER.NUM_WORKERS is -1, expected 0 or more"]),
    (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE is 'gpu', expected cuda (cuda:0, mps, xpu) for a GPU, or cpu"]),
    (["MODEL.DEVICE", "coda"], ["MODEL.DEVICE is 'coda', expected cuda"]),
    (["MODEL.DEVICE", "cuda:x"], ["MODEL.DEVICE is 'cuda:x'", "cuda:0, mps, xpu"]),
    (
        ["INPUT.CROP.ENABLED", True],
        ["the torchvision backend does not support", "INPUT.CROP.ENABLED is True; allowed: False"],
    ),
    (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16]]"], ["SIZES has 2 lists", "one for each of the 5"]),
    # data sets
    (["DATASETS.TRAIN", "('toy_trian',)"], ["data set 'toy_trian' is not in the catalog; did you mean 'toy_train'?"]),
    (
        ["DATASETS.TEST", "('nothing',)"],
        ["'nothing' is not in the catalog", "write into", "{json: PATH, images: FOLDER}"],
    ),
    (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is (), expected at least one data set"]),
    (["--eval-only", "DATASETS.TEST", "()"], ["DATASETS.TEST is empty"]),
    # weights
    (
        ["MODEL.WEIGHTS", "/nowhere/a.pth"],
        ["MODEL.WEIGHTS: file /nowhere/a.pth is missing", "path or address of a .pth"],
    ),
    (["--eval-only", "MODEL.WEIGHTS", "/nowhere/a.pth"], ["MODEL.WEIGHTS: file /nowhere/a.pth is missing"]),
    (["MODEL.WEIGHTS", ROOT], [f"MODEL.WEIGHTS: file {ROOT} is a folder"]),
    (["MODEL.WEIGHTS", "s3://a.pkl"], ["MODEL.WEIGHTS is s3://a.pkl, expected a file, https://"]),
    # the run folder
    (["OUTPUT_DIR", ""], ["OUTPUT_DIR is '', expected a folder; set OUTPUT_DIR output/NAME"]),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), OVERRIDES, ids=[" ".join(map(str, words)) for words, _ in OVERRIDES]
)
def test_overrides(rejected, overrides, expected):
    message = rejected(*overrides)
    for part in expected:
        assert part in message


def test_several_mistakes_are_told_at_once(rejected):
    message = rejected("SOLVER.BASE_LR", -1.0, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.DEVICE", "gpu")
    assert all(key in message for key in ("SOLVER.BASE_LR", "MODEL.BACKBONE.FREEZE_AT", "MODEL.DEVICE"))


class TestRecipes:
    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("  BASE_LR:", "  BASE_LRR:", "unknown key SOLVER.BASE_LRR; did you mean 'SOLVER.BASE_LR'?"),
            ("  MAX_ITER: 2", "  MAX_ITER: soon", "SOLVER.MAX_ITER is 'soon' (str), expected int such as 40000"),
            ("  MASK_ON: true", "  MASK_ON: 1", "MODEL.MASK_ON is 1 (int), expected bool such as False: write True"),
            ("SEED: 1", "SEED: [1", "not valid YAML"),
            ("SEED: 1", "\tSEED: 1", "not valid YAML"),
            ("SEED: 1", "SEED: 1\nSEED: 2", "SEED is already in line"),
        ],
        ids=["unknown key", "wrong type", "wrong type with fix", "bracket", "tab", "twice"],
    )
    def test_mistakes_name_file_and_line(self, rejected, toy_recipe, old, new, expected):
        text = toy_recipe.read_text().replace("MODEL:\n", "MODEL:\n  MASK_ON: true\n")
        assert text.count(old) == 1
        toy_recipe.write_text(text.replace(old, new))
        message = rejected()
        assert expected in message
        line = text[: text.index(old)].count("\n") + 1
        place = message.removeprefix(f"error: {toy_recipe}:").split(":")[0]
        assert line <= int(place) <= line + 1

    def test_missing_base(self, rejected, toy_recipe):
        text = toy_recipe.read_text()
        toy_recipe.write_text(text.replace("init/scratch.yaml", "init/scrtch.yaml"))
        line = text[: text.index("_BASE_")].count("\n") + 1
        missing = ROOT / "configs/_base_/init/scrtch.yaml"
        meant = f"; did you mean '{missing.with_name('scratch.yaml')}'?"
        assert rejected() == f"error: {toy_recipe}:{line}: {missing} does not exist{meant}\n"

    @pytest.mark.parametrize("text", ["", "# nothing yet\n", "- a list\n", "words\n"])
    def test_no_recipe_at_all(self, rejected, toy_recipe, text):
        toy_recipe.write_text(text)
        assert f"error: {toy_recipe}: expected lines such as 'SOLVER:'" in rejected()

    def test_missing_recipe(self, stopped, tmp_path):
        path = tmp_path / "a.yaml"
        assert f"{path} does not exist\n" in stopped("--config-file", path)

    @pytest.mark.parametrize(
        "path", ["configs/Digits/quikstart.yaml", "configs/Digit/quickstart.yaml", "quickstart.yaml"]
    )
    def test_misspelt_recipe(self, stopped, path, monkeypatch):
        monkeypatch.chdir(ROOT)
        assert f"{path} does not exist; did you mean 'configs/Digits/quickstart.yaml'?" in stopped(
            "--config-file", path
        )

    def test_a_recipe_in_python(self, stopped):
        assert "a.py is Python, a recipe is YAML, such as configs/" in stopped("--config-file", "configs/a.py")
        said = stopped("--config-file", "configs/mask_rcnn_R_50_FPN_3x.py")
        assert "a recipe is YAML; did you mean 'configs/Torchvision/mask_rcnn_R_50_FPN.yaml'?" in said


class TestDataSets:
    @pytest.fixture(params=["toy_train", "toy_val"])
    def annotations(self, request, toy_recipe, datasets_root) -> Path:
        """The json of the training set, then of the test set: both are checked before anything runs."""
        return datasets_root / request.param / "annotations.json"

    def test_missing_json(self, rejected, annotations, datasets_root):
        annotations.unlink()
        message = rejected()
        assert f"missing  {annotations}\n" in message
        assert f"found    {annotations.parent / 'images'}/\n" in message
        assert f"{datasets_root} holds: catalog.yaml, toy_train, toy_val" in message

    def test_missing_image_folder(self, rejected, annotations):
        (annotations.parent / "images").rename(annotations.parent / "photos")
        message = rejected()
        assert f"found    {annotations}\n" in message
        assert f"missing  {annotations.parent / 'images'}/\n" in message

    def test_missing_image(self, rejected, annotations):
        (annotations.parent / "images" / "3.jpg").unlink()
        message = rejected()
        assert f"{annotations}: 1 images that are not in {annotations.parent / 'images'}: id 3" in message
        assert "complete the folder" in message

    def test_broken_json(self, rejected, annotations):
        annotations.write_text('{"images": [\n{"id": 1,]}')
        assert f"error: {annotations}:2:10: broken json" in rejected()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                lambda c: c["annotations"][1].update(image_id="1"),
                [
                    "image_id is text where the image's id is a number",
                    "id 102 (image_id '1' (text))",
                    "write both alike",
                ],
            ),
            (lambda c: c["annotations"][1].update(category_id=4), ["unknown category_id: id 102", "[2, 5, 9]"]),
            (
                lambda c: c["annotations"][1].update(bbox=[1, 2, 0, 9]),
                ["no width or height: id 102", "drop_empty_boxes"],
            ),
            (
                lambda c: c["annotations"][1].pop("segmentation"),
                ["3+ points: id 102", "drop_objects_without_mask: true", "MODEL.MASK_ON False"],
            ),
            (lambda c: c.update(images=[], annotations=[]), ["is empty: 0 images, 3 categories"]),
        ],
        ids=["image id of another type", "unknown category id", "zero-width box", "no mask", "no images"],
    )
    def test_what_the_json_says(self, rejected, annotations, change, expected):
        edit(annotations, change)
        message = rejected()
        assert f"error: {annotations}: " in message
        for part in expected:
            assert part in message

    def test_no_objects_to_train_on(self, rejected, toy_recipe, datasets_root):
        path = datasets_root / "toy_train" / "annotations.json"
        edit(path, lambda c: c.update(annotations=[]))
        message = rejected()
        assert f"{path}: data set is empty for training" in message
        assert "DATALOADER.FILTER_EMPTY_ANNOTATIONS False" in message

    def test_categories_of_training_and_test_differ(self, rejected, toy_recipe, datasets_root):
        val = datasets_root / "toy_val" / "annotations.json"
        edit(val, lambda c: c["categories"][0].update(name="other"))
        message = rejected()
        assert f"error: {val} has 3 categories: 2 other, 5 class5, 9 class9" in message
        assert "2 class2, 5 class5, 9 class9" in message
        assert "the same category ids and names" in message

    def test_malformed_catalog_entry(self, rejected, toy_recipe, datasets_root):
        (datasets_root / "catalog.yaml").write_text("toy_train: {json: a.json}\n")
        assert f"{datasets_root / 'catalog.yaml'}: entry 'toy_train' is {{'json': 'a.json'}}; expected" in rejected()


class TestImages:
    """Seen only when the image is read."""

    @pytest.mark.parametrize(("name", "workers"), [("toy_train", 0), ("toy_train", 2), ("toy_val", 0)])
    def test_truncated_jpeg(self, failed, toy_recipe, datasets_root, name, workers):
        victim = datasets_root / name / "images" / "2.jpg"
        victim.write_bytes(victim.read_bytes()[:400])
        message = failed("DATALOADER.NUM_WORKERS", workers)
        assert f"error: {victim}: cannot be decoded" in message
        assert "fetch the file again or leave the image out" in message

    def test_size_differs_from_the_json(self, failed, toy_recipe, datasets_root):
        victim = datasets_root / "toy_train" / "images" / "2.jpg"
        Image.new("RGB", (50, 30)).save(victim)
        message = failed()
        assert f"error: {victim}: image is 50 x 30 px, the json says 64 x 96; " in message
        assert "correct width and height in the json" in message


class TestRunFolder:
    @pytest.mark.parametrize("place", ["blocked", "blocked/below/run"])
    def test_a_file_is_in_the_way(self, rejected, tmp_path, place):
        (tmp_path / "blocked").write_text("a file")
        message = rejected("OUTPUT_DIR", tmp_path / place)
        assert f"OUTPUT_DIR {tmp_path / place} cannot be written to ({tmp_path / 'blocked'}: " in message
        assert "name another folder: OUTPUT_DIR PATH" in message

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc, which even root cannot write to")
    def test_no_permission(self, rejected):
        assert "OUTPUT_DIR /proc/run cannot be written to (/proc: " in rejected("OUTPUT_DIR", "/proc/run")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; test_no_permission covers root")
    def test_read_only_folder(self, rejected, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o555)
        assert f"({tmp_path / 'locked'}: Permission denied)" in rejected("OUTPUT_DIR", tmp_path / "locked" / "run")

    def test_a_pipe_in_it(self, tmp_path):
        os.mkfifo(tmp_path / "log.txt")
        with pytest.raises(UserError, match=r"log\.txt is a pipe, which has no end; move it away, or name another"):
            RunDir(tmp_path).check(allow_existing=True)

    def test_holds_a_run(self, rejected, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}\n')
        message = rejected()
        assert f"OUTPUT_DIR {tmp_path / 'run'} already holds a run; continue it with --resume" in message
        assert "or name another folder: OUTPUT_DIR PATH" in message


class TestWeights:
    """Files that exist but are no weights of this model."""

    def write(self, path: Path, kind: str) -> Path:
        if kind in ("text", "empty"):
            path.write_text("not weights\n" if kind == "text" else "")
        else:
            another = {"encoder.weight": torch.ones(3)}
            torch.save({"code": {"model": torch.nn.Linear(2, 2)}, "tensor": torch.ones(3)}.get(kind, another), path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        return path

    @pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "eval-only"])
    @pytest.mark.parametrize("kind", ["text", "empty", "code", "truncated"])
    def test_not_a_checkpoint(self, rejected, tmp_path, kind, flags):
        path = self.write(tmp_path / "a.pth", kind)
        message = rejected(*flags, "MODEL.WEIGHTS", path)
        found = "holds no network that is known" if kind == "code" else "is damaged or no PyTorch file of plain tensors"
        assert f"weights file {path} {found}" in message
        assert "expected a checkpoint of this repository" in message

    def test_not_a_dictionary(self, rejected, tmp_path):
        path = self.write(tmp_path / "a.pth", "tensor")
        message = rejected("MODEL.WEIGHTS", path)
        assert f"weights file {path} holds a Tensor; expected a checkpoint or tensors by name" in message

    def test_of_another_model(self, rejected, tmp_path):
        path = self.write(tmp_path / "a.pth", "another model")
        message = rejected("MODEL.WEIGHTS", path)
        assert f"weights file {path} holds no network that is known" in message
        assert "expected a checkpoint of this" in message

    def test_of_another_depth(self, rejected, tmp_path):
        torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "a.pth")
        message = rejected("MODEL.WEIGHTS", tmp_path / "a.pth")
        assert "tensors of the backbone: " in message
        assert "without a place, the first is backbone.body.bn1" in message
        assert "MODEL.WEIGHTS has to come from the same MODEL.* keys" in message
