"""Search a grid of config values, with one training run per point, and write the best values as a recipe.

    scratch-det search --grid docs/grid_35k.yaml --out output/search \\
        --config-file configs/COCO-LowData/pretrained_mask_rcnn_R_50_FPN_6x_gn_35k_old.yaml \\
        --apply-to configs/COCO-LowData/scratch_mask_rcnn_R_50_FPN_9x_gn_35k.yaml

The grid is a YAML file: a list of values for a key, or a name and a list of keys that change together. What the paper
changed for 35k images:

    SOLVER:
      BASE_LR: [0.02, 0.04]
      GAMMA: [0.1, 0.02]
    scales:
      - {INPUT.MIN_SIZE_TRAIN: [800], INPUT.MIN_SIZE_TRAIN_SAMPLING: choice}
      - {INPUT.MIN_SIZE_TRAIN: [512, 800], INPUT.MIN_SIZE_TRAIN_SAMPLING: range}

Points are trained one after the other; scratch-det study spreads them over GPUs or a cluster. The same command again
continues what was interrupted. Exit code 0: all points are finished; 1: some failed, best.yaml is the best of the
others, and the same command tries the failed ones again; 2: a user error, the message says how to fix it; 75: stopped
by SIGTERM, SIGUSR1 or SIGHUP, 130: by Ctrl-C; in both cases the same command continues.
"""

import sys
from pathlib import Path

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error
from scratch_det.distributed.stop import Stopped
from scratch_det.study.search import Search, choose, search_grid


def build_parser() -> ToolParser:
    parser = ToolParser(
        usage="%(prog)s --config-file FILE --grid FILE --out DIR [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=__doc__,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    add_project_flag(parser)
    add("--grid", required=True, metavar="FILE", help="the grid, a YAML file; see above")
    add("--out", required=True, type=Path, metavar="DIR", help="the runs, the record and the result")
    add("--metric", default="bbox/AP", metavar="NAME", help="of result.json; the highest is best (%(default)s)")
    add("--apply-to", action="append", default=[], metavar="FILE", help="write DIR/FILE, a recipe with the best values")
    add("--choose", action="store_true", help="train nothing: choose among the finished points")
    add("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe, for all points")

    add = parser.add_argument_group("passed on to scratch-det train").add_argument
    add("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="library that builds the model (%(default)s)")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (%(default)s)")
    add("--scale-to-batch", type=int, metavar="N", help="N images an iteration: scales rate and iterations")
    add("--accumulate", type=int, default=1, metavar="K", help="K micro-batches a step (%(default)s)")
    return parser


def main() -> None:
    args = vars(build_parser().parse_intermixed_args())
    only_choose, search = args.pop("choose"), Search(**args)
    try:
        with exit_on_user_error(is_run=True):
            search.check()
            sys.exit(min(choose(search), 1) if only_choose else search_grid(search))
    except Stopped as stopped:
        print(f"{stopped}; the same command continues the search", file=sys.stderr)
        sys.exit(stopped.exit_code)
