#!/usr/bin/env python
"""Train and evaluate a recipe with detectron2's own DefaultTrainer: its loop, hooks, evaluators and checkpoints.

    python tools/detectron2_train_net.py --config-file FILE --num-gpus 8 --resume OUTPUT_DIR output/mine
    python tools/detectron2_train_net.py --config-file FILE --eval-only MODEL.WEIGHTS output/mine/model_final.pth

Flags are detectron2's, and so is the run folder. The recipe is checked as in tools/train_net.py, with the rules of
training from scratch. What differs between the two trainers is in docs/detectron2.md.
"""

import logging
from argparse import Namespace
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.command_line import exit_on_user_error
from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config

with exit_on_user_error():
    backends.load(backends.choose("detectron2"))  # one message where it is missing or does not work

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from scratch_det.backends.detectron2 import register, stock_cfg
from scratch_det.weights.load import load_weights


class Trainer(DefaultTrainer):
    """detectron2's trainer with its evaluators; weights are read by this repository, which leaves no part at random."""

    @classmethod
    def load(cls, cfg: CfgNode, model: nn.Module) -> None:
        """Fill ``model`` from MODEL.WEIGHTS, where there are any."""
        with exit_on_user_error():
            said = load_weights(model, cfg.MODEL.WEIGHTS, "detectron2", cfg) if cfg.MODEL.WEIGHTS else "random weights"
        logging.getLogger("detectron2.trainer").info(said)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "inference") -> Any:
        """VOC's for detectron2's own PASCAL VOC sets, else COCO's."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        out = f"{cfg.OUTPUT_DIR}/{folder}"
        return COCOEvaluator(dataset_name, output_dir=out, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with detectron2's test-time augmentation; the names of its tasks end in _TTA."""
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        found = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{task}_TTA": values for task, values in found.items()}


def setup(args: Namespace) -> CfgNode:
    """The recipe as detectron2's config; the training data decide on the number of classes and keypoints."""
    with exit_on_user_error():
        cfg = load_config(args.config_file, args.opts, backends.defaults("detectron2")).cfg
        notices = [] if args.eval_only else check_config(cfg, max(args.num_gpus, 1) * args.num_machines)
        names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        register(names)
    cfg = stock_cfg(cfg, cfg.MODEL.DEVICE)
    DatasetCatalog.get(names[0])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(MetadataCatalog.get(names[0]).thing_classes)
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(MetadataCatalog.get(names[0]).keypoint_names)
    cfg.freeze()
    default_setup(cfg, args)
    for notice in notices:
        logging.getLogger("detectron2.trainer").warning(notice)
    return cfg


def main(args: Namespace) -> dict[str, Any] | None:
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        if args.resume and trainer.checkpointer.has_checkpoint():
            trainer.resume_or_load()
        else:
            trainer.load(cfg, getattr(trainer.model, "module", trainer.model))
        if cfg.TEST.AUG.ENABLED:
            trainer.register_hooks([hooks.EvalHook(0, lambda: trainer.test_with_tta(cfg, trainer.model))])
        return trainer.train()
    model = Trainer.build_model(cfg)
    Trainer.load(cfg, model)
    results = Trainer.test(cfg, model)
    return results | (Trainer.test_with_tta(cfg, model) if cfg.TEST.AUG.ENABLED else {})


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    options = parser.parse_args()
    launch(main, options.num_gpus, options.num_machines, options.machine_rank, options.dist_url, args=(options,))
