"""The flags that every tool has which looks at or starts a run; see ``Request`` for what becomes of them.

A command line that starts a run: in this process, in several, or as one of those that a launcher has started.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import ToolParser, add_project_flag
from scratch_det.config.rules import WAIVABLE
from scratch_det.distributed.launch import ALONE, World, launch, read_world, several_to_launch
from scratch_det.distributed.stop import Stopped
from scratch_det.engine.plan import Request
from scratch_det.errors import exit_on_user_error


def run_parser(description: str | None) -> ArgumentParser:
    """A parser of recipe, processes, batch, checkpoints and overrides; the first flags are detectron2's."""
    parser = ToolParser(
        usage="%(prog)s --config-file FILE [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=description,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    add_project_flag(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR (or start it)")
    parser.add_argument("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="who builds the model (%(default)s)")
    parser.add_argument(
        "--init-std",
        type=float,
        metavar="STD",
        help="draw the random weights of every layer from N(0, STD), see docs/vgg.md",
    )
    parser.add_argument(
        "--waive",
        action="append",
        default=[],
        choices=WAIVABLE,
        metavar="RULE",
        help=f"train though a rule forbids it, to see what comes of it: {', '.join(WAIVABLE)}",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")

    several = parser.add_argument_group("several processes (not with torchrun or srun, which say it themselves)")
    several.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (%(default)s)")
    several.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (%(default)s)")
    several.add_argument("--machine-rank", type=int, default=0, metavar="I", help="this machine's number, from 0")
    several.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (a free port)")

    batch = parser.add_argument_group("another batch than the recipe's")
    batch.add_argument(
        "--scale-to-batch",
        type=int,
        metavar="N",
        help="N images an iteration: scales the rate and iterations, overrides included",
    )
    batch.add_argument(
        "--accumulate", type=int, default=1, metavar="K", help="work off each process's images in K parts (%(default)s)"
    )

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--branch-from", metavar="FILE", help="start from a checkpoint of a run with the same beginning"
    )
    checkpoints.add_argument(
        "--switch-from", metavar="FILE", help="go on as a cascade from a checkpoint of the same recipe without one"
    )
    checkpoints.add_argument(
        "--keep-at", type=numbers, default=(), metavar="I,J", help="keep the checkpoints after I, J, ... iterations"
    )
    checkpoints.add_argument(
        "--keep-last", type=int, default=3, metavar="K", help="else keep the last K; 0 keeps all (%(default)s)"
    )
    checkpoints.add_argument(
        "--stop-at",
        type=int,
        metavar="N",
        help="pause after N iterations and keep that checkpoint; the same command with --resume goes on",
    )
    return parser


def take_processes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove from ``arguments`` those that ``distributed.launch`` understands, and return them."""
    return {name: arguments.pop(name) for name in ("num_gpus", "num_machines", "machine_rank", "dist_url")}


def numbers(text: str) -> tuple[int, ...]:
    """1000,2000 as numbers."""
    return tuple(int(word) for word in text.split(",") if word)


def run_command(parser: ArgumentParser, start: Callable[[Request, World], None]) -> None:
    """Parse the command line and ``start`` what it asks for; exit codes as tools/train_net.py describes them."""
    args = vars(parser.parse_intermixed_args())
    several = take_processes(args)
    args["waive"] = tuple(args["waive"])
    request, world = Request(**args), ALONE
    try:
        with exit_on_user_error():
            world = read_world(os.environ)
            if several_to_launch(world, **several):
                sys.exit(launch(**several))
            with exit_on_user_error(prints=world.local_rank == 0):
                start(request, world)
    except Stopped as stopped:
        end = "" if request.eval_only else "; the same command with --resume continues from its checkpoint"
        if world.is_main:
            print(f"{stopped}{end}", file=sys.stderr)
        sys.exit(stopped.exit_code)
