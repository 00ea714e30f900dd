"""Predict images and videos with a trained detector: pictures, videos and COCO's results.

    scratch-det predict output/quickstart image.jpg folder 'more/**/*.jpg' --out output/predictions
    scratch-det predict output/quickstart clip.mp4 --score 0.7
    scratch-det predict model.pth --config-file FILE folder --like instances.json --score 0.05

MODEL is a run's folder, a weights file or its address. SOURCE is an image, a folder, a pattern, a video, or the address
of a stream or the number of a camera, which Ctrl-C ends. --like: the results have the ids of this COCO json, else file
names and 1, 2, ... for the classes. Exit code 0: all were predicted; 1: files that cannot be read were left out, and
are named; 2: a user error.
"""

import sys
from pathlib import Path

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error
from scratch_det.errors import UserError


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, or weights")
    add("sources", nargs="+", metavar="SOURCE", help="see above")
    add("--out", type=Path, default=Path("output/predictions"), metavar="DIR", help="(%(default)s)")
    add("--score", type=float, default=0.5, metavar="S", help="the least that is drawn and written (%(default)s)")
    add("--like", type=Path, metavar="JSON", help="take the ids of images and categories from it")
    add("--augment", action="store_true", help="with the recipe's test-time augmentation")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (%(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (the recipe's)")
    add("--config-file", type=Path, metavar="FILE", help="the recipe of weights that lie in no run's folder")
    add("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="what builds the model (the one that trained it)")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        from scratch_det.data.catalog import SUFFIXES
        from scratch_det.sources import VIDEO_SUFFIXES

        if args.model.lower().endswith((*SUFFIXES, *VIDEO_SUFFIXES)):
            raise UserError(f"{args.model} is an image or a video; MODEL comes first: scratch-det predict MODEL SOURCE")
        from scratch_det.detector import load  # torch: not for --help
        from scratch_det.predict import Settings, predict_sources

        model = load(args.model, args.config_file, args.device, None if args.backend == AUTO else args.backend)
        settings = Settings(args.score, args.batch_size, args.augment, args.like)
        faults = predict_sources(model, args.sources, args.out, settings)
    if faults:
        print("\n".join(["left out, as they cannot be read:", *faults]), file=sys.stderr)
        sys.exit(1)
