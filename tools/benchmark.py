#!/usr/bin/env python
"""Time two ways to train side by side, pair by pair in one process.

    python tools/benchmark.py loop --config-file configs/Digits/quickstart.yaml
    python tools/benchmark.py peers --config-file FILE --script detectron2/tools/plain_train_net.py

loop: an iteration of the training loop beside its bare forward pass, backward pass and update on the same batch.
peers: the loop with the detectron2 backend beside detectron2's own plain training script, on the same images.
Exit code 2: a user error, the message says which.
"""

from pathlib import Path

from scratch_det.backends import AUTO, BACKENDS
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("what", choices=["loop", "peers"], help="what to time")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument("--pairs", type=int, default=100, metavar="N", help="pairs to time (%(default)s)")
    parser.add_argument(
        "--backend",
        default=AUTO,
        choices=[AUTO, *BACKENDS],
        help="loop: the library that builds the model (%(default)s)",
    )
    parser.add_argument("--script", type=Path, metavar="FILE", help="peers: detectron2's tools/plain_train_net.py")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to the recipe")
    add_project_flag(parser)
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    with exit_on_user_error():
        from scratch_det.benchmark import loop_against_bare, loop_against_plain_script, plan_training  # not for --help

        backend = args.backend if args.what == "loop" else "detectron2"
        plan = plan_training(args.config_file, args.overrides, args.pairs, backend)
        if args.what == "loop":
            found = loop_against_bare(plan, args.pairs)
            print(found.as_text("an iteration of the loop", "bare forward, backward, update"))
        else:
            found = loop_against_plain_script(plan, args.pairs, args.script)
            print(found.as_text("an iteration of this loop", "detectron2's plain training script"))


if __name__ == "__main__":
    main()
