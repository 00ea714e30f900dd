"""The names of weights in detectron2, torchvision, Detectron and transformers, and how one becomes another.

A file of a bottom-up network alone (an ImageNet classifier) has the names of the detector's without their prefix, which
is the ``BOTTOM_UP`` of the library.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import product

BOTTOM_UP = {"torchvision": "backbone.body.", "detectron2": "backbone.bottom_up."}
OF_RESNETS = re.compile(  # below BOTTOM_UP; names of other networks are the same in both libraries
    r"(conv1|bn1|fc|layer\d|stem\.(conv\d|fc)|res\d\.\d+\.(conv\d|shortcut))(\.|_)"
)
CONVOLUTIONS = (  # torchvision, detectron2: a convolution, and the norm after it; {n} as in LAYERS
    ("backbone.body.layer{s}.{b}.downsample", "backbone.bottom_up.res{s+1}.{b}.shortcut"),
    ("backbone.fpn.inner_blocks.{n}", "backbone.fpn_lateral{n+2}"),
    ("backbone.fpn.layer_blocks.{n}", "backbone.fpn_output{n+2}"),
    ("roi_heads.box_head.{n}", "roi_heads.box_head.conv{n+1}"),
    ("roi_heads.mask_head.{n}", "roi_heads.mask_head.mask_fcn{n+1}"),
)
LAYERS = (  # torchvision, detectron2; {n} is a number, {n+1} the same plus one, {2n} twice the same, see NUMBERS
    *((f"{ours}.0", theirs) for ours, theirs in CONVOLUTIONS),
    *((f"{ours}.1", f"{theirs}.norm") for ours, theirs in CONVOLUTIONS),
    ("backbone.body.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.body.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.body.layer{s}.{b}.conv{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}"),
    ("backbone.body.layer{s}.{b}.bn{c}", "backbone.bottom_up.res{s+1}.{b}.conv{c}.norm"),
    ("rpn.head.conv.{n}.0", "proposal_generator.rpn_head.conv.conv{n}"),
    ("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv"),  # where it is the only one
    ("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.cls_score"),
    ("roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.bbox_pred"),
    ("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_head.deconv"),
    ("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.mask_head.predictor"),
    ("roi_heads.keypoint_head.{2n}", "roi_heads.keypoint_head.conv_fcn{n+1}"),
    ("roi_heads.keypoint_predictor.kps_score_lowres", "roi_heads.keypoint_head.score_lowres"),
)
STOCK = {  # what torchvision's own detectors and their released files call otherwise: a pattern, the name here
    r"(.*\.fpn\.\w+_blocks\.\d)\.(\w+)": r"\1.0.\2",
    r"(rpn\.head\.conv)\.(\w+)": r"\1.0.0.\2",
    r"(roi_heads\.box_head)\.fc6\.(\w+)": r"\1.1.\2",
    r"(roi_heads\.box_head)\.fc7\.(\w+)": r"\1.3.\2",
    **{rf"(roi_heads\.mask_head)\.mask_fcn{n + 1}\.(\w+)": rf"\1.{n}.0.\2" for n in range(4)},
}
FIELD = re.compile(r"\{(\d?)([a-z])([+-]\d)?\}")
NUMBERS = {"s": range(1, 5), "b": range(48), "c": range(1, 4), "n": range(48)}  # stage, block, convolution, all else
BOX_HEAD = "roi_heads.box_head."
RPN_CONV = "proposal_generator.rpn_head.conv."
BOX_FC = {  # a fully connected layer of the box head
    "torchvision": re.compile(r"roi_heads\.box_head\.(\d+)\.(weight|bias)"),
    "detectron2": re.compile(r"roi_heads\.box_head\.fc(\d+)\.(weight|bias)"),
}
BOX_CONV = re.compile(r"roi_heads\.box_head\.conv\d+\.weight")  # in detectron2
# A cascade's: roi_heads.stages.{k}.box_head. in torchvision, roi_heads.box_head.{k}. in detectron2, where a plain head
# has conv1, fc1 or weight after box_head or a layer's name after box_predictor.
STAGE = re.compile(
    r"roi_heads\.(?:stages\.(\d+)\.|(box_(?:head|predictor)\.)(\d+)\.(?=conv\d|fc\d|cls_score|bbox_pred))"
)
CAFFE2_LEAVES = {
    "bn_s": "norm.weight", "bn_b": "norm.bias", "bn_rm": "norm.running_mean", "bn_riv": "norm.running_var",
    "gn_s": "norm.weight", "gn_b": "norm.bias", "w": "weight", "b": "bias",
}  # fmt: skip
CAFFE2_LEAF = re.compile(rf"(.+?)_({'|'.join(CAFFE2_LEAVES)})")
CAFFE2_LAYERS = (  # Detectron's blobs without their ends; detectron2's layers, those of a backbone without BOTTOM_UP
    (r"(?:res_)?conv1", "stem.conv1"),
    (r"res(\d)_(\d+)_branch1", r"res\1.\2.shortcut"),
    *((rf"res(\d)_(\d+)_branch2{letter}", rf"res\1.\2.conv{k}") for k, letter in enumerate("abc", start=1)),
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", r"backbone.fpn_lateral\1"),
    (r"fpn_res(\d)_\d+_sum", r"backbone.fpn_output\1"),
    ("conv_rpn_fpn2", "proposal_generator.rpn_head.conv"),  # made for p2, used for all levels
    ("rpn_cls_logits_fpn2", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn_bbox_pred_fpn2", "proposal_generator.rpn_head.anchor_deltas"),
    (r"head_conv(\d+)", r"roi_heads.box_head.conv\1"),
    ("fc6", "roi_heads.box_head.fc1"),
    ("fc7", "roi_heads.box_head.fc2"),
    (r"(cls_score|bbox_pred)", r"roi_heads.box_predictor.\1"),
    (r"_(?:mask|\[mask\])_fcn(\d+)", r"roi_heads.mask_head.mask_fcn\1"),
    ("conv5_mask", "roi_heads.mask_head.deconv"),
    ("mask_fcn_logits", "roi_heads.mask_head.predictor"),
    (r"conv_fcn(\d+)", r"roi_heads.keypoint_head.conv_fcn\1"),
    ("kps_score_lowres", "roi_heads.keypoint_head.score_lowres"),
)
RESNETS = (  # a ResNet's layers in transformers and in nn.Sequential(*resnet.children()); torchvision's; as LAYERS
    ("embedder.embedder.convolution", "conv1"),
    ("embedder.embedder.normalization", "bn1"),
    ("encoder.stages.{s-1}.layers.{b}.layer.{c-1}.convolution", "layer{s}.{b}.conv{c}"),
    ("encoder.stages.{s-1}.layers.{b}.layer.{c-1}.normalization", "layer{s}.{b}.bn{c}"),
    ("encoder.stages.{s-1}.layers.{b}.shortcut.convolution", "layer{s}.{b}.downsample.0"),
    ("encoder.stages.{s-1}.layers.{b}.shortcut.normalization", "layer{s}.{b}.downsample.1"),
    *(("{s+3}.{b}." + end, "layer{s}.{b}." + end) for end in ("conv{c}", "bn{c}", "downsample.0", "downsample.1")),
    ("0", "conv1"),
    ("1", "bn1"),
)


def _expanded(layers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """LAYERS or RESNETS with every number put in."""
    for patterns in layers:
        letters = sorted({match[2] for match in FIELD.finditer(patterns[0])})
        for numbers in product(*(NUMBERS[letter] for letter in letters)):
            values = dict(zip(letters, numbers, strict=True))
            yield _filled(patterns[0], values), _filled(patterns[1], values)


def _filled(pattern: str, values: dict[str, int]) -> str:
    return FIELD.sub(lambda match: str(int(match[1] or 1) * values[match[2]] + int(match[3] or 0)), pattern)


COUNTERPARTS = {  # by library: its name of a layer -> the other's; the first of LAYERS counts
    "torchvision": dict(reversed(list(_expanded(LAYERS)))),
    "detectron2": {theirs: ours for ours, theirs in _expanded(LAYERS)},
}
OTHERS = dict(_expanded(RESNETS))


def renamed(names: Iterable[str], source: str, target: str, own_names: bool = False) -> dict[str, str | None]:
    """A detector's names, each with that of ``target``, or None where it has no such layer.

    source, target: "torchvision" and "detectron2", either way round. own_names: the bottom-up network is one of
    BACKBONES, whose names are the same in both even where they look like a ResNet's; otherwise the look decides.
    """
    plain = {name: without_stage(name) for name in names}
    numbers = sorted({int(match[1]) for match in map(BOX_FC[source].fullmatch, plain.values()) if match})
    if source == "torchvision":
        fcs = {number: f"fc{k}" for k, number in enumerate(numbers, start=1)}
    else:  # torchvision counts on from the convolutions and the flattening
        convolutions = {name for name in plain.values() if BOX_CONV.fullmatch(name)}
        fcs = {number: str(len(convolutions) + 2 * number - 1) for number in numbers}
    # detectron2 numbers the hidden convolutions of an RPN where there are several
    is_only = not any(name.startswith("rpn.head.conv.1.") for name in plain.values())
    found: dict[str, str | None] = {}
    for name, head in plain.items():
        layer, _, leaf = head.rpartition(".")
        network = head.removeprefix(BOTTOM_UP[source])
        new = f"{COUNTERPARTS[source][layer]}.{leaf}" if layer in COUNTERPARTS[source] else None
        if network != head and (own_names or (not new and not OF_RESNETS.match(network))):
            new = BOTTOM_UP[target] + network
        elif match := BOX_FC[source].fullmatch(head):
            new = f"{BOX_HEAD}{fcs[int(match[1])]}.{match[2]}"
        elif new and is_only:
            new = new.replace(f"{RPN_CONV}conv0.", RPN_CONV)
        found[name] = new and in_stage(new, stage_of(name), target)
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


def in_torchvision(name: str) -> str:
    """The name of a tensor whose layer RESNETS has; others stay as they are."""
    layer, dot, leaf = name.rpartition(".")
    return f"{OTHERS.get(layer, layer)}{dot}{leaf}"


def from_stock(name: str) -> str:
    """The name here of a layer of torchvision's own detectors."""
    found = ((new, re.fullmatch(pattern, name)) for pattern, new in STOCK.items())
    return next((match.expand(new) for new, match in found if match), name)


def from_caffe2(blob: str) -> str | None:
    """detectron2's name of one of Detectron's blobs, a backbone's without prefix; None for what a detector lacks."""
    if not (match := CAFFE2_LEAF.fullmatch(blob)):
        return None
    for pattern, layer in CAFFE2_LAYERS:
        if found := re.fullmatch(pattern, match[1]):
            return f"{found.expand(layer)}.{CAFFE2_LEAVES[match[2]]}"
    return None
