#!/usr/bin/env python
"""Train a detector from scratch with large-scale jitter and evaluate it, or only evaluate it.

    python projects/lsj/train_net.py --config-file projects/lsj/configs/mask_rcnn_R_50_FPN_100ep_lsj.yaml \\
        --num-gpus 8 --resume OUTPUT_DIR output/mask_rcnn_R_50_FPN_100ep_lsj

Flags, KEY VALUE pairs, exit codes and the run folder are those of tools/train_net.py; recipes have INPUT.LSJ besides.
"""

from lsj.start import start

from scratch_det.train.arguments import run_parser
from scratch_det.train.command import run_command


def main() -> None:
    parser = run_parser(__doc__)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS into OUTPUT_DIR/inference")
    run_command(parser, start)


if __name__ == "__main__":
    main()
