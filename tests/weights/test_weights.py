"""Weights of many origins: where they lie, reading them, their names, loading and converting them."""

import contextlib
import copy
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_tool
from run_folder import NO_TEST, weights
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from scratch_det import backends, conversion
from scratch_det.backends.torchvision import model as backend
from scratch_det.config import load_config
from scratch_det.conversion import agreement
from scratch_det.data.image import encode_masks
from scratch_det.errors import ConfigError, UserError
from scratch_det.weights import locate
from scratch_det.weights.convert import checkpoint_of, convert
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import check_weights, fetch, url_of
from scratch_det.weights.names import Scheme, from_caffe2, renamed, scheme_of
from scratch_det.weights.read import (
    DETECTRON,
    IMAGENET,
    Pixels,
    Weights,
    adapt_first_layer,
    read_checkpoint,
    read_pickle,
    read_weights,
)

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
PAIRS = [  # torchvision, detectron2
    ("backbone.body.bn1.running_mean", "backbone.bottom_up.stem.conv1.norm.running_mean"),
    ("backbone.body.layer3.22.conv2.weight", "backbone.bottom_up.res4.22.conv2.weight"),
    ("backbone.body.layer1.0.downsample.1.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias"),
    ("backbone.fpn.inner_blocks.3.0.weight", "backbone.fpn_lateral5.weight"),
    ("backbone.fpn.layer_blocks.0.1.weight", "backbone.fpn_output2.norm.weight"),
    ("rpn.head.conv.0.0.bias", "proposal_generator.rpn_head.conv.bias"),
    ("roi_heads.box_head.3.0.weight", "roi_heads.box_head.conv4.weight"),
    ("roi_heads.box_head.5.weight", "roi_heads.box_head.fc1.weight"),
    ("roi_heads.box_head.7.bias", "roi_heads.box_head.fc2.bias"),
    ("roi_heads.mask_head.1.1.weight", "roi_heads.mask_head.mask_fcn2.norm.weight"),
    ("roi_heads.mask_predictor.conv5_mask.weight", "roi_heads.mask_head.deconv.weight"),
    ("roi_heads.keypoint_head.14.weight", "roi_heads.keypoint_head.conv_fcn8.weight"),
    ("roi_heads.keypoint_predictor.kps_score_lowres.bias", "roi_heads.keypoint_head.score_lowres.bias"),
]
CAFFE2 = [
    ("conv1_w", "stem.conv1.weight"),
    ("conv1_gn_s", "stem.conv1.norm.weight"),
    ("res_conv1_bn_b", "stem.conv1.norm.bias"),
    ("res2_0_branch1_w", "res2.0.shortcut.weight"),
    ("res2_0_branch1_gn_b", "res2.0.shortcut.norm.bias"),
    ("res4_22_branch2c_w", "res4.22.conv3.weight"),
    ("res5_2_branch2a_bn_s", "res5.2.conv1.norm.weight"),
    ("res3_1_branch2b_bn_riv", "res3.1.conv2.norm.running_var"),
    ("pred_w", None),
    ("conv1_w_momentum", None),
]


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def model_of(*overrides: Any, recipe: Path = R50) -> nn.Module:
    with torch.device("meta"):
        return backend.build(load_config(recipe, list(overrides)).cfg)


def blobs_of(classifier: dict[str, Tensor], norm: str) -> dict[str, np.ndarray]:
    """A torchvision classifier under Detectron's names; ``norm`` is bn or gn."""
    found = {}
    for name, value in classifier.items():
        if name.startswith("fc.") or "running" in name or "num_batches" in name:
            continue
        layer, _, leaf = name.rpartition(".")
        layer = re.sub(r"layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch", layer)
        layer = layer.replace("downsample.0", "1").replace("downsample.1", f"1_{norm}")
        layer = re.sub(r"branchconv(\d)", lambda m: f"branch2{'abc'[int(m[1]) - 1]}", layer)
        layer = re.sub(r"branchbn(\d)", lambda m: f"branch2{'abc'[int(m[1]) - 1]}_{norm}", layer)
        layer = layer.replace("bn1", "res_conv1_bn" if norm == "bn" else "conv1_gn")
        is_norm = layer.endswith(f"_{norm}")
        found[f"{layer}_{({'weight': 's', 'bias': 'b'} if is_norm else {'weight': 'w', 'bias': 'b'})[leaf]}"] = (
            value.numpy()
        )
    return found


class TestNames:
    @pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[theirs for _, theirs in PAIRS])
    def test_both_ways(self, ours: str, theirs: str) -> None:
        names = [name for name, _ in PAIRS] + [f"roi_heads.box_head.{i}.0.weight" for i in range(4)]
        assert renamed(names, "torchvision", "detectron2")[ours] == theirs
        names = [name for _, name in PAIRS] + [f"roi_heads.box_head.conv{i}.weight" for i in range(1, 5)]
        assert renamed(names, "detectron2", "torchvision")[theirs] == ours

    def test_hidden_convolutions_of_an_rpn(self) -> None:
        ours = [f"rpn.head.conv.{n}.0.weight" for n in range(2)]
        theirs = [f"proposal_generator.rpn_head.conv.conv{n}.weight" for n in range(2)]
        assert renamed(ours, "torchvision", "detectron2") == dict(zip(ours, theirs, strict=True))
        assert renamed(theirs, "detectron2", "torchvision") == dict(zip(theirs, ours, strict=True))

    @pytest.mark.parametrize("fcs", [1, 2])
    @pytest.mark.parametrize("convs", [0, 4])
    @pytest.mark.parametrize("norm", ["GN", "BN"])
    def test_a_model_there_and_back(self, norm: str, convs: int, fcs: int) -> None:
        model = model_of("MODEL.RESNETS.NORM", norm, "MODEL.ROI_BOX_HEAD.NUM_CONV", convs,
                         "MODEL.ROI_BOX_HEAD.NUM_FC", fcs, "MODEL.RPN.CONV_DIMS", [-1] * fcs)  # fmt: skip
        there = renamed(model.state_dict(), "torchvision", "detectron2")
        assert None not in there.values()
        assert len(set(there.values())) == len(there)
        back = renamed(map(str, there.values()), "detectron2", "torchvision")
        assert [back[str(name)] for name in there.values()] == list(there)

    @pytest.mark.parametrize("builder", [maskrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn])
    def test_torchvisions_own_models(self, builder: Callable) -> None:
        with torch.device("meta"):
            names = builder(weights=None, weights_backbone=None).state_dict()
        there = renamed(names, "torchvision", "detectron2")
        assert None not in there.values()
        assert there["roi_heads.box_head.fc7.weight"] == "roi_heads.box_head.fc2.weight"

    @pytest.mark.detectron2
    @pytest.mark.parametrize("keypoints", [False, True])
    def test_detectron2s_models(self, keypoints: bool) -> None:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model

        cfg = get_cfg()
        cfg.merge_from_file(str(R50))
        cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.KEYPOINT_ON", keypoints, "MODEL.ROI_BOX_HEAD.NUM_CONV", 0,
                             "MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.FPN.NORM", "",
                             "MODEL.RPN.CONV_DIMS", [-1, -1] if keypoints else [-1]])  # fmt: skip
        with torch.device("meta"):
            names = build_model(cfg).state_dict()
        assert any("keypoint" in name for name in names) == keypoints
        there = renamed(names, "detectron2", "torchvision")
        assert None not in there.values()
        back = renamed(map(str, there.values()), "torchvision", "detectron2")
        assert [back[str(name)] for name in there.values()] == list(there)

    @pytest.mark.parametrize(("blob", "name"), CAFFE2, ids=[blob for blob, _ in CAFFE2])
    def test_detectrons(self, blob: str, name: str | None) -> None:
        assert from_caffe2(blob) == name

    @pytest.mark.detectron2
    def test_detectrons_as_detectron2_reads_them(self) -> None:
        from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

        blobs = [blob for blob, name in CAFFE2 if name]
        assert [from_caffe2(blob) for blob in blobs] == convert_basic_c2_names(blobs)

    def test_who_is_recognised(self) -> None:
        assert scheme_of(resnet18().state_dict()) == Scheme("torchvision", whole=False)
        assert scheme_of(["proposal_generator.x", "backbone.fpn_output2.bias"]) == Scheme("detectron2", whole=True)
        assert scheme_of(["conv1_w", "res2_0_branch1_w"]) == Scheme("Detectron", whole=False)
        assert scheme_of(["encoder.weight"]) is None


class TestFiles:
    def test_a_pickle_of_arrays(self, tmp_path: Path) -> None:
        """As Python 2 wrote them, too, and with single numbers."""
        blobs = {"a": np.arange(3, dtype=np.float32), "b": np.float32(2), "d": np.array([1, 256], ">i4")}
        content = {"blobs": OrderedDict(blobs, c=np.asfortranarray(np.arange(6).reshape(2, 3))), "cfg": "text"}
        for protocol in (2, 3, 4, 5):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
            found = read_pickle(tmp_path / "a.pkl")
            assert found["cfg"] == "text"
            assert (found["blobs"]["a"].tolist(), found["blobs"]["a"].dtype) == ([0, 1, 2], np.float32)
            assert (found["blobs"]["b"], found["blobs"]["b"].shape) == (2, ())
            assert found["blobs"]["c"].tolist() == [[0, 1, 2], [3, 4, 5]]
            assert found["blobs"]["d"].tolist() == [1, 256]

    def test_bytes_that_python_2_wrote(self, tmp_path: Path) -> None:
        """There an array's content was a str, and is read as text."""
        raw = np.array([1.5, -2], "<f4").tobytes()
        kind = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02}U\x01a" + array + kind + b"\x89U\x08" + raw + b"tbs.")
        assert read_pickle(tmp_path / "a.pkl")["a"].tolist() == [1.5, -2]

    @pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": {"a": np.zeros(2), "b": [bomb]}}])
    def test_a_pickle_of_anything_else_is_refused_unread(self, wrap: Callable, tmp_path: Path) -> None:
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(wrap(Bomb(tmp_path / "touched"))))
        with pytest.raises(UserError, match=r"evil\.pkl holds pathlib\S* expected NumPy arrays alone"):
            read_weights(tmp_path / "evil.pkl")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}]), np.zeros(2, "i4,O"), np.zeros(2, "M8[s]")])
    def test_arrays_of_anything_but_numbers_are_refused(self, array: np.ndarray, tmp_path: Path) -> None:
        """NumPy would read pointers from the file."""
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array}))
        with pytest.raises(UserError, match="expected arrays of numbers"):
            read_pickle(tmp_path / "a.pkl")

    def test_every_changed_byte_is_survived(self, tmp_path: Path) -> None:
        content = pickle.dumps({"a": np.arange(4, dtype=np.float32), "b": np.float32(1)}, protocol=2)
        for place in range(len(content)):
            for change in (0x00, 0xFF, content[place] ^ 1):
                (tmp_path / "a.pkl").write_bytes(content[:place] + bytes([change]) + content[place + 1 :])
                with contextlib.suppress(UserError):
                    read_pickle(tmp_path / "a.pkl")

    @pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": np.zeros(9)})[:-20]])
    def test_damage(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pkl is damaged or no pickle"):
            read_pickle(tmp_path / "a.pkl")

    def test_no_dictionary(self, tmp_path: Path) -> None:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([np.zeros(2)]))
        with pytest.raises(UserError, match="holds a list; expected a dictionary of arrays"):
            read_pickle(tmp_path / "a.pkl")

    def test_nothing_that_is_a_tensor(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "a.pth")
        with pytest.raises(UserError, match="holds no tensors by name"):
            read_weights(tmp_path / "a.pth")


class TestAddress:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache/scratch_det/weights"

    def test_names_of_the_catalog(self) -> None:
        """detectron2's own, which its catalog test below confirms."""
        expected = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl"
        assert url_of("catalog://ImageNetPretrained/FAIR/R-50-GN") == expected
        assert url_of("detectron2://a/b.pkl") == "https://dl.fbaipublicfiles.com/detectron2/a/b.pkl"
        assert url_of("/a/b.pth") is None

    @pytest.mark.detectron2
    @pytest.mark.parametrize("name", locate.IMAGENET)
    def test_addresses_are_detectron2s(self, name: str) -> None:
        from detectron2.checkpoint.catalog import ModelCatalog

        assert url_of(locate.CATALOG + name) == ModelCatalog.get(f"ImageNetPretrained/{name}")

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ("catalog://ImageNetPretrained/FAIR/R-50-GNN", "did you mean 'FAIR/R-50-GN'"),
            ("s3://bucket/a.pth", "expected a file, https://"),
        ],
    )
    def test_unknown_ones_are_refused_at_once(self, weights: str, expected: str, train: Callable) -> None:
        with pytest.raises(ConfigError, match=expected):
            train("MODEL.WEIGHTS", weights)

    def test_fetched_once(self, tmp_path: Path, cache: Path) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
        url = (tmp_path / "a.pth").as_uri()
        check_weights(url)
        file = fetch(url)
        assert file.is_relative_to(cache)
        (tmp_path / "a.pth").unlink()
        assert fetch(url) == file
        assert read_checkpoint(file)["a"].tolist() == [1, 1, 1]

    def test_without_network(self, cache: Path) -> None:
        for url in ("http://127.0.0.1:9/a.pth", "http://[bad/a.pth", "http://127.0.0.1:9/a b.pth"):
            with pytest.raises(UserError, match=rf"{re.escape(url)} cannot be fetched .*without network, fetch"):
                fetch(url)
        assert not list(cache.rglob("*.pth*[!k]"))

    def test_a_short_answer_is_no_file(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Answer(io.BytesIO):
            headers = {"Content-Length": "10"}  # noqa: RUF012

        monkeypatch.setattr(locate, "urlopen", lambda url, timeout: Answer(b"123"))
        with pytest.raises(UserError, match="3 of 10 bytes came"):
            fetch("https://example.org/a.pth")
        assert not list(cache.rglob("a.pth"))


class TestPixels:
    def test_order_and_division_go_into_the_weights(self) -> None:
        torch.manual_seed(0)
        weight, image = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 9, 9) * 255
        recipe = Pixels("BGR", IMAGENET.mean[::-1], (1.0, 2.0, 3.0))
        adapted, said = adapt_first_layer(weight, IMAGENET, recipe)

        def see(pixels: Pixels, weight: Tensor) -> Tensor:
            values = image if pixels.format == "RGB" else image.flip(1)
            mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (pixels.mean, pixels.std))
            return F.conv2d((values - mean) / std, weight, padding=1)

        torch.testing.assert_close(see(recipe, adapted), see(IMAGENET, weight))
        assert said == "channels RGB to BGR; divided by PIXEL_STD 1 2 3 instead of 57.375 57.12 58.395"

    def test_another_mean_is_told(self) -> None:
        _, said = adapt_first_layer(torch.zeros(1, 3, 1, 1), IMAGENET.reordered("BGR"), DETECTRON)
        assert said.endswith("PIXEL_MEAN stays the recipe's, up to 0.9 of 255 from the weights' own")

    def test_the_same_pixels_change_nothing(self) -> None:
        weight = torch.randn(2, 3, 1, 1)
        adapted, said = adapt_first_layer(weight, DETECTRON, DETECTRON)
        assert adapted is weight
        assert said == ""


class TestLoading:
    @pytest.fixture
    def model(self, toy_recipe: Path) -> nn.Module:
        torch.manual_seed(0)
        return backend.build(load_config(toy_recipe, ["MODEL.RESNETS.NORM", "BN"]).cfg)

    @pytest.fixture
    def load(self, toy_recipe: Path, tmp_path: Path) -> Callable[..., str]:
        """``load(model, state, KEY, VALUE, ...)``: save ``state``, load it as the recipe's MODEL.WEIGHTS."""

        def load(model: nn.Module, state: dict[str, Any], *overrides: Any, name: str = "weights.pth") -> str:
            if name.endswith(".pkl"):
                (tmp_path / name).write_bytes(pickle.dumps(state, protocol=2))
            else:
                torch.save(state, tmp_path / name)
            return load_weights(model, tmp_path / name, "torchvision", load_config(toy_recipe, list(overrides)).cfg)

        return load

    def test_own_checkpoint(self, model: nn.Module, load: Callable[..., str]) -> None:
        changed = {key: value + 1 for key, value in model.state_dict().items()}
        total = len(changed)
        assert f"{total} of {total} tensors loaded" in load(model, {"model": changed, "iteration": 3})
        assert all(value.equal(changed[key]) for key, value in model.state_dict().items())

    def test_of_a_wrapped_model(self, model: nn.Module, load: Callable[..., str]) -> None:
        changed = {key: value + 1 for key, value in model.state_dict().items()}
        load(model, {"state_dict": {f"module.{key}": value for key, value in changed.items()}})
        assert all(value.equal(changed[key]) for key, value in model.state_dict().items())

    def test_imagenet_classifier_fills_the_backbone_alone(self, model: nn.Module, load: Callable[..., str]) -> None:
        torch.manual_seed(1)
        classifier = resnet18().state_dict()
        heads = {
            key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone.body.")
        }
        said = load(model, classifier)
        number = len(classifier) - 2
        assert f"{number} of {number + len(heads)} tensors loaded, the backbone, from a torchvision or timm cl" in said
        assert "channels RGB to BGR; divided by PIXEL_STD 1 1 1 instead of 57.375 57.12 58.395" in said
        loaded = model.state_dict()
        first = loaded["backbone.body.conv1.weight"] * torch.tensor(IMAGENET.std[::-1]).view(1, 3, 1, 1)
        torch.testing.assert_close(first.flip(1), classifier.pop("conv1.weight"))
        assert all(loaded[f"backbone.body.{key}"].equal(value) for key, value in classifier.items() if key[:3] != "fc.")
        assert all(loaded[key].equal(value) for key, value in heads.items())

    def test_batch_norm_weights_do_not_pass_for_group_norm(self, toy_recipe: Path, load: Callable[..., str]) -> None:
        model = backend.build(load_config(toy_recipe, ["MODEL.RESNETS.NORM", "GN"]).cfg)
        with pytest.raises(UserError, match=r"without a place, the first is backbone\.body\.bn1\.running_mean"):
            load(model, resnet18().state_dict())

    @pytest.mark.parametrize(
        ("damage", "named"),
        [
            (lambda state: state.pop("rpn.head.cls_logits.bias"), "1 missing, the first is rpn.head.cls_logits.bias"),
            (
                lambda state: state.update({"backbone.fpn.inner_blocks.0.0.weight": torch.zeros(1)}),
                "1 of another shape, the first is backbone.fpn.inner_blocks.0.0.weight",
            ),
        ],
        ids=["missing", "other shape"],
    )
    def test_whatever_stays_random_is_refused(
        self, damage: Callable, named: str, model: nn.Module, load: Callable[..., str]
    ) -> None:
        state = model.state_dict()
        total = len(state)
        before = copy.deepcopy(model.state_dict())
        damage(state)
        with pytest.raises(UserError, match=rf"covers {total - 1} of {total} tensors.*{re.escape(named)}"):
            load(model, state)
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())

    def test_strangers_weights_are_refused(self, model: nn.Module, load: Callable[..., str]) -> None:
        with pytest.raises(UserError, match=r"has names such as encoder\.weight; expected a checkpoint of this repo"):
            load(model, {"encoder.weight": torch.zeros(3)})

    def test_the_stride_of_bottlenecks(self, toy_recipe: Path, tmp_path: Path) -> None:
        cfg = load_config(R50, ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", True]).cfg
        with torch.device("meta"):
            model = backend.build(cfg)
        torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
        with pytest.raises(UserError, match=r"STRIDE_IN_1X1 is True; set it to False"):
            load_weights(model, tmp_path / "resnet50.pth", "torchvision", cfg)

    def test_recorded_pixels_count(self, model: nn.Module, load: Callable[..., str]) -> None:
        """A model that was trained with other pixel statistics sees the same image through the recipe's."""
        state = {key: value.clone() for key, value in model.state_dict().items()}
        recorded = Pixels("RGB", DETECTRON.mean[::-1], (2.0, 2.0, 2.0)).as_dict()
        assert "channels RGB to BGR; divided by" in load(model, {"model": state, "pixels": recorded})
        name = "backbone.body.conv1.weight"
        torch.testing.assert_close(model.state_dict()[name], state[name].flip(1) / 2)

    def test_a_run_records_its_pixels(self, train: Callable) -> None:
        folder = train("MODEL.PIXEL_STD", "[2.0, 3.0, 4.0]", *NO_TEST)
        content = read_checkpoint(folder / "model_final.pth")
        assert content["pixels"] == {"format": "BGR", "mean": list(DETECTRON.mean), "std": [2.0, 3.0, 4.0]}

    def test_training_starts_from_them(self, train: Callable, tmp_path: Path) -> None:
        torch.manual_seed(1)
        state = resnet18().state_dict()
        torch.save(state, tmp_path / "resnet18.pth")
        keys = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 2, "INPUT.FORMAT", "RGB",
                "MODEL.PIXEL_STD", list(IMAGENET.std), *NO_TEST)  # fmt: skip
        trained = weights(train("MODEL.WEIGHTS", tmp_path / "resnet18.pth", *keys, backend="torchvision"))
        moved = {key for key, value in state.items() if not trained.get(f"backbone.body.{key}", value).equal(value)}
        assert {key.split(".")[0] for key in moved} == {"layer2", "layer3", "layer4"}
        assert not [key for key in moved if "bn" in key or "num_batches" in key]


class TestDetectron:
    """Detectron's .pkl files, made here from torchvision's ResNets."""

    @pytest.mark.parametrize("library", [pytest.param("detectron2", marks=pytest.mark.detectron2), "torchvision"])
    def test_group_norm(self, library: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels)).state_dict()
        blobs = blobs_of(classifier, "gn")
        assert {"conv1_w", "conv1_gn_s", "res2_0_branch1_gn_b", "res5_2_branch2c_gn_s"} < blobs.keys()
        extra = {"pred_w": np.zeros((9, 2048)), "conv1_w_momentum": blobs["conv1_w"], "conv1_b": np.ones(64)}
        (tmp_path / "R-50-GN.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, **extra}, "cfg": ""}, protocol=2))
        cfg = load_config(R50).cfg
        model = backends.load(library).build(cfg)
        assert ", the backbone, from a Detectron" in load_weights(model, tmp_path / "R-50-GN.pkl", library, cfg)
        loaded = model.state_dict()
        names = renamed([f"backbone.body.{key}" for key in classifier], "torchvision", "detectron2")
        for key, value in classifier.items():
            if not key.startswith("fc."):
                name = f"backbone.body.{key}"
                assert loaded[name if library == "torchvision" else names[name]].equal(value), key

    def test_a_detector_does_not_pass_for_a_backbone(self, tmp_path: Path) -> None:
        blobs = blobs_of(resnet18(norm_layer=lambda channels: nn.GroupNorm(32, channels)).state_dict(), "gn")
        blobs["conv_rpn_fpn2_w"] = np.zeros((256, 256, 3, 3))
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
        with pytest.raises(UserError, match="1 blobs that no ImageNet ResNet has, such as conv_rpn_fpn2_w"):
            read_weights(tmp_path / "a.pkl")

    @pytest.mark.detectron2
    def test_a_model_without_pyramid(self, tmp_path: Path) -> None:
        """Its last stage is part of the heads."""
        torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
        keys = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
                "MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.NAME",
                "Res5ROIHeads", "MODEL.RESNETS.NORM", "BN", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 64]]",
                "MODEL.ROI_BOX_HEAD.NAME", "", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0]  # fmt: skip
        cfg = load_config(R50, keys, backends.defaults("detectron2")).cfg
        model = backends.load("detectron2").build(cfg)
        assert "318 of" in load_weights(model, tmp_path / "resnet50.pth", "detectron2", cfg)

    def test_fused_batch_norm_is_for_frozen_bn(self, toy_recipe: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet18().state_dict()
        (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(blobs_of(classifier, "bn"), protocol=2))
        fused = read_weights(tmp_path / "R-18.pkl")
        torch.save(checkpoint_of(convert(fused, "torchvision"), fused, None, ""), tmp_path / "converted.pth")
        for norm, file in product(("FrozenBN", "BN", "GN"), ("R-18.pkl", "converted.pth")):
            cfg = load_config(toy_recipe, ["MODEL.RESNETS.NORM", norm]).cfg
            model = backend.build(cfg)
            if norm == "FrozenBN":
                load_weights(model, tmp_path / file, "torchvision", cfg)
                x, layer = torch.randn(2, 64, 5, 5), model.backbone.body.bn1
                torch.testing.assert_close(layer(x), x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
            else:
                with pytest.raises(UserError, match="which only FrozenBN can continue"):
                    load_weights(model, tmp_path / file, "torchvision", cfg)


class TestConversion:
    """tools/convert_checkpoint.py."""

    @pytest.fixture
    def convert_checkpoint(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        tool = load_tool("convert_checkpoint")

        def run(*arguments: Any) -> None:
            monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
            tool.main()

        return run

    @pytest.fixture
    def trained(self, train: Callable) -> Path:
        """A checkpoint of the torchvision backend."""
        return train(*NO_TEST, backend="torchvision") / "checkpoints/model_final.pth"

    def test_there_and_back(
        self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        """Background slots that detectron2 does not have come back as zeros, everything else as it was."""
        convert_checkpoint(trained, tmp_path / "there.pth", "--to", "detectron2")
        assert re.search(r"roi_heads\.mask_predictor +4 of +4", capsys.readouterr().out)
        convert_checkpoint(tmp_path / "there.pth", tmp_path / "back.pth", "--to", "torchvision")
        before, there, after = (read_checkpoint(p) for p in (trained, tmp_path / "there.pth", tmp_path / "back.pth"))
        assert there["converted_from"]["kind"] == "torchvision detector"
        assert before["pixels"] == there["pixels"] == after["pixels"]
        assert before["model"].keys() == after["model"].keys()
        slots = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
        for key, value in before["model"].items():
            slot = next((size for layer, size in slots.items() if layer in key), 0)
            assert after["model"][key][slot:].equal(value[slot:]), key
            assert not after["model"][key][:slot].any()
        scores = "roi_heads.box_predictor.cls_score.bias"
        assert there["model"][scores].equal(before["model"][scores].roll(-1))

    @pytest.mark.detectron2
    def test_verified_on_an_image(
        self, train: Callable, convert_checkpoint: Callable, tmp_path: Path, datasets_root: Path, capsys: Any
    ) -> None:
        image = datasets_root / "toy_train/images/1.jpg"
        for source, target in (backends.BACKENDS, backends.BACKENDS[::-1]):
            folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *NO_TEST, name=source, backend=source)
            new = tmp_path / f"{target}.pth"
            convert_checkpoint(folder / "checkpoints/model_final.pth", new, "--to", target, "--verify", image)
            said = capsys.readouterr().out
            assert f"it fills a {backends.library(target)} model of the recipe" in said
            assert re.search(r"1\.jpg: 10 and 10 detections: 10 of the same class", said)
            again = train("MODEL.WEIGHTS", new, *NO_TEST, name=f"from_{source}", backend=target)
            assert "tensors loaded" in (again / "log.txt").read_text()

    @pytest.mark.detectron2
    def test_a_difference_is_found(
        self, train: Callable, convert_checkpoint: Callable, tmp_path: Path, datasets_root: Path, capsys: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Masks turned inside out in the conversion."""
        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *NO_TEST)
        trained = train(*keys, backend="torchvision") / "checkpoints/model_final.pth"
        original = conversion.convert

        def spoilt(weights: Weights, to: str, own_names: bool) -> Any:
            found = original(weights, to, own_names)
            found.tensors["roi_heads.mask_head.predictor.weight"] *= -1
            return found

        monkeypatch.setattr(conversion, "convert", spoilt)
        image = datasets_root / "toy_train/images/1.jpg"
        with pytest.raises(SystemExit):
            convert_checkpoint(trained, tmp_path / "new.pth", "--to", "detectron2", "--verify", image)
        assert "the models do not agree on" in capsys.readouterr().err
        assert not (tmp_path / "new.pth").exists()

    def test_heads_that_are_not_by_class(
        self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: Any
    ):
        convert_checkpoint(trained, tmp_path / "there.pth", "--to", "detectron2")
        content = read_checkpoint(tmp_path / "there.pth")
        name = "roi_heads.box_predictor.bbox_pred.weight"
        content["model"][name] = content["model"][name][:4]
        torch.save(content, tmp_path / "agnostic.pth")
        with pytest.raises(SystemExit):
            convert_checkpoint(tmp_path / "agnostic.pth", tmp_path / "back.pth", "--to", "torchvision")
        assert "has 4 outputs, expected 12 for 3 classes" in capsys.readouterr().err

    def test_what_old_files_of_detectron2_hold_beside_weights(self, trained: Path, tmp_path: Path) -> None:
        there = convert(read_weights(trained), "detectron2").tensors
        extra = {"proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4)), "pixel_mean": np.zeros(3)}
        arrays = {name: value.numpy() for name, value in there.items()} | extra
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
        assert read_weights(tmp_path / "zoo.pkl").tensors.keys() == there.keys()

    def test_a_classifier(self, convert_checkpoint: Callable, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet18().state_dict()
        torch.save(classifier, tmp_path / "resnet18.pth")
        convert_checkpoint(tmp_path / "resnet18.pth", tmp_path / "there.pth", "--to", "detectron2")
        there = read_checkpoint(tmp_path / "there.pth")
        assert there["matching_heuristics"] is True
        assert Pixels.from_dict(there["pixels"]) == IMAGENET
        assert there["model"]["res5.1.conv2.norm.running_var"].equal(classifier["layer4.1.bn2.running_var"])
        convert_checkpoint(tmp_path / "there.pth", tmp_path / "back.pth", "--to", "torchvision")
        back = read_checkpoint(tmp_path / "back.pth")["model"]
        assert back.keys() == {key for key in classifier if not key.startswith("fc.")}
        assert all(value.equal(classifier[key]) for key, value in back.items())

    def test_weights_without_a_place(self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: Any):
        content = read_checkpoint(trained)
        content["model"]["roi_heads.novel_head.weight"] = torch.zeros(2)
        torch.save(content, trained)
        new = tmp_path / "new.pth"
        with pytest.raises(SystemExit) as end:
            convert_checkpoint(trained, new, "--to", "detectron2")
        said = capsys.readouterr()
        assert end.value.code == 2
        assert "1 tensors of" in said.err
        assert "the first is roi_heads.novel_head.weight; give --partial" in said.err
        assert re.search(r"roi_heads\.novel_head +0 of +1", said.out)
        assert not new.exists()
        convert_checkpoint(trained, new, "--to", "detectron2", "--partial")
        assert len(read_checkpoint(new)["model"]) == len(content["model"]) - 1

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("SRC", "DST", "--to", "torchvision"), "is a torchvision detector already"),
            (("SRC", "SRC", "--to", "detectron2"), "exists; name another file"),
            (("/nowhere.pth", "DST", "--to", "detectron2"), "weights file /nowhere.pth is missing"),
            (("COPY", "DST", "--to", "detectron2", "--verify", "IMAGE"), "give its recipe, --config-file FILE"),
        ],
    )
    def test_mistakes(
        self, words: tuple[str, ...], expected: str, trained: Path, convert_checkpoint: Callable, tmp_path: Path,
        datasets_root: Path, capsys: pytest.CaptureFixture,
    ) -> None:  # fmt: skip
        copied = tmp_path / "elsewhere/copied.pth"
        copied.parent.mkdir()
        copied.write_bytes(trained.read_bytes())
        places = {"SRC": trained, "DST": tmp_path / "new.pth", "COPY": copied, "IMAGE": datasets_root / "toy_val"}
        with pytest.raises(SystemExit) as end:
            convert_checkpoint(*(places.get(word, word) for word in words))
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("new.pth")]


class TestAgreement:
    @staticmethod
    def detections(*scores: float) -> dict[str, Any]:
        boxes = torch.arange(4.0 * len(scores)).reshape(-1, 4)
        return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.arange(len(scores))}

    def test_the_same(self) -> None:
        assert agreement(self.detections(0.9, 0.5), self.detections(0.9, 0.5)).holds

    def test_order_says_nothing_where_scores_are_close(self) -> None:
        one, other = self.detections(0.9, 0.5001, 0.5), self.detections(0.9, 0.5001, 0.5)
        for key in ("boxes", "labels"):
            other[key] = other[key][[0, 2, 1]]
        assert agreement(one, other).holds

    def test_empty_masks_are_equal(self) -> None:
        one = self.detections(0.9, 0.5)
        empty, full = encode_masks(np.stack([np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint8)]))
        one["masks"] = [empty, full]
        assert agreement(one, one).holds
        assert not agreement(one, {**one, "masks": [full, full]}).holds

    def test_another_number(self) -> None:
        assert not agreement(self.detections(0.9, 0.5), self.detections(0.9)).holds
        assert not agreement(self.detections(), self.detections(0.9)).holds

    @pytest.mark.parametrize("key", ["boxes", "scores", "labels"])
    def test_a_difference(self, key: str) -> None:
        other = self.detections(0.9, 0.5)
        other[key] = other[key] + (1 if key != "scores" else 0.01)
        assert not agreement(self.detections(0.9, 0.5), other).holds

    def test_nothing_is_no_agreement(self) -> None:
        assert not agreement(self.detections(), self.detections()).holds
