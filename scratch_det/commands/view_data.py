"""Look at a data set, or at a recipe's training images as the model gets them, on one page.

    scratch-det view data digits_train
    scratch-det view data my_train --class cat dog --size small --count 60
    scratch-det view data my_train --image 17 4211
    scratch-det view data --config-file configs/Digits/quickstart.yaml INPUT.MIN_SIZE_TRAIN "(64,)"

DIR gets index.html, which needs no network. Exit code 2: a user error.
"""

from argparse import ArgumentTypeError
from pathlib import Path

from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("words", nargs="*", metavar="NAME", help="a data set of the catalog; with --config-file KEY VALUE pairs")
    add("--config-file", type=Path, metavar="FILE", help="show what this recipe trains on")
    add_filter(parser)
    return parser


def add_filter(parser: ToolParser) -> None:
    """The flags that choose images, and where the page is written."""
    add = parser.add_argument
    add("--class", dest="classes", nargs="+", default=[], metavar="CLASS", help="images with an object of these")
    add("--size", choices=["small", "medium", "large"], default="", help="images with an object of this size (COCO's)")
    add("--crowds", action="store_true", help="images with a crowd")
    add("--image", dest="ids", nargs="+", default=[], metavar="ID", help="images with these ids")
    add("--count", type=count, default=24, metavar="N", help="at most so many (%(default)s)")
    add("--out", type=Path, default=Path("output/view"), metavar="DIR", help="(%(default)s)")
    add_project_flag(parser)


def count(text: str) -> int:
    """The type of a flag: 1 or more."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{number}, expected 1 or more")
    return number


def main() -> None:
    parser = build_parser()
    args = parser.parse_intermixed_args()
    if not args.config_file and len(args.words) != 1:
        parser.error("give one NAME of a data set, or --config-file FILE")
    if args.config_file and (args.classes or args.size or args.crowds or args.ids):
        parser.error("--class, --size, --crowds and --image choose from a data set NAME, not from --config-file")
    with exit_on_user_error():
        from scratch_det.diagnosis.data import Filter, view_data, view_training  # matplotlib: not for --help

        if args.config_file:
            print(view_training(args.config_file, args.words, args.count, args.out))
        else:
            chosen = Filter(args.classes, args.size, args.crowds, args.ids, args.count)
            print(view_data(args.words[0], chosen, args.out))
