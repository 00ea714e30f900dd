"""The paper in miniature: its experiments on the digits data, small enough for a CPU.

1x is 360 iterations of 4 images, where the paper's is 90,000 of 16; everything that the paper gives in units of 1x is
the same multiple of it here. Pre-training is classification of single digits, see configs/Pretraining. The plan, why
these sizes and which seeds, is in docs/miniature.md.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH
from scratch_det.study.run import CONFIGS, PRETRAIN, SEARCH, Claim, Run, cascade_runs, schedules

PER_X = 360
SEEDS = (2, 3, 4, 5)  # beside the recipes' own, 1, for the headline pair
FEWER_SEEDS = (2, 3)  # of the frozen layers and of small data
ONE_SEED = tuple(f"digits/{place}" for place in ("figure5", "table3", "norms", "control", "figure8"))
FROZEN = (6, 2)  # the lengths with stem and res2 as pre-trained
SIZES, SHORT, LONG = ("third", "tenth"), 1, 3  # of the 120 images; the lengths with them
GRID, GRID_POINTS = "docs/grid_digits.yaml", 4
TEST_AUG = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 72, 96, 120, 144)", "TEST.AUG.MAX_SIZE", "240",
            "TEST.AUG.FLIP", "False")  # half to 1.5 times the plain size; a mirrored digit is another one  # fmt: skip

SCRATCH_GN, TUNED_GN = "scratch_mask_rcnn_R_18_FPN_{k}x_gn", "pretrained_mask_rcnn_R_18_FPN_{k}x_gn"


def _claim(text: str, formula: str) -> Claim:
    """scratch_3x_tenth is short for scratch_mask_rcnn_R_18_FPN_3x_gn_tenth."""
    name = r"(_keypoint|_cascade_mask)?_(\dx)(_syncbn|_bn)?"
    full = re.sub(name, lambda m: f"{m[1] or '_mask'}_rcnn_R_18_FPN_{m[2]}{m[3] or '_gn'}", formula)
    return Claim.parse(text, full)


# The table "claims" of docs/miniature.md, by the plan's questions, then by figure.
CLAIMS = [_claim(*claim) for claim in (
    *((f"1: scratch - pretrained, {k}x", f"scratch_{k}x - pretrained_{k}x") for k in range(2, 7)),
    ("1: the difference at 6x less the one at 2x", "scratch_6x - pretrained_6x - scratch_2x + pretrained_2x"),
    *((f"2: scratch - pretrained, 6x, {name}", f"scratch_6x:{metric} - pretrained_6x:{metric}")
      for name, metric in (("box AP50", "bbox/AP50"), ("box AP75", "bbox/AP75"), ("mask AP", "segm/AP"))),
    ("2: the difference of AP75 less the one of AP50",
     "scratch_6x:bbox/AP75 - pretrained_6x:bbox/AP75 - scratch_6x:bbox/AP50 + pretrained_6x:bbox/AP50"),
    *((f"3: {init}, 6x - {k}x", f"{init}_6x - {init}_{k}x") for init in (SCRATCH, PRETRAINED) for k in (4, 5)),
    *((f"4: pretrained, frozen - not frozen, {k}x", f"pretrained_{k}x_frozen - pretrained_{k}x") for k in FROZEN),
    *((f"4: scratch - pretrained, frozen, {k}x", f"scratch_{k}x - pretrained_{k}x_frozen") for k in FROZEN),
    *((f"5: {size}, scratch - pretrained, {k}x", f"scratch_{k}x_{size} - pretrained_{k}x_{size}")
      for size in SIZES for k in (SHORT, LONG)),
    *((f"5: {size}, scratch - pretrained, {LONG}x, mask AP",
       f"scratch_{LONG}x_{size}:segm/AP - pretrained_{LONG}x_{size}:segm/AP") for size in SIZES),
    *((f"5: {size}, scratch, {LONG}x - pretrained, {SHORT}x", f"scratch_{LONG}x_{size} - pretrained_{SHORT}x_{size}")
      for size in SIZES),
    *((f"5: {size}, {init}, {LONG}x - {SHORT}x", f"{init}_{LONG}x_{size} - {init}_{SHORT}x_{size}")
      for size in SIZES for init in (SCRATCH, PRETRAINED)),
    *((f"Figure 4: SyncBN, scratch - pretrained, {k}x", f"scratch_{k}x_syncbn - pretrained_{k}x_syncbn")
      for k in (2, 6)),
    *((f"Figure 4: {init}, SyncBN - GN, 6x", f"{init}_6x_syncbn - {init}_6x") for init in (SCRATCH, PRETRAINED)),
    ("norms: 3x, BN on 2 images - SyncBN on 4", "scratch_3x_bn - scratch_3x_syncbn"),
    ("norms: 3x, all weights from N(0, 0.01) - He", "scratch_3x_alike - scratch_3x"),
    *((f"Figure 6: scratch - pretrained, {k}x, {name}",
       f"scratch_keypoint_{k}x:{metric} - pretrained_keypoint_{k}x:{metric}")
      for name, metric in (("box AP", "bbox/AP"), ("keypoint AP", "keypoints/AP")) for k in (2, 3)),
    *((f"Figure 5: {init}, {text}", f"{init}{ours} - {init}{theirs}")
      for init, k in ((SCRATCH, 9), (PRETRAINED, 6)) for text, ours, theirs in (
          (f"train aug, {k}x - plain, 6x", f"_{k}x_train_aug", "_6x"),
          ("cascade - train aug", f"_cascade_mask_{k}x_train_aug", f"_{k}x_train_aug"),
          ("test aug - cascade", f"_cascade_mask_{k}x_train_aug_test_aug:bbox_TTA/AP",
           f"_cascade_mask_{k}x_train_aug"))),
    ("Figure 5: cascade, scratch, 9x - pretrained, 6x",
     "scratch_cascade_mask_9x_train_aug - pretrained_cascade_mask_6x_train_aug"),
)]  # fmt: skip


def runs() -> list[Run]:
    """All but ``smoke``, each after those that it needs."""
    baseline, all_k = {6: "table2 figure5 table3 small_data freezing"}, range(6, 1, -1)
    # fmt: off
    table1 = [
        *_runs(SCRATCH_GN, "table1 figure1", all_k, {3: "norms control", **baseline}),
        *_runs(TUNED_GN, "table1 figure1", all_k, {2: "freezing", **baseline}),
    ]
    found = [
        *_runs("pretrain_digits_R_18_gn", "pretraining", [0], shown="classification, GN", recipe="digits_R_18_gn",
               init=SCRATCH, length=4000, folder="Pretraining", kind=PRETRAIN),
        *_runs("pretrain_digits_R_18_bn", "pretraining", [0], shown="classification, BN", recipe="digits_R_18_bn",
               init=SCRATCH, length=4000, folder="Pretraining", kind=PRETRAIN),
        *_repeated(table1, SEEDS),
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_syncbn", "figure4", all_k, {3: "norms"}, processes=2),
        *_runs("pretrained_mask_rcnn_R_18_FPN_{k}x_syncbn", "figure4", all_k, norm="bn", processes=2),
        # Norms that the rules reject, and all weights from one normal distribution.
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_bn", "norms", [3], shown="BN, 2 images a process", processes=2,
               flags=("--waive", "bn_has_images")),
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_frozenbn", "norms", [3], shown="FrozenBN, res2 frozen",
               diverges=True, flags=("--waive", "nothing_random_is_frozen")),
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_none", "norms", [3], shown="none", diverges=True),
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_gn_alike", "norms", [3], shown="GN, all weights from N(0, 0.01)",
               recipe="scratch_mask_rcnn_R_18_FPN_3x_gn", flags=("--init-std", "0.01")),
        *(run for size in SIZES for run in _small_data(size)),
        *_runs("scratch_keypoint_rcnn_R_18_FPN_{k}x_gn", "figure6", [3, 2]),
        *_runs("pretrained_keypoint_rcnn_R_18_FPN_{k}x_gn", "figure6", [3, 2]),
        # Train aug, cascade and test aug, each on top of the ones before.
        *(run for name, places, k in (
            ("scratch_mask_rcnn_R_18_FPN_{k}x_gn_train_aug", "figure5 table3", 9),
            ("pretrained_mask_rcnn_R_18_FPN_{k}x_gn_train_aug", "figure5", 6),
        ) for plain in _runs(name, places, [k], shown="{init}, train aug")
            for run in (plain, *cascade_runs(plain, TEST_AUG, {}, {}))),
        # A branch of Table 1, trained from its beginning: other numbers would show an error in prefix sharing.
        *_runs("scratch_mask_rcnn_R_18_FPN_{k}x_gn_unshared", "control", [3], shown="scratch, 3x, on its own",
               recipe="scratch_mask_rcnn_R_18_FPN_3x_gn"),
        # Stem and res2 as pre-trained, as in the paper's recipes.
        *_repeated([replace(run, name=f"{run.name}_frozen", recipe=run.name, trunk=run.trunk and f"{run.trunk}_frozen",
                            shown=run.shown.replace(",", ", stem and res2 frozen,"), places=("digits/freezing",),
                            changes=("MODEL.BACKBONE.FREEZE_AT", "2"))
                    for run in table1 if run.init == PRETRAINED and run.k in FROZEN], FEWER_SEEDS),
    ]
    # fmt: on
    claimed = {name for claim in CLAIMS for _, name, _ in claim.terms}
    return [replace(run, places=(*run.places, "digits/claims")) if run.repeats in claimed else run for run in found]


def smoke() -> Iterator[Run]:
    """Two schedules that are too short to learn anything: shows in a minute or two that everything works."""
    for run in _runs("smoke_{k}x", "smoke", [3, 2], init=SCRATCH, per_x=9, recipe="scratch_mask_rcnn_R_18_FPN_3x_gn"):
        end = run.iterations
        changes = ("SOLVER.MAX_ITER", str(end), "SOLVER.STEPS", str((end - 6, end - 2)), "SOLVER.WARMUP_ITERS", "3",
                   "SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "9")  # fmt: skip
        yield replace(run, changes=changes)


def _runs(
    name: str, places: str, lengths: Sequence[int], more: dict[int, str] | None = None, norm: str = "gn", **fields: Any
) -> list[Run]:
    """``schedules`` with lengths in 1x of the miniature; the ``norm`` of the weights that a pre-trained one has."""
    is_pretrained = fields.get("init", name.partition("_")[0]) == PRETRAINED
    pretraining = f"pretrain_digits_R_18_{norm}" if is_pretrained else None
    common = {"folder": "Digits", "per_x": PER_X, "pretraining": pretraining}
    runs = schedules(name, places, {k: {} for k in lengths}, more, **{**common, **fields})
    return [replace(run, places=tuple(f"digits/{place}" for place in run.places)) for run in runs]


def _repeated(runs: Sequence[Run], seeds: Sequence[int]) -> Iterator[Run]:
    """The runs, and again with other seeds, which are in their places but for those that show a single seed."""
    yield from runs
    for seed in seeds:
        for run in runs:
            places = tuple(place for place in run.places if place not in ONE_SEED)
            yield replace(run, name=f"{run.name}_seed{seed}", recipe=run.recipe or run.name, seed=seed, places=places,
                          trunk=run.trunk and f"{run.trunk}_seed{seed}")  # fmt: skip


def _small_data(size: str) -> Iterator[Run]:
    """A part of the images: both initialisations, with what a search with the pre-trained model finds."""
    recipes, places = {f"{TUNED_GN}_{size}": SHORT, f"{SCRATCH_GN}_{size}": LONG}, "figure7 small_data"
    tuned, scratch = (name.format(k=k) for name, k in recipes.items())
    targets = tuple(f"{CONFIGS}/Digits/{name}.yaml" for name in (tuned, scratch))
    # Evaluated at the end only, on scenes that neither training nor any table has.
    changes = ("TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "('digits_search',)")
    yield from _runs(f"search_{size}", places, [SHORT], shown=f"{size}, search", init=PRETRAINED, recipe=tuned,
                     kind=SEARCH, grid=GRID, points=GRID_POINTS, apply_to=targets, changes=changes)  # fmt: skip
    if size == "third":
        yield from _runs(f"{tuned}_old", places, [SHORT], shown=f"{size}, {{init}}, hyper-parameters of all, {{k}}x",
                         recipe=tuned)  # fmt: skip
    for name, k in recipes.items():
        runs = _runs(name, places, [LONG, SHORT], {k: "figure8" * (size == "tenth")}, shown=f"{size}, {{init}}, {{k}}x",
                     found_by=f"search_{size}", recipe_of={SHORT + LONG - k: k})  # fmt: skip
        yield from _repeated(runs, FEWER_SEEDS)
