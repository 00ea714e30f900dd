"""Where the numbers and pictures of a run are written: metrics.json, TensorBoard, trackers (``tracker_*``).

To add one, write a class like ``Writer`` and add a line to WRITERS in ``scratch_det.config.choices``. Rank 0 alone has
writers. metrics.json is always written: a resumed run, curves.png and a study read it.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pkgutil import resolve_name
from queue import SimpleQueue
from threading import Thread
from typing import Any

import msgspec
from fvcore.common.config import CfgNode
from PIL import Image

from scratch_det.config.choices import WRITERS
from scratch_det.engine.run_dir import ANEW, RunDir, keep_lines
from scratch_det.errors import shortened
from scratch_det.log import logger
from scratch_det.reading import read_json

SECONDS_TO_SEND = 30.0  # at the end of a run, what a tracker has not sent yet
PROJECT = "scratch_det"  # of a tracker whose own variables name no other


@dataclass
class Run:
    """What a writer is told when the run starts or continues.

    start_iteration: completed iterations. commit: of this repository, or None.
    id: a tracker's own name of this run, None at first; what is set here is given to it when the run continues.
    """

    run_dir: RunDir
    cfg: CfgNode
    start_iteration: int
    commit: str | None = None
    id: str | None = None


class Writer:
    """One place that gets numbers and pictures, in the order in which they arise; made when the run starts.

    is_slow: it is made and called in a thread of its own, and an error becomes one warning: the training neither waits
    nor ends. Any other must return soon, and an error ends the run.
    """

    is_slow = False

    def __init__(self, run: Run): ...

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers of an iteration (0-based) by name: losses, or with a slash in the name metrics. May have NaN."""
        raise NotImplementedError

    def image(self, iteration: int, name: str, picture: bytes) -> None:
        """A PNG of an iteration; by default left out."""

    def close(self, end: str) -> None:
        """The end of this process's part of the run: "finished", "paused", "stopped" (it was asked to) or "failed"."""


class JsonLines(Writer):
    """metrics.json. Lines that an earlier start wrote for later iterations are removed."""

    def __init__(self, run: Run):
        path = run.run_dir.metrics
        keep_lines(path, path, run.start_iteration)
        self.file = open(path, "a")  # noqa: SIM115 - open for as long as the run

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """One line; NaN becomes null."""
        line = {key: None if math.isnan(value) else value for key, value in values.items()}
        self.file.write(json.dumps({"iteration": iteration, **line}, sort_keys=True) + "\n")
        self.file.flush()

    def close(self, end: str) -> None:
        self.file.close()


class TensorBoard(Writer):
    """A file of events, opened when there is something to write: the import takes 0.2 s, and iteration 1 needs none.

    Not torch's SummaryWriter: on a full disk its thread ends, and whoever adds to its queue waits for ever.
    """

    def __init__(self, run: Run):
        self.folder, self.start_iteration, self.file = run.run_dir.path / "tensorboard", run.start_iteration, None

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._add(iteration, [{"tag": key, "simple_value": value} for key, value in values.items()])

    def image(self, iteration: int, name: str, picture: bytes) -> None:
        width, height = Image.open(BytesIO(picture)).size
        self._add(
            iteration, [{"tag": name, "image": {"width": width, "height": height, "encoded_image_string": picture}}]
        )

    def close(self, end: str) -> None:
        if self.file:
            self.file.close()

    def _add(self, iteration: int, values: list[dict[str, Any]]) -> None:
        try:
            self.file = self.file or self._open()
            _add_event(self.file, step=iteration, summary={"value": values})
        except OSError as error:  # the next line begins another file: half a record ends this one
            self.file, self.start_iteration = None, iteration
            logger.warning(f"TensorBoard misses iteration {iteration} ({error.strerror}); metrics.json has its numbers")

    def _open(self) -> Any:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}"
        file = RecordWriter(open(self.folder / name, "wb"))  # noqa: SIM115
        _add_event(file, file_version="brain.Event:2")
        _add_event(file, step=self.start_iteration, session_log={"status": "START"})  # hides later steps of old files
        return file


def _add_event(file: Any, **content: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    file.write(Event(wall_time=time.time(), **content).SerializeToString())
    file.flush()


class Sent(msgspec.Struct):
    """NAME.json of a tracker in the run folder: its id of the run, and the last iteration it has of each kind."""

    id: str | None = None
    last: dict[str, int] = {}


class InThread(Writer):
    """The slow writer ``make`` in a thread of its own; a run that continues sends nothing twice.

    ``make`` has imported its library before: a data loading worker that is forked during an import may wait for it.
    """

    def __init__(self, name: str, make: Callable[[Run], Writer], run: Run):
        self.name, self.run, self.record, self.end = name, run, run.run_dir.path / f"{name}.json", ""
        # at iteration 0 a record is of a start that came to no checkpoint
        sent = read_json(self.record, Sent, ANEW) if run.start_iteration and self.record.exists() else {}
        run.id, self.last = sent.get("id"), sent.get("last", {})
        Image.init()  # imports what both the thread and the workers need
        self.calls: SimpleQueue[Any] = SimpleQueue()
        self.thread = Thread(target=self._work, args=(make,), daemon=True)  # a network that hangs ends with the run
        self.thread.start()

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        kind = max(values)  # one name stands for those that come together: losses, the metrics of an evaluation
        self._put(kind, iteration, "scalars", {key: value for key, value in values.items() if math.isfinite(value)})

    def image(self, iteration: int, name: str, picture: bytes) -> None:
        self._put(name, iteration, "image", name, picture)

    def close(self, end: str) -> None:
        self.end = end
        self.calls.put(None)
        self.thread.join(SECONDS_TO_SEND)
        if self.thread.is_alive():
            logger.warning(f"{self.name} has not taken everything in {SECONDS_TO_SEND:.0f} s; metrics.json has it")

    def _put(self, *call: Any) -> None:
        if self.thread.is_alive():
            self.calls.put(call)

    def _work(self, make: Callable[[Run], Writer]) -> None:
        try:
            writer = make(self.run)
            for kind, iteration, method, *arguments in iter(self.calls.get, None):
                if iteration > self.last.get(kind, -1):
                    getattr(writer, method)(iteration, *arguments)
                    self.last[kind] = iteration
                    self.run.run_dir.write_json(self.record.name, {"id": self.run.id, "last": self.last})
            writer.close(self.end)
        except Exception as error:
            reason = shortened(f"{type(error).__name__}: {error}".splitlines()[0])
            logger.warning(f"{self.name} has failed ({reason}); the run goes on without it, metrics.json has all of it")


def start_writers(run: Run) -> list[Writer]:
    """metrics.json and the recipe's WRITERS, on rank 0; no writers elsewhere."""
    if not run.run_dir.writes:
        return []
    writers: list[Writer] = [JsonLines(run)]
    for name in run.cfg.WRITERS:
        kind, own = resolve_name(WRITERS[name].function), replace(run)
        writers.append(InThread(name, kind, own) if kind.is_slow else kind(own))
    return writers
