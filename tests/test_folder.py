"""What a study finds wrong with its run folders: other recipes, edited numbers, other weights than are there now."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from scratch_det.study.folder import disagreements
from scratch_det.study.run import SEARCH
from scratch_det.study.study import Study

TRUNK, BRANCH = "smoke_3x", "smoke_2x"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study("digits/smoke", tmp_path / "study", backend="torchvision", threads=1).begin()


def test_edited_folders(study: Study, study_tool: Callable) -> None:
    """Another recipe's configuration, and a better AP than the run has logged."""
    folder = study.out / TRUNK
    folder.mkdir()
    (folder / "config.yaml").write_text("MODEL:\n  WEIGHTS: /x/imagenet.pth\nSOLVER:\n  BASE_LR: 0.5\n")
    (folder / "metrics.json").write_text('{"iteration": 27, "bbox/AP": 12.5}\n')
    (folder / "result.json").write_text('{"iteration": 27, "metrics": {"bbox": {"AP": 99.0}, "segm": {"AP": 88.0}}}')
    (folder / "environment.json").write_text('{"backend": "detectron2"}')
    found = list(disagreements(study, study.jobs[0]))
    assert f"{folder}/config.yaml has SOLVER.BASE_LR 0.5, its recipe 0.02" in found
    assert f"{folder}/result.json says bbox/AP 99.0, the end of metrics.json 12.5" in found
    assert f"{folder}/result.json says segm/AP 88.0, the end of metrics.json nothing" in found
    assert f"{folder}/config.yaml has MODEL.WEIGHTS '/x/imagenet.pth', its recipe ''" in found
    assert f"{folder}/environment.json has backend 'detectron2', its command 'torchvision'" in found
    code, said = study_tool("report", "digits/smoke", "--out", study.out)
    assert code == 2
    assert "move such a folder away" in said
    (folder / "metrics.json").write_text("")
    (folder / "parent.json").touch()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/model_0000004.pth").touch()
    (folder / "environment.json").write_text('{"init_std": 0.01}')
    (folder / "result.json").write_text('{"metrics_json_sha256": "ab12"}')
    rest = "\n".join(disagreements(study, study.jobs[0]))
    assert f"metrics.json is not as the run wrote it: {folder}/result.json has another SHA-256 of it" in rest
    assert "metrics.json has no evaluation" in rest
    assert f"parent.json is there, but {TRUNK} is a run of its own here" in rest
    assert "environment.json has init_std 0.01, its command None" in rest
    (folder / "config.yaml").write_text("- no\n- configuration\n")
    assert "is no run's configuration" in next(disagreements(study, study.jobs[0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "/x/else.pth"}, "has weights '/x/else.pth', its command "),
        ({"backend": "detectron2"}, "has backend 'detectron2', its command 'torchvision'"),
        ({"weights_sha256": "old"}, "is of another model_final.pth than "),
        ({"weights_sha256": "new"}, None),
        ({}, None),
    ],
)
def test_another_evaluation(tmp_path: Path, changed: dict, message: str | None) -> None:
    study = Study("digits/figure5", tmp_path / "study", backend="torchvision")
    job = next(job for job in study.jobs if job.run.evaluates)
    weights = str(study.out / str(job.run.evaluates) / "checkpoints/model_final.pth")
    path = job.result(study.out)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"backend": "torchvision", "weights": weights, **changed}))
    Path(weights).parent.mkdir(parents=True)
    Path(weights).with_name("index.json").write_text('{"sha256": {"model_final.pth": ["new"]}}')
    found = list(disagreements(study, job))
    assert message in found[0] if message else not found


def test_another_search(tmp_path: Path) -> None:
    study = Study("digits/small_data", tmp_path / "study", backend="torchvision")
    job = next(job for job in study.jobs if job.run.kind == SEARCH)
    folder = study.out / job.name
    for point, ap in (("a", 20.0), ("b", 30.0)):
        (folder / f"trial_{point}").mkdir(parents=True)
        (folder / f"trial_{point}/result.json").write_text(json.dumps({"metrics": {"bbox": {"AP": ap}}}))
    for ap, found in ((30.0, []), (99.0, [f"{folder}/result.json says bbox/AP 99.0, the best of its points 30.0"])):
        (folder / "result.json").write_text(json.dumps({"metrics": {"bbox": {"AP": ap}}}))
        assert list(disagreements(study, job)) == found


def test_another_pretraining(tmp_path: Path) -> None:
    """Made anew after a run had begun with its weights."""
    study = Study("digits/freezing", tmp_path / "study", backend="torchvision")
    job = next(job for job in study.jobs if job.run.pretraining and not job.start)
    folder, body = study.out / job.name, study.out / str(job.run.pretraining) / "backbone.pth"
    for path in (folder, body.parent):
        path.mkdir(parents=True)
    body.write_bytes(b"weights")
    (folder / "metrics.json").write_text('{"iteration": 12}\n')
    (folder / "config.yaml").write_text("MODEL: {WEIGHTS: backbone.pth}\n")
    for content, is_other in ((b"others", True), (b"weights", False)):
        digest = sha256(content).hexdigest()
        (folder / "environment.json").write_text(json.dumps({"weights_sha256": digest}))
        found = "".join(disagreements(study, job))
        assert (f"is of another backbone.pth than {job.run.pretraining} has" in found) == is_other


def test_another_trunk(study: Study) -> None:
    """Made anew after its branch had begun."""
    trunk, branch = (study.out / name for name in (TRUNK, BRANCH))
    for folder in (trunk / "checkpoints", branch):
        folder.mkdir(parents=True)
    (trunk / "checkpoints/index.json").write_text('{"sha256": {"model_0000011.pth": ["new"]}}')
    (branch / "metrics.json").write_text('{"iteration": 12}\n')
    (branch / "config.yaml").write_text("SEED: 1\n")
    for digest, is_other in (("old", True), ("new", False)):
        (branch / "parent.json").write_text(json.dumps({"sha256": digest}))
        found = "".join(disagreements(study, study.jobs[1]))
        assert ("parent.json is of another model_0000011.pth than smoke_3x has" in found) == is_other
