"""Package metadata; every dependency with its reason."""

from setuptools import find_packages, setup

DEPENDENCIES = [
    "torch>=2.6",  # training; 2.6 is the first to load checkpoints with weights_only by default
    "torchvision>=0.21",  # models, RoIAlign, NMS, transforms; the release that matches torch 2.6
    "fvcore>=0.1.5",  # CfgNode: detectron2's kind of configuration
    "iopath>=0.1.7",  # opens files for fvcore
    "numpy>=1.24",  # the stream of images, annotations, AP
    "pillow>=10",  # decodes images and refuses truncated ones
    "pyyaml>=6",  # recipes with line numbers, the data set catalog
    "faster-coco-eval>=1.6",  # COCO's AP and masks (polygons, RLE) in C++
    "opencv-python-headless>=4.8",  # demo data: warps, contours; needs no display libraries
    "tensorboard>=2.21",  # curves; 2.21 is the first without pkg_resources
    "matplotlib>=3.8",  # curves.png, predictions.png, the figures of a study
    "jinja2>=3.1",  # a study's page; escapes what it fills in
    "tabulate>=0.9",  # text and Markdown tables
    "rich>=14.1",  # progress bars; 14.1 is the first that shows one inside another
    "scikit-learn>=1.3",  # demo data: the UCI handwritten digits
    "scikit-image>=0.22",  # demo data: photographs
]
EXTRAS = {
    "slurm": ["submitit>=1.5"],  # launching studies on a cluster
    "search": ["optuna>=4"],  # grid search over hyper-parameters
    "timm": ["timm>=1.0.31"],  # backbones of projects/timm_backbones; what it was tested with
    "dev": [
        *("pycocotools>=2.0.8", "optuna>=4", "submitit>=1.5", "timm>=1.0.31"),  # what some tests need
        *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.13"),
    ],
}

setup(
    name="scratch_det",
    version="0.1.0",
    description="Train object detectors from scratch: the recipes of Rethinking ImageNet Pre-training",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["scratch_det", "scratch_det.*"]),
    package_data={"scratch_det": ["config/*.yaml", "data/*.yaml", "study/report/page.*"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
)
