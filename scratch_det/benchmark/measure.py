"""What a call costs, in turns with others in this process, or in a fresh one. Needs no torch."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from scratch_det.errors import UserError

WARMUP, LEAST = 3, 3  # rounds


class Cost(NamedTuple):
    """Wall and CPU seconds; of a fresh process also MB (10^6 bytes): the peak of all, and private ones that were added.

    value: what the call returned; from a fresh process only a list or a number.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float = math.nan
    private_mb: float = math.nan
    value: Any = None


def timed(call: Callable[[], Any]) -> Cost:
    """The cost of one call in this process."""
    began = now()
    return since(began, call())


def now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def since(began: Cost, value: Any = None) -> Cost:
    """The cost of what has been done ``since`` that moment."""
    return Cost(time.perf_counter() - began.seconds, time.process_time() - began.cpu_seconds, value=value)


class Rounds(NamedTuple):
    """At most ``times``; no further one after ``seconds``, but LEAST.

    The ``warmup`` rounds before do not count; there is no further one of these after a quarter of the seconds.
    """

    times: int
    warmup: int = 0
    seconds: float = math.inf

    def turns(self) -> Iterator[tuple[bool, bool]]:
        """For each round whether it goes in reverse, as every other one, and whether it counts.

        In reverse: so that a slow moment affects all.
        """
        began, warming, number = time.perf_counter(), self.warmup, 0
        while number < self.times and (number < LEAST or time.perf_counter() - began < self.seconds):
            yield (number + warming) % 2 == 0, not warming
            number += not warming
            warming = warming and (warming - 1 if time.perf_counter() - began < self.seconds / 4 else 0)


def take_turns(
    ways: Sequence[Callable[[], Any]], rounds: Rounds, measure: Callable[[Callable[[], Any]], Any] = timed
) -> list[list[Any]]:
    """``measure`` each of ``ways`` once a round; returns what was measured, by way."""
    found: list[list[Any]] = [[] for _ in ways]
    for in_reverse, counts in rounds.turns():
        for which in reversed(range(len(ways))) if in_reverse else range(len(ways)):
            result = measure(ways[which])
            if counts:
                found[which].append(result)
    return found


def in_fresh_process(
    function: str, *arguments: Any, whole: bool = False, env: Mapping[str, str | Path] | None = None
) -> Cost:
    """Call ``module:function`` in a new interpreter with arguments that json can write; ``env`` is added to its own.

    Counted is what comes after the module's imports; or the whole process, if ``whole``. Raises UserError with the last
    line of its standard error when it fails.
    """
    request = json.dumps([function, time.time() if whole else None, arguments], default=str)
    command = [sys.executable, "-W", "ignore", "-m", __name__, request]
    added = {name: str(value) for name, value in (env or {}).items()}
    done = subprocess.run(command, env={**os.environ, **added}, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{function} in a fresh process: {reason}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """In the fresh process."""
    # Clean pages are those of files, which all processes share, although one alone has them to itself.
    name, whole_since, arguments = json.loads(sys.argv[1])
    call, before = partial(resolve_name(name), *arguments), _memory("smaps_rollup", "Private_Dirty")
    cost = timed(call)
    if whole_since is not None:
        cost = cost._replace(seconds=time.time() - whole_since, cpu_seconds=time.process_time())
    added = _memory("smaps_rollup", "Private_Dirty") - before
    result = cost.value if isinstance(cost.value, list | float) else None
    print("\n" + json.dumps(cost._replace(peak_mb=_memory("status", "VmHWM"), private_mb=added, value=result)))


def _memory(file: str, name: str) -> float:
    """MB in the lines of /proc/self/``file`` that begin with ``name``; nan where there is none (not on Linux)."""
    path = Path("/proc/self", file)
    lines = path.read_text().splitlines() if path.exists() else ["nan nan"]
    return sum(float(line.split()[1]) for line in lines if line.startswith((name, "nan"))) * 1024 / 1e6


if __name__ == "__main__":
    main()
