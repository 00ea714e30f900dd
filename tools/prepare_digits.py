#!/usr/bin/env python
"""Make the digits demo: a small detection data set and a pre-training set for it, in about a minute, offline.

Real handwritten digits (scikit-learn) drawn over real photographs (scikit-learn, scikit-image), annotated in COCO's
format with boxes, polygons and keypoints. The same seed gives the same bytes; a finished set is left alone.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scratch_det.errors import exit_on_user_error

LINE_EVERY = 10.0
"""Seconds between progress lines where the output is no terminal."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(root) / "digits",
        help="folder to make; <out>_pretrain is made beside it (default: digits in $DETECTRON2_DATASETS or ./datasets)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (default: %(default)s)")
    parser.add_argument("--train", type=int, default=2000, metavar="N", help="train scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=250, metavar="N", help="validation scenes (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="rebuild a digits set that is already there")
    return parser.parse_args()


@contextmanager
def reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback: a bar on a terminal, a line with the time left every few seconds elsewhere."""
    if not sys.stdout.isatty():
        yield plain_lines()
        return
    from rich.progress import Progress

    with Progress() as bar:
        tasks = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield advance


def plain_lines() -> Callable[[str, int, int], None]:
    """A progress callback that prints the end of every part, and where it is now and then."""
    part, started, printed = "", 0.0, 0.0

    def line(what: str, done: int, total: int) -> None:
        nonlocal part, started, printed
        now = time.monotonic()
        if what != part:
            part, started, printed = what, now, now
        if done == total:
            print(f"{what}: {total} in {now - started:.0f} s", flush=True)
        elif now - printed >= LINE_EVERY:
            left = (now - started) / done * (total - done)
            print(f"{what}: {done} of {total}, about {left:.0f} s left", flush=True)
            printed = now

    return line


def main() -> None:
    """Make what is missing and say what there is."""
    args = parse_args()
    with exit_on_user_error():
        from scratch_det.data.digits import make_digits

        with reporting() as progress:
            made = make_digits(args.out, args.seed, args.train, args.val, args.force, progress)
        for folder, built in made.items():
            print(f"{folder}: made" if built else f"{folder}: already there, nothing to do")
        print(f"to see annotated scenes, open {args.out / 'preview.png'}")


if __name__ == "__main__":
    main()
