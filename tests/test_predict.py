"""Predicting files: what a source is, what is written, and what cannot be read."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from scratch_det.detector import Detector
from scratch_det.errors import DataError, UserError
from scratch_det.log import logger
from scratch_det.predict import Settings, own_names, predict_sources, read_ids
from scratch_det.sources import find_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one in a folder below, and a text."""
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name in ("a.jpg", "below/b.PNG"):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def write_video(path: Path, frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, (96, 64))
    for number in range(frames):
        writer.write(np.full((64, 96, 3), 40 * number, np.uint8))
    writer.release()


class TestSources:
    def test_files_folders_and_patterns(self, folder: Path) -> None:
        write_video(folder / "clip.mp4", 3)
        images, videos = find_sources([str(folder), f"{folder}/**/*.PNG", str(folder / "a.jpg")], [])
        assert images == [folder / "a.jpg", folder / "below" / "b.PNG"]
        assert [(video.source, video.frames, video.rate) for video in videos] == [(str(folder / "clip.mp4"), 3, 5)]
        assert [frame.shape for frame in videos[0]] == [(64, 96, 3)] * 3

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("a.jpeg", r"there is no .*a.jpeg; did you mean 'a.jpg'\?; expected images"),
            ("*.tiff", r"there is no .*\*.tiff; expected images"),
            ("notes.txt", r"^[^:]*notes.txt is neither an image nor a video; expected images"),
            ("empty", r"empty is a folder without images: 0 other files; .* or a pattern: '.*empty/\*\*/\*.jpg'"),
        ],
    )
    def test_what_names_none(self, folder: Path, word: str, message: str) -> None:
        (folder / "empty").mkdir()
        with pytest.raises(UserError, match=message):
            find_sources([str(folder / word)], [])

    def test_broken_videos_and_cameras_that_are_not_there(self, tmp_path: Path) -> None:
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        faults = list[str]()
        assert find_sources([str(tmp_path / "broken.mp4")], faults) == ([], [])
        assert "broken.mp4: no video that can be decoded" in faults[0]
        for word, message in (
            ("97", r"camera 97 is not there"),
            ("file:///nowhere.mp4", r"^file:///nowhere.mp4: no v"),
        ):
            with pytest.raises(DataError, match=message):
                find_sources([word], [])
        with pytest.raises(UserError, match=r"^https://host/a.jpg: images are read from files; fetch it"):
            find_sources(["https://host/a.jpg"], [])

    def test_images_of_subfolders_are_counted(
        self, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "disabled", False)
        find_sources([str(folder)], [])
        assert f"1 images in its subfolders are left out; to take them: '{folder}/**/*.jpg'" in caplog.text

    def test_names_that_pictures_get(self) -> None:
        paths = [Path("../in/1.jpg"), Path("in/1.jpg"), Path("../.2.jpg")]
        assert [*own_names(paths, ".jpg").values()] == ["up_in_1.jpg", "in_1.jpg", "_2.jpg"]


class TestPredict:
    def test_pictures_and_results(self, small_detector: Detector, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        (folder / "below" / "a.jpg").write_bytes((folder / "a.jpg").read_bytes())
        (folder / "broken.jpg").write_bytes(b"")
        faults = predict_sources(small_detector, [str(folder), str(folder / "below")], out, Settings(0.0, batch_size=2))
        assert len(faults) == 1
        assert "broken.jpg: cannot be decoded" in faults[0]
        rows = json.loads((out / "results.json").read_text())
        ids = [str(folder / "a.jpg"), str(folder / "below" / "a.jpg"), "b.PNG"]
        assert [row["image_id"] for row in rows] == [name for name in ids for _ in range(10)]
        expected = small_detector.predict(folder / "below" / "b.PNG", batch_size=2).to_coco("b.PNG")
        assert [row["category_id"] for row in rows[20:]] == [row["category_id"] for row in expected]
        pictures = {str(folder / name).replace("/", "_") for name in ("a.jpg", "below/a.jpg")} | {"b.PNG.jpg"}
        assert {path.name for path in out.iterdir()} == pictures | {"results.json"}

    def test_ids_of_a_json(self, small_detector: Detector, folder: Path, tmp_path: Path) -> None:
        like, out = tmp_path / "like.json", tmp_path / "out"
        content: dict[str, Any] = {"images": [{"id": 17, "file_name": "train/a.jpg"}], "categories": []}
        for number, name in ((9, "cat"), (5, "ant")):
            content["categories"].append({"id": number, "name": name})
        like.write_text(json.dumps(content))
        settings = Settings(0.0, like=like)
        with pytest.raises(UserError, match=r"like.json has no file_name b.PNG; give a json of all images and"):
            predict_sources(small_detector, [str(folder), str(folder / "below")], out, settings)
        with pytest.raises(UserError, match=r"like.json has no category with the name bee; give a json of all images"):
            predict_sources(small_detector, [str(folder / "a.jpg")], out, settings)
        assert not out.exists()
        like.write_text("[]")
        with pytest.raises(UserError, match=r"like.json is a list, as results are; give the data's json"):
            predict_sources(small_detector, [str(folder)], out, settings)
        content["categories"].append({"id": 7, "name": "bee"})
        like.write_text(json.dumps(content))
        assert predict_sources(small_detector, [str(folder)], out, settings) == []
        labels = small_detector.predict(folder / "a.jpg").labels
        rows = json.loads((out / "results.json").read_text())
        assert [(row["image_id"], row["category_id"]) for row in rows] == [(17, (5, 7, 9)[label]) for label in labels]

    def test_images_of_one_name_have_the_id_of_their_path(
        self, small_detector: Detector, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "below" / "a.jpg").write_bytes((folder / "a.jpg").read_bytes())
        like, images = tmp_path / "like.json", [folder / "a.jpg", folder / "below" / "a.jpg"]

        def ids(*names: str) -> list[int | str]:
            content = {"images": [{"id": k, "file_name": name} for k, name in enumerate(names)], "categories": []}
            like.write_text(json.dumps(content))
            return list(read_ids(like, [], images)[0].values())

        assert ids("below/a.jpg", "in/a.jpg", "other/a.jpg") == [1, 0]
        for names in (("x/a.jpg", "y/a.jpg"), ("a.jpg",)):
            with pytest.raises(UserError, match=r"which image of --like .*like.json is .*a.jpg\? others have its name"):
                ids(*names)

    def test_impossible_settings_write_nothing(self, small_detector: Detector, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"the score is 50, expected 0 to 1"):
            predict_sources(small_detector, [str(folder)], tmp_path / "out", Settings(50))
        assert not (tmp_path / "out").exists()

    def test_originals_are_not_replaced(self, small_detector: Detector, folder: Path) -> None:
        with pytest.raises(UserError, match=r"whose files would be replaced; name another"):
            predict_sources(small_detector, [str(folder)], folder, Settings(0.5))

    def test_a_video(self, small_detector: Detector, tmp_path: Path) -> None:
        clips = [tmp_path / name / "clip.mp4" for name in ("a", "b")]
        for clip, frames in zip(clips, (3, 1), strict=True):
            clip.parent.mkdir()
            write_video(clip, frames)
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        words = [str(tmp_path / "broken.mp4"), *map(str, clips)] * 2
        faults = predict_sources(small_detector, words, tmp_path / "out", Settings(0.0))
        assert "broken.mp4: no video that can be decoded" in faults[0]
        _, (written, other) = find_sources([str(tmp_path / "out")], [])
        assert len(list(other)) == 1
        assert [frame.shape for frame in written] == [(266, 400, 3)] * 3  # the codec's sides are even
