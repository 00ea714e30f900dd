"""Large-scale jitter: detectron2's recipes from scratch in configs/new_baselines, on scratch_det."""
