#!/usr/bin/env python
"""The paper's runs: which there are, where the paper has them, what they cost, what they see and what it reports.

    python tools/study.py list
    python tools/study.py list --experiment table1
    python tools/study.py samples
    python tools/study.py samples --config-file configs/Digits/quickstart.yaml

list: a table of the runs. samples: images, instances and pixels that trainings see, pre-training included (Figure 2).
"""

import argparse

from scratch_det.errors import exit_on_user_error
from scratch_det.study.experiments import experiments, find, of_place
from scratch_det.study.listing import as_table
from scratch_det.study.samples import compare

FIGURE2 = ("pretrained_mask_rcnn_R_50_FPN_2x_gn", "scratch_mask_rcnn_R_50_FPN_6x_gn")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["list", "samples"], help="see above")
    parser.add_argument("--experiment", metavar="PLACE", help="list: table1, figure4, voc, ..., or a run's name (all)")
    parser.add_argument("--config-file", action="append", metavar="FILE", help="samples: a recipe (Figure 2's two)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        if args.what == "list":
            print(as_table(of_place(args.experiment) if args.experiment else experiments()))
        else:
            print(compare(args.config_file or [str(find(name).config) for name in FIGURE2]))


if __name__ == "__main__":
    main()
