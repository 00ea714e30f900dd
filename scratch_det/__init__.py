"""Training recipes for detectors from scratch, after *Rethinking ImageNet Pre-training* (arXiv 1811.08883)."""

__version__ = "0.1.0"
