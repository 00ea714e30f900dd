"""Write XML files as PASCAL VOC has them as json files in COCO's format.

    scratch-det data voc
    scratch-det data voc voc_2007_test
    scratch-det data voc my_export
    scratch-det data voc my_export/train my_export/valid --classes car,truck

Names are VOC's own sets, for the recipes of configs/PascalVOC-Detection/, by default voc_2007_trainval, voc_2012_train
and voc_2012_val, from the devkit's folders VOC2007/ and VOC2012/ in the datasets root. A folder is an export with
classes of your own: Annotations/ beside JPEGImages/ or images/, with a set for each list in ImageSets/Main/ where there
are any, or XML files beside their images, or folders of these. Its sets get entries in the catalog. Give the sets that
belong together in one command, as they share their classes. Writes instances_trainval.json and so on into the folders;
if one is not complete, nothing. Exit code 2: a user error.
"""

from scratch_det.command_line import ToolParser, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    names = "a folder, or voc_2007_ or voc_2012_ with trainval, train, val, or for 2007 test"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--classes", default="", metavar="A,B", help="your own; auto: all that the files name")
    parser.add_argument("--force", action="store_true", help="replace json files of other content")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.data.voc import PAPER_NAMES, make_voc  # NumPy: not for --help

        print(*make_voc(args.names or PAPER_NAMES, args.force, args.classes), sep="\n")
