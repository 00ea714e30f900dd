"""The command line of a run: its flags, and the start in this process or in several."""

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
    """Flags of everything that starts or checks a run, the first ones detectron2's; see ``Request``."""
    parser = ToolParser(
        usage="%(prog)s --config-file FILE [flags] [KEY VALUE ...]   (--help lists the flags)",
        description=description,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="the recipe, a YAML config")
    add_project_flag(parser)
    add("--resume", action="store_true", help="continue the run in OUTPUT_DIR, or start it where there is none")
    add("--backend", default=AUTO, choices=[AUTO, *BACKENDS], help="the library that builds the model (%(default)s)")
    add("--init-std", type=float, metavar="STD", help="initialise every layer from N(0, STD), see docs/vgg.md")
    waivable = f"train although this rule rejects the config: {', '.join(WAIVABLE)}"
    add("--waive", action="append", default=[], choices=WAIVABLE, metavar="RULE", help=waivable)
    add("overrides", nargs="*", metavar="KEY VALUE", help="keys of the recipe and their new values")

    add = parser.add_argument_group("several processes (torchrun and srun set these themselves)").add_argument
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (%(default)s)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines (%(default)s)")
    add("--machine-rank", type=int, default=0, metavar="I", help="rank of this machine, from 0")
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (a free port)")

    add = parser.add_argument_group("another batch than the recipe's").add_argument
    scale = "train with N images per step: scales learning rate and schedule"
    add("--scale-to-batch", type=int, metavar="N", help=scale)
    steps = "gradient accumulation: K micro-batches per step (%(default)s)"
    add("--accumulate", type=int, default=1, metavar="K", help=steps)

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
