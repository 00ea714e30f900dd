"""What this repository's parts cost, each beside its peer where that is installed; scratch-det benchmark runs it.

``rows`` has a generator of figures for each of ROWS, ``report`` makes their table, ``measure`` is the stopwatch.
"""

from dataclasses import dataclass
from pathlib import Path

from scratch_det.benchmark.measure import Rounds

ROWS = {
    "scoring": "AP of boxes and masks beside pycocotools, in memory and from files",
    "start": "a data set of COCO's size: from the command to the first batch, seconds and memory",
    "sample": "one training sample beside detectron2's DatasetMapper",
    "loader": "images a second from one worker, beside detectron2's loader",
    "loop": "an iteration of the loop beside its bare forward pass, backward pass and update",
    "step": "forward, backward, update beside detectron2's model; an iteration beside its plain training script",
    "startup": "scratch-det train up to its first iteration, and on a finished run",
}


@dataclass(frozen=True)
class Options:
    """What is measured, and how often.

    Attributes:
        recipes: config files with their KEY VALUE overrides.
        script: detectron2's tools/plain_train_net.py, where it does not lie beside the package.
        pairs: rounds of what takes milliseconds.
        repeats: rounds of what takes seconds, and of fresh processes.
        scale: of the number of made-up images.
    """

    recipes: list[tuple[str, list[str]]]
    backend: str
    pairs: Rounds
    repeats: Rounds
    scale: float = 1.0
    script: Path | None = None
