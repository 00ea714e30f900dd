"""Where results that can be made again are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/scratch_det``, by default ``~/.cache/scratch_det``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "scratch_det")
