"""Damaged run folders and checkpoints: one message that names the file, or the run goes on; never a traceback."""

import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import DAMAGES, NO_TEST, attempt, contents, damage, interrupted_after, read

from scratch_det.backends import choose, load
from scratch_det.conversion import convert_file
from scratch_det.engine import loop, resume
from scratch_det.engine.checkpointer import Checkpointer, write_synced
from scratch_det.engine.plan import Request, make_plan
from scratch_det.engine.resume import Origin, find_start, restore
from scratch_det.engine.run_dir import RunDir, keep_lines
from scratch_det.engine.state import build_state

Train = Callable[..., Path]
KEYS = ("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
MODEL = "checkpoints/model_0000000.pth"
FILES = {  # whether the run goes on without it
    "config.yaml": False, "environment.json": False, "parent.json": False, "result.json": False,
    "checkpoints/index.json": True, "metrics.json": True, "status.json": True,
}  # fmt: skip


@pytest.fixture
def begun(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run that died in the second of two iterations, with the parent.json and result.json that it might have."""
    monkeypatch.setattr(loop, "PERIOD", 1)
    with interrupted_after(monkeypatch, 1):
        train(*KEYS, name="begun")
    folder = tmp_path / "begun"
    (folder / "parent.json").write_text(json.dumps({"checkpoint": str(folder / MODEL), "sha256": "", "switch": False}))
    (folder / "result.json").write_text(json.dumps({"iteration": 2, "metrics": {}}))
    return folder


def test_a_damaged_run_folder(begun: Path, toy_recipe: Path, tmp_path: Path) -> None:
    """Each file in turn: of a run that goes on, or of the parent of a branch; as far as the first write of a run."""
    environment, wrong = read(begun, "environment.json"), []
    digest = write_synced(begun / MODEL, {"iteration": 0})  # small: it is copied, and not yet loaded
    (begun / "checkpoints/index.json").write_text(json.dumps({"sha256": {Path(MODEL).name: [digest]}, "keep_at": []}))

    def begin(flag: str, folder: Path) -> None:
        given = {"resume": True} if flag == "resume" else {"branch_from": str(folder / MODEL)}
        new = folder if flag == "resume" else tmp_path / "branch"
        plan = make_plan(Request(str(toy_recipe), [*map(str, KEYS), "OUTPUT_DIR", str(new)], **given))
        with closing(plan.run_dir):
            is_done, origin, _ = find_start(plan, Checkpointer(plan.run_dir.checkpoints), environment)
        assert is_done == (folder / "result.json").exists()
        keep_lines(origin.run.metrics if origin else folder / "metrics.json", tmp_path / "lines", 1)

    for flag, kind, file in product(("resume", "branch_from"), DAMAGES, FILES):
        if flag == "branch_from" and file in ("parent.json", "result.json"):
            continue  # they are the parent's own affair
        folder = shutil.copytree(begun, tmp_path / flag / kind / file.replace("/", "_"))
        if file != "result.json":
            (folder / "result.json").unlink()
        damage(folder / file, kind)
        before = contents(folder)
        said = attempt(partial(begin, flag, folder))
        if not (str(folder) in said or (said == "" and FILES[file])) or "UNEXPECTED" in said:
            wrong.append(f"{flag} {kind} {file}: {said or 'goes on'}")
        assert contents(folder) == before, file
    assert wrong == []


def grow(moments: dict[str, Any]) -> None:
    moments["momentum_buffer"] = torch.zeros(3, 3, 3)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {  # of a checkpoint's content
    "shape of momentum": (lambda all_: grow(all_["optimizer"]["state"][1]), r"momentum_buffer of .* is \(3, 3, 3\)"),
    "nan in momentum": (
        lambda all_: all_["optimizer"]["state"][0]["momentum_buffer"].fill_(math.nan),
        "has nan or inf",
    ),
    "groups": (lambda all_: all_["optimizer"]["param_groups"].pop(), "other groups of parameters"),
    "no such parameter": (lambda all_: all_["optimizer"]["state"].update({999: {}}), "does not fit"),
    "optimizer": (lambda all_: all_.update(optimizer=[1]), r"\$\.optimizer"),
    "iteration": (lambda all_: all_.update(iteration="one"), r"\$\.iteration"),
    "seconds": (lambda all_: all_.update(seconds=math.inf), r"\$\.seconds"),
    "window": (lambda all_: all_.update(window=[{"time": "1 s"}]), r"\$\.window\[0\]"),
    "scaler": (lambda all_: all_.update(scaler={"scale": "big"}), r"\$\.scaler"),
    "no model": (lambda all_: all_.pop("model"), "`model`"),
    "nan": (lambda all_: next(iter(all_["model"].values())).view(-1)[0].fill_(math.nan), "has nan or inf in"),
    "empty": (lambda all_: all_["model"].update({next(iter(all_["model"])): torch.zeros(0)}), "has nothing in"),
    "int8": (lambda all_: all_["model"].update({n: v.to(torch.int8) for n, v in all_["model"].items()}), "torch.int8"),
}


def test_a_checkpoint_that_does_not_fit(begun: Path, toy_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rejected before the run's folder is touched: ``open_folder`` comes later."""
    backend = choose("auto")
    cfg = make_plan(Request(str(toy_recipe), [*map(str, KEYS), "OUTPUT_DIR", str(begun)], backend, resume=True)).cfg
    state, origin, wrong = (
        build_state(cfg, load(backend), torch.device("cpu")),
        Origin(begun / MODEL, RunDir(begun), 1),
        [],
    )
    for kind, (change, message) in CHANGES.items():
        content = torch.load(begun / MODEL)
        change(content)
        with monkeypatch.context() as patch:
            patch.setattr(resume, "read_checkpoint", lambda path, content=content: content)
            said = attempt(partial(restore, cfg, backend, state, origin))
        if not re.search(message, said) or str(begun / MODEL) not in said or "UNEXPECTED" in said:
            wrong.append(f"{kind}: {said}")
    assert wrong == []
    assert restore(cfg, backend, state, origin) == []
    assert state.iteration == 1


def test_weights_with_a_flipped_byte_or_numbers_that_are_none(begun: Path, train: Train, tmp_path: Path) -> None:
    """Where torch.load says nothing: MODEL.WEIGHTS, --eval-only and a conversion."""
    path, content = tmp_path / "a.pth", (begun / MODEL).read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    torch.load(path)
    for kind, message in (("", "is damaged: its part"), ("nan", "has nan or inf in"), ("int8", "has torch.int8 in")):
        if kind:
            weights = torch.load(begun / MODEL)
            CHANGES[kind][0](weights)
            torch.save(weights, path)
        for action in (
            lambda: train(*KEYS, "MODEL.WEIGHTS", path, name="new"),
            lambda: train("MODEL.WEIGHTS", path, name="new", eval_only=True),
            lambda: convert_file(str(path), tmp_path / "b.pth", "detectron2"),
        ):
            said = attempt(action)
            assert message in said
            assert said.startswith(f"weights file {path}")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "b.pth").exists()


def test_an_output_folder_that_vanishes(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains: one message, which names it."""
    monkeypatch.setattr(loop, "PERIOD", 1)
    step = loop.Trainer.step

    def vanishing(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "run")
        return step(*arguments)

    monkeypatch.setattr(loop.Trainer, "step", vanishing)
    assert attempt(lambda: train(*KEYS)).startswith(f"OUTPUT_DIR {tmp_path / 'run'} is gone")
