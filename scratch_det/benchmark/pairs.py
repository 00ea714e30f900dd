"""Two ways to do the same work, timed pair by pair in one process, so that a slow moment of the machine hits both."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from scratch_det.engine.plan import Plan, Request, make_plan
from scratch_det.errors import UserError

WARMUP = 3  # pairs


@dataclass(frozen=True)
class Pairs:
    """Seconds of both ways, pair by pair."""

    first: list[float]
    second: list[float]

    def overhead(self) -> float:
        """Median over the pairs of first / second - 1, in percent."""
        return 100 * (statistics.median(a / b for a, b in zip(self.first, self.second, strict=True)) - 1)

    def as_text(self, first: str, second: str) -> str:
        """Both medians with their quartiles, and the overhead."""
        lines = [f"{len(self.first)} pairs, median (quartiles) in ms"]
        for name, seconds in ((first, self.first), (second, self.second)):
            low, middle, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
            lines.append(f"  {name:<40} {middle:8.2f} ({low:.2f} - {high:.2f})")
        lines.append(f"  {'overhead, median over the pairs':<40} {self.overhead():+8.2f} %")
        return "\n".join(lines)


def time_pairs(first: Callable[[], object], second: Callable[[], object], pairs: int) -> Pairs:
    """Call both ``pairs`` times, taking turns in who begins; WARMUP pairs before do not count."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(-WARMUP, pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (first, second)[which]()
            if number >= 0:
                times[which].append(time.perf_counter() - began)
    return Pairs(*times)


def in_both_orders(time_half: Callable[[int, bool], Pairs], pairs: int) -> Pairs:
    """Time ``pairs`` in two halves: ``time_half(number, first_is_set_up_first)``.

    Of two equal ways in one process the one that was set up first has been up to 3 % slower.
    """
    one, other = time_half(pairs - pairs // 2, True), time_half(pairs // 2, False)
    return Pairs(one.first + other.first, one.second + other.second)


def plan_training(config_file: str, overrides: list[str], pairs: int, backend: str) -> Plan:
    """The plan of a training on one process, with a seed. Raises UserError for errors as a run does, and for few pairs.

    The recipe's folder and test sets do not matter: nothing is written there, and nothing is evaluated.
    """
    if pairs < 2:
        raise UserError(f"--pairs is {pairs}, expected 2 or more: a median of fewer says nothing")
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, "DATASETS.TEST", "()", "OUTPUT_DIR", folder]
        plan = make_plan(Request(config_file, words, backend))
    plan.cfg.SEED = max(plan.cfg.SEED, 0)
    return plan
