"""Training: the optimizer, a whole run and its folder, resuming, checkpoints, evaluation only, imports."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from run_folder import CLOCK, NO_TEST, interrupted_after, lines, read, weights
from torch import nn

from scratch_det import backends
from scratch_det.backends.torchvision import model as backend
from scratch_det.config import flatten, get_cfg, load_config
from scratch_det.engine import loop, metrics
from scratch_det.engine.checkpointer import read_checkpoint
from scratch_det.engine.optimizer import build_optimizer, clip_gradients, set_learning_rate
from scratch_det.engine.plan import Request, start
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, UserError
from scratch_det.weights.digest import weights_sha256

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scratch_det"
R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Train = Callable[..., Path]


class TestOptimizer:
    def groups(self, *overrides: str) -> dict[tuple[float, float], tuple[int, int]]:
        """(factor on the rate, decay) -> (tensors, numbers) for the paper's R50 model."""
        cfg = load_config(R50, overrides).cfg
        with torch.device("meta"):
            model = backend.build(cfg)
        found = build_optimizer(cfg, model).param_groups
        sizes = {(g["lr_factor"], g["weight_decay"]): [p.numel() for p in g["params"]] for g in found}
        assert len(sizes) == len(found)
        return {group: (len(numbers), sum(numbers)) for group, numbers in sizes.items()}

    def test_groups_with_detectron2s_defaults(self) -> None:
        """Counted in detectron2: 85 tensors with decay, the 138 of the 69 norms without; plus background slots."""
        groups = self.groups("SOLVER.WEIGHT_DECAY_BIAS", "None", "SOLVER.BIAS_LR_FACTOR", "1.0")
        assert groups == {(1.0, 1e-4): (85, 45_649_840 + 4_357), (1.0, 0.0): (138, 61_312)}

    def test_groups_of_the_recipe_are_detectrons(self) -> None:
        groups = self.groups()
        unnormed = 3 + 1 + 2 + 2  # RPN, fc, box predictors, deconvolution and mask logits: weight and bias
        assert {group: tensors for group, (tensors, _) in groups.items()} == {
            (1.0, 1e-4): 85 - unnormed,
            (1.0, 0.0): 69,  # scales of the norms
            (2.0, 0.0): 69 + unnormed,
        }
        assert groups[1.0, 0.0] == (69, 61_312 // 2)

    def test_decay_of_norms_and_of_biases(self) -> None:
        overrides = (
            "SOLVER.WEIGHT_DECAY_NORM",
            "0.5",
            "SOLVER.WEIGHT_DECAY_BIAS",
            "0.25",
            "SOLVER.BIAS_LR_FACTOR",
            "1.0",
        )
        groups = self.groups(*overrides)
        assert groups[1.0, 0.5] == (69, 61_312 // 2)
        assert set(groups) == {(1.0, 1e-4), (1.0, 0.5), (1.0, 0.25)}

    def test_frozen_parameters_stay_out(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        optimizer = build_optimizer(get_cfg(), model)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model[1].parameters()
        }

    def test_momentum_and_nesterov_reach_sgd(self) -> None:
        cfg = get_cfg()
        cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV = 0.8, True
        (group,) = build_optimizer(cfg, nn.Linear(1, 1)).param_groups
        assert (group["momentum"], group["nesterov"]) == (0.8, True)

    @pytest.mark.parametrize(
        ("iteration", "rate"),
        [(0, 0.02 * 0.333333), (250, 0.02 * 0.6666665), (500, 0.02), (209_999, 0.02), (210_000, 0.002),
         (249_999, 0.002), (250_000, 0.0002), (269_999, 0.0002)],
    )  # fmt: skip
    def test_learning_rate(self, iteration: int, rate: float) -> None:
        cfg = load_config(R50).cfg
        optimizer = build_optimizer(cfg, nn.Linear(1, 1))
        assert set_learning_rate(optimizer, cfg, iteration) == pytest.approx(rate)
        assert {group["lr_factor"]: group["lr"] for group in optimizer.param_groups} == {
            1.0: pytest.approx(rate),
            2.0: pytest.approx(2 * rate),
        }

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("value", ([1.0, -1.0], [0.5])), ("norm", ([0.6, -0.8], [0.5]))],
    )
    def test_clipping_acts_on_each_parameter(self, kind: str, expected: tuple[list, list]) -> None:
        cfg = get_cfg()
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
        model = nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(1)])
        model[0].grad, model[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([0.5])
        clip_gradients(cfg, model)
        torch.testing.assert_close(model[0].grad, torch.tensor(expected[0]))
        torch.testing.assert_close(model[1].grad, torch.tensor(expected[1]))
        assert model[2].grad is None


class TestRun:
    def test_folder(self, train: Train, toy_recipe: Path) -> None:
        folder = train("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
        self.check_files(folder)
        self.check_metrics(lines(folder))
        self.check_json(folder)
        cfg = load_config(toy_recipe, ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2",
                                       "OUTPUT_DIR", str(folder), "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
                          backends.defaults(backends.choose("auto"))).cfg  # fmt: skip
        found, expected = flatten(RunDir(folder).read_config()), flatten(cfg)
        assert found.keys() == expected.keys()
        assert all(json.dumps(found[key]) == json.dumps(expected[key]) for key in expected)  # tuples as lists
        for picture in ("curves.png", "predictions.png"):
            with Image.open(folder / picture) as image:
                assert min(image.size) > 200

    @staticmethod
    def check_files(folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {
            "config.yaml", "environment.json", "metrics.json", "checkpoints", "inference", "status.json", "result.json",
            "log.txt", "tensorboard", "curves.png", "predictions.png", "lock",
        }  # fmt: skip
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {
            "model_0000001.pth", "model_best.pth", "model_final.pth", "last_checkpoint", "index.json",
        }  # fmt: skip
        assert [path.name for path in (folder / "inference").iterdir()] == ["coco_instances_results.json"]
        assert (folder / "checkpoints/last_checkpoint").read_text() == "model_final.pth"
        assert read_checkpoint(folder / "checkpoints/model_0000001.pth")["iteration"] == 1

    @staticmethod
    def check_metrics(found: list[dict[str, Any]]) -> None:
        """An evaluation after two iterations, a line of losses after the fourth, the last evaluation at MAX_ITER."""
        assert [line["iteration"] for line in found] == [1, 3, 4]
        middle, losses, final = found
        assert set(losses) == {"iteration", "total_loss", "lr", *LOSSES, *CLOCK}
        assert losses["total_loss"] == pytest.approx(sum(losses[key] for key in LOSSES), rel=0.1)  # medians
        assert (losses["lr"], losses["eta_seconds"]) == (0.01, 0)
        names = [*AP_NAMES, "AP-class2", "AP-class5", "AP-class9"]
        for line in (middle, final):
            assert set(line) == {"iteration", *(f"{task}/{name}" for task in ("bbox", "segm") for name in names)}
            assert line["bbox/APl"] is None  # no large object: not a number, which JSON cannot say

    @staticmethod
    def check_json(folder: Path) -> None:
        result, environment, status = (read(folder, f"{name}.json") for name in ("result", "environment", "status"))
        assert (result["backend"], result["iteration"]) == (backends.choose("auto"), 4)
        assert result["seconds"] > 0
        assert result["weights_sha256"] == weights_sha256(folder / "checkpoints/model_final.pth") != ""
        assert result["metrics"]["bbox"]["AP"] == lines(folder)[-1]["bbox/AP"]
        assert status["state"] == "finished"
        assert (status["iteration"], status["max_iter"]) == (4, 4)
        assert environment["packages"]["torch"] in torch.__version__
        assert {"command", "backend", "library", "python", "platform", "threads", "gpus", "git"} <= environment.keys()
        assert {name: data["images"] for name, data in environment["datasets"].items()} == {
            "toy_train": 4,
            "toy_val": 4,
        }
        assert all(re.fullmatch("[0-9a-f]{64}", data["json_sha256"]) for data in environment["datasets"].values())

    def test_losses_are_medians_of_the_window(self, tmp_path: Path) -> None:
        run_dir = RunDir(tmp_path)
        writer = metrics.Metrics(run_dir, start_iteration=0, max_iter=25, window=[])
        written = [writer.add(i, {"total_loss": float(i), "lr": i / 10, "time": 2.0}) for i in range(25)]
        writer.close()
        assert [i for i, line in enumerate(written) if line] == [19, 24]
        assert lines(tmp_path) == [
            {"iteration": 19, "total_loss": 9.5, "lr": 1.9, "time": 2.0, "eta_seconds": 10.0},
            {"iteration": 24, "total_loss": 22.0, "lr": 2.4, "time": 2.0, "eta_seconds": 0.0},
        ]

    def test_log_is_kept(self, train: Train) -> None:
        log = (train() / "log.txt").read_text()
        assert f"backend {backends.library(backends.choose('auto'))}" in log
        assert "random initialisation" in log
        assert re.search(r"iter 2/2 .*total_loss \d", log)

    def test_a_folder_that_holds_a_run_is_refused(self, train: Train) -> None:
        folder = train()
        before = (folder / "metrics.json").read_bytes()
        with pytest.raises(UserError, match="already holds a run"):
            train()
        assert (folder / "metrics.json").read_bytes() == before

    def test_same_seed_same_weights(self, train: Train) -> None:
        runs = [("a", 3), ("b", 3), ("c", 4)]
        first, again, other = (weights(train("SEED", seed, *NO_TEST, name=name)) for name, seed in runs)
        assert all(first[key].equal(again[key]) for key in first)
        assert not next(iter(first.values())).equal(next(iter(other.values())))

    def test_length_of_the_schedule_does_not_change_its_start(self, train: Train) -> None:
        short = weights(train("SOLVER.MAX_ITER", 2, *NO_TEST, name="short"))
        long = train("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST, name="long")
        long = weights(long, "model_0000001.pth")
        assert all(short[key].equal(long[key]) for key in short)

    def test_divergence_is_said_and_recorded(self, train: Train, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"loss is not finite at iteration 1 .*nan(?s:.)*lower SOLVER.BASE_LR"):
            train("SOLVER.BASE_LR", "1e20", "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1)
        status = read(tmp_path / "run", "status.json")
        assert (status["state"], status["iteration"]) == ("failed", 1)
        assert "not finite" in status["error"]
        assert not (tmp_path / "run/result.json").exists()
        assert (tmp_path / "run/checkpoints/last_checkpoint").read_text() == "model_0000000.pth"

    def test_weights_that_are_not_finite_are_not_saved(
        self, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A finite loss may have a gradient that is not; the next loss would tell, but after the checkpoint."""

        def spoil(run: loop.Run, *arguments: Any) -> tuple[dict[str, float], bool]:
            found = original(run, *arguments)
            if run.state.iteration == 1:
                next(run.state.model.parameters()).data[0] = math.inf
            return found

        original = loop.step
        monkeypatch.setattr(loop, "step", spoil)
        with pytest.raises(UserError, match=r"1 weights are not finite after 2 iterations(?s:.)*not saved(?s:.)*lower"):
            train("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        assert [path.name for path in (tmp_path / "run/checkpoints").glob("*.pth")] == ["model_0000000.pth"]

    def test_bf16(self, train: Train) -> None:
        folder = train("SOLVER.AMP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True, *NO_TEST)
        assert all(math.isfinite(lines(folder)[0][key]) for key in LOSSES)
        assert {value.dtype for value in weights(folder).values()} == {torch.float32}


class TestInitStd:
    def test_is_drawn_and_said(self, train: Train, capsys: pytest.CaptureFixture) -> None:
        train("SOLVER.BASE_LR", 1e-12, *NO_TEST, name="alike", init_std=0.3)
        assert "every layer alike from N(0, 0.3)" in capsys.readouterr().out

    def test_refusals(self, train: Train, tmp_path: Path) -> None:
        weights = train(*NO_TEST) / "checkpoints/model_final.pth"
        with pytest.raises(UserError, match=r"--init-std is of random weights, but MODEL\.WEIGHTS is"):
            train("MODEL.WEIGHTS", weights, *NO_TEST, name="other", init_std=0.1)
        with pytest.raises(UserError, match="--init-std is 0, expected above 0 and below 1"):
            train(*NO_TEST, name="other", init_std=0.0)
        with pytest.raises(UserError, match="--init-std: an evaluation has no use for it"):
            train(name="other", init_std=0.1, eval_only=True)
        with pytest.raises(UserError, match="starts from a checkpoint"):
            train(*NO_TEST, name="other", init_std=0.1, branch_from=str(weights))

    def test_is_kept_with_the_run(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        with interrupted_after(monkeypatch, 2):
            train(*keys, init_std=0.1)
        with pytest.raises(UserError, match=r"holds a run that began with 0\.1"):
            train(*keys, resume=True)
        train(*keys, resume=True, init_std=0.1)
        train("SOLVER.MAX_ITER", 4, resume=True, eval_only=True)  # no --init-std needed


class TestEvalOnly:
    def test_reproduces_the_runs_result(self, train: Train) -> None:
        folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01, "SOLVER.MAX_ITER", 3)
        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01, "MODEL.WEIGHTS", folder / "checkpoints/model_final.pth")
        again = train(*keys, name="again", eval_only=True)
        assert read(again, "inference/result.json")["metrics"] == read(folder, "result.json")["metrics"]
        results = "inference/coco_instances_results.json"
        assert read(again, results)
        assert (again / results).read_bytes() == (folder / results).read_bytes()
        assert [path.name for path in again.iterdir()] == ["inference"]

    def test_with_resume_takes_the_folders_last_checkpoint(self, train: Train) -> None:
        folder = train()
        expected = (folder / "inference/coco_instances_results.json").read_bytes()
        (folder / "inference/coco_instances_results.json").unlink()
        train(eval_only=True, resume=True)
        assert (folder / "inference/coco_instances_results.json").read_bytes() == expected

    def test_untrained_model(self, train: Train, capsys: pytest.CaptureFixture) -> None:
        folder = train(eval_only=True)
        assert 0 <= read(folder, "inference/result.json")["metrics"]["bbox"]["AP"] < 50
        assert "evaluates random weights" in capsys.readouterr().out

    def test_random_weights_do_not_replace_a_runs_predictions(self, train: Train) -> None:
        train()
        with pytest.raises(ConfigError, match="holds a run, whose predictions those of random weights would replace"):
            train(eval_only=True)

    def test_untrained_model_that_finds_nothing(self, train: Train) -> None:
        folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99, eval_only=True)
        assert read(folder, "inference/coco_instances_results.json") == []
        assert read(folder, "inference/result.json")["metrics"]["segm"]["AP"] == 0

    def test_missing_weights(self, train: Train, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"absent\.pth is missing"):
            train("MODEL.WEIGHTS", tmp_path / "absent.pth", eval_only=True)
        assert not (tmp_path / "run").exists()

    def test_nothing_to_evaluate(self, train: Train) -> None:
        with pytest.raises(UserError, match=r"DATASETS\.TEST is empty"):
            train("DATASETS.TEST", "()", eval_only=True)


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
        fields = {"drop_empty_boxes": True}
        for split in ("train", "val"):
            json_file, images = tiny_coco / f"annotations/instances_{split}2017.json", tiny_coco / f"{split}2017"
            register(datasets_root, **{f"coco_2017_{split}": {"json": str(json_file), "images": str(images), **fields}})
        keys = {
            "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, "SEED": 1, "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.BASE_LR": 0.0025,
            "INPUT.MIN_SIZE_TRAIN": "(160,)", "INPUT.MAX_SIZE_TRAIN": 256, "INPUT.MIN_SIZE_TEST": 160,
            "INPUT.MAX_SIZE_TEST": 256, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64, "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
            "SOLVER.MAX_ITER": 5, "SOLVER.STEPS": "(3, 4)", "SOLVER.WARMUP_ITERS": 1, "OUTPUT_DIR": tmp_path / "run",
        }  # fmt: skip
        start(Request(str(R50), words(keys)))
        result = read(tmp_path / "run", "result.json")
        assert result["iteration"] == 5
        assert 0 <= result["metrics"]["bbox"]["AP"] < 50
        assert 0 <= result["metrics"]["segm"]["AP"] < 50
        assert all(math.isfinite(lines(tmp_path / "run")[0][key]) for key in LOSSES)
