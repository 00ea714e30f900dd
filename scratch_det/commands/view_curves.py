"""Draw curves of several runs into one picture, to compare them.

    scratch-det view curves output/quickstart
    scratch-det view curves he=output/digits_vgg16 alike=output/digits_vgg16_alike --out vgg.png
    scratch-det view curves 2x=output/scratch_2x 6x=output/scratch_6x --metric bbox/AP --out table1.png

A run is called as its folder is, or by the LABEL before it; a metric is a key of metrics.json, one panel each. Exit
code 0: drawn; 2: a user error.
"""

from pathlib import Path

from scratch_det.command_line import ToolParser, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]FOLDER", help="a run's folder and what to call it")
    parser.add_argument("--metric", action="append", metavar="KEY", help="by default total_loss and, if any, bbox/AP")
    parser.add_argument("--out", type=Path, default=Path("output/curves.png"), metavar="FILE", help="(%(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.visualization.curves import compare_runs  # after --help: matplotlib takes 0.4 s

        print(compare_runs(args.runs, args.metric or (), args.out))
