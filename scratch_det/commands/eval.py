"""Evaluate a recipe's detector on DATASETS.TEST, into OUTPUT_DIR/inference: result.json and COCO's results.

    scratch-det eval --config-file FILE MODEL.WEIGHTS output/run/checkpoints/model_final.pth
    scratch-det eval --config-file output/run/config.yaml MODEL.WEIGHTS output/run/checkpoints/model_final.pth \\
        TEST.AUG.ENABLED True OUTPUT_DIR output/augmented

MODEL.WEIGHTS "FILE#model_ema" is the average of the weights (MODEL_EMA), written to OUTPUT_DIR/inference_EMA. In the
folder of a run with other test sets it is inference_NAMES. scratch-det view results and analyze errors take OUTPUT_DIR.
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
