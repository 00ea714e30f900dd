"""The numbers of *Rethinking ImageNet Pre-training* (arXiv 1811.08883), with their place; val2017 unless said."""

SCRATCH, PRETRAINED = "scratch", "pretrained"

# Table 1: box AP of Mask R-CNN with FPN and GN by depth, initialisation and kx schedule.
TABLE1 = {
    (50, SCRATCH): {2: 36.8, 3: 39.5, 4: 40.6, 5: 40.7, 6: 41.3},
    (50, PRETRAINED): {2: 40.3, 3: 40.8, 4: 40.9, 5: 40.9, 6: 41.1},
    (101, SCRATCH): {2: 38.2, 3: 41.0, 4: 41.8, 5: 42.2, 6: 42.7},
    (101, PRETRAINED): {2: 41.8, 3: 42.3, 4: 42.3, 5: 41.9, 6: 42.2},
}

METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")

# Table 2: the 6x models of Table 1 on all of METRICS; the fourth one has 42.2 box AP there.
TABLE2 = {
    (50, SCRATCH): (41.3, 61.8, 45.6, 36.6, 59.0, 38.9),
    (50, PRETRAINED): (41.1, 61.7, 44.6, 36.4, 58.5, 38.7),
    (101, SCRATCH): (42.7, 62.9, 47.0, 37.6, 59.9, 39.7),
    (101, PRETRAINED): (42.3, 62.6, 46.2, 37.2, 59.7, 39.7),
}

# Table 3: larger models, from scratch, on all of METRICS.
TABLE3 = {
    "R101 train aug": (45.0, 65.7, 49.3, 39.5, 62.5, 42.1),
    "X152 train aug": (46.4, 67.1, 51.1, 40.5, 63.9, 43.4),
    "X152 train aug, cascade": (48.6, 66.8, 52.9, 41.4, 64.2, 44.6),
    "X152 train aug, cascade, test aug": (50.9, 68.7, 55.4, 43.2, 66.1, 46.8),
}

# Table 3's caption: ImageNet weights with cascade, train and test aug; box and mask AP.
TABLE3_PRETRAINED = (50.3, 42.5)

# Section 5.1, Figure 5: mask AP by depth and initialisation with cascade, train and test aug.
TEST_AUG = {(50, SCRATCH): 41.6, (50, PRETRAINED): 40.9, (101, SCRATCH): 42.5, (101, PRETRAINED): 41.9}

# Section 5.1, Figure 6: keypoint AP of R50-FPN with GN at 2x, by initialisation; at 3x there is a curve.
KEYPOINTS_2X = {SCRATCH: 65.6, PRETRAINED: 65.5}

# Section 5.1: Faster R-CNN VGG-16 without normalisation: the kx schedule at which each peaks, and its box AP.
VGG = {SCRATCH: (11, 35.2), PRETRAINED: (9, 35.6)}

# Section 5.2, Figure 7: box AP with 35k images and the hyper-parameters found for them, either initialisation.
IMAGES_35K = 36.3

# Section 5.2, Figures 7 and 8: box AP by number of images; iterations only where the paper gives them.
FEWER_IMAGES = {
    "10k": {PRETRAINED: 26.0, SCRATCH: 25.9},
    "3.5k": {PRETRAINED: 16.0, SCRATCH: 9.3},
    "1k": {PRETRAINED: 9.9, SCRATCH: 3.5},
}
ITERATIONS_10K = {PRETRAINED: 60_000, SCRATCH: 220_000}

# Section 5.2, PASCAL VOC: iterations, and mAP on val2012 (VOC's: at IoU 0.5), of Faster R-CNN R101 by initialisation.
VOC = {PRETRAINED: (18_000, 82.7), SCRATCH: (144_000, 77.6)}
