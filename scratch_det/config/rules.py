"""Rules that reject a recipe which cannot train as written, before iteration 1, with the change that fixes it.

detectron2's defaults (FrozenBN, FREEZE_AT 2) are made for fine-tuning; without weights they silently freeze random
layers. In Detectron's released runs that mistake cost 3.3 box AP (R50, 3x: 36.2 against 39.5).

A rule is a generator of problems, one line each: what was found, what is expected, the key, the fix. Rules on a single
value are rows of ROWS and ALLOWED in ``ranges``; rules of one entry of a list stand with it in ``choices``.
"""

from collections.abc import Callable, Collection, Iterator

from fvcore.common.config import CfgNode

from scratch_det.config import choices
from scratch_det.config.load import flatten, get_cfg, plain
from scratch_det.config.ranges import IMAGES, is_one_of, known_values
from scratch_det.errors import raise_problems

NORM_NAMES = ("", "BN", "SyncBN", "FrozenBN", "GN")
GN_GROUPS = 32  # Wu & He, Group Normalization (2018); fixed in Detectron's and detectron2's recipes
# In that paper's Fig. 1 BN's ImageNet error rises as images per GPU fall from 32 to 2, GN's stays; the knee is near 8.
SMALLEST_BN_BATCH = 8  # images
CHANNELS = {  # keys of the channels that a part's GN divides
    "RESNETS": ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS"),
    "FPN": ("OUT_CHANNELS",),
    **dict.fromkeys(("ROI_BOX_HEAD", "ROI_MASK_HEAD"), ("CONV_DIM",)),
}
WAIVABLE = ("nothing_random_is_frozen", "bn_has_images")  # what trains, though badly; see --waive
NOT_HONOURED = ("TEST.EXPECTED_RESULTS", "SOLVER.RESCALE_INTERVAL")  # read only by detectron2's trainer

Rule = Callable[[CfgNode], Iterator[str]]
NO_CHOICE = choices.Choice("")  # a name that its list does not have


def check_config(cfg: CfgNode, num_processes: int = 1, accumulate: int = 1, waived: Collection[str] = ()) -> list[str]:
    """Notices for the log; raises one ConfigError with one line a problem when ``cfg`` cannot train as written.

    accumulate: micro-batches of an iteration in each of ``num_processes``.
    waived: names of rules in WAIVABLE whose problems become notices, to train in spite of them.
    Call ``settle_batch`` before: the batch is not rescaled here.
    """
    found = [(rule.__name__, problem) for rule in RULES for problem in rule(cfg)]
    found += [(rule.__name__, problem) for rule in PROCESS_RULES for problem in rule(cfg, num_processes, accumulate)]
    raise_problems(problem for rule, problem in found if rule not in waived)
    notices = [f"--waive {rule}: {problem}" for rule, problem in found]
    return [*notices, *sync_bn_notices(cfg, num_processes), *mirrored_views(cfg)]


def check_model(cfg: CfgNode) -> None:
    """Raise one ConfigError when the model cannot be built as written, whether or not it could be trained."""
    raise_problems([*known_values(cfg, "MODEL."), *(problem for rule in MODEL_RULES for problem in rule(cfg))])


def check_schedule(cfg: CfgNode) -> None:
    """Raise one ConfigError when SOLVER describes no schedule."""
    raise_problems([*known_values(cfg, "SOLVER."), *known_choices(cfg, "SOLVER.LR_SCHEDULER_NAME")])


def known_choices(cfg: CfgNode, section: str = "") -> Iterator[str]:
    """Names are entries of their list, and ``of_entry`` holds; a key may have one name or several."""
    values = flatten(cfg)
    for key, entries in choices.LISTS.items():
        names = values.get(key, next(iter(entries))) if key.startswith(section) else []
        names = [names] if isinstance(names, str) else names
        if len(set(names)) < len(names):
            yield f"{key} is {names}, expected each name once"
        for name in names:
            yield from is_one_of(key, name, entries)
            if name in entries:
                yield from of_entry(cfg, entries, name, f"{key} {name}")


def backbone_keys(cfg: CfgNode) -> Iterator[str]:
    """``of_entry`` holds for the backbone; its backend knows whether the name does."""
    name = cfg.MODEL.BACKBONE.NAME
    yield from of_entry(cfg, choices.BACKBONES, choices.backbone_names().get(name, ""), f"MODEL.BACKBONE.NAME {name}")


def of_entry(cfg: CfgNode, entries: dict[str, choices.Choice], name: str, reader: str) -> Iterator[str]:
    """The rule of the entry ``name`` holds, and no key is set that only other entries read."""
    chosen = entries.get(name, NO_CHOICE)
    yield from chosen.rule(cfg) if chosen.rule else ()
    unread = dict.fromkeys(key for entry in entries.values() for key in entry.keys if key not in chosen.keys)
    yield from left_at_default(cfg, unread, reader)


def left_at_default(cfg: CfgNode, keys: Collection[str], reader: str) -> Iterator[str]:
    values, defaults = flatten(cfg), flatten(get_cfg())
    for key in keys:
        if plain(values[key]) != plain(defaults[key]):
            yield f"{key} is {values[key]!r}, which {reader} ignores; leave it at {defaults[key]!r}"


def norms(cfg: CfgNode) -> dict[str, str]:
    """The norm of each part that the backbone's name makes part of the model, by key."""
    own = choices.BACKBONES.get(choices.backbone_names().get(cfg.MODEL.BACKBONE.NAME, ""), NO_CHOICE)
    parts = ["RESNETS"] * choices.is_resnet(cfg) + ["FPN"] * choices.has_fpn(cfg)
    parts += [key.split(".")[1] for key in own.keys if key.endswith(".NORM")] + ["ROI_BOX_HEAD", "ROI_MASK_HEAD"]
    return {f"MODEL.{part}.NORM": cfg.MODEL[part].NORM for part in parts}


def known_norms(cfg: CfgNode) -> Iterator[str]:
    for key, norm in norms(cfg).items():
        yield from is_one_of(key, norm, NORM_NAMES)


def nothing_random_is_frozen(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        return
    frozen_stages = cfg.MODEL.BACKBONE.FREEZE_AT
    if frozen_stages > 0:
        yield (
            f'MODEL.BACKBONE.FREEZE_AT is {frozen_stages} while MODEL.WEIGHTS is "": these randomly '
            "initialised stages would never be trained; set MODEL.BACKBONE.FREEZE_AT 0, or name weights"
        )
    for key, norm in norms(cfg).items():
        if norm == "FrozenBN":
            yield (
                f'{key} is FrozenBN while MODEL.WEIGHTS is "": without statistics it normalises nothing; '
                f"set {key} GN (or SyncBN), or name weights"
            )


def gn_channels_divide(cfg: CfgNode) -> Iterator[str]:
    """A ResNet's later stages are multiples of res2's; of a project's backbone no key says the channels."""
    for norm_key in (key for key, norm in norms(cfg).items() if norm == "GN"):
        part = norm_key.split(".")[1]
        keys = cfg.MODEL[part]
        widths = {f"MODEL.{part}.{name}": keys[name] for name in CHANNELS.get(part, ())}
        if part == "RESNETS":
            widths["MODEL.RESNETS.NUM_GROUPS x WIDTH_PER_GROUP"] = keys.NUM_GROUPS * keys.WIDTH_PER_GROUP
        for key, channels in widths.items():
            if channels % GN_GROUPS:
                nearest = max(GN_GROUPS, round(channels / GN_GROUPS) * GN_GROUPS)
                yield (
                    f"{key} makes {channels} channels, which GN ({norm_key}) cannot split into {GN_GROUPS} groups; "
                    f"use a multiple of {GN_GROUPS} such as {nearest}"
                )


def bn_has_images(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    """BN sees the images of one process, SyncBN the images of all processes: neither sees an accumulated batch."""
    images = cfg.SOLVER.IMS_PER_BATCH // num_processes
    for norm, whole in (("BN", images), ("SyncBN", cfg.SOLVER.IMS_PER_BATCH)):
        keys = " and ".join(key for key, chosen in norms(cfg).items() if chosen == norm)
        found = f"{keys} {'are' if ' and ' in keys else 'is'} {norm} with"
        if keys and accumulate > 1:
            yield (
                f"{found} --accumulate {accumulate}: it would normalise with the statistics of "
                f"{whole // accumulate} images, not of {whole}, which is another training; "
                f"set {keys} GN, which normalises each image separately, or leave out --accumulate"
            )
        elif keys and norm == "BN" and images < SMALLEST_BN_BATCH:
            yield (
                f"{found} {images} images per process: BN's error grows steeply below {SMALLEST_BN_BATCH} "
                f"(Wu & He 2018, Group Normalization, Fig. 1); set {keys} GN, or SyncBN with several processes"
            )


def sync_bn_notices(cfg: CfgNode, num_processes: int) -> Iterator[str]:
    keys = [key for key, norm in norms(cfg).items() if norm == "SyncBN"]
    if keys and num_processes == 1:
        yield (
            f"{', '.join(keys)}: SyncBN in a single process is plain BN over its {cfg.SOLVER.IMS_PER_BATCH} images; "
            f"the paper's SyncBN sees 16. GN does not depend on the batch"
        )


def keys_agree(cfg: CfgNode) -> Iterator[str]:
    """Keys that contradict each other, and those that only detectron2's trainer reads."""
    solver = cfg.SOLVER
    if cfg.MODEL.get("CHANNELS_LAST") and (keys := [key for key, norm in norms(cfg).items() if norm == "GN"]):
        yield f"MODEL.CHANNELS_LAST is True, but {keys[0]} is GN, whose kernels copy such maps twice; set it to False"
    if solver.WARMUP_ITERS >= solver.MAX_ITER >= 1:
        yield (
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, but the run has SOLVER.MAX_ITER {solver.MAX_ITER}; train "
            f"longer, set SOLVER.WARMUP_ITERS {solver.MAX_ITER // 10}, or with scratch-det train give --trial N"
        )
    if solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV is True with SOLVER.MOMENTUM 0; set SOLVER.MOMENTUM 0.9 or SOLVER.NESTEROV False"
    if solver.CLIP_GRADIENTS.ENABLED:
        yield from is_one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", solver.CLIP_GRADIENTS.CLIP_TYPE, ("value", "norm"))
    if cfg.TEST.PATIENCE and not (cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
        yield (
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but nothing is evaluated before the end: set TEST.EVAL_PERIOD to "
            "iterations between two evaluations and DATASETS.TEST, or TEST.PATIENCE 0"
        )
    if cfg.DATALOADER.SAMPLER_TRAIN == choices.REPEATS and not cfg.DATALOADER.REPEAT_THRESHOLD > 0:
        yield (
            f"DATALOADER.SAMPLER_TRAIN is {choices.REPEATS} with REPEAT_THRESHOLD 0, which repeats nothing; "
            "set DATALOADER.REPEAT_THRESHOLD to the share of images below which a class is rare, such as LVIS's 0.001"
        )
    if cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "vertical":  # detectron2 would still call a left eye left
        yield (
            "INPUT.RANDOM_FLIP is 'vertical' with MODEL.KEYPOINT_ON, expected horizontal or none: upside down, left "
            "and right keypoints would keep their names; set INPUT.RANDOM_FLIP horizontal"
        )
    yield from left_at_default(cfg, NOT_HONOURED, "this trainer")


def reference_world_size(cfg: CfgNode) -> Iterator[str]:
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference > 0 and batch % reference:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, expected a number of processes that share "
            f"SOLVER.IMS_PER_BATCH {batch} evenly; set SOLVER.REFERENCE_WORLD_SIZE 0 to keep the batch in any number"
        )


def batch_divides(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, num_processes * accumulate
    if not 1 <= batch <= IMAGES or batch % parts == 0:
        return
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    if batch % num_processes:
        fix = f"--scale-to-batch {max(1, round(batch / parts)) * parts}"
    else:
        share = batch // num_processes
        fix = f"--accumulate {max(k for k in range(1, min(accumulate, share + 1)) if share % k == 0)}"
    yield (
        f"SOLVER.IMS_PER_BATCH is {batch} in total, which {processes}"
        f"{f' with --accumulate {accumulate}' if accumulate > 1 else ''} cannot share evenly; give {fix}"
    )


def model_agrees(cfg: CfgNode) -> Iterator[str]:
    """Keys of the model that contradict each other.

    ResNet-18 and 34 have no bottlenecks, so their res2 is as narrow as the stem (He et al. 2016, Table 1). A cascade's
    stages regress one box for all classes, and the first one samples at ROI_HEADS' own IoU.
    """
    resnets, thresholds = cfg.MODEL.RESNETS, list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS)
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        yield (
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}, but a ResNet of DEPTH {resnets.DEPTH} "
            "has 64; set MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )
    yield from lists_agree(cfg)
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.NAME == "FastRCNNConvFCHead" and not (box.NUM_CONV or box.NUM_FC):
        yield "MODEL.ROI_BOX_HEAD has NUM_CONV 0 and NUM_FC 0, expected a layer; the paper's is NUM_CONV 4, NUM_FC 1"
    if cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    ious, weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS, cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    if not box.CLS_AGNOSTIC_BBOX_REG:
        yield (
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but a stage of CascadeROIHeads passes one box on, not "
            "one for each class; set it to True"
        )
    if len(ious) != len(weights):
        yield f"MODEL.ROI_BOX_CASCADE_HEAD has IOUS {ious} and BBOX_REG_WEIGHTS {weights}, expected one of each a stage"
    elif ious and thresholds != [ious[0]]:
        yield (
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS is {thresholds}, but the cascade's first stage "
            f"matches at IoU {ious[0]}; set it to [{ious[0]}]"
        )


def lists_agree(cfg: CfgNode) -> Iterator[str]:
    """Lists of the model that belong together have lengths that do."""
    for part in ("RPN", "ROI_HEADS"):
        thresholds, labels = cfg.MODEL[part].IOU_THRESHOLDS, cfg.MODEL[part].IOU_LABELS
        if len(labels) != len(thresholds) + 1:
            yield (
                f"MODEL.{part}.IOU_THRESHOLDS is {thresholds!r}, expected {len(labels) - 1} for IOU_LABELS {labels}, "
                "one label more than thresholds"
            )
    for name in ("SIZES", "ASPECT_RATIOS"):
        key, lists = f"MODEL.ANCHOR_GENERATOR.{name}", cfg.MODEL.ANCHOR_GENERATOR[name]
        if len(lists) not in (1, levels := len(cfg.MODEL.RPN.IN_FEATURES)):
            yield f"{key} has {len(lists)} lists; expected one for all levels or one for each of the {levels}"
        if len({len(values) for values in lists}) > 1:
            yield f"{key} is {lists!r}; every level needs the same number of values"


def augmented_tests(cfg: CfgNode) -> Iterator[str]:
    """No view's shorter side is above the longest one."""
    sides, longest = tuple(cfg.TEST.AUG.MIN_SIZES), cfg.TEST.AUG.MAX_SIZE
    if cfg.TEST.AUG.ENABLED and max(sides, default=0) > longest:
        yield f"TEST.AUG has MIN_SIZES {sides} and MAX_SIZE {longest}, expected a longest side above the shorter ones"


def mirrored_views(cfg: CfgNode) -> Iterator[str]:
    """A notice on mirrored test images that the training does not have."""
    if cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP and cfg.INPUT.RANDOM_FLIP != "horizontal":
        yield (
            f"TEST.AUG.FLIP is True, but INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP}: half of the views will be "
            "mirrored, which the model never sees in training; set TEST.AUG.FLIP False where that is another object"
        )


MODEL_RULES: tuple[Rule, ...] = (known_norms, gn_channels_divide, backbone_keys, model_agrees)
RULES: tuple[Rule, ...] = (
    nothing_random_is_frozen, *MODEL_RULES, known_values, known_choices, keys_agree, reference_world_size,
    augmented_tests,
)  # fmt: skip
PROCESS_RULES: tuple[Callable[[CfgNode, int, int], Iterator[str]], ...] = (batch_divides, bn_has_images)
