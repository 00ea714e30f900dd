"""The folder of a run's checkpoints: crashes, damage, what stays, the best one."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folder import PREFIX, Killed, completed_in, fill, flip, names, no_space, regular, state, truncate

from scratch_det.engine.checkpointer import (
    Checkpointer,
    checkpoint_name,
    damage,
    read_checkpoint,
)
from scratch_det.errors import UserError
from scratch_det.files import sha256_of


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
        assert torch.load(folder / checkpoint_name(0))["model"]["weight"].unique().numel() == 2
        with pytest.raises(UserError):
            Checkpointer(folder).newest_valid()
        assert "SHA-256 is not the recorded one" in warnings()

    def test_a_file_without_a_checksum_in_the_index(self, folder: Path, warnings: Callable) -> None:
        fill(folder, 1, 2)
        (folder / "index.json").unlink()
        assert completed_in(Checkpointer(folder).newest_valid()) == 2
        flip(folder / checkpoint_name(1))
        assert completed_in(Checkpointer(folder).newest_valid()) == 1
        assert "is not as it was saved" in warnings()

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
        assert (
            "index.json is damaged: Input data was truncated; best AP and checksums are lost; repeat --keep-at"
            in warnings()
        )


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
