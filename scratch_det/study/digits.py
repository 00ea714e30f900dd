"""The paper in miniature: its experiments on the digits data, small enough for a CPU.

1x is 180 iterations of 4 images, where the paper's is 90,000 of 16; everything that the paper gives in units of 1x is
the same multiple of it here. Pre-training is classification of single digits, see configs/Pretraining.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from scratch_det.study import coco
from scratch_det.study.paper import PRETRAINED, SCRATCH
from scratch_det.study.run import CONFIGS, EVALUATE, PRETRAIN, SEARCH, Run

PER_X = 180
MODEL = "mask_rcnn_R_18_FPN"
SEEDS = (2, 3)  # beside the recipes' own, 1, for the headline pair
SIZES = {"third": "figure7", "tenth": "figure7", "hundredth": "figure8"}  # of the 2,000 images
SMALL_DATA_K = {PRETRAINED: 3, SCRATCH: 6}
SEARCHES = {"third": "search_third", "tenth": "search_tenth", "hundredth": "search_tenth"}  # as in the paper
GRID, GRID_POINTS = "docs/grid_digits.yaml", 4
TEST_AUG = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 72, 96, 120, 144)", "TEST.AUG.MAX_SIZE", "240",
            "TEST.AUG.FLIP", "False")  # half to 1.5 times the plain size; a mirrored digit is another one  # fmt: skip
NO_EVALUATIONS = ("TEST.EVAL_PERIOD", "0")  # but the one at the end


def runs() -> list[Run]:
    """All but ``smoke``, each after those that it needs."""
    kinds = (_pretraining, _table1, _more_seeds, _figure4, _norms, _small_data, _keypoints, _enhanced, _control,
             _unfrozen)  # fmt: skip
    return [run for kind in kinds for run in kind()]


def _run(name: str, places: Iterable[str], shown: str, init: str, k: int, norm: str = "gn", **fields: Any) -> Run:
    """``fields``: others of Run."""
    pretraining = f"pretrain_digits_R_18_{norm}" if init == PRETRAINED else None
    where = tuple(f"digits/{place}" for place in places)
    fields = {"folder": "Digits", "per_x": PER_X, "pretraining": pretraining, **fields}
    return Run(name, where, shown, init, k, **fields)


def _pretraining() -> Iterator[Run]:
    for norm in ("gn", "bn"):
        yield Run(
            name=f"pretrain_digits_R_18_{norm}",
            places=("digits/pretraining",),
            shown=f"classification, {norm.upper()}",
            init=SCRATCH,
            k=0,
            length=2000,
            folder="Pretraining",
            recipe=f"digits_R_18_{norm}",
            kind=PRETRAIN,
        )


def _mirrored(end: str, figure: str, init: str) -> Iterator[Run]:
    """2x to 6x; the 3x run from scratch is a row of the comparison of norms, the 6x run the baseline of Figure 5."""
    more: dict[tuple[int, str], tuple[str, ...]] = {(3, SCRATCH): ("norms",)}
    if end == "gn":
        more = {
            (3, SCRATCH): ("norms", "control"),
            (6, init): ("table2", "figure5", "table3", "small_data", "freezing"),
        }
    for run in coco.kx_runs(MODEL, end, (figure,), init, {}):
        places = (*(("table1",) if end == "gn" else ()), *run.places, *more.get((run.k, init), ()))
        norm = "bn" if end == "syncbn" else end
        processes = 2 if end == "syncbn" else None
        yield _run(run.name, places, run.shown, init, run.k, norm, trunk=run.trunk, processes=processes)


def _table1() -> Iterator[Run]:
    for init in (SCRATCH, PRETRAINED):
        yield from _mirrored("gn", "figure1", init)


def _more_seeds() -> Iterator[Run]:
    """Of Table 1, with its recipes."""
    places = {"digits/table1", "digits/table2", "digits/figure1"}
    for seed, run in product(SEEDS, list(_table1())):
        yield replace(
            run,
            name=f"{run.name}_seed{seed}",
            recipe=run.name,
            seed=seed,
            places=tuple(place for place in run.places if place in places),
            trunk=run.trunk and f"{run.trunk}_seed{seed}",
        )


def _figure4() -> Iterator[Run]:
    for init in (SCRATCH, PRETRAINED):
        yield from _mirrored("syncbn", "figure4", init)


def _norms() -> Iterator[Run]:
    """3x from scratch with norms that the rules reject, and with all weights from one normal distribution."""
    name = f"{SCRATCH}_{MODEL}_3x"
    waive_bn, waive_frozen = ("--waive", "bn_has_images"), ("--waive", "nothing_random_is_frozen")
    bn = _run(f"{name}_bn", ["norms"], "BN, 2 images a process", SCRATCH, 3, processes=2, flags=waive_bn)
    frozen = _run(f"{name}_frozenbn", ["norms"], "FrozenBN, res2 frozen", SCRATCH, 3, flags=waive_frozen)
    yield from (bn, frozen, _run(f"{name}_none", ["norms"], "none", SCRATCH, 3))
    alike: dict[str, Any] = {"recipe": f"{name}_gn", "flags": ("--init-std", "0.01")}
    yield _run(f"{name}_gn_alike", ["norms"], "GN, all weights from N(0, 0.01)", SCRATCH, 3, **alike)


def _small_data() -> Iterator[Run]:
    """Searches with the pre-trained model, whose winners serve both initialisations."""
    names = {size: {init: f"{init}_{MODEL}_{k}x_gn_{size}" for init, k in SMALL_DATA_K.items()} for size in SIZES}
    for size, figure in SIZES.items():
        places, k = (figure, "small_data"), SMALL_DATA_K[PRETRAINED]
        recipe = names[size][PRETRAINED]
        if served := [other for other in SIZES if SEARCHES[other] == f"search_{size}"]:
            targets = [name for other in served for name in names[other].values()]
            search: dict[str, Any] = {"recipe": recipe, "kind": SEARCH, "grid": GRID, "points": GRID_POINTS}
            search |= {"apply_to": tuple(f"{CONFIGS}/Digits/{name}.yaml" for name in targets)}
            search |= {"changes": NO_EVALUATIONS}
            yield _run(f"search_{size}", places, f"{size}, search", PRETRAINED, k, **search)
        if size == "third":
            shown = f"{size}, pretrained, hyper-parameters of all"
            yield _run(f"{recipe}_old", places, shown, PRETRAINED, k, recipe=recipe)
        for init, name in names[size].items():
            yield _run(name, places, f"{size}, {init}", init, SMALL_DATA_K[init], found_by=SEARCHES[size])


def _keypoints() -> Iterator[Run]:
    for init in (SCRATCH, PRETRAINED):
        trunk = f"{init}_keypoint_rcnn_R_18_FPN_3x_gn"
        yield _run(trunk, ["figure6"], f"{init}, 3x", init, 3)
        yield _run(f"{init}_keypoint_rcnn_R_18_FPN_2x_gn", ["figure6"], f"{init}, 2x", init, 2, trunk=trunk)


def _enhanced() -> Iterator[Run]:
    """Train aug, cascade and test aug, each on top of the ones before."""
    for init, k in coco.TRAIN_AUG_K.items():
        places = ("figure5", "table3") if init == SCRATCH else ("figure5",)
        plain, cascade = (f"{init}_{kind}{MODEL}_{k}x_gn_train_aug" for kind in ("", "cascade_"))
        yield _run(plain, places, f"{init}, train aug", init, k)
        switch: dict[str, Any] = {"trunk": plain, "is_switch": True} if init == SCRATCH else {}
        yield _run(cascade, places, f"{init}, train aug, cascade", init, k, **switch)
        shown = f"{init}, train aug, cascade, test aug"
        evaluation: dict[str, Any] = {"kind": EVALUATE, "evaluates": cascade, "pretraining": None}
        evaluation |= {"recipe": cascade, "changes": TEST_AUG}
        yield _run(f"{cascade}_test_aug", places, shown, init, k, **evaluation)


def _unfrozen() -> Iterator[Run]:
    """What the frozen stem and res2 of the pre-trained recipes, which are the paper's, cost or bring here."""
    recipe = f"{PRETRAINED}_{MODEL}_6x_gn"
    changes: dict[str, Any] = {"recipe": recipe, "changes": ("MODEL.BACKBONE.FREEZE_AT", "0")}
    yield _run(f"{recipe}_unfrozen", ["freezing"], "pretrained, 6x, nothing frozen", PRETRAINED, 6, **changes)


def _control() -> Iterator[Run]:
    """A schedule that Table 1 has as a branch, trained on its own: the same numbers, or prefix sharing is wrong."""
    name = f"{SCRATCH}_{MODEL}_3x_gn"
    yield _run(f"{name}_unshared", ["control"], "scratch, 3x, on its own", SCRATCH, 3, recipe=name)


def smoke() -> Iterator[Run]:
    """Two schedules that are too short to learn anything: shows in a minute or two that everything works."""
    recipe, per_x = f"{SCRATCH}_{MODEL}_3x_gn", 9
    for k in (3, 2):
        steps = (k * per_x - 6, k * per_x - 2)
        keys = {"MAX_ITER": k * per_x, "STEPS": steps, "WARMUP_ITERS": 3, "CHECKPOINT_PERIOD": 5}
        words = [str(word) for key, value in keys.items() for word in (f"SOLVER.{key}", value)]
        fields: dict[str, Any] = {"per_x": per_x, "recipe": recipe, "changes": (*words, "TEST.EVAL_PERIOD", "9")}
        trunk = None if k == 3 else "smoke_3x"
        yield _run(f"smoke_{k}x", ["smoke"], f"scratch, {k}x", SCRATCH, k, trunk=trunk, **fields)
