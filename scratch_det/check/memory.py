"""The memory section: what annotations and batches take beside what this machine has left."""

from fvcore.common.config import CfgNode

from scratch_det.check import machine
from scratch_det.check.data import Data
from scratch_det.check.report import Section
from scratch_det.train.disk import size

PREFETCHED = 2  # batches that a worker holds ready: PyTorch's default


def check_memory(section: Section, cfg: CfgNode, data: Data, num_gpus: int, share: int, available: int | None) -> None:
    """Compare memory and shared memory with what ``num_gpus`` processes of this machine need.

    share: images that a process works on at a time. available: bytes before the data sets were read. The figures are
    estimates, so that too little is a notice and no error.
    """
    peak, packed = machine.peak_memory(), data.packed_bytes()
    processes = f"{num_gpus} processes, each " if num_gpus > 1 else ""
    left = f"; {size(available)} are available here" if available else ""
    section.add(
        f"{processes}{size(peak)} while the annotations are read, then {size(packed)} for them{left}",
        peak_bytes=peak,
        packed_bytes=packed,
        available_bytes=available,
    )
    if available and num_gpus * peak > available:
        section.problem(
            "notice",
            f"{num_gpus} x {size(peak)} are more than is available: get more memory, or start fewer processes here",
        )
    batches, free = num_gpus * cfg.DATALOADER.NUM_WORKERS * PREFETCHED, machine.free_shared_memory()
    if not batches or free is None:
        return
    needed = batches * share * image_bytes(cfg, data)
    section.add(
        f"/dev/shm: about {size(needed)} for the {batches} batches of {share} images that workers hold ready; "
        f"{size(free)} are free here",
        shared_bytes=needed,
        shared_free_bytes=free,
    )
    if needed > free:
        section.problem(
            "notice",
            "/dev/shm may be too small: lower DATALOADER.NUM_WORKERS, or give a container more (docker run --shm-size)",
        )


def image_bytes(cfg: CfgNode, data: Data) -> int:
    """About the bytes of one training image of the largest size with a mask for each object, at their mean number."""
    counts = data.objects(cfg) or [0]
    masks = sum(counts) / len(counts) if cfg.MODEL.MASK_ON else 0
    return round(max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN * (3 + masks))
