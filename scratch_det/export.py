"""A detector of the torchvision backend as one file, ONNX or torch's .pt2, that finds what ``Detector.predict`` finds.

All is inside: resizing, pixel statistics, NMS, masks, keypoints. The input ``image`` is uint8 [H, W, 3] in RGB, of any
size. The outputs, for N objects by descending score, are ``boxes`` float32 [N, 4] (x1 y1 x2 y2 in px of the image),
``scores`` float32 [N], ``labels`` int64 [N], and where the model has them ``masks`` bool [N, H, W] and ``keypoints``
float32 [N, K, 3] (x and y in px, score). The names of the classes are in the file.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.ops import box_area, clip_boxes_to_image
from torchvision.ops import boxes as box_ops

from scratch_det.data.image import read_image
from scratch_det.detector import Detector, Found, load
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation.inference import DETECTRON

OPSET = 20  # of ONNX
TOLERANCE = 1e-3  # of the largest difference
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def export_model(source: str, config: Path | None, out: Path, image: Path | None) -> str:
    """``export`` of what ``detector.load`` loads; returns a line about it. Raises UserError where ``out`` exists."""
    check_out(out)
    try:
        detector = load(source, config, "cpu", "torchvision")
    except ConfigError as error:
        if "torchvision backend" not in str(error):  # a recipe that cannot be read
            raise
        hint = "only models of the torchvision backend are exported; detectron2 has its tools/deploy/export_model.py"
        raise ConfigError(f"{error}\n  {hint}") from None
    blobs = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    pixels = read_image(image) if image else np.array(blobs.resize((640, 480), Image.Resampling.BICUBIC))
    count, differences = export(detector, out, pixels)
    compared = f"{count} objects in {image or 'coloured blobs'} differ by at most {told(differences)}"
    few = "" if count else "; compare it on an image with objects, --image FILE"
    augmented = "\n  without test-time augmentation, which no file can have" * detector.cfg.TEST.AUG.ENABLED
    return f"{out}, {out.stat().st_size / 1e6:.0f} MB: {compared}{few}{augmented}"


def export(detector: Detector, out: Path, image: np.ndarray) -> tuple[int, dict[str, float]]:
    """Write ``out``, a .onnx or .pt2, and compare it with ``detector.predict(image)``: objects, largest differences.

    Raises UserError, without a file, for another backend, and as ``check_out`` and ``compare``.
    """
    check_out(out)
    if detector.backend != "torchvision":
        raise UserError(f"{detector.backend} built this model; load it with backend='torchvision' to export it")
    out.parent.mkdir(parents=True, exist_ok=True)
    trial = out.with_name(f".{out.name}")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable()  # torch logs the whole program where it cannot trace it
            run = WRITERS[out.suffix](detector, trial)
        expected = detector.predict(image)
        differences = compare(expected, run(image))
        trial.rename(out)
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason, backbone = str(cause).partition("\n")[0], detector.cfg.MODEL.BACKBONE.NAME
        raise UserError(f"torch {torch.__version__} cannot export this model, with {backbone}: {reason:.200}; "
                        "docs/using_a_model.md lists those that were exported") from error  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
        trial.unlink(missing_ok=True)
    return len(expected), differences


def check_out(out: Path) -> None:
    """Raise UserError for another suffix, and where ``out`` exists or cannot be written."""
    if out.suffix not in WRITERS:
        raise UserError(f"--out {out}: expected a name that ends with {' or '.join(WRITERS)}")
    if out.exists():
        raise UserError(f"--out {out} exists; name another file, or remove it first")
    folder = next(path for path in out.absolute().parents if path.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({folder}: {error.strerror}); name another file") from None


def compare(expected: Found, found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Differences: of boxes and scores the largest, of keypoints the mean, of masks the share of all their pixels.

    Places are divided by the image's longer side, scores by the score. Raises UserError where a difference is
    above TOLERANCE, and where the objects are others.
    """
    if sorted(expected.labels) != sorted(found["labels"]):
        raise UserError(f"the exported model finds {len(found['labels'])} objects, the detector {len(expected)}, or "
                        "others; no file is left; try another image, --image FILE")  # fmt: skip
    is_other = expected.labels[:, None] != found["labels"]
    apart = np.nan_to_num(np.abs(expected.boxes[:, None] - found["boxes"]).sum(2)) + 1e9 * is_other
    order = linear_sum_assignment(apart)[1]  # equal scores may come in another order
    side, given = max(expected.image.shape), {name: value[order] for name, value in found.items()}
    differences = {
        "boxes": np.abs(given["boxes"] - expected.boxes) / side,
        "scores": np.abs(given["scores"] / expected.scores - 1),
    }
    if expected.masks is not None:
        both = expected.masks, given["masks"]
        differences["masks"] = np.logical_xor(*both).sum() / max(1, np.logical_or(*both).sum())
    if expected.keypoints is not None:
        apart = np.abs(given["keypoints"] - expected.keypoints) / [side, side, 1]
        differences["keypoints"] = apart.mean() if apart.size else 0  # a flat map's highest place may be another
    largest = {name: float(np.max(value, initial=0)) for name, value in differences.items()}
    if not np.max([*largest.values()]) <= TOLERANCE:  # NaN is above it, too
        raise UserError(f"the exported model differs from the detector by {told(largest)}, expected {TOLERANCE:g} or "
                        "less; no file is left")  # fmt: skip
    return largest


def told(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1g}" for name, value in differences.items())


def _write_onnx(detector: Detector, path: Path) -> Run:
    import onnxruntime
    from onnx_ir import Shape
    from onnxscript import opset20 as op

    def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        """ONNX defines TopK to be stable; torch has no translation."""
        return op.TopK(x, op.Gather(op.Shape(x), op.Constant(value_ints=[dim])), axis=dim, largest=int(descending))

    def roi_pool(features: Any, rois: Any, scale: float, height: int, width: int) -> Any:
        """onnxscript's own takes other arguments."""
        return op.MaxRoiPool(features, rois, pooled_shape=(height, width), spatial_scale=scale), rois

    program, names = _traced(detector)
    ours = {torch.ops.aten.sort.stable: stable_sort, torch.ops.torchvision.roi_pool.default: roi_pool}
    written = torch.onnx.export(
        program, opset_version=OPSET, input_names=["image"], output_names=names, custom_translation_table=ours,
        verbose=False,
    )  # fmt: skip
    graph = written.model.graph
    graph.inputs[0].shape = Shape(["height", "width", 3])
    for value in graph.outputs:
        value.shape = Shape(["objects", *(["height", "width"] if value.name == "masks" else value.shape[1:])])
    for node in graph.all_nodes():
        node.metadata_props.clear()  # which hold paths of this machine
    written.model.metadata_props["classes"] = json.dumps(detector.classes)
    written.save(path)
    session = onnxruntime.InferenceSession(path)
    return lambda image: dict(zip(names, session.run(None, {"image": image}), strict=True))


def _write_pt2(detector: Detector, path: Path) -> Run:
    torch.export.save(_traced(detector)[0], path, extra_files={"classes": json.dumps(detector.classes)})
    run = torch.export.load(path).module()
    return lambda image: {name: value.numpy() for name, value in run(torch.from_numpy(image)).items()}


WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}


def _traced(detector: Detector) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The program and the names of its outputs. Raises UserError where torch cannot trace the model."""
    model = Whole(detector).eval()
    image = torch.zeros(96, 128, 3, dtype=torch.uint8)
    sides = {"image": {0: torch.export.Dim("height", min=2), 1: torch.export.Dim("width", min=2)}}
    with patched():
        program = torch.export.export(model, (image,), dynamic_shapes=sides, strict=False)
    return program, list(program.call_spec.out_spec.context)


@contextmanager
def patched() -> Iterator[None]:
    """In the place of functions that ask for numbers which only the image decides, others that do not."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(_utils, "_topk_min", lambda x, k, axis: torch.sym_min(k, x.shape[axis])))
        stack.enter_context(patch.object(box_ops, "batched_nms", nms_of_groups))
        stack.enter_context(patch.object(F, "_verify_batch_size", lambda size: None))
        if timm := sys.modules.get("timm.layers.padding"):
            stack.enter_context(patch.object(timm, "get_same_padding", same_padding))
        yield


def same_padding(length: int, kernel: int, stride: int, dilation: int) -> int:
    """timm's, in whole numbers, so that lengths stay multiples of 32 to torch."""
    return max(((length + stride - 1) // stride - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)


def nms_of_groups(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """torchvision's ``batched_nms``: groups side by side; two boxes more, as torch assumes 2 results or more."""
    boxes, scores, groups = (torch.cat([one, one.new_full((2, *one.shape[1:]), fill)])
                             for one, fill in ((boxes, 0), (scores, -1), (groups, 0)))  # fmt: skip
    shifts = groups.to(boxes) * (boxes.max() + 1)
    return box_ops.nms(boxes + shifts[:, None], scores, threshold)[:-2]


class Whole(nn.Module):
    """From an image to its objects, without branches on the image's size or the number of objects."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.model, self.cfg = deepcopy(detector.model).cpu().requires_grad_(False), detector.cfg

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """See the module."""
        sides, size = _tensor(image.shape[:2]), image.shape[:2]
        pixels = self.resized(image.permute(2, 0, 1), sides)
        pixels = pixels.flip(0) if self.cfg.INPUT.FORMAT == "BGR" else pixels
        images, features = self.model.extract_features([{"image": pixels}])
        (proposals,), _ = self.model.rpn(images, features)
        (found,) = self.model.roi_heads.detect(features, [one_more(proposals)], images.image_sizes)
        found = {name: one_more(value) for name, value in found.items()}
        (shapes,) = self.model.roi_heads.shapes(features, [found])
        scale = (sides / _tensor(pixels.shape[1:])).flip(0).float().repeat(2)
        boxes = clip_boxes_to_image(found["boxes"] * scale, size)
        kept = (box_area(boxes) > 0).nonzero()[:, 0]
        if self.cfg.MODEL.ANCHOR_GENERATOR.ROUNDING == DETECTRON:
            boxes = clip_boxes_to_image(boxes + (1 - scale) * boxes.new_tensor([0, 0, 1, 1]), size)
        result = {**found, "boxes": boxes}
        if "masks" in shapes:
            result["masks"] = pasted(shapes["masks"], boxes, *size)
        if "heat_maps" in shapes:
            points = decoded(shapes["heat_maps"], found["boxes"])
            result["keypoints"] = points * torch.cat([scale[:2], scale.new_ones(1)])
        return {name: value[kept] for name, value in result.items()}

    def resized(self, image: Tensor, sides: Tensor) -> Tensor:
        """uint8 [3, H, W] at the size of tests, float32: to the last bit torch's antialiased resize of uint8."""
        short, longest = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        if not short:
            return image.float()
        size = sides * (short / sides.min())
        height, width = (size * (longest / size.max()).clamp(max=1) + 0.5).long().tolist()
        for side in (height, width):
            torch._check(side >= 1)
        pixels = (image.float() @ shares(image.shape[2], width).T + 0.5).floor().clamp(0, 255)
        return (shares(image.shape[1], height) @ pixels + 0.5).floor().clamp(0, 255)


def one_more(rows: Tensor) -> Tensor:
    """With a row of zeros, a box without area, as heads and loops are not known to run without any."""
    torch._check(rows.shape[0] >= 0)
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


def _tensor(numbers: Any) -> Tensor:
    return torch.stack([torch.scalar_tensor(number, dtype=torch.float64) for number in numbers])


def shares(old: int, new: int) -> Tensor:
    """float32 [new, old]: what each pixel gives to each new one, in numbers of 16 bits as torch has them."""
    ratio = torch.scalar_tensor(old, dtype=torch.float64) / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * ratio
    distances = (torch.arange(old, dtype=torch.float64) + 0.5 - centres[:, None]) / ratio.clamp(min=1)
    parts = (1 - distances.abs()).clamp(min=0)
    parts = parts / parts.sum(1, keepdim=True)
    unit = torch.exp2((32767.5 / parts.max()).log2().floor())
    return ((parts * unit + 0.5).floor() / unit).float()


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """bool [N, H, W], as ``modeling.ops.paste_masks``."""
    cells = torch.arange(masks.shape[2])

    def along(low: Tensor, high: Tensor, pixels: int) -> Tensor:
        places = (torch.arange(pixels) + 0.5 - low[:, None]) / (high - low)[:, None] * len(cells) - 0.5
        return (1 - (places[..., None] - cells).abs()).clamp(min=0)

    x1, y1, x2, y2 = boxes.unbind(1)
    return each(lambda mask, rows, columns: rows @ mask @ columns.T >= 0.5,
                masks, along(y1, y2, height), along(x1, x2, width))  # fmt: skip


def decoded(maps: Tensor, boxes: Tensor) -> Tensor:
    """Keypoints [N, K, 3], as ``modeling.ops.decode_keypoints``: the highest place of maps resized to their boxes."""
    cells = torch.arange(maps.shape[3])
    lengths = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    counts = lengths.ceil()

    def along(axis: int) -> Tensor:
        """[N, most, S]: torch's bicubic resize; after the end of a box its last place is repeated."""
        count = counts[:, axis, None]
        most = count.max().long().item()
        torch._check(most >= 1)
        at = (torch.minimum(torch.arange(most), count - 1) + 0.5) * (len(cells) / count) - 0.5
        low, total = at.floor(), torch.zeros(1)
        for step in (-1, 0, 1, 2):
            far = (at - low - step).abs()
            near, away = (1.25 * far - 2.25) * far**2 + 1, ((-0.75 * far + 3.75) * far - 6) * far + 3
            cell = (low + step).clamp(0, len(cells) - 1)
            total = total + (cell[..., None] == cells) * torch.where(far <= 1, near, away)[..., None]
        return total

    def highest(one: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        tops, x = (rows @ one @ columns.T).max(2)
        peaks, y = tops.max(1)
        return peaks, x.gather(1, y[:, None])[:, 0], y

    peaks, x, y = each(highest, maps, along(1), along(0))
    points = torch.stack([x, y], 2).minimum(counts.long()[:, None] - 1)
    points = (points + 0.5) * (lengths / counts)[:, None] + boxes[:, None, :2]
    return torch.cat([points, (peaks - maps.flatten(2).logsumexp(2)).exp()[..., None]], 2)


def each(function: Callable[..., Any], *values: Tensor) -> Any:
    """``function`` of the first entries, of the second ones and so on, stacked: a loop in the file."""
    from torch._higher_order_ops.scan import scan

    return scan(lambda nothing, entries: (nothing.clone(), function(*entries)), torch.zeros(1), values)[1]
