"""The names of weights in detectron2, torchvision and Detectron, and how one becomes another.

A backbone's own file (an ImageNet classifier) has the names of the detector's without what stands before them: the
``BOTTOM_UP`` of the two backends.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

BOTTOM_UP = {"torchvision": "backbone.body.", "detectron2": "backbone.bottom_up."}
OF_RESNETS = re.compile(
    r"(conv1|bn1|fc|layer\d|stem\.(conv\d|fc)|res\d\.\d+\.(conv\d|shortcut))(\.|_)"
)  # others: the same in both
LAYERS = (  # torchvision, detectron2; {n} is a number, {n+1} the same plus one, {2n} twice the same, see NUMBERS
    ("backbone.body.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.body.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.body.layer{s}.{b}.conv{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}"),
    ("backbone.body.layer{s}.{b}.bn{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}.norm"),
    ("backbone.body.layer{s}.{b}.downsample.0", "backbone.bottom_up.res{s+1}.{b}.shortcut"),
    ("backbone.body.layer{s}.{b}.downsample.1", "backbone.bottom_up.res{s+1}.{b}.shortcut.norm"),
    ("backbone.fpn.inner_blocks.{n}.0", "backbone.fpn_lateral{n+2}"),
    ("backbone.fpn.inner_blocks.{n}.1", "backbone.fpn_lateral{n+2}.norm"),
    ("backbone.fpn.layer_blocks.{n}.0", "backbone.fpn_output{n+2}"),
    ("backbone.fpn.layer_blocks.{n}.1", "backbone.fpn_output{n+2}.norm"),
    ("rpn.head.conv.{n}.0", "proposal_generator.rpn_head.conv.conv{n}"),
    ("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv"),  # where it is the only one
    ("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    ("roi_heads.box_head.{n}.0", "roi_heads.box_head.conv{n+1}"),
    ("roi_heads.box_head.{n}.1", "roi_heads.box_head.conv{n+1}.norm"),
    ("roi_heads.box_head.fc{n}", "roi_heads.box_head.fc{n}"),
    ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.cls_score"),
    ("roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.bbox_pred"),
    ("roi_heads.mask_head.{n}.0", "roi_heads.mask_head.mask_fcn{n+1}"),
    ("roi_heads.mask_head.{n}.1", "roi_heads.mask_head.mask_fcn{n+1}.norm"),
    ("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_head.deconv"),
    ("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.mask_head.predictor"),
    ("roi_heads.keypoint_head.{2n}", "roi_heads.keypoint_head.conv_fcn{n+1}"),
    ("roi_heads.keypoint_predictor.kps_score_lowres", "roi_heads.keypoint_head.score_lowres"),
)
NUMBERS = {"s": range(1, 5), "b": range(64), "c": range(1, 4), "n": range(64)}  # stage, block, convolution, all else
BOX_HEAD = "roi_heads.box_head."
RPN_CONV = "proposal_generator.rpn_head.conv.conv"  # and its number
FC = re.compile(r"roi_heads\.box_head\.(?:fc)?(\d+)\.(weight|bias)")
CONV = re.compile(r"roi_heads\.box_head\.(\d+)\.0\.weight")
# A cascade's: roi_heads.stages.{k}.box_head. in torchvision, roi_heads.box_head.{k}. in detectron2, where a plain head
# has conv1, fc1 or weight after box_head or a layer's name after box_predictor.
STAGE = re.compile(
    r"roi_heads\.(?:stages\.(\d+)\.|(box_(?:head|predictor)\.)(\d+)\.(?=conv\d|fc\d|cls_score|bbox_pred))"
)
CAFFE2_LEAVES = {
    "bn_s": "norm.weight", "bn_b": "norm.bias", "bn_rm": "norm.running_mean", "bn_riv": "norm.running_var",
    "gn_s": "norm.weight", "gn_b": "norm.bias", "w": "weight", "b": "bias",
}  # fmt: skip
CAFFE2 = re.compile(rf"(?:(?:res_)?conv1|res(\d)_(\d+)_branch(1|2[abc]))_({'|'.join(CAFFE2_LEAVES)})")


class Scheme(NamedTuple):
    """The library whose names they are, and whether they name a whole detector or only its backbone."""

    library: str  # torchvision, detectron2 or Detectron
    whole: bool

    def __str__(self) -> str:
        library = self.library + " or timm" * (self.library == "torchvision" and not self.whole)
        return f"{library} {'detector' if self.whole else 'classifier'}".strip()


OF_BOTTOM_UP = Scheme("", whole=False)  # a backbone's own names, the same in all backends
SIGNS = (  # the first name with one of these prefixes decides
    ("backbone.body.", Scheme("torchvision", whole=True)),
    ("backbone.", Scheme("detectron2", whole=True)),
    ("layer1.", Scheme("torchvision", whole=False)),
    ("features.", Scheme("torchvision", whole=False)),
    ("res2.", Scheme("detectron2", whole=False)),
    ("res2_", Scheme("Detectron", whole=False)),
)


def scheme_of(names: Iterable[str]) -> Scheme | None:
    """The scheme of these names; None when it is unknown."""
    names = list(names)
    return next((scheme for sign, scheme in SIGNS if any(name.startswith(sign) for name in names)), None)


def renamed(names: Iterable[str], source: str, target: str, own_names: bool = False) -> dict[str, str | None]:
    """A detector's names, each with that of ``target``, or None where it has no such layer.

    source, target: "torchvision" and "detectron2", either way round. own_names: the backbone is one of BACKBONES, whose
    own names are the same in both, however like a ResNet's; without a word they are told from a ResNet's by their look.
    """
    found: dict[str, str | None] = {}
    by_stage: dict[str, list[str]] = {}
    for name in names:
        if own_names and name.startswith(BOTTOM_UP[source]):
            found[name] = BOTTOM_UP[target] + name.removeprefix(BOTTOM_UP[source])
        else:
            by_stage.setdefault(stage_of(name), []).append(name)
    for stage, own in by_stage.items():
        theirs = _renamed_head([without_stage(name) for name in own], source)
        found |= {name: new and in_stage(new, stage, target) for name, new in zip(own, theirs, strict=True)}
    return found


def stage_of(name: str) -> str:
    """The number of the cascade's stage that a layer belongs to; "" for all else."""
    match = STAGE.match(name)
    return match[1] or match[3] if match else ""


def without_stage(name: str) -> str:
    """The name that a cascade stage's layer has in a detector with one box head."""
    return STAGE.sub(lambda match: f"roi_heads.{match[2] or ''}", name)


def in_stage(name: str, stage: str, library: str) -> str:
    """The inverse of ``without_stage``; nothing changes for stage ""."""
    if not stage:
        return name
    if library == "torchvision":
        return name.replace("roi_heads.", f"roi_heads.stages.{stage}.")
    return re.sub(r"(box_head|box_predictor)\.", rf"\1.{stage}.", name)


def _renamed_head(names: list[str], source: str) -> list[str | None]:
    """``renamed`` for names of which at most one box head's are among them."""
    if source == "detectron2":
        found = [_translated(name, source) for name in names]
        # torchvision counts fully connected layers on from the convolutions and the flattening before them
        first = len({name for name in found if name and CONV.fullmatch(name)}) + 1
        return [name and FC.sub(lambda m: f"{BOX_HEAD}{first + 2 * (int(m[1]) - 1)}.{m[2]}", name) for name in found]
    # detectron2 counts them from 1; VGG's in torchvision are fc6 and fc7
    rows = sorted({int(match[1]) for match in map(FC.fullmatch, names) if match})
    counted = [FC.sub(lambda m: f"{BOX_HEAD}fc{rows.index(int(m[1])) + 1}.{m[2]}", name) for name in names]
    found = [_translated(name, source) for name in counted]
    if any(name and name.startswith(f"{RPN_CONV}1.") for name in found):
        return found
    # detectron2 numbers the hidden convolutions of an RPN where there are several
    return [name and name.replace(f"{RPN_CONV}0.", RPN_CONV.removesuffix("conv")) for name in found]


def from_caffe2(name: str) -> str | None:
    """detectron2's backbone name of one of Detectron's blobs; None for what a detector does not use."""
    match = CAFFE2.fullmatch(name)
    if not match:
        return None
    stage, block, branch, leaf = match.groups()
    layer = "stem.conv1" if stage is None else f"res{stage}.{block}."
    if stage:
        layer += "shortcut" if branch == "1" else f"conv{'abc'.index(branch[1]) + 1}"
    return f"{layer}.{CAFFE2_LEAVES[leaf]}"


def _all_layers() -> Iterator[tuple[str, str]]:
    """LAYERS with every number put in."""
    for patterns in LAYERS:
        letters = [letter for letter in NUMBERS if re.search(rf"\{{2?{letter}\b", patterns[0])]
        for values in product(*(NUMBERS[letter] for letter in letters)):
            numbers = {
                text: value
                for letter, n in zip(letters, values, strict=True)
                for text, value in {letter: n, f"{letter}+1": n + 1, f"{letter}+2": n + 2, f"2{letter}": 2 * n}.items()
            }
            yield patterns[0].format_map(numbers), patterns[1].format_map(numbers)


COUNTERPARTS = {  # by library: its name of a layer -> the other's; the first of LAYERS counts
    "torchvision": dict(reversed(list(_all_layers()))),
    "detectron2": {theirs: ours for ours, theirs in _all_layers()},
}


def _translated(name: str, source: str) -> str | None:
    """A name of ``source`` in the other library; leaves (weight, bias) and networks of BACKBONES keep theirs."""
    layer, _, leaf = name.rpartition(".")
    if layer in COUNTERPARTS[source]:
        return f"{COUNTERPARTS[source][layer]}.{leaf}"
    own, other = BOTTOM_UP.values() if source == "torchvision" else reversed(BOTTOM_UP.values())
    layer = name.removeprefix(own)
    return None if layer == name or OF_RESNETS.match(layer) else other + layer
