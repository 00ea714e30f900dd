"""Whatever detectron2's ``build_model`` makes of a recipe."""
