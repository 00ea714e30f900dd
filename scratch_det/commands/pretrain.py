"""Pre-train a detector's backbone: image classification from a recipe, on a folder of images for each class.

    scratch-det pretrain --config-file configs/Pretraining/digits_R_18_gn.yaml
    scratch-det pretrain --config-file configs/Pretraining/imagenet_R_50_gn.yaml --num-gpus 8 --resume
    scratch-det train --config-file FILE MODEL.WEIGHTS output/pretrain_digits_R_18_gn/backbone.pth

Flags, KEY VALUE pairs, exit codes and the run folder are the same as for scratch-det train. backbone.pth, written at
the end, is for MODEL.WEIGHTS of either backend.
"""

from scratch_det.command_line import ToolParser
from scratch_det.engine.command import run_command, run_parser
from scratch_det.engine.plan import CLASSIFICATION


def build_parser() -> ToolParser:
    return run_parser(__doc__)


def main() -> None:
    run_command(build_parser(), CLASSIFICATION)
