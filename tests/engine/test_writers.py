"""Where numbers and pictures go: the trackers' own libraries, without a network, and one that fails."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import restored_registries
from run_folder import NO_TEST, interrupted_after, lines, read, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scratch_det.config import choices
from scratch_det.engine import loop, writers
from scratch_det.engine.writers import Writer

Train = Callable[..., Path]
KEYS = ("SOLVER.MAX_ITER", 6, "SEED", 1)
TRACKED = (*KEYS, "TEST.EVAL_PERIOD", 3, "VIS_PERIOD", 2, "WRITERS", ["tensorboard", "wandb", "mlflow"])


class Broken(Writer):
    is_slow = True

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("no network\nsecond line")


class Hanging(Writer):
    is_slow = True

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        threading.Event().wait()


class Ended(Writer):
    ends: ClassVar[list[str]] = []

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self, end: str) -> None:
        self.ends.append(end)


def steps(folder: Path) -> dict[str, list[int]]:
    """What TensorBoard has of some curves and pictures."""
    found = EventAccumulator(str(folder / "tensorboard"), {"images": 0}).Reload()
    curves = {name: [one.step for one in found.Scalars(name)] for name in ("total_loss", "bbox/AP")}
    return curves | {name: [one.step for one in found.Images(name)] for name in ("training", "predictions")}


def test_a_resumed_run_goes_on_in_its_trackers(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent twice, and neither trackers nor pictures change the training."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(loop, "PERIOD", 1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, interrupted_after(monkeypatch, 5):
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")  # forgotten when it goes on
        train(*TRACKED)
    begun = read(tmp_path / "run", "wandb.json")
    assert mlflow.MlflowClient().get_run(read(tmp_path / "run", "mlflow.json")["id"]).info.status == "KILLED"
    assert begun["last"] == {"total_loss": 4, "segm/APs": 2, "training": 4, "predictions": 2}
    folder = train(*TRACKED, resume=True)
    assert "3 of 6 iterations are done" in (folder / "log.txt").read_text()
    ours, plain = weights(folder), weights(train(*KEYS, *NO_TEST, name="plain"))
    assert all(ours[key].equal(plain[key]) for key in plain)
    assert steps(folder) == {
        "total_loss": [0, 1, 2, 3, 4, 5], "bbox/AP": [2, 6], "training": [0, 2, 4], "predictions": [2, 6],
    }  # fmt: skip

    client = mlflow.MlflowClient()
    number = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([number])
    assert run.info.status == "FINISHED"
    assert run.data.params["SOLVER.MAX_ITER"] == "6"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    losses = client.get_metric_history(run.info.run_id, "total_loss")
    assert {one.step: one.value for one in losses} == {i: lines_of(folder)[i]["total_loss"] for i in range(6)}
    assert len(losses) == 6
    assert [one.step for one in client.get_metric_history(run.info.run_id, "bbox/AP")] == [2, 6]
    assert run.data.metrics["bbox/AP"] == pytest.approx(read(folder, "result.json")["metrics"]["bbox"]["AP"])
    pictures = [one.path for one in client.list_artifacts(run.info.run_id, "images") if one.path.endswith("png")]
    assert sorted(path.split("+timestamp")[0] for path in pictures) == [
        "images/predictions+step+2", "images/predictions+step+6",
        *(f"images/training+step+{i}" for i in (0, 2, 4)),
    ]  # fmt: skip

    ended = read(folder, "wandb.json")
    assert ended["id"] == begun["id"] != ""
    assert ended["last"] == {"total_loss": 5, "segm/APs": 6, "training": 4, "predictions": 6}
    parts = sorted((folder / "wandb").glob(f"offline-run-*/run-{begun['id']}.wandb"))
    assert len(parts) == 2  # of one run, for `wandb sync`
    history = [line for part in parts for line in wandb_history(part)]
    for name, expected in steps(folder).items():
        assert [line["iteration"] for line in history if any(key.startswith(name) for key in line)] == expected
    assert len([*folder.glob("wandb/offline*/files/media/images/*.png")]) == 5


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What a .wandb file logs: records in LevelDB's format of logs, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, [], []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no header fits into the rest of the block
            at += 2**15 - at % 2**15
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(b"".join(parts)), []
            items = record.history.item
            found += [{one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in items}] * bool(items)
    return found


def lines_of(folder: Path) -> dict[int, dict[str, float]]:
    return {line["iteration"]: line for line in lines(folder) if "total_loss" in line}


@pytest.mark.parametrize(
    ("writer", "said"), [("Broken", r"Broken has failed (ConnectionError: no network); the run goes on without it"),
                         ("Hanging", "Hanging has not taken everything in 0 s")],
)  # fmt: skip
def test_a_tracker_that_does_not_work(writer: str, said: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and the run is the same."""
    monkeypatch.setattr(loop, "PERIOD", 1)
    monkeypatch.setattr(writers, "SECONDS_TO_SEND", 0.1)
    with restored_registries():
        choices.WRITERS[writer] = choices.Choice(f"{__name__}:{writer}")
        folder = train(*NO_TEST, "SOLVER.MAX_ITER", 4, "WRITERS", [writer])
    assert [line["iteration"] for line in lines(folder)] == [0, 1, 2, 3]
    log = (folder / "log.txt").read_text()
    assert log.count(writer) == 1
    assert said in log
    assert not (folder / "tensorboard").exists()


def test_how_a_run_ends(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*NO_TEST, "SOLVER.MAX_ITER", 4, "WRITERS", ["Ended"])
    with restored_registries():
        choices.WRITERS["Ended"] = choices.Choice(f"{__name__}:Ended")
        train(*keys, stop_at=2)
        with interrupted_after(monkeypatch, 1):
            train(*keys, resume=True)
        train(*keys, resume=True)
    assert Ended.ends == ["paused", "stopped", "finished"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("['wandb']", "WRITERS is ['wandb'], but wandb is not installed: pip install 'scratch_det[wandb]'"),
        ("['wandb', 'wandb']", "WRITERS is ['wandb', 'wandb'], expected each name once"),
        ("['wandbs']", "WRITERS is 'wandbs', expected 'tensorboard' or 'wandb' or 'mlflow'; did you mean 'wandb'?"),
        ("wandb", """WRITERS is 'wandb' (str), expected list such as ['tensorboard']: write "['wandb']\""""),
    ],
)
def test_what_is_rejected(given: str, said: str, rejected: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "find_spec", lambda _: None)
    assert said in rejected("WRITERS", given)
