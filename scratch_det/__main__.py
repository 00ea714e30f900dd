"""``scratch-det COMMAND``, also ``python -m scratch_det COMMAND``: imports the module of the command that is called."""

import sys
from importlib import import_module

from scratch_det import __version__
from scratch_det.command_line import ToolParser
from scratch_det.errors import EXIT_CODE, did_you_mean

COMMANDS = {  # each is a module of scratch_det.commands: "view data" is view_data
    "train": "train a detector from a recipe and evaluate it",
    "eval": "evaluate a detector's weights",
    "check": "test recipe, data and machine before a run",
    "predict": "detect in images, folders, videos",
    "view data": "a data set, or a recipe's training images, on one page",
    "view curves": "loss and AP of several runs in one picture",
    "analyze errors": "where a detector errs, or two differ, on one page",
    "analyze model": "parameters, multiply-adds and feature maps of a recipe's model",
    "study": "the paper's tables and figures, and your own: plan, run, report",
    "search": "a grid search over keys of a recipe",
    "pretrain": "pre-train a backbone by classification",
    "convert": "weights from one backend to the other",
    "data digits": "make the demo data set",
    "data voc": "XML files of PASCAL VOC's kind to COCO's format",
    "data subsets": "random parts of a data set",
    "data fix": "write a repaired copy of a COCO json",
    "benchmark": "time the parts of this library beside their peers",
    "detectron2": "train a recipe with detectron2's own trainer",
    "completion": "completion of commands and flags for a shell",
}


def module_of(command: str) -> str:
    """The module that has its ``build_parser`` and ``main``."""
    return f"scratch_det.commands.{command.replace(' ', '_')}"


def main() -> None:
    words = sys.argv[1:]
    command = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if command:
        sys.argv = [f"scratch-det {command}", *words[len(command.split()) :]]
        return import_module(module_of(command)).main()
    group = {name: what for name, what in COMMANDS.items() if words and name.startswith(f"{words[0]} ")}
    listed = "\n".join(f"  {name:<15} {what}" for name, what in (group or COMMANDS).items())
    usage = "scratch-det COMMAND ...   (COMMAND --help says more)"
    parser = ToolParser(prog="scratch-det", usage=usage, epilog=f"commands:\n{listed}")
    parser.add_argument("--version", action="version", version=f"scratch_det {__version__}")
    if not words or (group and len(words) == 1):
        parser.print_help(sys.stderr)
        sys.exit(EXIT_CODE)
    parser.parse_known_args(words)  # ends at --help and --version
    asked = " ".join(words[: 2 if group else 1])
    parser.error(f"{asked!r} is not a command{did_you_mean(asked, list(COMMANDS))}; --help lists them")


if __name__ == "__main__":
    main()
