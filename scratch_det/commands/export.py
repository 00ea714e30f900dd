"""Write a trained detector as one file for onnxruntime (.onnx), or for torch alone (.pt2).

    scratch-det export output/quickstart --out model.onnx
    scratch-det export model.pth --config-file FILE --out model.pt2 --image photo.jpg

The file has everything from pixels to boxes, scores, labels, masks and keypoints: docs/using_a_model.md shows the few
lines that run it. File and detector are compared on one image; where they differ no file is left. Exit code 2: a user
error.
"""

from pathlib import Path

from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, or weights")
    add("--out", type=Path, required=True, metavar="FILE", help="a new file; its name ends with .onnx or .pt2")
    add("--image", type=Path, metavar="FILE", help="compare on this image (coloured blobs)")
    add("--config-file", type=Path, metavar="FILE", help="the recipe of weights that lie in no run's folder")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.export import export_model  # torch: not for --help

        print(export_model(args.model, args.config_file, args.out, args.image))
