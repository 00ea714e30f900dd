"""The paper's tables and figures as commands: what they cost, running them, where they stand, and what came out.

    scratch-det study list --experiment table1
    scratch-det study samples --config-file configs/Digits/quickstart.yaml
    scratch-det study plan table1 --gpus 8 --seconds-per-iter 0.4
    scratch-det study run digits/smoke --out output/smoke
    scratch-det study status --out output/smoke
    scratch-det study report digits/smoke --out output/smoke

EXPERIMENT is a table or figure (table1, figure4, voc, ...), "paper" for all of them, a miniature on digits
(digits/table1, ..., "digits" for all), the name of one run, or a YAML file with runs of your own: docs/new_data.md.

list: a table of the runs. samples: images, instances and pixels that trainings see, pre-training included (Figure 2).
plan: runs, trunks and branches, iterations, GPU hours, disk. run: start or continue all runs that are not finished;
exit code 0: all finished, 1: some failed, 2: a user error, 70: a bug or a damaged file, 75: stopped by SIGTERM,
SIGUSR1 or SIGHUP, 130: by Ctrl-C; the same command goes on. report: tables, figures and a page in DIR/report, of what
there is so far.
"""

import sys
from argparse import BooleanOptionalAction
from os.path import normpath
from pathlib import Path
from typing import Any

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import TRACEBACK_FOLDERS, ToolParser, add_project_flag, exit_on_user_error
from scratch_det.distributed.stop import Stopped

ARGUMENTS: dict[str, dict[str, Any]] = {
    "experiment": {"type": normpath, "metavar": "EXPERIMENT",
                   "help": "such as table1 or FILE.yaml, see scratch-det study --help; report takes a part of it too"},
    "--experiment": {"type": normpath, "metavar": "EXPERIMENT", "default": "paper", "help": "(%(default)s)"},
    "--config-file": {"action": "append", "metavar": "FILE", "help": "a recipe (Figure 2's two)"},
    "--out": {"type": Path, "metavar": "DIR", "help": "the study's folder (output/studies/EXPERIMENT)"},
    "--share-prefix": {"action": BooleanOptionalAction, "default": True, "help": "branch off a longer schedule (yes)"},
    "--gpus": {"type": int, "metavar": "N", "default": 1, "help": "processes of a run (%(default)s)"},
    "--seconds-per-iter": {"type": float, "metavar": "S", "help": "seconds that an iteration takes on these GPUs"},
    "--json": {"dest": "as_json", "action": "store_true",
               "help": "print the graph: commands, needs, outputs; with --out the study is begun there"},
    "--launcher": {"choices": ["local", "torchrun", "slurm"], "default": "local",
                   "help": "what starts the runs (%(default)s)"},
    "--max-parallel": {"type": int, "metavar": "N", "default": 1, "help": "runs at once, not on SLURM (%(default)s)"},
    "--only": {"nargs": "+", "metavar": "ID", "default": [], "help": "only these runs"},
    "--dry-run": {"action": "store_true", "help": "print the commands, start nothing"},
    "--backend": {"choices": [AUTO, *BACKENDS], "default": AUTO, "help": "what builds the models (%(default)s)"},
    "--slurm": {"type": Path, "metavar": "FILE", "help": "a job template, as docs/slurm.sh"},
    "--results": {"type": Path, "metavar": "FOLDER", "help": "the study as data: written by report, read by table"},
}  # fmt: skip
COMMANDS = {  # functions of scratch_det.study.commands: help, arguments
    "list": ("the runs, with the paper's numbers", "--experiment"),
    "samples": ("images and pixels that trainings see (Figure 2)", "--config-file"),
    "plan": ("the cost of an experiment", "experiment --share-prefix --gpus --seconds-per-iter --json --out"),
    "run": ("start or continue an experiment", "experiment --share-prefix --gpus --out --launcher --max-parallel "
                                               "--only --dry-run --backend --slurm"),
    "status": ("the state of the runs", "experiment --out"),
    "report": ("write tables, figures and one page into DIR/report", "experiment --out --results"),
    "table": ("print the tables of a study that is kept as data", "experiment --results"),
}  # fmt: skip


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (what, arguments) in COMMANDS.items():
        add_project_flag(command := commands.add_parser(name, help=what))
        for argument in arguments.split():
            is_optional = (name, argument) == ("status", "experiment")  # --out names it too
            command.add_argument(argument, **ARGUMENTS[argument] | ({"nargs": "?"} if is_optional else {}))
    commands.choices["plan"].set_defaults(gpus=8)
    return parser


def main() -> None:
    parser = build_parser()
    args = vars(parser.parse_args())
    from scratch_det.study import commands  # 0.1 s: not for --help

    command = args.pop("command")
    do = commands.list_runs if command == "list" else getattr(commands, command)
    experiment = args.pop("experiment") if command == "status" else args.get("experiment")
    if command in ("run", "status", "report") and not args["out"]:
        if not experiment:
            parser.error("status: give EXPERIMENT or --out DIR")
        args["out"] = commands.folder_of(experiment)
    TRACEBACK_FOLDERS.extend(filter(None, [args.get("out")]))
    try:
        is_run = command == "run" and not args["dry_run"]
        with exit_on_user_error(reading_only=not is_run, is_run=is_run):
            code = do(**args)
        if code:
            sys.exit(code)
    except Stopped as stopped:
        print(f"{stopped}; the same command continues the study", file=sys.stderr)
        sys.exit(stopped.exit_code)
