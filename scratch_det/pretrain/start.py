"""From a command line to a pre-training: what can be refused is refused here, before torch is imported."""

from scratch_det import backends
from scratch_det.config import load_config, settle_batch
from scratch_det.distributed.world import ALONE, World
from scratch_det.errors import ConfigError
from scratch_det.pretrain.recipe import LIBRARY, check_recipe, read_folders
from scratch_det.train.rundir import RunDir
from scratch_det.train.start import Plan, Request, announce, check_flags, planned


def start(request: Request, world: World = ALONE) -> None:
    """Check the request, then train a classifier, as one of the processes of ``world``.

    Raises UserError for what the user can mend, Stopped when the run was asked to stop.
    """
    with planned(request, world, make_plan) as (plan, stop):
        from scratch_det.pretrain import classification
        from scratch_det.train.run import train_and_evaluate

        train_and_evaluate(plan, world, stop, classification)


def make_plan(request: Request, world: World) -> Plan:
    """Refuse what can be refused without torch, the cheap checks first; then say what was found."""
    if request.backend not in (LIBRARY, backends.AUTO):
        raise ConfigError(
            f"--backend {request.backend}: the body is {LIBRARY}'s here, and its weights serve both backends; "
            "leave the flag out"
        )
    recipe = load_config(request.config_file, request.overrides)
    cfg = recipe.cfg
    batch = settle_batch(recipe, world.size, request.scale_to_batch, request.accumulate)
    notices = check_recipe(cfg, world.size, request.accumulate, request.waive)
    run_dir = RunDir(cfg.OUTPUT_DIR, writes=world.is_main)
    run_dir.check(allow_existing=request.resume)
    check_flags(request, cfg)
    training, test = read_folders(recipe)

    plan = Plan(request, cfg, LIBRARY, training, test, run_dir)
    announce(plan, backends.library(LIBRARY), batch, notices)
    return plan
