"""COCO's compressed RLE as text. Needs no torch."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

COMPRESSED = re.compile(rb"([P-o]{0,11}[0-O])+")  # numbers of at most 60 bits


def run_lengths(texts: Sequence[str | bytes]) -> list[list[int]]:
    """The counts of compressed RLEs; [-1] for a text that is none.

    A text holds little-endian numbers of 5 bits a character, the sixth bit of all but the last. The last one's fifth
    bit is the sign; from the fourth on, numbers are differences to the one before the last (pycocotools' rleFrString).
    """
    written = [text.encode(errors="surrogatepass") if isinstance(text, str) else text for text in texts]
    sound = [text if COMPRESSED.fullmatch(text) else b"" for text in written]
    codes = np.frombuffer(b"".join(sound), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    bounds = np.searchsorted(ends, np.cumsum([0, *map(len, sound)]))  # the first number of each text
    starts = np.concatenate([[0], ends + 1])[: len(ends)]
    characters = ends + 1 - starts
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, characters))
    numbers = np.add.reduceat((codes & 31) << shifts, starts) if len(ends) else ends
    numbers -= (codes[ends] >> 4 & 1) << 5 * characters
    place = np.arange(len(ends)) - np.repeat(bounds[:-1], np.diff(bounds))
    for begin in (1, 2):  # every second number is a sum of differences from here on
        chosen = np.flatnonzero((place >= begin) & (place % 2 == begin % 2))
        total, begins = numbers[chosen].cumsum(), np.flatnonzero(place[chosen] == begin)
        earlier = total[begins] - numbers[chosen][begins]  # the sum over the texts before
        numbers[chosen] = total - np.repeat(earlier, np.diff([*begins, len(chosen)]))
    values = numbers.tolist()
    return [values[a:b] or [-1] for a, b in pairwise(bounds.tolist())]
