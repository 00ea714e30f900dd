"""Look at what a detector finds beside the truth, the worst images first, on one page.

    scratch-det view results output/quickstart
    scratch-det view results output/quickstart --class 3 5 --count 60
    scratch-det view results results.json --data my_val --task segm

RUN is a run's folder (its last evaluation; "RUN#model_ema": of the averaged weights), the OUTPUT_DIR of scratch-det
eval, or a json of COCO results. Detections are marked as right or wrong, objects as missed, on the image in grey. DIR
gets index.html, which needs no network. Exit code 2: a user error.
"""

from pathlib import Path

from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.commands.view_data import add_filter


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="see above")
    parser.add_argument("--data", metavar="NAME", help="the data set (the first that the run was evaluated on)")
    parser.add_argument("--task", choices=["bbox", "segm"], default="bbox", help="boxes or masks (%(default)s)")
    add_filter(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.diagnosis.command import Filter, view_results  # matplotlib: not for --help

        chosen = Filter(args.classes, args.size, args.crowds, args.ids, args.count)
        print(view_results(args.run, args.data, args.task, chosen, args.out))
