"""Print a recipe as it is after its bases and KEY VALUE pairs are merged: every key with its value, as YAML.

    scratch-det config configs/Digits/quickstart.yaml
    scratch-det config FILE SOLVER.BASE_LR 0.01 > merged.yaml
    scratch-det config FILE --diff                (KEY VALUE of what is not the default)

What data and machine decide, such as the number of classes, is in the config.yaml of a run. Exit code 2: a user error.
"""

from scratch_det import backends
from scratch_det.command_line import ToolParser, add_project_flag, exit_on_user_error
from scratch_det.config.load import flatten, load_config, plain
from scratch_det.errors import quoted


def build_parser() -> ToolParser:
    parser = ToolParser(usage="%(prog)s FILE [flags] [KEY VALUE ...]   (--help lists the flags)", description=__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="the recipe, or a run's config.yaml")
    add("overrides", nargs="*", default=[], metavar="KEY VALUE", help="keys of the recipe and their new values")
    add_project_flag(parser)
    known = [backends.AUTO, *backends.BACKENDS]
    add("--backend", default=backends.AUTO, choices=known, help="whose keys and defaults (%(default)s)")
    add("--diff", action="store_true", help="only what differs from the defaults, as KEY VALUE")
    return parser


def main() -> None:
    args = build_parser().parse_intermixed_args()
    with exit_on_user_error(reading_only=True):
        defaults = backends.defaults(backends.choose(args.backend))
        cfg, before = load_config(args.file, args.overrides, defaults).cfg, flatten(defaults)
        changed = [
            f"{key} {quoted(value)}" for key, value in flatten(cfg).items() if plain(value) != plain(before[key])
        ]
        print("\n".join(changed) if args.diff else cfg.dump().rstrip())
