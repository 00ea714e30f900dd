"""Train and evaluate a recipe with detectron2's own DefaultTrainer: its loop, hooks, evaluators and checkpoints.

    scratch-det detectron2 --config-file FILE --num-gpus 8 --resume OUTPUT_DIR output/mine
    scratch-det detectron2 --config-file FILE --eval-only MODEL.WEIGHTS output/mine/model_final.pth

Flags are detectron2's, and so is the run folder. The recipe is checked as in scratch-det train, with the rules of
training from scratch. What differs between the two trainers is in docs/detectron2.md. Exit code 2: a user error.
"""

import sys

from scratch_det import backends
from scratch_det.command_line import GIVEN, ToolParser, add_project_flag, exit_on_user_error
from scratch_det.config.load import flatten, load_config, set_key
from scratch_det.config.rules import NOT_HONOURED, check_config
from scratch_det.distributed.launch import ALONE, World, several_to_launch
from scratch_det.engine.command import add_process_flags
from scratch_det.errors import raise_problems


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="the recipe, a YAML config")
    add_project_flag(parser)
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR, if there is one")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    add("overrides", nargs="*", metavar="KEY VALUE", help="keys of the recipe and their new values")
    add_process_flags(parser)
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    with exit_on_user_error():
        several_to_launch(ALONE, args.num_gpus, args.num_machines, args.machine_rank)
        defaults = backends.defaults(backends.choose("detectron2"))
        cfg = load_config(args.config_file, args.overrides, defaults).cfg
        checked, keys, processes = cfg.clone(), flatten(defaults), max(args.num_gpus, 1) * args.num_machines
        for key in NOT_HONOURED:  # by this repository's trainer; detectron2's reads them
            set_key(checked, key, keys[key])
        notices = [] if args.eval_only else check_config(checked, processes)
        augmented, train_net = cfg.TEST.AUG.ENABLED, "evaluate with scratch-det eval"
        problems = {
            f"TEST.AUG.VOTE_THRESH is {cfg.TEST.AUG.VOTE_THRESH}, but detectron2 has no box voting; {train_net}":
                augmented and cfg.TEST.AUG.VOTE_THRESH,
            f"TEST.AUG.ENABLED with MODEL.KEYPOINT_ON: detectron2 does not augment keypoints; {train_net}":
                augmented and cfg.MODEL.KEYPOINT_ON,
            f"WRITERS is {cfg.WRITERS}, but detectron2's trainer writes TensorBoard alone; use scratch-det train":
                keys["WRITERS"] != cfg.WRITERS,
            f"MODEL.DEVICE is cpu with {processes} processes, but detectron2 trains several processes on GPUs only; "
            "use scratch-det train": cfg.MODEL.DEVICE == "cpu" and processes > 1 and not args.eval_only,
        }  # fmt: skip
        raise_problems(problem for problem, is_so in problems.items() if is_so)
        for notice in notices:
            print(f"notice: {notice}", file=sys.stderr)
        backends.load("detectron2")
        from scratch_det.backends.detectron2_trainer import run
        from scratch_det.distributed.devices import check_machine

        if check_machine(cfg.MODEL.DEVICE, World(size=processes, local_size=max(args.num_gpus, 1))).type == "cpu":
            cfg.MODEL.DEVICE = "cpu"
        run(cfg, args, GIVEN)
