"""detectron2's own plain training script on a config of this repository, as anybody else would run it."""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import detectron2
from detectron2.data import DatasetCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import Sampler

from scratch_det.backends.detectron2.model import stock_cfg
from scratch_det.data.catalog import lookup
from scratch_det.errors import UserError

SCRIPT = Path("tools/plain_train_net.py")


def find_script(path: Path | None) -> Path:
    """``path``, or the script in the checkout that detectron2 was installed from. Raises UserError for neither."""
    script = path or Path(detectron2.__file__).parents[1] / SCRIPT
    if not script.is_file():
        raise UserError(
            f"detectron2's script {script} is missing, it is not part of the installed package; "
            f"give its path in a checkout of detectron2: --script PATH/{SCRIPT}"
        )
    return script


def train_plainly(
    cfg: CfgNode, model: nn.Module, script: Path, image_ids: Iterable[int], gate: Callable[[Iterable], Iterator]
) -> None:
    """Run the script's ``do_train``: its loader, mapper, optimizer, schedule, writers and checkpoints.

    image_ids: of the images in the order to train them in, endless, so that two ways to train can be compared.
    gate: passes the loader's batches on, each when it is time for it.
    """
    spec: Any = spec_from_file_location("plain_train_net", script)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    stock = stock_cfg(cfg, device=cfg.MODEL.DEVICE)
    stock.DATALOADER.ASPECT_RATIO_GROUPING = False  # the order is given
    for name in stock.DATASETS.TRAIN:
        if name not in DatasetCatalog.list():
            entry = lookup(name)
            register_coco_instances(name, {}, str(entry.json_file), str(entry.image_root))

    def loader(stock: CfgNode) -> Iterator[Any]:
        records = get_detection_dataset_dicts(
            stock.DATASETS.TRAIN, filter_empty=stock.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        places = {record["image_id"]: place for place, record in enumerate(records)}
        return gate(build_detection_train_loader(stock, dataset=records, sampler=_Order(places, image_ids)))

    module.build_detection_train_loader = loader
    module.do_train(stock, model)


class _Order(Sampler):
    def __init__(self, places: dict[int, int], image_ids: Iterable[int]):
        self.places, self.image_ids = places, image_ids

    def __iter__(self) -> Iterator[int]:
        return (self.places[image_id] for image_id in self.image_ids)
