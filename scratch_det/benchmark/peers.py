"""detectron2 as anybody else would run it: the peer of a benchmark. Imports detectron2."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from scratch_det.backends.detectron2 import register_backbones, stock_cfg
from scratch_det.benchmark.loops import wait_for_gpu
from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.detectron2_catalog import register_data_sets
from scratch_det.distributed.devices import pick_device
from scratch_det.errors import UserError

PLAIN_SCRIPT = Path("tools/plain_train_net.py")


def first_batch(config_file: str, overrides: list[str]) -> Any:
    """To the first batch of a recipe; returns what stays in memory."""
    cfg = load_config(config_file, overrides).cfg
    entry = lookup(cfg.DATASETS.TRAIN[0])
    register_coco_instances(entry.name, {}, str(entry.json_file), str(entry.image_root))
    loader = build_detection_train_loader(stock_cfg(cfg, device="cpu"))
    batches = iter(loader)
    next(batches)
    return loader, batches


class MappedData:
    """detectron2's training samples of a config's data, by image id.

    mask_format: "polygon" or "bitmask"; None for the config's.
    """

    def __init__(self, cfg: CfgNode, mask_format: str | None = None):
        self.stock = stock_cfg(cfg, device=cfg.MODEL.DEVICE)
        self.stock.INPUT.MASK_FORMAT = mask_format or cfg.INPUT.MASK_FORMAT
        register_data_sets(self.stock.DATASETS.TRAIN)
        filters = self.stock.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        self.records = get_detection_dataset_dicts(self.stock.DATASETS.TRAIN, filter_empty=filters)
        self.places = {record["image_id"]: place for place, record in enumerate(self.records)}
        self.mapper = DatasetMapper(self.stock, is_train=True)

    def __getitem__(self, image_id: int) -> dict[str, Any]:
        return self.mapper(self.records[self.places[image_id]])

    def batches(self, **keywords: Any) -> Iterator[list[dict[str, Any]]]:
        """Of detectron2's own training loader, endless."""
        return iter(build_detection_train_loader(self.stock, dataset=self.records, **keywords))


def model_steps(cfg: CfgNode, device: torch.device, batches: list[list[dict[str, Any]]]) -> Callable[[], None]:
    """Forward pass, backward pass and update of detectron2's own model, on the next one of ``batches`` in a circle."""
    register_backbones()
    stock, feed = stock_cfg(cfg, device=str(device)), itertools.cycle(batches)
    model = build_model(stock).train()
    optimizer = build_optimizer(stock, model)

    def step() -> None:
        with EventStorage():
            losses = model(next(feed))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        wait_for_gpu()

    return step


def find_script(path: Path | None) -> Path:
    """``path``, or the script in the checkout that detectron2 was installed from. Raises UserError for neither."""
    script = path or Path(detectron2.__file__).parents[1] / PLAIN_SCRIPT
    if not script.is_file():
        raise UserError(f"detectron2's script {script} is missing; name a checkout's: --script PATH/{PLAIN_SCRIPT}")
    return script


def train_plainly(cfg: CfgNode, script: Path, image_ids: Iterable[int], gate: Callable[[Iterable], Iterator]) -> None:
    """Run the script's ``do_train`` on detectron2's own model: its loader, mapper, optimizer, writers and so on.

    image_ids: of the images in the order to train them in, endless, so that two ways to train can be compared.
    gate: passes the loader's batches on, each when it is time for it.
    """
    spec: Any = spec_from_file_location("plain_train_net", script)
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    data = MappedData(cfg)
    data.stock.DATALOADER.ASPECT_RATIO_GROUPING = False  # the order is given
    order = _Order(data.places[image_id] for image_id in image_ids)
    module.build_detection_train_loader = lambda stock: gate(data.batches(sampler=order))
    data.stock.MODEL.DEVICE = str(pick_device(cfg.MODEL.DEVICE))
    register_backbones()
    module.do_train(data.stock, build_model(data.stock))


class _Order(Sampler):
    def __init__(self, places: Iterable[int]):
        self.places = places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)
