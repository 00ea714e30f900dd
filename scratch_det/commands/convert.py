"""Convert weights between the backends: a detector's checkpoint, or the ImageNet weights of a backbone.

    scratch-det convert output/run converted.pth --to detectron2
    scratch-det convert model_final.pkl converted.pth --to torchvision --config-file FILE --verify IMAGE

SRC is a run's folder (its final weights), or a file or an address, as in MODEL.WEIGHTS: a checkpoint of either
backend, a model of detectron2's zoo, a classifier of torchvision or timm, a .pkl of Detectron. Every weight has to find
a place. With the recipe at hand (a run has it) the result is also loaded into a model. Exit code 2: a user error.
"""

from pathlib import Path

from scratch_det.backends import BACKENDS
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a run's folder, a file or an address")
    parser.add_argument("destination", type=Path, metavar="DST", help="the file to write, .pth")
    parser.add_argument("--to", required=True, choices=BACKENDS, help="whose names the weights get")
    parser.add_argument("--config-file", type=Path, metavar="FILE", help="the recipe (config.yaml beside SRC)")
    parser.add_argument("--verify", type=Path, metavar="IMAGE", help="compare detections of both backends in it")
    parser.add_argument("--partial", action="store_true", help="leave out weights that have no place")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.conversion import convert_file  # heavy: not for --help

        convert_file(args.source, args.destination, args.to, args.config_file, args.partial, args.verify)
