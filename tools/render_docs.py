#!/usr/bin/env python
"""Bring the tables in README.md and docs/*.md, and figures and page in docs/*/, up to date with results/.

    python tools/render_docs.py --project projects/self_supervised --project projects/timm_backbones [--check]

A table goes between a line `<!-- results EXPERIMENT -->` and a line `<!-- end -->`; EXPERIMENT as in scratch-det study.
docs/NAME/ has figures and page of results/NAME/, and SOURCE: SHA-256 of the numbers that the figures were drawn from,
and of each figure. After a change of how they are drawn, remove SOURCE, and start this again.
Exit code 1: with --check, a file is not up to date; 2: user error, such as no results for a marker.
"""

import sys
from pathlib import Path

from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def main() -> None:
    parser = ToolParser(description=__doc__)
    add_project_flag(parser)
    parser.add_argument("--check", action="store_true", help="write nothing, list the files that are not up to date")
    check = parser.parse_args().check
    with exit_on_user_error():
        from scratch_det.study.report import render  # after --help: matplotlib takes 0.4 s

        stale = render(Path(__file__).parents[1], check)
    for path in stale:
        print(f"{path}: {'not up to date; make docs' if check else 'written'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
