"""detectron2's own DefaultTrainer on configs of this repository: its loop, hooks, evaluators and checkpoints."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.backends.detectron2 import register, stock_cfg
from scratch_det.command_line import LOADED, exit_on_user_error, load_project
from scratch_det.weights.load import load_weights


class Trainer(DefaultTrainer):
    """detectron2's trainer with its evaluators; this repository reads the weights, so that no part stays random."""

    @classmethod
    def load(cls, cfg: CfgNode, model: nn.Module, to_evaluate: bool = False) -> None:
        """Fill ``model`` from MODEL.WEIGHTS, where there are any."""
        file = cfg.MODEL.WEIGHTS
        loaded = load_weights(model, file, "detectron2", cfg, to_evaluate=to_evaluate) if file else "random weights"
        logging.getLogger("detectron2.trainer").info(loaded)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "inference") -> Any:
        """VOC's for detectron2's own PASCAL VOC sets, else COCO's."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        out = f"{cfg.OUTPUT_DIR}/{folder}"
        return COCOEvaluator(dataset_name, output_dir=out, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)

    def build_hooks(self) -> list[Any]:
        """detectron2's, and an evaluation with test-time augmentation of the final weights where it is on."""
        built = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            augmented = hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
            # On rank 0 the last hook writes metrics.json and closes it; other ranks have none.
            built.insert(len(built) - comm.is_main_process(), augmented)
        return built

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with detectron2's test-time augmentation; the names of its tasks end in _TTA."""
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        found = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{task}_TTA": values for task, values in found.items()}


def run(cfg: CfgNode, args: Namespace, projects: list[str]) -> None:
    """Train or evaluate with ``args.num_gpus`` processes; ``cfg`` has passed ``check_config``."""
    several = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch(_train, *several, args=(cfg, args, projects))


def _train(cfg: CfgNode, args: Namespace, projects: list[str]) -> dict[str, Any] | None:
    with exit_on_user_error():
        for folder in (Path(word) for word in projects):
            if folder.resolve() not in LOADED:  # so in a new process; DatasetCatalog takes no name twice
                load_project(folder)
        names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        register(names)
        cfg = stock_cfg(cfg, cfg.MODEL.DEVICE)
        DatasetCatalog.get(names[0])  # the data decide on the number of classes and keypoints
        cfg.DATASETS.CLASS_NAMES = list(MetadataCatalog.get(names[0]).thing_classes)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(cfg.DATASETS.CLASS_NAMES)
        if cfg.MODEL.KEYPOINT_ON:
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(MetadataCatalog.get(names[0]).keypoint_names)
        cfg.freeze()
        default_setup(cfg, args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            Trainer.load(cfg, model, to_evaluate=True)
            results = Trainer.test(cfg, model)
            return results | (Trainer.test_with_tta(cfg, model) if cfg.TEST.AUG.ENABLED else {})
        trainer: Any = Trainer(cfg)
        if args.resume and trainer.checkpointer.has_checkpoint():
            trainer.resume_or_load()
        else:
            trainer.load(cfg, getattr(trainer.model, "module", trainer.model))
    return trainer.train()
