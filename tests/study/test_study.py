"""What is checked before a study starts: run folders of other recipes or checkpoints, data sets, processes, GPUs."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from study.player import BRANCH, TRUNK

from scratch_det.errors import UserError
from scratch_det.study.run import Job
from scratch_det.study.study import Study, disagreements


def test_begun_by_another_in_the_meantime(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run folders are the study's own."""
    study, exists = Study("digits/smoke", tmp_path / "new", backend="torchvision", threads=2), Path.exists

    def other_begins(path: Path) -> bool:
        monkeypatch.undo()
        assert not exists(path)
        replace(study, threads=3).begin()
        (study.out / TRUNK).mkdir()
        return False

    monkeypatch.setattr(Path, "exists", other_begins)
    assert study.begin().threads == 3


def test_the_traceback_of_an_earlier_start_is_not_in_the_way(study: Study) -> None:
    (study.out / "study.json").unlink()
    (study.out / "traceback.txt").touch()  # of an unexpected error before it had begun
    assert study.begin() == study


def test_processes_that_a_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpus does not change them."""
    study = Study("digits/figure4", tmp_path / "study", backend="torchvision")
    recipe = study.jobs[0].recipe(study.out, study.backend)
    recipe.SOLVER.IMS_PER_BATCH = 3
    monkeypatch.setattr(Job, "recipe", lambda *_: recipe)
    job = next(job for job in study.jobs if job.run.processes == 2)
    with pytest.raises(UserError, match=r"2 processes cannot share evenly; change .* \(it needs 2 processes\)$"):
        study.check([job])


def test_another_recipe(study: Study, study_tool: Callable) -> None:
    folder = study.out / TRUNK
    folder.mkdir()
    (folder / "config.yaml").write_text("MODEL:\n  WEIGHTS: /x/imagenet.pth\nSOLVER:\n  BASE_LR: 0.5\n")
    (folder / "metrics.json").write_text('{"iteration": 27, "bbox/AP": 12.5}\n')
    (folder / "result.json").write_text('{"iteration": 27}')
    (folder / "parent.json").touch()
    found = list(disagreements(study.jobs[1], study.out, study.backend))
    assert found == []  # no run is there
    (folder / "parent.json").unlink()
    found = list(disagreements(study.jobs[0], study.out, study.backend))
    assert found == [
        f"{folder}/config.yaml has SOLVER.BASE_LR 0.5, its recipe 0.02",
        f"{folder}/config.yaml has MODEL.WEIGHTS '/x/imagenet.pth', its recipe ''",
    ]
    code, said = study_tool("report", "digits/smoke", "--out", study.out)
    assert code == 2
    assert "move such a folder away" in said
    (folder / "config.yaml").write_text("- no\n- configuration\n")
    assert "config.yaml holds no sections of keys" in next(disagreements(study.jobs[0], study.out, study.backend))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights_sha256": "old"}, "names another model_final.pth than "),
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
    found = list(disagreements(job, study.out, study.backend))
    assert message in found[0] if message else not found


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
        found = "".join(disagreements(job, study.out, study.backend))
        assert (f"names another backbone.pth than {job.run.pretraining} has now" in found) == is_other


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
        found = "".join(disagreements(study.jobs[1], study.out, study.backend))
        assert ("parent.json names another model_0000011.pth than smoke_3x has now" in found) == is_other
