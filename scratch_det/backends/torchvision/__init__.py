"""Mask R-CNN and Faster R-CNN from the parts of ``torchvision.models.detection``."""
