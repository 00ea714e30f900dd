"""Faster, Mask and Keypoint R-CNN from the parts of ``torchvision.models.detection``."""
