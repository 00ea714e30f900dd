#!/usr/bin/env python
"""Train a detector from a recipe and evaluate it, or only evaluate it.

    python tools/train_net.py --config-file configs/Digits/quickstart.yaml
    python tools/train_net.py --config-file FILE --resume
    python tools/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS output/run/checkpoints/model_final.pth
    python tools/train_net.py --config-file FILE SOLVER.BASE_LR 0.01 OUTPUT_DIR output/other

The flags are detectron2's. KEY VALUE pairs change keys of the recipe.
"""

import argparse
import sys

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.errors import ConfigError, exit_on_user_error
from scratch_det.train.start import Request, start


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR (or start it)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS into OUTPUT_DIR/inference")
    parser.add_argument("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="who builds the model (%(default)s)")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine: 1")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines: 1")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="this machine's number: 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="rendezvous of several processes: auto")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    with exit_on_user_error():
        if args.num_gpus not in (0, 1) or (args.num_machines, args.machine_rank, args.dist_url) != (1, 0, "auto"):
            raise ConfigError(
                f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: this version trains in one process; "
                "leave out --num-gpus, --num-machines, --machine-rank and --dist-url"
            )
        try:
            start(Request(args.config_file, args.overrides, args.backend, args.resume, args.eval_only))
        except KeyboardInterrupt:
            print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
