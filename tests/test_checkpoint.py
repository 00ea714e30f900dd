"""Checkpoints: one file, the folder of a run through crashes, damage and a full disk, and the space they take."""

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from shutil import disk_usage
from typing import Any

import pytest
import torch

from scratch_det.engine import checkpointer
from scratch_det.engine.checkpointer import (
    Checkpointer,
    checkpoint_name,
    damage,
    read_checkpoint,
    write_synced,
)
from scratch_det.engine.run_dir import check_free_space, checkpoint_bytes, free_bytes, most_checkpoints
from scratch_det.errors import UserError
from scratch_det.files import sha256_of
from scratch_det.log import logger

NUMBERS = 10_000
PREFIX = 16  # bytes written before a crash


class Killed(BaseException):
    """Stands for kill -9: nothing in the package handles it."""


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def state(completed: int) -> dict[str, Any]:
    """As the loop's: every number of the weights is ``completed``."""
    return {"model": {"weight": torch.full((NUMBERS,), float(completed))}, "iteration": completed - 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """``warnings()`` is what the project's log said in this test."""
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger.name)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def fill(folder: Path, *completed: int, **options: Any) -> Checkpointer:
    kept = Checkpointer(folder, **options)
    for number in completed:
        kept.save(state(number), number)
    return kept


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pth*")}


def regular(*completed: int) -> set[str]:
    return {checkpoint_name(number - 1) for number in completed}


def completed_in(path: Path | None) -> int:
    """The iterations behind an undamaged checkpoint, by its content."""
    assert path is not None
    weight = read_checkpoint(path)["model"]["weight"]
    assert weight.unique().numel() == 1
    return int(weight[0])


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit; half-way through the file there are weights."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: NUMBERS // 2])


class TestFile:
    def test_names_are_detectron2s(self) -> None:
        assert checkpoint_name(499) == "model_0000499.pth"
        assert (checkpointer.FINAL, checkpointer.BEST) == ("model_final.pth", "model_best.pth")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of a damaged file
    @pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
    def test_code_in_a_checkpoint_is_not_run(self, write: Callable, tmp_path: Path) -> None:
        write({"model": Bomb(tmp_path / "exploded")}, tmp_path / "evil.pth")
        with pytest.raises(UserError, match=r"evil\.pth is damaged or not a PyTorch file"):
            read_checkpoint(tmp_path / "evil.pth")
        assert damage(tmp_path / "evil.pth")
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off", b"<html>404</html>"])
    def test_garbage(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.pth is damaged or not a PyTorch file"):
            read_checkpoint(tmp_path / "weights.pth")

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(state(1), path)
        truncate(path)
        with pytest.raises(UserError, match=r"weights\.pth is damaged"):
            read_checkpoint(path)

    def test_not_a_dictionary(self, tmp_path: Path) -> None:
        torch.save(torch.zeros(2), tmp_path / "tensor.pth")
        with pytest.raises(UserError, match=r"tensor\.pth holds a Tensor"):
            read_checkpoint(tmp_path / "tensor.pth")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"absent\.pth is missing"):
            read_checkpoint(tmp_path / "absent.pth")

    def test_detectron2s_place_is_understood(self, folder: Path) -> None:
        """Its users look for OUTPUT_DIR/model_final.pth."""
        Checkpointer(folder).save(state(7), 7, final=True)
        assert read_checkpoint(folder.parent / "model_final.pth")["iteration"] == 6

    @pytest.mark.parametrize("known", [True, False], ids=["SHA-256", "CRC-32"])
    def test_damage(self, known: bool, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        digests = [write_synced(path, state(3))]
        assert digests == [hashlib.sha256(path.read_bytes()).hexdigest()]
        digests *= known
        assert damage(path, digests) is None
        flip(path)
        assert str(damage(path, digests)).endswith("not the recorded one" if known else "data/0 is wrong")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of a damaged file
    def test_damage_never_passes_for_another_error(self, tmp_path: Path) -> None:
        """A sample of the bytes, and every one of the last 600, where the archive keeps its sizes and checksums."""
        path = tmp_path / "model.pth"
        digest = write_synced(path, state(3))
        content = path.read_bytes()
        for place in [*range(0, len(content) - 600, 97), *range(len(content) - 600, len(content))]:
            path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
            assert damage(path, [digest])
            damage(path)  # finds nearly all; here, raises nothing


class TestSave:
    def test_folder(self, folder: Path) -> None:
        kept = Checkpointer(folder, keep_at=[500])
        assert not folder.parent.exists()
        assert kept.save(state(500), 500) == folder / "model_0000499.pth"
        assert kept.save(state(700), 700, final=True) == folder / "model_final.pth"
        assert {path.name for path in folder.iterdir()} == {
            "model_0000499.pth", "model_final.pth", "last_checkpoint", "index.json",
        }  # fmt: skip
        assert (folder / "last_checkpoint").read_text() == "model_final.pth"
        digests = {name: [sha256_of(folder / name)] for name in ("model_0000499.pth", "model_final.pth")}
        assert json.loads((folder / "index.json").read_text()) == {"keep_at": [500], "sha256": digests}
        assert completed_in(folder / "model_0000499.pth") == 500

    def test_order_on_the_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Content, checksum, name; then the pointer; the old ones last."""
        events = []

        def rename(source: Path, path: Path) -> None:
            events.append(path.name)
            original_rename(source, path)

        def delete(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                events.append(f"delete {path.name}")
            original_delete(path, missing_ok)

        kept = fill(folder, 1, keep_last=1)
        original_rename, original_delete = os.replace, Path.unlink
        monkeypatch.setattr(os, "fsync", lambda file: events.append("flush"))
        monkeypatch.setattr(os, "replace", rename)
        monkeypatch.setattr(Path, "unlink", delete)
        kept.save(state(2), 2)
        assert events == [
            "flush", "flush", "index.json", "model_0000001.pth", "flush", "flush", "last_checkpoint",
            "delete model_0000000.pth",
        ]  # fmt: skip

    def test_saving_again_replaces_the_content(self, folder: Path) -> None:
        kept = fill(folder, 1)
        kept.save({**state(1), "seconds": 2.0}, 1)
        assert read_checkpoint(folder / checkpoint_name(0))["seconds"] == 2.0
        assert Checkpointer(folder).newest_valid() == folder / checkpoint_name(0)

    def test_dying_at_any_step_leaves_a_complete_checkpoint(self, tmp_path: Path) -> None:
        """The process is killed before and after each change on the disk, in turn, until it comes through."""
        for step in count():
            folder = tmp_path / str(step)
            fill(folder, 1, 2, keep_last=2)
            with dying_at(step) as survived:
                fill(folder, 3, keep_last=2, keep_at=[1])
            kept = Checkpointer(folder, keep_last=2)
            found = completed_in(kept.newest_valid())
            assert found in (2, 3)
            kept.save(state(found + 1), found + 1)  # what the crash left is no obstacle
            assert completed_in(kept.newest_valid()) == found + 1
            assert not list(folder.glob("*.partial"))
            if survived:
                break
        assert step > 14
        assert names(folder) == regular(1, 3, 4)

    def test_dying_while_a_damaged_checkpoint_is_replaced(self, tmp_path: Path) -> None:
        """The run has gone back to 2 and comes to 3 again: the new file is never taken for the damaged one."""
        for step in count():
            folder = tmp_path / str(step)
            fill(folder, 1, 2, 3)
            flip(folder / checkpoint_name(2))
            kept = Checkpointer(folder)
            assert completed_in(kept.newest_valid()) == 2
            with dying_at(step) as survived:
                kept.save(state(3), 3)
            renamed = damage(folder / checkpoint_name(2)) is None
            assert completed_in(Checkpointer(folder).newest_valid()) == (3 if renamed else 2)
            if survived:
                break
        assert renamed

    def test_dying_while_the_final_one_is_replaced(self, tmp_path: Path) -> None:
        """A run of 2 iterations was continued to 4."""
        for step in count():
            folder = tmp_path / str(step)
            Checkpointer(folder).save(state(2), 2, final=True)
            kept = fill(folder, 3)
            with dying_at(step) as survived:
                kept.save(state(4), 4, final=True)
            assert completed_in(Checkpointer(folder).newest_valid()) in (3, 4)
            if survived:
                break
        assert completed_in(Checkpointer(folder).newest_valid()) == 4

    def test_dying_while_the_best_one_is_replaced(self, tmp_path: Path) -> None:
        """Never a better AP than that of the file, and never a file that is not complete."""
        for step in count():
            folder = tmp_path / str(step)
            kept = fill(folder, 1)
            kept.save_best(state(1), 10.0, 1)
            kept.save(state(2), 2)
            with dying_at(step) as survived:
                kept.save_best(state(2), 20.0, 2)
            number = completed_in(folder / "model_best.pth")
            assert Checkpointer(folder).best_ap() in (10.0, 10.0 * number)
            assert completed_in(Checkpointer(folder).newest_valid()) == 2
            if survived:
                break
        assert Checkpointer(folder).best_ap() == 20.0


@contextmanager
def dying_at(step: int) -> Iterator[list[bool]]:
    """Raise Killed at one of the changes that are made on the disk; yields a list that is empty if it came to that."""
    steps = count()
    survived: list[bool] = []

    def mortal(change: Callable) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(steps) == step:
                raise Killed
            result = change(*arguments, **options)
            if next(steps) == step:
                raise Killed
            return result

        return wrapped

    def save(content: Any, file: Any) -> None:
        if next(steps) == step:
            file.write(b"P" * PREFIX)
            raise Killed
        original(content, file)

    original = torch.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink")):
            patch.setattr(module, name, mortal(getattr(module, name)))
        try:
            yield survived
            survived.append(True)
        except Killed:
            pass


class TestNewestValid:
    def test_none_yet(self, folder: Path) -> None:
        assert Checkpointer(folder).newest_valid() is None
        assert Checkpointer(folder).best_ap() == -math.inf

    @pytest.mark.parametrize("pointer", ["", "model_0000000.pth", "absent.pth", None])
    def test_the_pointer_does_not_matter(self, pointer: str | None, folder: Path) -> None:
        fill(folder, 1, 2)
        (folder / "last_checkpoint").unlink()
        if pointer is not None:
            (folder / "last_checkpoint").write_text(pointer)
        assert completed_in(Checkpointer(folder).newest_valid()) == 2

    def test_an_unfinished_file_is_no_checkpoint(self, folder: Path) -> None:
        fill(folder, 1)
        (folder / "model_0000001.pth.partial").write_bytes(b"half")
        assert completed_in(Checkpointer(folder).newest_valid()) == 1

    @pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.write_bytes(b"")])
    def test_falls_back_and_says_so(self, harm: Callable, folder: Path, warnings: Callable) -> None:
        fill(folder, 1, 2, 3)
        for name in regular(2, 3):
            harm(folder / name)
        assert completed_in(Checkpointer(folder).newest_valid()) == 1
        for name in regular(2, 3):
            assert f"{folder / name} is damaged (" in warnings()
        assert f"using {folder / checkpoint_name(0)} instead" in warnings()

    def test_a_deleted_file_needs_no_words(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1, 2)
        (folder / checkpoint_name(1)).unlink()
        assert completed_in(Checkpointer(folder).newest_valid()) == 1
        assert not warnings()

    def test_torch_reads_a_flipped_bit_without_a_word(self, folder: Path, warnings: Callable) -> None:
        """Why there has to be a checksum."""
        fill(folder, 1)
        flip(folder / checkpoint_name(0))
        assert read_checkpoint(folder / checkpoint_name(0))["model"]["weight"].unique().numel() == 2
        with pytest.raises(UserError):
            Checkpointer(folder).newest_valid()
        assert "SHA-256 is not the recorded one" in warnings()

    def test_a_file_without_a_checksum_in_the_index(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1, 2)
        (folder / "index.json").unlink()
        assert completed_in(Checkpointer(folder).newest_valid()) == 2
        flip(folder / checkpoint_name(1))
        assert completed_in(Checkpointer(folder).newest_valid()) == 1
        assert "CRC-32" in warnings()

    def test_all_damaged(self, folder: Path) -> None:
        fill(folder, 1, 2)
        for name in regular(1, 2):
            flip(folder / name)
        with pytest.raises(UserError, match=r"all checkpoints in .* model_0000001\.pth, model_0000000\.pth\n.*delete"):
            Checkpointer(folder).newest_valid()

    @pytest.mark.parametrize(("final", "newest"), [(2, 3), (3, 3), (4, 4)])
    def test_the_final_one_is_as_new_as_its_iterations(self, final: int, newest: int, folder: Path) -> None:
        """A finished run that was given a larger MAX_ITER has newer ones."""
        fill(folder, 1, 2, 3)
        torch.save(state(final), folder / "model_final.pth")
        assert completed_in(Checkpointer(folder).newest_valid()) == newest

    def test_a_damaged_final_one(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1).save(state(2), 2, final=True)
        truncate(folder / "model_final.pth")
        assert completed_in(Checkpointer(folder).newest_valid()) == 1
        assert "model_final.pth is damaged" in warnings()

    def test_the_best_one_is_better_than_none(self, folder: Path) -> None:
        fill(folder, 1).save_best(state(1), 5.0, 1)
        fill(folder, 2, 3, keep_last=1)
        assert completed_in(Checkpointer(folder).newest_valid()) == 3
        flip(folder / checkpoint_name(2))
        assert completed_in(Checkpointer(folder).newest_valid()) == 1

    def test_the_best_one_is_the_last_to_be_taken(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1).save_best(state(1), 5.0, 1)
        assert Checkpointer(folder).newest_valid() == folder / checkpoint_name(0)
        (folder / "model_best.pth").unlink()
        (folder / "model_best.pth").write_bytes(b"of who knows how many iterations")
        assert Checkpointer(folder).newest_valid() == folder / checkpoint_name(0)
        assert not warnings()

    def test_holds(self, folder: Path) -> None:
        kept = fill(folder, 1, 2)
        kept.save(state(3), 3, final=True)
        flip(folder / checkpoint_name(1))
        assert [kept.holds(number) for number in range(5)] == [False, True, False, True, False]


class TestRetention:
    @pytest.mark.parametrize(
        ("options", "left"),
        [
            ({}, (4, 5, 6)),
            ({"keep_last": 1}, (6,)),
            ({"keep_last": 0}, (1, 2, 3, 4, 5, 6)),
            ({"keep_last": 2, "keep_at": [2, 4, 9]}, (2, 4, 5, 6)),
        ],
    )
    def test_what_stays(self, options: dict[str, Any], left: tuple[int, ...], folder: Path) -> None:
        fill(folder, 1, 2, 3, 4, 5, 6, **options)
        assert names(folder) == regular(*left)

    def test_keep_at_need_not_be_given_again(self, folder: Path) -> None:
        fill(folder, 1, keep_last=1, keep_at=[1, 3])
        fill(folder, 2, 3, keep_last=1)
        kept = fill(folder, 4, 5, keep_last=1, keep_at=[4])
        assert names(folder) == regular(1, 3, 4, 5)
        assert kept.keep_at == {1, 3, 4}

    def test_final_best_and_strange_files_stay(self, folder: Path) -> None:
        kept = fill(folder, 1, keep_last=1)
        kept.save_best(state(1), 5.0, 1)
        strange = {"model_0000000_copy.pth", "model_1.pth", "weights.pth", "model_0000000.pth.bak"}
        for name in strange:
            (folder / name).write_bytes(b"mine")
        fill(folder, 2, 3, keep_last=1).save(state(4), 4, final=True)
        assert names(folder) == regular(3) | strange | {"model_final.pth", "model_best.pth"}

    def test_the_final_one_is_also_kept_as_a_regular_one(self, folder: Path) -> None:
        Checkpointer(folder, keep_at=[2]).save(state(2), 2, final=True)
        assert completed_in(folder / checkpoint_name(1)) == 2

    def test_later_ones_go_when_the_run_has_gone_back(self, folder: Path) -> None:
        fill(folder, 2, 4, 6, keep_at=[4, 6])
        for name in regular(4, 6):
            truncate(folder / name)
        kept = Checkpointer(folder, keep_last=1)
        assert completed_in(kept.newest_valid()) == 2
        assert names(folder) == regular(2, 4, 6)
        kept.save(state(3), 3)
        assert names(folder) == regular(3)
        kept.save(state(4), 4)
        kept.save(state(5), 5)
        assert names(folder) == regular(4, 5)

    def test_damaged_list_of_what_is_kept(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1, keep_last=1, keep_at=[1])
        (folder / "index.json").write_text("{")
        fill(folder, 2, keep_last=1, keep_at=[1])
        assert names(folder) == regular(1, 2)
        assert "index.json is damaged: best AP and checksums are lost; repeat --keep-at" in warnings()


class TestBest:
    def test_survives_a_restart(self, folder: Path) -> None:
        fill(folder, 1).save_best(state(1), 12.5, 1)
        kept = fill(folder, 2, keep_at=[2])
        assert kept.best_ap() == 12.5
        kept.save_best(state(2), 13.5, 2)
        assert Checkpointer(folder).best_ap() == 13.5
        assert completed_in(folder / "model_best.pth") == 2
        content = json.loads((folder / "index.json").read_text())
        assert content["best"] == {"completed": 2, "ap": 13.5}
        assert content["sha256"]["model_best.pth"] == [sha256_of(folder / "model_best.pth")]
        assert content["keep_at"] == [2]

    def test_takes_no_space_of_its_own(self, folder: Path) -> None:
        kept = fill(folder, 1)
        for ap in (1.0, 2.0):  # the second time both names are one file already
            kept.save_best(state(1), ap, 1)
        assert os.path.samefile(folder / "model_best.pth", folder / checkpoint_name(0))
        assert not list(folder.glob("*.partial"))

    def test_is_written_where_there_are_no_links(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", no_space)
        fill(folder, 1).save_best(state(1), 1.0, 1)
        assert not os.path.samefile(folder / "model_best.pth", folder / checkpoint_name(0))
        assert completed_in(folder / "model_best.pth") == 1

    def test_is_written_when_the_last_save_was_of_another_iteration(self, folder: Path) -> None:
        fill(folder, 1).save_best(state(2), 1.0, 2)
        assert completed_in(folder / "model_best.pth") == 2

    def test_a_damaged_one_can_be_bettered_by_any(self, folder: Path) -> None:
        kept = fill(folder, 1)
        kept.save_best(state(1), 12.5, 1)
        flip(folder / "model_best.pth")
        assert kept.best_ap() == -math.inf


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system takes no more than ``size`` bytes for a file: to a writer, the same as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    @pytest.mark.parametrize("room", [0, 1000, 30_000])
    def test_the_earlier_one_stays(self, room: int, folder: Path) -> None:
        """torch's writer fails in its own ways at the start, in the header and in the weights."""
        kept = fill(folder, 1, keep_last=1)
        for write in (lambda: kept.save(state(2), 2), lambda: kept.save_best(state(2), 9.0, 2)):
            with largest_file(room), pytest.raises(UserError) as caught:
                write()
            message = str(caught.value)
            assert message.startswith(f"disk full at {folder}/model_")
            assert "needs about 0.0 MB, " in message
            assert f"the last complete checkpoint is {folder / checkpoint_name(0)}\n" in message
            assert "free space and continue with --resume" in message
            assert names(folder) == regular(1)
            assert completed_in(kept.newest_valid()) == 1
        assert kept.best_ap() == -math.inf

    def test_at_the_first_checkpoint(self, folder: Path) -> None:
        with largest_file(1000), pytest.raises(UserError, match="the last complete checkpoint is none"):
            fill(folder, 1)
        assert Checkpointer(folder).newest_valid() is None

    @pytest.mark.parametrize(("name", "newest"), [("index.json", 1), ("last_checkpoint", 2)])
    def test_no_room_for_the_small_files(
        self, name: str, newest: int, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A checkpoint that is in the index and has its name is complete, and the next start finds it."""
        kept = fill(folder, 1, keep_last=1)
        with monkeypatch.context() as patch:
            write = checkpointer.write_atomically
            patch.setattr(
                checkpointer,
                "write_atomically",
                lambda path, text: (no_space if path.name == name else write)(path, text),
            )
            with pytest.raises(UserError, match=f"the last complete checkpoint is .*{checkpoint_name(newest - 1)}"):
                kept.save(state(2), 2)
        assert completed_in(Checkpointer(folder).newest_valid()) == newest
        assert completed_in(folder / checkpoint_name(0)) == 1
        assert not list(folder.glob("*.partial"))

    def test_other_errors_are_not_called_a_full_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(content: Any, file: Any) -> None:
            file.write(b"half")
            raise RuntimeError("CUDA error")

        kept = fill(folder, 1)
        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            kept.save(state(2), 2)
        assert names(folder) == regular(1)


class TestSpace:
    def test_bytes_of_a_checkpoint(self, tmp_path: Path) -> None:
        """The estimate against a file with a model (a frozen layer, a buffer) and SGD's momentum."""
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 300))
        model[0].requires_grad_(False)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
        model(torch.randn(2, 300)).sum().backward()
        optimizer.step()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(content, tmp_path / "model.pth")
        weights = sum(value.numel() for value in model.state_dict().values())
        estimate = checkpoint_bytes(weights, sum(parameter.numel() for parameter in trainable))
        assert estimate == pytest.approx((tmp_path / "model.pth").stat().st_size, rel=0.02)
        assert checkpointer.tensor_bytes(content) == pytest.approx(estimate, abs=8)  # BN's counter has 8 bytes

    @pytest.mark.parametrize(
        ("plan", "number"),
        [
            ((10, 2, 3), 3 + 3),  # best, final, the one being written
            ((10, 2, 0), 4 + 3),  # after 2, 4, 6, 8; after 10 it is the final one
            ((10, 2, 9), 4 + 3),
            ((10, 0, 3), 3),
            ((10, 2, 1, [3, 4, 20]), 1 + 2 + 3),
            ((10, 2, 0, [3, 4]), 4 + 1 + 3),
            ((540_000, 5000, 3, [60_000]), 7),
        ],
    )
    def test_number_of_checkpoints(self, plan: tuple, number: int) -> None:
        assert most_checkpoints(*plan) == number

    @pytest.mark.parametrize("final", [1, 4, 12])
    def test_no_run_has_more(self, final: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def save(content: Any, file: Any) -> None:
            original(content, file)
            seen.append(len(names(folder)))

        original = torch.save
        monkeypatch.setattr(torch, "save", save)
        kept = Checkpointer(folder, keep_last=2, keep_at=[1, 3])
        for completed in range(1, final + 1):
            kept.save(state(completed), completed, final=completed == final)
            if completed == 2:
                kept.save_best(state(completed), 1.0, completed)
        assert max(*seen, len(names(folder))) <= most_checkpoints(final, 1, 2, [1, 3])

    def test_too_little_is_refused(self, folder: Path) -> None:
        each = disk_usage(folder.parents[1]).total // 5
        with pytest.raises(UserError, match=r"up to 6 checkpoints of .* and needs .* available are (?s:.*)--keep-last"):
            check_free_space(folder, each, 100, 10, 3)
        check_free_space(folder, 1000, 100, 10, 3)
        assert not folder.parent.exists()

    def test_what_is_there_already_counts(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = fill(folder, 1, 2)
        kept.save_best(state(2), 1.0, 2)
        size = (folder / checkpoint_name(0)).stat().st_size
        monkeypatch.setattr("scratch_det.engine.run_dir.free_bytes", lambda path: 4 * size)
        check_free_space(folder, size, 100, 10, 3)  # 2 of 6 are there; the best one is one of them
        monkeypatch.setattr("scratch_det.engine.run_dir.free_bytes", lambda path: 4 * size - 1)
        with pytest.raises(UserError):
            check_free_space(folder, size, 100, 10, 3)

    def test_free_bytes_of_a_folder_to_come(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or disk_usage("/"))
        assert free_bytes(tmp_path / "a/b") > 0
        assert asked == [tmp_path]

    def test_needs_no_torch(self) -> None:
        code = "import sys, scratch_det.engine.run_dir; assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
