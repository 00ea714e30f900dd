"""What the check found, by section: told as it goes, or as json at the end.

The data sections: what the annotation files hold, whether they belong together, whether every image can be read.

The memory section: what annotations and batches take beside what this machine has left.

The model section: how large it is, found by building it without memory for its weights.

The check before the first iteration: what a run would refuse, what it will do, what it needs and what it writes.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import LoadedConfig, check_config, load_config, settle_batch
from scratch_det.config.choices import optimizer_of
from scratch_det.config.schedule import learning_rate_line
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, gc_paused, inspect_coco, needed_for_training
from scratch_det.data.coco_checks import Problem, Severity
from scratch_det.data.image_check import scan_images
from scratch_det.distributed.launch import ALONE, several_to_launch
from scratch_det.engine import machine, run_dir
from scratch_det.engine.datasets import (
    category_mismatch,
    class_count_conflict,
    keypoint_conflicts,
    settle_counts,
    shared_images,
)
from scratch_det.engine.plan import Request, check_init, check_kept, check_switch
from scratch_det.engine.run_dir import RunDir, size
from scratch_det.errors import UserError
from scratch_det.weights.locate import check_weights, find_checkpoint, place_of

Result = TypeVar("Result")
WIDTH = 11  # columns that the longest name of a section and a gap take


@dataclass
class Section:
    """Facts as lines for people and as values for programs; problems as (severity, message)."""

    name: str
    lines: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[Severity, str]] = field(default_factory=list)

    def add(self, line: str, **values: Any) -> None:
        """A fact."""
        self.lines.append(line)
        self.values.update(values)

    def problem(self, severity: Severity, message: str) -> None:
        """Something to mend, or to know; what was said before is not said again."""
        if (severity, message) not in self.problems:
            self.problems.append((severity, message))

    def attempt(self, action: Callable[..., Result], *arguments: Any) -> Result | None:
        """What ``action(*arguments)`` returns; None, and errors of this section, when it refuses.

        Each line of a refusal that is not indented is an error of its own.
        """
        try:
            return action(*arguments)
        except UserError as error:
            for message in re.split(r"\n(?!\s)", str(error)):
                self.problem("error", message)
        except OSError as error:
            self.problem("error", f"{error.filename}: {error.strerror}")
        return None

    def as_text(self) -> str:
        """The name, then a line for each fact and problem, errors before notices."""
        errors_first = sorted(self.problems, key=lambda problem: problem[0])
        lines = [*self.lines, *(f"{severity}: {message}" for severity, message in errors_first)]
        return self.name.ljust(WIDTH) + "\n".join(lines).replace("\n", "\n" + " " * WIDTH)


class Report:
    """Sections in their order; ``say`` receives each as text as soon as it is complete."""

    def __init__(self, say: Callable[[str], object]):
        self.sections: list[Section] = []
        self.say = say

    @contextmanager
    def section(self, name: str) -> Iterator[Section]:
        """A new section, complete at the end of the block."""
        section = Section(name)
        self.sections.append(section)
        yield section
        self.say(section.as_text())

    def count(self, severity: Severity) -> int:
        """How many problems of this kind there are in all sections."""
        return sum(found == severity for section in self.sections for found, _ in section.problems)

    @property
    def ok(self) -> bool:
        """Whether a run would start: there are no errors so far."""
        return not self.count("error")

    def verdict(self) -> str:
        """The last line."""
        counts = [(self.count("error"), "error"), (self.count("notice"), "notice")]
        named = " and ".join(f"{count} {noun}{'s' if count > 1 else ''}" for count, noun in counts if count)
        return f"{'ready to train' if self.ok else 'not ready to train'}: {named or 'nothing to mend'}"

    def as_json(self) -> str:
        """One object: ok, the sections with their facts, all problems."""
        content = {
            "ok": self.ok,
            "sections": [{"name": one.name, "lines": one.lines, "values": one.values} for one in self.sections],
            "problems": [
                {"severity": severity, "section": one.name, "message": message}
                for one in self.sections
                for severity, message in one.problems
            ],
        }
        return json.dumps(content, indent=2)


SAMPLED = 1000  # images whose records are measured


class Data(NamedTuple):
    """The data sets of a recipe that have no errors."""

    training: list[CocoDataset]
    test: list[CocoDataset]

    def objects(self, cfg: CfgNode) -> list[int]:
        """How many objects each image has that is trained on."""
        return [len(objects) for data in self.training for _, objects in data.training_images(cfg)]

    def packed_bytes(self) -> int:
        """About the memory that the training set's records take, which are pickled; measured on some of them."""
        return sum(round(_mean_record(data) * len(data.images)) for data in self.training)


def read_data(section: Section, recipe: LoadedConfig) -> Data:
    """Read every data set of the recipe, compare them, and set the counts that a run would set."""
    cfg = recipe.cfg
    parts = (
        [_read(section, name, cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) for name in names]
        for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    data = Data(*([one for one in part if one] for part in parts))
    found = [*data.training, *data.test]
    if found:
        mismatches = (category_mismatch(found[0], other) for other in found[1:])
        conflicts = class_count_conflict(recipe, found[0]), *keypoint_conflicts(recipe, *data)
        for message in (*conflicts, *mismatches):
            if message:
                section.problem("error", message)
        settle_counts(cfg, found[0])
    for training, test in product(*data):
        _tell(section, test.entry.name, shared_images(training, test))
    return data


def read_images(section: Section, data: Data) -> None:
    """Read every image file of ``data``."""
    for one in {part.entry.name: part for part in [*data.training, *data.test]}.values():
        name, scan = one.entry.name, scan_images(one)
        section.add(
            f"{name}: {scan.read:,} read now, {scan.known:,} unchanged since an earlier check",
            **{name: {"read": scan.read, "unchanged": scan.known, "faulty": scan.num_faulty}},
        )
        if scan.num_faulty:
            shown = [*scan.first_faults, *(["..."] if scan.num_faulty > len(scan.first_faults) else [])]
            section.problem("error", f"{name}: {scan.num_faulty} images cannot be trained on:\n  " + "\n  ".join(shown))


def _read(section: Section, name: str, need_masks: bool, need_keypoints: bool) -> CocoDataset | None:
    entry = section.attempt(lookup, name)
    found = entry and section.attempt(inspect_coco, entry, need_masks, need_keypoints)
    if not (entry and found):
        return None
    data, problems = found
    if data is None:
        section.add(f"{name}: {entry.json_file} cannot be used", **{name: {"json": str(entry.json_file)}})
    else:
        objects = sum(map(len, data.annotations.values()))
        facts = {"images": len(data.images), "objects": objects, "classes": len(data.classes)}
        section.add(
            f"{name}: {', '.join(f'{count:,} {what}' for what, count in facts.items())}; "
            f"{entry.json_file} (sha256 {data.digest[:12]})",
            **{name: {**facts, "json": str(entry.json_file), "sha256": data.digest}},
        )
    _tell(section, name, problems)
    return data


def _tell(section: Section, name: str, problems: Iterable[Problem]) -> None:
    for one in problems:
        section.problem(one.severity, f"{name}: {one}" + (f"\n  {one.fix}" if one.fix else ""))


def _mean_record(data: CocoDataset) -> float:
    """Bytes of one image's record."""
    sample = data.images[:: -(-len(data.images) // SAMPLED)]
    records = ((data.entry.image_root, image, data.training_annotations(image["id"])) for image in sample)
    return sum(len(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)) for record in records) / len(sample)


PREFETCHED = 2  # batches that a worker holds ready: PyTorch's default


def check_memory(section: Section, cfg: CfgNode, data: Data, num_gpus: int, share: int, available: int | None) -> None:
    """Compare memory and shared memory with what ``num_gpus`` processes of this machine need.

    share: images that a process works on at a time. available: bytes before the data sets were read. The figures are
    estimates, so that too little is a notice and no error.
    """
    peak, packed = machine.peak_memory(), data.packed_bytes()
    processes = f"{num_gpus} processes, each " if num_gpus > 1 else ""
    left = f"; {size(available)} are available here" if available else ""
    section.add(
        f"{processes}{size(peak)} while the annotations are read, then {size(packed)} for them{left}",
        peak_bytes=peak,
        packed_bytes=packed,
        available_bytes=available,
    )
    if available and num_gpus * peak > available:
        section.problem(
            "notice",
            f"{num_gpus} x {size(peak)} are more than is available: get more memory, or start fewer processes here",
        )
    batches, free = num_gpus * cfg.DATALOADER.NUM_WORKERS * PREFETCHED, machine.free_shared_memory()
    if not batches or free is None:
        return
    needed = batches * share * image_bytes(cfg, data)
    section.add(
        f"/dev/shm: about {size(needed)} for the {batches} batches of {share} images that workers hold ready; "
        f"{size(free)} are free here",
        shared_bytes=needed,
        shared_free_bytes=free,
    )
    if needed > free:
        section.problem(
            "notice",
            "/dev/shm may be too small: lower DATALOADER.NUM_WORKERS, or give a container more (docker run --shm-size)",
        )


def image_bytes(cfg: CfgNode, data: Data) -> int:
    """About the bytes of one training image of the largest size with a mask for each object, at their mean number."""
    counts = data.objects(cfg) or [0]
    masks = sum(counts) / len(counts) if cfg.MODEL.MASK_ON else 0
    return round(max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN * (3 + masks))


if TYPE_CHECKING:
    from scratch_det.engine.state import Size


def check_model(section: Section, backend: str, cfg: CfgNode, num_gpus: int) -> "Size":
    """Tell the model's size, whether MODEL.WEIGHTS fit it and whether the GPUs are there.

    ``cfg`` has passed every check and has NUM_CLASSES.
    """
    import torch  # here, so that refusals come at once

    from scratch_det.engine.state import size_of
    from scratch_det.weights.load import load_weights

    with torch.device("meta"):
        model = backends.load(backend).build(cfg)
    size = size_of(model)
    section.add(
        f"{backend}: {size.parameters:,} parameters, {size.trainable:,} trainable, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes",
        **size._asdict(),
    )
    if cfg.MODEL.WEIGHTS and place_of(cfg.MODEL.WEIGHTS).is_file():
        if loaded := section.attempt(load_weights, model, cfg.MODEL.WEIGHTS, backend, cfg):
            section.add(loaded)
    elif cfg.MODEL.WEIGHTS:
        section.problem("notice", f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: not fetched yet, so not compared with the model")
    visible = torch.cuda.device_count()
    if cfg.MODEL.DEVICE == "cuda" and visible < num_gpus:
        section.problem(
            "notice", f"MODEL.DEVICE is cuda and {num_gpus} GPUs are asked for, but {visible} are visible here"
            if visible else "MODEL.DEVICE is cuda, but no GPU is visible here: training would use the CPU",
        )  # fmt: skip
    return size


if TYPE_CHECKING:
    from scratch_det.engine.state import Size

WRITTEN = (
    "config.yaml environment.json status.json metrics.json log.txt tensorboard/ checkpoints/ inference/ result.json"
)


def check(
    request: Request,
    num_gpus: int = 1,
    num_machines: int = 1,
    images: bool = False,
    say: Callable[[str], object] = print,
) -> Report:
    """Look at all that ``request`` would meet if it were started, without stopping at the first thing to mend.

    num_gpus, num_machines: processes on a machine, and machines. images: also read every image file. ``say`` receives
    the sections as text, one by one. Raises UserError for numbers of processes that make no sense.
    """
    several_to_launch(ALONE, num_gpus, num_machines, machine_rank=0, dist_url="auto")
    here = max(num_gpus, 1)
    report, backend, available = Report(say), backends.choose(request.backend), machine.available_memory()
    with report.section("recipe") as section:
        library = backends.library(backend)
        section.add(f"{request.config_file}, backend {library}", config_file=request.config_file, backend=backend)
        recipe = load_recipe(section, request, backends.defaults(backend))
        lines = check_recipe(section, request, recipe, backend, here * num_machines) if recipe else []
    if not recipe:
        return report
    cfg, can_be_built = recipe.cfg, report.ok
    if lines:
        with report.section("batch") as section:
            for line in lines:
                section.add(line)
    with report.section("output") as section:
        check_output(section, request, cfg)
    with gc_paused():  # while the annotations are held
        with report.section("data") as section:
            data = read_data(section, recipe)
        if can_be_built:
            check_needs(report, request, cfg, data, here, num_machines, available)
    if images:
        with report.section("images") as section:
            read_images(section, data)
    return report


def check_needs(
    report: Report, request: Request, cfg: CfgNode, data: Data, here: int, num_machines: int, available: int | None
) -> None:
    """What a recipe without errors means for the length of the run, memory, model and disk.

    here: processes on this machine. available: memory in bytes before the data sets were read.
    """
    with report.section("schedule") as section:
        check_schedule(section, cfg, data)
    if data.training:
        with report.section("memory") as section:
            share = cfg.SOLVER.IMS_PER_BATCH // (here * num_machines * request.accumulate)
            check_memory(section, cfg, data, here, share, available)
    with report.section("model") as section:
        size = check_model(section, backends.choose(request.backend), cfg, here)
    with report.section("disk") as section:
        check_disk(section, request, cfg, size)


def load_recipe(section: Section, request: Request, defaults: CfgNode) -> LoadedConfig | None:
    """The recipe; when overrides cannot be read the one without them, to look at the rest; None when no file can."""
    file, words = request.config_file, request.overrides
    if recipe := section.attempt(load_config, file, words, defaults):
        return recipe
    unheard = Section("")  # of refusals that were told above
    pairs = [list(pair) for pair in zip(words[::2], words[1::2], strict=False)]
    sound = [pair for pair in pairs if unheard.attempt(load_config, file, pair, defaults)]
    return unheard.attempt(load_config, file, [word for pair in sound for word in pair], defaults)


def check_recipe(section: Section, request: Request, recipe: LoadedConfig, backend: str, processes: int) -> list[str]:
    """Every rule on a recipe that could be loaded; returns what the batch becomes, in lines."""
    cfg = recipe.cfg
    lines = section.attempt(settle_batch, recipe, processes, request.scale_to_batch, request.accumulate)
    for notice in section.attempt(check_config, cfg, processes, max(request.accumulate, 1), request.waive) or []:
        section.problem("notice", notice)
    section.attempt(backends.check_keys, backend, cfg)
    if not (request.resume and RunDir(cfg.OUTPUT_DIR).holds_run()):
        section.attempt(check_weights, cfg.MODEL.WEIGHTS)
    return lines or []


def check_output(section: Section, request: Request, cfg: CfgNode) -> None:
    """What will be written, and whether the folder is free for it."""
    section.add(f"{cfg.OUTPUT_DIR}/: {WRITTEN}", output_dir=cfg.OUTPUT_DIR)
    section.attempt(RunDir(cfg.OUTPUT_DIR).check, request.resume)
    section.attempt(check_kept, request, cfg.SOLVER.MAX_ITER)
    section.attempt(check_switch, request, cfg)
    section.attempt(check_init, request, cfg)
    parent = request.branch_from or request.switch_from
    if parent and not find_checkpoint(Path(parent)).is_file():
        section.problem(
            "error", f"{'--branch-from' if request.branch_from else '--switch-from'} {parent}: no such file"
        )
    elif parent or (request.resume and RunDir(cfg.OUTPUT_DIR).holds_run()):
        section.problem(
            "notice", "the run behind --resume, --branch-from or --switch-from is compared at the start only"
        )


def check_schedule(section: Section, cfg: CfgNode, data: Data) -> None:
    """The learning rate and how often every image is seen."""
    num_images = len(data.objects(cfg))
    section.add(learning_rate_line(cfg, num_images), training_images=num_images)
    if data.training and not num_images:
        section.problem("error", f"no training image has {needed_for_training(cfg)}")


def check_disk(section: Section, request: Request, cfg: CfgNode, size: "Size") -> None:
    """Whether the checkpoints fit."""
    folder = RunDir(cfg.OUTPUT_DIR).checkpoints
    each = run_dir.checkpoint_bytes(size.weights, size.trainable, optimizer_of(cfg).moments)
    asked = (cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, max(request.keep_last, 0), request.kept)
    most, free = run_dir.most_checkpoints(*asked), run_dir.free_bytes(folder)
    section.add(
        f"up to {most} checkpoints of {run_dir.size(each)} at a time, {run_dir.size(most * each)}; "
        f"{run_dir.size(free)} are free",
        checkpoint_bytes=each, needed_bytes=most * each, free_bytes=free,
    )  # fmt: skip
    section.attempt(run_dir.check_free_space, folder, each, *asked)
