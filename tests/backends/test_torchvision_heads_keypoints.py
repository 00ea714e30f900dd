"""The torchvision backend's keypoint head by hand, and beside detectron2's."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from run_folder import read
from samples import sample
from torch import Tensor, nn

from scratch_det import backends
from scratch_det.backends import torchvision as torchvision_backend
from scratch_det.backends.torchvision_heads import keypoint_loss, keypoint_samples
from scratch_det.config.load import get_cfg, load_config
from scratch_det.conversion import convert_file
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.transforms import flip, resize
from scratch_det.modeling.ops import decode_keypoints
from scratch_det.weights.convert import convert
from scratch_det.weights.origin import Weights

KEYS = ("MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")  # fmt: skip
SIDE = 4  # of the heat maps by hand
BOX = torch.tensor([[10.0, 20.0, 18.0, 24.0]])  # a place is 2 x 1 px


def keys_of(**changes: Any) -> CfgNode:
    keys = get_cfg().MODEL.ROI_KEYPOINT_HEAD
    keys.update(changes)
    return keys


class TestLoss:
    points = torch.tensor([[[11.0, 20.5, 2.0], [18.0, 24.0, 1.0], [12.0, 21.0, 0.0], [9.0, 21.0, 2.0]]])
    """In the first place, on the far corner (which counts as the last place), not labelled, outside."""

    def logits(self) -> Tensor:
        return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def test_by_hand(self) -> None:
        maps = self.logits()
        first, last = (maps[0, k].flatten().log_softmax(0)[place] for k, place in ((0, 0), (1, SIDE**2 - 1)))
        loss = keypoint_loss(maps, BOX, self.points, keys_of(LOSS_WEIGHT=3.0), most_boxes=7)
        assert loss.item() == pytest.approx(-3.0 * (first + last).item() / 2)
        fixed = keys_of(NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS=False, LOSS_WEIGHT=4.0)
        loss = keypoint_loss(maps, BOX, self.points, fixed, most_boxes=7)
        assert loss.item() == pytest.approx(-4.0 * (first + last).item() / (7 * 4))

    @pytest.mark.parametrize("boxes", [0, 1])
    def test_nothing_labelled(self, boxes: int) -> None:
        maps = self.logits()
        loss = keypoint_loss(maps[:boxes], BOX[:boxes], self.points[:boxes] * 0, keys_of(), most_boxes=7)
        loss.backward()
        assert loss.item() == 0
        assert maps.grad.eq(0).all()

    def test_boxes_without_a_point_inside_are_left_out(self) -> None:
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [11, 0, 20, 10], [10, 0, 20, 10]], dtype=torch.float32)
        points = torch.tensor([[[10.0, 5.0, 1.0]], [[5.0, 5.0, 0.0]], [[10.0, 5.0, 1.0]], [[10.0, 5.0, 1.0]]])
        [chosen], [theirs] = keypoint_samples([boxes], [points])
        assert chosen.equal(boxes[[0, 3]])
        assert theirs.equal(points[[0, 3]])


class TestDecoding:
    def test_the_peak_comes_back(self) -> None:
        maps = torch.full((1, 2, SIDE, SIDE), -20.0)
        maps[0, 0, 0, 0] = maps[0, 1, 3, 2] = 20.0
        found = decode_keypoints(maps, torch.tensor([[10.0, 20.0, 14.0, 24.0]]))
        assert found[0, :, :2].tolist() == [[10.5, 20.5], [12.5, 23.5]]
        assert found[0, :, 2].tolist() == pytest.approx([1.0, 1.0])

    def test_the_score_of_a_flat_map(self) -> None:
        found = decode_keypoints(torch.zeros(1, 1, SIDE, SIDE), torch.tensor([[0.0, 0.0, 30.0, 9.5]]))
        assert found[0, 0, 2].item() == pytest.approx(1 / SIDE**2)

    def test_no_boxes(self) -> None:
        assert decode_keypoints(torch.zeros(0, 5, SIDE, SIDE), torch.zeros(0, 4)).shape == (0, 5, 3)


def test_initial_weights() -> None:
    """N(0, sqrt(2 / fan_out)) and no norm; the deconvolution's fan counts as detectron2's does."""
    cfg = load_config(ROOT / "configs/Digits/keypoints.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "10"]).cfg
    torch.manual_seed(0)
    heads = torchvision_backend.build(cfg).roi_heads
    layers = [*heads.keypoint_head, heads.keypoint_predictor.kps_score_lowres]
    weights = [layer.weight for layer in layers if not isinstance(layer, nn.ReLU)]
    assert [tuple(weight.shape) for weight in weights] == [(64, 64, 3, 3)] * 3 + [(64, 17, 4, 4)]
    for weight in weights:
        expected = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
        assert weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.detectron2
class TestAgainstDetectron2:
    """The same weights, images and truth in both libraries."""

    SAMPLE_ALL = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16384", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "512",
                  "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")  # fmt: skip
    VARIANTS = (
        (),
        ("MODEL.MASK_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlign",
         "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", "False",
         "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", "4.0"),
    )  # fmt: skip

    @pytest.fixture(params=VARIANTS, ids=["keypoints", "masks too, fixed normaliser"])
    def pair(self, request: pytest.FixtureRequest, small_model: list[str]) -> tuple[nn.Module, nn.Module]:
        words = [*small_model, *self.SAMPLE_ALL, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *map(str, KEYS), *request.param]
        recipe, words = ROOT / "configs/Digits/keypoints.yaml", [*words, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
        torch.manual_seed(1)
        ours = torchvision_backend.build(load_config(recipe, words).cfg)
        with torch.no_grad():
            for layer in (ours.roi_heads.box_predictor.cls_score, ours.roi_heads.box_predictor.bbox_pred):
                layer.weight.normal_(std=0.03)
        weights = Weights(Path("memory"), ours.state_dict(), "torchvision", is_detector=True)
        theirs = backends.load("detectron2").build(load_config(recipe, words).cfg)
        theirs.load_state_dict(convert(weights, "detectron2")[0])
        return ours, theirs

    @staticmethod
    def batch(model: nn.Module) -> list[dict[str, Any]]:
        """Keypoints inside the boxes, on their borders, outside them and unlabelled."""
        batch = [sample(64, 96, objects=3, scale=1.5), sample(80, 64, seed=1)]
        for one in batch:
            low, high = one["boxes"][:, None, :2], one["boxes"][:, None, 2:]
            shares = torch.tensor([[[0.3, 0.6], [1.0, 1.0], [1.4, -0.2]]])
            v = torch.tensor([[2.0], [1.0], [2.0]]).expand(len(low), 3, 1)
            one["keypoints"] = torch.cat([low + shares * (high - low), v], dim=2)
            one["keypoints"][-1] = 0
        return (
            batch if model.roi_heads.has_mask() else [{k: v for k, v in one.items() if k != "masks"} for one in batch]
        )

    def test_losses_and_gradients(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = pair
        losses = torchvision_backend.losses(ours, self.batch(ours))
        expected = backends.load("detectron2").losses(theirs, self.batch(ours))
        assert list(losses) == list(expected)
        assert {n: loss.item() for n, loss in losses.items()} == pytest.approx(
            {n: loss.item() for n, loss in expected.items()}, rel=1e-4
        )
        losses["loss_keypoint"].backward()
        expected["loss_keypoint"].backward()
        found = ours.roi_heads.keypoint_predictor.kps_score_lowres.weight.grad
        torch.testing.assert_close(found, theirs.roi_heads.keypoint_head.score_lowres.weight.grad, rtol=1e-3, atol=1e-5)

    def test_an_overflow_gives_the_same_losses_as_not_finite(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = pair
        backend = backends.load("detectron2")
        sound = backend.losses(theirs, self.batch(ours))
        with torch.no_grad():
            theirs.proposal_generator.rpn_head.anchor_deltas.weight.fill_(math.inf)
        assert list(backend.losses(theirs, self.batch(ours))) == list(sound)

    def test_detections(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = pair
        found = torchvision_backend.predict(ours, self.batch(ours))
        expected = backends.load("detectron2").predict(theirs, self.batch(ours))
        for one, other in zip(found, expected, strict=True):
            n = len(other["scores"])  # detectron2 drops boxes without area after the top 10 are chosen
            assert n >= 5
            torch.testing.assert_close(one["boxes"][:n], other["boxes"], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(one["keypoints"][:n], other["keypoints"], rtol=1e-4, atol=1e-3)

    def test_transforms(self) -> None:
        from detectron2.data.detection_utils import transform_keypoint_annotations
        from detectron2.data.transforms import HFlipTransform, ResizeTransform, TransformList

        points, flip_indices = torch.rand(4, 3, 3) * torch.tensor([50.0, 40.0, 1.0]), (2, 1, 0)
        points[..., 2] = torch.tensor([2.0, 1.0, 2.0])
        one = {"image": torch.zeros(3, 40, 50, dtype=torch.uint8), "keypoints": points.clone()}
        found = flip(resize(one, (56, 70)), "horizontal", flip_indices)["keypoints"]
        steps = TransformList([ResizeTransform(40, 50, 56, 70), HFlipTransform(70)])
        for row, other in zip(found, points, strict=True):
            expected = transform_keypoint_annotations(other.flatten().tolist(), steps, (56, 70), flip_indices)
            torch.testing.assert_close(row, torch.as_tensor(expected).float(), rtol=1e-4, atol=1e-4)

    def test_the_images_it_trains_on(self, points_recipe: Path, datasets_root: Path) -> None:
        from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
        from detectron2.data.datasets import register_coco_instances

        entry = lookup("toy_train")
        register_coco_instances("toy_train", {}, str(entry.json_file), str(entry.image_root))
        data = read_coco(entry, need_masks=False, need_keypoints=True)
        try:
            for least in (0, 1, 6, 7, 9):
                keys = [*KEYS, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", least]
                found = [data.images[k]["id"] for k in data.training_images(load_config(points_recipe, keys).cfg)]
                records = get_detection_dataset_dicts("toy_train", min_keypoints=least)
                assert found == [record["image_id"] for record in records]
                first, theirs = data.training_objects(0)[0], records[0]["annotations"]
                assert [v + 0.5 for v in first["keypoints"][:2]] in [one["keypoints"][:2] for one in theirs]
        finally:
            DatasetCatalog.remove("toy_train")
            MetadataCatalog.pop("toy_train")


@pytest.mark.detectron2
@pytest.mark.parametrize("source", backends.BACKENDS)
def test_a_checkpoint_is_worth_as_much_with_the_other_backend(
    source: str,
    points_recipe: Path,
    train: Callable,
    tmp_path: Path,
    datasets_root: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The recipe names no number of keypoints: the weights tell."""
    target = next(name for name in backends.BACKENDS if name != source)
    file = train(*KEYS, "DATASETS.TEST", "()", backend=source) / "checkpoints/model_final.pth"
    image = datasets_root / "toy_val/images/1.jpg"
    convert_file(str(file), tmp_path / "new.pth", target, image=image)
    assert "100.0% of the keypoints at most 0.5 px" in capsys.readouterr().out
    weights = ("MODEL.WEIGHTS", str(tmp_path / "new.pth"))
    after = train(*KEYS, *weights, name="after", backend=target, eval_only=True)
    before = train(*KEYS, "MODEL.WEIGHTS", file, name="before", backend=source, eval_only=True)
    one, other = (read(folder, "inference/coco_instances_results.json") for folder in (before, after))
    assert len(one) == len(other) > 0
    points = [torch.tensor([r["keypoints"] for r in results]) for results in (one, other)]
    assert (points[0] - points[1]).abs().lt(0.5).float().mean() > 0.9
