#!/usr/bin/env python
"""Pre-train a detector's backbone: image classification from a recipe, on a folder of images for each class.

    python tools/pretrain_net.py --config-file configs/Pretraining/digits_R_18_gn.yaml
    python tools/pretrain_net.py --config-file configs/Pretraining/imagenet_R_50_gn.yaml --num-gpus 8 --resume
    python tools/train_net.py --config-file FILE MODEL.WEIGHTS output/pretrain_digits_R_18_gn/backbone.pth

Flags, KEY VALUE pairs, exit codes and the run folder are the same as for tools/train_net.py. backbone.pth, written at
the end, is for MODEL.WEIGHTS of either backend.
"""

from scratch_det.engine.command import run_command, run_parser
from scratch_det.engine.plan import CLASSIFICATION


def main() -> None:
    run_command(run_parser(__doc__), CLASSIFICATION)


if __name__ == "__main__":
    main()
