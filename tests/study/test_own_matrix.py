"""A matrix of initialisations in a YAML file: rows in columns, lengths that share trunks, weights, what is rejected."""

from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.errors import ConfigError, DataError
from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH
from scratch_det.study import own
from scratch_det.study.commands import folder_of
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.run import PRETRAIN, Claim, Run
from scratch_det.study.study import Study
from scratch_det.weights.locate import url_of

MATRIX = """
columns:
  all: {recipe: scratch.yaml, lengths: [1, 3], per_x: 9, seeds: [1, 2], changes: {SOLVER.GAMMA: 0.02}}
  few: {recipe: scratch.yaml, seeds: [1]}
random: {}
moco: {weights: moco.pth#encoder_q, pixels: 0-1, source: https://moco/moco.pth, epochs: 2, views: {224: 2}}
ours: {pretraining: crops, source: ours, changes: {SOLVER: {BASE_LR: 0.01}}}
crops: {recipe: scratch.yaml}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "scratch.yaml").write_text("SOLVER:\n  MAX_ITER: 40\nMODEL:\n  BACKBONE:\n    FREEZE_AT: 0\n")
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    return tmp_path / "matrix.yaml"


def by_name(file: Path) -> dict[str, Run]:
    return {run.name: run for run in own.runs(file)}


def test_each_row_in_each_column(file: Path) -> None:
    runs = by_name(file)
    of_random = ["random_all_3x", "random_all_3x_seed2", "random_all_1x", "random_all_1x_seed2", "random_few"]
    assert [*runs][:5] == of_random
    assert [*runs][5:] == [name.replace("random", row) for row in ("moco", "ours") for name in of_random] + ["crops"]
    assert {name.partition("_")[0]: run.init for name, run in runs.items() if name != "crops"} == {
        "random": SCRATCH, "moco": PRETRAINED, "ours": PRETRAINED}  # fmt: skip
    assert runs["crops"].kind == PRETRAIN
    assert {run.places for run in runs.values()} == {(own.MATRIX,), (own.PRETRAINING,)}


def test_claims_are_of_both_rows_and_columns(file: Path) -> None:
    file.write_text(f"{MATRIX}claims:\n  few - all, 1x: moco_few:bbox/AP50 - random_all_1x\n")
    assert own.read(file)[1] == [
        Claim("few - all, 1x", ((1, "moco_few", "bbox/AP50"), (-1, "random_all_1x", "bbox/AP")))
    ]


def test_a_row_in_some_columns(file: Path) -> None:
    file.write_text(MATRIX.replace("ours: {", "ours: {columns: [few], "))
    assert [name for name in by_name(file) if name.startswith("ours")] == ["ours_few"]


def test_lengths_share_a_trunk(file: Path) -> None:
    jobs = {job.name: job for job in jobs_of(own.runs(file))}
    assert (jobs["moco_all_1x"].start, jobs["moco_all_1x"].iterations) == (6, 3)
    assert jobs["moco_all_1x_seed2"].needs == ("moco_all_3x_seed2",)
    assert jobs["moco_all_3x"].keep_at == (6,)
    for name, (end, steps) in {"random_all_1x": (9, (6, 8)), "random_all_3x": (27, (21, 25))}.items():
        cfg = load_config(jobs[name].run.config, jobs[name].run.changes).cfg
        assert (end, steps, 0.02, 1) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA, cfg.SEED)
    assert jobs["random_few"].run.iterations == 40


def test_what_a_row_starts_from(file: Path) -> None:
    runs = by_name(file)
    cfg = load_config(runs["moco_few"].config, runs["moco_few"].changes).cfg
    assert (f"{file.parent}/moco.pth#encoder_q", "0-1") == (cfg.MODEL.WEIGHTS, cfg.MODEL.WEIGHTS_PIXELS)
    assert runs["moco_few"].about["views"] == {"224": 2}
    cfg = load_config(runs["ours_all_1x"].config, runs["ours_all_1x"].changes).cfg
    assert (runs["ours_all_1x"].pretraining, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == ("crops", 0.01, 0.02)


def test_missing_weights_say_where_they_are(file: Path, tmp_path: Path) -> None:
    study = Study(str(file), tmp_path / "out", backend="torchvision")
    weights = tmp_path / "moco.pth"
    with pytest.raises(
        DataError, match=rf"moco_few: .*missing; fetch them: mkdir -p .* && wget -O {weights} https://moco/moco.pth"
    ):
        study.check_data([job for job in study.jobs if job.name == "moco_few"])
    file.write_text(MATRIX.replace("https://moco/moco.pth", "unpack it"))
    with pytest.raises(DataError, match=r"fetch them: unpack it$"):
        study.check_data([job for job in Study(str(file), tmp_path / "out").jobs if job.name == "moco_few"])
    weights.touch()
    study.check_data([job for job in study.jobs if job.name in ("moco_few", "ours_few")])  # of ours, crops makes them


WRONG = {
    "lengths: [1, 3]": ("lengths: 3", r"all.lengths is 3, expected a list of different lengths"),
    "per_x: 9": ("per_x: 10", r"per_x is 10, expected the iterations of 1x, a multiple of 9"),
    "pixels: 0-1": ("pixels: imagnet", r"moco.pixels is 'imagnet', expected one of imagenet, caffe, "),
    "{224: 2}": ("{wide: 2}", r"moco.views is \{'wide': 2\}, expected \{SIDE: NUMBER\}"),
    "source: https": ("sauce: https", r"moco has no sauce; did you mean 'source'"),
    "epochs: 2": ("epochs: 2, changes: {MODEL.WEIGHTS: x}", r"moco_all changes MODEL.WEIGHTS, which weights sets"),
    "pretraining: crops": ("pretraining: crops, weights: a.pth", r"ours has weights and pretraining: leave one"),
    "few: {recipe: scratch.yaml, seeds: [1]}": ("few: {seeds: [1]}", r"few has no recipe"),
    "few: {": ("few: {weights: a.pth, ", r"matrix\.yaml:4: few has no weights; it may have recipe, .*, changes$"),
    "random: {}": (
        "random: {changes: {SOLVER.MAX_ITER: 9}}",
        r"random_all changes SOLVER.MAX_ITER, which lengths sets",
    ),
    "ours: {pretraining": (
        "ours: {columns: [], pretraining",
        r"ours.columns is \[\], expected a list of different columns",
    ),
    "ours: {": ("ours: {columns: [al], ", r"matrix\.yaml:7: ours.columns has al, expected some of all, few"),
    "crops: {": ("crops: {columns: [all], ", r"crops has no columns; it may have recipe"),
    "  few:": ("  all_1x: {recipe: scratch.yaml}\n  few:", r"moco_all_1x and moco_all_1x would be one folder"),
    "\ncrops: {": ("\nrandom_FEW: {recipe: scratch.yaml}\ncrops: {", r"random_few and random_FEW would be one folder"),
    "{pretraining: crops,": ("{pretraining: random,", r"ours starts from random, expected a run of this file that"),
    "\nrandom: {}": (
        "\nclaims: [3]\nrandom: {}",
        r"matrix\.yaml:5: claims is \[3\]: write claims: \{TEXT: RUN - RUN\}",
    ),
    "\nmoco: {": (
        "\nclaims: {few: moco_few - randm_few}\nmoco: {",
        r"yaml:6: the claim 'few' is about randm_few, expected a run, without its seed; did you mean 'random_few'",
    ),
    "moco: {weights": (
        "claims: {few: moco_few:AP}\nmoco: {weights",
        r"claim 'few' is about AP, expected a metric",
    ),
    "\nmoco: {weights: moco": (
        "\nclaims: {few: random_all_1x_seed2}\nmoco: {weights: moco",
        r"about random_all_1x_seed2, expected a run, without its seed; did you mean 'random_all_1x'",
    ),
    "\nours: {": ("\nclaims: {few: moco_few *}\nours: {", r"the claim 'few' is 'moco_few \*', expected a sum such as"),
    "few: {recipe: scratch.yaml, seeds: [1]}\n": (
        "few: {recipe: scratch.yaml, seeds: [1]}\nclaims: {few, 1x: moco_few}\n",
        r"the claim 'few' is None, expected a sum",
    ),
    "crops: {recipe": (
        "crops: {lengths: [2], recipe",
        r"starts from crops, expected a run .*, a recipe without lengths",
    ),
}


@pytest.mark.parametrize("old", WRONG)
def test_rejected(old: str, file: Path) -> None:
    new, message = WRONG[old]
    file.write_text(MATRIX.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        own.runs(file)


@pytest.mark.parametrize("nothing", ["random:", "random: {}"])
def test_a_random_row_says_nothing(nothing: str, file: Path) -> None:
    file.write_text(MATRIX.replace("random: {}", nothing))
    assert by_name(file)["random_few"].init == SCRATCH
    file.write_text(MATRIX.replace("random: {}", "random: [1]"))
    with pytest.raises(ConfigError, match=r"random is \[1\]: write random"):
        own.runs(file)


def test_without_columns(file: Path) -> None:
    file.write_text("columns: 3\nrandom: {}\n")
    with pytest.raises(ConfigError, match=r"columns is 3: write columns: \{NAME"):
        own.runs(file)
    file.write_text("columns: {all: {recipe: scratch.yaml}}\n")
    with pytest.raises(ConfigError, match="there are columns and no row"):
        own.runs(file)
    file.write_text("random: {seeds: [1]}\n")
    with pytest.raises(ConfigError, match="random has no recipe"):
        own.runs(file)


def test_that_of_this_repository() -> None:
    """By its name; every row says what it is, and nothing of a random or other backbone is frozen."""
    assert folder_of("inits").name == "inits"
    runs = of_place("inits")
    rows = {run.shown.partition(",")[0]: run for run in runs}
    assert len(runs) == 3 * len(rows) * (6 + 2)
    for name, run in rows.items():
        cfg = load_config(run.config, run.changes).cfg
        check_config(cfg, num_processes=8)
        assert {cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM} == {0, "SyncBN"}
        assert bool(run.about.get("source")) == bool(run.about.get("licence")) == (name != "random")
        assert (
            not cfg.MODEL.WEIGHTS or url_of(cfg.MODEL.WEIGHTS) or cfg.MODEL.WEIGHTS.startswith(f"{ROOT}/studies/../w")
        )
