"""Rules on initialisation and normalisation: the mistakes that cost days without an error message.

detectron2's defaults (FrozenBN, FREEZE_AT 2) are made for fine-tuning; with no weights they silently leave random
layers frozen for ever. In Detectron's released runs that mistake cost 3.3 box AP (R50, 3x: 36.2 against 39.5).
"""

from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.bodies import body_names, has_fpn, is_resnet, section_of
from scratch_det.config.defaults import PROJECT_KEYS
from scratch_det.errors import did_you_mean

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN")
GN_GROUPS = 32  # Wu & He, Group Normalization (2018); fixed in Detectron's and detectron2's recipes
# In that paper's Fig. 1 BN's ImageNet error rises as images per GPU fall from 32 to 2, GN's stays; the knee is near 8.
SMALLEST_BN_BATCH = 8  # images


def norms(cfg: CfgNode) -> dict[str, str]:
    """The norm of each part that has one, by key.

    The backbone's name says whether RESNETS and FPN are read, and which section of a project's.
    """
    own = body_names().get(cfg.MODEL.BACKBONE.NAME)
    theirs = [key.split(".")[1] for key in PROJECT_KEYS if key.endswith(".NORM") and own and section_of(key) == own]
    parts = ["RESNETS"] * is_resnet(cfg) + ["FPN"] * has_fpn(cfg) + theirs + ["ROI_BOX_HEAD", "ROI_MASK_HEAD"]
    return {f"MODEL.{part}.NORM": cfg.MODEL[part].NORM for part in parts}


def known_norms(cfg: CfgNode) -> Iterator[str]:
    for key, norm in norms(cfg).items():
        if norm not in NORMS:
            expected = ", ".join(repr(name) for name in NORMS)
            yield f"{key} is '{norm}', expected one of {expected}{did_you_mean(norm, list(NORMS))}"


def nothing_random_is_frozen(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        return
    frozen_stages = cfg.MODEL.BACKBONE.FREEZE_AT
    if frozen_stages > 0:
        yield (
            f'MODEL.BACKBONE.FREEZE_AT is {frozen_stages} while MODEL.WEIGHTS is "": these stages would stay '
            "random for ever; set MODEL.BACKBONE.FREEZE_AT 0, or name weights"
        )
    for key, norm in norms(cfg).items():
        if norm == "FrozenBN":
            yield (
                f'{key} is FrozenBN while MODEL.WEIGHTS is "": without statistics it normalises nothing; '
                f"set {key} GN (or SyncBN), or name weights"
            )


def gn_channels_divide(cfg: CfgNode) -> Iterator[str]:
    for norm_key, norm in norms(cfg).items():
        for key, channels in _normalised_channels(cfg, norm_key).items():
            if norm == "GN" and channels % GN_GROUPS:
                nearest = max(GN_GROUPS, round(channels / GN_GROUPS) * GN_GROUPS)
                yield (
                    f"{key} makes {channels} channels, which GN ({norm_key}) cannot split into {GN_GROUPS} groups; "
                    f"use a multiple of {GN_GROUPS} such as {nearest}"
                )


def bn_has_images(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    """BN sees the images of one process at a time, SyncBN those of all processes: neither sees an accumulated batch."""
    images = cfg.SOLVER.IMS_PER_BATCH // num_processes
    for key, norm in norms(cfg).items():
        if norm in ("BN", "SyncBN") and accumulate > 1:
            whole = images if norm == "BN" else cfg.SOLVER.IMS_PER_BATCH
            yield (
                f"{key} is {norm} with --accumulate {accumulate}: it would normalise with the statistics of "
                f"{whole // accumulate} images, not of {whole}, which is another training; "
                f"set {key} GN, which normalises each image alone, or leave out --accumulate"
            )
        elif norm == "BN" and images < SMALLEST_BN_BATCH:
            yield (
                f"{key} is BN with {images} images per process: BN's error grows steeply below {SMALLEST_BN_BATCH} "
                f"(Wu & He 2018, Group Normalization, Fig. 1); set {key} GN, or SyncBN with several processes"
            )


def sync_bn_notices(cfg: CfgNode, num_processes: int) -> Iterator[str]:
    keys = [key for key, norm in norms(cfg).items() if norm == "SyncBN"]
    if keys and num_processes == 1:
        yield (
            f"{', '.join(keys)}: SyncBN in a single process is plain BN over its {cfg.SOLVER.IMS_PER_BATCH} images; "
            f"the paper's SyncBN sees 16. GN does not depend on the batch"
        )


def _normalised_channels(cfg: CfgNode, norm_key: str) -> dict[str, int]:
    """The channels that the norm of ``norm_key`` sees; a ResNet's later stages are multiples of res2's.

    None where no key says it: a project's body.
    """
    part = norm_key.split(".")[1]
    if part != "RESNETS":
        name = "OUT_CHANNELS" if part == "FPN" else "CONV_DIM"
        return {f"MODEL.{part}.{name}": cfg.MODEL[part][name]} if name in cfg.MODEL[part] else {}
    resnets = cfg.MODEL.RESNETS
    return {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": resnets.STEM_OUT_CHANNELS,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": resnets.RES2_OUT_CHANNELS,
        "MODEL.RESNETS.NUM_GROUPS x WIDTH_PER_GROUP": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
    }
