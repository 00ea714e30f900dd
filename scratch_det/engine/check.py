"""scratch-det check: all checks of a run, then what it needs: length, memory, model size, disk, readable images."""

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from scratch_det import backends
from scratch_det.config.schedule import learning_rate_line
from scratch_det.data.coco import CocoDataset, nothing_to_train_on
from scratch_det.data.image import find_dark_images, scan_images
from scratch_det.distributed.launch import World, cgroup_files, several_to_launch
from scratch_det.engine import run_dir
from scratch_det.engine.datasets import add_problems
from scratch_det.engine.plan import DETECTION, Plan, Request, make_plan
from scratch_det.errors import Report, Section, UserError, counted, listed
from scratch_det.weights.locate import place_of

NAME_WIDTH = 11  # columns for the name of a section
PREFETCHED = 2  # batches that a worker holds ready: PyTorch's default
MEMINFO = Path("/proc/meminfo")
SHARED = Path("/dev/shm")  # workers pass images through it


def check(
    request: Request,
    num_gpus: int = 1,
    num_machines: int = 1,
    images: bool = False,
    say: Callable[[str], object] = print,
) -> Report:
    """All checks that ``request`` would have to pass at its start, without stopping at the first error.

    num_gpus, num_machines: processes on a machine, and machines. images: also read every image file. ``say`` receives
    the sections as text, one by one. Raises UserError for impossible numbers of processes.
    """
    several_to_launch(World(), num_gpus, num_machines, machine_rank=0)
    here = max(num_gpus, 1)
    world = World(size=here * num_machines, local_size=here)
    report = Report(strict=False, say=lambda section: say(as_text(section)))
    available = available_memory()
    try:
        plan = make_plan(request, world, DETECTION, report)
    except UserError:  # the recipe cannot be read; the report says why
        return report
    if not any(severity == "error" for severity, _ in report.sections[0].problems):  # the model can be built
        check_needs(report, plan, world, available)
    if images:
        with report.section("images") as section:
            for data in {data.entry.name: data for data in [*plan.training, *plan.test]}.values():
                check_images(section, data)
    return report


def check_needs(report: Report, plan: Plan, world: World, available: int | None) -> None:
    """Length of the run, memory, model size and disk space for a recipe without errors.

    available: memory in bytes before the data sets were read.
    """
    images = sum(len(data.training_images(plan.cfg)) for data in plan.training)
    with report.section("schedule") as section:
        section.add(learning_rate_line(plan.cfg, images), training_images=images)
        if plan.training and not images:
            section.problem("error", nothing_to_train_on(plan.cfg, plan.training))
        for data in plan.training:
            add_problems(section, data.entry.name, find_dark_images(data))
    if plan.training:
        with report.section("memory") as section:
            check_memory(section, plan, world, available)
    with report.section("model") as section:
        check_model(section, plan, world)
        size = section.values
    with report.section("disk") as section:
        folder, solver, request = plan.run_dir.checkpoints, plan.cfg.SOLVER, plan.request
        each = run_dir.checkpoint_bytes(plan.cfg, size["weights"], size["trainable"])
        keep_last, free = max(request.keep_last, 0), run_dir.free_bytes(folder)
        most = run_dir.most_checkpoints(solver.MAX_ITER, solver.CHECKPOINT_PERIOD, keep_last, request.kept)
        section.add(
            f"up to {most} checkpoints of {run_dir.size(each)} at a time, {run_dir.size(most * each)}; "
            f"{run_dir.size(free)} are free",
            checkpoint_bytes=each, needed_bytes=most * each, free_bytes=free,
        )  # fmt: skip
        section.attempt(run_dir.check_free_space, folder, each, most)


def as_text(section: Section) -> str:
    """The name, then a line for each fact and problem, errors before notices."""
    errors_first = sorted(section.problems, key=lambda problem: problem[0])
    lines = [*section.lines, *(f"{severity}: {message}" for severity, message in errors_first)]
    return section.name.ljust(NAME_WIDTH) + "\n".join(lines).replace("\n", "\n" + " " * NAME_WIDTH)


def verdict(report: Report) -> str:
    """The last line: whether a run would start."""
    named = " and ".join(
        counted(len(found), f"{kind}s") for kind in ("error", "notice") if (found := report.messages(kind))
    )
    return f"{'ready to train' if report.ok else 'not ready to train'}: {named or 'nothing to fix'}"


def as_json(report: Report) -> str:
    """One object: ok, the sections with their facts, all problems."""
    sections = [{"name": one.name, "lines": one.lines, "values": one.values} for one in report.sections]
    found = [(one.name, *problem) for one in report.sections for problem in one.problems]
    problems = [{"severity": severity, "section": name, "message": message} for name, severity, message in found]
    return json.dumps({"ok": report.ok, "sections": sections, "problems": problems}, indent=2)


def check_memory(section: Section, plan: Plan, world: World, available: int | None) -> None:
    """Compare memory and shared memory with what the processes of this machine need: estimates, so only notices.

    available: bytes before the data sets were read.
    """
    cfg, here = plan.cfg, world.local_size
    # the most that this process has held so far, and the arrays of the training set
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    packed = sum(array.nbytes for data in plan.training for array in data.arrays.values())
    left = f"; {run_dir.size(available)} are available here" if available else ""
    section.add(
        f"{run_dir.size(peak)} while the data sets are read, then {run_dir.size(packed)} that all share{left}",
        peak_bytes=peak, packed_bytes=packed, available_bytes=available,
    )  # fmt: skip
    if available and peak > available:
        section.problem("notice", f"{run_dir.size(peak)} are more than is available: get more memory")
    share = cfg.SOLVER.IMS_PER_BATCH // (world.size * plan.request.accumulate)  # images of a micro-batch
    batches, free = here * cfg.DATALOADER.NUM_WORKERS * PREFETCHED, free_shared_memory()
    if not batches or free is None:
        return
    # images of the largest size; boxes, and masks as outlines, are small beside them
    needed = batches * share * 3 * max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN
    section.add(
        f"/dev/shm: about {run_dir.size(needed)} for the {batches} batches of {share} images that workers hold ready; "
        f"{run_dir.size(free)} are free here",
        shared_bytes=needed, shared_free_bytes=free,
    )  # fmt: skip
    if needed > free:
        fix = "lower DATALOADER.NUM_WORKERS, or give a container more (docker run --shm-size)"
        section.problem("notice", f"/dev/shm may be too small, and workers send batches slowly then: {fix}")


def available_memory() -> int | None:
    """Bytes that new processes can take: of the machine and of every cgroup (container, job) around this process.

    None where the system does not report it. Memory that only caches files counts as available.
    """
    found = []
    if MEMINFO.exists():
        values = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        found.append(int(values["MemAvailable"].removesuffix("kB")) * 1024)
    files = (cgroup_files(f"memory.{name}") for name in ("max", "current", "stat"))
    for limit, current, statistics in zip(*files, strict=True):
        if limit and current and limit != ["max"]:
            cached = dict(line.split() for line in statistics).get("inactive_file", 0)
            found.append(int(limit[0]) - int(current[0]) + int(cached))
    return min(found, default=None)


def free_shared_memory() -> int | None:
    """Free bytes in /dev/shm; None where there is none."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def check_model(section: Section, plan: Plan, world: World) -> None:
    """Report the model's size, whether MODEL.WEIGHTS fit it and the data's pixels, and MODEL.DEVICE with its memory.

    The recipe has passed every check and has NUM_CLASSES. Without weights the model is built on the meta device.
    """
    import torch  # here, so that errors of the checks above come at once

    from scratch_det.data.dataset import first_image
    from scratch_det.distributed.devices import NO_GPU, check_machine, identity
    from scratch_det.engine.state import size_of
    from scratch_det.weights.load import load_weights

    cfg, backend = plan.cfg, plan.backend
    has_weights = bool(cfg.MODEL.WEIGHTS) and place_of(cfg.MODEL.WEIGHTS).is_file()
    with torch.device("cpu" if has_weights else "meta"):
        model = backends.load(backend).build(cfg)
    size = size_of(model)
    known = "" if plan.training or plan.test else " (their number is known only with the data)"
    section.add(
        f"{backend}: {size.parameters:,} parameters, {size.trainable:,} trainable, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes{known}",
        **size._asdict(),
    )
    if has_weights:
        to_train = (model, cfg.MODEL.WEIGHTS, backend, cfg, first_image(cfg, plan.training), plan.request.eval_only)
        if loaded := section.attempt(load_weights, *to_train, lambda text: section.problem("notice", text)):
            section.add(loaded)
    elif cfg.MODEL.WEIGHTS:
        section.problem("notice", f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: not fetched yet, so not compared with the model")
    if cfg.MODEL.DEVICE == "cuda" and world.size == 1 and not torch.cuda.is_available():
        section.problem("notice", NO_GPU)
    elif (device := section.attempt(check_machine, cfg.MODEL.DEVICE, world)) and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        section.add(f"{identity(device)}: {run_dir.size(free)} of {run_dir.size(total)} are free", gpu_free_bytes=free)


def check_images(section: Section, data: CocoDataset) -> None:
    """Read every image file of ``data``."""
    name, scan = data.entry.name, scan_images(data)
    section.add(
        f"{name}: {scan.read:,} read now, {scan.known:,} unchanged since an earlier check",
        **{name: {"read": scan.read, "unchanged": scan.known, "faulty": len(scan.faults)}},
    )
    if scan.faults:
        shown = listed(scan.faults, separator="\n  ")
        section.problem("error", f"{name}: {len(scan.faults)} images cannot be trained on:\n  {shown}")
