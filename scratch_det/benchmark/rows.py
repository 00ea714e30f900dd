"""A generator of figures for each of ROWS, by its name."""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from operator import call
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fvcore.common.config import CfgNode

from scratch_det.backends import is_installed, load
from scratch_det.benchmark import Options
from scratch_det.benchmark.data import IMAGES, NAME, write_coco
from scratch_det.benchmark.loops import (
    bare_steps,
    loaded_batches,
    loop_against_bare,
    loop_against_plain_script,
    plan_training,
)
from scratch_det.benchmark.measure import in_fresh_process, take_turns
from scratch_det.benchmark.report import IN_MS, IN_S, Figure, beside, figures
from scratch_det.benchmark.scoring import scoring as scoring
from scratch_det.data.catalog import ROOT_VARIABLE
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.loading import training_batches
from scratch_det.data.packed import FOLDER
from scratch_det.distributed.devices import pick_device
from scratch_det.engine.plan import Plan, Request, make_plan
from scratch_det.engine.state import build_state
from scratch_det.files import write_atomically

ENDLESS = 10**9  # iterations
PEER = "detectron2"
FORMS = ("polygon", "bitmask")  # of detectron2's masks
ONCE = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0")


def start(options: Options) -> Iterator[Figure]:
    """First starts find no packed json, later ones that of the first; the same recipe on both sides, no workers."""
    (file, overrides), images = options.recipes[0], max(round(IMAGES * options.scale), 1)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        json_file = write_coco(root, images)
        words = [*overrides, "DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0",
                 "OUTPUT_DIR", str(root / "run")]  # fmt: skip
        env = {ROOT_VARIABLE: root}
        own = partial(in_fresh_process, f"{__name__}:first_batch", file, words, options.backend, env=env)
        peer = partial(in_fresh_process, "scratch_det.benchmark.peers:first_batch", file, words, env=env)
        first, later, theirs = [], [], []
        for _ in range(options.repeats.times):
            shutil.rmtree(json_file.parent / FOLDER, ignore_errors=True)
            first.append(own())
            later.append(own())
            if is_installed(PEER):
                theirs.append(peer())
        about = f"start, {images:,} images, json of {json_file.stat().st_size / 1e6:,.0f} MB"
        for name, ours in (("first", first), ("later", later)):
            yield from figures(f"{name} {about}", (*IN_S, "peak MB", "private MB"), [ours, theirs], beside(PEER))


def first_batch(config_file: str, overrides: list[str], backend: str) -> Any:
    """From a command to its first batch; returns what stays in memory."""
    plan = make_plan(Request(config_file, overrides, backend))
    dataset = TrainingSet(plan.cfg, plan.training)
    batches = training_batches(dataset, plan.cfg, 0)
    next(batches)
    return plan, batches


def for_each_recipe(measure: Callable[[Options, str, Plan], Iterator[Figure]]) -> Callable[[Options], Iterator[Figure]]:
    """A row from what measures one recipe, given its name and plan."""

    def row(options: Options) -> Iterator[Figure]:
        for file, overrides in options.recipes:
            yield from measure(options, Path(file).stem, plan_training(file, overrides, options.backend))

    return row


def peer_data(cfg: CfgNode) -> list[Any]:
    """detectron2's samples of the same data, in each of FORMS; none where it is not installed."""
    if not is_installed(PEER):
        return []
    from scratch_det.benchmark.peers import MappedData

    return [MappedData(cfg, form) for form in FORMS]


@for_each_recipe
def sample(options: Options, name: str, plan: Plan) -> Iterator[Figure]:
    """The same images on both sides, in one thread, as in a loader's worker; ten rounds for each pair."""
    dataset, positions = TrainingSet(plan.cfg, plan.training), itertools.count()
    rounds = options.pairs._replace(times=10 * options.pairs.times)
    ids = [map(dataset.image_id, itertools.count()) for _ in FORMS]
    theirs = [partial(lambda data, ids: data[next(ids)], *pair) for pair in zip(peer_data(plan.cfg), ids, strict=False)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = take_turns([lambda: dataset[next(positions)], *theirs], rounds)
    finally:
        torch.set_num_threads(threads)
    for form, peer in zip(FORMS, costs[1:] or [[]], strict=False):
        yield from figures(f"sample, {name}", IN_MS, [costs[0], peer], beside(PEER, form))


@for_each_recipe
def loader(options: Options, name: str, plan: Plan) -> Iterator[Figure]:
    """One side after the other, since a worker goes on loading between two batches."""
    cfg = plan.cfg
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER = 1, ENDLESS
    dataset = TrainingSet(cfg, plan.training)
    loaders = [lambda: training_batches(dataset, cfg, 0), *(data.batches for data in peer_data(cfg))]
    ways = [partial(images_per_second, begin, options.pairs.times) for begin in loaders]
    rates = take_turns(ways, options.repeats, call)
    for form, peer in zip(FORMS, rates[1:] or [[]], strict=False):
        yield Figure(f"loader, one worker, {name}", "images/s", rates[0], beside(PEER, form), peer)


def images_per_second(begin: Callable[[], Any], count: int) -> float:
    """Of ``count`` batches after the first; ``begin`` returns a generator of batches."""
    with closing(begin()) as batches:
        next(batches)
        began = time.perf_counter()
        images = sum(len(next(batches)) for _ in range(count))
        return images / (time.perf_counter() - began)


@for_each_recipe
def loop(options: Options, name: str, plan: Plan) -> Iterator[Figure]:
    """Records included, loading excluded."""
    costs = loop_against_bare(plan, options.pairs)
    yield from figures(f"iteration of the loop, {name}", IN_MS, costs, "its bare work")


@for_each_recipe
def step(options: Options, name: str, plan: Plan) -> Iterator[Figure]:
    """The bare work of both models on the same images, unflipped and of one size; then whole iterations."""
    cfg, device = plan.cfg, pick_device(plan.cfg.MODEL.DEVICE)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "none", "choice"
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TRAIN[-1:]
    backend, batches, ways = load(plan.backend), loaded_batches(plan), []
    for mixed in (True, False):
        cfg.SOLVER.AMP.ENABLED = mixed
        ways.append(bare_steps(backend, build_state(cfg, backend, device), batches))
    for data in peer_data(cfg)[:1]:
        from scratch_det.benchmark.peers import model_steps

        ways.append(model_steps(cfg, device, [[data[one["image_id"]] for one in batch] for batch in batches]))
    with_amp, full, *theirs = take_turns(ways, options.pairs)
    for ours, kind in ((full, "float32"), (with_amp, "SOLVER.AMP.ENABLED")):
        what = f"model step, {kind}, {plan.backend}, {name}"
        yield from figures(what, IN_MS, [ours, *theirs], beside(PEER, "float32"))
    if is_installed(PEER):
        with_peer = plan_training(plan.request.config_file, plan.request.overrides, PEER)
        costs = loop_against_plain_script(with_peer, options.pairs, options.script)
        yield from figures(f"iteration, {PEER}, {name}", IN_MS, costs, beside(PEER, "plain script"))
    else:
        yield Figure(f"iteration, {PEER}, {name}", "", [], beside(PEER))


@for_each_recipe
def startup(options: Options, name: str, plan: Plan) -> Iterator[Figure]:
    """Whole processes, from the start of Python on; without evaluation."""
    runs, file, words = "scratch_det.benchmark.starts:", plan.request.config_file, plan.request.overrides
    with TemporaryDirectory() as folder:
        done = file, [*words, *ONCE, "OUTPUT_DIR", f"{folder}/done"], plan.backend
        in_fresh_process(f"{runs}run", *done)
        calls: list[Any] = [("run", *done), ("first_iteration", file, words, plan.backend)]
        calls += [("detectron2_first_iteration", *peer_run(plan, Path(folder)))] if is_installed(PEER) else []
        ways = [partial(in_fresh_process, f"{runs}{function}", *rest, whole=True) for function, *rest in calls]
        nothing, *costs = take_turns(ways, options.repeats, call)
    yield from figures(f"start to the first iteration's end, {name}", IN_S, costs, beside(PEER, "DefaultTrainer"))
    yield from figures(f"start with nothing to do, {name}", IN_S, [nothing])


def peer_run(plan: Plan, folder: Path) -> tuple[Path, dict[str, tuple[str, str]]]:
    """The recipe as detectron2's own config file, and the json and images of its data sets."""
    from scratch_det.backends.detectron2 import stock_cfg

    stock, path = stock_cfg(plan.cfg, str(pick_device(plan.cfg.MODEL.DEVICE))), folder / "detectron2.yaml"
    stock.OUTPUT_DIR = str(folder / "detectron2")
    write_atomically(path, stock.dump())
    return path, {data.entry.name: (str(data.entry.json_file), str(data.entry.image_root)) for data in plan.training}
