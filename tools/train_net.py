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

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.distributed.launch import launch, several_to_launch
from scratch_det.distributed.stop import Stopped
from scratch_det.distributed.world import read_world
from scratch_det.errors import exit_on_user_error
from scratch_det.train.start import Request, start


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config-file FILE [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR (or start it)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS into OUTPUT_DIR/inference")
    parser.add_argument("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="who builds the model (%(default)s)")

    several = parser.add_argument_group("several processes (not with torchrun or srun, which say it themselves)")
    several.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (%(default)s)")
    several.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (%(default)s)")
    several.add_argument("--machine-rank", type=int, default=0, metavar="I", help="this machine's number, from 0")
    several.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (a free port)")

    batch = parser.add_argument_group("another batch than the recipe's")
    batch.add_argument(
        "--scale-to-batch", type=int, metavar="N", help="N images an iteration: scales learning rate and iterations too"
    )
    batch.add_argument(
        "--accumulate", type=int, default=1, metavar="K", help="work off each process's images in K parts (%(default)s)"
    )

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--branch-from", metavar="FILE", help="start from a checkpoint of a run with the same beginning"
    )
    checkpoints.add_argument(
        "--keep-at", type=numbers, default=(), metavar="I,J", help="keep the checkpoints after I, J, ... iterations"
    )
    checkpoints.add_argument(
        "--keep-last", type=int, default=3, metavar="K", help="else keep the last K; 0 keeps all (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    return parser


def numbers(text: str) -> tuple[int, ...]:
    """ "1000,2000" as numbers."""
    return tuple(int(word) for word in text.split(",") if word)


def main() -> None:
    args = vars(build_parser().parse_intermixed_args())
    several = {name: args.pop(name) for name in ("num_gpus", "num_machines", "machine_rank", "dist_url")}
    try:
        with exit_on_user_error():
            world = read_world(os.environ)
            if several_to_launch(world, **several):
                sys.exit(launch(**several))
            with exit_on_user_error(speaks=world.local_rank == 0):
                start(Request(**args), world)
    except Stopped as stopped:
        end = "" if args["eval_only"] else "; the same command with --resume continues from its checkpoint"
        print(f"{stopped}{end}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted before the training began", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
