"""Handwritten scans -> smooth shapes to draw, and the two things done to masks (H x W bool arrays)."""

import cv2
import numpy as np
from numpy.random import Generator

INK = 0.43  # darkness (0..1) of an enlarged scan at the edge of its strokes
CELL = 8  # px: side of an enlarged scan's pixel


def make_glyph(scan: np.ndarray, rng: Generator, heights: tuple[int, int], limit: tuple[int, ...]) -> np.ndarray:
    """Opacity (h x w float32, 0..1, no larger than ``limit``) of an 8 x 8 scan, smoothly enlarged, sheared, rotated."""
    ink = _enlarge(scan)
    left, top, width, height = cv2.boundingRect((ink > INK).astype(np.uint8))
    target = rng.uniform(*heights)
    linear = _distortion(rng, target / height)
    side = int(3 * target)
    offset = side / 2 - linear @ (left + width / 2, top + height / 2)
    warped = cv2.warpAffine(ink, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
    opacity = np.clip((warped - INK) * target / 12 + 0.5, 0, 1)
    strokes = large_pieces(opacity > 0, (opacity > 0).sum() // 20 + 1)  # smaller blots are dirt of the scan
    x, y, width, height = cv2.boundingRect(strokes.astype(np.uint8))
    glyph = (opacity * strokes)[y : y + height, x : x + width]
    shrink = min(1.0, limit[0] / height, limit[1] / width)
    return cv2.resize(glyph, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else glyph


def _enlarge(scan: np.ndarray) -> np.ndarray:
    """Ink of a scan with a margin, CELL times larger and smooth."""
    ink = cv2.resize(np.pad(scan, 1), None, fx=CELL, fy=CELL, interpolation=cv2.INTER_CUBIC)
    ink = ink + 1.2 * (ink - cv2.GaussianBlur(ink, (0, 0), 1.2 * CELL))  # reopens holes that 8 x 8 pixels blurred shut
    return cv2.GaussianBlur(ink, (0, 0), 0.3 * CELL)


def _distortion(rng: Generator, scale: float) -> np.ndarray:
    """2 x 2 matrix that scales, widens, shears and turns a little."""
    stretch = scale * np.array([rng.uniform(0.85, 1.25), 1.0])
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with every enclosed hole filled."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def large_pieces(mask: np.ndarray, least: int) -> np.ndarray:
    """The mask without separate pieces of fewer than ``least`` px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return mask & (stats[:, cv2.CC_STAT_AREA] >= least)[labels]
