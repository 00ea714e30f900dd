"""Images and masks on disk: decoded, rejected when damaged, and scanned once."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MASK_KINDS, rectangle_mask
from PIL import Image, ImageOps
from toy_data import read_toy, rejection

from scratch_det.data.image import TURNS, decode_masks, encode_masks, find_dark_images, read_image, scan_images, turn_of
from scratch_det.files import cache_folder

EXIF_ORIENTATION = 0x0112


class TestImages:
    def test_three_ways_to_write_a_mask_are_one(self):
        box, width, height = (6, 8, 20, 12), 60, 40
        masks = decode_masks([rectangle_mask(box, width, height, kind) for kind in MASK_KINDS], height, width)
        expected = np.zeros((height, width), dtype=np.uint8)
        expected[8:20, 6:26] = 1
        for mask in masks:
            np.testing.assert_array_equal(mask, expected)

    def test_uncompressed_counts_run_down_the_columns(self):
        mask = decode_masks([{"size": [3, 2], "counts": [1, 2, 1, 1, 1]}], 3, 2)
        assert mask[0].tolist() == [[0, 0], [1, 1], [1, 0]]

    def test_polygons_of_one_object_are_joined(self):
        parts = rectangle_mask((2, 2, 4, 4), 20, 10, "polygon") + rectangle_mask((12, 3, 5, 5), 20, 10, "polygon")
        assert int(decode_masks([parts], 10, 20).sum()) == 16 + 25

    def test_no_masks(self):
        assert decode_masks([], 40, 60).shape == (0, 40, 60)

    def test_encode_decode_round_trip(self):
        masks = np.random.default_rng(0).integers(0, 2, (4, 30, 50), dtype=np.uint8)
        rles = encode_masks(masks)
        assert json.loads(json.dumps(rles)) == rles
        np.testing.assert_array_equal(decode_masks(rles, 30, 50), masks)

    def save(self, path: Path, mode: str = "RGB", **options) -> Path:
        pixels = np.zeros((40, 60, 3), dtype=np.uint8)
        pixels[:, :30] = (250, 120, 10)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    def test_colours_are_rgb(self, tmp_path):
        image = read_image(self.save(tmp_path / "a.png"), 60, 40)
        assert (image.shape, image.dtype) == ((40, 60, 3), np.uint8)
        assert image[0, 0].tolist() == [250, 120, 10]

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_colour_modes(self, tmp_path, mode):
        assert read_image(self.save(tmp_path / "a.jpg", mode), 60, 40).shape == (40, 60, 3)

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm", "big_endian.tif"])
    def test_of_16_bits_the_upper_8_are_kept(self, tmp_path, name):
        values = np.linspace(0, 65535, 24).reshape(4, 6).astype(">u2" if "big" in name else np.uint16)
        if name == "a.pgm":  # Pillow opens it in mode I
            (tmp_path / name).write_bytes(b"P5 6 4 65535\n" + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(tmp_path / name)
        image = read_image(tmp_path / name, 6, 4)
        np.testing.assert_array_equal(image, np.stack([values // 256] * 3, axis=2))

    @pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
    def test_values_without_a_range(self, tmp_path, dtype, mode):
        Image.fromarray(np.ones((4, 6), dtype)).save(tmp_path / "a.tif")
        message = rejection(read_image, tmp_path / "a.tif", 6, 4)
        assert message.startswith(f"{tmp_path / 'a.tif'}: floats or 32 bits a pixel (mode {mode})")

    @pytest.mark.parametrize(("brightest", "is_read"), [(0, True), (1, False), (255, False), (256, True)])
    def test_values_of_8_bits_in_16(self, tmp_path, brightest, is_read):
        Image.fromarray(np.array([[0, brightest]], np.uint16)).save(tmp_path / "a.png")
        if is_read:
            assert read_image(tmp_path / "a.png", 2, 1).max() == brightest // 256
        else:
            assert "16 bits a pixel, but none above 255" in rejection(read_image, tmp_path / "a.png", 2, 1)

    @pytest.mark.parametrize(
        ("brightest", "is_dark"), [((300, 4095), True), ((4096, 300), False), ((300, None), False)]
    )
    def test_values_of_12_bits_in_16(self, tmp_path, brightest, is_dark):
        """They are read nearly black, which a run and the check say of the set; one image may be dark."""
        images = []
        for number, most in enumerate(brightest):
            values = np.array([[0, 99]], np.uint8) if most is None else np.array([[0, most]], np.uint16)
            Image.fromarray(values).save(tmp_path / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
        found = find_dark_images(SimpleNamespace(images=images, entry=SimpleNamespace(image_root=tmp_path)))
        assert [str(one) for one in found] == is_dark * [
            "2 of the first images have 16 bits a pixel, none above 4095 of 65535: they are read nearly black: "
            "id 0 (0.png), 1 (1.png)"
        ]

    def test_exif_turns_the_image_upright(self, tmp_path):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6  # stored lying; upright after a quarter turn clockwise
        path = self.save(tmp_path / "a.jpg", exif=exif)
        upright = read_image(path, 40, 60)
        assert upright.shape == (60, 40, 3)
        assert upright[5, 20].astype(int).sum() > 300  # the left half is on top now
        assert upright[55, 20].astype(int).sum() < 60
        message = rejection(read_image, path, 60, 40)
        assert message.startswith(f"{path}: image is 40 x 60 px, the json says 60 x 40; stored like that, its EXIF tag")
        assert "--exif turned (or stored)" in message
        assert "image is 40 x 60 px, the json says 61 x 40; correct width and height" in rejection(
            read_image, path, 61, 40
        )

    @pytest.mark.parametrize("turn", TURNS)
    def test_a_tag_of_a_wrong_type_does_not_matter(self, tmp_path, turn):
        """The camera's make is a number, which Pillow's exif_transpose cannot write again."""
        entries = struct.pack("<HHII", 0x010F, 5, 1, 38), struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0)
        tags = struct.pack("<H", 2) + b"".join(entries) + struct.pack("<I", 0) + struct.pack("<II", 72, 1)
        path, sound = tmp_path / "odd.jpg", Image.Exif()
        sound[0x0112] = turn
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8))
        pixels.save(path, exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags)
        pixels.save(tmp_path / "sound.jpg", exif=sound)
        with Image.open(tmp_path / "sound.jpg") as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        assert np.array_equal(read_image(path), expected)

    def test_a_tiff_is_not_turned_twice(self, tmp_path):
        """Pillow opens it in its upright size, and takes the tag away when it reads the pixels."""
        pixels, tag = np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8), Image.Exif()
        tag[EXIF_ORIENTATION] = 6
        Image.fromarray(pixels).save(tmp_path / "1.tiff", exif=tag)
        with Image.open(tmp_path / "1.tiff") as opened:
            assert opened.size == (24, 31)
            assert turn_of(opened) == TURNS[1]
        assert np.array_equal(read_image(tmp_path / "1.tiff"), np.rot90(pixels, -1))

    def test_size_mismatch(self, tmp_path):
        path = self.save(tmp_path / "a.jpg")
        message = rejection(read_image, path, 61, 40)
        assert message.startswith(f"{path}: image is 60 x 40 px, the json says 61 x 40")

    @pytest.mark.parametrize("keep", [0, 10, 500])
    def test_truncated_jpeg(self, tmp_path, keep):
        path = self.save(tmp_path / "a.jpg")
        path.write_bytes(path.read_bytes()[:keep])
        message = rejection(read_image, path, 60, 40)
        assert message.startswith(f"{path}: cannot be decoded (")
        assert "fetch the file again" in message

    @pytest.mark.parametrize(
        ("make", "why"), [(lambda _: None, ": image file is missing"), (os.mkfifo, " is a folder, a pipe or a device")]
    )
    def test_no_file(self, tmp_path, make, why):
        make(tmp_path / "a.jpg")
        assert rejection(read_image, tmp_path / "a.jpg", 60, 40).startswith(f"{tmp_path / 'a.jpg'}{why}")


class TestScan:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return cache_folder()

    def counts(self) -> tuple[int, int, int]:
        scan = scan_images(read_toy())
        return scan.read, scan.known, len(scan.faults)

    def test_only_new_and_changed_files_are_read_again(self, coco_factory):
        images = coco_factory().parent / "images"
        assert self.counts() == (4, 0, 0)
        assert self.counts() == (0, 4, 0)
        os.utime(images / "1.jpg", ns=(1, 1))
        assert self.counts() == (1, 3, 0)

    def test_a_corrected_json_is_checked_again(self, coco_factory):
        path = coco_factory()
        assert self.counts() == (4, 0, 0)
        content = json.loads(path.read_text())
        content["images"][3].update(width=50)
        path.write_text(json.dumps(content))
        assert self.counts() == (1, 3, 1)

    def test_faults_are_named_and_not_remembered(self, coco_factory):
        images = coco_factory().parent / "images"
        (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:400])
        (images / "2.jpg").write_text("no image")
        Image.new("RGB", (50, 30)).save(images / "3.jpg")
        for num_read in (4, 3):
            scan = scan_images(read_toy())
            assert (scan.read, len(scan.faults)) == (num_read, 3)
            assert scan.faults[0].startswith(f"id 1, {images / '1.jpg'}: cannot be decoded")
            assert scan.faults[1].startswith(f"id 2, {images / '2.jpg'}: cannot be decoded")
            assert "3.jpg: image is 50 x 30 px, the json says 96 x 64" in scan.faults[2]

    def test_a_missing_file(self, coco_factory):
        path = coco_factory()
        data = read_toy()
        (path.parent / "images" / "1.jpg").unlink()
        assert scan_images(data).faults == [f"id 1, {path.parent / 'images' / '1.jpg'}: image file is missing"]

    def test_turned_images_count_upright(self, coco_factory):
        path = coco_factory().parent / "images" / "1.jpg"
        tag = Image.Exif()
        tag[EXIF_ORIENTATION] = 6
        Image.new("RGB", (64, 96)).save(path, exif=tag)
        assert self.counts() == (4, 0, 0)

    @pytest.mark.parametrize("content", ["", "[1]", "{broken"])
    def test_a_damaged_note_is_written_anew(self, coco_factory, cache, content):
        coco_factory()
        self.counts()
        [note] = cache.iterdir()
        note.write_text(content)
        assert self.counts() == (4, 0, 0)
        assert self.counts() == (0, 4, 0)

    def test_without_a_place_for_notes_all_are_read(self, coco_factory, tmp_path):
        (tmp_path / "cache").write_text("a file in the way")
        coco_factory()
        assert self.counts() == self.counts() == (4, 0, 0)
