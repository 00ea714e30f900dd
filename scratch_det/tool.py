"""The command line of a tool."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any


class ToolParser(ArgumentParser):
    """Shows the description, a tool's docstring, as it is written; takes no abbreviated flags, nor do its commands."""

    def __init__(self, **keywords: Any):
        super().__init__(**keywords, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
