"""Reading a run folder in tests, and damaging it."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from scratch_det.command_line import explained
from scratch_det.data.packed import FOLDER
from scratch_det.engine.checkpointer import read_checkpoint
from scratch_det.engine.loop import Trainer
from scratch_det.weights.networks import tensors_by_name

CLOCK = {"time", "data_time", "eta_seconds"}
NO_TEST = ("DATASETS.TEST", "()")  # only the weights matter


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=reject_constant) for line in (folder / "metrics.json").read_text().splitlines()
    ]


def reject_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(), parse_constant=reject_constant)


def weights(folder: Path, name: str = "model_final.pth") -> dict[str, Tensor]:
    return read_checkpoint(folder / "checkpoints" / name)["model"]


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in CLOCK}


def is_same(folder: Path, other: Path) -> bool:
    """Whether final weights, averages too, are bitwise equal and metrics.json has the same lines but for the clock."""
    ours, theirs = ({name: value for name, value in tensors_by_name(read_checkpoint(path / "model_final.pth")).items()
                     if name.startswith("model")} for path in (folder, other))  # fmt: skip
    same_weights = ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
    return same_weights and [*map(without_clock, lines(folder))] == [*map(without_clock, lines(other))]


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[None]:
    """The run of this block has to die, and does so in the iteration that follows ``steps`` complete ones."""
    calls = iter(range(steps))

    def step(*arguments: Any) -> tuple[dict[str, float], bool]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    original = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            yield


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every path below ``folder``, packed data sets left out; files with their bytes."""
    paths = [path for path in folder.rglob("*") if FOLDER not in path.parts]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {  # None: a folder is there instead
    "empty": lambda _: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "noise": lambda content: random.Random(0).randbytes(len(content)),
    "another type": lambda _: b"[1]",
    "null": lambda _: b"null",
    "no keys": lambda _: b"{}",
    "null keys": lambda content: nulls(content),
    "a folder": lambda _: None,
}


def nulls(content: bytes) -> bytes:
    """The first object with null for each value; of YAML the first section."""
    if content.startswith(b"{"):
        return json.dumps(dict.fromkeys(json.JSONDecoder().raw_decode(content.decode())[0])).encode()
    return b"SOLVER: {MAX_ITER: null}\nSEED: null\n"


def damage(path: Path, kind: str) -> None:
    """One of DAMAGES to the file at ``path``."""
    content = DAMAGES[kind](path.read_bytes())
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


def attempt(action: Callable[[], object]) -> str:
    """The message of what a user can mend; empty where all is well."""
    try:
        action()
    except Exception as error:  # what the net would catch
        return explained(error) or f"UNEXPECTED {type(error).__name__}: {error}"
    return ""
