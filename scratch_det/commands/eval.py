"""Evaluate a recipe's detector on DATASETS.TEST, into OUTPUT_DIR/inference.

    scratch-det eval --config-file FILE MODEL.WEIGHTS output/run/checkpoints/model_final.pth
    scratch-det eval --config-file output/run/config.yaml MODEL.WEIGHTS output/run/checkpoints/model_final.pth \\
        TEST.AUG.ENABLED True OUTPUT_DIR output/augmented

The same as scratch-det train --eval-only, whose exit codes it has.
"""

from argparse import SUPPRESS

from scratch_det.command_line import ToolParser
from scratch_det.engine.command import run_command, run_parser


def build_parser() -> ToolParser:
    parser = run_parser(__doc__, trains=False)
    parser.add_argument("--eval-only", action="store_true", default=True, help=SUPPRESS)  # as in scratch-det train
    return parser


def main() -> None:
    run_command(build_parser())
