"""Where a detector errs, as one page: kinds of errors, classes, confusions, worst images, labels that may be wrong.

    scratch-det analyze errors output/quickstart
    scratch-det analyze errors scratch=output/scratch pretrained=output/pretrained --out output/errors
    scratch-det analyze errors results.json --data my_val

RUN is a run's folder (its last evaluation; "RUN#model_ema": of the averaged weights), the OUTPUT_DIR of scratch-det
eval, or a json of COCO results, with NAME= before it to call it so. Several stand beside each other. DIR gets
index.html, classes.csv and diagnosis.json. Exit code 2: a user error.
"""

from pathlib import Path

from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="see above")
    parser.add_argument("--data", metavar="NAME", help="the data set (the first that the run was evaluated on)")
    parser.add_argument("--task", choices=["bbox", "segm"], default="bbox", help="boxes or masks (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("output/errors"), metavar="DIR", help="(%(default)s)")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.diagnosis.command import analyze_errors  # after --help: matplotlib

        print(analyze_errors(args.runs, args.data, args.task, args.out))
