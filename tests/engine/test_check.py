"""The check before a run: problems of data sets, images, recipe and machine, all told at once."""

import json
import re
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from conftest import ROOT, load_command

from scratch_det import backends
from scratch_det.benchmark.data import NAME, write_coco
from scratch_det.config import choices
from scratch_det.config.load import load_config
from scratch_det.config.schedule import learning_rate_line
from scratch_det.data.packed import FOLDER
from scratch_det.distributed import devices, launch
from scratch_det.distributed.launch import World
from scratch_det.engine import check as machine
from scratch_det.engine import run_dir
from scratch_det.engine.check import check, check_model
from scratch_det.engine.plan import Request
from scratch_det.errors import Section

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_6x_gn.yaml"


class TestCurve:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ([], "0.00667 -> 0.02 over 500 it, 0.002 from 480,000, 0.0002 from 520,000, end 540,000 (73.7 epochs)"),
            (["SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", "()"], "0.02, end 540,000 (73.7 epochs)"),
            (
                ["SOLVER.WARMUP_METHOD", "constant", "SOLVER.STEPS", "(9000,)", "SOLVER.GAMMA", 0.5],
                "0.00667 for 500 it, then 0.02, 0.01 from 9,000, end 540,000 (73.7 epochs)",
            ),
        ],
    )
    def test_line(self, overrides, expected):
        assert learning_rate_line(load_config(R50, overrides).cfg, 117_266) == f"learning rate {expected}"


class TestMachine:
    def write(self, monkeypatch, tmp_path, limits: dict[str, str], available: int = 8) -> None:
        """A machine of ``available`` kB, this process in cgroup job/step; limits: cgroup -> bytes, 100 taken."""
        (tmp_path / "meminfo").write_text(f"MemTotal:  99 kB\nMemAvailable:  {available} kB\n")
        (tmp_path / "own").write_text("0::/job/step\n")
        for name, limit in limits.items():
            folder = tmp_path / "groups" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text("100\n")
            (folder / "memory.stat").write_text("anon 60\ninactive_file 40\n")
        for module, name, file in (
            (machine, "MEMINFO", "meminfo"),
            (launch, "CGROUP", "own"),
            (launch, "CGROUPS", "groups"),
        ):
            monkeypatch.setattr(module, name, tmp_path / file)

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({}, 8192),
            ({"job/step": "max"}, 8192),
            ({"job": "1000", "job/step": "max"}, 940),
            ({"job": "1000", "job/step": "500"}, 440),
            ({"job": "100000"}, 8192),
        ],
        ids=str,
    )
    def test_the_tightest_limit_counts(self, monkeypatch, tmp_path, limits, expected):
        self.write(monkeypatch, tmp_path, limits)
        assert machine.available_memory() == expected

    def test_systems_that_do_not_tell(self, monkeypatch, tmp_path):
        for module, name in ((machine, "MEMINFO"), (launch, "CGROUP"), (launch, "CGROUPS"), (machine, "SHARED")):
            monkeypatch.setattr(module, name, tmp_path / "absent")
        assert machine.available_memory() is None
        assert machine.free_shared_memory() is None


class TestReport:
    @pytest.fixture
    def tool(self) -> Any:
        """scratch-det check as a module."""
        return load_command("check")

    @pytest.fixture
    def run(self, tool, toy_recipe, tmp_path, monkeypatch, capsys):
        """``run(*arguments)``: exit code and output of scratch-det check on the toy recipe; it only writes caches."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

        def files() -> list[Any]:
            return sorted(path for path in tmp_path.rglob("*") if not {"cache", FOLDER} & {*path.parts})

        def run(*arguments: Any) -> SimpleNamespace:
            before = files()
            monkeypatch.setattr(sys, "argv", ["check.py", "--config-file", str(toy_recipe), *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                tool.main()
            assert files() == before
            streams = capsys.readouterr()
            return SimpleNamespace(code=caught.value.code, out=streams.out, err=streams.err)

        return run

    def errors(self, run, *arguments: Any) -> list[str]:
        done = run("--json", *arguments)
        content = json.loads(done.out)
        errors = [one["message"] for one in content["problems"] if one["severity"] == "error"]
        assert (done.code, content["ok"]) == ((2, False) if errors else (0, True))
        return errors

    def test_weights_are_compared_with_the_model(self, run, tmp_path):
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "bn.pth")
        keys = ("MODEL.WEIGHTS", tmp_path / "bn.pth")
        (error,) = self.errors(run, *keys)
        assert "40 without a place" in error
        assert "these are BN's" in error
        assert self.errors(run, *keys, "MODEL.RESNETS.NORM", "FrozenBN") == []
        done = run("MODEL.WEIGHTS", "https://example.org/x.pth")
        assert (done.code, "not fetched yet, so not compared" in done.out) == (0, True)

    def test_the_run_behind_a_branch_is_not_compared(self, run, tmp_path, toy_recipe):
        assert self.errors(run, "--branch-from", "nowhere.pth") == [
            "--branch-from nowhere.pth: no such file; expected a checkpoint in the folder of its run"
        ]
        (tmp_path / "model.pth").touch()
        assert "compared only when the run starts" in run("--branch-from", tmp_path / "model.pth").out

    def test_ready(self, run, tmp_path):
        done = run("--images")
        assert done.code == 0
        names = re.findall(r"^(\w+) {2,}", done.out, re.MULTILINE)
        assert names == ["recipe", "batch", "output", "data", "schedule", "memory", "model", "disk", "images"]
        assert "toy_train: 4 images, 7 objects, 1 crowd, 3 classes (class2, class5, class9); " in done.out
        assert "learning rate 0.01, end 2 (1.3 epochs)" in done.out
        assert "toy_val: 4 read now, 0 unchanged" in done.out
        assert f"{tmp_path / 'run'}/: config.yaml" in done.out
        assert done.out.splitlines()[-1] == "ready to train: nothing to fix"

    def test_the_files_of_writers(self, run, monkeypatch):
        monkeypatch.setattr(choices, "find_spec", lambda _: True)
        said = {name: run("WRITERS", name).out for name in ("[]", "['wandb', 'mlflow']")}
        assert [one in text for text in said.values() for one in ("tensorboard/", "wandb/", "mlflow.json")] == [
            False, False, False, False, True, True
        ]  # fmt: skip

    def test_json_alone_on_standard_output(self, run):
        content = json.loads(run("--json", "--images").out)
        values = {one["name"]: one["values"] for one in content["sections"]}
        assert content["ok"]
        assert content["problems"] == []
        assert values["data"]["toy_val"]["images"] == 4
        assert values["disk"]["checkpoint_bytes"] == 4 * (values["model"]["weights"] + values["model"]["trainable"])

    def test_everything_is_told_at_once(self, run, datasets_root, tmp_path):
        (datasets_root / "toy_val" / "annotations.json").unlink()
        (datasets_root / "toy_train" / "images" / "3.jpg").unlink()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}\n')
        overrides = ["SOLVER.BASE_LR", "-1.0", "MODEL.BACKBONE.FREEZE_AT", 2, "SEED", "one", "SOLVER.BASE_LRR", 1]
        errors = self.errors(run, "--num-gpus", 3, "--keep-last", -1, *overrides)
        expected = [
            "SEED is 'one'", "unknown key SOLVER.BASE_LRR", "SOLVER.BASE_LR is -1.0", "FREEZE_AT is 2",
            "3 processes cannot share evenly", "already holds a run; continue it with --resume", "--keep-last is -1",
            "1 images that are not in", "'toy_val' is not complete",
        ]  # fmt: skip
        assert len(errors) == len(expected)
        for part in expected:
            assert sum(part in message for message in errors) == 1

    def test_resume_allows_a_run_in_the_folder(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}\n')
        assert self.errors(run, "--resume") == []

    def test_gpus_that_are_not_there(self, run, monkeypatch):
        """As at the start: an error where they were asked for, a notice where the CPU takes their place."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        [message] = self.errors(run, "--num-gpus", 2, "MODEL.DEVICE", "cuda")
        assert message.startswith("MODEL.DEVICE is cuda in 2 processes, but no GPU is visible")
        done = run("MODEL.DEVICE", "cuda")
        assert (done.code, "notice: MODEL.DEVICE is cuda, but no GPU is visible" in done.out) == (0, True)

    def test_the_memory_of_a_gpu(self, run, monkeypatch):
        """Functions of torch stand for a GPU."""
        monkeypatch.setattr(devices, "check_machine", lambda name, world: torch.device(name, 1))
        monkeypatch.setattr(devices, "identity", lambda device: f"GPU {device.index}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 20 * 10**9, 24 * 10**9))
        done = run("MODEL.DEVICE", "cuda")
        assert (done.code, "GPU 1: 20.0 GB of 24.0 GB are free" in done.out) == (0, True)

    def test_a_recipe_that_is_not_there(self, run, tmp_path, toy_recipe):
        toy_recipe.unlink()
        assert self.errors(run, "SEED", 1) == [f"command line: {toy_recipe} does not exist"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["MODEL.WEIGHTS", "/nowhere/a.pth"], "file /nowhere/a.pth is missing"),
            (["INPUT.CROP.ENABLED", True], "INPUT.CROP.ENABLED is True"),
            (["MODEL.ROI_HEADS.NUM_CLASSES", 80], "NUM_CLASSES is 80, but"),
            (["--accumulate", 0], "--accumulate is 0"),
            (["--scale-to-batch", 4, "SOLVER.BASE_LR", "-1.0"], "SOLVER.BASE_LR is -1.0"),
            (["SOLVER.IMS_PER_BATCH", 4], "give --scale-to-batch 4"),
        ],
        ids=str,
    )
    def test_what_a_start_rejects(self, run, arguments, text):
        [message] = self.errors(run, *arguments)
        assert text in message

    def test_processes_that_make_no_sense(self, run):
        done = run("--num-gpus", -1)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: --num-gpus -1 ")

    def test_categories_and_damaged_images(self, run, datasets_root):
        val = datasets_root / "toy_val" / "annotations.json"
        content = json.loads(val.read_text())
        content["categories"][0]["name"] = "other"
        val.write_text(json.dumps(content))
        victim = datasets_root / "toy_train" / "images" / "2.jpg"
        victim.write_bytes(victim.read_bytes()[:400])
        mismatch, damaged = self.errors(run, "--images")
        assert "the same category ids and names" in mismatch
        assert damaged.startswith(f"toy_train: 1 images cannot be trained on:\n  id 2, {victim}: ")

    def test_no_objects_to_train_on(self, run, datasets_root):
        path = datasets_root / "toy_train" / "annotations.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
        [message] = self.errors(run)
        assert "none of its 4 images has an object" in message
        assert self.errors(run, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False) == []

    def test_a_full_disk(self, run, monkeypatch):
        monkeypatch.setattr(run_dir, "free_bytes", lambda folder: 1000)
        [message] = self.errors(run)
        assert "available are 0.0 MB" in message

    def test_small_memory_is_a_notice(self, toy_recipe, monkeypatch):
        monkeypatch.setattr(machine, "available_memory", lambda: 1000)
        monkeypatch.setattr(machine, "free_shared_memory", lambda: 1000)
        report = check(Request(str(toy_recipe), ["DATALOADER.NUM_WORKERS", 3]), num_gpus=2, say=lambda text: None)
        [section] = [one for one in report.sections if one.name == "memory"]
        assert [severity for severity, _ in section.problems] == ["notice", "notice"]
        assert report.ok
        batches, images, pixels = 2 * 3 * machine.PREFETCHED, 1, 64 * 96
        assert section.values["shared_bytes"] == batches * images * pixels * 3

    @pytest.mark.parametrize("flags", ["", "--json"])
    def test_into_a_closed_pipe(self, toy_recipe, flags):
        command = f"{sys.executable} tools/check.py {flags} --config-file {toy_recipe} SOLVER.BASE_LR -1.0 | true"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (141, "")

    def test_answers_without_torch_until_the_model_is_built(self, toy_recipe):
        code = (
            "import sys\nfrom scratch_det.engine.check import check\nfrom scratch_det.engine.plan import Request\n"
            "report = check(Request(sys.argv[1], ['MODEL.BACKBONE.FREEZE_AT', '2']), say=lambda text: None)\n"
            "print(report.ok, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, toy_recipe], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "False False\n", done.stderr


def test_the_size_is_that_of_the_model(toy_recipe):
    """Found without memory for the weights, and later models get theirs."""
    cfg = load_config(toy_recipe).cfg
    section = Section("model")
    check_model(section, SimpleNamespace(cfg=cfg, backend="torchvision", training=[], test=[]), World())
    assert section.lines[0].endswith("classes (their number is known only with the data)")
    size = SimpleNamespace(**section.values)
    model = backends.load("torchvision").build(cfg)
    assert size.parameters == size.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert size.weights == sum(tensor.numel() for tensor in model.state_dict().values())
    assert next(model.parameters()).device == torch.device("cpu")


@pytest.mark.slow
def test_a_data_set_of_cocos_size_fits_in_4_gb(datasets_root, tmp_path):
    """The whole check but for reading images; 20 s on one core when this was written."""
    write_coco(datasets_root)
    command = [sys.executable, ROOT / "tools/check.py", "--json", "--config-file", R50]
    overrides = ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "run"]
    done = subprocess.run([*map(str, command), *map(str, overrides)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    values = {one["name"]: one["values"] for one in json.loads(done.stdout)["sections"]}
    assert values["data"][NAME]["objects"] == 860_001
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4e9
