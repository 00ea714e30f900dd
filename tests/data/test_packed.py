"""The packed form of a json: when it is used again, when it is made anew, and what cannot spoil it."""

import errno
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from toy_data import read_toy

from scratch_det.data import packed
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.data.coco_json import _read_quickly, _read_slowly, read_json
from scratch_det.errors import DataError

WRITER = """
import os, sys, time
from pathlib import Path
from scratch_det import files
from scratch_det.data import packed
from scratch_det.data.coco_json import _read_quickly, _read_slowly, read_json
def fsync(number):
    Path("writing").touch()
    time.sleep(60)
if "slow" in sys.argv:
    os.fsync = fsync
def make(path):
    with open("made", "a") as file:
        file.write("x")
    return read_json(path)
print(len(packed.load(Path(sys.argv[1]), make).arrays["label"]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/scratch_det/packed"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A json for each time that one was read."""
    found: list[Path] = []
    monkeypatch.setattr("scratch_det.data.coco.read_json", lambda path: found.append(path) or read_json(path))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """``start(json, *words)``: a process that reads it, in ``tmp_path``."""

    def run(*arguments: Any) -> subprocess.Popen:
        words = [sys.executable, "-c", WRITER, *map(str, arguments)]
        return subprocess.Popen(
            words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
        )

    return run


def pack_of(path: Path) -> Path:
    return path.parent / packed.FOLDER / f"{path.name}.{packed.VERSION}.pack"


def move_time(path: Path, seconds: int = 5) -> None:
    at = path.stat().st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(at, at))


def notices(name: str = "toy_train") -> list[str]:
    return [str(one) for one in inspect_coco(lookup(name), need_masks=True)[1]]


class TestReuse:
    def test_a_later_start_does_not_touch_the_json(self, coco_factory, made):
        path = coco_factory(change=lambda c: c["annotations"][0].pop("area"))
        first, said = read_toy(), notices()
        size, at = path.stat().st_size, path.stat().st_mtime_ns
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(at, at))
        again = read_toy()
        assert len(made) == 1
        assert (again.classes, again.digest, list(again.images)) == (first.classes, first.digest, list(first.images))
        assert all(np.array_equal(again.arrays[key], first.arrays[key], equal_nan=True) for key in first.arrays)
        assert notices() == said == ["1 annotations whose area is missing or negative: id 101"]
        assert not again.arrays["box"].flags.writeable

    def test_another_time_of_the_same_content(self, coco_factory, made, monkeypatch):
        path = coco_factory()
        read_toy()
        move_time(path)
        read_toy()
        monkeypatch.setattr(packed, "sha256_of", lambda path: pytest.fail("its digest was known"))
        read_toy()
        assert len(made) == 1

    def test_another_content_of_the_same_size(self, coco_factory, made):
        path = coco_factory()
        before = read_toy()
        path.write_bytes(path.read_bytes().replace(b"class2", b"class3"))
        move_time(path)
        after = read_toy()
        assert (len(made), after.classes[0]) == (2, "class3")
        assert before.digest != after.digest
        assert before.objects(0)[0]["bbox"] == after.objects(0)[0]["bbox"]  # what is mapped stays

    def test_a_json_that_changes_while_it_is_read(self, coco_factory):
        path = coco_factory()

        def make(json_file: Path) -> Any:
            found = read_json(json_file)
            path.write_bytes(path.read_bytes().replace(b"class2", b"class3"))
            move_time(path)
            return found

        names = [packed.load(path, one).header["categories"][0]["name"] for one in (make, read_json)]
        assert names == ["class2", "class3"]

    def test_what_a_run_needs_is_asked_each_time(self, coco_factory, made, datasets_root):
        """One file serves runs with and without masks, and entries with and without empty boxes."""

        def damage(content: dict[str, Any]) -> None:
            content["annotations"][0].pop("segmentation")
            content["annotations"][1]["bbox"][2] = 0

        coco_factory(change=damage)
        entry = lookup("toy_train")
        for drops in (False, True):
            for masks in (True, False):
                entry = type(entry)(entry.name, entry.json_file, entry.image_root, drop_empty_boxes=drops)
                data, problems = inspect_coco(entry, masks)
                said = " ".join(map(str, problems))
                assert ("3+ points: id 101" in said, "no width or height: id 102" in said) == (masks, not drops)
                assert (data is None) == (masks or not drops)
        assert len(made) == 1

    def test_a_json_that_no_run_can_use(self, coco_factory, made):
        coco_factory(change=lambda c: c["annotations"][1].update(category_id=77))
        assert notices() == notices() == ["1 annotations with an unknown category_id: id 102 (category_id 77)"]
        assert len(made) == 1


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[: len(content) // 2],
            lambda content: content[:-1] + bytes([content[-1] ^ 1]),
            lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
            lambda content: b"foreign\n" * 100,
            lambda content: content.replace(packed.VERSION.encode(), b"0" * 16),
            lambda content: b"\xff" * 64 + content[64:],
        ],
        ids=["empty", "half", "last bit", "header", "foreign", "older code", "no text"],
    )
    def test_it_is_made_anew(self, coco_factory, made, damage):
        path = coco_factory()
        before = read_toy()
        stat = pack_of(path).stat()
        content = damage(pack_of(path).read_bytes())
        pack_of(path).unlink()  # a file that is written over would change under those who map it
        pack_of(path).write_bytes(content)
        os.utime(pack_of(path), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = read_toy()
        assert len(made) == 2
        assert all(np.array_equal(after.arrays[key], before.arrays[key], equal_nan=True) for key in before.arrays)
        read_toy()
        assert len(made) == 2

    def test_a_folder_in_its_place(self, coco_factory, made, cache):
        path = coco_factory()
        pack_of(path).mkdir(parents=True)
        assert notices() == notices() == []
        assert len(made) == 1
        assert len(list(cache.glob("*.pack"))) == 1


class TestWriting:
    def test_a_read_only_folder(self, coco_factory, made, cache):
        """Simulated, as root may write anywhere: a file is where the folder should be."""
        path = coco_factory()
        (path.parent / packed.FOLDER).touch()
        read_toy()
        read_toy()
        assert len(made) == 1
        assert [one.suffix for one in sorted(cache.iterdir())] == [".pack", ".lock"]

    def test_a_user_without_a_home(self, coco_factory, monkeypatch):
        """As in a container with a user of its own number: the folder of the json is enough."""

        def nobody(number: int) -> None:
            raise KeyError(number)

        coco_factory()
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", nobody)
        assert notices() == []

    def test_nowhere_to_write(self, coco_factory, made, cache):
        path = coco_factory()
        (path.parent / packed.FOLDER).touch()
        cache.parent.mkdir(parents=True)
        cache.touch()
        assert len(read_toy().images) == 4
        [notice] = notices()
        assert notice.startswith("each start reads the whole json, as its packed form cannot be kept: ")
        assert len(made) == 2

    def test_a_full_disk(self, coco_factory, made, monkeypatch):
        path = coco_factory()

        def full(number: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert len(read_toy().objects(0)) == 3
            assert "No space left on device" in notices()[0]
        assert [one.suffix for one in pack_of(path).parent.iterdir()] == [".lock"]
        assert (notices(), len(made)) == ([], 3)

    def test_a_full_disk_but_room_in_the_cache(self, coco_factory, made, cache, monkeypatch):
        write = packed.write_atomically

        def full(path: Path, content: Any) -> None:
            if packed.FOLDER in path.parts:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, content)

        coco_factory()
        monkeypatch.setattr(packed, "write_atomically", full)
        assert notices() == notices() == []
        assert len(made) == 1
        assert not read_toy().arrays["box"].flags.writeable

    def test_kill_9_while_it_is_written(self, coco_factory, made, start, tmp_path):
        path = coco_factory()
        process = start(path, "slow")
        deadline = time.monotonic() + 300
        while not (tmp_path / "writing").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert {one.suffix for one in pack_of(path).parent.iterdir()} == {".lock", ".partial"}
        assert len(read_toy().objects(0)) == 3
        assert sorted(one.suffix for one in pack_of(path).parent.iterdir()) == [".lock", ".pack"]
        assert len(made) == 1

    def test_two_at_once(self, coco_factory, start, tmp_path):
        """One makes it, the others wait and take it."""
        path = coco_factory()
        processes = [start(path) for _ in range(3)]
        assert [process.communicate(timeout=300)[0] for process in processes] == [b"7\n"] * 3
        assert (tmp_path / "made").read_text() == "x"


def test_both_ways_of_reading_agree(coco_factory) -> None:
    """A json typed as COCO's is read quickly, one with another type the slow way, to the same arrays and problems."""

    def enrich(content: dict[str, Any]) -> None:
        first, *_ = content["annotations"]
        first.update(bbox=[1.25, 2, 3.5, 4], area=3.3, num_keypoints=1, keypoints=[1, 2, 2], ignore=1)
        content["annotations"][1].pop("area")
        content["annotations"][2]["segmentation"] = [[1, 2, 3, 4], []]
        content["annotations"][3]["segmentation"] = [[1, 1, 5, 5, 9, 9], [0.1, 0.2, 30, 7, 8, 9.5]]
        content["images"][1]["file_name"] = "ü.jpg"
        content["categories"][0]["supercategory"] = "thing"

    path = coco_factory(change=enrich)
    content = json.loads(path.read_text())
    (header, arrays), digest = read_json(path), None
    for one in content["annotations"]:
        one["id"] = str(one["id"])
    path.write_text(json.dumps(content))
    other_header, other_arrays = read_json(path)
    digest = header.pop("digest"), other_header.pop("digest")
    assert digest[0] != digest[1]
    assert header == other_header
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        assert array.dtype == other_arrays[name].dtype
        assert np.array_equal(array, other_arrays[name], equal_nan=array.dtype == float), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"id": 102}, {"image_id": 77}, {"category_id": 4},
        {"bbox": [1, 2, 0, 4]}, {"bbox": [1, 2, 0, 4], "iscrowd": 1}, {"bbox": [96, 1, 5, 5]},
        {"bbox": [95.5, 1, 2, 5]},
        {"bbox": [-5, 1, 5, 5]}, {"bbox": [-1, -1, 97, 66]}, {"bbox": [0, 0, 97, 65.5]},
        {"area": -1}, {"area": None}, {"iscrowd": 2}, {"iscrowd": None},
        {"segmentation": None}, {"segmentation": []}, {"segmentation": [[1, 1, 5, 5]]},
        {"segmentation": [[1, 1, 5, 5, 9, 9]]},
        {"segmentation": [[1, 1, 5, 5, 9, 9, 3]]}, {"segmentation": [[1, 1, 9, 1, 9, 9], [3e4, 0, 3e4, 9, 3e4, 3]]},
        {"segmentation": {"size": [64, 96], "counts": [96 * 64]}}, {"segmentation": {"size": [64, 96], "counts": [9]}},
        {"segmentation": {"size": [96, 64], "counts": "x"}}, {"segmentation": {"size": [64, 96], "counts": ""}},
        {"keypoints": [1, 2, 2]}, {"keypoints": [1, 2, 3, 0, 0, 0]},
        {"keypoints": [1, 2, 2, 0, 0, 0], "num_keypoints": 2},
        {"num_keypoints": -1}, {"segmentation": {"size": [64, 96], "counts": [-9, 96 * 64 + 9]}},
    ],
    ids=str,
)  # fmt: skip
def test_the_quick_way_misses_nothing(coco_factory, change) -> None:
    """It finds what the slow way finds, which judges every entry."""

    def damage(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["keypoints"] = ["a", "b"]
        for one in content["annotations"]:
            one["keypoints"] = [3, 4, 2, 5.5, 6, 1]
        content["annotations"][0].update(change)

    path = coco_factory(change=damage)
    data = path.read_bytes()
    quick = _read_quickly(data)
    assert quick is not None
    assert quick.problems == _read_slowly(path, data).problems


@pytest.mark.parametrize(
    "change",
    [{"segmentation": {"size": [2**70, 96], "counts": [9]}}, {"segmentation": {"size": [64, 96], "counts": [2**70]}},
     {"segmentation": {"size": [64, 96], "counts": [0.5, 96 * 64 - 0.5]}}, {"bbox": [2**70, 1, 5, 5]},
     {"num_keypoints": 2**70}, {"id": 2**70}],
    ids=str,
)  # fmt: skip
def test_numbers_that_arrays_cannot_hold(coco_factory, change) -> None:
    """They are problems like any other, where they matter."""
    coco_factory(change=lambda content: content["annotations"][0].update(change))
    said = " ".join(notices())
    assert ("nor RLE" in said, "outside its image" in said) == ("segmentation" in change, "bbox" in change)


def test_an_image_wider_than_64_bits(coco_factory) -> None:
    coco_factory(change=lambda content: content["images"][0].update(width=2**70))
    assert notices() == [f"1 images whose width is not a whole number of pixels above 0: id 1 (width {2**70})"]


def test_half_a_surrogate_pair(coco_factory) -> None:
    """It is legal json."""
    path = coco_factory(change=lambda content: content["images"][1].update(file_name="\ud800.jpg"))
    assert notices() == [f"1 images that are not in {path.parent / 'images'}: id 2 (\ud800.jpg)"]


def test_bytes_that_are_no_text(coco_factory) -> None:
    """In a field that nobody reads, of an annotation that is judged."""
    path = coco_factory(change=lambda content: content["annotations"][0].update(caption="here", area=-1))
    path.write_bytes(path.read_bytes().replace(b"here", b"\xff"))
    with pytest.raises(DataError, match="not a json text file"):
        notices()
