"""Loading: values are detectron2's, files chain, and a broken recipe is rejected with the line and the fix."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fvcore.common.config import CfgNode

from scratch_det.config.choices import PROJECT_KEYS
from scratch_det.config.load import flatten, get_cfg, load_config, set_key
from scratch_det.errors import ConfigError


class TestLoading:
    def load(self, tmp_path: Path, text: str, *overrides: object) -> CfgNode:
        (tmp_path / "recipe.yaml").write_text(text)
        return load_config(tmp_path / "recipe.yaml", overrides).cfg

    def test_values_are_decoded_as_by_detectron2(self, tmp_path: Path) -> None:
        text = "SOLVER:\n  BASE_LR: 2e-2\n  STEPS: [60, 80]\n  WEIGHT_DECAY_BIAS: 0.0\nMODEL:\n  PIXEL_STD: (1, 1, 1)\n"
        cfg = self.load(tmp_path, text, "SOLVER.MAX_ITER", "90", "INPUT.MIN_SIZE_TRAIN", "(640, 800)")
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.SOLVER.WEIGHT_DECAY_BIAS) == (0.02, (60, 80), 0.0)
        assert (cfg.MODEL.PIXEL_STD, cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TRAIN) == ([1, 1, 1], 90, (640, 800))

    def test_file_wins_over_bases_and_later_bases_over_earlier(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 10, BASE_LR: 0.5}\n")
        (tmp_path / "b.yaml").write_text("SEED: 2\nSOLVER: {MAX_ITER: 20}\n")
        cfg = self.load(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSEED: 3\n")
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 20, 0.5)

    def test_base_may_be_one_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("SEED: 1\n")
        assert self.load(tmp_path, "_BASE_: a.yaml\n").SEED == 1

    def test_explicit_keys(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("SEED: 1\n")
        (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nSOLVER: {BASE_LR: 0.1}\n")
        loaded = load_config(tmp_path / "b.yaml", ["OUTPUT_DIR", "x"])
        assert loaded.explicit == {"SEED", "SOLVER.BASE_LR", "OUTPUT_DIR"}

    def test_the_command_lines_part_is_known(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text("SOLVER: {BASE_LR: 0.1, MAX_ITER: 9, STEPS: []}\n")
        loaded = load_config(tmp_path / "recipe.yaml", ["SOLVER.MAX_ITER", "7", "SEED", "1"])
        assert loaded.overridden == {"SOLVER.MAX_ITER", "SEED"}
        assert (loaded.cfg.SOLVER.MAX_ITER, loaded.cfg.SEED) == (7, 1)
        assert (loaded.file_cfg.SOLVER.MAX_ITER, loaded.file_cfg.SEED, loaded.file_cfg.SOLVER.BASE_LR) == (9, -1, 0.1)

    def test_defaults_are_not_shared(self, tmp_path: Path) -> None:
        get_cfg().SOLVER.BASE_LR = 5.0
        assert get_cfg().SOLVER.BASE_LR == 0.001

    @pytest.mark.parametrize(
        ("text", "line", "expected"),
        [
            ("SOLVER:\n  BASE_LRR: 0.1\n", 2, "unknown key SOLVER.BASE_LRR; did you mean 'SOLVER.BASE_LR'"),
            ("SOLVER:\n\n  FREEZE_AT: 0\n", 3, "did you mean 'MODEL.BACKBONE.FREEZE_AT'"),
            ("BASE_LR: 0.1\n", 1, "unknown key BASE_LR; did you mean 'SOLVER.BASE_LR'"),
            ("SLOVER:\n  BASE_LR: 0.1\n", 2, "unknown key SLOVER.BASE_LR; did you mean 'SOLVER.BASE_LR'"),
            ("QQQ: 1\n", 1, "unknown key QQQ; see scratch_det/config/defaults.yaml"),
            ("MODEL:\n  RETINANET: {NUM_CLASSES: 3}\n", 2, "not trained here, such as RetinaNet: remove it"),
            ("SOLVER:\n", 1, "SOLVER is a section"),
            ("SOLVER:\n  BASE_LR: 1\n", 2, "SOLVER.BASE_LR is 1 (int), expected float such as 0.001: write 1.0"),
            ("SOLVER:\n  MAX_ITER: 9e4\n", 2, "is 90000.0 (float), expected int such as 40000: write 90000"),
            ("SOLVER:\n  STEPS: 30\n", 2, "expected tuple such as (30000,): write (30,)"),
            ("SOLVER:\n  STEPS: [a, b]\n", 2, "SOLVER.STEPS is ['a', 'b'] (list), expected tuple"),
            ("SOLVER:\n  BASE_LR: fast\n", 2, "SOLVER.BASE_LR is 'fast' (str), expected float"),
            ("SOLVER:\n  WEIGHT_DECAY_BIAS: none\n", 2, "SOLVER.WEIGHT_DECAY_BIAS is 'none' (str)"),
            (
                "DATASETS:\n  TRAIN: coco\n",
                2,
                "DATASETS.TRAIN is 'coco' (str), expected tuple such as (): write ('coco',)",
            ),
            ("MODEL:\n  MASK_ON: 1\n", 2, "expected bool such as False: write True"),
            ("MODEL:\n  WEIGHTS:\n", 2, 'MODEL.WEIGHTS is None (null), expected str such as "": write ""'),
            (f"SEED: '{'-' * 5000}1'\n", 1, "SEED is '------"),  # too deep for Python's parser
            ("SEED: null\n", 1, "SEED is None (null), expected int such as -1: leave the key out to keep -1"),
            ("OUTPUT_DIR: 7\n", 1, """write "'7'\""""),
            ("SEED: 1\nVERSION: 2\nSEED: 2\n", 3, "SEED is already in line 1 of this file"),
            ("SOLVER: {GAMMA: 0.1}\nSOLVER: {GAMMA: 0.2}\n", 2, "SOLVER is already in line 1"),
            ("SEED: 1\nSOLVER: [1\n", 3, "not valid YAML"),
            ("SOLVER:\n\tGAMMA: 0.1\n", 2, "not valid YAML"),
            ("SEED: !!python/object/apply:os.system ['true']\n", 1, "no Python objects"),
            ("SEED: 1\n_BASE_: nowhere.yaml\n", 2, "nowhere.yaml does not exist"),
            ("_BASE_: 3\n", 1, "_BASE_ is 3, expected a file name"),
            ("_BASE_: recipe.yaml\n", 1, "leads back to itself"),
            (f"_BASE_: {[f'{ROOT}/configs/_base_/init/scratch.yaml'] * 100}\n", 1, "leads to more than 100 files"),
        ],
    )
    def test_mistakes_name_their_line(self, tmp_path: Path, text: str, line: int, expected: str) -> None:
        with pytest.raises(ConfigError) as error:
            self.load(tmp_path, text)
        assert str(error.value).startswith(f"{tmp_path}/recipe.yaml:{line}: ")
        assert expected in str(error.value)

    def test_a_mistake_in_a_base_names_the_base(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text("# solver\nSOLVER:\n  GAMA: 0.1\n")
        with pytest.raises(ConfigError, match=r"/base\.yaml:3: unknown key SOLVER\.GAMA; did you mean 'SOLVER\.GAMMA'"):
            self.load(tmp_path, "_BASE_: ./base.yaml\n")

    def test_longer_cycles_are_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text("_BASE_: recipe.yaml\n")
        with pytest.raises(ConfigError, match=r"base\.yaml:1: .*leads back to itself"):
            self.load(tmp_path, "_BASE_: base.yaml\n")

    def test_all_mistakes_are_told_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as error:
            self.load(tmp_path, "SEEED: 1\nSOLVER:\n  BASE_LR: 1\n", "OUTPUT_DIRR", "x")
        assert len(str(error.value).splitlines()) == 3

    @pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n"])
    def test_no_keys(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match="no keys at all"):
            self.load(tmp_path, text)

    @pytest.mark.parametrize(("name", "expected"), [("none.yaml", "does not exist"), ("", "is a folder")])
    def test_missing_file(self, tmp_path: Path, name: str, expected: str) -> None:
        with pytest.raises(ConfigError, match=f"command line: .*{expected}"):
            load_config(tmp_path / name)

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["SOLVER.BASE_LR"], "'SOLVER.BASE_LR' has no value"),
            (["SOLVER.BASE_L", "0.1"], "unknown key SOLVER.BASE_L; did you mean 'SOLVER.BASE_LR'"),
            (["SOLVER", "0.1"], "SOLVER is a section"),
            (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR is 1 (int), expected float such as 0.001: write 1.0"),
            (["MODEL.MASK_ON", "yes"], "write True"),
            (["MODEL.DEVICE", "0"], "MODEL.DEVICE is 0 (int), expected str such as 'cuda': write cuda:0"),
            (["SOLVER.BASE_LR=0.1"], "joins key and value: write SOLVER.BASE_LR 0.1"),
        ],
    )
    def test_overrides(self, tmp_path: Path, overrides: list[str], expected: str) -> None:
        with pytest.raises(ConfigError) as error:
            self.load(tmp_path, "SEED: 1\n", *overrides)
        assert str(error.value).startswith("command line: ")
        assert expected in str(error.value)


def test_set_key_rejects_unknown_keys_sections_and_frozen_configurations() -> None:
    cfg = get_cfg()
    for key in ("SOLVER.NOTHING", "SOLVER"):
        with pytest.raises(KeyError):
            set_key(cfg, key, 1)
    cfg.freeze()
    with pytest.raises(AttributeError):
        set_key(cfg, "SOLVER.BASE_LR", 0.1)


def test_a_broken_recipe_is_rejected_without_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("SOLVER:\n  BASE_LRR: 0.1\n")
    code = (
        "import sys\nfrom scratch_det.config.load import load_config\n"
        "from scratch_det.command_line import exit_on_user_error\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        f"with exit_on_user_error():\n    load_config({str(recipe)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith(f"error: {recipe}:2: unknown key SOLVER.BASE_LRR")


@pytest.mark.detectron2
def test_defaults_are_detectron2s() -> None:
    from detectron2.config import get_cfg as stock_cfg

    stock = PROJECT_KEYS | flatten(stock_cfg())
    for key, value in flatten(get_cfg()).items():
        assert (stock[key], type(stock[key])) == (value, type(value)), key
