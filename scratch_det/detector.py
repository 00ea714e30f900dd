"""A trained detector as an object: load a run, or weights with their recipe, and predict images.

from scratch_det import load
model = load("output/quickstart")
found = model.predict("image.jpg")
print(found)
found.draw().save("found.png")
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import nn

from scratch_det import backends
from scratch_det.command_line import load_project
from scratch_det.config.load import flatten, get_cfg, load_config, with_keys
from scratch_det.config.ranges import known_values
from scratch_det.data.dataset import sample_of
from scratch_det.data.image import decode_masks, read_image, upright_rgb
from scratch_det.data.transforms import to_test_size
from scratch_det.distributed.devices import pick_device
from scratch_det.engine.checkpointer import FINAL, LAST
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError, raise_problems
from scratch_det.evaluation.inference import pasted, predict, predict_augmented
from scratch_det.evaluation.predictions import detections_of
from scratch_det.visualization.predictions import THRESHOLD, draw_objects
from scratch_det.weights.classes import num_classes
from scratch_det.weights.load import load_weights, require_detector
from scratch_det.weights.locate import fetch, place_of, split_part, url_of
from scratch_det.weights.origin import Weights, read_weights

Source = str | Path | np.ndarray | Image.Image  # an image: a file, or its pixels
NO_GPU = "no GPU is visible: predicting on the CPU"
KEYPOINTS = ("keypoint_predictor.kps_score_lowres", "keypoint_head.score_lowres")  # torchvision's, detectron2's


@dataclass(frozen=True, repr=False)
class Found:
    """What a detector finds in one image: N objects by descending score.

    name: the file, "" for pixels. image: uint8 [H, W, 3], RGB. boxes: float32 [N, 4], x1 y1 x2 y2 in px of the image.
    scores: float32 [N]. labels: int64 [N], places in ``classes``, the names of all classes of the model. rles: a COCO
    RLE for each object, None from a model without masks. keypoints: float32 [N, K, 3], x, y in px and score, or None.
    """

    name: str
    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    rles: list[dict[str, Any]] | None = None
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        height, width = self.image.shape[:2]
        best = ", ".join(f"{n} {s:.2f}" for n, s in zip(self.class_names[:MOST_NAMED], self.scores, strict=False))
        more = ", ..." * (len(self) > MOST_NAMED)
        return f"{self.name or 'image'}, {width} x {height}: {len(self)} objects{': ' * bool(best)}{best}{more}"

    __repr__ = __str__  # in a list, too

    @property
    def class_names(self) -> list[str]:
        """The class of each object."""
        return [self.classes[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """bool [N, H, W]; None from a model without masks."""
        return None if self.rles is None else decode_masks(self.rles, *self.image.shape[:2]).astype(bool)

    def above(self, score: float) -> "Found":
        """The objects with this score or more."""
        count = int((self.scores >= score).sum())  # they come by descending score
        parts = {name: value[:count] for name in OF_OBJECTS if (value := getattr(self, name)) is not None}
        return replace(self, **parts)

    def draw(self, score: float = THRESHOLD) -> Image.Image:
        """The image with the objects of this score or more; small images are enlarged, so that names can be read."""
        items = {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}
        return draw_objects(self.image, items | {"masks": self.rles, "keypoints": self.keypoints}, self.classes, score)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int | str] = ()) -> list[dict[str, Any]]:
        """Results as COCO's json has them.

        category_ids: of all classes, in their order; without them 1, 2, and so on. Raises UserError for fewer or more.
        """
        if len(category_ids) not in (0, len(self.classes)):
            raise UserError(
                f"to_coco: {len(category_ids)} category_ids, expected one for each of {len(self.classes)} classes"
            )
        arrays = {"masks": self.rles} | {
            name: getattr(self, name) for name in ("boxes", "scores", "labels", "keypoints")
        }
        found = {name: value for name, value in arrays.items() if value is not None}
        columns = detections_of(image_id, found, category_ids or range(1, len(self.classes) + 1))
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


OF_OBJECTS = ("boxes", "scores", "labels", "rles", "keypoints")  # fields of Found with an entry for each object
MOST_NAMED = 5  # objects in a line of text


class Detector:
    """A model that is ready to predict.

    cfg: its recipe. backend: the library that built it. classes: names, in the order of its labels.
    """

    def __init__(self, cfg: CfgNode, backend: str, model: nn.Module, classes: Sequence[str]):
        self.cfg, self.backend, self.model, self.classes = cfg, backend, model, tuple(classes)

    def predict(
        self, source: Source | Iterable[Source], score: float = 0.0, batch_size: int = 1, augment: bool = False
    ) -> Any:
        """``Found`` of an image, or a list of them for several; the options are those of ``predict_each``.

        source: a file, an array uint8 [H, W, 3] or [H, W] in RGB, an image of Pillow, or several of these.
        """
        if isinstance(source, str | bytes | np.ndarray | Image.Image) or not isinstance(source, Iterable):
            return next(self.predict_each([cast(Source, source)], score, batch_size, augment))
        return list(self.predict_each(source, score, batch_size, augment))

    def check_options(self, score: float = 0.0, batch_size: int = 1, augment: bool = False) -> None:
        """Raise UserError for options of ``predict_each`` that no image can be predicted with."""
        if not 0 <= score <= 1:
            raise UserError(f"the score is {score:g}, expected 0 to 1")
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}, expected 1 or more images")
        if augment and self.cfg.TEST.AUG.FLIP and self.cfg.MODEL.KEYPOINT_ON:
            raise UserError(
                "the keypoints that change sides in a flipped view are in the data's json: set TEST.AUG.FLIP False"
            )

    def predict_each(
        self, sources: Iterable[Source], score: float = 0.0, batch_size: int = 1, augment: bool = False
    ) -> Iterator[Found]:
        """``Found`` of one image after the other, so that a video needs no more memory than a batch.

        score: the least; below MODEL.ROI_HEADS.SCORE_THRESH_TEST of the recipe there is none. augment: views of
        TEST.AUG are predicted and merged; not for models with keypoints when views are flipped. Raises DataError for a
        file that cannot be read, UserError for other options, arrays and objects.
        """
        self.check_options(score, batch_size, augment)
        backend = backends.load(self.backend)
        remaining = iter(sources)
        while batch := list(islice(remaining, batch_size)):
            images = [_pixels(source) for source in batch]
            is_bgr = self.cfg.INPUT.FORMAT == "BGR"
            samples = [sample_of(np.ascontiguousarray(image[..., ::-1]) if is_bgr else image) for image in images]
            if augment:
                predicted = [predict_augmented(backend, self.model, self.cfg, sample) for sample in samples]
            else:
                resized = [to_test_size(sample, self.cfg) for sample in samples]
                predicted = predict(backend, self.model, self.cfg, resized)
            for source, image, sample, one in zip(batch, images, samples, predicted, strict=True):
                arrays = {name: one[name].numpy() for name in ("boxes", "scores", "labels", "keypoints") if name in one}
                name = str(source) if isinstance(source, str | Path) else ""
                rles = pasted(sample, one).get("masks")
                yield Found(name, image, classes=self.classes, rles=rles, **arrays).above(score)


def _pixels(source: Source) -> np.ndarray:
    """An image as uint8 [H, W, 3] in RGB."""
    if isinstance(source, str | Path):
        if Path(source).is_dir():
            raise UserError(
                f"predict: {source} is a folder; give its images: sorted(Path({str(source)!r}).glob('*.jpg'))"
            )
        return read_image(Path(source))
    if isinstance(source, Image.Image):
        return np.array(upright_rgb(source, "predict: the image"))
    if not isinstance(source, np.ndarray):
        raise UserError(f"predict: {source!r:.40} is no image; expected a file, an array, one of Pillow, or several")
    shape, is_grey = source.shape, source.ndim == 2
    if source.dtype != np.uint8 or not (is_grey or (source.ndim == 3 and shape[2] == 3)) or not source.size:
        raise UserError(f"an image of {source.dtype} {list(shape)}, expected uint8 [H, W, 3] in RGB, or [H, W]")
    return np.ascontiguousarray(np.repeat(source[..., None], 3, 2) if is_grey else source)


def load(
    source: str | Path,
    config: str | Path | None = None,
    device: str | None = None,
    backend: str | None = None,
    project: str | Path | None = None,
) -> Detector:
    """The detector of a run's folder, its final or else its last weights, or of a weights file.

    source: ``#model_ema`` behind it takes the average of the weights (MODEL_EMA), see ``locate.split_part``.
    config: the recipe of a weights file that lies in no run's folder. device: "cpu", "cuda" or "cuda:1"; else the
    recipe's, where there is one. backend: else the one that trained the weights. project: the folder
    of one that the recipe needs. Raises UserError where weights or
    recipe are missing or do not fit.
    """
    if project:
        load_project(Path(project))
    path, part = located(str(source))
    weights = read_weights(path, part=part)
    require_detector(weights)
    cfg = recipe_of(path, Path(config) if config else None, weights)
    if cfg is None:
        raise UserError(
            f"{source} lies in no run's folder: name its recipe, --config-file FILE (in Python config=FILE)"
        )
    if device:
        cfg.MODEL.DEVICE = device
        raise_problems(known_values(cfg, "MODEL.DEVICE"))
    name = backends.choose(backend or weights.library)
    backends.check_keys(name, cfg)
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    classes = weights.classes or cfg.DATASETS.get("CLASS_NAMES") or [f"class {label}" for label in range(count)]
    model = built(f"{path}#{part}" if part else path, name, cfg).eval()
    return Detector(cfg, name, model.to(pick_device(cfg.MODEL.DEVICE, no_gpu=NO_GPU)), classes)


def located(source: str) -> tuple[Path, str]:
    """The file with the weights of a run's folder, a file or an address, and which of several networks in it."""
    place, part = split_part(source)
    if not url_of(place) and not place_of(place).exists():
        raise UserError(f"there is no {place}; give a run's folder, a weights file or its address")
    return weights_of(Path(place)) if Path(place).is_dir() else fetch(place), part


def weights_of(run: Path) -> Path:
    """The final weights of a run, or those of its last checkpoint. Raises UserError where there are none."""
    folder = RunDir(run).checkpoints
    last = folder / LAST
    path = folder / (last.read_text().strip() if last.is_file() else FINAL)
    if not path.is_file():
        raise UserError(f"{run} has no weights, {path} is missing; name a run's folder or a weights file")
    return path


def recipe_of(path: Path, config: Path | None, weights: Weights) -> CfgNode | None:
    """The recipe of the weights, with the heads, classes and keypoints that they have; None when there is none."""
    run = RunDir(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    if config:
        cfg = load_config(config, defaults=backends.defaults(backends.choose(backends.AUTO))).cfg
    elif run.config.is_file() and run.environment.is_file():
        cfg = with_keys(get_cfg(), flatten(run.read_config()))  # keys that are newer than the run have their defaults
    else:
        return None
    if weights.is_detector:
        for head in ("MASK", "KEYPOINT"):
            cfg.MODEL[f"{head}_ON"] = any(name.startswith(f"roi_heads.{head.lower()}_") for name in weights.tensors)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes(weights.tensors) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for bias in (weights.tensors.get(f"roi_heads.{layer}.bias") for layer in KEYPOINTS):
        if bias is not None:
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(bias)
    return cfg


def built(source: str | Path, name: str, cfg: CfgNode) -> nn.Module:
    """The recipe's model in backend ``name`` with the weights of ``source``, on the CPU."""
    torch.manual_seed(0)
    model = backends.load(backends.choose(name)).build(cfg)
    load_weights(model, source, name, cfg)
    return model
