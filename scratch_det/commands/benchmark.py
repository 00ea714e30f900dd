"""Measure this repository beside pycocotools and detectron2, where these are installed; print medians as they come.

    scratch-det benchmark all --out results/benchmarks.md
    scratch-det benchmark loop,step --config-file configs/Digits/quickstart.yaml --pairs 100
    scratch-det benchmark sample --config-file FILE INPUT.MIN_SIZE_TRAIN "(800,)" --config-file OTHER_FILE

The rows:
%s

start takes the first recipe, scoring none, the others each of them. A row whose data is missing is left out, with the
reason. start needs 1.5 GB of free disk, and 5 GB of memory for detectron2.
Exit code 2: a user error, the message says which.
"""

import shlex
import sys
from pathlib import Path

from scratch_det.backends import BACKENDS
from scratch_det.benchmark import ROWS, Options
from scratch_det.benchmark.measure import WARMUP, Rounds
from scratch_det.benchmark.report import document, machine
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error
from scratch_det.errors import UserError
from scratch_det.files import write_atomically

RECIPES = [
    ["configs/Digits/quickstart.yaml"],
    ["configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_6x_gn.yaml",
     *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.BASE_LR", "0.00125")],
]  # fmt: skip


def build_parser() -> ToolParser:
    rows = "\n".join(f"  {name:<8} {what}" for name, what in ROWS.items())
    parser = ToolParser(description=(__doc__ or "") % rows)
    add = parser.add_argument
    add("rows", metavar="ROWS", help=f"all, or some of {','.join(ROWS)}")
    named = "a recipe and its overrides; several times for several (the quickstart, and R50-FPN GN with 1 image a step)"
    add("--config-file", nargs="+", action="append", metavar=("FILE", "KEY VALUE"), help=named)
    add("--backend", default="torchvision", choices=BACKENDS, help="the library that builds our model (%(default)s)")
    add("--pairs", type=int, default=20, metavar="N", help="rounds of what takes milliseconds (%(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds of what takes seconds (%(default)s)")
    add("--seconds", type=float, default=120, metavar="S", help="no pairs after that time, but three (%(default)g)")
    add("--scale", type=float, default=1.0, metavar="X", help="of the number of made-up images (%(default)s)")
    add("--script", type=Path, metavar="FILE", help="step: detectron2's tools/plain_train_net.py")
    add("--out", type=Path, metavar="FILE", help="write the table into this Markdown file after every row")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        names = list(ROWS) if args.rows == "all" else args.rows.split(",")
        if unknown := [name for name in names if name not in ROWS]:
            raise UserError(f"{unknown[0]} is not a row; expected all, or some of {','.join(ROWS)}")
        if min(args.pairs, args.repeats) < 1 or not (0 < args.scale <= 100 and args.seconds >= 0):
            raise UserError("--pairs and --repeats are 1 or more, --scale is above 0, at most 100, --seconds 0 or more")
        pairs = Rounds(args.pairs, WARMUP, args.seconds)
        recipes = [(file, overrides) for file, *overrides in args.config_file or RECIPES]
        options = Options(recipes, args.backend, pairs, Rounds(args.repeats), args.scale, args.script)
        from scratch_det.benchmark import rows  # imports torch

        about, found, missing = machine(), [], []
        command = f"scratch-det benchmark {shlex.join(sys.argv[1:])}"
        print("\n".join(about))
        for name in names:
            print(f"{name}: {ROWS[name]}", flush=True)
            try:
                for figure in getattr(rows, name)(options):
                    found.append(figure)
                    print(f"  {figure}", flush=True)
            except UserError as error:
                if len(names) == 1:
                    raise
                missing.append(f"- not measured: {name}. {str(error).splitlines()[0]}")
                print(missing[-1], flush=True)
            if args.out:
                write_atomically(args.out, document(command, [*about, *missing], found))
