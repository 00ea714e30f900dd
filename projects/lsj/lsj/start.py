"""From a command line to a run with large-scale jitter, as ``scratch_det.train.start``, before torch is imported."""

from lsj.recipe import add_keys, problems
from scratch_det.distributed.world import ALONE, World
from scratch_det.errors import ConfigError
from scratch_det.train.start import Plan, Request, choose_backend, planned
from scratch_det.train.start import make_plan as make_plain_plan


def start(request: Request, world: World = ALONE) -> None:
    """Check the request, then train and evaluate (or only evaluate), as one of the processes of ``world``.

    Raises UserError for what the user can mend, Stopped when the run was asked to stop.
    """
    with planned(request, world, make_plan) as (plan, stop):
        from lsj import detection
        from scratch_det.train.run import evaluate_only, train_and_evaluate

        (evaluate_only if request.eval_only else train_and_evaluate)(plan, world, stop, detection)


def make_plan(request: Request, world: World) -> Plan:
    """As ``scratch_det.train.start.make_plan``, once this project's own keys make sense."""
    _, recipe = choose_backend(request, add_keys)
    if found := list(problems(recipe.cfg)):
        raise ConfigError("\n".join(found))
    return make_plain_plan(request, world, add_keys)
