#!/usr/bin/env python
"""Time parts of the training, pair by pair in one process.

    python tools/benchmark.py loop --config-file configs/Digits/quickstart.yaml

loop: an iteration of the training loop beside its bare forward pass, backward pass and update on the same batch.
"""

import argparse

from scratch_det.benchmark.loop import loop_against_bare
from scratch_det.errors import exit_on_user_error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["loop"], help="what to time")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--pairs", type=int, default=100, metavar="N", help="pairs to time (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    with exit_on_user_error():
        found = loop_against_bare(args.config_file, args.overrides, args.pairs)
        print(found.describe("an iteration of the loop", "bare forward, backward, update"))


if __name__ == "__main__":
    main()
