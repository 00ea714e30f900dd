"""One checkpoint file: its name, damage, a full disk, the space that a run's checkpoints take."""

import hashlib
import math
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from shutil import disk_usage
from typing import Any

import pytest
import torch
from checkpoint_folder import Bomb, completed_in, fill, flip, names, no_space, regular, state, truncate

from scratch_det.config.load import get_cfg
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


class TestFile:
    def test_names_are_detectron2s(self) -> None:
        assert checkpoint_name(499) == "model_0000499.pth"
        assert (checkpointer.FINAL, checkpointer.BEST) == ("model_final.pth", "model_best.pth")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of a damaged file
    @pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
    def test_code_in_a_checkpoint_is_not_run(self, write: Callable, tmp_path: Path) -> None:
        write({"model": Bomb(tmp_path / "exploded")}, tmp_path / "evil.pth")
        with pytest.raises(UserError, match=r"evil\.pth is damaged or no PyTorch file"):
            read_checkpoint(tmp_path / "evil.pth")
        assert damage(tmp_path / "evil.pth")
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off", b"<html>404</html>"])
    def test_garbage(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "weights.pth").write_bytes(content)
        what = "a web page in the place of a file" if b"html" in content else "damaged or no PyTorch file"
        with pytest.raises(UserError, match=rf"weights\.pth is {what}"):
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
        assert ("not the recorded one" if known else "data/0 is not as it was saved; restore it") in str(
            damage(path, digests)
        )
        path.unlink()
        os.mkfifo(path)
        assert ("is a folder, a pipe" if known else "is missing") in str(damage(path, digests))

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
        kept.bytes_each = 1_500_000_000
        for write in (lambda: kept.save(state(2), 2), lambda: kept.save_best(state(2), 9.0, 2)):
            with largest_file(room), pytest.raises(UserError) as caught:
                write()
            message = str(caught.value)
            assert message.startswith(f"disk full at {folder}/model_")
            assert "needs about 1.5 GB, " in message
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
    @pytest.mark.parametrize("averaged", [False, True])
    def test_bytes_of_a_checkpoint(self, averaged: bool, tmp_path: Path) -> None:
        """The estimate against a file with a model (a frozen layer, a buffer), its average, and SGD's momentum."""
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 300))
        model[0].requires_grad_(False)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
        model(torch.randn(2, 300)).sum().backward()
        optimizer.step()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"model_ema": deepcopy(model).state_dict()} if averaged else {}
        torch.save(content, tmp_path / "model.pth")
        weights = sum(value.numel() for value in model.state_dict().values())
        cfg = get_cfg()
        cfg.MODEL_EMA.ENABLED = averaged
        estimate = checkpoint_bytes(cfg, weights, sum(parameter.numel() for parameter in trainable))
        assert estimate == pytest.approx((tmp_path / "model.pth").stat().st_size, rel=0.02)

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

    def test_too_little_is_rejected(self, folder: Path) -> None:
        each = disk_usage(folder.parents[1]).total // 5
        with pytest.raises(UserError, match=r"up to 6 checkpoints of .* and needs .* available are (?s:.*)--keep-last"):
            check_free_space(folder, each, most_checkpoints(100, 10, 3))
        check_free_space(folder, 1000, most_checkpoints(100, 10, 3))
        assert not folder.parent.exists()

    def test_what_is_there_already_counts(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = fill(folder, 1, 2)
        kept.save_best(state(2), 1.0, 2)
        size = (folder / checkpoint_name(0)).stat().st_size
        monkeypatch.setattr("scratch_det.engine.run_dir.free_bytes", lambda path: 4 * size)
        check_free_space(folder, size, most_checkpoints(100, 10, 3))  # 2 of 6 are there; the best one is one of them
        monkeypatch.setattr("scratch_det.engine.run_dir.free_bytes", lambda path: 4 * size - 1)
        with pytest.raises(UserError):
            check_free_space(folder, size, most_checkpoints(100, 10, 3))

    def test_free_bytes_of_a_folder_to_come(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or disk_usage("/"))
        assert free_bytes(tmp_path / "a/b") > 0
        assert asked == [tmp_path]

    def test_needs_no_torch(self) -> None:
        code = "import sys, scratch_det.engine.run_dir; assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
