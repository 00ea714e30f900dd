"""Train a detector from a recipe and evaluate it, or only evaluate it.

    scratch-det train --config-file configs/Digits/quickstart.yaml
    scratch-det train --config-file FILE --num-gpus 8 --resume
    scratch-det train --config-file FILE --eval-only MODEL.WEIGHTS output/run/checkpoints/model_final.pth
    scratch-det train --config-file FILE SOLVER.BASE_LR 0.01 OUTPUT_DIR output/other
    torchrun --nproc-per-node 8 -m scratch_det train --config-file FILE --resume
    srun scratch-det train --config-file FILE --resume          (one task a GPU)

The first flags are detectron2's. KEY VALUE pairs change keys of the recipe. Exit code 0: finished; 2: a user error,
the message says which and how to fix it; 70: a bug or a damaged file, traceback.txt in the run's folder has more; 75:
stopped by SIGTERM, SIGUSR1 or SIGHUP, 130: by Ctrl-C; both after a checkpoint, from which the same command with
--resume continues.
"""

from scratch_det.command_line import ToolParser
from scratch_det.engine.command import run_command, run_parser


def build_parser() -> ToolParser:
    parser = run_parser(__doc__)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS into OUTPUT_DIR/inference")
    return parser


def main() -> None:
    run_command(build_parser())
