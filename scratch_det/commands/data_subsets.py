"""Subsets of a data set in COCO's format, as the small-data recipes need: random ones, each inside the next larger one.

    scratch-det data subsets
    scratch-det data subsets --dataset digits_train --sizes 120,40,12
    scratch-det data subsets --sizes "" --ids mine=ids.txt

35k are the paper's images, those of val2014, where instances_val2014.json lies beside instances_train2017.json; else
they are drawn too. Writes instances_..._35k.json and so on beside the data set's json and, for names that no catalog
has, a line into catalog.yaml in the datasets root. A recipe then names coco_2017_train_35k. Exit code 2: a user error.
"""

import re
from argparse import ArgumentTypeError
from pathlib import Path

from scratch_det.command_line import ToolParser, exit_on_user_error, numbers, seed

PAPER_SIZES = "35000,10000,3500,1000"  # section 5.2 of the paper


def label_and_file(text: str) -> tuple[str, Path]:
    label, equals, file = text.partition("=")
    if not (re.fullmatch(r"[\w.-]+", label) and equals and file):
        raise ArgumentTypeError(f"{text!r}, expected LABEL=FILE, LABEL a part of a file's name")
    return label, Path(file)


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--dataset", default="coco_2017_train", metavar="NAME", help="its name (%(default)s)")
    parser.add_argument(
        "--sizes", type=numbers, default=PAPER_SIZES, metavar="N,M", help="numbers of images (%(default)s)"
    )
    ids = "the images in FILE, a COCO json or a list of ids, as NAME_LABEL (several times: several subsets)"
    parser.add_argument("--ids", action="append", default=[], type=label_and_file, metavar="LABEL=FILE", help=ids)
    parser.add_argument("--seed", type=seed, default=0, help="another seed draws other images (%(default)s)")
    parser.add_argument("--allow-lost-classes", action="store_true", help="accept subsets without an object of a class")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.data.subsets import make_subsets  # NumPy: not for --help

        print(*make_subsets(args.dataset, args.sizes, args.seed, args.allow_lost_classes, dict(args.ids)), sep="\n")
