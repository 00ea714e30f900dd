#!/usr/bin/env python
"""Train a detector from a recipe and evaluate it, or only evaluate it.

    python tools/train_net.py --config-file configs/Digits/quickstart.yaml
    python tools/train_net.py --config-file FILE --num-gpus 8 --resume
    python tools/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS output/run/checkpoints/model_final.pth
    python tools/train_net.py --config-file FILE SOLVER.BASE_LR 0.01 OUTPUT_DIR output/other
    torchrun --nproc-per-node 8 tools/train_net.py --config-file FILE --resume
    srun python tools/train_net.py --config-file FILE --resume          (one task a GPU)

The first flags are detectron2's. KEY VALUE pairs change keys of the recipe. Exit code 0: finished; 2: something to
mend, and the message says what; 75: stopped by SIGTERM or SIGUSR1 after a checkpoint, from which the same command with
--resume continues.
"""

import argparse
import os
import sys

from scratch_det.distributed.launch import launch, several_to_launch
from scratch_det.distributed.stop import Stopped
from scratch_det.distributed.world import ALONE, read_world
from scratch_det.errors import exit_on_user_error
from scratch_det.train.arguments import run_parser, take_processes
from scratch_det.train.start import Request, start


def build_parser() -> argparse.ArgumentParser:
    parser = run_parser(__doc__)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS into OUTPUT_DIR/inference")
    return parser


def main() -> None:
    args = vars(build_parser().parse_intermixed_args())
    several = take_processes(args)
    world = ALONE
    try:
        with exit_on_user_error():
            world = read_world(os.environ)
            if several_to_launch(world, **several):
                sys.exit(launch(**several))
            with exit_on_user_error(speaks=world.local_rank == 0):
                start(Request(**args), world)
    except Stopped as stopped:
        end = "" if args["eval_only"] else "; the same command with --resume continues from its checkpoint"
        if world.is_main:
            print(f"{stopped}{end}", file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
