"""A command line that starts a run: in this process, in several, or as one of those that a launcher has started."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable

from scratch_det.distributed.launch import launch, several_to_launch
from scratch_det.distributed.stop import Stopped
from scratch_det.distributed.world import ALONE, World, read_world
from scratch_det.errors import exit_on_user_error
from scratch_det.train.arguments import take_processes
from scratch_det.train.start import Request


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
            with exit_on_user_error(speaks=world.local_rank == 0):
                start(request, world)
    except Stopped as stopped:
        end = "" if request.eval_only else "; the same command with --resume continues from its checkpoint"
        if world.is_main:
            print(f"{stopped}{end}", file=sys.stderr)
        sys.exit(stopped.exit_code)
