"""The check before the first iteration: what a run would refuse, what it will do, what it needs and what it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.check import machine
from scratch_det.check.data import Data, read_data, read_images
from scratch_det.check.memory import check_memory
from scratch_det.check.model import check_model
from scratch_det.check.report import Report, Section
from scratch_det.config import LoadedConfig, check_config, load_config, settle_batch
from scratch_det.config.curve import learning_rate_line
from scratch_det.config.solver_rules import optimizer_of
from scratch_det.data.coco import collection_paused, lack_of_images
from scratch_det.distributed.launch import several_to_launch
from scratch_det.distributed.world import ALONE
from scratch_det.train import disk
from scratch_det.train.rundir import RunDir
from scratch_det.train.start import Request, check_init, check_kept, check_switch
from scratch_det.weights.address import check_weights, find_checkpoint

if TYPE_CHECKING:
    from scratch_det.modeling.size import Size

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
    with collection_paused():  # while the annotations are held
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
        section.problem("error", f"no training image has {lack_of_images(cfg)}")


def check_disk(section: Section, request: Request, cfg: CfgNode, size: "Size") -> None:
    """Whether the checkpoints fit."""
    folder = RunDir(cfg.OUTPUT_DIR).checkpoints
    each = disk.checkpoint_bytes(size.weights, size.trainable, optimizer_of(cfg).moments)
    asked = (cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, max(request.keep_last, 0), request.keep_at)
    most, free = disk.most_checkpoints(*asked), disk.free_bytes(folder)
    section.add(
        f"up to {most} checkpoints of {disk.size(each)} at a time, {disk.size(most * each)}; "
        f"{disk.size(free)} are free",
        checkpoint_bytes=each, needed_bytes=most * each, free_bytes=free,
    )  # fmt: skip
    section.attempt(disk.check_free_space, folder, each, *asked)
