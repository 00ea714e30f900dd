"""Training recipes for detectors from scratch, after *Rethinking ImageNet Pre-training* (arXiv 1811.08883)."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Detector", "Found", "load"]


def __getattr__(name: str) -> Any:
    """The names of ``__all__``, which need torch: an import of the package alone stays quick."""
    if name in __all__:
        from scratch_det import detector

        return getattr(detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
