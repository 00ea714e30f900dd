"""``scratch-det COMMAND``, also ``python -m scratch_det COMMAND``: imports the module of the command that is called."""

import sys
from importlib import import_module

from scratch_det import __version__
from scratch_det.command_line import ToolParser
from scratch_det.commands import COMMANDS, FOREIGN, module_of
from scratch_det.errors import EXIT_CODE, did_you_mean


def main() -> None:
    words = sys.argv[1:]
    for count in (2, 1):
        if (command := " ".join(words[:count])) in COMMANDS:
            sys.argv = [f"scratch-det {command}", *words[count:]]
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
    meant = did_you_mean(FOREIGN.get(asked, asked), list(COMMANDS))
    parser.error(f"{asked!r} is not a command{meant}; --help lists them")


if __name__ == "__main__":
    main()
