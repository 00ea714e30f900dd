#!/usr/bin/env python
"""Check a recipe, its data and this machine before a run: what would be refused, what it will do, need and write.

    python tools/check.py --config-file configs/Digits/quickstart.yaml
    python tools/check.py --config-file FILE --num-gpus 8 --images OUTPUT_DIR output/run

Flags and KEY VALUE pairs are those of tools/train_net.py. Nothing is written but a note of the images that were read,
below ~/.cache/scratch_det. Exit code 0: ready to train; 2: something to mend, and the errors say what.
"""

import argparse
import signal
import sys
from contextlib import redirect_stdout

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.check.run import check
from scratch_det.errors import EXIT_CODE, exit_on_user_error
from scratch_det.train.start import Request


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config-file FILE [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--images", action="store_true", help="read every image too: once, later only changed ones")
    parser.add_argument("--json", action="store_true", help="print one json object instead of text")
    parser.add_argument("--resume", action="store_true", help="OUTPUT_DIR may hold a run, to be continued")
    parser.add_argument("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="who builds the model (%(default)s)")
    for name, metavar, default, text in (
        ("--num-gpus", "N", 1, "processes on each machine"),
        ("--num-machines", "N", 1, "machines"),
        ("--accumulate", "K", 1, "parts in which a process works off its images"),
        ("--keep-last", "K", 3, "checkpoints kept, the last ones; 0 keeps all"),
    ):
        parser.add_argument(name, metavar=metavar, type=int, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--scale-to-batch", type=int, metavar="N", help="N images an iteration")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    return parser


def main() -> None:
    args = vars(build_parser().parse_intermixed_args())
    as_json, images, num_gpus, num_machines = (args.pop(k) for k in ("json", "images", "num_gpus", "num_machines"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that processes that read images end too
    try:
        with exit_on_user_error(), redirect_stdout(sys.stderr if as_json else sys.stdout):
            say = (lambda text: None) if as_json else print
            report = check(Request(**args), num_gpus, num_machines, images, say)
    except KeyboardInterrupt:
        print("interrupted; images that were read need not be read again", file=sys.stderr)
        sys.exit(130)
    print(report.as_json() if as_json else report.verdict())
    sys.exit(0 if report.ok else EXIT_CODE)


if __name__ == "__main__":
    main()
