"""Recipes: they load, they say what the paper says, and a broken one is refused with the line and the mend."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from fvcore.common.config import CfgNode

from scratch_det.config import check_config, flatten, get_cfg, load_config, set_key
from scratch_det.config.schedule import Schedule, kx_schedule
from scratch_det.engine.plan import CLASSIFICATION, DETECTION, Request, Section, check_recipe
from scratch_det.errors import ConfigError

CONFIGS = ROOT / "configs"
ALL_FILES = sorted(CONFIGS.rglob("*.yaml"))
LEAVES = [path for path in ALL_FILES if "_base_" not in path.parts]
SOLVERS = sorted((CONFIGS / "_base_/solver").glob("[0-9]*x.yaml"))
TABLE1 = sorted((CONFIGS / "COCO-InstanceSegmentation").glob("*_FPN_?x_gn.yaml"))
KX = re.compile(r"(?:^|_)(\d+)x(?:_|$)")  # "3x" of 3x.yaml or ..._FPN_3x_gn.yaml

# Box AP of the paper's Table 1: the columns are 2x to 6x.
TABLE1_BOX_AP = {
    ("R_50", "scratch"): (36.8, 39.5, 40.6, 40.7, 41.3),
    ("R_50", "pretrained"): (40.3, 40.8, 40.9, 40.9, 41.1),
    ("R_101", "scratch"): (38.2, 41.0, 41.8, 42.2, 42.7),
    ("R_101", "pretrained"): (41.8, 42.3, 42.3, 41.9, 42.2),
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_pretraining(path: Path) -> bool:
    return path.parent.name == "Pretraining"


def bases_of(leaf: Path) -> list[str]:
    return yaml.safe_load(leaf.read_text())["_BASE_"]


def kx_of(path: Path) -> int:
    found = KX.search(path.stem)
    assert found, path
    return int(found[1])


@pytest.fixture
def scratch_cfg() -> CfgNode:
    return load_config(CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml").cfg


class TestRecipes:
    @pytest.mark.parametrize("path", ALL_FILES, ids=relative)
    def test_every_file_loads(self, path: Path) -> None:
        load_config(path)

    @pytest.mark.parametrize("path", LEAVES, ids=relative)
    def test_every_leaf_can_train(self, path: Path) -> None:
        """With the flags of its own command."""
        recipe, text = load_config(path), path.read_text()
        asked = re.search(r"--num-gpus (\d+)", text)
        num_processes = int(asked[1]) if asked else 1 if recipe.cfg.MODEL.DEVICE == "cpu" else 8
        waived = re.findall(r"--waive (\w+)", text)
        section, request = Section(strict=True), Request(str(path), [], waive=tuple(waived))
        task = CLASSIFICATION if is_pretraining(path) else DETECTION
        check_recipe(section, request, recipe, "torchvision", num_processes, task)
        notices = [message for _, message in section.problems]
        assert {notice.split(":")[0] for notice in notices} == {f"--waive {rule}" for rule in waived}

    @pytest.mark.parametrize("path", LEAVES, ids=relative)
    def test_two_levels_at_most(self, path: Path) -> None:
        assert not any("_BASE_" in yaml.safe_load((path.parent / base).read_text()) for base in bases_of(path))

    @pytest.mark.parametrize("path", LEAVES, ids=relative)
    def test_header_names_its_own_command(self, path: Path) -> None:
        header = path.read_text().split("_BASE_")[0]
        tool = "pretrain_net" if is_pretraining(path) else "train_net"
        assert f"python tools/{tool}.py --config-file {relative(path)}" in header

    @pytest.mark.parametrize("path", [*SOLVERS, *TABLE1], ids=relative)
    def test_schedule_is_recomputed(self, path: Path) -> None:
        solver = load_config(path).cfg.SOLVER
        assert Schedule(solver.MAX_ITER, solver.STEPS) == kx_schedule(kx_of(path))

    def test_solvers_differ_in_the_schedule_alone(self) -> None:
        first, *others = [yaml.safe_load(path.read_text()) for path in SOLVERS]
        for other in others:
            assert other["SOLVER"] | {"STEPS": 0, "MAX_ITER": 0} == first["SOLVER"] | {"STEPS": 0, "MAX_ITER": 0}
            assert other["TEST"] == first["TEST"]

    @pytest.mark.parametrize("path", SOLVERS, ids=relative)
    def test_drops_are_evaluated_and_saved(self, path: Path) -> None:
        cfg = load_config(path).cfg
        for iteration in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER):
            assert iteration % cfg.TEST.EVAL_PERIOD == 0
            assert iteration % cfg.SOLVER.CHECKPOINT_PERIOD == 0

    @pytest.mark.parametrize("depth", ["R_50", "R_101"])
    def test_leaves_of_a_figure_differ_in_one_base(self, depth: str) -> None:
        leaves = [path for path in TABLE1 if f"_{depth}_" in path.name]
        assert len(leaves) == 10
        for a in leaves:
            for b in leaves:
                same_init = a.name.split("_")[0] == b.name.split("_")[0]
                changed = sum(x != y for x, y in zip(bases_of(a), bases_of(b), strict=True))
                assert changed == (not same_init) + (kx_of(a) != kx_of(b))
            assert set(yaml.safe_load(a.read_text())) == {"_BASE_"}

    @pytest.mark.parametrize("path", TABLE1, ids=relative)
    def test_header_says_what_the_paper_says(self, path: Path) -> None:
        init, depth, k = path.name.split("_")[0], "R_101" if "R_101" in path.name else "R_50", kx_of(path)
        header = path.read_text()
        assert f"{TABLE1_BOX_AP[depth, init][k - 2]} box AP" in header
        assert f"{90_000 * k:,} iterations" in header


class TestLoading:
    def load(self, tmp_path: Path, text: str, *overrides: object) -> CfgNode:
        (tmp_path / "recipe.yaml").write_text(text)
        return load_config(tmp_path / "recipe.yaml", overrides).cfg

    def test_values_are_decoded_as_by_detectron2(self, tmp_path: Path) -> None:
        text = "SOLVER:\n  BASE_LR: 2e-2\n  STEPS: [60, 80]\n  WEIGHT_DECAY_BIAS: 0.0\nMODEL:\n  PIXEL_STD: (1, 1, 1)\n"
        cfg = self.load(tmp_path, text, "SOLVER.MAX_ITER", "90", "INPUT.MIN_SIZE_TRAIN", "(640, 800)")
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.SOLVER.WEIGHT_DECAY_BIAS) == (0.02, (60, 80), 0.0)
        assert (cfg.MODEL.PIXEL_STD, cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TRAIN) == ([1, 1, 1], 90, (640, 800))

    @pytest.mark.parametrize("path", ALL_FILES, ids=relative)
    def test_result_is_fvcores(self, path: Path) -> None:
        stock = get_cfg()
        stock.merge_from_file(str(path))
        assert load_config(path).cfg == stock

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
            ("MODEL:\n  RETINANET: {NUM_CLASSES: 3}\n", 2, "only --backend detectron2 has"),
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

    def test_longer_cycles_are_refused(self, tmp_path: Path) -> None:
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
            (["SOLVER.BASE_LR=0.1"], "joins key and value: write SOLVER.BASE_LR 0.1"),
            (["SEED", "1", "--eval-only"], "flag --eval-only must come before the first KEY VALUE pair"),
        ],
    )
    def test_overrides(self, tmp_path: Path, overrides: list[str], expected: str) -> None:
        with pytest.raises(ConfigError) as error:
            self.load(tmp_path, "SEED: 1\n", *overrides)
        assert str(error.value).startswith("command line: ")
        assert expected in str(error.value)


class TestRules:
    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("MODEL.BACKBONE.FREEZE_AT", 2, "set MODEL.BACKBONE.FREEZE_AT 0"),
            ("MODEL.RESNETS.NORM", "FrozenBN", "set MODEL.RESNETS.NORM GN"),
            ("MODEL.FPN.NORM", "FrozenBN", "set MODEL.FPN.NORM GN"),
            ("MODEL.ROI_BOX_HEAD.NORM", "FrozenBN", "set MODEL.ROI_BOX_HEAD.NORM GN"),
            ("MODEL.ROI_MASK_HEAD.NORM", "FrozenBN", "set MODEL.ROI_MASK_HEAD.NORM GN"),
            ("MODEL.FPN.NORM", "SynchBN", "did you mean 'SyncBN'"),
            ("MODEL.FPN.OUT_CHANNELS", 80, "MODEL.FPN.OUT_CHANNELS makes 80 channels"),
            ("MODEL.ROI_BOX_HEAD.CONV_DIM", 48, "multiple of 32 such as 64"),
            ("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "multiple of 32 such as 32"),
            ("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "NUM_GROUPS x WIDTH_PER_GROUP makes 4 channels"),
            ("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.NORM is BN with 2 images per process"),
            ("MODEL.RESNETS.DEPTH", 51, "MODEL.RESNETS.DEPTH is 51"),
            ("MODEL.RESNETS.DEPTH", 18, "set MODEL.RESNETS.RES2_OUT_CHANNELS 64"),
            ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [1.5], "MODEL.ROI_HEADS.IOU_THRESHOLDS is [1.5]"),
            ("SOLVER.STEPS", (250_000, 210_000), 'set SOLVER.STEPS "(210000, 250000)"'),
            ("SOLVER.STEPS", (210_000, 270_000), 'drop them (set SOLVER.STEPS "(210000,)")'),
            ("SOLVER.MAX_ITER", 200_000, 'drop them (set SOLVER.STEPS "()")'),
            ("SOLVER.WARMUP_ITERS", 270_000, "set SOLVER.WARMUP_ITERS 27000"),
            ("SOLVER.WARMUP_FACTOR", 3.0, "SOLVER.WARMUP_FACTOR is 3.0"),
            ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER is 0"),
            ("SOLVER.IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH is 0"),
            ("SOLVER.IMS_PER_BATCH", 12, "which 8 processes cannot share evenly; give --scale-to-batch 16"),
            ("SOLVER.REFERENCE_WORLD_SIZE", -1, "SOLVER.REFERENCE_WORLD_SIZE is -1"),
            (
                "SOLVER.REFERENCE_WORLD_SIZE",
                5,
                "share SOLVER.IMS_PER_BATCH 16 evenly; set SOLVER.REFERENCE_WORLD_SIZE 0",
            ),
            ("SOLVER.BASE_LR", 0.0, "SOLVER.BASE_LR is 0.0"),
            ("SOLVER.GAMMA", -0.1, "SOLVER.GAMMA is -0.1"),
            ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0"),
            ("SOLVER.LR_SCHEDULER_NAME", "CosineLR", "did you mean 'WarmupCosineLR'"),
            ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", 'has no drops; set SOLVER.STEPS "()"'),
            ("SOLVER.BASE_LR_END", 0.001, "which SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR ignores; leave it at 0.0"),
            ("SOLVER.RESCALE_INTERVAL", True, "which this trainer ignores; leave it at False"),
            ("SOLVER.WARMUP_METHOD", "linnear", "did you mean 'linear'"),
            ("INPUT.FORMAT", "GRB", "expected 'BGR' or 'RGB'"),
            ("INPUT.RANDOM_FLIP", "horizontaly", "did you mean 'horizontal'"),
            ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "needs its two ends"),
            ("INPUT.MIN_SIZE_TRAIN", (), "INPUT.MIN_SIZE_TRAIN is ()"),
            ("INPUT.MAX_SIZE_TRAIN", 0, "INPUT.MAX_SIZE_TRAIN is 0"),
            ("INPUT.MIN_SIZE_TEST", -800, "INPUT.MIN_SIZE_TEST is -800, expected 0 or more"),
            ("INPUT.MAX_SIZE_TEST", 0, "INPUT.MAX_SIZE_TEST is 0, expected 1 or more"),
            ("TEST.DETECTIONS_PER_IMAGE", -1, "TEST.DETECTIONS_PER_IMAGE is -1, expected 1 or more"),
            ("DATASETS.TRAIN", (), "DATASETS.TRAIN is empty"),
        ],
    )
    def test_one_mistake_one_line(self, scratch_cfg: CfgNode, key: str, value: object, expected: str) -> None:
        set_key(scratch_cfg, key, value)
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes=8)
        assert expected in str(error.value)
        assert len(str(error.value).splitlines()) == 1

    def test_every_problem_is_listed(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.BACKBONE.FREEZE_AT = 2
        scratch_cfg.SOLVER.BASE_LR = -1.0
        scratch_cfg.DATASETS.TRAIN = ()
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg)
        assert len(str(error.value).splitlines()) == 3

    def test_detectron2s_defaults_cannot_train_from_scratch(self) -> None:
        with pytest.raises(ConfigError, match=r"FREEZE_AT is 2(.|\n)*RESNETS\.NORM is FrozenBN"):
            check_config(get_cfg())

    def test_fine_tuning_may_freeze(self) -> None:
        cfg = load_config(CONFIGS / "COCO-InstanceSegmentation/pretrained_mask_rcnn_R_50_FPN_2x_gn.yaml").cfg
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(cfg, num_processes=8) == []

    def test_plain_bn_with_enough_images(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.RESNETS.NORM = "BN"
        assert check_config(scratch_cfg, num_processes=2) == []

    def test_a_backbone_without_resnet_does_not_read_its_norm(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
        scratch_cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(scratch_cfg) == []

    def test_sync_bn_says_what_it_becomes(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.RESNETS.NORM = "SyncBN"
        assert check_config(scratch_cfg, num_processes=8) == []
        (notice,) = check_config(scratch_cfg, num_processes=1)
        assert notice.startswith("MODEL.RESNETS.NORM: SyncBN in a single process is plain BN")

    @pytest.mark.parametrize(("norm", "seen", "whole"), [("SyncBN", 8, 16), ("BN", 4, 8)])
    @pytest.mark.parametrize("part", ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"])
    def test_accumulation_needs_norms_without_a_batch(
        self, scratch_cfg: CfgNode, part: str, norm: str, seen: int, whole: int
    ) -> None:
        assert check_config(scratch_cfg, num_processes=2, accumulate=2) == []
        scratch_cfg.MODEL[part].NORM = norm
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes=2, accumulate=2)
        assert str(error.value) == (
            f"MODEL.{part}.NORM is {norm} with --accumulate 2: it would normalise with the statistics of {seen} "
            f"images, not of {whole}, which is another training; set MODEL.{part}.NORM GN, which normalises each image "
            "alone, or leave out --accumulate"
        )

    def test_fixed_statistics_may_accumulate(self) -> None:
        cfg = load_config(CONFIGS / "COCO-InstanceSegmentation/pretrained_mask_rcnn_R_50_FPN_2x_gn.yaml").cfg
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(cfg, accumulate=8) == []

    @pytest.mark.parametrize(
        ("num_processes", "accumulate", "expected"),
        [
            (1, 3, "which 1 process with --accumulate 3 cannot share evenly; give --accumulate 2"),
            (2, 32, "which 2 processes with --accumulate 32 cannot share evenly; give --accumulate 8"),
            (3, 2, "which 3 processes with --accumulate 2 cannot share evenly; give --scale-to-batch 18"),
            (64, 1, "which 64 processes cannot share evenly; give --scale-to-batch 64"),
        ],
    )
    def test_shares_are_even(self, scratch_cfg: CfgNode, num_processes: int, accumulate: int, expected: str) -> None:
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes, accumulate)
        assert str(error.value) == f"SOLVER.IMS_PER_BATCH is 16 in total, {expected}"

    @pytest.mark.parametrize(("num_processes", "accumulate"), [(0, 1), (1, 0)])
    def test_no_processes_or_parts(self, scratch_cfg: CfgNode, num_processes: int, accumulate: int) -> None:
        with pytest.raises(ValueError, match="must be 1 or more"):
            check_config(scratch_cfg, num_processes, accumulate)

    def test_clipping_type(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "global"
        assert check_config(scratch_cfg) == []
        scratch_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        with pytest.raises(ConfigError, match="CLIP_TYPE is 'global', expected 'value' or 'norm'"):
            check_config(scratch_cfg)


def test_set_key_refuses_unknown_keys_sections_and_frozen_configurations() -> None:
    cfg = get_cfg()
    for key in ("SOLVER.NOTHING", "SOLVER"):
        with pytest.raises(KeyError):
            set_key(cfg, key, 1)
    cfg.freeze()
    with pytest.raises(AttributeError):
        set_key(cfg, "SOLVER.BASE_LR", 0.1)


def test_a_broken_recipe_is_refused_without_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("SOLVER:\n  BASE_LRR: 0.1\n")
    code = (
        "import sys\nfrom scratch_det.config import load_config\nfrom scratch_det.errors import exit_on_user_error\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        f"with exit_on_user_error():\n    load_config({str(recipe)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith(f"error: {recipe}:2: unknown key SOLVER.BASE_LRR")


@pytest.mark.detectron2
class TestAgainstDetectron2:
    def test_defaults_are_equal(self) -> None:
        from detectron2.config import get_cfg as stock_cfg

        stock = flatten(stock_cfg())
        for key, value in flatten(get_cfg()).items():
            assert (stock[key], type(stock[key])) == (value, type(value)), key

    @pytest.mark.parametrize("path", ALL_FILES, ids=relative)
    def test_recipes_load_in_stock_detectron2(self, path: Path) -> None:
        from detectron2.config import get_cfg as stock_cfg

        cfg = stock_cfg()
        cfg.merge_from_file(str(path))
        stock = flatten(cfg)
        for key, value in flatten(load_config(path).cfg).items():
            assert stock[key] == value, key
