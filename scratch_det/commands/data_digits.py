"""Make the digits demo: a small detection data set and a pre-training set for it, in about a minute, offline.

    scratch-det data digits
    scratch-det data digits --out datasets/small --train 200 --val 20 --seed 1

Real handwritten digits (scikit-learn) drawn over real photographs (scikit-learn, scikit-image), annotated in COCO's
format with boxes, polygons and keypoints. The same seed gives the same bytes; a finished set is not changed. Exit code
2: a user error.
"""

import os
import signal
import sys
from pathlib import Path

from scratch_det.command_line import ToolParser, exit_on_user_error, seed


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    out = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "digits")
    parser.add_argument("--out", type=Path, default=out, help="folder; <out>_pretrain is made too (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="another seed gives other scenes (%(default)s)")
    parser.add_argument("--train", type=int, default=2000, metavar="N", help="train scenes (%(default)s)")
    parser.add_argument(
        "--val", type=int, default=250, metavar="N", help="val scenes, and as many in search (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace both folders if a digits set is already there")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, which removes the half-made folder
    with exit_on_user_error(interrupted="interrupted: nothing half-made is left"):
        from scratch_det.data.digits import make_digits  # slow to import, and --help does not need it

        for folder, made in make_digits(args.out, args.seed, args.train, args.val, args.force).items():
            print(f"{folder}: made" if made else f"{folder}: already there, nothing to do")
        print(f"to see annotated scenes, open {args.out / 'preview.png'}")
