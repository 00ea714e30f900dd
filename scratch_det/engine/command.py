"""The command line of a run: its flags, and the start in this process or in several."""

import os
import sys
from argparse import ArgumentParser
from contextlib import ExitStack, closing, redirect_stdout
from typing import Any

from scratch_det.backends import AUTO, BACKENDS, library
from scratch_det.command_line import TRACEBACK_FOLDERS, ToolParser, add_project_flag, exit_on_user_error, numbers
from scratch_det.config.rules import WAIVABLE
from scratch_det.distributed.launch import ALONE, World, launch, read_world, several_to_launch
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.engine.changes import report_finished
from scratch_det.engine.plan import DETECTION, Request, check_launch, is_finished, make_plan
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import Report
from scratch_det.log import close_logging, logger, set_up_logging

NOT_BEGUN = "nothing was trained in this start, the same command starts again"


def run_parser(description: str | None, trains: bool = True) -> ToolParser:
    """Flags of everything that starts or checks a run, the first ones detectron2's; see ``Request``.

    trains: with those that only a training has.
    """
    parser = ToolParser(
        usage="%(prog)s --config-file FILE [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=description,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="the recipe, a YAML config")
    add_project_flag(parser)
    add("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="the library that builds the model (%(default)s)")
    add("--device", metavar="NAME", help="MODEL.DEVICE: cpu, cuda, cuda:1, mps or xpu (the recipe's)")
    if trains:
        add("--resume", action="store_true", help="continue the run in OUTPUT_DIR, or start it where there is none")
        add("--init-std", type=float, metavar="STD", help="initialise every layer from N(0, STD), see docs/vgg.md")
        waivable = f"train although this rule rejects the config: {', '.join(WAIVABLE)}"
        add("--waive", action="append", default=[], choices=WAIVABLE, metavar="RULE", help=waivable)
    add("overrides", nargs="*", metavar="KEY VALUE", help="keys of the recipe and their new values")

    add_process_flags(parser, " (torchrun, srun and mpirun need none of these)")
    if not trains:
        return parser

    group = parser.add_argument_group("another batch or length than the recipe's")
    add = group.add_argument
    scale = "train with N images per step: scales learning rate and schedule"
    add("--scale-to-batch", type=int, metavar="N", help=scale)
    steps = "gradient accumulation: K micro-batches per step (%(default)s)"
    add("--accumulate", type=int, default=1, metavar="K", help=steps)
    add = group.add_mutually_exclusive_group().add_argument
    epochs = "N passes over the images that are trained on: sets SOLVER.MAX_ITER and STEPS"
    add("--epochs", type=float, metavar="N", help=epochs)
    trial = "a trial of N iterations, with the schedule in proportion, in OUTPUT_DIR_trial"
    add("--trial", type=int, metavar="N", help=trial)

    add = parser.add_argument_group("checkpoints").add_argument
    add("--branch-from", metavar="FILE", help="start from a checkpoint of a run whose iterations so far are the same")
    add("--switch-from", metavar="FILE", help="start a cascade from a checkpoint of the same recipe without cascade")
    add("--keep-at", type=numbers, default=(), metavar="I,J", help="keep the checkpoints after I, J, ... iterations")
    add("--keep-last", type=int, default=3, metavar="K", help="keep the last K others; 0 keeps all (%(default)s)")
    pause = (
        "pause after N iterations and keep that checkpoint; --resume without this flag, or with a larger N, continues"
    )
    add("--stop-at", type=int, metavar="N", help=pause)
    return parser


def add_process_flags(parser: ArgumentParser, note: str = "") -> None:
    """detectron2's flags of several processes."""
    add = parser.add_argument_group(f"several processes{note}").add_argument
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (%(default)s)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines (%(default)s)")
    add("--machine-rank", type=int, default=0, metavar="I", help="rank of this machine, from 0")
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (a free port)")


def read_request(parser: ArgumentParser) -> tuple[Request, dict[str, Any]]:
    """The request of the command line, and the values of all other flags by name."""
    flags = vars(parser.parse_intermixed_args())
    flags["waive"] = tuple(flags.get("waive", ()))
    if device := flags.pop("device"):
        if "MODEL.DEVICE" in flags["overrides"][::2]:
            parser.error("--device and MODEL.DEVICE: both name the device, leave out one of them")
        flags["overrides"] = ["MODEL.DEVICE", device, *flags["overrides"]]  # first: the last may lack its value
    return Request(**{name: flags.pop(name) for name in Request.__dataclass_fields__ if name in flags}), flags


def run_command(parser: ArgumentParser, task: str = DETECTION) -> None:
    """Parse the command line and start what it asks for; exit codes as scratch-det train describes them."""
    (request, flags), world, known = read_request(parser), ALONE, len(TRACEBACK_FOLDERS)
    try:
        with exit_on_user_error(is_run=True):
            world = read_world(os.environ)
            if several_to_launch(world, flags["num_gpus"], flags["num_machines"], flags["machine_rank"]):
                if flags["num_machines"] > 1 or not is_finished(request, task):
                    check_launch(request, max(flags["num_gpus"], 1) * flags["num_machines"], task)
                    sys.exit(launch(**flags))
                world = World(size=flags["num_gpus"], local_size=flags["num_gpus"])  # this process answers for all
            with exit_on_user_error(world.local_rank == 0):
                start(request, world, task)
    except Stopped as stopped:
        began = any(RunDir(path).holds_run() for path in TRACEBACK_FOLDERS[known:])
        end = "the same command with --resume continues from its checkpoint" if began else NOT_BEGUN
        if world.is_main:
            print(f"{stopped}{'' if request.eval_only else f'; {end}'}", file=sys.stderr)
        sys.exit(stopped.exit_code)


def start(request: Request, world: World = ALONE, task: str = DETECTION) -> None:
    """Check the request, then train and evaluate (or only evaluate), as one of the processes of ``world``.

    Only rank 0 prints and logs. Raises UserError for user errors, Stopped when the run was asked to stop.
    """
    set_up_logging(prints=world.is_main)
    stop, report = StopFlag(), Report()
    with stop.listening(), ExitStack() as stack:
        stack.callback(close_logging)
        stack.callback(sys.stdout.flush)
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stop.raises = True  # nothing is written yet, and a large json takes its time
        plan = make_plan(request, world, task, report)
        TRACEBACK_FOLDERS.append(plan.run_dir.path)
        built_by = library(plan.backend)
        logger.info(f"recipe {request.config_file}, backend {built_by}, writing to {plan.run_dir.path}/")
        for line in (line for section in report.sections if section.name == "batch" for line in section.lines):
            logger.info(line)
        for notice in report.messages("notice"):
            logger.warning(notice)
        stop.raises = False
        if plan.is_finished and world.size == world.local_size:  # without torch; of several machines rank 0 decides
            with closing(plan.run_dir):
                plan.run_dir.lock()
                return report_finished(plan.cfg, plan.run_dir)
        from scratch_det.engine.train import evaluate_only, train_and_evaluate  # imports torch

        (evaluate_only if request.eval_only else train_and_evaluate)(plan, world, stop)
