"""VOC's XML with classes of one's own, as other tools export it: what becomes a data set, and what is rejected."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_command
from PIL import ExifTags, Image

from scratch_det.data.catalog import catalog_entries, lookup
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.data.voc import make_voc
from scratch_det.errors import DataError

OBJECT = "<object><name>{}</name>{}<bndbox>{}</bndbox></object>"
SIZE = "<size><width>100</width><height>80</height></size>"


def write(
    folder: Path, name: str, *objects: str, images: str = "JPEGImages", xmls: str = "Annotations",
    suffix: str = ".jpg", head: str = SIZE, size: tuple[int, int] = (100, 80), orientation: int = 1,
) -> None:  # fmt: skip
    """An image and its XML; objects are ``"class left top right bottom"`` and what else stands in them."""
    texts = []
    for one in objects:
        label, *corners, rest = (*one.split(" ", 5), "")[:6]
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        texts.append(OBJECT.format(label, rest, "".join(f"<{side}>{value}</{side}>" for side, value in sides)))
    for part in (images, xmls):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size, "grey").save(folder / images / f"{name}{suffix}", exif=exif)
    (folder / xmls / f"{name}.xml").write_text(f"<annotation>{head}{''.join(texts)}</annotation>")


def opened(name: str) -> CocoDataset:
    return read_coco(lookup(name), need_masks=False)


def names(data: CocoDataset) -> list[str]:
    return [image["file_name"] for image in data.images]


class TestLayouts:
    """``make_voc`` of a folder, and the sets that it finds there."""

    def test_vocs_own_with_other_classes(self, datasets_root: Path, capsys: pytest.CaptureFixture) -> None:
        """VOC's name for it stays; an empty <difficult/>, as labelme2voc writes it, is none."""
        folder = datasets_root / "VOC2007"
        write(folder, "a", "raccoon 10 12 40 50 <difficult/>", "fox 1 1 9 9 <difficult>1</difficult>")
        (folder / "ImageSets/Main").mkdir(parents=True)
        (folder / "ImageSets/Main/train.txt").write_text("a\n")
        with pytest.raises(DataError, match=r"not expected: id a \('raccoon'\)(?s:.)*give --classes auto"):
            make_voc(["voc_2007_train"])
        report, classes, _ = make_voc(["voc_2007_train"], classes="auto")
        assert "voc_2007_train: 1 images, 2 objects, 1 of them difficult; " in report
        assert classes == "2 classes: fox, raccoon"
        data = opened("voc_2007_train")
        assert make_voc(["voc_2007_train"], True, "raccoon, fox,raccoon,")[1] == "2 classes: raccoon, fox"
        assert (data.classes, [one["bbox"] for one in data.objects(0)]) == (
            ["fox", "raccoon"], [[9, 11, 31, 39], [0, 0, 9, 9]],
        )  # fmt: skip
        assert [one["ignore"] for one in data.objects(0)] == [0, 1]
        assert not (datasets_root / "catalog.yaml").exists()

    def test_lists_and_subfolders(self, datasets_root: Path) -> None:
        """As CVAT exports: lists of any name and for a class, images with suffix, in subfolders, of any format."""
        folder = datasets_root / "my export"
        for name, suffix in (("site/1", ".png"), ("site/2", ".JPG"), ("3.b", ".bmp")):
            file_name = f"<filename>C:\\data\\{Path(name).name}{suffix}</filename>"
            write(folder, name, "car 1 1 9 9", suffix=suffix, head=file_name + SIZE)
        lists = folder / "ImageSets/Main"
        lists.mkdir(parents=True)
        (lists / "default.txt").write_text("site/1.png\r\n3.b\r\n")
        (lists / "val.txt").write_text("site/2\n\n")
        (lists / "car_val.txt").write_text("site/2  1\n")
        *_, advice = make_voc(["my export"])
        assert names(opened("my_export_default")) == ["site/1.png", "3.b.bmp"]
        assert names(opened("my_export_val")) == ["site/2.JPG"]
        assert "DATASETS.TRAIN \"('my_export_default',)\" DATASETS.TEST \"('my_export_val',)\"" in advice
        assert catalog_entries()["my_export_val"][0] == {
            "json": "my export/instances_val.json", "images": "my export/JPEGImages", "drop_empty_boxes": True,
        }  # fmt: skip

    def test_xml_beside_images(self, datasets_root: Path) -> None:
        """As Roboflow exports: a folder for each split. All splits have the classes of all, in whichever it is."""
        for split, label in (("train", "dog"), ("valid", "cat"), ("test", "dog")):
            write(datasets_root / "rf" / split, "a_jpg.rf.1", f"{label} 1 1 9 9", images="", xmls="")
        *_, advice = make_voc(["rf"])
        assert "('rf_train',)\" DATASETS.TEST \"('rf_valid',)" in advice
        for split in ("train", "valid", "test"):
            data = opened(f"rf_{split}")
            assert (data.classes, names(data)) == (["cat", "dog"], ["a_jpg.rf.1.jpg"])
        (datasets_root / "catalog.yaml").unlink()
        make_voc([str(datasets_root / "rf/train"), str(datasets_root / "rf/valid")])
        assert opened("rf_train").classes == ["cat", "dog"]

    @pytest.mark.parametrize(
        ("xmls", "images"),
        [("Annotations", "images"), ("annotations/xmls", "images"), ("annots", "Images"), ("Annotations", "")],
    )
    def test_without_lists(self, xmls: str, images: str, datasets_root: Path) -> None:
        """As Label Studio and labelImg write: all XML files in Annotations/ are one set."""
        write(datasets_root / "ls", "b", "dog 1 1 9 9", images=images, xmls=xmls)
        write(datasets_root / "ls", "a", images=images, xmls=xmls)
        make_voc(["ls"])
        data = opened("ls")
        assert (names(data), len(data.objects(0)), len(data.objects(1))) == (["a.jpg", "b.jpg"], 0, 1)

    def test_a_run_trains_on_it(self, datasets_root: Path, train: Callable) -> None:
        for split in ("train", "val"):
            write(datasets_root / "my" / split, "a", "dog 10 10 60 60", images="", xmls="")
        make_voc(["my"])
        train("DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)", "MODEL.MASK_ON", False)


class TestImages:
    def test_the_image_of_the_xmls_name_comes_first(self, datasets_root: Path) -> None:
        """A <filename> is often that of another image, or of a time before the images were renamed."""
        folder = datasets_root / "my"
        write(folder, "a", "dog 1 1 9 9", suffix=".png", head=f"<filename>b.jpg</filename>{SIZE}")
        write(folder, "b", "dog 1 1 9 9", head=f"<filename>b</filename>{SIZE}")
        write(folder, "c", "dog 1 1 9 9", head=f"<filename>old.webp</filename>{SIZE}")
        (folder / "JPEGImages/c.jpg").rename(folder / "JPEGImages/old.webp")
        make_voc(["my"])
        assert names(opened("my")) == ["a.png", "b.jpg", "old.webp"]

    @pytest.mark.parametrize("head", ["", "<size/>", "<size><width>0</width><height>0</height></size>"])
    def test_the_size_is_read_from_the_file(self, head: str, datasets_root: Path) -> None:
        write(datasets_root / "my", "a", "dog 1 1 9 9", head=head)
        make_voc(["my"])
        assert (opened("my").images[0]["width"], opened("my").images[0]["height"]) == (100, 80)

    @pytest.mark.parametrize("head", ["", SIZE])
    def test_a_photograph_that_its_exif_tag_turns(self, head: str, datasets_root: Path) -> None:
        write(datasets_root / "my", "a", "dog 1 1 9 79", head=head, size=(80, 100), orientation=6)
        make_voc(["my"])
        assert (opened("my").images[0]["width"], opened("my").images[0]["height"]) == (100, 80)

    def test_pixels_from_0(self, datasets_root: Path) -> None:
        """VOC counts from 1; where a corner is 0, corners are what they say."""
        write(datasets_root / "my", "a", "dog 0 5 10.5 80", "dog 7 7 7 9")
        make_voc(["my"])
        first, second = opened("my").objects(0)
        assert (first["bbox"], second["bbox"]) == ([0, 5, 10.5, 75], [7, 7, 0, 2])
        assert len(opened("my").training_objects(0)) == 1


class TestRejections:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<annotation>\n<size>\n</annotation>", r"a \(.*Annotations/a\.xml:3: mismatched tag"),
            ("", r"broken XML files: id a \(.*a\.xml:1: no element found"),
            ("<annotations><image/></annotations>", r"id a \(<annotations>, expected <annotation>\)"),
            (f"<annotation>{OBJECT.format('', '', '')}</annotation>", r"not expected: id a \(''\)"),
            (f"<annotation>{OBJECT.format('dog', '', '')}</annotation>", "object/bndbox/xmin: None"),
            ("<annotation/>", "my/Annotations: none of the XML files that the sets list has an object"),
        ],
    )
    def test_xml(self, text: str, message: str, datasets_root: Path) -> None:
        write(datasets_root / "my", "a")
        (datasets_root / "my/Annotations/a.xml").write_text(text)
        with pytest.raises(DataError, match=message):
            make_voc(["my"])
        assert not list(datasets_root.glob("**/*.json"))

    def test_what_a_run_would_say(self, datasets_root: Path, capsys: pytest.CaptureFixture) -> None:
        write(datasets_root / "my", "a", "dog 1 1 9 9", "dog 90 20 120 30")
        make_voc(["my"])
        assert "my: 1 annotations with a box that sticks out of its image" in capsys.readouterr().out
        write(datasets_root / "my", "a", "dog 1 1 9 9", "dog 200 20 220 30")
        with pytest.raises(DataError, match="1 annotations with a box that lies outside its image: id 2"):
            make_voc(["my"], force=True)

    @pytest.mark.parametrize("file", ["Annotations/a.xml", "JPEGImages/a.jpg"])
    def test_a_pipe_is_no_file(self, file: str, datasets_root: Path) -> None:
        write(datasets_root / "my", "a", "dog 1 1 9 9")
        (datasets_root / "my" / file).unlink()
        os.mkfifo(datasets_root / "my" / file)
        with pytest.raises(DataError, match=f"images without a file in {Path(file).parent}: id a"):
            make_voc(["my"])

    def test_names(self, datasets_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        """Classes that were not named, an empty folder, a name that the catalog has; nothing is written."""
        write(datasets_root / "my", "a", "dog 1 1 9 9", "dgo 1 1 9 9")
        (datasets_root / "empty/more").mkdir(parents=True)
        (datasets_root / "catalog.yaml").write_text("my: {json: other.json, images: other}\n")
        for arguments, message in (
            (
                ["my", "--classes", "dog, cat"],
                "id a ('dgo'; did you mean 'dog'?)\n  nothing was written; correct these",
            ),
            (["empty"], "/empty has no XML files; expected a folder with Annotations/"),
            (["my/exprot"], "there is no folder 'my/exprot', neither here nor in "),
            (["my"], "catalog.yaml: 'my' is {'json': 'other.json', 'images': 'other'} already"),
        ):
            monkeypatch.setattr("sys.argv", ["prepare_voc.py", *arguments])
            with pytest.raises(SystemExit, match="2"):
                load_command("data_voc").main()
            assert message in capsys.readouterr().err
        assert not list(datasets_root.glob("**/*.json"))
