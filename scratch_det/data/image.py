"""Images and masks as they lie on disk."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from PIL import Image, ImageOps

from scratch_det.errors import DataError


def read_image(path: Path, width: int | None = None, height: int | None = None) -> np.ndarray:
    """Decode one image to RGB uint8 [H, W, 3], turned upright as its EXIF tag says.

    Raises DataError when the file is missing, truncated or no image, or when its size is not ``width`` x ``height``,
    where these are given.
    """
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            image = np.asarray(upright.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: image file is missing") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); fetch the file again or leave the image out") from None
    if (width or height) and image.shape[:2] != (height, width):
        raise DataError(
            f"{path}: image is {image.shape[1]} x {image.shape[0]} px, the json says {width} x {height}; "
            "correct width and height in the json, or replace the file"
        )
    return image


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's three ways to write a mask (polygons, uncompressed and compressed RLE) as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_api.frPyObjects(segmentation, height, width)
    return segmentation


def decode_masks(segmentations: list[Any], height: int, width: int) -> torch.Tensor:
    """Rasterise masks to uint8 [N, H, W] of 0 and 1."""
    if not segmentations:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    decoded = mask_api.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Compress uint8 [N, H, W] masks to COCO RLE with text counts (json-ready)."""
    rles = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]
