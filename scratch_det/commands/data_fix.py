"""Write a repaired copy of a COCO json beside it, NAME_fixed: ids, sizes, file names, polygons, crowds, categories.

    scratch-det data fix my_train
    scratch-det data fix path/to/train.json --images path/to/train --dry-run
    scratch-det data fix my_train --exif turned --boxes-as-masks

The json itself stays as it is. A data set of the catalog gets an entry for its copy there. The copy is then read as for
a run. Exit code 0: it reads without errors, or nothing was to be mended; 2: errors are left, or a user error.
"""

from pathlib import Path

from scratch_det.command_line import ToolParser, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("source", metavar="NAME|FILE", help="a data set of the catalog, or a COCO json")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of FILE (the folder that it lies in)")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be mended")
    parser.add_argument("--force", action="store_true", help="replace a copy that is there")
    drawn = "images that their EXIF tag turns: were the objects drawn on them as turned, or as stored in the file?"
    parser.add_argument("--exif", choices=("turned", "stored"), default="", help=drawn)
    parser.add_argument("--boxes-as-masks", action="store_true", help="objects without a mask get their box as mask")
    parser.add_argument("--boxes-from-masks", action="store_true", help="all boxes are computed from the masks")
    parser.add_argument("--no-crowds", action="store_true", help="iscrowd becomes 0: crowds are not trained on")
    parser.add_argument("--boxes-are-corners", action="store_true", help="all boxes are x0, y0, x1, y1")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.data.fix import fix  # NumPy: not for --help

        fix(**vars(args))
