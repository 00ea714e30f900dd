"""Print the completion of commands, flags and files for a shell, by shtab.

    mkdir -p ~/.local/share/bash-completion/completions ~/.zfunc
    scratch-det completion bash > ~/.local/share/bash-completion/completions/scratch-det
    scratch-det completion zsh > ~/.zfunc/_scratch-det

zsh needs "fpath+=~/.zfunc" before "compinit" in ~/.zshrc. Exit code 2: shtab is not installed.
"""

import re
from argparse import ArgumentParser, _SubParsersAction
from importlib import import_module
from typing import Any

from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.commands import COMMANDS, module_of

FILES = re.compile(r"\b(FILE|DIR|FOLDER|JSON|IMAGE|SOURCE|MODEL|SRC|DST|RUN)\b")  # metavars


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def main() -> None:
    shell = build_parser().parse_args().shell
    with exit_on_user_error(reading_only=True):
        import shtab  # of the extra "completion"

        print(shtab.complete(all_commands(shtab.FILE), shell))


def all_commands(files: Any) -> ArgumentParser:
    """``scratch-det`` with the parsers of all commands; ``files``: shtab's word for arguments that are files."""
    parser = ArgumentParser(prog="scratch-det")
    groups = {"": parser.add_subparsers()}
    for name, what in COMMANDS.items():
        *group, last = name.split()
        if group and group[0] not in groups:
            groups[group[0]] = groups[""].add_parser(group[0], help=f"{group[0]} ...").add_subparsers()
        command = import_module(module_of(name)).build_parser()
        groups["".join(group)].add_parser(last, help=what, parents=[command], add_help=False)
    parsers = [parser]
    for action in (action for one in parsers for action in one._actions):  # parsers grows while it is walked
        if isinstance(action, _SubParsersAction):
            parsers += action.choices.values()
        elif FILES.search(str(action.metavar)):
            action.complete = files  # type: ignore[attr-defined]
    return parser
