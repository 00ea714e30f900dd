"""The paper's runs that this repository has recipes for: one entry a run, with its place and what the paper reports.

Runs of one model that differ in length alone share their beginning: the longest one is the trunk of the others, which
branch off where they first drop the learning rate.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from scratch_det.study import paper
from scratch_det.study.paper import PRETRAINED, SCRATCH
from scratch_det.study.run import EVALUATE, PRETRAIN, Run

TRAIN_AUG_K = {SCRATCH: 9, PRETRAINED: 6}  # of the kx schedule, section 5.1
TEST_AUG = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MAX_SIZE", "2000")  # pixels of the longer side, as in Detectron
SMALL_DATA_PLACES = {"10k": "figure7", "3.5k": "3.5k", "1k": "figure8"}  # 3.5k images are in section 5.2's text alone


def runs() -> list[Run]:
    """All of the paper's, a trunk before its branches."""
    kinds = (_table1, _figure4, _train_aug, _pretraining, _cascade, _keypoints, _vgg, _small_data, _fewer_images, _voc)
    return [run for kind in kinds for run in kind()]


def kx_runs(stem: str, end: str, places: tuple[str, ...], init: str, expected: dict[int, dict]) -> Iterator[Run]:
    """2x to 6x of one model: the 6x run and its branches."""
    trunk = f"{init}_{stem}_6x_{end}"
    for k in range(6, 1, -1):
        yield Run(
            name=f"{init}_{stem}_{k}x_{end}",
            places=places if k < 6 or "table1" not in places else (*places, "table2", "figure5"),
            shown=f"{init}, {k}x",
            init=init,
            k=k,
            expected=expected.get(k, {}),
            trunk=None if k == 6 else trunk,
        )


def _table1() -> Iterator[Run]:
    for (depth, init), row in paper.TABLE1.items():
        expected = {k: {"bbox/AP": ap} for k, ap in row.items()}
        expected[6] = dict(zip(paper.METRICS, paper.TABLE2[depth, init], strict=True)) | expected[6]
        figure = "figure1" if depth == 50 else "figure3"
        yield from kx_runs(f"mask_rcnn_R_{depth}_FPN", "gn", ("table1", figure), init, expected)


def _figure4() -> Iterator[Run]:
    for init in (SCRATCH, PRETRAINED):
        yield from kx_runs("mask_rcnn_R_50_FPN", "syncbn", ("figure4",), init, {})


def _train_aug() -> Iterator[Run]:
    """Table 3's two rows without cascade, and what Figure 5 compares the first one with."""
    for model, init in (*product(("R_50", "R_101"), (SCRATCH, PRETRAINED)), ("X_152_32x8d", SCRATCH)):
        row = paper.TABLE3.get(f"{_short(model)} train aug") if init == SCRATCH else None
        yield Run(
            name=_enhanced("mask_rcnn", model, init),
            places=_places_of(model, row is not None),
            shown=f"{_short(model)}, {init}, train aug",
            init=init,
            k=TRAIN_AUG_K[init],
            expected=dict(zip(paper.METRICS, row, strict=True)) if row else {},
        )


def _pretraining() -> Iterator[Run]:
    """Of the one body whose weights nobody publishes; 100 epochs of ImageNet."""
    name, shown = "imagenet_X_152_32x8d_gn", "X152, ImageNet classification"
    yield Run(name, ("table3",), shown, SCRATCH, 0, length=500_500, folder="Pretraining", kind=PRETRAIN)


def _cascade() -> Iterator[Run]:
    """With cascade, which from scratch follows plain training; and each model with test aug."""
    for model, init in product(("R_50", "R_101", "X_152_32x8d"), (SCRATCH, PRETRAINED)):
        short, name = _short(model), _enhanced("cascade_mask_rcnn", model, init)
        in_table3 = model.startswith("X")
        row = paper.TABLE3[f"{short} train aug, cascade"] if in_table3 and init == SCRATCH else ()
        run = Run(
            name=name,
            places=_places_of(model, in_table3),
            shown=f"{short}, {init}, train aug, cascade",
            init=init,
            k=TRAIN_AUG_K[init],
            expected=dict(zip(paper.METRICS, row, strict=False)),
            trunk=_enhanced("mask_rcnn", model, init) if init == SCRATCH else None,
            is_switch=init == SCRATCH,
            pretraining=f"imagenet_{model}_gn" if in_table3 and init == PRETRAINED else None,
        )
        yield run
        yield replace(
            run,
            name=f"{name}_test_aug",
            recipe=name,
            changes=TEST_AUG,
            shown=f"{run.shown}, test aug",
            expected={metric.replace("/", "_TTA/"): value for metric, value in _with_test_aug(model, init).items()},
            trunk=None,
            is_switch=False,
            pretraining=None,
            evaluates=name,
            kind=EVALUATE,
        )


def _with_test_aug(model: str, init: str) -> dict[str, float]:
    """What the paper reports with cascade, train and test aug."""
    if not model.startswith("X"):
        return {"segm/AP": paper.TEST_AUG[int(model.removeprefix("R_")), init]}
    if init == PRETRAINED:
        return dict(zip(("bbox/AP", "segm/AP"), paper.TABLE3_PRETRAINED, strict=True))
    return dict(zip(paper.METRICS, paper.TABLE3["X152 train aug, cascade, test aug"], strict=True))


def _enhanced(architecture: str, model: str, init: str) -> str:
    return f"{init}_{architecture}_{model}_FPN_{TRAIN_AUG_K[init]}x_gn_train_aug"


def _short(model: str) -> str:
    """R_101 -> R101, X_152_32x8d -> X152."""
    return "".join(model.split("_")[:2])


def _places_of(model: str, in_table3: bool) -> tuple[str, ...]:
    return (*(("figure5",) if model.startswith("R") else ()), *(("table3",) if in_table3 else ()))


def _vgg() -> Iterator[Run]:
    for init, (k, box_ap) in paper.VGG.items():
        name = f"{init}_faster_rcnn_VGG16_{k}x_train_aug"
        yield Run(name, ("vgg",), f"VGG-16, {init}", init, k, {"bbox/AP": box_ap}, folder="COCO-Detection")


def _keypoints() -> Iterator[Run]:
    for init, ap in paper.KEYPOINTS_2X.items():
        trunk = f"{init}_keypoint_rcnn_R_50_FPN_3x_gn"
        for k in (3, 2):
            yield Run(
                name=f"{init}_keypoint_rcnn_R_50_FPN_{k}x_gn",
                places=("figure6",),
                shown=f"{init}, {k}x",
                init=init,
                k=k,
                expected={"keypoints/AP": ap} if k == 2 else {},
                trunk=None if k == 3 else trunk,
                folder="COCO-Keypoints",
            )


def _small_data() -> Iterator[Run]:
    """35k images; what the paper reports holds for both initialisations with the hyper-parameters found for them."""
    found = {"bbox/AP": paper.IMAGES_35K}
    for name, init, k, expected in (
        ("pretrained_mask_rcnn_R_50_FPN_6x_gn_35k_old", PRETRAINED, 6, {}),
        ("pretrained_mask_rcnn_R_50_FPN_6x_gn_35k", PRETRAINED, 6, found),
        ("scratch_mask_rcnn_R_50_FPN_9x_gn_35k", SCRATCH, 9, found),
    ):
        with_old = ", hyper-parameters of 118k" if name.endswith("_old") else ""
        yield Run(name, ("figure7",), f"35k, {init}{with_old}", init, k, expected, folder="COCO-LowData")


def _fewer_images() -> Iterator[Run]:
    """10k images as long as the paper says, fewer for as many epochs as those."""
    for size, (init, iterations) in product(paper.FEWER_IMAGES, paper.ITERATIONS_10K.items()):
        length = round(iterations * float(size.removesuffix("k")) / 10)
        yield Run(
            name=f"{init}_mask_rcnn_R_50_FPN_{length // 1000}k_gn_{size}",
            places=(SMALL_DATA_PLACES[size],),
            shown=f"{size}, {init}",
            init=init,
            k=0,
            expected={"bbox/AP": paper.FEWER_IMAGES[size][init]},
            folder="COCO-LowData",
            length=length,
        )


def _voc() -> Iterator[Run]:
    for init, (length, mean_ap) in paper.VOC.items():
        yield Run(
            name=f"{init}_faster_rcnn_R_101_FPN_{length // 1000}k_gn",
            places=("voc",),
            shown=f"PASCAL VOC, {init}",
            init=init,
            k=0,
            expected={"bbox/AP50": mean_ap},
            folder="PascalVOC-Detection",
            length=length,
        )
