#!/usr/bin/env python
"""Write PASCAL VOC's annotations as json files in COCO's format, for the recipes of configs/PascalVOC-Detection/.

    python tools/prepare_voc.py
    python tools/prepare_voc.py voc_2007_test

Reads the devkit's folders VOC2007/ and VOC2012/ in the datasets root and writes instances_trainval.json and so on into
them. Without names it makes voc_2007_trainval, voc_2012_train and voc_2012_val. If a folder is not complete, nothing is
written. Exit code 2: a user error.
"""

from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.data.voc import NAMES, PAPER_NAMES, make_voc


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=PAPER_NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--force", action="store_true", help="replace json files of other content")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        print(*make_voc(args.names, args.force), sep="\n")


if __name__ == "__main__":
    main()
