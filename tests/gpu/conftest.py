"""The checks on a GPU, marked ``gpu(seconds=...)``: ``make gpu-check`` runs them.

Without a GPU they are skipped; SCRATCH_DET_GPU_CHECK_ON=cpu tries their code on a CPU, on smaller images and models.
A check records its figures with pytest's ``record_property``; each one ends as a line of JSON on standard output.
``--gpu-results FOLDER``: the lines go into FOLDER/<card>.json, too, and from results/gpu into docs/gpu.md.

``train``  a run on drawn data in this process: its folder    ``plan``  what make_plan says of one
``words``  the overrides of both                              ``drawn``  the folder of the data
"""

import json
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_MODEL
from gpu.drawn import draw_data
from gpu.kit import DEVICE, IS_SMALL, ON
from gpu.report import write_page

from scratch_det.distributed.launch import usable_cores
from scratch_det.engine.command import start
from scratch_det.engine.plan import Plan, Request, make_plan

SECONDS, LEAST = 580, 15  # for all checks; a check needs at least that many to begin
BEGAN = time.monotonic()
KEYS = {
    "SEED": 1, "DATASETS.TRAIN": "('drawn_train',)", "DATASETS.TEST": "()", "SOLVER.BASE_LR": 0.002,
    "SOLVER.STEPS": "()", "SOLVER.WARMUP_ITERS": 1, "SOLVER.IMS_PER_BATCH": 2, "TEST.EVAL_PERIOD": 0,
    "INPUT.MIN_SIZE_TRAIN": "(800,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "TEST.KEYPOINT_OKS_SIGMAS": "[0.1, 0.1, 0.1]",
}  # fmt: skip
SMALL = {
    **SMALL_MODEL, "MODEL.RESNETS.STRIDE_IN_1X1": False, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(32, 32)",
}  # fmt: skip
HAS_DEVICE = IS_SMALL or torch.cuda.is_available()
LINES: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-results", type=Path, help="folder for <card>.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in () if HAS_DEVICE else items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"no GPU is visible ({ON}=cpu tries the code of the checks)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if HAS_DEVICE and item.get_closest_marker("gpu") and (report.when == "call" or not report.passed):
        line = {"check": item.name.removeprefix("test_"), "outcome": report.outcome, "seconds": round(call.duration, 1)}
        line |= dict(item.user_properties)
        if call.excinfo:
            line["message"] = (str(call.excinfo.value) or call.excinfo.typename).splitlines()[0]
        LINES.append(line)
        report.is_told = True
        if folder := item.config.getoption("--gpu-results", None):
            keep(folder)
        item.config.pluginmanager.get_plugin("terminalreporter").write_line(json.dumps(line))
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return (report.outcome, "", report.outcome.upper()) if getattr(report, "is_told", False) else None  # no dot


def keep(folder: Path) -> None:
    """Write the lines so far into ``folder``; of results/gpu/, which is for cards, docs/gpu.md has them, too."""
    is_published = folder.resolve() == ROOT / "results/gpu"
    if IS_SMALL and is_published:
        return
    card = "CPU" if IS_SMALL else torch.cuda.get_device_name()
    machine = {
        "card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "cores": usable_cores(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", card.lower()).strip("_")
    (folder / f"{name}.json").write_text(json.dumps({**machine, "checks": LINES}, indent=1) + "\n")
    if is_published:
        write_page(ROOT)


@pytest.fixture(autouse=True)
def limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """End a check after its own seconds, or those that are left of all."""
    marker = request.node.get_closest_marker("gpu")
    if not marker:
        yield
        return
    left = SECONDS - (time.monotonic() - BEGAN)
    if left < LEAST:
        pytest.skip(f"no time: the checks before took {SECONDS - left:.0f} s")
    seconds = min(left, marker.kwargs["seconds"])

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    if not IS_SMALL:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets root with drawn_train and drawn_val."""
    root = tmp_path_factory.mktemp("drawn")
    draw_data(root, *(((120, 90), 6, 3) if IS_SMALL else ((640, 480), 48, 12)))
    return root


@pytest.fixture
def words(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``words(KEY, VALUE, ..., name="run")``: the overrides of a run on the drawn data."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(drawn))

    def make(*overrides: Any, name: str = "run") -> list[str]:
        keys = {**KEYS, **(SMALL if IS_SMALL else {}), "MODEL.DEVICE": DEVICE, "OUTPUT_DIR": tmp_path / name}
        given = dict(zip(overrides[::2], overrides[1::2], strict=True))
        return [str(word) for pair in {**keys, **given}.items() for word in pair]

    return make


@pytest.fixture
def train(words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """``train(recipe, KEY, VALUE, ..., name="run", resume=False, ...)``: the folder of a run in this process."""

    def run(recipe: str, *overrides: Any, name: str = "run", **request: Any) -> Path:
        start(Request(str(ROOT / recipe), words(*overrides, name=name), "torchvision", **request))
        return tmp_path / name

    return run


@pytest.fixture
def plan(words: Callable[..., list[str]]) -> Callable[..., Plan]:
    """``plan(recipe, KEY, VALUE, ...)``."""
    return lambda recipe, *overrides: make_plan(Request(str(ROOT / recipe), words(*overrides), "torchvision"))
