"""The detectron2 backend: models that detectron2's ``build_model`` builds."""
