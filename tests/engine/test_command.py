"""The command line of a run: its flags, and how it ends in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from run_folder import contents

from scratch_det.__main__ import main
from scratch_det.engine.plan import Request
from scratch_det.errors import quoted

MOST_LINES = 6
TRAIN_NET = ROOT / "tools" / "train_net.py"


class TestFlags:
    @pytest.mark.parametrize(
        ("arguments", "overrides", "flags"),
        [
            (["SOLVER.BASE_LR", "0.01", "--resume"], ["SOLVER.BASE_LR", "0.01"], {"resume": True}),
            (["SEED", "1", "--backend", "torchvision"], ["SEED", "1"], {"backend": "torchvision"}),
            (["SEED", "1", "--resume", "OUTPUT_DIR", "x"], ["SEED", "1", "OUTPUT_DIR", "x"], {"resume": True}),
            (["SEED", "-1", "MODEL.WEIGHTS", ""], ["SEED", "-1", "MODEL.WEIGHTS", ""], {}),
            (["--num-gpus", "0"], [], {}),
            (["--keep-at", "27,47", "--keep-last", "1"], [], {"keep_at": (27, 47), "keep_last": 1}),
            (["--stop-at", "7"], [], {"stop_at": 7}),
            (["SEED", "1", "--device", "cpu"], ["MODEL.DEVICE", "cpu", "SEED", "1"], {}),
            (["--epochs", "1.5"], [], {"epochs": 1.5}),
            (["--scale-to-batch", "2", "--accumulate", "4"], [], {"scale_to_batch": 2, "accumulate": 4}),
            (["--branch-from", "a/model_0000026.pth"], [], {"branch_from": "a/model_0000026.pth"}),
            (["--num-gpus", "1", "--num-machines", "1", "--machine-rank", "0", "--dist-url", "auto"], [], {}),
        ],
    )
    def test_flags_may_stand_anywhere(self, train_net, monkeypatch, arguments, overrides, flags):
        requests = []
        monkeypatch.setattr("scratch_det.engine.command.start", lambda request, *_: requests.append(request))
        train_net("--config-file", "a.yaml", *arguments)
        train_net(*arguments, "--config-file", "a.yaml")
        assert requests == [Request("a.yaml", overrides, **flags)] * 2

    @pytest.mark.parametrize("words", [("eval",), ("eval", "--eval-only"), ("train", "--eval-only")])
    def test_an_evaluation(self, monkeypatch, words):
        requests = []
        monkeypatch.setattr("scratch_det.engine.command.start", lambda request, *_: requests.append(request))
        monkeypatch.setattr("sys.argv", ["scratch-det", *words, "--config-file", "a.yaml", "MODEL.WEIGHTS", "a.pth"])
        main()
        assert requests == [Request("a.yaml", ["MODEL.WEIGHTS", "a.pth"], eval_only=True)]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("--foo", "unrecognized arguments: --foo"),
            ("SOLVER.BASE_LR 0.01 --foo", "unrecognized arguments: --foo"),
            ("SOLVER.BASE_LR 0.01 --foo=1", "unrecognized arguments: --foo=1"),
            ("SOLVER.BASE_LR 0.01 -x", "unrecognized arguments: -x"),
            ("--backend nonsense", "--backend: invalid choice: 'nonsense' (choose from"),
            ("--num-gpus two", "--num-gpus: invalid int value: 'two'"),
            ("--keep-at 1,x", "--keep-at: 1,x, expected whole numbers, such as 1000,2000"),
            ("--config-file", "--config-file: expected one argument"),
            # what other libraries call it
            ("--local_rank=0", "instead of --local_rank write nothing: what torchrun"),
            ("--local-rank 0", "instead of --local-rank write nothing: what torchrun"),
            ("--work-dir out", "instead of --work-dir write OUTPUT_DIR FOLDER"),
            ("--cfg-options a=1", "instead of --cfg-options write KEY VALUE pairs without a flag"),
            ("--batch_size 4", "instead of --batch_size write --scale-to-batch N"),
            ("--lr 0.1 -j 2", "instead of -j write DATALOADER.NUM_WORKERS N"),
            ("--epochs 12 --lr 0.1", "instead of --lr write SOLVER.BASE_LR X"),
            ("--max-epochs 9", "instead of --max-epochs write --epochs N"),
            ("--patience 9", "instead of --patience write TEST.PATIENCE N"),
            ("--model-ema", "instead of --model-ema write MODEL_EMA.ENABLED True"),
            (
                "--device cpu MODEL.DEVICE cuda",
                "--device and MODEL.DEVICE: both name the device, leave out one of them",
            ),
            ("--trial 4 --epochs 1", "argument --epochs: not allowed with argument --trial"),
            ("-1 --cfg_options a=1", "instead of --cfg_options write KEY VALUE pairs without a flag"),
            ("--num_gpus 2", "unrecognized arguments: --num_gpus; did you mean '--num-gpus'?"),
            ("--resume=last.pth", "--resume takes no value: it continues the run in OUTPUT_DIR"),
        ],
    )
    def test_unknown_flags_and_values(self, train_net, capsys, toy_recipe, tmp_path, arguments, expected):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as caught:
            train_net("--config-file", toy_recipe, *arguments.split())
        message = capsys.readouterr().err
        assert caught.value.code == 2
        assert len(message.splitlines()) <= MOST_LINES
        assert expected in message.splitlines()[-1]
        assert contents(tmp_path) == before

    def test_what_the_recipe_forbids_starts_no_process(self, train_net, toy_recipe, monkeypatch, capsys):
        monkeypatch.setattr("scratch_det.engine.command.launch", lambda **_: pytest.fail("processes were started"))
        with pytest.raises(SystemExit, match="2"):
            train_net("--config-file", toy_recipe, "--num-gpus", "3")
        assert "3 processes cannot share evenly" in capsys.readouterr().err

    def test_a_recipe_is_required(self, train_net, capsys):
        with pytest.raises(SystemExit) as caught:
            train_net("SOLVER.BASE_LR", "0.01")
        assert caught.value.code == 2
        assert "required: --config-file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            (["a (1).yaml", "--resume"], '; write --config-file "a (1).yaml"'),
            (["--resume", "configs/a.py"], "; write --config-file configs/a.py"),
            (["--config", "a.yaml"], "  instead of --config write --config-file FILE"),
            (["-c", "a.yaml"], "  instead of -c write --config-file FILE"),
        ],
    )
    def test_a_recipe_without_its_flag(self, train_net, capsys, arguments, answer):
        with pytest.raises(SystemExit, match="2"):
            train_net(*arguments)
        assert capsys.readouterr().err.splitlines()[-1].endswith(answer)

    @pytest.mark.parametrize("part", ["", "#model_ema"])
    def test_what_is_to_be_evaluated_without_its_flag(self, capsys, monkeypatch, tmp_path, part):
        weights = tmp_path / "checkpoints" / "model_final.pth"
        weights.parent.mkdir()
        for path in (weights, tmp_path / "config.yaml"):
            path.touch()
        for word in (f"{tmp_path}{part}", f"{weights}{part}"):
            monkeypatch.setattr("sys.argv", ["scratch-det", "eval", word, "SEED", "1"])
            with pytest.raises(SystemExit, match="2"):
                main()
            expected = f"; write --config-file {tmp_path}/config.yaml MODEL.WEIGHTS {quoted(f'{weights}{part}')}"
            assert capsys.readouterr().err.splitlines()[-1].endswith(expected)

    def test_a_stop_during_the_checks_is_obeyed_at_once(self, train_net, capsys, monkeypatch):
        """A json of COCO's size takes 10 s, and nothing is lost."""

        def check_for_long(*_):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        monkeypatch.setattr("scratch_det.engine.command.make_plan", check_for_long)
        with pytest.raises(SystemExit, match="75"):
            train_net("--config-file", "a.yaml")
        assert (
            capsys.readouterr().err
            == "stopped by SIGTERM; nothing was trained in this start, the same command starts again\n"
        )

    def test_tools_without_keys_give_no_answer_on_keys(self, study_tool):
        code, said = study_tool("list", "--work-dir", "out")
        assert (code, said.splitlines()[-1].split(": ", 2)[2]) == (2, "unrecognized arguments: --work-dir out")


class TestProcess:
    """The same in processes of their own."""

    def run(self, *command) -> subprocess.CompletedProcess:
        line = [sys.executable, *map(str, command)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)

    def test_config_error(self, toy_recipe, tmp_path):
        done = self.run(TRAIN_NET, "--config-file", toy_recipe, "SOLVER.BASE_LRR", "0.1")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: command line: unknown key SOLVER.BASE_LRR; did you mean 'SOLVER.BASE_LR'?\n"
        assert not (tmp_path / "run").exists()

    def test_truncated_jpeg(self, toy_recipe, datasets_root, tmp_path):
        victim = datasets_root / "toy_train" / "images" / "2.jpg"
        victim.write_bytes(victim.read_bytes()[:400])
        done = self.run(TRAIN_NET, "--config-file", toy_recipe)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: {victim}: cannot be decoded")
        assert "Traceback" not in done.stderr + done.stdout
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            ("--help", 0),
            ("--foo", 2),
            ("SOLVER.BASE_LRR 1", 2),
            ("MODEL.BACKBONE.FREEZE_AT 2", 2),
            ("DATASETS.TRAIN ('nothing',)", 2),
            ("MODEL.WEIGHTS /nowhere/a.pth", 2),
        ],
    )
    def test_answers_without_torch(self, toy_recipe, arguments, code):
        script = (
            "import runpy, sys\nsys.argv.pop(0)\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n    print('exit', stop.code, 'torch' in sys.modules)\n"
        )
        done = self.run("-c", script, TRAIN_NET, "--config-file", toy_recipe, *arguments.split())
        assert done.stdout.splitlines()[-1] == f"exit {code} False"
