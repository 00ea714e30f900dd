#!/usr/bin/env python
"""The paper's tables and figures as commands: what they cost, running them, where they stand, and what came out.

    python tools/study.py list --experiment table1
    python tools/study.py samples --config-file configs/Digits/quickstart.yaml
    python tools/study.py plan table1 --gpus 8 --seconds-per-iter 0.4
    python tools/study.py run digits/smoke --out output/smoke
    python tools/study.py status --out output/smoke
    python tools/study.py report digits/smoke --out output/smoke

EXPERIMENT is a table or figure (table1, figure4, voc, ...), "paper" for all of them, a miniature on digits
(digits/table1, ..., "digits" for all), the name of one run, or a YAML file with runs of your own: docs/new_data.md.

list: a table of the runs. samples: images, instances and pixels that trainings see, pre-training included (Figure 2).
plan: runs, trunks and branches, iterations, GPU hours, disk. run: start or continue all runs that are not
finished; exit code 0: all finished, 1: some failed, 2: a user error, 75: stopped by SIGTERM or SIGUSR1, 130: by
Ctrl-C; the same command goes on. report: tables, figures and a page in DIR/report, of what there is so far.
"""

import sys
from argparse import ArgumentParser, BooleanOptionalAction
from os.path import normpath
from pathlib import Path

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.distributed.stop import Stopped
from scratch_det.study.commands import LAUNCHERS, SLURM, folder_of, list_runs, plan, report, run, samples, status

UNREAD = "what study.py run prints was read no further; its runs stop with a checkpoint: start it again"


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="the runs, with the paper's numbers")
    command.add_argument("--experiment", type=normpath, default="paper", metavar="EXPERIMENT", help="(%(default)s)")
    command.set_defaults(do=list_runs)

    command = commands.add_parser("samples", help="images and pixels that trainings see (Figure 2)")
    command.add_argument("--config-file", action="append", metavar="FILE", help="a recipe (Figure 2's two)")
    command.set_defaults(do=samples)

    command = commands.add_parser("plan", help="the cost of an experiment")
    command.add_argument("experiment", type=normpath, metavar="EXPERIMENT")
    add_sharing(command)
    command.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a run (%(default)s)")
    command.add_argument("--seconds-per-iter", type=float, metavar="S", help="seconds an iteration takes on them")
    command.add_argument(
        "--json", dest="as_json", action="store_true", help="print the graph: commands, their inputs and outputs"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the run folders: begin the study there")
    command.set_defaults(do=plan)

    command = commands.add_parser("run", help="start or continue an experiment")
    command.add_argument("experiment", type=normpath, metavar="EXPERIMENT")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="a folder for the run folders (output/studies/EXPERIMENT)"
    )
    command.add_argument(
        "--launcher",
        default="local",
        choices=sorted([*LAUNCHERS, SLURM]),
        help="program that starts runs (%(default)s)",
    )
    command.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of a run (%(default)s)")
    command.add_argument(
        "--max-parallel", type=int, default=1, metavar="N", help="runs at once, not on SLURM (%(default)s)"
    )
    command.add_argument("--only", nargs="+", default=[], metavar="ID", help="only these runs")
    command.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    command.add_argument(
        "--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="library that builds the models (%(default)s)"
    )
    command.add_argument("--slurm", type=Path, metavar="FILE", help="a job template, as docs/slurm.sh")
    add_sharing(command)
    command.set_defaults(do=run)

    command = commands.add_parser("status", help="the state of the runs")
    command.add_argument(
        "experiment", nargs="?", type=normpath, metavar="EXPERIMENT", help="the experiment of the study"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder given to run (output/studies/EXPERIMENT)")
    command.set_defaults(do=status)

    command = commands.add_parser("report", help="write tables, figures and one page into DIR/report")
    command.add_argument(
        "experiment", type=normpath, metavar="EXPERIMENT", help="the experiment of the study, or a part of it"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder given to run (output/studies/EXPERIMENT)")
    command.add_argument("--results", type=Path, metavar="FOLDER", help="the study as data, as in results/digits")
    command.set_defaults(do=report)
    return parser


def add_sharing(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--share-prefix",
        action=BooleanOptionalAction,
        default=True,
        help="schedules of one model branch off its longest one",
    )


def main() -> None:
    parser = build_parser()
    args = vars(parser.parse_args())
    do = args.pop("do")
    experiment = args.pop("experiment") if do is status else args.get("experiment")
    if "out" in args and args["out"] is None and do is not plan:
        if not experiment:
            parser.error("status: give EXPERIMENT or --out DIR")
        args["out"] = folder_of(experiment)
    try:
        with exit_on_user_error(unread=UNREAD if do is run and not args["dry_run"] else ""):
            code = do(**args)
        if code:
            sys.exit(code)
    except Stopped as stopped:
        print(f"{stopped}; the same command continues the study", file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
