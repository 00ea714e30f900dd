"""Which image is trained at which position, and with which random numbers: a function of (seed, position) alone.

Nothing here has state. A resumed run, a run with other workers or another number of processes, and a run with another
schedule length all see the same image with the same augmentation at the same position.
"""

import numpy as np

GROUP_SIZE = 2  # images that share an orientation; the paper's 2 images per GPU, whatever this run's split
ORDER, AUGMENTATION = 0, 1  # what a random generator is for; keeps their streams apart


class Stream:
    """An endless sequence of image indices; each pass over the data (epoch) is its own permutation.

    Args:
        seed: non-negative.
        num_images: images per epoch, at least 1.
        portrait: bool [num_images]; when given, positions 2k and 2k+1 hold images of one orientation wherever an epoch
            allows it (detectron2's DATALOADER.ASPECT_RATIO_GROUPING, without its buffers).
    """

    def __init__(self, seed: int, num_images: int, portrait: np.ndarray | None = None):
        if seed < 0 or num_images < 1:
            raise ValueError(f"seed {seed} and num_images {num_images}: expected seed >= 0 and at least one image")
        self.seed, self.num_images, self.portrait = seed, num_images, portrait
        self._cached = -1, np.empty(0, int)  # the last epoch asked for and its order

    def index(self, position: int) -> int:
        """Index of the image at a global position (0-based count of images since the start of training)."""
        epoch, offset = divmod(position, self.num_images)
        if self._cached[0] != epoch:
            self._cached = epoch, self._shuffle(epoch)
        return int(self._cached[1][offset])

    def rng(self, position: int) -> np.random.Generator:
        """The random numbers for the augmentation of the image at a global position."""
        return np.random.default_rng([self.seed, AUGMENTATION, position])

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, ORDER, epoch])
        order = rng.permutation(self.num_images)
        if self.portrait is None:
            return order
        return _pair_up(order, self.portrait[order], rng, starts_odd=(epoch * self.num_images) % GROUP_SIZE == 1)


def _pair_up(order: np.ndarray, portrait: np.ndarray, rng: np.random.Generator, starts_odd: bool) -> np.ndarray:
    """Reorder one epoch so that its pairs, counted from even global positions, share an orientation.

    What cannot be paired goes to the epoch's ends: one image when their number is odd (at the start where that cuts a
    pair anyway), two of different orientation or none when it is even.
    """
    pairs, left_over = [], []
    for group in (order[portrait], order[~portrait]):
        whole = len(group) // GROUP_SIZE * GROUP_SIZE
        pairs.append(group[:whole].reshape(-1, GROUP_SIZE))
        left_over.extend(group[whole:])
    shuffled = rng.permutation(np.concatenate(pairs))
    head, tail = (left_over[:1], left_over[1:]) if starts_odd else ([], left_over)
    return np.concatenate([np.array(head, order.dtype), shuffled.reshape(-1), np.array(tail, order.dtype)])
