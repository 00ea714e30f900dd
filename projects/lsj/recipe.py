"""What a recipe says of large-scale jitter: rules on its keys, and the schedule. Never imports torch."""

import math
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.rules import SMALLEST_VIEW
from scratch_det.config.schedule import Schedule

EPOCH = 118_000  # images: detectron2 counts with the rounded size of train2017
BATCH = 64  # images
DROPS = (8 / 9, 26 / 27)  # of a run, the two drops of detectron2's 100 epochs: 163,889 and 177,546 of 184,375
WARMUP = 500 / 184_375  # of a run, its first part: detectron2 means 500 iterations of the 100 epochs


def problems(cfg: CfgNode) -> Iterator[str]:
    """One line for each thing that INPUT.LSJ cannot mean."""
    size, scales = cfg.INPUT.LSJ.SIZE, tuple(cfg.INPUT.LSJ.SCALES)
    if size < SMALLEST_VIEW:
        yield (
            f"INPUT.LSJ.SIZE is {size}, expected the side of the training images, {SMALLEST_VIEW} pixels or more; "
            "set INPUT.LSJ.SIZE 1024"
        )
    if len(scales) == 2 and 0 < scales[1] < scales[0]:
        yield f'INPUT.LSJ.SCALES is {scales}, expected the smaller one first; set INPUT.LSJ.SCALES "{scales[::-1]}"'
    elif len(scales) != 2 or not 0 < scales[0] <= scales[1] < math.inf:
        yield (
            f'INPUT.LSJ.SCALES is {scales}, expected the two ends of a range above 0; set INPUT.LSJ.SCALES "(0.1, 2.0)"'
        )


def lsj_schedule(epochs: int, epoch: int = EPOCH, batch: int = BATCH) -> Schedule:
    """``epochs`` of ``epoch`` images, ``batch`` in an iteration; the drops are where they are in 100 epochs, in parts.

    So they scale with the length, where the paper's last 60k and 20k iterations do not, and so does warm-up: a shorter
    run is not the beginning of a longer one. As in detectron2, the drops are whole iterations of the 100 epochs, and
    these are multiplied.
    """
    if min(epochs, epoch, batch) < 1:
        raise ValueError(f"epochs {epochs}, images in one {epoch} and in a batch {batch} must be 1 or more")
    hundred = 100 * epoch / batch
    return Schedule(epochs * epoch // batch, tuple(round(hundred * part) * epochs // 100 for part in DROPS))


def warmup_iters(max_iter: int) -> int:
    """The iterations of warm-up in a run of ``max_iter``."""
    return round(WARMUP * max_iter)
