"""tools/study.py plan: what an experiment costs, and in which order its runs come."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT

from scratch_det.study.experiments import of_place
from scratch_det.study.job import jobs_of


@pytest.mark.parametrize(("flag", "iterations"), [("--share-prefix", "3,120,000"), ("--no-share-prefix", "7,200,000")])
def test_table1(study_tool: Callable, flag: str, iterations: str) -> None:
    code, said = study_tool("plan", "table1", flag, "--gpus", 8, "--seconds-per-iter", 0.5)
    assert code == 0
    assert f"iterations: {iterations}" in said
    hours = int(iterations.replace(",", "")) / 7200
    assert f"time: {hours:,.0f} h on 8 GPUs one run after the other, {8 * hours:,.0f} GPU hours" in said


@pytest.mark.parametrize(
    "experiment", sorted({place for run in of_place("paper") for place in run.places} | {"digits"})
)
def test_every_experiment(study_tool: Callable, experiment: str) -> None:
    code, said = study_tool("plan", experiment)
    assert code == 0
    assert "GB of checkpoints" in said


def test_order() -> None:
    """Pre-training, trunk, branches, switch, evaluation."""
    for experiment in ("paper", "digits"):
        seen: set[str] = set()
        for job in jobs_of(of_place(experiment)):
            assert seen.issuperset(job.needs), job.name
            seen.add(job.name)


def test_needs_come_along() -> None:
    names = {job.name for job in jobs_of(of_place("scratch_cascade_mask_rcnn_R_50_FPN_9x_gn_train_aug_test_aug"))}
    plain = "scratch_mask_rcnn_R_50_FPN_9x_gn_train_aug"
    cascade = plain.replace("mask_rcnn", "cascade_mask_rcnn")
    assert names == {plain, cascade, f"{cascade}_test_aug"}


def test_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, runpy; sys.argv = ['study.py', 'plan', 'paper']\n"
        "runpy.run_path('tools/study.py', run_name='__main__')\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
