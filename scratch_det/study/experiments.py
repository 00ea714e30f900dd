"""All experiments: the paper's, the miniatures on digits, and YAML files of the user's own runs.

Also what their trainings see (Figure 2): images, instances and pixels, each counted as often as it is shown.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup
from scratch_det.errors import ConfigError, DataError, UserError, did_you_mean
from scratch_det.evaluation.metrics import SCRATCH
from scratch_det.study import digits, own, paper
from scratch_det.study.run import PRETRAIN, Job, Run, from_here
from scratch_det.tables import aligned

IMAGENET_IMAGES = 1_281_167  # training images of the 1,000 classes
IMAGENET_EPOCHS = 100  # Figure 2's pre-training; one instance per image
# Those of configs/_base_/init.
IMAGENET_WEIGHTS = ("ImageNetPretrained/", "pytorch.org/models/vgg16-", "pytorch.org/models/resnet50-")
COCO_INSTANCES = 860_001 / 118_287  # of an image, in train2017: 7.3


@cache
def experiments() -> tuple[Run, ...]:
    """All runs that are listed here, each after those that it needs, a trunk before its branches."""
    return (*paper.runs(), *digits.runs(), *digits.smoke())


def find(name: str, own_runs: Sequence[Run] = ()) -> Run:
    """The run called ``name``, from ``own_runs`` or the lists here. Raises UserError when there is none."""
    known = {run.name: run for run in (*experiments(), *own_runs)}
    if name not in known:
        raise UserError(f"there is no experiment {name}{did_you_mean(name, list(known))}")
    return known[name]


def of_place(place: str) -> list[Run]:
    """The runs of a table or figure, all runs of "paper" or "digits", the runs in a file, or the run with this name.

    Raises UserError when there are none.
    """
    if path := own.file_of(place):
        return own.runs(path)
    known, groups = experiments(), {"paper": paper.runs(), "digits": digits.runs()}
    places = sorted({name for run in known for name in run.places})
    groups |= {name: [run for run in known if name in run.places] for name in places}
    found = groups | {run.name: [run] for run in known}
    if place not in found:
        files = [path.stem for path in sorted(own.STUDIES.glob("*.yaml"))]
        hint = did_you_mean(place, [*found, *files])
        fix = "; scratch-det study samples counts it" if place == "figure2" else hint
        others = f"{', '.join([*groups, *files])}, names that list prints, and files, *.yaml"
        raise UserError(f"no experiment {place}{fix}; there are {others}")
    return found[place]


def jobs_of(runs: Sequence[Run], share_prefix: bool = True) -> list[Job]:
    """``runs`` and all runs that they need, each after those that it needs.

    ``share_prefix``: a run whose trunk is among them branches off it; otherwise it trains all of its iterations.
    """
    given, everything = {run.name: run for run in runs}, dict[str, Run]()

    def needs(run: Run, from_trunk: bool) -> tuple[str, ...]:
        asked = (run.trunk if from_trunk else None, run.evaluates, run.pretraining, run.found_by)
        return tuple(name for name in asked if name)

    def add(run: Run) -> None:
        for name in needs(run, run.is_switch):
            add(given.get(name) or find(name))
        everything.setdefault(run.name, run)

    for run in runs:
        add(run)
    starts = {
        name: run.branch_at(everything.get(run.trunk or "")) if share_prefix or run.is_switch else 0
        for name, run in everything.items()
    }
    kept = {name: {starts[branch.name] for branch in everything.values() if branch.trunk == name} for name in starts}
    return [Job(run, starts[name], tuple(sorted(kept[name] - {0})), needs(run, starts[name] > 0))
            for name, run in everything.items()]  # fmt: skip


# Figure 2


class Seen(NamedTuple):
    """Counts over a whole training."""

    images: float
    instances: float
    pixels: float


def seen_in_pretraining(images: int = IMAGENET_EPOCHS * IMAGENET_IMAGES, side: int = 224) -> Seen:
    """Classification: so many ``images`` in all epochs, square crops of ``side`` pixels; of ImageNet by default."""
    return Seen(images, images, images * side**2)


def pixels_seen(run: Run, pretraining: Run | None) -> tuple[float, float]:
    """By the pre-training of a detector's weights, NaN where nobody says, and by the detector itself.

    ``pretraining``: the run that made the weights; of others ``about`` says it.
    """
    cfg = load_config(from_here(run.config), run.changes).cfg
    own = seen_in_schedule(cfg, 0).pixels
    if run.init == SCRATCH:
        return 0.0, own
    views, images = run.about.get("views", {}), run.about.get("epochs", math.nan)
    images *= run.about.get("images", IMAGENET_IMAGES)
    if pretraining:
        cfg = load_config(from_here(pretraining.config), pretraining.changes).cfg
        views = pretraining.about.get("views", {cfg.INPUT.MIN_SIZE_TRAIN[0]: 1})
        images = pretraining.iterations * cfg.SOLVER.IMS_PER_BATCH
    seen = sum(seen_in_pretraining(images * number, int(side)).pixels for side, number in views.items())
    return seen or math.nan, own


def seen_before(weights: str) -> tuple[Seen, str]:
    """Of the pre-training that made MODEL.WEIGHTS, and its name; weights of a pre-training run lie in its folder."""
    folder = Path(weights).parent.name
    if run := next((run for run in experiments() if run.kind == PRETRAIN and run.name == folder), None):
        cfg = load_config(from_here(run.config)).cfg
        return seen_in_pretraining(run.length * cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN[0]), run.name
    if any(part in weights for part in IMAGENET_WEIGHTS):
        return seen_in_pretraining(), f"{IMAGENET_EPOCHS} epochs of ImageNet"
    return Seen(0, 0, 0), "weights, not counted" if weights else ""


def seen_in_training(cfg: CfgNode) -> tuple[Seen, str]:
    """Of a detector's training, and where the mean number of instances per image is from: its data set, or COCO's.

    Raises DataError when the training set is neither on disk nor COCO.
    """
    try:
        from scratch_det.data.coco import read_coco  # NumPy: not for --help

        data = [read_coco(lookup(name), need_masks=False) for name in cfg.DATASETS.TRAIN]
    except DataError:
        if not all(name.startswith("coco_") for name in cfg.DATASETS.TRAIN):
            raise
        return seen_in_schedule(cfg, COCO_INSTANCES), "train2017's, as the data set is not here"
    instances = sum(int(one.object_counts().sum()) for one in data) / sum(len(one.images) for one in data)
    return seen_in_schedule(cfg, instances), f"{', '.join(cfg.DATASETS.TRAIN)}'s"


def seen_in_schedule(cfg: CfgNode, instances: float) -> Seen:
    """Of a detector's training with a mean of so many ``instances`` per image.

    The pixels of an image are the mean training side times the longest side allowed, as in Figure 2 (800 x 1333).
    """
    images, sides = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN
    return Seen(images, images * instances, images * sum(sides) / len(sides) * cfg.INPUT.MAX_SIZE_TRAIN)


def samples_table(config_files: list[str]) -> str:
    """A table with a row for each recipe: its training and, where it is known, the pre-training of its weights.

    Raises ConfigError for a classifier's recipe.
    """
    rows: list[tuple[str, ...]] = [("recipe", "images", "instances", "pixels", "instances an image")]
    for file in config_files:
        cfg = load_config(file).cfg
        if cfg.INPUT.CROP.ENABLED:  # which no detector has
            expected = "expected a detector's, whose pre-training is counted too"
            raise ConfigError(f"{file} is a classifier's recipe, of scratch-det pretrain; {expected}")
        own, source = seen_in_training(cfg)
        before, name = seen_before(cfg.MODEL.WEIGHTS)
        total, label = map(sum, zip(own, before, strict=True)), Path(file).stem + (f" + {name}" if name else "")
        rows.append((label, *map(with_prefix, total), f"{own.instances / own.images:.2f}, {source}"))
    return "\n".join(aligned(rows))


def with_prefix(number: float) -> str:
    """2560 -> 2.56 k, 131 million -> 131 M, 9.5 billion -> 9.5 G, and so on; "?" for NaN."""
    if math.isnan(number):
        return "?"
    power = min(int(math.log10(max(number, 1)) // 3), 4)
    return f"{number / 1000**power:.3g} {' kMGT'[power]}".rstrip()
