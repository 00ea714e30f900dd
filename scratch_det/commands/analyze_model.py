"""How large a recipe's model is and what it costs, part by part: parameters, multiply-adds, activations, feature maps.

    scratch-det analyze model --config-file configs/Digits/quickstart.yaml
    scratch-det analyze model --config-file FILE --size 1024x1024 --markdown MODEL.RESNETS.DEPTH 101
    scratch-det analyze model --table results/models.md --backend torchvision

Counted is one test image, by default of the recipe's size (800 x 1333), padded as the backend pads it: box heads on
MODEL.RPN.POST_NMS_TOPK_TEST proposals, other heads on TEST.DETECTIONS_PER_IMAGE boxes, so nothing depends on what a
model finds. --table writes one row for each model below configs/. Weights are neither read nor made.
"""

import re
from argparse import ArgumentTypeError
from pathlib import Path

from scratch_det.backends import AUTO, BACKENDS, choose, model_config
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def height_and_width(text: str) -> tuple[int, int]:
    if not (sides := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise ArgumentTypeError(f"{text!r}, expected HEIGHTxWIDTH in pixels, such as 800x1333")
    return int(sides[1]), int(sides[2])


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="the recipe, a YAML file")
    what.add_argument("--table", type=Path, metavar="FILE", help="write a table of all models")
    parser.add_argument(
        "--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="the library that builds it (%(default)s)"
    )
    size = "height and width of the image (the recipe's test size)"
    parser.add_argument("--size", type=height_and_width, metavar="HxW", help=size)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    add_project_flag(parser)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_intermixed_args()
    if args.table and (args.size or args.markdown or args.overrides):
        parser.error("--table takes models and sizes from configs/: leave out --size, --markdown and KEY VALUE pairs")
    with exit_on_user_error(reading_only=True):
        backend = choose(args.backend)
        cfg = None if args.table else model_config(args.config_file, args.overrides, backend)
        # Imports torch, which a request that is rejected need not wait for.
        from scratch_det.analysis import describe_model, write_table

        if args.table:
            write_table(args.table, backend)
        else:
            print(describe_model(args.config_file, cfg, backend, args.size, args.markdown))
